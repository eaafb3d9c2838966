"""Files that are written completely or not at all: text, arrays and JSON."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor


def write_atomic(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write a file so that readers see the old content or the new, never a part; text is UTF-8, and names of files that
    are not become escapes.
    """
    with _atomic_file(path) as file:
        file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


def save_array(path: str | os.PathLike[str], array: np.ndarray) -> None:
    """Write one array as ``.npy``, atomically and without pickling.

    Raises:
        ValueError: ``path`` does not end in ``.npy``, or the array holds Python objects.
    """
    if Path(path).suffix != ".npy":
        raise ValueError(f"path must end in .npy, got {str(path)!r}")
    array = np.asarray(array)
    if array.dtype.hasobject:
        raise ValueError(f"array must hold numbers, got dtype {array.dtype}; objects would need pickling")
    with _atomic_file(path) as file:
        np.save(file, array, allow_pickle=False)


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
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(target.parent)


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
    if isinstance(value, Tensor):
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
