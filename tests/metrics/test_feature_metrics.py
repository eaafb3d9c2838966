"""Frechet distance, density and coverage, and the search for copies: closed forms and brute force."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from tgdp_fast.ecg.records.synthetic import synthetic_ecg
from tgdp_fast.metrics import density_and_coverage, frechet_distance, memorization, nearest_by_correlation


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def with_moments(x: np.ndarray, mean: np.ndarray, root: np.ndarray) -> np.ndarray:
    """x moved so that its mean is ``mean`` and its covariance root^T root, exactly."""
    centered = x - x.mean(axis=0)
    white = centered @ np.linalg.inv(np.linalg.cholesky(np.cov(centered.T))).T
    return white @ root + mean


# ------------------------------------------------------------------------------------------- Frechet distance


def test_frechet_distance_of_commuting_covariances() -> None:
    """Diagonal covariances: |difference of means|^2 + sum (s_i - t_i)^2."""
    s, t = np.array([1.0, 2.0, 0.5]), np.array([3.0, 2.0, 1.0])
    mean = np.array([1.0, -2.0, 0.5])
    a = with_moments(normal(37, 3, seed=1), np.zeros(3), np.diag(s))
    b = with_moments(normal(41, 3, seed=2), mean, np.diag(t))
    assert frechet_distance(a, b) == pytest.approx((mean**2).sum() + ((s - t) ** 2).sum(), rel=1e-10)


@pytest.mark.parametrize(("n", "m"), [(60, 31), (5, 9), (4, 60)])
def test_frechet_distance_is_its_formula(n: int, m: int) -> None:
    """With a matrix root of the product, for covariances of full rank or not (7 features).

    sqrtm of a singular matrix is exact to about the square root of the precision.
    """
    a, b = normal(n, 7, seed=3) @ normal(7, 7, seed=4), normal(m, 7, seed=5) + 0.3
    first, second = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * np.real(sqrtm(first @ second)))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8 if min(n, m) > 7 else 1e-4)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-10)


def test_frechet_distance_to_itself_and_to_few() -> None:
    x = normal(400, 20, seed=1)
    assert frechet_distance(x, x[::-1]) == pytest.approx(0.0, abs=1e-10)
    # Equal laws: the bias that the docstring states (F^2 / N terms of higher order are left out), and far more where
    # there are fewer samples than features: the missing directions alone have 11 of variance.
    pairs = [(normal(800, 20, seed=2 * s), normal(400, 20, seed=2 * s + 1)) for s in range(20)]
    assert np.mean([frechet_distance(a, b) for a, b in pairs]) == pytest.approx((1 / 800 + 1 / 400) * 125, rel=0.1)
    assert frechet_distance(normal(10, 20, seed=2), normal(4000, 20, seed=3)) > 11


# -------------------------------------------------------------------------------------- density and coverage


def by_definition(real: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, float]:
    density, covered = 0, 0
    for i, x in enumerate(real):
        radius = sorted(np.linalg.norm(x - other) for j, other in enumerate(real) if j != i)[k - 1]
        inside = sum(np.linalg.norm(x - y) <= radius for y in generated)
        density += inside
        covered += inside > 0
    return density / (k * len(generated)), covered / len(real)


@pytest.mark.parametrize(("n", "m", "k"), [(23, 17, 5), (6, 40, 5), (30, 3, 1)])
def test_density_and_coverage_are_their_definitions(n: int, m: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated = normal(n, 3, seed=n), 0.8 * normal(m, 3, seed=m)
    expected = by_definition(real, generated, k)
    found = density_and_coverage(real, generated, k)
    assert (found.density, found.coverage) == pytest.approx(expected, abs=1e-12)
    monkeypatch.setattr("tgdp_fast.metrics.features._BLOCK", 7)
    assert density_and_coverage(real.reshape(n, 3, 1), generated.reshape(m, 3, 1), k) == found


def test_density_and_coverage_of_equal_laws() -> None:
    """Expectations 1 and Lemma 2; the mean of 20 draws is within 4 standard errors of them."""
    found = [density_and_coverage(normal(150, 4, seed=2 * s), normal(100, 4, seed=2 * s + 1)) for s in range(20)]
    for values, expected in (
        ([f.density for f in found], 1.0),
        ([f.coverage for f in found], found[0].expected_coverage),
    ):
        assert np.mean(values) == pytest.approx(expected, abs=4 * np.std(values, ddof=1) / math.sqrt(20))
    # k = 1, by hand: the nearest of N - 1 real and M generated ones is real with probability (N - 1) / (N + M - 1).
    assert density_and_coverage(normal(9, 2), normal(4, 2, seed=1), 1).expected_coverage == pytest.approx(1 - 8 / 12)


def test_what_density_and_coverage_tell_apart() -> None:
    real = np.concatenate([normal(100, 2, seed=1), normal(100, 2, seed=2) + 50])
    one_mode = density_and_coverage(real, normal(200, 2, seed=3))
    assert one_mode.density > 0.8
    assert one_mode.coverage < 0.55
    far = density_and_coverage(real, normal(200, 2, seed=3) - 500)
    assert (far.density, far.coverage) == (0.0, 0.0)


# ----------------------------------------------------------------------------------------------- memorization


def nearest_by_definition(signals: np.ndarray, train: np.ndarray, shift: int) -> np.ndarray:
    def unit(window: np.ndarray) -> np.ndarray:
        window = window - window.mean(axis=1, keepdims=True)
        return window / np.linalg.norm(window)

    length = signals.shape[2]
    size = length - 2 * shift
    return np.array(
        [
            min(
                np.linalg.norm(unit(x[:, shift : shift + size]) - unit(record[:, start : start + size]))
                for record in train
                for start in range(2 * shift + 1)
            )
            for x in signals
        ]
    )


@pytest.mark.parametrize(("length", "shift"), [(31, 0), (33, 5), (64, 3)])
def test_the_nearest_record_over_shifts(length: int, shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    signals = normal(5, 3, length, seed=1).astype(np.float32) + 2
    train = normal(7, 3, length, seed=2).astype(np.float32) - 9
    distance, nearest = nearest_by_correlation(signals, train, max_shift=shift)
    assert distance == pytest.approx(nearest_by_definition(signals, train, shift), rel=1e-6)
    alone = [nearest_by_correlation(signals, train[i : i + 1], max_shift=shift)[0] for i in range(7)]
    assert np.array_equal(nearest, np.argmin(alone, axis=0))
    monkeypatch.setattr("tgdp_fast.metrics.copies._VALUES", 150)  # in parts of a few pairs
    again = nearest_by_correlation(signals, train, max_shift=shift)
    assert again[0] == pytest.approx(distance, rel=1e-6)
    assert np.array_equal(again[1], nearest)


def test_copies_are_found_however_disguised() -> None:
    records = synthetic_ecg(60, 300, seed=1)
    train, held_out, generated = records[:30, :, 20:240], records[30:50, :, 20:240], records[50:, :, 20:240].copy()
    generated[0] = train[7]
    generated[1] = -1.0 + 2.0 * train[3]
    generated[2] = records[11, :, 35:255]  # 15 samples later
    generated[3] = records[12, :, :220]  # 20 samples earlier
    found = memorization(generated, train, held_out, max_shift=20)
    assert found.generated[0] == 0.0
    assert found.generated[1:4] == pytest.approx([0, 0, 0], abs=1e-6)
    assert found.nearest[:4].tolist() == [7, 3, 11, 12]
    assert (found.copies, found.nearer >= 4) == (4, True)
    assert found.expected_nearer == pytest.approx(10 / 21)
    assert found.low_ratio == pytest.approx(0.0, abs=1e-6)
    assert found.median_ratio == pytest.approx(np.median(found.generated) / np.median(found.held_out))
    # Without shifts the moved ones are not seen.
    assert memorization(generated, train, held_out, max_shift=0).copies == 2


def test_new_records_are_no_copies() -> None:
    """Of one distribution the ratio of medians is 1; 200 distances of a relative spread near 0.2 give it to 0.02."""
    train, held_out, generated = (synthetic_ecg(n, 150, seed=s) for s, n in enumerate((100, 200, 200)))
    found = memorization(generated, train, held_out)
    assert found.median_ratio == pytest.approx(1.0, abs=0.1)
    assert found.copies == 0
    assert found.nearer <= 8  # 1 expected; geometric, so above 8 with probability 0.02 at most
    everything = memorization(train, train, held_out)
    assert (everything.copies, everything.nearer, everything.median_ratio) == (100, 100, 0.0)


def test_signals_without_any_signal() -> None:
    train = normal(3, 2, 20).astype(np.float32)
    flat = np.full((2, 2, 20), 3.0, np.float32)
    assert nearest_by_correlation(flat, train)[0] == pytest.approx([math.sqrt(2)] * 2)
    assert nearest_by_correlation(train, flat)[0] == pytest.approx([math.sqrt(2)] * 3)


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8), (3, 4, 5, 2)])
def test_copies_of_vectors_and_images(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    train, held_out, generated = (100 + 3 * random.standard_normal((n, *shape)) for n in (50, 400, 300))
    new = memorization(generated, train, held_out)
    flat, own = generated.reshape(300, -1), train.reshape(50, -1)
    pairs = np.linalg.norm(own[:, None] - held_out.reshape(1, 400, -1), axis=2)
    distances = np.linalg.norm(flat[:, None] - own, axis=2)
    assert new.generated == pytest.approx(distances.min(axis=1) / np.sqrt((pairs**2).mean()))
    assert new.nearest.tolist() == distances.argmin(axis=1).tolist()
    assert new.held_out == pytest.approx(pairs.min(axis=0) / np.sqrt((pairs**2).mean()))
    assert new.copies == 0
    assert new.median_ratio == pytest.approx(1.0, abs=0.2)
    generated[:20] = train[:20]
    generated[20:30] = train[20:30] + 1e-4
    found = memorization(torch.from_numpy(generated).float(), train, held_out)
    assert found.copies == 30
    assert found.nearer >= 20
    assert found.nearest[:30].tolist() == list(range(30))
    assert found.low_ratio < 1e-3
    # In other units, and in parts, it is the same.
    monkeypatch.setattr("tgdp_fast.metrics.copies._VALUES", 150)
    again = memorization(1000 * generated, 1000 * train, 1000 * held_out)
    assert (again.copies, again.nearest.tolist()) == (30, found.nearest.tolist())
    assert again.generated[30:] == pytest.approx(found.generated[30:], rel=1e-4)


def test_copies_name_the_argument_at_fault() -> None:
    x, signals = normal(6, 3), normal(4, 2, 20)
    with pytest.raises(ValueError, match=r"generated and train must hold events of one shape, got \[2\] and \[3\]"):
        memorization(x[:, :2], x, x)
    with pytest.raises(ValueError, match=r"held_out and train must hold events of one shape, got \[2\] and \[3\]"):
        memorization(x, x, x[:, :2])
    with pytest.raises(ValueError, match=r"generated must have shape \[N, leads, L\], got \[6, 3\]"):
        memorization(x, signals, signals)
    with pytest.raises(ValueError, match=r"held_out must have shape \[N, leads, L\], got \[6, 3\]"):
        memorization(signals, signals, x)
    with pytest.raises(ValueError, match=r"generated must have shape \[N, ...\]"):
        memorization(x[:, 0], x, x)
    with pytest.raises(ValueError, match="generated must be finite"):
        memorization(np.full_like(x, np.nan), x, x)
    with pytest.raises(ValueError, match=r"max_shift is for signals \[N, leads, L\], got train of shape \[6, 3\]"):
        memorization(x, x, x, max_shift=0)
    with pytest.raises(ValueError, match="distinct samples"):
        memorization(x, np.ones_like(x), np.ones_like(x))


def test_bad_arguments() -> None:
    x = normal(6, 3)
    with pytest.raises(ValueError, match="a and b must have as many features, got 3 and 2"):
        frechet_distance(x, x[:, :2])
    with pytest.raises(ValueError, match="a must have shape"):
        frechet_distance(x[:1], x)
    with pytest.raises(ValueError, match="real must hold more than k = 6 samples, got 6"):
        density_and_coverage(x, x, 6)
    with pytest.raises(ValueError, match=r"signals must have shape \[N, leads, L\], got \[6, 3\]"):
        nearest_by_correlation(x, x)
    signals = normal(4, 2, 20)
    with pytest.raises(ValueError, match="one shape"):
        nearest_by_correlation(signals, signals[:, :1])
    with pytest.raises(ValueError, match="max_shift must leave at least two of 20 samples in the middle, got 10"):
        memorization(signals, signals, signals, max_shift=10)


def test_copies_that_spoil_neighborhoods_are_told() -> None:
    x, y = normal(40, 2), normal(40, 2, seed=1)
    with pytest.warns(UserWarning, match="real holds 40 copies among 80 rows"):
        density_and_coverage(np.concatenate([x, x]), y)
    with pytest.warns(UserWarning, match="held_out holds 3 copies of training samples"):
        memorization(y, x, np.concatenate([x[:3], normal(20, 2, seed=2)]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        density_and_coverage(x, y)
        memorization(y, x, normal(20, 2, seed=2))
