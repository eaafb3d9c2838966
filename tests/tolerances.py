"""Errors against float64 that follow from the arithmetic, stated once.

The yardstick of a kernel is eager PyTorch in the same dtype: a kernel may be twice as wrong. Yet eager may round
luckily, on one CPU more than on another. An error that the roundings on the way explain is allowed in any case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tgdp_fast.lab.accuracy import unit_roundoff

#: Error relative to the largest result, of elements that take a few operations in float32 each: four roundings.
FEW_OPERATIONS = 4 * 2.0**-24


def of_sums(lengths: Sequence[int], dtype: torch.dtype = torch.float32) -> float:
    """Error of sums that follow on each other, each of so many terms of either sign, relative to the results' size.

    Step k of a sum of n terms in float32 rounds a partial sum of about sqrt(k / n) of the result by at most u = 2^-24.
    Roundings are independent, so their squares add up: to n / 2 u^2 if all were the largest possible, to n / 6 u^2 on
    average. sqrt(n) u is 2.4 times the root of that. Products, a bias, a function and its slope between two sums are
    four roundings of whole results, which count like eight of a sum. The largest of many errors is to the largest
    result what one is to the other on average.

    In 16 bits, each sum's result is rounded once more, by at most the unit of ``dtype``.
    """
    single = math.sqrt(sum(length + 8 for length in lengths)) * unit_roundoff(torch.float32)
    return single if dtype == torch.float32 else single + math.sqrt(len(lengths)) * unit_roundoff(dtype)


def of_mlp(sizes: Sequence[int], dtype: torch.dtype = torch.float32) -> float:
    """:func:`of_sums` of value and gradient of an MLP with ``sizes`` D, H_1, .., H_L: each layer up and down."""
    return of_sums([*sizes, *sizes], dtype)


def of_mlp_backward(sizes: Sequence[int], batch: int, dtype: torch.dtype = torch.float32) -> float:
    """:func:`of_sums` of the derivative of an MLP: layers up, the tangent up, two passes down, and over the batch."""
    return of_sums([*sizes] * 4 + [batch], dtype)


def rms(values: Tensor) -> float:
    """Root of the mean of the squares."""
    return float(values.detach().square().mean().sqrt())


def largest(values: Tensor) -> float:
    """Largest size of an entry."""
    return float(values.detach().abs().max())


def allowed(eager_error: float, bound: float) -> float:
    """Twice the error of eager PyTorch, or the bound where that is luckier than the arithmetic."""
    return max(2 * eager_error, bound)


def assert_no_worse_than_eager(got, eager, exact, relative: float, size=rms) -> None:
    """Each of ``got`` has at most twice the error of ``eager``, or ``relative`` of the ``size`` of ``exact`` (float64).

    One number for each sample or unit is a sum that may cancel: its size is that of its terms, of order one in tests.
    """
    for ours, theirs, truth in zip(got, eager, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == truth.shape
        if not truth.numel():
            continue
        error, yardstick = (size(tensor.double() - truth) for tensor in (ours, theirs))
        scale = size(truth) if truth.ndim > 1 else max(size(truth), 1.0)
        assert math.isfinite(yardstick), "the yardstick itself is not finite"
        assert error <= allowed(yardstick, relative * scale), (error, yardstick, relative * scale)
