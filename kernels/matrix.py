"""Matrix products, biases, SiLU and sums over the batch, as every kernel of a perceptron uses them.

Products accumulate in float32. Every operand has two strides, so that transposed factors need no copy, and 64-bit
offsets. Nothing here uses atomics: a result depends on the shapes and the tile alone and repeats bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tgdp_fast.kernels.launching import Tile, launch

# The interpreter multiplies bfloat16 numbers as integers and rounds towards zero; there, both are done in float32.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

#: A precision: that of "ieee", SUMMED products at a time. A multiple of every depth of a tile.
IN_PARTS, SUMMED = tl.constexpr("ieee_in_parts"), tl.constexpr(256)


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
def saturated(value, DTYPE: tl.constexpr):  # noqa: N803
    """float32 rounded likewise, but to no infinity of float16; keeps NaN."""
    if tl.float16 == DTYPE:
        value = tl.where(value > 65504.0, 65504.0, value)
        value = tl.where(value < -65504.0, -65504.0, value)
    return narrow(value, DTYPE)


@triton.jit
def multiply_add(left, right, total, PRECISION: tl.constexpr):  # noqa: N803
    """total + left right, in float32."""
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee" if PRECISION == IN_PARTS else PRECISION)


@triton.jit
def accumulate(
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
    """total + left[rows, :depth] right[:depth, columns], in slices of DEPTH; rows and columns are int64.

    Where second_left, of the strides of left, is not None, also second_total with it in place of left: the right factor
    is read once. With PRECISION IN_PARTS, SUMMED products are added up at a time, and then these sums: the error of a
    sum grows with the square root of its length.
    """
    inner = tl.arange(0, DEPTH).to(tl.int64)
    offsets = rows[:, None] * left_row_stride + inner[None, :] * left_column_stride
    left += offsets
    if second_left is not None:
        second_left += offsets
    right += inner[:, None] * right_row_stride + columns[None, :] * right_column_stride
    if PRECISION != IN_PARTS:
        return _accumulate_part(
            total,
            second_total,
            left,
            second_left,
            left_column_stride,
            right,
            right_row_stride,
            row_mask,
            column_mask,
            depth,
            DEPTH,
            PRECISION,
        )
    left_step = tl.full([], SUMMED, tl.int64) * left_column_stride
    right_step = tl.full([], SUMMED, tl.int64) * right_row_stride
    for start in range(0, depth, SUMMED):
        rest = tl.minimum(depth - start, SUMMED)
        zeros = tl.zeros_like(total)
        if second_left is None:
            total += _accumulate_part(
                zeros,
                None,
                left,
                None,
                left_column_stride,
                right,
                right_row_stride,
                row_mask,
                column_mask,
                rest,
                DEPTH,
                PRECISION,
            )
        else:
            part, second_part = _accumulate_part(
                zeros,
                zeros,
                left,
                second_left,
                left_column_stride,
                right,
                right_row_stride,
                row_mask,
                column_mask,
                rest,
                DEPTH,
                PRECISION,
            )
            total += part
            second_total += second_part
            second_left += left_step
        left += left_step
        right += right_step
    if second_left is None:
        return total
    else:
        return total, second_total


@triton.jit
def _accumulate_part(
    total,
    second_total,
    left,
    second_left,
    left_column_stride,
    right,
    right_row_stride,
    row_mask,
    column_mask,
    depth,
    DEPTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    inner = tl.arange(0, DEPTH)
    left_step = tl.full([], DEPTH, tl.int64) * left_column_stride
    right_step = tl.full([], DEPTH, tl.int64) * right_row_stride
    for start in range(0, depth, DEPTH):
        inside = inner < depth - start
        left_mask = row_mask[:, None] & inside[None, :]
        left_slice = tl.load(left, mask=left_mask, other=0.0)
        right_slice = tl.load(right, mask=inside[:, None] & column_mask[None, :], other=0.0)
        total = multiply_add(left_slice, right_slice, total, PRECISION)
        if second_left is not None:
            second_slice = tl.load(second_left, mask=left_mask, other=0.0)
            second_total = multiply_add(second_slice, right_slice, second_total, PRECISION)
            second_left += left_step
        left += left_step
        right += right_step
    if second_left is None:
        return total
    else:
        return total, second_total


@triton.jit
def exponential(x):
    """exp(x) of float32 to about one unit in the last place; keeps NaN. The exponential of base 2 alone would cost |x|
    units, for its argument x log2(e) is rounded.
    """
    x = tl.where(x > 128.0, 128.0, x)
    x = tl.where(x < -256.0, -256.0, x)
    t = x * 1.4426950216293335
    rest = tl.fma(x, 1.4426950216293335, -t) + x * 1.925963033500011e-08
    return tl.exp2(t) * (1.0 + rest * 0.6931471805599453)


@triton.jit
def sigmoid(z, EXACT: tl.constexpr):  # noqa: N803
    """1 / (1 + exp(-z)) of float32; exact 0 and 1 far out. With EXACT to a few units in the last place."""
    power = exponential(-z) if EXACT else tl.exp(-z)
    return 1.0 / (1.0 + power)


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
def add_bias(z, bias, row_stride, column_stride, row, row_mask, column, column_mask, SHARED: tl.constexpr):  # noqa: N803
    """z + bias, of one row if SHARED, else of a row per sample."""
    if SHARED:
        z += tl.load(bias + column * column_stride, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    else:
        mask = row_mask[:, None] & column_mask[None, :]
        z += tl.load(bias + row[:, None] * row_stride + column[None, :] * column_stride, mask=mask, other=0.0).to(
            tl.float32
        )
    return z


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
        None,
        left + start * left_batch_stride,
        None,
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
            None,
            second_left + start * left_batch_stride,
            None,
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


def summed(precision: str, dtype: torch.dtype, depth: int) -> str:
    """The precision for sums of ``depth`` products; 16-bit factors lose more than a long sum of them does."""
    is_long = precision == "ieee" and dtype == torch.float32 and depth > 2 * SUMMED.value
    return str(IN_PARTS.value) if is_long else precision


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


def sum_tile(rows: int, columns: int, across: int = 64, num_warps: int = 8) -> Tile:
    """Tile for sums of [rows, columns] over the rows, 16 numbers a thread."""
    across = power_of_two(columns, 1, across)
    return Tile(power_of_two(rows, 1, 512 * num_warps // across), across, 1, num_warps, 3)


#: Programs that keep a large card busy, and rows of the batch below which dividing it further gains nothing.
_ENOUGH_PROGRAMS, _LEAST_SHARE = 256, 512


def batch_parts(batch: int, tiles: int) -> int:
    """Into how many parts a weight gradient divides the batch: by shapes and tile alone, so that sums repeat."""
    return max(min(triton.cdiv(_ENOUGH_PROGRAMS, max(tiles, 1)), triton.cdiv(batch, _LEAST_SHARE)), 1)


def column_sum(source: Tensor, dtype: torch.dtype) -> Tensor:
    """[C] in ``dtype``: the sum of [R, C] over its rows."""
    rows, columns = source.shape

    def run(tile: Tile) -> Tensor:
        output = source.new_empty(columns, dtype=dtype)
        launch(
            column_sum_kernel,
            (triton.cdiv(columns, tile.columns),),
            source,
            output,
            rows,
            columns,
            *source.stride(),
            tile=tile,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
        )
        return output

    return run(sum_tile(rows, columns))


def weight_gradient(
    left: Tensor, right: Tensor, second: tuple[Tensor, Tensor] | None = None, *, precision: str = "ieee"
) -> Tensor:
    """left^T right (+ second[0]^T second[1]): [B, N] and [B, K] to [N, K], in the dtype of left.

    second[0] must have the strides of left. Large batches are divided among programs, whose float32 results a second
    launch adds.
    """
    (batch, rows), columns = left.shape, right.shape[1]
    second_left, second_right = (left, right) if second is None else second

    def run(tile: Tile) -> Tensor:
        tiles = blocks(rows, columns, tile)
        parts = batch_parts(batch, tiles)
        # Whole slices per part, so that only the last one has a remainder.
        share = triton.cdiv(triton.cdiv(batch, parts), tile.depth) * tile.depth
        output = left.new_empty(parts, rows, columns, dtype=torch.float32 if parts > 1 else left.dtype)
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
            tile=tile,
            PAIR=second is not None,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            PRECISION=summed(precision, left.dtype, share),
        )
        if parts == 1:
            return output[0]
        return column_sum(output.view(parts, rows * columns), left.dtype).view(rows, columns)

    return run(gradient_tile(rows, columns, batch, left.dtype))


def launch_layer(
    kernel: Any,
    tile: Tile,
    size: tuple[int, int, int],
    left: Tensor,
    *arguments: Any,
    products: int = 1,
    precision: str,
    **flags: bool,
) -> None:
    """Launch over [batch, units] a kernel whose ``products`` of ``left`` are ``depth`` deep; (batch, units, depth)."""
    batch, units, depth = size
    launch(
        kernel,
        (blocks(batch, units, tile),),
        left,
        *arguments,
        tile=tile,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        PRECISION=summed(precision, left.dtype, depth),
        **flags,
    )


def bias_strides(bias: Tensor) -> tuple[int, int]:
    """Strides of [1, H] or [B, H]; the first is 0 for a shared row."""
    return (0 if bias.shape[0] == 1 else bias.stride(0)), bias.stride(1)


def as_rows(bias: Tensor) -> Tensor:
    """[H] as [1, H]; [1, H] and [B, H] as they are."""
    return bias.unsqueeze(0) if bias.ndim == 1 else bias


def without_data(
    batch: int, sizes: Sequence[int], outputs: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Arguments of a perceptron of ``sizes`` (inputs and hidden layers) with a shared first bias, for a record."""

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    weights = [empty(m, n) for n, m in zip(sizes, (*sizes[1:], outputs), strict=True)]
    return empty(batch, sizes[0]), empty(1, sizes[1]), weights, [empty(m) for m in (*sizes[2:], outputs)]
