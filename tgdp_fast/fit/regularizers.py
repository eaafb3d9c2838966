"""Regularizers of the guidance network (TGDP Algorithm 4). A new one is one class, here or in a file of your own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tgdp_fast.fit.losses import bounded_exp
from tgdp_fast.fit.terms import Term, TransferBatch
from tgdp_fast.runtime.checks import check_number

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Regularizer(Term, family="regularizer"):
    """A term that is added to the loss ``weight`` times; weight 0 omits it.

    Class attributes:
        default: its weight if no regularizers are named.
    """

    default: ClassVar[float] = 0.0

    weight: float = 1.0

    def __post_init__(self) -> None:
        check_number(self.name, self.weight, 0.0)


class Consistency(Regularizer):
    """1/2 || epsilon_p - sigma_t grad log h - epsilon ||^2 on noised target samples, summed over elements.

    The guided model's denoising loss with lambda(t) = sigma_t^2 (TGDP section 3.2). Needs a denoiser.
    """

    name = "consistency"
    needs = ("target", "target_gradient", "target_epsilon")
    default = 1.0

    def __call__(self, batch: TransferBatch) -> Tensor:
        target = batch.target
        residual = batch.target_epsilon - target.sigma * batch.target_gradient - target.epsilon
        # One half of the squared norm, as in a likelihood bound: the same units as the cross-entropy.
        return self.weight * 0.5 * residual.flatten(1).square().sum(1).mean()


class Cycle(Regularizer):
    """(h - h_c)^2 on noised target samples, h_c from a time-dependent classifier trained first (Algorithm 2)."""

    name = "cycle"
    needs = ("target_log_h", "target_classifier_log_h")

    def __call__(self, batch: TransferBatch) -> Tensor:
        h, h_classifier = (bounded_exp(f, 10.0) for f in (batch.target_log_h, batch.target_classifier_log_h))
        return self.weight * (h - h_classifier).square().mean()


#: Every regularizer by its name, including those defined elsewhere.
REGULARIZERS: dict[str, type[Regularizer]] = Regularizer.known
