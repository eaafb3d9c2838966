"""The operators the way public code computes them: plain PyTorch, one operation after another, autograd.grad.

In float64 they are the truth that errors are measured against; in a lower precision the yardstick for an error and the
``peer`` of the benchmarks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from tgdp_fast.benchmark.problems import PerceptronInputs


def guided_step(
    x: Tensor,
    epsilon: Tensor,
    gradient: Tensor | None,
    history: Tensor | None,
    *,
    matrix: Sequence[Sequence[float]],
    guidance_weight: float,
    alpha: float,
    sigma: float,
    noise_scale: float = 0.0,
    z: Tensor | None = None,
    clamp: tuple[float, float] | None = None,
) -> list[Tensor]:
    """:func:`tgdp_fast.ops.guided_step` in the dtype of x throughout, with the noise given: [x_next, x0, m_1, ..].

    Shapes: x, epsilon, gradient, z [B, ...]; history [H, B, ...] or None for zeros; every output [B, ...].
    """
    guided = epsilon if gradient is None else epsilon - guidance_weight * gradient
    x0 = (x - sigma * guided) / alpha
    if clamp is not None:
        x0 = x0.clamp(*clamp)
        guided = (x - alpha * x0) / sigma
    slots = len(matrix) - 1
    previous = [None] * slots if history is None else list(history.unbind(0))
    rows = []
    for coefficients in matrix:
        row = torch.zeros_like(x)
        for coefficient, value in zip(coefficients, [x, *previous, guided], strict=True):
            if coefficient != 0.0 and value is not None:
                row = row + coefficient * value
        rows.append(row)
    if z is not None:
        rows[0] = rows[0] + noise_scale * z
    return [rows[0], x0, *rows[1:]]


def multistep(
    x: Tensor,
    epsilon: Tensor,
    gradient: Tensor,
    previous: Tensor,
    *,
    matrix: Sequence[Sequence[float]],
    guidance_weight: float,
    alpha: float,
    sigma: float,
) -> list[Tensor]:
    """A step of DPM-Solver++ 2M as its public implementations write it, from x0 and the x0 before: [x_next, x0, x0].

    Shapes: every tensor [B, ...]; matrix 2 x 3, the same step as a table of this package has it.
    """
    from_x, from_previous, from_epsilon = matrix[0]
    guided = epsilon - guidance_weight * gradient
    x0 = (x - sigma * guided) / alpha
    x_next = (from_x + from_epsilon / sigma) * x - (from_epsilon * alpha / sigma) * x0 + from_previous * previous
    return [x_next, x0, x0]


def long_convolution(u: Tensor, spectrum: Tensor, *, gelu: bool = True) -> Tensor:
    """:func:`tgdp_fast.ops.long_convolution` with the real transform of the taps given, 2 L points: [H, L + 1] complex.

    Transforms in the precision of the spectrum, for they have no 16 bits; the activation in the dtype of u.
    """
    length = u.shape[-1]
    y = torch.fft.irfft(torch.fft.rfft(u.to(spectrum.real.dtype), n=2 * length) * spectrum, n=2 * length)
    y = y[..., length - 1 : 2 * length - 1].to(u.dtype)
    return functional.gelu(y) if gelu else y


def gated_activation(x: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`tgdp_fast.ops.gated_activation` in the dtype of x throughout; x [B, 2 C, L], bias [2 C] or [B, 2 C]."""
    first, second = (x if bias is None else x + bias.unsqueeze(-1)).chunk(2, dim=1)
    return torch.tanh(first) * torch.sigmoid(second)


def perceptron(x: Tensor, first_bias: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """Outputs [B, O] of the SiLU MLP of :func:`tgdp_fast.ops.mlp_forward`; x [B, D]."""
    hidden = functional.silu(functional.linear(x, weights[0]) + first_bias)
    for weight, bias in zip(weights[1:-1], biases[:-1], strict=True):
        hidden = functional.silu(functional.linear(hidden, weight, bias))
    return functional.linear(hidden, weights[-1], biases[-1])


def value_and_grad(
    x: Tensor, first_bias: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *, create_graph: bool = False
) -> list[Tensor]:
    """[f [B], df/dx [B, D]] by autograd; with ``create_graph`` both can be differentiated again."""
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        value = perceptron(x, first_bias, weights, biases).squeeze(1)
        (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=create_graph)
    return [value if create_graph else value.detach(), gradient]


def backward(value_cotangent: Tensor, gradient_cotangent: Tensor, inputs: PerceptronInputs) -> list[Tensor]:
    """Gradients of sum(fb f) + sum(gb . g) in (x, first_bias, *weights, *biases) by double backward."""
    leaves = inputs.map(lambda tensor: tensor.detach().clone().requires_grad_())
    outputs = value_and_grad(*leaves, create_graph=True)
    return list(torch.autograd.grad(outputs, leaves.flat(), [value_cotangent, gradient_cotangent]))
