"""The compiled extensions: loaded once, when the operators are imported, or the reason why one is missing."""

from __future__ import annotations

import importlib.machinery
import os
import shutil
import sys
from pathlib import Path

import torch

#: Command that builds it, in the environment whose torch is used.
BUILD_COMMAND = "pip install --no-build-isolation --no-deps --force-reinstall"


_FOLDER = Path(__file__).resolve().parents[1]
_ADVICE = f"run `{BUILD_COMMAND} {'-e .' if (_FOLDER.parent / 'setup.py').is_file() else 'tgdp_fast'}`"


def _load(kind: str) -> str | None:
    """Load the extension of this kind if it was built here; otherwise return what to do."""
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    found = [path for suffix in suffixes if (path := _FOLDER / f"_{kind.lower()}{suffix}").is_file()]
    if not found:
        if sys.platform != "linux":
            return f"the {kind} extension is built on Linux only, and this is {sys.platform}"
        if shutil.which("c++") is None and shutil.which("g++") is None:
            return f"the {kind} extension is not built: no C++ compiler on PATH; install g++ and ninja and {_ADVICE}"
        if kind == "CUDA" and shutil.which("nvcc") is None and not os.environ.get("CUDA_HOME"):
            return (
                f"the CUDA extension is not built: no CUDA toolkit; install CUDA {torch.version.cuda}, set CUDA_HOME "
                f"to it and {_ADVICE}"
            )
        return f"the {kind} extension is not built; {_ADVICE}, with --verbose to see why it fails"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        reason = str(error).splitlines()[0].rpartition(": ")[2]
        return f"the {kind} extension was built for another torch or system ({reason}); {_ADVICE}"
    return None


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return f"the CUDA extension needs a torch that was built with CUDA, and {torch.__version__} was not"
    if CPU_MISSING is not None:
        return f"the CUDA extension needs the CPU extension, which defines its operators: {CPU_MISSING}"
    return _load("CUDA")


#: None if the CPU extension is loaded, else why not and what to do.
CPU_MISSING = _load("CPU")

#: The same for the CUDA extension, whether or not a GPU is visible.
CUDA_MISSING = _load_cuda()


def cpu_capability() -> str | None:
    """Instruction set of the CPU kernels, or None without the extension; TGDP_CPU_CAPABILITY lowers it."""
    return None if CPU_MISSING is not None else str(torch.ops.tgdp_fast.cpu_capability())
