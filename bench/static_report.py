"""What every GPU kernel is compiled to, and how long it should take, without a GPU: a Markdown text with predictions.

    python bench/static_report.py --out docs/gpu_predictions.md      about two minutes

Registers, spills and shared memory are the compiler's. Blocks per multiprocessor follow from them. Bytes and FLOPs are
what the launch must move and compute at least. floor = max(bytes / bandwidth, FLOPs / rate); predicted = floor, longer
by what the last, partly filled, wave of blocks wastes, plus a launch. The fused CUDA kernels are predicted step by step
(block_seconds and cluster_seconds in the script, which state what is assumed of the card), the long convolution by what
it needs most of (long_convolution_predictions.py). Nothing here is measured: what an H200 measured, and how far off
some of this was, is in bench/NOTES.md.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import math
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "cuda")]

import cuda_emulation  # noqa: E402
import long_convolution_predictions  # noqa: E402
import sssd_ecg_predictions  # noqa: E402
import torch  # noqa: E402

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

    Per multiprocessor: shared memory in bytes, threads, blocks; 65,536 registers everywhere. clock in Hz; l2 the
    bandwidth of the level-2 cache; mma the part of the tensor cores' rate that ``mma.sync`` reaches: on Hopper the full
    rate needs ``wgmma`` (Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture", 2024: 0.62).
    """

    name: str
    bandwidth: float
    fp32: float
    bf16: float
    multiprocessors: int
    shared: int
    threads: int
    blocks: int
    clock: float
    l2: float
    mma: float


CARDS = {
    80: Card("A100 80GB SXM", 2.04e12, 19.5e12, 312e12, 108, 164 << 10, 2048, 32, 1.41e9, 4.0e12, 1.0),
    86: Card("RTX 3090", 0.936e12, 35.6e12, 71e12, 82, 100 << 10, 1536, 16, 1.70e9, 2.0e12, 1.0),
    90: Card("H100 SXM", 3.35e12, 67e12, 989e12, 132, 228 << 10, 2048, 32, 1.83e9, 5.5e12, 0.62),
    100: Card("B200", 8.0e12, 75e12, 2250e12, 148, 228 << 10, 2048, 32, 1.85e9, 8.0e12, 0.5),
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


def triton_table(capability: int) -> tuple[str, list[tuple[int, int, int]], dict[str, float]]:
    """The table of an architecture, (registers, spilled, shared) of every kernel, and predicted seconds by name."""
    card, body, sizes, times = CARDS[capability], [], [], {}
    for module in kernel_modules():
        for item in shipped(module):
            binary = compile_nvidia(item, capability)
            sizes.append((binary.registers, binary.spilled, binary.shared))
            resident = blocks_per_multiprocessor(card, binary.registers, binary.shared, item.num_warps)
            floor, seconds = predicted(card, item.programs, resident, item.bytes, item.flops, binary.tensor_cores)
            times[item.name] = seconds
            numbers = (binary.registers, binary.spilled, f"{binary.shared / 1024:.0f}", resident * item.num_warps)
            work = (f"{item.bytes / 1e6:.3g}", f"{item.flops / 1e9:.3g}", f"{floor * 1e6:.3g}", f"{seconds * 1e6:.3g}")
            body.append([f"`{item.name}`", item.problem, *map(str, numbers), *work])
    header = ["kernel", "problem", "registers", "spilled B", "shared KiB", "warps / SM", "MB", "GFLOP"]
    return markdown_table([*header, "floor us", "predicted us"], body), sizes, times


def cuda_rows(capability: int, sources: str = "*.cu") -> list[list[str]]:
    """Name, architecture, registers, spilled bytes and static shared memory of every CUDA kernel; none without nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return []
    architecture = f"sm_{capability}{'a' * (capability == 90)}"
    rows = []
    for source in sorted((ROOT / "csrc" / "cuda").glob(sources)):
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


# fused CUDA kernels: one block computes all layers of its rows ------------------------------------------------------

#: Cycles of a step beside its work: barrier, wait for copies, addresses.
_STEP = 40
#: Cycles until the level-2 cache answers, of an H100 (Luo et al.): a step waits for weights whose rows are no whole
#: pieces of 16 bytes, which no asynchronous copy takes.
_LEVEL_2 = 263
#: Cycles between two products on tensor cores that add to the same sums (Luo et al.: mma.sync m16n8k16).
_DEPENDENT = 33
#: Between the blocks of a cluster, bytes a cycle of a multiprocessor: 2.65 TB/s of 114 at 1.755 GHz (Luo et al., for
#: clusters of four, the largest that they measure; 3.27 TB/s for two).
_BETWEEN = 13
#: Cycles for blocks of a cluster to meet, an assumption: four times the 180 cycles from one multiprocessor to another
#: (Luo et al.), for the fence waits until all writes are answered, and the barrier's arrivals and release take as long.
_MEETING = 4 * 180
#: Cycles of a multiprocessor per element: bias, SiLU and slope on the way up; slopes on the way down.
_ACTIVATION, _SLOPE = 18 / 128, 5 / 128


@dataclass(frozen=True)
class Pass:
    """One product of a network for a block of rows.

    Columns of its results, depth, cycles per element after it, elements of a row of its weights, and whether it makes a
    layer, whose columns the blocks of a cluster share.
    """

    columns: int
    depth: int
    after: float = 0.0
    row: int = 0
    layer: bool = True


def score_passes(size: int, widths: tuple[int, ...]) -> list[Pass]:
    """The score network's: its layers and the head."""
    sizes = (size, *widths)
    up = [Pass(b, a, _ACTIVATION, a) for a, b in zip(sizes, widths, strict=False)]
    return [*up, Pass(size, widths[-1], row=widths[-1], layer=False)]


def guidance_passes(size: int, widths: tuple[int, ...]) -> list[Pass]:
    """The guidance network's: its layers, forward and back."""
    up = score_passes(size, widths)[:-1]
    down = [Pass(p.depth, p.columns, _SLOPE, p.row) for p in reversed(up)]
    return [*up, *down[:-1], dataclasses.replace(down[-1], layer=False)]


def step_cycles(
    card: Card, plan: cuda_emulation.LaunchPlan, columns: int, depth: int, element_bytes: int
) -> dict[str, float]:
    """Cycles of a step by what it needs; the longest counts.

    A step multiplies [rows, plan.depth] by [plan.depth, columns]: products at the rate of mma.sync or of float32, and
    those that add to the same sums one after the other; shared memory, 128 bytes a cycle, for what the warps read, four
    beside each other and of more than 16 rows two such groups, and for the tile that arrives, which has `depth`; the
    tile's way from the level-2 cache, 64 bytes a cycle, or the block's share of that cache's bandwidth.
    """
    rows = plan.rows
    rate = card.bf16 * card.mma if element_bytes == 2 else card.fp32
    per_cycle = rate / 2 / card.multiprocessors / card.clock
    tile = columns * depth * element_bytes
    if element_bytes == 2:
        groups = 1 if rows == 16 else 2
        read = (min(math.ceil(columns / 16), 4) * rows + groups * columns) * plan.depth * element_bytes
    else:
        # A row of factors is the same for all lanes; every warp reads the whole tile.
        read = (rows + 8 * plan.panel) * plan.depth * element_bytes
    busy = min(plan.blocks, card.multiprocessors // plan.cluster * plan.cluster)
    return {
        "products": rows * columns * plan.depth / per_cycle,
        "products in turn": plan.depth / 16 * _DEPENDENT if element_bytes == 2 else 0.0,
        "shared memory": (read + tile) / 128,
        "level-2 cache": tile * max(1 / 64, busy * card.clock / card.l2),
    }


def _waiting(one: Pass, element_bytes: int) -> int:
    """Cycles that a step waits for weights that arrive through registers."""
    return _LEVEL_2 if one.row * element_bytes % 16 else 0


def block_seconds(card: Card, plan: cuda_emulation.LaunchPlan, passes: list[Pass], element_bytes: int) -> float:
    """Time of one block for all passes, the multiprocessor to itself."""
    rows, panel = plan.rows, plan.panel
    step = max(step_cycles(card, plan, panel, plan.depth, element_bytes).values())
    cycles = 0.0
    for one in passes:
        panels = math.ceil(one.columns / panel)
        one_step = step + _STEP + _waiting(one, element_bytes)
        cycles += panels * math.ceil(one.depth / plan.depth) * one_step + panels * rows * panel * one.after
    return cycles / card.clock


def cluster_seconds(card: Card, plan: cuda_emulation.LaunchPlan, passes: list[Pass], element_bytes: int) -> float:
    """Time of one cluster for all passes, a multiprocessor to each of its blocks.

    After a layer the blocks exchange their columns and meet. The weights arrive meanwhile: it takes longer if they do.
    """
    rows, panel, depth = plan.rows, plan.panel, plan.depth
    cycles = stream = 0.0
    for one in passes:
        padded = math.ceil(one.columns / depth) * depth
        # As columns_of_block in perceptron_layers.cuh.
        own = math.ceil(padded / plan.cluster / 8) * 8 if one.layer else one.columns
        panels = math.ceil(own / panel)
        steps = panels * math.ceil(one.depth / depth)
        # Only columns and depth that are there arrive.
        needs = step_cycles(card, plan, min(own, panel), min(one.depth, depth), element_bytes)
        stream += steps * needs.pop("level-2 cache")
        one_step = max(needs.values()) + _STEP + _waiting(one, element_bytes)
        cycles += steps * one_step + panels * rows * panel * one.after
        if one.layer:
            others = rows * (plan.cluster - 1) * own * element_bytes
            cycles += others / _BETWEEN + _MEETING
    return max(cycles, stream) / card.clock


def fused_seconds(
    card: Card, plan: cuda_emulation.LaunchPlan, batch: int, passes: list[Pass], element_bytes: int
) -> float:
    """Time of a launch: blocks share a multiprocessor, and waves of them follow one another."""
    if plan.cluster > 1:
        waves = math.ceil(math.ceil(batch / plan.rows) / (card.multiprocessors // plan.cluster))
        return waves * cluster_seconds(card, plan, passes, element_bytes) + _LAUNCH
    sharing = math.ceil(plan.blocks / card.multiprocessors)
    waves = math.ceil(math.ceil(batch / plan.rows) / plan.blocks)
    return waves * sharing * block_seconds(card, plan, passes, element_bytes) + _LAUNCH


def _device(card: Card, clusters: bool = True) -> None:
    there = card.multiprocessors // 8 if clusters and card in (CARDS[90], CARDS[100]) else 0
    cuda_emulation.choose_device(card.multiprocessors, (card.shared >> 10) - 1, card.shared >> 10, clusters=there)


def _integers(values: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def fused_mlp(card: Card, size: int, widths: tuple[int, ...], batch: int, dtype: torch.dtype) -> tuple:
    """(plan, seconds, FLOPs) of mlp_value_and_grad."""
    _device(card)
    call = cuda_emulation.MlpValueAndGradCall()
    call.dtype, call.batch, call.inputs = cuda_emulation.DTYPES[dtype], batch, size
    call.network.layers, call.network.widths = len(widths), _integers(widths)
    plan = cuda_emulation.plan_of(call)
    passes = guidance_passes(size, widths)
    flops = 2.0 * batch * sum(one.columns * one.depth for one in passes)
    return plan, fused_seconds(card, plan, batch, passes, dtype.itemsize), flops


def fused_trajectory(
    card: Card,
    size: int,
    widths: tuple[tuple[int, ...], tuple[int, ...]],
    batch: int,
    evaluations: int,
    dtype: torch.dtype,
    *,
    clusters: bool = True,
) -> tuple:
    """(plan, seconds, FLOPs) of trajectory with widths of both networks and one history slot."""
    _device(card, clusters)
    plan = cuda_emulation.trajectory_plan(size, *widths, batch, dtype)
    passes = score_passes(size, widths[0]) + guidance_passes(size, widths[1])
    flops = 2.0 * batch * sum(one.columns * one.depth for one in passes) * evaluations
    return plan, fused_seconds(card, plan, batch, passes * evaluations, dtype.itemsize), flops


_FUSED_NOTES = f"""A step multiplies the rows of a block by a tile of weights, panel x depth, and takes as long as
what it needs most of; but blocks of a cluster fetch weights while they exchange a layer, so that only the whole
time of both counts. They exchange {_BETWEEN} bytes a cycle and multiprocessor and meet in {_MEETING} cycles, four
ways of 180 cycles from one to another. Bandwidth (2.65 TB/s of 114 multiprocessors at 1.755 GHz, clusters of four,
the largest measured) and latency between multiprocessors, latency of the level-2 cache ({_LEVEL_2} cycles) and of
mma.sync (about {_DEPENDENT}) are taken from Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU
Architecture", 2024, on an H800; that clusters of eight have the same bandwidth, and the number of ways, are
assumptions."""

_WIDE = (512,) * 4
_SIMULATION = ((*_WIDE, 256), _WIDE)
#: 25 steps of two evaluations, the first of one.
_EVALUATIONS = 49
#: What products of large matrices reach of an H100's rate, in FLOP/s, where goals speak of the measured rate.
_REACHED = 750e12


def fused_table(card: Card) -> str:
    """Plans and predictions of the fused CUDA kernels; "" where there is no compiler to ask the launchers with."""
    if shutil.which("g++") is None:
        return ""
    body = []
    for dtype in (torch.bfloat16, torch.float32):
        calls = [
            (f"mlp_value_and_grad [{batch}, 2], 4 x {width}", fused_mlp(card, 2, (width,) * 4, batch, dtype))
            for width, batch in ((512, 65536), (512, 4096), (512, 256), (128, 4096))
        ]
        calls += [
            (
                f"trajectory [{batch}, 2], simulation, {_EVALUATIONS} evaluations",
                fused_trajectory(card, 2, _SIMULATION, batch, _EVALUATIONS, dtype),
            )
            for batch in (10000, 1024, 512, 256)
        ]
        calls += [
            (
                f"the same [{batch}, 2] without clusters",
                fused_trajectory(card, 2, _SIMULATION, batch, _EVALUATIONS, dtype, clusters=False),
            )
            for batch in (1024, 512, 256)
        ]
        for name, (plan, seconds, flops) in calls:
            floor = flops / (card.bf16 if dtype == torch.bfloat16 else card.fp32)
            tile = f"{plan.rows} x {plan.panel} x {plan.depth}"
            needs = step_cycles(card, plan, plan.panel, plan.depth, dtype.itemsize)
            longest = max(needs, key=lambda need: needs[need])
            numbers = (
                plan.blocks,
                plan.cluster,
                tile,
                f"{needs[longest]:.0f}: {longest}",
                f"{plan.shared_bytes / 1024:.0f}",
                f"{plan.scratch_bytes / 1e6:.3g}",
            )
            work = (f"{flops / 1e9:.3g}", f"{floor * 1e6:.4g}", f"{seconds * 1e6:.4g}", f"{100 * floor / seconds:.0f}")
            body.append([name, str(dtype).removeprefix("torch."), *map(str, numbers), *work])
    header = [
        "call",
        "dtype",
        "blocks",
        "in a cluster",
        "rows x panel x depth",
        "cycles of a step",
        "shared KiB",
        "scratch MB",
        "GFLOP",
        "floor us",
    ]
    return markdown_table([*header, "predicted us", "% of data sheet's rate"], body)


def layered_seconds(times: dict[str, float], problem: str) -> float:
    """Time of a network's launches one after the other, in a graph; launches that repeat one before are not listed."""
    listed = {int(name.rpartition("/")[2]): seconds for name, seconds in times.items() if f"/{problem}/" in name}
    return sum(listed[max(i for i in listed if i <= launch)] for launch in range(max(listed) + 1))


def goals_table(card: Card, times: dict[str, float]) -> str:
    """What was aimed at on an H100, and what is predicted."""
    bf16 = torch.bfloat16
    elements = 10**8
    moved = 24.0 * elements  # float32: x, epsilon, gradient, one slot of history; x and history written
    floor, seconds = predicted(card, 10**6, 1, moved, 1.0, False)
    _, fused, flops = fused_mlp(card, 2, _WIDE, 65536, bf16)
    layered = layered_seconds(times, "mlp-bf16-2-512-65536")
    body = [
        ["guided_step, 1e8 elements", "90 % of copy bandwidth", f"{100 * floor / seconds:.0f} %"],
        [
            "mlp_value_and_grad bf16, width 512, batch 65,536",
            "60 % of the rate of large products (taken as 750 TFLOP/s)",
            f"Triton, layer by layer: {layered * 1e6:.0f} us, {100 * flops / _REACHED / layered:.0f} %; "
            f"CUDA, fused: {fused * 1e6:.0f} us, {100 * flops / _REACHED / fused:.0f} %",
        ],
    ]
    for batch, goal in ((10000, "5 ms"), (256, "1.2 ms")):
        _, seconds, flops = fused_trajectory(card, 2, _SIMULATION, batch, _EVALUATIONS, bf16)
        prediction = f"{seconds * 1e3:.1f} ms (products at the data sheet's rate: {flops / card.bf16 * 1e3:.2g} ms)"
        body.append([f"simulation bf16, {batch} samples, {_EVALUATIONS} evaluations", goal, prediction])
    return markdown_table(["what", "goal", "predicted"], body)


def report() -> str:
    """The whole text."""
    parts = ["# GPU kernels: compiled sizes and predicted times", (__doc__ or "").split("\n\n")[-1].strip()]
    summary = []
    for capability, card in CARDS.items():
        table, sizes, times = triton_table(capability)
        registers, spilled, shared = (max(values) for values in zip(*sizes, strict=True))
        spilling = sum(1 for _, bytes_spilled, _ in sizes if bytes_spilled)
        summary.append([f"sm_{capability}", card.name, *map(str, (len(sizes), registers, spilling, spilled, shared))])
        if capability == 90:
            main_table, main_times = table, times
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
    network = sssd_ecg_predictions.table(CARDS[90], 90, compile_nvidia)
    parts += [f"### SSSD-ECG in Triton, predicted for {CARDS[90].name}", network]
    fused = fused_table(CARDS[90])
    if fused:
        parts += [f"## Fused CUDA kernels, predicted for {CARDS[90].name}", _FUSED_NOTES, fused]
        parts[2:2] = [f"## Goals on an {CARDS[90].name}", goals_table(CARDS[90], main_times)]
    if (nvcc := shutil.which("nvcc")) is not None:
        convolutions = long_convolution_predictions.table(CARDS[90], 90, nvcc, compile_nvidia)
        title = f"## Long convolution in CUDA, predicted for {CARDS[90].name}"
        parts += [title, long_convolution_predictions.NOTES, convolutions]
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
