"""The matmuls of a residual block of the SSSD-ECG network, fused with everything pointwise and over channels.

Reference twin ``tgdp_fast.ops.residual_block.residual_block_reference_``. Seven launches, two of them of
``long_convolution.py``:

1. ``transposed_kernel``: the residual stream, rounded to factors, with the channels of a position in one piece: the
   inputs of the three taps of the convolution start at whole rows, so that their loads are wide;
2. ``taps_kernel``: the convolution of three taps and the step's bias;
3. and 5. the long convolution with GELU;
4. and 6. ``mixture_kernel``: a program has all channels of some positions, so that LayerNorm follows the matmul in
   registers, and after the second layer the gate;
7. ``output_kernel``: the residual and the skip matmul, which change the state.

State, accumulators, statistics and the first u, which is unbounded, are float32; u between the layers is normalized,
and in 16 bits if the matmuls are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tgdp_fast.kernels import launching, long_convolution
from tgdp_fast.kernels.launching import Compilation, Tile
from tgdp_fast.kernels.matmul import INTERPRETED, multiply_add, power_of_two, saturated


class Layer(NamedTuple):
    """An S4 layer: ``tgdp_fast.ops.S4Weights`` with the filters as :func:`long_convolution.pack` gives them."""

    packed: Tensor
    scales: Tensor
    mixture: Tensor
    mixture_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    epsilon: float


class Block(NamedTuple):
    """``tgdp_fast.ops.ResidualBlockWeights``."""

    convolution: Tensor
    first: Layer
    second: Layer
    output: Tensor
    output_bias: Tensor


@triton.jit
def transposed_kernel(
    state,
    output,
    channels,
    groups,
    state_sample_stride,
    width,
    ALIGNMENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """output[b, 1 + t, c] = state[b, c, t], and zeros at [b, 0] and [b, L + 1], with L = groups * ALIGNMENT.

    output [B, L + 2, width], state float32 of ``channels`` or more. A program writes ROWS positions of COLUMNS
    channels. Twin: ``state[:, :C].mT``, padded. Moves both once; no FLOPs to speak of.
    """
    length = groups * ALIGNMENT
    tiles = tl.cdiv(length, ROWS)
    sample, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    position = tile * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    state += sample * (state_sample_stride * ALIGNMENT) + channel[:, None].to(tl.int64) * length + position[None, :]
    values = tl.load(state, mask=(channel < channels)[:, None] & (position < length)[None, :], other=0.0)
    output += sample * ((length + 2) * width.to(tl.int64)) + channel
    inside = channel < width
    zeros = tl.zeros([COLUMNS], output.dtype.element_ty)
    if tile == 0:
        tl.store(output, zeros, mask=inside)
    if tile == tiles - 1:
        tl.store(output + (length + 1) * width, zeros, mask=inside)
    output = output[None, :] + (1 + position)[:, None] * width
    mask = (position < length)[:, None] & inside[None, :]
    tl.store(output, saturated(tl.trans(values), output.dtype.element_ty), mask=mask)


@triton.jit
def _matmul(
    x,
    weight,
    row,
    row_mask,
    column,
    column_mask,
    channels,
    width,
    TAPS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[r, t] = sum over i < TAPS and c < channels of weight[r, i channels + c] x[t + i, c]; rows of x are ``width``."""
    inner = tl.arange(0, DEPTH)
    # Within a sample and a matrix, 32 bits are enough: there are at most 1024 rows of 1536.
    weight_offsets = row[:, None] * (TAPS * channels) + inner[None, :]
    x_offsets = column[None, :] * width + inner[:, None]
    total = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    slices = tl.cdiv(channels, DEPTH)
    for i in range(0, TAPS * slices):
        tap, start = i // slices, i % slices * DEPTH
        inside = inner < channels - start
        left_mask = row_mask[:, None] & inside[None, :]
        left = tl.load(weight + (tap * channels + start) + weight_offsets, mask=left_mask, other=0.0)
        right_mask = inside[:, None] & column_mask[None, :]
        right = tl.load(x + (tap * width + start) + x_offsets, mask=right_mask, other=0.0)
        total = multiply_add(left, right, total, PRECISION)
    return total


@triton.jit
def _tile(
    rows,
    length,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sample, rows and positions of this program. Programs that share positions are neighbours."""
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(length, COLUMNS)
    program = tl.program_id(0)
    row = (program % down) * ROWS + tl.arange(0, ROWS)
    column = (program // down % across) * COLUMNS + tl.arange(0, COLUMNS)
    return (program // (down * across)).to(tl.int64), row, column


@triton.jit
def taps_kernel(
    x,
    weight,
    step_bias,
    output,
    hidden,
    channels,
    length,
    stride,
    width,
    step_sample_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """output[b, h, t] = sum over taps i, channels c of weight[h, i channels + c] x[b, t + i, c], and the step's bias.

    output float32 [B, hidden, stride], of which ``length`` positions are used; x [B, length + 2, width], see
    :func:`transposed_kernel`; weight [hidden, 3 channels]; step_bias float32 [.., 3, hidden]: the bias inside, and
    the parts that the first and the last position lack.

    Twin: the first matmul of ``residual_block_reference_``. 6 B L hidden channels FLOPs; bytes: all once, if the L2
    cache serves what several programs read.
    """
    sample, row, column = _tile(hidden, length, ROWS, COLUMNS)
    row_mask, column_mask = row < hidden, column < length
    x += sample * (length + 2) * width
    total = _matmul(x, weight, row, row_mask, column, column_mask, channels, width, 3, DEPTH, PRECISION)
    step_bias += sample * step_sample_stride + row
    total += tl.load(step_bias, mask=row_mask, other=0.0)[:, None]
    at_first = tl.load(step_bias + hidden, mask=row_mask, other=0.0)
    at_last = tl.load(step_bias + 2 * hidden, mask=row_mask, other=0.0)
    total = tl.where((column == 0)[None, :], total - at_first[:, None], total)
    total = tl.where((column == length - 1)[None, :], total - at_last[:, None], total)
    output += sample * hidden * stride
    mask = row_mask[:, None] & (column < stride)[None, :]
    tl.store(output + (row[:, None] * stride + column[None, :]), total, mask=mask)


@triton.jit
def output_kernel(
    gated,
    weight,
    bias,
    state,
    rows,
    channels,
    groups,
    width,
    ALIGNMENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """state = [state[:, :channels] / sqrt 2; the rest] + weight gated + bias, with L = groups * ALIGNMENT.

    state float32 [B, rows, L]; gated [B, L + 2, width], position t at 1 + t; weight [rows, channels]; bias float32
    [rows].

    Twin: the last matmul of ``residual_block_reference_``. 2 B L rows channels FLOPs; bytes: the state twice, the
    others once.
    """
    length = groups * ALIGNMENT
    sample, row, column = _tile(rows, length, ROWS, COLUMNS)
    row_mask, column_mask = row < rows, column < length
    gated += sample * (length + 2) * width + width
    total = _matmul(gated, weight, row, row_mask, column, column_mask, channels, width, 1, DEPTH, PRECISION)
    state += sample * rows * length
    offsets = row[:, None] * length + column[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    old = tl.load(state + offsets, mask=mask, other=0.0)
    total += tl.load(bias + row, mask=row_mask, other=0.0)[:, None]
    tl.store(state + offsets, tl.where((row < channels)[:, None], old * 0.7071067811865476, old) + total, mask=mask)


@triton.jit
def gate(a, b):
    """tanh(a) sigmoid(b), float32, to a few units in the last place; two exponentials and one division."""
    magnitude = tl.abs(a)
    square = a * a
    # tanh(m) = m + m^3 p(m^2), minimax in the relative error, where the quotient below would cancel.
    p = -0.005704996176064014 * square + 0.020639095455408096
    p = p * square - 0.05373971909284592
    p = p * square + 0.13331441581249237
    p = p * square - 0.3333328068256378
    small = magnitude < 0.625
    # tanh(m) = (1 - t) / (1 + t), t = exp(-2 m).
    t = tl.exp(-2.0 * magnitude)
    numerator = tl.where(small, magnitude + (magnitude * square) * p, 1.0 - t)
    denominator = tl.where(small, 1.0, 1.0 + t) * (1.0 + tl.exp(-b))
    result = numerator / denominator
    return tl.where(a < 0.0, -result, result)


@triton.jit
def _rows(u, bias, channel, channel_mask, mask):
    """Half of the channels of u, with a bias, float32."""
    shift = tl.load(bias + channel, mask=channel_mask, other=0.0)
    return tl.load(u, mask=mask, other=0.0).to(tl.float32) + shift[:, None]


@triton.jit
def _affine(z, weight, bias, label_bias, channel, mask):
    """Half of the channels of LayerNorm's output, from what has moments 0 and 1."""
    shift = tl.load(bias + channel, mask=mask, other=0.0)
    if label_bias is not None:
        shift += tl.load(label_bias + channel, mask=mask, other=0.0)
    return z * tl.load(weight + channel, mask=mask, other=0.0)[:, None] + shift[:, None]


@triton.jit
def mixture_kernel(
    y,
    mixture,
    u,
    output,
    vectors,
    label_bias,
    epsilon,
    channels,
    groups,
    stride,
    width,
    label_sample_stride,
    GATED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """LayerNorm(u + mixture y + mixture_bias) at COLUMNS positions of a sample, 2 ``channels`` = H wide, to output.

    y, u and output [B, H, stride], of which L = groups * ALIGNMENT positions are used; vectors: mixture_bias, and the
    weight and bias of LayerNorm, float32 [H]. With GATED, output is what :func:`output_kernel` reads, [B, L + 2,
    width], and becomes tanh(first half) sigmoid(second half) of that.

    The halves have accumulators of their own, each [CHANNELS, COLUMNS], so that the gate is pointwise.

    Twin: ``_s4`` after the convolution, and ``gated_activation_reference``. 2 B L H^2 FLOPs; bytes: all once, if the L2
    cache serves the weights, which every program reads.
    """
    mixture_bias, norm_weight, norm_bias = vectors
    length, hidden = groups * ALIGNMENT, 2 * channels
    tiles = tl.cdiv(length, COLUMNS)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    column = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    channel, inner = tl.arange(0, CHANNELS), tl.arange(0, DEPTH)
    channel_mask, column_mask = channel < channels, column < length
    mask = channel_mask[:, None] & column_mask[None, :]
    # Within a sample and a matrix, 32 bits are enough: there are at most 1024 rows of 1024.
    y += sample * hidden * stride
    u += sample * hidden * stride
    y_offsets = inner[:, None] * stride + column[None, :]
    offsets, half = channel[:, None] * stride + column[None, :], channels * stride
    first = _rows(u + offsets, mixture_bias, channel, channel_mask, mask)
    second = _rows(u + half + offsets, mixture_bias + channels, channel, channel_mask, mask)
    weight_offsets = channel[:, None] * hidden + inner[None, :]
    for start in range(0, hidden, DEPTH):
        inside = inner < hidden - start
        left_mask = channel_mask[:, None] & inside[None, :]
        right = tl.load(y + y_offsets, mask=inside[:, None] & column_mask[None, :], other=0.0)
        left = tl.load(mixture + weight_offsets, mask=left_mask, other=0.0)
        first = multiply_add(left, right, first, PRECISION)
        left = tl.load(mixture + channels * hidden + weight_offsets, mask=left_mask, other=0.0)
        second = multiply_add(left, right, second, PRECISION)
        mixture += DEPTH
        y += DEPTH * stride
    # Outside, first and second are 0 here, and stay 0.
    mean = (tl.sum(first, 0) + tl.sum(second, 0)) / hidden
    first = tl.where(mask, first - mean[None, :], 0.0)
    second = tl.where(mask, second - mean[None, :], 0.0)
    variance = (tl.sum(first * first, 0) + tl.sum(second * second, 0)) / hidden
    scale = tl.rsqrt(variance + epsilon)[None, :]
    if label_bias is not None:
        label_bias += sample * label_sample_stride
        further_bias = label_bias + channels
    else:
        further_bias = None
    first = _affine(first * scale, norm_weight, norm_bias, label_bias, channel, channel_mask)
    second = _affine(second * scale, norm_weight + channels, norm_bias + channels, further_bias, channel, channel_mask)
    if GATED:
        output += sample * (length + 2) * width + width
        value = saturated(gate(first, second), output.dtype.element_ty)
        tl.store(output + (column[None, :] * width + channel[:, None]), value, mask=mask)
    else:
        output += sample * hidden * stride
        tl.store(output + offsets, saturated(first, output.dtype.element_ty), mask=mask)
        tl.store(output + half + offsets, saturated(second, output.dtype.element_ty), mask=mask)


def precision_of(dtype: torch.dtype) -> str:
    """Precision of the matmuls of a dtype: those of float32 as six of bfloat16, with the errors of float32."""
    return "bf16x6" if dtype == torch.float32 and not INTERPRETED.value else "ieee"


def transpose(output: Tensor, state: Tensor, channels: int) -> None:
    """Fill output [B, L + 2, W], W a multiple of 16, from the first channels of state [B, R, L]."""
    batch, rows, width = output.shape
    length = state.shape[2]
    alignment = launching.alignment(length, state.stride(0))
    tile = Tile(64, 32, 1, 4, 1)
    launching.launch(
        transposed_kernel,
        (batch * triton.cdiv(length, tile.rows), triton.cdiv(width, tile.columns)),
        state,
        output,
        channels,
        length // alignment,
        state.stride(0) // alignment,
        width,
        tile=tile,
        ALIGNMENT=alignment,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
    )


def taps(output: Tensor, x: Tensor, weight: Tensor, step_bias: Tensor) -> None:
    """Fill output float32 [B, H, P] up to position L from x [B, L + 2, W], weight [H, 3 C], step_bias [B or 1, 3, H].

    The last two dimensions of step_bias are in one piece.
    """
    (batch, rows, width), (hidden, depth), stride = x.shape, weight.shape, output.shape[2]
    length = rows - 2
    tile = _taps_tile(batch * length, hidden, depth // 3, dtype=weight.dtype)
    launching.launch(
        taps_kernel,
        (batch * triton.cdiv(hidden, tile.rows) * triton.cdiv(length, tile.columns),),
        x,
        weight,
        step_bias,
        output,
        hidden,
        depth // 3,
        length,
        stride,
        width,
        _sample_stride(step_bias),
        tile=tile,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        PRECISION=precision_of(weight.dtype),
    )


def _taps_tile(positions: int, hidden: int, channels: int, *, dtype: torch.dtype) -> Tile:
    """Large tiles if they fill a card, else small ones; both in 99 KB of shared memory."""
    few = positions * hidden < 128 * 128 * 128
    if dtype == torch.float32:
        tile = Tile(64, 32, 32, 4, 3) if few else Tile(64, 64, 16, 4, 3)
    else:
        tile = Tile(128, 64, 64, 4, 4) if few else Tile(128, 256, 32, 8, 4)
    return _fitted(tile, hidden, positions, channels)


def _output_tile(positions: int, rows: int, channels: int, *, dtype: torch.dtype) -> Tile:
    """As for the taps, but at most 128 positions: a program has old numbers of the state in registers besides."""
    tile = _taps_tile(positions, rows, channels, dtype=dtype)
    return tile if tile.columns <= 128 else _fitted(Tile(128, 128, 64, 8, 3), rows, positions, channels)


def _fitted(tile: Tile, rows: int, columns: int, depth: int) -> Tile:
    return tile._replace(
        rows=power_of_two(rows, 16, tile.rows),
        columns=power_of_two(columns, 16, tile.columns),
        depth=power_of_two(depth, 16, tile.depth),
    )


def output(state: Tensor, gated: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Change state [B, R, L] by the output matmul of gated [B, L + 2, W] with weight [R, C] and bias [R]."""
    (batch, rows, length), channels = state.shape, weight.shape[1]
    alignment = launching.alignment(length)
    tile = _output_tile(batch * length, rows, channels, dtype=weight.dtype)
    launching.launch(
        output_kernel,
        (batch * triton.cdiv(rows, tile.rows) * triton.cdiv(length, tile.columns),),
        gated,
        weight,
        bias,
        state,
        rows,
        channels,
        length // alignment,
        gated.shape[2],
        tile=tile,
        ALIGNMENT=alignment,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        PRECISION=precision_of(weight.dtype),
    )


def mixture(
    output: Tensor,
    y: Tensor,
    u: Tensor,
    weight: Tensor,
    vectors: tuple[Tensor, Tensor, Tensor],
    label_bias: Tensor | None,
    epsilon: float,
    length: int,
    *,
    gated: bool,
) -> None:
    """A layer's mixture, residual connection and LayerNorm, up to position ``length``.

    Args:
        output: [B, H, P] like u, or with ``gated`` [B, L + 2, W] for the gate of it.
        y, u: [B, H, P].
        weight: [H, H].
        vectors: the mixture's bias, LayerNorm's weight and bias, float32 [H].
        label_bias: float32 [B or 1, H], rows in one piece, or None.
        epsilon: of LayerNorm.
        length: positions.
        gated: whether to apply the gate.
    """
    batch, hidden, stride = u.shape
    alignment = launching.alignment(length)
    tile = _mixture_tile(batch, length, hidden, dtype=weight.dtype)
    launching.launch(
        mixture_kernel,
        (batch * triton.cdiv(length, tile.columns),),
        y,
        weight,
        u,
        output,
        vectors,
        label_bias,
        epsilon,
        hidden // 2,
        length // alignment,
        stride,
        output.shape[2],
        0 if label_bias is None else _sample_stride(label_bias),
        tile=tile,
        GATED=gated,
        ALIGNMENT=alignment,
        CHANNELS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        PRECISION=precision_of(weight.dtype),
    )


def _mixture_tile(batch: int, length: int, hidden: int, *, dtype: torch.dtype) -> Tile:
    """All channels of as many positions as registers hold; fewer if that leaves multiprocessors idle."""
    rows = triton.next_power_of_2(max(triton.cdiv(hidden, 2), 16))
    if dtype == torch.float32:
        tile = Tile(rows, 16, 16, 8, 2)
    else:
        tile = Tile(rows, 16 if batch * length < 132 * 32 else 64, 32, 8, 3)
    return _fitted(tile._replace(columns=max(tile.columns >> (rows > 256), 16)), rows, length, hidden)


def _sample_stride(bias: Tensor) -> int:
    """0 if one row serves all."""
    return 0 if bias.shape[0] == 1 else bias.stride(0)


def launch(state: Tensor, step_bias: Tensor, label_bias: Tensor | None, weights: Block) -> None:
    """The whole block; changes ``state``.

    Args:
        state: float32 [B, C + S, L], contiguous.
        step_bias: float32 [B or 1, 3, H], rows in one piece.
        label_bias: float32 [B or 1, H], rows in one piece, or None.
        weights: contiguous.
    """
    batch, _, length = state.shape
    channels, dtype = weights.output.shape[1], weights.output.dtype
    exact = dtype == torch.float32
    # Rows start at multiples of one access.
    x = state.new_empty(batch, length + 2, _up_to_16(channels), dtype=dtype)
    shape = (batch, 2 * channels, _up_to_16(length))
    u = state.new_empty(shape)
    y = state.new_empty(shape, dtype=dtype)
    between = state.new_empty(shape, dtype=torch.float32 if exact else torch.float16)
    transpose(x, state, channels)
    taps(u, x, weights.convolution, step_bias)
    # Once the taps have read x, the gate may take its place.
    for layer, before, after, label in ((weights.first, u, between, label_bias), (weights.second, between, x, None)):
        convolve(y[..., :length], before[..., :length], layer, exact=exact)
        vectors = layer.mixture_bias, layer.norm_weight, layer.norm_bias
        mixture(after, y, before, layer.mixture, vectors, label, layer.epsilon, length, gated=after is x)
    output(state, x, weights.output, weights.output_bias)


def convolve(output: Tensor, u: Tensor, layer: Layer, *, exact: bool) -> None:
    """Fill output [B, H, L] with gelu(filters * u), by the kernel for which the layer's filters are packed."""
    if layer.packed.ndim == _CUDA_DIMENSIONS:
        torch.ops.tgdp_fast.cuda_long_convolution_(u, layer.packed, layer.scales, True, not exact, output)
    else:
        filters = layer.packed, layer.scales
        long_convolution.launch(output, u, *filters, activation=True, exact=exact, saturate=not exact)


#: Of spectra that are packed for the CUDA kernel, [H, M, 2]; Triton's are [H, 2, A, B].
_CUDA_DIMENSIONS = 3


def _up_to_16(size: int) -> int:
    return triton.cdiv(size, 16) * 16


def without_data(shape: tuple[int, int, int, int], dtype: torch.dtype, labels: bool = True) -> Callable[[], None]:
    """A launch on tensors without data, of a block for B, C, S, L."""
    batch, channels, skip, length = shape
    hidden = 2 * channels
    points = long_convolution.points_of(length)
    assert points is not None

    def empty(*size: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=of, device="meta")

    packed = empty(
        hidden, 2, *long_convolution.FACTORS[points], of=torch.float32 if dtype == torch.float32 else torch.float16
    )
    vector = empty(hidden)
    layer = Layer(packed, vector, empty(hidden, hidden, of=dtype), vector, vector, vector, 1e-5)
    weights = Block(
        empty(hidden, 3 * channels, of=dtype),
        layer,
        layer,
        empty(channels + skip, channels, of=dtype),
        empty(channels + skip),
    )
    label_bias = empty(batch, hidden) if labels else None
    return partial(launch, empty(batch, channels + skip, length), empty(1, 3, hidden), label_bias, weights)


def shipped() -> list[Compilation]:
    """Blocks of the paper's size for several samples and for one, and small odd ones."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    return launching.recorded(
        {
            "block-bf16": without_data((8, 256, 256, 1000), bf16),
            "block-fp16": without_data((8, 256, 256, 1000), fp16),
            "block-fp32": without_data((8, 256, 256, 1000), fp32),
            "block-one-bf16": without_data((1, 256, 256, 1000), bf16),
            "block-one-fp32": without_data((1, 256, 256, 1000), fp32),
            "block-odd": without_data((3, 34, 20, 129), bf16, labels=False),
        }
    )
