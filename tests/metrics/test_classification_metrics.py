"""AUC, F-max and bootstrap intervals against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tgdp_fast.metrics import bootstrap_interval, f_max, macro_auc, macro_auc_by_ranks, per_class_scores


def case(count: int, classes: int, seed: int, decimals: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Random statements and scores with ties; some records have none."""
    random = np.random.default_rng(seed)
    return random.integers(0, 2, (count, classes)), random.uniform(size=(count, classes)).round(decimals)


def auc_by_pairs(y: np.ndarray, score: np.ndarray) -> float:
    """Probability that a record with the class has the larger score, ties half."""
    pairs = [(a > b) + 0.5 * (a == b) for a in score[y == 1] for b in score[y == 0]]
    return sum(pairs) / len(pairs)


def f_by_definition(y: np.ndarray, score: np.ndarray, threshold: float) -> float:
    precisions, recalls = [], []
    for truth, found in zip(y, score, strict=True):
        own, given = set(np.flatnonzero(truth)), set(np.flatnonzero(found >= threshold))
        if given:
            precisions.append(len(own & given) / len(given))
        if own:
            recalls.append(len(own & given) / len(own))
    precision = sum(precisions) / len(precisions) if precisions else 0.0
    recall = sum(recalls) / len(recalls)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("seed", range(5))
def test_auc_counts_pairs(seed: int) -> None:
    y, score = case(17, 3, seed)
    found = macro_auc(y, score)
    expected = [auc_by_pairs(y[:, k], score[:, k]) for k in range(3)]
    assert found.per_class == pytest.approx(expected, abs=1e-12)
    assert found.value == pytest.approx(np.mean(expected), abs=1e-12)
    assert macro_auc_by_ranks(y, score) == pytest.approx(np.mean(expected), abs=1e-12)
    assert found.left_out == ()


def test_classes_with_one_value_are_left_out() -> None:
    y, score = case(11, 4, 0)
    y[:, 1], y[:, 3] = 0, 1
    found = macro_auc(y, score)
    assert found.left_out == (1, 3)
    assert np.isnan(found.per_class[[1, 3]]).all()
    assert found.value == pytest.approx((found.per_class[0] + found.per_class[2]) / 2)
    assert macro_auc_by_ranks(y, score) == pytest.approx(found.value, abs=1e-12)
    # One class with a curve is an own path of scikit-learn.
    assert macro_auc(y[:, :2], score[:, :2]).per_class[0] == pytest.approx(found.per_class[0])
    assert math.isnan(macro_auc_by_ranks(np.zeros((3, 2)), score[:3, :2]))
    assert math.isnan(macro_auc(np.zeros((3, 2)), score[:3, :2]).value)


@pytest.mark.parametrize("seed", range(5))
def test_f_max_is_the_largest_f_of_the_means(seed: int) -> None:
    y, score = case(13, 4, seed)
    y[0] = 0
    found = f_max(y, score)
    # The scores are tenths, so tenths are among the hundredths that are tried: both give the same.
    expected = max(f_by_definition(y, score, t) for t in np.unique(score) if t > 0)
    assert found.value == pytest.approx(expected, abs=1e-12)
    assert f_max(y, score, thresholds=None).value == pytest.approx(expected, abs=1e-12)
    assert f_by_definition(y, score, found.threshold) == pytest.approx(expected, abs=1e-12)
    mean = 2 * found.precision * found.recall / (found.precision + found.recall)
    assert mean == pytest.approx(found.value, abs=1e-12)


def test_f_max_by_hand() -> None:
    """At 0.6: precisions 1 (record 0), none (record 1), 1/2 (record 2): 3/4; recalls 1/2, 0, 1: 1/2. F = 0.6."""
    y = np.array([[1, 1, 0], [0, 0, 1], [1, 0, 0]])
    score = np.array([[0.6, 0.1, 0.0], [0.2, 0.3, 0.1], [0.9, 0.7, 0.0]])
    assert f_by_definition(y, score, 0.6) == pytest.approx(0.6)
    assert f_max(y, score, thresholds=6).value == pytest.approx(
        max(f_by_definition(y, score, t / 5) for t in range(1, 6))
    )
    assert f_max(y, y.astype(float)).value == 1.0
    assert f_max(y, np.zeros((3, 3))).value == 0.0
    # In parts as at once.
    wide = case(5, 7, 3)
    whole = f_max(*wide, thresholds=1001)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tgdp_fast.metrics.classification._VALUES", 35 * 10)
        assert f_max(*wide, thresholds=1001) == whole


def test_per_class_scores_are_counts() -> None:
    y, score = case(19, 3, 2)
    y[:, 2] = 0
    rows = per_class_scores(y, score, ["NORM", "AFIB", "PVC"], threshold=0.4)
    for k, row in enumerate(rows[:2]):
        given, truth = score[:, k] >= 0.4, y[:, k] == 1
        right = (given & truth).sum()
        assert (row.positives, row.precision) == (truth.sum(), pytest.approx(right / given.sum()))
        assert row.recall == pytest.approx(right / truth.sum())
        assert row.f1 == pytest.approx(2 / (1 / row.precision + 1 / row.recall))
        assert row.auc == pytest.approx(auc_by_pairs(y[:, k], score[:, k]))
    assert [row.name for row in rows] == ["NORM", "AFIB", "PVC"]
    assert all(math.isnan(v) for v in (rows[2].auc, rows[2].f1, rows[2].recall))
    assert rows[2].precision == 0.0
    assert math.isnan(per_class_scores(y, score, threshold=2.0)[0].precision)


def test_the_interval_of_a_mean() -> None:
    """The percentile interval of a mean of 0 / 1 values is the binomial one, +- 1.96 sqrt(p (1 - p) / n)."""
    n, p = 400, 0.3
    y = np.zeros((n, 1), int)
    y[: int(p * n)] = 1
    found = bootstrap_interval(lambda y, _: float(y.mean()), y, y.astype(float), num=2000, seed=1)
    half = 1.96 * math.sqrt(p * (1 - p) / n)
    assert found.value == p
    # A quantile near 2.5 % of 2000 draws has a standard error of 0.06 standard deviations.
    assert found.low == pytest.approx(p - half, abs=0.2 * half)
    assert found.high == pytest.approx(p + half, abs=0.2 * half)
    assert (found.confidence, found.num, found.rejected) == (0.95, 2000, 0)
    narrow = bootstrap_interval(lambda y, _: float(y.mean()), y, y.astype(float), num=2000, seed=1, confidence=0.5)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.6745 / 1.96 * half, rel=0.2)
    assert bootstrap_interval(lambda y, _: float(y.mean()), y, y.astype(float), num=50, seed=2) == bootstrap_interval(
        lambda y, _: float(y.mean()), y, y.astype(float), num=50, seed=2
    )


def test_resamplings_without_a_class_are_drawn_anew() -> None:
    """A class of one record of ten vanishes from a resampling with probability 0.9^10 = 0.35."""
    y = np.zeros((10, 3), int)
    y[:, 0], y[0, 1] = np.arange(10) % 2, 1  # Class 2 has no record at all: nothing can vanish.
    seen: list[int] = []

    def statistic(y: np.ndarray, score: np.ndarray) -> float:
        seen.append(int(y[:, 1].sum()))
        return macro_auc(y, score).value

    found = bootstrap_interval(statistic, y, np.random.default_rng(0).uniform(size=(10, 3)), num=300)
    assert min(seen) >= 1
    assert found.num == 300
    share = found.rejected / (found.rejected + 300)
    assert share == pytest.approx(0.9**10, abs=4 * math.sqrt(0.35 * 0.65 / 460))
    assert found.low <= found.value <= found.high
    # One record with, one without: of the four resamplings two will do.
    tiny = bootstrap_interval(lambda y, s: 1.0, np.array([[1], [0]]), np.zeros((2, 1)), num=10)
    assert (tiny.low, tiny.high) == (1.0, 1.0)


def test_bad_arguments() -> None:
    y, score = case(5, 2, 0)
    with pytest.raises(ValueError, match=r"one shape \[N, K\] .* got \[5, 2\] and \[5, 1\]"):
        macro_auc(y, score[:, :1])
    with pytest.raises(ValueError, match="y must hold 0 and 1 only"):
        macro_auc(y + 0.5, score)
    with pytest.raises(ValueError, match="score must be finite, but 1 values"):
        macro_auc(y, _with_nan(score))
    with pytest.raises(ValueError, match=r"score must be in \[0, 1\]"):
        f_max(y, score + 1)
    with pytest.raises(ValueError, match="recall is not defined"):
        f_max(np.zeros((5, 2)), score)
    with pytest.raises(ValueError, match="names must be one for each of 2 classes, got 1"):
        per_class_scores(y, score, ["a"])
    with pytest.raises(ValueError, match="confidence must be"):
        bootstrap_interval(lambda y, s: 0.0, y, score, confidence=1.0)


def _with_nan(score: np.ndarray) -> np.ndarray:
    changed = score.copy()
    changed[1, 1] = np.nan
    return changed
