"""Density ratios: losses by their minimisers, classifier and diagnostics against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tgdp_fast import TrainingConfig
from tgdp_fast.data.gaussians import GaussianMixture, log_density_ratio, paper_source, paper_target
from tgdp_fast.fit.density_ratio import DensityRatio, calibration_slope, fit_density_ratio
from tgdp_fast.fit.diagnostics import (
    TransferDiagnostics,
    area_under_curve,
    calibration_error,
    diagnose,
    effective_sample_size,
    outside_fraction,
)
from tgdp_fast.fit.losses import LogMSE, Poisson, RatioLoss, RatioMSE, bounded_exp, logistic_loss


def minimizer(loss_of_f: object) -> float:
    """Argument of the minimum of a scalar convex function, by a fine grid and one parabola."""
    grid = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    values = torch.stack([loss_of_f(f) for f in grid])  # type: ignore[operator]
    i = int(values.argmin())
    a, b, c = values[i - 1 : i + 2].tolist()
    return float(grid[i]) + 0.5 * (a - c) / (a - 2 * b + c) * 0.001


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (RatioMSE, lambda r: r.mean().log()),
        (Poisson, lambda r: r.mean().log()),
        (LogMSE, lambda r: r.log().mean()),
    ],
)
def test_minimizers(loss: type[RatioLoss], expected: object) -> None:
    """At one x_t seen with several x_0, the minimizer is log E[r] (or E[log r])."""
    log_r = torch.tensor([-1.3, 0.2, 0.9, 1.7], dtype=torch.float64)
    found = minimizer(lambda f: loss.per_sample(f.expand(4), log_r).mean())
    assert found == pytest.approx(float(expected(log_r.exp())), abs=1e-5)  # type: ignore[operator]


def test_logistic_minimizer_is_the_log_ratio_whatever_the_sample_sizes() -> None:
    """A place that holds 30 % of the target and 5 % of the source: f = log 6, with 7 or 700 target samples."""
    for repeat in (1, 100):
        target = torch.tensor([1.0] * 3 + [0.0] * 7, dtype=torch.float64).repeat(repeat)
        source = torch.tensor([1.0] * 1 + [0.0] * 19, dtype=torch.float64)
        # Elsewhere f is fixed at its own optimum, log(0.7 / 0.95); only f at the place varies.
        other = math.log(0.7 / 0.95)

        def loss(f: Tensor, source: Tensor = source, target: Tensor = target, other: float = other) -> Tensor:
            return logistic_loss(source * f + (1 - source) * other, target * f + (1 - target) * other)

        assert minimizer(loss) == pytest.approx(math.log(6.0), abs=1e-5)


def test_bounded_exp_is_exp_with_a_tangent_beyond_its_limit() -> None:
    f = torch.tensor([-math.inf, -5.0, 0.0, 29.5, 30.0, 30.5, 500.0], dtype=torch.float64, requires_grad=True)
    value = bounded_exp(f)
    edge = math.exp(30)
    expected = [0.0, math.exp(-5), 1.0, math.exp(29.5), edge, 1.5 * edge, 471 * edge]
    torch.testing.assert_close(value.detach(), torch.tensor(expected, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(value.sum(), f)
    # The slope of exp up to the limit, where both pieces meet, and that of the limit from there on.
    slope = [0.0, math.exp(-5), 1.0, math.exp(29.5), edge, edge, edge]
    torch.testing.assert_close(gradient, torch.tensor(slope, dtype=torch.float64))
    assert float(bounded_exp(torch.tensor(12.0), 10.0)) == pytest.approx(3 * math.exp(10), rel=1e-6)


@pytest.mark.parametrize("loss", [RatioMSE, Poisson, LogMSE])
@pytest.mark.parametrize("start", [31.0, 500.0, 1e6])
def test_losses_lead_back_from_any_height_without_overflow(loss: type[RatioLoss], start: float) -> None:
    f = torch.tensor([start], requires_grad=True)
    value = loss.per_sample(f, torch.tensor([1.0])).mean()
    (gradient,) = torch.autograd.grad(value, f)
    assert value.isfinite()
    assert gradient.isfinite()
    assert float(gradient) > 0


def test_effective_sample_size() -> None:
    assert effective_sample_size(torch.zeros(7)) == pytest.approx(7)
    assert effective_sample_size(torch.tensor([0.0, -1e9, -1e9])) == pytest.approx(1)
    weights = torch.tensor([1.0, 2.0, 5.0])
    assert effective_sample_size(weights.log() + 300) == pytest.approx(64 / 30, rel=1e-5)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=20), st.lists(st.integers(-3, 3), min_size=1, max_size=20))
def test_area_under_curve_counts_pairs(negative: list[int], positive: list[int]) -> None:
    pairs = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positive for n in negative]
    found = area_under_curve(torch.tensor(negative), torch.tensor(positive))
    assert found == pytest.approx(sum(pairs) / len(pairs))


def test_calibration_of_exact_and_of_overconfident_ratios() -> None:
    source, target = GaussianMixture([[0.0]], 1.0), GaussianMixture([[1.0]], 1.0)
    x, y = source.sample(20_000, seed=1), target.sample(5_000, seed=2)
    at_source = log_density_ratio(target, source, x)
    at_target = log_density_ratio(target, source, y)
    # 20 cells with standard error at most sqrt(0.25 / 5000 / 2 / 2) = 0.0035 each, weighted to one.
    assert calibration_error(at_source, at_target) < 0.012
    assert calibration_error(4 * at_source, 4 * at_target) > 0.1
    assert calibration_slope(at_source, at_target) == pytest.approx(1.0, abs=0.08)
    assert calibration_slope(4 * at_source, 4 * at_target) == pytest.approx(0.25, rel=0.08)
    # Timid logits stay as they are.
    assert calibration_slope(0.4 * at_source, 0.4 * at_target) == 1.0


def test_outside_fraction() -> None:
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(3000, 3, generator=generator)
    inside = torch.randn(500, 3, generator=generator)
    assert outside_fraction(source, inside) < 0.01  # expected 0.001
    assert outside_fraction(source, inside + torch.tensor([0.0, 12.0, 0.0])) == 1.0
    mixed = torch.cat([inside[:100], inside[100:200] + 12.0])
    assert outside_fraction(source, mixed) == pytest.approx(0.5, abs=0.02)
    # The unit of a feature does not matter.
    scale = torch.tensor([1.0, 1e4, 1e-3])
    assert outside_fraction(source * scale, mixed * scale) == pytest.approx(0.5, abs=0.02)


def test_outside_fraction_of_a_source_sorted_by_cluster() -> None:
    """A source above ``limit`` is thinned, not cut off: its last cluster covers the target."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(3000, 2, generator=generator)
    source[2000:] += 30.0
    target = torch.randn(200, 2, generator=generator) + 30.0
    # Half as many neighbours, among which the farthest of 1000 is as far out: about 0.001 again.
    assert outside_fraction(source, target, limit=1500) < 0.03
    assert outside_fraction(source, target, limit=1500) == outside_fraction(source, target, limit=1500, seed=0)


SETTINGS = TrainingConfig(steps=200, batch_size=256, learning_rate=3e-3, weight_decay=0.01, ema_decay=0.9, warmup=5)


def test_fitted_ratio_against_the_exact_one() -> None:
    source, target = GaussianMixture([[0.0, 0.0]], 1.0), GaussianMixture([[0.8, 0.0]], 1.0)
    x, y = source.sample(3000, seed=1), target.sample(1000, seed=2)
    ratio = fit_density_ratio(x, y, settings=SETTINGS, seed=3)
    exact = log_density_ratio(target, source, x)
    error = (ratio.source_log_ratio - exact).square().mean().sqrt()
    assert float(error) < 0.25 < float(exact.std())
    assert float(ratio.source_log_ratio.exp().mean()) == pytest.approx(1.0, abs=1e-4)
    report = diagnose(x, y, ratio)
    # AUC of two unit Gaussians at distance d: Phi(d / sqrt 2) = 0.714; E_p[r^2] = e^(d^2), ESS = M e^(-0.64) = 1582.
    assert report.auc == pytest.approx(0.714, abs=0.03)
    assert report.effective_sample_size == pytest.approx(3000 * math.exp(-0.64), rel=0.25)
    assert report.calibration_error < 0.06
    assert report.warnings == []


def folds_of(ratio: DensityRatio, logit: Tensor, x: Tensor, labels: Tensor | None = None) -> Tensor:
    """Fold of each sample: that of the one classifier which gave its logit."""
    with torch.no_grad():
        outputs = torch.stack([classifier(x, labels) for classifier in ratio.classifiers])
    # Rows in other batches may differ by rounding; two classifiers differ by far more.
    close = torch.isclose(outputs, logit, rtol=1e-4, atol=1e-6)
    assert (close.sum(0) == 1).all()
    return close.int().argmax(0)


def test_no_sample_has_any_part_in_the_classifier_that_judges_it() -> None:
    """Whatever the held-out samples are, training on the rest and its length are the same to the bit."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 3, generator=generator), torch.randn(25, 3, generator=generator) + 1
    settings = TrainingConfig(steps=60, batch_size=32, learning_rate=1e-2, ema_decay=0.9, warmup=5)
    ratio = fit_density_ratio(x, y, settings=settings)
    in_x, in_y = folds_of(ratio, ratio.source_logit, x), folds_of(ratio, ratio.target_logit, y)
    assert torch.bincount(in_x).tolist() == [12] * 5
    assert torch.bincount(in_y).tolist() == [5] * 5
    for fold in (0, 3):
        changed_x, changed_y = x.clone(), y.clone()
        changed_x[in_x == fold] += 5  # Now the held-out domains lie the other way round.
        changed_y[in_y == fold] -= 5
        other = fit_density_ratio(changed_x, changed_y, settings=settings)
        same = [
            all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
            for first, second in zip(ratio.classifiers, other.classifiers, strict=True)
        ]
        assert same == [k == fold for k in range(5)]


def test_equal_domains_are_not_told_apart() -> None:
    """300 and 10 samples of one Gaussian: AUC one half on average, and a slope that flattens the noise."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for seed in range(4):
        x, y = torch.randn(300, 2, generator=generator), torch.randn(10, 2, generator=generator)
        ratio = fit_density_ratio(x, y, folds=3, seed=seed)
        found.append(area_under_curve(ratio.source_logit, ratio.target_logit))
        assert ratio.slope < 0.7
    # Standard error of one AUC: sqrt((300 + 10 + 1) / (12 * 300 * 10)) = 0.093, of the mean of four 0.047. Stopping
    # early on the reported fold gave 0.65.
    assert sum(found) / len(found) == pytest.approx(0.5, abs=0.12)


def test_memorized_samples_are_not_held_out_ones() -> None:
    """Same domain twice: a classifier that saw the samples it judges would separate them, cross-fitting cannot."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 30, generator=generator), torch.randn(40, 30, generator=generator)
    ratio = fit_density_ratio(x, y, settings=SETTINGS)
    # Standard error of the AUC at 60 x 40: about sqrt((60 + 40 + 1) / (12 * 60 * 40)) = 0.06.
    assert area_under_curve(ratio.source_logit, ratio.target_logit) == pytest.approx(0.5, abs=0.18)
    assert ratio.slope < 0.6


def test_folds_are_alike_for_every_class() -> None:
    generator = torch.Generator().manual_seed(0)
    eye = torch.eye(3)
    kinds = {"source": torch.tensor([0] * 11 + [1] * 30 + [2] * 8), "target": torch.tensor([2, 0, 2, 0, 1, 2, 0, 0])}
    x, y = torch.randn(49, 2, generator=generator), torch.randn(8, 2, generator=generator)
    rows = {name: eye[kind] for name, kind in kinds.items()}
    ratio = fit_density_ratio(
        x,
        y,
        source_labels=rows["source"],
        target_labels=rows["target"],
        folds=4,
        settings=TrainingConfig(steps=3, batch_size=8, warmup=0),
    )
    for name, logit, data in (("source", ratio.source_logit, x), ("target", ratio.target_logit, y)):
        fold = folds_of(ratio, logit, data, rows[name])
        for kind in range(3):
            counts = torch.bincount(fold[kinds[name] == kind], minlength=4)
            assert int(counts.max() - counts.min()) <= 1


def test_log_ratios_are_clipped() -> None:
    """Separable domains: the logits grow without bound, the log ratios do not."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 2, generator=generator), torch.randn(60, 2, generator=generator) + 40
    ratio = fit_density_ratio(x, y, settings=SETTINGS, clip=2.5)
    unclipped = ratio.slope * ratio.target_logit - math.log(ratio.mean_ratio)
    assert float(unclipped.abs().max()) > 5
    for values in (ratio.source_log_ratio, ratio.target_log_ratio):
        assert float(values.abs().max()) <= 2.5
    assert float(ratio.target_log_ratio.max()) == 2.5


def test_labels_enter_the_ratio() -> None:
    """p(x, y) and q(x, y) differ in the label shares alone: log r = log(0.9 / 0.5) or log(0.1 / 0.5)."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2000, 1, generator=generator), torch.randn(1000, 1, generator=generator)
    eye = torch.eye(2)
    ratio = fit_density_ratio(
        x,
        y,
        source_labels=eye[torch.arange(2000) % 2],
        target_labels=eye[(torch.arange(1000) % 10 == 0).long()],
        settings=SETTINGS,
    )
    assert float(ratio.source_log_ratio[::2].mean()) == pytest.approx(math.log(1.8), abs=0.15)
    assert float(ratio.source_log_ratio[1::2].mean()) == pytest.approx(math.log(0.2), abs=0.3)


def test_two_target_samples_are_enough_to_run() -> None:
    ratio = fit_density_ratio(torch.randn(30, 2), torch.randn(2, 2), settings=TrainingConfig(steps=5, batch_size=8))
    assert len(ratio.classifiers) == 2
    assert ratio.target_log_ratio.isfinite().all()


def test_a_target_outside_the_source_is_said_plainly() -> None:
    source, target = torch.randn(500, 2), torch.randn(40, 2) + 20
    report = diagnose(source, target, fit_density_ratio(source, target, settings=SETTINGS))
    assert report.outside_fraction == 1.0
    assert report.auc > 0.99
    assert any("the target lies outside the source. 100%" in text for text in report.warnings)
    assert str(report).startswith("WARNING: do not use the samples: the target lies outside the source")
    assert str(report).endswith(report.summary())
    assert "WARNING" not in report.summary()


def test_numbers_that_say_nothing_say_so() -> None:
    x = torch.randn(500, 2)
    zero = DensityRatio(torch.zeros(500), torch.zeros(40), torch.zeros(500), torch.zeros(40), 0.03, 1.0, [])
    within = diagnose(x, x[:40] + 0.01, zero).summary()
    assert "calibration slope 0.03 (says nothing at this AUC)" in within
    assert "500 of 500 (100.0%)\n" in within + "\n"
    outside = diagnose(x, x[:40] + 50.0, zero)
    assert "500 of 500 (100.0%), which says nothing: the target lies outside the source" in outside.summary()
    outside.add_mean_h([(0.1, 2.781e21, 4.72e19), (1.0, 1.0, 0.01)])
    assert "t =      0.1   above 10,000\n" in outside.summary()
    assert "1.000 +- 0.010" in outside.summary()


def test_a_ratio_of_the_wrong_mean_has_no_effective_sample_size() -> None:
    x = torch.randn(500, 2)
    logit = 0.01 * torch.randn(500)  # Separable domains: hardly any spread over the source, and far from 0.
    ratio = DensityRatio(logit, torch.full((40,), 9.0), logit - 9, torch.full((40,), 9.0), 1.0, math.exp(-9), [])
    report = diagnose(x, x[:40] + 0.1, ratio)
    assert report.effective_sample_size > 400
    assert "effective sample size of the ratio: none to speak of: the mean ratio is far from 1" in str(report)
    assert any("mean over the source is 0.00012 and should be 1. Do not use" in text for text in report.warnings)


def test_very_few_target_samples_are_said_to_be_few() -> None:
    for count in (9, 10):
        source, target = torch.randn(200, 2), torch.randn(count, 2)
        report = diagnose(source, target, fit_density_ratio(source, target, settings=SETTINGS))
        assert any(text.startswith("9 target samples are very few") for text in report.warnings) == (count == 9)


def test_the_papers_target_is_not_called_outside() -> None:
    for n in (10, 100):
        source, target = paper_source().sample(3000, seed=0), paper_target().sample(n, seed=1)
        assert outside_fraction(source, target) < 0.34


def test_a_fitted_ratio_whose_mean_is_far_from_one_is_warned_of() -> None:
    def diagnostics() -> TransferDiagnostics:
        return TransferDiagnostics(100, 20, 0.7, 0.05, 1.0, 50.0, 1.0, 0.0)

    sound = diagnostics()
    sound.add_mean_h([(0.0, 0.7, 0.1), (0.5, 4.0, 0.1), (1.0, 54.0, 20.0)])  # The last is within three errors of 5.
    assert not sound.warnings
    low, high = diagnostics(), diagnostics()
    low.add_mean_h([(0.0, 1e-12, 1e-12), (1.0, 1.0, 0.1)])
    high.add_mean_h([(0.0, 1.0, 0.1), (0.5, 9.0, 1.0)])
    assert "mean of the fitted ratio h over the source is below 0.0001 at t = 0 and should be 1" in low.warnings[0]
    assert "is 9 at t = 0.5" in high.warnings[0]
    assert low.mean_h[0] == (0.0, 1e-12, 1e-12)


@pytest.mark.parametrize(("outside", "mean_ratio"), [(0.35, 1.0), (0.0, 1.3e-22), (0.0, 1e9)])
def test_an_unreachable_target_is_no_memorization(outside: float, mean_ratio: float) -> None:
    report = TransferDiagnostics(100, 20, 0.7, 0.05, 1.0, 50.0, mean_ratio, outside, warnings=["do not use"])
    assert not report.within_reach
    report.add_mean_h([(0.0, 1e-12, 1e-13)])
    assert report.warnings == ["do not use"]
    assert "e-" not in report.summary()
    assert TransferDiagnostics(**report.to_dict()).mean_h == [[0.0, 1e-12, 1e-13]]
    assert TransferDiagnostics(100, 20, 0.7, 0.05, 1.0, 50.0, 0.3, 0.34).within_reach


def test_copies_of_the_source_do_not_move_the_target_outside() -> None:
    generator = torch.Generator().manual_seed(0)
    once, target = torch.randn(300, 2, generator=generator), 0.5 * torch.randn(60, 2, generator=generator)
    shuffled = once.repeat(3, 1)[torch.randperm(900, generator=generator)]
    far = target + 50.0
    assert outside_fraction(shuffled, target) == pytest.approx(outside_fraction(once, target), abs=0.02)
    assert outside_fraction(shuffled, far) == outside_fraction(once, far) == 1.0
    same = once[:1].expand(20, 2)
    assert outside_fraction(same, torch.cat([once[:1], far[:1]])) == 0.5


def test_arrays_and_labels_are_checked_as_in_a_fit() -> None:
    x, y = torch.randn(20, 2).numpy(), torch.randn(5, 2)
    settings = TrainingConfig(steps=2, batch_size=8)
    with pytest.raises(ValueError, match="target must hold at least 2 samples, but it holds one sample"):
        fit_density_ratio(x, y[:1], settings=settings)
    with pytest.raises(ValueError, match="source_labels and target_labels must be given together"):
        fit_density_ratio(x, y, source_labels=torch.zeros(20, dtype=torch.long), settings=settings)
    classes = torch.arange(20) % 3, torch.arange(5) % 3
    rows = [torch.nn.functional.one_hot(one, 3).float() for one in classes]
    by_class = fit_density_ratio(x, y, source_labels=classes[0], target_labels=classes[1], settings=settings)
    by_row = fit_density_ratio(
        torch.from_numpy(x), y.numpy(), source_labels=rows[0], target_labels=rows[1], settings=settings
    )
    assert torch.equal(by_class.source_log_ratio, by_row.source_log_ratio)
    equal = fit_density_ratio(x, y[:1].expand(5, 2), settings=settings)
    assert equal.target_log_ratio.isfinite().all()
