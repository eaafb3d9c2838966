"""Tables of records as CSV files, and what their cells say."""

from __future__ import annotations

import ast
import csv
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from functools import lru_cache
from pathlib import Path

from tgdp_fast.ecg.records.entries import ECGEntry, LabelError
from tgdp_fast.ecg.records.statements import ALIASES, STATEMENTS, check_statements
from tgdp_fast.ecg.records.wfdb import RecordError, Root

# As pandas and Excel write a cell that is missing or failed, in lower case.
_MISSING = frozenset(
    ("", "nan", "-nan", "none", "null", "nil", "<na>", "na", "n/a", "nat", "-", "--", "?", "1.#ind", "-1.#ind",
     "1.#qnan", "-1.#qnan", "#n/a", "#n/a n/a", "#na", "#null!", "#value!", "#ref!", "#name?", "#num!", "#div/0!")
)  # fmt: skip
_DECIMAL = re.compile(r"[-+]?\d{1,60}(?:\.\d{0,60})?(?:[eE][-+]?\d{1,2})?", re.ASCII)


def read_table(path: Path, columns: Sequence[str], root: Root) -> Iterator[dict[str, str]]:
    """Rows of a CSV file with a header: UTF-8, with commas. Bytes that are not UTF-8 become what file names have there.

    Raises:
        ValueError: it cannot be read, a column is missing, two have one name, or it has other separators.
    """
    try:
        root.status(path)
    except RecordError as error:
        raise ValueError(f"{path} cannot be used: {error}") from None
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.DictReader(file, restval="")
        try:
            rows.fieldnames = _column_names(path, [name.strip() for name in rows.fieldnames or ()], columns)
            for row in rows:
                yield {name: value for name, value in row.items() if isinstance(value, str)}
        except csv.Error as error:
            raise ValueError(f"{path} is damaged at line {rows.line_num}: {error}") from None


def _column_names(path: Path, names: list[str], wanted: Sequence[str]) -> list[str]:
    missing = [name for name in wanted if name not in names]
    for separator, words in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if missing and set(wanted) <= {part.strip(' "') for name in names for part in name.split(separator)}:
            raise ValueError(f"{path} must be separated by commas, but its columns are by {words}; save it anew")
    if missing:
        raise ValueError(
            f"{path} must have the columns {', '.join(wanted)}; {', '.join(missing)} is missing among "
            f"{', '.join(names[:30])}"
        )
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        raise ValueError(f"{path} must name each column once; {', '.join(twice[:5])} is there more than once")
    return names


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
    except (ValueError, SyntaxError, TypeError, OverflowError, MemoryError, RecursionError):
        raise RecordError(f"scp_codes must be like {{'NORM': 100.0}}, got {text[:60]!r}") from None
    if minimum_likelihood is not None:
        likelihoods = {name: value for name, value in likelihoods.items() if value == 0 or value >= minimum_likelihood}
    return statements(likelihoods)


def statements(names: Sequence[str] | Mapping[str, float]) -> tuple[str, ...]:
    """Known statements in order.

    Raises:
        LabelError: one is unknown.
    """
    try:
        return check_statements(names)
    except ValueError as error:
        raise LabelError(str(error), [name for name in names if ALIASES.get(name, name) not in STATEMENTS]) from None


def known(text: str | None) -> str | None:
    """The text in a cell; None where it is missing, in whatever way pandas or Excel write that."""
    text = (text or "").strip()
    return None if text.lower() in _MISSING else text


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
    """A patient's or record's identifier, None where it is missing.

    A number is one identifier, however it is written: "15709.0", "015709" and "1.5709e4" are "15709". No digit of a
    long one is lost.
    """
    found = known(text)
    if found is None or not _DECIMAL.fullmatch(found):
        return found
    value = Decimal(found)
    return str(int(value)) if value == int(value) else found


def fold(text: str | None) -> int | None:
    """A fold's number; None where the cell is empty.

    Raises:
        RecordError: no integer.
    """
    if known(text) is None:
        return None
    value = number(text)
    if value is None or value != int(value) or abs(value) >= 2**31:
        raise RecordError(f"strat_fold must be an integer, got {text!r}")
    return int(value)
