"""Guidance in the loops of other samplers, written out here: guided-diffusion's and k-diffusion's, on Gaussians.

Source N(m_p, v_p), target N(m_q, v_q): every step of every loop is affine in the state, so the mean and the variance of
its result follow from the loop's coefficients alone, and the samples must have them to the error of their number.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tgdp_fast import Denoiser, GuidanceNetwork, NoiseSchedule, ScoreMLP, sample, solver_table
from tgdp_fast.data.gaussians import ExactDenoiser, ExactGuidance, GaussianMixture
from tgdp_fast.integrations.cond_fn import as_cond_fn
from tgdp_fast.integrations.k_diffusion import KDiffusionDenoiser
from tgdp_fast.ops.noise import normal

SOURCE, TARGET = ((0.5, -0.3), 0.4), ((-0.2, 0.8), 0.15)
COUNT = 4_099
CONTINUOUS = NoiseSchedule.vp_linear()


def mixture(law) -> GaussianMixture:
    return GaussianMixture([list(law[0])], law[1])


def discrete(steps: int) -> NoiseSchedule:
    """The linear schedule of DDPM in any number of steps; alpha_bar ends at 4e-5."""
    return NoiseSchedule.from_betas(betas(steps))


def betas(steps: int) -> np.ndarray:
    return np.linspace(0.1, 20.0, steps) / steps


def models(schedule: NoiseSchedule) -> tuple[ExactDenoiser, ExactGuidance]:
    return ExactDenoiser(mixture(SOURCE), schedule), ExactGuidance(mixture(TARGET), mixture(SOURCE), schedule)


def start(count: int = COUNT, seed: int = 3) -> torch.Tensor:
    """x_T of the samples 0 .. count - 1 of our sampler."""
    return normal(seed, torch.arange(count), 2, 0)


# the samplers ------------------------------------------------------------------------------------------------------


def ddim_loop(epsilon, alphas_bar, indices, x, cond_fn=None, **model_kwargs):
    """Algorithm 2 of Dhariwal and Nichol over a decreasing list of indices of the training schedule."""
    for index, after in zip(indices, [*indices[1:], None], strict=True):
        t = torch.full((len(x),), index)
        eps = epsilon(x, t)
        if cond_fn is not None:
            eps = eps - math.sqrt(1 - alphas_bar[index]) * cond_fn(x, t, **model_kwargs)
        x_0 = (x - math.sqrt(1 - alphas_bar[index]) * eps) / math.sqrt(alphas_bar[index])
        previous = 1.0 if after is None else alphas_bar[after]
        x = math.sqrt(previous) * x_0 + math.sqrt(1 - previous) * eps
    return x


def variances(steps: int, kind: str) -> np.ndarray:
    """Of the reverse steps: beta, or that of the posterior; the first step's noise is never added."""
    beta = betas(steps)
    alphas_bar = np.cumprod(1 - beta)
    return beta if kind == "large" else beta * (1 - np.append(1.0, alphas_bar[:-1])) / (1 - alphas_bar)


def p_sample_loop(epsilon, steps, kind, x, noise, cond_fn):
    """Algorithm 1 of Dhariwal and Nichol."""
    beta = betas(steps)
    alphas_bar, variance = np.cumprod(1 - beta), variances(steps, kind)
    for index in reversed(range(steps)):
        t = torch.full((len(x),), index)
        mean = (x - beta[index] / math.sqrt(1 - alphas_bar[index]) * epsilon(x, t)) / math.sqrt(1 - beta[index])
        x = mean + variance[index] * cond_fn(x, t)
        if index > 0:
            x = x + math.sqrt(variance[index]) * noise(x)
    return x


def euler_loop(model, x, sigmas, **extra_args):
    """Euler's method of k-diffusion; sigmas decrease to 0."""
    for sigma, after in zip(sigmas, sigmas[1:], strict=False):
        denoised = model(x, x.new_full((len(x),), sigma), **extra_args)
        x = x + (x - denoised) / sigma * (after - sigma)
    return x


# what they must give ------------------------------------------------------------------------------------------------


def score(law, alpha_bar):
    """Factor and constant of the score of the noised Gaussian, for each coordinate: a x + b."""
    mean, variance = np.array(law[0]), alpha_bar * law[1] + 1 - alpha_bar
    return -1 / variance, math.sqrt(alpha_bar) * mean / variance


def moments_of_p_sample(steps, kind):
    """Mean [2] and variance of the loop's result, from N(0, 1), by its affine steps."""
    beta, variance = betas(steps), variances(steps, kind)
    alphas_bar = np.cumprod(1 - beta)
    mean, spread = np.zeros(2), 1.0
    for index in reversed(range(steps)):
        (a_p, b_p), (a_q, b_q) = score(SOURCE, alphas_bar[index]), score(TARGET, alphas_bar[index])
        root = math.sqrt(1 - beta[index])
        factor = (1 + beta[index] * a_p) / root + variance[index] * (a_q - a_p)
        mean = factor * mean + beta[index] * b_p / root + variance[index] * (b_q - b_p)
        spread = factor**2 * spread + (variance[index] if index > 0 else 0.0)
    return mean, spread


def moments_of_ddim(alphas_bar, indices):
    """The same for ddim with the target's own score: Theorem 3.1 says that this is the guided one."""
    mean, deviation = np.zeros(2), 1.0
    for index, after in zip(indices, [*indices[1:], None], strict=True):
        now, previous = alphas_bar[index], 1.0 if after is None else alphas_bar[after]
        a, b = score(TARGET, now)
        weight = math.sqrt(1 - previous) - math.sqrt(previous * (1 - now) / now)
        factor = math.sqrt(previous / now) - weight * math.sqrt(1 - now) * a
        mean = factor * mean - weight * math.sqrt(1 - now) * b
        deviation = factor * deviation
    return mean, deviation**2


def assert_moments(x, mean, variance):
    """Six standard errors: sqrt(variance / n) of a mean, variance sqrt(2 / n) of a variance."""
    x = x.double().numpy()
    assert np.abs(x.mean(0) - mean).max() < 6 * math.sqrt(variance / len(x))
    assert np.abs(x.var(0) - variance).max() < 6 * variance * math.sqrt(2 / len(x))


def error(moments):
    """Largest deviation from the target: mean in its standard deviations, variance relative."""
    mean, variance = moments
    return max(np.abs(mean - TARGET[0]).max() / math.sqrt(TARGET[1]), abs(variance / TARGET[1] - 1))


# guided-diffusion ---------------------------------------------------------------------------------------------------


def test_ddim_loop_reaches_the_target():
    schedule = discrete(200)
    denoiser, guidance = models(schedule)
    alphas_bar, indices = np.array(schedule.parameters), list(range(199, -1, -1))
    drawn = ddim_loop(denoiser.epsilon, alphas_bar, indices, start(), as_cond_fn(guidance))
    expected = moments_of_ddim(alphas_bar, indices)
    assert_moments(drawn, *expected)
    # The loop's own error, first order in the step: 200 steps leave a few percent, and 800 a quarter of it.
    assert error(expected) < 0.1
    finer = discrete(800)
    quarter = error(moments_of_ddim(np.array(finer.parameters), list(range(799, -1, -1))))
    assert quarter == pytest.approx(error(expected) / 4, rel=0.15)
    unguided = ddim_loop(denoiser.epsilon, alphas_bar, indices, start())
    assert np.abs(unguided.mean(0).numpy() - SOURCE[0]).max() < 0.05


@pytest.mark.parametrize("kind", ["small", "large"])
def test_p_sample_loop_reaches_the_target(kind):
    steps = 300
    denoiser, guidance = models(discrete(steps))
    generator = torch.Generator().manual_seed(7)
    drawn = p_sample_loop(
        denoiser.epsilon,
        steps,
        kind,
        start().double(),
        lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype),
        as_cond_fn(guidance),
    )
    expected = moments_of_p_sample(steps, kind)
    assert_moments(drawn, *expected)
    # variance * grad is not beta / sqrt(alpha) * grad; that and the loop's own error are of first order in the step.
    assert error(expected) < 0.15
    assert error(moments_of_p_sample(4 * steps, kind)) == pytest.approx(error(expected) / 4, rel=0.15)


def test_ddim_loop_is_our_sampler():
    """All indices, and a respaced run in which cond_fn is called with the indices of the training schedule."""
    schedule = discrete(100)
    denoiser, guidance = models(schedule)
    for indices in (list(range(99, -1, -1)), [99, 80, 61, 43, 20, 7, 0]):
        table = solver_table("ddim", schedule, times=[float(index) for index in indices])
        ours = sample(denoiser, guidance, num=51, solver=table, seed=3, scale=0.8)
        theirs = ddim_loop(
            denoiser.epsilon, np.array(schedule.parameters), indices, start(51), as_cond_fn(guidance, scale=0.8)
        )
        # Both keep the state in float32: a rounding of 6e-8 in each step, on states of a few units.
        assert torch.allclose(ours, theirs, rtol=0, atol=2e-5)


def test_cond_fn_is_the_gradient_of_the_log_ratio():
    """Against a difference quotient of the closed form, with sign and scale, at every time convention."""
    schedule = discrete(50)
    x, t = torch.randn(5, 2, dtype=torch.float64), torch.tensor([0, 7, 20, 33, 49])

    def log_ratio(x):
        alpha_bar = torch.tensor(schedule.parameters, dtype=torch.float64)[t]
        total = 0.0
        for sign, (mean, variance) in ((1, TARGET), (-1, SOURCE)):
            spread = alpha_bar * variance + 1 - alpha_bar
            centred = x - alpha_bar.sqrt()[:, None] * torch.tensor(mean, dtype=torch.float64)
            total = total + sign * (-0.5 * centred.square().sum(1) / spread - spread.log())
        return total

    found = as_cond_fn(models(schedule)[1], scale=1.5)(x, t)
    assert found.shape == x.shape
    for column in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[column] = 1e-5
        quotient = (log_ratio(x + step) - log_ratio(x - step)) / 2e-5
        assert torch.allclose(found[:, column], 1.5 * quotient, rtol=1e-7, atol=1e-8)
    # rescale_timesteps: the sampler hands over 1000 t / N.
    rescaled = as_cond_fn(models(schedule)[1], scale=1.5, time_scale=20.0)(x, t * 20.0)
    assert torch.allclose(rescaled, found, rtol=1e-12)
    # The guidance's schedule is another one: the same log-SNR, hence the same gradient.
    continuous = NoiseSchedule.vp_linear(t_min=1e-6, t_max=2.0)
    found_there = as_cond_fn(models(continuous)[1], schedule, scale=1.5)(x, t)
    assert torch.allclose(found_there, found, rtol=1e-9, atol=1e-12)


def test_learned_guidance_with_labels():
    network = GuidanceNetwork((2,), discrete(30), width=8, depth=2, num_classes=3)
    x, t, y = torch.randn(4, 2), torch.tensor([0, 9, 18, 29]), torch.tensor([0, 2, 1, 2])
    cond_fn = as_cond_fn(network, scale=2.0)
    found = cond_fn(x, t, y=y, something_else=1)
    assert not found.requires_grad
    expected = network.log_ratio_and_grad(x, t.double(), y)[1].detach()
    assert torch.allclose(found, 2.0 * expected, rtol=1e-6, atol=1e-8)
    renamed = as_cond_fn(network, scale=2.0, labels="classes")
    assert torch.equal(renamed(x, t, classes=y), found)
    with pytest.raises(ValueError, match="labels are required"):
        cond_fn(x, t)
    unconditional = GuidanceNetwork((2,), discrete(30), width=8, depth=2)
    assert as_cond_fn(unconditional)(x, t, y=y).shape == x.shape
    there = as_cond_fn(network, discrete(60), scale=0.5, labels="classes", time_scale=2.0)
    assert not torch.equal(there(x, 2 * t, classes=y), 0.25 * found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_cond_fn_takes_every_dtype(dtype):
    """The gradient is that of the float32 network, rounded once to the dtype of x."""
    schedule = discrete(1000)
    network = GuidanceNetwork((2,), schedule, width=8, depth=2).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(1))
    cond_fn, t = as_cond_fn(network, schedule, scale=3.0), torch.tensor([0, 10, 500, 999])
    x = start(4).to(dtype)
    expected = 3.0 * network.log_ratio_and_grad(x.float(), t.double())[1].detach()
    for found in (cond_fn(x, t), cond_fn(x.requires_grad_(), t)):
        assert found.dtype == dtype
        assert not found.requires_grad
        torch.testing.assert_close(found, expected.to(dtype), rtol=1e-6, atol=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(cond_fn(x, t), expected.to(dtype), rtol=1e-6, atol=0.0)


def test_cond_fn_refuses_times_beyond_the_schedule():
    """Of a sampler with rescale_timesteps the times are multiples of 1000 / N; its factor takes them back."""
    source, guidance = models(discrete(100))
    x, indices = start(3), torch.tensor([0, 50, 99])
    expected = as_cond_fn(guidance)(x, indices)
    assert torch.allclose(as_cond_fn(guidance, time_scale=10.0)(x, 10.0 * indices), expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"\[0, 99\], got values from 0 to 990; .* time_scale=1000 / N"):
        as_cond_fn(guidance)(x, 10.0 * indices)
    with pytest.raises(ValueError, match=r"\[0, 990\], got values from -1 to -1"):
        as_cond_fn(guidance, time_scale=10.0)(x, torch.full((3,), -1.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_k_diffusion(dtype):
    """x and the model in half precision, log h in float32: the float32 result of the rounded state, rounded once."""
    _, guidance = models(CONTINUOUS)
    seen = []

    class Guidance:
        schedule = CONTINUOUS

        def log_ratio_and_grad(self, x, t, labels=None):
            seen.append(x.dtype)
            return guidance.log_ratio_and_grad(x, t)

    x, sigma = (2.0 * start(5)).to(dtype), torch.full((5,), 0.7)
    result = KDiffusionDenoiser(lambda x, sigma: 0.5 * x, Guidance(), scale=2.0)(x, sigma)
    expected = KDiffusionDenoiser(lambda x, sigma: 0.5 * x, guidance, scale=2.0)(x.float(), sigma)
    assert result.dtype == dtype
    assert seen == [torch.float32]
    torch.testing.assert_close(result, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_cond_fn_refuses():
    guidance = models(CONTINUOUS)[1]
    with pytest.raises(ValueError, match="schedule must be the sampler's discrete .* but none was given"):
        as_cond_fn(guidance)
    with pytest.raises(ValueError, match="schedule must be the sampler's discrete"):
        as_cond_fn(guidance, np.linspace(1e-4, 0.02, 10))
    with pytest.raises(ValueError, match="log_ratio_and_grad"):
        as_cond_fn(lambda x, t: x, discrete(50))
    with pytest.raises(ValueError, match="scale must be finite"):
        as_cond_fn(guidance, discrete(50), scale=math.inf)
    with pytest.raises(ValueError, match="time_scale"):
        as_cond_fn(guidance, discrete(50), time_scale=0.0)


# k-diffusion --------------------------------------------------------------------------------------------------------


def gaussian_denoiser(law):
    """denoised = E[x_0 | x_0 + sigma eps = x] for N(m, v): (v x + sigma^2 m) / (v + sigma^2)."""
    mean, variance = torch.tensor(law[0], dtype=torch.float64), law[1]

    def model(x, sigma):
        squared = sigma.double().square()[:, None]
        return ((variance * x + squared * mean) / (variance + squared)).to(x.dtype)

    return model


@pytest.mark.parametrize("schedule", [CONTINUOUS, discrete(100)], ids=["continuous", "discrete"])
def test_guided_denoiser_is_the_target_s(schedule):
    denoiser, guidance = models(schedule)
    # Inside the schedule, times between its indices included.
    low, high = (float(np.exp(-schedule.half_log_snr(t))) for t in (schedule.t_min, schedule.t_max))
    sigma = torch.from_numpy(np.geomspace(1.01 * low, 0.99 * high, 9))
    x = torch.randn(9, 2, dtype=torch.float64) * (1 + sigma[:, None])
    expected = gaussian_denoiser(TARGET)(x, sigma)
    for model in (gaussian_denoiser(SOURCE), denoiser):
        guided = KDiffusionDenoiser(model, guidance)
        assert torch.allclose(guided(x, sigma), expected, rtol=1e-8, atol=1e-8)
        plain = KDiffusionDenoiser(model)(x, sigma)
        assert torch.allclose(plain, gaussian_denoiser(SOURCE)(x, sigma), rtol=1e-8, atol=1e-8)
        # Linear in the scale.
        half = KDiffusionDenoiser(model, guidance, scale=0.5)(x, sigma)
        assert torch.allclose(half, 0.5 * (plain + expected), rtol=1e-8, atol=1e-8)


def test_euler_loop_reaches_the_target():
    denoiser, guidance = models(CONTINUOUS)
    times = np.linspace(CONTINUOUS.t_max, CONTINUOUS.t_min, 150)
    sigmas = [*np.exp(-CONTINUOUS.half_log_snr(times)).tolist(), 0.0]
    # x / alpha, with x from N(0, I), as our sampler starts.
    x = start() / CONTINUOUS.alpha(CONTINUOUS.t_max)
    drawn = euler_loop(KDiffusionDenoiser(denoiser, guidance), x, sigmas)
    mean, deviation = np.zeros(2), 1.0 / CONTINUOUS.alpha(CONTINUOUS.t_max)
    for sigma, after in zip(sigmas, sigmas[1:], strict=False):
        slope = sigma / (TARGET[1] + sigma**2) * (after - sigma)
        mean, deviation = mean + slope * (mean - TARGET[0]), deviation * (1 + slope)
    assert_moments(drawn, mean, deviation**2)
    assert error((mean, deviation**2)) < 0.1


def test_euler_loop_is_our_sampler():
    schedule = discrete(100)
    denoiser, guidance = models(schedule)
    times = [99.0, 90.0, 71.0, 50.0, 31.0, 12.0, 3.0, 0.0]
    ours = sample(denoiser, guidance, num=51, solver=solver_table("euler", schedule, times=times), seed=3)
    sigmas = [*np.exp(-schedule.half_log_snr(np.array(times))).tolist(), 0.0]
    x = start(51) / schedule.alpha(99.0)
    theirs = euler_loop(KDiffusionDenoiser(denoiser, guidance), x, sigmas)
    # x_ve begins at 150 standard deviations; a rounding there is 6e-8 * 150, and the steps shrink it.
    assert torch.allclose(ours, theirs, rtol=0, atol=5e-5)


def test_networks_of_ours_with_labels():
    schedule = discrete(30)
    denoiser = Denoiser(ScoreMLP((2,), width=8, depth=2, num_classes=3), schedule, time_input="half_log_snr")
    guidance = GuidanceNetwork((2,), schedule, width=8, depth=2, num_classes=3)
    x, y, index = torch.randn(4, 2), torch.tensor([0, 1, 2, 0]), 11.0
    alpha, sigma = schedule.alpha(index), schedule.sigma(index)
    found = KDiffusionDenoiser(denoiser, guidance)(x / alpha, torch.full((4,), sigma / alpha), class_cond=y)
    with torch.no_grad():
        gradient = guidance.log_ratio_and_grad(x, index, y)[1]
        expected = (x - sigma * (denoiser.epsilon(x, index, y) - sigma * gradient)) / alpha
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert not found.requires_grad


def test_sigma_of_float32_finds_the_index():
    schedule, seen = NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 200)), []

    class Recording:
        num_classes = 0

        def log_ratio_and_grad(self, x, t, labels=None):
            seen.append(t)
            return x[:, 0], torch.zeros_like(x)

    sigma = torch.from_numpy(np.exp(-schedule.half_log_snr(np.arange(200.0)))).float()
    KDiffusionDenoiser(lambda x, sigma: x, Recording(), schedule=schedule)(torch.zeros(200, 2), sigma)
    assert torch.equal(seen[0], torch.arange(200, dtype=torch.float64))
    # Beyond the schedule: its ends.
    KDiffusionDenoiser(lambda x, sigma: x, Recording(), schedule=schedule)(torch.zeros(2, 2), torch.tensor([1e-4, 1e4]))
    assert seen[1].tolist() == [0.0, 199.0]


def test_k_diffusion_wrapper_refuses():
    guidance = models(CONTINUOUS)[1]
    with pytest.raises(ValueError, match="model must be callable"):
        KDiffusionDenoiser(3, guidance)
    with pytest.raises(ValueError, match="log_ratio_and_grad"):
        KDiffusionDenoiser(gaussian_denoiser(SOURCE), gaussian_denoiser(TARGET))

    class WithoutSchedule:
        def log_ratio_and_grad(self, x, t, labels=None):
            raise AssertionError

    with pytest.raises(ValueError, match="schedule must be the NoiseSchedule of guidance"):
        KDiffusionDenoiser(gaussian_denoiser(SOURCE), WithoutSchedule())
