"""Data: users' arrays, Gaussian mixtures in closed form, handwritten digits, electrocardiograms."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
    from tgdp_fast.ecg.records.cache import ECGDataset, build_ecg_cache
    from tgdp_fast.ecg.records.folder import ECGFolder, open_ecg_folder
    from tgdp_fast.ecg.records.output import write_ecg_records
    from tgdp_fast.runtime.arrays import Standardizer, check_labels, check_samples, load_array
else:
    # Torch comes with the first name that needs it: listing a folder of records, and the processes that read them, do
    # without.
    _MODULES = {
        "arrays": ("Standardizer", "check_labels", "check_samples", "load_array"),
        "digits": ("DigitArrays", "DigitJudge", "digit_judge", "load_digits_arrays"),
        "ecg_cache": ("ECGDataset", "build_ecg_cache"),
        "ecg_folder": ("ECGFolder", "open_ecg_folder"),
        "ecg_output": ("write_ecg_records",),
        "gaussians": (
            "ExactDenoiser",
            "ExactGuidance",
            "GaussianMixture",
            "exact_denoiser",
            "exact_guidance",
            "log_density_ratio",
            "log_density_ratio_and_grad",
            "paper_source",
            "paper_target",
        ),
    }
    _PLACES = {name: module for module, names in _MODULES.items() for name in names}

    def __getattr__(name):
        from importlib import import_module

        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
        return value

    def __dir__():
        return sorted({*globals(), *_PLACES})


__all__ = [
    "DigitArrays",
    "DigitJudge",
    "ECGDataset",
    "ECGFolder",
    "ExactDenoiser",
    "ExactGuidance",
    "GaussianMixture",
    "Standardizer",
    "build_ecg_cache",
    "check_labels",
    "check_samples",
    "digit_judge",
    "exact_denoiser",
    "exact_guidance",
    "load_array",
    "load_digits_arrays",
    "log_density_ratio",
    "log_density_ratio_and_grad",
    "open_ecg_folder",
    "paper_source",
    "paper_target",
    "write_ecg_records",
]
