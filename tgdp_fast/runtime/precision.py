"""The precision of a call, and autograd in it, independent of what the caller has set around it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import torch

#: dtype of the factors of matmuls.
PRECISIONS: Mapping[str, torch.dtype] = MappingProxyType(
    {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
)


def autocast(precision: str, device_type: str) -> AbstractContextManager[Any]:
    """Autocast to the 16-bit dtype of ``precision``; for other precisions no autocast, also if the caller has one.

    Args:
        precision: a name; names outside ``PRECISIONS`` count as fp32.
        device_type: "cpu", "cuda", ...
    """
    dtype = PRECISIONS.get(precision, torch.float32)
    if dtype != torch.float32:
        return torch.autocast(device_type, dtype)
    on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else nullcontext()


@contextmanager
def ordinary_autograd() -> Iterator[None]:
    """Gradients on, no inference mode and no autocast: for work with gradients of its own, wherever it is called."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device_type in ("cpu", "cuda", "mps", "xpu"):
            stack.enter_context(autocast("fp32", device_type))
        yield
