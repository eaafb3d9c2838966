"""Fitting the guidance network: Algorithms 1 to 4 of the paper in one call."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tgdp_fast.diffusion.denoiser import evaluation_mode, labels_for
from tgdp_fast.diffusion.guidance import GuidanceNetwork
from tgdp_fast.diffusion.guided import EpsilonModel
from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.fit.density_ratio import (
    RATIO_LOSSES,
    DensityRatio,
    bounded_exp,
    fit_density_ratio,
    logistic_loss,
    ratio_loss,
)
from tgdp_fast.fit.diagnostics import TransferDiagnostics, diagnose
from tgdp_fast.fit.training import (
    TIME_DISTRIBUTIONS,
    Batches,
    Optimisation,
    add_noise,
    as_labels,
    as_samples,
    count_classes,
    derived_seed,
    device_of,
    draw_noised,
    optimise,
    seeded_initialisation,
    warn_of_scale,
)
from tgdp_fast.models.mlp import encode_labels
from tgdp_fast.runtime.checkpoint import signature_of
from tgdp_fast.runtime.checks import check_choice, check_integer, check_number, check_seed
from tgdp_fast.runtime.precision import PRECISIONS, autocast


@dataclass
class GuidanceFit:
    """What :func:`fit_guidance` returns.

    Attributes:
        guidance: the fitted network, in eval mode.
        diagnostics: print it; read its ``warnings``. None when diagnostics were switched off.
        history: training loss at about 100 steps.
        config: the settings that were used, JSON-able.
    """

    guidance: GuidanceNetwork
    diagnostics: TransferDiagnostics | None
    history: list[float] = field(repr=False)
    config: dict[str, Any] = field(repr=False)


def fit_guidance(
    source: np.ndarray | Tensor,
    target: np.ndarray | Tensor,
    schedule: NoiseSchedule | None = None,
    *,
    denoiser: EpsilonModel | None = None,
    source_labels: np.ndarray | Tensor | None = None,
    target_labels: np.ndarray | Tensor | None = None,
    num_classes: int | None = None,
    conditional: bool = True,
    loss: str = "logistic",
    consistency: float | None = None,
    cycle: float = 0.0,
    ratio: DensityRatio | None = None,
    width: int = 128,
    depth: int = 4,
    alpha_power: float = 2.0,
    label_smoothing: float = 0.0,
    stem: str = "none",
    settings: Optimisation | None = None,
    time_distribution: str = "uniform",
    precision: str = "fp32",
    diagnostics: bool = True,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = False,
    state_dir: str | os.PathLike[str] | None = None,
) -> GuidanceFit:
    """Fit log h(x, t[, y]), the log density ratio of target to source under noise (TGDP Algorithms 1 to 4).

    ``loss="ratio_mse", cycle > 0, consistency > 0`` is the paper's Algorithm 4; ``cycle = consistency = 0`` its
    Algorithm 3.

    Args:
        source, target: [M, ...], [N, ...], of about unit scale, in the coordinates of the denoiser.
        schedule: of the source model; taken from ``denoiser`` when that is given.
        denoiser: the frozen source model; needed for the consistency term.
        source_labels, target_labels: class indices or rows; both or neither.
        num_classes: default from the labels.
        conditional: whether the guidance takes the labels (TGDP Theorem 3.3); otherwise they are for a conditional
            denoiser alone.
        loss: "logistic" (time-dependent domain classifier), "ratio_mse", "poisson" or "log_mse" (regression on the
            density ratio of a cross-fitted classifier on clean data).
        consistency: weight of 1/2 || epsilon_p - sigma_t grad log h - epsilon ||^2 (summed over elements, lambda(t) =
            sigma_t^2) on noised target samples; default 1 with a denoiser, else 0.
        cycle: weight of the cycle term, (h - h_c)^2 on noised target samples, h_c from a time-dependent classifier that
            is trained first.
        ratio: the clean-data classifier's density ratio at these very samples, computed before, from features of them
            perhaps; default: fitted here to the samples as they are.
        width, depth, alpha_power, stem: of the :class:`GuidanceNetwork`.
        label_smoothing: of the logistic loss.
        settings: of the optimisation; the default depends on the number of target samples (:func:`default_settings`).
        time_distribution: of training times, "uniform" in t or in "logsnr".
        precision: of the guidance network's products while fitting, "fp32", "bf16" or "fp16"; parameters and losses
            are float32 always.
        diagnostics: also fit the clean-data classifier and report whether the target is within reach.
        seed: of everything random.
        device: where to fit; default that of ``denoiser``, else the CPU.
        progress, state_dir: see :func:`tgdp_fast.fit.training.optimise`.

    Returns:
        A :class:`GuidanceFit`.

    Raises:
        ValueError: bad data, labels or settings, before any work.
        TrainingDivergedError: a non-finite loss.
    """
    check_losses(loss, consistency, cycle, label_smoothing, time_distribution)
    check_choice("precision", precision, PRECISIONS)
    check_seed(seed)
    check_denoiser(denoiser)
    if denoiser is not None and schedule is not None and schedule != denoiser.schedule:
        raise ValueError(f"schedule must be that of denoiser, {denoiser.schedule}, or left out; got {schedule}")
    schedule = denoiser.schedule if denoiser is not None else schedule or NoiseSchedule.vp_linear()
    if consistency is None:
        consistency = 1.0 if denoiser is not None else 0.0
    if consistency > 0 and denoiser is None:
        raise ValueError("denoiser must be given when consistency > 0: the term compares with the source model")
    if state_dir is not None and denoiser is not None and not _is_module(denoiser):
        raise ValueError("state_dir needs a denoiser that is a torch module, so that a resumed fit can tell it apart")
    home = device_of(denoiser)
    x_source = as_samples("source", source, home if device is None else device)
    warn_of_scale("source", x_source)
    x_target = as_samples("target", target, x_source.device)
    if _is_module(denoiser) and home.type != x_source.device.type:
        raise ValueError(
            f"device must be that of denoiser, {home}, got {x_source.device}; move it with denoiser.to(...)"
        )
    if x_source.shape[1:] != x_target.shape[1:]:
        raise ValueError(
            f"target must hold samples of the source's shape {tuple(x_source.shape[1:])}, "
            f"got {tuple(x_target.shape[1:])}"
        )
    classes = common_classes(
        source_labels, target_labels, len(x_source), len(x_target), num_classes, getattr(denoiser, "num_classes", None)
    )
    event_shape = tuple(x_source.shape[1:])
    architecture: dict[str, Any] = {"width": width, "depth": depth, "alpha_power": alpha_power, "stem": stem}
    check_fit_arguments(event_shape, schedule, settings=settings, **architecture)
    y_source = as_labels("source_labels", source_labels, len(x_source), classes, x_source.device)
    y_target = as_labels("target_labels", target_labels, len(x_target), classes, x_source.device)
    data = _Data(x_source, y_source, x_target, y_target)
    settings = settings or default_settings(len(x_target))

    def new_network(initial_seed: int) -> GuidanceNetwork:
        with seeded_initialisation(initial_seed):
            network = GuidanceNetwork(event_shape, schedule, num_classes=classes if conditional else 0, **architecture)
        return network.to(x_source.device)

    if ratio is not None and (len(ratio.source_log_ratio), len(ratio.target_log_ratio)) != (
        len(x_source),
        len(x_target),
    ):
        raise ValueError(
            f"ratio must be that of the {len(x_source)} source and {len(x_target)} target samples, got one of "
            f"{len(ratio.source_log_ratio)} and {len(ratio.target_log_ratio)}"
        )
    if ratio is None and (diagnostics or loss != "logistic"):
        ratio = fit_density_ratio(
            x_source,
            x_target,
            source_labels=None if y_source is None or not conditional else encode_labels(y_source, classes),
            target_labels=None if y_target is None or not conditional else encode_labels(y_target, classes),
            seed=seed,
            progress=progress,
        )

    classifier = None
    if cycle > 0:
        classifier_seed = derived_seed(seed, "time-dependent classifier")
        classifier = new_network(classifier_seed)
        objective = _objective(
            classifier, data, schedule, settings, time_distribution, "logistic", label_smoothing=label_smoothing
        )
        optimise(
            classifier,
            objective,
            settings,
            seed=classifier_seed,
            progress=progress,
            description="time classifier",
        )
        classifier.requires_grad_(False)

    network = new_network(seed)
    objective = _objective(
        network,
        data,
        schedule,
        settings,
        time_distribution,
        loss,
        source_log_ratio=None if ratio is None else ratio.source_log_ratio.to(x_source.device),
        consistency=consistency,
        denoiser=denoiser,
        cycle=cycle,
        classifier=classifier,
        label_smoothing=label_smoothing,
        precision=precision,
    )
    config = {
        "loss": loss,
        "precision": precision,
        "conditional": conditional,
        "consistency": consistency,
        "cycle": cycle,
        "time_distribution": time_distribution,
        "label_smoothing": label_smoothing,
        "network": network.to_config(),
        "settings": asdict(settings),
        "seed": seed,
    }
    history = optimise(
        network,
        objective,
        settings,
        seed=seed,
        progress=progress,
        description="guidance",
        state_dir=state_dir,
        signature=signature_of(
            x_source, x_target, y_source, y_target, config, denoiser, None if ratio is None else ratio.source_log_ratio
        ),
    )
    report = None
    if diagnostics and ratio is not None:
        report = diagnose(x_source, x_target, ratio)
        report.add_mean_h(mean_h(network, x_source, labels=y_source, seed=seed))
        if y_source is not None and y_target is not None:
            report.add_labels(y_source, y_target, classes)
    return GuidanceFit(network, report, history, config)


def check_fit_arguments(
    event_shape: tuple[int, ...],
    schedule: NoiseSchedule,
    *,
    conditional: bool = True,
    loss: str = "logistic",
    consistency: float | None = None,
    cycle: float = 0.0,
    label_smoothing: float = 0.0,
    time_distribution: str = "uniform",
    settings: Optimisation | None = None,
    precision: str = "fp32",
    diagnostics: bool = True,
    **network: Any,
) -> None:
    """Refuse bad arguments of :func:`fit_guidance` without doing anything, for callers that train something first.

    ``network`` are the arguments of :class:`GuidanceNetwork`.

    Raises:
        ValueError: names the argument, an unknown one too.
    """
    check_losses(loss, consistency, cycle, label_smoothing, time_distribution)
    check_choice("precision", precision, PRECISIONS)
    if settings is not None and not isinstance(settings, Optimisation):
        raise ValueError(f"settings must be an Optimisation, got {type(settings).__name__}")
    known = ("width", "depth", "alpha_power", "stem")
    for name in network:
        check_choice("argument of fit_guidance", name, (*known, *_FIT_ARGUMENTS))
    with seeded_initialisation(0):
        GuidanceNetwork(event_shape, schedule, **network)


def check_denoiser(denoiser: Any) -> None:
    """Refuse what is no denoiser; None is one to be trained, or none.

    Raises:
        ValueError: names the argument.
    """
    schedule = getattr(denoiser, "schedule", None)
    if denoiser is not None and not (
        isinstance(schedule, NoiseSchedule) and callable(getattr(denoiser, "epsilon", None))
    ):
        raise ValueError(
            f"denoiser must be a Denoiser, or have a NoiseSchedule as schedule and a method epsilon, got "
            f"{type(denoiser).__name__}; wrap a network as Denoiser(network, schedule, prediction)"
        )


def check_losses(
    loss: str, consistency: float | None, cycle: float, label_smoothing: float, time_distribution: str
) -> None:
    """Refuse unknown losses and weights that are no weights.

    Raises:
        ValueError: names the argument.
    """
    check_choice("loss", loss, RATIO_LOSSES)
    check_choice("time_distribution", time_distribution, TIME_DISTRIBUTIONS)
    check_number("cycle", cycle, 0.0)
    check_number("label_smoothing", label_smoothing, 0.0, 0.49)
    if consistency is not None:
        check_number("consistency", consistency, 0.0)


_FIT_ARGUMENTS = (
    "conditional",
    "loss",
    "consistency",
    "cycle",
    "label_smoothing",
    "time_distribution",
    "settings",
    "precision",
    "diagnostics",
)


def common_classes(
    source_labels: np.ndarray | Tensor | None,
    target_labels: np.ndarray | Tensor | None,
    num_source: int,
    num_target: int,
    num_classes: int | None,
    denoiser_classes: int | None,
) -> int:
    """Number of classes of a transfer: as given, else the conditional denoiser's, else from both sets of labels.

    Raises:
        ValueError: labels of one domain only, or none for a conditional denoiser.
    """
    if (source_labels is None) != (target_labels is None):
        raise ValueError("source_labels and target_labels must be given together (or neither)")
    if source_labels is None and denoiser_classes:
        raise ValueError(
            f"source_labels and target_labels must be given: the denoiser is conditional on {denoiser_classes} classes"
        )
    if num_classes is None and denoiser_classes:
        return denoiser_classes
    return max(
        count_classes("source_labels", source_labels, num_source, num_classes),
        count_classes("target_labels", target_labels, num_target, num_classes),
    )


def default_settings(num_target: int) -> Optimisation:
    """Optimisation settings for ``num_target`` samples: the fewer, the shorter and the more regularised.

    Chosen on development draws of the paper's simulation (section 4.1), with its means and with a one-sided target.
    """
    check_integer("num_target", num_target, 1)
    if num_target < 50:
        return Optimisation(steps=300, batch_size=128, learning_rate=2e-3, weight_decay=1.0, ema_decay=0.995)
    if num_target < 500:
        return Optimisation(steps=1500, batch_size=256, learning_rate=2e-3, weight_decay=0.3, ema_decay=0.995)
    return Optimisation(steps=4000, batch_size=256, learning_rate=2e-3, weight_decay=0.1, ema_decay=0.998)


def _is_module(model: object) -> bool:
    return isinstance(model, nn.Module)


@dataclass(frozen=True)
class _Data:
    x_source: Tensor
    y_source: Tensor | None
    x_target: Tensor
    y_target: Tensor | None


def _objective(
    network: GuidanceNetwork,
    data: _Data,
    schedule: NoiseSchedule,
    settings: Optimisation,
    time_distribution: str,
    loss: str,
    *,
    source_log_ratio: Tensor | None = None,
    consistency: float = 0.0,
    denoiser: EpsilonModel | None = None,
    cycle: float = 0.0,
    classifier: GuidanceNetwork | None = None,
    label_smoothing: float = 0.0,
    precision: str = "fp32",
) -> Callable[[torch.Generator], Tensor]:
    """The loss of Algorithms 2, 3 or 4 on fresh batches of both domains."""
    device_type = data.x_source.device.type

    source_batches = Batches(len(data.x_source), settings.batch_size)
    target_batches = Batches(len(data.x_target), settings.batch_size)
    needs_target = loss == "logistic" or consistency > 0 or cycle > 0

    def value(generator: torch.Generator) -> Tensor:
        rows, source, source_labels = draw_noised(
            source_batches, data.x_source, data.y_source, schedule, generator, time_distribution
        )
        if needs_target:
            _, target, labels = draw_noised(
                target_batches, data.x_target, data.y_target, schedule, generator, time_distribution
            )
            own_labels = labels_for(network, labels)
        gradient = None
        own_source = labels_for(network, source_labels)
        with autocast(precision, device_type):
            if not needs_target:
                f_source = network.log_ratio(source.x, source.t, own_source).float()
            elif consistency > 0:
                f_source = network.log_ratio(source.x, source.t, own_source).float()
                f_target, gradient = (value.float() for value in network(target.x, target.t, own_labels))
            else:  # Both in one call.
                both = None if own_labels is None or own_source is None else torch.cat([own_source, own_labels])
                x, t = torch.cat([source.x, target.x]), torch.cat([source.t, target.t])
                f_source, f_target = network.log_ratio(x, t, both).float().split([len(source.x), len(target.x)])
        total = f_source.new_zeros(())
        if loss != "logistic":
            assert source_log_ratio is not None
            total = total + ratio_loss(loss, f_source, source_log_ratio[rows])
        if gradient is not None:
            assert denoiser is not None
            with torch.no_grad(), evaluation_mode(denoiser):
                epsilon_p = denoiser.epsilon(target.x, target.t, labels_for(denoiser, labels))
            residual = epsilon_p - target.sigma * gradient - target.epsilon
            # One half of the squared norm, as in a likelihood bound: in its units, like the cross-entropy beside it.
            total = total + consistency * 0.5 * residual.flatten(1).square().sum(1).mean()
        if loss == "logistic":
            total = total + logistic_loss(f_source, f_target, smoothing=label_smoothing)
        if cycle > 0:
            assert classifier is not None
            with torch.no_grad():
                h_classifier = bounded_exp(classifier.log_ratio(target.x, target.t, own_labels), 10.0)
            total = total + cycle * (bounded_exp(f_target, 10.0) - h_classifier).square().mean()
        return total

    return value


def _rows(labels: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if labels is None else labels[rows]


def mean_h(
    guidance: GuidanceNetwork,
    source: Tensor,
    *,
    labels: Tensor | None = None,
    num_times: int = 6,
    limit: int = 4096,
    seed: int = 0,
) -> list[tuple[float, float, float]]:
    """E_p[h(x_t, t)] at ``num_times`` times, with its standard error: rows (t, mean, error). 1 when h is exact."""
    schedule = guidance.schedule
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(source), generator=generator)[:limit].to(source.device)
    x0, y = source[chosen], _rows(labels, chosen)
    rows = []
    for t in np.linspace(schedule.t_min, schedule.t_max, num_times):
        t = float(np.round(t)) if schedule.is_discrete else float(t)
        noised = add_noise(schedule, x0, torch.full((len(x0),), t), generator)
        with torch.no_grad():
            h = guidance.log_ratio(noised.x, t, labels_for(guidance, y)).double().clamp_max(50.0).exp()
        rows.append((t, float(h.mean()), float(h.std() / len(h) ** 0.5)))
    return rows
