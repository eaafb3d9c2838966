"""Records in the format of PhysioNet's WFDB, as far as PTB-XL uses it: a header, and 16-bit samples in one file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, eq=False)
class Record:
    """One record.

    Attributes:
        signals: float32 [leads, samples], in the header's units (PTB-XL: mV).
        leads: their names, as the header has them.
        rate: samples per second.
    """

    signals: np.ndarray
    leads: tuple[str, ...]
    rate: float

    def select(self, leads: Sequence[str]) -> np.ndarray:
        """The signals [len(leads), samples] of these leads, by name in any case.

        Raises:
            ValueError: a lead is missing.
        """
        rows = {name.lower(): row for row, name in enumerate(self.leads)}
        missing = [name for name in leads if name.lower() not in rows]
        if missing:
            raise ValueError(f"the record must have the leads {', '.join(missing)}, it has {', '.join(self.leads)}")
        return self.signals[[rows[name.lower()] for name in leads]]


def read_record(header: str | os.PathLike[str]) -> Record:
    """Read ``NAME.hea`` and the file of samples beside it.

    Raises:
        ValueError: no such file, a header that is none, samples in another format than 16 or in several files, or
            fewer of them than the header says.
    """
    path = Path(header)
    try:
        lines = [line.split() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
        count, rate, samples = int(lines[0][1]), float(lines[0][2].split("/")[0]), int(lines[0][3])
        fields = lines[1 : count + 1]
        files, formats = {field[0] for field in fields}, {field[1] for field in fields}
        scales = [_gain_and_baseline(field[2], field[4]) for field in fields]
        leads = tuple(" ".join(field[8:]) for field in fields)
    except (OSError, ValueError, IndexError) as error:
        raise ValueError(f"{path} must be the header of a WFDB record: {error}") from None
    if formats != {"16"} or len(files) != 1:
        raise ValueError(
            f"{path} must have all signals in one file of format 16, got {len(files)} and "
            f"{', '.join(sorted(formats))}; convert it with the package wfdb"
        )
    data = path.with_name(files.pop())
    size = data.stat().st_size if data.is_file() else 0
    if size != 2 * count * samples:
        raise ValueError(
            f"{data} must hold {count} signals of {samples} samples, {2 * count * samples} bytes, got {size}"
        )
    values = np.fromfile(data, dtype="<i2").reshape(samples, count).T
    gain, baseline = (np.array(column, dtype=np.float32)[:, None] for column in zip(*scales, strict=True))
    return Record((values - baseline) / gain, leads, rate)


def _gain_and_baseline(text: str, adc_zero: str) -> tuple[float, float]:
    """``1000.0(0)/mV``: units of the samples per physical unit, and the sample that is zero (default: of the ADC)."""
    number = text.split("/")[0]
    gain, _, baseline = number.rstrip(")").partition("(")
    return float(gain), float(baseline or adc_zero)
