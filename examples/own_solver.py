# %% [markdown]
# # A solver of your own
#
# A solver is a table with one small matrix per evaluation of the denoiser. The matrix computes the next state and
# history from the state, the history and the predicted noise:
#
# `[x, m_1..m_H] <- matrix[k] @ [x, m_1..m_H, eps] + [noise_scale[k] z, 0, ..]`
#
# A new solver therefore needs no new kernel: the fused kernels run any table. The example is the two-step method for
# the noise prediction. In half log-SNR, lambda, the exact solution is
#
# $$ x(b) = \frac{\alpha_b}{\alpha_a} x(a) - \sigma_b (e^h - 1)\, \epsilon, \qquad h = \lambda_b - \lambda_a $$
#
# if eps is constant over the step (that is `ddim`). The two-step method instead uses eps in the middle of the step, on
# the line through the last two values.

# %%
import math

import numpy as np
import torch

import tgdp_fast as tgdp
from tgdp_fast.data.gaussians import GaussianMixture, exact_denoiser
from tgdp_fast.ops.noise import normal


def two_step(schedule: tgdp.NoiseSchedule, steps: int) -> tgdp.SolverTable:
    """The two-step method on times uniform in log-SNR, from t_max to t_min."""
    ends = (schedule.half_log_snr(t) for t in (schedule.t_max, schedule.t_min))
    half_log_snr = np.linspace(*ends, steps + 1)
    times = schedule.time_from_half_log_snr(half_log_snr)
    times[0], times[-1] = schedule.t_max, schedule.t_min
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    matrix = np.zeros((steps, 2, 3))  # rows: x, m_1; columns: x, m_1, eps
    for k in range(steps):
        h = half_log_snr[k + 1] - half_log_snr[k]
        change = -sigma[k + 1] * math.expm1(h)
        # h / (2 h of the step before); the first step has none.
        extrapolated = 0.5 if k else 0.0
        matrix[k, 0, 0] = alpha[k + 1] / alpha[k]
        matrix[k, 0, 1:] = -change * extrapolated, change * (1.0 + extrapolated)
        matrix[k, 1] = 0.0, 0.0, 1.0  # remember eps
    return tgdp.SolverTable(
        solver="two_step",
        spacing="explicit",
        times=times[:-1].copy(),
        alpha=alpha[:-1].copy(),
        sigma=sigma[:-1].copy(),
        matrix=matrix,
        noise_scale=np.zeros(steps),
        ends_step=np.ones(steps, dtype=bool),
        history=1,
        final_alpha=float(alpha[-1]),
        final_sigma=float(sigma[-1]),
    )


# %% [markdown]
# ## Is it correct?
#
# Check it where the answer is known. For one Gaussian the denoiser is exact, and the probability-flow equation has a
# closed solution: it scales every state's distance from the mean by the ratio of standard deviations.

# %%
schedule = tgdp.NoiseSchedule.vp_linear()
mean, variance = torch.tensor([0.7, -1.2], dtype=torch.float64), 0.25
denoiser = exact_denoiser(GaussianMixture([mean.tolist()], variance), schedule)


def exact_end(start: torch.Tensor) -> torch.Tensor:
    """Where the probability flow takes x at t_max by the time t_min."""
    times = np.array([schedule.t_max, schedule.t_min])
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    deviation = np.sqrt(alpha**2 * variance + sigma**2)
    return alpha[1] * mean + (start - alpha[0] * mean) * deviation[1] / deviation[0]


start = normal(0, torch.arange(200), 2, 0).double()


def error(table: tgdp.SolverTable) -> float:
    """Largest error of 200 samples at t_min."""
    drawn = tgdp.sample(denoiser, num=200, solver=table, seed=0)
    return float((drawn.double() - exact_end(start)).abs().max())


errors = {}
for steps in (10, 20, 40):
    ddim = tgdp.solver_table("ddim", schedule, steps, denoise_final=False)
    first, second = errors[steps] = error(ddim), error(two_step(schedule, steps))
    print(f"{steps:3d} evaluations: ddim {first:.1e}, two-step {second:.1e}")

# %% [markdown]
# Doubling the steps halves the error of a first-order method and quarters that of a second-order method.

# %%
halved = zip(errors[20], errors[40], strict=True)
order = [math.log2(before / after) for before, after in halved]
print(f"orders: ddim {order[0]:.2f}, two-step {order[1]:.2f}")
assert 0.7 < order[0] < 1.3
assert 1.7 < order[1] < 2.3

# %% [markdown]
# ## Use it
#
# Pass the table instead of a solver's name. With the networks of this package it runs in the same fused kernel as the
# others, including guidance. The result still has the noise of t_min, sigma = 0.01 here; named solvers take a last step
# to clean data (`denoise_final`).

# %%
score = tgdp.ScoreMLP((2,), width=64)
network = tgdp.Denoiser(score, schedule, "v_prediction", time_input="half_log_snr")
guidance = tgdp.GuidanceNetwork((2,), schedule, width=64)
table = two_step(schedule, 20)
samples = tgdp.sample(network, guidance, num=500, solver=table, seed=0)
with tgdp.use_backend("reference"):
    plain = tgdp.sample(network, guidance, num=500, solver=table, seed=0)
largest = float((samples - plain).abs().max())
print(f"fused kernels against plain PyTorch: largest difference {largest:.1e}")
assert torch.allclose(samples, plain, rtol=1e-3, atol=1e-3)
