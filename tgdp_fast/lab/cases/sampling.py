"""Sampling the simulation, from noise or from a given state."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tgdp_fast.diffusion.denoiser import Denoiser
from tgdp_fast.diffusion.guidance import GuidanceNetwork
from tgdp_fast.diffusion.guided import EpsilonModel, Guidance, GuidedDenoiser
from tgdp_fast.diffusion.solvers import SolverTable, solver_table
from tgdp_fast.lab.accuracy import PRECISIONS, Verdict, error_of
from tgdp_fast.lab.cases.base import (
    GRAPH,
    PLAIN_PROVIDERS,
    SEED,
    Call,
    Case,
    Prepared,
    PreparedComposite,
    Work,
    autocast,
    backend_of,
    bytes_of,
    checked_rows,
    hidden_weights,
)
from tgdp_fast.lab.cases.networks import guidance_network, source_denoiser
from tgdp_fast.metrics import sliced_wasserstein
from tgdp_fast.ops import mlp_value_and_grad, use_backend
from tgdp_fast.ops.noise import normal
from tgdp_fast.sampling.fused import FusedRun
from tgdp_fast.sampling.sampler import advance, sample

#: Largest error of a sample in fp32, relative to the largest entry.
SAMPLES_FP32 = 1e-3
#: The same in bf16. The two networks have ten products, each rounding to 2^-9 of its result: 2^-9 sqrt(10), 0.6 %, of
#: epsilon on average, and about eight times that in the worst of a few hundred samples, after the solver has added up
#: errors of one direction with the exponentially growing weights that end in the last, nearly noiseless, steps.
SAMPLES_BF16 = 5e-2
#: Largest sliced Wasserstein distance of the peer's samples, from the same initial noise by another solver, to the
#: reference's, relative to their standard deviation.
PEER_SAMPLES = 5e-2


class _SamplingCase(Case):
    """25 evaluations of DPM-Solver++ 2M with the networks of the paper's simulation, 4 x width each."""

    DEPTH, INPUTS, STEPS = 4, 2, 25

    def __init__(self, kind: str, num: int, width: int, quick: bool) -> None:
        self.num, self.width = num, width
        self.name = f"{kind}/samples{num}-width{width}"
        self.shape = f"[{num}, {self.INPUTS}], 2 x ({self.DEPTH} x {width}), {self.STEPS} evaluations"
        self.precisions = ("fp32", "bf16")
        self.quick = quick
        self.memory = 400.0 * num * width
        self.operators = ("mlp_value_and_grad", "guided_step", "trajectory")
        self.composite = True

    def work(self, precision: str) -> Work:
        score = hidden_weights(self.INPUTS, self.width, self.DEPTH) + self.width * self.INPUTS
        guidance = hidden_weights(self.INPUTS, self.width, self.DEPTH) + self.width
        flops = float(self.STEPS) * self.num * (2 * score + 4 * guidance)
        return Work(float(bytes_of(precision) * (score + guidance) + 4 * self.num * self.INPUTS), flops, precision)


class Sampling(_SamplingCase):
    """:func:`tgdp_fast.sample` end to end; the peer: 25 steps of DPM-Solver 2S, gradients by autograd, time embeddings
    of a full batch of times at every evaluation.
    """

    def __init__(self, num: int, width: int, *, quick: bool = False) -> None:
        super().__init__("sampling", num, width, quick)
        self.recordable = False  # it asks at its end whether all is finite

    def prepare(self, precision: str, device: torch.device) -> Prepared:
        return _PreparedSampling(self, precision, device)


class Trajectory(_SamplingCase):
    """The solver's loop alone, from a given initial state, in one batch; the peer as in :class:`Sampling`."""

    def __init__(self, num: int, width: int, *, quick: bool = False) -> None:
        super().__init__("trajectory", num, width, quick)

    def providers(self, device: torch.device | None = None) -> tuple[str, ...]:
        # One launch serves these, which asks at its end whether all is finite: nothing to record.
        fused = {"cuda" + GRAPH, "auto" + GRAPH}
        return tuple(name for name in super().providers(device) if name not in fused)

    def prepare(self, precision: str, device: torch.device) -> Prepared:
        return _PreparedTrajectory(self, precision, device)


class _PreparedSampling(PreparedComposite):
    def __init__(self, case: _SamplingCase, precision: str, device: torch.device) -> None:
        self.case, self.precision, self.device = case, precision, device
        self.denoiser = source_denoiser(case.width, device)
        self.guidance = guidance_network(case.width, device)
        self.table = solver_table("dpmpp_2m", self.denoiser.schedule, case.STEPS)
        self.peer_table = solver_table("dpm_solver_2s", self.denoiser.schedule, case.STEPS)
        self.indices = torch.arange(case.num, device=device)
        self.initial = normal(SEED, self.indices, case.INPUTS, 0, device=device)

    def call(self, provider: str) -> Call:
        if provider == "peer":
            return lambda: [self._peer()]
        denoiser, guidance = self._networks(provider)
        return self._sampler(provider, denoiser, guidance)

    def _sampler(self, provider: str, denoiser: EpsilonModel, guidance: Guidance) -> Call:
        def call() -> list[Tensor]:
            samples = sample(
                denoiser,
                guidance,
                num=self.case.num,
                shape=(self.case.INPUTS,),
                solver=self.table,
                seed=SEED,
                precision=self.precision,
                backend="reference" if provider == "compile" else provider,
                device=self.device,
            )
            return [samples]

        return call

    def _networks(self, provider: str) -> tuple[EpsilonModel, Guidance]:
        if provider != "compile":
            return self.denoiser, self.guidance
        compiled: Any = torch.compile(self.denoiser.network, dynamic=False)
        return Denoiser(compiled, self.denoiser.schedule, "v_prediction", time_input="half_log_snr"), _CompiledGuidance(
            self.guidance
        )

    def _peer(self) -> Tensor:
        with torch.no_grad(), autocast(self.precision, self.device):
            guided = GuidedDenoiser(self.denoiser, _AutogradGuidance(self.guidance))
            with use_backend("reference"):
                return run_table(guided, self.peer_table, self.initial, self.indices)

    def judge(self, provider: str, outputs: Sequence[Tensor]) -> Verdict:
        (samples,) = outputs
        if provider == "peer":
            # Another solver: compared as a set of samples.
            (reference,) = self.call("reference")()
            distance = sliced_wasserstein(samples.float(), reference) / float(reference.std())
            return Verdict(distance <= PEER_SAMPLES, distance)
        rows = checked_rows(self.case.num, self.device)
        guided = GuidedDenoiser(copy.deepcopy(self.denoiser).double(), copy.deepcopy(self.guidance).double())
        with torch.inference_mode(), use_backend("reference"):
            exact = run_table(guided, self.table, self.initial[rows].double(), self.indices[rows])
        error = error_of([samples[rows]], [exact]).maximum
        return Verdict(error <= (SAMPLES_FP32 if self.precision == "fp32" else SAMPLES_BF16), error)


class _PreparedTrajectory(_PreparedSampling):
    def _sampler(self, provider: str, denoiser: EpsilonModel, guidance: Guidance) -> Call:
        guided = GuidedDenoiser(denoiser, guidance)
        scales = [1.0] * self.table.nfe
        dtype = None if self.precision == "fp32" else PRECISIONS[self.precision]

        def fused() -> list[Tensor]:
            with torch.inference_mode():
                run = FusedRun.of(guided, self.table, scales, dtype, provider)
                assert run is not None
                return [run.run(self.initial, None, SEED, self.indices)[0]]

        if provider not in PLAIN_PROVIDERS and FusedRun.of(guided, self.table, scales, dtype, provider) is not None:
            return fused

        def call() -> list[Tensor]:
            with torch.inference_mode(), backend_of(provider), autocast(self.precision, self.device):
                return [run_table(guided, self.table, self.initial, self.indices)]

        return call


def run_table(guided: GuidedDenoiser, table: SolverTable, x: Tensor, indices: Tensor) -> Tensor:
    """All evaluations of a solver from the state ``x`` [B, D], in its dtype; ``indices`` [B] are the sample indices."""
    history = x.new_zeros((table.history, *x.shape)) if table.history else None
    for k in range(table.nfe):
        x, history, _ = advance(guided, table, k, x, history, SEED, indices)
    return x


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
    """The guidance network with its perceptron compiled. The time embedding, of one row, is not: its input is another
    number at each evaluation.
    """

    num_classes = 0

    def __init__(self, network: GuidanceNetwork) -> None:
        self.network = network
        layers = [layer for layer in network.layers if isinstance(layer, nn.Linear)]
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers[1:]]

        def perceptron(x: Tensor, first_bias: Tensor) -> tuple[Tensor, Tensor]:
            return mlp_value_and_grad(x, first_bias, weights, biases, backend="reference")

        self.perceptron = torch.compile(perceptron, dynamic=False)

    def log_ratio_and_grad(self, x: Tensor, t: float | Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        value, gradient = self.perceptron(x, self.network.first_bias(t, labels))
        alpha = float(self.network.schedule.alpha(float(t))) ** self.network.alpha_power
        return alpha * value, alpha * gradient
