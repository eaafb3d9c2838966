"""Which devices the CUDA kernels run on."""

from __future__ import annotations

import re
from functools import cache

import torch
from torch import Tensor

from tgdp_fast.runtime import native

_LEAST = (8, 0)  # asynchronous copies and matmuls of bfloat16


def unsupported_device(tensor: Tensor) -> str | None:
    """Why kernels cannot take tensors on the GPU of this one, or None."""
    properties = torch.cuda.get_device_properties(tensor.device)
    capability = properties.major, properties.minor
    here = "{}.{}".format(*capability)
    if capability < _LEAST:
        return f"it needs compute capability 8.0 or newer, and {tensor.device} has {here}"
    built = native.CUDA_ARCHITECTURES
    if built and not any(_runs_on(architecture, capability) for architecture in built):
        return (
            f"it was built for compute capability {', '.join(built)}, and {tensor.device} has {here}; run "
            f"`TORCH_CUDA_ARCH_LIST={here} {native.build_command()}`"
        )
    return None


@cache
def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture of TORCH_CUDA_ARCH_LIST, such as 9.0a or 8.6+PTX, runs on a card.

    Machine code runs on cards of the same major version that are not older, and with an "a" on that card alone; PTX on
    all that are not older.
    """
    found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", architecture)
    if found is None:  # a name such as Hopper
        return True
    built = int(found[1]), int(found[2])
    if found[3] == "a":
        return built == capability
    return built <= capability and (found[4] is not None or built[0] == capability[0])
