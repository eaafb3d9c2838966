"""Predicted times of the Triton kernels of SSSD-ECG on a GPU, launch by launch: part of the static report."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from tgdp_fast.experiments.results import markdown_table
from tgdp_fast.kernels import launching
from tgdp_fast.kernels.residual_block import without_data

#: Seconds between kernels of a CUDA graph that wait for one another.
NODE = 1.2e-6
#: Part of the data sheet's rate that products of large tiles reach where a warp group issues them together.
_REACHED = 0.76
BLOCKS = 36
#: Samples of a call, those of them that pass the network together, and what was aimed at in bf16.
CALLS = ((256, 8, "95 ms, 62 at best"), (1, 1, "1.2 ms, 0.45 at best"))
_SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}


def program_work(item: Any, samples: int) -> tuple[float, float, float]:
    """(bytes from the level-2 cache, FLOPs of matrix products, other FLOPs) of a program of one of these launches.

    Args:
        item: a ``Compilation`` of a block of 256 and 256 channels and 1000 positions.
        samples: that the launch is for.
    """
    size = _SIZES[item.problem.split()[0]]
    tile, name = item.constants, item.name.split("/")[0]
    if name == "transposed":
        elements = tile["ROWS"] * tile["COLUMNS"]
        return elements * (4 + _size_of(item, "output")), 0.0, elements
    if name == "long_convolution":
        of_program = 512 * samples / item.programs
        points, split = tile["A"] * tile["B"], tile["PRECISION"] != "fp16"
        moved = of_program * 1000 * (_size_of(item, "u") + _size_of(item, "output"))
        tables = points * (2 * _size_of(item, "packed") + 8 + 8 * (1 + split))
        # Twiddles, spectrum, conversions, GELU: about as many instructions as each of them has FLOPs.
        other = of_program * points * (70 + 60 * split)
        return moved + tables, of_program * points * 12 * (tile["A"] + tile["B"]) * (4 if split else 1), other
    columns, split = tile["COLUMNS"], 6 if size == 4 else 1
    if name == "mixture":
        elements = 512 * columns
        moved = (512 * 512 + elements) * size + elements * (_size_of(item, "u") + _size_of(item, "output"))
        return moved, 2.0 * 512 * elements * split, 20.0 * elements
    depth = 768 if name == "taps" else 256
    elements = tile["ROWS"] * columns
    moved = depth * (tile["ROWS"] + columns) * size + elements * (4 if name == "taps" else 8)
    return moved, 2.0 * depth * elements * split, 4.0 * elements


def _size_of(item: Any, argument: str) -> int:
    return _SIZES[item.signature[argument].removeprefix("*")]


def launch_seconds(card: Any, item: Any, samples: int, wgmma: bool) -> float:
    """Time of a launch of a block."""
    return seconds_of(card, item.programs, *program_work(item, samples), wgmma)


def seconds_of(card: Any, programs: int, moved: float, products: float, other: float, wgmma: bool) -> float:
    """Time of a launch of programs that have such work each: their reads at the level-2 cache's rate, or the
    multiprocessor with most programs, by 64 bytes a cycle from that cache or by arithmetic.
    """
    rate = card.bf16 * (_REACHED if wgmma else card.mma)
    most = math.ceil(programs / card.multiprocessors)
    arithmetic = most * card.multiprocessors * (products / rate + other / card.fp32)
    return max(programs * moved / card.l2, most * moved / (64 * card.clock), arithmetic) + NODE


def weight_bytes(size: int) -> float:
    """Of a block: four products' weights, and spectra of two layers."""
    return (512 * 768 + 2 * 512 * 512 + 512 * 256) * size + 2 * 512 * 1024 * 2 * size


def call_seconds(card: Any, launches: list[float], batch: int, together: int, size: int) -> float:
    """A call of the network: all blocks for each group of samples, and the weights from memory once for each."""
    groups = math.ceil(batch / together)
    return groups * BLOCKS * (sum(launches) + weight_bytes(size) / card.bandwidth)


def block_launches(dtype: torch.dtype, samples: int) -> list[Any]:
    """The seven launches of a block of the paper's size."""
    listed = launching.recorded({"block": without_data((samples, 256, 256, 1000), dtype)})
    found = {int(item.name.rpartition("/")[2]): item for item in listed}
    # The second convolution and mixture may be as the first.
    return [found[number] if number in found else found[number - 2] for number in range(7)]


def table(card: Any, capability: int, compile_nvidia: Callable[[Any, int], Any]) -> str:
    """Predictions of a block's launches and of whole calls."""
    body, calls = [], []
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for batch, together, goal in CALLS:
            launches = [
                launch_seconds(card, item, together, "wgmma" in compile_nvidia(item, capability).ptx)
                for item in block_launches(dtype, together)
            ]
            listed = " + ".join(f"{seconds * 1e6:.1f}" for seconds in launches)
            body.append([name, str(together), listed, f"{sum(launches) * 1e6:.0f}"])
            seconds = call_seconds(card, launches, batch, together, dtype.itemsize)
            calls.append([name, str(batch), goal if name == "bf16" else "-", f"{seconds * 1e3:.2f} ms"])
    return "\n\n".join(
        [
            "A launch takes the longest of what its programs read through the level-2 cache, what the multiprocessor\n"
            "with most of them reads, and its arithmetic; and 1.2 us. Weights come from memory once for each group.",
            markdown_table(["dtype", "samples together", "launches of a block, us", "block us"], body),
            markdown_table(["dtype", "batch", "goal", "predicted for all 36 blocks"], calls),
        ]
    )
