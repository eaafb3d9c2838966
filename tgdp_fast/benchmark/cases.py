"""What is timed: the cases, and for each the providers that compute it side by side.

Providers: ``peer`` (the way public code does it), ``reference`` (this package in plain PyTorch), ``compile``
(torch.compile of the reference), every backend of the case's operators that serves it, and ``auto`` where that mixes
several of them.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from tgdp_fast.benchmark import eager
from tgdp_fast.benchmark.accuracy import PRECISIONS, ROUNDINGS, Error, Verdict, error_of, within
from tgdp_fast.benchmark.problems import perceptron_inputs, step_inputs
from tgdp_fast.denoiser import Denoiser
from tgdp_fast.density_ratio import logistic_loss
from tgdp_fast.fused import FusedRun
from tgdp_fast.guidance import EpsilonModel, Guidance, GuidanceNetwork, GuidedDenoiser
from tgdp_fast.metrics import sliced_wasserstein
from tgdp_fast.models import ScoreMLP
from tgdp_fast.noise import normal
from tgdp_fast.ops import _dispatch, guided_step, mlp_value_and_grad, use_backend
from tgdp_fast.ops.guided_step import guided_step_reference
from tgdp_fast.ops.mlp_value_and_grad import mlp_value_and_grad_reference
from tgdp_fast.sampling import advance, sample
from tgdp_fast.schedule import NoiseSchedule
from tgdp_fast.solvers import SolverTable, solver_table
from tgdp_fast.training import adamw, add_noise, seeded_initialisation

#: Returns what the numeric check looks at.
Call = Callable[[], Sequence[Tensor]]

PLAIN_PROVIDERS = ("peer", "reference", "compile")
_BACKENDS = tuple(name for name in _dispatch.BACKENDS if name != "reference")
PROVIDERS = (*PLAIN_PROVIDERS, *_BACKENDS, "auto")

#: Largest error of a sample in fp32, relative to the largest entry.
SAMPLES_FP32 = 1e-3
#: The same in bf16. The two networks have ten products, each rounding to 2^-9 of its result: 2^-9 sqrt(10), 0.6 %, of
#: epsilon on average, and about eight times that in the worst of a few hundred samples, after the solver has added up
#: errors of one direction with the exponentially growing weights that end in the last, nearly noiseless, steps.
SAMPLES_BF16 = 5e-2
#: Largest sliced Wasserstein distance of the peer's samples, from the same initial noise by another solver, to the
#: reference's, relative to their standard deviation.
PEER_SAMPLES = 5e-2
#: The peer's chain of operations rounds each result to its own precision.
PEER_ROUNDINGS = 16.0

_CHECKED_ROWS = 512
_FEW_ROWS = 64
_SEED = 7


class UnservedError(Exception):
    """A provider has nothing of its own to show for a case."""


@dataclass(frozen=True)
class Work:
    """Least bytes moved and FLOPs of one call, by the formulas in the operators' docstrings."""

    traffic: float
    flops: float
    precision: str  # of the arithmetic


class Prepared(ABC):
    """A case in one precision with its inputs in memory."""

    @abstractmethod
    def call(self, provider: str) -> Call:
        """What is timed.

        Raises:
            BackendUnavailableError: the backend does not serve it.
            UnservedError: it would be another provider's call.
        """

    @abstractmethod
    def check(self, provider: str, call: Call) -> Verdict:
        """Run ``call`` for the first time and compare with float64. Raises as :meth:`call`."""


class Case(ABC):
    """One thing to time.

    Attributes:
        name: unique, "kind/size".
        shape: of the inputs, for people.
        precisions: in which it is timed.
        quick: whether ``--quick`` includes it.
        memory: bytes it needs at most, about.
        operators: registered operators whose backends are providers.
        composite: whether it calls several operators, so that "auto" can mix backends.
    """

    name: str
    shape: str
    precisions: tuple[str, ...]
    quick: bool
    memory: float
    operators: tuple[str, ...]
    composite: bool = False

    def providers(self) -> tuple[str, ...]:
        """Names of the providers that may serve it."""
        report = _dispatch.backend_report()
        there = [
            backend
            for backend in _BACKENDS
            if any(report[operator][backend] == "available" for operator in self.operators if operator in report)
        ]
        return (*PLAIN_PROVIDERS, *there, *(["auto"] if self.composite else []))

    @abstractmethod
    def work(self, precision: str) -> Work:
        """Least work of one call."""

    @abstractmethod
    def prepare(self, precision: str, device: torch.device) -> Prepared:
        """Make the inputs."""


def _bytes(precision: str) -> int:
    return PRECISIONS[precision].itemsize


def _rows(batch: int, device: torch.device) -> Tensor:
    """Up to ``_CHECKED_ROWS`` row indices, evenly spread, first and last among them."""
    return torch.linspace(0, batch - 1, min(batch, _CHECKED_ROWS)).round().long().to(device)


def _judge(
    provider: str, outputs: Sequence[Tensor], exact: Sequence[Tensor], eager_error: Error, dtype: torch.dtype
) -> Verdict:
    """The gate of one operator; ``eager_error`` is the peer's, or for the peer that of the reference."""
    error = error_of(outputs, exact)
    roundings = PEER_ROUNDINGS if provider == "peer" else ROUNDINGS
    return Verdict(within(error, eager_error, dtype, roundings), error.maximum)


# ------------------------------------------------------------------------------------------------ guided_step


class GuidedStep(Case):
    """One solver step of samples of 1000 elements, all tensors in the precision: DPM-Solver++ 2M, or DDPM's with noise.

    Args:
        elements: in all.
        noise: time a DDPM step, whose noise the operator generates.
    """

    SAMPLE = 1000

    def __init__(self, exponent: int, *, noise: bool = False, quick: bool = False) -> None:
        elements = 10**exponent
        self.noise = noise
        self.batch = elements // self.SAMPLE
        self.name = f"guided_step{'_noise' if noise else ''}/1e{exponent}"
        self.shape = f"[{self.batch}, {self.SAMPLE}]"
        self.precisions = ("fp32", "bf16", "fp16")
        self.quick = quick
        self.memory = 80.0 * elements
        self.operators = ("guided_step",)
        self.table = solver_table("ddpm" if noise else "dpmpp_2m", NoiseSchedule.vp_linear(), 25)

    def work(self, precision: str) -> Work:
        elements, slots = self.batch * self.SAMPLE, self.table.history
        flops = elements * (5 + (1 + slots) * (3 + 2 * slots) + (2 if self.noise else 0))
        return Work(elements * _bytes(precision) * (5.0 + 2 * slots), flops, "fp32")

    def prepare(self, precision: str, device: torch.device) -> Prepared:
        return _PreparedStep(self, PRECISIONS[precision], device)


class _PreparedStep(Prepared):
    def __init__(self, case: GuidedStep, dtype: torch.dtype, device: torch.device) -> None:
        table, k = case.table, case.table.nfe // 2
        self.case, self.dtype, self.device = case, dtype, device
        self.inputs = step_inputs((case.batch, case.SAMPLE), table.history, dtype, device)
        self.sample_index = torch.arange(case.batch, device=device)
        self.noise_scale = float(table.noise_scale[k])
        self.step: dict[str, Any] = {
            "matrix": tuple(map(tuple, table.matrix[k].tolist())),
            "guidance_weight": float(table.sigma[k]),
            "alpha": float(table.alpha[k]),
            "sigma": float(table.sigma[k]),
        }

    def call(self, provider: str) -> Call:
        x, epsilon, gradient, history = self.inputs
        if provider == "peer":
            if history is not None:
                return lambda: eager.multistep(x, epsilon, gradient, history[0], **self.step)
            return lambda: eager.guided_step(
                *self.inputs, **self.step, noise_scale=self.noise_scale, z=torch.randn_like(x)
            )
        arguments = {**self.step, "noise_scale": self.noise_scale, "seed": _SEED, "evaluation": 1}
        if provider == "compile":
            compiled = torch.compile(guided_step_reference, dynamic=False)
            return lambda: self._flat(compiled(*self.inputs, **arguments, sample_index=self.sample_index))
        return lambda: self._flat(
            guided_step(*self.inputs, **arguments, sample_index=self.sample_index, backend=provider)
        )

    @staticmethod
    def _flat(result: Sequence[Any]) -> list[Tensor]:
        x_next, history, x0 = result
        return [x_next, x0, *(() if history is None else history.unbind(0))]

    def check(self, provider: str, call: Call) -> Verdict:
        torch.manual_seed(_SEED)
        outputs = call()
        if provider != "peer":
            z = normal(_SEED, self.sample_index, self.case.SAMPLE, 1, device=self.device) if self.case.noise else None
        else:
            torch.manual_seed(_SEED)
            z = torch.randn_like(self.inputs.x) if self.case.noise else None
        rows = _rows(self.case.batch, self.device)
        part = self.inputs.map(lambda tensor: tensor.index_select(tensor.ndim - 2, rows))
        noise: dict[str, Any] = {} if z is None else {"noise_scale": self.noise_scale, "z": z[rows].double()}
        exact = eager.guided_step(*part.map(Tensor.double), **(self.step | noise))
        if z is not None:
            noise["z"] = z[rows].to(self.dtype)
        plain = eager.guided_step(*part, **(self.step | noise))
        return _judge(provider, [output[rows] for output in outputs], exact, error_of(plain, exact), self.dtype)


# ----------------------------------------------------------------------------------------- mlp_value_and_grad


class Perceptron(Case):
    """Value and input gradient of the guidance network's perceptron, four hidden layers, one shared first bias."""

    DEPTH = 4

    def __init__(self, batch: int, inputs: int, width: int, *, quick: bool = False) -> None:
        self.batch, self.inputs, self.width = batch, inputs, width
        self.name = f"mlp_value_and_grad/batch{batch}-input{inputs}-width{width}"
        self.shape = f"[{batch}, {inputs}], {self.DEPTH} x {width}"
        self.precisions = ("fp32", "bf16")
        self.quick = quick
        self.memory = 20.0 * batch * (3 * inputs + 3 * self.DEPTH * width)
        self.operators = ("mlp_value_and_grad",)

    @property
    def weights(self) -> int:
        """P: numbers in the weight matrices."""
        return _weights(self.inputs, self.width, self.DEPTH) + self.width

    def work(self, precision: str) -> Work:
        numbers = self.batch * (2 * self.inputs + 1) + self.weights + self.DEPTH * self.width
        return Work(_bytes(precision) * float(numbers), 4.0 * self.batch * self.weights, precision)

    def prepare(self, precision: str, device: torch.device) -> Prepared:
        return _PreparedPerceptron(self, PRECISIONS[precision], device)


def _weights(inputs: int, width: int, depth: int) -> int:
    """Numbers in the weight matrices of the hidden layers."""
    return inputs * width + (depth - 1) * width * width


class _PreparedPerceptron(Prepared):
    def __init__(self, case: Perceptron, dtype: torch.dtype, device: torch.device) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        self.widths = [case.width] * case.DEPTH
        self.inputs = perceptron_inputs(case.batch, case.inputs, self.widths, dtype, device)

    def call(self, provider: str) -> Call:
        if provider == "peer":
            return lambda: eager.value_and_grad(*self.inputs)
        if provider == "compile":
            return _without_graph(torch.compile(mlp_value_and_grad_reference, dynamic=False), *self.inputs)
        return _without_graph(mlp_value_and_grad, *self.inputs, backend=provider)

    def check(self, provider: str, call: Call) -> Verdict:
        rows = _rows(len(self.inputs.x), self.device)
        part = self.inputs._replace(x=self.inputs.x[rows])
        exact = eager.value_and_grad(*part.to(torch.float64))
        other = mlp_value_and_grad_reference if provider == "peer" else eager.value_and_grad
        eager_error = error_of(other(*part), exact)
        if len(rows) < _FEW_ROWS:
            # In a few rows eager's errors may happen to cancel: its usual one is that of further rows of the same
            # network, each against its own scale.
            more = perceptron_inputs(_FEW_ROWS, self.case.inputs, self.widths, self.dtype, self.device)
            usual = zip(*other(*more), *eager.value_and_grad(*more.to(torch.float64)), strict=True)
            errors = [error_of([f[None], g[None]], [exact_f[None], exact_g[None]]) for f, g, exact_f, exact_g in usual]
            eager_error = Error(*(max(values) for values in zip(eager_error, *errors, strict=True)))
        return _judge(provider, [output[rows] for output in call()], exact, eager_error, self.dtype)


def _without_graph(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Call:
    def call() -> Sequence[Tensor]:
        with torch.inference_mode():
            result: Sequence[Tensor] = function(*arguments, **keywords)
        return result

    return call


# --------------------------------------------------------------------------------------- several operators


@contextmanager
def _recorded_backends() -> Iterator[set[str]]:
    """The backends that operators resolve to within the block."""
    real, used = _dispatch.resolve, set()

    def resolve(*arguments: Any, **keywords: Any) -> _dispatch.Implementation:
        implementation = real(*arguments, **keywords)
        used.add(implementation.backend)
        return implementation

    _dispatch.resolve = resolve
    try:
        yield used
    finally:
        _dispatch.resolve = real


class _PreparedComposite(Prepared):
    """Checks that a backend is really used, and leaves the numeric check to :meth:`judge`."""

    def check(self, provider: str, call: Call) -> Verdict:
        with _recorded_backends() as used:
            outputs = call()
        if provider in _BACKENDS and provider not in used:
            raise UnservedError(f"no operator of this case runs on {provider}")
        if provider == "auto" and len(used) < 2:
            raise UnservedError(f"auto takes {', '.join(used) or 'no operator'} for all of it")
        return self.judge(provider, outputs)

    @abstractmethod
    def judge(self, provider: str, outputs: Sequence[Tensor]) -> Verdict:
        """Compare with float64."""


def _backend(provider: str) -> AbstractContextManager[Any]:
    return use_backend(provider if provider not in PLAIN_PROVIDERS else "reference")


def _autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, PRECISIONS[precision])


class FitStep(Case):
    """One optimisation step of a guidance network on 2-D data: loss, backward, AdamW.

    The logistic loss of a batch of either domain, alone or with the consistency term on the target's batch. The noised
    batches and the denoiser's prediction are given.
    """

    DEPTH, FREQUENCIES, INPUTS = 4, 32, 2

    def __init__(self, width: int, *, consistency: bool, batch: int = 4096, quick: bool = False) -> None:
        self.width, self.consistency, self.batch = width, consistency, batch
        self.name = f"fit_step/{'consistency' if consistency else 'logistic'}-width{width}"
        self.shape = f"2 x [{batch}, {self.INPUTS}], {self.DEPTH} x {width}"
        self.precisions = ("fp32", "bf16")
        self.quick = quick
        self.memory = 400.0 * batch * width
        self.operators = ("mlp_value_and_grad", "mlp_value_and_grad_backward")
        self.composite = True

    def work(self, precision: str) -> Work:
        perceptron = _weights(self.INPUTS, self.width, self.DEPTH) + self.width
        embedding = self.FREQUENCIES * self.width + self.width**2
        per_pair = 6 * perceptron + (14 if self.consistency else 6) * perceptron + 12 * embedding
        # AdamW reads weight, gradient and two moments and writes three of them; all in float32.
        return Work(4.0 * 8 * (perceptron + embedding), float(self.batch) * per_pair, precision)

    def prepare(self, precision: str, device: torch.device) -> Prepared:
        return _PreparedFitStep(self, precision, device)


@dataclass(frozen=True)
class _Batches:
    """Noised batches of both domains: x [B, D], t [B]; of the target also sigma [B, 1], the noise and epsilon_p."""

    x_source: Tensor
    t_source: Tensor
    x_target: Tensor
    t_target: Tensor
    sigma: Tensor
    epsilon: Tensor
    epsilon_p: Tensor

    def to(self, dtype: torch.dtype) -> _Batches:
        return _Batches(*(value.to(dtype) for value in vars(self).values()))


class _PreparedFitStep(_PreparedComposite):
    def __init__(self, case: FitStep, precision: str, device: torch.device) -> None:
        schedule = NoiseSchedule.vp_linear()
        generator = torch.Generator().manual_seed(_SEED)
        noised = []
        for _ in range(2):
            x0 = torch.randn(case.batch, case.INPUTS, generator=generator)
            t = schedule.t_min + (schedule.t_max - schedule.t_min) * torch.rand(case.batch, generator=generator)
            noised.append(add_noise(schedule, x0.to(device), t, generator))
        source, target = noised
        epsilon_p = target.epsilon + 0.1 * torch.randn(target.epsilon.shape, generator=generator).to(device)
        self.case, self.precision, self.device = case, precision, device
        self.batches = _Batches(
            source.x,
            source.t,
            target.x,
            target.t,
            torch.as_tensor(target.sigma).to(source.x),
            target.epsilon,
            epsilon_p,
        )
        self.network = guidance_network(case.width, device)

    def loss(self, network: GuidanceNetwork, batches: _Batches, autograd: bool) -> Tensor:
        """The loss of one step; ``autograd``: take the input gradient by autograd and differentiate it again."""
        if not self.case.consistency:
            x, t = torch.cat([batches.x_source, batches.x_target]), torch.cat([batches.t_source, batches.t_target])
            return logistic_loss(*network.log_ratio(x, t).float().split(len(batches.x_source)))
        f_source = network.log_ratio(batches.x_source, batches.t_source)
        if autograd:
            x = batches.x_target.detach().requires_grad_()
            f_target = network.log_ratio(x, batches.t_target)
            (gradient,) = torch.autograd.grad(f_target.sum(), x, create_graph=True)
        else:
            f_target, gradient = network(batches.x_target, batches.t_target)
        residual = batches.epsilon_p - batches.sigma * gradient - batches.epsilon
        return logistic_loss(f_source, f_target) + 0.5 * residual.square().sum(1).mean()

    def call(self, provider: str) -> Call:
        network = copy.deepcopy(self.network)
        parameters = list(network.parameters())
        optimizer = adamw([{"params": parameters}], 1e-4)
        loss: Callable[..., Tensor] = self.loss
        if provider == "compile":
            loss = torch.compile(self.loss, dynamic=False)

        def step() -> list[Tensor]:
            with _backend(provider), _autocast(self.precision, self.device):
                value = loss(network, self.batches, provider == "peer")
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            return [value.detach(), *(p.grad for p in parameters if p.grad is not None)]

        return step

    def judge(self, provider: str, outputs: Sequence[Tensor]) -> Verdict:
        network = copy.deepcopy(self.network).double()
        value = self.loss(network, self.batches.to(torch.float64), True)
        exact = [value.detach(), *torch.autograd.grad(value, list(network.parameters()))]
        plain = self.call("reference" if provider == "peer" else "peer")()
        return _judge(provider, outputs, exact, error_of(plain, exact), PRECISIONS[self.precision])


# ------------------------------------------------------------------------------------------------------ sampling


def guidance_network(width: int, device: torch.device) -> GuidanceNetwork:
    """An untrained guidance network for 2-D data whose activations are of order one."""
    with seeded_initialisation(_SEED):
        network = GuidanceNetwork((2,), NoiseSchedule.vp_linear(), width=width, depth=4)
        _scale_weights(network)
    return network.to(device).eval()


def source_denoiser(width: int, device: torch.device) -> Denoiser:
    """An untrained denoiser for 2-D data, set up as ``train_denoiser`` does."""
    with seeded_initialisation(_SEED + 1):
        network = ScoreMLP((2,), width=width, depth=4)
        _scale_weights(network)
    denoiser = Denoiser(network, NoiseSchedule.vp_linear(), "v_prediction", time_input="half_log_snr")
    return denoiser.to(device).eval()


def _scale_weights(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1.2 * module.in_features**-0.5)


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
        score = _weights(self.INPUTS, self.width, self.DEPTH) + self.width * self.INPUTS
        guidance = _weights(self.INPUTS, self.width, self.DEPTH) + self.width
        flops = float(self.STEPS) * self.num * (2 * score + 4 * guidance)
        return Work(float(_bytes(precision) * (score + guidance) + 4 * self.num * self.INPUTS), flops, precision)


class Sampling(_SamplingCase):
    """:func:`tgdp_fast.sample` end to end; the peer: 25 steps of DPM-Solver 2S, gradients by autograd, time embeddings
    of a full batch of times at every evaluation.
    """

    def __init__(self, num: int, width: int, *, quick: bool = False) -> None:
        super().__init__("sampling", num, width, quick)

    def prepare(self, precision: str, device: torch.device) -> Prepared:
        return _PreparedSampling(self, precision, device)


class Trajectory(_SamplingCase):
    """The solver's loop alone, from a given initial state, in one batch; the peer as in :class:`Sampling`."""

    def __init__(self, num: int, width: int, *, quick: bool = False) -> None:
        super().__init__("trajectory", num, width, quick)

    def prepare(self, precision: str, device: torch.device) -> Prepared:
        return _PreparedTrajectory(self, precision, device)


class _PreparedSampling(_PreparedComposite):
    def __init__(self, case: _SamplingCase, precision: str, device: torch.device) -> None:
        self.case, self.precision, self.device = case, precision, device
        self.denoiser = source_denoiser(case.width, device)
        self.guidance = guidance_network(case.width, device)
        self.table = solver_table("dpmpp_2m", self.denoiser.schedule, case.STEPS)
        self.peer_table = solver_table("dpm_solver_2s", self.denoiser.schedule, case.STEPS)
        self.indices = torch.arange(case.num, device=device)
        self.initial = normal(_SEED, self.indices, case.INPUTS, 0, device=device)

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
                seed=_SEED,
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
        with torch.no_grad(), _autocast(self.precision, self.device):
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
        rows = _rows(self.case.num, self.device)
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
                return [run.run(self.initial, None, _SEED, self.indices)[0]]

        if provider not in PLAIN_PROVIDERS and FusedRun.of(guided, self.table, scales, dtype, provider) is not None:
            return fused

        def call() -> list[Tensor]:
            with torch.inference_mode(), _backend(provider), _autocast(self.precision, self.device):
                return [run_table(guided, self.table, self.initial, self.indices)]

        return call


def run_table(guided: GuidedDenoiser, table: SolverTable, x: Tensor, indices: Tensor) -> Tensor:
    """All evaluations of a solver from the state ``x`` [B, D], in its dtype; ``indices`` [B] are the sample indices."""
    history = x.new_zeros((table.history, *x.shape)) if table.history else None
    for k in range(table.nfe):
        x, history, _ = advance(guided, table, k, x, history, _SEED, indices)
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


# ------------------------------------------------------------------------------------------------ the list


def all_cases() -> list[Case]:
    """Every case, in the order in which they run."""
    quick_perceptrons = {(16, 2, 128), (4096, 2, 128), (4096, 2, 512), (256, 3904, 512)}
    cases: list[Case] = [GuidedStep(exponent, quick=exponent in (4, 6)) for exponent in range(4, 9)]
    cases += [GuidedStep(6, noise=True)]
    cases += [
        Perceptron(batch, inputs, width, quick=(batch, inputs, width) in quick_perceptrons)
        for inputs in (2, 64, 3904)
        for width in (128, 256, 512)
        for batch in ((1, 16, 256, 4096, 10000, 65536) if inputs == 2 else (1, 256, 4096, 65536))
    ]
    cases += [
        FitStep(width, consistency=consistency, quick=width == 128)
        for width in (128, 512)
        for consistency in (False, True)
    ]
    cases += [Trajectory(num, width, quick=num == 256 and width == 128) for width in (128, 512) for num in (256, 10000)]
    cases += [Sampling(num, width, quick=num == 256 and width == 128) for width in (128, 512) for num in (256, 10000)]
    return cases


def select(cases: Sequence[Case], only: Sequence[str], *, quick: bool = False) -> list[Case]:
    """The cases whose name contains, or matches as a pattern with ``*`` and ``?``, one of ``only``; no ``only``: all.

    Raises:
        ValueError: a name that fits no case; lists the cases.
    """
    offered = [case for case in cases if case.quick or not quick]
    for text in only:
        if not any(_fits(case.name, text) for case in offered):
            names = ", ".join(case.name for case in offered)
            raise ValueError(f"--only must fit a case{' of --quick' * quick}, got {text!r}; cases: {names}")
    return [case for case in offered if not only or any(_fits(case.name, text) for text in only)]


def _fits(name: str, text: str) -> bool:
    return text in name or fnmatch(name, text)
