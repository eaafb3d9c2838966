"""The cache of records: what it holds, when it is used again, what a kill leaves; resampling; splits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ecg_files import PTBXL_LEADS, ROOT, real_data, twelve, write_icbeb, write_ptbxl, write_record
from hypothesis import given, settings
from hypothesis import strategies as st

from tgdp_fast.ecg.records import cache as ecg_cache
from tgdp_fast.ecg.records.cache import ECGCacheError, ECGDataset, build_ecg_cache
from tgdp_fast.ecg.records.entries import ECGEntry
from tgdp_fast.ecg.records.folder import open_ecg_folder
from tgdp_fast.ecg.records.leads import STORED_LEADS, TWELVE_LEADS
from tgdp_fast.ecg.records.signals import rate_ratio, read_entry, resample
from tgdp_fast.ecg.records.splits import split_by_patient
from tgdp_fast.ecg.records.statements import STATEMENTS
from tgdp_fast.ecg.records.wfdb import RecordError, Root
from tgdp_fast.runtime import arrays
from tgdp_fast.runtime.arrays import Standardizer


def stored(values: np.ndarray) -> np.ndarray:
    """The eight leads in mV of samples [length, 12]."""
    return (values.T[[TWELVE_LEADS.index(lead) for lead in STORED_LEADS]] / 1000).astype(np.float32)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ecg_cache, "_CHUNK_RECORDS", 3)


def content(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(place.iterdir()) if path.is_file()}


# content ----------------------------------------------------------------------------------------------------


def test_a_cache_holds_the_records_in_order(tmp_path: Path, small_chunks: None) -> None:
    root = write_ptbxl(tmp_path / "ptbxl", 7)
    dataset = build_ecg_cache(open_ecg_folder(root), tmp_path / "cache", seconds=0.57)
    assert isinstance(dataset.signals, np.memmap)
    assert not dataset.signals.flags.writeable
    assert dataset.signals.dtype == np.float32
    assert np.array_equal(dataset.signals, np.stack([stored(twelve(n, 100))[:, :57] for n in range(1, 8)]))
    assert dataset.names == tuple(f"{n:05d}" for n in range(1, 8))
    assert dataset.patients == ("1000", "1000", "1001", "1001", "1002", "1002", "1003")
    assert dataset.folds.tolist() == [1, 1, 2, 2, 3, 3, 4]
    assert dataset.ages.tolist() == [90, 42, 43, 44, 45, 46, 47]
    assert dataset.sexes[:2] == ("female", "male")
    assert dataset.vocabulary == STATEMENTS
    assert dataset.labels.dtype == np.uint8
    assert [[STATEMENTS[k] for k in np.flatnonzero(row)] for row in dataset.labels[:4]] == [
        ["NORM", "SR"],
        ["AFIB"],
        ["LVH", "PVC"],
        [],
    ]
    assert (dataset.rate, dataset.leads, dataset.kind, len(dataset)) == (100.0, STORED_LEADS, "ptb-xl", 7)
    assert dataset.problems == ()
    loaded = ECGDataset.load(tmp_path / "cache")
    assert np.array_equal(loaded.signals, dataset.signals)
    assert loaded.sha256 == dataset.sha256
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()) == [
        "cache.json",
        "signals",
    ]


def test_leads_are_those_asked_for_in_their_order(tmp_path: Path) -> None:
    root = write_ptbxl(tmp_path / "ptbxl", 2)
    dataset = build_ecg_cache(open_ecg_folder(root), tmp_path / "cache", seconds=1.0, leads=("v6", "AVL", "II"))
    assert dataset.leads == ("V6", "aVL", "II")
    assert np.array_equal(dataset.signals[0], (twelve(1, 100).T[[11, 4, 1]] / 1000).astype(np.float32))


def test_short_records_are_dropped_and_counted_and_are_never_fatal(tmp_path: Path) -> None:
    root = write_icbeb(tmp_path / "icbeb", (700, 499, 499, 500))
    for on_problem in ("skip", "raise"):
        dataset = build_ecg_cache(open_ecg_folder(root), tmp_path / "cache", seconds=1.0, on_problem=on_problem)
        assert dataset.names == ("A0001", "A0004")
        # One is known by its header, the other after reading.
        assert sorted((p.record, p.reason, p.short) for p in dataset.problems) == [
            ("A0002", "it has 0.998 s, less than 1 s", True),
            ("A0003", "it has 0.998 s, less than 1 s", True),
        ]
    assert dataset.patients == ("record A0001", "record A0004")
    assert dataset.folds.tolist() == [-1, -1]
    assert np.isnan(dataset.ages[1])


def test_rows_of_broken_records_leave_no_gaps(tmp_path: Path, small_chunks: None) -> None:
    root = write_ptbxl(tmp_path / "ptbxl", 11)
    broken = [1, 4, 5, 6, 11]  # a whole chunk is among them
    for number in broken:
        dat = root / f"records100/00000/{number:05d}_lr.dat"
        values = twelve(number, 100)
        values[99] += 1  # the header's checksum stays
        values.tofile(dat)
    dataset = build_ecg_cache(open_ecg_folder(root), tmp_path / "cache", seconds=1.0)
    left = [number for number in range(1, 12) if number not in broken]
    assert dataset.names == tuple(f"{n:05d}" for n in left)
    assert np.array_equal(dataset.signals, np.stack([stored(twelve(n, 100)) for n in left]))
    assert [p.record for p in dataset.problems] == [f"{n:05d}" for n in broken]
    assert ECGDataset.load(tmp_path / "cache").folds.tolist() == dataset.folds.tolist() == [1, 2, 4, 4, 5, 5]


def test_processes_write_what_one_writes(tmp_path: Path, small_chunks: None) -> None:
    root = write_ptbxl(tmp_path / "ptbxl", 8)
    (root / "records100/00000/00002_lr.dat").write_bytes(b"")
    folder = open_ecg_folder(root)
    build_ecg_cache(folder, tmp_path / "one", seconds=1.0, workers=1)
    build_ecg_cache(folder, tmp_path / "two", seconds=1.0, workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_memory_does_not_grow_with_the_number_of_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ecg_cache, "_CHUNK_RECORDS", 10)
    monkeypatch.setattr(ecg_cache, "_BLOCK", 1 << 16)
    monkeypatch.setattr(arrays, "_VALUES", 10 * 8 * 500)
    peaks: dict[int, int] = {}
    # The lesser of two: at times Python enlarges tables of its own meanwhile.
    for count in (30, 120, 30, 120):
        folder = open_ecg_folder(write_ptbxl(tmp_path / str(count), count, seconds=5.0))
        tracemalloc.start()
        dataset = build_ecg_cache(folder, tmp_path / f"cache{count}", seconds=5.0)
        dataset.standardizer(np.arange(count))
        peaks[count] = min(peaks.get(count, 10**9), tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(dataset) == count
        shutil.rmtree(tmp_path / f"cache{count}")
    # What is known of a record beside its signal takes less than 2 KB, its signal 16 KB.
    assert peaks[120] - peaks[30] < 90 * 2_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 0}, "rate must be"),
        ({"seconds": -1}, "seconds must be"),
        ({"seconds": 0.001}, r"rate \* seconds must be at least one sample"),
        ({"leads": ("I", "V9")}, "leads must be different ones of I, II"),
        ({"leads": ("I", "i")}, "leads must be different ones"),
        ({"leads": ()}, "leads must be different ones"),
        ({"on_problem": "ignore"}, "on_problem must be one of raise, skip"),
        ({"workers": 0}, "workers must be an integer >= 1"),
        ({"rate": 100.123456}, "no record can be used: record 00001: it is at 100 Hz, fewer"),
        ({"rate": 99.123456}, "no record can be used: record 00001: it cannot be resampled"),
        ({"seconds": 2.0}, "no record can be used: record 00001: it has 1 s, less than 2 s"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    folder = open_ecg_folder(write_ptbxl(tmp_path / "ptbxl", 2))
    with pytest.raises(ValueError, match=message):
        build_ecg_cache(folder, tmp_path / "cache", **({"seconds": 1.0} | arguments))


# used again, made anew --------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the records that are read."""
    names: list[str] = []
    real = ecg_cache.read_entry

    def read(entry: ECGEntry, *arguments: Any, **options: Any) -> np.ndarray:
        names.append(entry.name)
        return real(entry, *arguments, **options)

    monkeypatch.setattr(ecg_cache, "read_entry", read)
    return names


def test_a_cache_is_used_again_until_something_changes(tmp_path: Path, reads: list[str]) -> None:
    root, place = write_ptbxl(tmp_path / "ptbxl", 3), tmp_path / "cache"

    def build(**changes: Any) -> int:
        reads.clear()
        build_ecg_cache(open_ecg_folder(root), place, **({"seconds": 1.0} | changes))
        assert len(list(place.iterdir())) == 2  # nothing of before is left
        return len(reads)

    assert build() == 3
    assert build() == 0
    assert build(workers=2) == 0
    assert build(seconds=0.5) == 3
    assert build(seconds=0.5, leads=("I",)) == 3
    assert build() == 3
    table = root / "ptbxl_database.csv"
    table.write_text(table.read_text().replace("AFIB", "AFLT"))
    assert build() == 3
    assert "AFLT" in {STATEMENTS[k] for k in np.flatnonzero(ECGDataset.load(place).labels.any(axis=0))}
    dat = root / "records100/00000/00001_lr.dat"
    os.utime(dat, ns=(1, 1))
    assert build() == 3
    write_record(dat.parent, "00001_lr", twelve(77, 100), PTBXL_LEADS)
    assert build() == 3
    assert np.array_equal(ECGDataset.load(place).signals[0], stored(twelve(77, 100)))
    dat.unlink()
    assert build() == 2


def test_a_finished_cache_needs_no_right_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    root, place = write_ptbxl(tmp_path / "ptbxl", 3), tmp_path / "cache"
    built = build_ecg_cache(open_ecg_folder(root), place, seconds=1.0)

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(ecg_cache, "folder_lock", forbidden)
    reads.clear()
    assert build_ecg_cache(open_ecg_folder(root), place, seconds=1.0).sha256 == built.sha256
    assert reads == []


def damage_signals(place: Path) -> None:
    (path,) = place.glob("signals-*.npy")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def cut_signals(place: Path) -> None:
    (path,) = place.glob("signals-*.npy")
    path.write_bytes(path.read_bytes()[:-4])


def remove_signals(place: Path) -> None:
    next(place.glob("signals-*.npy")).unlink()


def change_state(place: Path) -> None:
    path = place / "cache.json"
    path.write_text(path.read_text().replace('"AFIB"', '"AFLT"'))


def cut_state(place: Path) -> None:
    path = place / "cache.json"
    path.write_text(path.read_text()[:-9])


def other_version(place: Path) -> None:
    path = place / "cache.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 0'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_signals, "has another content than was written"),
        (cut_signals, "is a damaged cache"),
        (remove_signals, "is a damaged cache"),
        (change_state, "cache.json was changed after it was written"),
        (cut_state, "is a damaged cache"),
        (other_version, "is of another version"),
        (shutil.rmtree, "holds none"),
    ],
)
def test_a_damaged_cache_is_refused_and_made_anew(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder, place = open_ecg_folder(write_ptbxl(tmp_path / "ptbxl", 3)), tmp_path / "cache"
    before = np.array(build_ecg_cache(folder, place, seconds=1.0).signals)
    damage(place)
    with pytest.raises(ECGCacheError, match=message):
        ECGDataset.load(place)
    assert np.array_equal(build_ecg_cache(folder, place, seconds=1.0).signals, before)
    assert np.array_equal(ECGDataset.load(place).signals, before)


def test_an_array_in_use_survives_its_cache_being_made_anew(tmp_path: Path) -> None:
    root, place = write_ptbxl(tmp_path / "ptbxl", 3), tmp_path / "cache"
    old = build_ecg_cache(open_ecg_folder(root), place, seconds=1.0)
    expected = np.array(old.signals)
    build_ecg_cache(open_ecg_folder(root), place, seconds=0.5)
    assert np.array_equal(old.signals, expected)


# interrupted ------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a call as a kill does: nothing in the code catches it."""


@pytest.mark.parametrize("broken", [False, True])
def test_a_call_goes_on_wherever_the_one_before_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_chunks: None, reads: list[str], broken: bool
) -> None:
    """Cut off before every single operation on files, in turn."""
    root = write_ptbxl(tmp_path / "ptbxl", 8)
    if broken:
        values = twelve(4, 100)
        values[99] += 1
        values.tofile(root / "records100/00000/00004_lr.dat")
    folder = open_ecg_folder(root)
    expected = np.array(build_ecg_cache(folder, tmp_path / "whole", seconds=1.0).signals)
    names = [(os, "replace"), (os, "fsync"), (ecg_cache, "_save_json"), (shutil, "rmtree"), (Path, "unlink")]
    real = {name: getattr(owner, name) for owner, name in names}
    steps, left = 0, 10**9

    def cut(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal steps, left
            steps, left = steps + 1, left - 1
            if left < 0:
                raise Killed
            return real[name](*arguments, **options)

        return call

    for owner, name in names:
        monkeypatch.setattr(owner, name, cut(name))
    build_ecg_cache(folder, tmp_path / "counted", seconds=1.0)
    total = steps
    assert total >= 12
    read_again = []
    for position in range(total):
        place = tmp_path / f"cut{position}"
        left = position
        with pytest.raises(Killed):
            build_ecg_cache(folder, place, seconds=1.0)
        left = 10**9
        reads.clear()
        dataset = build_ecg_cache(folder, place, seconds=1.0)
        assert np.array_equal(dataset.signals, expected)
        assert np.array_equal(ECGDataset.load(place).signals, expected)
        read_again.append(len(reads))
        shutil.rmtree(place)
    # Later cuts leave less to do, and in the end nothing.
    assert read_again == sorted(read_again, reverse=True)
    assert (read_again[0], read_again[-1]) == (8, 0)
    assert len(set(read_again)) >= 4


KILLED = """
import os, sys
from pathlib import Path
from tgdp_fast.ecg.records import cache as ecg_cache
from tgdp_fast.ecg.records.entries import ECGEntry
from tgdp_fast.ecg.records.folder import open_ecg_folder
if __name__ == "__main__":
    real, count = ecg_cache._save_json, 0
    def save(*arguments):
        global count
        real(*arguments)
        count += 1
        if count == 2:
            from multiprocessing import active_children
            print(*[child.pid for child in active_children()], flush=True)
            os.kill(os.getpid(), 9)
    ecg_cache._save_json = save
    ecg_cache._CHUNK_RECORDS = 3
    ecg_cache.build_ecg_cache(open_ecg_folder(sys.argv[1]), sys.argv[2], seconds=1.0, workers=2)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_kill_9_leaves_a_cache_that_the_next_call_finishes_and_no_process(
    tmp_path: Path, small_chunks: None, reads: list[str]
) -> None:
    root, place = write_ptbxl(tmp_path / "ptbxl", 40), tmp_path / "cache"
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    done = subprocess.run(
        [sys.executable, str(script), str(root), str(place)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    with pytest.raises(ECGCacheError, match="is not finished: the same call of build_ecg_cache goes on"):
        ECGDataset.load(place)
    dataset = build_ecg_cache(open_ecg_folder(root), place, seconds=1.0)
    assert 0 < len(reads) <= 40 - 2 * 3
    assert np.array_equal(dataset.signals, np.stack([stored(twelve(n, 100)) for n in range(1, 41)]))
    end = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(alive, workers))


def test_chunks_that_changed_since_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_chunks: None, reads: list[str]
) -> None:
    folder, place = open_ecg_folder(write_ptbxl(tmp_path / "ptbxl", 8)), tmp_path / "cache"
    monkeypatch.setattr(ecg_cache._Build, "_finish", lambda *a: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        build_ecg_cache(folder, place, seconds=1.0)
    monkeypatch.undo()
    monkeypatch.setattr(ecg_cache, "_CHUNK_RECORDS", 3)
    (building,) = place.glob("building-*")
    with open(building / "signals.npy", "r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\1")
    (building / "00000000.json").write_text("{")
    dataset = build_ecg_cache(folder, place, seconds=1.0)
    assert np.array_equal(dataset.signals, np.stack([stored(twelve(n, 100)) for n in range(1, 9)]))


def test_a_full_disk_is_said_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_ecg_folder(write_ptbxl(tmp_path / "ptbxl", 2))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 10, 9))  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="cache_dir needs 0.00 GB, but .* has 0.00 GB left"):
        build_ecg_cache(folder, tmp_path / "cache", seconds=1.0)


# resampling -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new", "factors"), [(500, 100, (1, 5)), (257, 100, (100, 257)), (1000, 360, (9, 25))])
def test_resampling_keeps_what_is_slow_and_removes_what_is_fast(
    old: float, new: float, factors: tuple[int, int]
) -> None:
    assert rate_ratio(old, new) == factors
    length = int(3 * old)
    time_old, time_new = np.arange(length) / old, np.arange(-(-length * factors[0] // factors[1])) / new
    constant = np.full((2, length), 1.25, np.float32)
    # A level stays a level, up to both ends; the window's ripple is below 1e-3 (Kaiser, beta = 5: 53 dB).
    assert np.abs(resample(constant, *factors) - 1.25).max() < 1.25e-3 * 2
    # In the pass band to 1e-2; beyond half the new rate by 0.6 of it, gone to 53 dB. Away from the ends.
    inside = slice(40, -40)
    for frequency, gain in ((0.1 * new, 1.0), (0.25 * new, 1.0), (0.7 * new, 0.0)):
        wave = np.sin(2 * np.pi * frequency * time_old)[None].astype(np.float32)
        expected = gain * np.sin(2 * np.pi * frequency * time_new)
        assert np.abs(resample(wave, *factors)[0] - expected)[inside].max() < 5e-3
    assert resample(constant, 1, 1) is constant


@given(st.integers(0, 400), st.sampled_from([(500.0, 100.0), (400.0, 100.0), (257.0, 100.0), (100.0, 50.0)]))
@settings(max_examples=25)
def test_the_crop_is_that_of_the_whole_record_resampled(extra: int, rates: tuple[float, float]) -> None:
    from tgdp_fast.ecg.records.signals import fit

    old, new = rates
    signals = np.random.default_rng(extra).standard_normal((8, int(old) + extra)).astype(np.float32)
    found = fit(signals, list(STORED_LEADS), old, rate=new, seconds=1.0, leads=STORED_LEADS)
    whole = resample(signals, *rate_ratio(old, new))
    assert found.shape == (8, int(new))
    assert np.array_equal(found, whole[:, : int(new)])


def test_what_is_wrong_behind_the_part_that_is_used_does_not_count(tmp_path: Path) -> None:
    values = twelve(0, 400)
    values[300] = -32768
    write_record(tmp_path, "r", values, PTBXL_LEADS)
    (entry,) = open_ecg_folder(tmp_path).entries
    found = read_entry(entry, Root(tmp_path), rate=100.0, seconds=3.0, leads=STORED_LEADS)
    assert np.array_equal(found, stored(values)[:, :300])
    with pytest.raises(RecordError, match="12 samples are NaN"):
        read_entry(entry, Root(tmp_path), rate=100.0, seconds=3.01, leads=STORED_LEADS)


# splits -----------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 12), st.lists(st.booleans(), min_size=3, max_size=3)), max_size=60),
    st.sampled_from([(1.0,), (0.5, 0.5), (0.1, 0.9), (0.8, 0.1, 0.1)]),
    st.integers(0, 5),
)
def test_splits_never_leak_patients(rows: list[Any], fractions: tuple[float, ...], seed: int) -> None:
    patients = [f"p{patient}" for patient, _ in rows]
    labels = np.array([row for _, row in rows], np.uint8).reshape(len(rows), 3)
    sides = split_by_patient(patients, labels, fractions, seed)
    assert len(sides) == len(fractions)
    assert sorted(np.concatenate(sides).tolist()) == list(range(len(rows)))
    owners = [{patients[row] for row in side} for side in sides]
    assert sum(map(len, owners)) == len(set(patients))
    again = split_by_patient(patients, labels, fractions, seed)
    assert all(np.array_equal(a, b) for a, b in zip(sides, again, strict=True))


def test_splits_spread_labels_and_sizes() -> None:
    random = np.random.default_rng(0)
    frequencies = np.array([0.5, 0.2, 0.05, 0.02])
    labels = (random.random((2000, 4)) < frequencies).astype(np.uint8)
    patients = [f"{n}" for n in random.integers(0, 1500, 2000)]
    fractions = np.array([0.7, 0.2, 0.1])
    sides = split_by_patient(patients, labels, fractions, 1)
    # Patients have few records, so every share is right to a few of them.
    for side, fraction in zip(sides, fractions, strict=True):
        assert abs(len(side) - fraction * 2000) <= 4
        assert np.abs(labels[side].sum(axis=0) - fraction * labels.sum(axis=0)).max() <= 6
    assert not np.array_equal(sides[2], split_by_patient(patients, labels, fractions, 2)[2])
    few = split_by_patient([f"{n}" for n in range(16)], np.eye(16, 4, dtype=np.uint8), (0.25, 0.75))
    assert [len(side) for side in few] == [4, 12]


def test_rows_and_splits_of_a_dataset(tmp_path: Path) -> None:
    root = write_ptbxl(tmp_path / "ptbxl", 40)
    dataset = build_ecg_cache(open_ecg_folder(root), tmp_path / "cache", seconds=1.0)
    assert [len(part) for part in dataset.split_by_patient((0.5, 0.5))] == [20, 20]
    with pytest.raises(ValueError, match="fractions must be positive with sum 1"):
        dataset.split_by_patient((0.5, 0.6))
    rows = np.array([3, 0])
    part = dataset.rows(rows)
    assert len(part) == 2
    assert part.names == ("00004", "00001")
    assert part.patients == ("1001", "1000")
    assert part.sexes == ("male", "female")
    assert part.folds.tolist() == [2, 1]
    assert part.ages.tolist() == [44, 90]
    assert not isinstance(part.signals, np.memmap)
    assert part.signals.dtype == part.labels.dtype == np.float32
    assert np.array_equal(part.signals, dataset.signals[rows])
    assert np.array_equal(part.labels, dataset.labels[rows])
    assert part.statements == ["NORM", "SR"]
    assert dataset.statements == ["AFIB", "LVH", "NORM", "PVC", "SR"]
    assert (part.rate, part.leads, part.vocabulary) == (dataset.rate, dataset.leads, dataset.vocabulary)


def test_statistics_come_from_the_rows_chosen(tmp_path: Path) -> None:
    root = write_ptbxl(tmp_path / "ptbxl", 9)
    dataset = build_ecg_cache(open_ecg_folder(root), tmp_path / "cache", seconds=1.0)
    rows = np.array([1, 2, 7])
    found = dataset.standardizer(rows)
    part = np.array(dataset.signals[rows], np.float64)
    assert found.mean.shape == found.std.shape == (8, 1)
    assert np.allclose(found.mean[:, 0], part.mean(axis=(0, 2)), rtol=1e-12, atol=1e-12)
    assert np.allclose(found.std[:, 0], part.std(axis=(0, 2)), rtol=1e-12)
    assert not np.allclose(dataset.standardizer().std, found.std)
    restored = Standardizer.from_tensors(found.to_tensors())
    x = np.array(dataset.signals)
    assert np.allclose(restored.invert(restored.apply(x)), x, atol=1e-6)
    with pytest.raises(ValueError, match="0 rows chosen"):
        dataset.standardizer(rows[:0])


# real records -----------------------------------------------------------------------------------------------


def test_the_real_records(tmp_path: Path) -> None:
    source = build_ecg_cache(open_ecg_folder(real_data("ptbxl")), tmp_path / "source", on_problem="raise")
    target = build_ecg_cache(open_ecg_folder(real_data("icbeb2018")), tmp_path / "target", on_problem="raise")
    for dataset in (source, target):
        assert dataset.problems == ()
        assert dataset.signals.shape == (len(dataset), 8, 1000)
        assert np.isfinite(dataset.signals).all()
        assert 0.05 < float(dataset.standardizer().std.min()) < float(dataset.standardizer().std.max()) < 1.0
    state = json.loads((tmp_path / "source" / "cache.json").read_text())
    assert state["signals"]["shape"] == list(source.signals.shape)
