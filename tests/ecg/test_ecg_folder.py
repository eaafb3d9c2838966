"""Folders of PTB-XL, ICBEB2018 and plain records: what is recognised, chosen and refused; tgdp-fast ecg inspect."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from ecg_files import (
    PTBXL_LEADS,
    ROOT,
    real_data,
    twelve,
    write_converted_icbeb,
    write_icbeb,
    write_ptbxl,
    write_record,
    write_table,
)

from tgdp_fast.cli.main import main
from tgdp_fast.ecg.records.cache import build_ecg_cache
from tgdp_fast.ecg.records.entries import ECGEntry
from tgdp_fast.ecg.records.folder import open_ecg_folder
from tgdp_fast.ecg.records.leads import STORED_LEADS, TWELVE_LEADS
from tgdp_fast.ecg.records.signals import read_entry
from tgdp_fast.ecg.records.statements import ICBEB_STATEMENTS, STATEMENTS
from tgdp_fast.ecg.records.wfdb import RecordError, Root


def signal(entry: ECGEntry, root: Path, rate: float = 100.0, seconds: float = 1.0) -> np.ndarray:
    return read_entry(entry, Root(root), rate=rate, seconds=seconds, leads=TWELVE_LEADS)


# PTB-XL -----------------------------------------------------------------------------------------------------


def test_ptbxl_by_its_table(tmp_path: Path) -> None:
    folder = open_ecg_folder(write_ptbxl(tmp_path))
    assert folder.kind == "ptb-xl"
    assert folder.problems == []
    assert folder.notes == []
    first, second, third, fourth = folder.entries
    assert first.name == "00001"
    assert first.labels == ("NORM", "SR")
    assert [e.patient for e in folder.entries] == ["1000", "1000", "1001", "1001"]
    assert [e.fold for e in folder.entries] == [1, 1, 2, 2]
    assert [e.age for e in folder.entries] == [90.0, 42.0, 43.0, 44.0]  # 300 stands for 90 and more
    assert [e.sex for e in folder.entries] == ["female", "male", "female", "male"]
    assert fourth.labels == ()
    assert (third.rate, third.length, third.seconds) == (100.0, 100, 1.0)
    assert np.array_equal(signal(third, tmp_path), (twelve(3, 100).T / 1000).astype(np.float32))


def test_likelihoods(tmp_path: Path) -> None:
    write_ptbxl(tmp_path)
    labels = {
        threshold: [e.labels for e in open_ecg_folder(tmp_path, minimum_likelihood=threshold).entries]
        for threshold in (None, 0, 35, 50.5)
    }
    assert labels[None] == labels[0] == [("NORM", "SR"), ("AFIB",), ("LVH", "PVC"), ()]
    assert labels[35] == [("NORM", "SR"), (), ("LVH", "PVC"), ()]
    assert labels[50.5] == [("NORM", "SR"), (), (), ()]  # SR has 0: unknown
    with pytest.raises(ValueError, match="minimum_likelihood must be"):
        open_ecg_folder(tmp_path, minimum_likelihood=101)


def test_ptbxl_chooses_files_by_rate(tmp_path: Path) -> None:
    root = write_ptbxl(tmp_path, rates=(100, 500))
    (root / "records100/00000/00002_lr.hea").unlink()
    (root / "records500/00000/00003_hr.hea").unlink()

    def rates(rate: float | None) -> tuple[dict[str, float], list[str], list[str]]:
        folder = open_ecg_folder(root, rate=rate)
        return {e.name: e.rate for e in folder.entries}, [str(p) for p in folder.problems], folder.notes

    low, high = "records have no 100 Hz file; their 500 Hz file", "records have no 500 Hz file; their 100 Hz file"
    assert rates(100) == ({"00001": 100, "00002": 500, "00003": 100, "00004": 100}, [], [f"1 {low} is taken"])
    assert rates(None) == ({"00001": 500, "00002": 500, "00003": 100, "00004": 500}, [], [f"1 {high} is taken"])
    found, problems, notes = rates(250)
    assert found == {"00001": 500, "00002": 500, "00004": 500}
    assert problems == ["record 00003: it is at 100 Hz, fewer than the 250 Hz that are asked for"]
    assert notes == []
    # A broken file is not replaced by the other rate in silence.
    (root / "records100/00000/00001_lr.dat").unlink()
    assert rates(100)[1] == ["record 00001: 00001_lr.dat is missing"]


def test_tables_of_ptbxl(tmp_path: Path) -> None:
    write_ptbxl(tmp_path, 2)
    table = tmp_path / "ptbxl_database.csv"
    text = table.read_text()
    table.write_text(text + text.splitlines()[1] + "\n")
    assert [str(p) for p in open_ecg_folder(tmp_path).problems] == [
        "record 00001: ptbxl_database.csv has its row twice"
    ]
    table.write_text("\ufeff" + text.replace("ecg_id", "id"))
    with pytest.raises(ValueError, match="must have the columns ecg_id.*; ecg_id is missing among id, patient_id"):
        open_ecg_folder(tmp_path)
    table.write_text("\ufeff" + text)  # a byte-order mark is no part of a name
    assert len(open_ecg_folder(tmp_path).entries) == 2
    rows = [{"": name, "description": "x"} for name in STATEMENTS]
    write_table(tmp_path / "scp_statements.csv", rows)
    assert len(open_ecg_folder(tmp_path).entries) == 2
    write_table(tmp_path / "scp_statements.csv", [*rows[1:], {"": "NEW", "description": "x"}])
    with pytest.raises(ValueError, match="must name the 71 statements of PTB-XL; it differs in 1AVB, NEW"):
        open_ecg_folder(tmp_path)


MISSING = (
    "", " ", "nan", "NaN", "-nan", "None", "NULL", "null", "<NA>", "NA", "N/A", "n/a", "NaT", "-", "--", "#N/A", "#NA",
    "#VALUE!", "#REF!", "1.#QNAN",
)  # fmt: skip


def rewrite(path: Path, column: str, cells: Sequence[object]) -> None:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    write_table(path, [{**row, column: cell} for row, cell in zip(rows, cells, strict=True)])


@pytest.mark.parametrize("column", ["patient_id", "strat_fold", "age", "sex", "filename_hr"])
def test_missing_cells_however_they_are_written(tmp_path: Path, column: str) -> None:
    table = write_ptbxl(tmp_path, len(MISSING)) / "ptbxl_database.csv"
    rewrite(table, column, MISSING)
    folder = open_ecg_folder(tmp_path)
    assert folder.problems == []
    field = {"patient_id": "patient", "strat_fold": "fold"}.get(column, column)
    if column != "filename_hr":
        assert [getattr(entry, field) for entry in folder.entries] == [None] * len(MISSING)
    # A record without a number or a file is named, once each.
    rewrite(table, "ecg_id", MISSING)
    assert {problem.reason for problem in open_ecg_folder(tmp_path).problems} == {
        "ptbxl_database.csv has no ecg_id for it"
    }


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (("15709", "15709.0", "015709", "1.5709e4", " 15709 ", "15709.", "+15709"), ["15709"] * 7),
        (("900719925474099301.0", "900719925474099302"), ["900719925474099301", "900719925474099302"]),
        (("1e3", "1000"), ["1000"] * 2),
        (("9" * 70, "9" * 69 + "8", "1e999999999"), ["9" * 70, "9" * 69 + "8", "1e999999999"]),
        (("12_3", "1_23", "P7", "7.5", "inf", "0x10"), ["12_3", "1_23", "P7", "7.5", "inf", "0x10"]),
    ],
)
def test_identifiers_keep_every_digit(tmp_path: Path, texts: tuple[str, ...], expected: list[str]) -> None:
    table = write_ptbxl(tmp_path, len(texts)) / "ptbxl_database.csv"
    rewrite(table, "patient_id", texts)
    assert [entry.patient for entry in open_ecg_folder(tmp_path).entries] == expected


def test_long_numbers_of_records(tmp_path: Path) -> None:
    numbers = ["123456789012345671", "123456789012345672"]
    rewrite(write_ptbxl(tmp_path / "a", 2) / "ptbxl_database.csv", "ecg_id", numbers)
    assert [entry.name for entry in open_ecg_folder(tmp_path / "a").entries] == numbers
    root = write_converted_icbeb(tmp_path / "b", 2)
    for number, new in enumerate(numbers, 1):
        for path in (root / "records500").glob(f"{number}.*"):
            path.rename(path.with_stem(new))
        header = root / "records500" / f"{new}.hea"
        header.write_text(header.read_text().replace(f"{number}.dat", f"{new}.dat"))
    rewrite(root / "icbeb_database.csv", "ecg_id", [f"{number}.0" for number in numbers])
    rewrite(root / "icbeb_database.csv", "filename", ["nan", ""])
    assert [entry.name for entry in open_ecg_folder(root).entries] == numbers
    write_icbeb(tmp_path / "c", [500])
    rows = "".join(f"{number},1\n" for number in numbers)
    (tmp_path / "c" / "REFERENCE.csv").write_text(f"Recording,First_label,Second_label\nA0001,1.0,nan\n{rows}")
    folder = open_ecg_folder(tmp_path / "c")
    assert [entry.labels for entry in folder.entries] == [("NORM",)]
    assert [problem.record for problem in folder.problems] == numbers


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_tables_with_other_separators_or_columns_twice(tmp_path: Path, separator: str) -> None:
    table = write_ptbxl(tmp_path, 2) / "ptbxl_database.csv"
    text = table.read_text()
    table.write_text(text.replace(",", separator))
    with pytest.raises(ValueError, match="must be separated by commas"):
        open_ecg_folder(tmp_path)
    table.write_text(text.replace("age", "patient_id", 1))
    with pytest.raises(ValueError, match="must name each column once; patient_id is there more than once"):
        open_ecg_folder(tmp_path)
    table.write_text("\ufeff" + text.replace("age", " age ", 1), newline="\r\n")
    assert [entry.age for entry in open_ecg_folder(tmp_path).entries] == [90.0, 42.0]
    table.write_bytes(b"x" * 200_000)
    with pytest.raises(ValueError, match="is damaged at line"):
        open_ecg_folder(tmp_path)


def test_the_real_ptbxl() -> None:
    path = real_data("ptbxl")
    folder = open_ecg_folder(path)
    with open(path / "ptbxl_database.csv") as file:
        rows = {f"{int(row['ecg_id']):05d}": row for row in csv.DictReader(file)}
    assert folder.problems == []
    assert {e.name for e in folder.entries} == set(rows)
    assert all(e.fold == int(rows[e.name]["strat_fold"]) for e in folder.entries)
    # Without a patient: record 139, which later versions dropped as a duplicate.
    known = {n: f"{float(row['patient_id']):.0f}" if row["patient_id"] else None for n, row in rows.items()}
    assert {e.name: e.patient for e in folder.entries} == known
    assert {e.rate for e in folder.entries} == {100.0, 500.0}
    both = {e.name: e for e in open_ecg_folder(path, rate=500).entries}
    # PTB-XL's own 100 Hz files come from the same recordings by another filter, 2 ms later, and lack some slow parts.
    correlations = []
    for low in [entry for entry in folder.entries if entry.rate == 100 and entry.name in both][:8]:
        a, b = signal(low, path, seconds=10.0), signal(both[low.name], path, seconds=10.0)
        assert a.shape == b.shape == (12, 1000)
        correlations += [np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)]
    assert len(correlations) == 96
    assert np.median(correlations) > 0.98


# ICBEB2018 --------------------------------------------------------------------------------------------------


def test_icbeb_in_both_forms(tmp_path: Path) -> None:
    folder = open_ecg_folder(write_icbeb(tmp_path))
    assert folder.kind == "icbeb2018"
    assert folder.problems == []
    assert [e.name for e in folder.entries] == ["A0001", "A0002", "A0003", "A0004"]
    assert [e.form for e in folder.entries] == ["wfdb", "matlab"] * 2
    assert [e.length for e in folder.entries] == [700, None, 1200, None]
    assert [e.labels for e in folder.entries] == [("NORM", "PVC"), ("AFIB",), ("1AVB",), ("CLBBB",)]
    assert [e.sex for e in folder.entries] == ["female", None, "female", None]
    for number, entry in enumerate(folder.entries[:3], 1):
        expected = twelve(number, 700 if number == 1 else 650 if number == 2 else 1200, 500).T / 1000
        assert np.allclose(signal(entry, tmp_path, 500.0), expected[:, :500], rtol=1e-6)


def test_classes_of_icbeb_are_statements(tmp_path: Path) -> None:
    write_icbeb(tmp_path, [500])
    rows = "Recording,First_label,Second_label,Third_label\n"
    for number, name in ICBEB_STATEMENTS.items():
        (tmp_path / "REFERENCE.csv").write_text(f"{rows}A0001,{number},,\n")
        assert open_ecg_folder(tmp_path).entries[0].labels == (name,)
    (tmp_path / "REFERENCE.csv").write_text(f"{rows}A0001,9,3,5\r\n")
    assert open_ecg_folder(tmp_path).entries[0].labels == ("1AVB", "CRBBB", "STE_")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("A0001,10,,", "record A0001: unknown label '10' in REFERENCE.csv; expected 1 to 9"),
        ("A0001,1,AF,", "record A0001: unknown label 'AF' in REFERENCE.csv; expected 1 to 9"),
        ("A0001,,,", "record A0001: unknown label '' in REFERENCE.csv; expected 1 to 9"),
        ("A0001,1.5,,", "record A0001: unknown label '1.5' in REFERENCE.csv; expected 1 to 9"),
        ("A0001,1,,\nA0001,2,,", "record A0001: REFERENCE.csv has its row twice"),
        ("A0001,1,,\n../A0001,2,,", "record ../A0001: the path '../A0001' leaves the folder"),
        ("A0001,1,,\nA0009,2,,", "record A0009: REFERENCE.csv has it, but there is no A0009.mat"),
        ("", "record A0001: REFERENCE.csv has no label for it"),
    ],
)
def test_labels_of_icbeb_that_are_none(tmp_path: Path, line: str, problem: str) -> None:
    write_icbeb(tmp_path, [500])
    (tmp_path / "REFERENCE.csv").write_text(f"Recording,First_label,Second_label,Third_label\n{line}\n")
    folder = open_ecg_folder(tmp_path)
    assert [str(p) for p in folder.problems] == [problem]
    assert len(folder.entries) == (0 if problem.startswith("record A0001:") else 1)


def test_icbeb_without_reference(tmp_path: Path) -> None:
    write_icbeb(tmp_path)
    (tmp_path / "REFERENCE.csv").unlink()
    folder = open_ecg_folder(tmp_path)
    assert [e.labels for e in folder.entries] == [("NORM",)] * 2  # of the headers
    assert [str(p) for p in folder.problems] == [
        f"record A000{number}: there is no REFERENCE.csv with its label" for number in (2, 4)
    ]
    header = tmp_path / "A0001.hea"
    for text, reason in (("", "no label"), ("164889003,1", "unknown label '1' in its header")):
        header.write_text("\n".join(header.read_text().split("#Dx")[0].splitlines()) + f"\n#Dx: {text}\n")
        assert reason in open_ecg_folder(tmp_path).problems[0].reason


def test_original_files_that_are_broken(tmp_path: Path) -> None:
    from scipy.io import savemat

    write_icbeb(tmp_path / "data", [500] * 10)
    (tmp_path / "data" / "REFERENCE.csv").write_text(
        "Recording,First_label\n" + "".join(f"A{n:04d},1\n" for n in range(1, 11))
    )
    data = twelve(0, 500, 500).T / 1000.0
    place = tmp_path / "data"
    content = (place / "A0002.mat").read_bytes()
    (place / "A0002.mat").write_bytes(content[: len(content) // 2])
    savemat(place / "A0004.mat", {"ECG": {"data": data[:11]}})
    savemat(place / "A0006.mat", {"val": data})
    nan = data.copy()
    nan[3, 400] = np.nan
    savemat(place / "A0008.mat", {"ECG": {"data": nan}})
    savemat(place / "A0010.mat", {"ECG": {"data": data[:, :499]}})
    (place / "sub").mkdir()
    (place / "A0003.mat").rename(place / "sub" / "A0003.mat")
    from tgdp_fast.ecg.records.inspection import inspect_ecg_folder

    found = inspect_ecg_folder(open_ecg_folder(place), 1.0, read=True)
    reasons = {p["record"]: p["reason"] for p in found["problems"]}
    assert sorted(reasons) == ["A0002", "A0003", "A0004", "A0006", "A0008", "A0010"]
    assert "A0002.mat cannot be read" in reasons["A0002"]
    assert "it is there 2 times" in reasons["A0003"]
    assert reasons["A0004"] == "A0004.mat must hold 12 leads [12, samples], it holds [11, 500]"
    assert reasons["A0006"] == "A0006.mat cannot be read: it has no struct ECG with data"
    assert reasons["A0008"] == "1 samples are NaN or infinite, in the leads aVR"
    assert reasons["A0010"] == "it has 0.998 s, less than 1 s"
    assert [p["record"] for p in found["problems"] if p["short"]] == ["A0010"]
    assert found["usable"] == 4


def test_compressed_files_that_grow_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    from tgdp_fast.ecg.records.readers import icbeb

    write_icbeb(tmp_path, [500, 500])
    for length, reason in ((100_000, "A0002.mat is no record: it holds more than 1000000 bytes"), (500, "")):
        monkeypatch.setattr(icbeb, "_LARGEST", 1_000_000)
        savemat(tmp_path / "A0002.mat", {"ECG": {"data": np.zeros((12, length))}}, do_compression=True)
        assert (tmp_path / "A0002.mat").stat().st_size < 20_000
        if reason:
            with pytest.raises(RecordError, match=reason):
                icbeb.read_original(tmp_path / "A0002.mat", Root(tmp_path))
        else:
            assert icbeb.read_original(tmp_path / "A0002.mat", Root(tmp_path))[0].shape == (12, 500)


def test_converted_icbeb(tmp_path: Path) -> None:
    root = write_converted_icbeb(tmp_path)
    folder = open_ecg_folder(root)
    assert folder.kind == "icbeb2018-converted"
    assert folder.problems == []
    first, second, third = folder.entries
    assert [e.name for e in folder.entries] == ["A0011", "A0012", "A0013"]
    assert first.labels == ("AFIB", "PVC")  # VPC
    assert (first.patient, first.fold, first.age, first.sex) == ("1", 2, 51.0, "male")
    # Its 100 Hz files have no filter against aliasing.
    assert {e.rate for e in folder.entries} == {500.0}
    assert np.array_equal(signal(first, root, 500.0), (twelve(1, 500, 500).T / 1000).astype(np.float32))
    (root / "records500" / "2.hea").unlink()
    folder = open_ecg_folder(root)
    assert [e.rate for e in folder.entries] == [500.0, 100.0, 500.0]
    assert "1 records have no 500 Hz file" in folder.notes[0]
    (root / "records100" / "2.hea").unlink()
    assert [str(p) for p in open_ecg_folder(root).problems] == [
        "record A0012: missing: records500/2.hea and records100/2.hea"
    ]
    # Numbers with zeros before them, in the table and of the files.
    for number in (1, 3):
        (root / "records500" / f"{number}.hea").rename(root / "records500" / f"000{number}.hea")
    rewrite(root / "icbeb_database.csv", "ecg_id", ["0001", "0002", "0003"])
    assert [e.name for e in open_ecg_folder(root).entries] == ["A0011", "A0013"]


def test_the_real_icbeb() -> None:
    path = real_data("icbeb2018")
    folder = open_ecg_folder(path)
    assert folder.problems == []
    assert {e.form for e in folder.entries} == {"wfdb", "matlab"}
    with open(path / "records.csv") as file:
        rows = {row["record"]: row for row in csv.DictReader(file)}
    names = {"SNR": "NORM", "AF": "AFIB", "I-AVB": "1AVB", "LBBB": "CLBBB", "RBBB": "CRBBB", "STD": "STD_"}
    for entry in folder.entries:
        expected = {names.get(label, label) for label in rows[entry.name]["labels"].split("|")}
        assert set(entry.labels) == expected
        found = signal(entry, path, seconds=9.0)
        assert found.shape == (12, 900)
        lead = dict(zip(TWELVE_LEADS, found, strict=True))
        # Rounded to 1 uV one by one, and filtered.
        assert np.abs(lead["I"] + lead["III"] - lead["II"]).max() < 0.005


# plain records ----------------------------------------------------------------------------------------------


def test_plain_records_with_labels_in_their_headers(tmp_path: Path) -> None:
    order = (*STORED_LEADS[::-1], "X")
    values = np.random.default_rng(0).integers(-999, 999, (120, 9)).astype(np.int16)
    write_record(tmp_path / "a", "one", values, order, comments=("Labels: SR, NORM",))
    write_record(tmp_path / "b", "one", values, order, comments=())
    write_record(tmp_path, "two", values, order, comments=("labels: NONE",))
    write_record(tmp_path, "few", values[:, 1:], order[1:])
    folder = open_ecg_folder(tmp_path)
    assert folder.kind == "wfdb"
    assert [(e.name, e.labels) for e in folder.entries] == [("a/one", ("NORM", "SR")), ("b/one", ())]
    assert [p.record for p in folder.problems] == ["few", "two"]
    assert "it has 8 leads: the leads aVF are missing" in folder.problems[0].reason
    assert "unknown label 'NONE'" in folder.problems[1].reason
    found = read_entry(folder.entries[0], Root(tmp_path), rate=100.0, seconds=1.0, leads=STORED_LEADS)
    assert np.array_equal(found, (values[:100, 7::-1].T / 1000).astype(np.float32))
    assert {e.name for e in open_ecg_folder(tmp_path, leads=["V1"]).entries} == {"a/one", "b/one", "few"}
    assert folder.notes == []
    write_record(tmp_path / "b", "one", values, order, comments=("Dx: 426177001",))
    assert open_ecg_folder(tmp_path).notes[0].startswith("1 records name diagnoses (Dx) and no statements")


APPLE = bytes.fromhex("00051607000200004d6163204f532058") + bytes(100)


@pytest.mark.parametrize("write", [write_ptbxl, write_icbeb, write_converted_icbeb, None])
def test_hidden_files_and_what_systems_leave_behind_are_no_records(tmp_path: Path, write: Callable | None) -> None:
    if write is None:
        write_record(tmp_path, "one", twelve(1, 120), PTBXL_LEADS, comments=("Labels: NORM",))
    else:
        write(tmp_path)
    before = open_ecg_folder(tmp_path)
    for place in (tmp_path, tmp_path / "__MACOSX", tmp_path / ".Trashes", tmp_path / "$RECYCLE.BIN"):
        place.mkdir(exist_ok=True)
        for name in ("._one.hea", "._A0001.mat", "._REFERENCE.csv", "._ptbxl_database.csv", ".DS_Store", "Thumbs.db"):
            (place / name).write_bytes(APPLE)
    for name in ("A0001.hea", "A0001.mat", "REFERENCE.csv", "ptbxl_database.csv"):
        (tmp_path / "__MACOSX" / name).write_bytes(APPLE)
        (tmp_path / ".Trashes" / name).write_bytes(APPLE)
    assert before.entries != []
    assert open_ecg_folder(tmp_path) == before


def test_other_matlab_files_are_no_records(tmp_path: Path) -> None:
    write_record(tmp_path, "one", twelve(1, 120), PTBXL_LEADS, comments=("Labels: NORM",))
    (tmp_path / "results.mat").write_bytes(b"MATLAB 5.0")
    folder = open_ecg_folder(tmp_path)
    assert (folder.kind, [entry.name for entry in folder.entries], folder.problems) == ("wfdb", ["one"], [])


@pytest.mark.parametrize("units", ["mmHg", "mm Hg", "l/min", "%"])
def test_other_channels_in_records_of_the_challenge(tmp_path: Path, units: str) -> None:
    write_icbeb(tmp_path, [500])
    header = tmp_path / "A0001.hea"
    lines = header.read_text().replace("A0001 12 500", "A0001 13 500").splitlines()
    lines.insert(1, f"A0001.mat 16+24 10/{units} 16 0 7 {7 * 500 & 0xFFFF} 0 ART")
    header.write_text("\n".join(lines))
    values = np.concatenate([np.full((500, 1), 7), twelve(1, 500, 500)], axis=1)
    (tmp_path / "A0001.mat").write_bytes(bytes(24) + values.astype("<i2").tobytes())
    folder = open_ecg_folder(tmp_path)
    assert folder.problems == []
    assert np.array_equal(signal(folder.entries[0], tmp_path, 500.0), (values[:, 1:].T / 1000).astype(np.float32))


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a folder of records, but .*none does not exist"):
        open_ecg_folder(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        open_ecg_folder(tmp_path / "file")
    with pytest.raises(ValueError, match="has none of these"):
        open_ecg_folder(tmp_path)
    with pytest.raises(ValueError, match="rate must be"):
        open_ecg_folder(tmp_path, rate=0)
    (tmp_path / "ptbxl_database.csv").symlink_to(write_ptbxl(tmp_path / "other") / "ptbxl_database.csv")
    assert len(open_ecg_folder(tmp_path).problems) == 4  # a table that stays inside may be a link
    (tmp_path / "ptbxl_database.csv").unlink()
    (tmp_path / "ptbxl_database.csv").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="leaves the folder by a link"):
        open_ecg_folder(tmp_path)


# the command ------------------------------------------------------------------------------------------------


def test_inspect_prints_what_a_user_wants_to_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_ptbxl(tmp_path, rates=(100, 500))
    (root / "records100/00000/00002_lr.hea").unlink()
    (root / "records100/00000/00003_lr.dat").unlink()
    assert main(["ecg", "inspect", str(root), "--seconds", "1"]) == 0
    text = capsys.readouterr().out
    for line in (
        "usable records    3 (headers and tables; --read looks at the signals)",
        "rates             2 at 100 Hz, 1 at 500 Hz",
        "seconds           1 to 1",
        "patients          2",
        "folds             1: 2, 2: 1",
        "labels            AFIB 1, NORM 1, SR 1",
        "without labels    1",
        "note: 1 records have no 100 Hz file; their 500 Hz file is taken",
        "dropped: too short 0, broken 1",
        "  record 00003: 00003_lr.dat is missing",
    ):
        assert line in text
    assert main(["ecg", "inspect", str(root), "--seconds", "1", "--strict"]) == 1
    assert main(["ecg", "inspect", str(root), "--seconds", "2", "--json"]) == 1  # nothing is usable
    text = capsys.readouterr().out
    found = json.loads(text[text.index("\n{\n") :])
    assert (found["records"], found["usable"], found["short"]) == (3, 0, 3)
    assert found["problems"][1] == {"record": "00001", "reason": "it has 1 s, less than 2 s", "short": True}
    assert main(["ecg", "inspect", str(tmp_path / "none")]) == 2
    assert "DIR must be a folder of records" in capsys.readouterr().err
    for flag, value, message in (
        ("--seconds", "0", "--seconds must be"),
        ("--seconds", "0.001", "--rate times --seconds must be at least one sample"),
        ("--rate", "-5", "--rate must be finite and in (0.0, inf), got -5.0"),
        ("--minimum-likelihood", "101", "--minimum-likelihood must be"),
    ):
        assert main(["ecg", "inspect", str(root), flag, value]) == 2
        assert capsys.readouterr().err.startswith(f"tgdp-fast: error: {message}")


def test_inspect_names_the_data_sets_of_a_parent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ptbxl(tmp_path / "a" / "ptb-xl")
    write_icbeb(tmp_path / "icbeb")
    write_record(tmp_path / "own", "one", twelve(1, 120), PTBXL_LEADS)
    assert main(["ecg", "inspect", str(tmp_path)]) == 1
    assert (
        f"DIR must be a data set itself, but {tmp_path} holds 3 data sets: a/ptb-xl (ptb-xl), icbeb (icbeb2018), own "
        "(records without a table); name one of them"
    ) in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"holds one: ptb-xl \(ptb-xl\); name that"):
        open_ecg_folder(tmp_path / "a")


def test_inspect_tells_labels_of_another_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_icbeb(tmp_path, [500] * 5)
    for name in ("REFERENCE.csv", "A0002.mat", "A0004.mat"):
        (tmp_path / name).unlink()
    for number, codes in ((1, "39732003,426177001"), (3, "426177001,426783006"), (5, "12345")):
        header = tmp_path / f"A000{number}.hea"
        header.write_text(header.read_text().replace("Dx: 426783006", f"Dx: {codes}"))
    assert main(["ecg", "inspect", str(tmp_path), "--seconds", "1"]) == 1
    out, err = capsys.readouterr()
    for line in (
        "usable records    0",
        "other labels      426177001 (sinus bradycardia) 2, 12345 1, 39732003 (left axis deviation) 1",
        "expected          of SNOMED CT 426783006 (normal ECG), 164889003 (atrial fibrillation), ",
        "dropped: too short 0, broken 0, with other labels 3",
    ):
        assert line in out
    assert f"no record of {tmp_path} can be used" in err
    assert main(["ecg", "inspect", str(tmp_path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["other_labels"]
    assert found["counts"] == {"426177001": 2, "12345": 1, "39732003": 1}
    assert found["records"] == ["A0001", "A0003", "A0005"]
    # One that is usable makes the command succeed, unless --strict is given.
    header.write_text(header.read_text().replace("12345", "426783006"))
    assert main(["ecg", "inspect", str(tmp_path), "--seconds", "1"]) == 0
    assert main(["ecg", "inspect", str(tmp_path), "--seconds", "1", "--strict"]) == 1


@pytest.mark.parametrize("encoding", ["ascii", "utf-8:strict"])
def test_names_that_are_not_utf8_are_printed(tmp_path: Path, encoding: str) -> None:
    """Of records that are usable, as WFDB and MATLAB files, and of broken ones; in text and as JSON."""
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/f\xf6lder"))
    write_icbeb(root, [500, 500])
    for path in [*root.glob("A*"), root / "REFERENCE.csv"]:
        content = path.read_bytes()
        if path.suffix != ".mat":
            content = content.replace(b"A000", b"J\xf6rg")
        path.unlink()
        Path(os.fsdecode(os.fsencode(path).replace(b"A000", b"J\xf6rg"))).write_bytes(content)
    (root / os.fsdecode(b"\xe4.hea")).write_bytes(b"no header\n")
    folder = open_ecg_folder(root)
    assert [entry.name for entry in folder.entries] == ["J\\udcf6rg1", "J\\udcf6rg2"]
    assert [problem.record for problem in folder.problems] == ["\\udce4"]
    for more in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "tgdp_fast", "ecg", "inspect", str(root), "--seconds", "1", "--read", *more],
            cwd=ROOT, capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": encoding},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        shown = done.stdout.replace(b"\\\\", b"\\")  # JSON has each backslash twice
        assert b"f\\udcf6lder" in shown
        assert b"\\udce4" in shown
    dataset = build_ecg_cache(folder, root / "cache", seconds=1.0)
    assert dataset.names == tuple(entry.name for entry in folder.entries)


def test_inspect_reads_signals_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_icbeb(tmp_path, [500, 500, 500, 499])
    mat = root / "A0001.mat"
    mat.write_bytes(mat.read_bytes()[:24] + b"\0" * (len(mat.read_bytes()) - 24))
    (root / "A0002.mat").write_bytes(b"nothing")
    main(["ecg", "inspect", str(root), "--seconds", "1"])
    assert "usable records    4" in capsys.readouterr().out
    main(["ecg", "inspect", str(root), "--seconds", "1", "--read"])
    text = capsys.readouterr().out
    assert "usable records    1\n" in text
    assert "dropped: too short 1, broken 2" in text
    assert "record A0001: A0001.mat has another checksum" in text


def test_long_lists_are_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ptbxl(tmp_path, 30)
    for path in tmp_path.rglob("*.dat"):
        path.unlink()
    main(["ecg", "inspect", str(tmp_path)])
    text = capsys.readouterr().out
    assert text.count("is missing") == 20
    assert "and 10 more broken; --json lists all" in text


def test_thousands_of_records_take_about_a_second_and_no_torch(tmp_path: Path) -> None:
    write_record(tmp_path / "0", "r", twelve(0, 1000), PTBXL_LEADS)
    header = (tmp_path / "0" / "r.hea").read_text()
    content = (tmp_path / "0" / "r.dat").read_bytes()
    for number in range(2000):
        if number % 500 == 0:
            (tmp_path / f"{number}").mkdir(exist_ok=True)
        place = tmp_path / f"{number // 500 * 500}" / f"r{number}.hea"
        place.write_text(header.replace("r.dat", f"r{number}.dat"))
        place.with_suffix(".dat").write_bytes(content)
    for _ in range(3):  # others may use the processor
        start = time.process_time()
        folder = open_ecg_folder(tmp_path)
        seconds = time.process_time() - start
        if seconds < 1.0:
            break
    assert len(folder.entries) == 2001
    assert seconds < 1.0
    code = (
        "import sys; from tgdp_fast.cli.main import main\n"
        "code = main(['ecg', 'inspect', sys.argv[1], '--seconds', '1'])\n"
        "assert code == 0 and not {'torch', 'pandas', 'scipy', 'wfdb'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "0")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# a data set of one's own ------------------------------------------------------------------------------------

READER = '''
"""Records as CSV files of millivolts, one column for each lead, with a table of names, rates and statements."""

from pathlib import Path

import numpy as np

from tgdp_fast.ecg.records.entries import ECGEntry, ECGFolder, check_rate
from tgdp_fast.ecg.records.registry import Selection, reader, signal_reader
from tgdp_fast.ecg.records.tables import number, read_table, statements
from tgdp_fast.ecg.records.wfdb import RecordError, Root


@reader("toy", lambda root: (root.path / "toy.csv").exists(), contents="toy.csv (toy)")
def read_toy(folder: ECGFolder, root: Root, selection: Selection) -> None:
    for row in read_table(root.path / "toy.csv", ["name", "rate", "labels"], root):
        with folder.record(row["name"]):
            path = root.join(row["name"] + ".txt")
            stamp, rate = root.stamp(path), number(row["rate"]) or 0.0
            check_rate(rate, selection.rate)
            labels = statements(row["labels"].split("+"))
            folder.entries.append(ECGEntry(row["name"], path, "toy", rate, None, labels, files=(stamp,)))


@signal_reader("toy")
def read_signals(path: Path, root: Root) -> tuple[np.ndarray, list[str], float]:
    root.status(path)
    try:
        table = np.genfromtxt(path, delimiter=",", names=True, dtype=np.float32)
        return np.stack([table[name] for name in table.dtype.names]), list(table.dtype.names), 100.0
    except (ValueError, TypeError) as error:
        raise RecordError(f"{path.name} cannot be read: {error}") from None
'''


def test_one_module_adds_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module in the folder of readers is enough: it is found, recognizes its folders and reads them."""
    from tgdp_fast.ecg.records import readers, registry

    monkeypatch.setattr(registry, "_readers", dict(registry._readers))
    monkeypatch.setattr(registry, "_signal_readers", dict(registry._signal_readers))
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "toy.py").write_text(READER)
    monkeypatch.setattr(readers, "__path__", [*readers.__path__, str(tmp_path / "modules")])
    data = tmp_path / "data"
    data.mkdir()
    values = np.random.default_rng(0).standard_normal((3, 130, 8)).astype(np.float32)
    for name, signals in zip("abc", values, strict=True):
        np.savetxt(data / f"{name}.txt", signals, "%.9g", ",", header=",".join(STORED_LEADS), comments="")
    (data / "toy.csv").write_text("name,rate,labels\na,100,SR+NORM\nb,100,AFIB\nc,50,SR\nd,100,SR\n../e,100,SR\n")
    try:
        folder = open_ecg_folder(data)
        assert folder.kind == "toy"
        assert [(entry.name, entry.labels) for entry in folder.entries] == [("a", ("NORM", "SR")), ("b", ("AFIB",))]
        assert [str(problem) for problem in folder.problems] == [
            "record c: it is at 50 Hz, fewer than the 100 Hz that are asked for",
            "record d: d.txt is missing",
            "record ../e: the path '../e.txt' leaves the folder",
        ]
        dataset = build_ecg_cache(folder, tmp_path / "cache", seconds=1.2)
        assert dataset.kind == "toy"
        assert np.array_equal(dataset.signals, values[:2, :120].transpose(0, 2, 1))
        with pytest.raises(ValueError, match=r"path must hold toy.csv \(toy\), ptbxl_database.csv \(PTB-XL\), REFER"):
            open_ecg_folder(tmp_path / "modules")
        with pytest.raises(RecordError, match="no reader is registered for records of the form 'tapes'"):
            registry.read_signals_of("tapes", data / "a.txt", Root(data))
    finally:
        sys.modules.pop("tgdp_fast.ecg.records.readers.toy", None)
