"""The compiled extension as an installation meets it: absent, broken, unbuildable."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
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
MISSING = "print(n.CPU_MISSING)"


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The package without its extension, outside of the checkout."""
    shutil.copytree(ROOT / "tgdp_fast", tmp_path / "tgdp_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "tgdp_fast" / "_not_built.json").unlink(missing_ok=True)
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
    for content in (b"no library at all", b""):
        (bare / "tgdp_fast" / "_cpu.abi3.so").write_bytes(content)
        assert "the CPU extension was built for another torch or system" in run(bare, SAMPLE)


HERE = ".".join(torch.__version__.split(".")[:2])


@needs_extension
def test_an_extension_of_another_torch_is_refused_before_it_is_loaded(bare: Path) -> None:
    built = (ROOT / "tgdp_fast" / "_cpu.abi3.so").read_bytes()
    stamp = f"tgdp_fast was built for torch {HERE}".encode()
    assert built.count(stamp + b"\0") == 1
    for other in ("1.99", HERE + "1"):
        # What follows may be anything: it is not loaded.
        (bare / "tgdp_fast" / "_cpu.abi3.so").write_bytes(stamp.replace(HERE.encode(), other.encode()) + b"\0")
        shown = run(bare, SAMPLE)
        assert f"the CPU extension was built for torch {other}, and this is torch {HERE}; run `pip install" in shown
        assert "--no-cache-dir" in shown


@needs_extension
def test_a_library_with_the_right_stamp_that_cannot_be_loaded_is_not_fatal(bare: Path) -> None:
    (bare / "tgdp_fast" / "_cpu.abi3.so").write_bytes(f"tgdp_fast was built for torch {HERE}\0".encode())
    assert "the CPU extension was built for another torch or system" in run(bare, SAMPLE)


def test_extensions_of_earlier_versions_are_left_alone(bare: Path) -> None:
    (bare / "tgdp_fast" / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"no library at all")
    assert "the CPU extension is not built" in run(bare, SAMPLE)


@needs_extension
def test_the_extension_asks_for_nothing_outside_of_the_limited_api() -> None:
    program = shutil.which("nm")
    if program is None:
        pytest.skip("no nm")
    command = [program, "--dynamic", "--undefined-only", str(ROOT / "tgdp_fast" / "_cpu.abi3.so")]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1].split("@")[0] for line in listed.splitlines()]
    assert [name for name in names if name.startswith(("Py", "_Py"))] == ["PyModule_Create2"]


def test_the_reason_at_the_installation_is_known_afterwards(bare: Path) -> None:
    reason = "torch could not be imported while it was built (No module named 'torch')"
    (bare / "tgdp_fast" / "_not_built.json").write_text(json.dumps({"CPU": reason}))
    assert f"(not built at the last installation: {reason})" in run(bare, SAMPLE)
    for damaged in ("", "[]", "{}", "{"):
        (bare / "tgdp_fast" / "_not_built.json").write_text(damaged)
        assert "with --verbose to see why it fails" in run(
            bare, "from tgdp_fast.runtime import native as n\n" + MISSING
        )


def test_the_first_use_without_the_extension_warns_once(bare: Path) -> None:
    def stderr(code: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=bare,
            env={**os.environ, "PYTHONPATH": str(bare), **environment},
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    shown = stderr(SAMPLE)
    assert shown.count("tgdp_fast computes with plain PyTorch on this cpu") == 1
    assert "the CPU extension is not built" in shown
    assert "plain PyTorch" not in stderr(SAMPLE, TGDP_BACKEND="reference")
    assert "plain PyTorch" not in stderr("import tgdp_fast.ops")


def build(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "csrc").mkdir(exist_ok=True)
    command = (sys.executable, "setup.py", "--quiet", *(command or ("build_ext", "--inplace")))
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
    noted = json.loads((bare / "tgdp_fast" / "_not_built.json").read_text())
    assert noted["CPU"].startswith("the compiler failed")
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


@pytest.mark.skipif(sys.platform != "linux", reason="built on Linux only")
def test_a_build_without_torch_says_so_in_what_is_installed(bare: Path) -> None:
    """As pip builds it in isolation."""
    (bare / "hidden").mkdir()
    (bare / "hidden" / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    done = build(bare, "build", "--build-lib", "built", PYTHONPATH=str(bare / "hidden"))
    assert done.returncode == 0, done.stderr
    assert "torch could not be imported" in run(bare / "built", SAMPLE)


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
    (bare / "tgdp_fast" / "_cuda.abi3.so").write_bytes(b"no library at all")
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
