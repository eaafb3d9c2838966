"""Distances between sets of features: Frechet distance, density and coverage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tgdp_fast.metrics.two_sample import _points, warn_of_copies
from tgdp_fast.runtime.checks import check_integer

_BLOCK = 2_048  # rows and columns of a distance matrix held at once, 32 MiB in float64


@dataclass(frozen=True)
class DensityCoverage:
    """Quality and diversity of generated samples (Naeem et al., ICML 2020).

    Attributes:
        density: mean number of neighborhoods of real samples that contain a generated sample, divided by k. It is 1 for
            equal distributions, and can be larger if generated samples crowd in the middle of the real ones.
        coverage: share of the real samples whose neighborhood contains a generated sample.
        expected_coverage: for equal distributions and these numbers of samples (Naeem et al., Lemma 2).
    """

    density: float
    coverage: float
    expected_coverage: float


def frechet_distance(a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> float:
    """Squared Wasserstein-2 distance between Gaussians fitted to two sets of features.

    |mean_a - mean_b|^2 + Tr(C_a) + Tr(C_b) - 2 Tr((C_a C_b)^(1/2)), C with N - 1 (Heusel et al., "GANs Trained by a Two
    Time-Scale Update Rule Converge to a Local Nash Equilibrium", NeurIPS 2017). The last trace is the sum of singular
    values of X_a X_b^T, X the centered features over (N - 1)^(1/2). No matrix root is needed, and covariances may lack
    full rank. Computed in float64.

    The distance of finite sets is biased upwards. For two sets from one distribution N(m, s^2 I), with N and M well
    above the number F of features, it is (1/N + 1/M) s^2 F (F + 5) / 4 instead of 0. If N < F, the fits have directions
    without variance, and it is larger still. Compare only distances with equal N and M, and with the distance of two
    sets of real records of these sizes.

    Args:
        a, b: features [N, F] and [M, F], N, M >= 2.

    Raises:
        ValueError: fewer than two rows, values that are not finite, different features.
    """
    first, second = _features("a", a, 2), _features("b", b, 2)
    _check_same(first, second, "a", "b")
    mean_a, mean_b = first.mean(dim=0), second.mean(dim=0)
    root_a = _triangle((first - mean_a) / (len(first) - 1) ** 0.5)
    root_b = _triangle((second - mean_b) / (len(second) - 1) ** 0.5)
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    value = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * cross
    return max(0.0, float(value))


def density_and_coverage(real: np.ndarray | Tensor, generated: np.ndarray | Tensor, k: int = 5) -> DensityCoverage:
    """Density and coverage: are generated samples only where real ones are, and everywhere where real ones are.

    The neighborhood of a real sample is the closed ball around it that reaches its k-th nearest other real sample.
    density = (number of pairs of a generated sample in a neighborhood) / (k M); coverage = (neighborhoods that contain
    a generated sample) / N (Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models", ICML 2020,
    equations 2 and 3). Euclidean distances in float64; memory is bounded.

    Args:
        real: [N, ...], N > k; generated: [M, ...]; events are flattened.
        k: number of neighbors.

    Raises:
        ValueError: too few samples, values that are not finite, different features.
    """
    k = check_integer("k", k, 1)
    x, y = _features("real", real, 1), _features("generated", generated, 1)
    _check_same(x, y, "real", "generated")
    if len(x) <= k:
        raise ValueError(f"real must hold more than k = {k} samples, got {len(x)}")
    warn_of_copies("real", x, "the neighborhoods of its samples shrink or vanish")
    pairs, covered = 0, 0
    for rows in x.split(_BLOCK):
        nearest = torch.empty(len(rows), 0, dtype=x.dtype, device=x.device)
        for distances in _distances(rows, x):
            # Each row also finds itself, at distance 0: one more neighbor.
            both = torch.cat([nearest, distances], dim=1)
            nearest = both.topk(min(k + 1, both.shape[1]), dim=1, largest=False).values
        radius = nearest.amax(dim=1, keepdim=True)
        inside = torch.zeros(len(rows), dtype=torch.int64, device=x.device)
        for distances in _distances(rows, y):
            inside += (distances <= radius).sum(dim=1)
        pairs += int(inside.sum())
        covered += int((inside > 0).sum())
    n, m = len(x), len(y)
    # The probability that the k nearest of M generated and N - 1 other real samples are all real.
    missed = np.prod([(n - 1 - i) / (n + m - 1 - i) for i in range(k)])
    return DensityCoverage(pairs / (k * m), covered / n, float(1.0 - missed))


def _triangle(x: Tensor) -> Tensor:
    """R with R^T R = x^T x and at most as many rows as columns."""
    return x if len(x) <= x.shape[1] else torch.linalg.qr(x, mode="r").R


def _distances(rows: Tensor, points: Tensor) -> Iterator[Tensor]:
    # Without expanding the square, which would give a sample a nonzero distance to itself.
    for part in points.split(_BLOCK):
        yield torch.cdist(rows, part, compute_mode="donot_use_mm_for_euclid_dist")


def _features(name: str, value: np.ndarray | Tensor, minimum: int) -> Tensor:
    return _points(name, value, minimum).cpu()


def _check_same(a: Tensor, b: Tensor, first: str, second: str) -> None:
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{first} and {second} must have as many features, got {a.shape[1]} and {b.shape[1]}")
