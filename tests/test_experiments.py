"""The experiments, small: complete rows, resume, tables; and that the README's code runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tgdp_fast import Optimisation
from tgdp_fast.experiments import digits, gaussians
from tgdp_fast.experiments.results import RowStore, markdown_table, mean_and_deviation

TINY = Optimisation(steps=5, batch_size=32, ema_decay=0.5, warmup=1)
KEYS = ["n", "seed", "method", "sw2", "nll", "average_likelihood", "mmd", "mode_mass", "fit_seconds", "sample_seconds"]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, quick_ratio: None) -> None:
    """Every fit a few steps long."""
    for module in (gaussians, digits):
        for name in ("train_vanilla", "fine_tune", "fit_guidance"):
            real = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *a, _real=real, **k: _real(*a, **{**k, "settings": TINY}))


def plan(out: Path, **changes: Any) -> gaussians.Plan:
    settings = {"num_target": (4, 6), "seeds": 2, "num_source": 100, "num_samples": 50, "source_settings": TINY}
    return gaussians.Plan(out, **{**settings, **changes})


def test_gaussians_writes_every_row_and_resumes(tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    rows = gaussians.run(plan(tmp_path))
    assert len(rows) == 2 * 2 * len(gaussians.METHODS)
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
    calls: list[str] = []
    real = gaussians.run_method
    monkeypatch.setattr(gaussians, "run_method", lambda p, n, s, m: (calls.append(m), real(p, n, s, m))[1])
    gaussians.run(plan(tmp_path))
    assert calls == []
    RowStore(tmp_path, "").path("n4-seed1-oracle").unlink()
    gaussians.run(plan(tmp_path))
    assert calls == ["oracle"]
    # Rows of other settings are not mixed in.
    gaussians.run(plan(tmp_path, num_samples=51, methods=("target",), num_target=(4,), seeds=1))
    assert calls == ["oracle", "target"]


def test_digits_writes_every_row(tmp_path: Path, tiny: None) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    rows = digits.run(digits.Plan(tmp_path, (1, 7), 6, 1, 20, source_settings=TINY, width=16))
    assert [row["method"] for row in rows] == list(digits.METHODS)
    real = rows[0]
    # Real held-out images of the two digits: the judge knows nearly all of them.
    assert real["target_fraction"] > 0.95
    assert "called 1 and 7" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "samples.png").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_target": (1,)}, "n must be an integer >= 2"),
        ({"seeds": 0}, "seeds must be"),
        ({"methods": ("tgpd",)}, "methods must be one of .*did you mean 'tgdp'"),
        ({"jobs": 0}, "jobs must be"),
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


def test_readme_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "guidance" / "model.safetensors").is_file()
