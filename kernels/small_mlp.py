"""An MLP so small that one program takes a block of rows through all layers: at most four hidden layers of at most 128
units, in 16 bits.

A launch leaves nothing in memory but its results, b B (D + O) bytes for outputs and b B (2 D + 1) for value and
gradient, where layer by layer it is 2 b B S and about 5 b B S more for S hidden units (b bytes a number): at 128 units
that is a byte per 64 FLOPs, which no card's memory keeps up with. Weights, at most 32 KB a layer, come from the L2
cache, once per block of rows on each way.

On the way back the slopes silu'(z) of all layers are in registers (32 rows, 4 x 128 units: 32 KB of 256; with 64 rows
the rest of a block no longer fits and spills). A layer is computed in two halves of its units, of which two 16-bit
slopes share a register.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tgdp_fast.kernels.launching import TYPES, Compilation, Tile, launch, recorded
from tgdp_fast.kernels.matmul import (
    Place,
    accumulate,
    add_bias,
    bias_of,
    matrix_of,
    multiply_add,
    narrow,
    power_of_two,
    sigmoid,
    silu_slope,
    store,
    transposed,
)


class Layer(NamedTuple):
    """A hidden layer: weight [units, units below], in one piece, and bias, each a Matrix; where pre-activations go."""

    weight: Any
    bias: Any
    units: Any
    pre_activation: Any


@triton.jit
def pack(low, high, zero):
    """Two blocks of 16-bit numbers as one of 32 bits: a register would hold one of 16 bits only.

    ``zero`` is one that the compiler does not know; otherwise it would see both numbers and keep them apart.
    """
    low_bits = low.to(tl.uint16, bitcast=True).to(tl.int32)
    return (low_bits | (high.to(tl.uint16, bitcast=True).to(tl.int32) << 16)) + zero


@triton.jit
def unpack_low(pair, DTYPE: tl.constexpr):
    """The first of two packed blocks."""
    return (pair & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)


@triton.jit
def unpack_high(pair, DTYPE: tl.constexpr):
    """The second of two packed blocks."""
    return ((pair >> 16) & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)


@triton.jit
def quarter(weight, units, depth, row, column):
    """weight[row, column] of [units, depth] in one piece, zero beyond."""
    mask = (row < units)[:, None] & (column < depth)[None, :]
    return tl.load(weight + row[:, None] * depth + column[None, :], mask=mask, other=0.0)


@triton.jit
def finish_half(z, layer, place, DTYPE: tl.constexpr):
    """silu(z + bias) and its slope of half a layer in DTYPE; z itself is stored where the layer keeps it."""
    z = add_bias(z, layer.bias, place)
    if layer.pre_activation is not None:
        store(layer.pre_activation, layer.units, place, z)
    s = sigmoid(z)
    return narrow(z * s, DTYPE), narrow(silu_slope(z, s), DTYPE)


@triton.jit
def half_place(row, row_mask, column, units):
    """Half of a layer's units, for a block of rows."""
    return Place(row, row_mask, column.to(tl.int64), column < units, 0, 0)


@triton.jit
def first_half(x, layer, inputs, row, row_mask, column, DEPTH: tl.constexpr):
    """silu(z_1) and silu'(z_1) of half the first layer; x: Matrix."""
    place = half_place(row, row_mask, column, layer.units)
    z = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    z = accumulate(z, x, transposed(layer.weight), place, inputs, DEPTH)
    return finish_half(z, layer, place, x.pointer.dtype.element_ty)


@triton.jit
def next_half(low, high, layer, depth, row, row_mask, column, low_column):
    """silu(z) and silu'(z) of half a layer, on top of both halves of the layer below, of ``depth`` units."""
    weight, high_column = layer.weight.pointer, low_column + low_column.shape[0]
    z = tl.zeros([low.shape[0], column.shape[0]], tl.float32)
    z = multiply_add(low, tl.trans(quarter(weight, layer.units, depth, column, low_column)), z)
    z = multiply_add(high, tl.trans(quarter(weight, layer.units, depth, column, high_column)), z)
    return finish_half(z, layer, half_place(row, row_mask, column, layer.units), low.dtype)


@triton.jit
def forward_block(x, layers, inputs, row, row_mask, column, zero, DEPTH: tl.constexpr):
    """Both halves of the last activation, and the packed slopes of all layers; column: those of the low half."""
    high_column = column + column.shape[0]
    low, slope_low = first_half(x, layers[0], inputs, row, row_mask, column, DEPTH)
    high, slope_high = first_half(x, layers[0], inputs, row, row_mask, high_column, DEPTH)
    slopes = (pack(slope_low, slope_high, zero),)
    for i in tl.static_range(1, len(layers)):
        depth = layers[i - 1].units
        next_low, slope_low = next_half(low, high, layers[i], depth, row, row_mask, column, column)
        next_high, slope_high = next_half(low, high, layers[i], depth, row, row_mask, high_column, column)
        low, high = next_low, next_high
        slopes = slopes + (pack(slope_low, slope_high, zero),)  # type: ignore[assignment]
    return low, high, slopes


@triton.jit
def small_forward_kernel(
    x,
    layers,
    head,
    head_bias,
    output,
    batch,
    inputs,
    outputs,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """All layers of a block of rows in one program.

    x [batch, inputs], a Matrix; layers: a tuple of Layer; head [outputs, units of the last layer], head_bias [outputs]
    and output [batch, outputs], in one piece. Twin: ``_reference_forward``. 2 B P FLOPs for P weights and about 10 B S
    pointwise for S hidden units; bytes: x and the output, and the pre-activations that are kept, once; the weights once
    per block from the L2 cache.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = row < batch
    column = tl.arange(0, HALF)
    low, high, _ = forward_block(x, layers, inputs, row, row_mask, column, tl.minimum(batch, 0), DEPTH)
    depth = layers[len(layers) - 1].units
    for start in range(0, outputs, OUTPUTS):
        out = start + tl.arange(0, OUTPUTS)
        out_mask = out < outputs
        result = tl.zeros([ROWS, OUTPUTS], tl.float32)
        result = multiply_add(low, tl.trans(quarter(head, outputs, depth, out, column)), result)
        result = multiply_add(high, tl.trans(quarter(head, outputs, depth, out, column + HALF)), result)
        result += tl.load(head_bias + out, mask=out_mask, other=0.0).to(tl.float32)[None, :]
        offsets = row[:, None] * outputs + out[None, :]
        tl.store(output + offsets, narrow(result, output.dtype.element_ty), mask=row_mask[:, None] & out_mask[None, :])


@triton.jit
def backward_half(low, high, slope, weight, units, depth, column, low_row):
    """slope * (delta weight) for half the columns of weight [units, depth]; low and high are the halves of delta."""
    eta = tl.zeros([low.shape[0], column.shape[0]], tl.float32)
    eta = multiply_add(low, quarter(weight, units, depth, low_row, column), eta)
    eta = multiply_add(high, quarter(weight, units, depth, low_row + low_row.shape[0], column), eta)
    return narrow(slope.to(tl.float32) * eta, low.dtype)


@triton.jit
def small_value_and_grad_kernel(
    x,
    layers,
    head,
    head_bias,
    value,
    gradient,
    batch,
    inputs,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """All layers forward and backward of a block of rows in one program.

    x [batch, inputs], a Matrix; layers: a tuple of Layer; head [1, units of the last layer], head_bias [1], value
    [batch] and gradient [batch, inputs], in one piece. Twin: ``_reference_value_and_grad``. 4 B P FLOPs for P weights
    and about 20 B S pointwise for S hidden units; bytes: x, value and gradient, and the pre-activations that are kept,
    once; the weights twice per block from the L2 cache.
    """
    dtype: tl.constexpr = gradient.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = row < batch
    column = tl.arange(0, HALF)
    # Unknown to the compiler: see pack. Added to a column it makes new addresses on the way back, for keeping those of
    # the way forward would take more registers than there are.
    zero = tl.minimum(batch, 0)
    low, high, slopes = forward_block(x, layers, inputs, row, row_mask, column, zero, DEPTH)
    column += zero
    units = layers[len(layers) - 1].units
    w_low = tl.load(head + column, mask=column < units, other=0.0).to(tl.float32)[None, :]
    w_high = tl.load(head + HALF + column, mask=HALF + column < units, other=0.0).to(tl.float32)[None, :]
    total = tl.sum(low.to(tl.float32) * w_low + high.to(tl.float32) * w_high, 1)
    tl.store(value + row, narrow(total + tl.load(head_bias).to(tl.float32), dtype), mask=row_mask)
    last = slopes[len(layers) - 1]
    low = narrow(unpack_low(last, dtype).to(tl.float32) * w_low, dtype)
    high = narrow(unpack_high(last, dtype).to(tl.float32) * w_high, dtype)
    for i in tl.static_range(len(layers) - 1, 0, -1):
        weight, units, depth = layers[i].weight.pointer, layers[i].units, layers[i - 1].units
        slope_low, slope_high = unpack_low(slopes[i - 1], dtype), unpack_high(slopes[i - 1], dtype)
        next_low = backward_half(low, high, slope_low, weight, units, depth, column, column)
        next_high = backward_half(low, high, slope_high, weight, units, depth, column + HALF, column)
        low, high = next_low, next_high
    weight, units = layers[0].weight.pointer, layers[0].units
    for start in range(0, inputs, DEPTH):
        below = start + tl.arange(0, DEPTH)
        result = tl.zeros([ROWS, DEPTH], tl.float32)
        result = multiply_add(low, quarter(weight, units, inputs, column, below), result)
        result = multiply_add(high, quarter(weight, units, inputs, column + HALF, below), result)
        mask = row_mask[:, None] & (below < inputs)[None, :]
        tl.store(gradient + row[:, None] * inputs + below[None, :], narrow(result, dtype), mask=mask)


#: Limits of a small MLP.
MOST_LAYERS, MOST_UNITS, MOST_INPUTS = 4, 128, 512


def fits(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether an MLP is small enough for one program per block of rows."""
    widths = [weight.shape[0] for weight in weights[:-1]]
    return len(widths) <= MOST_LAYERS and min(widths) > 0 and max(widths) <= MOST_UNITS and x.shape[1] <= MOST_INPUTS


def _tile(batch: int, inputs: int, widest: int) -> Tile:
    """Rows of a block, half the padded width, and slices of the first layer's matmul."""
    # Few rows give every SM a block of its own; many share a reading of the weights.
    rows, num_warps = (16, 4) if batch <= 2048 else (32, 8)
    return Tile(rows, power_of_two(widest, 32, MOST_UNITS) // 2, power_of_two(inputs, 16, 32), num_warps, 2)


def _launch(
    kernel: Any,
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    results: tuple[Tensor, ...],
    sizes: tuple[int, ...],
    *,
    keep: bool,
    **constants: int,
) -> list[Tensor]:
    """Fill the results, and return the pre-activations with ``keep``; sizes: what a kernel takes after its inputs."""
    batch, inputs = x.shape
    widths = [weight.shape[0] for weight in weights[:-1]]
    kept = [x.new_empty(batch, width) for width in widths] if keep else []
    places: Sequence[Tensor | None] = kept or [None] * len(widths)
    layers = tuple(
        Layer(matrix_of(weight.contiguous()), bias_of(bias), width, z)
        for weight, bias, width, z in zip(weights[:-1], (first_bias, *biases[:-1]), widths, places, strict=True)
    )
    tile = _tile(batch, inputs, max(widths))
    launch(
        kernel,
        (triton.cdiv(batch, tile.rows),),
        matrix_of(x),
        layers,
        weights[-1].contiguous(),
        biases[-1].contiguous(),
        *results,
        batch,
        inputs,
        *sizes,
        tile=tile,
        HALF=tile.columns,
        ROWS=tile.rows,
        DEPTH=tile.depth,
        **constants,
    )
    return kept


def forward(
    x: Tensor, first_bias: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """As ``forward`` of ``mlp.py``, of an MLP that :func:`fits`."""
    count = weights[-1].shape[0]
    output = x.new_empty(x.shape[0], count)
    columns = power_of_two(count, 16, 64)
    network = x, first_bias, weights, biases
    return output, _launch(small_forward_kernel, *network, (output,), (count,), keep=keep, OUTPUTS=columns)


def value_and_grad(
    x: Tensor, first_bias: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *, keep: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """As ``value_and_grad`` of ``mlp.py``, of an MLP that :func:`fits`."""
    results = x.new_empty(x.shape[0]), x.new_empty(x.shape)
    network = x, first_bias, weights, biases
    return *results, _launch(small_value_and_grad_kernel, *network, results, (), keep=keep)


def without_data(
    batch: int, sizes: Sequence[int], outputs: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Arguments of an MLP of ``sizes`` (inputs and hidden layers) with a shared first bias, on tensors without data."""

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    weights = [empty(m, n) for n, m in zip(sizes, (*sizes[1:], outputs), strict=True)]
    return empty(batch, sizes[0]), empty(1, sizes[1]), weights, [empty(m) for m in (*sizes[2:], outputs)]


def shipped() -> list[Compilation]:
    """Score and guidance networks of two inputs and four layers of 128 units, with few rows and with many."""
    calls: dict[str, Callable[[], object]] = {}
    for dtype in (torch.bfloat16, torch.float16):
        name = TYPES[dtype]
        for batch, keep in ((16, False), (65536, True)):
            network = without_data(batch, (2, 128, 128, 128, 128), 2, dtype)
            calls[f"forward-{name}-128-{batch}"] = partial(forward, *network, keep=keep)
        for batch in (256, 65536):
            network = without_data(batch, (2, 128, 128, 128, 128), 1, dtype)
            calls[f"value-{name}-2-128-{batch}"] = partial(value_and_grad, *network, keep=False)
    return recorded(calls)
