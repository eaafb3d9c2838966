"""Whether a density ratio can be trusted: diagnostics of source and target before sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tgdp_fast.fit.density_ratio import DensityRatio
from tgdp_fast.models.mlp import encode_labels
from tgdp_fast.runtime.arrays import without_copies


def effective_sample_size(log_weight: Tensor) -> float:
    """(sum r)^2 / sum r^2 from log r [M]: the number of samples that the ratio-weighted source is worth."""
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
    pairs = ((source_log_ratio, 0.0), (target_log_ratio, 1.0))
    is_target = torch.cat([torch.full_like(one, value, dtype=torch.float64) for one, value in pairs])
    weight = torch.cat([torch.full_like(one, 0.5 / len(one), dtype=torch.float64) for one, _ in pairs])
    index = (probability * bins).long().clamp_max(bins - 1)
    gap = weight.new_zeros(bins).index_add_(0, index, weight * (probability - is_target))
    return float(gap.abs().sum())


def outside_fraction(
    source: Tensor, target: Tensor, *, quantile: float = 0.999, limit: int = 10_000, seed: int = 0
) -> float:
    """Share of target samples farther from the source than all but ``1 - quantile`` of source samples are from each
    other.

    Distances are Euclidean to the nearest source sample, features scaled by the source's standard deviation. Uses at
    most ``limit`` source samples, a random subset chosen by ``seed``; of these only distinct ones if more than a tenth
    are copies, whose distance to each other says nothing. The value is small if the source covers the target, even
    thinly.
    """
    if len(source) > limit:
        # A random subset: the first samples of a source sorted by cluster would lack whole clusters.
        generator = torch.Generator("cpu").manual_seed(seed)
        source = source[torch.randperm(len(source), generator=generator, device="cpu")[:limit]]
    source, target = source.flatten(1).float(), target.flatten(1).float()
    source = without_copies(source)
    if len(source) == 1:
        return float((target != source).any(1).double().mean())
    spread = source.std(0).clamp_min(1e-6)
    source, target = source / spread, target / spread
    own = torch.empty(len(source), dtype=torch.float32, device="cpu")
    for rows in torch.arange(len(source), device="cpu").split(1000):
        distance = torch.cdist(source[rows], source)
        distance[torch.arange(len(rows), device="cpu"), rows] = math.inf
        own[rows] = distance.min(1).values.cpu()
    threshold = torch.quantile(own, quantile)
    nearest = torch.cat([torch.cdist(part, source).min(1).values.cpu() for part in target.split(1000)])
    return float((nearest > threshold).double().mean())


@dataclass
class TransferDiagnostics:
    """Is the target within reach of the source, and is the ratio correct?

    Attributes:
        num_source, num_target: sample counts.
        auc: held-out area under the ROC curve of the domain classifier; 0.5: same domain, 1: separable.
        calibration_error: held-out expected calibration error after calibration.
        calibration_slope: factor applied to the logits, at most 1; 1 is no correction.
        effective_sample_size: of r over the source.
        mean_ratio: E_p[r] before normalization; should be near 1.
        outside_fraction: see :func:`outside_fraction`.
        mean_h: rows (t, E_p[h], its standard error) for the fitted guidance; E_p[h] = 1 if it is exact.
        warnings: plain sentences; empty if nothing looks wrong.
        within_reach: a property: False where the source does not cover the target at all, so that samples must not be
            used.
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

    @property
    def within_reach(self) -> bool:
        """Whether the target lies within the source and the ratio has about the right mean."""
        return is_within_reach(self.outside_fraction, self.mean_ratio)

    def add_mean_h(self, rows: list[tuple[float, float, float]]) -> None:
        """Set the rows of ``mean_h``, and add a warning if they are far from 1, unless the target is out of reach:
        then h cannot hold, and other warnings say why.
        """
        self.mean_h = rows
        wrong = [(t, mean) for t, mean, error in rows if mean + 3 * error < 0.2 or mean - 3 * error > 5.0]
        if wrong and self.within_reach:
            t, mean = max(wrong, key=lambda row: abs(math.log(max(row[1], 1e-30))))
            self.warnings.append(
                f"the guidance does not hold: the mean of the fitted ratio h over the source is {_plainly(mean)} at "
                f"t = {t:.4g} and should be 1. It has learned the given target samples by heart; use fewer steps, "
                "more weight_decay, or a regression loss (poisson)."
            )

    def add_labels(self, source: Tensor, target: Tensor, num_classes: int) -> None:
        """Add a warning if target samples have classes that no source sample has; labels [N], or rows [N, K]."""
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
            f"mean ratio over the source: {_plainly(self.mean_ratio)} (1 when exact)",
            f"effective sample size of the ratio: {size}",
        ]
        if self.mean_h:
            lines.append("mean of the fitted ratio h over the source under noise, E_p[h] (1 at every t when exact):")
            lines += [f"  t = {t:8.4g}   {_with_error(mean, error)}" for t, mean, error in self.mean_h]
        return "\n".join(lines)

    def __str__(self) -> str:
        return "\n".join([*(f"WARNING: {text}" for text in self.warnings), self.summary()])


#: The target counts as out of reach above this share of target samples outside the source.
_MOST_OUTSIDE = 0.34


def is_within_reach(outside_fraction: float | None, mean_ratio: float | None) -> bool:
    """Whether the source covers the target at all, as far as these numbers are known."""
    return (outside_fraction or 0.0) <= _MOST_OUTSIDE and (mean_ratio is None or not _far_from_one(mean_ratio))


def _plainly(value: float) -> str:
    """Two digits of a mean that should be 1; where it is off by 10,000 the digits say nothing."""
    return "below 0.0001" if value < 1e-4 else "above 10,000" if value > 1e4 else f"{value:.2g}"


def _with_error(mean: float, error: float) -> str:
    """The mean with its standard error, three decimals, where they say something."""
    return f"{mean:6.3f} +- {error:.3f}" if 1e-4 <= mean <= 1e4 else _plainly(mean)


def _far_from_one(mean_ratio: float) -> bool:
    """Whether a ratio is wrong as a whole; sound fits to few samples range from 0.3 to 3."""
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
            f"the density ratio is wrong: its mean over the source is {_plainly(ratio.mean_ratio)} and should be 1. Do "
            "not use the samples; the target is out of reach, or there are too few samples to tell."
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
