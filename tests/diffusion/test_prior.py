"""The priors: moments, the start of sampling in closed form, the same start however it is drawn, files, errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from tgdp_fast import (
    CheckpointError,
    Denoiser,
    EmpiricalPrior,
    GaussianPrior,
    NoiseSchedule,
    ScoreMLP,
    sample,
    sample_to_file,
    solver_table,
)
from tgdp_fast.data.gaussians import GaussianMixture, exact_denoiser, exact_guidance
from tgdp_fast.diffusion.prior import Prior, prior_from_tensors
from tgdp_fast.ops.noise import normal

#: That of SSSD-ECG, which ends at alpha_bar = 0.13.
SCHEDULE = NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 200))
ALPHA, SIGMA = SCHEDULE.alpha(199.0), SCHEDULE.sigma(199.0)

SHAPE = (5, 3)
MEAN = torch.linspace(-1.0, 1.5, 15, dtype=torch.float64)


def covariance() -> Tensor:
    """Eigenvalues from 0.05 to 6, in a basis of no meaning."""
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(15, 15, dtype=torch.float64, generator=generator)).Q
    return basis @ torch.logspace(math.log10(0.05), math.log10(6.0), 15, dtype=torch.float64).diag() @ basis.T


class GaussianDenoiser:
    """The exact epsilon of N(MEAN, covariance()) data."""

    schedule = SCHEDULE
    event_shape = SHAPE
    num_classes = 0

    def epsilon(self, x: Tensor, t: float, labels: Tensor | None = None) -> Tensor:
        alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
        noised = alpha**2 * covariance() + sigma**2 * torch.eye(15, dtype=torch.float64)
        centred = x.flatten(1).double() - alpha * MEAN
        return (sigma * torch.linalg.solve(noised, centred.T).T).reshape(x.shape).float()


def exact_prior() -> GaussianPrior:
    variances, directions = torch.linalg.eigh(covariance())
    return GaussianPrior(MEAN.reshape(SHAPE), directions.flip(1), variances.flip(0), 0.0)


def function_of(matrix: Tensor, function: Any) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ function(values).diag() @ vectors.T


# ---------------------------------------------------------------------------------------------------------- moments


def test_fit_finds_mean_and_covariance() -> None:
    """Against numpy, of more samples than elements and of fewer."""
    for count in (400, 9):
        x = np.random.default_rng(0).standard_normal((count, *SHAPE)) * 2.0 + 1.0
        x[:, 0, 1] *= 3.0
        prior = GaussianPrior.fit(x)
        flat = x.astype(np.float32).reshape(count, 15).astype(np.float64)
        assert prior.event_shape == SHAPE
        assert prior.variances.shape == (min(15, count - 1),)
        assert np.allclose(prior.mean.flatten(), flat.mean(0), rtol=0, atol=1e-12)
        rebuilt = prior.directions @ prior.variances.diag() @ prior.directions.T
        assert np.allclose(rebuilt, np.cov(flat.T), rtol=0, atol=1e-11)
        assert prior.remainder == pytest.approx(0.0, abs=1e-13)
        assert torch.allclose(prior.directions.T @ prior.directions, torch.eye(len(prior.variances)).double())
        assert bool((prior.variances.diff() <= 0).all())


@pytest.mark.parametrize("count", [400, 9])
@pytest.mark.parametrize("rank", [0, 4, 15])
def test_a_lower_rank_keeps_the_largest_variances_and_shares_the_rest(count: int, rank: int) -> None:
    x = np.random.default_rng(1).standard_normal((count, 15)) @ np.diag(np.linspace(0.5, 3.0, 15))
    prior = GaussianPrior.fit(x, rank=rank)
    spectrum = np.linalg.eigvalsh(np.cov(x.astype(np.float32).astype(np.float64).T))[::-1]
    kept = min(rank, 15, count - 1)
    assert np.allclose(prior.variances, spectrum[:kept], rtol=1e-10)
    total = float(prior.variances.sum()) + prior.remainder * (15 - kept)
    assert total == pytest.approx(spectrum.sum(), rel=1e-10)


def test_weights_count_as_repetitions() -> None:
    """Integer weights give the mean and, up to the correction for the mean, the covariance of repeated rows."""
    x = np.random.default_rng(2).standard_normal((40, 6)).astype(np.float32)
    weights = np.random.default_rng(3).integers(0, 4, 40)
    prior = GaussianPrior.fit(x, weights=weights)
    repeated = GaussianPrior.fit(np.repeat(x, weights, axis=0))
    share = weights / weights.sum()
    total = weights.sum()
    correction = (1 - 1 / total) / (1 - (share**2).sum())
    assert torch.allclose(prior.mean, repeated.mean, rtol=0, atol=1e-14)
    assert torch.allclose(prior.variances, correction * repeated.variances, rtol=1e-12)
    scaled = GaussianPrior.fit(x, weights=torch.from_numpy(weights * 1e-300))
    assert torch.allclose(scaled.variances, prior.variances, rtol=1e-12)
    equal = GaussianPrior.fit(x, weights=np.full(40, 7.0))
    assert torch.allclose(equal.variances, GaussianPrior.fit(x).variances, rtol=1e-12)


@pytest.mark.parametrize("rank", [0, 4, 15])
def test_the_start_has_the_law_of_noised_data(rank: int) -> None:
    """from_noise() is linear in z: its matrix times its transpose is the covariance, its value at 0 the mean."""
    x = np.random.default_rng(4).standard_normal((50, *SHAPE))
    prior = GaussianPrior.fit(x, rank=rank)
    zero = prior.from_noise(torch.zeros(1, *SHAPE), ALPHA, SIGMA).double()
    matrix = (prior.from_noise(torch.eye(15).reshape(15, *SHAPE), ALPHA, SIGMA).double() - zero).reshape(15, 15)
    across = torch.eye(15).double() - prior.directions @ prior.directions.T
    clean = prior.directions @ prior.variances.diag() @ prior.directions.T + prior.remainder * across
    noised = ALPHA**2 * clean + SIGMA**2 * torch.eye(15).double()
    # Results are rounded to float32, 2^-24 of values up to 2; 15 products of two add up.
    assert torch.allclose(zero[0], ALPHA * prior.mean, rtol=0, atol=2**-23)
    assert torch.allclose(matrix @ matrix.T, noised, rtol=0, atol=15 * 2 * 2**-22)
    # The density is that of this distribution.
    points = torch.randn(7, *SHAPE)
    exact = MultivariateNormal(ALPHA * prior.mean.flatten(), noised)
    expected = exact.log_prob(points.flatten(1).double())
    assert torch.allclose(prior.log_prob(points, ALPHA, SIGMA), expected, rtol=1e-12)


def test_standardised_uncorrelated_data_give_back_the_standard_normal() -> None:
    prior = GaussianPrior(torch.zeros(6), torch.zeros(6, 0), torch.zeros(0), 1.0)
    z = torch.randn(4, 6)
    assert torch.allclose(prior.from_noise(z, ALPHA, SIGMA), z, rtol=1e-6)


# --------------------------------------------------------------------------------------------------------- sampling


def test_the_matched_prior_samples_gaussian_data_exactly_and_the_standard_normal_does_not() -> None:
    """The exact probability flow is x_0 = mu + (C / S)^(1/2) (x_T - alpha mu), with S = alpha^2 C + sigma^2.

    From x_T ~ N(alpha mu, S) it gives N(mu, C), the data. From N(0, I) it gives mean mu - alpha (C / S)^(1/2) mu and
    covariance C / S: along the first direction 3.6 instead of 6.
    """
    num = 4000
    options: dict[str, Any] = {"num": num, "solver": "dpmpp_2m", "steps": 100, "seed": 4}
    c, prior = covariance(), exact_prior()
    s = ALPHA**2 * c + SIGMA**2 * torch.eye(15, dtype=torch.float64)
    root = function_of(c, torch.sqrt) @ function_of(s, torch.rsqrt)
    z = normal(4, torch.arange(num), 15, 0).reshape(num, *SHAPE)
    spreads = []
    laws = ((prior, MEAN, c), (None, MEAN - ALPHA * root @ MEAN, root @ root))
    for given, mean, spread in laws:
        x = sample(GaussianDenoiser(), prior=given, **options).flatten(1).double()
        start = (z if given is None else given.from_noise(z, ALPHA, SIGMA)).flatten(1).double()
        flow = MEAN + (start - ALPHA * MEAN) @ root
        # A hundred steps of second order leave 0.0006 of values up to 10.
        assert torch.allclose(x, flow, rtol=0, atol=0.002)
        # Five standard errors of the moments of Gaussian samples.
        variances = spread.diagonal()
        errors = ((spread.square() + variances[:, None] * variances) / num).sqrt()
        assert bool(((x.mean(0) - mean).abs() <= 5 * (variances / num).sqrt() + 0.002).all())
        assert bool(((x.T.cov() - spread).abs() <= 5 * errors + 0.002 * variances.max()).all())
        spreads.append(float((x @ prior.directions[:, 0]).var()))
    assert spreads[0] > 1.5 * spreads[1]
    assert float((ALPHA * root @ MEAN).abs().max()) > 0.3


@pytest.mark.parametrize("kind", [GaussianPrior.fit, EmpiricalPrior])
def test_the_start_is_that_of_the_solvers_first_time(kind: Any) -> None:
    """A table that begins at less noise starts from data noised that much, in bf16 as well: the state is float32."""
    seen: list[Tensor] = []

    class Watching(torch.nn.Module):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            seen.append(x.clone())
            return torch.zeros_like(x)

    prior = kind(torch.randn(20, *SHAPE))
    table = solver_table("ddim", SCHEDULE, times=[50, 10])
    denoiser = Denoiser(Watching(), SCHEDULE)
    expected = prior.start(6, torch.arange(3, 8), SCHEDULE.alpha(50.0), SCHEDULE.sigma(50.0))
    assert expected.shape == (5, *SHAPE)
    for precision in ("fp32", "bf16"):
        seen.clear()
        sample(denoiser, num=5, shape=SHAPE, solver=table, seed=6, first_index=3, prior=prior, precision=precision)
        assert torch.equal(seen[0], expected)


def test_an_empirical_start_is_a_noised_row_drawn_with_its_weight() -> None:
    rows = torch.randn(6, *SHAPE)
    weights = [0.0, 2.0, 1.0, 0.0, 3.0, 0.0]
    prior = EmpiricalPrior(rows, weights=weights)
    index = torch.arange(-3000, 3000)
    chosen = prior.rows(7, index)
    share = torch.bincount(chosen, minlength=6) / 6000
    # Five standard errors of a share of 1/2.
    assert torch.allclose(share, torch.tensor(weights) / 6, rtol=0, atol=5 * 0.5 / math.sqrt(6000))
    assert share[[0, 3, 5]].tolist() == [0, 0, 0]
    z = normal(7, index, 15, 0).reshape(-1, *SHAPE)
    assert torch.allclose(prior.start(7, index, 0.6, 0.8), 0.6 * rows[chosen] + 0.8 * z, rtol=0, atol=1e-6)
    # Another seed, and an index beyond 32 bits, choose otherwise; one index always alike.
    assert not torch.equal(prior.rows(8, index), chosen)
    assert not torch.equal(prior.rows(7, index + 2**40), chosen)
    assert torch.equal(prior.rows(7, index[17:19]), chosen[17:19])
    # The choice is independent of the noise: no row has noise of another mean or variance.
    for row in (1, 2, 4):
        noise = z[chosen == row]
        assert abs(float(noise.mean())) < 5 / math.sqrt(noise.numel())
        assert float(noise.var()) == pytest.approx(1.0, abs=5 * math.sqrt(2 / noise.numel()))


def test_an_empirical_start_reaches_a_law_that_no_gaussian_is() -> None:
    """A mode at -6 with a twentieth of the mass. The flow of one dimension keeps the order, so the mode gets what lies
    below the quantile 0.05 of x_T, which is at -1.83: 0.034 of N(0, 1), 0.042 of the matched Gaussian N(0, 1.118).
    """
    mixture = GaussianMixture([[-6.0], [6.0 / 19.0]], 0.01, [1.0, 19.0])
    data = mixture.sample(5000, seed=1)
    for prior, expected in ((None, 0.0336), (GaussianPrior.fit(data), 0.0417), (EmpiricalPrior(data), 0.05)):
        x = sample(exact_denoiser(mixture, SCHEDULE), prior=prior, num=20_000, steps=60, seed=3)
        # Three standard errors.
        assert float((x < -3).double().mean()) == pytest.approx(expected, abs=3 * math.sqrt(0.05 / 20_000))


def test_guided_samples_start_from_weighted_source_samples() -> None:
    """Source N(0, I), target N(m, 0.49 I), exact guidance: the start must be the target's.

    With N(0, I) the mean lacks alpha (v / S)^(1/2) of m, as above: about a quarter.
    """
    source, target = GaussianMixture([[0.0, 0.0]], 1.0), GaussianMixture([[0.8, -0.4]], 0.49)
    data = source.sample(20_000, seed=1)
    guidance = exact_guidance(target, source, SCHEDULE)
    weights = guidance.log_ratio_and_grad(data.double(), 0.0)[0].softmax(0)
    options: dict[str, Any] = {"num": 8_000, "steps": 60, "seed": 3}
    plain = sample(exact_denoiser(source, SCHEDULE), guidance, **options).double()
    expected = torch.tensor([0.8, -0.4], dtype=torch.float64)
    for prior in (GaussianPrior.fit(data, weights=weights), EmpiricalPrior(data, weights=weights)):
        found = sample(exact_denoiser(source, SCHEDULE), guidance, prior=prior, **options).double()
        # 0.7 / sqrt(8,000) of the draw, and 0.25 of the weighted mean's error, about 1 / sqrt(5,000).
        assert torch.allclose(found.mean(0), expected, rtol=0, atol=5 * (0.008 + 0.25 * 0.014))
        assert torch.allclose(found.var(0), torch.full((2,), 0.49).double(), rtol=0, atol=0.05)
    assert float(plain.mean(0)[0]) < 0.8 - 0.15


def small_model() -> Denoiser:
    return Denoiser(ScoreMLP((4,), 16, 2), SCHEDULE, "v_prediction", time_input="half_log_snr")


def small_prior(seed: int = 0) -> GaussianPrior:
    return GaussianPrior.fit(1.0 + 2.0 * np.random.default_rng(seed).standard_normal((30, 4)), rank=2)


@pytest.mark.parametrize("prior", [small_prior(), EmpiricalPrior(np.random.default_rng(5).standard_normal((9, 4)))])
def test_samples_depend_on_their_index_alone_and_on_the_prior(prior: Prior) -> None:
    denoiser = small_model()
    options: dict[str, Any] = {"steps": 4, "seed": 2**63 + 5, "prior": prior}
    whole = sample(denoiser, num=23, **options)
    part = sample(denoiser, num=11, first_index=7, batch_size=4, **options)
    assert torch.allclose(part, whole[7:18], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole, sample(denoiser, num=23, **(options | {"prior": None})), atol=0.1)


def test_a_start_has_the_same_bits_in_every_batch() -> None:
    prior = exact_prior()
    z = torch.randn(33, *SHAPE)
    whole = prior.from_noise(z, ALPHA, SIGMA)
    parts = torch.cat([prior.from_noise(part, ALPHA, SIGMA) for part in z.split([1, 7, 25])])
    assert torch.equal(whole, parts)


class StoppedError(Exception):
    pass


def test_a_file_resumes_with_the_same_prior_only(tmp_path: Path) -> None:
    denoiser, path = small_model(), tmp_path / "x.npy"
    options: dict[str, Any] = {"num": 7, "steps": 3, "block_size": 3}

    def interrupt() -> None:
        starts = []

        def stop(step: int, *_: Any) -> None:
            starts.append(step)
            if starts.count(0) == 2:
                raise StoppedError

        with pytest.raises(StoppedError):
            sample_to_file(path, denoiser, prior=small_prior(), callback=stop, **options)

    for prior, left in ((small_prior(), 4), (small_prior(1), 7), (None, 7)):
        interrupt()
        drawn: list[int] = []
        found = sample_to_file(
            path,
            denoiser,
            prior=prior,
            callback=lambda step, t, x, x0, drawn=drawn: drawn.append(len(x) if step == 0 else 0),
            **options,
        )
        assert sum(drawn) == left
        assert np.allclose(found, sample(denoiser, num=7, steps=3, prior=prior).numpy(), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------- files and errors


@pytest.mark.parametrize("prior", [small_prior(), EmpiricalPrior(np.eye(3, 4), weights=[1, 2, 0])])
def test_save_and_load(tmp_path: Path, prior: Prior) -> None:
    prior.save(tmp_path / "prior")
    loaded = Prior.load(tmp_path / "prior")
    assert type(loaded) is type(prior)
    index = torch.arange(40)
    assert torch.equal(loaded.start(3, index, ALPHA, SIGMA), prior.start(3, index, ALPHA, SIGMA))
    assert loaded.event_shape == loaded.to("cpu").event_shape == (4,)
    small_model().save(tmp_path / "denoiser")
    with pytest.raises(CheckpointError, match="kind 'denoiser', expected 'prior'"):
        Prior.load(tmp_path / "denoiser")


def test_incomplete_tensors_are_refused() -> None:
    tensors = small_prior().to_tensors()
    with pytest.raises(ValueError, match="samples and weights, or mean, .*, but variances is missing"):
        prior_from_tensors({k: v for k, v in tensors.items() if k != "variances"})
    with pytest.raises(ValueError, match=r"directions must have shape \[4, R\], .* got \[4, 2\] and variances \[1\]"):
        prior_from_tensors(tensors | {"variances": torch.ones(1)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": np.zeros(4)}, "samples must have shape"),
        ({"samples": np.zeros((1, 4))}, "samples must hold at least 2 samples"),
        ({"samples": np.full((5, 2), np.nan)}, "samples must be finite"),
        ({"rank": -1}, "rank must be an integer >= 0"),
        ({"rank": 5}, "rank must be at most 4, the elements of a sample, got 5"),
        ({"weights": np.ones(4)}, r"weights must have shape \[5\], one per sample, got \[4\]"),
        ({"weights": [1, 1, -1, 1, 1]}, "weights must be finite, >= 0 and not all 0"),
        ({"weights": [1, 1, math.inf, 1, 1]}, "weights must be finite, >= 0 and not all 0"),
        ({"weights": [0, 0, 2, 0, 0]}, "weights must be positive for at least two samples"),
        ({"weights": np.zeros(5)}, "weights must be finite, >= 0 and not all 0"),
    ],
)
def test_bad_fits_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianPrior.fit(**{"samples": np.eye(5, 4), **arguments})


def test_an_empirical_prior_checks_its_data() -> None:
    with pytest.raises(ValueError, match="samples must hold at least 1 samples"):
        EmpiricalPrior(np.zeros((0, 4)))
    with pytest.raises(ValueError, match=r"weights must have shape \[3\]"):
        EmpiricalPrior(np.zeros((3, 4)), weights=[1.0])


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (np.zeros(4), "prior must be a GaussianPrior, an EmpiricalPrior or None, got ndarray"),
        (GaussianPrior.fit(np.eye(3)), r"prior must be of samples of shape \(4,\), got one of \(3,\)"),
    ],
)
def test_a_prior_that_does_not_fit_is_refused_before_any_work(tmp_path: Path, prior: Any, message: str) -> None:
    denoiser = small_model()
    denoiser.network.register_forward_hook(_never)
    with pytest.raises(ValueError, match=message):
        sample(denoiser, num=2, prior=prior)
    with pytest.raises(ValueError, match=message):
        sample_to_file(tmp_path / "x.npy", denoiser, num=2, prior=prior)
    assert not any(tmp_path.iterdir())


def _never(*_: Any) -> None:
    raise AssertionError("a network was run")
