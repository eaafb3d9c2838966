"""Common base of losses and regularizers: a registered name, their needs, and JSON.

A loss or a regularizer is one class in one file. Defining the class registers its name for
:class:`tgdp_fast.GuidanceConfig`, messages and the command line. This module and those of the terms do not import
torch, because the help of the command line lists their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from tgdp_fast.runtime.checks import check_choice

if TYPE_CHECKING:
    from torch import Tensor

    from tgdp_fast.fit.batches import NoisedBatch

Kind = TypeVar("Kind", bound="Term")


@dataclass
class TransferBatch:
    """Inputs of a term in one training step: B noised samples of each domain.

    Attributes:
        source: noised source samples (x0, x, epsilon [B, ...], t [B], alpha, sigma); always present.
        source_log_h: log h(x_t, t) of the fitted network [B]; always present.
        source_log_ratio: log r(x_0) of the classifier on clean data [B] (TGDP Algorithm 1).
        target: noised target samples.
        target_log_h: log h(x_t, t) of the fitted network [B].
        target_gradient: its gradient in x_t [B, ...].
        target_epsilon: noise predicted by the frozen source model [B, ...]; without gradient.
        target_classifier_log_h: log h(x_t, t) of the time-dependent classifier [B] (Algorithm 2); without gradient.
    """

    source: NoisedBatch
    source_log_h: Tensor = field(init=False)
    source_log_ratio: Tensor = field(init=False)
    target: NoisedBatch = field(init=False)
    target_log_h: Tensor = field(init=False)
    target_gradient: Tensor = field(init=False)
    target_epsilon: Tensor = field(init=False)
    target_classifier_log_h: Tensor = field(init=False)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(f"the batch has no {name}; a term that reads it must list {name!r} in its needs")


_OPTIONAL = tuple(entry.name for entry in fields(TransferBatch) if entry.name not in ("source", "source_log_h"))


class Term:
    """One term of the objective: a frozen dataclass, called with a :class:`TransferBatch`.

    Class attributes:
        name: its registered name.
        needs: the attributes of the batch that it reads, besides ``source`` and ``source_log_h``. Only attributes that
            a term needs are computed.
    """

    family: ClassVar[str]
    known: ClassVar[dict[str, Any]]
    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, family: str = "", **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if family:
            cls.family, cls.known = family, {}
        for need in cls.needs:
            check_choice(f"needs of {cls.__name__}", need, _OPTIONAL)
        if "name" in vars(cls):
            cls.known[cls.name] = cls

    def __call__(self, batch: TransferBatch) -> Tensor:
        """A scalar, float32."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """``{"name": ..., and its fields}``, JSON-able."""
        return {"name": self.name, **asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def of(cls: type[Kind], value: Any) -> Kind:
        """A term from an object, its name, or :meth:`to_dict`.

        Raises:
            ValueError: lists the known names, or entries.
        """
        if isinstance(value, cls):
            return value
        entries = dict(value) if isinstance(value, Mapping) else {"name": value}
        chosen = cls.known[check_choice(cls.family, entries.pop("name", None), cls.known)]
        for entry in entries:
            check_choice(f"entry of {chosen.name}", entry, [one.name for one in fields(chosen)])
        result: Kind = chosen(**entries)
        return result
