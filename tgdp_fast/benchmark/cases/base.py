"""What a case is, and what all of them share."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tgdp_fast.benchmark.accuracy import PRECISIONS, ROUNDINGS, Error, Verdict, error_of, within
from tgdp_fast.ops import registry, use_backend

#: Returns what the numeric check looks at.
Call = Callable[[], Sequence[Tensor]]

PLAIN_PROVIDERS = ("peer", "reference", "compile")
BACKENDS = tuple(name for name in registry.BACKENDS if name != "reference")
#: Of whole networks: as released code computes them, as others would speed them up, and compiled for sampling.
NETWORK_PROVIDERS = ("published", "strong", "sampling")
PROVIDERS = (*PLAIN_PROVIDERS, *BACKENDS, "auto", *NETWORK_PROVIDERS)
#: Added to a provider's name: its call recorded in a CUDA graph and replayed.
GRAPH = "+graph"

#: The peer's chain of operations rounds each result to its own precision.
PEER_ROUNDINGS = 16.0

_CHECKED_ROWS = 512
SEED = 7


class UnservedError(Exception):
    """A provider has nothing of its own to show for a case."""


@dataclass(frozen=True)
class Work:
    """Least bytes moved and FLOPs of one call, by the formulas in the operators' docstrings."""

    traffic: float
    flops: float
    precision: str  # of the arithmetic


class Prepared(ABC):
    """A case in one precision with its inputs in memory."""

    @abstractmethod
    def call(self, provider: str) -> Call:
        """What is timed.

        Raises:
            BackendUnavailableError: the backend does not serve it.
            UnservedError: it would be another provider's call.
        """

    @abstractmethod
    def check(self, provider: str, call: Call) -> Verdict:
        """Run ``call`` for the first time and compare with float64. Raises as :meth:`call`."""


class Case(ABC):
    """One thing to time.

    Attributes:
        name: unique, "kind/size".
        shape: of the inputs, for people.
        precisions: in which it is timed.
        quick: whether ``--quick`` includes it.
        memory: bytes it needs at most, about.
        operators: registered operators whose backends are providers.
        composite: whether it calls several operators, so that "auto" can mix backends.
        recordable: whether one call can be recorded in a CUDA graph.
        rounds: of timing, at most, on a CPU; None where the time that is set aside for them decides.
        needs_accelerator: whether a CPU would take too long.
    """

    name: str
    shape: str
    precisions: tuple[str, ...]
    quick: bool
    memory: float
    operators: tuple[str, ...]
    composite: bool = False
    recordable: bool = True
    rounds: int | None = None
    needs_accelerator: bool = False

    def providers(self, device: torch.device | None = None) -> tuple[str, ...]:
        """Names of the providers that may serve it on a device (default: the CPU), each before its recording."""
        report = registry.backend_report()
        there = [
            backend
            for backend in BACKENDS
            if any(report[operator][backend] == "available" for operator in self.operators if operator in report)
        ]
        names = (*PLAIN_PROVIDERS, *there, *(["auto"] if self.composite else []))
        if device is None or device.type != "cuda" or not self.recordable:
            return names
        return tuple(itertools.chain.from_iterable((name, name + GRAPH) for name in names))

    @abstractmethod
    def work(self, precision: str) -> Work:
        """Least work of one call."""

    @abstractmethod
    def prepare(self, precision: str, device: torch.device) -> Prepared:
        """Make the inputs."""


def bytes_of(precision: str) -> int:
    return PRECISIONS[precision].itemsize


def checked_rows(batch: int, device: torch.device) -> Tensor:
    """Up to ``_CHECKED_ROWS`` row indices, evenly spread, first and last among them."""
    return torch.linspace(0, batch - 1, min(batch, _CHECKED_ROWS)).round().long().to(device)


def judge(
    provider: str, outputs: Sequence[Tensor], exact: Sequence[Tensor], eager_error: Error, dtype: torch.dtype
) -> Verdict:
    """The gate of one operator; ``eager_error`` is the peer's, or for the peer that of the reference."""
    error = error_of(outputs, exact)
    roundings = PEER_ROUNDINGS if provider == "peer" else ROUNDINGS
    return Verdict(within(error, eager_error, dtype, roundings), error.maximum)


def hidden_weights(inputs: int, width: int, depth: int) -> int:
    """Numbers in the weight matrices of the hidden layers."""
    return inputs * width + (depth - 1) * width * width


@contextmanager
def _recorded_backends() -> Iterator[set[str]]:
    """The backends that operators resolve to within the block."""
    real, used = registry.resolve, set()

    def resolve(*arguments: Any, **keywords: Any) -> registry.Implementation:
        implementation = real(*arguments, **keywords)
        used.add(implementation.backend)
        return implementation

    registry.resolve = resolve
    try:
        yield used
    finally:
        registry.resolve = real


class PreparedComposite(Prepared):
    """Checks that a backend is really used, and leaves the numeric check to :meth:`judge`."""

    def check(self, provider: str, call: Call) -> Verdict:
        with _recorded_backends() as used:
            outputs = call()
        if provider in BACKENDS and provider not in used:
            raise UnservedError(f"no operator of this case runs on {provider}")
        if provider == "auto" and len(used) < 2:
            raise UnservedError(f"auto takes {', '.join(used) or 'no operator'} for all of it")
        return self.judge(provider, outputs)

    @abstractmethod
    def judge(self, provider: str, outputs: Sequence[Tensor]) -> Verdict:
        """Compare with float64."""


def backend_of(provider: str) -> AbstractContextManager[Any]:
    return use_backend(provider if provider not in PLAIN_PROVIDERS else "reference")


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, PRECISIONS[precision])
