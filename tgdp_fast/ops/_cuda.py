"""Which devices the CUDA kernels run on."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = (8, 0)  # asynchronous copies and matmuls of bfloat16


def unsupported_device(tensor: Tensor) -> str | None:
    """Why kernels cannot take tensors on the GPU of this one, or None."""
    properties = torch.cuda.get_device_properties(tensor.device)
    if (properties.major, properties.minor) >= _LEAST:
        return None
    return f"it needs compute capability 8.0 or newer, and {tensor.device} has {properties.major}.{properties.minor}"
