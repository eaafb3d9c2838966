"""Sampling: one loop over a solver table, in chunks, with noise that depends on seed and sample index alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tgdp_fast.diffusion.denoiser import evaluation_mode
from tgdp_fast.diffusion.guided import EpsilonModel, Guidance, GuidedDenoiser
from tgdp_fast.diffusion.prior import Prior
from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.diffusion.solvers import SolverTable, solver_table
from tgdp_fast.ops import SolverStep, guided_step
from tgdp_fast.ops.guided_step import GuidedStepOutput
from tgdp_fast.ops.measured import capturing
from tgdp_fast.ops.noise import normal
from tgdp_fast.ops.registry import requested_backend, use_backend
from tgdp_fast.runtime.arrays import check_labels
from tgdp_fast.runtime.checkpoint import signature_of
from tgdp_fast.runtime.checks import check_choice, check_device, check_integer, check_seed
from tgdp_fast.runtime.progress import announce
from tgdp_fast.sampling.fused import FusedRun
from tgdp_fast.sampling.graph import Replayed

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
#: fp32 in three bf16 products where whole runs are fused and the processor has the units, else fp32 itself.
SPLIT = "bf16x3"


#: callback(step, t, x, x0): solver step, its time, the state after it, the predicted clean sample.
Callback = Callable[[int, float, Tensor, Tensor], None]


class SamplingDivergedError(ArithmeticError):
    """The state became infinite or NaN; carries ``evaluation`` (0-based) and ``time``."""

    def __init__(self, evaluation: int, time: float, table: SolverTable) -> None:
        self.evaluation = evaluation
        self.time = time
        advice = (
            "Lower scale, set gradient_norm_limit or clamp, use more steps, or a first-order solver (ddim)"
            if evaluation > 0
            else "At the first one the models themselves gave no finite numbers: look at denoiser.epsilon(x, t) and at "
            "guidance.log_ratio_and_grad(x, t) of standard normal x"
        )
        super().__init__(
            f"sampling diverged: x is not finite after evaluation {evaluation} of {table.nfe} (t = {time:.4g}, solver "
            f"{table.solver}, {table.spacing} spacing). {advice}"
        )


def sample(
    denoiser: EpsilonModel | GuidedDenoiser,
    guidance: Guidance | None = None,
    *,
    num: int,
    shape: tuple[int, ...] | None = None,
    labels: Any = None,
    solver: str | SolverTable = "dpmpp_2m",
    steps: int = 25,
    spacing: str = "logsnr",
    eta: float | None = None,
    scale: float | Callable[[float], float] = 1.0,
    interval: tuple[float, float] | None = None,
    clamp: tuple[float, float] | None = None,
    gradient_norm_limit: float | None = None,
    prior: Prior | None = None,
    seed: int = 0,
    first_index: int = 0,
    batch_size: int | None = None,
    precision: str = "fp32",
    backend: str = "auto",
    device: str | torch.device | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Draw samples of the target domain (TGDP section 3.1, Theorem 3.1).

    Sample ``i`` depends on ``seed`` and ``first_index + i`` alone: not on ``batch_size``, nor on which process drew it
    (up to rounding of the network's products).

    Args:
        denoiser: a :class:`Denoiser`, anything with ``schedule`` and ``epsilon(x, t, labels)``, or a
            :class:`GuidedDenoiser` (then the guidance arguments below must be left at their defaults).
        guidance: a :class:`GuidanceNetwork` or anything with ``log_ratio_and_grad``; None samples the source.
        num: number of samples.
        shape: shape of one sample; may be left out when the denoiser states its ``event_shape``.
        labels: one class index for all, indices [num], or soft / multi-hot rows [num, K]. Required by conditional
            models, refused where no model takes any.
        solver: a name in ``SOLVERS``, or a ready :class:`SolverTable` of the denoiser's schedule (then steps, spacing
            and eta are its own).
        steps: solver steps; two-evaluation solvers run the network up to twice a step (``table.nfe``).
        spacing: "logsnr", "uniform" or "karras".
        eta: stochasticity of ddim and euler_ancestral.
        scale, interval, clamp, gradient_norm_limit: see :class:`GuidedDenoiser`.
        prior: law of the first state, a :class:`GaussianPrior` or :class:`EmpiricalPrior`; None for N(0, I), which is
            right where the schedule ends with next to no signal.
        seed: 0 <= seed < 2**64.
        first_index: index of the first sample; shards draw disjoint ranges of one sample set.
        batch_size: samples in flight; bounds memory, which does not grow with steps.
        precision: of the networks, "fp32", "bf16" or "fp16" (autocast); the state is fp32 always. "bf16x3" may take
            fp32 products as three in bf16, with about 16 bits: faster than fp32 only on processors whose bf16 units
            are more than three times as fast.
        backend: of the operators, "auto", "reference", ...
        device: where the parameters of the models are; found by itself where a model is an ``nn.Module``.
        callback: called after each solver step of each batch.
        progress: show a progress bar over network evaluations.

    Returns:
        float32 [num, *shape] on ``device``.

    Raises:
        ValueError: a bad argument, or models that do not fit each other (schedule, shape, device), before any work.
        SamplingDivergedError: the state is not finite.
    """
    plan = _prepare(
        denoiser,
        guidance,
        num=num,
        shape=shape,
        labels=labels,
        solver=solver,
        steps=steps,
        spacing=spacing,
        eta=eta,
        scale=scale,
        interval=interval,
        clamp=clamp,
        gradient_norm_limit=gradient_norm_limit,
        prior=prior,
        seed=seed,
        first_index=first_index,
        batch_size=batch_size,
        precision=precision,
        backend=backend,
        device=device,
        callback=callback,
    )
    announce(f"sampling: {num} samples", progress)
    return _draw(plan, 0, plan.num, progress)


@dataclass(frozen=True)
class _Plan:
    """Checked arguments of one run."""

    guided: GuidedDenoiser
    table: SolverTable
    scales: list[float]  # at the table's times, 0 outside the interval
    num: int
    shape: tuple[int, ...]
    labels: Tensor | None  # one row per sample, on the device
    prior: Prior | None  # on the device
    seed: int
    first_index: int
    batch_size: int
    precision: str
    backend: str
    device: torch.device
    callback: Callback | None

    def identity(self) -> dict[str, Any]:
        """All that decides the samples besides the models, JSON-able; the interval shows in the scales."""
        return {
            "guided": self.guided.guidance is not None,
            "scales": self.scales,
            "clamp": self.guided.clamp,
            "gradient_norm_limit": self.guided.gradient_norm_limit,
            "table": self.table.signature(),
            "num": self.num,
            "shape": self.shape,
            "labels": signature_of(self.labels),
            "prior": None if self.prior is None else signature_of(*self.prior.to_tensors().values()),
            "seed": self.seed,
            "first_index": self.first_index,
            "precision": self.precision,
        }


def _prepare(
    denoiser: EpsilonModel | GuidedDenoiser,
    guidance: Guidance | None,
    *,
    num: int,
    shape: tuple[int, ...] | None,
    labels: Any,
    solver: str | SolverTable,
    steps: int,
    spacing: str,
    eta: float | None,
    scale: float | Callable[[float], float],
    interval: tuple[float, float] | None,
    clamp: tuple[float, float] | None,
    gradient_norm_limit: float | None,
    prior: Prior | None,
    seed: int,
    first_index: int,
    batch_size: int | None,
    precision: str,
    backend: str,
    device: str | torch.device | None,
    callback: Callback | None,
) -> _Plan:
    """Check every argument of :func:`sample` without running a network."""
    num = check_integer("num", num, 0)
    first_index = check_integer("first_index", first_index, 0)
    if first_index + num > 2**63:
        raise ValueError(f"first_index + num must be at most 2^63, got {first_index} + {num}")
    seed = check_seed(seed)
    check_choice("precision", precision, (*PRECISIONS, SPLIT))
    requested_backend(backend)
    guided = _guided(denoiser, guidance, scale, interval, clamp, gradient_norm_limit)
    models = {"denoiser": guided.denoiser} | ({} if guided.guidance is None else {"guidance": guided.guidance})
    _check_schedules(models)
    table = solver
    if not isinstance(table, SolverTable):
        table = solver_table(table, guided.schedule, steps, spacing=spacing, eta=eta)
    elif not _is_table_of(guided.schedule, table):
        raise ValueError(
            f"solver is a table of another noise schedule than the denoiser's {guided.schedule!r}; build it with "
            "solver_table(name, denoiser.schedule, steps)"
        )
    shape = _event_shape(shape, models)
    if batch_size is None:
        batch_size = _default_batch_size(shape)
    device = _device(device, models)
    all_labels = _labels(labels, num, models)
    _check_prior(prior, shape)
    return _Plan(
        guided=guided,
        table=table,
        scales=_scales(guided, table),
        num=num,
        shape=shape,
        labels=None if all_labels is None else all_labels.to(device),
        prior=None if prior is None else prior.to(device),
        seed=seed,
        first_index=first_index,
        batch_size=check_integer("batch_size", batch_size, 1),
        precision=precision,
        backend=backend,
        device=device,
        callback=callback,
    )


def _default_batch_size(shape: tuple[int, ...]) -> int:
    return max(1, min(8192, 2**21 // math.prod(shape)))


def _draw(plan: _Plan, start: int, stop: int, progress: bool) -> Tensor:
    """Samples ``start`` to ``stop`` of a run: float32 [stop - start, *shape]."""
    with torch.inference_mode(False):  # An ordinary tensor also where the caller is in inference mode.
        result = torch.empty((stop - start, *plan.shape), dtype=torch.float32, device=plan.device)
    chunks = range(start, stop, plan.batch_size)
    dtype = PRECISIONS.get(plan.precision)
    autocast = torch.autocast(plan.device.type, dtype) if dtype is not None else nullcontext()
    hidden = None if progress else True  # None: shown on a terminal only
    bar = tqdm(total=len(chunks) * plan.table.nfe, desc="sampling", unit="evaluation", disable=hidden, leave=False)
    networks = (plan.guided.denoiser, plan.guided.guidance)
    with torch.inference_mode(), evaluation_mode(*networks), _backend(plan.backend), bar:
        fused = None
        if plan.callback is None:
            bf16x3 = plan.precision == SPLIT
            run = plan.guided, plan.table, plan.scales, dtype, plan.backend
            fused = FusedRun.of(*run, bf16x3=bf16x3, samples=plan.num)
        replayed = None
        if plan.device.type == "cuda" and plan.callback is None and fused is None:
            replayed = Replayed(partial(_replayed_evaluations, plan), "the sampling loop")
        for first in chunks:
            last = min(first + plan.batch_size, stop)
            if fused is not None:
                samples = _run_fused(plan, fused, first, last)
                bar.update(plan.table.nfe)
            else:
                with autocast:
                    samples = _run_table(plan, first, last, bar, replayed)
            result[first - start : last - start] = samples
    return result


def _initial_state(plan: _Plan, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """x_T [B, *shape], sample indices [B] and labels of one chunk."""
    indices = torch.arange(plan.first_index + start, plan.first_index + stop, device=plan.device)
    if plan.prior is None:
        x = normal(plan.seed, indices, math.prod(plan.shape), 0, device=plan.device).reshape(len(indices), *plan.shape)
    else:
        x = plan.prior.start(plan.seed, indices, float(plan.table.alpha[0]), float(plan.table.sigma[0]))
    return x, indices, None if plan.labels is None else plan.labels[start:stop]


def _run_fused(plan: _Plan, fused: FusedRun, start: int, stop: int) -> Tensor:
    """All evaluations of one chunk, in one operator."""
    x, indices, labels = _initial_state(plan, start, stop)
    x, diverged = fused.run(x, labels, plan.seed, indices)
    if diverged >= 0:
        raise SamplingDivergedError(diverged, float(plan.table.times[diverged]), plan.table)
    return x


def _run_table(plan: _Plan, start: int, stop: int, bar: Any, replayed: Replayed | None) -> Tensor:
    """All evaluations of one chunk, one by one or, if given, replayed."""
    x, indices, labels = _initial_state(plan, start, stop)
    if replayed is not None:
        x, finite = replayed(x, indices, labels)
        bar.update(plan.table.nfe)
    else:

        def after(k: int, x: Tensor, x0: Tensor, finite: Tensor) -> None:
            # On an accelerator asking would wait for it at every evaluation.
            if plan.device.type == "cpu" and not finite:
                raise SamplingDivergedError(k, float(plan.table.times[k]), plan.table)
            if plan.table.ends_step[k] and plan.callback is not None:
                step = int(plan.table.ends_step[:k].sum())
                plan.callback(step, float(plan.table.times[k]), x, x0)
            bar.update()

        x, finite = _evaluations(plan, x, indices, labels, after=after)
    if not finite.all():
        first = int((~finite).int().argmax())
        raise SamplingDivergedError(first, float(plan.table.times[first]), plan.table)
    return x


def _replayed_evaluations(plan: _Plan, x: Tensor, indices: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """The hot loop with the same kernels in the call that warms up and in its recording."""
    with capturing():
        return _evaluations(plan, x, indices, labels, after=None)


def _evaluations(
    plan: _Plan,
    x: Tensor,
    indices: Tensor,
    labels: Tensor | None,
    *,
    after: Callable[[int, Tensor, Tensor, Tensor], None] | None,
) -> tuple[Tensor, Tensor]:
    """The hot loop: x at its end, and after which evaluations it was finite. It must not wait for an accelerator.

    ``after(k, x, x0, finite)`` is called after each evaluation.
    """
    guided, table = plan.guided, plan.table
    history = x.new_zeros((table.history, *x.shape)) if table.history else None
    finite = []
    for k in range(table.nfe):
        x, history, x0 = advance(guided, table, k, x, history, plan.seed, indices, labels)
        finite.append(x.isfinite().all())
        if after is not None:
            after(k, x, x0, finite[-1])
    return x, torch.stack(finite)


def advance(
    guided: GuidedDenoiser,
    table: SolverTable,
    k: int,
    x: Tensor,
    history: Tensor | None,
    seed: int,
    sample_index: Tensor,
    labels: Tensor | None = None,
) -> GuidedStepOutput:
    """Evaluation ``k`` of a solver: the networks, then the step. Shapes as in :func:`tgdp_fast.ops.guided_step`."""
    evaluation = guided.evaluate(x, float(table.times[k]), labels)
    return guided_step(
        x,
        evaluation.epsilon,
        evaluation.gradient,
        history,
        step=SolverStep(
            table.matrix[k],
            noise_scale=float(table.noise_scale[k]),
            guidance_weight=evaluation.weight,
            alpha=float(table.alpha[k]),
            sigma=float(table.sigma[k]),
            clamp=guided.clamp,
        ),
        seed=seed,
        sample_index=sample_index,
        evaluation=k + 1,
    )


def _guided(
    denoiser: EpsilonModel | GuidedDenoiser,
    guidance: Guidance | None,
    scale: float | Callable[[float], float],
    interval: tuple[float, float] | None,
    clamp: tuple[float, float] | None,
    gradient_norm_limit: float | None,
) -> GuidedDenoiser:
    if not isinstance(denoiser, GuidedDenoiser):
        return GuidedDenoiser(
            denoiser,
            guidance,
            scale=scale,
            interval=interval,
            clamp=clamp,
            gradient_norm_limit=gradient_norm_limit,
        )
    given = {
        "guidance": guidance,
        "interval": interval,
        "clamp": clamp,
        "gradient_norm_limit": gradient_norm_limit,
    }
    repeated = [name for name, value in given.items() if value is not None] + (["scale"] if scale != 1.0 else [])
    if repeated:
        raise ValueError(f"{', '.join(repeated)}: set on the GuidedDenoiser that was passed, not again in sample()")
    return denoiser


def _check_schedules(models: Mapping[str, Any]) -> None:
    schedule = getattr(models["denoiser"], "schedule", None)
    if not isinstance(schedule, NoiseSchedule):
        raise ValueError(f"denoiser must have an attribute schedule, a NoiseSchedule, got {schedule!r}")
    other = getattr(models.get("guidance"), "schedule", None)
    if other is not None and other != schedule:
        raise ValueError(
            "guidance and denoiser must have the same noise schedule, got guidance.schedule = "
            f"{other!r} and denoiser.schedule = {schedule!r}; fit the guidance with the denoiser's schedule"
        )


def _is_table_of(schedule: NoiseSchedule, table: SolverTable) -> bool:
    inside = (table.times >= schedule.t_min) & (table.times <= schedule.t_max)
    return bool(inside.all()) and np.allclose(schedule.alpha(table.times), table.alpha, rtol=1e-6, atol=0.0)


def _scales(guided: GuidedDenoiser, table: SolverTable) -> list[float]:
    scales = []
    for t in table.times.tolist():
        try:
            scales.append(guided.scale_at(t))
        except ValueError as error:
            raise ValueError(
                f"scale must give a finite number at every time of the solver; at t = {t}: {error}"
            ) from None
    return scales


def _event_shape(shape: tuple[int, ...] | None, models: Mapping[str, Any]) -> tuple[int, ...]:
    stated = {name: getattr(model, "event_shape", None) for name, model in models.items()}
    known = [tuple(value) for value in stated.values() if value is not None]
    if known and known[0] != known[-1]:
        raise ValueError(f"denoiser and guidance must have the same event_shape, got {known[0]} and {known[-1]}")
    if shape is None:
        if not known:
            raise ValueError(
                "shape must be given (the shape of one sample): the denoiser does not state its event_shape"
            )
        return known[0]
    try:
        shape = tuple(check_integer("shape entries", size, 1) for size in shape)
    except TypeError:
        raise ValueError(f"shape must be a tuple of integers, the shape of one sample, got {shape!r}") from None
    if known and shape != known[0]:
        raise ValueError(f"shape must be {known[0]}, the event_shape of the model, got {shape}")
    return shape


def _check_prior(prior: Prior | None, shape: tuple[int, ...]) -> None:
    if prior is None:
        return
    if not isinstance(prior, Prior):
        raise ValueError(
            f"prior must be a GaussianPrior, an EmpiricalPrior or None, got {type(prior).__name__}; see "
            "GaussianPrior.fit"
        )
    if prior.event_shape != shape:
        raise ValueError(f"prior must be of samples of shape {shape}, got one of {prior.event_shape}")


def _device(device: str | torch.device | None, models: Mapping[str, Any]) -> torch.device:
    """``device``, or that of the first parameter; the parameters of all models must lie there."""
    places = {
        name: {parameter.device for parameter in model.parameters()}
        for name, model in models.items()
        if isinstance(model, nn.Module)
    }
    if device is None:
        result = next((place for found in places.values() for place in found), torch.device("cpu"))
    else:
        result = check_device(device)
    for name, found in places.items():
        for place in found - {result}:
            raise ValueError(
                f"the parameters of {name} are on {place}, but sampling runs on {result}; move them with "
                f"{name}.to({str(result)!r}) or choose another device"
            )
    return result


def _labels(labels: Any, num: int, models: Mapping[str, Any]) -> Tensor | None:
    """None, or labels with one row per sample that every model accepts.

    A model that states no ``num_classes`` takes them as they come.
    """
    counts = {name: getattr(model, "num_classes", None) for name, model in models.items()}
    conditional = {name: count for name, count in counts.items() if count}
    if labels is None:
        for name, count in conditional.items():
            raise ValueError(f"labels are required: the {name} is conditional on {count} classes")
        return None
    if all(count == 0 for count in counts.values()):
        raise ValueError(
            f"labels must be None, got labels for {' and '.join(counts)} without classes (num_classes = 0)"
        )
    try:
        result = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"labels must be numbers, got {type(labels).__name__}: {error}") from None
    if result.ndim == 0:
        result = result.expand(num)
    if result.ndim > 2 or len(result) != num:
        raise ValueError(
            f"labels must be one class index, {num} indices, or {num} rows of class weights (num = {num}), got shape "
            f"{tuple(result.shape)}"
        )
    for count in conditional.values():
        result = torch.from_numpy(check_labels("labels", result, num, count))
    return result


@contextmanager
def _backend(name: str) -> Iterator[None]:
    if name == "auto":
        yield
    else:
        with use_backend(name):
            yield
