"""Records of PhysioNet's WFDB, read by the package wfdb: one record's leads by name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def read_leads(header: str | os.PathLike[str], leads: Sequence[str]) -> tuple[np.ndarray, float]:
    """Some leads of a record.

    Args:
        header: ``NAME.hea``; the signals are in the files that it names.
        leads: their names, in any case.

    Returns:
        float32 [len(leads), samples] in the header's units (PTB-XL: mV), and samples per second.

    Raises:
        ValueError: no such record, a damaged one, or a lead is missing.
        ImportError: wfdb is missing.
    """
    try:
        import wfdb
    except ImportError:
        raise ImportError("WFDB records need wfdb, which is not installed; run: pip install 'tgdp_fast[ecg]'") from None
    path = Path(header)
    try:
        record = wfdb.rdrecord(str(path.with_suffix("")))
    except (OSError, ValueError, IndexError, TypeError) as error:
        raise ValueError(f"{path} must be the header of a WFDB record whose files are whole: {error}") from None
    columns = {name.lower(): column for column, name in enumerate(record.sig_name)}
    missing = [name for name in leads if name.lower() not in columns]
    if missing:
        raise ValueError(f"{path} must have the leads {', '.join(missing)}, it has {', '.join(record.sig_name)}")
    signals = record.p_signal[:, [columns[name.lower()] for name in leads]]
    return np.ascontiguousarray(signals.T, dtype=np.float32), float(record.fs)
