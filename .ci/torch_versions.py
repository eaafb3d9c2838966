"""Compiles the sources that use torch against other versions of it, and looks up what they need in its libraries.

usage: torch_versions.py VERSION...

Nothing of these versions runs: only the headers and two libraries are taken out of their wheels, so that several GB
of CUDA libraries need not be installed. The sources use parts of ATen that torch does not promise to keep (brgemm, and
memory for outputs), which a minor version may move or change: then this fails, and names them.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

#: All that include headers of torch in the same way as one of these need not be compiled as well.
SOURCES = ("csrc/bindings.cpp", "csrc/cpu/matmul.cpp", "csrc/cpu/pool.cpp", "csrc/cpu/mlp.cpp")
LIBRARIES = ("torch/lib/libtorch_cpu.so", "torch/lib/libc10.so")
#: Says by which C++ standard a version compiles extensions.
FLAGS = "torch/utils/cpp_extension.py"
#: Names of torch's own functions, as the linker sees them.
OURS = re.compile(r"_ZN?K?\w*?\d*(?:2at|3c10|5torch)")


def unpack(version: str, folder: Path) -> Path:
    """The folder with torch/include and the libraries of a version."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--dest", str(folder), f"torch=={version}"], check=True)
    (wheel,) = folder.glob("torch-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        wanted = [
            name for name in archive.namelist() if name.startswith("torch/include/") or name in (*LIBRARIES, FLAGS)
        ]
        archive.extractall(folder, wanted)
    wheel.unlink()
    return folder


def symbols(path: Path, *options: str) -> set[str]:
    """Names in the symbol table of a file, without versions."""
    done = subprocess.run(["nm", *options, str(path)], check=True, capture_output=True, text=True)
    return {line.split()[-1].split("@")[0] for line in done.stdout.splitlines() if line.split()}


def compiled(source: str, folder: Path) -> set[str]:
    """What the source needs of torch, by its headers in the folder."""
    include, output = folder / "torch" / "include", folder / (Path(source).stem + ".o")
    standard = re.search(r"common_cflags \+= \['(-std=[^']*)'", (folder / FLAGS).read_text())
    assert standard is not None, FLAGS
    flags = [standard[1], "-O0", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-DPy_LIMITED_API=0x030A0000"]
    paths = [include, include / "torch" / "csrc" / "api" / "include", sysconfig.get_paths()["include"]]
    subprocess.run(["c++", *flags, *(f"-I{path}" for path in paths), "-c", source, "-o", str(output)], check=True)
    return {name for name in symbols(output, "--undefined-only") if OURS.match(name)}


def check(version: str) -> None:
    """Raises if a source does not compile or needs what the libraries do not have."""
    with tempfile.TemporaryDirectory() as name:
        folder = unpack(version, Path(name))
        with ThreadPoolExecutor(2) as pool:
            needed = set().union(*pool.map(lambda source: compiled(source, folder), SOURCES))
        there = set().union(*(symbols(folder / library, "--dynamic", "--defined-only") for library in LIBRARIES))
        missing = {name for name in needed - there if "brgemm" in name or not name.startswith("_ZN4tgdp")}
        if missing or not any("brgemm" in name for name in needed):
            raise SystemExit(f"torch {version} lacks {sorted(missing) or 'brgemm'}")
        print(f"torch {version}: {len(needed)} names found, brgemm among them")


for each in sys.argv[1:]:
    check(each)
