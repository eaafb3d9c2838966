"""ICBEB2018 = the training set of CPSC2018 (Liu et al., J. Med. Imaging Health Inform. 8, 2018), in three forms.

The original ``.mat`` files; those of the PhysioNet/CinC Challenges 2020 and 2021 (``.mat`` and ``.hea``), both with
``REFERENCE.csv``; and the conversion to WFDB of the PTB-XL benchmark (Strodthoff et al., IEEE JBHI 25(5), 2021), with
``icbeb_database.csv``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tgdp_fast.ecg.records.entries import (
    MATLAB,
    ECGEntry,
    Listing,
    Problem,
    fold,
    identifier,
    number,
    read_table,
    scp_labels,
    statements,
    wfdb_entry,
    years,
)
from tgdp_fast.ecg.records.leads import TWELVE_LEADS
from tgdp_fast.ecg.records.statements import ICBEB_STATEMENTS, SNOMED_STATEMENTS
from tgdp_fast.ecg.records.wfdb import RecordError, RecordHeader, Root

REFERENCE = "REFERENCE.csv"
CONVERTED = "icbeb_database.csv"
#: Of the original files, which do not state it.
RATE = 500.0
_SEXES = {"m": "male", "male": "male", "f": "female", "female": "female"}
# The other way round than in PTB-XL.
_CONVERTED_SEXES = {"1": "male", "0": "female"}


def read_icbeb(root: Root, files: Sequence[Path], rate: float | None) -> Listing:
    """Records of the original and of the Challenge's form, which may lie beside each other.

    Labels are those of ``REFERENCE.csv``. Where there is none, headers name them (``#Dx``, SNOMED codes).

    Args:
        root: the folder.
        files: its ``.mat`` and ``.hea`` files.
        rate: see :func:`tgdp_fast.ecg.records.folder.open_ecg_folder`.
    """
    listing = Listing()
    labels = _reference(root, listing)
    places: dict[str, dict[Path, set[str]]] = {}
    for path in files:
        places.setdefault(path.stem, {}).setdefault(path.parent, set()).add(path.suffix)
    problems = {problem.record for problem in listing.problems}
    for name in sorted(set(places) | set(labels or {})):
        if name in problems:
            continue
        try:
            folders = places.get(name, {})
            if not folders:
                raise RecordError(f"{REFERENCE} has it, but there is no {name}.mat")
            if len(folders) > 1:
                raise RecordError(f"it is there {len(folders)} times: {', '.join(sorted(map(str, folders)))}")
            if labels is not None and name not in labels:
                raise RecordError(f"{REFERENCE} has no label for it")
            ((folder, suffixes),) = folders.items()
            if ".hea" in suffixes:
                entry, header = wfdb_entry(name, folder / f"{name}.hea", root, TWELVE_LEADS, rate)
                found = _diagnoses(header) if labels is None else labels[name]
                sex = _SEXES.get((header.comment("Sex") or "").lower())
                listing.entries.append(replace(entry, labels=found, age=years(header.comment("Age")), sex=sex))
            else:
                path = folder / f"{name}.mat"
                status = root.status(path)
                if labels is None:
                    raise RecordError(f"there is no {REFERENCE} with its label")
                if rate is not None and rate > RATE:
                    raise RecordError(f"it is at {RATE:g} Hz, fewer than the {rate:g} Hz that are asked for")
                stamp = (root.relative(path), status.st_size, status.st_mtime_ns)
                listing.entries.append(ECGEntry(name, path, MATLAB, RATE, None, labels[name], files=(stamp,)))
        except RecordError as error:
            listing.problems.append(Problem(name, str(error)))
    return listing


def _reference(root: Root, listing: Listing) -> dict[str, tuple[str, ...]] | None:
    """Statements by record name; None where there is no table."""
    path = root.path / REFERENCE
    if not path.exists():
        return None
    labels: dict[str, tuple[str, ...]] = {}
    for row in read_table(path, ["Recording", "First_label"], root):
        name = row["Recording"].strip()
        try:
            if not name or "/" in name or "\\" in name or ".." in name:
                raise RecordError(f"the path {name!r} leaves the folder")
            if name in labels:
                raise RecordError(f"{REFERENCE} has its row twice")
            labels[name] = ()
            cells = [value.strip() for column, value in row.items() if column and column.endswith("_label")]
            classes = [number(cell) or -1.0 for cell in cells if cell]
            wrong = [cell for cell in cells if cell and (number(cell) or -1.0) not in ICBEB_STATEMENTS]
            if wrong or not classes:
                shown = ", ".join(map(repr, wrong)) or "''"
                raise RecordError(f"unknown label {shown} in {REFERENCE}; expected 1 to 9")
            labels[name] = statements([ICBEB_STATEMENTS[int(value)] for value in classes])
        except RecordError as error:
            listing.problems.append(Problem(name, str(error)))
    return labels


def _diagnoses(header: RecordHeader) -> tuple[str, ...]:
    codes = [code.strip() for code in (header.comment("Dx") or "").split(",") if code.strip()]
    if not codes:
        raise RecordError(f"no label: its header names no Dx, and there is no {REFERENCE}")
    wrong = [code for code in codes if code not in SNOMED_STATEMENTS]
    if wrong:
        raise RecordError(f"unknown label {wrong[0]!r} in its header (Dx); expected SNOMED codes of the nine classes")
    return statements([SNOMED_STATEMENTS[code] for code in codes])


def read_converted_icbeb(root: Root, rate: float | None, minimum_likelihood: float | None) -> Listing:
    """Records of ``icbeb_database.csv``: ``records500/ID.hea`` where it is there, else ``records100/ID.hea``.

    The conversion made its 100 Hz files by spline interpolation without a filter against aliasing, so those at 500 Hz
    are preferred at every rate.
    """
    listing, seen, unfiltered = Listing(), set(), 0
    for row in read_table(root.path / CONVERTED, ["ecg_id", "scp_codes"], root):
        number_ = identifier(row["ecg_id"]) or ""
        name = row.get("filename", "").strip() or number_
        try:
            if name in seen:
                raise RecordError(f"{CONVERTED} has its row twice")
            seen.add(name)
            paths = [root.join(f"{folder}/{number_}.hea") for folder in ("records500", "records100")]
            there = [path for path in paths if os.path.lexists(path)]
            if not there:
                raise RecordError(f"missing: {' and '.join(root.relative(path) for path in paths)}")
            entry, _ = wfdb_entry(name, there[0], root, TWELVE_LEADS, rate)
            entry = replace(
                entry,
                labels=scp_labels(row["scp_codes"], minimum_likelihood),
                patient=identifier(row.get("patient_id")),
                fold=fold(row.get("strat_fold")),
                age=years(row.get("age")),
                sex=_CONVERTED_SEXES.get(identifier(row.get("sex")) or ""),
            )
        except RecordError as error:
            listing.problems.append(Problem(name, str(error)))
            continue
        listing.entries.append(entry)
        unfiltered += there[0] == paths[1]
    if unfiltered:
        listing.notes.append(
            f"{unfiltered} records have no 500 Hz file; their 100 Hz file, which was made without a filter against "
            "aliasing, is taken"
        )
    return listing


def read_original(path: Path, root: Root) -> np.ndarray:
    """Signals of an original ``.mat`` file: float32 [12, samples] in mV, leads as in ``TWELVE_LEADS``.

    Raises:
        RecordError: damaged, or of another form.
        ImportError: SciPy is missing.
    """
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ImportError(
            "MATLAB files need SciPy, which is not installed; run: pip install 'tgdp_fast[ecg]'"
        ) from None
    root.status(path)
    try:
        # MATLAB 5 files hold arrays and structs of them: nothing in them is run.
        content = loadmat(path, variable_names=["ECG"])
        data = content["ECG"]["data"].item()
        signals = np.asarray(data)
    except Exception as error:  # whatever a damaged file makes of it
        reason = "it has no struct ECG with data" if isinstance(error, KeyError | ValueError | IndexError) else error
        raise RecordError(f"{path.name} cannot be read: {reason}") from None
    if signals.dtype.kind not in "fiu" or signals.ndim != 2 or len(signals) != len(TWELVE_LEADS):
        raise RecordError(f"{path.name} must hold 12 leads [12, samples], it holds {list(signals.shape)}")
    return np.ascontiguousarray(signals, dtype=np.float32)
