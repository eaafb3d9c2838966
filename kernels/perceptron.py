"""All outputs of a SiLU perceptron and their derivative.

Two ways, both with bias, activation and its derivative at the end of the products:

- Layer by layer, for any width: one launch per layer up and one per layer down, to be captured in one CUDA graph. A
  layer of H units reads and writes b B H bytes of its input and output beside its weights (b bytes per number), where
  PyTorch reads and writes them three times, and does 2 B H H_below FLOPs. At width 512 a weight matrix does not fit
  next to the activations in shared memory, and the products are what takes the time: 256 FLOPs per byte moved in 16
  bits.
- In one launch, for at most four hidden layers of at most 128 units in 16 bits: a program takes its rows through all
  layers and leaves nothing in memory but the output, b B (D + O) bytes instead of b B (D + O + 2 S) for S hidden
  units; weights (32 KB a layer at most) come from the level-2 cache, read once per block of rows. At 128 units the
  layer-by-layer way moves a byte per 64 FLOPs, which no card's memory keeps up with. float32 products without tensor
  cores are limited by arithmetic and stay layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tgdp_fast.kernels.compilation import Compilation
from tgdp_fast.kernels.matrix import (
    TYPES,
    Tile,
    accumulate,
    block_of,
    blocks,
    column_sum,
    launch,
    layer_tile,
    multiply_add,
    narrow,
    power_of_two,
    recorded,
    sigmoid,
    silu_slope,
    weight_gradient,
)


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
def layer_up_kernel(
    below,
    weight,
    bias,
    pre_activation,
    activation,
    batch,
    units,
    depth,
    below_row_stride,
    below_column_stride,
    weight_row_stride,
    weight_column_stride,
    bias_row_stride,
    bias_column_stride,
    SHARED_BIAS: tl.constexpr,  # noqa: N803
    KEEP: tl.constexpr,  # noqa: N803
    ACTIVATE: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """z = below weight^T + bias, kept if KEEP, and silu(z) if ACTIVATE.

    below [batch, depth], weight [units, depth]; pre_activation and activation [batch, units], contiguous. Twin: a layer
    of ``perceptron``'s ``_forward_reference``. 2 B units depth FLOPs in products and about 10 B units pointwise; bytes:
    below and weight once, what is stored once.
    """
    _, row, row_mask, column, column_mask = block_of(batch, units, ROWS, COLUMNS)
    z = accumulate(
        tl.zeros([ROWS, COLUMNS], tl.float32),
        below,
        below_row_stride,
        below_column_stride,
        weight,
        weight_column_stride,
        weight_row_stride,
        row,
        row_mask,
        column,
        column_mask,
        depth,
        DEPTH,
        PRECISION,
    )
    z = add_bias(z, bias, bias_row_stride, bias_column_stride, row, row_mask, column, column_mask, SHARED_BIAS)
    offsets = row[:, None] * units + column[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    if KEEP:
        tl.store(pre_activation + offsets, narrow(z, pre_activation.dtype.element_ty), mask=mask)
    if ACTIVATE:
        tl.store(activation + offsets, narrow(z * sigmoid(z), activation.dtype.element_ty), mask=mask)


@triton.jit
def layer_down_kernel(
    above,
    weight,
    pre_activation,
    output,
    activation,
    sums,
    value_parts,
    value_bias,
    value,
    batch,
    units,
    depth,
    parts,
    above_row_stride,
    above_column_stride,
    weight_row_stride,
    weight_column_stride,
    SLOPE: tl.constexpr,  # noqa: N803
    ACTIVATE: tl.constexpr,  # noqa: N803
    SUM: tl.constexpr,  # noqa: N803
    FINISH: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """output = above weight, times silu'(z) if SLOPE.

    above [batch, depth], weight [depth, units]; pre_activation (z), output and activation [batch, units], contiguous.
    With ACTIVATE also activation = silu(z), which the gradient of the weight above needs; with SUM also sums
    [row blocks, units], the output added over each block of rows: the gradient of a bias before its last addition. With
    FINISH also value [batch] = sum of value_parts [parts, batch] + value_bias, which would cost a launch of its own.
    Twin: a layer of ``perceptron_backward_reference``. 2 B units depth FLOPs and about 10 B units pointwise; bytes:
    above and weight once, z once, what is stored once.
    """
    block, row, row_mask, column, column_mask = block_of(batch, units, ROWS, COLUMNS)
    result = accumulate(
        tl.zeros([ROWS, COLUMNS], tl.float32),
        above,
        above_row_stride,
        above_column_stride,
        weight,
        weight_row_stride,
        weight_column_stride,
        row,
        row_mask,
        column,
        column_mask,
        depth,
        DEPTH,
        PRECISION,
    )
    offsets = row[:, None] * units + column[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    if SLOPE or ACTIVATE:
        z = tl.load(pre_activation + offsets, mask=mask, other=0.0).to(tl.float32)
        s = sigmoid(z)
        if SLOPE:
            result *= silu_slope(z, s)
        if ACTIVATE:
            tl.store(activation + offsets, narrow(z * s, activation.dtype.element_ty), mask=mask)
    tl.store(output + offsets, narrow(result, output.dtype.element_ty), mask=mask)
    if SUM:
        # Rows that do not exist are zero: their left factor was.
        tl.store(sums + block.to(tl.int64) * units + column, tl.sum(result, 0), mask=column_mask)
    if FINISH:  # noqa: SIM102 - the compiler drops the inner question where the outer one is settled
        if tl.program_id(0) % tl.maximum(tl.cdiv(units, COLUMNS), 1) == 0:
            total = tl.zeros([ROWS], tl.float32) + tl.load(value_bias).to(tl.float32)
            sources = value_parts + row
            for _ in range(parts):
                total += tl.load(sources, mask=row_mask, other=0.0)
                sources += batch
            tl.store(value + row, narrow(total, value.dtype.element_ty), mask=row_mask)


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
    s = sigmoid(z)
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
        x,
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


#: Limits of the kernels that take a block of rows through all layers.
MOST_FUSED_LAYERS, MOST_FUSED_UNITS, MOST_FUSED_INPUTS = 4, 128, 512


def fits_one_launch(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether a network is small enough for one program per block of rows."""
    widths = [weight.shape[0] for weight in weights[:-1]]
    return (
        x.dtype != torch.float32
        and len(widths) <= MOST_FUSED_LAYERS
        and min(widths) > 0
        and max(widths) <= MOST_FUSED_UNITS
        and x.shape[1] <= MOST_FUSED_INPUTS
    )


def fused_tile(batch: int, width: int, inputs: int) -> Tile:
    """Rows of a block, half the padded width, and slices of the first layer's product."""
    columns = power_of_two(width, 32, MOST_FUSED_UNITS) // 2
    depth = power_of_two(inputs, 16, 32)
    # Few rows give every multiprocessor a block of its own; many share a reading of the weights.
    return Tile(16, columns, depth, 4, 2) if batch <= 2048 else Tile(32, columns, depth, 8, 2)


def four(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Four tensors, the last one repeated: the arguments of a fused kernel, which has as many layers at most."""
    return [tensors[min(i, len(tensors) - 1)] for i in range(MOST_FUSED_LAYERS)]


def bias_strides(bias: Tensor) -> tuple[int, int]:
    """Strides of [1, H] or [B, H]; the first is 0 for a shared row."""
    return (0 if bias.shape[0] == 1 else bias.stride(0)), bias.stride(1)


def layer_up(
    below: Tensor, weight: Tensor, bias: Tensor, *, keep: bool, activate: bool, precision: str = "ieee"
) -> tuple[Tensor | None, Tensor | None]:
    """(z, silu(z)) of z = below weight^T + bias, each None where not asked for: [B, D], [H, D], [1 or B, H]."""
    (batch, depth), units = below.shape, weight.shape[0]
    pre_activation = below.new_empty(batch, units) if keep else None
    activation = below.new_empty(batch, units) if activate else None
    tile = layer_tile(batch, units, depth, below.dtype)
    launch(
        layer_up_kernel,
        (blocks(batch, units, tile),),
        below,
        weight,
        bias,
        activation if pre_activation is None else pre_activation,
        pre_activation if activation is None else activation,
        batch,
        units,
        depth,
        *below.stride(),
        *weight.stride(),
        *bias_strides(bias),
        flops=2 * batch * units * depth,
        tile=tile,
        SHARED_BIAS=bias.shape[0] == 1,
        KEEP=keep,
        ACTIVATE=activate,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        PRECISION=precision,
    )
    return pre_activation, activation


def layer_down(
    above: Tensor,
    weight: Tensor,
    pre_activation: Tensor | None,
    *,
    activate: bool = False,
    with_sum: bool = False,
    value: tuple[Tensor, Tensor, Tensor] | None = None,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(above weight * silu'(z), silu(z) or None, sums over row blocks or None): [B, O], [O, H], [B, H] to [B, H].

    Without pre_activation (z) the product alone. ``value`` is (parts [P, B], bias [1], result [B]) to be finished.
    """
    (batch, depth), units = above.shape, weight.shape[1]
    crowded = pre_activation is not None and above.dtype != torch.float32
    tile = layer_tile(batch, units, depth, above.dtype, crowded=crowded)
    output = above.new_empty(batch, units)
    activation = above.new_empty(batch, units) if activate else None
    sums = above.new_empty(triton.cdiv(batch, tile.rows), units, dtype=torch.float32) if with_sum else None
    parts, bias, finished = (output, output, output) if value is None else value
    launch(
        layer_down_kernel,
        (blocks(batch, units, tile),),
        above,
        weight,
        output if pre_activation is None else pre_activation,
        output,
        output if activation is None else activation,
        output if sums is None else sums,
        parts,
        bias,
        finished,
        batch,
        units,
        depth,
        0 if value is None else len(parts),
        *above.stride(),
        *weight.stride(),
        flops=2 * batch * units * depth,
        tile=tile,
        SLOPE=pre_activation is not None,
        ACTIVATE=activate,
        SUM=with_sum,
        FINISH=value is not None,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        PRECISION=precision,
    )
    return output, activation, sums


def as_rows(bias: Tensor) -> Tensor:
    """[H] as [1, H]; [1, H] and [B, H] as they are."""
    return bias.unsqueeze(0) if bias.ndim == 1 else bias


def perceptron(
    x: Tensor, first_bias: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """Output [B, O] and, with ``keep``, the pre-activations [B, H_l]; arguments as of the operator ``perceptron``."""
    if fits_one_launch(x, weights):
        return _fused_outputs(x, first_bias, weights, biases, keep=keep)
    activation: Any = x
    kept = []
    for weight, bias in zip(weights[:-1], (first_bias, *biases[:-1]), strict=True):
        pre_activation, activation = layer_up(activation, weight, as_rows(bias), keep=keep, activate=True)
        if pre_activation is not None:
            kept.append(pre_activation)
    output, _ = layer_up(activation, weights[-1], as_rows(biases[-1]), keep=True, activate=False)
    assert output is not None
    return output, kept


def _fused_outputs(
    x: Tensor, first_bias: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    batch, inputs = x.shape
    widths = [weight.shape[0] for weight in weights[:-1]]
    outputs = weights[-1].shape[0]
    output = x.new_empty(batch, outputs)
    kept = [x.new_empty(batch, width) for width in widths] if keep else []
    tile = fused_tile(batch, max(widths), inputs)
    bias = as_rows(first_bias)
    launch(
        fused_outputs_kernel,
        (triton.cdiv(batch, tile.rows),),
        x,
        bias,
        *four([weight.contiguous() for weight in weights[:-1]]),
        *four([b.contiguous() for b in (*biases[:-1], biases[-1])])[: MOST_FUSED_LAYERS - 1],
        weights[-1].contiguous(),
        biases[-1].contiguous(),
        output,
        *four(kept or [output]),
        batch,
        inputs,
        *(widths[min(i, len(widths) - 1)] for i in range(MOST_FUSED_LAYERS)),
        outputs,
        *x.stride(),
        *bias_strides(bias),
        flops=2 * batch * sum(weight.numel() for weight in weights),
        tile=tile,
        LAYERS=len(widths),
        SHARED_BIAS=bias.shape[0] == 1,
        KEEP=keep,
        HALF=tile.columns,
        ROWS=tile.rows,
        DEPTH=tile.depth,
        OUTPUTS=power_of_two(outputs, 16, 64),
        PRECISION="ieee",
    )
    return output, kept


def perceptron_backward(
    output_cotangent: Tensor,
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    pre_activations: Sequence[Tensor],
    *,
    needs_grad: Sequence[bool],
    precision: str = "ieee",
) -> list[Tensor]:
    """The needed gradients of sum(output_cotangent * output) with respect to (x, first_bias, *weights, *biases).

    One launch per layer down, which also recomputes the activation that the gradient of the weight above needs; one or
    two per gradient of a weight or bias.
    """
    depth = len(pre_activations)
    needs_x, needs_first = needs_grad[:2]
    needs_weight, needs_bias = needs_grad[2 : depth + 3], (needs_first, *needs_grad[depth + 3 :])
    weight_grads: dict[int, Tensor] = {}
    bias_grads: dict[int, Tensor] = {}
    shared = first_bias.ndim == 1 or first_bias.shape[0] == 1
    lowest = 0 if needs_x else min((i for i in range(depth + 1) if needs_weight[i] or needs_bias[i]), default=depth + 1)
    above = output_cotangent
    if needs_bias[depth]:
        bias_grads[depth] = column_sum(above, x.dtype)
    for layer in range(depth, -1, -1):
        if layer == 0:
            if needs_weight[0]:
                weight_grads[0] = weight_gradient(above, x, precision=precision)
            break
        if layer <= lowest and not needs_weight[layer]:
            break
        z = pre_activations[layer - 1].contiguous()
        with_sum = needs_bias[layer - 1] and (layer > 1 or shared)
        below, activation, sums = layer_down(
            above, weights[layer], z, activate=needs_weight[layer], with_sum=with_sum, precision=precision
        )
        if activation is not None:
            weight_grads[layer] = weight_gradient(above, activation, precision=precision)
        if sums is not None:
            bias_grads[layer - 1] = column_sum(sums, x.dtype)
        above = below
        if layer == 1 and needs_first:
            bias_grads[0] = bias_grads[0].view(first_bias.shape) if shared else above
    found: list[Tensor | None] = [None] * (2 * depth + 3)
    if needs_x:
        found[0] = layer_down(above, weights[0], None, precision=precision)[0]
    found[1] = bias_grads.get(0)
    for layer in range(depth + 1):
        found[2 + layer] = weight_grads.get(layer)
        if layer > 0:
            found[depth + 2 + layer] = bias_grads.get(layer)
    return [gradient for gradient, needed in zip(found, needs_grad, strict=True) if needed and gradient is not None]


def without_data(
    batch: int, sizes: Sequence[int], outputs: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Arguments of a perceptron of ``sizes`` (inputs and hidden layers) with a shared first bias, for a record."""

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    weights = [empty(m, n) for n, m in zip(sizes, (*sizes[1:], outputs), strict=True)]
    return empty(batch, sizes[0]), empty(1, sizes[1]), weights, [empty(m) for m in (*sizes[2:], outputs)]


def shipped() -> list[Compilation]:
    """Score networks of the two-dimensional experiment, four layers of 128 and of 512, and their derivative."""
    calls: dict[str, Callable[[], object]] = {}
    for dtype, name in TYPES.items():
        for width in (128, 512):
            for batch in (16, 65536):
                network = without_data(batch, (2, *[width] * 4), 2, dtype)
                keep = batch > 16
                calls[f"perceptron-{name}-{width}-{batch}"] = partial(perceptron, *network, keep=keep)
        x, first_bias, weights, biases = network
        kept = [x.new_empty(batch, width) for _ in biases]
        calls[f"perceptron-{name}-backward"] = partial(
            perceptron_backward, x, x, first_bias, weights, kept, needs_grad=[True] * (2 * len(kept) + 3)
        )
    return recorded(calls)
