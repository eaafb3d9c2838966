"""Metrics against closed forms, brute force and their symmetries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from tgdp_fast.data.gaussians import GaussianMixture, paper_target
from tgdp_fast.metrics import (
    average_likelihood,
    median_bandwidth,
    mmd,
    mode_mass,
    negative_log_likelihood,
    sliced_wasserstein,
)

DOUBLE = torch.float64


def points(count: int, dimension: int, seed: int = 0) -> torch.Tensor:
    """Non-contiguous float64 standard normal points."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2 * count, dimension + 2, generator=generator, dtype=DOUBLE)[1::2, 1:-1]


def transport_cost(x: np.ndarray, y: np.ndarray) -> float:
    """Squared W2 in one dimension as a linear programme over couplings: the definition."""
    n, m = len(x), len(y)
    rows = np.kron(np.eye(n), np.ones(m))
    columns = np.kron(np.ones(n), np.eye(m))
    result = linprog(
        np.square(x[:, None] - y[None]).ravel(),
        A_eq=np.vstack([rows, columns]),
        b_eq=np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)]),
    )
    return float(result.fun)


# ----------------------------------------------------------------------------------------- sliced Wasserstein


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 5), (6, 6), (4, 6), (7, 5), (9, 3)])
def test_one_dimension_is_the_optimal_transport(n: int, m: int) -> None:
    """In one dimension every direction is +-1, so the metric is W2 itself; linprog solves to about 1e-9."""
    x, y = points(n, 1, seed=1), points(m, 1, seed=2) * 1.5 + 0.3
    expected = transport_cost(x[:, 0].numpy(), y[:, 0].numpy())
    assert sliced_wasserstein(x, y, num_projections=3) ** 2 == pytest.approx(expected, abs=1e-7)


def test_unequal_sizes_equal_repeated_points() -> None:
    """Repeating every point changes no distribution: sizes 15 and 21 against both brought to 105."""
    x, y = points(15, 4, seed=1), points(21, 4, seed=2) + 0.2
    repeated = sliced_wasserstein(x.repeat_interleave(7, dim=0), y.repeat_interleave(5, dim=0))
    assert sliced_wasserstein(x, y) == pytest.approx(repeated, rel=1e-12)


def test_shift() -> None:
    """x + d is transported by d in every direction: SW2^2 is the mean of (theta . d)^2, |d|^2 / D on average.

    theta_1^2 of a uniform direction has variance 2 (D - 1) / (D^2 (D + 2)); tolerance five standard errors.
    """
    dimension, projections = 3, 4096
    x, shift = points(53, dimension), torch.tensor([3.0, -1.0, 2.0], dtype=DOUBLE)
    squared = sliced_wasserstein(x, x + shift, num_projections=projections) ** 2
    length = float(shift.square().sum())
    error = length * math.sqrt(2 * (dimension - 1) / (dimension**2 * (dimension + 2)) / projections)
    assert abs(squared - length / dimension) < 5 * error


def test_scale() -> None:
    """2 x against x: every 1-D W2^2 is the mean square of theta . x, averaging to trace(x^T x) / (N D)."""
    x = points(201, 5)
    squared = sliced_wasserstein(x, 2 * x, num_projections=4096) ** 2
    # The spread over directions is that of theta^T S theta for S near the identity: about sqrt(2 / D) * 0.1
    # here.
    assert squared == pytest.approx(float(x.square().mean()), rel=5 * 0.1 / math.sqrt(4096))


def test_sampling_floor_of_the_paper() -> None:
    """Two fresh target sets of 10,000 points: about 0.01, and a lost mode is far outside that."""
    target = paper_target()
    x, y = target.sample(10_000, seed=1), target.sample(10_000, seed=2)
    assert sliced_wasserstein(x, y) < 0.015
    assert sliced_wasserstein(x[x[:, 0] > 0], y) > 0.3


def test_sliced_wasserstein_is_deterministic_in_its_seed() -> None:
    x, y = points(31, 2, seed=1), points(37, 2, seed=2)
    assert sliced_wasserstein(x, y, seed=3) == sliced_wasserstein(x, y, seed=3)
    assert sliced_wasserstein(x, y, seed=3) != sliced_wasserstein(x, y, seed=4)


# --------------------------------------------------------------------------------- maximum mean discrepancy


def naive_mmd(x: torch.Tensor, y: torch.Tensor, bandwidths: list[float]) -> float:
    """The definition in float64, pairs one by one."""

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        squared = (a[:, None] - b[None]).square().sum(dim=2)
        return torch.stack([(-squared / (2 * h**2)).exp() for h in bandwidths]).mean(dim=0)

    n, m = len(x), len(y)
    within_x = float(kernel(x, x).sum() - n) / (n * (n - 1))
    within_y = float(kernel(y, y).sum() - m) / (m * (m - 1))
    return within_x + within_y - 2 * float(kernel(x, y).mean())


@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 17), (129, 1025), (1024, 300), (1300, 1100)])
@pytest.mark.parametrize("bandwidths", [[0.7], [0.3, 1.0, 4.0]])
def test_mmd_is_its_definition(n: int, m: int, bandwidths: list[float]) -> None:
    """Sizes on both sides of the block of 1,024, far from the origin.

    An fp32 exponent of size e is off by about e 2^-23 (a few roundings of the expanded square); averaged
    over pairs that stays below 1e-6.
    """
    x, y = points(n, 3, seed=1) + 100, points(m, 3, seed=2) * 1.2 + 100.3
    expected = naive_mmd(x, y, bandwidths)
    bandwidth = bandwidths[0] if len(bandwidths) == 1 else bandwidths
    assert mmd(x, y, bandwidth) == pytest.approx(expected, abs=1e-6)
    assert mmd(x[torch.randperm(n)], y[torch.randperm(m)], bandwidth) == pytest.approx(expected, abs=1e-6)


def test_mmd_of_two_gaussians() -> None:
    """E k(x, y) = (h^2 / c)^(D/2) exp(-|a - b|^2 / (2 c)), c = h^2 + s^2 + t^2, for N(a, s^2), N(b, t^2).

    Standard error of the estimate to first order: 2 sqrt(Var_P w / n + Var_Q w / m) with the witness w, the
    difference of the mean embeddings, also in closed form. Tolerance: five of them.
    """
    n, m, dimension, h, s, t = 3001, 2503, 2, 0.8, 1.0, 1.3
    shift = torch.tensor([1.2, -0.8], dtype=DOUBLE)
    x, y = s * points(n, dimension, seed=5), t * points(m, dimension, seed=6) + shift

    def mean_kernel(variance: float, squared: torch.Tensor | float) -> torch.Tensor:
        total = h**2 + variance
        return (h**2 / total) ** (dimension / 2) * torch.exp(-torch.as_tensor(squared) / (2 * total))

    expected = mean_kernel(2 * s**2, 0.0) + mean_kernel(2 * t**2, 0.0)
    expected -= 2 * mean_kernel(s**2 + t**2, shift.square().sum())

    def witness(z: torch.Tensor) -> torch.Tensor:
        at_y = (z - shift).square().sum(dim=1)
        return mean_kernel(s**2, z.square().sum(dim=1)) - mean_kernel(t**2, at_y)

    error = 2 * math.sqrt(float(witness(x).var() / n + witness(y).var() / m))
    assert abs(mmd(x, y, h) - float(expected)) < 5 * error
    assert float(expected) > 20 * error, "the distance must stand out for this test to say anything"


def test_mmd_is_unbiased() -> None:
    """The mean over 400 pairs of small sets is zero to five standard errors; the biased one is far off."""
    values = np.array([mmd(points(5, 2, seed=2 * s), points(6, 2, seed=2 * s + 1), 1.0) for s in range(400)])
    assert abs(values.mean()) < 5 * values.std() / math.sqrt(len(values))
    assert values.min() < 0


def test_median_bandwidth() -> None:
    """Exact on three points; on many, that of |a - b|, normal points: sqrt(2) times that of chi_2, 1.1774."""
    assert median_bandwidth(np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])) == pytest.approx(math.sqrt(18))
    # Standard error of a median over 2,000 points' pairs: below 2 %.
    assert median_bandwidth(points(5001, 2)) == pytest.approx(math.sqrt(2) * 1.17741, rel=0.05)
    x, y = points(40, 2, seed=1), points(50, 2, seed=2)
    assert mmd(x, y) == mmd(x, y, median_bandwidth(y)), "the reference set alone decides the kernel"
    with pytest.raises(ValueError, match="distinct samples"):
        median_bandwidth(np.ones((5, 2)))


# ----------------------------------------------------------------------------------------------- known
# density


def test_known_density() -> None:
    """Fresh samples: NLL is the entropy, the average likelihood int q^2 (closed form), masses the weights."""
    mixture, n = GaussianMixture([[0.0, 0.0], [5.0, 0.0]], 0.1, [0.3, 0.7]), 20_001
    x = mixture.sample(n, seed=1)
    log_density = mixture.log_prob(x.double())
    nll_error = float(log_density.std()) / math.sqrt(n)
    assert abs(negative_log_likelihood(mixture, x) - mixture.entropy()) < 5 * nll_error
    # Modes 16 deviations apart do not meet: int q^2 = sum w^2 / (4 pi v).
    likelihood_error = float(log_density.exp().std()) / math.sqrt(n)
    assert abs(average_likelihood(mixture, x) - (0.09 + 0.49) / (4 * math.pi * 0.1)) < 5 * likelihood_error
    assert mode_mass(mixture, x) == pytest.approx((0.3, 0.7), abs=1 / n)
    assert mode_mass(mixture, x.numpy()[:, ::1]) == mode_mass(mixture, x)
    assert mode_mass(mixture, np.array([[0.0, 0.0], [5.0, 0.0], [5.1, 0.0]])) == pytest.approx((1 / 3, 2 / 3))


# --------------------------------------------------------------------------------------- properties, bad
# input


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 40),
    m=st.integers(2, 40),
    event=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
    half=st.booleans(),
)
def test_properties(n: int, m: int, event: list[int], seed: int, half: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(size, *event, generator=generator) for size in (n, m))
    if half:
        x = x.to(torch.bfloat16)
    distance = sliced_wasserstein(x, y, num_projections=9)
    order_x, order_y = (torch.randperm(size, generator=generator) for size in (n, m))
    assert distance == pytest.approx(sliced_wasserstein(x[order_x], y[order_y], num_projections=9), rel=1e-9)
    assert distance == pytest.approx(sliced_wasserstein(y, x, num_projections=9), rel=1e-9)
    assert sliced_wasserstein(x, x[order_x], num_projections=9) == pytest.approx(0, abs=1e-9)
    value = mmd(x, y, 1.0)
    assert -2 <= value <= 2
    assert value == pytest.approx(mmd(y, x, 1.0), abs=1e-6)
    assert value == pytest.approx(mmd(x.float().numpy().reshape(n, -1), y.flatten(1), 1.0), abs=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: sliced_wasserstein(x[:0], x),
            r"x must have shape \[N, \.\.\.\] with N >= 1, got \[0, 3\]",
        ),
        (lambda x: sliced_wasserstein(x, x[:, :2]), r"events of one shape, got \[3\] and \[2\]"),
        (lambda x: sliced_wasserstein(x, x / 0), "y must be finite, but 4 of 4 rows"),
        (lambda x: sliced_wasserstein(x, x, num_projections=0), "num_projections must be an integer >= 1"),
        (lambda x: sliced_wasserstein(x[0], x), r"x must have shape"),
        (lambda x: mmd(x[:1], x), r"x must have shape \[N, \.\.\.\] with N >= 2, got \[1, 3\]"),
        (lambda x: mmd(x, x, 0.0), "bandwidth must be finite and in"),
        (lambda x: mmd(x, x, []), "got none"),
        (lambda x: negative_log_likelihood(paper_target(), x[0]), r"x must have shape \[N, D\]"),
        (lambda x: average_likelihood(paper_target(), x[:, :2] / 0), "x must be finite"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call(torch.ones(4, 3))
