"""Backends, the implementations of each operator, and which of them serves a call.

Every operator has a ``reference`` implementation in plain PyTorch and may have faster ones. A public function asks
``resolve`` for the implementation and calls its ``function``:

- an explicit ``backend=`` is honoured or raises :class:`BackendUnavailableError` with the reason;
- ``backend="auto"`` follows ``with use_backend(name)`` if one is active, else the environment variable
  ``TGDP_BACKEND``, both as strict as an explicit choice;
- otherwise ``auto`` takes the first of the device's backends that accepts the call and is not known to be slower there
  than another one that does, ``reference`` last. What it takes and passes over is
  logged, and an installation without kernels for the device warns once.

Under ``torch.compile`` the choice is made while tracing and becomes part of the compiled code: a later
``use_backend`` or change of the environment does not reach it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tgdp_fast.runtime.checks import check_choice

__all__ = [
    "BACKENDS",
    "BackendUnavailableError",
    "Implementation",
    "backend_report",
    "lookup",
    "register",
    "requested_backend",
    "resolve",
    "unsupported_float64",
    "use_backend",
]


class Backend(NamedTuple):
    """One way to implement operators.

    Attributes:
        name: what users call it.
        device: kind of device that its tensors must be on; None if its implementations check that themselves.
        auto: kinds of devices for which "auto" considers it; None for all.
    """

    name: str
    device: str | None
    auto: tuple[str, ...] | None


#: In the order in which "auto" considers them. Triton's interpreter serves CPU tensors, if requested by name.
_BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cuda", "cuda", ("cuda",)),
        Backend("triton", None, ("cuda",)),
        Backend("cpu", "cpu", ("cpu",)),
        Backend("reference", None, None),
    )
}
BACKENDS = tuple(_BACKENDS)
_ENVIRONMENT = "TGDP_BACKEND"
_WITHOUT_KERNELS = "warned that no kernels are installed"
_NOT_INSTALLED = "this installation has no such implementation of the operator"

_logger = logging.getLogger(__name__)
#: What this process has logged or warned of.
_logged: set[str] = set()
_lock = threading.Lock()
_override: ContextVar[str | None] = ContextVar("tgdp_fast_backend", default=None)


class BackendUnavailableError(RuntimeError):
    """An explicitly requested backend cannot serve a call.

    Attributes:
        operator: name of the operator.
        backend: the requested backend.
        reason: why it cannot serve the call.
    """

    def __init__(self, operator: str, backend: str, reason: str, available: tuple[str, ...]) -> None:
        self.operator = operator
        self.backend = backend
        self.reason = reason
        super().__init__(
            f"backend {backend!r} cannot serve operator {operator!r}: {reason}. Backends of this operator "
            f"here: {', '.join(available)}. Use backend='auto' to take the fastest that fits, name one of "
            f"these, or, if the choice came from use_backend or the environment variable {_ENVIRONMENT}, "
            "leave the block or unset the variable"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would call the class with the message alone, and fail in worker processes.
        return _restore_error, (self.args[0], self.operator, self.backend, self.reason)


def _restore_error(message: str, operator: str, backend: str, reason: str) -> BackendUnavailableError:
    error = BackendUnavailableError.__new__(BackendUnavailableError, message)
    error.operator, error.backend, error.reason = operator, backend, reason
    return error


@dataclass(frozen=True)
class Implementation:
    """One implementation of one operator.

    Attributes:
        operator, backend: names.
        function: what computes it.
        unsupported: why it cannot take a call, or None.
        prefer: the backends that were measured to be faster for a call, if there are any.
    """

    operator: str
    backend: str
    function: Callable[..., Any]
    unsupported: Callable[..., str | None] | None = None
    prefer: Callable[..., Sequence[str]] | None = None


_registry: dict[str, dict[str, Implementation]] = {}
#: Why an operator has no implementation of a backend that could have one.
_missing: dict[tuple[str, str], str] = {}


def register(
    operator: str,
    backend: str,
    function: Callable[..., Any],
    unsupported: Callable[..., str | None] | None = None,
    *,
    prefer: Callable[..., Sequence[str]] | None = None,
    missing: str | None = None,
) -> None:
    """Add an implementation; ``unsupported`` and ``prefer`` get the call that ``resolve`` gets and must not read tensor
    values.

    With a reason in ``missing``, nothing is added, and a request for the backend raises with this reason.

    Raises:
        ValueError: unknown backend, or the operator already has an implementation of it.
    """
    check_choice("backend", backend, BACKENDS)
    implementations = _registry.setdefault(operator, {})
    if backend in implementations:
        raise ValueError(f"operator {operator!r} already has a {backend!r} implementation; register each once")
    if missing is None:
        implementations[backend] = Implementation(operator, backend, function, unsupported, prefer)
    else:
        _missing[operator, backend] = missing


def requested_backend(backend: str = "auto") -> str:
    """What the caller asks for: the argument, else ``use_backend``, else TGDP_BACKEND, else "auto".

    Raises:
        ValueError: the argument or the environment variable names no backend.
    """
    check_choice("backend", backend, (*BACKENDS, "auto"))
    return _ambient_backend() if backend == "auto" else backend


# Context variables cannot be traced; while compiling, their value at that moment is the answer.
def _ambient_backend() -> str:
    override = _override.get()
    if override is not None:
        return override
    value = os.environ.get(_ENVIRONMENT) or "auto"
    return check_choice(f"environment variable {_ENVIRONMENT}", value, (*BACKENDS, "auto"), "set one or unset it")


# What torch.compiler.assume_constant_result sets; calling it would import the compiler with the package.
_ambient_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def resolve(operator: str, backend: str, *call: Any, **keywords: Any) -> Implementation:
    """The implementation that serves this call of the operator.

    Args:
        operator: registered name.
        backend: "auto" or one of BACKENDS.
        *call, **keywords: the call's arguments; the first tensor among the positional ones determines the device.

    Raises:
        ValueError: unknown operator or backend.
        BackendUnavailableError: a requested backend is missing or does not support this call.
    """
    check_choice("operator", operator, _registry)
    implementations = _registry[operator]
    name = requested_backend(backend)
    device = next((argument.device.type for argument in call if isinstance(argument, Tensor)), "cpu")
    if name != "auto":
        reason = _why_not(operator, implementations.get(name), name, device, call, keywords)
        if reason is not None:
            raise BackendUnavailableError(operator, name, reason, tuple(b for b in BACKENDS if b in implementations))
        return implementations[name]
    accepting: list[str] = []
    for candidate, about in _BACKENDS.items():
        considered = candidate in implementations or (operator, candidate) in _missing
        if not considered or (about.auto is not None and device not in about.auto):
            continue
        reason = _why_not(operator, implementations.get(candidate), candidate, device, call, keywords)
        if reason is None:
            accepting.append(candidate)
        else:
            _log_once(f"operator {operator} does not use backend {candidate}: {reason}")
    if accepting == ["reference"]:
        _warn_without_kernels(operator, device, call)
    for candidate in accepting:
        prefer = implementations[candidate].prefer
        faster = [] if prefer is None else [name for name in prefer(*call, **keywords) if name in accepting]
        if not faster:
            _log_once(f"operator {operator} uses backend {candidate} on {device} tensors")
            return implementations[candidate]
        _log_once(f"operator {operator} does not use backend {candidate}: {faster[0]} was measured to be faster")
    reason = f"no implementation takes this call on {device} tensors"
    raise BackendUnavailableError(operator, "auto", reason, tuple(implementations))


def lookup(operator: str, backend: str) -> Implementation:
    """The implementation that an earlier ``resolve`` of a call has chosen, without another choice."""
    return _registry[operator][backend]


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, ``backend="auto"`` means ``name`` for every operator; an explicit argument wins.

    Nests; local to the thread or asyncio task that enters it. ``use_backend("auto")`` overrides an outer block and the
    environment variable TGDP_BACKEND.

    Raises:
        ValueError: name is neither a backend nor "auto".
    """
    token = _override.set(check_choice("backend", name, (*BACKENDS, "auto")))
    try:
        yield
    finally:
        _override.reset(token)


def backend_report() -> dict[str, dict[str, str]]:
    """For every operator and backend: "available", or the reason why it is not."""
    return {
        operator: {b: "available" if b in implementations else _why_missing(operator, b) for b in BACKENDS}
        for operator, implementations in sorted(_registry.items())
    }


def _why_missing(operator: str, backend: str) -> str:
    return _missing.get((operator, backend), _NOT_INSTALLED)


def _why_not(
    operator: str,
    implementation: Implementation | None,
    backend: str,
    device: str,
    call: tuple[Any, ...],
    keywords: dict[str, Any],
) -> str | None:
    """Why a backend does not serve a call, or None."""
    if implementation is None:
        return _why_missing(operator, backend)
    required = _BACKENDS[backend].device or device
    if device != required:
        return f"it takes {required} tensors and the inputs are on {device}"
    return None if implementation.unsupported is None else implementation.unsupported(*call, **keywords)


def unsupported_float64(x: Tensor, *_: Any, **__: Any) -> str | None:
    """Why kernels without float64 cannot take a call, or None: an ``unsupported``, or part of one."""
    return "it serves float32, bfloat16 and float16, not float64" if x.dtype == torch.float64 else None


def _log_once(message: str) -> None:
    if not torch.compiler.is_compiling() and _is_new(message):
        _logger.info("%s", message)


def _warn_without_kernels(operator: str, device: str, call: tuple[Any, ...]) -> None:
    """Warn once if a call runs on plain PyTorch only because no kernel for its device is installed."""
    if torch.compiler.is_compiling() or _WITHOUT_KERNELS in _logged:
        return
    kernels = [name for name, about in _BACKENDS.items() if about.auto is not None and device in about.auto]
    reasons = [_missing[operator, name] for name in kernels if (operator, name) in _missing]
    if not reasons or any(name in _registry[operator] for name in kernels):
        return
    # No kernel would have taken it.
    if any(isinstance(argument, Tensor) and argument.dtype == torch.float64 for argument in call):
        return
    if _is_new(_WITHOUT_KERNELS):
        warnings.warn(
            f"tgdp_fast computes with plain PyTorch on this {device}, which is slower than its kernels: "
            f"{'; '.join(reasons)}. To keep plain PyTorch and hear no more of it, set {_ENVIRONMENT}=reference or "
            "pass backend='reference'",
            stacklevel=4,
        )


def _is_new(message: str) -> bool:
    """Whether this process has not said it yet; from now on it has."""
    if message in _logged:
        return False
    with _lock:
        new = message not in _logged
        _logged.add(message)
    return new
