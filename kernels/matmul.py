"""What the kernels of an MLP share: matmuls, biases, SiLU, sums over the batch, and tiles.

Matmuls accumulate in float32. Every factor has two strides, so that transposed factors need no copy, and 64-bit
offsets. Nothing here uses atomics: a result depends on the shapes and the tile alone and repeats bit by bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tgdp_fast.kernels.launching import Tile, launch

# The interpreter multiplies bfloat16 numbers as integers and rounds towards zero; there, both are done in float32.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


class Matrix(NamedTuple):
    """A tensor of two dimensions as a kernel takes it; ``row_stride`` None is one row for all."""

    pointer: Any
    row_stride: Any
    column_stride: Any


class Place(NamedTuple):
    """Rows and columns of a program's tile, int64, which of them exist, and the numbers of its blocks."""

    row: Any
    row_mask: Any
    column: Any
    column_mask: Any
    row_block: Any
    column_block: Any


@triton.jit
def narrow(value, DTYPE: tl.constexpr):
    """float32 rounded to the nearest number of DTYPE, ties to even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = value.to(tl.uint32, bitcast=True)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        value = value.to(DTYPE)
    return value


@triton.jit
def saturated(value, DTYPE: tl.constexpr):
    """float32 rounded likewise, but to no infinity of float16; keeps NaN."""
    if tl.float16 == DTYPE:
        value = tl.where(value > 65504.0, 65504.0, value)
        value = tl.where(value < -65504.0, -65504.0, value)
    return narrow(value, DTYPE)


@triton.jit
def multiply_add(left, right, total, PRECISION: tl.constexpr = "ieee"):
    """total + left right, in float32."""
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def transposed(matrix):
    """The same numbers with rows and columns exchanged."""
    return Matrix(matrix.pointer, matrix.column_stride, matrix.row_stride)


@triton.jit
def accumulate(total, left, right, place, depth, DEPTH: tl.constexpr):
    """total + left[rows, :depth] right[:depth, columns] at ``place``, in slices of DEPTH; left and right: Matrix."""
    inner = tl.arange(0, DEPTH)
    wide = inner.to(tl.int64)
    left_pointer = left.pointer + (place.row[:, None] * left.row_stride + wide[None, :] * left.column_stride)
    right_pointer = right.pointer + (wide[:, None] * right.row_stride + place.column[None, :] * right.column_stride)
    left_step = tl.full([], DEPTH, tl.int64) * left.column_stride
    right_step = tl.full([], DEPTH, tl.int64) * right.row_stride
    for start in range(0, depth, DEPTH):
        inside = inner < depth - start
        left_slice = tl.load(left_pointer, mask=place.row_mask[:, None] & inside[None, :], other=0.0)
        right_slice = tl.load(right_pointer, mask=inside[:, None] & place.column_mask[None, :], other=0.0)
        total = multiply_add(left_slice, right_slice, total)
        left_pointer += left_step
        right_pointer += right_step
    return total


@triton.jit
def accumulate_two(total, second_total, left, second_left, right, place, depth, DEPTH: tl.constexpr):
    """As :func:`accumulate` for two left factors, [batch, depth] in one piece each: the right one is read once."""
    inner = tl.arange(0, DEPTH)
    wide = inner.to(tl.int64)
    offsets = place.row[:, None] * depth + wide[None, :]
    left += offsets
    second_left += offsets
    right_pointer = right.pointer + (wide[:, None] * right.row_stride + place.column[None, :] * right.column_stride)
    right_step = tl.full([], DEPTH, tl.int64) * right.row_stride
    for start in range(0, depth, DEPTH):
        inside = inner < depth - start
        left_mask = place.row_mask[:, None] & inside[None, :]
        right_slice = tl.load(right_pointer, mask=inside[:, None] & place.column_mask[None, :], other=0.0)
        total = multiply_add(tl.load(left, mask=left_mask, other=0.0), right_slice, total)
        second_total = multiply_add(tl.load(second_left, mask=left_mask, other=0.0), right_slice, second_total)
        left += DEPTH
        second_left += DEPTH
        right_pointer += right_step
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
def place_of(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile of this program among those of [rows, columns].

    Programs of one row block are neighbours, so that all but the first find its left factor in the L2 cache.
    """
    across = tl.maximum(tl.cdiv(columns, COLUMNS), 1)
    row_block = tl.program_id(0) // across
    column_block = tl.program_id(0) % across
    row = row_block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    return Place(row, row < rows, column.to(tl.int64), column < columns, row_block.to(tl.int64), column_block)


@triton.jit
def load(pointer, units, place):
    """A tile of [batch, units], in one piece, as float32."""
    mask = place.row_mask[:, None] & place.column_mask[None, :]
    return tl.load(pointer + (place.row[:, None] * units + place.column[None, :]), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(pointer, units, place, value):
    """Write float32 to a tile of [batch, units], in one piece."""
    mask = place.row_mask[:, None] & place.column_mask[None, :]
    offsets = place.row[:, None] * units + place.column[None, :]
    tl.store(pointer + offsets, narrow(value, pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_row(matrix, place):
    """The columns of the first row of a matrix, [1, COLUMNS] float32."""
    pointer = matrix.pointer + place.column * matrix.column_stride
    return tl.load(pointer, mask=place.column_mask, other=0.0).to(tl.float32)[None, :]


@triton.jit
def add_bias(z, bias, place):
    """z + bias: one row for all, or a row per sample."""
    if bias.row_stride is None:
        z += load_row(bias, place)
    else:
        offsets = place.row[:, None] * bias.row_stride + place.column[None, :] * bias.column_stride
        mask = place.row_mask[:, None] & place.column_mask[None, :]
        z += tl.load(bias.pointer + offsets, mask=mask, other=0.0).to(tl.float32)
    return z


@triton.jit
def weight_gradient_kernel(
    left,
    right,
    second,
    output,
    batch,
    rows,
    columns,
    share,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """output[part] = left^T right (+ second[0]^T second[1]), summed over the part's share of the batch.

    left [batch, rows] and right [batch, columns], each a Matrix; second: two more, or None; output [parts, rows,
    columns], in one piece. Twin: ``zbar.t() @ a + delta.t() @ u`` of the backward references. 2 B rows columns FLOPs
    per pair; bytes: both factors and the output once, and again for every further block of the other side.
    """
    place = place_of(rows, columns, ROWS, COLUMNS)
    part = tl.program_id(1).to(tl.int64)
    start = part * share
    depth = tl.minimum(batch - start, share).to(tl.int32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    total = accumulate(total, transposed(_from_row(left, start)), _from_row(right, start), place, depth, DEPTH)
    if second is not None:
        left, right = transposed(_from_row(second[0], start)), _from_row(second[1], start)
        total = accumulate(total, left, right, place, depth, DEPTH)
    store(output + part * rows * columns, columns, place, total)


@triton.jit
def _from_row(matrix, row):
    return Matrix(matrix.pointer + row * matrix.row_stride, matrix.row_stride, matrix.column_stride)


@triton.jit
def column_sum_kernel(source, output, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """output [columns] = sum of source [rows, columns], a Matrix, over its rows, in float32. Twin: ``source.sum(0)``.

    Bytes: the source and the output once; rows * columns FLOPs.
    """
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    column_mask = column < columns
    inner = tl.arange(0, ROWS)
    pointer = source.pointer + (
        inner.to(tl.int64)[:, None] * source.row_stride + column[None, :] * source.column_stride
    )
    step = tl.full([], ROWS, tl.int64) * source.row_stride
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rows, ROWS):
        total += tl.load(pointer, mask=(inner < rows - start)[:, None] & column_mask[None, :], other=0.0).to(tl.float32)
        pointer += step
    tl.store(output + column, narrow(tl.sum(total, 0), output.dtype.element_ty), mask=column_mask)


def matrix_of(tensor: Tensor) -> Matrix:
    """[R, C] as a kernel takes it."""
    return Matrix(tensor, *tensor.stride())


def bias_of(bias: Tensor) -> Matrix:
    """[H] or [1, H], one row for all, or [B, H], as a kernel takes it."""
    if bias.ndim == 1:
        return Matrix(bias, None, bias.stride(0))
    return Matrix(bias, None if bias.shape[0] == 1 else bias.stride(0), bias.stride(1))


def power_of_two(size: int, least: int, most: int) -> int:
    """The smallest power of two that holds ``size``, within limits that are powers of two."""
    return min(max(triton.next_power_of_2(size), least), most)


def blocks(rows: int, columns: int, tile: Tile) -> int:
    """Programs of a launch over [rows, columns]; one column block at least, for what only its programs do."""
    return triton.cdiv(rows, tile.rows) * max(triton.cdiv(columns, tile.columns), 1)


def layer_tile(rows: int, columns: int, depth: int, *, crowded: bool = False) -> Tile:
    """Tile for a matmul [rows, depth] [depth, columns]; ``crowded`` if its pointwise end takes many registers.

    The same for every card: few rows take narrow tiles, so that many programs share the weights; many rows the
    largest tile whose slices, in ``num_stages`` copies, leave room in 99 KB of shared memory.
    """
    if rows <= 16:
        return Tile(16, power_of_two(columns, 16, 32), power_of_two(depth, 16, 128), 4, 3)
    if rows * columns < 128 * 128 * 128 or columns <= 32:
        return Tile(64, power_of_two(columns, 16, 64), power_of_two(depth, 16, 64), 4, 3)
    return Tile(128, power_of_two(columns, 16, 64 if crowded else 128), power_of_two(depth, 16, 32), 8, 4)


def _gradient_tile(rows: int, columns: int, batch: int) -> Tile:
    """Tile for a gradient [rows, columns] of a weight, a matmul whose depth is the batch."""
    if min(rows, columns) <= 64 or batch <= 256:
        return Tile(power_of_two(rows, 16, 64), power_of_two(columns, 16, 64), power_of_two(batch, 16, 64), 4, 3)
    return Tile(128, 128, 32, 8, 4)


#: Programs that keep a large card busy, and rows of the batch below which dividing it further gains nothing.
_ENOUGH_PROGRAMS, _LEAST_SHARE = 256, 512


def batch_parts(batch: int, tiles: int) -> int:
    """Into how many parts a weight gradient divides the batch: by shapes and tile alone, so that sums repeat."""
    return max(min(triton.cdiv(_ENOUGH_PROGRAMS, max(tiles, 1)), triton.cdiv(batch, _LEAST_SHARE)), 1)


def column_sum(source: Tensor, dtype: torch.dtype) -> Tensor:
    """[C] in ``dtype``: the sum of [R, C] over its rows."""
    rows, columns = source.shape
    across = power_of_two(columns, 1, 64)
    tile = Tile(power_of_two(rows, 1, 4096 // across), across, 1, 8, 3)  # 16 numbers a thread
    output = source.new_empty(columns, dtype=dtype)
    launch(
        column_sum_kernel,
        (triton.cdiv(columns, tile.columns),),
        matrix_of(source),
        output,
        rows,
        columns,
        tile=tile,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
    )
    return output


def weight_gradient(left: Tensor, right: Tensor, second: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """left^T right (+ second[0]^T second[1]): [B, N] and [B, K] to [N, K], in the dtype of left.

    Large batches are divided among programs, whose float32 results a second launch adds.
    """
    (batch, rows), columns = left.shape, right.shape[1]
    tile = _gradient_tile(rows, columns, batch)
    tiles = blocks(rows, columns, tile)
    parts = batch_parts(batch, tiles)
    # Whole slices per part, so that only the last one has a remainder.
    share = triton.cdiv(triton.cdiv(batch, parts), tile.depth) * tile.depth
    output = left.new_empty(parts, rows, columns, dtype=torch.float32 if parts > 1 else left.dtype)
    launch(
        weight_gradient_kernel,
        (tiles, parts),
        matrix_of(left),
        matrix_of(right),
        None if second is None else (matrix_of(second[0]), matrix_of(second[1])),
        output,
        batch,
        rows,
        columns,
        share,
        tile=tile,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
    )
    if parts == 1:
        return output[0]
    return column_sum(output.view(parts, rows * columns), left.dtype).view(rows, columns)
