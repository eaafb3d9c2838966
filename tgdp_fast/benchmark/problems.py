"""Inputs of the operators: of order one, the same on every machine and in every precision up to its rounding."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.diffusion.solvers import solver_table
from tgdp_fast.ops import (
    LongConvolution,
    ResidualBlockWeights,
    S4Weights,
    TrajectoryNetwork,
    TrajectoryPlan,
    prepare_long_convolution,
)


class PerceptronInputs(NamedTuple):
    """Arguments of ``mlp_value_and_grad`` and ``mlp_forward``."""

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


class TrajectoryInputs(NamedTuple):
    """Arguments of ``trajectory``."""

    x: Tensor
    score: TrajectoryNetwork
    guidance: TrajectoryNetwork | None
    plan: TrajectoryPlan


def trajectory_inputs(
    shape: tuple[int, int],
    widths: Sequence[int],
    guidance_widths: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    solver: str = "dpmpp_2m",
    sample_bias: bool = False,
    limits: bool = False,
    seed: int = 0,
) -> TrajectoryInputs:
    """Three steps of a solver, on samples of ``shape`` [B, D].

    Args:
        shape, widths: of the samples and of the score network, which predicts v.
        guidance_widths: none: there is no guidance network.
        dtype: of the networks' weights.
        device: of all tensors.
        solver: its name.
        sample_bias: whether first biases have a part per sample.
        limits: whether x0 and the gradient's norm are limited.
        seed: of the random numbers.
    """
    table = solver_table(solver, NoiseSchedule.vp_linear(), 3)
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int, scale: float) -> Tensor:
        return (scale * torch.randn(size, generator=generator)).to(device)

    def network(hidden: Sequence[int], outputs: int) -> TrajectoryNetwork:
        sizes = (shape[1], *hidden, outputs)
        weights = [draw(m, n, scale=n**-0.5).to(dtype) for n, m in itertools.pairwise(sizes)]
        biases = [draw(m, scale=0.3).to(dtype) for m in sizes[2:]]
        labels = draw(shape[0], sizes[1], scale=0.3) if sample_bias else None
        return TrajectoryNetwork(weights, biases, draw(table.nfe, sizes[1], scale=0.3), labels)

    plan = TrajectoryPlan(
        table.matrix,
        table.noise_scale,
        0.5 * table.sigma if guidance_widths else np.zeros(table.nfe),
        table.alpha,
        table.sigma,
        table.sigma,  # a v-prediction
        table.alpha,
        (-2.0, 2.0) if limits else None,
        0.2 if limits else None,
    )
    score, guidance = network(widths, shape[1]), network(guidance_widths, 1) if guidance_widths else None
    return TrajectoryInputs(draw(*shape, scale=1.0), score, guidance, plan)


class ResidualBlockInputs(NamedTuple):
    """Arguments of ``residual_block_``."""

    state: Tensor
    step_bias: Tensor
    label_bias: Tensor | None
    weights: ResidualBlockWeights

    @property
    def others(self) -> tuple[Tensor, Tensor | None, ResidualBlockWeights]:
        """All but the state."""
        return self.step_bias, self.label_bias, self.weights

    def double(self) -> ResidualBlockInputs:
        """The same numbers in float64, for the reference alone."""
        state, step_bias, label_bias, (convolution, first, second, output, output_bias) = self
        weights = convolution.double(), _double(first), _double(second), output.double(), output_bias.double()
        labels = None if label_bias is None else label_bias.double()
        return ResidualBlockInputs(state.double(), step_bias.double(), labels, ResidualBlockWeights(*weights))


def _double(layer: S4Weights) -> S4Weights:
    filters = LongConvolution(layer.filters.taps.double(), None, None)
    mixture, mixture_bias, norm_weight, norm_bias = (tensor.double() for tensor in layer[1:5])
    return S4Weights(filters, mixture, mixture_bias, norm_weight, norm_bias, layer.epsilon)


def residual_block_inputs(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    labels: str = "per sample",
    steps: str = "shared",
    seed: int = 0,
) -> ResidualBlockInputs:
    """A block whose layers all have outputs of order one.

    Args:
        shape: samples B, residual channels C, skip channels S and positions L.
        dtype: of the products' weights.
        device: of all tensors.
        labels, steps: "shared" for biases with one row, "per sample" for B rows; labels: "none" for no bias.
        seed: of the random numbers.
    """
    batch, channels, skip, length = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=generator)).to(device)

    def layer() -> S4Weights:
        width = 2 * channels
        taps = draw(width, 2 * length - 1, scale=length**-0.5)
        return S4Weights(
            prepare_long_convolution(taps, dtype),
            draw(width, width, scale=width**-0.5).to(dtype),
            draw(width, scale=0.3),
            1 + draw(width, scale=0.2),
            draw(width, scale=0.3),
            1e-5,
        )

    weights = ResidualBlockWeights(
        draw(2 * channels, 3 * channels, scale=(3 * channels) ** -0.5).to(dtype),
        layer(),
        layer(),
        draw(channels + skip, channels, scale=channels**-0.5).to(dtype),
        draw(channels + skip, scale=0.3),
    )
    rows = {"shared": 1, "per sample": batch}
    return ResidualBlockInputs(
        draw(batch, channels + skip, length),
        draw(rows[steps], 3, 2 * channels, scale=0.5),
        None if labels == "none" else draw(rows[labels], 2 * channels, scale=0.5),
        weights,
    )
