"""Metrics of generated samples."""

from tgdp_fast.metrics.mixture import average_likelihood, mode_mass, negative_log_likelihood
from tgdp_fast.metrics.two_sample import median_bandwidth, mmd, sliced_wasserstein

__all__ = [
    "average_likelihood",
    "median_bandwidth",
    "mmd",
    "mode_mass",
    "negative_log_likelihood",
    "sliced_wasserstein",
]
