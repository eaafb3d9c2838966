"""Names of precisions, for every ``precision`` argument."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any

import torch

#: dtype of the factors of matmuls.
PRECISIONS: Mapping[str, torch.dtype] = MappingProxyType(
    {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
)


def autocast(precision: str, device_type: str) -> AbstractContextManager[Any]:
    """Autocast to the 16-bit dtype of ``precision``; for other precisions, a context that does nothing.

    Args:
        precision: a name; names outside ``PRECISIONS`` count as fp32.
        device_type: "cpu", "cuda", ...
    """
    dtype = PRECISIONS.get(precision, torch.float32)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device_type, dtype)
