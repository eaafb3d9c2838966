"""Metrics of generated samples."""

from tgdp_fast.metrics.classification import (
    ClassScore,
    FMax,
    Interval,
    MacroAUC,
    bootstrap_interval,
    f_max,
    macro_auc,
    macro_auc_by_ranks,
    per_class_scores,
)
from tgdp_fast.metrics.copies import Memorization, memorization, nearest_by_correlation
from tgdp_fast.metrics.ecg_intervals import (
    ECGStatistics,
    Spectra,
    StatisticComparison,
    compare_statistics,
    ecg_statistics,
    spectra,
    spectral_difference,
)
from tgdp_fast.metrics.features import DensityCoverage, density_and_coverage, frechet_distance
from tgdp_fast.metrics.mixture import average_likelihood, mode_mass, negative_log_likelihood
from tgdp_fast.metrics.two_sample import median_bandwidth, mmd, sliced_wasserstein

__all__ = [
    "ClassScore",
    "DensityCoverage",
    "ECGStatistics",
    "FMax",
    "Interval",
    "MacroAUC",
    "Memorization",
    "Spectra",
    "StatisticComparison",
    "average_likelihood",
    "bootstrap_interval",
    "compare_statistics",
    "density_and_coverage",
    "ecg_statistics",
    "f_max",
    "frechet_distance",
    "macro_auc",
    "macro_auc_by_ranks",
    "median_bandwidth",
    "memorization",
    "mmd",
    "mode_mass",
    "nearest_by_correlation",
    "negative_log_likelihood",
    "per_class_scores",
    "sliced_wasserstein",
    "spectra",
    "spectral_difference",
]
