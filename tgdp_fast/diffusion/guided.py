"""The guided denoiser: epsilon of a frozen model with the gradient of log h, and the protocols of both."""

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
    """Interface of a guidance, provided by the closed-form oracle and the learned network."""

    def log_ratio_and_grad(self, x: Tensor, t: float | Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, ...], t -> (log h [B], grad_x log h [B, ...])."""
        ...


class EpsilonModel(Protocol):
    """Interface of a denoiser."""

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

    For samplers of your own; :func:`tgdp_fast.sample` accepts it too.

    Args:
        denoiser: the source model.
        guidance: any object with ``log_ratio_and_grad``; None: no guidance.
        scale: guidance scale; 1 is exact. A function of the schedule time t gives a scale schedule.
        interval: (t_low, t_high); the guidance network does not run outside.
        clamp: (low, high), range of the predicted x0; epsilon is recomputed from the clamped x0.
        gradient_norm_limit: largest per-sample L2 norm of scale * sigma_t * grad log h, the term subtracted from
            epsilon, whose own norm is about sqrt(number of elements); longer gradients are shortened.

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
        check_models(denoiser, guidance)
        self.denoiser = denoiser
        self.guidance = guidance
        self.scale = check_scale(scale)
        self.interval = check_pair("interval", interval)
        self.clamp = check_pair("clamp", clamp, finite=True)
        self.gradient_norm_limit = check_gradient_norm_limit(gradient_norm_limit)

    @property
    def schedule(self) -> NoiseSchedule:
        """The denoiser's noise schedule."""
        return self.denoiser.schedule

    def scale_at(self, t: float) -> float:
        """Guidance scale at schedule time ``t``; 0 outside the interval or without guidance."""
        return 0.0 if self.guidance is None else scale_at(self.scale, self.interval, t)

    def evaluate(self, x: Tensor, t: float, labels: Tensor | None = None) -> GuidedEvaluation:
        """Run the denoiser and, unless the scale is 0, the guidance network. x [B, ...]."""
        scale = self.scale_at(t)
        weight = 0.0 if scale == 0.0 else scale * float(self.schedule.sigma(t))
        epsilon, gradient = evaluate_models(
            self.denoiser, self.guidance, x, t, labels, weight, self.gradient_norm_limit
        )
        return GuidedEvaluation(epsilon, gradient, weight)

    def epsilon(self, x: Tensor, t: float, labels: Tensor | None = None) -> Tensor:
        """Guided epsilon [B, ...], clamp included; samplers outside this package should call this method."""
        evaluation = self.evaluate(x, t, labels)
        alpha, sigma = float(self.schedule.alpha(t)), float(self.schedule.sigma(t))
        return guided_epsilon(x, evaluation.epsilon, evaluation.gradient, evaluation.weight, alpha, sigma, self.clamp)[
            0
        ]


def evaluate_models(
    denoiser: EpsilonModel,
    guidance: Guidance | None,
    x: Tensor,
    t: float,
    labels: Tensor | None,
    weight: float,
    gradient_norm_limit: float | None,
) -> tuple[Tensor, Tensor | None]:
    """epsilon of the source [B, ...], and grad log h [B, ...], or None if ``weight`` is 0.

    Args:
        denoiser, guidance: the models; labels are passed to those that use them.
        x: [B, ...] state.
        t: schedule time.
        labels: None, [B] or [B, K].
        weight: scale * sigma_t, factor of the gradient in epsilon_q; the gradient is returned without it.
        gradient_norm_limit: largest per-sample norm of weight * gradient; longer gradients are shortened.
    """
    if weight == 0.0 or guidance is None:
        return denoiser.epsilon(x, t, labels_for(denoiser, labels)), None
    epsilon, (_, gradient) = side_by_side(
        x.device,
        lambda: denoiser.epsilon(x, t, labels_for(denoiser, labels)),
        lambda: guidance.log_ratio_and_grad(x, t, labels_for(guidance, labels)),
    )
    if gradient_norm_limit is not None:
        gradient = limit_gradient(gradient, weight, gradient_norm_limit)
    return epsilon, gradient


def scale_at(
    scale: float | Callable[[float], float], interval: tuple[float, float] | None, t: float, name: str = "t"
) -> float:
    """Guidance scale at time ``t``, 0 outside the interval. A function is called only within the interval.

    Raises:
        ValueError: the function returns no finite number; the message calls the time ``name``.
    """
    if interval is not None and not interval[0] <= t <= interval[1]:
        return 0.0
    return check_number(f"scale({name})", scale(t)) if callable(scale) else scale


def check_scale(scale: float | Callable[[float], float]) -> float | Callable[[float], float]:
    """The scale, a number as a float; ValueError unless it is a function or a finite number."""
    return scale if callable(scale) else check_number("scale", scale)


def check_pair(name: str, pair: tuple[float, float] | None, finite: bool = False) -> tuple[float, float] | None:
    """None, or the pair as floats; ValueError unless it is two numbers (low, high) with low < high."""
    if pair is None:
        return None
    try:
        low, high = (float(value) for value in pair)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be a pair (low, high), got {pair!r}") from None
    if not low < high or (finite and not math.isfinite(high - low)):
        raise ValueError(f"{name} must be a pair (low, high) with low < high{', finite' * finite}, got {pair!r}")
    return low, high


def check_gradient_norm_limit(limit: float | None) -> float | None:
    """None, or the limit as a float; ValueError unless it is finite and above 0."""
    return None if limit is None else check_number("gradient_norm_limit", limit, 0.0, exclusive=True)


def hint_of_guidance(value: Any) -> str:
    """For messages about an invalid guidance: a hint if it contains a valid one, like the result of a fit."""
    return "; pass its attribute guidance" if hasattr(getattr(value, "guidance", None), "log_ratio_and_grad") else ""


def check_models(denoiser: Any, guidance: Any) -> None:
    """Raises ValueError for a denoiser without ``epsilon`` and a guidance without ``log_ratio_and_grad``."""
    if not hasattr(denoiser, "epsilon"):
        raise ValueError(
            f"denoiser must have a method epsilon(x, t, labels), got {type(denoiser).__name__}; "
            "wrap a plain network as tgdp_fast.Denoiser(network, schedule)"
        )
    if guidance is not None:
        check_guidance(guidance)


def check_guidance(guidance: Any) -> None:
    """Raises ValueError for an object without ``log_ratio_and_grad``."""
    if not hasattr(guidance, "log_ratio_and_grad"):
        raise ValueError(
            f"guidance must have a method log_ratio_and_grad(x, t, labels), got {type(guidance).__name__}"
            f"{hint_of_guidance(guidance)}"
        )
