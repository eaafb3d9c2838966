"""Every CUDA source compiles for the shipped architectures without spills, within the limits of a block."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin"))
SOURCES = sorted(path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
# Instructions of tensor cores must appear in these.
TENSOR_CORES = {"mlp_value_and_grad.cu", "trajectory.cu", "trajectory_cluster.cu"}
# Those of clusters in these, which have empty kernels for architectures before.
CLUSTERS = {"trajectory_cluster.cu"}
# The most static shared memory; what kernels ask for at launch is checked against the device by the launchers.
STATIC_SHARED = 48 * 1024

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH or in CUDA_HOME")


@functools.cache
def supported() -> set[str]:
    shown = subprocess.run([str(NVCC), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return set(shown.split())


def disassembler() -> str | None:
    """cuobjdump of the toolkit, or the one that comes with Triton."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        beside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(beside) if os.access(beside, os.X_OK) else None
    return found


def check(source: str, architecture: str, folder: Path) -> None:
    if f"sm_{architecture.rstrip('a')}" not in supported():
        pytest.skip(f"this nvcc has no sm_{architecture}")
    cubin = folder / "kernels.cubin"
    command = [str(NVCC), "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v", "-Werror"]
    command += ["all-warnings", str(ROOT / "csrc" / "cuda" / source), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", done.stderr)]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert registers
    assert max(registers) <= 255
    assert spills
    # On Blackwell one number of one of its kernels is stored and read twice.
    allowed = {("4", "8")} if (source, architecture) == ("mlp_value_and_grad.cu", "100") else set()
    assert set(spills) - allowed == {("0", "0")}
    assert all(int(number) <= STATIC_SHARED for number in re.findall(r"(\d+) bytes smem", done.stderr))
    if source in CLUSTERS and int(architecture.rstrip("a")) < 90:
        assert max(registers) < 16
        return
    if source in TENSOR_CORES and (tool := disassembler()) is not None:
        shown = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
        instructions = ["HMMA.16816.F32.BF16", "HMMA.16816.F32 ", "LDSM", "LDGSTS"]
        # The barrier of a cluster.
        instructions += ["UCGABAR_ARV", "UCGABAR_WAIT"] if source in CLUSTERS else []
        for instruction in instructions:
            assert instruction in shown.stdout


@pytest.mark.slow(ci=True)
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")
def test_bindings_are_valid(tmp_path: Path) -> None:
    """Against the headers of this torch and this toolkit; they can only be linked with a torch that has CUDA."""
    headers = Path(torch.__file__).parent / "include"
    planned = subprocess.run(
        [str(NVCC), "--dryrun", "-c", str(ROOT / "csrc" / "cuda" / SOURCES[0])], capture_output=True, text=True
    )
    top = re.search(r"^#\$ TOP=(.*)$", planned.stderr, re.MULTILINE)
    toolkit = Path(top[1] if top else "") / "include"
    if not (headers / "c10" / "cuda" / "CUDAGuard.h").is_file() or not (toolkit / "cuda_runtime_api.h").is_file():
        pytest.skip("this torch or toolkit comes without its headers for CUDA")
    # Written when a torch with CUDA is built.
    made = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    made.parent.mkdir(parents=True)
    made.write_text("#define C10_CUDA_BUILD_SHARED_LIBS\n")
    command = ["g++", "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{tmp_path}"]
    folders = (headers, headers / "torch" / "csrc" / "api" / "include", toolkit, sysconfig.get_paths()["include"])
    command += [part for folder in folders for part in ("-isystem", str(folder))]
    done = subprocess.run([*command, str(ROOT / "csrc" / "cuda_bindings.cpp")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_there_are_sources() -> None:
    assert "guided_step.cu" in SOURCES
    assert set(SOURCES) >= TENSOR_CORES


def cases() -> list[Any]:
    """Quick: what compiles in seconds. In CI also each source for Hopper, and the small ones for all generations.

    The PTX of the large ones differs in its target alone, and each takes minutes: they are left to --run-slow=all.
    """
    found = []
    for source in SOURCES:
        for architecture in ("80", "86", "90a", "100"):
            large = source in TENSOR_CORES
            # The long convolution has two dozen kernels: there its first and its last generation.
            in_ci = architecture == "90a" or (not large and (source != "long_convolution.cu" or architecture == "80"))
            marks = [] if not large and architecture == "90a" else [pytest.mark.slow(ci=in_ci)]
            found.append(pytest.param(source, architecture, marks=marks))
    return found


@pytest.mark.parametrize(("source", "architecture"), cases())
def test_compiles(source: str, architecture: str, tmp_path: Path) -> None:
    check(source, architecture, tmp_path)
