"""A folder of electrocardiograms: its records with labels, patients and folds, without reading a signal."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tgdp_fast.ecg.records import icbeb, ptbxl
from tgdp_fast.ecg.records.entries import ECGEntry, Listing, Problem, statements, wfdb_entry
from tgdp_fast.ecg.records.leads import STORED_LEADS, lead_name
from tgdp_fast.ecg.records.wfdb import RecordError, Root
from tgdp_fast.runtime.checks import check_number

__all__ = ["ECGEntry", "ECGFolder", "Problem", "open_ecg_folder"]

#: What a folder can be: PTB-XL, ICBEB2018 (original or Challenge form, or converted to WFDB), or any WFDB records.
KINDS = ("ptb-xl", "icbeb2018", "icbeb2018-converted", "wfdb")


@dataclass(frozen=True)
class ECGFolder:
    """Records of a folder.

    Attributes:
        path: the folder.
        kind: one of ``KINDS``.
        entries: records that can be used as far as headers and tables tell.
        problems: records that cannot, and why.
        notes: what was chosen where there was a choice.
    """

    path: Path
    kind: str
    entries: list[ECGEntry]
    problems: list[Problem]
    notes: list[str]

    def summary(self, seconds: float = 10.0) -> dict[str, Any]:
        """Counts: records, rates, durations, labels, folds, patients, and those shorter than ``seconds``."""
        known = [entry.seconds for entry in self.entries if entry.seconds is not None]
        short = [entry for entry in self.entries if is_short(entry, seconds)]
        labels = Counter(label for entry in self.entries for label in entry.labels)
        return {
            "path": self.path,
            "kind": self.kind,
            "records": len(self.entries),
            "rates": dict(sorted(Counter(f"{entry.rate:g}" for entry in self.entries).items())),
            "seconds": {"least": min(known), "most": max(known)} if known else None,
            "unknown_length": len(self.entries) - len(known),
            "short": len(short),
            "labels": dict(sorted(labels.items(), key=lambda item: (-item[1], item[0]))),
            "unlabelled": sum(not entry.labels for entry in self.entries),
            "patients": len({entry.patient for entry in self.entries if entry.patient is not None}),
            "folds": dict(sorted(Counter(entry.fold for entry in self.entries if entry.fold is not None).items())),
            "notes": self.notes,
        }


def open_ecg_folder(
    path: str | os.PathLike[str],
    *,
    rate: float | None = 100.0,
    minimum_likelihood: float | None = None,
    leads: Sequence[str] = STORED_LEADS,
) -> ECGFolder:
    """Look through a folder; headers and tables are read, signals are not.

    What it is, is told by its files: ``ptbxl_database.csv``; ``icbeb_database.csv``; ``REFERENCE.csv``, or headers of
    ``.mat`` files; or any ``.hea``. Records of the last kind have the labels of a comment ``# Labels: NORM, SR`` of
    their header, as :func:`tgdp_fast.ecg.records.output.write_ecg_records` writes it.

    Args:
        path: the folder. Links to the outside and paths that leave it are refused, record by record.
        rate: samples per second that will be asked for: where a record exists at several rates, the file is chosen by
            it, and a record with fewer is a problem. None: the highest there is.
        minimum_likelihood: of statements, in percent; statements whose likelihood is lower are left out. None: all
            are kept. 0 means "unknown" in PTB-XL, and such statements are kept always.
        leads: names of leads that plain WFDB records must have. Those of PTB-XL and ICBEB2018 must have all twelve.

    Raises:
        ValueError: no such folder, none of these in it, or a damaged table.
    """
    if rate is not None:
        rate = check_number("rate", rate, 0.0, exclusive=True)
    if minimum_likelihood is not None:
        minimum_likelihood = check_number("minimum_likelihood", minimum_likelihood, 0.0, 100.0)
    root = Root(path)
    if not root.path.is_dir():
        state = "is a file" if root.path.exists() else "does not exist"
        raise ValueError(f"path must be a folder of records, but {path} {state}")
    if (root.path / ptbxl.TABLE).exists():
        kind, listing = "ptb-xl", ptbxl.read_ptbxl(root, rate, minimum_likelihood)
    elif (root.path / icbeb.CONVERTED).exists():
        kind, listing = "icbeb2018-converted", icbeb.read_converted_icbeb(root, rate, minimum_likelihood)
    else:
        files = _record_files(root.path)
        if (root.path / icbeb.REFERENCE).exists() or any(file.suffix == ".mat" for file in files):
            kind, listing = "icbeb2018", icbeb.read_icbeb(root, files, rate)
        elif files:
            kind, listing = "wfdb", _plain_records(root, files, rate, leads)
        else:
            raise ValueError(
                f"path must hold {ptbxl.TABLE} (PTB-XL), {icbeb.REFERENCE} or {icbeb.CONVERTED} (ICBEB2018), or WFDB "
                f"records; {path} has none of these"
            )
    return ECGFolder(root.path, kind, listing.entries, listing.problems, listing.notes)


def is_short(entry: ECGEntry, seconds: float) -> bool:
    """Whether the record is known to hold less."""
    return entry.length is not None and entry.length < seconds * entry.rate - 1e-6


def _record_files(folder: Path) -> list[Path]:
    """Headers and MATLAB files at any depth; linked folders are not entered."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name) for name in sorted(names) if name.endswith((".hea", ".mat"))]
    return found


def _plain_records(root: Root, files: Sequence[Path], rate: float | None, leads: Sequence[str]) -> Listing:
    listing = Listing()
    for path in files:
        name = root.relative(path.with_suffix(""))
        try:
            entry, header = wfdb_entry(name, path, root, leads, rate)
            names = [part.strip() for part in (header.comment("Labels") or "").split(",") if part.strip()]
            listing.entries.append(replace(entry, labels=statements(names)))
        except RecordError as error:
            listing.problems.append(Problem(name, str(error)))
    return listing


def known_leads(leads: Sequence[str]) -> tuple[str, ...]:
    """Names of leads, in their usual spelling.

    Raises:
        ValueError: none given, one twice, or one that is not of the twelve.
    """
    names = [lead_name(lead) for lead in leads]
    unknown = [lead for lead, name in zip(leads, names, strict=True) if name is None]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(f"leads must be different ones of I, II, III, aVR, aVL, aVF, V1 to V6, got {list(leads)}")
    return tuple(name for name in names if name is not None)
