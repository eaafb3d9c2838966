"""What every GPU kernel is compiled to, and how long it should take, without a GPU: a Markdown text with predictions.

    python bench/static_report.py --out docs/gpu_predictions.md      about two minutes

Registers, spills and shared memory are the compiler's. Blocks per multiprocessor follow from them. Bytes and FLOPs are
what the launch must move and compute at least. floor = max(bytes / bandwidth, FLOPs / rate); predicted = floor, longer
by what the last, partly filled, wave of blocks wastes, plus a launch. Nothing here is measured.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tgdp_fast.benchmark.binaries import compile_nvidia, kernel_modules, shipped  # noqa: E402
from tgdp_fast.checkpoint import write_atomic  # noqa: E402
from tgdp_fast.experiments.results import markdown_table  # noqa: E402

_LAUNCH = 3e-6  # seconds, as one of several in a queue
_ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers([^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet; rates without sparsity, bf16 products with float32 sums.

    Per multiprocessor: shared memory in bytes, threads, blocks; 65,536 registers everywhere.
    """

    name: str
    bandwidth: float
    fp32: float
    bf16: float
    multiprocessors: int
    shared: int
    threads: int
    blocks: int


CARDS = {
    80: Card("A100 80GB SXM", 2.04e12, 19.5e12, 312e12, 108, 164 << 10, 2048, 32),
    86: Card("RTX 3090", 0.936e12, 35.6e12, 71e12, 82, 100 << 10, 1536, 16),
    90: Card("H100 SXM", 3.35e12, 67e12, 989e12, 132, 228 << 10, 2048, 32),
    100: Card("B200", 8.0e12, 75e12, 2250e12, 148, 228 << 10, 2048, 32),
}


def blocks_per_multiprocessor(card: Card, registers: int, shared: int, warps: int) -> int:
    """How many blocks are resident at once: registers come in 256 per warp, a block's shared memory has 1 KiB more."""
    of_registers = 65536 // (warps * math.ceil(registers * 32 / 256) * 256)
    of_shared = card.shared // (shared + 1024)
    return min(of_registers, of_shared, card.threads // (32 * warps), card.blocks)


def predicted(card: Card, programs: int, resident: int, moved: float, flops: float, tensor_cores: bool) -> tuple:
    """(floor, predicted) in seconds."""
    floor = max(moved / card.bandwidth, flops / (card.bf16 if tensor_cores else card.fp32))
    wave = card.multiprocessors * max(resident, 1)
    waste = math.ceil(programs / wave) * wave / programs
    return floor, floor * waste + _LAUNCH


def triton_table(capability: int) -> tuple[str, list[tuple[int, int, int]]]:
    """The table of an architecture, and (registers, spilled, shared) of every kernel."""
    card, body, sizes = CARDS[capability], [], []
    for module in kernel_modules():
        for item in shipped(module):
            binary = compile_nvidia(item, capability)
            sizes.append((binary.registers, binary.spilled, binary.shared))
            resident = blocks_per_multiprocessor(card, binary.registers, binary.shared, item.num_warps)
            floor, seconds = predicted(card, item.programs, resident, item.bytes, item.flops, binary.tensor_cores)
            numbers = (binary.registers, binary.spilled, f"{binary.shared / 1024:.0f}", resident * item.num_warps)
            work = (f"{item.bytes / 1e6:.3g}", f"{item.flops / 1e9:.3g}", f"{floor * 1e6:.3g}", f"{seconds * 1e6:.3g}")
            body.append([f"`{item.name}`", item.problem, *map(str, numbers), *work])
    header = ["kernel", "problem", "registers", "spilled B", "shared KiB", "warps / SM", "MB", "GFLOP"]
    return markdown_table([*header, "floor us", "predicted us"], body), sizes


def cuda_rows(capability: int) -> list[list[str]]:
    """Name, architecture, registers, spilled bytes and static shared memory of every CUDA kernel; none without nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return []
    architecture = f"sm_{capability}{'a' * (capability == 90)}"
    rows = []
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        with tempfile.TemporaryDirectory() as folder:
            command = [nvcc, "-std=c++17", "-O3", f"-arch={architecture}", "-cubin", "-Xptxas", "-v", str(source)]
            done = subprocess.run([*command, "-o", f"{folder}/kernel"], capture_output=True, text=True, check=True)
        for mangled, stores, loads, registers, rest in _ENTRY.findall(done.stderr):
            name = subprocess.run(["c++filt", "-p", mangled], capture_output=True, text=True).stdout.strip() or mangled
            shared = re.search(r"(\d+) bytes smem", rest)
            spilled = int(stores) + int(loads)
            name = name.replace("tgdp::", "").replace("(anonymous namespace)::", "")
            rows.append([f"`{name}`", architecture, registers, str(spilled), shared[1] if shared else "0"])
    return rows


def report() -> str:
    """The whole text."""
    parts = ["# GPU kernels: compiled sizes and predicted times", (__doc__ or "").split("\n\n")[-1].strip()]
    summary = []
    for capability, card in CARDS.items():
        table, sizes = triton_table(capability)
        registers, spilled, shared = (max(values) for values in zip(*sizes, strict=True))
        spilling = sum(1 for _, bytes_spilled, _ in sizes if bytes_spilled)
        summary.append([f"sm_{capability}", card.name, *map(str, (len(sizes), registers, spilling, spilled, shared))])
        if capability == 90:
            main_table = table
    header = [
        "architecture",
        "card",
        "kernels",
        "most registers",
        "kernels that spill",
        "most spilled B",
        "most shared B",
    ]
    parts += ["## Triton", markdown_table(header, summary), f"### Predicted for {CARDS[90].name}", main_table]
    cuda = [row for capability in CARDS for row in cuda_rows(capability)]
    if cuda:
        parts += [
            "## CUDA",
            markdown_table(["kernel", "architecture", "registers", "spilled B", "static shared B"], cuda),
        ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Print the report, or write it to ``--out``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="a Markdown file")
    options = parser.parse_args()
    text = report()
    if options.out is None:
        print(text)
    else:
        write_atomic(options.out, text)


if __name__ == "__main__":
    main()
