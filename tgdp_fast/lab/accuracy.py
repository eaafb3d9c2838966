"""Errors against float64, and the limit that an implementation has to keep before its time counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: Allowance beside eager's own error, in unit roundoffs of the largest entry of an output: where eager happens to round
#: luckily, an implementation that sums in another order still differs by one rounding of each of a few partial sums.
ROUNDINGS = 4.0


class Error(NamedTuple):
    """Largest and mean error over all entries of all outputs, each relative to the largest entry of its output."""

    maximum: float
    mean: float


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number of ``dtype``."""
    return torch.finfo(dtype).eps / 2


def error_of(outputs: Sequence[Tensor], exact: Sequence[Tensor]) -> Error:
    """Error of ``outputs`` against float64 ``exact``, tensors of pairwise equal shapes.

    A vector with one number per sample is a sum that may cancel in a small batch: its scale is at least 1. An entry
    that is not finite where the exact one is makes both numbers infinite, and so does a wrong shape.
    """
    if [tuple(value.shape) for value in outputs] != [tuple(value.shape) for value in exact]:
        return Error(math.inf, math.inf)
    largest, total, count = 0.0, 0.0, 0
    for value, truth in zip(outputs, exact, strict=True):
        if truth.numel() == 0:
            continue
        scale = float(truth.abs().max())
        if truth.ndim <= 1:
            scale = max(scale, 1.0)
        relative = (value.detach().to(torch.float64) - truth).abs() / (scale or 1.0)
        if not bool(relative.isfinite().all()):
            return Error(math.inf, math.inf)
        largest = max(largest, float(relative.max()))
        total += float(relative.sum())
        count += truth.numel()
    return Error(largest, total / max(count, 1))


def within(error: Error, eager: Error, dtype: torch.dtype, roundings: float = ROUNDINGS) -> bool:
    """Whether ``error`` is at most twice that of eager PyTorch in the same precision plus ``roundings`` unit roundoffs
    (for the mean, in which luck averages out, a quarter of them).
    """
    allowance = roundings * unit_roundoff(dtype)
    return error.maximum <= 2 * eager.maximum + allowance and error.mean <= 2 * eager.mean + allowance / 4
