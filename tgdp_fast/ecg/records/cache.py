"""Signals of a folder of electrocardiograms as one memory-mapped array: read once, in parallel, and kept.

A cache is a folder with ``cache.json`` (records, settings and hashes; written last) and the signals as ``.npy``. Until
then finished chunks lie in ``building-...``, so that the next call continues a run that was killed at any moment.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tgdp_fast.ecg.records.entries import ECGEntry, ECGFolder, Problem
from tgdp_fast.ecg.records.leads import STORED_LEADS, known_leads
from tgdp_fast.ecg.records.signals import TooShortError, check_crop, read_entry
from tgdp_fast.ecg.records.splits import split_by_patient
from tgdp_fast.ecg.records.statements import STATEMENTS, multi_hot
from tgdp_fast.ecg.records.wfdb import RecordError, Root
from tgdp_fast.runtime.checks import check_choice, check_integer
from tgdp_fast.runtime.files import write_atomic, writing
from tgdp_fast.runtime.locks import folder_lock
from tgdp_fast.runtime.progress import progress_bar
from tgdp_fast.runtime.workers import start_worker

if TYPE_CHECKING:
    from tgdp_fast.runtime.arrays import Standardizer

_FORMAT = "tgdp_fast ECG cache"
_VERSION = 1
_STATE = "cache.json"
_CHUNK_BYTES = 8 << 20
_CHUNK_RECORDS = 256
_BLOCK = 1 << 22  # bytes hashed or copied at once
#: Fewer records are read by the process itself: starting workers takes longer.
_RECORDS_PER_WORKER = 512


class ECGCacheError(ValueError):
    """A cache that is missing, not finished, or damaged."""


class BrokenRecordError(ValueError):
    """A record that cannot be used, where this is fatal."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(f'{problem}; on_problem="skip" leaves such records out and lists them')
        self.problem = problem


@dataclass(frozen=True, eq=False)
class ECGDataset:
    """Signals with labels and other facts of each record.

    Attributes:
        signals: float32 [N, leads, L] in mV, memory-mapped read-only.
        labels: multi-hot [N, K], uint8; of :meth:`rows` float32.
        vocabulary: K statements.
        names: N names of records.
        patients: N identifiers; "record NAME" for records whose patient is not known.
        folds: int64 [N], -1 where not known.
        ages: float32 [N] in years, NaN where not known.
        sexes: "male", "female" or None.
        problems: records that were left out, and why.
        rate: samples per second.
        leads: names.
        kind: of the folder, see :class:`~tgdp_fast.ecg.records.entries.ECGFolder`.
        sha256: of the file of signals.
    """

    signals: np.ndarray
    labels: np.ndarray
    vocabulary: tuple[str, ...]
    names: tuple[str, ...]
    patients: tuple[str, ...]
    folds: np.ndarray
    ages: np.ndarray
    sexes: tuple[str | None, ...]
    problems: tuple[Problem, ...]
    rate: float
    leads: tuple[str, ...]
    kind: str
    sha256: str
    fingerprint: str = field(repr=False)

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def load(cls, cache_dir: str | os.PathLike[str], *, verify: bool = True) -> ECGDataset:
        """A finished cache.

        Args:
            cache_dir: as given to :func:`build_ecg_cache`.
            verify: compare the content of the signals with its hash, which reads them once.

        Raises:
            ECGCacheError: there is none, it is not finished, or it is damaged.
        """
        return _load(Path(cache_dir), verify)

    def rows(self, rows: np.ndarray) -> ECGDataset:
        """The records at ``rows``, in memory, with labels as networks take them."""
        return replace(
            self,
            signals=np.asarray(self.signals[rows], dtype=np.float32),
            labels=np.asarray(self.labels[rows], dtype=np.float32),
            names=tuple(self.names[row] for row in rows),
            patients=tuple(self.patients[row] for row in rows),
            folds=self.folds[rows],
            ages=self.ages[rows],
            sexes=tuple(self.sexes[row] for row in rows),
        )

    @property
    def statements(self) -> list[str]:
        """Statements that occur, in the order of the vocabulary."""
        return [self.vocabulary[column] for column in np.flatnonzero(self.labels.any(axis=0))]

    def split_by_patient(self, fractions: Sequence[float], seed: int = 0) -> tuple[np.ndarray, ...]:
        """Rows of each side; records of a patient are on one side, and labels are spread by ``fractions``.

        See :func:`tgdp_fast.ecg.records.splits.split_by_patient`.
        """
        return split_by_patient(self.patients, self.labels, fractions, seed)

    def standardizer(self, rows: np.ndarray | None = None) -> Standardizer:
        """Mean and standard deviation of each lead over ``rows``: those of the training part. None: all rows."""
        from tgdp_fast.runtime.arrays import Standardizer

        return Standardizer.fit(self.signals, rows=rows)


def build_ecg_cache(
    folder: ECGFolder,
    cache_dir: str | os.PathLike[str],
    *,
    rate: float = 100.0,
    seconds: float = 10.0,
    leads: Sequence[str] = STORED_LEADS,
    workers: int | None = None,
    on_problem: str = "skip",
    progress: bool = False,
) -> ECGDataset:
    """Read all records of ``folder`` into ``cache_dir``, or load them from there.

    The cache is reused if names, sizes, modification times, labels and settings are the same and its content matches
    its hash; otherwise it is rebuilt. An interrupted call resumes. Memory does not grow with the number of records.
    Concurrent calls for one folder wait for each other.

    Args:
        folder: see :func:`tgdp_fast.ecg.records.folder.open_ecg_folder`.
        cache_dir: a folder for this cache alone.
        rate: samples per second to resample to.
        seconds: length that is kept of each record, from its start; shorter records are listed in ``problems``.
        leads: names, in the order of the array.
        workers: processes; None: one per core, fewer for few records. With more than one, a script must call this
            below ``if __name__ == "__main__":``, as always with :mod:`multiprocessing`.
        on_problem: "skip" leaves broken records out and lists them, "raise" stops at the first.
        progress: show progress.

    Raises:
        BrokenRecordError: with ``on_problem="raise"``, at the first broken record; short ones are not broken.
        ValueError: bad arguments, or no record can be used.
        ImportError: SciPy or wfdb is missing and a record needs it.
        OSError: no space, or a process was killed.
    """
    length = check_crop(rate, seconds)
    names = known_leads(leads)
    check_choice("on_problem", on_problem, ("skip", "raise"))
    if workers is not None:
        check_integer("workers", workers, 1)
    entries, problems = _usable(folder, seconds)
    if on_problem == "raise":
        _raise_first(problems)
    settings = {"rate": float(rate), "seconds": float(seconds), "leads": list(names)}
    fingerprint = _fingerprint(folder, entries, problems, settings)
    place = Path(cache_dir)
    dataset = _loaded(place, fingerprint)  # A finished cache may lie where nobody may write.
    if dataset is None:
        with folder_lock(place, wait=True):
            dataset = _loaded(place, fingerprint)  # Another process may have built it.
            if dataset is None:
                build = _Build(place, fingerprint, folder, entries, problems, settings, length, on_problem == "raise")
                build.run(_workers(workers, len(entries)), progress)
                dataset = _load(place, verify=False)
    if on_problem == "raise":
        _raise_first(dataset.problems)
    return dataset


def _usable(folder: ECGFolder, seconds: float) -> tuple[list[ECGEntry], list[Problem]]:
    entries, problems = [], list(folder.problems)
    for entry in folder.entries:
        short = entry.too_short(seconds)
        if short is None:
            entries.append(entry)
        else:
            problems.append(short)
    return entries, problems


def _raise_first(problems: Sequence[Problem]) -> None:
    for problem in problems:
        if not problem.short:
            raise BrokenRecordError(problem)


def _workers(workers: int | None, records: int) -> int:
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, records // _RECORDS_PER_WORKER))


def _fingerprint(
    folder: ECGFolder, entries: Sequence[ECGEntry], problems: Sequence[Problem], settings: dict[str, Any]
) -> str:
    digest = hashlib.sha256(json.dumps([_VERSION, folder.kind, settings, STATEMENTS, _CHUNK_RECORDS]).encode())
    for entry in entries:
        known = [entry.name, entry.form, entry.labels, entry.patient, entry.fold, entry.age, entry.sex, entry.files]
        digest.update(json.dumps(known).encode())
    digest.update(json.dumps([astuple(problem) for problem in problems]).encode())
    return digest.hexdigest()


def _loaded(place: Path, fingerprint: str) -> ECGDataset | None:
    """The cache if it is finished, undamaged and the one that is asked for."""
    try:
        dataset = _load(place, verify=True)
    except (ECGCacheError, FileNotFoundError):  # Another process may be replacing it.
        return None
    return dataset if dataset.fingerprint == fingerprint else None


# -------------------------------------------------------------------------------------------------------- building


class _Build:
    """A cache that is being built."""

    def __init__(
        self,
        place: Path,
        fingerprint: str,
        folder: ECGFolder,
        entries: list[ECGEntry],
        problems: list[Problem],
        settings: dict[str, Any],
        length: int,
        stop: bool,
    ) -> None:
        self.place, self.fingerprint, self.folder = place, fingerprint, folder
        self.entries, self.problems, self.settings, self.stop = entries, problems, settings, stop
        self.event = (len(settings["leads"]), length)
        self.row_bytes = 4 * self.event[0] * self.event[1]
        self.chunk = max(1, min(_CHUNK_RECORDS, _CHUNK_BYTES // self.row_bytes))
        self.building = place / f"building-{fingerprint[:16]}"
        self.partial = self.building / "signals.npy"
        self.final = place / f"signals-{fingerprint[:16]}.npy"

    def run(self, workers: int, progress: bool) -> None:
        if not self.entries:
            raise _nothing(self.problems)
        # Remains of earlier calls that were killed.
        for other in self.place.glob("building-*"):
            if other != self.building:
                shutil.rmtree(other)
        for other in self.place.glob(f".{_STATE}.*.partial"):
            other.unlink()
        offset = self._prepare()
        chunks = {start: self._finished(start, offset) for start in range(0, len(self.entries), self.chunk)}
        waiting = [start for start, found in chunks.items() if found is None]
        done = len(self.entries) - sum(len(self._records(start)) for start in waiting)
        with progress_bar(len(self.entries), "reading", "record", progress, initial=done) as bar:
            for start, result in self._read(waiting, offset, workers):
                # The samples are on disk already: now the chunk is finished.
                _save_json(self._file(start), result)
                chunks[start] = result
                bar.update(len(self._records(start)))
        self._finish([chunks[start] or {} for start in sorted(chunks)], offset)

    def _records(self, start: int) -> list[ECGEntry]:
        return self.entries[start : start + self.chunk]

    def _file(self, start: int) -> Path:
        return self.building / f"{start:08d}.json"

    def _prepare(self) -> int:
        """Create the file of signals in its full size; returns the offset of its rows."""
        header = _npy_header((len(self.entries), *self.event))
        size = len(header) + len(self.entries) * self.row_bytes
        self.building.mkdir(exist_ok=True)
        if not self.partial.exists() and self.final.exists() and self.final.stat().st_size == size:
            # Interrupted between the last chunk and cache.json.
            os.replace(self.final, self.partial)
        if not self.partial.exists() or self.partial.stat().st_size != size:
            for old in self.building.iterdir():
                old.unlink()
            free = shutil.disk_usage(self.place).free
            if free < size:
                raise OSError(f"cache_dir needs {size / 1e9:.2f} GB, but {self.place} has {free / 1e9:.2f} GB left")
            with writing(self.partial), open(self.partial, "wb") as file:
                file.write(header)
                file.truncate(size)
        return len(header)

    def _finished(self, start: int, offset: int) -> dict[str, Any] | None:
        """The result of a chunk, if it was finished and is intact."""
        try:
            found = json.loads(self._file(start).read_text(encoding="utf-8"))
            rows, digest = len(found["rows"]), found["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        with open(self.partial, "rb") as file:
            file.seek(offset + start * self.row_bytes)
            return found if _sha256(file, rows * self.row_bytes) == digest else None

    def _read(self, waiting: list[int], offset: int, workers: int) -> Iterator[tuple[int, dict[str, Any]]]:
        def task(start: int) -> tuple[Any, ...]:
            position = offset + start * self.row_bytes
            return self.folder.path, self._records(start), self.partial, position, self.settings, self.event, self.stop

        if workers == 1 or len(waiting) == 1:
            for start in waiting:
                yield start, _read_chunk(*task(start))
            return
        # A fork of a process with threads can hang.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(min(workers, max(1, len(waiting))), context, start_worker)
        try:
            futures = {pool.submit(_read_chunk, *task(start)): start for start in waiting}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise ChildProcessError(
                "a process that read records ended early: it was killed, or it could not start because the script "
                'does not call build_ecg_cache below if __name__ == "__main__":; finished chunks are kept, and '
                "workers=1 needs no other process"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _finish(self, chunks: list[dict[str, Any]], offset: int) -> None:
        kept: list[int] = []
        problems = list(self.problems)
        for start, chunk in zip(range(0, len(self.entries), self.chunk), chunks, strict=True):
            kept += [start + row for row in chunk["rows"]]
            problems += [Problem(*each) for each in chunk["problems"]]
        if not kept:
            raise _nothing(problems)
        if len(kept) == len(self.entries):
            os.replace(self.partial, self.final)
        else:
            self._compact(chunks, offset, len(kept))
        with open(self.final, "rb") as file:
            digest = _sha256(file)
        records = [self.entries[row] for row in kept]
        state = {
            "format": _FORMAT,
            "version": _VERSION,
            "fingerprint": self.fingerprint,
            "kind": self.folder.kind,
            **self.settings,
            "vocabulary": list(STATEMENTS),
            "records": [[e.name, list(e.labels), e.patient, e.fold, e.age, e.sex] for e in records],
            "problems": [list(astuple(problem)) for problem in problems],
            "signals": {"file": self.final.name, "shape": [len(records), *self.event], "sha256": digest},
        }
        _save_json(self.place / _STATE, {**state, "sha256": _json_sha256(state)})
        # Files of an earlier state; a process that has one mapped keeps it.
        for other in self.place.glob("signals-*.npy"):
            if other != self.final:
                other.unlink()
        shutil.rmtree(self.building)

    def _compact(self, chunks: list[dict[str, Any]], offset: int, count: int) -> None:
        """Copy the rows of good records into one file without gaps."""
        copy = self.building / "compact.npy"
        with writing(copy), open(self.partial, "rb") as source, open(copy, "wb") as target:
            target.write(_npy_header((count, *self.event)))
            for index, chunk in enumerate(chunks):
                source.seek(offset + index * self.chunk * self.row_bytes)
                left = len(chunk["rows"]) * self.row_bytes
                while left and (block := source.read(min(left, _BLOCK))):
                    target.write(block)
                    left -= len(block)
            target.flush()
            os.fsync(target.fileno())
        os.replace(copy, self.final)


def _nothing(problems: Sequence[Problem]) -> ValueError:
    shown = "; ".join(str(problem) for problem in problems[:3])
    return ValueError(f"no record can be used: {shown or 'there is none'}")


def _read_chunk(
    folder: Path,
    entries: list[ECGEntry],
    file: Path,
    position: int,
    settings: dict[str, Any],
    event: tuple[int, int],
    stop: bool,
) -> dict[str, Any]:
    """Read records into the file from ``position`` on, without gaps for those that have a problem."""
    root = Root(folder)
    block = np.empty((len(entries), *event), "<f4")
    rows: list[int] = []
    problems: list[tuple[str, str, bool]] = []
    for index, entry in enumerate(entries):
        try:
            block[len(rows)] = read_entry(entry, root, **settings)
            rows.append(index)
        except RecordError as error:
            problem = Problem(entry.name, str(error), isinstance(error, TooShortError))
            if stop:
                _raise_first([problem])
            problems.append((problem.record, problem.reason, problem.short))
    content = block[: len(rows)].tobytes()
    with writing(file), open(file, "r+b") as target:
        target.seek(position)
        target.write(content)
        target.flush()
        os.fsync(target.fileno())
    return {"rows": rows, "problems": problems, "sha256": hashlib.sha256(content).hexdigest()}


# -------------------------------------------------------------------------------------------------------- loading


def _load(place: Path, verify: bool) -> ECGDataset:
    advice = "build_ecg_cache makes it anew"
    file = place / _STATE
    if not file.is_file():
        begun = any(place.glob("building-*"))
        state = "is not finished: the same call of build_ecg_cache goes on" if begun else "holds none"
        raise ECGCacheError(f"cache_dir must be a finished cache of records, but {place} {state}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT or content["version"] != _VERSION:
            raise ECGCacheError(f"{file} is of another version; {advice}")
        digest = content.pop("sha256")
        if digest != _json_sha256(content):
            raise ECGCacheError(f"{file} was changed after it was written; {advice}")
        stored, shape = content["signals"], tuple(content["signals"]["shape"])
        path = place / os.path.basename(stored["file"])
        signals = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ECGCacheError):
            raise
        raise ECGCacheError(f"{place} is a damaged cache ({error}); {advice}") from None
    if signals.shape != shape or signals.dtype != np.float32:
        raise ECGCacheError(f"{path} holds {signals.dtype} {list(signals.shape)}, not {list(shape)}; {advice}")
    if verify:
        with open(path, "rb") as handle:
            if _sha256(handle) != stored["sha256"]:
                raise ECGCacheError(f"{path} has another content than was written; {advice}")
    names, labels, patients, folds, ages, sexes = zip(*content["records"], strict=True)
    return ECGDataset(
        signals=signals,
        labels=multi_hot(labels, content["vocabulary"]),
        vocabulary=tuple(content["vocabulary"]),
        names=names,
        patients=tuple(f"record {n}" if p is None else p for n, p in zip(names, patients, strict=True)),
        folds=np.array([-1 if fold is None else fold for fold in folds], np.int64),
        ages=np.array([np.nan if age is None else age for age in ages], np.float32),
        sexes=sexes,
        problems=tuple(Problem(*each) for each in content["problems"]),
        rate=content["rate"],
        leads=tuple(content["leads"]),
        kind=content["kind"],
        sha256=stored["sha256"],
        fingerprint=content["fingerprint"],
    )


def _npy_header(shape: tuple[int, ...]) -> bytes:
    import io

    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()


def _sha256(file: Any, size: int | None = None) -> str:
    digest = hashlib.sha256()
    left = size
    while block := file.read(_BLOCK if left is None else min(left, _BLOCK)):
        digest.update(block)
        left = None if left is None else left - len(block)
    return digest.hexdigest()


def _json_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _save_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value))
