"""Gaussian mixtures: every identity of the guidance formula, by closed form, quadrature or samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial.hermite_e import hermegauss

from tgdp_fast.data.gaussians import (
    ExactDenoiser,
    ExactGuidance,
    GaussianMixture,
    exact_denoiser,
    exact_guidance,
    log_density_ratio,
    log_density_ratio_and_grad,
    paper_source,
    paper_target,
)
from tgdp_fast.diffusion.schedule import NoiseSchedule

DOUBLE = torch.float64
LEVELS = [(1.0, 0.0), (math.sqrt(0.99), 0.1), (0.8, 0.6), (0.1, math.sqrt(0.99)), (0.0, 1.0)]


def uneven(dimension: int = 3) -> GaussianMixture:
    """Three components with different variances and weights: nothing cancels by symmetry."""
    generator = torch.Generator().manual_seed(3)
    means = torch.randn(3, dimension, generator=generator, dtype=DOUBLE)
    return GaussianMixture(means, [0.1, 0.5, 1.3], [0.2, 0.5, 0.3])


def shifted(dimension: int = 3) -> GaussianMixture:
    mixture = uneven(dimension)
    return GaussianMixture(mixture.means[:2] + 0.3, [0.3, 0.2], [0.6, 0.4])


def points(count: int, dimension: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Non-contiguous float64 points [count, dimension]."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(2 * count, dimension + 1, generator=generator, dtype=DOUBLE)[::2, 1:]


def plane(half_width: float, spacing: float) -> tuple[torch.Tensor, float]:
    """Grid over the plane with its cell area; the trapezoid rule converges exponentially here."""
    axis = torch.arange(-half_width, half_width + spacing / 2, spacing, dtype=DOUBLE)
    return torch.cartesian_prod(axis, axis), spacing**2


def test_log_prob_against_scipy() -> None:
    from scipy.stats import multivariate_normal

    mixture, x = uneven(), points(17, 3)
    density = sum(
        weight * multivariate_normal(mean, variance * np.eye(3)).pdf(x.numpy())
        for weight, mean, variance in zip(
            mixture.weights.numpy(), mixture.means.numpy(), mixture.variance.numpy(), strict=True
        )
    )
    np.testing.assert_allclose(mixture.log_prob(x).numpy(), np.log(density), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_score_against_autograd(alpha: float, sigma: float) -> None:
    mixture = uneven(5).noised(alpha, sigma)
    x = points(33, 5, scale=2.0).clone().requires_grad_()
    (expected,) = torch.autograd.grad(mixture.log_prob(x).sum(), x)
    # Both are float64 evaluations of numbers of order 10 to 100.
    torch.testing.assert_close(mixture.score(x.detach()), expected, rtol=1e-12, atol=1e-12)


def test_stable_far_away() -> None:
    """All densities underflow here; the nearest mode decides, and float32 gets float32 back."""
    x = torch.tensor([[3e4, 1e4], [-1e6, 1e6]], dtype=torch.float32)
    for mixture in (paper_source(), paper_target()):
        score = mixture.score(x)
        assert score.dtype == torch.float32
        assert mixture.log_prob(x).isfinite().all()
        # One component carries the weight: score = (m - x) / v, m is the mean nearest to x.
        nearest = mixture.means[torch.cdist(x.double(), mixture.means).argmin(dim=1)]
        torch.testing.assert_close(score.double(), (nearest - x) / 0.1, rtol=1e-6, atol=0)
    value, gradient = log_density_ratio_and_grad(paper_target(), paper_source(), x)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_score_of_target_is_score_of_source_plus_guidance(alpha: float, sigma: float) -> None:
    """TGDP Theorem 3.1, with the gradient of log h taken by autograd."""
    source, target = uneven(), shifted()
    x = points(21, 3).clone().requires_grad_()
    value, gradient = log_density_ratio_and_grad(target, source, x, alpha, sigma)
    (autograd,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(gradient, autograd, rtol=1e-12, atol=1e-12)
    x = x.detach()
    total = source.noised(alpha, sigma).score(x) + gradient
    torch.testing.assert_close(total, target.noised(alpha, sigma).score(x), rtol=1e-12, atol=1e-12)
    expected = target.noised(alpha, sigma).log_prob(x) - source.noised(alpha, sigma).log_prob(x)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_density_ratio(target, source, x, alpha, sigma), value, rtol=0, atol=0)


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_h_has_mean_one_under_source_and_its_inverse_under_target(alpha: float, sigma: float) -> None:
    """E_{p_t}[h] = E_{q_t}[1/h] = 1 by quadrature.

    Spacing 0.05 is below a sixth of the smallest deviation (0.316) and the grid ends 14 of the largest (7 /
    0.5) beyond the modes at the cleanest level, 6 at the noisiest: the tail beyond 6 deviations weighs 4e-9
    in the plane.
    """
    source, target = paper_source(), paper_target()
    grid, area = plane(7.0, 0.05)
    h = log_density_ratio(target, source, grid, alpha, sigma).exp()
    p = source.noised(alpha, sigma).log_prob(grid).exp()
    q = target.noised(alpha, sigma).log_prob(grid).exp()
    assert float((p * h).sum()) * area == pytest.approx(1.0, abs=1e-8)
    assert float((q / h).sum()) * area == pytest.approx(1.0, abs=1e-8)


def test_mean_of_h_over_noised_samples() -> None:
    """The same two means over samples: ties the densities to the sampler and to the noising.

    Tolerance: five standard errors sqrt(Var / n), the variance itself by quadrature.
    """
    source, target, alpha, sigma, n = paper_source(), paper_target(), 0.9, math.sqrt(0.19), 40_000
    grid, area = plane(8.0, 0.05)
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(9), dtype=DOUBLE)
    for numerator, denominator in ((target, source), (source, target)):
        ratio = log_density_ratio(numerator, denominator, grid, alpha, sigma).exp()
        second = float((denominator.noised(alpha, sigma).log_prob(grid).exp() * ratio**2).sum()) * area
        x = alpha * denominator.sample(n, seed=4, balanced=False) + sigma * noise
        mean = float(log_density_ratio(numerator, denominator, x, alpha, sigma).exp().mean())
        assert second > 1.1, "the ratio must vary for this test to say anything"
        assert abs(mean - 1) < 5 * math.sqrt((second - 1) / n)


def test_h_tends_to_one_with_the_signal() -> None:
    """log h is of order alpha: with alpha = 0 it is zero, and its size falls in proportion."""
    x = points(29, 3)
    sizes = []
    for alpha in (1e-2, 1e-3, 1e-4):
        value = log_density_ratio(shifted(), uneven(), x, alpha, math.sqrt(1 - alpha**2))
        sizes.append(float(value.abs().max()))
    assert sizes[1] == pytest.approx(sizes[0] / 10, rel=0.1)
    assert sizes[2] == pytest.approx(sizes[0] / 100, rel=0.1)
    assert float(log_density_ratio(shifted(), uneven(), x, 0.0, 1.0).abs().max()) < 1e-14


def test_h_at_time_zero_is_the_density_ratio() -> None:
    x = points(29, 3)
    expected = shifted().log_prob(x) - uneven().log_prob(x)
    torch.testing.assert_close(log_density_ratio(shifted(), uneven(), x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("alpha", "sigma"), [(0.995, math.sqrt(1 - 0.995**2)), (0.8, 0.6), (0.3, math.sqrt(0.91))])
def test_h_is_the_posterior_mean_of_the_ratio(alpha: float, sigma: float) -> None:
    """h(x_t, t) = E_{p(x_0 | x_t)}[r(x_0)], by Gauss-Hermite quadrature over the closed-form posterior.

    r has complex poles where p vanishes, at distance pi s2 / (2 |mu|) = 0.222 from the real axis; in units
    of the posterior deviation (at most 0.316) at least 0.70, so n nodes leave an error of about exp(-2 *
    0.70 * sqrt(2 n)), below 1e-10 for n = 160.
    """
    source, target = paper_source(), paper_target()
    nodes, weights = hermegauss(160)
    nodes_plane = torch.cartesian_prod(*[torch.as_tensor(nodes)] * 2)
    weight = torch.as_tensor(np.outer(weights, weights).ravel() / (2 * math.pi))
    x = points(7, 2)
    gain = alpha * 0.1 / (alpha**2 * 0.1 + sigma**2)
    deviation = math.sqrt(0.1 * sigma**2 / (alpha**2 * 0.1 + sigma**2))
    share = source.noised(alpha, sigma).responsibilities(x)
    expected = torch.zeros(7, dtype=DOUBLE)
    for k in range(2):
        centre = source.means[k] + gain * (x - alpha * source.means[k])
        for row in range(7):
            r = log_density_ratio(target, source, centre[row] + deviation * nodes_plane).exp()
            expected[row] += share[row, k] * (weight * r).sum()
    h = log_density_ratio(target, source, x, alpha, sigma).exp()
    torch.testing.assert_close(h, expected, rtol=1e-8, atol=0)


def test_noised_marginal_against_samples() -> None:
    """Mean, second and fourth moments of alpha x + sigma eps, at five standard errors of the samples."""
    mixture, alpha, sigma, n = uneven(), 0.7, math.sqrt(0.51), 60_000
    noise = torch.randn(n, 3, generator=torch.Generator().manual_seed(5), dtype=DOUBLE)
    empirical = alpha * mixture.sample(n, seed=1, balanced=False).double() + sigma * noise
    marginal = mixture.noised(alpha, sigma)
    mean = marginal.weights @ marginal.means
    second = torch.einsum("k,ki,kj->ij", marginal.weights, marginal.means, marginal.means)
    second += (marginal.weights @ marginal.variance) * torch.eye(3, dtype=DOUBLE)
    # E x^4 of a Gaussian: m^4 + 6 m^2 v + 3 v^2.
    m, v = marginal.means, marginal.variance[:, None]
    fourth = marginal.weights @ (m**4 + 6 * m**2 * v + 3 * v**2)
    for values, expected in (
        (empirical, mean),
        ((empirical[:, :, None] * empirical[:, None, :]).flatten(1), second.flatten()),
        (empirical**4, fourth),
    ):
        tolerance = 5 * values.std(dim=0) / math.sqrt(n)
        assert ((values.mean(dim=0) - expected).abs() < tolerance).all()


@pytest.mark.parametrize("n", [1, 2, 3, 10, 101, 1000])
def test_balanced_counts(n: int) -> None:
    mixture = uneven()
    x, component = mixture.sample_with_components(n, seed=7)
    counts = torch.bincount(component, minlength=3)
    assert ((counts - n * mixture.weights).abs() < 1).all()
    assert counts.sum() == n
    assert x.dtype == torch.float32
    assert x.shape == (n, 3)
    assert torch.equal(x, mixture.sample(n, seed=7))
    assert not torch.equal(x, mixture.sample(n, seed=8))
    # Each sample lies around its own component's mean: within 7 deviations in each of at most 3,000
    # coordinates.
    deviation = (x - mixture.means[component]).abs() / mixture.variance[component].sqrt()[:, None]
    assert deviation.max() < 7


def test_balanced_samples_are_shuffled() -> None:
    """A prefix holds both modes: 30 of 30 from one mode has a chance below 1e-8."""
    component = paper_target().sample_with_components(1000, seed=0)[1][:30]
    assert 0 < component.sum() < 30
    assert torch.bincount(paper_target().sample_with_components(1001)[1]).tolist() == [501, 500]


def test_unbalanced_counts_vary() -> None:
    shares = {int(paper_target().sample_with_components(100, seed=s, balanced=False)[1].sum()) for s in range(6)}
    assert len(shares) > 1


def test_entropy_closed_forms() -> None:
    single = GaussianMixture([[0.3, -2.0, 5.0]], 0.7)
    assert single.entropy() == pytest.approx(1.5 * math.log(2 * math.pi * math.e * 0.7), abs=1e-9)
    # Modes 100 deviations apart: the component's entropy plus the entropy of the choice.
    apart = GaussianMixture([[0.0, 0.0], [30.0, 40.0]], 0.25, [0.3, 0.7])
    choice = -0.3 * math.log(0.3) - 0.7 * math.log(0.7)
    assert apart.entropy() == pytest.approx(math.log(2 * math.pi * math.e * 0.25) + choice, abs=1e-9)
    # Coinciding modes of a mixture are one Gaussian.
    same = GaussianMixture([[1.0, 1.0]] * 4, 2.0)
    assert same.entropy() == pytest.approx(math.log(2 * math.pi * math.e * 2.0), abs=1e-9)


def test_entropy_of_the_paper_by_plane_quadrature() -> None:
    target = paper_target()
    grid, area = plane(5.0, 0.04)
    log_density = target.log_prob(grid)
    expected = -float((log_density.exp() * log_density).sum()) * area
    assert target.entropy() == pytest.approx(expected, abs=1e-9)
    assert target.entropy() == pytest.approx(paper_source().entropy(), abs=1e-12)
    assert target.entropy() == pytest.approx(1.19, abs=0.01)


def test_entropy_by_sampling() -> None:
    """Monte Carlo is used where components differ in variance; quadrature gives the truth."""
    mixture, num = uneven(2), 200_000
    grid, area = plane(9.0, 0.04)
    log_density = mixture.log_prob(grid)
    expected = -float((log_density.exp() * log_density).sum()) * area
    second = float((log_density.exp() * log_density**2).sum()) * area
    error = math.sqrt((second - expected**2) / num)
    assert abs(mixture.entropy(num=num, seed=2) - expected) < 5 * error


def test_mode_mass_is_unbiased() -> None:
    """The mean responsibility has mean w exactly, overlapping components included (5 standard errors)."""
    mixture, n = uneven(2), 30_000
    x = mixture.sample(n, seed=6, balanced=False)
    error = mixture.responsibilities(x.double()).std(dim=0) / math.sqrt(n)
    mass = mixture.mode_mass(x)
    assert ((mass - mixture.weights).abs() < 5 * error).all()
    assert float(mass.sum()) == pytest.approx(1.0, abs=1e-12)
    assert mixture.mode_mass(torch.tensor([[1e3, 1e3]]))[2] == pytest.approx(1.0), "the widest mode owns the tail"


@pytest.fixture(params=["vp_linear", "cosine", "discrete"])
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    if request.param == "discrete":
        return NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 200))
    return getattr(NoiseSchedule, request.param)()


def test_exact_denoiser_and_guidance(schedule: NoiseSchedule) -> None:
    """All four parametrisations guided by the formulas agree with the target's own closed forms."""
    source, target = uneven(), shifted()
    denoiser, guidance = exact_denoiser(source, schedule), exact_guidance(target, source, schedule)
    oracle = ExactDenoiser(target, schedule)
    assert isinstance(guidance, ExactGuidance)
    assert denoiser.schedule is schedule
    assert denoiser.event_shape == guidance.event_shape == (3,)
    x = points(19, 3)
    for fraction in (0.0, 0.13, 0.6, 1.0):
        t = schedule.t_min + fraction * (schedule.t_max - schedule.t_min)
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        eps = denoiser.epsilon(x, t)
        _, g = guidance.log_ratio_and_grad(x, t)
        eps_q = oracle.epsilon(x, t)
        score_q = target.noised(alpha, sigma).score(x)
        torch.testing.assert_close(eps - sigma * g, eps_q, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(-eps / sigma + g, score_q, rtol=1e-9, atol=1e-9)
        x0 = (x - sigma * eps) / alpha
        x0_q = (x - sigma * eps_q) / alpha
        torch.testing.assert_close(x0 + sigma**2 / alpha * g, x0_q, rtol=1e-9, atol=1e-9)
        v, v_q = alpha * eps - sigma * x0, alpha * eps_q - sigma * x0_q
        # The identity divides by alpha, which is 6e-3 at the noisiest time.
        torch.testing.assert_close(v - sigma / alpha * g, v_q, rtol=1e-7, atol=1e-9)
        # Tweedie: the predicted x0 is the posterior mean, here summed over components in closed form.
        m, variance = target.means, target.variance[:, None]
        posterior = m + alpha * variance / (alpha**2 * variance + sigma**2) * (x[:, None] - alpha * m)
        share = target.noised(alpha, sigma).responsibilities(x)
        torch.testing.assert_close(x0_q, (share[:, :, None] * posterior).sum(dim=1), rtol=1e-7, atol=1e-7)


def test_a_time_for_each_sample(schedule: NoiseSchedule) -> None:
    source, target = uneven(), shifted()
    denoiser, guidance = exact_denoiser(source, schedule), exact_guidance(target, source, schedule)
    x = points(5, 3)
    times = torch.linspace(schedule.t_min, schedule.t_max, 5, dtype=DOUBLE)
    eps, (value, gradient) = denoiser.epsilon(x, times), guidance.log_ratio_and_grad(x, times)
    for i, t in enumerate(times.tolist()):
        one = x[i : i + 1]
        torch.testing.assert_close(eps[i : i + 1], denoiser.epsilon(one, t), rtol=1e-12, atol=1e-12)
        single_value, single_gradient = guidance.log_ratio_and_grad(one, t)
        torch.testing.assert_close(value[i : i + 1], single_value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient[i : i + 1], single_gradient, rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(0, 9),
    dimension=st.integers(1, 7),
    components=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_shapes_and_dtypes(batch: int, dimension: int, components: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mixture = GaussianMixture(torch.randn(components, dimension, generator=generator), 0.4)
    x = torch.randn(batch, dimension, generator=generator)
    assert mixture.log_prob(x).shape == (batch,)
    assert mixture.score(x).shape == x.shape
    assert mixture.responsibilities(x).shape == (batch, components)
    for dtype in (torch.float32, torch.bfloat16, DOUBLE):
        value, gradient = log_density_ratio_and_grad(mixture, mixture, x.to(dtype), 0.6, 0.8)
        assert value.dtype == gradient.dtype == dtype
        assert not value.any()
        assert not gradient.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.5, 0.5], 0.1), r"means must be finite with shape \[K, D\], got shape \[2\]"),
        (([[math.nan, 0.5]], 0.1), "means must be finite"),
        (([[0.5, 0.5]], 0.0), r"variance must be finite and positive, got \[0\.0\]"),
        (
            ([[0.5, 0.5]], [0.1, 0.1]),
            r"variance must be one number or have one entry for each of the 1 means, got shape \[2\]",
        ),
        (([[0.5], [0.1]], 0.1, [1.0, -1.0]), "weights must be finite and positive"),
    ],
)
def test_bad_mixtures(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianMixture(*arguments)


def test_bad_arguments(schedule: NoiseSchedule) -> None:
    mixture = uneven()
    with pytest.raises(ValueError, match=r"x must have shape \[B, 3\], got \[4, 2\]"):
        mixture.score(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="n must be an integer >= 1, got 0"):
        mixture.sample(0)
    with pytest.raises(ValueError, match="sigma must be finite"):
        mixture.noised(1.0, -1.0)
    with pytest.raises(ValueError, match="one dimension, got 2 and 3"):
        exact_guidance(uneven(2), mixture, schedule)
    with pytest.raises(ValueError, match="labels must be None"):
        exact_denoiser(mixture, schedule).epsilon(torch.zeros(1, 3), 0.5, torch.zeros(1))
