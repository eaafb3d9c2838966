"""PTB-XL as PhysioNet distributes it (Wagner et al., Scientific Data 7:154, 2020), and tables of the same form."""

from __future__ import annotations

import os

from tgdp_fast.ecg.records.entries import ECGFolder, wfdb_entry
from tgdp_fast.ecg.records.leads import TWELVE_LEADS
from tgdp_fast.ecg.records.registry import Selection, reader
from tgdp_fast.ecg.records.statements import STATEMENTS
from tgdp_fast.ecg.records.tables import described, identifier, known, read_table
from tgdp_fast.ecg.records.wfdb import RecordError, Root, check_relative

TABLE = "ptbxl_database.csv"
VOCABULARY = "scp_statements.csv"
_SEXES = {"0": "male", "1": "female"}


@reader("ptb-xl", lambda root: (root.path / TABLE).exists(), contents=f"{TABLE} (PTB-XL)", table=TABLE, rank=1)
def read_ptbxl(folder: ECGFolder, root: Root, selection: Selection) -> None:
    """Records of ``ptbxl_database.csv``: ``filename_lr`` (100 Hz) where it is there and has the rate, else
    ``filename_hr`` (500 Hz).

    Raises:
        ValueError: a table is damaged, or ``scp_statements.csv`` has other statements than the 71.
    """
    if (root.path / VOCABULARY).exists():
        found = {row.get("", "").strip() for row in read_table(root.path / VOCABULARY, ["description"], root)}
        if found != set(STATEMENTS):
            other = sorted(found ^ set(STATEMENTS))
            raise ValueError(
                f"{root.path / VOCABULARY} must name the 71 statements of PTB-XL; it differs in {', '.join(other[:5])}"
            )
    columns = ("filename_lr", "filename_hr")
    if selection.rate is None or selection.rate > 100:
        columns = columns[::-1]
    seen, others = set(), 0
    for row in read_table(root.path / TABLE, ["ecg_id", "scp_codes", *columns], root):
        number = identifier(row["ecg_id"])
        name = "without ecg_id" if number is None else number.zfill(5)
        with folder.record(name):
            if number is None:
                raise RecordError(f"{TABLE} has no ecg_id for it")
            if name in seen:
                raise RecordError(f"{TABLE} has its row twice")
            seen.add(name)
            named = [known(row[column]) for column in columns]
            files = [check_relative(f"{file}.hea") for file in named if file is not None]
            if not files:
                raise RecordError(f"{TABLE} names no file")
            chosen = next((file for file in files if os.path.lexists(os.path.join(root.path, file))), None)
            if chosen is None:
                raise RecordError(f"missing: {' and '.join(files)}")
            entry, _ = wfdb_entry(name, root.join(chosen), root, TWELVE_LEADS, selection.rate)
            folder.entries.append(described(entry, row, _SEXES, selection.minimum_likelihood))
            others += chosen != files[0]
    if others:
        wanted, taken = ("100", "500") if columns[0] == "filename_lr" else ("500", "100")
        folder.notes.append(f"{others} records have no {wanted} Hz file; their {taken} Hz file is taken")
