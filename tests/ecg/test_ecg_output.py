"""Generated records as files: what other readers find in them, and that they are whole or not there."""

from __future__ import annotations

import csv
import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tgdp_fast import __version__
from tgdp_fast.ecg.records import output as ecg_output
from tgdp_fast.ecg.records.cache import build_ecg_cache
from tgdp_fast.ecg.records.folder import open_ecg_folder
from tgdp_fast.ecg.records.leads import STORED_LEADS, TWELVE_LEADS, twelve_leads, twelve_leads_digital
from tgdp_fast.ecg.records.output import write_ecg_records
from tgdp_fast.ecg.records.synthetic import synthetic_ecg
from tgdp_fast.ecg.records.wfdb import write_record
from tgdp_fast.runtime.locks import InUseError, target_lock

MANIFEST = {"seed": 3, "model": "0123", "solver": "dpmpp_2m", "scale": 1.5}
LABELS = [["SR", "NORM"], ["AFIB"], []]


@pytest.fixture
def signals() -> np.ndarray:
    return synthetic_ecg(3, 151, seed=5)


def write(folder: Path, signals: np.ndarray, **changes: Any) -> Path:
    return write_ecg_records(folder, signals, **({"rate": 100, "labels": LABELS, "manifest": MANIFEST} | changes))


def test_wfdb_reads_the_records(tmp_path: Path, signals: np.ndarray) -> None:
    import wfdb

    assert write(tmp_path / "out", signals) == tmp_path / "out"
    for index in range(3):
        path = str(tmp_path / "out" / "records" / f"0000{index}")
        record = wfdb.rdrecord(path)
        assert record.sig_name == list(TWELVE_LEADS)
        assert (record.fs, record.sig_len, record.fmt, record.units) == (100, 151, ["16"] * 12, ["mV"] * 12)
        assert record.comments == [["Labels: NORM, SR"], ["Labels: AFIB"], ["Labels:"]][index]
        assert record.adc_gain == [1000.0] * 12
        lead = dict(zip(TWELVE_LEADS, record.p_signal.T, strict=True))
        for place, name in enumerate(STORED_LEADS):
            assert np.abs(lead[name] - signals[index, place]).max() <= 0.0005 + 1e-6
        assert np.abs(record.p_signal.T - twelve_leads(signals[index])).max() <= 0.00175 + 1e-6
        digital = wfdb.rdrecord(path, physical=False).d_signal.T
        one, two, three, right, left, foot = digital[:6].astype(int)
        assert np.array_equal(one + three, two)
        assert np.abs(2 * right + one + two).max() <= 1
        assert np.abs(2 * left - one + three).max() <= 1
        assert np.abs(2 * foot - two - three).max() <= 1
        assert record.checksum == [int(row.sum()) % 65536 for row in digital.astype(int)]


@pytest.mark.parametrize("rate", [100, 257.5])
def test_records_are_those_that_wfdb_writes(tmp_path: Path, signals: np.ndarray, rate: float) -> None:
    import wfdb

    digital = twelve_leads_digital(signals[0])
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    write_record(tmp_path / "ours", "r", digital, TWELVE_LEADS, rate, 1000, ["Labels: NORM", "Sex: Female"])
    wfdb.wrsamp(
        "r",
        fs=rate,
        units=["mV"] * 12,
        sig_name=list(TWELVE_LEADS),
        d_signal=digital.T.astype(np.int64),
        fmt=["16"] * 12,
        adc_gain=[1000.0] * 12,
        baseline=[0] * 12,
        comments=["Labels: NORM", "Sex: Female"],
        write_dir=str(tmp_path / "theirs"),
    )
    for name in ("r.hea", "r.dat"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_labels_manifest_and_arrays(tmp_path: Path, signals: np.ndarray) -> None:
    out = write(tmp_path / "out", signals, names=["b", "a-1", "c_2"])
    assert sorted(path.name for path in out.iterdir()) == ["labels.csv", "manifest.json", "records", "samples.npz"]
    with open(out / "labels.csv") as file:
        assert list(csv.reader(file)) == [["record", "labels"], ["b", "NORM;SR"], ["a-1", "AFIB"], ["c_2", ""]]
    manifest = json.loads((out / "manifest.json").read_text())
    assert MANIFEST.items() <= manifest.items()
    assert manifest["tgdp_fast"] == __version__
    assert (manifest["records"], manifest["rate"], manifest["seconds"]) == (3, 100.0, 1.51)
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} - {"manifest.json"}
    assert len(files) == 8
    assert manifest["sha256"] == {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in files}
    with np.load(out / "samples.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["signals"], signals)
        assert arrays["signals"].dtype == np.float32
        assert tuple(arrays["leads"]) == STORED_LEADS
        assert arrays["names"].tolist() == ["b", "a-1", "c_2"]
        assert arrays["labels"].sum(axis=1).tolist() == [2, 1, 0]
        assert arrays["rate"] == 100.0


def test_our_own_reader_finds_what_was_written(tmp_path: Path, signals: np.ndarray) -> None:
    folder = open_ecg_folder(write(tmp_path / "out", signals))
    assert folder.kind == "wfdb"
    assert [e.name for e in folder.entries] == ["records/00000", "records/00001", "records/00002"]
    assert [e.labels for e in folder.entries] == [("NORM", "SR"), ("AFIB",), ()]
    dataset = build_ecg_cache(folder, tmp_path / "cache", seconds=1.51, on_problem="raise")
    assert np.abs(dataset.signals - signals).max() <= 0.0005 + 1e-6
    unlabelled = open_ecg_folder(write(tmp_path / "other", signals, labels=None))
    assert [e.labels for e in unlabelled.entries] == [()] * 3


def test_twelve_leads_in_any_order(tmp_path: Path, signals: np.ndarray) -> None:
    write(tmp_path / "eight", signals)
    full = twelve_leads(signals)
    order = np.random.default_rng(0).permutation(12)
    names = [TWELVE_LEADS[place].upper() for place in order]
    write(tmp_path / "twelve", full)
    write(tmp_path / "mixed", full[:, order], leads=names)
    reversed_eight = write(tmp_path / "back", signals[:, ::-1], leads=STORED_LEADS[::-1])
    assert reversed_eight == tmp_path / "back"
    expected = (tmp_path / "eight" / "records" / "00001.dat").read_bytes()
    for name in ("twelve", "mixed", "back"):
        assert (tmp_path / name / "records" / "00001.dat").read_bytes() == expected
    full[1, 3, 7] += 0.01
    with pytest.raises(ValueError, match=r"record 1: lead aVR differs by 0.01 mV from what I and aVF make it"):
        write(tmp_path / "wrong", full)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"signals_mV": np.zeros((2, 8, 0), np.float32)}, r"shape \[N, 8, L\] or \[N, 12, L\], got \[2, 8, 0\]"),
        ({"signals_mV": np.zeros((2, 9, 5), np.float32)}, r"got \[2, 9, 5\]"),
        ({"signals_mV": np.zeros((2, 8, 5), np.int16)}, "must be floating point in mV, got int16"),
        ({"signals_mV": np.full((1, 8, 5), np.nan), "labels": None}, "record 0: stored must be finite"),
        ({"signals_mV": np.full((1, 8, 5), 33.0), "labels": None}, "record 0: stored must lie within 32.767 mV"),
        ({"rate": 0}, "rate must be"),
        ({"labels": [[], []]}, "labels must hold names for each of the 3 records, got 2"),
        ({"labels": [[], ["NOMR"], []]}, r"labels, record 1: unknown label 'NOMR' \(did you mean 'NORM'\?\)"),
        ({"labels": ["NORM", [], []]}, "labels, record 0: expected a list of names, got the text 'NORM'"),
        ({"leads": TWELVE_LEADS}, "leads must name the 8 leads I, V1, .*: there are 12 names"),
        ({"leads": ("I",) * 8}, "leads must name the 8 leads"),
        ({"names": ["a", "b"]}, "names must be 3 different names"),
        ({"names": ["a", "b", "a"]}, "names must be 3 different names"),
        ({"names": ["a", "b", "../c"]}, "'../c' is none"),
        ({"manifest": {"model": object()}}, "object"),
    ],
)
def test_mistakes_leave_nothing(tmp_path: Path, signals: np.ndarray, changes: dict[str, Any], message: str) -> None:
    arguments = {"signals_mV": signals, "rate": 100.0, "labels": LABELS, "manifest": MANIFEST} | changes
    with pytest.raises((ValueError, TypeError), match=message):
        write_ecg_records(tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_hold_something_are_refused(tmp_path: Path, signals: np.ndarray) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", signals)  # empty
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="folder must be new or empty"):
        write(tmp_path / "out", signals)
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="folder must be new or empty"):
        write(tmp_path / "file", signals)


def test_an_interrupt_leaves_nothing(tmp_path: Path, signals: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    real, names = ecg_output.write_record, []

    def write_record(folder: Path, name: str, *arguments: Any) -> None:
        names.append(name)
        if len(names) == 2:
            raise KeyboardInterrupt
        real(folder, name, *arguments)

    monkeypatch.setattr(ecg_output, "write_record", write_record)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", signals)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 1000, 4000])
def test_a_full_disk_names_the_folder_and_leaves_nothing(tmp_path: Path, signals: np.ndarray, size: int) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as found:
            write(tmp_path / "out", signals)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(found.value.filename).startswith(str(tmp_path / "out"))
    assert not any(tmp_path.iterdir())
    write(tmp_path / "out", signals)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_has_left_goes_and_a_folder_that_another_writes_is_refused(
    tmp_path: Path, signals: np.ndarray
) -> None:
    (tmp_path / ".out.0123abcd.partial" / "records").mkdir(parents=True)
    refused: list[InUseError] = []

    def other() -> None:
        try:
            write(tmp_path / "out", signals)
        except InUseError as error:
            refused.append(error)

    with target_lock(tmp_path / "out"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "out is being written by process" in str(refused[0])
    write(tmp_path / "out", signals)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_masked_signals_are_refused(tmp_path: Path) -> None:
    signals = np.zeros((2, 8, 50), dtype=np.float32)
    masked = np.ma.array(signals, mask=np.arange(800).reshape(2, 8, 50) == 400)
    with pytest.raises(
        ValueError, match="signals_mV must not hold masked values, but 1 of 800 are masked, .* in row 1"
    ):
        write(tmp_path / "out", masked)
    assert not (tmp_path / "out").exists()
