"""Files that are written completely or not at all: text, arrays and JSON."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError

from tgdp_fast.runtime.locks import lock_open_file, remove_unless_locked, target_lock


def write_atomic(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write a file so that readers see the old content or the new, never a part; text is UTF-8, and names of files that
    are not become escapes.
    """
    with _atomic_file(path) as file:
        file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


def save_array(path: str | os.PathLike[str], array: np.ndarray, seal: hashlib._Hash | None = None) -> None:
    """Write one array as ``.npy``, atomically and without pickling.

    Args:
        path: the file.
        array: of numbers.
        seal: takes up the content of the file; its digest follows the end of the array, where readers ignore it.

    Raises:
        ValueError: ``path`` does not end in ``.npy``, or the array holds Python objects.
    """
    if Path(path).suffix != ".npy":
        raise ValueError(f"path must end in .npy, got {str(path)!r}")
    array = np.asarray(array)
    if array.dtype.hasobject:
        raise ValueError(f"array must hold numbers, got dtype {array.dtype}; objects would need pickling")
    with _atomic_file(path) as file:

        def write(part: bytes) -> None:
            file.write(part)
            if seal is not None:
                seal.update(part)

        # To a file of Python NumPy writes by C, and then cannot say why it fails.
        np.save(SimpleNamespace(write=write), array, allow_pickle=False)
        if seal is not None:
            file.write(seal.digest())


def to_json(value: Any) -> str:
    """Strict JSON text of results: numpy and torch values become numbers and lists, NaN and infinity null.

    Raises:
        TypeError: a value has no JSON form.
    """
    return json.dumps(_plain(value), indent=2, allow_nan=False) + "\n"


def save_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write :func:`to_json` of ``value`` atomically."""
    write_atomic(path, to_json(value))


@contextmanager
def _atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    target = real_path(path)
    if target.is_dir():
        raise IsADirectoryError(f"path must name a file, but {path} is a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in partials(target):
        if left.is_file():
            remove_unless_locked(left)
    partial = new_partial(target)
    with writing(target, partial):
        try:
            with _open_locked(partial) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                if os.name != "nt":  # There only after it is closed.
                    os.replace(partial, target)
            if os.name == "nt":
                os.replace(partial, target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        flush(target.parent)


def _open_locked(partial: Path) -> BinaryIO:
    """A new file, locked for as long as it is open: unlocked, it is what a killed process has left."""
    while True:
        file = open(partial, "xb")  # noqa: SIM115
        with suppress(OSError):  # Without locks nobody removes it.
            if not lock_open_file(file.fileno(), partial):
                # Somebody has looked at it before it was locked, and removes it.
                file.close()
                partial.unlink(missing_ok=True)
                continue
        return file


@contextmanager
def atomic_folder(target: Path, *, wait: bool = False) -> Iterator[Path]:
    """A new folder beside ``target``, which the block fills and renames; removed if it does not.

    Args:
        target: folder to make or replace; parent folders are created. Nobody else does so inside the block.
        wait: for another process that does, instead of raising.

    Raises:
        InUseError: another process does so, and ``wait`` is False.
        OSError: the disk fails; the error names the file by its place in ``target``.
    """
    with target_lock(target, wait=wait):
        remove_partial_folders(target)
        partial = new_partial(target)
        with writing(target, partial):
            try:
                partial.mkdir()
                yield partial
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise


def remove_partial_folders(target: Path) -> None:
    """Remove what killed processes have left of :func:`atomic_folder`; only the owner of the target's lock may."""
    for left in partials(target):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)


def new_partial(target: Path) -> Path:
    """A new name beside ``target``, for what will be renamed to it, or is to be removed."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")


def partials(target: Path) -> list[Path]:
    """What is there under such names: written now, or left by a process that was killed."""
    name = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{8}\.partial")
    with os.scandir(target.parent) as entries:
        return [Path(entry.path) for entry in entries if name.fullmatch(entry.name)]


@contextmanager
def writing(target: Path, partial: Path | None = None) -> Iterator[None]:
    """Errors of the disk in the block are OSErrors that name ``target``, also where ``partial`` was written for it."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"([^:]+) \(os error (\d+)\)", str(error))
        if found is None:
            raise OSError(f"{target} could not be written: {error}") from None
        raise OSError(int(found[2]), found[1].strip(), str(target)) from None
    except OSError as error:
        known = error.filename is not None
        name = str(error.filename or target)
        if partial is not None:
            name = name.replace(str(partial), str(target))
        if error.errno is None or (known and name == error.filename):
            raise
        raise OSError(error.errno, error.strerror, name) from error


def real_path(path: str | os.PathLike[str]) -> Path:
    """The target of a link, which is what to replace: otherwise the link itself would be."""
    return Path(os.path.realpath(path))


def flush(path: Path) -> None:
    """Force a file or a folder's entries to disk; Windows cannot open folders, where this does nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain(value: Any) -> Any:
    if callable(getattr(value, "detach", None)):  # A tensor; processes that read records have no torch.
        value = value.detach().cpu().tolist()
    elif isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value
