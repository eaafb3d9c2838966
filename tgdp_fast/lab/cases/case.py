"""What a case is, and what the cases share.

A module of this folder has, for an operator: its inputs, the operator the way public code computes it (in float64 the
truth that errors are measured against, in a lower precision the yardstick for an error and the ``peer`` of the
benchmark), awkward shapes for ``validate`` with a function ``check``, and the ``case`` of ``bench``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tgdp_fast.lab.accuracy import ROUNDINGS, Error, error_of, within
from tgdp_fast.ops import registry, use_backend
from tgdp_fast.runtime.precision import PRECISIONS

PLAIN_PROVIDERS = ("peer", "reference", "compile")
BACKENDS = tuple(name for name in registry.BACKENDS if name != "reference")
#: Of whole networks: as released code computes them, as others would speed them up, and compiled for sampling.
NETWORK_PROVIDERS = ("published", "strong", "sampling")
PROVIDERS = (*PLAIN_PROVIDERS, *BACKENDS, "auto", *NETWORK_PROVIDERS)
#: Added to a provider's name: its call captured in a CUDA graph and replayed.
GRAPH = "+graph"

#: The peer's chain of operations rounds each result to its own precision.
PEER_ROUNDINGS = 16.0
SEED = 7

#: Returns what the numeric check looks at.
Call = Callable[[], Sequence[Tensor]]
#: Least bytes moved and FLOPs of one call, by the formulas in the operators' docstrings, and the FLOPs' precision.
Work = tuple[float, float, str]


class UnservedError(Exception):
    """A provider has nothing of its own to show for a case."""


class InaccurateError(Exception):
    """A provider is too far from float64 to be timed; ``error`` says how far."""

    def __init__(self, error: float) -> None:
        super().__init__(f"error {error:.3g}")
        self.error = error


class Setup(NamedTuple):
    """The inputs of a case in memory.

    Attributes:
        call: call(provider) is what is timed; raises BackendUnavailableError or UnservedError.
        check: check(provider, call) runs a call for the first time and returns its largest error; raises
            InaccurateError, or as ``call``.
    """

    call: Callable[[str], Call]
    check: Callable[[str, Call], float]


@dataclass
class Case:
    """One thing to time.

    Attributes:
        name: unique, "kind/size".
        shape: of the inputs, for people.
        precisions: in which it is timed.
        memory: bytes that it needs at most, roughly.
        work: least work of one call in a precision.
        setup: makes the inputs in a precision on a device.
        operators: registered operators whose backends are providers; of several, "auto" can mix backends.
        only: names of the providers, where they are not those of the operators.
        uncapturable: providers whose calls cannot be captured in a CUDA graph.
        quick: whether ``--quick`` includes it.
        rounds: of timing, at most, on a CPU; None where the time set aside for them decides.
        needs_accelerator: whether a CPU would take too long.
    """

    name: str
    shape: str
    precisions: tuple[str, ...]
    memory: float
    work: Callable[[str], Work]
    setup: Callable[[str, torch.device], Setup]
    operators: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    uncapturable: tuple[str, ...] = ()
    quick: bool = False
    rounds: int | None = None
    needs_accelerator: bool = False

    def providers(self, device: torch.device | None = None) -> tuple[str, ...]:
        """Names of the providers that may serve it on a device (default: the CPU), each before its captured form."""
        names = self.only
        if not names:
            report = registry.backend_report()
            states = [report[operator] for operator in self.operators if operator in report]
            there = [name for name in BACKENDS if any(state[name] == "available" for state in states)]
            names = (*PLAIN_PROVIDERS, *there, *["auto"] * (len(self.operators) > 1))
        if device is None or device.type != "cuda":
            return names
        endings = {name: ("",) if name in self.uncapturable else ("", GRAPH) for name in names}
        return tuple(name + ending for name in names for ending in endings[name])


class Check(NamedTuple):
    """One operator on one awkward shape, for ``validate``.

    Attributes:
        shape: for people.
        outputs: outputs(backend) calls the operator.
        exact: the outputs in float64.
        eager: the outputs of eager PyTorch in the precision of the check.
    """

    shape: str
    outputs: Callable[[str], Sequence[Tensor]]
    exact: Sequence[Tensor]
    eager: Sequence[Tensor]


class Draw:
    """draw(*size): normal numbers, the same on every machine and in every precision up to its rounding.

    Args:
        dtype, device: of the tensors.
        seed: of the generator.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.dtype, self.device, self.seed = dtype, device, seed
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *size: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (scale * torch.randn(size, generator=self.generator)).to(self.device, dtype or self.dtype)


def bytes_of(precision: str) -> int:
    """Bytes of a number."""
    return PRECISIONS[precision].itemsize


def checked_rows(batch: int, device: torch.device, most: int = 512) -> Tensor:
    """Up to ``most`` row indices, evenly spread, first and last among them."""
    return torch.linspace(0, batch - 1, min(batch, most)).round().long().to(device)


def largest_error(
    provider: str, outputs: Sequence[Tensor], exact: Sequence[Tensor], eager_error: Error, dtype: torch.dtype
) -> float:
    """The largest error of an operator's outputs; ``eager_error`` is the peer's, or for the peer the reference's.

    Raises:
        InaccurateError: it is above the limit of :func:`within`.
    """
    error = error_of(outputs, exact)
    if not within(error, eager_error, dtype, PEER_ROUNDINGS if provider == "peer" else ROUNDINGS):
        raise InaccurateError(error.maximum)
    return error.maximum


def limited(error: float, limit: float) -> float:
    """``error``, or InaccurateError unless it is at most ``limit``."""
    if not error <= limit:
        raise InaccurateError(error)
    return error


def served_outputs(provider: str, call: Call) -> Sequence[Tensor]:
    """What ``call`` returns, of a case with several operators.

    Raises:
        UnservedError: no operator ran on the provider's backend, or "auto" took one backend for all of them.
    """
    with _resolved_backends() as used:
        outputs = call()
    if provider in BACKENDS and provider not in used:
        raise UnservedError(f"no operator of this case runs on {provider}")
    if provider == "auto" and len(used) < 2:
        raise UnservedError(f"auto takes {', '.join(used) or 'no operator'} for all of it")
    return outputs


@contextmanager
def _resolved_backends() -> Iterator[set[str]]:
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


def backend_of(provider: str) -> AbstractContextManager[Any]:
    """``use_backend`` of the provider's; plain providers and released code run on the reference."""
    return use_backend(provider if provider in BACKENDS or provider == "auto" else "reference")


def place(tensor: Tensor, layout: str) -> Tensor:
    """The same values: "contiguous", "strided" (every second entry of a larger transposed buffer, the rest NaN) or
    "misaligned" (one entry past the start of a buffer).
    """
    if layout == "strided":
        buffer = tensor.new_full([2 * size for size in reversed(tensor.shape)], float("nan"))
        view = buffer[tuple(slice(1, None, 2) for _ in tensor.shape)].permute(*reversed(range(tensor.ndim)))
        return view.copy_(tensor)
    if layout == "misaligned":
        return tensor.new_full((tensor.numel() + 1,), float("nan"))[1:].view(tensor.shape).copy_(tensor)
    return tensor.contiguous()
