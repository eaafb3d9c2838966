"""Any other folder of WFDB records: labels are a comment ``# Labels: NORM, SR`` of each header.

:func:`tgdp_fast.ecg.records.output.write_ecg_records` writes such folders.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tgdp_fast.ecg.records.entries import WFDB, ECGFolder, wfdb_entry
from tgdp_fast.ecg.records.registry import Recording, Selection, check_one_data_set, reader, signal_reader
from tgdp_fast.ecg.records.tables import statements
from tgdp_fast.ecg.records.wfdb import Root, read_signals


@reader("wfdb", lambda root: bool(_headers(root)), contents="WFDB records", rank=100)
def read_plain_records(folder: ECGFolder, root: Root, selection: Selection) -> None:
    """Every header at any depth; the records must have the leads of the selection."""
    check_one_data_set(root)
    diagnosed = 0
    for path in _headers(root):
        name = root.relative(path.with_suffix(""))
        with folder.record(name):
            entry, header = wfdb_entry(name, path, root, selection.leads, selection.rate)
            names = [part.strip() for part in (header.comment("Labels") or "").split(",") if part.strip()]
            folder.entries.append(replace(entry, labels=statements(names)))
            diagnosed += not names and header.comment("Dx") is not None
    if diagnosed:
        folder.notes.append(
            f"{diagnosed} records name diagnoses (Dx) and no statements; write a line such as '# Labels: NORM, SR' "
            "into their headers"
        )


def _headers(root: Root) -> list[Path]:
    return [path for path in root.record_files if path.suffix == ".hea"]


@signal_reader(WFDB, bounded=True)
def read_wfdb(path: Path, root: Root, seconds: float | None = None) -> Recording:
    """The voltages of a record; see :func:`tgdp_fast.ecg.records.wfdb.read_signals`."""
    signals, header = read_signals(path, root, seconds=seconds)
    return signals, header.leads, header.rate
