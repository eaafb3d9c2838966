"""Sampling the simulation, from noise or from a given state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tgdp_fast.diffusion.denoiser import Denoiser
from tgdp_fast.diffusion.guidance import GuidanceNetwork
from tgdp_fast.diffusion.guided import EpsilonModel, Guidance
from tgdp_fast.diffusion.solvers import SolverTable, solver_table
from tgdp_fast.lab.accuracy import error_of
from tgdp_fast.lab.cases.case import (
    PLAIN_PROVIDERS,
    PROVIDERS,
    SEED,
    Call,
    Case,
    Setup,
    backend_of,
    bytes_of,
    checked_rows,
    limited,
    served_outputs,
)
from tgdp_fast.lab.cases.mlp import hidden_weights
from tgdp_fast.lab.cases.networks import guidance_network, source_denoiser
from tgdp_fast.metrics import sliced_wasserstein
from tgdp_fast.ops import mlp_value_and_grad, use_backend
from tgdp_fast.ops.noise import normal
from tgdp_fast.runtime.precision import PRECISIONS, autocast
from tgdp_fast.sampling.config import SamplingConfig
from tgdp_fast.sampling.full_trajectory import FullTrajectory
from tgdp_fast.sampling.loop import Loop
from tgdp_fast.sampling.sampler import Sampler

DEPTH, INPUTS, STEPS = 4, 2, 25

#: Largest error of a sample in fp32, relative to the largest entry.
SAMPLES_FP32 = 1e-3
#: The same in bf16. The two networks have ten matmuls, each rounding to 2^-9 of its result: 2^-9 sqrt(10), 0.6 %, of
#: epsilon on average, and about eight times that in the worst of a few hundred samples, after the solver has added up
#: errors of one direction with the exponentially growing weights that end in the last, nearly noiseless, steps.
SAMPLES_BF16 = 5e-2
#: Largest sliced Wasserstein distance of the peer's samples, from the same initial noise by another solver, to the
#: reference's, relative to their standard deviation.
PEER_SAMPLES = 5e-2


def case(num: int, width: int, *, quick: bool = False) -> Case:
    """:func:`tgdp_fast.sample` end to end: 25 evaluations of DPM-Solver++ 2M with the networks of the paper's
    simulation, 4 x width each. The peer: 25 steps of DPM-Solver 2S, gradients by autograd, time embeddings of a full
    batch of times at every evaluation.
    """
    # Sampling asks at its end whether everything is finite, which a graph cannot.
    return _case("sampling", num, width, _end_to_end, PROVIDERS, quick)


def trajectory_case(num: int, width: int, *, quick: bool = False) -> Case:
    """The solver's loop alone, from a given initial state, in one batch; the peer as in :func:`case`."""
    # One launch serves these, and asks at its end whether everything is finite.
    return _case("trajectory", num, width, _loop, ("cuda", "auto"), quick)


def _case(
    kind: str, num: int, width: int, sampler: Callable[..., Call], uncapturable: tuple[str, ...], quick: bool
) -> Case:
    hidden = hidden_weights(INPUTS, width, DEPTH)
    score, guidance = hidden + width * INPUTS, hidden + width
    flops = float(STEPS) * num * (2 * score + 4 * guidance)

    def traffic(precision: str) -> float:
        return float(bytes_of(precision) * (score + guidance) + 4 * num * INPUTS)

    return Case(
        f"{kind}/samples{num}-width{width}",
        f"[{num}, {INPUTS}], 2 x ({DEPTH} x {width}), {STEPS} evaluations",
        ("fp32", "bf16"),
        400.0 * num * width,
        lambda precision: (traffic(precision), flops, precision),
        partial(_setup, num, width, sampler),
        ("mlp_value_and_grad", "guided_step", "trajectory"),
        uncapturable=uncapturable,
        quick=quick,
    )


class _Problem(NamedTuple):
    """What is sampled: networks, solver, sample indices [num] and initial noise [num, INPUTS]."""

    denoiser: Denoiser
    guidance: GuidanceNetwork
    table: SolverTable
    indices: Tensor
    initial: Tensor
    precision: str


def _setup(num: int, width: int, sampler: Callable[..., Call], precision: str, device: torch.device) -> Setup:
    denoiser, indices = source_denoiser(width, device), torch.arange(num, device=device)
    table = solver_table("dpmpp_2m", denoiser.schedule, STEPS)
    initial = normal(SEED, indices, INPUTS, 0, device=device)
    problem = _Problem(denoiser, guidance_network(width, device), table, indices, initial, precision)

    def call(provider: str) -> Call:
        if provider == "peer":
            peer_table = solver_table("dpm_solver_2s", denoiser.schedule, STEPS)
            return partial(_peer, problem._replace(table=peer_table))
        return sampler(problem, provider, *_networks(problem, provider))

    def check(provider: str, call_: Call) -> float:
        (samples,) = served_outputs(provider, call_)
        if provider == "peer":
            # Another solver: compared as a set of samples.
            (reference,) = call("reference")()
            distance = sliced_wasserstein(samples.float(), reference) / float(reference.std())
            return limited(distance, PEER_SAMPLES)
        rows = checked_rows(num, device)
        double = guided_loop(copy.deepcopy(denoiser).double(), copy.deepcopy(problem.guidance).double(), table)
        with torch.inference_mode(), use_backend("reference"):
            exact, _ = double(initial[rows].double(), indices[rows], seed=SEED)
        error = error_of([samples[rows]], [exact]).maximum
        return limited(error, SAMPLES_FP32 if precision == "fp32" else SAMPLES_BF16)

    return Setup(call, check)


def _networks(problem: _Problem, provider: str) -> tuple[EpsilonModel, Guidance]:
    denoiser, guidance = problem.denoiser, problem.guidance
    if provider != "compile":
        return denoiser, guidance
    compiled: Any = torch.compile(denoiser.network, dynamic=False)
    compiled = Denoiser(compiled, denoiser.schedule, "v_prediction", time_input="half_log_snr")
    return compiled, _CompiledGuidance(guidance)


def _peer(problem: _Problem) -> list[Tensor]:
    loop = guided_loop(problem.denoiser, _AutogradGuidance(problem.guidance), problem.table)
    with torch.no_grad(), autocast(problem.precision, problem.initial.device.type), use_backend("reference"):
        return [loop(problem.initial, problem.indices, seed=SEED)[0]]


def _end_to_end(problem: _Problem, provider: str, denoiser: EpsilonModel, guidance: Guidance) -> Call:
    backend = "reference" if provider == "compile" else provider
    config = SamplingConfig(problem.table, precision=problem.precision, backend=backend)
    sampler = Sampler(denoiser, guidance, config, shape=(INPUTS,), device=problem.initial.device)
    return lambda: [sampler.draw(len(problem.indices), seed=SEED)]


def _loop(problem: _Problem, provider: str, denoiser: EpsilonModel, guidance: Guidance) -> Call:
    loop, dtype = guided_loop(denoiser, guidance, problem.table), PRECISIONS[problem.precision]

    def full() -> Sequence[Tensor]:
        with torch.inference_mode():
            trajectory = FullTrajectory.of(loop, dtype, provider)
            assert trajectory is not None
            return [trajectory.run(problem.initial, None, SEED, problem.indices)[0]]

    def evaluations() -> Sequence[Tensor]:
        device = problem.initial.device
        with torch.inference_mode(), backend_of(provider), autocast(problem.precision, device.type):
            return [loop(problem.initial, problem.indices, seed=SEED)[0]]

    served = provider not in PLAIN_PROVIDERS and FullTrajectory.of(loop, dtype, provider) is not None
    return full if served else evaluations


def guided_loop(denoiser: EpsilonModel, guidance: Guidance, table: SolverTable) -> Loop:
    """All evaluations of a solver with exact guidance."""
    return Loop(denoiser, guidance, table, table.sigma.tolist())


class _AutogradGuidance:
    """The guidance network the way public code evaluates it."""

    def __init__(self, network: GuidanceNetwork) -> None:
        self.network = network

    def log_ratio_and_grad(self, x: Tensor, t: float | Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        times = torch.full((len(x),), float(t), device=x.device)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = self.network.log_ratio(x, times, labels)
            (gradient,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), gradient


class _CompiledGuidance:
    """The guidance network with its MLP compiled. The time embedding, of one row, is not: its input is another number
    at each evaluation.
    """

    num_classes = 0

    def __init__(self, network: GuidanceNetwork) -> None:
        self.network = network
        layers = [layer for layer in network.layers if isinstance(layer, nn.Linear)]
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers[1:]]

        def mlp(x: Tensor, first_bias: Tensor) -> tuple[Tensor, Tensor]:
            return mlp_value_and_grad(x, first_bias, weights, biases, backend="reference")

        self.mlp = torch.compile(mlp, dynamic=False)

    def log_ratio_and_grad(self, x: Tensor, t: float | Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        value, gradient = self.mlp(x, self.network.first_bias(t, labels))
        alpha = float(self.network.schedule.alpha(float(t))) ** self.network.alpha_power
        return alpha * value, alpha * gradient
