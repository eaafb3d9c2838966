from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
from pathlib import Path

import numpy
import pytest
import torch

from tgdp_fast._version import __version__
from tgdp_fast.runtime import info as _info
from tgdp_fast.runtime.info import environment

X86 = """\
processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Some Processor @ 2.00GHz: rev 2
flags\t\t: fpu vme avx avx2 fma amx_tile avx512f avx512_bf16 unknown_flag
bugs\t\t: spectre_v1 sve

processor\t: 1
model name\t: Another
flags\t\t: fpu avx512_fp16
"""
ARM = """\
processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd sve bf16 i8mm
CPU implementer\t: 0x41
"""


def git(folder: Path, *arguments: str) -> str:
    settings = ["user.name=tester", "user.email=tester@example.invalid"]
    settings += ["commit.gpgsign=false", "tag.gpgsign=false"]
    options = [option for setting in settings for option in ("-c", setting)]
    command = ["git", "-C", str(folder), *options, *arguments]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()


def test_states_versions_and_threads():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        facts = environment()
    finally:
        torch.set_num_threads(before)
    assert facts["torch_threads"] == 1
    assert facts["torch"] == torch.__version__
    assert facts["numpy"] == numpy.__version__
    assert facts["python"] == platform.python_version()
    assert facts["tgdp_fast"] == __version__
    assert facts["machine"] == platform.machine()
    assert facts["cpu_count"] >= 1
    assert facts["cpu"]


def test_survives_json_and_reveals_neither_paths_nor_names():
    facts = environment()
    text = json.dumps(facts)
    assert json.loads(text) == facts
    assert "/" not in json.dumps({**facts, "cpu": ""})  # a name of a CPU may contain one; nothing else may
    words = set(re.split(r"[^\w.-]+", text))
    assert platform.node() not in words
    assert Path.home().name not in words


def test_instruction_sets_agree_with_what_torch_found():
    sets = set(environment()["instruction_sets"])
    if not sets:
        pytest.skip("this system does not tell its instruction sets")
    capability = torch.backends.cpu.get_cpu_capability()  # torch asks the CPU itself
    if capability.startswith(("AVX2", "AVX512")):
        assert {"avx", "avx2", "fma"} <= sets
    if capability.startswith("AVX512"):
        assert "avx512f" in sets


def test_cpuinfo_of_the_first_cpu_is_read():
    assert _info._parse_cpuinfo(X86) == (
        "Some Processor @ 2.00GHz: rev 2",
        ["avx", "fma", "avx2", "avx512f", "avx512_bf16", "amx_tile"],
    )
    assert _info._parse_cpuinfo(ARM) == ("", ["asimd", "i8mm", "bf16", "sve"])
    assert _info._parse_cpuinfo("") == ("", [])


def test_the_cpu_has_a_name_where_cpuinfo_is_missing(monkeypatch: pytest.MonkeyPatch):
    def refuse(*arguments: object, **options: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", refuse)
    cpu, sets = _info._cpu()
    assert cpu
    assert sets == []


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_is_that_of_the_checkout(tmp_path: Path):
    assert _info._commit(tmp_path) is None  # no checkout
    git(tmp_path, "init", "--quiet")
    assert _info._commit(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    git(tmp_path, "tag", "-a", "v1", "-m", "v1")  # a tag must not take the place of the hash
    head = git(tmp_path, "rev-parse", "HEAD")
    assert re.fullmatch("[0-9a-f]{40}", head)
    assert _info._commit(tmp_path) == head
    (tmp_path / "untracked").write_text("")
    assert _info._commit(tmp_path) == head
    (tmp_path / "file").write_text("two")
    assert _info._commit(tmp_path) == head + "-dirty"
    inside = tmp_path / "site-packages"
    inside.mkdir()
    assert _info._commit(inside) is None  # somebody else's checkout


def test_commit_is_none_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _info._commit(tmp_path) is None
    assert environment()["commit"] is None


def test_describes_the_cuda_device(monkeypatch: pytest.MonkeyPatch):
    class Properties:
        name = "Some Card"
        major, minor = 9, 0
        total_memory = 80 * 2**30

    assert (environment()["cuda"] is not None) == torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    assert environment()["cuda"] == {
        "version": torch.version.cuda,
        "device": "Some Card",
        "capability": "9.0",
        "memory_gib": 80.0,
        "device_count": 2,
    }


BACKENDS = {
    "guided_step": {"cuda": "no toolkit", "triton": "no GPU", "cpu": "available", "reference": "available"},
    "residual_block_": {"cuda": "none of it", "triton": "no GPU", "cpu": "available", "reference": "available"},
}
KERNELS = {"cpu_kernels": "avx512_bf16"}


VERSIONS = {"tgdp_fast": "1.2", "torch": "2.13.0", "python": "3.12.1"}


def described(backends: dict[str, dict[str, str]] = BACKENDS, everything: bool = True, **changes: object) -> list[str]:
    facts = environment() | {"cuda": None, "commit": None} | KERNELS | VERSIONS | changes
    return _info.describe({"environment": facts, "backends": backends}, everything=everything).splitlines()


def test_info_begins_with_the_kernels_and_the_gpu():
    assert described()[:2] == ["CPU kernels: yes, avx512_bf16; GPU: none", ""]
    without = "CPU kernels: no, plain PyTorch instead (why: see below); GPU: none"
    assert described(cpu_kernels=None)[0] == without
    card = {"version": "12.8", "device": "Some Card", "capability": "9.0", "memory_gib": 80.0, "device_count": 2}
    assert described(cuda=card)[0].endswith("GPU: Some Card, kernels: none, plain PyTorch instead (why: see below)")
    both = {"guided_step": dict.fromkeys(BACKENDS["guided_step"], "available")}
    assert described(both, cuda=card)[0].endswith("; GPU: Some Card, kernels: cuda and triton")
    line = "cuda               version 12.8, device Some Card, capability 9.0, memory_gib 80.0, device_count 2"
    assert line in described(both, cuda=card)


def test_info_has_a_line_for_each_operator_and_each_reason_once():
    assert described(everything=False)[2:] == [
        "guided_step                  cpu               without cuda [1], triton [2]",
        "residual_block               cpu               without cuda [3], triton [2]",
        "",
        "[1] no toolkit",
        "[2] no GPU",
        "[3] none of it",
        "",
        "tgdp_fast 1.2, torch 2.13.0, Python 3.12.1",
    ]
    card = {"version": "12.8", "device": "Some Card", "capability": "9.0", "memory_gib": 80.0, "device_count": 2}
    there = dict.fromkeys(("cuda", "triton", "cpu", "reference"), "available")
    none = "this installation has no such implementation of the operator"
    report = {"all": there, "plain": {**dict.fromkeys(there, none), "reference": "available"}}
    report["half"] = {**there, "cpu": "not built", "cuda": none}
    assert described(report, everything=False, cuda=card)[2:-2] == [
        "all                          cuda, cpu",
        "plain                        reference",
        "half                         triton, reference without cpu [1]",
        "",
        "[1] not built",
    ]
    # Built, without a GPU to run on.
    assert described({"all": there}, everything=False)[2:-2] == ["all                          cpu"]


def test_info_says_where_the_choice_of_auto_was_measured():
    card = {"version": "12.8", "device": "NVIDIA Ada", "capability": "8.9", "memory_gib": 48.0, "device_count": 1}
    for everything in (True, False):
        text = described(cuda=card, measured_on="H200", everything=everything)[1]
        assert text.startswith(
            "The choice of auto among the backends of a GPU was measured on an H200, not on this NVIDIA"
        )
        assert not described(cuda=card | {"device": "NVIDIA H200 NVL"}, measured_on="H200", everything=everything)[1]
        assert not described(measured_on="H200", everything=everything)[1]


def test_info_is_written_for_people():
    lines = described(instruction_sets=[])
    assert lines[2].split() == ["system", platform.system()]
    assert "residual_block" in lines
    assert "  cpu        available" in lines
    text = "\n".join(lines)
    for word in ("None", "residual_block_"):
        assert word not in text
    assert "commit             not run from a git checkout" in lines
    assert "cuda               no GPU that torch can use" in lines
    assert "instruction_sets   not known" in lines
    assert "cpu_kernels        none" in described(cpu_kernels=None)


def test_info_describes_this_installation():
    from tgdp_fast.ops import backend_report
    from tgdp_fast.runtime.native import cpu_capability

    facts = environment() | KERNELS | {"cpu_kernels": cpu_capability()}
    text = _info.describe({"environment": facts, "backends": backend_report()}, everything=True)
    assert text.startswith("CPU kernels: ")
    assert "None" not in text
    for operator in backend_report():
        assert f"\n{operator.rstrip('_')}\n" in text
