"""Synthetic electrocardiograms, and records read from WFDB files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ecg_files import write_record

from tgdp_fast.ecg.records.leads import STORED_LEADS
from tgdp_fast.ecg.records.synthetic import synthetic_ecg
from tgdp_fast.ecg.records.wfdb import read_leads


def test_signals_are_reproducible_and_differ() -> None:
    x = synthetic_ecg(5, 130, seed=3)
    assert x.shape == (5, 8, 130)
    assert x.dtype == np.float32
    assert np.array_equal(synthetic_ecg(5, 130, seed=3), x)
    assert not np.allclose(synthetic_ecg(5, 130, seed=4), x, atol=0.1)
    assert not np.allclose(x[0], x[1], atol=0.1)
    # More records than are computed at once.
    many = synthetic_ecg(520, 7, seed=1)
    assert np.isfinite(many).all()
    assert len(np.unique(many[:, 0, 0])) == 520


def test_beats_come_at_heart_rates_and_look_like_beats() -> None:
    """Ten seconds hold 8 to 18 beats at 50 to 110 a minute; the largest deflection of I is R, of V1 it is downwards."""
    x = synthetic_ecg(60, 1000, seed=0)
    lead_i, v1 = x[:, STORED_LEADS.index("I")], x[:, STORED_LEADS.index("V1")]
    above = lead_i > 0.5 * lead_i.max(axis=1, keepdims=True)
    beats = (above[:, 1:] & ~above[:, :-1]).sum(axis=1)
    assert 10 <= np.median(beats) <= 16
    assert (beats >= 7).all()
    assert (beats <= 19).mean() > 0.8  # In the others T is high enough to be counted too.
    assert np.median(lead_i.max(1)) == pytest.approx(1.0, rel=0.3)
    assert np.median(v1.min(1)) < -2 * np.median(v1.max(1))
    # Twice the rate: the same seconds in twice the samples.
    assert synthetic_ecg(2, 2000, rate=200.0, seed=0).shape == (2, 8, 2000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num": 0}, "num must be an integer >= 1"),
        ({"num": 1, "length": 0}, "length must be an integer >= 1"),
        ({"num": 1, "rate": 0.0}, "rate must be"),
        ({"num": 1, "seed": -1}, "seed must be"),
    ],
)
def test_bad_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthetic_ecg(**arguments)  # type: ignore[arg-type]


def test_leads_by_name_in_the_headers_units(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(-3000, 3000, (11, 3)).astype(np.int16)
    header = write_record(tmp_path, "00001_lr", values, ("I", "AVF", "V1"))
    signals, rate = read_leads(header, ["V1", "aVF"])
    assert rate == 100.0
    assert signals.dtype == np.float32
    assert np.allclose(signals, values.T[[2, 1]] / 1000, rtol=1e-6)
    with pytest.raises(
        ValueError,
        match="must have the leads V2, I, V6: the leads V2, V6 are missing; there are I, AVF, V1",
    ):
        read_leads(header, ["V2", "I", "V6"])


def test_damaged_records_are_refused(tmp_path: Path) -> None:
    header = write_record(tmp_path, "r", np.zeros((5, 2), np.int16), ("a", "b"))
    with pytest.raises(ValueError, match=r"missing.hea must be the header of a WFDB record"):
        read_leads(tmp_path / "missing.hea", ["a"])
    (tmp_path / "r.dat").write_bytes(b"\0" * 11)
    with pytest.raises(ValueError, match=r"r.hea must be the header of a WFDB record whose files are whole"):
        read_leads(header, ["a"])
    (tmp_path / "r.dat").unlink()
    with pytest.raises(ValueError, match=r"r.hea must be the header of a WFDB record whose files are whole"):
        read_leads(header, ["a"])
    header.write_text("nothing")
    with pytest.raises(ValueError, match="must be the header"):
        read_leads(header, ["a"])
