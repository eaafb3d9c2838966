"""The experiments, small: complete rows, resume, tables; and that the README's code runs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tgdp_fast import GuidanceConfig, Logistic, TrainingConfig
from tgdp_fast.data.digits import load_digits_arrays
from tgdp_fast.fit import guidance as transfer
from tgdp_fast.fit.guidance import GuidanceFit, fit_guidance
from tgdp_fast.lab import figures
from tgdp_fast.lab.experiments import digits, gaussians
from tgdp_fast.lab.tables import RowStore, markdown_table, mean_and_deviation

TINY = TrainingConfig(steps=5, batch_size=32, ema_decay=0.5, warmup=1)
KEYS = ["n", "seed", "method", "sw2", "nll", "average_likelihood", "mmd", "mode_mass", "fit_seconds", "sample_seconds"]


def quick_guidance(*arguments: Any, config: GuidanceConfig | None = None, **keywords: Any) -> GuidanceFit:
    """``fit_guidance`` in a few steps."""
    return fit_guidance(*arguments, config=replace(config or GuidanceConfig(), training=TINY), **keywords)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, quick_ratio: None) -> None:
    """Every fit a few steps long."""
    for module in (gaussians, digits):
        for name in ("train_vanilla", "fine_tune"):
            real = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *a, _real=real, **k: _real(*a, **{**k, "settings": TINY}))
        monkeypatch.setattr(module, "fit_guidance", quick_guidance)


def plan(out: Path, **changes: Any) -> gaussians.Plan:
    settings = {"num_target": (4, 6), "seeds": 2, "num_source": 100, "num_samples": 50, "source_settings": TINY}
    return gaussians.Plan(out, **{**settings, **changes})


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Rows of the simulation that were computed, not found on disk."""
    calls: list[str] = []
    real = gaussians.run_method

    def spy(p: gaussians.Plan, n: int, seed: int, method: str) -> Any:
        calls.append(f"{method} {n} {seed}")
        return real(p, n, seed, method)

    monkeypatch.setattr(gaussians, "run_method", spy)
    return calls


def test_gaussians_writes_every_row_and_resumes(tmp_path: Path, tiny: None, computed: list[str]) -> None:
    pytest.importorskip("matplotlib")
    rows = gaussians.run(plan(tmp_path))
    assert len(rows) == len(computed) == 2 * 2 * len(gaussians.METHODS)
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"environment", "rows"}
    assert all(list(row) == KEYS for row in results["rows"])
    assert {row["method"] for row in results["rows"]} == set(gaussians.METHODS)
    table = (tmp_path / "results.md").read_text()
    assert "| tgdp " in table
    assert "## n = 6" in table
    for name in ("samples.png", "log_ratio.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    # A second run computes nothing; a lost row alone is computed again.
    computed.clear()
    gaussians.run(plan(tmp_path))
    assert computed == []
    RowStore(tmp_path, "").path("n4-seed1-oracle").unlink()
    gaussians.run(plan(tmp_path))
    assert computed == ["oracle 4 1"]


SMALL = {"methods": ("source", "vanilla", "tgdp"), "num_target": (4,), "seeds": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"num_samples": 51},
        {"num_source": 101},
        {"solver": "heun"},
        {"steps": 24},
        {"width": 16},
        {"source_settings": TrainingConfig(steps=6, batch_size=32, ema_decay=0.5, warmup=1)},
    ],
)
def test_rows_of_other_settings_are_not_used(
    tmp_path: Path, tiny: None, computed: list[str], change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []
    real = gaussians.train_denoiser
    monkeypatch.setattr(gaussians, "train_denoiser", lambda x, *a, **k: (trained.append(len(x)), real(x, *a, **k))[1])
    monkeypatch.setattr(gaussians, "plot", lambda p: [])
    gaussians.run(plan(tmp_path, **SMALL))
    gaussians.run(plan(tmp_path, **SMALL))
    assert len(computed) == 3
    gaussians.run(plan(tmp_path, **SMALL, **change))
    assert len(computed) == 6
    # Only what the source model depends on trains it again.
    assert len(trained) == 1 + (set(change) <= {"num_source", "width", "source_settings"})


def test_rows_of_another_recipe_are_not_used(
    tmp_path: Path, tiny: None, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gaussians, "plot", lambda p: [])
    gaussians.run(plan(tmp_path, **SMALL))
    computed.clear()
    with monkeypatch.context() as patch:
        patch.setattr(transfer, "default_training", lambda n: TINY)
        gaussians.run(plan(tmp_path, **SMALL))
        assert computed == ["tgdp 4 0"]
    monkeypatch.setitem(gaussians.VARIANTS, "tgdp", GuidanceConfig(Logistic(0.1)))
    gaussians.run(plan(tmp_path, **SMALL))
    assert computed == ["tgdp 4 0"] * 2


@pytest.mark.parametrize("changes", [{"seeds": 3}, {"jobs": 2}, {"num_target": (4, 5)}, {"methods": ("target",)}])
def test_a_row_does_not_depend_on_what_else_is_run(tmp_path: Path, changes: dict[str, Any]) -> None:
    small = plan(tmp_path, **SMALL)
    other = plan(tmp_path, **{**SMALL, **changes})
    assert other.signature(4, "tgdp") == small.signature(4, "tgdp") != small.signature(4, "source")
    assert other.source_signature() == small.source_signature()


def test_lost_arrays_are_computed_again(tmp_path: Path, tiny: None, computed: list[str]) -> None:
    pytest.importorskip("matplotlib")
    small = plan(tmp_path, **{**SMALL, "seeds": 2})
    gaussians.run(small)
    computed.clear()
    (tmp_path / "samples" / "n4-tgdp-log-ratio.npy").unlink()
    (tmp_path / "samples" / "n4-vanilla.npy").unlink()
    (tmp_path / "samples.png").unlink()
    gaussians.run(small)
    assert computed == ["vanilla 4 0", "tgdp 4 0"]
    assert (tmp_path / "samples.png").is_file()


def test_an_interrupted_row_leaves_no_older_one_beside_its_arrays(
    tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the plan of the older row would plot the arrays of the newer."""
    first = plan(tmp_path, methods=("target",), num_target=(4,), seeds=1)
    gaussians.run(first)

    def interrupted(*_: Any) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gaussians, "sliced_wasserstein", interrupted)
        with pytest.raises(KeyboardInterrupt):
            gaussians.run(plan(tmp_path, methods=("target",), num_target=(4,), seeds=1, num_samples=60))
    gaussians.run(first)
    assert len(np.load(tmp_path / "samples" / "n4-target.npy")) == 50


@pytest.mark.parametrize("experiment", ["gaussians", "digits"])
def test_without_matplotlib_everything_but_the_plots_is_written(
    tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], experiment: str
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    if experiment == "gaussians":
        gaussians.run(plan(tmp_path, **SMALL))
    else:
        pytest.importorskip("sklearn")
        digits.run(digits.Plan(tmp_path, (1, 7), 6, 1, 20, source_settings=TINY, width=16))
    reason = "plots need matplotlib, which is not installed; run: pip install matplotlib"
    assert f"no plots: {reason}" in capsys.readouterr().out
    assert (tmp_path / "results.json").is_file()
    assert (tmp_path / "results.md").is_file()
    assert not list(tmp_path.glob("*.png"))


def test_the_plan_decides_solver_and_steps(tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[str, int]] = []
    real = gaussians.sample
    monkeypatch.setattr(gaussians, "sample", lambda *a, **k: (used.append((k["solver"], k["steps"])), real(*a, **k))[1])
    small = plan(tmp_path, num_source=20, solver="heun", steps=7)
    for method in ("source", "vanilla", "oracle", "oracle/dpmpp_2m"):
        gaussians.run_method(small, 4, 0, method)
    assert used == [("heun", 7)] * 3 + [("dpmpp_2m", 7)]
    # Heun evaluates twice a step, but once in the last one.
    assert "drawn with heun in 13 evaluations" in gaussians.report([], small)
    assert "drawn with dpmpp_3m in 25 evaluations" in gaussians.report([], plan(tmp_path))


def test_the_target_is_measured_against_other_samples(tmp_path: Path) -> None:
    for seed in (0, 1):
        row = gaussians.run_method(plan(tmp_path), 4, seed, "target")
        assert 0.02 < row["sw2"] < 0.5


def test_processes_give_the_rows_of_one_process(tmp_path: Path) -> None:
    changes = {"methods": ("target", "oracle"), "num_target": (4,), "seeds": 2}
    found = []
    for jobs in (1, 2):
        found.append(gaussians.run(plan(tmp_path / str(jobs), jobs=jobs, **changes)))
    for one, two in zip(*found, strict=True):
        for key in ("n", "seed", "method"):
            assert one[key] == two[key]
        assert one["sw2"] == pytest.approx(two["sw2"], rel=1e-5)


@pytest.mark.skipif(os.name != "posix", reason="process groups")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_ends_the_processes_at_once_and_keeps_finished_rows(tmp_path: Path, sent: signal.Signals) -> None:
    """Ctrl-C reaches the whole process group, a kill the main process alone; fits of a minute each are under way."""
    code = f"""
import signal
import sys
from pathlib import Path
from tgdp_fast import GuidanceConfig, Logistic, TrainingConfig
from tgdp_fast.lab.experiments import gaussians

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # A background shell has it ignored.
    tiny = TrainingConfig(steps=5, batch_size=32, ema_decay=0.5, warmup=1)
    plan = gaussians.Plan(Path({str(tmp_path)!r}), (1000,), 4, ("target", "vanilla"), 100, 50, source_settings=tiny,
                          width=256, jobs=2)
    try:
        gaussians.run(plan)
    except KeyboardInterrupt:
        sys.exit(130)
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(script)], start_new_session=True, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        finished = tmp_path / "rows" / "n1000-seed0-target.json"
        deadline = time.monotonic() + 60
        while not finished.is_file():
            assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)  # Into the next fits.
        started = time.monotonic()
        (os.kill if sent == signal.SIGKILL else os.killpg)(process.pid, sent)
        # Standard error closes when the last of the workers, which share it, is gone.
        errors = process.communicate(timeout=20)[1]
        assert process.returncode == (-sent if sent == signal.SIGKILL else 130), errors
        assert time.monotonic() - started < 15  # far less than a fit, on a busy machine too
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert "Traceback" not in errors
    assert json.loads(finished.read_text())["row"]["method"] == "target"
    assert not list((tmp_path / "rows").glob("*vanilla*"))


def test_digits_writes_every_row(tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    small = digits.Plan(tmp_path, (1, 7), 6, 2, 20, source_settings=TINY, width=16)
    rows = digits.run(small)
    assert [row["method"] for row in rows] == list(digits.METHODS) * 2
    for real in (row for row in rows if row["method"] == "real"):
        # Real held-out images of the two digits: the judge knows nearly all of them, they are no copies of the given
        # ones, and one half of them is not the other.
        assert real["target_fraction"] > 0.95
        assert real["nearest_target_distance"] > 1.0
        assert 0.05 < real["sw2"] < min(row["sw2"] for row in rows if row["method"] != "real")
    text = (tmp_path / "results.md").read_text()
    assert "called 1 and 7" in text
    assert "on the 599 held-out ones" in text
    assert (tmp_path / "samples.png").is_file()
    # A second run draws nothing; lost images of the first draw are drawn again.
    drawn: list[str] = []
    real_draw = digits.draw
    monkeypatch.setattr(digits, "draw", lambda *a: (drawn.append(f"{a[3]} {a[4]}"), real_draw(*a))[1])
    digits.run(small)
    assert drawn == []
    (tmp_path / "tgdp.npy").unlink()
    digits.run(small)
    assert drawn == ["tgdp 0"]


def test_digits_rows_and_source_model_have_their_own_signatures(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    first = digits.Plan(tmp_path, (1, 7), 6)
    for changes in ({"digits": (1, 8)}, {"num_target": 8}, {"num_samples": 11}):
        other = digits.Plan(tmp_path, **{"digits": (1, 7), "num_target": 6, **changes})  # type: ignore[arg-type]
        assert other.source_signature() == first.source_signature()
        assert other.signature("source") != first.signature("source")
    for settings in ({"width": 16}, {"source_settings": TINY}):
        other = digits.Plan(tmp_path, (1, 7), 6, **settings)  # type: ignore[arg-type]
        assert other.source_signature() != first.source_signature()
        assert other.signature("source") != first.signature("source")
    assert digits.Plan(tmp_path, (1, 7), 6, seeds=1, progress=True).signature("tgdp") == first.signature("tgdp")


def test_held_out_images_were_seen_by_no_model() -> None:
    pytest.importorskip("sklearn")
    arrays = load_digits_arrays((3, 8), 20, seed=1)
    held_out = {row.tobytes() for row in digits.held_out_images(arrays)}
    wanted = np.isin(arrays.held_out_labels, (3, 8))
    assert held_out == {row.tobytes() for row in arrays.held_out[wanted]}
    assert held_out.isdisjoint(row.tobytes() for row in arrays.source)
    assert held_out.isdisjoint(row.tobytes() for row in arrays.target)
    first, second = digits.halves(arrays, 5)
    assert abs(len(first) - len(second)) <= 1
    parts = [{row.tobytes() for row in half} for half in (first, second)]
    assert parts[0].isdisjoint(parts[1])
    assert parts[0] | parts[1] == held_out
    assert not np.array_equal(digits.halves(arrays, 6)[0], first)


def test_nearest_distance_is_zero_for_copies() -> None:
    generator = np.random.default_rng(0)
    target = generator.normal(size=(7, 64)).astype(np.float32)
    assert digits.nearest_distance(target[[3, 3, 5]], target) == pytest.approx(0.0, abs=0.01)
    images = generator.normal(size=(9, 64)).astype(np.float32)
    exact = np.linalg.norm(images[:, None].astype(np.float64) - target, axis=2).min(1)
    assert digits.nearest_distance(images, target) == pytest.approx(np.median(exact), rel=1e-5)


def test_figures_are_available_with_matplotlib_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    assert figures.available()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not figures.available()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_target": (1,)}, "n must be an integer >= 2"),
        ({"seeds": 0}, "seeds must be"),
        ({"methods": ("tgpd",)}, "methods must be one of .*did you mean 'tgdp'"),
        ({"jobs": 0}, "jobs must be"),
        ({"width": 0}, "width must be"),
        ({"methods": ()}, "methods must not be empty"),
        ({"methods": ("tgdp", "source", "tgdp")}, "methods must not repeat an entry"),
        ({"num_target": ()}, "num_target must not be empty"),
        ({"num_target": (10, 10)}, "num_target must not repeat an entry"),
    ],
)
def test_bad_plans(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(tmp_path, **changes)


def test_mean_and_deviation() -> None:
    assert mean_and_deviation([1.0, 3.0]) == "2.000 ± 1.414"
    assert mean_and_deviation([0.25]) == "0.250"
    assert mean_and_deviation([None, float("nan")]) == "-"


def test_markdown_table_is_aligned() -> None:
    lines = markdown_table(["a", "long"], [["wide cell", "1"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1] == "| --------- | ---- |"


@pytest.mark.parametrize(("name", "module"), [("simulation", gaussians), ("digits", digits)])
def test_pages_quote_the_committed_results(name: str, module: Any) -> None:
    root = Path(__file__).parents[2]
    results = json.loads((root / "docs" / "results" / name / "results.json").read_text())
    assert module.summary(results["rows"]) in (root / "docs" / "reproducing.md").read_text()
    assert re.fullmatch("[0-9a-f]{7,40}", results["environment"]["commit"])  # Of a clean checkout.


def test_readme_quotes_the_committed_results() -> None:
    root = Path(__file__).parents[2]
    rows = json.loads((root / "docs" / "results" / "simulation" / "results.json").read_text())["rows"]
    methods = ("target", "source", "vanilla", "finetune", "tgdp")
    assert gaussians.summary([row for row in rows if row["method"] in methods]) in (root / "README.md").read_text()


def test_readme_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "guidance" / "model.safetensors").is_file()
