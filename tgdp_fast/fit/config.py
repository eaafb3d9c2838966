"""Settings of a fit: frozen objects that check themselves once and convert to and from JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

import torch

from tgdp_fast.diffusion.guidance import STEMS, GuidanceNetwork
from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.fit.losses import Logistic, Loss
from tgdp_fast.fit.regularizers import REGULARIZERS, Regularizer
from tgdp_fast.fit.terms import Term
from tgdp_fast.models.ecg_stem import ECGStem
from tgdp_fast.runtime.checks import check_choice, check_integer, check_number
from tgdp_fast.runtime.memory import check_memory
from tgdp_fast.runtime.precision import PRECISIONS

TIME_DISTRIBUTIONS = ("uniform", "logsnr")

Config = TypeVar("Config")


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of every training loop: AdamW, linear warm-up, cosine decay to zero, moving average of the weights.

    Weight decay applies to matrices, not to biases. The result has the averaged weights.
    """

    steps: int = 2000
    batch_size: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    ema_decay: float = 0.999
    warmup: int = 50
    gradient_clip: float = 1.0

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 1)
        check_integer("batch_size", self.batch_size, 1)
        check_memory("batch_size", self.batch_size, 16 * self.batch_size, "batches of one number", "use a smaller one")
        check_number("learning_rate", self.learning_rate, 0.0, exclusive=True)
        check_number("weight_decay", self.weight_decay, 0.0)
        check_number("ema_decay", self.ema_decay, 0.0, 1.0 - 1e-12)
        check_integer("warmup", self.warmup, 0)
        check_number("gradient_clip", self.gradient_clip, 0.0, exclusive=True)

    def rate(self, step: int) -> float:
        """Learning rate at ``step`` (0-based)."""
        ramp = min(1.0, (step + 1) / (self.warmup + 1))
        return self.learning_rate * ramp * 0.5 * (1.0 + math.cos(math.pi * step / self.steps))


@dataclass(frozen=True)
class NetworkConfig:
    """Architecture of the guidance network; see :class:`tgdp_fast.GuidanceNetwork`."""

    width: int = 128
    depth: int = 4
    alpha_power: float = 2.0
    stem: str = "none"

    def __post_init__(self) -> None:
        check_integer("width", self.width, 1)
        check_integer("depth", self.depth, 1)
        check_number("alpha_power", self.alpha_power, 0.0)
        check_choice("stem", self.stem, STEMS)
        values, what = self.depth * self.width**2, "weights, gradients and moments of a network of this width and depth"
        check_memory("width and depth", (self.width, self.depth), 16 * values, what, "choose a smaller network")

    def build(self, event_shape: tuple[int, ...], schedule: NoiseSchedule, num_classes: int = 0) -> GuidanceNetwork:
        """An untrained network.

        Raises:
            ValueError: the stem does not match the shape of a sample.
        """
        return GuidanceNetwork(event_shape, schedule, num_classes=num_classes, **asdict(self))

    def check_event_shape(self, event_shape: tuple[int, ...]) -> None:
        """Raises ValueError if :meth:`build` would, for callers that train something else first."""
        if self.stem != "none":  # A stem alone limits the shape.
            with torch.device("meta"):  # Uses neither memory nor random numbers.
                ECGStem(event_shape)


@dataclass(frozen=True)
class GuidanceConfig:
    """Settings of :func:`tgdp_fast.fit_guidance`.

    ``GuidanceConfig(loss="ratio_mse", regularizers=[Consistency(1.0), Cycle(1.0)])`` is the paper's Algorithm 4,
    without regularizers its Algorithm 3.

    Args:
        loss: a :class:`tgdp_fast.fit.losses.Loss` or its name: "logistic" (time-dependent domain classifier),
            "ratio_mse", "poisson" or "log_mse" (regression on the density ratio of a cross-fitted classifier on clean
            data).
        regularizers: objects of :mod:`tgdp_fast.fit.regularizers` or their names, one of each kind. None:
            ``Consistency(1.0)`` with a denoiser, no regularizer without.
        network: width, depth, alpha_power and stem of the :class:`tgdp_fast.GuidanceNetwork`.
        training: of the loop; None: :func:`tgdp_fast.fit.guidance.default_training` for the number of target samples.
        conditional: whether the guidance uses the labels (TGDP Theorem 3.3); otherwise only a conditional denoiser uses
            them.
        num_classes: None: that of the denoiser, else from the labels.
        time_distribution: of training times, "uniform" in t or in "logsnr".
        precision: of the guidance network's matmuls while fitting, "fp32", "bf16" or "fp16"; parameters and losses are
            always float32.
        diagnostics: also fit the clean-data classifier and report whether the target is within reach.

    Raises:
        ValueError: names the argument.
    """

    loss: Loss | str = field(default_factory=Logistic)
    regularizers: Iterable[Regularizer | str] | None = None
    network: NetworkConfig = field(default_factory=NetworkConfig)
    training: TrainingConfig | None = None
    conditional: bool = True
    num_classes: int | None = None
    time_distribution: str = "uniform"
    precision: str = "fp32"
    diagnostics: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss", Loss.of(self.loss))
        if self.regularizers is not None:
            given = [self.regularizers] if isinstance(self.regularizers, Regularizer | str) else self.regularizers
            chosen = tuple(Regularizer.of(value) for value in given)
            names = [one.name for one in chosen]
            if len(set(names)) < len(names):
                raise ValueError(f"regularizers must be different ones, got {', '.join(names)}")
            object.__setattr__(self, "regularizers", chosen)
        check_config("network", self.network, NetworkConfig)
        if self.training is not None:
            check_config("training", self.training, TrainingConfig)
        if self.num_classes is not None:
            check_integer("num_classes", self.num_classes, 0)
        check_choice("time_distribution", self.time_distribution, TIME_DISTRIBUTIONS)
        check_choice("precision", self.precision, PRECISIONS)

    @property
    def terms(self) -> tuple[Term, ...]:
        """The terms of the objective: the loss, then the regularizers with nonzero weight."""
        return (Loss.of(self.loss), *(one for one in map(Regularizer.of, self.regularizers or ()) if one.weight))

    @property
    def needs(self) -> frozenset[str]:
        """The attributes of a :class:`tgdp_fast.fit.terms.TransferBatch` that the terms read."""
        return frozenset(need for term in self.terms for need in term.needs)

    def resolved(self, training: TrainingConfig, num_classes: int, has_denoiser: bool) -> GuidanceConfig:
        """A copy with every None replaced by its default.

        Raises:
            ValueError: a term needs a denoiser, and there is none.
        """
        regularizers = self.regularizers
        if regularizers is None:
            kinds = [kind for kind in REGULARIZERS.values() if has_denoiser or "target_epsilon" not in kind.needs]
            regularizers = tuple(kind(kind.default) for kind in kinds if kind.default)
        found = replace(self, regularizers=regularizers, training=self.training or training, num_classes=num_classes)
        for term in found.terms:
            if "target_epsilon" in term.needs and not has_denoiser:
                raise ValueError(
                    f"denoiser must be given when {term.name} > 0: the term compares with the source model"
                )
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values["loss"] = Loss.of(self.loss).to_dict()
        if self.regularizers is not None:
            values["regularizers"] = [Regularizer.of(one).to_dict() for one in self.regularizers]
        values["network"] = asdict(self.network)
        values["training"] = None if self.training is None else asdict(self.training)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GuidanceConfig:
        """Inverse of :meth:`to_dict`; missing entries have their defaults.

        Raises:
            ValueError: an unknown entry, an invalid value.
        """
        given = dict(values)
        for name, kind in (("network", NetworkConfig), ("training", TrainingConfig)):
            if isinstance(given.get(name), Mapping):
                given[name] = _from_entries(kind, given[name], f"entry of {name}")
        return _from_entries(cls, given, "entry of the configuration")


def check_config(name: str, value: Any, kind: type[Config], advice: str = "") -> Config:
    """Return ``value``, or raise ValueError unless it is a ``kind``."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise ValueError(f"{name} must be {article} {kind.__name__}, got {type(value).__name__}{advice}")
    return value


def _from_entries(kind: type[Config], entries: Mapping[str, Any], what: str) -> Config:
    for name in entries:
        check_choice(what, name, [entry.name for entry in fields(kind)])  # type: ignore[arg-type]
    return kind(**entries)
