"""State dicts: read from files of other code, given the names that a module has, and copied into it.

Wrappers of modules add parts to the names of tensors: ``nn.DataParallel`` and ``DistributedDataParallel`` "module",
``torch.compile`` "_orig_mod", the scripts that train them "model" or "ema". They are left out where the names that
remain are those of the module.
"""

from __future__ import annotations

import argparse
import mmap
import os
import re
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from tgdp_fast.runtime.checkpoint import COMPILED, CheckpointError, first_names, looks_pickled
from tgdp_fast.runtime.reading import reason_of

_WRAPPERS = ("module", COMPILED)
# Both spellings of weight normalization: torch.nn.utils.weight_norm, and the later torch.nn.utils.parametrizations.
_WEIGHT_NORM = re.compile(r"(?:^|\.)(parametrizations\.(\w+)\.original([01]))$")
# Plain values that scripts save beside weights. Making one runs no code of the file. Numbers of NumPy only: its texts
# and arrays have a size of their own in their state.
_NUMBERS = [np.dtype(code) for code in "?bBhHiIlLqQefdgFDG"]
_PLAIN: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *{type(number) for number in _NUMBERS},
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
# torch keeps its list of safe classes for the whole process.
_LOADING = threading.Lock()
# Tensors of a file may share memory, or repeat it with stride 0, but a small file does not describe a large network.
_REPEATED = 64

_ELEMENTWISE = (Tensor.exp, Tensor.sqrt, Tensor.square, Tensor.mul)

Module = TypeVar("Module", bound=nn.Module)


# ------------------------------------------------------------------------------------------- files of others


def read_state_dict(
    path: str | os.PathLike[str], entry: str = "model_state_dict", *, anchor: str = ""
) -> dict[str, Tensor]:
    """The state dict in a file from elsewhere: a safetensors file, or one of ``torch.save``.

    Args:
        path: the file; its content, not its name, determines its type.
        entry: of the state dict in a file of ``torch.save``, unless the file itself is one.
        anchor: name of a tensor that the state dict must have. A prefix of it is removed from all names.

    Returns:
        Tensors on the CPU in their stored dtypes.

    Raises:
        CheckpointError: no such file, damaged, or with anything but dense tensors in the state dict, or with several
            state dicts. Only tensors, numbers and plain containers are unpickled, and no code from the file is run.
    """
    file = Path(path)
    if not file.is_file():
        state = "is a folder; Denoiser.load reads checkpoint folders" if file.is_dir() else "does not exist"
        raise CheckpointError(f"{path} {state}; expected a file of torch.save or safetensors")
    try:
        content = _unpickled(file) if looks_pickled(file) else load_file(file)
    except Exception as error:  # Damaged files raise errors of many types, from several libraries.
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            name = re.sub(r"^numpy\._?core\.multiarray\._reconstruct$", "numpy.ndarray", found[1])
            advice = "whoever wrote it can save its weights alone: torch.save(model.state_dict(), FILE)"
            if name.startswith("numpy."):
                advice = (
                    f"if you trust the file, convert it once: content = torch.load(FILE, weights_only=False); "
                    f'torch.save(content["{entry}"], FILE), after torch.from_numpy for arrays among the weights'
                )
            raise CheckpointError(
                f"{path} holds something else than tensors, an object of {name}, which is never unpickled because that "
                f"can run arbitrary code; {advice}"
            ) from None
        raise CheckpointError(
            f"{path} is damaged, truncated, or holds something else than tensors ({type(error).__name__}: "
            f"{reason_of(error)}); expected a file of torch.save or safetensors with a state dict"
        ) from None
    tensors = _entry(content, entry, path)
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path} must hold a state dict, alone or as {entry!r}: the entry {name!r} is of type "
                f"{type(tensor).__name__}, expected torch.Tensor"
            )
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = "quantized" if tensor.is_quantized else "without values (meta)" if tensor.is_meta else tensor.layout
            raise CheckpointError(
                f"{path} must hold dense tensors, but {name!r} is {kind}; save it as a dense one, such as "
                "one.to_dense() or one.dequantize()"
            )
    described, stored = sum(one.numel() * one.element_size() for one in tensors.values()), file.stat().st_size
    if described > _REPEATED * stored + 2**20:
        raise CheckpointError(f"{path} has {stored} bytes and describes tensors of {described}; it is damaged")
    return _without_prefix(tensors, anchor, path) if anchor else dict(tensors)


def _unpickled(file: Path) -> Any:
    """The content of a file of ``torch.save``: tensors, numbers, texts and plain containers of them."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
        # torch.save never compresses; what is larger outside than inside is no file of it.
        if any(one.compress_type != zipfile.ZIP_STORED for one in members) or (
            sum(one.file_size for one in members) > file.stat().st_size
        ):
            raise ValueError("its archive is compressed, which torch.save never does")
    with (
        open(file, "rb") as handle,
        # Reading it never takes more than it has, whatever lengths it states.
        mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        _LOADING,
        torch.serialization.safe_globals(_PLAIN),
    ):
        content: Any = mapped  # It reads and seeks, as a file does.
        return torch.load(content, map_location="cpu", weights_only=True)


def _entry(content: Any, entry: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state dict in the content of a file."""
    if isinstance(content, dict) and entry in content:
        content = content[entry]
    elif isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        found = [
            name
            for name, value in content.items()
            if isinstance(value, dict) and any(isinstance(one, Tensor) for one in value.values())
        ]
        if len(found) > 1:
            raise CheckpointError(
                f"{path} holds several state dicts ({first_names([repr(name) for name in found])}), and {entry!r} is "
                f"none of them; save the one to use alone: content = torch.load(FILE, weights_only=True); "
                f"torch.save(content[{found[0]!r}], NEW_FILE)"
            )
        content = content[found[0]] if found else content
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a state dict, alone or as {entry!r}, got {type(content).__name__}")
    return content


def _without_prefix(tensors: Mapping[str, Tensor], anchor: str, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors with the names that they have where ``anchor`` has its own."""
    plain = _renamed(tensors)
    prefixes = [name.removesuffix(anchor) for name in plain if name == anchor or name.endswith("." + anchor)]
    if len(prefixes) > 1:
        raise CheckpointError(
            f"{path} holds {anchor} several times, with {first_names([repr(one) for one in prefixes])} in front; save "
            "the tensors of one of them in a file of their own"
        )
    prefix = prefixes[0] if prefixes else ""
    return {name.removeprefix(prefix): tensor for name, tensor in plain.items()}


def _plain_name(name: str) -> str:
    """A tensor's name without the parts of wrappers, and in the older spelling of weight normalization."""
    if found := _WEIGHT_NORM.search(name):
        name = f"{name[: found.start(1)]}{found[2]}_{'gv'[int(found[3])]}"
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _renamed(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """By their plain names; unchanged if two would have the same."""
    plain = {_plain_name(name): value for name, value in tensors.items()}
    return plain if len(plain) == len(tensors) else dict(tensors)


# --------------------------------------------------------------------------------------------- into modules


def unwrapped(network: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``, ``nn.DataParallel`` and ``DistributedDataParallel``, in any order."""
    while True:
        inner = network._modules.get(COMPILED) if isinstance(network, nn.Module) else None
        if inner is None and isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = network.module
        if inner is None:
            return network
        network = inner


def restored(
    build: Callable[[], Module], config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str | os.PathLike[str]
) -> Module:
    """The module of ``build`` with the values of ``tensors``, compared before anything of its size is allocated.

    Args:
        build: makes the module; called on the meta device first.
        config: the settings that it uses, from a file.
        tensors, where: as in :func:`load_state_dict_checked`.

    Raises:
        CheckpointError: as :func:`load_state_dict_checked`; sizes that no module with these tensors has.
    """
    largest = max([1000, len(tensors), *(size for tensor in tensors.values() for size in tensor.shape)])
    for name, value in _integers(config):
        if value > 2 * largest:
            raise CheckpointError(
                f"{where} belongs to another architecture than its settings say: {name} is {value}, but no tensor has "
                f"more than {largest} rows or columns; the settings are damaged or of another checkpoint"
            )
    with torch.device("meta"), _Sketch(1000 * len(tensors) + 10_000):
        sketch = build()
    _named_as_in(sketch, tensors, where)
    module = build()
    load_state_dict_checked(module, tensors, where)
    return module


def load_state_dict_checked(module: nn.Module, tensors: Mapping[str, Tensor], where: str | os.PathLike[str]) -> None:
    """Copy ``tensors`` into ``module`` if every name and shape agrees; otherwise leave the module untouched.

    Args:
        module: receives the values in its own dtype and on its own device.
        tensors: state dict, as returned by :func:`load_checkpoint`. Parts of names that wrappers add, and a prefix
            common to all, may differ.
        where: the path or name that messages mention.

    Raises:
        CheckpointError: lists missing, unexpected and differently shaped tensors; numbers of another kind; a module
            without values.
    """
    empty = [name for name, value in _tensors_of(module).items() if value.is_meta or is_lazy(value)]
    if empty:
        raise CheckpointError(
            f"{where} cannot be read into a {type(module).__name__} whose tensors have no values yet "
            f"({first_names(empty)}); build it on the CPU, and call it once if it has lazy layers"
        )
    module.load_state_dict(_named_as_in(module, tensors, where), strict=True)


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    state = module.state_dict(keep_vars=True)  # The tensors themselves, so that tied ones are known.
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _named_as_in(module: nn.Module, tensors: Mapping[str, Tensor], where: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors by the names of ``module``, after a comparison of names, shapes and kinds of numbers."""
    own = _tensors_of(module)
    named = dict(tensors)
    if own.keys() != named.keys():
        theirs, back = (_bare(_renamed(names)) for names in (tensors, {name: name for name in own}))
        if theirs.keys() == back.keys():
            named = {back[name]: value for name, value in theirs.items()}
        # Of tensors that are one in the module, some writers store one.
        there = {id(own[name]): named[name] for name in own if name in named}
        named |= {name: there[id(value)] for name, value in own.items() if name not in named and id(value) in there}
    missing = [name for name in own if name not in named]
    unexpected = [name for name in named if name not in own]
    pairs = {name: (named[name], value) for name, value in own.items() if name in named}
    shapes = [
        f"{name} {list(theirs.shape)}, expected {list(value.shape)}"
        for name, (theirs, value) in pairs.items()
        if theirs.shape != value.shape
    ]
    numbers = [
        f"{name} {theirs.dtype}, expected {value.dtype}"
        for name, (theirs, value) in pairs.items()
        if _kind(theirs) > max(_kind(value), 1)
    ]
    found = {"missing": missing, "unexpected": unexpected, "other shape": shapes, "other numbers": numbers}
    if any(found.values()):
        listed = "; ".join(f"{title}: {first_names(names)}" for title, names in found.items() if names)
        raise CheckpointError(
            f"{where} belongs to another architecture than this {type(module).__name__} "
            f"({listed}); build the module with the settings it was saved with"
        )
    return named


def _bare(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """By the names without what is in front of all of them."""
    prefix = os.path.commonprefix([f"{name}." for name in tensors]).rpartition(".")[0] + "."
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def _kind(tensor: Tensor) -> int:
    """1 for integers and bools, 2 for real numbers, 3 for complex ones: a copy to a lower kind would drop a part."""
    return 3 if tensor.is_complex() else 2 if tensor.is_floating_point() else 1


def _integers(config: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """The integers in settings, with their names."""
    if isinstance(config, int):
        yield name, config
    elif isinstance(config, Mapping):
        for key, value in config.items():
            yield from _integers(value, str(key))
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _integers(value, name)


class _Sketch(TorchFunctionMode):
    """On the meta device: a module's shapes, without its values, for about as many tensors as a file holds."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls -= 1
        if self.calls < 0:
            raise ValueError("they describe a network of far more layers than the file has tensors for")
        # The meta device would import torch's compiler for these, which takes seconds.
        if func in (torch.linspace, torch.randn):
            return torch.empty(args[2] if func is torch.linspace else args)
        if func in (nn.init.normal_, Tensor.normal_):
            return args[0] if args else kwargs["tensor"]
        return torch.empty_like(args[0]) if func in _ELEMENTWISE else func(*args, **(kwargs or {}))
