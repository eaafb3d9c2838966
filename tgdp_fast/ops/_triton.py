"""Whether Triton kernels can run here. The kernels themselves are loaded by the operators on their first call."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

#: Triton runs kernels as Python on CPU tensors: for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _missing() -> str | None:
    if not (Path(__file__).parent.parent / "kernels").is_dir():
        return (
            "there are no Triton kernels here: tgdp_fast/kernels is no folder, as in a checkout without links; "
            "run `git config core.symlinks true && git checkout -- tgdp_fast/kernels`, or install a wheel"
        )
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; run `pip install triton`"
    if not INTERPRETED and not torch.cuda.is_available():
        return "Triton kernels need a GPU and none is visible (TRITON_INTERPRET=1 runs them on the CPU, slowly)"
    return None


#: The device type of the tensors that kernels serve here.
DEVICE_TYPE = "cpu" if INTERPRETED else "cuda"

#: None if kernels can run, else why not and what to do.
MISSING = _missing()


def unsupported_device(tensor: Tensor) -> str | None:
    """Why a kernel cannot take tensors on the device of this one, or None."""
    if tensor.device.type == DEVICE_TYPE:
        return None
    runs_on = "CPU tensors, under TRITON_INTERPRET=1" if INTERPRETED else "tensors on a GPU"
    return f"it takes {runs_on}, and the inputs are on {tensor.device.type}"


@overload
def readable(tensor: Tensor) -> Tensor: ...
@overload
def readable(tensor: None) -> None: ...
def readable(tensor: Tensor | None) -> Tensor | None:
    """The tensor as a kernel reads it: contiguous, and float32 if it is float64."""
    if tensor is None:
        return None
    return (tensor.float() if tensor.dtype == torch.float64 else tensor).contiguous()


def define(name: str, schema: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register ``torch.ops.tgdp_fast.NAME``.

    Args:
        name: of the operator.
        schema: its arguments and results.
        launch: takes the arguments and returns the results. Triton launches on the current device, so it must make
            that of the tensors current.
        fake: returns the results without values.

    Nothing is registered if kernels cannot run.
    """
    if MISSING is None:
        torch.library.define(f"tgdp_fast::{name}", schema)
        torch.library.impl(f"tgdp_fast::{name}", DEVICE_TYPE, launch)
        torch.library.register_fake(f"tgdp_fast::{name}", fake)
