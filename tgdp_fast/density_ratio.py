"""Density ratios of target to source on clean data: domain classifier, ratio losses, and whether to trust them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import update_bn

from tgdp_fast._checks import check_integer
from tgdp_fast.models.mlp import encode_labels
from tgdp_fast.training import Batches, Optimisation, derived_seed, optimise, seeded_initialisation

RATIO_LOSSES = ("logistic", "ratio_mse", "poisson", "log_mse")

_ROWS = 4_096  # held-out samples classified at once
_CALIBRATION = 50  # batches behind the running statistics of a batch normalisation

#: Of a domain classifier on clean data: few steps and a strong weight decay, since nothing stops it early.
DEFAULT_SETTINGS = Optimisation(
    steps=300, batch_size=256, learning_rate=2e-3, weight_decay=1.0, ema_decay=0.95, warmup=10
)


def bounded_exp(log_ratio: Tensor, limit: float = 30.0) -> Tensor:
    """exp(f) up to f = ``limit``, its tangent beyond: exp(limit) (1 + f - limit).

    Cannot overflow, increases everywhere and is differentiable, so that a loss of it keeps its minimiser and a wild
    value finds back.
    """
    return log_ratio.clamp_max(limit).exp() * (1.0 + functional.relu(log_ratio - limit))


def ratio_loss(name: str, log_ratio: Tensor, target_log_ratio: Tensor) -> Tensor:
    """Regression losses for Algorithm 3, averaged over source samples.

    ========== ===================== =============================================================
    name       per sample            minimiser f
    ========== ===================== =============================================================
    ratio_mse  (exp(f) - r)^2        log E[r | x_t]; the paper's (TGDP equation 8)
    poisson    exp(f) - r f          the same; a Bregman divergence, convex in f
    log_mse    (f - log r)^2         E[log r | x_t]; biased low by Jensen's inequality
    ========== ===================== =============================================================

    Args:
        name: "ratio_mse", "poisson" or "log_mse" ("logistic" needs both domains: :func:`logistic_loss`).
        log_ratio: f [B]. exp is :func:`bounded_exp`, so that one wild sample cannot overflow.
        target_log_ratio: log r(x_0) [B].
    """
    if name == "log_mse":
        return (log_ratio - target_log_ratio).square().mean()
    ratio, target = bounded_exp(log_ratio), bounded_exp(target_log_ratio)
    if name == "ratio_mse":
        return (ratio - target).square().mean()
    if name == "poisson":
        return (ratio - target * log_ratio).mean()
    raise ValueError(f"loss must be one of ratio_mse, poisson, log_mse here, got {name!r}")


def logistic_loss(source_log_ratio: Tensor, target_log_ratio: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Balanced cross-entropy of the domain, f = -logit c = log q/p (TGDP Algorithms 1 and 2).

    Each domain counts one half whatever its number of samples, so the minimiser is the log ratio with no offset.
    ``smoothing`` is the probability with which each label is taken to be wrong (label smoothing): it bounds the
    minimiser, |f| <= log((1 - smoothing) / smoothing). Shapes: [A], [B] -> scalar.
    """
    plain = functional.softplus(source_log_ratio).mean() + functional.softplus(-target_log_ratio).mean()
    return 0.5 * (plain + smoothing * (target_log_ratio.mean() - source_log_ratio.mean()))


class DomainClassifier(nn.Module):
    """log q(x[, y]) / p(x[, y]) on clean data: a SiLU network whose output is minus the logit of c = P(source | x).

    Shapes: ``forward(x [B, ...], label_rows [B, K] or None) -> [B]``.
    """

    def __init__(self, num_features: int, num_classes: int = 0, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        sizes = [num_features + num_classes] + [width] * depth
        layers: list[nn.Module] = []
        for a, b in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(a, b), nn.SiLU()]
        self.network = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))

    def forward(self, x: Tensor, label_rows: Tensor | None = None) -> Tensor:
        features = x.flatten(1) if label_rows is None else torch.cat([x.flatten(1), label_rows], dim=1)
        result: Tensor = self.network(features)[:, 0]
        return result


@dataclass(frozen=True)
class DensityRatio:
    """Cross-fitted log ratios: no sample's logit comes from a classifier that was trained or selected on it.

    Calibration adds two numbers, a slope and a shift, that all samples decide together.

    Attributes:
        source_log_ratio, target_log_ratio: calibrated log r at the source [M] and target [N] samples.
        source_logit, target_logit: the same before calibration and normalisation.
        slope: factor in [0.03, 1] that calibration put on the logits; well below 1 means that the classifiers were
            overconfident.
        mean_ratio: mean of r over the source after calibration, before it was normalised to 1.
        classifiers: one per fold.
    """

    source_log_ratio: Tensor
    target_log_ratio: Tensor
    source_logit: Tensor
    target_logit: Tensor
    slope: float
    mean_ratio: float
    classifiers: Sequence[nn.Module] = field(repr=False)


def fit_density_ratio(
    source: Tensor,
    target: Tensor,
    *,
    source_labels: Tensor | None = None,
    target_labels: Tensor | None = None,
    folds: int = 5,
    width: int = 64,
    depth: int = 2,
    build: Callable[[], nn.Module] | None = None,
    settings: Optimisation | None = None,
    clip: float = 10.0,
    seed: int = 0,
    progress: bool = False,
) -> DensityRatio:
    """Domain classifier on clean data (TGDP Algorithm 1), cross-fitted over folds.

    Each fold's classifier is trained on the other folds with balanced batches, for a fixed number of steps: stopping it
    where its held-out loss is least would choose by the very samples whose values are reported, and find a difference
    between equal domains. Few steps and weight decay keep it from overfitting instead (:data:`DEFAULT_SETTINGS`, chosen
    by the error of log r and of its mean on the paper's simulation, for all its numbers of target samples, and by an
    AUC of one half on equal domains). The pooled held-out logits are then calibrated by one slope, at most 1 (more
    would sharpen noise), and shifted so that the mean ratio over the source is 1, which holds for the true ratio
    (E_p[r] = 1).

    Args:
        source, target: [M, ...], [N, ...].
        source_labels, target_labels: rows [., K], for the ratio q(x, y) / p(x, y).
        folds: reduced when there are fewer target samples.
        width, depth: of each classifier.
        build: makes an untrained classifier of another architecture, (x [B, ...], label rows [B, K] or None) -> logit
            [B]; default a :class:`DomainClassifier` of ``width`` and ``depth``.
        settings: of the optimisation; default :data:`DEFAULT_SETTINGS`.
        clip: log r is limited to [-clip, clip].
        seed: of folds, weights and batches.
        progress: show a bar per fold.
    """
    folds = min(check_integer("folds", folds, 2), len(target), len(source))
    settings = settings or DEFAULT_SETTINGS
    generator = torch.Generator().manual_seed(seed)
    source_fold = _stratified_folds(len(source), folds, source_labels, generator)
    target_fold = _stratified_folds(len(target), folds, target_labels, generator)
    source_logit, target_logit = torch.zeros(len(source)), torch.zeros(len(target))
    classifiers = []
    num_classes = 0 if source_labels is None else source_labels.shape[1]
    for fold in range(folds):
        data = [(source, source_labels, source_fold != fold), (target, target_labels, target_fold != fold)]
        fold_seed = derived_seed(seed, f"fold {fold}")
        with seeded_initialisation(fold_seed):
            new = DomainClassifier(source[0].numel(), num_classes, width, depth) if build is None else build()
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
    """Fold of each sample [count], sizes equal to within one, and so for each class where labels are given."""
    order = torch.randperm(count, generator=generator)
    if labels is not None:
        order = order[torch.argsort(labels.argmax(1).cpu()[order], stable=True)]
    result = torch.empty(count, dtype=torch.long)
    result[order] = torch.arange(count) % folds
    return result


def _train_classifier(
    classifier: nn.Module,
    data: list[tuple[Tensor, Tensor | None, Tensor]],
    settings: Optimisation,
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
        # Both domains in one call: batch normalisation must not see them apart.
        return logistic_loss(*classifier(*draw(generator)).chunk(2))

    optimise(classifier, loss, settings, seed=seed, progress=progress, description=description)
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in classifier.modules()):
        # Its running statistics are of the last weights, and what is kept is their average.
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # of dropout
            update_bn((draw(generator)[0] for _ in range(_CALIBRATION)), classifier)


def calibration_slope(source_logit: Tensor, target_logit: Tensor) -> float:
    """Factor in [0.03, 1] on held-out logits that minimises the balanced log loss: it tempers, and never sharpens."""
    slopes = torch.logspace(math.log10(0.03), 0.0, 61, dtype=torch.float64)
    losses = [logistic_loss(s * source_logit.double(), s * target_logit.double()).item() for s in slopes]
    return float(slopes[int(torch.tensor(losses).argmin())])


def effective_sample_size(log_weight: Tensor) -> float:
    """(sum r)^2 / sum r^2 from log r [M]: how many source samples the ratio-weighted source is worth."""
    weight = log_weight.double()
    return float(torch.exp(2 * torch.logsumexp(weight, 0) - torch.logsumexp(2 * weight, 0)))


def area_under_curve(negative: Tensor, positive: Tensor) -> float:
    """P(score of a positive > score of a negative), ties one half: the area under the ROC curve."""
    scores = torch.cat([negative, positive]).double()
    values, inverse, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    rank = torch.cumsum(counts, 0).double() - (counts.double() - 1) / 2
    total = rank[inverse][len(negative) :].sum().item()
    n, m = len(positive), len(negative)
    return (total - n * (n + 1) / 2) / (n * m)


def calibration_error(source_log_ratio: Tensor, target_log_ratio: Tensor, bins: int = 10) -> float:
    """Expected calibration error of P(target | x) with both domains weighted one half, over equal-width bins."""
    probability = torch.sigmoid(torch.cat([source_log_ratio, target_log_ratio]).double())
    weight = torch.cat(
        [
            torch.full((len(source_log_ratio),), 0.5 / len(source_log_ratio), dtype=torch.float64),
            torch.full((len(target_log_ratio),), 0.5 / len(target_log_ratio), dtype=torch.float64),
        ]
    )
    is_target = torch.cat([torch.zeros(len(source_log_ratio)), torch.ones(len(target_log_ratio))]).double()
    index = (probability * bins).long().clamp_max(bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, weight * (probability - is_target))
    return float(gap.abs().sum())


def outside_fraction(
    source: Tensor, target: Tensor, *, quantile: float = 0.999, limit: int = 10_000, seed: int = 0
) -> float:
    """Share of target samples farther from the source than all but ``1 - quantile`` of source samples are from each
    other.

    Distances are Euclidean to the nearest source sample, features scaled by the source's standard deviation. Uses at
    most ``limit`` source samples, a random subset chosen by ``seed``. A target that the source covers, even thinly,
    gives a small value.
    """
    if len(source) > limit:
        # Not the first ones: a source sorted by cluster would lack whole clusters.
        source = source[torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:limit]]
    source, target = source.flatten(1).float(), target.flatten(1).float()
    spread = source.std(0).clamp_min(1e-6)
    source, target = source / spread, target / spread
    own = torch.empty(len(source))
    for rows in torch.arange(len(source)).split(1000):
        distance = torch.cdist(source[rows], source)
        distance[torch.arange(len(rows)), rows] = math.inf
        own[rows] = distance.min(1).values.cpu()
    threshold = torch.quantile(own, quantile)
    nearest = torch.cat([torch.cdist(part, source).min(1).values.cpu() for part in target.split(1000)])
    return float((nearest > threshold).double().mean())


@dataclass
class TransferDiagnostics:
    """Can the target be reached from the source, and did the ratio come out right?

    Attributes:
        num_source, num_target: sample counts.
        auc: held-out area under the ROC curve of the domain classifier; 0.5: same domain, 1: separable.
        calibration_error: held-out expected calibration error after calibration.
        calibration_slope: factor put on the logits, at most 1; 1 is no correction.
        effective_sample_size: of r over the source.
        mean_ratio: E_p[r] before normalisation; should be near 1.
        outside_fraction: see :func:`outside_fraction`.
        mean_h: rows (t, E_p[h], its standard error) for the fitted guidance; E_p[h] = 1 when it is exact.
        warnings: plain sentences; empty when nothing looks wrong.
    """

    num_source: int
    num_target: int
    auc: float
    calibration_error: float
    calibration_slope: float
    effective_sample_size: float
    mean_ratio: float
    outside_fraction: float
    mean_h: list[tuple[float, float, float]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add_mean_h(self, rows: list[tuple[float, float, float]]) -> None:
        """Take the rows of ``mean_h``, and a warning where they are far from 1."""
        self.mean_h = rows
        wrong = [(t, mean) for t, mean, error in rows if mean + 3 * error < 0.2 or mean - 3 * error > 5.0]
        if wrong:
            t, mean = max(wrong, key=lambda row: abs(math.log(max(row[1], 1e-30))))
            self.warnings.append(
                f"the guidance does not hold: the mean of the fitted ratio h over the source is {mean:.2g} at "
                f"t = {t:.4g} and should be 1. It has learned the given target samples by heart; use fewer steps, "
                "more weight_decay, or a regression loss (poisson)."
            )

    def add_labels(self, source: Tensor, target: Tensor, num_classes: int) -> None:
        """A warning where target samples have classes that no source sample has; labels [N], or rows [N, K]."""
        has_source, has_target = ((encode_labels(labels, num_classes) > 0) for labels in (source, target))
        unseen = has_target.any(0) & ~has_source.any(0)
        if unseen.any():
            classes = ", ".join(str(k) for k in unseen.nonzero().flatten().tolist())
            affected = int(has_target[:, unseen].any(1).sum())
            self.warnings.append(
                f"do not use samples of class {classes}: {affected} of {self.num_target} target samples have it and no "
                "source sample does, so there is no density to re-weight. Add such samples to the source, or leave "
                "them out of the target."
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**vars(self), "mean_h": [list(row) for row in self.mean_h], "warnings": list(self.warnings)}

    def summary(self) -> str:
        """The numbers, without the warnings."""
        share = self.effective_sample_size / self.num_source
        size = f"{self.effective_sample_size:.0f} of {self.num_source} ({share:.1%})"
        if _far_from_one(self.mean_ratio):
            size = "none to speak of: the mean ratio is far from 1"
        elif self.outside_fraction > _MOST_OUTSIDE:
            size += ", which says nothing: the target lies outside the source"
        lines = [
            f"source {self.num_source} samples, target {self.num_target}",
            f"target samples outside the source: {self.outside_fraction:.0%} (few when the target is within reach)",
            f"domain classifier, held out: AUC {self.auc:.3f} (0.5: same domain, 1: separable), calibration error "
            f"{self.calibration_error:.3f}, calibration slope {self.calibration_slope:.2f} "
            + (
                "(says nothing at this AUC)"
                if self.auc < 0.55
                else "(1: no correction; well below 1: it was overconfident)"
            ),
            f"mean ratio over the source: {self.mean_ratio:.2g} (1 when exact)",
            f"effective sample size of the ratio: {size}",
        ]
        if self.mean_h:
            lines.append("mean of the fitted ratio h over the source under noise, E_p[h] (1 at every t when exact):")
            lines += [f"  t = {t:8.4g}   {_short(mean)} +- {_short(error).strip()}" for t, mean, error in self.mean_h]
        return "\n".join(lines)

    def __str__(self) -> str:
        return "\n".join([*(f"WARNING: {text}" for text in self.warnings), self.summary()])


#: Share of target samples outside the source from which on the target counts as out of reach.
_MOST_OUTSIDE = 0.34


def _short(value: float) -> str:
    """Three digits after the point, or three in all where there are many before it."""
    return f"{value:6.3f}" if abs(value) < 1000 else f"{value:6.3g}"


def _far_from_one(mean_ratio: float) -> bool:
    """Whether a ratio is wrong as a whole; sound fits to few samples reach from 0.3 to 3."""
    return not 0.1 <= mean_ratio <= 10


def diagnose(source: Tensor, target: Tensor, ratio: DensityRatio) -> TransferDiagnostics:
    """Diagnostics of a density ratio on clean data. Sources: TGDP section 3 (coverage), standard importance
    weighting.
    """
    size = effective_sample_size(ratio.source_log_ratio)
    outside = outside_fraction(source, target)
    auc = area_under_curve(ratio.source_logit, ratio.target_logit)
    warnings = []
    unreached, wrong = outside > _MOST_OUTSIDE, _far_from_one(ratio.mean_ratio)
    if unreached:
        warnings.append(
            f"do not use the samples: the target lies outside the source. {outside:.0%} of the target samples are "
            "farther from the source than source samples are from each other. TGDP re-weights what the source model "
            "can already produce; it cannot create what is not there. Use a broader source, or fine-tune."
        )
    if wrong:
        warnings.append(
            f"the density ratio is wrong: its mean over the source is {ratio.mean_ratio:.2g} and should be 1. Do not "
            "use the samples; the target is out of reach, or there are too few samples to tell."
        )
    elif size < 10:
        warnings.append(
            f"the density ratio rests on {size:.1f} effective source samples; expect samples of poor diversity, and do "
            "not trust likelihoods. More source data near the target would help most."
        )
    if len(target) < 10:
        warnings.append(
            f"{len(target)} target samples are very few: the guidance, and these diagnostics too, say little about the "
            "domain they come from. Compare the samples with what you know of it."
        )
    if auc > 0.999 and len(target) >= 10 and not unreached and not wrong:
        warnings.append(
            "the domains are perfectly separable for the classifier, so the ratio is not determined by the data; "
            "compare guided samples with held-out target data before use."
        )
    return TransferDiagnostics(
        num_source=len(source),
        num_target=len(target),
        auc=auc,
        calibration_error=calibration_error(ratio.source_log_ratio, ratio.target_log_ratio),
        calibration_slope=ratio.slope,
        effective_sample_size=size,
        mean_ratio=ratio.mean_ratio,
        outside_fraction=outside,
        warnings=warnings,
    )
