"""Launches of kernels, and records of launches on tensors without data, from which tests compile ahead of time.

Every kernel module lists the specialisations that it ships as a function ``shipped()``; tests compile each of them for
every architecture without a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Names of the dtypes in signatures.
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_ELEMENTS = TYPES | {torch.int64: "i64"}


class Tile(NamedTuple):
    """What one program computes, the depth of the slices of its matmuls, and its launch options."""

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


@dataclass(frozen=True)
class Compilation:
    """One specialisation of a kernel.

    Attributes:
        name: unique, "kernel/variant".
        kernel: the ``triton.jit`` function.
        signature: type of every argument, "*fp32", "*i64", "fp32", "i64", or "constexpr"; tuples of them for tuples.
        constants: values of the "constexpr" ones by place: the number of the argument, then the one inside a tuple.
        num_warps, num_stages: launch options.
        tensor_cores: whether matrix instructions must appear.
        divisible: places of the pointers, strides and sizes that are multiples of 16 in every call of this
            specialisation.
    """

    name: str
    kernel: Any
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    num_warps: int
    num_stages: int
    tensor_cores: bool
    divisible: tuple[tuple[int, ...], ...] = ()


#: The list that launches are added to instead of run, in :func:`recorded`.
_recording: list[Compilation] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, tile: Tile | Block, **constants: Any) -> None:
    """Launch, unless there is nothing to do."""
    if _recording is not None:
        _recording.append(_compilation(kernel, arguments, constants, tile))
    elif min(grid) > 0:
        # Triton's default for fused multiply-adds depends on its version.
        kernel[grid](
            *arguments, **constants, num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True
        )


def alignment(*numbers: int) -> int:
    """The largest power of two, up to 16, that divides all numbers: how many elements an access may take at once.

    Triton knows of an argument only whether it is a multiple of 16; kernels take such numbers in units of this.
    """
    return math.gcd(16, *numbers)


def recorded(calls: dict[str, Callable[[], object]]) -> list[Compilation]:
    """The launches of the calls, on tensors without data: each specialisation once.

    They are named "kernel/call", with "/number" if a call launches several.
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


def _compilation(kernel: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], tile: Tile | Block) -> Compilation:
    """One launch, specialised as Triton does it: ones are constants, and multiples of 16 are known to be such."""
    constants: dict[tuple[int, ...], Any] = {}
    divisible: list[tuple[int, ...]] = []
    tensors: list[Tensor] = []

    def specialised(argument: Any, place: tuple[int, ...], fixed: bool) -> Any:
        if isinstance(argument, tuple):
            types = [specialised(item, (*place, i), fixed) for i, item in enumerate(argument)]
            return type(argument)(*types) if hasattr(argument, "_fields") else tuple(types)
        if isinstance(argument, Tensor):
            tensors.append(argument)
            divisible.append(place)
            return "*" + _ELEMENTS[argument.dtype]
        if isinstance(argument, float):
            return "fp32"
        if argument is None or (argument == 1 and not fixed):
            constants[place] = argument
            return "constexpr"
        divisible.extend([place] * (argument % 16 == 0 and not fixed))
        return "i32" if -(2**31) <= argument < 2**31 else "i64"

    signature = {}
    for i, parameter in enumerate(kernel.params):
        if parameter.name in keywords:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = keywords[parameter.name]
        else:
            signature[parameter.name] = specialised(arguments[i], (i,), parameter.do_not_specialize)
    precision, matmul = keywords.get("PRECISION", "ieee"), "DEPTH" in keywords or "PRECISION" in keywords
    return Compilation(
        name=kernel.__name__.removesuffix("_kernel"),
        kernel=kernel,
        signature=signature,
        constants=constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        tensor_cores=matmul and (tensors[0].dtype != torch.float32 or not precision.startswith("ieee")),
        divisible=tuple(divisible),
    )
