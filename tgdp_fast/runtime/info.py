"""Facts about the machine and the software, for result files and ``tgdp-fast info``."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy
import torch

from tgdp_fast._version import __version__

# Flags that determine which numeric code runs; x86 first, then Arm. Spelled as in Linux.
_INSTRUCTION_SETS = (
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16",
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme",
)  # fmt: skip


#: Backends that serve tensors on a GPU and on the CPU, the fastest first.
_BY_DEVICE = (("cuda", "triton", "reference"), ("cpu", "reference"))
#: What a report says of a backend that an operator does not have anywhere.
_NO_SUCH = "this installation has no such implementation of the operator"


def environment() -> dict[str, Any]:
    """Return the facts that measurements depend on, as JSON-able values.

    Returns:
        ``system`` and ``machine`` (type of CPU), ``cpu`` (its model), ``instruction_sets`` (list of
        str; empty if the system does not report them), ``cpu_count`` (logical CPUs this process may use),
        ``torch_threads``; the versions ``python``, ``torch``, ``numpy`` and ``tgdp_fast``; ``commit`` (of the
        checkout the package runs from, with ``-dirty`` appended if tracked files differ from it; None outside
        a git checkout); ``cuda`` (None, or a dict with ``version``, ``device``, ``capability``,
        ``memory_gib`` and ``device_count``).

    The result contains no paths, host names or user names, so it can be published.
    """
    cpu, instruction_sets = _cpu()
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": cpu,
        "instruction_sets": instruction_sets,
        "cpu_count": _usable_cpus(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "tgdp_fast": __version__,
        "commit": _commit(Path(__file__).resolve().parents[2]),
        "cuda": _cuda(),
    }


def describe(facts: dict[str, dict[str, Any]], *, everything: bool = True) -> str:
    """Text of ``tgdp-fast info``: a summary in one line, then every fact, or a line for each operator.

    Args:
        facts: "environment", of :func:`environment` with ``cpu_kernels`` and, optionally, ``measured_on``, the card on
            which the choice of "auto" was measured; and "backends", of :func:`tgdp_fast.ops.backend_report`.
        everything: every fact, and the state of every backend of each operator; otherwise a line for each operator,
            the reasons why backends are missing, each once, and the versions.
    """
    environment, backends = facts["environment"], facts["backends"]
    lines = [_in_one_line(environment, backends), *_on_another_card(environment), ""]
    if not everything:
        versions = f"tgdp_fast {environment['tgdp_fast']}, torch {environment['torch']}, Python {environment['python']}"
        return "\n".join([*lines, *_by_operator(environment, backends), "", versions])
    for name, value in environment.items():
        lines.append(f"{name:18s} {_shown(name, value)}")
    for operator, states in backends.items():
        lines += ["", operator.rstrip("_")]  # the underscore marks an in-place operator
        lines += [f"  {backend:10s} {state}" for backend, state in states.items()]
    return "\n".join(lines)


def _by_operator(environment: dict[str, Any], backends: dict[str, dict[str, str]]) -> list[str]:
    """What "auto" considers first for each operator, and the reasons why not more, each once."""
    reasons: dict[str, int] = {}
    lines = []
    for operator, states in backends.items():
        found = [name for name, state in states.items() if state == "available"]
        if environment["cuda"] is None and "cuda" in found:
            found.remove("cuda")  # built, but for no GPU that is here
        first = [
            next((name for name in found if name in kinds), "") for kinds in _BY_DEVICE[environment["cuda"] is None :]
        ]
        missing = [
            f"{name} [{reasons.setdefault(state, len(reasons) + 1)}]"
            for name, state in states.items()
            if state != "available" and state != _NO_SUCH
        ]
        line = f"{operator.rstrip('_'):28s} {', '.join(dict.fromkeys(filter(None, first)))}"
        lines.append(f"{line:46s} {'without ' + ', '.join(missing) if missing else ''}".rstrip())
    return [*lines, "", *(f"[{number}] {reason}" for reason, number in reasons.items())] if reasons else lines


def _on_another_card(environment: dict[str, Any]) -> list[str]:
    cuda, measured = environment["cuda"], environment.get("measured_on")
    if cuda is None or measured is None or measured in cuda["device"]:
        return []
    return [
        f"The choice of auto among the backends of a GPU was measured on an {measured}, not on this {cuda['device']}: "
        "`tgdp-fast bench` shows which is faster here, and --backend or TGDP_BACKEND takes it"
    ]


def _in_one_line(environment: dict[str, Any], backends: dict[str, dict[str, str]]) -> str:
    kernels = environment["cpu_kernels"]
    cpu = f"yes, {kernels}" if kernels else "no, plain PyTorch instead (why: see below)"
    cuda, gpu = environment["cuda"], "none"
    if cuda is not None:
        found = [name for name in ("cuda", "triton") if any(b.get(name) == "available" for b in backends.values())]
        gpu = f"{cuda['device']}, kernels: {' and '.join(found) or 'none, plain PyTorch instead (why: see below)'}"
    return f"CPU kernels: {cpu}; GPU: {gpu}"


def _shown(name: str, value: Any) -> str:
    if value is None:
        return {"cuda": "no GPU that torch can use", "commit": "not run from a git checkout"}.get(name, "none")
    if isinstance(value, dict):
        return ", ".join(f"{key} {each}" for key, each in value.items() if each is not None)
    if isinstance(value, list):
        return " ".join(value) or "not known"
    return str(value)


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux; in a container or under taskset, fewer than the machine has
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu() -> tuple[str, list[str]]:
    """Return the model and the instruction sets of the CPU."""
    try:
        model, instruction_sets = _parse_cpuinfo(Path("/proc/cpuinfo").read_text(errors="replace"))
    except OSError:  # not Linux
        model, instruction_sets = "", []
    return model or platform.processor() or platform.machine(), instruction_sets


def _parse_cpuinfo(text: str) -> tuple[str, list[str]]:
    """Return model and instruction sets of the first CPU in the text of ``/proc/cpuinfo``."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, separator, value = line.partition(":")
        if separator:
            fields.setdefault(name.strip().lower(), value.strip())
    flags = set(fields.get("flags", fields.get("features", "")).split())  # x86, Arm
    return fields.get("model name", ""), [name for name in _INSTRUCTION_SETS if name in flags]


def _commit(root: Path) -> str | None:
    """Return the commit checked out in ``root``, or None if that is not the top folder of a git checkout.

    For a copy without history, the environment variable TGDP_COMMIT gives the commit.
    """
    if os.environ.get("TGDP_COMMIT"):
        return os.environ["TGDP_COMMIT"]
    top = _git(root, "rev-parse", "--show-toplevel")
    # A package installed inside another project's checkout (e.g. in its .venv) must not report that commit.
    if top is None or Path(top).resolve() != root.resolve():
        return None
    return _git(root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(root: Path, *arguments: str) -> str | None:
    # Ignore the variables of a git hook, which name another repository, and do not refresh the index of the checkout.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    variables["GIT_OPTIONAL_LOCKS"] = "0"
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            check=True,
            text=True,
            timeout=10,
            env=variables,
        )
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, no commit yet
        return None
    return done.stdout.strip() or None


def _cuda() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "version": torch.version.cuda,
        "device": device.name,
        "capability": f"{device.major}.{device.minor}",
        "memory_gib": round(device.total_memory / 2**30, 1),
        "device_count": torch.cuda.device_count(),
    }
