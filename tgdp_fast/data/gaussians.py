"""Gaussian mixtures in closed form: densities, scores and the exact guidance of the paper's simulation.

A noised mixture is a mixture: x_t = alpha x_0 + sigma eps has means alpha m_k and variances alpha^2 v_k + sigma^2,
so p_t, q_t, their scores and h = q_t / p_t are all exact (TGDP section 4.1).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.runtime.checks import check_integer, check_number

#: Variance of each mode in the paper's simulation.
PAPER_VARIANCE = 0.1
_CHUNK = 65_536  # rows evaluated at once in Monte Carlo


class GaussianMixture:
    """Mixture of isotropic Gaussians sum_k w_k N(m_k, v_k I); everything is computed in float64.

    Args:
        means: [K, D].
        variance: v, one number for all components, or [K].
        weights: [K], positive; normalized to sum to one. None: equal weights.

    Raises:
        ValueError: wrong dimensions, values that are not finite, a variance or weight that is not positive.
    """

    means: Tensor
    variance: Tensor
    weights: Tensor

    def __init__(
        self,
        means: Tensor | np.ndarray | list[list[float]],
        variance: float | Tensor | np.ndarray | list[float],
        weights: Tensor | np.ndarray | list[float] | None = None,
    ) -> None:
        self.means = torch.as_tensor(means, dtype=torch.float64, device="cpu").clone()
        if self.means.ndim != 2 or 0 in self.means.shape or not self.means.isfinite().all():
            raise ValueError(f"means must be finite with shape [K, D], got shape {list(self.means.shape)}")
        self.variance = self._per_component("variance", variance)
        weight = self._per_component("weights", 1.0 if weights is None else weights)
        self.weights = weight / weight.sum()

    def _per_component(self, name: str, value: float | Tensor | np.ndarray | list[float]) -> Tensor:
        tensor = torch.as_tensor(value, dtype=torch.float64, device="cpu")
        if tensor.ndim == 0:
            tensor = tensor.expand(self.num_components)
        if tensor.shape != (self.num_components,):
            raise ValueError(
                f"{name} must be one number or have one entry for each of the {self.num_components} means, "
                f"got shape {list(tensor.shape)}"
            )
        if not (tensor.isfinite() & (tensor > 0)).all():
            raise ValueError(f"{name} must be finite and positive, got {tensor.tolist()}")
        return tensor.clone()

    def __repr__(self) -> str:
        return (
            f"GaussianMixture(means={self.means.tolist()}, variance={self.variance.tolist()}, "
            f"weights={self.weights.tolist()})"
        )

    @property
    def num_components(self) -> int:
        """K."""
        return self.means.shape[0]

    @property
    def dimension(self) -> int:
        """D."""
        return self.means.shape[1]

    # ---------------------------------------------------------------------------------------------- sampling

    def sample(self, n: int, *, seed: int = 0, balanced: bool = True) -> Tensor:
        """``n`` samples [n, D], float32, in random order; see :meth:`sample_with_components`."""
        return self.sample_with_components(n, seed=seed, balanced=balanced)[0]

    def sample_with_components(self, n: int, *, seed: int = 0, balanced: bool = True) -> tuple[Tensor, Tensor]:
        """Samples and the component each came from.

        Args:
            n: number of samples.
            seed: the same seed gives the same samples.
            balanced: draw ``n w_k`` samples from each component, rounded by largest remainder (ties to the
                first), instead of a random number. At small n the error of a mode's mass dominates transport
                distances.

        Returns:
            (samples [n, D] float32, component index [n] int64), shuffled together.
        """
        n = check_integer("n", n, 1)
        generator = torch.Generator("cpu").manual_seed(check_integer("seed", seed, 0))
        if balanced:
            quota = n * self.weights
            # The small term turns n w_k such as 2.9999999999999996 into an exact 3.
            counts = (quota + 1e-9).floor()
            extra = torch.sort(quota - counts, descending=True, stable=True).indices[: n - int(counts.sum())]
            counts[extra] += 1
            component = torch.arange(self.num_components, device="cpu").repeat_interleave(counts.long())
            component = component[torch.randperm(n, generator=generator, device="cpu")]
        else:
            component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.dimension, dtype=torch.float64, generator=generator, device="cpu")
        x = self.means[component] + self.variance[component].sqrt()[:, None] * noise
        return x.float(), component

    # --------------------------------------------------------------------------------------------- densities

    def log_prob(self, x: Tensor) -> Tensor:
        """log density [B] at ``x`` [B, D], in nats."""
        return self._log_joint(x)[0].logsumexp(dim=1).to(_dtype(x))

    def score(self, x: Tensor) -> Tensor:
        """grad log density [B, D] at ``x`` [B, D]."""
        return self._log_prob_and_score(x)[1].to(_dtype(x))

    def responsibilities(self, x: Tensor) -> Tensor:
        """Posterior probability of each component [B, K] at ``x`` [B, D]."""
        return self._log_joint(x)[0].softmax(dim=1).to(_dtype(x))

    def mode_mass(self, x: Tensor) -> Tensor:
        """Mass of ``x`` [B, D] in each component, the mean responsibility: [K] float64, sums to one.

        Its expectation over samples of the mixture is exactly ``weights``, also if components overlap (the share by
        most likely component is biased then).
        """
        return self._log_joint(x)[0].softmax(dim=1).mean(dim=0)

    def noised(self, alpha: float, sigma: float) -> GaussianMixture:
        """The distribution of alpha x + sigma eps: means alpha m_k, variances alpha^2 v_k + sigma^2."""
        alpha = check_number("alpha", alpha, 0.0)
        sigma = check_number("sigma", sigma, 0.0)
        return GaussianMixture(alpha * self.means, alpha**2 * self.variance + sigma**2, self.weights)

    def entropy(self, num: int = 1_000_000, seed: int = 0) -> float:
        """Differential entropy -E[log density], in nats.

        If all components have the same variance and their means lie on a line (always true for one or two), the mixture
        factorizes into a mixture along the line and a Gaussian orthogonal to it. Then quadrature gives an error below
        1e-9, and ``num`` and ``seed`` are unused. Otherwise Monte Carlo over ``num`` balanced samples, with standard
        error at most std(log density) / sqrt(num), about sqrt(D / 2 / num): 1e-3 for D = 2 and the default.
        """
        centered = self.means - self.means[0]
        singular = torch.linalg.svdvals(centered)
        spread = float(singular[0])
        on_a_line = singular[1:].sum() <= 1e-12 * spread
        if on_a_line and bool((self.variance == self.variance[0]).all()):
            direction = torch.linalg.svd(centered, full_matrices=False).Vh[0]
            variance = float(self.variance[0])
            line = GaussianMixture((centered @ direction)[:, None], self.variance, self.weights)
            deviation = math.sqrt(variance)
            # The trapezoid rule converges exponentially for an analytic integrand that vanishes at both
            # ends: with spacing std / 16 and a margin of 12 std, both errors are below rounding.
            low, high = float(line.means.min()) - 12 * deviation, float(line.means.max()) + 12 * deviation
            points = max(2, math.ceil(16 * (high - low) / deviation)) + 1
            grid = torch.linspace(low, high, points, dtype=torch.float64, device="cpu")
            log_density = line.log_prob(grid[:, None])
            along = -float((log_density.exp() * log_density).sum()) * (high - low) / (points - 1)
            return along + 0.5 * (self.dimension - 1) * math.log(2 * math.pi * math.e * variance)
        total = 0.0
        for part in self.sample(check_integer("num", num, 1), seed=seed).double().split(_CHUNK):
            total -= float(self.log_prob(part).sum())
        return total / num

    def _log_joint(
        self, x: Tensor, alpha: float | Tensor = 1.0, sigma: float | Tensor = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """log(w_k N(x; alpha m_k, u_k)) [B, K], x - alpha m_k [B, K, D], u_k = alpha^2 v_k + sigma^2 [B or
        1, K].

        alpha, sigma: numbers or [B].
        """
        if x.ndim != 2 or x.shape[1] != self.dimension:
            raise ValueError(f"x must have shape [B, {self.dimension}], got {list(x.shape)}")
        means, variance, weights = (part.to(x.device) for part in (self.means, self.variance, self.weights))
        alpha = torch.as_tensor(alpha, dtype=torch.float64, device=x.device).reshape(-1, 1)
        sigma = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).reshape(-1, 1)
        variance = alpha.square() * variance + sigma.square()
        difference = x.to(torch.float64)[:, None, :] - alpha[:, :, None] * means
        exponent = -0.5 * (difference.square().sum(dim=2) / variance)
        return (
            weights.log() + exponent - 0.5 * self.dimension * (2 * math.pi * variance).log(),
            difference,
            variance,
        )

    def _log_prob_and_score(
        self, x: Tensor, alpha: float | Tensor = 1.0, sigma: float | Tensor = 0.0
    ) -> tuple[Tensor, Tensor]:
        log_joint, difference, variance = self._log_joint(x, alpha, sigma)
        weight = log_joint.softmax(dim=1) / variance
        return log_joint.logsumexp(dim=1), -(weight[:, :, None] * difference).sum(dim=1)


def log_density_ratio(
    target: GaussianMixture,
    source: GaussianMixture,
    x: Tensor,
    alpha: float | Tensor = 1.0,
    sigma: float | Tensor = 0.0,
) -> Tensor:
    """Exact log h(x_t, t) = log q_t(x_t) - log p_t(x_t) (TGDP Theorem 3.1); alpha = 1, sigma = 0 gives log r.

    Shapes: x [B, D]; alpha, sigma: numbers or [B]; returns [B] in the dtype of ``x``, computed in float64.
    """
    return log_density_ratio_and_grad(target, source, x, alpha, sigma)[0]


def log_density_ratio_and_grad(
    target: GaussianMixture,
    source: GaussianMixture,
    x: Tensor,
    alpha: float | Tensor = 1.0,
    sigma: float | Tensor = 0.0,
) -> tuple[Tensor, Tensor]:
    """Exact log h [B] and grad_x log h [B, D], the difference of scores; see :func:`log_density_ratio`."""
    log_target, score_target = target._log_prob_and_score(x, alpha, sigma)
    log_source, score_source = source._log_prob_and_score(x, alpha, sigma)
    dtype = _dtype(x)
    return (log_target - log_source).to(dtype), (score_target - score_source).to(dtype)


class ExactDenoiser:
    """The noise prediction of a mixture in closed form: epsilon = -sigma_t grad log p_t, any x [B, D], no
    weights.

    Args:
        mixture: distribution of the clean data.
        schedule: noise schedule; ``schedule.alpha(t)`` and ``schedule.sigma(t)`` give the noising.
    """

    num_classes = 0

    def __init__(self, mixture: GaussianMixture, schedule: NoiseSchedule) -> None:
        self.mixture = mixture
        self.schedule = schedule

    @property
    def event_shape(self) -> tuple[int, ...]:
        """(D,)."""
        return (self.mixture.dimension,)

    def epsilon(self, x: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Tensor:
        """epsilon [B, D] in the dtype of ``x``; t is a number or [B]."""
        _refuse_labels(labels)
        alpha, sigma = _alpha_sigma(self.schedule, t)
        score = self.mixture._log_prob_and_score(x, alpha, sigma)[1]
        scale = sigma.to(x.device).reshape(-1, 1) if isinstance(sigma, Tensor) else sigma
        return (-scale * score).to(_dtype(x))


class ExactGuidance:
    """The exact guidance log h = log q_t / p_t with its gradient: the oracle that a learned network
    approximates.

    Args:
        target, source: mixtures q and p of the clean data.
        schedule: noise schedule.
    """

    num_classes = 0

    def __init__(self, target: GaussianMixture, source: GaussianMixture, schedule: NoiseSchedule) -> None:
        if target.dimension != source.dimension:
            raise ValueError(
                f"target and source must have one dimension, got {target.dimension} and {source.dimension}"
            )
        self.target = target
        self.source = source
        self.schedule = schedule

    @property
    def event_shape(self) -> tuple[int, ...]:
        """(D,)."""
        return (self.target.dimension,)

    def log_ratio_and_grad(self, x: Tensor, t: float | Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """log h [B] and grad_x log h [B, D] in the dtype of ``x``; t is a number or [B]."""
        _refuse_labels(labels)
        return log_density_ratio_and_grad(self.target, self.source, x, *_alpha_sigma(self.schedule, t))


def exact_denoiser(mixture: GaussianMixture, schedule: NoiseSchedule) -> ExactDenoiser:
    """The closed-form denoiser of ``mixture`` under ``schedule``."""
    return ExactDenoiser(mixture, schedule)


def exact_guidance(target: GaussianMixture, source: GaussianMixture, schedule: NoiseSchedule) -> ExactGuidance:
    """The closed-form guidance from ``source`` to ``target`` under ``schedule``."""
    return ExactGuidance(target, source, schedule)


def paper_source() -> GaussianMixture:
    """Source of the paper's simulation (TGDP section 4.1): modes +-(0.5, 0.5), balanced, variance 0.1."""
    return _two_modes(0.5, 0.5)


def paper_target() -> GaussianMixture:
    """Target of the paper's simulation (TGDP section 4.1): modes +-(0.5, -0.5), balanced, variance 0.1."""
    return _two_modes(0.5, -0.5)


def _two_modes(*mean: float) -> GaussianMixture:
    return GaussianMixture([list(mean), [-value for value in mean]], PAPER_VARIANCE)


def _dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else torch.float64


def _alpha_sigma(schedule: NoiseSchedule, t: float | Tensor) -> tuple[float | Tensor, float | Tensor]:
    if isinstance(t, Tensor):
        time = t.to(torch.float64)
        return schedule.alpha(time), schedule.sigma(time)
    return schedule.alpha(t), schedule.sigma(t)


def _refuse_labels(labels: Tensor | None) -> None:
    if labels is not None:
        raise ValueError("labels must be None: the closed form is unconditional")
