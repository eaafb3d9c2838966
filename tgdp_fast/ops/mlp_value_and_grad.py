"""Value and input gradient of a SiLU multilayer perceptron with one output, in closed form.

    z_1 = W_1 x + first_bias,   z_l = W_l a_{l-1} + b_l,   a_l = silu(z_l),   f = w . a_L + c
    delta_L = silu'(z_L) * w,   delta_l = silu'(z_l) * (W_{l+1}^T delta_{l+1}),   g = df/dx = W_1^T delta_1

No autograd inside. The operator is differentiable once: for cotangents (fb, gb) the gradient of s = fb f + gb
. g with respect to every input is again closed form, a tangent pass upwards and one reverse pass downwards::

    u_0 = gb,   v_l = W_l u_{l-1},   u_l = silu'(z_l) * v_l                    (so gb . g = w . u_L)
    abar_L = fb w,   eta_L = w;   for l = L .. 1:
        delta_l = silu'(z_l) * eta_l,   zbar_l = silu'(z_l) * abar_l + silu''(z_l) * v_l * eta_l
        dW_l = zbar_l a_{l-1}^T + delta_l u_{l-1}^T,   db_l = zbar_l
        abar_{l-1} = W_l^T zbar_l,   eta_{l-1} = W_l^T delta_l
    dw = fb a_L + u_L,   dc = fb,   dx = abar_0

with silu'(z) = s (1 + z (1 - s)), silu''(z) = s (1 - s) (2 + z (1 - 2 s)) and s = sigmoid(z). This is what
the consistency term of TGDP's Algorithm 4 needs (Ouyang et al., NeurIPS 2024, arXiv 2405.16876): a loss on
grad log h.

Two operators are registered, so that a faster implementation may provide either or both:

``mlp_value_and_grad``
    ``function(x, first_bias, weights, biases, *, save_pre_activations, split) -> (f, g, pre_activations)``;
    pre_activations is (z_1, .., z_L), each [B, H_l] in the dtype of x, or () when not asked for.
``mlp_value_and_grad_backward``
    ``function(value_cotangent, gradient_cotangent, x, first_bias, weights, pre_activations, *, needs_grad, split)
    -> gradients``; see :func:`mlp_value_and_grad_backward_reference`.

``refuses`` of either gets (x, first_bias, weights, biases), at the time of the forward call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tgdp_fast.ops import _cuda, _dispatch, _measured, _triton
from tgdp_fast.ops.perceptron import (
    checked_call,
    dense_rows,
    fake_gradients,
    fake_pre_activations,
    flat,
    needs_autograd,
    refuses_triton,
    where_needed,
)
from tgdp_fast.runtime import native

__all__ = ["mlp_value_and_grad", "mlp_value_and_grad_backward_reference", "mlp_value_and_grad_reference"]

_FORWARD = "mlp_value_and_grad"
_BACKWARD = "mlp_value_and_grad_backward"


def mlp_value_and_grad(
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    split: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Value f(x) and gradient df/dx of a SiLU perceptron, without autograd and differentiable once.

    When grad mode is on and an input requires grad, both outputs are differentiable with respect to all
    inputs (x, first_bias, weights, biases); a second derivative of the outputs raises. The backward runs on
    the backend that was asked for in the forward call. Works under inference_mode and
    ``torch.compile(fullgraph=True)``.

    Precision: matrix products in the common dtype of the inputs, activations and their derivatives in float32
    (float64 for float64 inputs; for bfloat16 to 2^-12 of the sigmoid) from the products' results; with float16
    and bfloat16, f, g and everything saved have that dtype. Under torch.autocast the inputs are cast to its
    dtype first, as for a linear layer.

    Cost, with P = sum_l H_l H_{l-1} weights (H_0 = D) and S = sum_l H_l units: 4 B P FLOPs in products and
    about 20 B S pointwise for the value and gradient; the backward takes at most 10 B P more (2 tangent, 4
    reverse, 4 weights). Memory traffic when nothing else leaves the chip: b (B (2 D + 1) + P + S) bytes for b
    bytes per number, and b B H_1 more for a first_bias of B rows; saved for the backward: the
    inputs and b B S bytes of pre-activations. Reference twins also write and read every layer's activations.

    Args:
        x: [B, D] float16, bfloat16, float32 or float64.
        first_bias: [H_1], [1, H_1] or [B, H_1]; the whole additive term of the first layer (its bias, and the
            contribution of time and label embeddings).
        weights: L + 1 matrices W_1 [H_1, D], W_2 [H_2, H_1], .., W_L [H_L, H_{L-1}] and the head w [1, H_L];
            L >= 1.
        biases: L vectors b_2 [H_2], .., b_L [H_L] and c [1]; there is no b_1, see first_bias.
        split: float32 products may be taken as three products of bfloat16 numbers, x = high + low, with a relative
            error of about 2^-16: for processors whose bfloat16 units are more than three times as fast. Where a
            backend has none it takes float32 products.
        backend: "auto", "reference", or a faster implementation by name.

    Returns:
        f [B] and g [B, D], in the dtype of x.

    Raises:
        ValueError: numbers of layers, shapes, dtypes or devices do not fit.
        BackendUnavailableError: the requested backend cannot serve the call, or its backward.

    Source: the value and gradient of log h of TGDP, Theorem 3.1; derivative for Algorithm 4, consistency
        term.
    """
    call = checked_call(x, first_bias, weights, biases, outputs=1)
    name = _dispatch.requested_backend(backend)
    forward = _dispatch.resolve(_FORWARD, name, *call)
    if needs_autograd(call):
        # Resolved here, for the backward may run in another thread, outside of a use_backend block.
        backward = _dispatch.resolve(_BACKWARD, name, *call)
        return _MlpValueAndGrad.apply(forward.backend, backward.backend, len(call[3]), split, *flat(call))
    value, gradient, _ = forward.function(*call, save_pre_activations=False, split=split)
    return value, gradient


def mlp_value_and_grad_reference(
    x: Tensor, first_bias: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch twin of :func:`mlp_value_and_grad`: the closed form, without checks."""
    value, gradient, _ = _forward_reference(x, first_bias, weights, biases, save_pre_activations=False)
    return value, gradient


def mlp_value_and_grad_backward_reference(
    value_cotangent: Tensor | None,
    gradient_cotangent: Tensor | None,
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    pre_activations: Sequence[Tensor],
    *,
    needs_grad: Sequence[bool] | None = None,
    split: bool = False,
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
        split: as in the forward; products here are in the dtype of x all the same.

    Returns:
        Gradients of (x, first_bias, *weights, *biases), each with the shape and dtype of its input; None
        where not needed. The gradient of first_bias is summed over the batch where it was broadcast.
    """
    depth = len(pre_activations)
    needs = tuple(needs_grad) if needs_grad is not None else (True,) * (2 * depth + 3)
    needs_x, needs_first, needs_w, needs_b = needs[0], needs[1], needs[2 : depth + 3], needs[depth + 3 :]
    dtype, precise = x.dtype, _activation_dtype(x.dtype)
    fb = x.new_zeros(x.shape[0]) if value_cotangent is None else value_cotangent
    head = weights[depth]

    # Upwards: activations, slopes, and the tangent pass.
    tangent = None if gradient_cotangent is None else dense_rows(gradient_cotangent)
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

    # Downwards, no further than the lowest layer that somebody needs.
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


def _forward_reference(
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    save_pre_activations: bool,
    split: bool = False,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    depth = len(biases)
    activation = dense_rows(x)
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


class _MlpValueAndGrad(torch.autograd.Function):
    """Saves inputs and pre-activations; gradients by the joint closed form."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, backward_backend: str, depth: int, split: bool, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, first_bias, weights, biases = inputs[0], inputs[1], inputs[2 : depth + 3], inputs[depth + 3 :]
        function = _dispatch.lookup(_FORWARD, backend).function
        value, gradient, saved = function(x, first_bias, weights, biases, save_pre_activations=True, split=split)
        ctx.save_for_backward(x, first_bias, *weights, *saved)
        ctx.backend, ctx.depth, ctx.split = backward_backend, depth, split
        # So that a loss on the value alone skips the tangent pass.
        ctx.set_materialize_grads(False)
        return value, gradient

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, value_cotangent: Tensor | None, gradient_cotangent: Tensor | None) -> Any:
        if value_cotangent is None and gradient_cotangent is None:
            return (None,) * (4 + 2 * ctx.depth + 3)
        x, first_bias, *rest = ctx.saved_tensors
        weights, saved = tuple(rest[: ctx.depth + 1]), tuple(rest[ctx.depth + 1 :])
        backward = _dispatch.lookup(_BACKWARD, ctx.backend).function
        needs_grad = tuple(ctx.needs_input_grad[4:])
        cotangents = value_cotangent, gradient_cotangent
        gradients = backward(*cotangents, x, first_bias, weights, saved, needs_grad=needs_grad, split=ctx.split)
        return (None, None, None, None, *gradients)


def _activation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _silu_slope(z: Tensor, s: Tensor) -> Tensor:
    """First derivative of silu at z, with s = sigmoid(z)."""
    return s * (1.0 + z * (1.0 - s))


def _silu_curvature(z: Tensor, s: Tensor) -> Tensor:
    """Second derivative of silu at z, with s = sigmoid(z)."""
    return s * (1.0 - s) * (2.0 + z * (1.0 - 2.0 * s))


def _call_forward(
    operator: str, *call: Any, save_pre_activations: bool, split: bool = False
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The implementation by the registered operator of this name."""
    value, gradient, saved = getattr(torch.ops.tgdp_fast, operator)(*call, save_pre_activations, split)
    return value, gradient, tuple(saved)


def _call_backward(
    operator: str, *call: Any, needs_grad: tuple[bool, ...], split: bool = False
) -> tuple[Tensor | None, ...]:
    return where_needed(getattr(torch.ops.tgdp_fast, operator)(*call, needs_grad, split), needs_grad)


def _fake_forward(
    x: Tensor,
    first_bias: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    save_pre_activations: bool,
    split: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    saved = fake_pre_activations(x, weights, save_pre_activations)
    return x.new_empty(x.shape[0]), x.new_empty(x.shape), saved


def _fake_backward(
    value_cotangent: Tensor | None,
    gradient_cotangent: Tensor | None,
    x: Tensor,
    first_bias: Tensor,
    weights: list[Tensor],
    pre_activations: list[Tensor],
    needs_grad: list[bool],
    split: bool,
) -> list[Tensor]:
    return fake_gradients(x, first_bias, weights, needs_grad)


if native.CPU_MISSING is None:
    torch.library.register_fake("tgdp_fast::mlp_value_and_grad", _fake_forward)
    torch.library.register_fake("tgdp_fast::mlp_value_and_grad_backward", _fake_backward)
    _dispatch.register(_FORWARD, "cpu", partial(_call_forward, _FORWARD), _dispatch.refuses_float64)
    _dispatch.register(_BACKWARD, "cpu", partial(_call_backward, _BACKWARD), _dispatch.refuses_float64)


if _triton.MISSING is None:
    torch.library.define(
        "tgdp_fast::mlp_value_and_grad_triton",
        "(Tensor x, Tensor first_bias, Tensor[] weights, Tensor[] biases, bool save_pre_activations, bool split)"
        " -> (Tensor, Tensor, Tensor[])",
    )
    torch.library.define(
        "tgdp_fast::mlp_value_and_grad_backward_triton",
        "(Tensor? value_cotangent, Tensor? gradient_cotangent, Tensor x, Tensor first_bias, Tensor[] weights,"
        " Tensor[] pre_activations, bool[] needs_grad, bool split) -> Tensor[]",
    )

    @torch.library.impl("tgdp_fast::mlp_value_and_grad_triton", "default")
    def _(
        x: Tensor,
        first_bias: Tensor,
        weights: list[Tensor],
        biases: list[Tensor],
        save_pre_activations: bool,
        split: bool,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        from tgdp_fast.kernels import mlp_value_and_grad as kernels

        with torch.cuda.device_of(x):
            return kernels.value_and_grad(x, first_bias, weights, biases, keep=save_pre_activations, split=split)

    @torch.library.impl("tgdp_fast::mlp_value_and_grad_backward_triton", "default")
    def _(
        value_cotangent: Tensor | None,
        gradient_cotangent: Tensor | None,
        x: Tensor,
        first_bias: Tensor,
        weights: list[Tensor],
        pre_activations: list[Tensor],
        needs_grad: list[bool],
        split: bool,
    ) -> list[Tensor]:
        from tgdp_fast.kernels import mlp_value_and_grad as kernels

        cotangents = value_cotangent, gradient_cotangent
        with torch.cuda.device_of(x):
            return kernels.value_and_grad_backward(
                *cotangents, x, first_bias, weights, pre_activations, needs_grad=needs_grad, split=split
            )

    torch.library.register_fake("tgdp_fast::mlp_value_and_grad_triton", _fake_forward)
    torch.library.register_fake("tgdp_fast::mlp_value_and_grad_backward_triton", _fake_backward)
    _dispatch.register(
        _FORWARD,
        "triton",
        partial(_call_forward, "mlp_value_and_grad_triton"),
        refuses_triton,
        yields_to=_measured.triton_perceptron_yields_to,
    )
    _dispatch.register(
        _BACKWARD,
        "triton",
        partial(_call_backward, "mlp_value_and_grad_backward_triton"),
        refuses_triton,
        yields_to=_measured.triton_derivative_yields_to,
    )


def _refuses_cuda(x: Tensor, _: Tensor, weights: Sequence[Tensor], __: Sequence[Tensor]) -> str | None:
    if len(weights) > 9 or any(weight.shape[0] > 512 for weight in weights):
        return "it serves at most 8 hidden layers, at most 512 wide"
    return _dispatch.refuses_float64(x) or _cuda.refuses_device(x)


# The same operator on tensors of another device; there is no kernel of its derivative.
_dispatch.register(
    _FORWARD,
    "cuda",
    partial(_call_forward, _FORWARD),
    _refuses_cuda,
    yields_to=_measured.cuda_perceptron_yields_to,
    missing=native.CUDA_MISSING,
)
_dispatch.register(
    _BACKWARD,
    "cuda",
    partial(_call_backward, _BACKWARD),
    missing="the CUDA kernels have no derivative of this operator",
)


_dispatch.register(_FORWARD, "reference", _forward_reference)
_dispatch.register(_BACKWARD, "reference", mlp_value_and_grad_backward_reference)
