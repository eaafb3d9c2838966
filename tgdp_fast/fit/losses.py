"""Losses of the guidance network. A new one is one class, here or in a file of your own.

========== ===================== ============================================================= =====================
name       per sample            minimizer f                                                   data
========== ===================== ============================================================= =====================
logistic   cross-entropy         log q_t / p_t (TGDP Algorithm 2)                              both domains
ratio_mse  (exp(f) - r)^2        log E[r | x_t]; the paper's (Algorithm 3, equation 8)         source, and r
poisson    exp(f) - r f          the same; a Bregman divergence, convex in f                   source, and r
log_mse    (f - log r)^2         E[log r | x_t]; biased low by Jensen's inequality             source, and r
========== ===================== ============================================================= =====================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tgdp_fast.fit.terms import Term, TransferBatch
from tgdp_fast.runtime.checks import check_number

if TYPE_CHECKING:
    from torch import Tensor


def bounded_exp(log_ratio: Tensor, limit: float = 30.0) -> Tensor:
    """exp(f) up to f = ``limit``, its tangent beyond: exp(limit) (1 + f - limit).

    It cannot overflow, increases everywhere and is differentiable, so a loss with it keeps its minimizer and recovers
    from extreme values.
    """
    return log_ratio.clamp_max(limit).exp() * (1.0 + (log_ratio - limit).relu())


def logistic_loss(source_log_ratio: Tensor, target_log_ratio: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Balanced cross-entropy of the domain, f = -logit c = log q/p (TGDP Algorithms 1 and 2).

    Each domain counts one half for any number of samples, so the minimizer is the log ratio without an offset.
    ``smoothing`` is the assumed probability that a label is wrong (label smoothing). It bounds the minimizer,
    |f| <= log((1 - smoothing) / smoothing). Shapes: [A], [B] -> scalar.
    """
    from torch.nn.functional import softplus

    plain = softplus(source_log_ratio).mean() + softplus(-target_log_ratio).mean()
    return 0.5 * (plain + smoothing * (target_log_ratio.mean() - source_log_ratio.mean()))


@dataclass(frozen=True)
class Loss(Term, family="loss"):
    """The loss with which the guidance network learns log h."""


@dataclass(frozen=True)
class Logistic(Loss):
    """A time-dependent domain classifier: :func:`logistic_loss` with a ``smoothing`` in [0, 0.49]."""

    name = "logistic"
    needs = ("target_log_h",)

    smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_number("smoothing", self.smoothing, 0.0, 0.49)

    def __call__(self, batch: TransferBatch) -> Tensor:
        return logistic_loss(batch.source_log_h, batch.target_log_h, smoothing=self.smoothing)


@dataclass(frozen=True)
class RatioLoss(Loss):
    """Regression of f [B] on the density ratio r of clean source samples, log r [B] (TGDP Algorithm 3)."""

    needs = ("source_log_ratio",)

    def __call__(self, batch: TransferBatch) -> Tensor:
        return self.per_sample(batch.source_log_h, batch.source_log_ratio).mean()

    @staticmethod
    def per_sample(log_h: Tensor, log_ratio: Tensor) -> Tensor:
        """f [B], log r [B] -> [B]."""
        raise NotImplementedError


class RatioMSE(RatioLoss):
    """(exp(f) - r)^2."""

    name = "ratio_mse"

    @staticmethod
    def per_sample(log_h: Tensor, log_ratio: Tensor) -> Tensor:
        return (bounded_exp(log_h) - bounded_exp(log_ratio)).square()


class Poisson(RatioLoss):
    """exp(f) - r f."""

    name = "poisson"

    @staticmethod
    def per_sample(log_h: Tensor, log_ratio: Tensor) -> Tensor:
        return bounded_exp(log_h) - bounded_exp(log_ratio) * log_h


class LogMSE(RatioLoss):
    """(f - log r)^2."""

    name = "log_mse"

    @staticmethod
    def per_sample(log_h: Tensor, log_ratio: Tensor) -> Tensor:
        return (log_h - log_ratio).square()


#: Every loss by its name, including those defined elsewhere.
LOSSES: dict[str, type[Loss]] = Loss.known
