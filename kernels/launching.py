"""Launching kernels, or noting what would be launched."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tgdp_fast.kernels.compilation import Compilation

#: Names of the dtypes in signatures.
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Tile(NamedTuple):
    """What one program computes, how deep the slices of its products are, and its launch options."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


#: Where launches are noted instead of run, by :func:`recorded`.
_recording: list[Compilation] | None = None


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, flops: float, tile: Tile | None = None, **constants: Any
) -> None:
    """Launch, unless there is nothing to do. ``flops`` is for the record."""
    options = {} if tile is None else {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if _recording is not None:
        _recording.append(_compilation(kernel, grid, arguments, constants, flops, options))
    elif min(grid) > 0:
        # Triton's default for fused multiply-adds depends on its version.
        kernel[grid](*arguments, **constants, **options, enable_fp_fusion=True)


def recorded(calls: dict[str, Callable[[], object]]) -> list[Compilation]:
    """What the calls, on tensors without data, would launch: each specialisation once, named "kernel/call/number"."""
    global _recording
    found: dict[str, Compilation] = {}
    for name, call in calls.items():
        _recording = []
        try:
            call()
            for i, item in enumerate(_recording):
                key = str((item.name, item.signature, item.constants, item.divisible))
                found.setdefault(key, replace(item, name=f"{item.name}/{name}/{i}"))
        finally:
            _recording = None
    return list(found.values())


def _compilation(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    flops: float,
    options: dict[str, int],
) -> Compilation:
    """One launch, specialised as Triton does it: ones are constants, and multiples of 16 are known to be such."""
    names = list(inspect.signature(kernel.fn).parameters)
    signature, fixed, divisible = {}, dict(constants), []
    tensors = {id(argument): argument for argument in arguments if isinstance(argument, Tensor)}
    for name, argument in zip(names, arguments, strict=False):
        if isinstance(argument, Tensor):
            signature[name] = "*" + TYPES[argument.dtype]
            divisible.append(name)
        elif argument == 1:
            signature[name] = "constexpr"
            fixed[name] = 1
        else:
            signature[name] = "i32" if argument < 2**31 else "i64"
            divisible += [name] * (argument % 16 == 0)
    signature |= dict.fromkeys(constants, "constexpr")
    first = arguments[0]
    shape = " x ".join(str(list(tensor.shape)) for tensor in arguments[:2])
    return Compilation(
        name=kernel.__name__.removesuffix("_kernel"),
        kernel=kernel,
        signature={name: signature[name] for name in names},
        constants=fixed,
        num_warps=options.get("num_warps", 4),
        num_stages=options.get("num_stages", 3),
        tensor_cores="PRECISION" in constants and first.dtype != torch.float32,
        problem=f"{TYPES[first.dtype]} {shape}",
        programs=math.prod(grid),
        bytes=float(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())),
        flops=float(flops),
        divisible=tuple(divisible),
    )
