"""Multi-label classification metrics as in the PTB-XL benchmark: macro AUC, sample-centric F-max, intervals.

Source: Strodthoff et al., "Deep Learning for ECG Analysis: Benchmarks and Insights from PTB-XL", IEEE Journal of
Biomedical and Health Informatics 25 (2021), section III. F-max is that of CAFA (Radivojac et al., "A large-scale
evaluation of computational protein function prediction", Nature Methods 10, 2013).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tgdp_fast.runtime.arrays import as_array
from tgdp_fast.runtime.checks import check_integer, check_number, check_seed
from tgdp_fast.runtime.optional import optional

_VALUES = 8_000_000  # booleans (thresholds x records x classes) in memory at once
_TRIES = 100  # resamples drawn at most per requested one


@dataclass(frozen=True)
class MacroAUC:
    """Mean area under the ROC curve over classes.

    Attributes:
        value: the mean over the classes that have both values; NaN if there are none.
        per_class: [K], NaN for classes that are left out.
        left_out: indices of classes without a curve, because all records have the same value.
    """

    value: float
    per_class: np.ndarray
    left_out: tuple[int, ...]


@dataclass(frozen=True)
class FMax:
    """The largest F over thresholds, with ``precision`` and ``recall`` at its ``threshold``."""

    value: float
    threshold: float
    precision: float
    recall: float


@dataclass(frozen=True)
class ClassScore:
    """One class: number of its records, area under the ROC curve, and F1, precision and recall at a threshold."""

    name: str
    positives: int
    auc: float
    f1: float
    precision: float
    recall: float


@dataclass(frozen=True)
class Interval:
    """A statistic with its bootstrap interval.

    Attributes:
        value: of the statistic on the original records.
        low, high: the interval; NaN if no resample could be used.
        confidence: its level.
        num: number of resamples used.
        rejected: number of resamples drawn again because a class had vanished.
    """

    value: float
    low: float
    high: float
    confidence: float
    num: int
    rejected: int


def macro_auc(y: np.ndarray, score: np.ndarray) -> MacroAUC:
    """Macro AUC over the classes that have both values; the others are listed.

    Args:
        y: statements [N, K] of 0 and 1.
        score: probabilities or any other scores [N, K]; ties count half.

    Raises:
        ValueError: other shapes or values.
        ImportError: scikit-learn is missing.
    """
    y, score = _pair(y, score)
    roc_auc_score = optional("sklearn.metrics", "the area under the ROC curve needs").roc_auc_score
    both = y.any(axis=0) & ~y.all(axis=0)
    per_class = np.full(y.shape[1], np.nan)
    if both.any():
        per_class[both] = roc_auc_score(y[:, both], score[:, both], average=None)
    value = float(per_class[both].mean()) if both.any() else float("nan")
    return MacroAUC(value, per_class, tuple(int(column) for column in np.flatnonzero(~both)))


def macro_auc_by_ranks(y: np.ndarray, score: np.ndarray) -> float:
    """``macro_auc(y, score).value`` from the ranks of the scores (Mann-Whitney).

    The result is the same. For a few thousand records it is at least ten times faster than scikit-learn, which matters
    for a bootstrap.

    Raises:
        ValueError: other shapes or values.
        ImportError: scipy is missing.
    """
    y, score = _pair(y, score)
    rankdata = optional("scipy.stats", "ranks need").rankdata
    both = y.any(axis=0) & ~y.all(axis=0)
    if not both.any():
        return float("nan")
    truth, ranks = y[:, both], rankdata(score[:, both], axis=0)
    positives = truth.sum(axis=0)
    pairs = (ranks * truth).sum(axis=0) - positives * (positives + 1) / 2
    return float((pairs / (positives * (len(truth) - positives))).mean())


def f_max(y: np.ndarray, score: np.ndarray, thresholds: int | None = 101) -> FMax:
    """Sample-centric F-max: the largest harmonic mean of precision and recall over thresholds.

    At a threshold, a record is assigned the classes whose score is at least the threshold. Precision is the mean over
    the records that are assigned a class, recall the mean over the records that have one. F is computed from these
    means.

    Args:
        y: statements [N, K] of 0 and 1.
        score: probabilities [N, K] in [0, 1].
        thresholds: number of evenly spaced thresholds from 0 to 1, without 0 itself. None tries every score, which is
            exact but slow for many records. The difference is small: the default has steps of 0.01, as in CAFA.

    Raises:
        ValueError: other shapes or values, or no record has a class.
    """
    y, score = _pair(y, score)
    if not ((score >= 0) & (score <= 1)).all():
        raise ValueError(f"score must be in [0, 1], got values from {score.min()} to {score.max()}")
    if not y.any():
        raise ValueError("y must have at least one record with a class, got only zeros: recall is not defined")
    if thresholds is None:
        levels = np.unique(score)
        levels = levels[levels > 0] if (levels > 0).any() else np.array([1.0])
    else:
        levels = np.linspace(0.0, 1.0, check_integer("thresholds", thresholds, 2))[1:]
    classes = y.sum(axis=1)
    has = classes > 0
    precision, recall = np.zeros(len(levels)), np.zeros(len(levels))
    step = max(1, _VALUES // score.size)
    for start in range(0, len(levels), step):
        part = slice(start, start + step)
        given = score[None] >= levels[part, None, None]  # [thresholds, N, K]
        right = (given & y[None]).sum(axis=2)
        number = given.sum(axis=2)
        answered = (number > 0).sum(axis=1)
        precision[part] = (right / np.maximum(number, 1)).sum(axis=1) / np.maximum(answered, 1)
        recall[part] = (right[:, has] / classes[has]).mean(axis=1)
    total = precision + recall
    value = np.where(total > 0, 2.0 * precision * recall / np.where(total > 0, total, 1.0), 0.0)
    best = int(value.argmax())
    return FMax(float(value[best]), float(levels[best]), float(precision[best]), float(recall[best]))


def per_class_scores(
    y: np.ndarray, score: np.ndarray, names: Sequence[str] | None = None, threshold: float = 0.5
) -> list[ClassScore]:
    """AUC of each class, and F1, precision and recall at one common threshold.

    Undefined values are NaN: the AUC of a class in which all records have the same value, F1 and recall of a class that
    no record has, and precision of a class that no record is assigned.

    Args:
        y: statements [N, K] of 0 and 1.
        score: probabilities [N, K].
        names: of the classes; default: their indices.
        threshold: a class is assigned if its score is at least this; for example ``f_max(...).threshold``.

    Raises:
        ValueError: other shapes or values.
        ImportError: scikit-learn is missing.
    """
    auc = macro_auc(y, score).per_class
    y, score = _pair(y, score)
    names = [str(column) for column in range(y.shape[1])] if names is None else list(names)
    if len(names) != y.shape[1]:
        raise ValueError(f"names must be one for each of {y.shape[1]} classes, got {len(names)}")
    given = score >= check_number("threshold", threshold)
    right, positives, answers = (y & given).sum(axis=0), y.sum(axis=0), given.sum(axis=0)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN, see the docstring
        precision, recall = right / answers, right / positives
        f1 = np.where(positives > 0, 2 * right / (positives + answers), np.nan)
    return [
        ClassScore(name, int(positives[k]), float(auc[k]), float(f1[k]), float(precision[k]), float(recall[k]))
        for k, name in enumerate(names)
    ]


def bootstrap_interval(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    y: np.ndarray,
    score: np.ndarray,
    *,
    num: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of a statistic, resampling the records.

    As in the benchmark, a resample is drawn again if a class has vanished from it, or if all its records have a class
    that not all original records have. With classes of few records this makes the interval slightly too narrow;
    ``rejected`` counts these cases. After 100 draws per requested resample, those found so far are used. Resamples with
    a NaN statistic are left out.

    Args:
        statistic: statistic(y, score) -> number, such as :func:`macro_auc_by_ranks`, or
            ``lambda y, score: f_max(y, score).value``.
        y: statements [N, K] of 0 and 1.
        score: scores [N, K].
        num: number of resamples; the benchmark has 100.
        seed: methods with the same seed and y use the same resamples.
        confidence: level of the interval, in (0, 1).

    Raises:
        ValueError: other shapes or values.
    """
    y, score = _pair(y, score)
    check_integer("num", num, 1)
    check_number("confidence", confidence, 0.0, 1.0, exclusive=True)
    random = np.random.default_rng(check_seed(seed))
    present, absent = y.any(axis=0), ~y.all(axis=0)
    values: list[float] = []
    drawn = 0
    while len(values) < num and drawn < _TRIES * num:
        rows = random.integers(len(y), size=len(y))
        drawn += 1
        found = y[rows]
        if found[:, present].any(axis=0).all() and not found[:, absent].all(axis=0).any():
            values.append(float(statistic(found.astype(np.int64), score[rows])))
    rejected = drawn - len(values)
    usable = np.array(values)[np.isfinite(values)]
    low, high = float("nan"), float("nan")
    if len(usable):
        low, high = (float(v) for v in np.quantile(usable, [(1 - confidence) / 2, (1 + confidence) / 2]))
    value = float(statistic(y.astype(np.int64), score))
    return Interval(value, low, high, float(confidence), len(usable), rejected)


def _pair(y: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Booleans [N, K] and float64 [N, K]."""
    truth, found = as_array("y", y), as_array("score", score)
    if truth.ndim != 2 or truth.shape != found.shape or truth.size == 0:
        raise ValueError(
            f"y and score must be of one shape [N, K] with N, K >= 1, got {list(truth.shape)} and {list(found.shape)}"
        )
    if not np.isin(truth, (0, 1)).all():
        raise ValueError("y must hold 0 and 1 only; round soft labels first")
    found = found.astype(np.float64)
    if not np.isfinite(found).all():
        raise ValueError(f"score must be finite, but {int((~np.isfinite(found)).sum())} values are not")
    return truth.astype(bool), found
