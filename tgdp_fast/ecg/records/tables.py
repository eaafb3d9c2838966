"""Tables of records as CSV files, and what their cells say."""

from __future__ import annotations

import ast
import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from tgdp_fast.ecg.records.entries import ECGEntry
from tgdp_fast.ecg.records.statements import check_statements
from tgdp_fast.ecg.records.wfdb import RecordError, Root


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


def described(
    entry: ECGEntry, row: Mapping[str, str], sexes: Mapping[str, str], minimum_likelihood: float | None
) -> ECGEntry:
    """The entry with what a row of PTB-XL's columns says: statements, patient, fold, age and sex.

    Args:
        entry: see there.
        row: with ``scp_codes``; the other columns may be missing.
        sexes: what the column ``sex`` stands for.
        minimum_likelihood: see :func:`scp_labels`.

    Raises:
        RecordError: a cell cannot be read.
    """
    return replace(
        entry,
        labels=scp_labels(row["scp_codes"], minimum_likelihood),
        patient=identifier(row.get("patient_id")),
        fold=fold(row.get("strat_fold")),
        age=years(row.get("age")),
        sex=sexes.get(identifier(row.get("sex")) or ""),
    )


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


def statements(names: Sequence[str] | Mapping[str, float]) -> tuple[str, ...]:
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
