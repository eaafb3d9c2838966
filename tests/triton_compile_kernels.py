"""Kernels with known properties, for the test of what is read from compiled kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from tgdp_fast.kernels.launching import Compilation


@triton.jit
def _product(output, a, b, size: tl.constexpr):
    rows = tl.arange(0, size)
    offsets = rows[:, None] * size + rows[None, :]
    total = tl.dot(tl.load(a + offsets), tl.load(b + offsets))
    tl.store(output + offsets, total)


@triton.jit
def _spilling(output, a, size: tl.constexpr):
    # 512 numbers of each thread live at once.
    lanes = tl.arange(0, size)
    values = tl.load(a + lanes)
    total = tl.sum(values)
    tl.store(output + lanes, values / total)


@triton.jit
def _widened(output, a, size: tl.constexpr):
    lanes = tl.arange(0, size)
    tl.store(output + lanes, tl.load(a + lanes).to(tl.float64) * 1.1)


def product() -> Compilation:
    """A product of 64 x 64 matrices."""
    return _compilation(_product, {"output": "*fp32", "a": "*fp16", "b": "*fp16"}, 64, 4)


def spilling() -> Compilation:
    """More numbers than registers."""
    return _compilation(_spilling, {"output": "*fp32", "a": "*fp32"}, 1 << 14, 1)


def widened() -> Compilation:
    """Arithmetic in float64."""
    return _compilation(_widened, {"output": "*fp32", "a": "*fp32"}, 128, 1)


def _compilation(kernel, pointers: dict[str, str], size: int, num_warps: int) -> Compilation:
    return Compilation(
        name=kernel.__name__,
        kernel=kernel,
        signature=pointers | {"size": "constexpr"},
        constants={(len(pointers),): size},
        num_warps=num_warps,
        num_stages=1,
        tensor_cores=False,
        divisible=tuple((i,) for i in range(len(pointers))),
    )
