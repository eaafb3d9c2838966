"""A SiLU MLP layer by layer, for any width, in 16 bits: its outputs, value and input gradient, and their derivatives.

Formulas and reference twins: ``tgdp_fast/ops/mlp.py``. One launch per layer forward and one backward, to be captured in
one CUDA graph, with bias, SiLU or its derivative at the end of each matmul. For value and gradient, the last launch
forward multiplies by the head, adds up its share of the value and computes the first cotangent, and the first launch
backward completes the value. The derivative of value and gradient is a tangent pass forward, which also recomputes
activations, one pass backward in which both cotangents share a reading of each weight, and a matmul over the batch per
weight.

A layer of H units reads and writes b B H bytes of its input and output beside its weights (b bytes per number), where
PyTorch reads and writes them three times, and does 2 B H H_below FLOPs. At width 512 a weight does not fit next to the
activations in shared memory, and the matmuls are what takes the time: some 200 FLOPs per byte moved, most from the L2
cache. Smaller MLPs take one launch: ``small_mlp.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tgdp_fast.kernels import small_mlp
from tgdp_fast.kernels.launching import TYPES, Compilation, launch, recorded
from tgdp_fast.kernels.matmul import (
    accumulate,
    accumulate_two,
    add_bias,
    bias_of,
    blocks,
    column_sum,
    layer_tile,
    load,
    load_row,
    matrix_of,
    narrow,
    place_of,
    sigmoid,
    silu_curvature,
    silu_slope,
    store,
    transposed,
    weight_gradient,
)


class ValueParts(NamedTuple):
    """The unfinished sum of the value: ``value`` [B] = sum of ``parts`` [count, B] float32 + ``bias`` [1]."""

    parts: Any
    count: Any
    bias: Any
    value: Any


@triton.jit
def forward_kernel(
    below,
    weight,
    bias,
    pre_activation,
    activation,
    batch,
    units,
    depth,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """z = below weight^T + bias and silu(z), each where its pointer is not None.

    below [batch, depth], weight [units, depth] and bias, each a Matrix; pre_activation (z) and activation [batch,
    units], in one piece. Twin: a layer of ``_reference_forward``. 2 B units depth FLOPs in the matmul and about 10 B
    units pointwise; bytes: below and weight once, what is stored once.
    """
    place = place_of(batch, units, ROWS, COLUMNS)
    z = accumulate(tl.zeros([ROWS, COLUMNS], tl.float32), below, transposed(weight), place, depth, DEPTH)
    z = add_bias(z, bias, place)
    if pre_activation is not None:
        store(pre_activation, units, place, z)
    if activation is not None:
        store(activation, units, place, z * sigmoid(z))


@triton.jit
def forward_last_kernel(
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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The last hidden layer and the turn: z = below weight^T + bias, delta = silu'(z) head.

    below [batch, depth], weight [units, depth], bias and head [1, units], each a Matrix; pre_activation (z, or None)
    and delta [batch, units], in one piece; value_parts [column blocks, batch] float32: what each block of units adds to
    the value, silu(z) . head. Twin: ``_reference_value_and_grad``. 2 B units depth FLOPs in the matmul and about 20 B
    units pointwise; bytes: below and weight once, what is stored once.
    """
    place = place_of(batch, units, ROWS, COLUMNS)
    z = accumulate(tl.zeros([ROWS, COLUMNS], tl.float32), below, transposed(weight), place, depth, DEPTH)
    z = add_bias(z, bias, place)
    s = sigmoid(z)
    w = load_row(head, place)
    if pre_activation is not None:
        store(pre_activation, units, place, z)
    store(delta, units, place, silu_slope(z, s) * w)
    parts = value_parts + place.column_block.to(tl.int64) * batch + place.row
    tl.store(parts, tl.sum(z * s * w, 1), mask=place.row_mask)


@triton.jit
def backward_kernel(
    above,
    weight,
    pre_activation,
    output,
    activation,
    sums,
    unfinished,
    batch,
    units,
    depth,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """output = above weight, times silu'(z) where pre_activation (z) is not None.

    above [batch, depth] and weight [depth, units], each a Matrix; pre_activation, output and activation [batch, units],
    in one piece. Where they are not None also activation = silu(z), which the gradient of the weight above needs; sums
    [row blocks, units] float32, the output added over each block of rows: the gradient of a bias before its last
    addition; and unfinished, a ValueParts, is finished, which would cost a launch of its own. Twin: a layer of
    ``mlp_backward_reference``. 2 B units depth FLOPs and about 10 B units pointwise; bytes: above and weight once, z
    once, what is stored once.
    """
    place = place_of(batch, units, ROWS, COLUMNS)
    result = accumulate(tl.zeros([ROWS, COLUMNS], tl.float32), above, weight, place, depth, DEPTH)
    if pre_activation is not None:
        z = load(pre_activation, units, place)
        s = sigmoid(z)
        result *= silu_slope(z, s)
        if activation is not None:
            store(activation, units, place, z * s)
    store(output, units, place, result)
    if sums is not None:
        # Rows beyond the batch are zero, because their left factor was.
        tl.store(sums + place.row_block * units + place.column, tl.sum(result, 0), mask=place.column_mask)
    if unfinished is not None:  # noqa: SIM102 - the compiler drops the inner condition if the outer one is constant
        if place.column_block == 0:
            total = tl.zeros([ROWS], tl.float32) + tl.load(unfinished.bias).to(tl.float32)
            parts = unfinished.parts + place.row
            for _ in range(unfinished.count):
                total += tl.load(parts, mask=place.row_mask, other=0.0)
                parts += batch
            value = unfinished.value
            tl.store(value + place.row, narrow(total, value.dtype.element_ty), mask=place.row_mask)


@triton.jit
def tangent_kernel(
    below,
    weight,
    pre_activation,
    activation,
    tangent,
    product,
    batch,
    units,
    depth,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One layer of the tangent pass: product v = below weight^T, tangent u = silu'(z) v, and activation silu(z).

    below [batch, depth] and weight [units, depth], each a Matrix; pre_activation (z), activation (or None), tangent and
    product [batch, units], in one piece. Twin: the way forward in ``mlp_value_and_grad_backward_reference``. 2 B units
    depth FLOPs in the matmul and about 15 B units pointwise; bytes: below and weight once, z once, what is stored once.
    """
    place = place_of(batch, units, ROWS, COLUMNS)
    v = accumulate(tl.zeros([ROWS, COLUMNS], tl.float32), below, transposed(weight), place, depth, DEPTH)
    z = load(pre_activation, units, place)
    s = sigmoid(z)
    store(product, units, place, v)
    store(tangent, units, place, silu_slope(z, s) * v)
    if activation is not None:
        store(activation, units, place, z * s)


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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The last layer of the tangent pass and the turn, with abar = value_cotangent head and eta = head.

    v = below weight^T; delta = silu'(z) head; zbar = silu'(z) abar + silu''(z) v head. below [batch, depth], weight
    [units, depth] and head [1, units], each a Matrix; value_cotangent: pointer and stride of [batch], or None for
    zeros; pre_activation (z), zbar and delta [batch, units], in one piece; bias_sums and head_sums [row blocks, units]
    float32: zbar, and value_cotangent silu(z) + silu'(z) v, added over each block of rows. Twin:
    ``mlp_value_and_grad_backward_reference``. 2 B units depth FLOPs in the matmul and about 25 B units pointwise;
    bytes: below and weight once, z once, what is stored once.
    """
    place = place_of(batch, units, ROWS, COLUMNS)
    v = accumulate(tl.zeros([ROWS, COLUMNS], tl.float32), below, transposed(weight), place, depth, DEPTH)
    z = load(pre_activation, units, place)
    s = sigmoid(z)
    slope = silu_slope(z, s)
    w = load_row(head, place)
    zbar_block = silu_curvature(z, s) * v * w
    head_block = slope * v
    if value_cotangent is not None:
        pointer = value_cotangent[0] + place.row * value_cotangent[1]
        fb = tl.load(pointer, mask=place.row_mask, other=0.0).to(tl.float32)[:, None]
        zbar_block += slope * (fb * w)
        head_block += fb * (z * s)
    store(zbar, units, place, zbar_block)
    store(delta, units, place, slope * w)
    # Rows beyond the batch add nothing: their v and cotangent are zero.
    sums = place.row_block * units + place.column
    tl.store(bias_sums + sums, tl.sum(zbar_block, 0), mask=place.column_mask)
    tl.store(head_sums + sums, tl.sum(head_block, 0), mask=place.column_mask)


@triton.jit
def joint_backward_kernel(
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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Both cotangents through a layer: zbar = silu'(z) abar + silu''(z) v eta, delta = silu'(z) eta.

    abar = zbar_above weight and eta = delta_above weight; zbar_above and delta_above [batch, depth], in one piece;
    weight [depth, units], a Matrix; pre_activation (z), product (v), zbar and delta [batch, units], in one piece; sums
    [row blocks, units] float32: zbar added over each block of rows. Twin: ``mlp_value_and_grad_backward_reference``.
    4 B units depth FLOPs in matmuls and about 25 B units pointwise; bytes: what is read and what is stored once.
    """
    place = place_of(batch, units, ROWS, COLUMNS)
    zeros = tl.zeros([ROWS, COLUMNS], tl.float32)
    abar, eta = accumulate_two(zeros, zeros, zbar_above, delta_above, weight, place, depth, DEPTH)
    z, v = load(pre_activation, units, place), load(product, units, place)
    s = sigmoid(z)
    slope = silu_slope(z, s)
    zbar_block = slope * abar + silu_curvature(z, s) * v * eta
    store(zbar, units, place, zbar_block)
    store(delta, units, place, slope * eta)
    tl.store(sums + place.row_block * units + place.column, tl.sum(zbar_block, 0), mask=place.column_mask)


def _launch(kernel: Any, tile: Any, size: tuple[int, int, int], *arguments: Any) -> None:
    """Launch over [batch, units] a kernel that takes the arguments and (batch, units, depth)."""
    batch, units, _ = size
    launch(
        kernel,
        (blocks(batch, units, tile),),
        *arguments,
        *size,
        tile=tile,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
    )


def _forward_layer(
    below: Tensor, weight: Tensor, bias: Tensor, *, keep: bool, activate: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(z, silu(z)) of z = below weight^T + bias, each None if not requested: [B, D], [H, D], [H] or [1 or B, H]."""
    size = below.shape[0], weight.shape[0], below.shape[1]
    z = below.new_empty(size[:2]) if keep else None
    activation = below.new_empty(size[:2]) if activate else None
    arguments = matrix_of(below), matrix_of(weight), bias_of(bias), z, activation
    _launch(forward_kernel, layer_tile(*size), size, *arguments)
    return z, activation


def _forward_last(
    below: Tensor, weight: Tensor, bias: Tensor, head: Tensor, *, keep: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """z of the last hidden layer or None, delta [B, H], and what each block of units adds to the value [blocks, B]."""
    size = below.shape[0], weight.shape[0], below.shape[1]
    tile = layer_tile(*size)
    z = below.new_empty(size[:2]) if keep else None
    delta = below.new_empty(size[:2])
    parts = below.new_empty(max(triton.cdiv(size[1], tile.columns), 1), size[0], dtype=torch.float32)
    matrices = matrix_of(below), matrix_of(weight), bias_of(bias), matrix_of(head)
    _launch(forward_last_kernel, tile, size, *matrices, z, delta, parts)
    return z, delta, parts


def _backward_layer(
    above: Tensor,
    weight: Tensor,
    z: Tensor | None,
    *,
    activate: bool = False,
    with_sum: bool = False,
    unfinished: ValueParts | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(above weight * silu'(z), silu(z) or None, sums over row blocks or None): [B, O], [O, H], [B, H] to [B, H].

    Without z the matmul alone.
    """
    size = above.shape[0], weight.shape[1], above.shape[1]
    tile = layer_tile(*size, crowded=z is not None)
    output = above.new_empty(size[:2])
    activation = above.new_empty(size[:2]) if activate else None
    sums = above.new_empty(triton.cdiv(size[0], tile.rows), size[1], dtype=torch.float32) if with_sum else None
    arguments = matrix_of(above), matrix_of(weight), z, output, activation, sums, unfinished
    _launch(backward_kernel, tile, size, *arguments)
    return output, activation, sums


def forward(
    x: Tensor, first_bias: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """Output [B, O] and, with ``keep``, the pre-activations [B, H_l]; arguments as of the operator ``mlp_forward``."""
    if small_mlp.fits(x, weights):
        return small_mlp.forward(x, first_bias, weights, biases, keep=keep)
    activation: Any = x
    kept = []
    for weight, bias in zip(weights[:-1], (first_bias, *biases[:-1]), strict=True):
        z, activation = _forward_layer(activation, weight, bias, keep=keep, activate=True)
        if z is not None:
            kept.append(z)
    output, _ = _forward_layer(activation, weights[-1], biases[-1], keep=True, activate=False)
    assert output is not None
    return output, kept


def value_and_grad(
    x: Tensor, first_bias: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], keep: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """f [B], g [B, D] and, with ``keep``, the pre-activations; arguments as of the operator ``mlp_value_and_grad``."""
    if small_mlp.fits(x, weights):
        return small_mlp.value_and_grad(x, first_bias, weights, biases, keep=keep)
    hidden, all_biases = weights[:-1], (first_bias, *biases[:-1])
    activation: Any = x
    kept: list[Any] = []
    for weight, bias in zip(hidden[:-1], all_biases[:-1], strict=True):
        # The backward pass needs the slopes at z even if the caller does not keep it.
        z, activation = _forward_layer(activation, weight, bias, keep=True, activate=True)
        kept.append(z)
    z, delta, parts = _forward_last(activation, hidden[-1], all_biases[-1], weights[-1], keep=keep)
    value = x.new_empty(x.shape[0])
    unfinished: ValueParts | None = ValueParts(parts, len(parts), biases[-1], value)
    for weight, below in zip(reversed(hidden), (*reversed(kept), None), strict=True):
        delta = _backward_layer(delta, weight, below, unfinished=unfinished)[0]
        unfinished = None
    return value, delta, [*kept, z] if z is not None else []


class _Gradients:
    """The needed gradients of (x, first_bias, *weights, *biases), by layer; the bias of layer 0 is first_bias."""

    def __init__(self, first_bias: Tensor, depth: int, needs_grad: Sequence[bool]) -> None:
        self.x: Tensor | None = None
        self.weights: list[Tensor | None] = [None] * (depth + 1)
        self.biases: list[Tensor | None] = [None] * (depth + 1)
        self.needs_x = needs_grad[0]
        self.needs_weight, self.needs_bias = needs_grad[2 : depth + 3], (needs_grad[1], *needs_grad[depth + 3 :])
        self.shape = first_bias.shape
        self.shared = first_bias.ndim == 1 or first_bias.shape[0] == 1
        wanted = (i for i in range(depth + 1) if self.needs_weight[i] or self.needs_bias[i])
        #: The lowest layer whose gradients are needed; depth + 1 if none are.
        self.lowest = 0 if self.needs_x else next(wanted, depth + 1)

    def set_first_bias(self, cotangent: Tensor, sums: Tensor | None) -> None:
        """From the cotangent of z_1 [B, H], and that added over blocks of rows where one row served all."""
        if self.needs_bias[0]:
            shared = None if sums is None else column_sum(sums, cotangent.dtype).view(self.shape)
            self.biases[0] = cotangent if shared is None else shared

    def needed(self) -> list[Tensor]:
        """In the order of the operators' results."""
        found = (self.x, self.biases[0], *self.weights, *self.biases[1:])
        return [gradient for gradient in found if gradient is not None]


def backward(
    output_cotangent: Tensor,
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    pre_activations: Sequence[Tensor],
    needs_grad: Sequence[bool],
) -> list[Tensor]:
    """The needed gradients of sum(output_cotangent * output) with respect to (x, first_bias, *weights, *biases).

    One launch per layer, which also recomputes the activation that the gradient of the weight above needs; one or two
    per gradient of a weight or bias.
    """
    depth = len(pre_activations)
    found = _Gradients(first_bias, depth, needs_grad)
    above = output_cotangent
    if found.needs_bias[depth]:
        found.biases[depth] = column_sum(above, x.dtype)
    for layer in range(depth, 0, -1):
        if layer <= found.lowest and not found.needs_weight[layer]:
            break
        z = pre_activations[layer - 1].contiguous()
        with_sum = found.needs_bias[layer - 1] and (layer > 1 or found.shared)
        below, activation, sums = _backward_layer(
            above, weights[layer], z, activate=found.needs_weight[layer], with_sum=with_sum
        )
        if activation is not None:
            found.weights[layer] = weight_gradient(above, activation)
        if layer == 1:
            found.set_first_bias(below, sums)
        elif sums is not None:
            found.biases[layer - 1] = column_sum(sums, x.dtype)
        above = below
    if found.needs_weight[0]:
        found.weights[0] = weight_gradient(above, x)
    if found.needs_x:
        found.x = _backward_layer(above, weights[0], None)[0]
    return found.needed()


def value_and_grad_backward(
    value_cotangent: Tensor | None,
    gradient_cotangent: Tensor | None,
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    pre_activations: Sequence[Tensor],
    needs_grad: Sequence[bool],
) -> list[Tensor]:
    """The needed gradients of sum(fb f + gb . g) with respect to (x, first_bias, *weights, *biases).

    Without gb there is no tangent pass and this is the derivative of an MLP with one output.
    """
    if gradient_cotangent is None:
        fb = x.new_zeros(x.shape[0]) if value_cotangent is None else value_cotangent
        return backward(fb.unsqueeze(1), x, first_bias, weights, pre_activations, needs_grad)
    depth = len(pre_activations)
    found = _Gradients(first_bias, depth, needs_grad)
    if found.needs_bias[depth]:
        found.biases[depth] = (
            x.new_zeros(1) if value_cotangent is None else column_sum(value_cotangent.unsqueeze(1), x.dtype)
        )
    if found.lowest >= depth and not found.needs_weight[depth]:
        return found.needed()
    zs = [z.contiguous() for z in pre_activations]
    # Forward: the inputs of each layer, of the network and of the tangent pass.
    activations, tangents, products = [x], [gradient_cotangent], []
    for layer in range(depth - 1):
        activation, tangent, product = _tangent_layer(
            tangents[-1], weights[layer], zs[layer], activate=found.needs_weight[layer + 1]
        )
        activations.append(activation)
        tangents.append(tangent)
        products.append(product)
    zbar, delta, sums, head_sums = _tangent_last(
        tangents[-1], weights[depth - 1], weights[depth], value_cotangent, zs[-1]
    )
    if found.needs_weight[depth]:
        found.weights[depth] = column_sum(head_sums, x.dtype).unsqueeze(0)
    # Backward, down to the lowest layer whose gradients are needed.
    for layer in range(depth - 1, found.lowest - 1, -1):
        if found.needs_weight[layer]:
            found.weights[layer] = weight_gradient(zbar, activations[layer], (delta, tangents[layer]))
        if layer > 0 and found.needs_bias[layer]:
            found.biases[layer] = column_sum(sums, x.dtype)
        if layer > found.lowest:
            zbar, delta, sums = _joint_backward_layer(zbar, delta, weights[layer], zs[layer - 1], products[layer - 1])
    if found.lowest == 0:
        found.set_first_bias(zbar, sums if found.shared else None)
    if found.needs_x:
        found.x = _backward_layer(zbar, weights[0], None)[0]
    return found.needed()


def _tangent_layer(below: Tensor, weight: Tensor, z: Tensor, *, activate: bool) -> tuple[Tensor, Tensor, Tensor]:
    """silu(z), or z itself if that is not needed; u = silu'(z) v; v = below weight^T."""
    size = below.shape[0], weight.shape[0], below.shape[1]
    activation = torch.empty_like(z) if activate else None
    tangent, product = torch.empty_like(z), torch.empty_like(z)
    arguments = matrix_of(below), matrix_of(weight), z, activation, tangent, product
    _launch(tangent_kernel, layer_tile(*size, crowded=True), size, *arguments)
    return z if activation is None else activation, tangent, product


def _tangent_last(
    below: Tensor, weight: Tensor, head: Tensor, value_cotangent: Tensor | None, z: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """zbar and delta of the last hidden layer [B, H], and sums over blocks of rows for its bias and for the head."""
    size = below.shape[0], weight.shape[0], below.shape[1]
    tile = layer_tile(*size, crowded=True)
    zbar, delta = torch.empty_like(z), torch.empty_like(z)
    bias_sums, head_sums = z.new_empty(2, triton.cdiv(size[0], tile.rows), size[1], dtype=torch.float32)
    fb = None if value_cotangent is None else (value_cotangent, value_cotangent.stride(0))
    matrices = matrix_of(below), matrix_of(weight), matrix_of(head)
    _launch(tangent_last_kernel, tile, size, *matrices, fb, z, zbar, delta, bias_sums, head_sums)
    return zbar, delta, bias_sums, head_sums


def _joint_backward_layer(
    zbar_above: Tensor, delta_above: Tensor, weight: Tensor, z: Tensor, product: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """zbar and delta [B, H] of the layer below ``weight``, and zbar added over blocks of rows."""
    size = zbar_above.shape[0], weight.shape[1], zbar_above.shape[1]
    tile = layer_tile(*size, crowded=True)
    zbar, delta = torch.empty_like(z), torch.empty_like(z)
    sums = z.new_empty(triton.cdiv(size[0], tile.rows), size[1], dtype=torch.float32)
    arguments = zbar_above, delta_above, matrix_of(weight), z, product, zbar, delta, sums
    _launch(joint_backward_kernel, tile, size, *arguments)
    return zbar, delta, sums


def shipped() -> list[Compilation]:
    """Score networks of the two-dimensional experiment and guidance networks of two inputs and of the ECG's 3904, and
    their derivatives; smaller ones ship with ``small_mlp.py``.
    """
    calls: dict[str, Callable[[], object]] = {}
    for dtype in (torch.bfloat16, torch.float16):
        name = TYPES[dtype]
        for batch in (16, 65536):
            network = small_mlp.without_data(batch, (2, 512, 512, 512, 512), 2, dtype)
            calls[f"forward-{name}-512-{batch}"] = partial(forward, *network, keep=batch > 16)
        x, first_bias, weights, biases = network
        kept = [x.new_empty(len(x), 512) for _ in biases]
        needs_grad = [True] * (2 * len(kept) + 3)
        calls[f"forward-{name}-backward"] = partial(backward, x, x, first_bias, weights, kept, needs_grad)
        for inputs, batch in ((2, 16), (2, 65536), (3904, 256)):
            network = small_mlp.without_data(batch, (inputs, 512, 512, 512, 512), 1, dtype)
            calls[f"value-{name}-{inputs}-512-{batch}"] = partial(value_and_grad, *network, keep=False)
        x, first_bias, weights, _ = small_mlp.without_data(65536, (2, 512, 512, 512, 512), 1, dtype)
        cotangents = x.new_empty(len(x)), x
        calls[f"value-{name}-backward"] = partial(
            value_and_grad_backward, *cotangents, x, first_bias, weights, kept, needs_grad
        )
    return recorded(calls)
