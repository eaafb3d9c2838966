"""Random batches of a training step: rows of a sample set, times, and noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tgdp_fast.diffusion.denoiser import per_sample
from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.runtime import distributed


def draw_times(
    schedule: NoiseSchedule, count: int, generator: torch.Generator, distribution: str = "uniform"
) -> Tensor:
    """Training times [count] float32: stratified (one per equal share of the range) in random order.

    "uniform" is uniform in t; "logsnr" uniform in log-SNR. Discrete schedules give integer times.
    """
    order = torch.randperm(count, generator=generator, device="cpu")
    u = (order + torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")) / count
    if distribution == "logsnr":
        low, high = (float(schedule.half_log_snr(t)) for t in (schedule.t_max, schedule.t_min))
        times = schedule.time_from_half_log_snr(low + (high - low) * u)
        times = times.round() if schedule.is_discrete else times
    elif schedule.is_discrete:
        times = (u * (schedule.t_max - schedule.t_min + 1)).floor() + schedule.t_min
    else:
        times = schedule.t_min + (schedule.t_max - schedule.t_min) * u
    return times.clamp(schedule.t_min, schedule.t_max).float()


class Batches:
    """Random rows of a sample set.

    A set that fits into the batch is repeated within it, each sample equally often. Rows of a larger set are drawn with
    replacement.
    """

    def __init__(self, count: int, batch_size: int) -> None:
        self.count = count
        self.batch_size = batch_size

    def draw(self, generator: torch.Generator) -> Tensor:
        """Row indices [batch_size]."""
        if self.batch_size >= self.count:
            passes = -(-self.batch_size // self.count)
            rows = torch.cat([torch.randperm(self.count, generator=generator, device="cpu") for _ in range(passes)])
            return rows[: self.batch_size]
        return torch.randint(self.count, (self.batch_size,), generator=generator, device="cpu")


@dataclass(frozen=True)
class NoisedBatch:
    """x_t = alpha_t x_0 + sigma_t epsilon for a batch."""

    x0: Tensor
    x: Tensor
    epsilon: Tensor
    t: Tensor
    alpha: float | Tensor
    sigma: float | Tensor


def add_noise(schedule: NoiseSchedule, x0: Tensor, t: Tensor, generator: torch.Generator) -> NoisedBatch:
    """Noise x0 [B, ...] to times t [B]; alpha and sigma have shape [B, 1, ...]."""
    return _noised(schedule, x0, t, _standard_normal(x0.shape, generator))


def _standard_normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _noised(schedule: NoiseSchedule, x0: Tensor, t: Tensor, epsilon: Tensor) -> NoisedBatch:
    t, epsilon = t.to(x0.device), epsilon.to(x0.device)
    alpha, sigma = per_sample(schedule.alpha(t).to(x0), x0), per_sample(schedule.sigma(t).to(x0), x0)
    return NoisedBatch(x0, alpha * x0 + sigma * epsilon, epsilon, t, alpha, sigma)


def draw_noised(
    batches: Batches,
    x: Tensor,
    labels: Tensor | None,
    schedule: NoiseSchedule,
    generator: torch.Generator,
    time_distribution: str = "uniform",
) -> tuple[Tensor, NoisedBatch, Tensor | None]:
    """Random rows of ``x`` and ``labels``, noised to random times: this process's share of one common batch.

    Returns:
        rows [B], the noised samples, labels [B, ...] or None.
    """
    rows = batches.draw(generator)
    t = draw_times(schedule, len(rows), generator, time_distribution)
    epsilon = _standard_normal((len(rows), *x.shape[1:]), generator)
    own = distributed.share(len(rows))
    rows = rows[own].to(x.device)
    batch = _noised(schedule, x[rows], t[own], epsilon[own])
    return rows, batch, None if labels is None else labels[rows]
