"""Networks in eval mode for one caller, whatever mode they are in for others.

A network's mode is a flag on each of its modules, so a thread that set it would change the network for all threads: one
that trains it would lose its dropout, one that samples it would get dropout. A caller therefore gets a *view*: modules
of the same classes that share all state with the originals, parameters and caches alike, but have a mode of their own.
Counting the users of each module would keep two samplers apart, but not a sampler and a training loop.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

#: Modules that reach their submodules without the attributes that a view replaces.
_WITHOUT_VIEW = ("torch.jit", "torch.nn.parallel", "torch.distributed", "torch._dynamo")
_PLAIN = ("torch.nn.", "tgdp_fast.")
#: Attributes of every module; of these only hooks may hold other modules where a view does not replace them.
_OWN = frozenset(name for name in vars(nn.Module()) if not name.endswith("hooks"))
_VALUES = (bool, int, float, str, bytes, type, Tensor)
_DEPTH = 4

_lock = threading.Lock()
_users: dict[int, tuple[nn.Module, int]] = {}  # Modules put in eval mode, and how many callers need that.


@contextmanager
def evaluation_mode(*modules: Any) -> Iterator[tuple[Any, ...]]:
    """The modules with dropout and batch statistics off, in the same order, to be called in their place.

    Each is a view that no other caller sees or disturbs. Compiled and scripted modules, and those that keep submodules
    in other objects than modules, have no view: if they are in training mode they are put in eval mode for everyone,
    until the last caller that needs this leaves. Values that are no modules are returned as they are.
    """
    given = [view_of(module) if isinstance(module, nn.Module) else module for module in modules]
    shared = [
        child
        for module, chosen in zip(modules, given, strict=True)
        if chosen is module and isinstance(module, nn.Module)
        for child in module.modules()
    ]
    with _lock:  # Held only to count: callers never wait for each other's work.
        entered = [child for child in shared if id(child) in _users or child.training]
        for child in entered:
            child.training = False
            _users[id(child)] = child, _users.get(id(child), (child, 0))[1] + 1
    try:
        yield tuple(given)
    finally:
        with _lock:
            for child in entered:
                _, count = _users.pop(id(child))
                if count > 1:
                    _users[id(child)] = child, count - 1
                else:
                    child.training = True


class _View:
    """A module that shares the attributes of another one, except for its mode and the submodules, which are views."""

    __slots__ = ()

    def _get_mode(self) -> bool:
        return bool(object.__getattribute__(self, "_view_mode"))

    def _set_mode(self, mode: bool) -> None:
        object.__setattr__(self, "_view_mode", mode)

    training = property(_get_mode, _set_mode)
    _modules = property(lambda self: object.__getattribute__(self, "_view_children"))

    def __getattr__(self, name: str) -> Any:
        children = self._modules
        return children[name] if name in children else super().__getattr__(name)  # type: ignore[misc]

    # A view counts as its module where a hook uses it as a key, and where it is copied.
    def __eq__(self, other: object) -> bool:
        return other is self or other is object.__getattribute__(self, "_view_of")

    def __hash__(self) -> int:
        return hash(object.__getattribute__(self, "_view_of"))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return object.__getattribute__(self, "_view_of").__reduce_ex__(protocol)


def view_of(module: nn.Module) -> nn.Module:
    """A view of ``module`` in eval mode, or the module itself if it has no view.

    A view follows every change of a tensor, but not of the tree of submodules.
    """
    try:
        return _view(module, {})
    except NoViewError:
        return module


class NoViewError(Exception):
    """A module reaches others, or itself, not through its submodules."""


def _view(module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    found = known.get(id(module))
    if found is not None:
        return found
    kind: Any = type(module)
    if _needs_original(module, kind.__module__):
        raise NoViewError
    result: nn.Module = object.__new__(_view_class(kind))
    known[id(module)] = result
    children = {name: None if child is None else _view(child, known) for name, child in module._modules.items()}
    write = object.__setattr__  # That of nn.Module would register the module as a submodule.
    write(result, "_view_of", module)
    write(result, "_view_mode", False)
    write(result, "_view_children", children)
    write(result, "__dict__", module.__dict__)
    return result


@functools.lru_cache(maxsize=256)
def _view_class(kind: Any) -> Any:
    entries = {
        "__slots__": ("_view_of", "_view_mode", "_view_children"),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        # A slice of nn.ModuleList makes another object of its class.
        "__new__": lambda _, *args, **named: kind(*args, **named),
    }
    return type(kind)(kind.__name__, (_View, kind), entries)


def _needs_original(module: nn.Module, home: str) -> bool:
    attributes = module.__dict__
    if module._compiled_call_impl is not None or home.startswith(_WITHOUT_VIEW):
        return True
    if home.startswith(_PLAIN) and "forward" not in attributes:
        hooks = (attributes["_forward_hooks"], attributes["_forward_pre_hooks"])
        return any(_holds_module(held) for held in hooks if held)
    return any(_holds_module(attributes[name]) for name in attributes.keys() - _OWN)


def _holds_module(value: Any, depth: int = _DEPTH) -> bool:
    if value is None or isinstance(value, _VALUES):
        return False
    if isinstance(value, nn.Module) or depth == 0:
        return True
    held: Any = ()
    if isinstance(value, dict):
        held = value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        held = value
    elif isinstance(value, MethodType):
        held = (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        held = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, FunctionType):
        held = _captured(value)
    elif type(value).__module__.partition(".")[0] not in ("torch", "numpy", "tgdp_fast") and hasattr(value, "__dict__"):
        held = vars(value).values()
    return any(_holds_module(item, depth - 1) for item in held)


def _captured(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # An empty cell.
            yield cell.cell_contents
