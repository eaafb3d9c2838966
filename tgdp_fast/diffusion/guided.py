"""The guided denoiser: epsilon of a frozen model with the gradient of log h, and what it asks of both."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from tgdp_fast.diffusion.denoiser import labels_for
from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.ops import guided_epsilon, limit_gradient
from tgdp_fast.runtime.checks import check_number
from tgdp_fast.runtime.streams import side_by_side


class Guidance(Protocol):
    """What the sampler asks of a guidance: the closed-form oracle and the learned network both provide it."""

    def log_ratio_and_grad(self, x: Tensor, t: float | Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, ...], t -> (log h [B], grad_x log h [B, ...])."""
        ...


class EpsilonModel(Protocol):
    """What the sampler asks of a denoiser."""

    schedule: NoiseSchedule

    def epsilon(self, x: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Tensor:
        """x [B, ...], t -> epsilon [B, ...]."""
        ...


@dataclass(frozen=True)
class GuidedEvaluation:
    """One evaluation: epsilon of the source, grad log h (None outside the interval), and the weight scale * sigma."""

    epsilon: Tensor
    gradient: Tensor | None
    weight: float


class GuidedDenoiser:
    """A frozen denoiser with guidance: epsilon_q = epsilon_p - scale * sigma_t * grad log h  (TGDP Theorem 3.1).

    Args:
        denoiser: the source model.
        guidance: anything with ``log_ratio_and_grad``; None leaves the source unguided.
        scale: guidance scale; 1 is exact. A function of the schedule time t gives a scale schedule.
        interval: (t_low, t_high) outside which the guidance network is not run at all.
        clamp: (low, high) to which the predicted x0 is clamped; epsilon is recomputed from it.
        gradient_norm_limit: largest per-sample L2 norm of scale * sigma_t * grad log h (what is subtracted from
            epsilon, whose own norm is about sqrt(number of elements)); longer gradients are shortened.

    Raises:
        ValueError: a bad scale, interval, clamp or limit.
    """

    def __init__(
        self,
        denoiser: EpsilonModel,
        guidance: Guidance | None = None,
        *,
        scale: float | Callable[[float], float] = 1.0,
        interval: tuple[float, float] | None = None,
        clamp: tuple[float, float] | None = None,
        gradient_norm_limit: float | None = None,
    ) -> None:
        if not hasattr(denoiser, "epsilon"):
            raise ValueError(
                f"denoiser must have a method epsilon(x, t, labels), got {type(denoiser).__name__}; "
                "wrap a plain network as tgdp_fast.Denoiser(network, schedule)"
            )
        if guidance is not None:
            check_guidance(guidance)
        self.denoiser = denoiser
        self.guidance = guidance
        self.scale = scale if callable(scale) else check_number("scale", scale)
        self.interval = _check_pair("interval", interval)
        self.clamp = _check_pair("clamp", clamp, finite=True)
        self.gradient_norm_limit = (
            None
            if gradient_norm_limit is None
            else check_number("gradient_norm_limit", gradient_norm_limit, 0.0, exclusive=True)
        )

    @property
    def schedule(self) -> NoiseSchedule:
        """The denoiser's noise schedule."""
        return self.denoiser.schedule

    def scale_at(self, t: float) -> float:
        """Guidance scale at schedule time ``t``; 0 outside the interval or without guidance."""
        if self.guidance is None:
            return 0.0
        if self.interval is not None and not self.interval[0] <= t <= self.interval[1]:
            return 0.0
        return check_number("scale(t)", self.scale(t)) if callable(self.scale) else self.scale

    def evaluate(self, x: Tensor, t: float, labels: Tensor | None = None) -> GuidedEvaluation:
        """Run the denoiser and, where the scale is not 0, the guidance network. x [B, ...]."""
        scale = self.scale_at(t)
        guidance = self.guidance
        if scale == 0.0 or guidance is None:
            return GuidedEvaluation(self.denoiser.epsilon(x, t, labels_for(self.denoiser, labels)), None, 0.0)
        weight = scale * float(self.schedule.sigma(t))
        epsilon, (_, gradient) = side_by_side(
            x.device,
            lambda: self.denoiser.epsilon(x, t, labels_for(self.denoiser, labels)),
            lambda: guidance.log_ratio_and_grad(x, t, labels_for(guidance, labels)),
        )
        if self.gradient_norm_limit is not None:
            gradient = limit_gradient(gradient, weight, self.gradient_norm_limit)
        return GuidedEvaluation(epsilon, gradient, weight)

    def epsilon(self, x: Tensor, t: float, labels: Tensor | None = None) -> Tensor:
        """Guided epsilon [B, ...], clamp included; what a sampler outside this package should call."""
        evaluation = self.evaluate(x, t, labels)
        alpha, sigma = float(self.schedule.alpha(t)), float(self.schedule.sigma(t))
        return guided_epsilon(x, evaluation.epsilon, evaluation.gradient, evaluation.weight, alpha, sigma, self.clamp)[
            0
        ]


def _check_pair(name: str, pair: tuple[float, float] | None, finite: bool = False) -> tuple[float, float] | None:
    if pair is None:
        return None
    try:
        low, high = (float(value) for value in pair)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a pair (low, high), got {pair!r}") from None
    if not low < high or (finite and not math.isfinite(high - low)):
        raise ValueError(f"{name} must be a pair (low, high) with low < high{', finite' * finite}, got {pair!r}")
    return low, high


def hint_of_guidance(value: Any) -> str:
    """For messages about what is no guidance: where one is inside it, as in the result of a fit."""
    return "; pass its attribute guidance" if hasattr(getattr(value, "guidance", None), "log_ratio_and_grad") else ""


def check_guidance(guidance: Any) -> None:
    """Raises ValueError for what has no ``log_ratio_and_grad``."""
    if not hasattr(guidance, "log_ratio_and_grad"):
        raise ValueError(
            f"guidance must have a method log_ratio_and_grad(x, t, labels), got {type(guidance).__name__}"
            f"{hint_of_guidance(guidance)}"
        )
