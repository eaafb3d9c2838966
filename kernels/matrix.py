"""Matrix products, sums over the batch and SiLU, as every kernel of a perceptron uses them.

Products accumulate in float32. Every operand has two strides, so that transposed factors need no copy, and 64-bit
offsets. Nothing here uses atomics: a result depends on the shapes alone and repeats bit by bit.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tgdp_fast.kernels.compilation import Compilation

# The interpreter multiplies bfloat16 numbers as integers and rounds towards zero; there, both are done in float32.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

#: Names of the dtypes in signatures.
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Tile(NamedTuple):
    """What one program computes, how deep the slices of its products are, and its launch options."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


@triton.jit
def narrow(value, DTYPE: tl.constexpr):  # noqa: N803
    """float32 rounded to the nearest number of DTYPE, ties to even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = value.to(tl.uint32, bitcast=True)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        value = value.to(DTYPE)
    return value


@triton.jit
def multiply_add(left, right, total, PRECISION: tl.constexpr):  # noqa: N803
    """total + left right, in float32."""
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def accumulate(
    total,
    left,
    left_row_stride,
    left_column_stride,
    right,
    right_row_stride,
    right_column_stride,
    rows,
    row_mask,
    columns,
    column_mask,
    depth,
    DEPTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """total + left[rows, :depth] right[:depth, columns], in slices of DEPTH; rows and columns are int64."""
    inner = tl.arange(0, DEPTH)
    wide_inner = inner.to(tl.int64)
    left += rows[:, None] * left_row_stride + wide_inner[None, :] * left_column_stride
    right += wide_inner[:, None] * right_row_stride + columns[None, :] * right_column_stride
    left_step = tl.full([], DEPTH, tl.int64) * left_column_stride
    right_step = tl.full([], DEPTH, tl.int64) * right_row_stride
    for start in range(0, depth, DEPTH):
        inside = inner < depth - start
        left_slice = tl.load(left, mask=row_mask[:, None] & inside[None, :], other=0.0)
        right_slice = tl.load(right, mask=inside[:, None] & column_mask[None, :], other=0.0)
        total = multiply_add(left_slice, right_slice, total, PRECISION)
        left += left_step
        right += right_step
    return total


@triton.jit
def accumulate_pair(
    total,
    second_total,
    left,
    second_left,
    left_row_stride,
    left_column_stride,
    right,
    right_row_stride,
    right_column_stride,
    rows,
    row_mask,
    columns,
    column_mask,
    depth,
    DEPTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """:func:`accumulate` for two left factors of equal strides, reading the right one once."""
    inner = tl.arange(0, DEPTH)
    wide_inner = inner.to(tl.int64)
    offsets = rows[:, None] * left_row_stride + wide_inner[None, :] * left_column_stride
    left += offsets
    second_left += offsets
    right += wide_inner[:, None] * right_row_stride + columns[None, :] * right_column_stride
    left_step = tl.full([], DEPTH, tl.int64) * left_column_stride
    right_step = tl.full([], DEPTH, tl.int64) * right_row_stride
    for start in range(0, depth, DEPTH):
        inside = inner < depth - start
        left_mask = row_mask[:, None] & inside[None, :]
        right_slice = tl.load(right, mask=inside[:, None] & column_mask[None, :], other=0.0)
        total = multiply_add(tl.load(left, mask=left_mask, other=0.0), right_slice, total, PRECISION)
        second_total = multiply_add(
            tl.load(second_left, mask=left_mask, other=0.0), right_slice, second_total, PRECISION
        )
        left += left_step
        second_left += left_step
        right += right_step
    return total, second_total


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)) of float32; exact 0 and 1 far out."""
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def silu_slope(z, s):
    """First derivative of silu at z, with s = sigmoid(z)."""
    return s * (1.0 + z * (1.0 - s))


@triton.jit
def silu_curvature(z, s):
    """Second derivative of silu at z, with s = sigmoid(z)."""
    return s * (1.0 - s) * (2.0 + z * (1.0 - 2.0 * s))


@triton.jit
def block_of(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # noqa: N803
    """Row block of this program, its rows and columns as int64, and which of them exist.

    Programs of one row block are neighbours, so that all but the first find its left factor in the level-2 cache.
    """
    across = tl.maximum(tl.cdiv(columns, COLUMNS), 1)
    program = tl.program_id(0)
    block = program // across
    row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (program % across) * COLUMNS + tl.arange(0, COLUMNS)
    return block, row, row < rows, column.to(tl.int64), column < columns


@triton.jit
def weight_gradient_kernel(
    left,
    right,
    second_left,
    second_right,
    output,
    batch,
    rows,
    columns,
    share,
    left_batch_stride,
    left_column_stride,
    right_batch_stride,
    right_column_stride,
    second_right_batch_stride,
    second_right_column_stride,
    PAIR: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """output[part] = left^T right (+ second_left^T second_right with PAIR), summed over the part's share of the batch.

    left [batch, rows] and right [batch, columns]; output [parts, rows, columns], contiguous. second_left has the
    strides of left. Twin: ``zbar.t() @ a + delta.t() @ u`` of the backward references. 2 B rows columns FLOPs per
    pair; bytes: both factors and the output once, and again for every further block of the other side.
    """
    _, row, row_mask, column, column_mask = block_of(rows, columns, ROWS, COLUMNS)
    part = tl.program_id(1).to(tl.int64)
    start = part * share
    depth = tl.minimum(batch - start, share).to(tl.int32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    total = accumulate(
        total,
        left + start * left_batch_stride,
        left_column_stride,
        left_batch_stride,
        right + start * right_batch_stride,
        right_batch_stride,
        right_column_stride,
        row,
        row_mask,
        column,
        column_mask,
        depth,
        DEPTH,
        PRECISION,
    )
    if PAIR:
        total = accumulate(
            total,
            second_left + start * left_batch_stride,
            left_column_stride,
            left_batch_stride,
            second_right + start * second_right_batch_stride,
            second_right_batch_stride,
            second_right_column_stride,
            row,
            row_mask,
            column,
            column_mask,
            depth,
            DEPTH,
            PRECISION,
        )
    output += (part * rows + row[:, None]) * columns + column[None, :]
    tl.store(output, narrow(total, output.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def column_sum_kernel(
    source,
    output,
    rows,
    columns,
    row_stride,
    column_stride,
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    """output [columns] = sum of source [rows, columns] over its rows, in float32. Twin: ``source.sum(0)``.

    Bytes: the source and the output once; rows * columns FLOPs.
    """
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    column_mask = column < columns
    inner = tl.arange(0, ROWS)
    source += inner.to(tl.int64)[:, None] * row_stride + column[None, :] * column_stride
    step = tl.full([], ROWS, tl.int64) * row_stride
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rows, ROWS):
        total += tl.load(source, mask=(inner < rows - start)[:, None] & column_mask[None, :], other=0.0).to(tl.float32)
        source += step
    tl.store(output + column, narrow(tl.sum(total, 0), output.dtype.element_ty), mask=column_mask)


def precision_of(dtype: torch.dtype, split: bool = False) -> str:
    """How products of float32 are taken: as such, or with ``split`` as three of bfloat16 (relative error 2^-16)."""
    return "bf16x3" if split and dtype == torch.float32 and not INTERPRETED.value else "ieee"


def blocks(rows: int, columns: int, tile: Tile) -> int:
    """Programs of a launch over [rows, columns]; one column block at least, for what only its programs do."""
    return triton.cdiv(rows, tile.rows) * max(triton.cdiv(columns, tile.columns), 1)


def power_of_two(size: int, least: int, most: int) -> int:
    """The smallest power of two that holds ``size``, within limits that are powers of two."""
    return min(max(triton.next_power_of_2(size), least), most)


def layer_tile(rows: int, columns: int, depth: int, dtype: torch.dtype, *, crowded: bool = False) -> Tile:
    """Tile for a product [rows, depth] [depth, columns]; ``crowded`` if its pointwise end takes many registers.

    The same for every card: few rows take narrow tiles, so that many programs share the weights; many rows the
    largest tile whose slices, in ``num_stages`` copies, leave room in 99 KB of shared memory.
    """
    if dtype == torch.float32:
        wide = 32 if crowded else 64
        if rows <= 16:
            return Tile(16, power_of_two(columns, 16, 32), power_of_two(depth, 16, 64), 4, 3)
        # Below about two million results more programs are worth more than larger tiles.
        few = rows * columns < 128 * 128 * 128
        return Tile(32 if few else 128, power_of_two(columns, 16, wide), 16, 4 if few else 8, 3)
    if rows <= 16:
        return Tile(16, power_of_two(columns, 16, 32), power_of_two(depth, 16, 128), 4, 3)
    if rows * columns < 128 * 128 * 128 or columns <= 32:
        return Tile(64, power_of_two(columns, 16, 64), power_of_two(depth, 16, 64), 4, 3)
    wide = 64 if crowded else 128
    return Tile(128, power_of_two(columns, 16, wide), power_of_two(depth, 16, 32), 8, 4)


def gradient_tile(rows: int, columns: int, batch: int, dtype: torch.dtype) -> Tile:
    """Tile for a gradient [rows, columns] of a weight, a product whose depth is the batch."""
    if dtype == torch.float32:
        return Tile(power_of_two(rows, 16, 64), power_of_two(columns, 16, 64), 16, 4, 3)
    if min(rows, columns) <= 64 or batch <= 256:
        return Tile(power_of_two(rows, 16, 64), power_of_two(columns, 16, 64), power_of_two(batch, 16, 64), 4, 3)
    return Tile(128, 128, 32, 8, 4)


#: Programs that keep a large card busy, and rows of the batch below which dividing it further gains nothing.
_ENOUGH_PROGRAMS, _LEAST_SHARE = 256, 512


def batch_parts(batch: int, tiles: int) -> int:
    """Into how many parts a weight gradient divides the batch: by the shapes alone, so that sums repeat."""
    return max(min(triton.cdiv(_ENOUGH_PROGRAMS, max(tiles, 1)), triton.cdiv(batch, _LEAST_SHARE)), 1)


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


def column_sum(source: Tensor, dtype: torch.dtype) -> Tensor:
    """[C] in ``dtype``: the sum of [R, C] over its rows."""
    rows, columns = source.shape
    output = source.new_empty(columns, dtype=dtype)
    across = power_of_two(columns, 1, 64)
    down = power_of_two(rows, 1, 4096 // across)
    launch(
        column_sum_kernel,
        (triton.cdiv(columns, across),),
        source,
        output,
        rows,
        columns,
        *source.stride(),
        flops=rows * columns,
        tile=Tile(down, across, 1, 8, 3),
        ROWS=down,
        COLUMNS=across,
    )
    return output


def weight_gradient(
    left: Tensor, right: Tensor, second: tuple[Tensor, Tensor] | None = None, *, precision: str = "ieee"
) -> Tensor:
    """left^T right (+ second[0]^T second[1]): [B, N] and [B, K] to [N, K], in the dtype of left.

    second[0] must have the strides of left. Large batches are divided among programs, whose float32 results a second
    launch adds.
    """
    (batch, rows), columns = left.shape, right.shape[1]
    tile = gradient_tile(rows, columns, batch, left.dtype)
    tiles = blocks(rows, columns, tile)
    parts = batch_parts(batch, tiles)
    # Whole slices per part, so that only the last one has a remainder.
    share = triton.cdiv(triton.cdiv(batch, parts), tile.depth) * tile.depth
    output = left.new_empty(parts, rows, columns, dtype=torch.float32 if parts > 1 else left.dtype)
    second_left, second_right = (left, right) if second is None else second
    launch(
        weight_gradient_kernel,
        (tiles, parts),
        left,
        right,
        second_left,
        second_right,
        output,
        batch,
        rows,
        columns,
        share,
        *left.stride(),
        *right.stride(),
        *second_right.stride(),
        flops=2 * batch * rows * columns * (1 if second is None else 2),
        tile=tile,
        PAIR=second is not None,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        PRECISION=precision,
    )
    if parts == 1:
        return output[0]
    return column_sum(output.view(parts, rows * columns), left.dtype).view(rows, columns)
