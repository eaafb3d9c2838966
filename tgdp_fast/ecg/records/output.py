"""Generated electrocardiograms as files that any reader of WFDB opens, with labels and a manifest."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tgdp_fast._version import __version__
from tgdp_fast.ecg.records.leads import STORED_LEADS, TWELVE_LEADS, find_leads, twelve_leads, twelve_leads_digital
from tgdp_fast.ecg.records.statements import check_statements, multi_hot
from tgdp_fast.ecg.records.wfdb import write_record
from tgdp_fast.runtime.checks import check_number
from tgdp_fast.runtime.files import atomic_folder, save_json, write_atomic

#: Of the records: int16 in microvolts, as in PTB-XL.
UNITS_PER_MILLIVOLT = 1000
MANIFEST, LABELS, ARRAYS, RECORDS = "manifest.json", "labels.csv", "samples.npz", "records"
_RECORD_NAME = re.compile(r"[A-Za-z0-9_-]+")
_TOLERANCE = 0.003  # mV: three leads that were rounded to 1 uV, each by itself, and some for arithmetic in float32
_BLOCK = 1 << 20


def check_new_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder that records may be written to, with links resolved.

    Raises:
        ValueError: something is there that is no empty folder.
    """
    target = Path(os.path.realpath(folder))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"folder must be new or empty, but {folder} exists and is not; choose another")
    return target


def write_ecg_records(
    folder: str | os.PathLike[str],
    signals_mV: np.ndarray,  # noqa: N803
    *,
    rate: float,
    labels: Sequence[Iterable[str]] | None = None,
    leads: Sequence[str] | None = None,
    manifest: Mapping[str, Any],
    names: Sequence[str] | None = None,
) -> Path:
    """Write 12-lead records, all files or none.

    The folder gets ``records/NAME.hea`` and ``.dat`` (WFDB format 16, 1000 units/mV), which ``wfdb.rdrecord`` and
    :func:`~tgdp_fast.ecg.records.folder.open_ecg_folder` read; ``labels.csv``; ``samples.npz`` with the signals as
    given; and ``manifest.json``: the entries of ``manifest``, the version of this package, and SHA-256 of every other
    file.

    I and aVF are rounded first and the other limb leads follow from these integers, so that I + III = II holds exactly
    in the files, and aVR = -(I + II)/2, aVL = (I - III)/2, aVF = (II + III)/2 to half a unit
    (:func:`~tgdp_fast.ecg.records.leads.twelve_leads_digital`).

    Args:
        folder: new, or an empty folder.
        signals_mV: [N, 8, L] or [N, 12, L] in mV, finite. Of twelve leads, the limb leads must fit each other.
        rate: samples per second.
        labels: statements of each record; None: no labels.
        leads: names of the leads; None: ``STORED_LEADS`` of eight, ``TWELVE_LEADS`` of twelve.
        manifest: how the records were made, JSON-able, such as ``{"seed": ..., "model": ..., "solver": ...}``.
        names: of the records, of letters, digits, "_" and "-"; None: 00000, 00001, ...

    Returns:
        the folder.

    Raises:
        ValueError: bad arguments, an unknown label, a sample that int16 cannot hold, limb leads that contradict each
            other, or a folder that is not empty.
        InUseError: another process writes this folder.
    """
    rate = check_number("rate", rate, 0.0, exclusive=True)
    signals = _check_shape(signals_mV)
    given = _given_leads(signals, leads)
    count = len(signals)
    record_names = _record_names(names, count)
    statements = _statements(labels, count)
    target = check_new_folder(folder)
    with atomic_folder(target) as partial:
        (partial / RECORDS).mkdir()
        places = find_leads(given, STORED_LEADS)
        for index, name in enumerate(record_names):
            signal = np.asarray(signals[index])
            try:
                if len(given) == len(TWELVE_LEADS):
                    _check_limb_leads(signal, given)
                digital = twelve_leads_digital(signal[places], UNITS_PER_MILLIVOLT)
            except ValueError as error:
                raise ValueError(f"signals_mV, record {index}: {error}") from None
            comments = [] if statements is None else [f"Labels: {', '.join(statements[index])}"]
            write_record(partial / RECORDS, name, digital, TWELVE_LEADS, rate, UNITS_PER_MILLIVOLT, comments)
        write_atomic(partial / LABELS, _labels_csv(record_names, statements))
        _write_arrays(partial / ARRAYS, signals, given, rate, record_names, statements)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        facts = {
            **manifest,
            "tgdp_fast": __version__,
            "records": count,
            "rate": rate,
            "seconds": signals.shape[2] / rate,
            "leads": TWELVE_LEADS,
            "units_per_mV": UNITS_PER_MILLIVOLT,
            "sha256": {path.relative_to(partial).as_posix(): _sha256(path) for path in files},
        }
        save_json(partial / MANIFEST, facts)
        # Replaces an empty folder; fails if something was put into it meanwhile.
        os.rename(partial, target)
    return Path(folder)


def _check_shape(signals: np.ndarray) -> np.ndarray:
    from tgdp_fast.runtime.arrays import as_array  # With torch, which this module otherwise does without.

    array = as_array("signals_mV", signals)
    if array.dtype.kind != "f":
        raise ValueError(f"signals_mV must be floating point in mV, got {array.dtype}")
    if array.ndim != 3 or array.shape[1] not in (8, 12) or 0 in array.shape:
        raise ValueError(f"signals_mV must have shape [N, 8, L] or [N, 12, L], got {list(array.shape)}")
    return array


def _given_leads(signals: np.ndarray, leads: Sequence[str] | None) -> tuple[str, ...]:
    default = STORED_LEADS if signals.shape[1] == len(STORED_LEADS) else TWELVE_LEADS
    if leads is None:
        return default
    try:
        find_leads(leads, default)
        if len(leads) != len(default):
            raise ValueError(f"there are {len(leads)} names")
    except ValueError as error:
        raise ValueError(f"leads must name the {len(default)} leads {', '.join(default)}: {error}") from None
    return tuple(leads)


def _record_names(names: Sequence[str] | None, count: int) -> list[str]:
    if names is None:
        return [f"{index:05d}" for index in range(count)]
    wrong = [name for name in names if not _RECORD_NAME.fullmatch(str(name))]
    if wrong or len(names) != count or len(set(names)) < count:
        detail = f"; {wrong[0]!r} is none" if wrong else f"; got {len(names)}, {len(set(names))} of them different"
        raise ValueError(f"names must be {count} different names of letters, digits, '_' and '-'{detail}")
    return [str(name) for name in names]


def _statements(labels: Sequence[Iterable[str]] | None, count: int) -> list[tuple[str, ...]] | None:
    if labels is None:
        return None
    if len(labels) != count:
        raise ValueError(f"labels must hold names for each of the {count} records, got {len(labels)}")
    found = []
    for index, record in enumerate(labels):
        try:
            if isinstance(record, str):
                raise ValueError(f"expected a list of names, got the text {record!r}")
            found.append(check_statements(record))
        except ValueError as error:
            raise ValueError(f"labels, record {index}: {error}") from None
    return found


def _check_limb_leads(signal: np.ndarray, given: Sequence[str]) -> None:
    """Refuse twelve leads if recomputing the limb leads changes one by more than rounding."""
    ordered = signal[find_leads(given, TWELVE_LEADS)]
    expected = twelve_leads(signal[find_leads(given, STORED_LEADS)])
    apart = np.abs(ordered - expected).max(axis=1)
    worst = int(apart.argmax())
    if apart[worst] > _TOLERANCE:  # NaN is found later
        raise ValueError(
            f"lead {TWELVE_LEADS[worst]} differs by {apart[worst]:.3g} mV from what I and aVF make it; give the eight "
            f"leads {', '.join(STORED_LEADS)}"
        )


def _labels_csv(names: Sequence[str], statements: Sequence[tuple[str, ...]] | None) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["record", "labels"])
    writer.writerows([name, ";".join(statements[i]) if statements else ""] for i, name in enumerate(names))
    return text.getvalue()


def _write_arrays(
    path: Path,
    signals: np.ndarray,
    leads: Sequence[str],
    rate: float,
    names: Sequence[str],
    statements: Sequence[tuple[str, ...]] | None,
) -> None:
    arrays = {
        "signals": signals.astype(np.float32, copy=False),
        "leads": np.array(leads),
        "rate": np.array(rate),
        "names": np.array(names),
    }
    if statements is not None:
        arrays["labels"] = multi_hot(statements)
    np.savez(path, **arrays)  # type: ignore[arg-type]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
