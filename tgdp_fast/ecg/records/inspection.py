"""Summary of a folder of electrocardiograms, with the records that would be dropped, as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from tgdp_fast.ecg.records.entries import ECGFolder, Problem, printable
from tgdp_fast.ecg.records.registry import read_signals_of
from tgdp_fast.ecg.records.signals import TooShortError, check_crop, fit
from tgdp_fast.ecg.records.statements import SNOMED_STATEMENTS, STATEMENTS, in_words
from tgdp_fast.ecg.records.wfdb import Root
from tgdp_fast.runtime.progress import tracked


def inspect_ecg_folder(
    folder: ECGFolder, seconds: float = 10.0, *, read: bool = False, progress: bool = False
) -> dict[str, Any]:
    """Counts of records, rates, durations, labels, folds and patients, and all problems.

    Args:
        folder: see :func:`tgdp_fast.ecg.records.folder.open_ecg_folder`.
        seconds: kept of each record; shorter ones are listed.
        read: look at every signal too: truncated files, checksums, NaN, flat leads, lengths that only reading tells.
        progress: show progress of reading.

    Returns:
        entries of :meth:`tgdp_fast.ecg.records.entries.ECGFolder.summary`, and ``usable``,
        ``problems`` (``record``, ``reason``, ``short``) and ``read``; and ``other_labels`` where records are not used
        for their labels: ``records``, ``counts`` of labels that are not known, and ``expected``.
    """
    problems, entries = list(folder.problems), list(folder.entries)
    root = Root(folder.path)
    usable = 0
    check_crop(max((entry.rate for entry in folder.entries), default=1.0), seconds)
    for index, entry in enumerate(tracked(folder.entries, "reading", "record", read and progress)):
        if short := entry.too_short(seconds):
            problems.append(short)
            continue
        try:
            check_crop(entry.rate, seconds)
            if read:
                bound = None if entry.length is None else seconds
                signals, names, rate = read_signals_of(entry.form, entry.path, root, bound)
                entries[index] = replace(entry, length=entry.length or signals.shape[1])
                fit(signals, names, rate, rate=rate, seconds=seconds, leads=())
            usable += 1
        except ValueError as error:
            problems.append(Problem(entry.name, str(error), isinstance(error, TooShortError)))
    found = {
        **replace(folder, entries=entries).summary(seconds),
        "path": printable(str(folder.path)),
        "usable": usable,
        "problems": [asdict(problem) for problem in problems],
        "read": read,
    }
    if folder.other_labels:
        found["other_labels"] = _other_labels(folder.other_labels)
    return found


def _other_labels(records: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    counts = Counter(label for labels in records.values() for label in labels)
    if all(label.isdecimal() for label in counts):
        expected = f"of SNOMED CT {', '.join(map(in_words, SNOMED_STATEMENTS))}"
    else:
        shown = ", ".join(map(in_words, ("NORM", "AFIB", "CRBBB")))
        expected = f"the {len(STATEMENTS)} statements of PTB-XL, such as {shown}"
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return {"records": sorted(records), "counts": dict(ordered), "expected": expected}
