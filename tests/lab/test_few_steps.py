"""The experiment on few steps, small: complete rows, resume, what its measures measure."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import few_steps
import numpy as np
import pytest
from ecg_files import write_record

from tgdp_fast import TrainingConfig
from tgdp_fast.ecg.records.leads import STORED_LEADS
from tgdp_fast.ecg.records.synthetic import synthetic_ecg

SMALL = (few_steps.REAL, "dpmpp_2m/20/standard/fp32", "dpmpp_2m/20/gaussian/fp32", "dpmpp_2m/20/standard/bf16")


def plan(out: Path, **changes: Any) -> few_steps.Plan:
    settings = {
        "seeds": 2,
        "num_samples": 12,
        "methods": SMALL,
        "num_train": 60,
        "num_reference": 50,
        "length": 20,
        "num_res_layers": 1,
        "res_channels": 4,
        "d_state": 4,
        "settings": TrainingConfig(steps=4, batch_size=8, ema_decay=0.5, warmup=1),
    }
    return few_steps.Plan(out, **(settings | changes))


def test_every_row_is_written_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = few_steps.run(plan(tmp_path))
    written = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["seed"], row["method"]) for row in written] == [(s, m) for s in range(2) for m in SMALL]
    assert [row["evaluations"] for row in rows] == [0, 20, 20, 20] * 2
    assert all(np.isfinite(value) for row in rows for value in row.values() if not isinstance(value, str))
    text = (tmp_path / "results.md").read_text()
    assert "alpha_bar_T = 0.132" in text
    assert "## bf16 less fp32" in text
    computed: list[str] = []
    real = few_steps.run_method
    monkeypatch.setattr(few_steps, "run_method", lambda *a: (computed.append(f"{a[5]} {a[4]}"), real(*a))[1])
    monkeypatch.setattr(few_steps, "train_denoiser", None)
    few_steps.run(plan(tmp_path))
    assert computed == []
    next((tmp_path / "rows").glob("seed1-real*")).unlink()
    few_steps.run(plan(tmp_path))
    assert computed == ["1 real"]
    few_steps.run(plan(tmp_path, num_samples=13, seeds=1, methods=(few_steps.REAL,)))
    assert computed == ["1 real", "0 real"]


def test_records_take_the_place_of_synthetic_signals(tmp_path: Path) -> None:
    folder = tmp_path / "records"
    folder.mkdir()
    for number in range(2):
        values = (1000 * synthetic_ecg(1, 60 + number, seed=number)[0].T).astype(np.int16)
        write_record(folder, f"{number}_lr", values, STORED_LEADS)
    write_record(folder, "0_hr", np.zeros((300, 8), np.int16), STORED_LEADS, rate=500)
    windows, count = few_steps.record_windows(folder, 20)
    assert windows.shape == (2 * (1 + 40 // 2), 8, 20)
    assert count == 2
    assert np.array_equal(windows[1], synthetic_window(0, 2, 22))
    signals = few_steps.load_signals(plan(tmp_path, records=folder))
    assert signals.train is signals.reference
    assert np.allclose(signals.train.std(axis=(0, 2)), 1.0, rtol=1e-4)
    assert signals.fresh(5, 1).shape == (5, 8, 20)
    with pytest.raises(ValueError, match="records must be a folder with WFDB records at 100 Hz"):
        few_steps.record_windows(tmp_path / "none", 20)


def synthetic_window(seed: int, start: int, stop: int) -> np.ndarray:
    values = (1000 * synthetic_ecg(1, 60 + seed, seed=seed)[0]).astype(np.int16)
    return values[:, start:stop].astype(np.float32) / 1000


def test_measures_know_what_is_wrong() -> None:
    reference, train, other = (synthetic_ecg(300, 32, seed=seed) for seed in range(3))

    def measure(x: np.ndarray) -> dict[str, float]:
        return few_steps.measure(x.astype(np.float32), few_steps.Signals(train, reference, synthetic_window, ""))

    same, scaled, louder = measure(other), measure(1.5 * other), measure(1.5 * reference)
    assert same["principal_variance"] == pytest.approx(1.0, abs=0.15)
    assert scaled["principal_variance"] == pytest.approx(2.25 * same["principal_variance"], rel=1e-5)
    assert scaled["lead_std"] == pytest.approx(0.5, abs=0.1)
    assert louder["spectrum_db"] == pytest.approx(20 * np.log10(1.5), rel=1e-5)
    exact = measure(reference)
    assert exact["lead_std"] == exact["spectrum_db"] == exact["sw2"] == 0.0
    assert exact["principal_variance"] == pytest.approx(1.0, rel=1e-6)
    for name in ("sw2", "mmd", "lead_std", "spectrum_db"):
        assert scaled[name] > 2 * same[name]
    assert measure(train)["nearest"] == pytest.approx(0.0, abs=0.01)
    assert same["nearest"] > 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "seeds must be"),
        ({"num_samples": 2}, "num_samples must be"),
        ({"methods": ("ddpm/200/gaussian/fp16",)}, "methods must be one of"),
        ({"methods": ()}, "methods must not be empty"),
    ],
)
def test_bad_plans(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(tmp_path, **changes)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plans: list[few_steps.Plan] = []

    def pretend(given: few_steps.Plan) -> None:
        plans.append(given)
        (given.out / "results.md").write_text("a table")

    monkeypatch.setattr(few_steps, "run", pretend)
    command = ["--out", str(tmp_path), "--quiet"]
    few_steps.main(command)
    few_steps.main([*command, "--seeds", "2", "--num", "20", "--records", "r", "--methods", "real"])
    assert "a table" in capsys.readouterr().out
    assert plans[0] == few_steps.Plan(tmp_path)
    assert plans[1] == few_steps.Plan(tmp_path, Path("r"), 2, 20, ("real",))
    with pytest.raises(SystemExit, match="2"):
        few_steps.main([*command, "--methods", "reel"])
    assert "did you mean 'real'" in capsys.readouterr().err


def test_the_committed_results_say_what_the_texts_say() -> None:
    folder = Path(__file__).parents[2] / "docs" / "results"
    for name in ("few_steps", "few_steps_ptbxl"):
        assert re.fullmatch(
            "[0-9a-f]{40}", json.loads((folder / name / "results.json").read_text())["environment"]["commit"]
        )
    rows = json.loads((folder / "few_steps" / "results.json").read_text())["rows"]

    def values(method: str, key: str) -> np.ndarray:
        return np.array([row[key] for row in rows if row["method"] == method])

    sw2 = {method: f"{values(method, 'sw2').mean():.2f}" for method in few_steps.METHODS}
    assert sw2[few_steps.REAL] == "0.13"
    for solver, found in {"ddpm/200": ("0.68", "0.40", "0.13"), "dpmpp_2m/20": ("0.68", "0.33", "0.13")}.items():
        assert tuple(sw2[f"{solver}/{prior}/fp32"] for prior in few_steps.PRIORS) == found
        assert values(f"{solver}/standard/fp32", "lead_std").mean() == pytest.approx(2 / 3, abs=0.02)
    nearest = {name: values(f"{name}/20/empirical/fp32", "nearest").mean() for name in ("dpmpp_2m", "dpmpp_2m_sde")}
    real = values(few_steps.REAL, "nearest").mean()
    assert nearest["dpmpp_2m"] < 0.85 * real < 0.95 * real < nearest["dpmpp_2m_sde"]
    for prior in few_steps.PRIORS:
        for key in ("sw2", "mmd", "principal_variance", "lead_std", "spectrum_db", "nearest"):
            single, half = (values(f"dpmpp_2m/20/{prior}/{precision}", key) for precision in ("fp32", "bf16"))
            assert abs((half - single).mean()) < single.std(ddof=1)
