"""Launching kernels, or noting what would be launched."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tgdp_fast.kernels.compilation import Compilation

#: Names of the dtypes in signatures.
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_ELEMENTS = TYPES | {torch.int64: "i64"}


class Tile(NamedTuple):
    """What one program computes, how deep the slices of its products are, and its launch options."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


class Block(NamedTuple):
    """How many elements one program computes, and its launch options."""

    elements: int
    num_warps: int
    num_stages: int = 3


#: Where launches are noted instead of run, by :func:`recorded`.
_recording: list[Compilation] | None = None


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, flops: float, tile: Tile | Block, **constants: Any
) -> None:
    """Launch, unless there is nothing to do. ``flops`` is for the record."""
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if _recording is not None:
        _recording.append(_compilation(kernel, grid, arguments, constants, flops, options))
    elif min(grid) > 0:
        # Triton's default for fused multiply-adds depends on its version.
        kernel[grid](*arguments, **constants, **options, enable_fp_fusion=True)


def alignment(*numbers: int) -> int:
    """The largest power of two, up to 16, that divides all numbers: how many elements an access may take at once.

    Triton knows of an argument only whether it is a multiple of 16; kernels take such numbers in units of this.
    """
    return math.gcd(16, *numbers)


def recorded(calls: dict[str, Callable[[], object]]) -> list[Compilation]:
    """What the calls, on tensors without data, would launch: each specialisation once.

    They are named "kernel/call", with "/number" where a call launches several.
    """
    global _recording
    found: dict[str, Compilation] = {}
    for name, call in calls.items():
        _recording = []
        try:
            call()
            launched = _recording
        finally:
            _recording = None
        for i, item in enumerate(launched):
            key = str((item.name, item.signature, item.constants, item.divisible, item.num_warps, item.num_stages))
            number = f"/{i}" if len(launched) > 1 else ""
            found.setdefault(key, replace(item, name=f"{item.name}/{name}{number}"))
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
    signature, fixed, divisible = {}, dict(constants), []
    for parameter, argument in zip(kernel.params, arguments, strict=False):
        name = parameter.name
        if isinstance(argument, Tensor):
            signature[name] = "*" + _ELEMENTS[argument.dtype]
            divisible.append(name)
        elif isinstance(argument, float):
            signature[name] = "fp32"
        elif argument is None or (argument == 1 and not parameter.do_not_specialize):
            signature[name] = "constexpr"
            fixed[name] = argument
        else:
            signature[name] = "i32" if -(2**31) <= argument < 2**31 else "i64"
            divisible += [name] * (argument % 16 == 0 and not parameter.do_not_specialize)
    signature |= dict.fromkeys(constants, "constexpr")
    tensors = {id(argument): argument for argument in arguments if isinstance(argument, Tensor)}
    first = arguments[0]
    product = "PRECISION" in constants
    shape = " x ".join(str(list(tensor.shape)) for tensor in arguments[: 1 + product])
    return Compilation(
        name=kernel.__name__.removesuffix("_kernel"),
        kernel=kernel,
        signature={name: signature[name] for name in kernel.arg_names},
        constants=fixed,
        num_warps=options["num_warps"],
        num_stages=options["num_stages"],
        tensor_cores=product and (first.dtype != torch.float32 or not constants["PRECISION"].startswith("ieee")),
        problem=f"{TYPES[first.dtype]} {shape}",
        programs=math.prod(grid),
        bytes=float(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())),
        flops=float(flops),
        divisible=tuple(divisible),
    )
