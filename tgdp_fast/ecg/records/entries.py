"""Records of a folder as far as headers and tables tell, before a signal is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unicodedata import category

from tgdp_fast.ecg.records.wfdb import FileStamp, RecordError, RecordHeader, Root, read_header

#: Form of files that most data sets have: a WFDB header with its files.
WFDB = "wfdb"
_LONGEST = 1000  # characters of a reason


class LabelError(RecordError):
    """A record whose labels are of another set than those that are known.

    Attributes:
        labels: those that are not known.
    """

    def __init__(self, message: str, labels: Sequence[str]) -> None:
        super().__init__(message)
        self.labels = tuple(map(printable, labels))


def printable(text: str) -> str:
    """The text with control characters and bytes that were not UTF-8 (surrogates of :func:`os.fsdecode`) as escapes,
    ``\\udcf6``: names of files hold them, and not every output can.
    """
    if text.isprintable():
        return text
    return "".join(c.encode("unicode_escape").decode() if category(c) in {"Cc", "Cs"} else c for c in text)


@dataclass(frozen=True)
class ECGEntry:
    """One record of a folder.

    Attributes:
        name: unique in its folder.
        path: the WFDB header, or the file that holds the signals.
        form: of its files: ``"wfdb"``, ``"matlab"`` (original files of ICBEB2018), or another that a reader registers.
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", printable(self.name))
        if self.patient is not None:
            object.__setattr__(self, "patient", printable(self.patient))

    @property
    def seconds(self) -> float | None:
        """Duration; None where only reading tells."""
        return None if self.length is None else self.length / self.rate

    def too_short(self, seconds: float) -> Problem | None:
        """The problem of a record that is known to hold less than ``seconds``, else None."""
        if self.length is None or self.length >= seconds * self.rate - 1e-6:
            return None
        return Problem(self.name, f"it has {self.seconds:g} s, less than {seconds:g} s", short=True)


@dataclass(frozen=True)
class Problem:
    """A record that is not used, and why.

    Attributes:
        short: it is sound, but shorter than what is kept of a record.
    """

    record: str
    reason: str
    short: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "record", printable(self.record))
        reason = printable(self.reason)
        # Messages about hostile files quote them.
        object.__setattr__(self, "reason", reason if len(reason) <= _LONGEST else reason[:_LONGEST] + "...")

    def __str__(self) -> str:
        return f"record {self.record}: {self.reason}"


@dataclass(frozen=True)
class ECGFolder:
    """Records of a folder.

    Attributes:
        path: the folder.
        kind: name of the reader that knows its form, such as ``"ptb-xl"``.
        entries: records that can be used as far as headers and tables tell.
        problems: records that cannot, and why.
        notes: what was chosen where there was a choice.
        other_labels: by the names of records that are not used for their labels: the labels that are not known.
    """

    path: Path
    kind: str
    entries: list[ECGEntry] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    other_labels: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @contextmanager
    def record(self, name: str) -> Iterator[None]:
        """A block that reads one record; a :class:`RecordError` in it, or what else a damaged file makes of it, becomes
        the record's problem.
        """
        try:
            yield
        except (ValueError, ArithmeticError) as error:
            problem = Problem(name, str(error))
            self.problems.append(problem)
            if isinstance(error, LabelError):
                self.other_labels[problem.record] = error.labels

    def summary(self, seconds: float = 10.0) -> dict[str, Any]:
        """Counts: records, rates, durations, labels, folds, patients, and those shorter than ``seconds``."""
        known = [entry.seconds for entry in self.entries if entry.seconds is not None]
        labels = Counter(label for entry in self.entries for label in entry.labels)
        return {
            "path": self.path,
            "kind": self.kind,
            "records": len(self.entries),
            "rates": dict(sorted(Counter(f"{entry.rate:g}" for entry in self.entries).items())),
            "seconds": {"least": min(known), "most": max(known)} if known else None,
            "unknown_length": len(self.entries) - len(known),
            "short": sum(entry.too_short(seconds) is not None for entry in self.entries),
            "labels": dict(sorted(labels.items(), key=lambda item: (-item[1], item[0]))),
            "unlabelled": sum(not entry.labels for entry in self.entries),
            "patients": len({entry.patient for entry in self.entries if entry.patient is not None}),
            "folds": dict(sorted(Counter(entry.fold for entry in self.entries if entry.fold is not None).items())),
            "notes": self.notes,
        }


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
        header.find(leads)
    except RecordError:
        raise
    except ValueError as error:
        raise RecordError(f"it has {len(header.signals)} leads: {error}") from None
    check_rate(header.rate, rate)
    return ECGEntry(name, path, WFDB, header.rate, header.length or header.stored, files=tuple(files)), header


def check_rate(found: float, wanted: float | None) -> None:
    """Refuse a record with fewer samples per second than are asked for.

    Raises:
        RecordError: it has fewer.
    """
    if wanted is not None and found < wanted:
        raise RecordError(f"it is at {found:g} Hz, fewer than the {wanted:g} Hz that are asked for")
