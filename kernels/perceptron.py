"""All outputs of a SiLU perceptron and their derivative.

Layer by layer, for any width: one launch per layer up and one per layer down, to be captured in one CUDA graph, with
bias, activation and its derivative at the end of the products. A layer of H units reads and writes b B H bytes of its
input and output beside its weights (b bytes per number), where PyTorch reads and writes them three times, and does
2 B H H_below FLOPs. At width 512 a weight matrix does not fit next to the activations in shared memory, and the
products are what takes the time: 256 FLOPs per byte moved in 16 bits. What is smaller goes in one launch:
``kernels/small_network.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

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
    sigmoid,
    silu_slope,
    weight_gradient,
    without_data,
)


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
    offsets = row[:, None] * units + column[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    if KEEP:
        tl.store(pre_activation + offsets, narrow(z, pre_activation.dtype.element_ty), mask=mask)
    if ACTIVATE:
        tl.store(
            activation + offsets,
            narrow(z * sigmoid(z, weight.dtype.element_ty == tl.float32), activation.dtype.element_ty),
            mask=mask,
        )


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
        None,
        above,
        None,
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
        s = sigmoid(z, weight.dtype.element_ty == tl.float32)
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


def layer_up(
    below: Tensor, weight: Tensor, bias: Tensor, *, keep: bool, activate: bool, precision: str = "ieee"
) -> tuple[Tensor | None, Tensor | None]:
    """(z, silu(z)) of z = below weight^T + bias, each None where not asked for: [B, D], [H, D], [1 or B, H]."""
    (batch, depth), units = below.shape, weight.shape[0]

    def run(tile: Tile) -> tuple[Tensor | None, Tensor | None]:
        pre_activation = below.new_empty(batch, units) if keep else None
        activation = below.new_empty(batch, units) if activate else None
        launch_layer(
            layer_up_kernel,
            tile,
            (batch, units, depth),
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
            SHARED_BIAS=bias.shape[0] == 1,
            KEEP=keep,
            ACTIVATE=activate,
            precision=precision,
        )
        return pre_activation, activation

    return run(layer_tile(batch, units, depth, below.dtype))


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

    def run(tile: Tile) -> tuple[Tensor, Tensor | None, Tensor | None]:
        output = above.new_empty(batch, units)
        activation = above.new_empty(batch, units) if activate else None
        sums = above.new_empty(triton.cdiv(batch, tile.rows), units, dtype=torch.float32) if with_sum else None
        parts, bias, finished = (output, output, output) if value is None else value
        launch_layer(
            layer_down_kernel,
            tile,
            (batch, units, depth),
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
            SLOPE=pre_activation is not None,
            ACTIVATE=activate,
            SUM=with_sum,
            FINISH=value is not None,
            precision=precision,
        )
        return output, activation, sums

    return run(layer_tile(batch, units, depth, above.dtype, crowded=crowded))


def perceptron(
    x: Tensor, first_bias: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """Output [B, O] and, with ``keep``, the pre-activations [B, H_l]; arguments as of the operator ``perceptron``."""
    if small_network.fits(x, weights):
        return small_network.outputs(x, first_bias, weights, biases, keep=keep)
    activation: Any = x
    kept = []
    for weight, bias in zip(weights[:-1], (first_bias, *biases[:-1]), strict=True):
        pre_activation, activation = layer_up(activation, weight, as_rows(bias), keep=keep, activate=True)
        if pre_activation is not None:
            kept.append(pre_activation)
    output, _ = layer_up(activation, weights[-1], as_rows(biases[-1]), keep=True, activate=False)
    assert output is not None
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


def shipped() -> list[Compilation]:
    """Score networks of the two-dimensional experiment, four layers of 128 and of 512, and their derivative."""
    calls: dict[str, Callable[[], object]] = {}
    for dtype, name in TYPES.items():
        for width in (128, 512):
            for batch in (16, 65536):
                network = without_data(batch, (2, *[width] * 4), 2, dtype)
                if small_network.fits(network[0], network[2]):
                    continue
                keep = batch > 16
                calls[f"perceptron-{name}-{width}-{batch}"] = partial(perceptron, *network, keep=keep)
        x, first_bias, weights, biases = network
        kept = [x.new_empty(batch, width) for _ in biases]
        calls[f"perceptron-{name}-backward"] = partial(
            perceptron_backward, x, x, first_bias, weights, kept, needs_grad=[True] * (2 * len(kept) + 3)
        )
    return recorded(calls)
