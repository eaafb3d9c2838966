"""A SiLU multilayer perceptron (MLP): its outputs, and value and input gradient of one with a single output.

    z_1 = W_1 x + first_bias,   z_l = W_l a_{l-1} + b_l,   a_l = silu(z_l),   output = W a_L + c

:func:`mlp_forward` gives the output: score networks, time embeddings, losses on a log ratio alone. With one output,
f = w . a_L + c, :func:`mlp_value_and_grad` gives the gradient too, in closed form and without autograd::

    delta_L = silu'(z_L) * w,   delta_l = silu'(z_l) * (W_{l+1}^T delta_{l+1}),   g = df/dx = W_1^T delta_1

It is differentiable once: for cotangents (fb, gb) the gradient of s = fb f + gb . g with respect to every input is
again closed form, a tangent pass forward and one pass backward::

    u_0 = gb,   v_l = W_l u_{l-1},   u_l = silu'(z_l) * v_l                    (so gb . g = w . u_L)
    abar_L = fb w,   eta_L = w;   for l = L .. 1:
        delta_l = silu'(z_l) * eta_l,   zbar_l = silu'(z_l) * abar_l + silu''(z_l) * v_l * eta_l
        dW_l = zbar_l a_{l-1}^T + delta_l u_{l-1}^T,   db_l = zbar_l
        abar_{l-1} = W_l^T zbar_l,   eta_{l-1} = W_l^T delta_l
    dw = fb a_L + u_L,   dc = fb,   dx = abar_0

with silu'(z) = s (1 + z (1 - s)), silu''(z) = s (1 - s) (2 + z (1 - 2 s)) and s = sigmoid(z). This is what the
consistency term of TGDP's Algorithm 4 needs (Ouyang et al., NeurIPS 2024, arXiv 2405.16876): a loss on grad log h.

Each function and its derivative are operators of their own, so that a faster implementation may provide either:

``mlp_forward``, ``mlp_value_and_grad``
    ``function(x, first_bias, weights, biases, *, save_pre_activations, bf16x3) -> (*outputs, pre_activations)``; the
    latter are (z_1, .., z_L), each [B, H_l] in the dtype of x, or () if not requested.
``mlp_backward``, ``mlp_value_and_grad_backward``
    ``function(*cotangents, x, first_bias, weights, pre_activations, *, needs_grad, bf16x3) -> gradients`` of (x,
    first_bias, *weights, *biases), None if not needed; see the reference twins.

``unsupported`` of all four gets (x, first_bias, weights, biases), at the time of the forward call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tgdp_fast.ops import _cuda, _triton, measured, registry
from tgdp_fast.runtime import fakes, native

__all__ = [
    "mlp_backward_reference",
    "mlp_forward",
    "mlp_forward_reference",
    "mlp_value_and_grad",
    "mlp_value_and_grad_backward_reference",
    "mlp_value_and_grad_reference",
]

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

#: x, first_bias, weights, biases
Call = tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]


def mlp_forward(
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    backend: str = "auto",
) -> Tensor:
    """All outputs of a SiLU MLP.

    Differentiable in all inputs: once by a faster backend, and any number of times by PyTorch's autograd, if the
    reference serves the call. With "auto" it does if x requires a gradient or a transform of ``torch.func`` is active.
    Precision and autocast as in :func:`mlp_value_and_grad`.

    Cost, with P = sum_l H_l H_{l-1} weights, head included: 2 B P FLOPs in matmuls, and 4 B P in the backward (6 B P
    with the gradient of x).

    Args:
        x: [B, D] float16, bfloat16, float32 or float64.
        first_bias: [H_1], [1, H_1] or [B, H_1]; the whole additive term of the first layer.
        weights: L + 1 matrices W_1 [H_1, D], W_2 [H_2, H_1], .., W_L [H_L, H_{L-1}] and the head W [O, H_L]; L >= 1.
        biases: L vectors b_2 [H_2], .., b_L [H_L] and c [O].
        backend: "auto", "reference", or a faster implementation by name; "cpu" serves all but float64, "triton" float16
            and bfloat16.

    Returns:
        [B, O], in the dtype of x.

    Raises:
        ValueError: numbers of layers, shapes, dtypes or devices do not fit.
        BackendUnavailableError: the requested backend cannot serve the call, or its backward.
    """
    call = _checked_call(x, first_bias, weights, biases)
    name = registry.requested_backend(backend)
    if name == "auto" and (_transformed() or (x.requires_grad and torch.is_grad_enabled())):
        name = "reference"
    forward = registry.resolve("mlp_forward", name, *call)
    if forward.backend == "reference":
        return mlp_forward_reference(*call)
    (output,) = _evaluated(forward, "mlp_backward", name, call)
    return output


def mlp_value_and_grad(
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    bf16x3: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Value f(x) and gradient df/dx of a SiLU MLP with one output, without autograd and differentiable once.

    When grad mode is on and an input requires grad, both outputs are differentiable with respect to all inputs (x,
    first_bias, weights, biases); a second derivative of the outputs raises. The backward runs on the backend that the
    forward call requested. Works under inference_mode and ``torch.compile(fullgraph=True)``.

    Precision: matmuls in the common dtype of the inputs, activations and their derivatives in float32 (float64 for
    float64 inputs; for bfloat16 to 2^-12 of the sigmoid) from the matmuls' results; with float16 and bfloat16, f, g and
    everything saved have that dtype. Under torch.autocast the inputs are cast to its dtype first, as for a linear
    layer.

    Cost, with P = sum_l H_l H_{l-1} weights (H_0 = D) and S = sum_l H_l units: 4 B P FLOPs in matmuls and about 20 B S
    pointwise for the value and gradient; the backward takes at most 10 B P more (2 tangent, 4 backward, 4 weights).
    Memory traffic when nothing else leaves the chip: b (B (2 D + 1) + P + S) bytes for b bytes per number, and b B H_1
    more for a first_bias of B rows; saved for the backward: the inputs and b B S bytes of pre-activations. Reference
    twins also write and read every layer's activations.

    Args:
        x: [B, D] float16, bfloat16, float32 or float64.
        first_bias: [H_1], [1, H_1] or [B, H_1]; the whole additive term of the first layer (its bias, and the
            contribution of time and label embeddings).
        weights: L + 1 matrices W_1 [H_1, D], W_2 [H_2, H_1], .., W_L [H_L, H_{L-1}] and the head w [1, H_L]; L >= 1.
        biases: L vectors b_2 [H_2], .., b_L [H_L] and c [1]; there is no b_1, see first_bias.
        bf16x3: float32 matmuls may be taken as three matmuls of bfloat16 numbers, x = high + low, with a relative error
            of about 2^-16: for CPUs whose bfloat16 units are more than three times as fast. A backend without such
            matmuls uses float32 ones.
        backend: "auto", "reference", or a faster implementation by name; "cpu" and "cuda" serve all but float64,
            "triton" float16 and bfloat16.

    Returns:
        f [B] and g [B, D], in the dtype of x.

    Raises:
        ValueError: numbers of layers, shapes, dtypes or devices do not fit.
        BackendUnavailableError: the requested backend cannot serve the call, or its backward.

    Source: the value and gradient of log h of TGDP, Theorem 3.1; derivative for Algorithm 4, consistency term.
    """
    call = _checked_call(x, first_bias, weights, biases, outputs=1)
    name = registry.requested_backend(backend)
    forward = registry.resolve("mlp_value_and_grad", name, *call)
    value, gradient = _evaluated(forward, "mlp_value_and_grad_backward", name, call, bf16x3)
    return value, gradient


def mlp_forward_reference(x: Tensor, first_bias: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """Plain PyTorch twin of :func:`mlp_forward`, without checks, under ordinary autograd."""
    return _reference_forward(x, first_bias, weights, biases, save_pre_activations=False)[0]


def mlp_value_and_grad_reference(
    x: Tensor, first_bias: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch twin of :func:`mlp_value_and_grad`: the closed form, without checks."""
    value, gradient, _ = _reference_value_and_grad(x, first_bias, weights, biases, save_pre_activations=False)
    return value, gradient


def _dense_rows(matrix: Tensor) -> Tensor:
    """``matrix`` [M, K] as the left factor of a matmul, copied if PyTorch may read past its rows.

    On a CPU with AMX, oneDNN reads 16-bit rows two numbers at a time: if K is odd, also the number behind each row,
    which it multiplies by zero. In a slice of a larger tensor that number belongs to other data, and NaN or infinity
    there would spread into the row.
    """
    odd = matrix.dtype in (torch.float16, torch.bfloat16) and matrix.shape[1] % 2 == 1
    return matrix.contiguous() if odd and matrix.device.type == "cpu" else matrix


def _reference_forward(
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    save_pre_activations: bool,
    bf16x3: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    activation, pre_activations = _dense_rows(x), []
    for weight, bias in zip(weights[:-1], (first_bias, *biases[:-1]), strict=True):
        pre_activations.append(functional.linear(activation, weight) + bias)
        activation = functional.silu(pre_activations[-1])
    saved = tuple(pre_activations) if save_pre_activations else ()
    return functional.linear(activation, weights[-1], biases[-1]), saved


def _reference_value_and_grad(
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    save_pre_activations: bool,
    bf16x3: bool = False,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    depth = len(biases)
    activation = _dense_rows(x)
    pre_activations = []
    for weight, bias in zip(weights[:depth], (first_bias, *biases[:-1]), strict=True):
        pre_activations.append(torch.addmm(bias, activation, weight.t()))
        activation = functional.silu(pre_activations[-1])
    value = torch.addmm(biases[-1], activation, weights[depth].t()).squeeze(1)
    saved = tuple(pre_activations) if save_pre_activations else ()
    gradient = weights[depth].expand(x.shape[0], -1)
    for z, weight in zip(reversed(pre_activations), reversed(weights[:depth]), strict=True):
        # silu'(z) * eta in one pass, in float32 inside for 16-bit tensors, as silu itself.
        gradient = torch.ops.aten.silu_backward(gradient, z) @ weight
    return value, gradient, saved


def mlp_backward_reference(
    output_cotangent: Tensor,
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    pre_activations: Sequence[Tensor],
    *,
    needs_grad: Sequence[bool],
    bf16x3: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients of sum(output_cotangent * output) with respect to every input.

    Args:
        output_cotangent: [B, O].
        x, first_bias, weights: as in the forward; of first_bias only the shape is used.
        pre_activations: (z_1, .., z_L), [B, H_l] each, as the forward saved them.
        needs_grad: which gradients to compute, in the order of the result.
        bf16x3: ignored.

    Returns:
        Gradients of (x, first_bias, *weights, *biases), each with the shape and dtype of its input; None if not needed.
        The gradient of first_bias is summed over the batch if it was broadcast.
    """
    depth = len(pre_activations)
    needs_x, needs_first = needs_grad[:2]
    needs_weight, needs_bias = needs_grad[2 : depth + 3], (needs_first, *needs_grad[depth + 3 :])
    weight_grads: list[Tensor | None] = [None] * (depth + 1)
    bias_grads: list[Tensor | None] = [None] * (depth + 1)
    zbar = _dense_rows(output_cotangent)
    for layer in reversed(range(depth + 1)):
        if needs_weight[layer]:
            below = x if layer == 0 else functional.silu(pre_activations[layer - 1])
            weight_grads[layer] = zbar.t() @ below
        if needs_bias[layer]:
            bias_grads[layer] = zbar.sum(0) if layer > 0 else zbar.sum_to_size(first_bias.shape)
        if layer > 0:
            # silu'(z) * abar in one pass, in float32 inside for 16-bit tensors, as silu itself.
            zbar = torch.ops.aten.silu_backward(zbar @ weights[layer], pre_activations[layer - 1])
    return (zbar @ weights[0] if needs_x else None, bias_grads[0], *weight_grads, *bias_grads[1:])


def mlp_value_and_grad_backward_reference(
    value_cotangent: Tensor | None,
    gradient_cotangent: Tensor | None,
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    pre_activations: Sequence[Tensor],
    *,
    needs_grad: Sequence[bool] | None = None,
    bf16x3: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients of s = sum_b (fb f + gb . g) with respect to every input, in closed form.

    Args:
        value_cotangent: fb [B], or None for zeros.
        gradient_cotangent: gb [B, D], or None for zeros; without it the tangent pass is skipped.
        x: [B, D].
        first_bias: as in the forward; only its shape is used.
        weights: L + 1 matrices, as in the forward.
        pre_activations: (z_1, .., z_L), [B, H_l] each, as the forward saved them.
        needs_grad: which gradients to compute, in the order of the result; default all.
        bf16x3: ignored; matmuls are in the dtype of x.

    Returns:
        Gradients of (x, first_bias, *weights, *biases), each with the shape and dtype of its input; None if not needed.
        The gradient of first_bias is summed over the batch if it was broadcast.
    """
    depth = len(pre_activations)
    needs = tuple(needs_grad) if needs_grad is not None else (True,) * (2 * depth + 3)
    needs_x, needs_first, needs_w, needs_b = needs[0], needs[1], needs[2 : depth + 3], needs[depth + 3 :]
    dtype, precise = x.dtype, _activation_dtype(x.dtype)
    fb = x.new_zeros(x.shape[0]) if value_cotangent is None else value_cotangent
    head = weights[depth]

    # Forward: activations, slopes, and the tangent pass.
    tangent = None if gradient_cotangent is None else _dense_rows(gradient_cotangent)
    activations, tangents, slopes, curved = [x], [tangent], [], []
    for layer in range(depth):
        z = pre_activations[layer].to(precise)
        s = torch.sigmoid(z)
        slope = _silu_slope(z, s)
        activations.append((z * s).to(dtype))
        slopes.append(slope)
        tangent = tangents[-1]
        if tangent is not None:
            v = (tangent @ weights[layer].t()).to(precise)
            tangents.append((slope * v).to(dtype))
            curved.append(_silu_curvature(z, s) * v)

    weight_grads: list[Tensor | None] = [None] * (depth + 1)
    bias_grads: list[Tensor | None] = [None] * depth
    if needs_w[depth]:
        top = tangents[-1]
        head_grad = fb.unsqueeze(0) @ activations[depth]
        weight_grads[depth] = head_grad if top is None else head_grad + top.sum(0, keepdim=True)
    if needs_b[depth - 1]:
        bias_grads[depth - 1] = fb.sum().reshape(1)

    # Backward, down to the lowest layer whose gradients are needed.
    x_grad: Tensor | None = None
    first_bias_grad: Tensor | None = None
    wanted = [needs_w[0] or needs_first, *(needs_w[i] or needs_b[i - 1] for i in range(1, depth))]
    lowest = 0 if needs_x else next((i for i in range(depth) if wanted[i]), depth)
    abar = fb.unsqueeze(1).to(precise) * head.to(precise)
    eta = head.to(precise)
    for layer in reversed(range(lowest, depth)):
        zbar_precise = slopes[layer] * abar
        delta: Tensor | None = None
        if gradient_cotangent is not None:
            zbar_precise = zbar_precise + curved[layer] * eta
            delta = (slopes[layer] * eta).to(dtype)
        zbar = zbar_precise.to(dtype)
        if needs_w[layer]:
            grad = zbar.t() @ activations[layer]
            tangent = tangents[layer] if delta is not None else None
            weight_grads[layer] = grad if tangent is None or delta is None else torch.addmm(grad, delta.t(), tangent)
        if layer == 0 and needs_first:
            first_bias_grad = zbar_precise.sum_to_size(first_bias.shape).to(dtype)
        if layer > 0 and needs_b[layer - 1]:
            bias_grads[layer - 1] = zbar_precise.sum(0).to(dtype)
        if layer > 0:
            abar = (zbar @ weights[layer]).to(precise)
            if delta is not None:
                eta = (delta @ weights[layer]).to(precise)
        elif needs_x:
            x_grad = zbar @ weights[0]
    return (x_grad, first_bias_grad, *weight_grads, *bias_grads)


def _activation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _silu_slope(z: Tensor, s: Tensor) -> Tensor:
    """First derivative of silu at z, with s = sigmoid(z)."""
    return s * (1.0 + z * (1.0 - s))


def _silu_curvature(z: Tensor, s: Tensor) -> Tensor:
    """Second derivative of silu at z, with s = sigmoid(z)."""
    return s * (1.0 - s) * (2.0 + z * (1.0 - 2.0 * s))


class _Mlp(torch.autograd.Function):
    """Either operator with its derivative; saves inputs and pre-activations."""

    @staticmethod
    def forward(
        ctx: Any, operators: tuple[str, str], backends: tuple[str, str], depth: int, bf16x3: bool, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        x, first_bias, weights, biases = inputs[0], inputs[1], inputs[2 : depth + 3], inputs[depth + 3 :]
        function = registry.lookup(operators[0], backends[0]).function
        *outputs, saved = function(x, first_bias, weights, biases, save_pre_activations=True, bf16x3=bf16x3)
        ctx.save_for_backward(x, first_bias, *weights, *saved)
        ctx.operator, ctx.backend, ctx.depth, ctx.bf16x3 = operators[1], backends[1], depth, bf16x3
        # So that a loss on the value alone skips the tangent pass.
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * (4 + 2 * ctx.depth + 3)
        x, first_bias, *rest = ctx.saved_tensors
        weights, saved = tuple(rest[: ctx.depth + 1]), tuple(rest[ctx.depth + 1 :])
        function = registry.lookup(ctx.operator, ctx.backend).function
        needs_grad = tuple(ctx.needs_input_grad[4:])
        call = *cotangents, x, first_bias, weights, saved
        return None, None, None, None, *function(*call, needs_grad=needs_grad, bf16x3=ctx.bf16x3)


def _evaluated(
    forward: registry.Implementation, backward: str, backend: str, call: Call, bf16x3: bool = False
) -> tuple[Tensor, ...]:
    """Outputs by ``forward``; with an autograd graph if a gradient may be needed."""
    x, first_bias, weights, biases = call
    inputs = (x, first_bias, *weights, *biases)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        # Resolved here because the backward may run in another thread, outside a use_backend block.
        backends = forward.backend, registry.resolve(backward, backend, *call).backend
        outputs: tuple[Tensor, ...] = _Mlp.apply((forward.operator, backward), backends, len(biases), bf16x3, *inputs)
        return outputs
    *results, _ = forward.function(*call, save_pre_activations=False, bf16x3=bf16x3)
    return tuple(results)


def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


# The compiler of torch before 2.12 cannot trace the question; the answer depends on its argument alone.
_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _transformed() -> bool:
    return bool(torch._C._are_functorch_transforms_active())


def _checked_call(
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    outputs: int | None = None,
) -> Call:
    """The call of an MLP, in the dtype of autocast if that is enabled.

    Raises:
        ValueError: as :func:`mlp_forward`, or the head has another number of ``outputs``.
    """
    weights, biases = tuple(weights), tuple(biases)
    device_type = x.device.type
    if _has_autocast(device_type) and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        x, first_bias = x.to(dtype), first_bias.to(dtype)
        weights = tuple(weight.to(dtype) for weight in weights)
        biases = tuple(bias.to(dtype) for bias in biases)
    _check(x, first_bias, weights, biases, outputs)
    return x, first_bias, weights, biases


def _check(
    x: Tensor, first_bias: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor, ...], outputs: int | None
) -> None:
    if x.ndim != 2:
        raise ValueError(f"x must have shape [B, D], got {tuple(x.shape)}; flatten the sample dimensions first")
    dtype, device = x.dtype, x.device
    if dtype not in _FLOATING:
        raise ValueError(f"x must be float16, bfloat16, float32 or float64, got {dtype}; convert it with .to()")
    if len(weights) < 2:
        raise ValueError(f"weights must hold at least W_1 and the head, got {len(weights)} tensors")
    if len(biases) != len(weights) - 1:
        raise ValueError(
            f"biases must hold {len(weights) - 1} tensors, b_2 .. b_L and c, for {len(weights)} weights, got "
            f"{len(biases)}; b_1 belongs into first_bias"
        )
    for i, tensor in enumerate((first_bias, *weights, *biases)):
        if tensor.dtype != dtype:
            name = _name(i, len(weights))
            raise ValueError(f"{name} must have the dtype of x, {dtype}, got {tensor.dtype}; convert it with .to()")
        if tensor.device != device:
            name = _name(i, len(weights))
            raise ValueError(f"{name} must be on the device of x, {device}, got {tensor.device}; move it with .to()")
    width = x.shape[1]
    for i, weight in enumerate(weights):
        head = i == len(weights) - 1
        wrong_outputs = head and outputs is not None and weight.shape[:1] != (outputs,)
        if weight.ndim != 2 or weight.shape[1] != width or wrong_outputs:
            rows = f"H_{i + 1}" if not head else "O" if outputs is None else str(outputs)
            raise ValueError(f"weights[{i}] must have shape [{rows}, {width}], got {tuple(weight.shape)}")
        width = weight.shape[0]
        if i > 0 and biases[i - 1].shape != (width,):
            raise ValueError(f"biases[{i - 1}] must have shape ({width},), got {tuple(biases[i - 1].shape)}")
    first = weights[0].shape[0]
    if first_bias.shape not in ((first,), (1, first), (x.shape[0], first)):
        raise ValueError(
            f"first_bias must have shape ({first},), (1, {first}) or ({x.shape[0]}, {first}), got "
            f"{tuple(first_bias.shape)}"
        )


def _name(index: int, num_weights: int) -> str:
    """Of a tensor among (first_bias, *weights, *biases)."""
    if index == 0:
        return "first_bias"
    return f"weights[{index - 1}]" if index <= num_weights else f"biases[{index - 1 - num_weights}]"


# Implementations by registered operators of torch -------------------------------------------------------------


def _call_forward(
    name: str, takes_bf16x3: bool, *call: Any, save_pre_activations: bool, bf16x3: bool = False
) -> tuple[Any, ...]:
    """Outputs and pre-activations by ``torch.ops.tgdp_fast.NAME``."""
    operator = getattr(torch.ops.tgdp_fast, name)
    further = (bf16x3,) if takes_bf16x3 else ()
    *outputs, saved = operator(*call, save_pre_activations, *further)
    return *outputs, tuple(saved)


def _call_backward(
    name: str, takes_bf16x3: bool, *call: Any, needs_grad: tuple[bool, ...], bf16x3: bool = False
) -> tuple[Tensor | None, ...]:
    """Gradients by ``torch.ops.tgdp_fast.NAME``, which returns the needed ones; None at the other places."""
    operator = getattr(torch.ops.tgdp_fast, name)
    further = (bf16x3,) if takes_bf16x3 else ()
    gradients = iter(operator(*call, needs_grad, *further))
    return tuple(next(gradients) if needed else None for needed in needs_grad)


def _unsupported_by_triton(x: Tensor, *_: Any) -> str | None:
    # PyTorch's float32 matmuls were faster in every measured case.
    reason = "it serves float16 and bfloat16, not float32; backend='reference' takes float32 on a GPU"
    return registry.unsupported_float64(x) or (reason if x.dtype == torch.float32 else _triton.unsupported_device(x))


def _unsupported_by_cuda(x: Tensor, _: Tensor, weights: Sequence[Tensor], __: Sequence[Tensor]) -> str | None:
    if len(weights) > 9 or any(weight.shape[0] > 512 for weight in weights):
        return "it serves at most 8 hidden layers, at most 512 wide"
    return registry.unsupported_float64(x) or _cuda.unsupported_device(x)


def _launch_triton(function: str, *call: Any) -> Any:
    """The results of a function of ``kernels/mlp.py``."""
    from tgdp_fast.kernels import mlp

    with torch.cuda.device_of(next(argument for argument in call if isinstance(argument, Tensor))):
        return getattr(mlp, function)(*call)


_CALL = "Tensor x, Tensor first_bias, Tensor[] weights, "
_FORWARD = f"({_CALL}Tensor[] biases, bool save_pre_activations) -> "
_BACKWARD = f"{_CALL}Tensor[] pre_activations, bool[] needs_grad) -> Tensor[]"
_ONE, _TWO = "(Tensor output_cotangent, ", "(Tensor? value_cotangent, Tensor? gradient_cotangent, "
# Each operator's name, whether the native one has the argument bf16x3, Triton's schema, fake and reference.
for _operator, _bf16x3, _schema, _fake, _reference in (
    ("mlp_forward", False, _FORWARD + "(Tensor, Tensor[])", fakes.mlp_forward, _reference_forward),
    ("mlp_backward", False, _ONE + _BACKWARD, fakes.mlp_backward, mlp_backward_reference),
    (
        "mlp_value_and_grad",
        True,
        _FORWARD + "(Tensor, Tensor, Tensor[])",
        fakes.mlp_value_and_grad,
        _reference_value_and_grad,
    ),
    (
        "mlp_value_and_grad_backward",
        True,
        _TWO + _BACKWARD,
        fakes.mlp_value_and_grad_backward,
        mlp_value_and_grad_backward_reference,
    ),
):
    _is_backward = _operator.endswith("backward")
    _call = _call_backward if _is_backward else _call_forward
    _preferred = measured.preferred_to_triton_mlp_backward if _is_backward else measured.preferred_to_triton_mlp
    _launch = partial(_launch_triton, _operator.removeprefix("mlp_"))
    _triton.define(f"{_operator}_triton", _schema, _launch, _fake)
    _call_triton = partial(_call, f"{_operator}_triton", False)
    registry.register(
        _operator, "cpu", partial(_call, _operator, _bf16x3), registry.unsupported_float64, missing=native.CPU_MISSING
    )
    registry.register(
        _operator, "triton", _call_triton, _unsupported_by_triton, prefer=_preferred, missing=_triton.MISSING
    )
    registry.register(_operator, "reference", _reference)

# The same operator on tensors of another device; there is no kernel of its derivative, nor of the other function.
registry.register(
    "mlp_value_and_grad",
    "cuda",
    partial(_call_forward, "mlp_value_and_grad", True),
    _unsupported_by_cuda,
    prefer=measured.preferred_to_cuda_mlp,
    missing=native.CUDA_MISSING,
)
registry.register(
    "mlp_value_and_grad_backward",
    "cuda",
    mlp_value_and_grad_backward_reference,
    missing="the CUDA kernels have no derivative of this operator",
)
