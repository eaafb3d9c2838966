"""Metrics of samples under a known density, such as the target of the paper's simulation."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor

from tgdp_fast.runtime.arrays import as_float64


class KnownDensity(Protocol):
    """A density with closed forms, such as a Gaussian mixture."""

    def log_prob(self, x: Tensor) -> Tensor:
        """x [N, D] -> log density [N]."""
        ...

    def mode_mass(self, x: Tensor) -> Tensor:
        """x [N, D] -> mass per component [K]."""
        ...


def average_likelihood(mixture: KnownDensity, x: Tensor | np.ndarray) -> float:
    """Mean density q(x) over samples ``x`` [N, D]: the average likelihood of TGDP section 4.1.

    It rewards samples near the modes: a collapsed sampler may exceed fresh samples of the target.
    """
    return float(mixture.log_prob(_samples(x)).exp().mean())


def negative_log_likelihood(mixture: KnownDensity, x: Tensor | np.ndarray) -> float:
    """-mean log q(x) over samples ``x`` [N, D], in nats; for fresh samples of the target it is the entropy."""
    return -float(mixture.log_prob(_samples(x)).mean())


def mode_mass(mixture: KnownDensity, x: Tensor | np.ndarray) -> tuple[float, ...]:
    """Share of the samples ``x`` [N, D] in each of the K modes, the mean responsibility; sums to one."""
    return tuple(mixture.mode_mass(_samples(x)).tolist())


def _samples(x: Tensor | np.ndarray) -> Tensor:
    tensor = as_float64("x", x)
    if tensor.ndim != 2 or len(tensor) == 0:
        raise ValueError(f"x must have shape [N, D] with N >= 1, got {list(tensor.shape)}")
    if not tensor.isfinite().all():
        raise ValueError("x must be finite, got NaN or infinite values; drop those samples first")
    return tensor
