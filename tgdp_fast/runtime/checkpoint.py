"""Checkpoints: folders of ``config.json`` and ``model.safetensors``, written atomically and never unpickled.

A checkpoint is one folder and is replaced as a whole. An interrupted save leaves the old state or the new
one: the new folder is completed and flushed beside the old one, then two renames exchange them. If the process
dies between the renames, the old folder remains as ``.NAME.previous`` and loading finds it there. Processes that save
the same folder wait for each other; what a killed one has left goes at the next save or removal. Readers take no lock
and need no right to write: they read again if the folder was replaced meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tgdp_fast._version import __version__
from tgdp_fast.runtime.arrays import CheckedArray
from tgdp_fast.runtime.files import atomic_folder, flush, real_path, remove_partial_folders, write_atomic, writing
from tgdp_fast.runtime.locks import target_lock
from tgdp_fast.runtime.reading import parse_json, read_bytes, refused

FORMAT = "tgdp_fast"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
TENSOR_FILE = "model.safetensors"
CARD_FILE = "README.md"

_PICKLE_ADVICE = (
    "files written by torch.save or pickle are never loaded, because unpickling can run arbitrary code; "
    "convert once with tensors = torch.load(FILE, weights_only=True), then load_state_dict into the model "
    "and save it from there"
)
_EXPECTED = f"expected a checkpoint folder with {CONFIG_FILE} and {TENSOR_FILE}"
_AGAIN = "save or copy the checkpoint again"
_READS = 100  # of a folder that others save at the same time
_LISTED = 4  # names shown of several
_CONFIG_BYTES = 64 * 1024**2  # far more than the settings and the history of any fit
# What safetensors has a name for.
_STORED = frozenset(
    getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex64", "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    )
)
# Files for readers and for git, which are kept when a checkpoint is replaced.
_KEPT = (CARD_FILE, ".gitattributes")

#: What torch.compile puts in front of the names of a module's tensors.
COMPILED = "_orig_mod"

T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message names the path, the cause and what to do."""


# ----------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(
    path: str | os.PathLike[str],
    kind: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    card: str | None = None,
) -> None:
    """Write a checkpoint folder atomically; an existing checkpoint at ``path`` is replaced as a whole.

    An existing model card (README.md) and .gitattributes are kept.

    Args:
        path: folder to create or replace; parent folders are created.
        kind: type of the content, such as ``"denoiser"``; checked on load.
        config: JSON-able settings that rebuild the object; finite numbers only. Tuples come back as lists.
        tensors: named dense tensors of any shape and device, usually a state dict. Views and tensors that share
            memory are stored as separate tensors, lazy conjugates by their values. Names are stored without the parts
            that ``torch.compile`` adds.
        card: text of README.md; None keeps an existing one, or writes none.

    Raises:
        CheckpointError: ``path`` is a file or a folder with anything other than a checkpoint,
            ``config`` is not JSON-able, or a value of ``tensors`` is not a dense tensor. Nothing has been
            written then.
        OSError: the disk fails; the previous state is intact. The error names the file.
    """
    target = real_path(path)
    if not isinstance(kind, str) or not kind:
        raise CheckpointError(f"kind must be a non-empty string, got {kind!r}")
    try:
        config = json.loads(json.dumps(dict(config), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"config of the {kind} checkpoint must hold only finite numbers, strings, booleans, None, lists "
            f"and dicts: {error}"
        ) from None
    stored = _detached(tensors)
    check_replaceable(target)  # Before the lock, which is a file too.
    with atomic_folder(target, wait=True) as partial:
        _write_tensors(partial / TENSOR_FILE, stored)
        _write_texts(partial, target, kind, config, card)
        _exchange(partial, target)


def _write_tensors(file: Path, stored: dict[str, Tensor]) -> None:
    file.touch()
    mode = file.stat().st_mode  # As the user's umask has it; safetensors makes a file that the user alone can read.
    with writing(file):
        save_file(stored, file)
        file.chmod(mode)
        flush(file)


def _write_texts(partial: Path, target: Path, kind: str, config: Mapping[str, Any], card: str | None) -> None:
    """The files beside the tensors; those that are kept come from ``target``."""
    tensor_file = partial / TENSOR_FILE
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "library_version": __version__,
        "tensors": {"bytes": tensor_file.stat().st_size, "sha256": _sha256(tensor_file)},
        "config": config,
    }
    write_atomic(partial / CONFIG_FILE, json.dumps(header, indent=2) + "\n")
    for name in _KEPT:
        if name == CARD_FILE and card is not None:
            write_atomic(partial / name, card)
        elif (target / name).is_file():
            write_atomic(partial / name, (target / name).read_bytes())
    flush(partial)


def _exchange(partial: Path, target: Path) -> None:
    """Put ``partial`` in the place of ``target``, which becomes the previous one."""
    previous = _previous(target)
    if target.exists():
        # With a complete target an older leftover is obsolete, and the rename needs its place.
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(target, previous)
    try:
        os.replace(partial, target)
    except BaseException:
        if previous.exists() and not target.exists():
            os.replace(previous, target)
        raise
    flush(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _settled(read: Callable[[], T], path: str | os.PathLike[str]) -> T:
    """``read()`` of a checkpoint; again if the folder was replaced meanwhile, so that all comes from one save."""
    folder = real_path(path)
    for _ in range(_READS):
        before = _state(folder)
        try:
            result = read()
        except Exception:
            if _state(folder) == before:
                raise
        else:
            if _state(folder) == before:
                return result
    raise CheckpointError(f"{path} was saved again during each of {_READS} attempts to read it; read it later")


def _state(folder: Path) -> list[tuple[int, ...]]:
    """Differs between two saves of one folder."""
    found: list[tuple[int, ...]] = []
    for place in (folder, _previous(folder)):
        for file in (place, place / CONFIG_FILE, place / TENSOR_FILE):
            try:
                status = file.stat()
            except OSError:
                found.append(())
            else:
                found.append((status.st_dev, status.st_ino, status.st_mtime_ns))
    return found


def load_checkpoint(path: str | os.PathLike[str], kind: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a checkpoint folder: ``(config, tensors)``, tensors on the CPU in their stored dtypes.

    Args:
        path: folder written by :func:`save_checkpoint`.
        kind: the expected kind; None accepts any (see :func:`checkpoint_kind`).

    Raises:
        CheckpointError: ``path`` is missing, a file, not a checkpoint of this library, damaged, truncated, a
            pickle in disguise, of another kind, or of a newer format. No code from the checkpoint is run.
    """
    return _settled(lambda: _load_checkpoint(path, kind), path)


def _load_checkpoint(path: str | os.PathLike[str], kind: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder, header = _read_header(path)
    if kind is not None and header["kind"] != kind:
        raise CheckpointError(
            f"{path} is a checkpoint of kind {header['kind']!r}, expected {kind!r}; pass another folder"
        )
    tensor_file = folder / TENSOR_FILE
    if not tensor_file.is_file():
        raise CheckpointError(f"{tensor_file} is missing, so the checkpoint is incomplete; {_AGAIN}")
    if looks_pickled(tensor_file):
        raise CheckpointError(f"{tensor_file} is not a safetensors file but a pickle or zip archive: {_PICKLE_ADVICE}")
    expected, size = header["tensors"]["bytes"], tensor_file.stat().st_size
    if size != expected:
        state = "truncated" if size < expected else "of another checkpoint"
        raise CheckpointError(f"{tensor_file} is {state}: it has {size} bytes, expected {expected}; {_AGAIN}")
    if _sha256(tensor_file) != header["tensors"]["sha256"]:
        raise CheckpointError(
            f"{tensor_file} does not match the sha256 in {CONFIG_FILE}: it was damaged or comes from another "
            f"checkpoint; {_AGAIN}"
        )
    with refused(CheckpointError, f"{tensor_file} is not a readable safetensors file"):
        return header["config"], load_file(tensor_file)


def described(path: str | os.PathLike[str], name: str) -> AbstractContextManager[None]:
    """Around what builds a ``name`` from the config and tensors of :func:`load_checkpoint`: its errors become
    CheckpointError, because an intact file may hold any settings.
    """
    return refused(CheckpointError, f"{CONFIG_FILE} in {path} does not describe a {name} that this version can build")


def checkpoint_exists(path: str | os.PathLike[str]) -> bool:
    """Whether anything is at ``path``, or beside it after a save that was killed between its two renames."""
    folder = real_path(path)
    return folder.exists() or _previous(folder).is_dir()


def checkpoint_kind(path: str | os.PathLike[str]) -> str:
    """The kind of the checkpoint at ``path``, from its JSON alone; raises as :func:`load_checkpoint` does."""
    return str(_settled(lambda: _read_header(path), path)[1]["kind"])


def remove_checkpoint(path: str | os.PathLike[str]) -> None:
    """Remove a checkpoint's own files, what killed saves of it have left, and the folder if nothing else lies in it."""
    folder = Path(path)
    if not folder.parent.is_dir():
        return
    with target_lock(folder, wait=True):
        remove_partial_folders(folder)
        shutil.rmtree(_previous(folder), ignore_errors=True)
        for name in (TENSOR_FILE, CONFIG_FILE):
            (folder / name).unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


# ----------------------------------------------------------------------------------------- signatures


def signature_of(*parts: Any) -> str:
    """SHA-256 that identifies the data and models of saved work.

    Tensors and arrays count by dtype, shape and bytes, checked arrays by their digest; modules by class,
    ``to_config()`` where they have it, and state dict; anything else by its JSON (sorted keys), or its ``repr`` if
    it has none.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            to_config = getattr(part, "to_config", None)
            config = to_config() if callable(to_config) else None
            digest.update(signature_of(type(part).__qualname__, config, *_flattened(part.state_dict())).encode())
        elif isinstance(part, CheckedArray):
            digest.update(part.digest.encode())
        elif isinstance(part, Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).tobytes())
        else:
            digest.update(json.dumps(part, sort_keys=True, default=repr).encode())
        digest.update(b";")
    return digest.hexdigest()


def _flattened(state: Mapping[str, Any]) -> list[Any]:
    return [item for name, value in state.items() for item in (name, value)]


# --------------------------------------------------------------------------------------------- helpers


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def check_replaceable(target: Path) -> None:
    """Refuse a path where saving a checkpoint would delete something else.

    Raises:
        CheckpointError: ``target`` is a file, or a folder with anything but a checkpoint of this package.
    """
    _settled(lambda: _check_replaceable(target), target)


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; a checkpoint is a folder, so choose another path")
    entries = sorted(entry.name for entry in target.iterdir())
    if not entries:
        return
    try:
        ours = _read_config(target / CONFIG_FILE).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        ours = False
    others = [name for name in entries if name not in (CONFIG_FILE, TENSOR_FILE, *_KEPT)]
    if not ours or others:
        shown = others or entries
        raise CheckpointError(
            f"{target} is not empty and not only a checkpoint of {FORMAT} (it holds {first_names(shown)}); "
            "saving would delete that, so choose another path or empty the folder"
        )


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        came: Any = type(tensor).__name__
        if isinstance(tensor, Tensor):
            tensor = tensor.detach()
            # A subclass keeps its values elsewhere: spread over processes, packed, or nowhere.
            faults = {
                tensor.layout: tensor.layout != torch.strided,
                tensor.dtype: tensor.dtype not in _STORED,
                "one without values, on the meta device": tensor.is_meta,
                type(tensor).__name__: type(tensor) is not Tensor,
            }
            came = next((fault for fault, found in faults.items() if found), None)
        if came is not None:
            raise CheckpointError(f"tensors[{name!r}] must be a dense torch.Tensor, got {came}")
        # A conjugate or negative view has the memory of its origin.
        value = tensor.resolve_conj().resolve_neg().cpu().contiguous()
        pointer = value.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory.
        key = ".".join(part for part in name.split(".") if part != COMPILED)
        if key in stored:
            raise CheckpointError(f"tensors has two entries {key!r}, one of them as {name!r}; rename a submodule")
        stored[key] = value.clone() if pointer in seen else value
        seen.add(pointer)
    return stored


def _read_config(file: Path) -> Any:
    content = read_bytes(file, _CONFIG_BYTES, CheckpointError, "the settings of a model")
    return parse_json(content, CheckpointError, f"{file} is damaged, not JSON", f"; {_AGAIN}")


def _read_header(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    folder = real_path(path)
    if not folder.exists() and _previous(folder).is_dir():
        folder = _previous(folder)
    if not folder.exists():
        raise CheckpointError(f"{path} does not exist; {_EXPECTED}")
    if not folder.is_dir():
        if looks_pickled(folder) or folder.suffix in (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin"):
            raise CheckpointError(f"{path} is a file, not a checkpoint folder: {_PICKLE_ADVICE}")
        raise CheckpointError(f"{path} is a file; {_EXPECTED}")
    config_file = folder / CONFIG_FILE
    if not config_file.is_file():
        raise CheckpointError(f"{path} is not a checkpoint of {FORMAT}: it has no {CONFIG_FILE}")
    header = _read_config(config_file)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        # Names of models of other libraries in a file of this name.
        other = (
            next((header[name] for name in ("model_type", "_class_name", "architectures") if name in header), None)
            if isinstance(header, dict)
            else None
        )
        says = "does not say so" if other is None else f"is that of a model of another library, {other!r}"
        raise CheckpointError(f"{path} is not a checkpoint of {FORMAT}: its {CONFIG_FILE} {says}")
    version = header.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, written by {FORMAT} {header.get('library_version')}; this "
            f"library reads versions up to {FORMAT_VERSION}, so upgrade {FORMAT}"
        )
    tensors = header.get("tensors")
    complete = (
        version == FORMAT_VERSION
        and isinstance(header.get("kind"), str)
        and isinstance(header.get("config"), dict)
        and isinstance(tensors, dict)
        and isinstance(tensors.get("bytes"), int)
        and isinstance(tensors.get("sha256"), str)
    )
    if not complete:
        raise CheckpointError(f"{config_file} is damaged: entries are missing or of a wrong type; {_AGAIN}")
    return folder, header


def looks_pickled(file: Path) -> bool:
    """Recognize torch.save's zip archive and a plain pickle by their first bytes."""
    with open(file, "rb") as handle:
        start = handle.read(9)
    # A safetensors file starts with an 8-byte length, which may begin with 0x80 too, and then a JSON object.
    pickled = start[:1] == b"\x80" and start[1:2] <= b"\x05" and start[8:] != b"{"
    return pickled or start[:4] == b"PK\x03\x04"


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def first_names(names: list[str]) -> str:
    """The first of several names, for a message."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
