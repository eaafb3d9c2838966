"""Predicted times of the long convolution in CUDA, beside Triton's: part of the static report."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sssd_ecg_predictions
import torch

from tgdp_fast.experiments.results import markdown_table
from tgdp_fast.kernels import launching
from tgdp_fast.kernels.long_convolution import FACTORS, _without_data, points_of

_SOURCE = Path(__file__).resolve().parent.parent / "csrc" / "cuda" / "long_convolution.cu"
#: Of a block, and instructions that a multiprocessor issues in a cycle.
_WARPS, _ISSUED = 4, 4
_TYPES = {torch.float32: ("F32", "FloatSpectra"), torch.bfloat16: ("Bf16", "HalfSpectra")}
_CALLS = tuple((batch, 512, length) for batch, length in ((64, 1000), (16, 1000), (1, 1000), (64, 500), (64, 250)))


def warp_instructions(nvcc: str, architecture: str) -> dict[str, int]:
    """Instructions of a warp of every kernel, by its mangled name: from its start to its end, with GELU."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/kernels.cubin"
        command = [nvcc, "-std=c++17", "-O3", f"-arch={architecture}", "-cubin", str(_SOURCE), "-o", cubin]
        subprocess.run(command, capture_output=True, check=True)
        shown = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-sass", cubin], capture_output=True, text=True, check=True
        )
    counts = {}
    for text in shown.stdout.split("Function : ")[1:]:
        name, _, body = text.partition("\n")
        instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9]+)", body, re.MULTILINE)
        counts[name.strip()] = instructions.index("EXIT") + 1
    return counts


def work(shape: tuple[int, int, int], element_bytes: int) -> tuple[float, float]:
    """(bytes from and to memory, FLOPs) of a call; spectra have numbers as large as the elements."""
    batch, channels, length = shape
    points = points_of(length)
    assert points is not None
    moved = 2.0 * channels * element_bytes * (batch * length + points)
    return moved, batch * channels * (8.0 * points * math.log2(points) + 25.0 * length)


def needs(card: Any, shape: tuple[int, int, int], element_bytes: int, instructions: int) -> dict[str, float]:
    """Seconds by what the kernel needs; the longest counts.

    Instructions issued by the multiprocessor with most blocks, and its accesses to the first-level cache and shared
    memory, 128 bytes a cycle: two exchanges, written and read, roots twice, spectrum, signal and result. A block reads
    a spectrum once from the level-2 cache.
    """
    batch, channels, length = shape
    points = points_of(length)
    assert points is not None
    together = 32 // FACTORS[points][1]
    blocks = math.ceil(batch * channels / (together * _WARPS))
    most = math.ceil(blocks / card.multiprocessors)
    spectrum, signal = 2 * points * element_bytes, 2 * length * element_bytes
    touched = together * (4 * 8 * points + spectrum + signal) + 2 * 8 * points
    of_cache = blocks * (_WARPS * together * signal + max(1, _WARPS * together / batch) * spectrum)
    return {
        "instructions": most * _WARPS * instructions / _ISSUED / card.clock,
        "shared memory": most * _WARPS * touched / 128 / card.clock,
        "level-2 cache": of_cache / card.l2,
        "memory": work(shape, element_bytes)[0] / card.bandwidth,
    }


def triton_seconds(card: Any, shape: tuple[int, int, int], dtype: torch.dtype, compiled: Callable[[Any], Any]) -> float:
    """As sssd_ecg_predictions has it."""
    (item,) = launching.recorded({"": _without_data(shape, dtype)})
    points = points_of(shape[2])
    assert points is not None
    split, size = dtype == torch.float32, dtype.itemsize
    of_program = shape[0] * shape[1] / item.programs
    moved = of_program * shape[2] * 2 * size + points * (2 * size + 8 + 8 * (1 + split))
    products = of_program * points * 12 * sum(FACTORS[points]) * (4 if split else 1)
    other = of_program * points * (70 + 60 * split)
    wgmma = "wgmma" in compiled(item).ptx
    seconds = sssd_ecg_predictions.seconds_of(card, item.programs, moved, products, other, wgmma)
    return max(seconds, work(shape, size)[0] / card.bandwidth + sssd_ecg_predictions.NODE)


def table(card: Any, capability: int, nvcc: str, compile_nvidia: Callable[[Any, int], Any]) -> str:
    """Predictions of calls with GELU."""
    counts = warp_instructions(nvcc, f"sm_{capability}{'a' * (capability == 90)}")
    body = []
    for dtype, names in _TYPES.items():
        for shape in _CALLS:
            points = points_of(shape[2])
            assert points is not None
            # Mangled, u and y of one element: the second stands for the first.
            element, spectra = (f"NS0_{len(name)}{name}E" for name in names)
            wanted = f"I{element}S[0-9]*_{spectra}" + "".join(f"Li{factor}E" for factor in FACTORS[points])
            (instructions,) = (count for name, count in counts.items() if re.search(wanted, name))
            found = needs(card, shape, dtype.itemsize, instructions)
            longest = max(found, key=lambda need: found[need])
            moved, flops = work(shape, dtype.itemsize)
            seconds = found[longest] + sssd_ecg_predictions.NODE
            triton = triton_seconds(card, shape, dtype, lambda item: compile_nvidia(item, capability))
            cells = (instructions, f"{moved / 1e6:.3g}", f"{flops / 1e9:.3g}", f"{found['memory'] * 1e6:.3g}", longest)
            times = (f"{seconds * 1e6:.3g}", f"{triton * 1e6:.3g}")
            body.append([str(list(shape)), str(dtype).removeprefix("torch."), *map(str, cells), *times])
    header = ["call", "dtype", "instructions of a warp", "MB", "GFLOP", "memory us", "longest", "CUDA us", "Triton us"]
    return markdown_table(header, body)


NOTES = """A launch takes the longest of what it needs, and 1.2 us: instructions, as if every scheduler issued one each
cycle; shared memory and first-level cache; level-2 cache; memory. Triton's is predicted as for SSSD-ECG. An H200
measured CUDA to be the faster one in every dtype: filters are prepared for it where nothing else is asked for."""
