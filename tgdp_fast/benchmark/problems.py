"""Inputs of the operators: of order one, the same on every machine and in every precision up to its rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PerceptronInputs(NamedTuple):
    """Arguments of ``mlp_value_and_grad`` and ``perceptron``."""

    x: Tensor
    first_bias: Tensor
    weights: list[Tensor]
    biases: list[Tensor]

    def to(self, dtype: torch.dtype) -> PerceptronInputs:
        """Every tensor in ``dtype``."""
        return self.map(lambda tensor: tensor.to(dtype))

    def map(self, function: Callable[[Tensor], Tensor]) -> PerceptronInputs:
        """``function`` of every tensor."""
        weights, biases = [function(w) for w in self.weights], [function(b) for b in self.biases]
        return PerceptronInputs(function(self.x), function(self.first_bias), weights, biases)

    def flat(self) -> list[Tensor]:
        """x, first_bias, the weights, the biases."""
        return [self.x, self.first_bias, *self.weights, *self.biases]


def perceptron_inputs(
    batch: int,
    inputs: int,
    widths: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    outputs: int = 1,
    bias_rows: str = "shared",
    seed: int = 0,
) -> PerceptronInputs:
    """Weights of standard deviation 1.5 / sqrt(columns), so that activations and outputs stay of order one.

    Args:
        batch, inputs: x is [batch, inputs].
        widths: H_1, .., H_L.
        outputs: O; mlp_value_and_grad takes one.
        bias_rows: "shared" for a first_bias [H_1], "per sample" for [batch, H_1].
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(device, dtype)

    sizes = [inputs, *widths, outputs]
    weights = [draw(rows, columns, scale=1.5 * columns**-0.5) for columns, rows in zip(sizes, sizes[1:], strict=False)]
    biases = [draw(rows, scale=0.5) for rows in sizes[2:]]
    first_bias = draw(widths[0]) if bias_rows == "shared" else draw(batch, widths[0])
    return PerceptronInputs(draw(batch, inputs), first_bias, weights, biases)


class StepInputs(NamedTuple):
    """Tensors of ``guided_step``: x, epsilon, gradient [B, ...], history [H, B, ...] or None."""

    x: Tensor
    epsilon: Tensor
    gradient: Tensor
    history: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> StepInputs:
        """``function`` of every tensor."""
        history = None if self.history is None else function(self.history)
        return StepInputs(function(self.x), function(self.epsilon), function(self.gradient), history)


def step_inputs(
    shape: Sequence[int], slots: int, dtype: torch.dtype, device: torch.device, *, seed: int = 0
) -> StepInputs:
    """Standard normal tensors; no history where ``slots`` is 0."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    x, epsilon, gradient = draw(*shape), draw(*shape), draw(*shape)
    return StepInputs(x, epsilon, gradient, draw(slots, *shape) if slots else None)
