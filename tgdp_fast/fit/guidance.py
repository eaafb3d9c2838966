"""Fitting the guidance network: Algorithms 1 to 4 of the paper in one call."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tgdp_fast.diffusion.denoiser import labels_for
from tgdp_fast.diffusion.guidance import GuidanceNetwork
from tgdp_fast.diffusion.guided import EpsilonModel
from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.fit.batches import add_noise
from tgdp_fast.fit.config import GuidanceConfig, TrainingConfig, check_config
from tgdp_fast.fit.data import ArrayLike, TransferArrays, warn_of_scale
from tgdp_fast.fit.density_ratio import DensityRatio, cross_fitted
from tgdp_fast.fit.diagnostics import TransferDiagnostics, diagnose
from tgdp_fast.fit.losses import Logistic
from tgdp_fast.fit.objective import Objective, TransferData
from tgdp_fast.fit.training import derived_seed, device_of, minimize
from tgdp_fast.models.mlp import encode_labels
from tgdp_fast.runtime.checkpoint import described, load_checkpoint, save_checkpoint, signature_of
from tgdp_fast.runtime.checks import check_integer, check_seed
from tgdp_fast.runtime.precision import ordinary_autograd
from tgdp_fast.runtime.randomness import seeded_initialization


@dataclass
class GuidanceFit:
    """The result of :func:`fit_guidance`.

    Attributes:
        guidance: the fitted network, in eval mode.
        diagnostics: print it; read its ``warnings``. None if diagnostics were turned off.
        history: training loss at about 100 steps.
        config: the settings that were used, JSON-able; :meth:`GuidanceConfig.from_dict` reads them.
    """

    guidance: GuidanceNetwork
    diagnostics: TransferDiagnostics | None
    history: list[float] = field(repr=False)
    config: dict[str, Any] = field(repr=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint folder, atomically."""
        config = {
            "guidance": self.guidance.to_config(),
            "diagnostics": None if self.diagnostics is None else self.diagnostics.to_dict(),
            "history": self.history,
            "config": self.config,
        }
        save_checkpoint(path, "guidance_fit", config, self.guidance.state_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GuidanceFit:
        """Read a folder of :meth:`save`, onto the CPU.

        Raises:
            CheckpointError: damaged, of another kind or architecture.
        """
        config, tensors = load_checkpoint(path, "guidance_fit")
        with described(path, cls.__name__):
            guidance = GuidanceNetwork.from_parts(config["guidance"], tensors, str(path))
            diagnostics = None if config["diagnostics"] is None else TransferDiagnostics(**config["diagnostics"])
            return cls(guidance, diagnostics, config["history"], config["config"])


@ordinary_autograd()
def fit_guidance(
    source: ArrayLike,
    target: ArrayLike,
    schedule: NoiseSchedule | None = None,
    config: GuidanceConfig | None = None,
    *,
    denoiser: EpsilonModel | None = None,
    source_labels: ArrayLike | None = None,
    target_labels: ArrayLike | None = None,
    ratio: DensityRatio | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = False,
    state_dir: str | os.PathLike[str] | None = None,
) -> GuidanceFit:
    """Fit log h(x, t[, y]), the log density ratio of target to source under noise (TGDP Algorithms 1 to 4).

    Args:
        source, target: [M, ...], [N, ...], of about unit scale, in the coordinates of the denoiser.
        schedule: of the source model; taken from ``denoiser`` if given.
        config: loss, regularizers, network, training and other settings; default: ``GuidanceConfig()``.
        denoiser: the frozen source model; needed for the consistency term.
        source_labels, target_labels: class indices or rows; both or neither.
        ratio: a density ratio at the same samples, computed in advance, for example from features; default: fitted here
            to the samples themselves.
        seed: of everything random.
        device: where to fit; default: that of ``denoiser``, else the CPU.
        progress, state_dir: see :func:`tgdp_fast.fit.training.minimize`.

    Returns:
        A :class:`GuidanceFit`.

    Raises:
        ValueError: bad data, labels or settings, before any work.
        TrainingDivergedError: a non-finite loss.
    """
    config = check_config("config", GuidanceConfig() if config is None else config, GuidanceConfig)
    schedule = common_schedule(schedule, denoiser)
    check_seed(seed)
    if state_dir is not None and denoiser is not None and not isinstance(denoiser, nn.Module):
        raise ValueError("state_dir needs a denoiser that is a torch module, so that a resumed fit can tell it apart")
    arrays = TransferArrays.check(
        source, target, source_labels, target_labels, num_classes=config.num_classes, denoiser=denoiser
    )
    config = config.resolved(default_training(len(arrays.target)), arrays.num_classes, denoiser is not None)
    data = _on_device(arrays, denoiser, device)
    warn_of_scale("source", data.source)
    _check_ratio(ratio, arrays)
    network = new_network(config, data, schedule, seed)

    if ratio is None and (config.diagnostics or "source_log_ratio" in config.needs):  # Algorithm 1
        ratio = _clean_ratio(data, config, seed, progress)
    classifier = None
    if "target_classifier_log_h" in config.needs:  # Algorithm 2
        classifier = _time_classifier(data, config, schedule, derived_seed(seed, "time-dependent classifier"), progress)
    # Algorithm 3 with a loss of the ratio; Algorithm 4 with regularizers too.
    log_ratio = None if ratio is None else ratio.source_log_ratio
    objective = Objective(
        network,
        data,
        config,
        source_log_ratio=None if log_ratio is None else log_ratio.to(data.source.device),
        denoiser=denoiser,
        classifier=classifier,
    )
    signature = ""
    if state_dir is not None:
        settings = config.to_dict(), network.to_config(), seed
        signature = signature_of(*vars(arrays).values(), *settings, denoiser, log_ratio)
    history = minimize(
        network,
        objective,
        objective.training,
        seed=seed,
        progress=progress,
        description="guidance",
        state_dir=state_dir,
        signature=signature,
    )
    report = _report(network, data, ratio, seed) if config.diagnostics and ratio is not None else None
    return GuidanceFit(network, report, history, config.to_dict())


def common_schedule(schedule: NoiseSchedule | None, denoiser: Any) -> NoiseSchedule:
    """The schedule of the denoiser, or the given one, or VP linear.

    Raises:
        ValueError: ``denoiser`` is not a denoiser, or has another schedule.
    """
    if denoiser is None:
        return schedule or NoiseSchedule.vp_linear()
    own = getattr(denoiser, "schedule", None)
    if not isinstance(own, NoiseSchedule) or not callable(getattr(denoiser, "epsilon", None)):
        raise ValueError(
            f"denoiser must be a Denoiser, or have a NoiseSchedule as schedule and a method epsilon, got "
            f"{type(denoiser).__name__}; wrap a network as Denoiser(network, schedule, prediction)"
        )
    if schedule is not None and schedule != own:
        raise ValueError(f"schedule must be that of denoiser, {own}, or left out; got {schedule}")
    return own


def new_network(config: GuidanceConfig, data: TransferData, schedule: NoiseSchedule, seed: int) -> GuidanceNetwork:
    """An untrained guidance network for ``data``, with initial weights from ``seed``."""
    classes = data.num_classes if config.conditional else 0
    with seeded_initialization(seed):
        network = config.network.build(tuple(data.source.shape[1:]), schedule, classes)
    return network.to(data.source.device)


def default_training(num_target: int) -> TrainingConfig:
    """Training settings for ``num_target`` samples: fewer samples give a shorter and more regularized training.

    Chosen on development draws of the paper's simulation (section 4.1), with its means and with a one-sided target.
    """
    check_integer("num_target", num_target, 1)
    if num_target < 50:
        return TrainingConfig(steps=300, batch_size=128, learning_rate=2e-3, weight_decay=1.0, ema_decay=0.995)
    if num_target < 500:
        return TrainingConfig(steps=1500, batch_size=256, learning_rate=2e-3, weight_decay=0.3, ema_decay=0.995)
    return TrainingConfig(steps=4000, batch_size=256, learning_rate=2e-3, weight_decay=0.1, ema_decay=0.998)


def _on_device(arrays: TransferArrays, denoiser: Any, device: str | torch.device | None) -> TransferData:
    home = device_of(denoiser)
    source = arrays.source.tensor(home if device is None else device)
    if isinstance(denoiser, nn.Module) and home.type != source.device.type:
        raise ValueError(f"device must be that of denoiser, {home}, got {source.device}; move it with denoiser.to(...)")
    others = (arrays.target, arrays.source_labels, arrays.target_labels)
    target, *labels = (None if one is None else one.tensor(source.device) for one in others)
    assert target is not None
    return TransferData(source, target, labels[0], labels[1], arrays.num_classes)


def _check_ratio(ratio: DensityRatio | None, arrays: TransferArrays) -> None:
    expected = len(arrays.source), len(arrays.target)
    if ratio is not None and (len(ratio.source_log_ratio), len(ratio.target_log_ratio)) != expected:
        raise ValueError(
            f"ratio must be that of the {expected[0]} source and {expected[1]} target samples, got one of "
            f"{len(ratio.source_log_ratio)} and {len(ratio.target_log_ratio)}"
        )


def _clean_ratio(data: TransferData, config: GuidanceConfig, seed: int, progress: bool) -> DensityRatio:
    """Algorithm 1: the density ratio of clean samples, by a cross-fitted domain classifier."""
    rows = [
        None if labels is None or not config.conditional else encode_labels(labels, data.num_classes)
        for labels in (data.source_labels, data.target_labels)
    ]
    classes = 0 if rows[0] is None else data.num_classes
    return cross_fitted((data.source, rows[0]), (data.target, rows[1]), classes, seed=seed, progress=progress)


def _time_classifier(
    data: TransferData, config: GuidanceConfig, schedule: NoiseSchedule, seed: int, progress: bool
) -> GuidanceNetwork:
    """Algorithm 2: the domain classifier of noised samples, smoothed like the loss if that is logistic too."""
    loss = config.loss if isinstance(config.loss, Logistic) else Logistic()
    config = replace(config, loss=loss, regularizers=(), precision="fp32")
    classifier = new_network(config, data, schedule, seed)
    objective = Objective(classifier, data, config)
    minimize(classifier, objective, objective.training, seed=seed, progress=progress, description="time classifier")
    return classifier.requires_grad_(False)


def _report(network: GuidanceNetwork, data: TransferData, ratio: DensityRatio, seed: int) -> TransferDiagnostics:
    report = diagnose(data.source, data.target, ratio)
    report.add_mean_h(mean_h(network, data.source, labels=data.source_labels, seed=seed))
    if data.source_labels is not None and data.target_labels is not None:
        report.add_labels(data.source_labels, data.target_labels, data.num_classes)
    return report


def mean_h(
    guidance: GuidanceNetwork,
    source: Tensor,
    *,
    labels: Tensor | None = None,
    limit: int = 4096,
    seed: int = 0,
) -> list[tuple[float, float, float]]:
    """E_p[h(x_t, t)] at six times, with its standard error: rows (t, mean, error). It is 1 if h is exact."""
    schedule = guidance.schedule
    generator = torch.Generator("cpu").manual_seed(seed)
    chosen = torch.randperm(len(source), generator=generator, device="cpu")[:limit].to(source.device)
    x0, y = source[chosen], None if labels is None else labels[chosen]
    rows = []
    for t in np.linspace(schedule.t_min, schedule.t_max, 6):
        t = float(np.round(t)) if schedule.is_discrete else float(t)
        noised = add_noise(schedule, x0, torch.full((len(x0),), t, dtype=torch.float32, device="cpu"), generator)
        with torch.no_grad():
            h = guidance.log_ratio(noised.x, t, labels_for(guidance, y)).double().clamp_max(50.0).exp()
        rows.append((t, float(h.mean()), float(h.std() / len(h) ** 0.5)))
    return rows
