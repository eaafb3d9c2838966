"""Where sampling starts: the distribution of noised data at the first time, in place of N(0, I).

Sampling should start from the distribution of x_T = alpha_T x_0 + sigma_T epsilon. This is N(0, I) if alpha_T is close
to 0: it is 0.0066 for ``NoiseSchedule.vp_linear()``, but 0.36 (alpha_bar_T = 0.13) for the 200 steps of SSSD-ECG. Two
priors replace it there: :class:`GaussianPrior` has the mean and the covariance of the data, :class:`EmpiricalPrior` the
full distribution of stored samples.

Priors hold clean data and no schedule: the first time of the solver determines alpha_T and sigma_T. The noise is that
of :mod:`tgdp_fast.ops.noise`, so a start depends only on the seed and the index of its sample.

Fit a prior to data that the samples should resemble, in the coordinates of the denoiser. Without guidance these are the
source samples, or those of one class if one class is drawn. With guidance x_T has the target's distribution q_T. Then
give the source samples with their density ratios r(x_0) as ``weights``, up to a factor, such as
``guidance.log_ratio(source, schedule.t_min).softmax(0)``, or the target samples themselves if there are many.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tgdp_fast.ops.noise import key_words, normal, philox4x32
from tgdp_fast.runtime.arrays import as_float64, check_samples
from tgdp_fast.runtime.checkpoint import described, load_checkpoint, save_checkpoint
from tgdp_fast.runtime.checks import check_integer

KIND = "prior"

_ROWS = 1_024  # rows converted to float64 at once
#: Evaluation index whose random words choose rows; no solver has as many evaluations.
_CHOICE = 2**32 - 1


class Prior(ABC):
    """The distribution that :func:`tgdp_fast.sample` starts from."""

    @property
    @abstractmethod
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""

    @abstractmethod
    def start(self, seed: int, sample_index: Tensor, alpha: float, sigma: float) -> Tensor:
        """x_T of the samples ``sample_index`` [B] int64: float32 [B, *event_shape].

        Row b is a function of (seed, sample_index[b]) and of alpha and sigma, the coefficients at the first time.
        """

    @abstractmethod
    def to(self, device: str | torch.device) -> Prior:
        """The same prior on ``device``."""

    @abstractmethod
    def to_tensors(self) -> dict[str, Tensor]:
        """All tensors, for a checkpoint."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint folder (config.json, model.safetensors), atomically."""
        save_checkpoint(path, KIND, {}, self.to_tensors())

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Prior:
        """Read a checkpoint folder.

        Raises:
            CheckpointError: damaged, or of another kind.
        """
        tensors = load_checkpoint(path, KIND)[1]
        with described(path, "Prior"):
            return prior_from_tensors(tensors)


def prior_from_tensors(tensors: Mapping[str, Tensor]) -> Prior:
    """Inverse of :meth:`Prior.to_tensors`."""
    if set(tensors) == {"samples", "weights"}:
        return EmpiricalPrior(tensors["samples"], weights=tensors["weights"])
    names = ("mean", "directions", "variances", "remainder")
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(
            f"tensors must hold samples and weights, or {', '.join(names)}, but {' and '.join(missing)} is missing"
        )
    return GaussianPrior(tensors["mean"], tensors["directions"], tensors["variances"], float(tensors["remainder"]))


@dataclass(frozen=True, eq=False)
class GaussianPrior(Prior):
    """The Gaussian with the mean and covariance of noised data, exact if the data are Gaussian::

        prior = GaussianPrior.fit(source)
        samples = sample(denoiser, num=64, solver="dpmpp_2m", steps=20, prior=prior)

    Standardized data have unit variances, so only the covariance between elements differs from N(0, I).

    Attributes:
        mean: float64, of the shape of one sample.
        directions: float64 [D, R], orthonormal columns over the D elements of a sample: the principal directions.
        variances: float64 [R], the variance of the clean data along each direction, descending.
        remainder: the variance along everything orthogonal to them.

    Source of the decomposition: Tipping & Bishop, "Probabilistic Principal Component Analysis", JRSS B 61 (1999),
    equations 7 and 8.
    """

    mean: Tensor
    directions: Tensor
    variances: Tensor
    remainder: float

    def __post_init__(self) -> None:
        for name in ("mean", "directions", "variances"):
            value = getattr(self, name)
            value = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
            object.__setattr__(self, name, value.detach().double())
        expected = (self.mean.numel(), *self.variances.shape)
        if len(expected) != 2 or self.directions.shape != expected:
            raise ValueError(
                f"directions must have shape [{self.mean.numel()}, R], a row per element of mean and a column for each "
                f"of the variances [R], got {list(self.directions.shape)} and variances {list(self.variances.shape)}"
            )

    @classmethod
    def fit(
        cls,
        samples: np.ndarray | Tensor,
        *,
        weights: np.ndarray | Tensor | None = None,
        rank: int | None = None,
    ) -> GaussianPrior:
        """Moments of ``samples``, computed in float64.

        The cost is an eigenvalue decomposition of size min(N, D): a second for 1,000, minutes for 8,000.

        Args:
            samples: [N, ...], N >= 2, in the coordinates of the denoiser.
            weights: [N] >= 0, up to a factor; None: all equal.
            rank: R, number of directions with a variance of their own, at most D; all others share one. 0 keeps only
                the mean and one variance. None keeps all directions of the samples, at most N - 1. Fewer directions
                save memory (8 D R bytes); :meth:`log_prob` of held-out samples shows the loss in accuracy.

        Raises:
            ValueError: bad samples, weights or rank; weights that leave a single sample.
        """
        array = check_samples("samples", samples)
        x = torch.from_numpy(array).flatten(1)
        count, elements = x.shape
        kept = min(elements, count - 1)
        if rank is not None:
            rank = check_integer("rank", rank, 0)
            if rank > elements:
                raise ValueError(f"rank must be at most {elements}, the elements of a sample, got {rank}")
            kept = min(kept, rank)
        share = _shares(weights, count)
        if int((share > 0.0).sum()) < 2:
            raise ValueError("weights must be positive for at least two samples; one has no covariance")
        chunks = [slice(start, start + _ROWS) for start in range(0, count, _ROWS)]
        mean = sum(
            (share[rows] @ x[rows].double() for rows in chunks),
            torch.zeros(elements, dtype=torch.float64, device="cpu"),
        )
        # Scale rows so that their sum of squares is the unbiased estimate; equal weights give division by N - 1.
        scale = (share / (1.0 - share.square().sum())).sqrt()[:, None]
        if count <= elements:
            _, singular, rows_of_v = torch.linalg.svd(scale * (x.double() - mean), full_matrices=False)
            variances, directions = singular.square(), rows_of_v.T
        else:
            covariance = torch.zeros((elements, elements), dtype=torch.float64, device="cpu")
            for rows in chunks:
                part = scale[rows] * (x[rows].double() - mean)
                covariance.addmm_(part.T, part)
            ascending, columns = torch.linalg.eigh(covariance)
            variances, directions = ascending.flip(0).clamp(min=0.0), columns.flip(1)
        rest = float(variances[kept:].sum())
        return cls(
            mean.reshape(array.shape[1:]),
            directions[:, :kept].contiguous(),
            variances[:kept].clone(),
            rest / (elements - kept) if kept < elements else 0.0,
        )

    @property
    def event_shape(self) -> tuple[int, ...]:
        return tuple(self.mean.shape)

    def start(self, seed: int, sample_index: Tensor, alpha: float, sigma: float) -> Tensor:
        z = normal(seed, sample_index, self.mean.numel(), 0, device=self.mean.device)
        return self.from_noise(z.reshape(-1, *self.event_shape), alpha, sigma)

    def from_noise(self, z: Tensor, alpha: float, sigma: float) -> Tensor:
        """x_T [B, ...] float32, a linear function of standard normal ``z`` [B, ...] with the distribution of x_T.

        Computed in float64, so that the result does not depend on the number of rows.
        """
        flat = z.flatten(1).double()
        own, rest = self._deviations(alpha, sigma)
        x = alpha * self.mean.flatten() + rest * flat
        x += ((flat @ self.directions) * (own - rest)) @ self.directions.T
        return x.reshape(z.shape).float()

    def log_prob(self, x: Tensor | np.ndarray, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """Log density [B], float64, in nats, of noised data at ``x`` [B, ...]; alpha 1, sigma 0 means clean data.

        Its mean over held-out noised samples minus that of N(0, I) is the gain over N(0, I) as a start, in
        Kullback-Leibler divergence to the distribution of x_T.
        """
        centred = as_float64("x", x).to(self.mean.device).flatten(1) - alpha * self.mean.flatten()
        own, rest = self._deviations(alpha, sigma)
        along = centred @ self.directions
        others = len(self.directions) - len(own)
        quadratic = (along / own).square().sum(1)
        determinant = 2.0 * own.log().sum()
        if others:
            across = centred - along @ self.directions.T
            quadratic = quadratic + across.square().sum(1) / rest**2
            determinant = determinant + 2.0 * others * math.log(rest)
        return -0.5 * (quadratic + determinant + len(self.directions) * math.log(2.0 * math.pi))

    def _deviations(self, alpha: float, sigma: float) -> tuple[Tensor, float]:
        """Standard deviations of x_T along the directions [R], and orthogonal to them."""
        return (alpha**2 * self.variances + sigma**2).sqrt(), math.sqrt(alpha**2 * self.remainder + sigma**2)

    def to(self, device: str | torch.device) -> GaussianPrior:
        return GaussianPrior(
            self.mean.to(device), self.directions.to(device), self.variances.to(device), self.remainder
        )

    def to_tensors(self) -> dict[str, Tensor]:
        return {
            "mean": self.mean,
            "directions": self.directions,
            "variances": self.variances,
            "remainder": torch.tensor(self.remainder, dtype=torch.float64, device="cpu"),
        }


class EmpiricalPrior(Prior):
    """Noised copies of stored samples, each drawn with its weight: an estimate of the distribution of x_T.

    An x_T with many elements still shows which stored sample it came from, and its result resembles that sample. There
    are no more kinds of results than stored samples, and private details of them may show. Store many.

    Args:
        samples: [N, ...], in the coordinates of the denoiser; kept as float32.
        weights: [N] >= 0, up to a factor; None: all equal.

    Raises:
        ValueError: bad samples or weights.
    """

    def __init__(self, samples: np.ndarray | Tensor, *, weights: np.ndarray | Tensor | None = None) -> None:
        array = check_samples("samples", samples, minimum=1)
        self.samples = torch.from_numpy(array.copy())
        self.weights = _shares(weights, len(array))

    @property
    def event_shape(self) -> tuple[int, ...]:
        return tuple(self.samples.shape[1:])

    def rows(self, seed: int, sample_index: Tensor) -> Tensor:
        """Index of the stored sample behind each start: [B] int64, on the device of the prior."""
        low, high, choice = key_words(seed, _CHOICE)
        index = sample_index.to(self.weights.device)
        word = philox4x32((0, index, index >> 32, choice), (low, high))[0]
        level = (word.double() + 0.5) * 2.0**-32
        # Rounding of the sum must not select an index past the last sample with a positive weight.
        bounds = self.weights.cumsum(0)
        return torch.searchsorted(bounds, level * bounds[-1])

    def start(self, seed: int, sample_index: Tensor, alpha: float, sigma: float) -> Tensor:
        clean = self.samples[self.rows(seed, sample_index)]
        z = normal(seed, sample_index, self.samples[0].numel(), 0, device=clean.device)
        return alpha * clean + sigma * z.reshape(clean.shape)

    def to(self, device: str | torch.device) -> EmpiricalPrior:
        moved = object.__new__(EmpiricalPrior)
        moved.samples, moved.weights = self.samples.to(device), self.weights.to(device)
        return moved

    def to_tensors(self) -> dict[str, Tensor]:
        return {"samples": self.samples, "weights": self.weights}


def _shares(weights: np.ndarray | Tensor | None, count: int) -> Tensor:
    """Weights [count] that sum to one, float64."""
    if weights is None:
        return torch.full((count,), 1.0 / count, dtype=torch.float64, device="cpu")
    share = as_float64("weights", weights).cpu()
    if share.shape != (count,):
        raise ValueError(f"weights must have shape [{count}], one per sample, got {list(share.shape)}")
    largest = float(share.max())
    if not bool((share.isfinite() & (share >= 0.0)).all()) or largest == 0.0:
        raise ValueError("weights must be finite, >= 0 and not all 0; of log ratios take log_ratio.softmax(0)")
    share = share / largest
    return share / share.sum()
