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
#: Float32 [leads, samples] in mV, names of the leads, samples per second.
Recording = tuple[np.ndarray, list[str], float]
#: read(path, root) gives a whole record. A reader that is registered with ``bounded`` takes a third argument, seconds
#: or None, and may leave out what lies behind them, except for ``wfdb.AHEAD`` samples.
ReadSignals = Callable[..., Recording]


@dataclass(frozen=True)
class Reader:
    """One kind of folder.

    Attributes:
        kind: its name, which is kept in caches.
        detects: whether a folder is of this kind.
        read: see :data:`ReadFolder`.
        contents: what such a folder holds, for the message about a folder that is of no kind; "" adds nothing.
        table: name of the file that lies in every folder of this kind; "" where there is none.
        rank: kinds are tried in ascending order. Those that only look at the suffixes of files come after those that
            look for a table of their own.
    """

    kind: str
    detects: Callable[[Root], bool]
    read: ReadFolder
    contents: str
    table: str
    rank: int


class SeveralDataSetsError(ValueError):
    """A folder that is no data set itself, but holds some."""


_readers: dict[str, Reader] = {}
_signal_readers: dict[str, tuple[ReadSignals, bool]] = {}


def reader(
    kind: str, detects: Callable[[Root], bool], *, contents: str = "", table: str = "", rank: int = 0
) -> Callable[[ReadFolder], ReadFolder]:
    """Register the decorated function as the reader of folders of this kind; see :class:`Reader`."""

    def register(read: ReadFolder) -> ReadFolder:
        _readers[kind] = Reader(kind, detects, read, contents, table, rank)
        return read

    return register


def signal_reader(form: str, *, bounded: bool = False) -> Callable[[ReadSignals], ReadSignals]:
    """Register the decorated function for records whose :attr:`ECGEntry.form` is ``form``; see :data:`ReadSignals`."""

    def register(read: ReadSignals) -> ReadSignals:
        _signal_readers[form] = read, bounded
        return read

    return register


def readers() -> list[Reader]:
    """All kinds, in the order in which they are tried."""
    _discover()
    return sorted(_readers.values(), key=lambda each: each.rank)


def check_one_data_set(root: Root) -> None:
    """Refuse a folder that holds folders of kinds with a table of their own.

    Raises:
        SeveralDataSetsError: it does; names them.
    """
    kinds = {each.table: each.kind for each in readers() if each.table}
    found = {
        root.relative(Path(place)): next(kind for table, kind in kinds.items() if table in names)
        for place, names in root.visible
        if place != str(root.path) and not kinds.keys().isdisjoint(names)
    }
    if not found:
        return
    for file in root.record_files:
        top = root.relative(file).split("/")[0]
        if not any(place.split("/")[0] == top for place in found):
            found[top if file.parent != root.path else "."] = "records without a table"
    shown = ", ".join(f"{place} ({kind})" for place, kind in list(found.items())[:10])
    count, advice = ("one", "name that") if len(found) == 1 else (f"{len(found)} data sets", "name one of them")
    raise SeveralDataSetsError(f"path must be a data set itself, but {root.path} holds {count}: {shown}; {advice}")


def read_signals_of(form: str, path: Path, root: Root, seconds: float | None = None) -> Recording:
    """A record of this form; see :data:`ReadSignals`.

    Args:
        form: see there.
        path: of the record.
        root: its folder.
        seconds: that are needed, from the start; None: all.

    Raises:
        RecordError: it is broken, or nothing reads the form.
    """
    if form not in _signal_readers:
        _discover()
    if form not in _signal_readers:
        raise RecordError(f"no reader is registered for records of the form {form!r}")
    read, bounded = _signal_readers[form]
    try:
        return read(path, root, seconds) if bounded else read(path, root)
    except RecordError:
        raise
    except (ValueError, ArithmeticError) as error:  # whatever a damaged file makes of it
        raise RecordError(f"{path.name} cannot be read: {error}") from None
    except MemoryError:
        raise RecordError(f"{path.name} does not fit in memory") from None


def _discover() -> None:
    for module in pkgutil.iter_modules(import_module(_READERS).__path__, f"{_READERS}."):
        import_module(module.name)
