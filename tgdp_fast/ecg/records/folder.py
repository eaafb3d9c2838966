"""A folder of electrocardiograms: which kind it is, and its records, without reading a signal."""

from __future__ import annotations

import os
from collections.abc import Sequence

from tgdp_fast.ecg.records.entries import ECGFolder
from tgdp_fast.ecg.records.leads import STORED_LEADS
from tgdp_fast.ecg.records.registry import Selection, readers
from tgdp_fast.ecg.records.wfdb import Root
from tgdp_fast.runtime.checks import check_number


def open_ecg_folder(
    path: str | os.PathLike[str],
    *,
    rate: float | None = 100.0,
    minimum_likelihood: float | None = None,
    leads: Sequence[str] = STORED_LEADS,
) -> ECGFolder:
    """Look through a folder; headers and tables are read, signals are not.

    Its files tell the kind of folder. The kinds are tried in this order: PTB-XL (``ptbxl_database.csv``); ICBEB2018
    converted to WFDB (``icbeb_database.csv``); ICBEB2018 (``REFERENCE.csv``, or ``.mat`` files); any WFDB records
    (``.hea``). Each kind is a module in :mod:`tgdp_fast.ecg.records.readers`.

    Args:
        path: the folder. Links to the outside and paths that leave it are refused, record by record.
        rate: samples per second that will be asked for: where a record exists at several rates, the file is chosen by
            it, and a record with fewer is a problem. None: the highest there is.
        minimum_likelihood: of statements, in percent; statements whose likelihood is lower are left out. None: all
            are kept. 0 means "unknown" in PTB-XL, and such statements are kept always.
        leads: names of leads that plain WFDB records must have. Those of PTB-XL and ICBEB2018 must have all twelve.

    Raises:
        ValueError: no such folder, one of no known kind, or a damaged table.
    """
    if rate is not None:
        rate = check_number("rate", rate, 0.0, exclusive=True)
    if minimum_likelihood is not None:
        minimum_likelihood = check_number("minimum_likelihood", minimum_likelihood, 0.0, 100.0)
    root = Root(path)
    if not root.path.is_dir():
        state = "does not exist"
        if root.path.exists():
            state = (
                "is a file; tgdp_fast.ecg.records.output.write_ecg_records(folder, array, rate=..., labels=..., "
                "manifest={}) makes such a folder of an array [N, 8, L] or [N, 12, L] in mV"
            )
        raise ValueError(f"path must be a folder of records, but {path} {state}")
    for reader in (kinds := readers()):
        if reader.detects(root):
            folder = ECGFolder(root.path, reader.kind)
            reader.read(folder, root, Selection(rate, minimum_likelihood, tuple(leads)))
            return folder
    *contents, last = [reader.contents for reader in kinds if reader.contents]
    raise ValueError(f"path must hold {', '.join(contents)}, or {last}; {path} has none of these")
