"""One solver step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.diffusion.solvers import SolverTable, solver_table
from tgdp_fast.lab.accuracy import error_of
from tgdp_fast.lab.cases.case import SEED, Call, Case, Check, Draw, Setup, bytes_of, checked_rows, largest_error, place
from tgdp_fast.ops import SolverStep, guided_step
from tgdp_fast.ops.guided_step import guided_step_reference
from tgdp_fast.ops.noise import normal
from tgdp_fast.runtime.precision import PRECISIONS

#: Elements of a sample.
SAMPLE = 1000

#: For validate: shape of x, history slots, noise, clamp, layout.
SHAPES = (
    ((0, 3), 1, False, False, "contiguous"),
    ((1, 1), 0, False, False, "contiguous"),
    ((1, 2), 2, True, False, "contiguous"),
    ((5,), 1, True, True, "contiguous"),
    ((7, 3), 0, True, False, "contiguous"),
    ((33, 5), 1, False, True, "contiguous"),
    ((6, 2, 7), 2, True, False, "strided"),
    ((9, 13), 1, True, False, "misaligned"),
    ((3, 8, 1000), 2, True, True, "contiguous"),
    ((4099, 2), 1, False, False, "contiguous"),
)


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
    draw = Draw(dtype, device, seed)
    x, epsilon, gradient = draw(*shape), draw(*shape), draw(*shape)
    return StepInputs(x, epsilon, gradient, draw(slots, *shape) if slots else None)


def eager_step(
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
    previous = [None] * (len(matrix) - 1) if history is None else list(history.unbind(0))
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


def eager_multistep(
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
    """A step of DPM-Solver++ 2M as its public implementations write it, from x0 and the previous x0: [x_next, x0, x0].

    Shapes: every tensor [B, ...]; matrix 2 x 3, the same step as a table of this package has it.
    """
    from_x, from_previous, from_epsilon = matrix[0]
    guided = epsilon - guidance_weight * gradient
    x0 = (x - sigma * guided) / alpha
    x_next = (from_x + from_epsilon / sigma) * x - (from_epsilon * alpha / sigma) * x0 + from_previous * previous
    return [x_next, x0, x0]


def _flat(result: Sequence[Any]) -> list[Tensor]:
    x_next, history, x0 = result
    return [x_next, x0, *(() if history is None else history.unbind(0))]


def check(draw: Draw, shape: tuple[int, ...], slots: int, noise: bool, clamp: bool, layout: str) -> Check:
    """The step of an entry of :data:`SHAPES` with a random matrix."""
    inputs = step_inputs(shape, slots, draw.dtype, draw.device, seed=draw.seed)
    matrix = torch.randn(1 + slots, 2 + slots, generator=draw.generator, dtype=torch.float64).tolist()
    step: dict[str, Any] = {"matrix": matrix, "guidance_weight": 0.7, "alpha": 0.8, "sigma": 0.6}
    step |= {"clamp": (-1.0, 1.0) if clamp else None, "noise_scale": 0.5 if noise else 0.0}
    # Indices past 2^32, so that 64-bit counters are seen.
    index, z = torch.arange(shape[0], device=draw.device) * 3 + 2**33, None
    if noise:
        z = normal(draw.seed, index, math.prod(shape[1:]), 5, device=draw.device).reshape(shape)
    placed = inputs.map(partial(place, layout=layout))
    call = partial(guided_step, *placed, step=SolverStep(**step), seed=draw.seed, sample_index=index, evaluation=5)
    return Check(
        ", ".join([f"{list(shape)}", f"{slots} slots", *["noise"] * noise, *["clamp"] * clamp, layout]),
        lambda backend: _flat(call(backend=backend)),
        eager_step(*inputs.map(Tensor.double), **step, z=None if z is None else z.double()),
        eager_step(*inputs, **step, z=None if z is None else z.to(draw.dtype)),
    )


def case(exponent: int, *, noise: bool = False, quick: bool = False) -> Case:
    """A step of 10^exponent elements, all tensors in the precision: DPM-Solver++ 2M, or DDPM with ``noise``, which the
    operator generates.
    """
    elements = 10**exponent
    table = solver_table("ddpm" if noise else "dpmpp_2m", NoiseSchedule.vp_linear(), 25)
    slots = table.history
    flops = float(elements * (5 + (1 + slots) * (3 + 2 * slots) + (2 if noise else 0)))
    return Case(
        f"guided_step{'_noise' if noise else ''}/1e{exponent}",
        f"[{elements // SAMPLE}, {SAMPLE}]",
        ("fp32", "bf16", "fp16"),
        80.0 * elements,
        lambda precision: (elements * bytes_of(precision) * (5.0 + 2 * slots), flops, "fp32"),
        partial(_setup, table, elements // SAMPLE, noise),
        ("guided_step",),
        # A replay of the peer draws other noise each time, so there is nothing to compare it with.
        uncapturable=("peer",) if noise else (),
        quick=quick,
    )


def _setup(table: SolverTable, batch: int, noisy: bool, precision: str, device: torch.device) -> Setup:
    dtype, k = PRECISIONS[precision], table.nfe // 2
    inputs = step_inputs((batch, SAMPLE), table.history, dtype, device)
    index, noise_scale, sigma = torch.arange(batch, device=device), float(table.noise_scale[k]), float(table.sigma[k])
    matrix = tuple(map(tuple, table.matrix[k].tolist()))
    step: dict[str, Any] = {"matrix": matrix, "guidance_weight": sigma, "alpha": float(table.alpha[k]), "sigma": sigma}

    def call(provider: str) -> Call:
        x, epsilon, gradient, history = inputs
        if provider == "peer":
            if history is not None:
                return partial(eager_multistep, x, epsilon, gradient, history[0], **step)
            return lambda: eager_step(*inputs, **step, noise_scale=noise_scale, z=torch.randn_like(x))
        function: Callable[..., Any] = partial(guided_step, backend=provider)
        if provider == "compile":
            function = torch.compile(guided_step_reference, dynamic=False)
        arguments: dict[str, Any] = {"step": SolverStep(**step, noise_scale=noise_scale)}
        arguments |= {"seed": SEED, "evaluation": 1, "sample_index": index}
        return lambda: _flat(function(*inputs, **arguments))

    def check(provider: str, call: Call) -> float:
        torch.manual_seed(SEED)
        outputs, z = call(), None
        if noisy and provider != "peer":
            z = normal(SEED, index, SAMPLE, 1, device=device)
        elif noisy:
            torch.manual_seed(SEED)
            z = torch.randn_like(inputs.x)
        rows = checked_rows(batch, device)
        part = inputs.map(lambda tensor: tensor.index_select(tensor.ndim - 2, rows))

        def eager(to: torch.dtype) -> list[Tensor]:
            noise = None if z is None else z[rows].to(to)
            return eager_step(*part.map(lambda tensor: tensor.to(to)), **step, noise_scale=noise_scale, z=noise)

        exact = eager(torch.float64)
        return largest_error(
            provider, [output[rows] for output in outputs], exact, error_of(eager(dtype), exact), dtype
        )

    return Setup(call, check)
