"""Runs that are killed, that share a folder, or whose disk is full: right results or a refusal, and nothing left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]


def outcome(place: Path, *arguments: str) -> Any:
    """What tests/runs_at_once.py prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    script = [sys.executable, str(TESTS / "runs_at_once.py"), *arguments]
    done = subprocess.run(script, cwd=place, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


every = pytest.mark.slow(ci=False)


@pytest.mark.parametrize(("strides", "least"), [(("37", "6"), 3), pytest.param(("1", "1"), 15, marks=every)])
def test_killed_at_any_change_of_files_it_ends_the_same(tmp_path: Path, strides: tuple[str, str], least: int) -> None:
    for found in outcome(tmp_path, "kills", *strides).values():
        assert found["wrong"] == []
        assert found["points"] >= least


@pytest.mark.parametrize("rounds", ["10", pytest.param("200", marks=every)])
def test_two_runs_never_mix_in_one_file(tmp_path: Path, rounds: str) -> None:
    found = outcome(tmp_path, "race", rounds)
    assert found.pop("left") == 0
    assert set(found) <= {"both", "one refused"}
    assert sum(found.values()) == int(rounds)


@pytest.mark.parametrize("count", ["10", pytest.param("300", marks=every)])
def test_saves_of_one_folder_wait_for_each_other(tmp_path: Path, count: str) -> None:
    found = outcome(tmp_path, "saves", count)
    assert found == {"statuses": [0] * 5, "files": ["done", "model"]}
