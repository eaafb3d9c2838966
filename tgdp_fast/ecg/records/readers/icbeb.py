"""ICBEB2018 = the training set of CPSC2018 (Liu et al., J. Med. Imaging Health Inform. 8, 2018), with
``REFERENCE.csv``: the original ``.mat`` files, and those of the PhysioNet/CinC Challenges 2020 and 2021 (``.mat`` and
``.hea``).
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from tgdp_fast.ecg.records.entries import ECGEntry, ECGFolder, LabelError, check_rate, printable, wfdb_entry
from tgdp_fast.ecg.records.leads import TWELVE_LEADS
from tgdp_fast.ecg.records.readers import icbeb_converted
from tgdp_fast.ecg.records.registry import Recording, Selection, check_one_data_set, reader, signal_reader
from tgdp_fast.ecg.records.statements import ICBEB_STATEMENTS, SNOMED_NAMES, SNOMED_STATEMENTS
from tgdp_fast.ecg.records.tables import known, number, read_table, statements, years
from tgdp_fast.ecg.records.wfdb import RecordError, RecordHeader, Root
from tgdp_fast.runtime.optional import optional

REFERENCE = "REFERENCE.csv"
#: Form of the original files: MATLAB 5 with the struct ``ECG``.
MATLAB = "matlab"
#: Of the original files, which do not state it.
RATE = 500.0
_LARGEST = 1 << 28  # bytes that a file holds: three quarters of an hour
_COMPRESSED = 15  # type of such an element of MATLAB 5
_SEXES = {"m": "male", "male": "male", "f": "female", "female": "female"}


def _detects(root: Root) -> bool:
    if (root.path / REFERENCE).exists():
        return True
    # A header lies beside each file of the Challenge. Other MATLAB files make no records of WFDB records.
    headers = {path.with_suffix("") for path in root.record_files if path.suffix == ".hea"}
    return any(path.suffix == ".mat" and (not headers or path.with_suffix("") in headers) for path in root.record_files)


@reader("icbeb2018", _detects, contents=f"{REFERENCE} or {icbeb_converted.TABLE} (ICBEB2018)", table=REFERENCE, rank=3)
def read_icbeb(folder: ECGFolder, root: Root, selection: Selection) -> None:
    """Records of the original and of the Challenge's form, which may lie beside each other.

    Labels are those of ``REFERENCE.csv``. Where there is none, headers name them (``#Dx``, SNOMED codes).
    """
    labels = _reference(folder, root)
    if labels is None:
        check_one_data_set(root)
    places: dict[str, dict[Path, set[str]]] = {}
    for path in root.record_files:
        places.setdefault(path.stem, {}).setdefault(path.parent, set()).add(path.suffix)
    problems = {problem.record for problem in folder.problems}
    for name in sorted({*places, *(labels or {})}):
        if printable(name) in problems:
            continue
        with folder.record(name):
            found = places.get(name, {})
            if not found:
                raise RecordError(f"{REFERENCE} has it, but there is no {name}.mat")
            if len(found) > 1:
                raise RecordError(f"it is there {len(found)} times: {', '.join(sorted(map(str, found)))}")
            if labels is not None and name not in labels:
                raise RecordError(f"{REFERENCE} has no label for it")
            ((place, suffixes),) = found.items()
            stated = None if labels is None else labels[name]
            of_challenge = ".hea" in suffixes
            read = _challenge_entry if of_challenge else _original_entry
            path = place / f"{name}{'.hea' if of_challenge else '.mat'}"
            folder.entries.append(read(name, path, root, stated, selection.rate))
    if folder.other_labels and labels is None:
        folder.notes.append(f"taken for ICBEB2018, because of .mat files beside headers; there is no {REFERENCE}")


def _challenge_entry(name: str, path: Path, root: Root, labels: tuple[str, ...] | None, rate: float | None) -> ECGEntry:
    entry, header = wfdb_entry(name, path, root, TWELVE_LEADS, rate)
    found = _diagnoses(header) if labels is None else labels
    sex = _SEXES.get((header.comment("Sex") or "").lower())
    return replace(entry, labels=found, age=years(header.comment("Age")), sex=sex)


def _original_entry(name: str, path: Path, root: Root, labels: tuple[str, ...] | None, rate: float | None) -> ECGEntry:
    stamp = root.stamp(path)
    if labels is None:
        raise RecordError(f"there is no {REFERENCE} with its label")
    check_rate(RATE, rate)
    return ECGEntry(name, path, MATLAB, RATE, None, labels, files=(stamp,))


def _reference(folder: ECGFolder, root: Root) -> dict[str, tuple[str, ...]] | None:
    """Statements by record name; None where there is no table."""
    path = root.path / REFERENCE
    if not path.exists():
        return None
    labels: dict[str, tuple[str, ...]] = {}
    for row in read_table(path, ["Recording", "First_label"], root):
        name = row["Recording"].strip()
        with folder.record(name):
            if not name or "/" in name or "\\" in name or ".." in name:
                raise RecordError(f"the path {name!r} leaves the folder")
            if name in labels:
                raise RecordError(f"{REFERENCE} has its row twice")
            labels[name] = ()
            cells = [known(value) for column, value in row.items() if column and column.endswith("_label")]
            classes = {cell: number(cell) or -1.0 for cell in cells if cell is not None}
            wrong = [cell for cell, value in classes.items() if value not in ICBEB_STATEMENTS]
            if wrong or not classes:
                shown = ", ".join(map(repr, wrong)) or "''"
                text = f"unknown label {shown} in {REFERENCE}; expected 1 to 9"
                raise LabelError(text, wrong) if wrong else RecordError(text)
            labels[name] = statements([ICBEB_STATEMENTS[int(value)] for value in classes.values()])
    return labels


def _diagnoses(header: RecordHeader) -> tuple[str, ...]:
    codes = [code.strip() for code in (header.comment("Dx") or "").split(",") if code.strip()]
    if not codes:
        raise RecordError(f"no label: its header names no Dx, and there is no {REFERENCE}")
    wrong = [code for code in codes if code not in SNOMED_STATEMENTS]
    if wrong:
        words = f": {SNOMED_NAMES[wrong[0]]}" if wrong[0] in SNOMED_NAMES else ""
        raise LabelError(
            f"unknown label {wrong[0]!r} in its header (Dx{words}); expected SNOMED codes of the nine classes", wrong
        )
    return statements([SNOMED_STATEMENTS[code] for code in codes])


def _inflates_beyond(path: Path, most: int) -> bool:
    """Whether compressed elements of a MATLAB 5 file hold more than ``most`` bytes: a few of zlib make thousands."""
    total = 0
    try:
        with open(path, "rb") as file:
            order = "<" if file.read(128)[126:] == b"IM" else ">"
            while total <= most and len(tag := file.read(8)) == 8:
                kind, size = struct.unpack(f"{order}II", tag)
                end = file.tell() + size
                inflate = zlib.decompressobj()
                while kind == _COMPRESSED and total <= most and not inflate.eof:
                    block = inflate.unconsumed_tail or file.read(1 << 16)
                    if not block:
                        break
                    total += len(inflate.decompress(block, 1 << 20))
                file.seek(end)
    except (OSError, zlib.error):  # whoever reads it says so
        pass
    return total > most


@signal_reader(MATLAB)
def read_original(path: Path, root: Root) -> Recording:
    """Signals of an original ``.mat`` file: float32 [12, samples] in mV, names of the leads, 500 Hz.

    Raises:
        RecordError: damaged, or of another form.
        ImportError: SciPy is missing.
    """
    loadmat = optional("scipy.io", "MATLAB files need").loadmat
    size = root.status(path).st_size
    if size > _LARGEST or _inflates_beyond(path, _LARGEST):
        raise RecordError(f"{path.name} is no record: it holds more than {_LARGEST} bytes")
    try:
        # MATLAB 5 files hold arrays and structs of them: nothing in them is run.
        content = loadmat(path, variable_names=["ECG"])
        signals = np.asarray(content["ECG"]["data"].item())
    except Exception as error:  # whatever a damaged file makes of it
        reason = "it has no struct ECG with data" if isinstance(error, KeyError | ValueError | IndexError) else error
        raise RecordError(f"{path.name} cannot be read: {reason}") from None
    if signals.dtype.kind not in "fiu" or signals.ndim != 2 or len(signals) != len(TWELVE_LEADS):
        raise RecordError(f"{path.name} must hold 12 leads [12, samples], it holds {list(signals.shape)}")
    return np.ascontiguousarray(signals, dtype=np.float32), list(TWELVE_LEADS), RATE
