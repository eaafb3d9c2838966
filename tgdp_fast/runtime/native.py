"""The compiled extensions: loaded once, when the operators are imported, or the reason why one is missing."""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

import torch

from tgdp_fast.runtime import fakes

#: Command that builds it, in the environment whose torch is used. pip would keep and reuse what it built for another.
BUILD_COMMAND = "pip install --no-build-isolation --no-deps --no-cache-dir --force-reinstall"


_FOLDER = Path(__file__).resolve().parents[1]
#: What setup.py leaves about extensions that it did not build: {"CPU": reason}.
_NOT_BUILT = _FOLDER / "_not_built.json"
#: What csrc/operators.h writes into an extension: the torch it was compiled against, and the GPU architectures.
_STAMP = re.compile(rb"tgdp_fast was built for torch (\d+\.\d+)(?: and GPU architectures ([\w.+]*))?\0")


def build_command() -> str:
    """The command that builds what is installed again."""
    if (_FOLDER.parent / "setup.py").is_file():
        return f"{BUILD_COMMAND} -e ."
    try:
        origin = json.loads(metadata.distribution("tgdp_fast").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        origin = {}
    if version := origin.get("vcs_info"):
        return f"{BUILD_COMMAND} '{version['vcs']}+{origin['url']}@{version['commit_id']}'"
    return f"{BUILD_COMMAND} PATH_OF_A_CHECKOUT"


_ADVICE = f"run `{build_command()}`"


def _load(kind: str) -> str | None:
    """Load the extension of this kind if it was built for this torch; otherwise return what to do."""
    path = _FOLDER / f"_{kind.lower()}.abi3.so"
    if not path.is_file():
        return _why_not_built(kind)
    # Before it is loaded: with another torch that may end the process.
    stamp = _stamp(path)
    here = ".".join(torch.__version__.split(".")[:2])
    if stamp is None:
        return f"the {kind} extension was built for another torch or system (it does not say for which); {_ADVICE}"
    if stamp[0] != here:
        return f"the {kind} extension was built for torch {stamp[0]}, and this is torch {here}; {_ADVICE}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        reason = str(error).splitlines()[0].rpartition(": ")[2]
        return f"the {kind} extension was built for another torch or system ({reason}); {_ADVICE}"
    fakes.register(kind)
    return None


def _stamp(path: Path) -> tuple[str, tuple[str, ...]] | None:
    """Torch's minor version that an extension was built for, and the GPU architectures; None for any other file."""
    if path.stat().st_size == 0:
        return None
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = _STAMP.search(content)
        if found is None:
            return None
        return found[1].decode(), tuple((found[2] or b"").decode().split("_"))


def _why_not_built(kind: str) -> str:
    if sys.platform != "linux":
        return f"the {kind} extension is built on Linux only, and this is {sys.platform}"
    if shutil.which("c++") is None and shutil.which("g++") is None:
        return f"the {kind} extension is not built: no C++ compiler on PATH; install g++ and ninja and {_ADVICE}"
    if kind == "CUDA" and shutil.which("nvcc") is None and not os.environ.get("CUDA_HOME"):
        return (
            f"the CUDA extension is not built: no CUDA toolkit; install CUDA {torch.version.cuda}, set CUDA_HOME "
            f"to it and {_ADVICE}"
        )
    try:
        why = f" (not built at the last installation: {json.loads(_NOT_BUILT.read_text())[kind]})"
    except (OSError, ValueError, LookupError, TypeError):
        why = ", with --verbose to see why it fails"
    return f"the {kind} extension is not built; {_ADVICE}{why}"


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return f"the CUDA extension needs a torch that was built with CUDA, and {torch.__version__} was not"
    if CPU_MISSING is not None:
        return f"the CUDA extension needs the CPU extension, which defines its operators: {CPU_MISSING}"
    return _load("CUDA")


def _architectures() -> tuple[str, ...]:
    stamp = None if CUDA_MISSING is not None else _stamp(_FOLDER / "_cuda.abi3.so")
    return () if stamp is None else stamp[1]


#: None if the CPU extension is loaded, else why not and what to do.
CPU_MISSING = _load("CPU")

#: The same for the CUDA extension, whether or not a GPU is visible.
CUDA_MISSING = _load_cuda()

#: GPU architectures that the CUDA extension has kernels for, as TORCH_CUDA_ARCH_LIST names them; none without it.
CUDA_ARCHITECTURES = _architectures()


def cpu_capability() -> str | None:
    """Instruction set of the CPU kernels, or None without the extension; TGDP_CPU_CAPABILITY lowers it."""
    return None if CPU_MISSING is not None else str(torch.ops.tgdp_fast.cpu_capability())
