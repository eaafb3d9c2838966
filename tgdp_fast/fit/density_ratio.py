"""Density ratios of target to source on clean data: domain classifier, cross-fitted over folds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from tgdp_fast.fit.batches import Batches
from tgdp_fast.fit.config import TrainingConfig, check_config
from tgdp_fast.fit.data import ArrayLike, TransferArrays
from tgdp_fast.fit.losses import logistic_loss
from tgdp_fast.fit.training import derived_seed, minimize
from tgdp_fast.models.mlp import encode_labels
from tgdp_fast.runtime.arrays import CheckedArray
from tgdp_fast.runtime.checks import check_integer, check_number, check_seed
from tgdp_fast.runtime.precision import ordinary_autograd
from tgdp_fast.runtime.randomness import global_random_state, seeded_initialization

_ROWS = 4_096  # held-out samples classified at once
_CALIBRATION = 50  # batches behind the running statistics of a batch normalization

#: Training of a domain classifier on clean data: few steps and strong weight decay, because there is no early stopping.
DEFAULT_SETTINGS = TrainingConfig(
    steps=300, batch_size=256, learning_rate=2e-3, weight_decay=1.0, ema_decay=0.95, warmup=10
)
_FOLDS, _CLIP = 5, 10.0


class DomainClassifier(nn.Module):
    """log q(x[, y]) / p(x[, y]) on clean data: a SiLU network whose output is minus the logit of c = P(source | x).

    Shapes: ``forward(x [B, ...], label_rows [B, K] or None) -> [B]``.
    """

    def __init__(self, num_features: int, num_classes: int = 0, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        sizes = [num_features + num_classes] + [width] * depth
        layers: list[nn.Module] = []
        for a, b in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(a, b, dtype=torch.float32), nn.SiLU()]
        self.network = nn.Sequential(*layers, nn.Linear(sizes[-1], 1, dtype=torch.float32))

    def forward(self, x: Tensor, label_rows: Tensor | None = None) -> Tensor:
        features = x.flatten(1) if label_rows is None else torch.cat([x.flatten(1), label_rows], dim=1)
        result: Tensor = self.network(features)[:, 0]
        return result


@dataclass(frozen=True)
class DensityRatio:
    """Cross-fitted log ratios: no sample's logit comes from a classifier that was trained or selected on it.

    Calibration adds two numbers, a slope and a shift, fitted to all samples together.

    Attributes:
        source_log_ratio, target_log_ratio: calibrated log r at the source [M] and target [N] samples.
        source_logit, target_logit: the same before calibration and normalization.
        slope: factor in [0.03, 1] applied to the logits by calibration; well below 1 means that the classifiers were
            overconfident.
        mean_ratio: mean of r over the source after calibration, before normalization to 1.
        classifiers: one per fold.
    """

    source_log_ratio: Tensor
    target_log_ratio: Tensor
    source_logit: Tensor
    target_logit: Tensor
    slope: float
    mean_ratio: float
    classifiers: Sequence[nn.Module] = field(repr=False)


@ordinary_autograd()
def fit_density_ratio(
    source: ArrayLike,
    target: ArrayLike,
    *,
    source_labels: ArrayLike | None = None,
    target_labels: ArrayLike | None = None,
    folds: int = _FOLDS,
    build: Callable[[], nn.Module] | None = None,
    settings: TrainingConfig | None = None,
    clip: float = _CLIP,
    seed: int = 0,
    progress: bool = False,
) -> DensityRatio:
    """Domain classifier on clean data (TGDP Algorithm 1), cross-fitted over folds.

    Each fold's classifier is trained on the other folds with balanced batches, for a fixed number of steps. Early
    stopping at the smallest held-out loss would select on the same samples whose values are reported, and would find a
    difference between equal domains. Few steps and weight decay prevent overfitting instead (:data:`DEFAULT_SETTINGS`,
    chosen by the error of log r and of its mean on the paper's simulation, for all its numbers of target samples, and
    by an AUC of one half on equal domains). The pooled held-out logits are then calibrated by one slope, at most 1 (a
    larger one would sharpen noise), and shifted so that the mean ratio over the source is 1, as for the true ratio
    (E_p[r] = 1).

    Args:
        source, target: [M, ...], [N, ...], at least two each; tensors stay on their device.
        source_labels, target_labels: class indices or rows [., K], for the ratio q(x, y) / p(x, y).
        folds: reduced if there are fewer target samples.
        build: returns an untrained classifier of another architecture, (x [B, ...], label rows [B, K] or None) -> logit
            [B]; default a :class:`DomainClassifier`.
        settings: of the training; default :data:`DEFAULT_SETTINGS`.
        clip: log r is limited to [-clip, clip].
        seed: of folds, weights and batches.
        progress: show a bar per fold.

    Raises:
        ValueError: bad data, labels or settings, before any work.
        TrainingDivergedError: a non-finite loss.
    """
    given = source_labels.values if isinstance(source_labels, CheckedArray) else source_labels
    columns = () if given is None else np.shape(given)[1:]
    arrays = TransferArrays.check(
        source, target, source_labels, target_labels, num_classes=columns[0] if columns else None
    )
    device = source.device if isinstance(source, Tensor) else torch.device("cpu")
    source, target = arrays.source.tensor(device), arrays.target.tensor(device)
    source_labels, target_labels = (
        None if one is None else encode_labels(one.tensor(device), arrays.num_classes) for one in arrays.labels
    )
    if clip != math.inf:
        check_number("clip", clip, 0.0, exclusive=True)
    check_seed(seed)
    settings = check_config("settings", settings or DEFAULT_SETTINGS, TrainingConfig)
    folds = check_integer("folds", folds, 2)
    data = (source, source_labels), (target, target_labels)
    return cross_fitted(*data, arrays.num_classes, folds, build, settings, clip=clip, seed=seed, progress=progress)


def cross_fitted(
    source_data: tuple[Tensor, Tensor | None],
    target_data: tuple[Tensor, Tensor | None],
    num_classes: int,
    folds: int = _FOLDS,
    build: Callable[[], nn.Module] | None = None,
    settings: TrainingConfig = DEFAULT_SETTINGS,
    *,
    clip: float = _CLIP,
    seed: int = 0,
    progress: bool = False,
) -> DensityRatio:
    """:func:`fit_density_ratio` of checked samples and label rows [., K], on one device."""
    (source, source_labels), (target, target_labels) = source_data, target_data
    folds = min(folds, len(target), len(source))
    generator = torch.Generator("cpu").manual_seed(seed)
    source_fold = _stratified_folds(len(source), folds, source_labels, generator)
    target_fold = _stratified_folds(len(target), folds, target_labels, generator)
    source_logit, target_logit = (torch.zeros(len(one), dtype=torch.float32, device="cpu") for one in (source, target))
    classifiers = []
    for fold in range(folds):
        data = [(source, source_labels, source_fold != fold), (target, target_labels, target_fold != fold)]
        fold_seed = derived_seed(seed, f"fold {fold}")
        with seeded_initialization(fold_seed):
            new = DomainClassifier(source[0].numel(), num_classes) if build is None else build()
            classifier = new.to(source.device)
        _train_classifier(classifier, data, settings, fold_seed, progress, f"classifier {fold + 1}/{folds}")
        with torch.no_grad():
            for logits, (x, y, seen) in zip((source_logit, target_logit), data, strict=True):
                rest = (~seen).nonzero()[:, 0].to(x.device)
                for rows in rest.split(_ROWS):
                    logits[rows.cpu()] = classifier(x[rows], None if y is None else y[rows]).cpu()
        classifiers.append(classifier)
    slope = calibration_slope(source_logit, target_logit)
    shift = torch.logsumexp(slope * source_logit.double(), 0).item() - math.log(len(source))
    return DensityRatio(
        source_log_ratio=(slope * source_logit - shift).clamp(-clip, clip),
        target_log_ratio=(slope * target_logit - shift).clamp(-clip, clip),
        source_logit=source_logit,
        target_logit=target_logit,
        slope=slope,
        mean_ratio=math.exp(min(shift, 700.0)),
        classifiers=classifiers,
    )


def _stratified_folds(count: int, folds: int, labels: Tensor | None, generator: torch.Generator) -> Tensor:
    """Fold of each sample [count], sizes equal to within one, also for each class if labels are given."""
    order = torch.randperm(count, generator=generator, device="cpu")
    if labels is not None:
        order = order[torch.argsort(labels.argmax(1).cpu()[order], stable=True)]
    result = torch.empty(count, dtype=torch.long, device="cpu")
    result[order] = torch.arange(count, device="cpu") % folds
    return result


def _train_classifier(
    classifier: nn.Module,
    data: list[tuple[Tensor, Tensor | None, Tensor]],
    settings: TrainingConfig,
    seed: int,
    progress: bool,
    description: str,
) -> None:
    """Train on samples of both domains: (x, label rows, mask of the rows to train on) of each."""
    parts = [(x[seen], None if y is None else y[seen]) for x, y, seen in data]
    batches = [Batches(len(x), settings.batch_size) for x, _ in parts]

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        rows = [batch.draw(generator) for batch in batches]
        x = torch.cat([x[own] for (x, _), own in zip(parts, rows, strict=True)])
        labels = [y[own] for (_, y), own in zip(parts, rows, strict=True) if y is not None]
        return x, torch.cat(labels) if labels else None

    def loss(generator: torch.Generator) -> Tensor:
        # Both domains in one call: batch normalization must not see them separately.
        return logistic_loss(*classifier(*draw(generator)).chunk(2))

    minimize(classifier, loss, settings, seed=seed, progress=progress, description=description)
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in classifier.modules()):
        # Its running statistics belong to the last weights, but the averaged weights are kept.
        generator = torch.Generator("cpu").manual_seed(seed)
        with global_random_state(generator.get_state()):  # of dropout
            update_bn((draw(generator)[0] for _ in range(_CALIBRATION)), classifier)


def calibration_slope(source_logit: Tensor, target_logit: Tensor) -> float:
    """Factor in [0.03, 1] on held-out logits that minimizes the balanced log loss: it tempers, and never sharpens."""
    slopes = torch.logspace(math.log10(0.03), 0.0, 61, dtype=torch.float64, device="cpu")
    losses = [logistic_loss(s * source_logit.double(), s * target_logit.double()).item() for s in slopes]
    return float(slopes[int(torch.tensor(losses, dtype=torch.float32, device="cpu").argmin())])
