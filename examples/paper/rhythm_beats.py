"""Single heartbeats of two rhythms, cut at R peaks: normal sinus rhythm and atrial fibrillation."""

from __future__ import annotations

import csv
import math
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tgdp_fast.ecg.records.leads import STORED_LEADS
from tgdp_fast.ecg.records.signals import resample
from tgdp_fast.ecg.records.synthetic import synthetic_ecg
from tgdp_fast.runtime.checks import check_integer
from tgdp_fast.runtime.optional import optional

#: Labels of ``records.csv``: the common rhythm, and the one whose share shifts.
SINUS, FIBRILLATION = "SNR", "AF"
RECORDED_RATE, RATE = 500, 100  # Hz, of records and of beats
#: Samples of a beat at ``RATE``, those before R, and most beats of one record.
LENGTH, BEFORE, MOST_BEATS = 128, 48, 20
#: Seconds of a record that are looked at: ``MOST_BEATS`` beats at 40 a minute.
SECONDS = 30

_COLUMNS = ("record", "file", "labels")
_ARRAYS = ("data", "offset", "length", "scale", "record")


@dataclass(frozen=True, eq=False)
class Beats:
    """Beats with the record (= patient) and the rhythm of each.

    Attributes:
        signals: float32 [N, 128] at 100 Hz, R at sample 48; each with mean 0 and variance 1.
        records: index of each beat's record, int64 [N].
        fibrillation: bool [N].
    """

    signals: np.ndarray
    records: np.ndarray
    fibrillation: np.ndarray

    def __len__(self) -> int:
        return len(self.signals)

    def rows(self, chosen: np.ndarray) -> Beats:
        """Those at ``chosen``, indices or a mask."""
        return Beats(self.signals[chosen], self.records[chosen], self.fibrillation[chosen])


def load_rhythm_beats(folder: Path) -> Beats:
    """Beats of all records in ``folder`` whose one label is SNR or AF.

    ``records.csv`` has the columns record, file and labels. A file is an ``.npz`` of lead I at 500 Hz: record k is
    ``data[offset[k] : offset[k] + length[k]] * scale[k]`` (one ``scale`` for all will do), its name ``record[k]``.

    Raises:
        ValueError: no such folder, table or file, a table or file of another form, a record that is missing, or no
            record of a rhythm.
        ImportError: neurokit2 or scipy is missing.
    """
    return cut_beats(read_rhythm_records(folder))


def synthetic_rhythm_beats(num_records: int, seed: int = 0) -> Beats:
    """Beats of ``num_records`` synthetic records of each rhythm, lead I of 20 s; see :func:`synthetic_ecg`.

    Atrial fibrillation is stood for by records without P waves and with irregular beats.

    Raises:
        ImportError: neurokit2 or scipy is missing.
    """
    num_records = check_integer("num_records", num_records, 1)
    signals = [
        (row, fibrillation)
        for fibrillation in (False, True)
        for row in synthetic_ecg(
            num_records,
            20 * RECORDED_RATE,
            rate=RECORDED_RATE,
            seed=2 * check_integer("seed", seed, 0) + fibrillation,
            fibrillation=fibrillation,
        )[:, STORED_LEADS.index("I")]
    ]
    return cut_beats(signals)


def cut_beats(records: Sequence[tuple[np.ndarray, bool]]) -> Beats:
    """Up to 20 beats of each record, at the R peaks that neurokit2 finds after its own cleaning (0.5 Hz high-pass).

    Args:
        records: lead I [samples] at 500 Hz, of any scale, and whether it is of fibrillation.

    Raises:
        ValueError: no beats of one of the rhythms.
        ImportError: neurokit2 or scipy is missing.
    """
    parts, numbers, rhythms = [], [], []
    for number, (signal, fibrillation) in enumerate(records):
        found = _beats_of(signal)
        parts.append(found)
        numbers += [number] * len(found)
        rhythms += [fibrillation] * len(found)
    beats = Beats(np.concatenate(parts), np.array(numbers, np.int64), np.array(rhythms, bool))
    for fibrillation, name in ((False, SINUS), (True, FIBRILLATION)):
        if not (beats.fibrillation == fibrillation).any():
            raise ValueError(f"records must have beats of {name}, but none was found; are they lead I at 500 Hz?")
    return beats


def _beats_of(signal: np.ndarray) -> np.ndarray:
    """Beats [N, 128] of one record; none where no peaks are found."""
    neurokit = optional("neurokit2", "R peaks need")
    signal = np.asarray(signal[: SECONDS * RECORDED_RATE], dtype=np.float64)
    none = np.zeros((0, LENGTH), np.float32)
    if len(signal) < 2 * RECORDED_RATE or np.ptp(signal) == 0:
        return none
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        cleaned = neurokit.ecg_clean(signal, sampling_rate=RECORDED_RATE)
        try:
            peaks = np.asarray(neurokit.ecg_peaks(cleaned, sampling_rate=RECORDED_RATE)[1]["ECG_R_Peaks"], np.float64)
        except (ValueError, IndexError, KeyError, ZeroDivisionError, TypeError):
            return none  # What neurokit2 raises where it finds no beats.
    factor = RECORDED_RATE // RATE
    x = resample(np.ascontiguousarray(cleaned), 1, factor)
    starts = np.round(peaks[np.isfinite(peaks)] / factor).astype(int) - BEFORE
    starts = starts[(starts >= 0) & (starts + LENGTH <= len(x))][:MOST_BEATS]
    windows = np.array([x[start : start + LENGTH] for start in starts]).reshape(-1, LENGTH)
    windows = windows - windows.mean(axis=1, keepdims=True)
    spread = windows.std(axis=1, keepdims=True)
    return (windows / spread)[spread[:, 0] > 0].astype(np.float32)


def read_rhythm_records(folder: Path) -> list[tuple[np.ndarray, bool]]:
    """Signals [samples] of the records with the one label SNR or AF, in the order of the table, and whether it is AF.

    Raises:
        ValueError: as :func:`load_rhythm_beats`.
    """
    table = folder / "records.csv"
    if not table.is_file():
        raise ValueError(
            f"records must be a folder with records.csv and .npz files of lead I at 500 Hz, got {folder}, which has "
            "no records.csv"
        )
    with open(table, newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{table} must have the columns {', '.join(_COLUMNS)}; it lacks {', '.join(missing)}")
        wanted = [row for row in reader if row["labels"] in (SINUS, FIBRILLATION)]
    for name in (SINUS, FIBRILLATION):
        if not any(row["labels"] == name for row in wanted):
            raise ValueError(f"{table} must have records with the one label {name}, it has none")
    signals: dict[str, np.ndarray] = {}
    for name in sorted({row["file"] for row in wanted}):
        if Path(name).name != name:
            raise ValueError(f"{table} must name files beside it, got {name!r}")
        signals |= _read_file(folder / name)
    lost = [row["record"] for row in wanted if row["record"] not in signals]
    if lost:
        raise ValueError(f"{table} names {len(lost)} records that its files lack, the first is {lost[0]!r}")
    return [(signals[row["record"]], row["labels"] == FIBRILLATION) for row in wanted]


def _read_file(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            data, offset, length, scale, names = (file[name] for name in _ARRAYS)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} must be an .npz file with {', '.join(_ARRAYS)}: {error}") from None
    scale = np.broadcast_to(scale, offset.shape)
    return dict(_signals(path, data, offset, length, scale, names))


def _signals(path: Path, data: np.ndarray, *columns: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    for offset, length, scale, name in zip(*columns, strict=True):
        if offset < 0 or length < 1 or offset + length > len(data):
            raise ValueError(f"{path}: record {name} lies outside the {len(data)} samples of data")
        signal = data[offset : offset + length].astype(np.float64) * float(scale)
        if not math.isfinite(signal.sum()):
            raise ValueError(f"{path}: record {name} has values that are not finite")
        yield str(name), signal
