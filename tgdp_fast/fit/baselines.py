"""Baselines for TGDP: a diffusion model of the target samples alone, and a fine-tuned source model."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from tgdp_fast.diffusion.denoiser import Denoiser
from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.fit.config import TrainingConfig
from tgdp_fast.fit.training import train_denoiser


def baseline_training(num_target: int, *, few: int, learning_rate: float) -> TrainingConfig:
    """Best training of the baselines on the simulation; ``few`` is the number of steps with fewer than 50 samples.

    With more steps they repeat the given samples.
    """
    steps = few if num_target < 50 else 2000 if num_target < 500 else 4000
    ema_decay = 0.99 if num_target < 50 else 0.998
    return TrainingConfig(
        steps=steps, batch_size=256, learning_rate=learning_rate, weight_decay=0.01, ema_decay=ema_decay
    )


def train_vanilla(
    target: np.ndarray | Tensor,
    schedule: NoiseSchedule | None = None,
    *,
    settings: TrainingConfig | None = None,
    **arguments: Any,
) -> Denoiser:
    """A diffusion model trained from scratch on the target samples [N, ...] (TGDP section 4, "vanilla diffusion").

    ``arguments`` are those of :func:`train_denoiser`. See :func:`baseline_training`.
    """
    settings = settings or baseline_training(len(target), few=300, learning_rate=2e-3)
    return train_denoiser(target, schedule, settings=settings, **{"description": "vanilla", **arguments})


def fine_tune(
    denoiser: Denoiser, target: np.ndarray | Tensor, *, settings: TrainingConfig | None = None, **arguments: Any
) -> Denoiser:
    """The source model trained further on the target samples [N, ...] (TGDP section 4, "fine-tuning").

    ``denoiser`` is copied, not changed. ``arguments`` are those of :func:`train_denoiser`. The default steps were
    chosen for the baseline on the simulation.
    """
    settings = settings or baseline_training(len(target), few=800, learning_rate=5e-4)
    return train_denoiser(target, initial=denoiser, settings=settings, **{"description": "fine-tune", **arguments})
