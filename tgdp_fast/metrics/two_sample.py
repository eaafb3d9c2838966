"""Distances between two sets of samples: sliced Wasserstein-2 and maximum mean discrepancy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tgdp_fast.runtime.arrays import as_float64, without_copies
from tgdp_fast.runtime.checks import check_integer, check_number, check_seed
from tgdp_fast.runtime.precision import autocast

_MEDIAN_POINTS = 2_000  # rows of y used by the median heuristic
_BLOCK = 1_024  # rows and columns of a kernel matrix in memory at once, 4 MiB in fp32


def sliced_wasserstein(
    x: Tensor | np.ndarray, y: Tensor | np.ndarray, num_projections: int = 128, seed: int = 0
) -> float:
    """Sliced Wasserstein-2 distance: sqrt of the mean over random directions of the squared 1-D W2 distance.

    The 1-D distances are exact, also for unequal sizes: both quantile functions are step functions, integrated over
    the merged steps. Computed in float64.

    Args:
        x: [N, ...], y: [M, ...]; events are flattened.
        num_projections: number of random unit directions.
        seed: of the directions; compare methods with the same seed.

    Returns:
        The distance, in the units of the data. Under a shift by d it tends to |d| / sqrt(D).

    Raises:
        ValueError: an empty set, values that are not finite, different events.
    """
    x, y = _pair(x, y, minimum=1)
    num_projections = check_integer("num_projections", num_projections, 1)
    generator = torch.Generator("cpu").manual_seed(check_seed(seed))
    directions = torch.randn(num_projections, x.shape[1], dtype=torch.float64, generator=generator, device="cpu")
    directions = (directions / directions.norm(dim=1, keepdim=True)).to(x.device)
    n, m = len(x), len(y)
    # Levels in units of 1 / (n m) are integers, so coinciding steps are found exactly.
    ends = torch.cat([torch.arange(1, size + 1, device="cpu") * other for size, other in ((n, m), (m, n))]).unique()
    widths = ends.diff(prepend=ends.new_zeros(1)).to(torch.float64).to(x.device) / (n * m)
    row_x, row_y = (((ends - 1) // size).to(x.device) for size in (m, n))
    total = 0.0
    for part in directions.split(max(1, 4_000_000 // (n + m))):
        sorted_x = (part @ x.T).sort(dim=1).values
        sorted_y = (part @ y.T).sort(dim=1).values
        if n != m:
            sorted_x, sorted_y = sorted_x[:, row_x], sorted_y[:, row_y]
        total += float(((sorted_x - sorted_y).square() @ widths).sum())
    return math.sqrt(total / num_projections)


def mmd(
    x: Tensor | np.ndarray,
    y: Tensor | np.ndarray,
    bandwidth: float | Sequence[float] | None = None,
) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy with the RBF kernel exp(-|a - b|^2 / (2
    bandwidth^2)).

    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j). Being unbiased,
    it is zero on average for equal distributions, and may be slightly negative. The kernel is evaluated
    in fp32 in blocks and summed in float64: resolution about 1e-7, memory a few MiB.

    Args:
        x: [N, ...], y: [M, ...], at least two each; events are flattened.
        bandwidth: one bandwidth, several (their kernels are averaged), or None for :func:`median_bandwidth`
            of ``y``: pass the reference set as ``y``, so that all methods use the same kernel.

    Raises:
        ValueError: fewer than two samples, values that are not finite, different events, a bandwidth that is
            not positive.
    """
    x, y = _pair(x, y, minimum=2)
    if bandwidth is None:
        bandwidth = median_bandwidth(y)
    values = [bandwidth] if np.ndim(bandwidth) == 0 else list(bandwidth)  # type: ignore[arg-type]
    if not values:
        raise ValueError("bandwidth must be a positive number or several, got none")
    bandwidths = [check_number("bandwidth", value, 0.0, exclusive=True) for value in values]
    # Distances are expanded as |a|^2 + |b|^2 - 2 a.b, exact enough in fp32 only around the origin.
    center = y.mean(dim=0)
    x, y = (x - center).float(), (y - center).float()
    n, m = len(x), len(y)
    with autocast("fp32", x.device.type):  # Whatever the caller has set.
        within_x, within_y = (_kernel_sum(part, part, bandwidths) for part in (x, y))
        between = _kernel_sum(x, y, bandwidths)
    return within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * between / (n * m)


def median_bandwidth(y: Tensor | np.ndarray) -> float:
    """Median distance between pairs of ``y`` [M, ...], on at most 2,000 evenly spaced rows.

    Raises:
        ValueError: fewer than two samples, or most of them coincide.
    """
    points = _points("y", y, minimum=2)
    rows = torch.linspace(
        0, len(points) - 1, min(len(points), _MEDIAN_POINTS), dtype=torch.float32, device=points.device
    )
    points = points[rows.round().long()]
    median = float(torch.pdist(points).median())
    if median <= 0:
        raise ValueError("y must hold distinct samples for the median bandwidth; pass bandwidth as a number")
    return median


def _kernel_sum(x: Tensor, y: Tensor, bandwidths: list[float]) -> float:
    """Sum over pairs of the averaged kernel; where ``x is y``, over pairs of different rows."""
    total = 0.0
    for start, rows in _blocks(x):
        for column, columns in _blocks(y):
            if x is y and column < start:
                continue  # the kernel is symmetric: the block above the diagonal counts twice
            squared = torch.addmm(columns.square().sum(dim=1)[None, :], rows, columns.T, alpha=-2.0)
            squared += rows.square().sum(dim=1)[:, None]
            squared.clamp_(min=0.0)
            for bandwidth in bandwidths:
                scaled = squared * (-0.5 / bandwidth**2)
                kernel = scaled.exp_()
                block = float(kernel.sum(dim=1).double().sum())
                if x is y:
                    block = block - float(kernel.diagonal().double().sum()) if start == column else 2 * block
                total += block
    return total / len(bandwidths)


def _blocks(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(x), _BLOCK):
        yield start, x[start : start + _BLOCK]


def _pair(x: Tensor | np.ndarray, y: Tensor | np.ndarray, minimum: int) -> tuple[Tensor, Tensor]:
    first, second = _points("x", x, minimum), _points("y", y, minimum)
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"x and y must hold events of one shape, got {list(np.shape(x))[1:]} and {list(np.shape(y))[1:]}"
        )
    return first, second.to(first.device)


def warn_of_copies(name: str, x: Tensor, consequence: str) -> None:
    """Warn if more than a tenth of the rows of ``x`` repeat another one, as after oversampling."""
    copies = len(x) - len(without_copies(x))
    if copies:
        warnings.warn(
            f"{name} holds {copies} copies among {len(x)} rows: {consequence}; pass each row once", stacklevel=3
        )


def _points(name: str, value: Tensor | np.ndarray, minimum: int) -> Tensor:
    tensor = as_float64(name, value)
    if tensor.ndim < 2 or len(tensor) < minimum or tensor.numel() == 0:
        raise ValueError(f"{name} must have shape [N, ...] with N >= {minimum}, got {list(tensor.shape)}")
    tensor = tensor.flatten(1)
    finite = tensor.isfinite().all(dim=1)
    if not finite.all():
        raise ValueError(f"{name} must be finite, but {int((~finite).sum())} of {len(tensor)} rows are not; drop them")
    return tensor
