"""Random numbers from a seed, without the random state that all threads of a process share."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_FACTORIES = {torch.rand, torch.randn, torch.randint, torch.randperm}
_OF_TENSORS = {torch.normal, torch.bernoulli, torch.multinomial, torch.poisson, Tensor.bernoulli, Tensor.multinomial}
_IN_PLACE = {
    getattr(Tensor, f"{name}_")
    for name in ("uniform", "normal", "bernoulli", "exponential", "geometric", "log_normal", "cauchy", "random")
}
#: They take no generator, so their tensor is filled in place, which gives the same numbers.
_LIKE = {torch.rand_like: Tensor.uniform_, torch.randn_like: Tensor.normal_, torch.randint_like: Tensor.random_}
_REAL = {torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.eye, torch.linspace, torch.logspace}

_global_state = threading.RLock()


@contextmanager
def seeded_initialization(seed: int) -> Iterator[None]:
    """Modules built in the block get initial weights from ``seed``: float32, and on the CPU unless a device is named.

    The numbers are those that ``torch.manual_seed(seed)`` would give, but the global random state is neither used nor
    changed, and neither are the default dtype and device: other threads may build networks at the same time. Functions
    that draw without being able to take a generator, such as dropout, are not seeded.
    """
    with torch.device("cpu"), _Seeded(seed):
        yield


class _Seeded(TorchFunctionMode):
    """Gives every random function of this thread a generator, and new tensors of real numbers float32."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def _generator(self, device: Any) -> torch.Generator:
        device = torch.empty(0, device="cpu" if device is None else device).device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _REAL and kwargs.get("dtype") is None:
            kwargs["dtype"] = torch.float32
        if func in _LIKE:
            bounds = {name: kwargs.pop(name) for name in ("low", "high") if name in kwargs}
            result = torch.empty_like(args[0], **kwargs)
            range_ = (0, *args[1:]) if len(args) == 2 else args[1:]
            if bounds:
                range_ = bounds.get("low", 0), bounds["high"]
            fill: Any = _LIKE[func]
            return fill(result, *range_, generator=self._generator(result.device))
        if kwargs.get("generator") is None:
            if func in _FACTORIES:
                kwargs["generator"] = self._generator(kwargs.get("device"))
            elif func in _IN_PLACE or func in _OF_TENSORS or _is_initializer(func):
                first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
                kwargs["generator"] = self._generator(None if first is None else first.device)
        return func(*args, **kwargs)


def _is_initializer(func: Any) -> bool:
    return getattr(func, "__module__", "") == "torch.nn.init" and "generator" in inspect.signature(func).parameters


def draws_globally(module: nn.Module) -> bool:
    """Whether the module may draw in training mode: it has dropout, or code from outside torch and this package."""
    drawing = nn.modules.dropout._DropoutNd | nn.RReLU | nn.RNNBase | nn.MultiheadAttention
    return any(
        isinstance(child, drawing) or not type(child).__module__.startswith(("torch.nn.modules.", "tgdp_fast."))
        for child in module.modules()
    )


@contextmanager
def global_random_state(state: Tensor) -> Iterator[None]:
    """Within the block the global generator of the CPU is in ``state``, which becomes its state at the end.

    For what draws from it alone, such as dropout. Of this package's threads one at a time is in such a block; random
    numbers of other libraries' threads may mix with its own. The caller's state is restored.
    """
    with _global_state, torch.random.fork_rng(devices=[]):
        torch.set_rng_state(state)
        try:
            yield
        finally:
            state.copy_(torch.get_rng_state())
