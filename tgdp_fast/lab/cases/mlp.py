"""Value and input gradient of the guidance network's MLP, the outputs of an MLP, and their derivatives."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tgdp_fast.lab.accuracy import Error, error_of
from tgdp_fast.lab.cases.case import Call, Case, Check, Draw, Setup, bytes_of, checked_rows, largest_error, place
from tgdp_fast.ops import mlp_forward, mlp_value_and_grad
from tgdp_fast.ops.mlp import mlp_value_and_grad_reference
from tgdp_fast.runtime.precision import PRECISIONS

#: Hidden layers of a timed network.
DEPTH = 4
_FEW_ROWS = 64

#: For validate: batch, inputs, widths, first bias, layout.
SHAPES = (
    (0, 3, (16, 16), "shared", "contiguous"),
    (1, 2, (128,) * 4, "shared", "contiguous"),
    (1, 1, (1,), "shared", "contiguous"),
    (37, 2, (33,), "shared", "contiguous"),
    (129, 1, (17, 31), "shared", "contiguous"),
    (65, 5, (48, 20, 7), "per sample", "contiguous"),
    (1, 7, (40, 24), "per sample", "contiguous"),
    (33, 64, (130, 127, 129), "shared", "strided"),
    (64, 17, (64, 64), "per sample", "strided"),
    (31, 10, (50, 50), "shared", "misaligned"),
    (77, 2, (512,) * 4, "shared", "contiguous"),
    (5, 3904, (96, 64), "per sample", "contiguous"),
)
#: The same with one, a few and many outputs, in turn.
SHAPES_OF_OUTPUTS = tuple((*shape, (1, 3, 8, 9, 70)[i % 5]) for i, shape in enumerate(SHAPES))


class MLPInputs(NamedTuple):
    """Arguments of ``mlp_value_and_grad`` and of the operator of outputs."""

    x: Tensor
    first_bias: Tensor
    weights: list[Tensor]
    biases: list[Tensor]

    def to(self, dtype: torch.dtype) -> MLPInputs:
        """Every tensor in ``dtype``."""
        return self.map(lambda tensor: tensor.to(dtype))

    def map(self, function: Callable[[Tensor], Tensor]) -> MLPInputs:
        """``function`` of every tensor."""
        weights, biases = [function(w) for w in self.weights], [function(b) for b in self.biases]
        return MLPInputs(function(self.x), function(self.first_bias), weights, biases)

    def flat(self) -> list[Tensor]:
        """x, first_bias, the weights, the biases."""
        return [self.x, self.first_bias, *self.weights, *self.biases]


def mlp_inputs(
    batch: int,
    inputs: int,
    widths: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    outputs: int = 1,
    bias_rows: str = "shared",
    seed: int = 0,
) -> MLPInputs:
    """Weights of standard deviation 1.5 / sqrt(columns), so that activations and outputs stay of order one.

    Args:
        batch, inputs: x is [batch, inputs].
        widths: H_1, .., H_L.
        dtype, device: of all tensors.
        outputs: O; mlp_value_and_grad takes one.
        bias_rows: "shared" for a first_bias [H_1], "per sample" for [batch, H_1].
        seed: of the random numbers.
    """
    draw = Draw(dtype, device, seed)
    sizes = [inputs, *widths, outputs]
    weights = [draw(rows, columns, scale=1.5 * columns**-0.5) for columns, rows in itertools.pairwise(sizes)]
    biases = [draw(rows, scale=0.5) for rows in sizes[2:]]
    first_bias = draw(widths[0]) if bias_rows == "shared" else draw(batch, widths[0])
    return MLPInputs(draw(batch, inputs), first_bias, weights, biases)


def hidden_weights(inputs: int, width: int, depth: int) -> int:
    """Numbers in the weight matrices of the hidden layers."""
    return inputs * width + (depth - 1) * width * width


def eager_mlp(x: Tensor, first_bias: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """Outputs [B, O] of the SiLU network; x [B, D]."""
    hidden = functional.silu(functional.linear(x, weights[0]) + first_bias)
    for weight, bias in zip(weights[1:-1], biases[:-1], strict=True):
        hidden = functional.silu(functional.linear(hidden, weight, bias))
    return functional.linear(hidden, weights[-1], biases[-1])


def eager_value_and_grad(
    x: Tensor, first_bias: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> list[Tensor]:
    """[f [B], df/dx [B, D]] by autograd; where x requires a gradient, both can be differentiated again."""
    create_graph = x.requires_grad
    with torch.enable_grad():
        x = x if create_graph else x.detach().requires_grad_()
        value = eager_mlp(x, first_bias, weights, biases).squeeze(1)
        (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=create_graph)
    return [value if create_graph else value.detach(), gradient]


def check(
    draw: Draw,
    batch: int,
    inputs: int,
    widths: tuple[int, ...],
    bias_rows: str,
    layout: str,
    outputs: int | None = None,
    *,
    backward: bool = False,
) -> Check:
    """Value and input gradient, or with ``outputs`` (of :data:`SHAPES_OF_OUTPUTS`) the outputs; with ``backward`` the
    gradients in x, first_bias, weights and biases of a random sum of these, by autograd through the definition.
    """
    drawn = mlp_inputs(
        batch, inputs, widths, draw.dtype, draw.device, outputs=outputs or 1, bias_rows=bias_rows, seed=draw.seed
    )
    placed, again = drawn.map(partial(place, layout=layout)), Draw(draw.dtype, draw.device, draw.seed)
    sizes = ((batch,), (batch, inputs)) if outputs is None else ((batch, outputs),)
    cotangents = [again(*size, scale=max(batch, 1) ** -0.5) for size in sizes]

    def run(function: Callable[..., Any], given: MLPInputs) -> Sequence[Tensor]:
        leaves = given.map(lambda tensor: tensor.detach().requires_grad_(backward))
        found = function(*leaves)
        found = [found] if isinstance(found, Tensor) else found
        if not backward:
            return [tensor.detach() for tensor in found]
        return torch.autograd.grad(found, leaves.flat(), [part.to(given.x.dtype) for part in cotangents])

    operator, eager = (mlp_value_and_grad, eager_value_and_grad) if outputs is None else (mlp_forward, eager_mlp)
    name = f"[{batch}, {inputs}] {'x'.join(map(str, widths))}, {bias_rows} bias, {layout}"
    return Check(
        name + ("" if outputs is None else f", {outputs} outputs"),
        lambda backend: run(partial(operator, backend=backend), placed),
        run(eager, drawn.to(torch.float64)),
        run(eager, drawn),
    )


check_backward = partial(check, backward=True)


def case(batch: int, inputs: int, width: int, *, quick: bool = False) -> Case:
    """Value and input gradient, four hidden layers, one shared first bias."""
    weights = hidden_weights(inputs, width, DEPTH) + width
    numbers = float(batch * (2 * inputs + 1) + weights + DEPTH * width)
    return Case(
        f"mlp_value_and_grad/batch{batch}-input{inputs}-width{width}",
        f"[{batch}, {inputs}], {DEPTH} x {width}",
        ("fp32", "bf16"),
        20.0 * batch * (3 * inputs + 3 * DEPTH * width),
        lambda precision: (bytes_of(precision) * numbers, 4.0 * batch * weights, precision),
        partial(_setup, batch, inputs, [width] * DEPTH),
        ("mlp_value_and_grad",),
        quick=quick,
    )


def _setup(batch: int, inputs: int, widths: Sequence[int], precision: str, device: torch.device) -> Setup:
    dtype = PRECISIONS[precision]
    drawn = mlp_inputs(batch, inputs, widths, dtype, device)

    def call(provider: str) -> Call:
        if provider == "peer":
            return partial(eager_value_and_grad, *drawn)
        function: Callable[..., Sequence[Tensor]] = partial(mlp_value_and_grad, backend=provider)
        if provider == "compile":
            function = torch.compile(mlp_value_and_grad_reference, dynamic=False)

        def without_graph() -> Sequence[Tensor]:
            with torch.inference_mode():
                return function(*drawn)

        return without_graph

    def check(provider: str, call: Call) -> float:
        rows = checked_rows(batch, device)
        part = drawn._replace(x=drawn.x[rows])
        exact = eager_value_and_grad(*part.to(torch.float64))
        other: Callable[..., Sequence[Tensor]] = eager_value_and_grad
        if provider == "peer":
            other = mlp_value_and_grad_reference
        eager_error = error_of(other(*part), exact)
        if len(rows) < _FEW_ROWS:
            # In a few rows eager's errors may happen to cancel: its usual one is that of further rows of the same
            # network, each against its own scale.
            more = mlp_inputs(_FEW_ROWS, inputs, widths, dtype, device)
            usual = zip(*other(*more), *eager_value_and_grad(*more.to(torch.float64)), strict=True)
            errors = [error_of([f[None], g[None]], [exact_f[None], exact_g[None]]) for f, g, exact_f, exact_g in usual]
            eager_error = Error(*(max(values) for values in zip(eager_error, *errors, strict=True)))
        return largest_error(provider, [output[rows] for output in call()], exact, eager_error, dtype)

    return Setup(call, check)
