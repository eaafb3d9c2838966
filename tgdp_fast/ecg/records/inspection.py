"""Summary of a folder of electrocardiograms, with the records that would be dropped, as plain data."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from tgdp_fast.ecg.records.entries import ECGFolder, Problem
from tgdp_fast.ecg.records.registry import read_signals_of
from tgdp_fast.ecg.records.signals import TooShortError, check_crop, fit
from tgdp_fast.ecg.records.wfdb import RecordError, Root
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
        ``problems`` (``record``, ``reason``, ``short``) and ``read``.
    """
    problems, entries = list(folder.problems), list(folder.entries)
    root = Root(folder.path)
    usable = 0
    for index, entry in enumerate(tracked(folder.entries, "reading", "record", read and progress)):
        check_crop(entry.rate, seconds)
        if short := entry.too_short(seconds):
            problems.append(short)
            continue
        try:
            if read:
                signals, names, rate = read_signals_of(entry.form, entry.path, root)
                entries[index] = replace(entry, length=signals.shape[1])
                fit(signals, names, rate, rate=rate, seconds=seconds, leads=())
            usable += 1
        except RecordError as error:
            problems.append(Problem(entry.name, str(error), isinstance(error, TooShortError)))
    return {
        **replace(folder, entries=entries).summary(seconds),
        "path": str(folder.path),
        "usable": usable,
        "problems": [asdict(problem) for problem in problems],
        "read": read,
    }
