"""Kinds of folders and forms of files: the modules in :mod:`tgdp_fast.ecg.records.readers` register themselves here."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np

from tgdp_fast.ecg.records.entries import ECGFolder
from tgdp_fast.ecg.records.wfdb import RecordError, Root

_READERS = "tgdp_fast.ecg.records.readers"


@dataclass(frozen=True)
class Selection:
    """What a reader is asked for; see :func:`tgdp_fast.ecg.records.folder.open_ecg_folder`."""

    rate: float | None
    minimum_likelihood: float | None
    leads: tuple[str, ...]


#: read(folder, root, selection) adds the records of ``root`` to ``folder.entries``, ``.problems`` and ``.notes``.
ReadFolder = Callable[[ECGFolder, Root, Selection], None]
#: read(path, root) gives a whole record: float32 [leads, samples] in mV, names of the leads, samples per second.
ReadSignals = Callable[[Path, Root], tuple[np.ndarray, list[str], float]]


@dataclass(frozen=True)
class Reader:
    """One kind of folder.

    Attributes:
        kind: its name, which is kept in caches.
        detects: whether a folder is of this kind.
        read: see :data:`ReadFolder`.
        contents: what such a folder holds, for the message about a folder that is of no kind; "" adds nothing.
        rank: kinds are tried in ascending order. Those that only look at the suffixes of files come after those that
            look for a table of their own.
    """

    kind: str
    detects: Callable[[Root], bool]
    read: ReadFolder
    contents: str
    rank: int


_readers: dict[str, Reader] = {}
_signal_readers: dict[str, ReadSignals] = {}


def reader(
    kind: str, detects: Callable[[Root], bool], *, contents: str = "", rank: int = 0
) -> Callable[[ReadFolder], ReadFolder]:
    """Register the decorated function as the reader of folders of this kind; see :class:`Reader`."""

    def register(read: ReadFolder) -> ReadFolder:
        _readers[kind] = Reader(kind, detects, read, contents, rank)
        return read

    return register


def signal_reader(form: str) -> Callable[[ReadSignals], ReadSignals]:
    """Register the decorated function for records whose :attr:`ECGEntry.form` is ``form``."""

    def register(read: ReadSignals) -> ReadSignals:
        _signal_readers[form] = read
        return read

    return register


def readers() -> list[Reader]:
    """All kinds, in the order in which they are tried."""
    _discover()
    return sorted(_readers.values(), key=lambda each: each.rank)


def read_signals_of(form: str, path: Path, root: Root) -> tuple[np.ndarray, list[str], float]:
    """A whole record of this form; see :data:`ReadSignals`.

    Raises:
        RecordError: it is broken, or nothing reads the form.
    """
    if form not in _signal_readers:
        _discover()
    if form not in _signal_readers:
        raise RecordError(f"no reader is registered for records of the form {form!r}")
    return _signal_readers[form](path, root)


def _discover() -> None:
    for module in pkgutil.iter_modules(import_module(_READERS).__path__, f"{_READERS}."):
        import_module(module.name)
