"""ICBEB2018 as the PTB-XL benchmark converts it to WFDB (Strodthoff et al., IEEE JBHI 25(5), 2021)."""

from __future__ import annotations

import os

from tgdp_fast.ecg.records.entries import ECGFolder, wfdb_entry
from tgdp_fast.ecg.records.leads import TWELVE_LEADS
from tgdp_fast.ecg.records.registry import Selection, reader
from tgdp_fast.ecg.records.tables import described, identifier, known, read_table
from tgdp_fast.ecg.records.wfdb import RecordError, Root

TABLE = "icbeb_database.csv"
# The other way round than in PTB-XL.
_SEXES = {"1": "male", "0": "female"}


@reader("icbeb2018-converted", lambda root: (root.path / TABLE).exists(), table=TABLE, rank=2)
def read_converted_icbeb(folder: ECGFolder, root: Root, selection: Selection) -> None:
    """Records of ``icbeb_database.csv``: ``records500/ID.hea`` where it is there, else ``records100/ID.hea``.

    The conversion made its 100 Hz files by spline interpolation without a filter against aliasing, so those at 500 Hz
    are preferred at every rate.
    """
    seen, unfiltered = set(), 0
    for row in read_table(root.path / TABLE, ["ecg_id", "scp_codes"], root):
        number = identifier(row["ecg_id"]) or ""
        name = known(row.get("filename")) or number
        with folder.record(name):
            if not number:
                raise RecordError(f"{TABLE} has no ecg_id for it")
            if name in seen:
                raise RecordError(f"{TABLE} has its row twice")
            seen.add(name)
            written = dict.fromkeys((number, row["ecg_id"].strip()))  # "0012" too
            paths = [root.join(f"{rate}/{each}.hea") for rate in ("records500", "records100") for each in written]
            there = [path for path in paths if os.path.lexists(path)]
            if not there:
                raise RecordError(f"missing: {' and '.join(root.relative(path) for path in paths)}")
            entry, _ = wfdb_entry(name, there[0], root, TWELVE_LEADS, selection.rate)
            folder.entries.append(described(entry, row, _SEXES, selection.minimum_likelihood))
            unfiltered += there[0].parent.name == "records100"
    if unfiltered:
        folder.notes.append(
            f"{unfiltered} records have no 500 Hz file; their 100 Hz file, which was made without a filter against "
            "aliasing, is taken"
        )
