"""Records of WFDB: headers, samples, and every way in which a record can be broken."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from ecg_files import PTBXL_LEADS, real_data, twelve, write_ptbxl, write_record
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tgdp_fast.ecg.records.cache import BrokenRecordError, build_ecg_cache
from tgdp_fast.ecg.records.folder import open_ecg_folder
from tgdp_fast.ecg.records.inspection import inspect_ecg_folder
from tgdp_fast.ecg.records.wfdb import RecordError, Root, parse_header, read_header, read_leads, read_signals

# headers ----------------------------------------------------------------------------------------------------

SIGNAL_LINES = st.builds(
    "{}.dat {} {} {} {} {} {} 0 {}".format,
    st.just("r"),
    st.sampled_from(["16", "16+24", "212", "80"]),
    st.sampled_from(["1000/mV", "1000.0(0)/mV", "200(-5)/uV", "0.5e3(7)/mV", "0", "100"]),
    st.sampled_from([8, 12, 16]),
    st.integers(-2000, 2000),
    st.integers(-99, 99),
    st.integers(-32768, 65535),
    st.sampled_from(["I", "aVF", "lead V 1", "MDC_ECG_LEAD_II"]),
)


@given(
    st.lists(SIGNAL_LINES, min_size=1, max_size=3),
    st.sampled_from(["100", "500", "257.5", "500/100(3)"]),
    st.integers(1, 99),
    st.sampled_from(["", " 12:33:59", " 12:33:59 12/05/2020"]),
    st.lists(st.sampled_from(["# Age: 5", "#Dx: 1,2", "# a:b"])),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_headers_are_understood_as_wfdb_does(
    tmp_path: Path, lines: list[str], rate: str, length: int, time: str, comments: list[str]
) -> None:
    import wfdb

    text = "\n".join(["# made up", f"r {len(lines)} {rate} {length}{time}", *lines, *comments, ""])
    (tmp_path / "r.hea").write_text(text)
    found, expected = parse_header(text), wfdb.rdheader(str(tmp_path / "r"))
    assert (found.rate, found.length, found.leads) == (expected.fs, expected.sig_len, expected.sig_name)
    assert [s.format for s in found.signals] == expected.fmt
    assert [s.gain for s in found.signals] == expected.adc_gain
    assert [s.baseline for s in found.signals] == expected.baseline
    assert [s.units for s in found.signals] == expected.units
    assert [s.offset for s in found.signals] == [offset or 0 for offset in expected.byte_offset]
    assert [s.checksum for s in found.signals] == expected.checksum
    assert list(found.comments) == [line.strip() for line in expected.comments]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "does not begin with a record line: ''"),
        ("nothing", "does not begin with a record line: 'nothing'"),
        ("r/3 12 100 1000", "several segments"),
        ("r 2 100 5\nr.dat 16", "says 2 signals and describes 1"),
        ("r 1 -1 5\nr.dat 16", "1 signals of 5 samples at -1 Hz"),
        ("r 0 100 5", "0 signals"),
        ("r 1 100 5\nr.dat sixteen", "line of signal 0 is damaged: 'r.dat sixteen'"),
        ("r 1 100 5\nr.dat", "line of signal 0 is damaged"),
        ("r 1 100 5\nr.dat 16 a/mV", "line of signal 0 is damaged"),
        ("r 1 100 5\nr.dat 16 1000/mV 16 0 0 x 0 I", "line of signal 0 is damaged"),
    ],
)
def test_headers_that_are_none(text: str, reason: str) -> None:
    with pytest.raises(RecordError, match=reason):
        parse_header(text)


HOSTILE = [
    ("r 12 100 1200", "r 12 1e308 1200", r"1200 samples at 1e\+308 Hz"),
    ("r 12 100 1200", "r 12 1e-308 1200", "1200 samples at 1e-308 Hz"),
    ("r 12 100 1200", "r 12 nan 1200", "at nan Hz"),
    ("r 12 100 1200", "r 12 -100 1200", "at -100 Hz"),
    ("r 12 100 1200", "r 12 0.01 1200", "it is at 0.01 Hz"),
    ("r 12 100 1200", "r 1000000000000000000 100 1200", "says 1000000000000000000 signals"),
    ("r 12 100 1200", "r 12 100 1000000000000000000", "is truncated: it has 28800 bytes"),
    ("r 12 100 1200", f"r 12 100 {'9' * 4000}", "12 signals of 999"),
    ("r 12 100 1200", f"r 12 100 {'9' * 9000}", "record line"),
    ("(0)/mV", f"({'9' * 400})/mV", "line of signal 0 is damaged"),
    ("(0)/mV", "(0.5)/mV", "line of signal 0 is damaged"),
    ("1000.0(0)", "nan(0)", "line of signal 0 is damaged"),
    ("1000.0(0)", "1e400(0)", "line of signal 0 is damaged"),
    ("1000.0(0)", "1e300(0)", r"has the gain 1e\+300 per mV"),
    ("1000.0(0)", "1e-300(0)", "has the gain 1e-300 per mV"),
    (".dat 16 ", f".dat 16+{'9' * 4000} ", "line of signal 0 is damaged"),
    (".dat 16 ", f".dat 16+{2**61} ", "is truncated: it has 28800 bytes"),
    ("r.dat", "r" * 300 + ".dat", "File name too long"),
    ("r.dat", "r\0.dat", "leaves the folder"),
]


@pytest.mark.parametrize(("old", "new", "reason"), HOSTILE, ids=[str(n) for n in range(len(HOSTILE))])
def test_a_hostile_header_is_named_and_stops_no_folder(tmp_path: Path, old: str, new: str, reason: str) -> None:
    write_record(tmp_path, "good", twelve(1, 1200), PTBXL_LEADS)
    header = write_record(tmp_path, "r", twelve(2, 1200), PTBXL_LEADS)
    header.write_text(header.read_text().replace(old, new))
    folder = open_ecg_folder(tmp_path)
    assert [entry.name for entry in folder.entries] == ["good"]
    assert [problem.record for problem in folder.problems] == ["r"]
    assert re.search(reason, folder.problems[0].reason)
    found = inspect_ecg_folder(open_ecg_folder(tmp_path, rate=None), 10.0, read=True)
    assert (found["usable"], [problem["record"] for problem in found["problems"]]) == (1, ["r"])


def test_links_in_a_circle_are_broken_records(tmp_path: Path) -> None:
    write_record(tmp_path, "good", twelve(1, 1200), PTBXL_LEADS)
    write_record(tmp_path, "data", twelve(1, 1200), PTBXL_LEADS)
    (tmp_path / "data.dat").unlink()
    for name in ("data.dat", "head.hea"):
        (tmp_path / name).symlink_to(name)
    (tmp_path / "circle").symlink_to(tmp_path)
    folder = open_ecg_folder(tmp_path)
    assert [entry.name for entry in folder.entries] == ["good"]
    assert [problem.record for problem in folder.problems] == ["data", "head"]
    assert all("cannot be read" in problem.reason for problem in folder.problems)


@given(st.text())
@settings(max_examples=200)
def test_any_text_is_a_header_or_a_reason(text: str) -> None:
    try:
        header = parse_header(text)
    except RecordError:
        return
    assert header.signals


# samples ----------------------------------------------------------------------------------------------------


def write_by_wfdb(folder: Path, fmt: str, values: np.ndarray, baseline: int = 0, gain: float = 1000.0) -> None:
    import wfdb

    leads = values.shape[1]
    wfdb.wrsamp(
        "r",
        fs=100,
        units=["mV"] * leads,
        sig_name=[f"V{i + 1}" for i in range(leads)],
        d_signal=values.astype(np.int64),
        fmt=[fmt] * leads,
        adc_gain=[gain] * leads,
        baseline=[baseline] * leads,
        write_dir=str(folder),
    )


@pytest.mark.parametrize("fmt", ["16", "212", "80", "24", "32"])
@pytest.mark.parametrize(("baseline", "gain"), [(0, 1000.0), (-13, 200.0)])
def test_every_format_agrees_with_wfdb(tmp_path: Path, fmt: str, baseline: int, gain: float) -> None:
    import wfdb

    values = np.random.default_rng(0).integers(-100, 100, (13, 3))
    write_by_wfdb(tmp_path, fmt, values, baseline, gain)
    signals, header = read_signals(tmp_path / "r.hea")
    assert header.plain == (fmt == "16")
    assert signals.dtype == np.float32
    expected = wfdb.rdrecord(str(tmp_path / "r")).p_signal.T
    assert np.abs(signals - expected).max() <= 2 * np.finfo(np.float32).eps * np.abs(expected).max()
    assert np.allclose(expected, (values.T - baseline) / gain)


def test_real_records_agree_with_wfdb() -> None:
    import wfdb

    folder = real_data("ptbxl")
    for path in sorted(folder.rglob("*.hea"))[::25]:
        signals, _ = read_signals(path)
        expected = wfdb.rdrecord(str(path.with_suffix(""))).p_signal.T.astype(np.float32)
        assert np.array_equal(signals, expected)


@pytest.mark.parametrize("fmt", ["16", "212"])
def test_samples_that_are_none_become_nan(tmp_path: Path, fmt: str) -> None:
    values = np.arange(8).reshape(4, 2)
    values[1, 1] = {"16": -32768, "212": -2048}[fmt]
    write_by_wfdb(tmp_path, fmt, values)
    signals, _ = read_signals(tmp_path / "r.hea")
    assert np.argwhere(np.isnan(signals)).tolist() == [[1, 1]]


UNITS = [
    *[(units, 1.0) for units in ("mV", "MV", "mv", "millivolts", "", " mV")],
    *[(units, 1e-3) for units in ("uV", "UV", "\N{MICRO SIGN}V", "\N{GREEK SMALL LETTER MU}V", "microvolt", "uVolt")],
    *[(units, 1e-6) for units in ("nV", "NV", "nanovolts")],
    *[("pV", 1e-9), ("V", 1e3), ("volts", 1e3), ("kV", 1e6)],
    *[(units, None) for units in ("mmHg", "mm Hg", "l/min", "%", "degC", "°C", "NU", "mV/s", "V^2")],
]


@pytest.mark.parametrize(("units", "scale"), UNITS)
def test_units(tmp_path: Path, units: str, scale: float | None) -> None:
    values = np.array([[5], [-7]], np.int16)
    header = write_record(tmp_path, "r", values, ("I",))
    header.write_text(header.read_text().replace("1000.0(0)/mV", f"2(1)/{units}"), encoding="utf-8")
    if scale is None:
        with pytest.raises(ValueError, match=rf"lead I is in {re.escape(units)}, which is no voltage"):
            read_leads(header, ["I"])
    else:
        assert np.allclose(read_leads(header, ["I"])[0], [[2.0 * scale, -4.0 * scale]], rtol=1e-6)


def test_the_micro_sign_of_latin_1(tmp_path: Path) -> None:
    header = write_record(tmp_path, "r", np.array([[5], [-7]], np.int16), ("I",))
    header.write_bytes(header.read_bytes().replace(b"1000.0(0)/mV", b"2/\xb5V"))
    assert np.allclose(read_leads(header, ["I"])[0], [[2.5e-3, -3.5e-3]], rtol=1e-6)


@pytest.mark.parametrize("units", ["mmHg", "mm Hg", "l/min", "%", "°C", "NU"])
@pytest.mark.parametrize("fmt", ["16", "212", "80", "24", "32", "516"])
def test_other_channels_do_not_stop_a_lead(tmp_path: Path, fmt: str, units: str) -> None:
    """Nor does a date that is a year alone, which the package wfdb refuses."""
    values = np.random.default_rng(0).integers(-100, 100, (301, 3))
    values[:, 2] = 0
    write_by_wfdb(tmp_path, fmt, values)
    header = tmp_path / "r.hea"
    lines = header.read_text().splitlines()
    lines[0] += " 10:20:30 2006"
    lines[1] = lines[1].replace("/mV", f"/{units}").replace("V1", "ART")
    lines[3] = lines[3].replace("V3", "vz")
    header.write_text("\n".join(lines), encoding="utf-8")
    expected = (values[:, 1:2].T / 1000).astype(np.float32)
    found, rate = read_leads(header, ["V2"])
    assert np.array_equal(found, expected)
    assert rate == 100.0
    folder = open_ecg_folder(tmp_path, leads=["V2"])
    assert inspect_ecg_folder(folder, 1.0, read=True)["usable"] == 1  # vz is flat
    dataset = build_ecg_cache(folder, tmp_path / "cache", seconds=3.0, leads=["V2"])
    assert np.array_equal(dataset.signals[0], expected[:, :300])


@pytest.mark.parametrize("date", ["2006", "01/02/2006", "00/00/0000", "31/31/1", "1.2.2006", "10:20", "10:20:30.5 6"])
@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("fmt", ["16", "61"])
def test_dates_have_no_influence(tmp_path: Path, fmt: str, files: int, date: str) -> None:
    values = np.random.default_rng(0).integers(-500, 500, (300, 2)).astype(np.int16)
    lines = [f"s 2 500 300 {date}"]
    for k, lead in enumerate(("I", "II")):
        lines.append(
            f"s{k % files}.dat {fmt} 1000(0)/mV 16 0 0 {int(values[:, k].astype(int).sum()) & 0xFFFF} 0 {lead}"
        )
    order = {"16": "<i2", "61": ">i2"}[fmt]
    for k in range(files):
        (values if files == 1 else values[:, k]).astype(order).tofile(tmp_path / f"s{k}.dat")
    (tmp_path / "s.hea").write_text("\n".join(lines) + "\n")
    assert np.array_equal(read_leads(tmp_path / "s.hea", ["II"])[0][0], (values[:, 1] / 1000).astype(np.float32))


@pytest.mark.parametrize("name", ["r", "median_beats/r", "a/b/r", "records/7", "my record", "another", "ä"])
def test_names_of_the_record_line_have_no_influence(tmp_path: Path, name: str) -> None:
    values = twelve(0, 9)
    header = write_record(tmp_path, "my record", values, PTBXL_LEADS)
    header.write_text(header.read_text().replace("my record 12", f"{name} 12", 1), encoding="utf-8")
    assert np.array_equal(read_leads(header, ["V6"])[0][0], (values[:, 11] / 1000).astype(np.float32))


MINUS = ("-", "\N{MINUS SIGN}", "\N{EN DASH}", "minus ", "ECG -", "Lead -", "MDC_ECG_LEAD_-")
UNSURE = ("aVR-", "aVR neg", "neg aVR", "ECG-aVR", "aVR (-)", "- aVR", "--aVR", "aVR*-1")


@pytest.mark.parametrize(
    ("name", "negated"),
    [(start + lead, True) for start in MINUS for lead in ("aVR", "I")] + [(name, False) for name in UNSURE],
)
def test_leads_of_the_other_sign(tmp_path: Path, name: str, negated: bool) -> None:
    """They are negated where that is certain, and missing otherwise."""
    lead = "I" if name.endswith("I") else "aVR"
    values = np.random.default_rng(0).integers(-500, 500, (200, 2)).astype(np.int16)
    header = write_record(tmp_path, "c", values, ("X", "II"))
    header.write_text(header.read_text().replace(" 0 X", f" 0 {name}"), encoding="utf-8")
    if negated:
        assert np.array_equal(read_leads(header, [lead])[0][0], -(values[:, 0] / 1000).astype(np.float32))
    else:
        with pytest.raises(ValueError, match=f"the leads {lead} are missing"):
            read_leads(header, [lead])
    # The lead itself goes first.
    header.write_text(header.read_text().replace(" 0 II", f" 0 {lead}"), encoding="utf-8")
    assert np.array_equal(read_leads(header, [lead])[0][0], (values[:, 1] / 1000).astype(np.float32))


def test_a_minus_that_joins_words_is_no_sign(tmp_path: Path) -> None:
    values = twelve(0, 9)
    header = write_record(tmp_path, "r", values, [f"ECG-{lead}" for lead in PTBXL_LEADS])
    assert np.array_equal(read_leads(header, PTBXL_LEADS)[0], (values.T / 1000).astype(np.float32))
    header.write_text(header.read_text().replace("ECG-AVR", "ECG -AVR"))
    assert np.array_equal(read_leads(header, ["aVR"])[0][0], -(values[:, 3] / 1000).astype(np.float32))
    # One that differs from the others may be negated.
    header = write_record(tmp_path, "r", values, [f"ECG {lead}" for lead in PTBXL_LEADS])
    header.write_text(header.read_text().replace("ECG AVR", "ECG-AVR").replace("ECG III", "ECG-III"))
    with pytest.raises(ValueError, match="the leads aVR, III are missing"):
        read_leads(header, ["aVR", "III", "I"])


@pytest.mark.parametrize(
    ("gain", "expected"),
    [("0", 5 / 200), ("0(1)/mV", 4 / 200), ("2e2(1e0)/mV", 4 / 200), ("-1000.0(0)/mV", -5e-3), ("5E-1(1.0)/uV", 8e-3)],
)
def test_gains_and_baselines(tmp_path: Path, gain: str, expected: float) -> None:
    header = write_record(tmp_path, "r", np.array([[5], [5]], np.int16), ("I",))
    header.write_text(header.read_text().replace("1000.0(0)/mV", gain))
    assert np.allclose(read_leads(header, ["I"])[0], expected, rtol=1e-6)


def test_a_large_baseline_hides_nothing(tmp_path: Path) -> None:
    values = 2**30 + np.arange(8).reshape(8, 1)
    write_by_wfdb(tmp_path, "32", values, 2**30, 1000.0)
    assert np.allclose(read_leads(tmp_path / "r.hea", ["V1"])[0][0], np.arange(8) / 1000, rtol=1e-6)


@pytest.mark.parametrize("fmt", ["16", "212", "8"])
def test_long_records_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fmt: str) -> None:
    from tgdp_fast.ecg.records import wfdb as module

    values = np.cumsum(np.random.default_rng(0).integers(-9, 9, (401, 3)), axis=0)
    header = tmp_path / "r.hea"
    if fmt == "8":  # differences, and the first value in the header
        lines = [f"r.dat 8 1000/mV 16 0 {values[0, k]} {values[:, k].sum() & 0xFFFF} 0 V{k + 1}" for k in range(3)]
        header.write_text("\n".join(["r 3 100 401", *lines]))
        np.diff(values, axis=0, prepend=values[:1]).astype(np.int8).tofile(tmp_path / "r.dat")
    else:
        write_by_wfdb(tmp_path, fmt, values)
    whole, _ = read_signals(header)
    assert np.array_equal(whole, (values.T / 1000).astype(np.float32))
    monkeypatch.setattr(module, "_BLOCK", 3 * 50)
    monkeypatch.setattr(module, "AHEAD", 7)
    assert np.array_equal(read_signals(header)[0], whole)
    assert np.array_equal(read_signals(header, seconds=1.2)[0], whole[:, :127])
    header.write_text(header.read_text().replace(f" {values[:, 2].sum() & 0xFFFF} 0 V3", " 1 0 V3"))
    with pytest.raises(RecordError, match="another checksum in lead V3"):
        read_signals(header, seconds=1.2)


def test_memory_grows_with_what_is_kept_and_not_with_the_file(tmp_path: Path) -> None:
    import os
    import tracemalloc

    header = write_record(tmp_path, "r", twelve(0, 1200), PTBXL_LEADS)
    header.write_text(header.read_text().replace("r 12 100 1200", "r 12 100 0"))
    os.truncate(header.with_suffix(".dat"), 1 << 28)  # zeros, which no checksum sees and no disk holds
    folder = open_ecg_folder(tmp_path)
    assert folder.entries[0].length == (1 << 28) // 24
    tracemalloc.start()
    try:
        assert inspect_ecg_folder(folder, 10.0, read=True)["usable"] == 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Two blocks of 8 MB with their masks, and 17,384 samples of 12 leads.
    assert peak < 40e6


def test_records_that_do_not_say_their_length_or_checksum(tmp_path: Path) -> None:
    values = twelve(0, 9)
    header = write_record(tmp_path, "r", values, PTBXL_LEADS, checksums=False)
    header.write_text(header.read_text().replace("r 12 100 9", "r 12 100"))
    signals, found = read_signals(header)
    assert found.length is None
    assert found.signals[0].checksum is None
    assert np.array_equal(signals, (values.T / 1000).astype(np.float32))


# broken records ---------------------------------------------------------------------------------------------


@dataclass
class Files:
    """One record of a made-up PTB-XL."""

    root: Path
    hea: Path
    dat: Path

    def replace(self, old: str, new: str) -> None:
        text = self.hea.read_text()
        assert old in text
        self.hea.write_text(text.replace(old, new))

    def rewrite(self, values: np.ndarray, leads: tuple[str, ...] = PTBXL_LEADS) -> None:
        write_record(self.hea.parent, self.hea.stem, values, leads)

    def table(self, old: str, new: str) -> None:
        path = self.root / "ptbxl_database.csv"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))


def nan(files: Files) -> None:
    values = twelve(3, 100)
    values[40:43, 7] = -32768
    files.rewrite(values)


def flat(files: Files) -> None:
    values = twelve(3, 100)
    values[:, 4] = 12
    files.rewrite(values)


def other_sample(files: Files) -> None:
    content = bytearray(files.dat.read_bytes())
    content[24 * 50] ^= 1
    files.dat.write_bytes(bytes(content))


def linked_out(files: Files) -> None:
    outside = files.root.parent / "outside.dat"
    files.dat.rename(outside)
    files.dat.symlink_to(outside)


def linked_folder(files: Files) -> None:
    outside = files.root.parent / "outside"
    files.hea.parent.rename(outside)
    files.hea.parent.symlink_to(outside)


def climbing_header(files: Files) -> None:
    (files.root.parent / "x.dat").write_bytes(files.dat.read_bytes())
    files.replace("00003_lr.dat", "../../../x.dat")


# Name, what is done to record 3, the reason, and whether it shows without reading the signal.
CORRUPTIONS: list[tuple[str, Callable[[Files], object], str, bool]] = [
    ("missing .dat", lambda f: f.dat.unlink(), "00003_lr.dat is missing", True),
    ("missing .hea", lambda f: f.hea.unlink(), "missing: records100/00000/00003_lr.hea and records500", True),
    (
        "truncated",
        lambda f: f.dat.write_bytes(f.dat.read_bytes()[:-1]),
        "00003_lr.dat is truncated: it has 2399 bytes, the header asks for 2400",
        True,
    ),
    ("empty header", lambda f: f.hea.write_text(""), "the header does not begin with a record line", True),
    ("binary header", lambda f: f.hea.write_bytes(bytes(range(256))), "record line|several segments", True),
    ("wrong checksum", other_sample, "another checksum in lead I than its header", False),
    (
        "11 leads",
        lambda f: f.rewrite(twelve(3, 100)[:, :11], PTBXL_LEADS[:11]),
        "it has 11 leads: the leads V6 are missing",
        True,
    ),
    ("two leads of a name", lambda f: f.replace(" AVL", " AVR"), "the leads aVL are missing", True),
    ("NaN", nan, "3 samples are NaN or infinite, in the leads V2", False),
    ("flat lead", flat, "flat: the leads AVL have one value throughout", False),
    ("units", lambda f: f.replace("/mV 16 0", "/mmHg 16 0"), "lead I is in mmHg", True),
    ("unknown label", lambda f: f.table("'PVC': 50.0", "'PVX': 50.0"), "unknown label 'PVX'", True),
    ("no labels", lambda f: f.table("{'PVC': 50.0, 'LVH': 35.0}", "PVC"), "scp_codes must be like", True),
    (
        "code as labels",
        lambda f: f.table("{'PVC': 50.0, 'LVH': 35.0}", "__import__('os').getcwd()"),
        "scp_codes must be like",
        True,
    ),
    ("no fold", lambda f: f.table("'LVH': 35.0}\",2", "'LVH': 35.0}\",x"), "strat_fold must be an integer", True),
    (
        "path that climbs",
        lambda f: f.table("records100/00000/00003_lr", "../outside/00003_lr"),
        r"the path '../outside/00003_lr.hea' leaves the folder",
        True,
    ),
    (
        "absolute path",
        lambda f: f.table("records100/00000/00003_lr", "/etc/passwd"),
        "the path '/etc/passwd.hea' leaves the folder",
        True,
    ),
    ("header that climbs", climbing_header, "the path '../../../x.dat' leaves the folder", True),
    ("link", linked_out, "00003_lr.dat' leaves the folder by a link", True),
    ("folder", lambda f: (f.dat.unlink(), f.dat.mkdir()), "00003_lr.dat is not a file", True),
    ("skew", lambda f: f.replace(".dat 16 ", ".dat 16:3 "), "several samples in a frame or a skew", True),
    ("unknown format", lambda f: f.replace(".dat 16 ", ".dat 99 "), "wfdb cannot read 00003_lr.hea", False),
]


@pytest.mark.parametrize(("damage", "reason", "seen"), [c[1:] for c in CORRUPTIONS], ids=[c[0] for c in CORRUPTIONS])
def test_a_broken_record_is_named_with_the_reason(
    tmp_path: Path, damage: Callable[[Files], object], reason: str, seen: bool
) -> None:
    root = write_ptbxl(tmp_path / "ptbxl")
    hea = root / "records100" / "00000" / "00003_lr.hea"
    damage(Files(root, hea, hea.with_suffix(".dat")))
    folder = open_ecg_folder(root)
    others = ["00001", "00002", "00004"]
    if seen:
        (problem,) = folder.problems
        assert problem.record == "00003"
        assert [entry.name for entry in folder.entries] == others
    else:
        assert folder.problems == []
    # Skipped, and listed.
    dataset = build_ecg_cache(folder, tmp_path / "cache", seconds=1.0)
    assert list(dataset.names) == others
    (problem,) = dataset.problems
    assert problem.record == "00003"
    assert not problem.short
    assert re.search(reason, problem.reason)
    # Fatal where asked, whether a cache is there already or not.
    for place in ("cache", "other"):
        with pytest.raises(BrokenRecordError, match=reason) as error:
            build_ecg_cache(folder, tmp_path / place, seconds=1.0, on_problem="raise")
        assert error.value.problem.record == "00003"
    found = inspect_ecg_folder(folder, 1.0, read=True)
    assert [p["record"] for p in found["problems"]] == ["00003"]
    assert found["usable"] == 3


def test_a_folder_that_links_out_is_refused_for_every_record_in_it(tmp_path: Path) -> None:
    root = write_ptbxl(tmp_path / "ptbxl")
    hea = root / "records100" / "00000" / "00003_lr.hea"
    linked_folder(Files(root, hea, hea.with_suffix(".dat")))
    folder = open_ecg_folder(root)
    assert folder.entries == []
    assert all("leaves the folder by a link" in problem.reason for problem in folder.problems)
    with pytest.raises(ValueError, match=r"no record can be used: record 00001: the path .* leaves the folder"):
        build_ecg_cache(folder, tmp_path / "cache")
    # The folder itself may be reached by a link, and links that stay inside are links like others.
    (tmp_path / "link").symlink_to(write_ptbxl(tmp_path / "sound"))
    inside = tmp_path / "sound" / "records100" / "00000"
    (inside / "00002_lr.dat").rename(inside / "kept.dat")
    (inside / "00002_lr.dat").symlink_to("kept.dat")
    assert open_ecg_folder(tmp_path / "link").problems == []


@pytest.mark.parametrize("path", ["/x", "../x", "a/../../x", "", "c:/x", "..\\x", "a\0b"])
def test_paths_that_leave(tmp_path: Path, path: str) -> None:
    with pytest.raises(RecordError, match="leaves the folder"):
        Root(tmp_path).join(path)


def test_what_changes_between_listing_and_reading_is_seen(tmp_path: Path) -> None:
    root = write_ptbxl(tmp_path / "ptbxl")
    folder = open_ecg_folder(root)
    dat = root / "records100" / "00000" / "00002_lr.dat"
    (root / "records100" / "00000" / "00001_lr.hea").write_text("gone")
    dat.write_bytes(dat.read_bytes()[:100])
    dataset = build_ecg_cache(folder, tmp_path / "cache", seconds=1.0)
    assert list(dataset.names) == ["00003", "00004"]
    assert ["record line" in dataset.problems[0].reason, "truncated" in dataset.problems[1].reason] == [True, True]


def test_headers_of_absurd_size_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "r.hea").write_bytes(b"#" * (2 << 20))
    with pytest.raises(RecordError, match="is no header: it has 2097152 bytes"):
        read_header(tmp_path / "r.hea")
