"""Compiling Triton kernels for GPUs that are not here, and reading what came out."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tgdp_fast import kernels
from tgdp_fast.kernels.launching import Compilation
from tgdp_fast.ops import _triton

#: Shared memory that a program may use, in bytes, by compute capability (CUDA C++ Programming Guide).
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
#: Matrix instructions of the generations, in PTX.
MATRIX_INSTRUCTION = re.compile(r"^\s*(?:@%p\d+\s+)?(?:mma|wgmma\.mma_async|tcgen05\.mma)\b", re.MULTILINE)


def why_not() -> str | None:
    """Why nothing can be compiled here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return "TRITON_INTERPRET is set, so that there is nothing to compile" if _triton.INTERPRETED else None


def kernel_modules() -> tuple[str, ...]:
    """Names of the modules of kernels that ship compilations."""
    paths = sorted(path for folder in kernels.__path__ for path in Path(folder).glob("*.py"))
    return tuple(path.stem for path in paths if re.search(r"^def shipped\(", path.read_text(), re.MULTILINE))


def shipped(module: str) -> list[Compilation]:
    """What a module of kernels ships."""
    loaded: ModuleType = importlib.import_module(f"tgdp_fast.kernels.{module}")
    compilations: list[Compilation] = loaded.shipped()
    return compilations


@dataclass(frozen=True)
class Binary:
    """A kernel for one NVIDIA architecture; sizes in bytes, registers per thread."""

    ptx: str
    ttgir: str
    shared: int
    registers: int
    spilled: int

    @property
    def tensor_cores(self) -> bool:
        return MATRIX_INSTRUCTION.search(self.ptx) is not None

    @property
    def doubles(self) -> list[str]:
        """Instructions on float64."""
        return [line.strip() for line in self.ptx.splitlines() if re.search(r"\.f64\b", line)]


def compile_nvidia(compilation: Compilation, capability: int) -> Binary:
    """The kernel for a compute capability, without a GPU."""
    kernel = _compile(compilation, "cuda", capability, 32)
    registers, spilled = _usage(kernel.asm["cubin"])
    return Binary(kernel.asm["ptx"], kernel.asm["ttgir"], kernel.metadata.shared, registers, spilled)


def compile_amd(compilation: Compilation, architecture: str = "gfx942") -> str:
    """The kernel's assembly for an AMD GPU."""
    assembly: str = _compile(compilation, "hip", architecture, 64).asm["amdgcn"]
    return assembly


def _compile(compilation: Compilation, backend: str, architecture: int | str, warp_size: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes = {place: [["tt.divisibility", 16]] for place in compilation.divisible}
    source = ASTSource(compilation.kernel, compilation.signature, compilation.constants, attributes)
    # Fused multiply-adds are on in every launch; Triton's default for them depends on its version.
    options = {"num_warps": compilation.num_warps, "num_stages": compilation.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget(backend, architecture, warp_size), options=options)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack, where spilled ones are; of the binary that a launch would load."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    usage = re.findall(r"REG:(\d+) STACK:(\d+)", done.stdout + done.stderr)
    assert len(usage) == 1, done.stdout
    return int(usage[0][0]), int(usage[0][1])
