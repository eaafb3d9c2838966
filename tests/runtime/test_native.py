"""The compiled extension as an installation meets it: absent, broken, unbuildable."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from native import ROOT, needs_extension, run_with

from tgdp_fast.ops import backend_report
from tgdp_fast.runtime import native

SAMPLE = """
import torch
import tgdp_fast as tgdp
from tgdp_fast.ops import backend_report, mlp_value_and_grad
print(backend_report()["mlp_value_and_grad"]["cpu"])
schedule = tgdp.NoiseSchedule.vp_linear()
from tgdp_fast.models import ScoreMLP
denoiser = tgdp.Denoiser(ScoreMLP((2,), 8, 2), schedule, time_input="half_log_snr")
assert tgdp.sample(denoiser, num=5, steps=2).isfinite().all()
try:
    ones = torch.ones
    mlp_value_and_grad(ones(2, 3), ones(4), [ones(4, 3), ones(1, 4)], [ones(1)], backend="cpu")
except tgdp.BackendUnavailableError as error:
    print(error)
"""


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The package without its extension, outside of the checkout."""
    shutil.copytree(ROOT / "tgdp_fast", tmp_path / "tgdp_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def run(folder: Path, code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_the_extension_everything_works_and_the_reason_is_given(bare: Path) -> None:
    shown = run(bare, SAMPLE)
    assert "the CPU extension is not built; run `pip install --no-build-isolation" in shown
    assert "backend 'cpu' cannot serve operator 'mlp_value_and_grad'" in shown


def test_without_a_compiler_the_reason_names_it(bare: Path) -> None:
    assert "no C++ compiler on PATH; install g++" in run(bare, SAMPLE, PATH=str(bare))


@needs_extension
def test_an_extension_of_another_torch_is_not_fatal(bare: Path) -> None:
    (built,) = (ROOT / "tgdp_fast").glob("_cpu*.so")
    (bare / "tgdp_fast" / built.name).write_bytes(b"no library at all")
    shown = run(bare, SAMPLE)
    assert "the CPU extension was built for another torch or system" in shown


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "csrc").mkdir(exist_ok=True)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    variables = {k: v for k, v in os.environ.items() if not k.startswith("TGDP_")}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**variables, **environment})


@pytest.mark.skipif(sys.platform != "linux", reason="built on Linux only")
def test_a_build_that_fails_says_so_and_does_not_fail_the_installation(bare: Path) -> None:
    (bare / "csrc").mkdir()
    (bare / "csrc" / "bindings.cpp").write_text("this is not C++\n")
    done = build(bare)
    if "no C++ compiler" in done.stderr:
        pytest.skip("no C++ compiler")
    assert done.returncode == 0, done.stderr
    assert "tgdp_fast: the CPU extension is not built: the compiler failed" in done.stderr
    required = build(bare, TGDP_REQUIRE_CPU="1")
    assert required.returncode != 0
    assert "the CPU extension is not built" in required.stderr


def test_no_compiler_and_switched_off(bare: Path) -> None:
    for environment, reason in (
        ({"PATH": str(bare)}, "no C++ compiler"),
        ({"TGDP_BUILD_CPU": "0"}, "TGDP_BUILD_CPU=0"),
    ):
        done = build(bare, **environment)
        assert done.returncode == 0, done.stderr
        if sys.platform == "linux":
            assert f"tgdp_fast: the CPU extension is not built: {reason}" in done.stderr
        assert not list((bare / "tgdp_fast").glob("_cpu*.so"))


def shown_by(code: str) -> str:
    return run_with("import torch\n" + code)


def test_the_reason_for_no_cuda_extension_names_torch() -> None:
    shown = shown_by("torch.version.cuda = None\nfrom tgdp_fast.runtime import native\nprint(native.CUDA_MISSING)")
    assert "needs a torch that was built with CUDA" in shown


def test_the_reason_for_no_cuda_extension_names_what_to_do(bare: Path) -> None:
    code = "import torch\ntorch.version.cuda = '13.0'\nfrom tgdp_fast.runtime import native\n"
    shown = run(bare, code + "print(native.CUDA_MISSING)")
    assert "the CUDA extension needs the CPU extension, which defines its operators: the CPU extension is not" in shown
    # As if the CPU extension were there.
    code += "native.CPU_MISSING = None\nprint(native._load_cuda())"
    assert "no CUDA toolkit; install CUDA 13.0" in run(
        bare, code, PATH=os.path.dirname(shutil.which("c++") or ""), CUDA_HOME=""
    )
    assert "the CUDA extension is not built; run `pip install" in run(bare, code, CUDA_HOME="somewhere")
    (bare / "tgdp_fast" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"no library at all")
    assert "the CUDA extension was built for another torch or system" in run(bare, code)


def test_cuda_operators_give_the_reason() -> None:
    report = backend_report()
    for operator in ("guided_step", "mlp_value_and_grad", "long_convolution"):
        assert report[operator]["cuda"] == (native.CUDA_MISSING or "available")
    assert "no derivative" in report["mlp_value_and_grad_backward"]["cuda"]


@pytest.mark.skipif(sys.platform != "linux", reason="built on Linux only")
def test_the_cuda_extension_is_optional_unless_required(bare: Path) -> None:
    off = build(bare, TGDP_BUILD_CPU="0", TGDP_BUILD_CUDA="0")
    assert off.returncode == 0, off.stderr
    assert "tgdp_fast: the CUDA extension is not built: TGDP_BUILD_CUDA=0" in off.stderr
    required = build(bare, TGDP_BUILD_CPU="0", TGDP_BUILD_CUDA="0", TGDP_REQUIRE_CUDA="1")
    assert required.returncode != 0
    assert "the CUDA extension is not built: TGDP_BUILD_CUDA=0" in required.stderr
