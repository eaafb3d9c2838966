"""Damaged and hostile files of every format: read, or refused by a documented error; never anything else.

All are read in one process with little memory and a limit of time for each file: see reader_process.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import HOSTILE
from reader_process import MEMORY

HERE = Path(__file__).parent
KINDS = ("npy", "npz", "config", "safetensors", "torch", "toml", "bench", "hea", "table", "mat", "dat")
#: For each kind of file.
FEW, MANY = 40, 400


def outcomes(place: Path, mutations: int, *only: str) -> dict[str, Any]:
    """What the process reports."""
    paths = [str(HERE), str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    subprocess.run(
        [
            sys.executable,
            str(HERE / "reader_process.py"),
            str(place / "files"),
            str(place / "r.json"),
            str(mutations),
            *only,
        ],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
    )
    found: dict[str, Any] = json.loads((place / "r.json").read_text())
    return found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return outcomes(tmp_path_factory.mktemp("fuzz"), FEW)


def faults(found: dict[str, Any], chosen: Callable[[str], bool] = lambda name: True) -> list[str]:
    return [
        f"{one['name']} {one['number']}: {one['error']}"
        for one in found["outcomes"]
        if one["outcome"] == "fault" and chosen(one["name"])
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_changed_files_are_read_or_refused(report: dict[str, Any], kind: str) -> None:
    assert not faults(report, lambda name: name.split("/")[0] == kind)
    counts = Counter(one["outcome"] for one in report["outcomes"] if one["name"].split("/")[0] == kind)
    assert counts.total() >= FEW // 2
    assert counts["refused"] or kind in ("hea", "mat", "dat"), "the changes reach the reader"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_read_or_refused(report: dict[str, Any], name: str) -> None:
    assert not faults(report, lambda other: other == f"hostile: {name}")


def test_no_code_runs_and_memory_is_bounded(report: dict[str, Any]) -> None:
    assert not report["exploded"]
    assert report["peak"] < MEMORY


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_changed_files_are_read_or_refused(tmp_path: Path, kind: str) -> None:
    found = outcomes(tmp_path, MANY, kind)
    assert not faults(found)
    assert not found["exploded"]
    assert found["peak"] < MEMORY
