"""Packages that are missing, broken, or miss others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tgdp_fast.runtime.optional import optional, require


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where packages of a test are put; they are forgotten after it."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


def test_a_package_is_imported(folder: Path) -> None:
    (folder / "some_package").mkdir()
    (folder / "some_package" / "part.py").write_text("answer = 42")
    assert optional("some_package.part", "questions need").answer == 42
    require(["json", "some_package.part"], "questions need")


@pytest.mark.parametrize(
    ("module", "package"), [("wfdb", "wfdb"), ("sklearn.metrics", "scikit-learn"), ("scipy.io", "scipy")]
)
def test_a_missing_package_is_named_as_pip_names_it(monkeypatch: pytest.MonkeyPatch, module: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, module.split(".")[0], None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    expected = f"^records need {package}, which is not installed; run: pip install {package}$"
    with pytest.raises(ImportError, match=expected):
        optional(module, "records need")


def test_a_package_that_misses_another_one_names_that(folder: Path) -> None:
    (folder / "some_package.py").write_text("import absent_package.part")
    text = r"^it needs some_package, which cannot be imported \(No module .*\); run: pip install absent_package$"
    with pytest.raises(ImportError, match=text):
        optional("some_package", "it needs")


def test_a_broken_package_is_to_be_installed_anew(folder: Path) -> None:
    (folder / "some_package.py").write_text("raise ImportError('undefined symbol: f')")
    text = r"^it needs some_package, which cannot be imported \(undefined symbol: f\); run: pip install some_package$"
    with pytest.raises(ImportError, match=text):
        optional("some_package", "it needs")


def test_all_that_are_missing_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sklearn", "neurokit2"):
        monkeypatch.setitem(sys.modules, name, None)
    text = "^this run needs scikit-learn, neurokit2, not installed here; run: pip install scikit-learn neurokit2$"
    with pytest.raises(ImportError, match=text):
        require(["json", "sklearn", "neurokit2", "sklearn"], "this run needs")
