"""All outputs of a SiLU multilayer perceptron: score networks, time embeddings, and losses on a log ratio alone.

    z_1 = W_1 x + first_bias,   z_l = W_l a_{l-1} + b_l,   a_l = silu(z_l),   output = W a_L + c

Two operators are registered, so that a faster implementation may provide either or both:

``perceptron``
    ``function(x, first_bias, weights, biases, *, save_pre_activations) -> (output, pre_activations)``; the latter are
    (z_1, .., z_L), each [B, H_l] in the dtype of x, or () when not asked for.
``perceptron_backward``
    ``function(output_cotangent, x, first_bias, weights, pre_activations, *, needs_grad) -> gradients`` of (x,
    first_bias, *weights, *biases); None where not needed.

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

from tgdp_fast.ops import _dispatch, _measured, _triton
from tgdp_fast.runtime import native

__all__ = ["perceptron", "perceptron_backward_reference", "perceptron_reference"]

_FORWARD = "perceptron"
_BACKWARD = "perceptron_backward"
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

#: x, first_bias, weights, biases
Call = tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]


def perceptron(
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    backend: str = "auto",
) -> Tensor:
    """All outputs of a SiLU perceptron.

    Differentiable in all inputs: once by a faster backend, and by PyTorch's autograd, as often as one likes, where the
    reference serves the call. Left to "auto", that is where x requires a gradient or a transform of ``torch.func`` is
    active. Precision and autocast as in :func:`mlp_value_and_grad`.

    Cost, with P = sum_l H_l H_{l-1} weights, head included: 2 B P FLOPs in products, and 4 B P in the backward (6 B P
    with the gradient of x).

    Args:
        x: [B, D] float16, bfloat16, float32 or float64.
        first_bias: [H_1], [1, H_1] or [B, H_1]; the whole additive term of the first layer.
        weights: L + 1 matrices W_1 [H_1, D], W_2 [H_2, H_1], .., W_L [H_L, H_{L-1}] and the head W [O, H_L]; L >= 1.
        biases: L vectors b_2 [H_2], .., b_L [H_L] and c [O].
        backend: "auto", "reference", or a faster implementation by name.

    Returns:
        [B, O], in the dtype of x.

    Raises:
        ValueError: numbers of layers, shapes, dtypes or devices do not fit.
        BackendUnavailableError: the requested backend cannot serve the call, or its backward.
    """
    call = checked_call(x, first_bias, weights, biases)
    name = _dispatch.requested_backend(backend)
    if name == "auto" and (_transformed() or (x.requires_grad and torch.is_grad_enabled())):
        name = "reference"
    forward = _dispatch.resolve(_FORWARD, name, *call)
    if forward.backend == "reference":
        return perceptron_reference(*call)
    if needs_autograd(call):
        backward = _dispatch.resolve(_BACKWARD, name, *call)
        output: Tensor = _Perceptron.apply(forward.backend, backward.backend, len(call[3]), *flat(call))
        return output
    output, _ = forward.function(*call, save_pre_activations=False)
    return output


def perceptron_reference(x: Tensor, first_bias: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """Plain PyTorch twin of :func:`perceptron`, without checks, under ordinary autograd."""
    return _forward_reference(x, first_bias, weights, biases, save_pre_activations=False)[0]


def perceptron_backward_reference(
    output_cotangent: Tensor,
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    pre_activations: Sequence[Tensor],
    *,
    needs_grad: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of sum(output_cotangent * output) with respect to every input.

    Args:
        output_cotangent: [B, O].
        x, first_bias, weights: as in the forward; of first_bias only the shape is used.
        pre_activations: (z_1, .., z_L), [B, H_l] each, as the forward saved them.
        needs_grad: which gradients to compute, in the order of the result.

    Returns:
        Gradients of (x, first_bias, *weights, *biases), each with the shape and dtype of its input; None where not
        needed. The gradient of first_bias is summed over the batch where it was broadcast.
    """
    depth = len(pre_activations)
    needs_x, needs_first = needs_grad[:2]
    needs_weight, needs_bias = needs_grad[2 : depth + 3], (needs_first, *needs_grad[depth + 3 :])
    weight_grads: list[Tensor | None] = [None] * (depth + 1)
    bias_grads: list[Tensor | None] = [None] * (depth + 1)
    zbar = dense_rows(output_cotangent)
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


def _forward_reference(*call: Any, save_pre_activations: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    x, first_bias, weights, biases = call
    activation, pre_activations = dense_rows(x), []
    for weight, bias in zip(weights[:-1], (first_bias, *biases[:-1]), strict=True):
        pre_activations.append(functional.linear(activation, weight) + bias)
        activation = functional.silu(pre_activations[-1])
    saved = tuple(pre_activations) if save_pre_activations else ()
    return functional.linear(activation, weights[-1], biases[-1]), saved


def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


# The compiler of torch before 2.12 cannot trace the question; the answer depends on its argument alone.
_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def checked_call(
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    outputs: int | None = None,
) -> Call:
    """The call of a perceptron, in the dtype of autocast where that is on.

    Raises:
        ValueError: as :func:`perceptron`, or the head has another number of ``outputs``.
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


def flat(call: Call) -> tuple[Tensor, ...]:
    """All tensors of a call in the order of the backward's gradients."""
    return call[0], call[1], *call[2], *call[3]


def dense_rows(matrix: Tensor) -> Tensor:
    """``matrix`` [M, K] as the left factor of a matmul, copied where PyTorch may read past its rows.

    On a CPU with AMX, oneDNN reads 16-bit rows two numbers at a time: where K is odd, also the number behind each row,
    which it multiplies by zero. In a slice of a larger tensor that number belongs to somebody else, and NaN or infinity
    there would spread into the row.
    """
    odd = matrix.dtype in (torch.float16, torch.bfloat16) and matrix.shape[1] % 2 == 1
    return matrix.contiguous() if odd and matrix.device.type == "cpu" else matrix


def needs_autograd(call: Call) -> bool:
    """Whether somebody may ask for a gradient."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in flat(call))


def _transformed() -> bool:
    return bool(torch._C._are_functorch_transforms_active())


class _Perceptron(torch.autograd.Function):
    """Saves inputs and pre-activations."""

    @staticmethod
    def forward(ctx: Any, backend: str, backward_backend: str, depth: int, *inputs: Tensor) -> Tensor:
        x, first_bias, weights, biases = inputs[0], inputs[1], inputs[2 : depth + 3], inputs[depth + 3 :]
        function = _dispatch.lookup(_FORWARD, backend).function
        output: Tensor
        output, saved = function(x, first_bias, weights, biases, save_pre_activations=True)
        ctx.save_for_backward(x, first_bias, *weights, *saved)
        ctx.backend, ctx.depth = backward_backend, depth
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_cotangent: Tensor) -> Any:
        x, first_bias, *rest = ctx.saved_tensors
        weights, saved = tuple(rest[: ctx.depth + 1]), tuple(rest[ctx.depth + 1 :])
        function = _dispatch.lookup(_BACKWARD, ctx.backend).function
        needs_grad = tuple(ctx.needs_input_grad[3:])
        return None, None, None, *function(output_cotangent, x, first_bias, weights, saved, needs_grad=needs_grad)


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


def refuses_triton(x: Tensor, *_: Any) -> str | None:
    """Why the Triton kernels cannot take a call."""
    return _dispatch.refuses_float64(x) or _triton.refuses_device(x)


def _call_forward(operator: str, *call: Any, save_pre_activations: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The implementation by the registered operator of this name."""
    output, saved = getattr(torch.ops.tgdp_fast, operator)(*call, save_pre_activations)
    return output, tuple(saved)


def _call_backward(operator: str, *call: Any, needs_grad: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return where_needed(getattr(torch.ops.tgdp_fast, operator)(*call, needs_grad), needs_grad)


def where_needed(gradients: list[Tensor], needs_grad: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """The gradients that a backward operator returns at their places, None at the others."""
    remaining = iter(gradients)
    return tuple(next(remaining) if needed else None for needed in needs_grad)


def fake_pre_activations(x: Tensor, weights: list[Tensor], wanted: bool) -> list[Tensor]:
    """What a forward operator keeps, without values."""
    return [x.new_empty((x.shape[0], weight.shape[0])) for weight in weights[:-1]] if wanted else []


def fake_gradients(x: Tensor, first_bias: Tensor, weights: list[Tensor], needs_grad: list[bool]) -> list[Tensor]:
    """What a backward operator returns, without values."""
    shapes = [x.shape, first_bias.shape, *(w.shape for w in weights), *(w.shape[:1] for w in weights[1:])]
    return [x.new_empty(shape) for shape, needed in zip(shapes, needs_grad, strict=True) if needed]


def _fake_forward(
    x: Tensor, first_bias: Tensor, weights: list[Tensor], biases: list[Tensor], save_pre_activations: bool
) -> tuple[Tensor, list[Tensor]]:
    output = x.new_empty((x.shape[0], weights[-1].shape[0]))
    return output, fake_pre_activations(x, weights, save_pre_activations)


def _fake_backward(
    output_cotangent: Tensor,
    x: Tensor,
    first_bias: Tensor,
    weights: list[Tensor],
    pre_activations: list[Tensor],
    needs_grad: list[bool],
) -> list[Tensor]:
    return fake_gradients(x, first_bias, weights, needs_grad)


if native.CPU_MISSING is None:
    torch.library.register_fake("tgdp_fast::perceptron", _fake_forward)
    torch.library.register_fake("tgdp_fast::perceptron_backward", _fake_backward)
    _dispatch.register(_FORWARD, "cpu", partial(_call_forward, "perceptron"), _dispatch.refuses_float64)
    _dispatch.register(_BACKWARD, "cpu", partial(_call_backward, "perceptron_backward"), _dispatch.refuses_float64)


if _triton.MISSING is None:
    torch.library.define(
        "tgdp_fast::perceptron_triton",
        "(Tensor x, Tensor first_bias, Tensor[] weights, Tensor[] biases, bool save_pre_activations)"
        " -> (Tensor, Tensor[])",
    )
    torch.library.define(
        "tgdp_fast::perceptron_backward_triton",
        "(Tensor output_cotangent, Tensor x, Tensor first_bias, Tensor[] weights, Tensor[] pre_activations,"
        " bool[] needs_grad) -> Tensor[]",
    )

    @torch.library.impl("tgdp_fast::perceptron_triton", "default")
    def _(
        x: Tensor, first_bias: Tensor, weights: list[Tensor], biases: list[Tensor], save_pre_activations: bool
    ) -> tuple[Tensor, list[Tensor]]:
        from tgdp_fast.kernels import perceptron as kernels

        with torch.cuda.device_of(x):
            return kernels.perceptron(x, first_bias, weights, biases, keep=save_pre_activations)

    @torch.library.impl("tgdp_fast::perceptron_backward_triton", "default")
    def _(
        output_cotangent: Tensor,
        x: Tensor,
        first_bias: Tensor,
        weights: list[Tensor],
        pre_activations: list[Tensor],
        needs_grad: list[bool],
    ) -> list[Tensor]:
        from tgdp_fast.kernels import perceptron as kernels

        with torch.cuda.device_of(x):
            return kernels.perceptron_backward(
                output_cotangent, x, first_bias, weights, pre_activations, needs_grad=needs_grad
            )

    torch.library.register_fake("tgdp_fast::perceptron_triton", _fake_forward)
    torch.library.register_fake("tgdp_fast::perceptron_backward_triton", _fake_backward)
    _dispatch.register(
        _FORWARD,
        "triton",
        partial(_call_forward, "perceptron_triton"),
        refuses_triton,
        yields_to=_measured.triton_perceptron_yields_to,
    )
    _dispatch.register(
        _BACKWARD,
        "triton",
        partial(_call_backward, "perceptron_backward_triton"),
        refuses_triton,
        yields_to=_measured.triton_derivative_yields_to,
    )


_dispatch.register(_FORWARD, "reference", _forward_reference)
_dispatch.register(_BACKWARD, "reference", perceptron_backward_reference)
