"""The compiled extension: loaded once, when the operators are imported, or a reason why it is not there."""

from __future__ import annotations

import importlib.machinery
import shutil
import sys
from pathlib import Path

import torch

#: What a user runs to build it, in the environment whose torch is to be used.
BUILD_COMMAND = "pip install --no-build-isolation --no-deps --force-reinstall"


def _load() -> str | None:
    folder = Path(__file__).resolve().parent
    found = [path for suffix in importlib.machinery.EXTENSION_SUFFIXES if (path := folder / f"_cpu{suffix}").is_file()]
    where = "-e ." if (folder.parent / "setup.py").is_file() else "tgdp_fast"
    advice = f"run `{BUILD_COMMAND} {where}`"
    if not found:
        if sys.platform != "linux":
            return f"the CPU extension is built on Linux only, and this is {sys.platform}"
        if shutil.which("c++") is None and shutil.which("g++") is None:
            return f"the CPU extension is not built: no C++ compiler on PATH; install g++ and ninja and {advice}"
        return f"the CPU extension is not built; {advice}, with --verbose to see why it fails"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        reason = str(error).splitlines()[0].rpartition(": ")[2]
        return f"the CPU extension was built for another torch or system ({reason}); {advice}"
    return None


#: None where the extension is loaded, else why not and what to do.
CPU_MISSING = _load()


def cpu_capability() -> str | None:
    """Instruction set of the CPU kernels, or None without the extension; TGDP_CPU_CAPABILITY lowers it."""
    return None if CPU_MISSING is not None else str(torch.ops.tgdp_fast.cpu_capability())
