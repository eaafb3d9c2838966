"""What is known of a record before its signal is read, and what is wrong with others."""

from __future__ import annotations

import ast
import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from tgdp_fast.ecg.records.leads import find_leads
from tgdp_fast.ecg.records.statements import check_statements
from tgdp_fast.ecg.records.wfdb import FileStamp, RecordError, RecordHeader, Root, read_header

#: Forms of files: a WFDB header with its files, or the original ICBEB2018 ``.mat`` with the struct ``ECG``.
WFDB, MATLAB = "wfdb", "matlab"


@dataclass(frozen=True)
class ECGEntry:
    """One record of a folder.

    Attributes:
        name: unique in its folder.
        path: the WFDB header, or the ``.mat`` file.
        form: ``"wfdb"`` or ``"matlab"``.
        rate: samples per second.
        length: samples of each lead; None where only reading tells.
        labels: statements, in the vocabulary's order.
        patient: None where it is not known: then the record is its own patient.
        fold: of ``strat_fold``; None where there is none.
        age: years, 90 for 90 and more; None where not known.
        sex: "male", "female" or None.
        files: name, size and time of change of each file.
    """

    name: str
    path: Path
    form: str
    rate: float
    length: int | None
    labels: tuple[str, ...] = ()
    patient: str | None = None
    fold: int | None = None
    age: float | None = None
    sex: str | None = None
    files: tuple[FileStamp, ...] = ()

    @property
    def seconds(self) -> float | None:
        """Duration; None where only reading tells."""
        return None if self.length is None else self.length / self.rate


@dataclass(frozen=True)
class Problem:
    """A record that is not used, and why.

    Attributes:
        short: it is sound, but shorter than what is kept of a record.
    """

    record: str
    reason: str
    short: bool = False

    def __str__(self) -> str:
        return f"record {self.record}: {self.reason}"


@dataclass
class Listing:
    """Entries, problems and notes that a reader of a table collects."""

    entries: list[ECGEntry] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_table(path: Path, columns: Sequence[str], root: Root) -> Iterator[dict[str, str]]:
    """Rows of a CSV file with a header.

    Raises:
        ValueError: it cannot be read, or a column is missing.
    """
    try:
        root.status(path)
    except RecordError as error:
        raise ValueError(f"{path} cannot be used: {error}") from None
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = csv.DictReader(file, restval="")
        missing = [name for name in columns if name not in (rows.fieldnames or ())]
        if missing:
            raise ValueError(
                f"{path} must have the columns {', '.join(columns)}; {', '.join(missing)} is missing among "
                f"{', '.join((rows.fieldnames or ())[:30])}"
            )
        try:
            for row in rows:
                yield {name: value for name, value in row.items() if isinstance(value, str)}
        except csv.Error as error:
            raise ValueError(f"{path} is damaged at line {rows.line_num}: {error}") from None


def wfdb_entry(
    name: str, path: Path, root: Root, leads: Sequence[str], rate: float | None
) -> tuple[ECGEntry, RecordHeader]:
    """Entry of a record whose header is there, without labels; and that header.

    Raises:
        RecordError: see :func:`tgdp_fast.ecg.records.wfdb.read_header`; or a lead of ``leads`` is missing, or the
            record has fewer than ``rate`` samples per second.
    """
    header, files = read_header(path, root)
    try:
        places = find_leads(header.leads, leads)
    except ValueError as error:
        raise RecordError(f"it has {len(header.signals)} leads: {error}") from None
    for place in places:
        _ = header.signals[place].millivolts
    if rate is not None and header.rate < rate:
        raise RecordError(f"it is at {header.rate:g} Hz, fewer than the {rate:g} Hz that are asked for")
    return ECGEntry(name, path, WFDB, header.rate, header.length, files=tuple(files)), header


@lru_cache(maxsize=8192)  # most records share theirs with others
def scp_labels(text: str, minimum_likelihood: float | None) -> tuple[str, ...]:
    """Statements of a column ``scp_codes``: a dict literal from statement to likelihood in percent, 0 for unknown.

    Args:
        text: the literal.
        minimum_likelihood: leave out statements whose likelihood is known and lower; None keeps all.

    Raises:
        RecordError: no such literal, or an unknown statement.
    """
    try:
        codes = ast.literal_eval(text)
        if not isinstance(codes, dict):
            raise ValueError
        likelihoods = {str(name): float(value) for name, value in codes.items()}
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise RecordError(f"scp_codes must be like {{'NORM': 100.0}}, got {text[:60]!r}") from None
    if minimum_likelihood is not None:
        likelihoods = {name: value for name, value in likelihoods.items() if value == 0 or value >= minimum_likelihood}
    return statements(likelihoods)


def statements(names: Sequence[str] | dict[str, float]) -> tuple[str, ...]:
    """Known statements in order.

    Raises:
        RecordError: one is unknown.
    """
    try:
        return check_statements(names)
    except ValueError as error:
        raise RecordError(str(error)) from None


def number(text: str | None) -> float | None:
    """The number in a cell, or None."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def years(text: str | None) -> float | None:
    """An age; 90 for all from 90 on (PTB-XL writes 300 for them)."""
    value = number(text)
    return None if value is None or value < 0 else min(value, 90.0)


def identifier(text: str | None) -> str | None:
    """A patient's or record's identifier; integers that a table holds as "15709.0" lose the fraction."""
    value = number(text)
    return str(int(value)) if value is not None and value == int(value) else (text or "").strip() or None


def fold(text: str | None) -> int | None:
    """A fold's number; None where the cell is empty.

    Raises:
        RecordError: no integer.
    """
    if not (text or "").strip():
        return None
    value = number(text)
    if value is None or value != int(value):
        raise RecordError(f"strat_fold must be an integer, got {text!r}")
    return int(value)
