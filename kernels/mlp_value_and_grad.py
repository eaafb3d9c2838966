"""Value and input gradient of a SiLU perceptron with one output, and their joint derivative.

Formulas and twins: ``tgdp_fast/ops/mlp_value_and_grad.py``. As in ``kernels/perceptron.py`` it goes layer by layer, in
2 L launches for L hidden layers, to be captured in one CUDA graph. Each has bias, SiLU or its derivative at the end of
its product; the last one up multiplies by the head, adds up its share of the value and goes down already, the first one
down completes the value. Per hidden unit and sample, 2 b bytes are written (a and z) and 3 b read, against 4 H_below
FLOPs: at width 512 in bfloat16 205 FLOPs per byte, most from the level-2 cache, so that the tensor cores are the limit
(a whole network in one program, with 64 rows and four layers of 512, would need 256 KB for slopes and 512 KB per
weight: more than a multiprocessor has). What is smaller goes in one launch: ``kernels/small_network.py``.

The derivative goes layer by layer: a tangent pass up, which also recomputes activations, one pass down in which both
cotangents share a reading of each weight, and a product over the batch per weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from tgdp_fast.kernels import small_network
from tgdp_fast.kernels.launching import TYPES, Compilation, Tile, recorded
from tgdp_fast.kernels.matrix import (
    accumulate,
    add_bias,
    as_rows,
    bias_strides,
    block_of,
    column_sum,
    launch_layer,
    layer_tile,
    narrow,
    precision_of,
    sigmoid,
    silu_curvature,
    silu_slope,
    weight_gradient,
    without_data,
)
from tgdp_fast.kernels.perceptron import layer_down, layer_up, perceptron_backward


@triton.jit
def last_layer_kernel(
    below,
    weight,
    bias,
    head,
    pre_activation,
    delta,
    value_parts,
    batch,
    units,
    depth,
    below_row_stride,
    below_column_stride,
    weight_row_stride,
    weight_column_stride,
    bias_row_stride,
    bias_column_stride,
    head_stride,
    SHARED_BIAS: tl.constexpr,  # noqa: N803
    KEEP: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """The last hidden layer and the turn: z = below weight^T + bias, delta = silu'(z) head.

    below [batch, depth], weight [units, depth], head [units]; pre_activation (z, if KEEP) and delta [batch, units],
    contiguous; value_parts [column blocks, batch] float32: what each block of units adds to the value, silu(z) . head.
    Twin: ``_forward_reference``. 2 B units depth FLOPs in products and about 20 B units pointwise; bytes: below and
    weight once, what is stored once.
    """
    _, row, row_mask, column, column_mask = block_of(batch, units, ROWS, COLUMNS)
    z = accumulate(
        tl.zeros([ROWS, COLUMNS], tl.float32),
        None,
        below,
        None,
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
    s = sigmoid(z, weight.dtype.element_ty == tl.float32)
    w = tl.load(head + column * head_stride, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    offsets = row[:, None] * units + column[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    if KEEP:
        tl.store(pre_activation + offsets, narrow(z, pre_activation.dtype.element_ty), mask=mask)
    tl.store(delta + offsets, narrow(silu_slope(z, s) * w, delta.dtype.element_ty), mask=mask)
    part = (tl.program_id(0) % tl.maximum(tl.cdiv(units, COLUMNS), 1)).to(tl.int64)
    tl.store(value_parts + part * batch + row, tl.sum(z * s * w, 1), mask=row_mask)


@triton.jit
def tangent_up_kernel(
    below,
    weight,
    pre_activation,
    activation,
    tangent,
    product,
    batch,
    units,
    depth,
    below_row_stride,
    below_column_stride,
    weight_row_stride,
    weight_column_stride,
    ACTIVATE: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """One layer of the tangent pass: product v = below weight^T, tangent u = silu'(z) v, and activation silu(z).

    below [batch, depth], weight [units, depth]; pre_activation (z), activation (if ACTIVATE), tangent and product
    [batch, units], contiguous. Twin: the way up in ``mlp_value_and_grad_backward_reference``. 2 B units depth FLOPs in
    products and about 15 B units pointwise; bytes: below and weight once, z once, what is stored once.
    """
    _, row, row_mask, column, column_mask = block_of(batch, units, ROWS, COLUMNS)
    v = accumulate(
        tl.zeros([ROWS, COLUMNS], tl.float32),
        None,
        below,
        None,
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
    offsets = row[:, None] * units + column[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    z = tl.load(pre_activation + offsets, mask=mask, other=0.0).to(tl.float32)
    s = sigmoid(z, weight.dtype.element_ty == tl.float32)
    tl.store(product + offsets, narrow(v, product.dtype.element_ty), mask=mask)
    tl.store(tangent + offsets, narrow(silu_slope(z, s) * v, tangent.dtype.element_ty), mask=mask)
    if ACTIVATE:
        tl.store(activation + offsets, narrow(z * s, activation.dtype.element_ty), mask=mask)


@triton.jit
def tangent_last_kernel(
    below,
    weight,
    head,
    value_cotangent,
    pre_activation,
    zbar,
    delta,
    bias_sums,
    head_sums,
    batch,
    units,
    depth,
    below_row_stride,
    below_column_stride,
    weight_row_stride,
    weight_column_stride,
    head_stride,
    value_cotangent_stride,
    VALUE: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """The last layer of the tangent pass and the turn, with abar = value_cotangent head and eta = head.

    v = below weight^T; delta = silu'(z) head; zbar = silu'(z) abar + silu''(z) v head. below [batch, depth], weight
    [units, depth], head [units], value_cotangent [batch] (zeros without VALUE); pre_activation (z), zbar and delta
    [batch, units], contiguous; bias_sums and head_sums [row blocks, units] float32: zbar, and value_cotangent silu(z) +
    silu'(z) v, added over each block of rows. Twin: ``mlp_value_and_grad_backward_reference``. 2 B units depth FLOPs
    in products and about 25 B units pointwise; bytes: below and weight once, z once, what is stored once.
    """
    block, row, row_mask, column, column_mask = block_of(batch, units, ROWS, COLUMNS)
    v = accumulate(
        tl.zeros([ROWS, COLUMNS], tl.float32),
        None,
        below,
        None,
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
    offsets = row[:, None] * units + column[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    z = tl.load(pre_activation + offsets, mask=mask, other=0.0).to(tl.float32)
    s = sigmoid(z, weight.dtype.element_ty == tl.float32)
    slope = silu_slope(z, s)
    w = tl.load(head + column * head_stride, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    zbar_block = silu_curvature(z, s) * v * w
    head_block = slope * v
    if VALUE:
        fb = tl.load(value_cotangent + row * value_cotangent_stride, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        zbar_block += slope * (fb * w)
        head_block += fb * (z * s)
    tl.store(zbar + offsets, narrow(zbar_block, zbar.dtype.element_ty), mask=mask)
    tl.store(delta + offsets, narrow(slope * w, delta.dtype.element_ty), mask=mask)
    # Rows that do not exist add nothing: their v and cotangent are zero.
    sums = block.to(tl.int64) * units + column
    tl.store(bias_sums + sums, tl.sum(zbar_block, 0), mask=column_mask)
    tl.store(head_sums + sums, tl.sum(head_block, 0), mask=column_mask)


@triton.jit
def joint_down_kernel(
    zbar_above,
    delta_above,
    weight,
    pre_activation,
    product,
    zbar,
    delta,
    sums,
    batch,
    units,
    depth,
    weight_row_stride,
    weight_column_stride,
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """Both cotangents through a layer: zbar = silu'(z) abar + silu''(z) v eta, delta = silu'(z) eta.

    abar = zbar_above weight and eta = delta_above weight; zbar_above and delta_above [batch, depth], contiguous; weight
    [depth, units]; pre_activation (z), product (v), zbar and delta [batch, units], contiguous; sums [row blocks, units]
    float32: zbar added over each block of rows. Twin: ``mlp_value_and_grad_backward_reference``. 4 B units depth FLOPs
    in products and about 25 B units pointwise; bytes: what is read and what is stored once.
    """
    block, row, row_mask, column, column_mask = block_of(batch, units, ROWS, COLUMNS)
    abar, eta = accumulate(
        tl.zeros([ROWS, COLUMNS], tl.float32),
        tl.zeros([ROWS, COLUMNS], tl.float32),
        zbar_above,
        delta_above,
        depth,
        1,
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
    z = tl.load(pre_activation + offsets, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(product + offsets, mask=mask, other=0.0).to(tl.float32)
    s = sigmoid(z, weight.dtype.element_ty == tl.float32)
    slope = silu_slope(z, s)
    zbar_block = slope * abar + silu_curvature(z, s) * v * eta
    tl.store(zbar + offsets, narrow(zbar_block, zbar.dtype.element_ty), mask=mask)
    tl.store(delta + offsets, narrow(slope * eta, delta.dtype.element_ty), mask=mask)
    tl.store(sums + block.to(tl.int64) * units + column, tl.sum(zbar_block, 0), mask=column_mask)


def value_and_grad(
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    keep: bool,
    split: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """f [B], g [B, D] and, with ``keep``, the pre-activations; arguments as of the operator ``mlp_value_and_grad``."""
    if small_network.fits(x, weights):
        return small_network.value_and_grad(x, first_bias, weights, biases, keep=keep)
    precision = precision_of(x.dtype, split)
    all_biases = [as_rows(bias) for bias in (first_bias, *biases[:-1])]
    hidden = weights[:-1]
    pre_activations = []
    activation: Tensor | None = x
    for weight, bias in zip(hidden[:-1], all_biases[:-1], strict=True):
        assert activation is not None
        # The slopes on the way down are those of z, whether or not the caller keeps it.
        z, activation = layer_up(activation, weight, bias, keep=True, activate=True, precision=precision)
        assert z is not None
        pre_activations.append(z)
    assert activation is not None
    z, delta, parts = _last_layer(activation, hidden[-1], all_biases[-1], weights[-1], keep=keep, precision=precision)
    value = x.new_empty(x.shape[0])
    unfinished: tuple[Tensor, Tensor, Tensor] | None = (parts, biases[-1], value)
    for weight, below in zip(reversed(hidden), (*reversed(pre_activations), None), strict=True):
        delta = layer_down(delta, weight, below, value=unfinished, precision=precision)[0]
        unfinished = None
    return value, delta, [*pre_activations, z] if z is not None else []


def _last_layer(
    below: Tensor, weight: Tensor, bias: Tensor, head: Tensor, *, keep: bool, precision: str
) -> tuple[Tensor | None, Tensor, Tensor]:
    """z of the last hidden layer or None, delta [B, H], and what each block of units adds to the value [blocks, B]."""
    (batch, depth), units = below.shape, weight.shape[0]

    def run(tile: Tile) -> tuple[Tensor | None, Tensor, Tensor]:
        delta = below.new_empty(batch, units)
        z = below.new_empty(batch, units) if keep else None
        parts = below.new_empty(max(triton.cdiv(units, tile.columns), 1), batch, dtype=torch.float32)
        launch_layer(
            last_layer_kernel,
            tile,
            (batch, units, depth),
            below,
            weight,
            bias,
            head,
            delta if z is None else z,
            delta,
            parts,
            batch,
            units,
            depth,
            *below.stride(),
            *weight.stride(),
            *bias_strides(bias),
            head.stride(1),
            SHARED_BIAS=bias.shape[0] == 1,
            KEEP=keep,
            precision=precision,
        )
        return z, delta, parts

    return run(layer_tile(batch, units, depth, below.dtype))


def value_and_grad_backward(
    value_cotangent: Tensor | None,
    gradient_cotangent: Tensor | None,
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    pre_activations: Sequence[Tensor],
    *,
    needs_grad: Sequence[bool],
    split: bool,
) -> list[Tensor]:
    """The needed gradients of sum(fb f + gb . g) with respect to (x, first_bias, *weights, *biases).

    Without gb there is no tangent pass and this is the derivative of a perceptron with one output.
    """
    precision = precision_of(x.dtype, split)
    if gradient_cotangent is None:
        fb = x.new_zeros(x.shape[0]) if value_cotangent is None else value_cotangent
        return perceptron_backward(
            fb.unsqueeze(1), x, first_bias, weights, pre_activations, needs_grad=needs_grad, precision=precision
        )
    depth = len(pre_activations)
    needs_x, needs_first = needs_grad[:2]
    needs_weight, needs_bias = needs_grad[2 : depth + 3], (needs_first, *needs_grad[depth + 3 :])
    found: list[Tensor | None] = [None] * (2 * depth + 3)
    weight_at, bias_at = 2, depth + 2  # of layer 0; the bias of layer 0 is first_bias
    if needs_bias[depth]:
        found[bias_at + depth] = (
            x.new_zeros(1) if value_cotangent is None else column_sum(value_cotangent.unsqueeze(1), x.dtype)
        )
    wanted = [needs_weight[i] or needs_bias[i] for i in range(depth)]
    lowest = 0 if needs_x else next((i for i in range(depth) if wanted[i]), depth)

    if lowest < depth or needs_weight[depth]:
        zs = [z.contiguous() for z in pre_activations]
        # Upwards: what each layer sees of the network below it, and of the tangent.
        activations: list[Tensor] = [x]
        tangents, products = [gradient_cotangent], []
        for layer in range(depth - 1):
            activation, tangent, product = _tangent_up(
                tangents[-1], weights[layer], zs[layer], activate=needs_weight[layer + 1], precision=precision
            )
            activations.append(activation)
            tangents.append(tangent)
            products.append(product)
        zbar, delta, sums, head_sums = _tangent_last(
            tangents[-1], weights[depth - 1], weights[depth], value_cotangent, zs[-1], precision=precision
        )
        if needs_weight[depth]:
            found[weight_at + depth] = column_sum(head_sums, x.dtype).unsqueeze(0)
        # Downwards, no further than the lowest layer that somebody needs.
        for layer in range(depth - 1, lowest - 1, -1):
            if needs_weight[layer]:
                found[weight_at + layer] = weight_gradient(
                    zbar, activations[layer], (delta, tangents[layer]), precision=precision
                )
            if layer > 0 and needs_bias[layer]:
                found[bias_at + layer] = column_sum(sums, x.dtype)
            if layer > lowest:
                zbar, delta, sums = _joint_down(
                    zbar, delta, weights[layer], zs[layer - 1], products[layer - 1], precision=precision
                )
        if needs_first:
            shared = first_bias.ndim == 1 or first_bias.shape[0] == 1
            found[1] = column_sum(sums, x.dtype).view(first_bias.shape) if shared else zbar
        if needs_x:
            found[0] = layer_down(zbar, weights[0], None, precision=precision)[0]
    return [gradient for gradient, needed in zip(found, needs_grad, strict=True) if needed and gradient is not None]


def _tangent_up(
    below: Tensor, weight: Tensor, z: Tensor, *, activate: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """silu(z), or z itself where that is not needed; u = silu'(z) v; v = below weight^T."""
    (batch, depth), units = below.shape, weight.shape[0]

    def run(tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        activation = torch.empty_like(z) if activate else z
        tangent, product = torch.empty_like(z), torch.empty_like(z)
        launch_layer(
            tangent_up_kernel,
            tile,
            (batch, units, depth),
            below,
            weight,
            z,
            activation,
            tangent,
            product,
            batch,
            units,
            depth,
            *below.stride(),
            *weight.stride(),
            ACTIVATE=activate,
            precision=precision,
        )
        return activation, tangent, product

    crowded = below.dtype != torch.float32
    return run(layer_tile(batch, units, depth, below.dtype, crowded=crowded))


def _tangent_last(
    below: Tensor, weight: Tensor, head: Tensor, value_cotangent: Tensor | None, z: Tensor, *, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """zbar and delta of the last hidden layer [B, H], and sums over blocks of rows for its bias and for the head."""
    (batch, depth), units = below.shape, weight.shape[0]

    def run(tile: Tile) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        zbar, delta = torch.empty_like(z), torch.empty_like(z)
        bias_sums, head_sums = z.new_empty(2, triton.cdiv(batch, tile.rows), units, dtype=torch.float32)
        launch_layer(
            tangent_last_kernel,
            tile,
            (batch, units, depth),
            below,
            weight,
            head,
            z if value_cotangent is None else value_cotangent,
            z,
            zbar,
            delta,
            bias_sums,
            head_sums,
            batch,
            units,
            depth,
            *below.stride(),
            *weight.stride(),
            head.stride(1),
            0 if value_cotangent is None else value_cotangent.stride(0),
            VALUE=value_cotangent is not None,
            precision=precision,
        )
        return zbar, delta, bias_sums, head_sums

    crowded = below.dtype != torch.float32
    return run(layer_tile(batch, units, depth, below.dtype, crowded=crowded))


def _joint_down(
    zbar_above: Tensor, delta_above: Tensor, weight: Tensor, z: Tensor, product: Tensor, *, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """zbar and delta [B, H] of the layer below ``weight``, and zbar added over blocks of rows."""
    (batch, depth), units = zbar_above.shape, weight.shape[1]

    def run(tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        zbar, delta = torch.empty_like(z), torch.empty_like(z)
        sums = z.new_empty(triton.cdiv(batch, tile.rows), units, dtype=torch.float32)
        launch_layer(
            joint_down_kernel,
            tile,
            (batch, units, depth),
            zbar_above,
            delta_above,
            weight,
            z,
            product,
            zbar,
            delta,
            sums,
            batch,
            units,
            depth,
            *weight.stride(),
            products=2,
            precision=precision,
        )
        return zbar, delta, sums

    return run(layer_tile(batch, units, depth, zbar_above.dtype, crowded=True))


def shipped() -> list[Compilation]:
    """Guidance networks of two inputs and of the ECG's 3904, four layers of 128 and of 512, and their derivative."""
    calls: dict[str, Callable[[], object]] = {}
    for dtype, name in TYPES.items():
        for inputs, width, batch in ((2, 128, 256), (2, 128, 65536), (2, 512, 16), (2, 512, 65536), (3904, 512, 256)):
            network = without_data(batch, (inputs, *[width] * 4), 1, dtype)
            if small_network.fits(network[0], network[2]):
                continue
            calls[f"mlp-{name}-{inputs}-{width}-{batch}"] = partial(value_and_grad, *network, keep=False, split=False)
        x, first_bias, weights, biases = without_data(65536, (2, 512, 512, 512, 512), 1, dtype)
        kept = [x.new_empty(len(x), 512) for _ in biases]
        calls[f"mlp-{name}-backward"] = partial(
            value_and_grad_backward,
            x.new_empty(len(x)),
            x,
            x,
            first_bias,
            weights,
            kept,
            needs_grad=[True] * (2 * len(kept) + 3),
            split=False,
        )
    return recorded(calls)
