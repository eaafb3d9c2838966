"""What is compiled ahead of time: every kernel module lists its shipped specialisations as a function ``shipped()``.

Tests compile each for every architecture without a GPU, and the static report predicts its time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Compilation:
    """One specialisation of a kernel, and one problem that it is launched for.

    Attributes:
        name: unique, "kernel/variant".
        kernel: the ``triton.jit`` function.
        signature: type of every argument, "*fp32", "*i64", "fp32", "i64", or "constexpr".
        constants: values of the constexpr arguments.
        num_warps, num_stages: launch options.
        tensor_cores: whether matrix instructions must appear.
        problem: what is launched, for people: "1e8 elements".
        programs: program instances of that launch.
        bytes, flops: what it moves to and from memory and computes, at least.
        divisible: arguments (pointers, strides, sizes) that are multiples of 16 in every call of this specialisation.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    tensor_cores: bool
    problem: str
    programs: int
    bytes: float
    flops: float
    divisible: tuple[str, ...] = field(default=())
