"""The experiment on label shift, small: complete rows, resume, what its measures measure, real files read."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import label_shift
import numpy as np
import pytest
import rhythm_beats
from ecg_files import real_data
from label_shift import Draw, Rate, corrected_share, divide, mixture
from rhythm_beats import Beats, cut_beats, load_rhythm_beats

from tgdp_fast import GuidanceConfig, TrainingConfig
from tgdp_fast.ecg.records.leads import STORED_LEADS
from tgdp_fast.ecg.records.synthetic import synthetic_ecg, synthetic_ecg_with_rates
from tgdp_fast.fit.guidance import GuidanceFit, fit_guidance

TINY = TrainingConfig(steps=3, batch_size=16, ema_decay=0.5, warmup=1)


def plan(out: Path, **changes: Any) -> label_shift.Plan:
    settings = {
        "seeds": 2,
        "num_samples": 12,
        "num_target": 20,
        "num_components": 5,
        "width": 8,
        "source_settings": TINY,
        "classifier_settings": TINY,
        "folds": 2,
    }
    return label_shift.Plan(out, **(settings | changes))


def made_up(records: int = 12, each: int = 7, seed: int = 0) -> Beats:
    """Beats that R peaks were not looked for: those of AF have no bump before R."""
    generator = np.random.default_rng(seed)
    number = np.repeat(np.arange(2 * records), each)
    fibrillation = number >= records
    time = np.arange(rhythm_beats.LENGTH) - rhythm_beats.BEFORE
    bump = np.exp(-0.5 * ((time + 16) / 3) ** 2) * ~fibrillation[:, None]
    x = np.exp(-0.5 * (time / 3) ** 2) + 0.3 * bump + 0.05 * generator.standard_normal((len(number), len(time)))
    x = x - x.mean(axis=1, keepdims=True)
    return Beats((x / x.std(axis=1, keepdims=True)).astype(np.float32), number, fibrillation)


def quick_guidance(*arguments: Any, config: GuidanceConfig | None = None, **keywords: Any) -> GuidanceFit:
    """``fit_guidance`` in a few steps."""
    return fit_guidance(*arguments, config=replace(config or GuidanceConfig(), training=TINY), **keywords)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fit a few steps long, and no R peaks to look for."""
    for name in ("train_vanilla", "fine_tune", "fit_density_ratio"):
        real = getattr(label_shift, name)
        monkeypatch.setattr(label_shift, name, lambda *a, _real=real, **k: _real(*a, **{**k, "settings": TINY}))
    monkeypatch.setattr(label_shift, "fit_guidance", quick_guidance)
    monkeypatch.setattr(rhythm_beats, "synthetic_rhythm_beats", lambda num: made_up())


def test_every_row_is_written_and_resumed(tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    rows = label_shift.run(plan(tmp_path))
    written = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert written == rows
    assert [(row["seed"], row["method"]) for row in rows] == [(s, m) for s in range(2) for m in label_shift.METHODS]
    computed: list[str] = []
    real = label_shift.run_method
    monkeypatch.setattr(label_shift, "run_method", lambda p, d, m: (computed.append(f"{d.seed} {m}"), real(p, d, m))[1])
    for name in ("train_denoiser", "fit_guidance"):
        monkeypatch.setattr(label_shift, name, None)
    label_shift.run(plan(tmp_path))
    assert computed == []
    next((tmp_path / "rows").glob("seed1-source.json")).unlink()
    again = label_shift.run(plan(tmp_path))
    assert computed == ["1 source"]
    assert [{**row, "cpu_seconds": 0} for row in again] == [{**row, "cpu_seconds": 0} for row in rows]
    monkeypatch.setattr(rhythm_beats, "synthetic_rhythm_beats", lambda num: made_up(seed=1))
    with pytest.raises(TypeError):  # Other beats: the source model is to be trained again.
        label_shift.run(plan(tmp_path))


def test_a_judge_of_two_rhythms_is_right(tmp_path: Path) -> None:
    """Rhythms that differ in a bump six times the noise: no error but in few beats, and shares as they were mixed."""
    pytest.importorskip("sklearn")
    settings = TrainingConfig(steps=60, batch_size=32, learning_rate=3e-3, ema_decay=0.9, warmup=5)
    drawn = Draw(plan(tmp_path, classifier_settings=settings), made_up(24), 0)
    network, true_positive, false_positive = drawn.verdict
    assert true_positive.value > 0.95
    assert false_positive.value < 0.05
    for beats, share in ((drawn.source, 0.1), (drawn.target, 0.6), (drawn.real, 0.6)):
        called = Rate.of(drawn.calls(network, drawn.seen(beats)), beats.records)
        assert corrected_share(called, true_positive, false_positive).value == pytest.approx(share, abs=0.06)
    # Statements of beats that their classifiers did not see.
    source, target = label_shift.statement_logits(drawn)
    assert ((source > 0) == drawn.source.fibrillation).mean() > 0.9
    assert ((target > 0) == drawn.target.fibrillation).mean() > 0.9


def test_records_are_divided_and_mixed(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    beats = made_up(12, 7)
    parts = divide(beats, np.random.default_rng(0))
    assert [len(np.unique(part.records)) for part in parts] == [8, 10, 6]
    assert sorted(np.concatenate([np.unique(part.records) for part in parts])) == list(range(24))
    assert [part.fibrillation.mean() for part in parts] == [0.5] * 3
    drawn = Draw(plan(tmp_path), beats, 0)
    assert (len(drawn.target), drawn.target.fibrillation.sum()) == (20, 12)
    # 35 beats of SNR are nine tenths of 38.
    assert (len(drawn.source), drawn.source.fibrillation.sum()) == (38, 4)
    assert not set(drawn.source.records) & set(drawn.target.records)
    assert set(drawn.reference.records) <= set(drawn.judge.records)
    assert not set(drawn.judge.records) & (set(drawn.held_out.records))
    # As many components as needed give back what they were fitted to.
    full = Draw(plan(tmp_path, num_components=37), beats, 0)
    assert np.allclose(full.seen(full.source), full.source.signals, atol=1e-4)
    assert np.allclose(full.encode(full.source).std(axis=0, ddof=1), 1.0, atol=1e-4)
    other = Draw(plan(tmp_path), beats, 1)
    assert set(other.judge.records) != set(drawn.judge.records)
    whole = mixture(beats, 0.5, None, np.random.default_rng(0), "x")
    assert len(whole) == len(beats)


def test_errors_of_shares() -> None:
    """Against the standard deviation of shares that are estimated again and again."""
    generator = np.random.default_rng(0)
    # 10 records of 5 beats each that are alike: 10 independent calls.
    calls, records = np.repeat([1.0, 0.0], [15, 35]), np.repeat(np.arange(10), 5)
    assert Rate.of(calls).error == pytest.approx(np.sqrt(0.3 * 0.7 / 50))
    assert Rate.of(calls, records).error == pytest.approx(np.sqrt(0.3 * 0.7 / 10))
    p, t, f, counts = 0.6, 0.9, 0.1, (400, 300, 200)
    shares, errors = [], []
    for _ in range(2000):
        rates = [
            Rate.of((generator.random(count) < rate).astype(float))
            for count, rate in zip(counts, (p * t + (1 - p) * f, t, f), strict=True)
        ]
        found = corrected_share(*rates)
        shares.append(found.value)
        errors.append(found.error)
    # 2,000 estimates: their mean is known to 0.0008 and their deviation to 1.6 %; the estimator's own bias is of the
    # order of the squared error, 0.001.
    assert np.mean(shares) == pytest.approx(p, abs=0.004)
    assert np.mean(errors) == pytest.approx(np.std(shares), rel=0.08)
    assert np.isnan(corrected_share(Rate(0.5, 0.1), Rate(0.4, 0.1), Rate(0.4, 0.1)).value)


def row(method: str, seed: int, share: float, sw2: float) -> dict[str, Any]:
    numbers = dict.fromkeys(("called", "true_positive", "false_positive"), 0.5)
    return {"method": method, "seed": seed, "share": share, "share_error": 0.03, "sw2": sw2, "mmd": sw2 / 100} | numbers


@pytest.mark.parametrize(("shares", "verdict", "singles"), [((0.5, 0.72), "within", 1), ((0.3, 0.4), "not within", 0)])
def test_findings_say_what_the_rows_say(
    tmp_path: Path, shares: tuple[float, float], verdict: str, singles: int
) -> None:
    rows = [row(method, seed, 0.6, 0.1) for seed in range(2) for method in label_shift.METHODS]
    for entry in rows:
        if entry["method"] == "tgdp":
            entry |= {"share": shares[entry["seed"]], "sw2": (0.05, 0.11)[entry["seed"]]}
        entry |= {"samples": 12, "cpu_seconds": 1.0}
    shared, finetune, vanilla = label_shift.findings(rows, plan(tmp_path))
    assert f"{sum(shares) / 2:.1%} in the mean" in shared
    assert f"%: {verdict} ten points. Single seeds within ten points: {singles} of 2." in shared
    assert "SW2 0.08 against 0.1: better (better in 1 of 2 seeds)" in finetune
    assert "0 points: worse (better in 0 of 2 seeds)" in vanilla
    text = label_shift.report(rows, plan(tmp_path), made_up())
    assert f"| {shares[0]:.1%} ± 3.0%" in text
    assert "12 records of AF and 12 of SNR (168 beats), all synthetic" in text


def write_records(folder: Path, signals: dict[str, np.ndarray], labels: dict[str, str], **changes: Any) -> None:
    """The form of real records: int16 with a scale for each, and a table."""
    folder.mkdir(parents=True, exist_ok=True)
    scale = np.array([np.abs(x).max() / 32767 for x in signals.values()])
    length = np.array([len(x) for x in signals.values()])
    arrays = {
        "data": np.concatenate(
            [np.round(x / s).astype(np.int16) for x, s in zip(signals.values(), scale, strict=True)]
        ),
        "offset": np.cumsum(length) - length,
        "length": length,
        "scale": scale,
        "record": np.array(list(signals)),
    }
    np.savez(folder / "some.npz", **(arrays | changes))
    with open(folder / "records.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["record", "file", "n_samples", "labels"])
        writer.writeheader()
        writer.writerows({"record": name, "file": "some.npz", "labels": label} for name, label in labels.items())


def lead_i(num: int, seed: int, fibrillation: bool = False, seconds: int = 12) -> np.ndarray:
    x = synthetic_ecg(num, 500 * seconds, rate=500.0, seed=seed, fibrillation=fibrillation)
    return x[:, STORED_LEADS.index("I")]


def test_beats_are_cut_at_r_peaks_of_the_records_that_are_wanted(tmp_path: Path) -> None:
    pytest.importorskip("neurokit2")
    signals = dict(zip("abc", lead_i(3, 0), strict=True)) | dict(zip("de", lead_i(2, 1, True), strict=True))
    labels = {"d": "AF", "a": "SNR", "b": "AF|RBBB", "c": "SNR", "e": "PVC"}
    write_records(tmp_path, signals, labels)
    beats = load_rhythm_beats(tmp_path)
    assert beats.signals.shape[1] == rhythm_beats.LENGTH
    assert beats.signals.dtype == np.float32
    counts = np.bincount(beats.records)
    assert len(counts) == 3  # d, a, c
    assert counts.min() >= 5
    assert counts.max() <= rhythm_beats.MOST_BEATS
    assert [bool(beats.fibrillation[beats.records == k].all()) for k in range(3)] == [True, False, False]
    assert np.allclose(beats.signals.mean(axis=1), 0, atol=1e-5)
    assert np.allclose(beats.signals.std(axis=1), 1, atol=1e-5)
    # Of 0.2 s around the middle the largest deflection is R, or S, which follows by four samples.
    near = slice(rhythm_beats.BEFORE - 10, rhythm_beats.BEFORE + 11)
    peak = np.abs(beats.signals[:, near]).argmax(axis=1) - 10
    assert (np.abs(peak) <= 5).all()
    assert (np.abs(peak) <= 1).mean() > 0.5
    # Scale and offset of a record say nothing.
    louder = cut_beats([(5 * signals["a"] + 3, False), (signals["d"], True)])
    quiet = cut_beats([(signals["a"], False), (signals["d"], True)])
    assert np.allclose(louder.signals, quiet.signals, atol=1e-3)
    # A lead without a beat gives none.
    assert len(cut_beats([(np.zeros(6000), False), (signals["a"], False), (signals["d"], True)])) == len(quiet)
    with pytest.raises(ValueError, match="records must have beats of SNR, but none was found"):
        cut_beats([(np.zeros(6000), False), (signals["d"], True)])


def test_beats_of_real_records() -> None:
    pytest.importorskip("neurokit2")
    records = rhythm_beats.read_rhythm_records(real_data("icbeb2018_lead_I"))
    assert sum(fibrillation for _, fibrillation in records) == 198
    assert len(records) == 198 + 184
    chosen = [record for rhythm in (True, False) for record in [r for r in records if r[1] == rhythm][:4]]
    beats = cut_beats(chosen)
    counts = np.bincount(beats.records)
    # Records of 8 s and more, 40 to 200 beats a minute.
    assert len(counts) == 8
    assert counts.min() >= 4
    # R, in the middle, is what all beats of a record have in common: their mean is largest there.
    for number in range(8):
        mean = np.abs(beats.signals[beats.records == number].mean(axis=0))
        assert abs(int(mean.argmax()) - rhythm_beats.BEFORE) <= 6


def test_fibrillation_has_no_p_waves_and_irregular_beats() -> None:
    regular, rates = synthetic_ecg_with_rates(40, 1000, seed=3)
    assert np.array_equal(regular, synthetic_ecg(40, 1000, seed=3, fibrillation=False))
    irregular, _ = synthetic_ecg_with_rates(40, 1000, seed=3, fibrillation=True)

    def measures(x: np.ndarray) -> tuple[float, float]:
        """Median height of P above what is before it, in mV, and median coefficient of variation of intervals."""
        heights, variations = [], []
        for lead in x[:, STORED_LEADS.index("I")]:
            above = lead > 0.6 * lead.max()
            peaks = np.flatnonzero(above[1:-1] & (lead[1:-1] >= lead[:-2]) & (lead[1:-1] > lead[2:])) + 1
            peaks = peaks[np.diff(peaks, prepend=-100) > 25]
            heights += [lead[p - 18 : p - 10].max() - np.median(lead[p - 30 : p - 22]) for p in peaks if p > 30]
            variations.append(np.diff(peaks).std() / np.diff(peaks).mean())
        return float(np.median(heights)), float(np.median(variations))

    (p_regular, cv_regular), (p_irregular, cv_irregular) = measures(regular), measures(irregular)
    assert p_irregular < 0.6 * p_regular
    assert cv_regular < 0.08 < 0.12 < cv_irregular < 0.3
    # To the last sample there are beats, whatever the intervals.
    long = synthetic_ecg(30, 1500, seed=0, fibrillation=True)[:, STORED_LEADS.index("I")]
    assert (long[:, -200:].max(axis=1) > 0.5 * long.max(axis=1)).mean() > 0.9


def damaged(name: str) -> Callable[[Path], None]:
    signals, labels = {"a": lead_i(1, 0)[0], "d": lead_i(1, 1, True)[0]}, {"a": "SNR", "d": "AF"}
    columns = "record,labels\na,SNR\n"
    cases: dict[str, Callable[[Path], Any]] = {
        "no table": lambda folder: (folder / "records.csv").unlink(),
        "columns": lambda folder: (folder / "records.csv").write_text(columns),
        "rhythm": lambda folder: write_records(folder, signals, {"a": "SNR"}),
        "lost": lambda folder: write_records(folder, signals, labels | {"z": "AF"}),
        "outside": lambda folder: write_records(folder, signals, labels, length=np.array([6000, 6001])),
        "no number": lambda folder: write_records(folder, signals, labels, scale=np.array([1.0, np.nan])),
        "no file": lambda folder: (folder / "some.npz").write_bytes(b"none"),
        "array": lambda folder: np.savez(folder / "some.npz", data=np.zeros(3)),
        "leaves": lambda folder: (folder / "records.csv").write_text("record,file,labels\na,../x,SNR\nd,../x,AF\n"),
    }

    def damage(folder: Path) -> None:
        write_records(folder, signals, labels)
        cases[name](folder)

    return damage


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no table", "records must be a folder with records.csv"),
        ("columns", "must have the columns record, file, labels; it lacks file"),
        ("rhythm", "must have records with the one label AF, it has none"),
        ("lost", "names 1 records that its files lack, the first is 'z'"),
        ("outside", "record d lies outside the 12000 samples of data"),
        ("no number", "record d has values that are not finite"),
        ("no file", "must be an .npz file with data, offset"),
        ("array", "must be an .npz file with data, offset"),
        ("leaves", "must name files beside it, got '../x'"),
    ],
)
def test_bad_folders(tmp_path: Path, case: str, message: str) -> None:
    damaged(case)(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_rhythm_beats(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "seeds must be"),
        ({"num_samples": 2}, "num_samples must be"),
        ({"num_target": 3}, "num_target must be"),
        ({"folds": 1}, "folds must be"),
        ({"target_share": 1.0}, "target_share must be"),
    ],
)
def test_bad_plans(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(tmp_path, **changes)


def test_more_beats_than_there_are(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match="the target mixture needs 60 beats of AF for 100 at a share of 0.6, and its"):
        Draw(plan(tmp_path, num_target=100), made_up(), 0)
    with pytest.raises(ValueError, match="at least four of AF to be divided in three, got 3"):
        Draw(plan(tmp_path), made_up(3), 0)
    with pytest.raises(ValueError, match="num_components must be at most 38, got 39"):
        Draw(plan(tmp_path, num_components=39), made_up(), 0)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plans: list[label_shift.Plan] = []

    def pretend(given: label_shift.Plan) -> None:
        plans.append(given)
        (given.out / "results.md").write_text("a table")

    monkeypatch.setattr(label_shift, "run", pretend)
    command = ["--out", str(tmp_path), "--quiet"]
    label_shift.main(command)
    label_shift.main([*command, "--seeds", "2", "--num", "20", "--records", "r", "--n", "30"])
    assert "a table" in capsys.readouterr().out
    assert plans[0] == label_shift.Plan(tmp_path, num_components=label_shift.SYNTHETIC_COMPONENTS)
    assert plans[1] == label_shift.Plan(tmp_path, Path("r"), 2, 20, 30)
    with pytest.raises(SystemExit, match="2"):
        label_shift.main([*command, "--n", "1"])
    assert "num_target must be" in capsys.readouterr().err


def test_the_committed_results_say_what_their_text_says() -> None:
    folder = Path(__file__).parents[2] / "docs" / "results" / "label_shift"
    content = json.loads((folder / "results.json").read_text())
    assert re.fullmatch("[0-9a-f]{40}", content["environment"]["commit"])
    rows, text = content["rows"], (folder / "results.md").read_text()
    assert [(row["seed"], row["method"]) for row in rows] == [(s, m) for s in range(3) for m in label_shift.METHODS]
    for paragraph in label_shift.findings(rows, label_shift.Plan(folder)):
        assert paragraph in text
    shares = [row["share"] for row in rows if row["method"] == "tgdp"]
    assert abs(np.mean(shares) - 0.6) <= label_shift.TOLERANCE
    for row in rows:
        called, true, false = (
            Rate(row[name], row.get(f"{name}_error", 0.0)) for name in ("called", "true_positive", "false_positive")
        )
        assert row["share"] == pytest.approx(corrected_share(called, true, false).value)
        assert f"{row['share']:.1%} ± {row['share_error']:.1%}" in text
