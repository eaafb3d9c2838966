"""Data: users' arrays, Gaussian mixtures in closed form, handwritten digits."""

from tgdp_fast.data.arrays import Standardizer, check_labels, check_samples, load_array
from tgdp_fast.data.digits import DigitArrays, DigitJudge, digit_judge, load_digits_arrays
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

__all__ = [
    "DigitArrays",
    "DigitJudge",
    "ExactDenoiser",
    "ExactGuidance",
    "GaussianMixture",
    "Standardizer",
    "check_labels",
    "check_samples",
    "digit_judge",
    "exact_denoiser",
    "exact_guidance",
    "load_array",
    "load_digits_arrays",
    "log_density_ratio",
    "log_density_ratio_and_grad",
    "paper_source",
    "paper_target",
]
