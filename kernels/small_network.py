"""Perceptrons so small that one program takes a block of rows through all layers: at most four hidden layers of at most
128 units, in 16 bits.

A launch leaves nothing in memory but its results, b B (D + O) bytes for outputs and b B (2 D + 1) for value and
gradient, where layer by layer it is 2 b B S and about 5 b B S more for S hidden units (b bytes a number): at 128 units
that is a byte per 64 FLOPs, which no card's memory keeps up with. Weights, at most 32 KB a layer, come from the level-2
cache, once per block of rows on each way.

On the way down the slopes silu'(z) of all layers are in registers (32 rows, 4 x 128 units: 32 KB of 256; with 64 rows
the rest of a block no longer fits and spills). A layer is computed in two halves of its units, of which two 16-bit
slopes share a register. float32 products without tensor cores are limited by arithmetic and stay layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from tgdp_fast.kernels.launching import TYPES, Compilation, Tile, launch, recorded
from tgdp_fast.kernels.matrix import (
    accumulate,
    add_bias,
    as_rows,
    bias_strides,
    multiply_add,
    narrow,
    power_of_two,
    sigmoid,
    silu_slope,
    without_data,
)


@triton.jit
def pack(low, high, zero):
    """Two blocks of 16-bit numbers as one of 32 bits: a register would hold one of 16 bits only.

    ``zero`` is one that the compiler does not know; otherwise it would see both numbers and keep them apart.
    """
    low_bits = low.to(tl.uint16, bitcast=True).to(tl.int32)
    return (low_bits | (high.to(tl.uint16, bitcast=True).to(tl.int32) << 16)) + zero


@triton.jit
def unpack_low(pair, DTYPE: tl.constexpr):  # noqa: N803
    """The first of two packed blocks."""
    return (pair & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)


@triton.jit
def unpack_high(pair, DTYPE: tl.constexpr):  # noqa: N803
    """The second of two packed blocks."""
    return ((pair >> 16) & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)


@triton.jit
def weight_quarter(weight, units, depth, row, column):
    """weight[row, column] of a contiguous [units, depth], zero beyond."""
    mask = (row < units)[:, None] & (column < depth)[None, :]
    return tl.load(weight + row[:, None] * depth + column[None, :], mask=mask, other=0.0)


@triton.jit
def finish_half(
    z,
    pre_activation,
    units,
    row,
    row_mask,
    column,
    KEEP: tl.constexpr,  # noqa: N803
    DTYPE: tl.constexpr,  # noqa: N803
):
    """silu(z) and silu'(z) of half a layer in DTYPE; z [batch, units] itself is stored if KEEP."""
    if KEEP:
        mask = row_mask[:, None] & (column < units)[None, :]
        tl.store(pre_activation + row[:, None] * units + column[None, :], narrow(z, DTYPE), mask=mask)
    s = sigmoid(z, False)
    return narrow(z * s, DTYPE), narrow(silu_slope(z, s), DTYPE)


@triton.jit
def fused_first_half(
    x,
    weight,
    bias,
    pre_activation,
    inputs,
    units,
    x_row_stride,
    x_column_stride,
    bias_row_stride,
    bias_column_stride,
    row,
    row_mask,
    column,
    SHARED_BIAS: tl.constexpr,  # noqa: N803
    KEEP: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """silu(z_1) and silu'(z_1) of half the first layer; weight [units, inputs] is contiguous."""
    wide_column = column.to(tl.int64)
    column_mask = column < units
    z = accumulate(
        tl.zeros([row.shape[0], column.shape[0]], tl.float32),
        None,
        x,
        None,
        x_row_stride,
        x_column_stride,
        weight,
        1,
        inputs,
        row,
        row_mask,
        wide_column,
        column_mask,
        inputs,
        DEPTH,
        PRECISION,
    )
    z = add_bias(z, bias, bias_row_stride, bias_column_stride, row, row_mask, wide_column, column_mask, SHARED_BIAS)
    return finish_half(z, pre_activation, units, row, row_mask, column, KEEP, x.dtype.element_ty)


@triton.jit
def fused_half_up(
    low,
    high,
    weight,
    bias,
    pre_activation,
    units,
    depth,
    row,
    row_mask,
    column,
    low_column,
    KEEP: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """silu(z) and silu'(z) of half a layer, on top of both halves of the layer below."""
    z = tl.zeros([low.shape[0], column.shape[0]], tl.float32)
    z = multiply_add(low, tl.trans(weight_quarter(weight, units, depth, column, low_column)), z, PRECISION)
    high_column = low_column + low_column.shape[0]
    z = multiply_add(high, tl.trans(weight_quarter(weight, units, depth, column, high_column)), z, PRECISION)
    z += tl.load(bias + column, mask=column < units, other=0.0).to(tl.float32)[None, :]
    return finish_half(z, pre_activation, units, row, row_mask, column, KEEP, low.dtype)


@triton.jit
def fused_layer_up(
    low,
    high,
    weight,
    bias,
    pre_activation,
    units,
    depth,
    row,
    row_mask,
    column,
    zero,
    KEEP: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """Both halves of silu(z), and silu'(z) packed; column: those of the low half. weight [units, depth], contiguous."""
    next_low, slope_low = fused_half_up(
        low, high, weight, bias, pre_activation, units, depth, row, row_mask, column, column, KEEP, PRECISION
    )
    next_high, slope_high = fused_half_up(
        low,
        high,
        weight,
        bias,
        pre_activation,
        units,
        depth,
        row,
        row_mask,
        column + column.shape[0],
        column,
        KEEP,
        PRECISION,
    )
    return next_low, next_high, pack(slope_low, slope_high, zero)


@triton.jit
def fused_up(
    x,
    first_bias,
    weight_1,
    weight_2,
    weight_3,
    weight_4,
    bias_2,
    bias_3,
    bias_4,
    pre_activation_1,
    pre_activation_2,
    pre_activation_3,
    pre_activation_4,
    inputs,
    units_1,
    units_2,
    units_3,
    units_4,
    x_row_stride,
    x_column_stride,
    bias_row_stride,
    bias_column_stride,
    row,
    row_mask,
    column,
    zero,
    LAYERS: tl.constexpr,  # noqa: N803
    SHARED_BIAS: tl.constexpr,  # noqa: N803
    KEEP: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """Both halves of the last activation, and the packed slopes of four layers, those beyond LAYERS repeated."""
    low, slope_low = fused_first_half(
        x,
        weight_1,
        first_bias,
        pre_activation_1,
        inputs,
        units_1,
        x_row_stride,
        x_column_stride,
        bias_row_stride,
        bias_column_stride,
        row,
        row_mask,
        column,
        SHARED_BIAS,
        KEEP,
        DEPTH,
        PRECISION,
    )
    high, slope_high = fused_first_half(
        x,
        weight_1,
        first_bias,
        pre_activation_1,
        inputs,
        units_1,
        x_row_stride,
        x_column_stride,
        bias_row_stride,
        bias_column_stride,
        row,
        row_mask,
        column + column.shape[0],
        SHARED_BIAS,
        KEEP,
        DEPTH,
        PRECISION,
    )
    slopes_1 = pack(slope_low, slope_high, zero)
    slopes_2 = slopes_1
    if LAYERS > 1:
        low, high, slopes_2 = fused_layer_up(
            low,
            high,
            weight_2,
            bias_2,
            pre_activation_2,
            units_2,
            units_1,
            row,
            row_mask,
            column,
            zero,
            KEEP,
            PRECISION,
        )
    slopes_3 = slopes_2
    if LAYERS > 2:
        low, high, slopes_3 = fused_layer_up(
            low,
            high,
            weight_3,
            bias_3,
            pre_activation_3,
            units_3,
            units_2,
            row,
            row_mask,
            column,
            zero,
            KEEP,
            PRECISION,
        )
    slopes_4 = slopes_3
    if LAYERS > 3:
        low, high, slopes_4 = fused_layer_up(
            low,
            high,
            weight_4,
            bias_4,
            pre_activation_4,
            units_4,
            units_3,
            row,
            row_mask,
            column,
            zero,
            KEEP,
            PRECISION,
        )
    return low, high, slopes_1, slopes_2, slopes_3, slopes_4


@triton.jit
def fused_outputs_kernel(
    x,
    first_bias,
    weight_1,
    weight_2,
    weight_3,
    weight_4,
    bias_2,
    bias_3,
    bias_4,
    head,
    head_bias,
    output,
    pre_activation_1,
    pre_activation_2,
    pre_activation_3,
    pre_activation_4,
    batch,
    inputs,
    units_1,
    units_2,
    units_3,
    units_4,
    outputs,
    x_row_stride,
    x_column_stride,
    bias_row_stride,
    bias_column_stride,
    LAYERS: tl.constexpr,  # noqa: N803
    SHARED_BIAS: tl.constexpr,  # noqa: N803
    KEEP: tl.constexpr,  # noqa: N803
    HALF: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
    OUTPUTS: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """All layers of a block of rows in one program; units_l are of hidden layer l <= LAYERS, the rest repeats them.

    x [batch, inputs]; everything else contiguous: weight_l [units_l, units_(l-1)], head [outputs, units_L]. Twin:
    ``perceptron``'s ``_forward_reference``. 2 B P FLOPs for P weights and about 10 B S pointwise for S hidden units;
    bytes: x and the output, and with KEEP the pre-activations, once; the weights once per block from the level-2 cache.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = row < batch
    column = tl.arange(0, HALF)
    low, high, _, _, _, _ = fused_up(
        x,
        first_bias,
        weight_1,
        weight_2,
        weight_3,
        weight_4,
        bias_2,
        bias_3,
        bias_4,
        pre_activation_1,
        pre_activation_2,
        pre_activation_3,
        pre_activation_4,
        inputs,
        units_1,
        units_2,
        units_3,
        units_4,
        x_row_stride,
        x_column_stride,
        bias_row_stride,
        bias_column_stride,
        row,
        row_mask,
        column,
        tl.minimum(batch, 0),
        LAYERS,
        SHARED_BIAS,
        KEEP,
        DEPTH,
        PRECISION,
    )
    for start in range(0, outputs, OUTPUTS):
        out = start + tl.arange(0, OUTPUTS)
        result = tl.zeros([ROWS, OUTPUTS], tl.float32)
        result = multiply_add(low, tl.trans(weight_quarter(head, outputs, units_4, out, column)), result, PRECISION)
        result = multiply_add(
            high, tl.trans(weight_quarter(head, outputs, units_4, out, column + HALF)), result, PRECISION
        )
        out_mask = out < outputs
        result += tl.load(head_bias + out, mask=out_mask, other=0.0).to(tl.float32)[None, :]
        offsets = row[:, None] * outputs + out[None, :]
        tl.store(output + offsets, narrow(result, output.dtype.element_ty), mask=row_mask[:, None] & out_mask[None, :])


@triton.jit
def fused_half_down(low, high, slope, weight, units, depth, column, low_row, PRECISION: tl.constexpr):  # noqa: N803
    """slope * (delta weight) for half the columns of weight [units, depth]; low and high are the halves of delta."""
    eta = tl.zeros([low.shape[0], column.shape[0]], tl.float32)
    eta = multiply_add(low, weight_quarter(weight, units, depth, low_row, column), eta, PRECISION)
    high_row = low_row + low_row.shape[0]
    eta = multiply_add(high, weight_quarter(weight, units, depth, high_row, column), eta, PRECISION)
    return narrow(slope.to(tl.float32) * eta, low.dtype)


@triton.jit
def fused_layer_down(low, high, slopes, weight, units, depth, column, PRECISION: tl.constexpr):  # noqa: N803
    """Both halves of delta of the layer below a contiguous weight [units, depth]."""
    slope_low, slope_high = unpack_low(slopes, low.dtype), unpack_high(slopes, low.dtype)
    next_low = fused_half_down(low, high, slope_low, weight, units, depth, column, column, PRECISION)
    next_high = fused_half_down(
        low, high, slope_high, weight, units, depth, column + column.shape[0], column, PRECISION
    )
    return next_low, next_high


@triton.jit
def fused_value_and_grad_kernel(
    x,
    first_bias,
    weight_1,
    weight_2,
    weight_3,
    weight_4,
    bias_2,
    bias_3,
    bias_4,
    head,
    head_bias,
    value,
    gradient,
    pre_activation_1,
    pre_activation_2,
    pre_activation_3,
    pre_activation_4,
    batch,
    inputs,
    units_1,
    units_2,
    units_3,
    units_4,
    x_row_stride,
    x_column_stride,
    bias_row_stride,
    bias_column_stride,
    LAYERS: tl.constexpr,  # noqa: N803
    SHARED_BIAS: tl.constexpr,  # noqa: N803
    KEEP: tl.constexpr,  # noqa: N803
    HALF: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """All layers up and down of a block of rows in one program.

    x [batch, inputs]; everything else contiguous: weight_l [units_l, units_(l-1)], head [units_L], value [batch],
    gradient [batch, inputs]; units_l are those of hidden layer l <= LAYERS, the rest repeats them. Twin:
    ``_forward_reference``. 4 B P FLOPs for P weights and about 20 B S pointwise for S hidden units; bytes: x, value and
    gradient, and with KEEP the pre-activations, once; the weights twice per block from the level-2 cache.
    """
    dtype: tl.constexpr = gradient.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = row < batch
    column = tl.arange(0, HALF)
    # Unknown to the compiler: see pack. Added to a column it makes new addresses on the way down, for keeping those of
    # the way up would take more registers than there are.
    zero = tl.minimum(batch, 0)
    low, high, slopes_1, slopes_2, slopes_3, slopes_4 = fused_up(
        x,
        first_bias,
        weight_1,
        weight_2,
        weight_3,
        weight_4,
        bias_2,
        bias_3,
        bias_4,
        pre_activation_1,
        pre_activation_2,
        pre_activation_3,
        pre_activation_4,
        inputs,
        units_1,
        units_2,
        units_3,
        units_4,
        x_row_stride,
        x_column_stride,
        bias_row_stride,
        bias_column_stride,
        row,
        row_mask,
        column,
        zero,
        LAYERS,
        SHARED_BIAS,
        KEEP,
        DEPTH,
        PRECISION,
    )
    column += zero
    w_low = tl.load(head + column, mask=column < units_4, other=0.0).to(tl.float32)[None, :]
    w_high = tl.load(head + HALF + column, mask=HALF + column < units_4, other=0.0).to(tl.float32)[None, :]
    total = tl.sum(low.to(tl.float32) * w_low + high.to(tl.float32) * w_high, 1)
    tl.store(value + row, narrow(total + tl.load(head_bias).to(tl.float32), dtype), mask=row_mask)
    low = narrow(unpack_low(slopes_4, dtype).to(tl.float32) * w_low, dtype)
    high = narrow(unpack_high(slopes_4, dtype).to(tl.float32) * w_high, dtype)
    if LAYERS > 3:
        low, high = fused_layer_down(low, high, slopes_3, weight_4, units_4, units_3, column, PRECISION)
    if LAYERS > 2:
        low, high = fused_layer_down(low, high, slopes_2, weight_3, units_3, units_2, column, PRECISION)
    if LAYERS > 1:
        low, high = fused_layer_down(low, high, slopes_1, weight_2, units_2, units_1, column, PRECISION)
    for start in range(0, inputs, DEPTH):
        below = start + tl.arange(0, DEPTH)
        result = tl.zeros([ROWS, DEPTH], tl.float32)
        result = multiply_add(low, weight_quarter(weight_1, units_1, inputs, column, below), result, PRECISION)
        result = multiply_add(high, weight_quarter(weight_1, units_1, inputs, column + HALF, below), result, PRECISION)
        mask = row_mask[:, None] & (below < inputs)[None, :]
        tl.store(gradient + row[:, None] * inputs + below[None, :], narrow(result, dtype), mask=mask)


Value = TypeVar("Value")

#: Limits of a small network.
MOST_LAYERS, MOST_UNITS, MOST_INPUTS = 4, 128, 512


def fits(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether a network is small enough for one program per block of rows."""
    widths = [weight.shape[0] for weight in weights[:-1]]
    return (
        x.dtype != torch.float32
        and len(widths) <= MOST_LAYERS
        and min(widths) > 0
        and max(widths) <= MOST_UNITS
        and x.shape[1] <= MOST_INPUTS
    )


def _tile(batch: int, inputs: int, *widths: int) -> Tile:
    """Rows of a block, half the padded width, and slices of the first layer's product."""
    # Few rows give every multiprocessor a block of its own; many share a reading of the weights.
    rows, num_warps = (16, 4) if batch <= 2048 else (32, 8)
    return Tile(rows, power_of_two(max(widths), 32, MOST_UNITS) // 2, power_of_two(inputs, 16, 32), num_warps, 2)


def _four(values: Sequence[Value]) -> list[Value]:
    """Four of them, the last one repeated: the arguments of a kernel, which has as many layers at most."""
    return [values[min(i, len(values) - 1)] for i in range(MOST_LAYERS)]


def _launch(
    kernel: Any,
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    results: Sequence[Tensor],
    sizes: Sequence[int],
    *,
    keep: bool,
    passes: int,
    **constants: int,
) -> list[Tensor]:
    """Fill the results, and return the pre-activations with ``keep``; sizes: what a kernel takes beside the layers'."""
    batch, inputs = x.shape
    widths = [weight.shape[0] for weight in weights[:-1]]
    kept = [x.new_empty(batch, width) for width in widths] if keep else []
    bias = as_rows(first_bias)
    arguments = (
        x,
        bias,
        *_four([weight.contiguous() for weight in weights[:-1]]),
        *_four([b.contiguous() for b in biases])[: MOST_LAYERS - 1],
        weights[-1].contiguous(),
        biases[-1].contiguous(),
        *results,
        *_four(kept or results[-1:]),
        batch,
        inputs,
        *_four(widths),
        *sizes,
        *x.stride(),
        *bias_strides(bias),
    )
    flags = {"LAYERS": len(widths), "SHARED_BIAS": bias.shape[0] == 1, "KEEP": keep, **constants}

    def run(tile: Tile) -> None:
        launch(
            kernel,
            (triton.cdiv(batch, tile.rows),),
            *arguments,
            tile=tile,
            HALF=tile.columns,
            ROWS=tile.rows,
            DEPTH=tile.depth,
            PRECISION="ieee",
            **flags,
        )

    run(_tile(batch, inputs, *widths))
    return kept


def outputs(
    x: Tensor, first_bias: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """As ``perceptron`` of ``kernels/perceptron.py``, of a network that :func:`fits`."""
    count = weights[-1].shape[0]
    output = x.new_empty(x.shape[0], count)
    columns = power_of_two(count, 16, 64)
    kept = _launch(
        fused_outputs_kernel, x, first_bias, weights, biases, [output], [count], keep=keep, passes=1, OUTPUTS=columns
    )
    return output, kept


def value_and_grad(
    x: Tensor, first_bias: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *, keep: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """As ``value_and_grad`` of ``kernels/mlp_value_and_grad.py``, of a network that :func:`fits`."""
    value, gradient = x.new_empty(x.shape[0]), x.new_empty(x.shape)
    results = [value, gradient]
    kept = _launch(fused_value_and_grad_kernel, x, first_bias, weights, biases, results, [], keep=keep, passes=2)
    return value, gradient, kept


def shipped() -> list[Compilation]:
    """Score and guidance networks of two inputs and four layers of 128 units, with few rows and with many."""
    calls: dict[str, Callable[[], object]] = {}
    for dtype, name in TYPES.items():
        if dtype == torch.float32:
            continue
        for batch, keep in ((16, False), (65536, True)):
            network = without_data(batch, (2, 128, 128, 128, 128), 2, dtype)
            calls[f"perceptron-{name}-128-{batch}"] = partial(outputs, *network, keep=keep)
        for batch in (256, 65536):
            network = without_data(batch, (2, 128, 128, 128, 128), 1, dtype)
            calls[f"mlp-{name}-2-128-{batch}"] = partial(value_and_grad, *network, keep=False)
    return recorded(calls)
