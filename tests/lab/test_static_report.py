"""The predictions for GPUs: their arithmetic, and that the committed text is about the kernels that there are."""

from __future__ import annotations

import dataclasses
import re
import sys

import pytest
from native import ROOT

from tgdp_fast.benchmark.binaries import kernel_modules, shipped

pytest.importorskip("triton", reason="Triton is not installed; run `pip install triton`")
sys.path.append(str(ROOT / "bench"))

import long_convolution_predictions as predictions
import static_report

H100 = static_report.CARDS[90]


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks"),
    [
        (32, 0, 4, 16),  # threads: 2048 / 128
        (255, 0, 4, 2),  # registers: 256 x 128 of 65536
        (64, 100 << 10, 4, 2),  # shared memory: 101 of 228 KiB
        (16, 0, 1, 32),  # blocks
    ],
)
def test_blocks_of_a_multiprocessor(registers, shared, warps, blocks):
    assert static_report.blocks_per_multiprocessor(H100, registers, shared, warps) == blocks


def test_a_full_wave_takes_the_floor_and_a_launch_and_one_block_more_takes_two_waves():
    moved = 3.35e12  # a second of memory
    floor, seconds = static_report.predicted(H100, 132 * 4, 4, moved, 1.0, False)
    assert floor == pytest.approx(1.0)
    assert seconds == pytest.approx(1.0 + 3e-6)
    assert static_report.predicted(H100, 132 * 4 + 1, 4, moved, 1.0, False)[1] == pytest.approx(2.0, rel=0.01)
    assert static_report.predicted(H100, 132, 1, 1.0, 989e12, True)[0] == pytest.approx(1.0)
    assert static_report.predicted(H100, 132, 1, 1.0, 67e12, False)[0] == pytest.approx(1.0)


def test_the_committed_text_names_every_kernel():
    text = (ROOT / "docs" / "gpu_predictions.md").read_text()
    missing = [item.name for module in kernel_modules() for item in shipped(module) if f"`{item.name}`" not in text]
    assert not missing, "run python bench/static_report.py --out docs/gpu_predictions.md"
    assert "Nothing here is measured" in text


def test_the_time_of_a_block_is_its_slowest_resource_step_by_step():
    plan = static_report.cuda_emulation.LaunchPlan(blocks=1, rows=96, panel=256, depth=16, cluster=1)
    steps = 2 * 32  # 512 columns of depth 512
    one = static_report.Pass(512, 512)
    cycles = static_report.block_seconds(H100, plan, [one], 2) * H100.clock / steps
    products = 96 * 256 * 16 / (989e12 * 0.62 / 2 / 132 / 1.83e9)
    shared = (4 * 96 * 16 + 3 * 256 * 16) * 2 / 128
    assert cycles == pytest.approx(max(products, shared) + 40)
    needs = static_report.step_cycles(H100, plan, 256, 16, 2)
    assert (needs["products"], needs["shared memory"]) == pytest.approx((products, shared))
    # Alone, a block has 64 bytes a cycle of the level-2 cache; 132 share its bandwidth.
    assert needs["level-2 cache"] == pytest.approx(256 * 16 * 2 / 64)
    plan.blocks = 132
    needs = static_report.step_cycles(H100, plan, 256, 16, 2)
    assert needs["level-2 cache"] == pytest.approx(132 * 256 * 16 * 2 * 1.83e9 / 5.5e12)
    plan.blocks = 1
    # What follows on a product counts once per panel.
    after = static_report.block_seconds(H100, plan, [static_report.Pass(512, 512, 0.1)], 2) * H100.clock
    assert after == pytest.approx(cycles * steps + 2 * 96 * 256 * 0.1)
    # 133 blocks of 96 rows on 132 multiprocessors: a second wave.
    plan.blocks = 132
    seconds = [static_report.fused_seconds(H100, plan, batch, [one], 2) - 3e-6 for batch in (132 * 96, 132 * 96 + 1)]
    assert seconds[1] == pytest.approx(2 * seconds[0])


def test_a_cluster_takes_its_steps_and_exchanges_or_the_stream_of_its_weights():
    plan = static_report.cuda_emulation.LaunchPlan(blocks=128, rows=16, panel=64, depth=128, cluster=8)
    one = static_report.Pass(512, 512, row=512)
    cycles = static_report.cluster_seconds(H100, plan, [one], 2) * H100.clock
    # Four warps read all rows, and a tile is written and read once, at 128 bytes a cycle: longer than the products,
    # and than eight of them one after the other at 33 cycles.
    step = (4 * 16 * 128 + 2 * 64 * 128) * 2 / 128
    assert step > max(8 * 33, 16 * 64 * 128 / (989e12 * 0.62 / 2 / 132 / 1.83e9))
    exchange = 7 * 16 * 64 * 2 / 13 + 720
    assert cycles == pytest.approx(4 * (step + 40) + exchange)
    # Every block makes a head, whose two columns one warp has.
    head = static_report.Pass(2, 512, row=512, layer=False)
    chain = static_report.cluster_seconds(H100, plan, [head], 2) * H100.clock
    assert chain == pytest.approx(4 * (8 * 33 + 40))
    # Weights in rows of four bytes: each step waits for the level-2 cache.
    slow = static_report.Pass(2, 512, row=2, layer=False)
    assert static_report.cluster_seconds(H100, plan, [slow], 2) * H100.clock == pytest.approx(chain + 4 * 263)
    # With a tenth of the level-2 cache's bandwidth the weights decide.
    starved = dataclasses.replace(H100, l2=H100.l2 / 10)
    seconds = static_report.cluster_seconds(starved, plan, [one], 2)
    assert seconds == pytest.approx(128 * 512 * 64 * 2 / (H100.l2 / 10))
    # Sixteen clusters run at once: the seventeenth, of samples 257 and on, waits.
    times = [static_report.fused_seconds(H100, plan, batch, [one], 2) - 3e-6 for batch in (256, 257)]
    assert times[1] == pytest.approx(2 * times[0])


def test_launches_that_repeat_one_count_again():
    times = {"up/m/0": 1.0, "up/m/1": 2.0, "last/m/3": 5.0, "up/other/0": 7.0}
    assert static_report.layered_seconds(times, "m") == 1.0 + 2.0 + 2.0 + 5.0


def test_the_committed_text_names_every_cuda_kernel():
    text = (ROOT / "docs" / "gpu_predictions.md").read_text()
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cuh"))
    kernels = set(re.findall(r"\b(\w+_kernel)\(", sources))
    assert {"guided_step_kernel", "long_convolution_kernel", "trajectory_kernel"} <= kernels
    missing = [name for name in kernels if f"cuda::{name}<" not in text]
    assert not missing, "run python bench/static_report.py --out docs/gpu_predictions.md"


def test_a_long_convolution_takes_what_it_needs_most_of():
    shape = (64, 512, 1000)
    moved, flops = predictions.work(shape, 4)
    assert moved == 2 * 4 * 512 * (64 * 1000 + 1024)
    assert flops == 64 * 512 * (8 * 1024 * 10 + 25 * 1000)
    needs = predictions.needs(H100, shape, 4, 3000)
    # 8192 blocks of four warps: 63 at most for a multiprocessor, which issues four instructions a cycle.
    assert needs["instructions"] == pytest.approx(63 * 3000 / 1.83e9)
    # Two exchanges, roots twice, spectrum, signal and result.
    touched = 4 * 8192 + 2 * 8192 + 8192 + 8000
    assert needs["shared memory"] == pytest.approx(63 * 4 * touched / 128 / 1.83e9)
    assert needs["level-2 cache"] == pytest.approx(8192 * (4 * 8000 + 8192) / 5.5e12)
    assert needs["memory"] == pytest.approx(moved / 3.35e12)
    # Of 500 positions two signals go into a warp, which reads roots once for both.
    needs = predictions.needs(H100, (2, 3, 500), 2, 3000)
    touched = 2 * (4 * 4096 + 2048 + 2000) + 2 * 4096
    assert needs["shared memory"] == pytest.approx(4 * touched / 128 / 1.83e9)
    # A block of eight signals, four channels' spectra at most.
    assert needs["level-2 cache"] == pytest.approx((8 * 2000 + 4 * 2048) / 5.5e12)


def test_the_committed_text_supports_whose_kernel_is_taken_first():
    """long_convolution.py: CUDA for float32, Triton for 16 bits."""
    text = (ROOT / "docs" / "gpu_predictions.md").read_text()
    rows = re.findall(r"^\| \[\d+, 512, 1000\] +\| (\w+) .*\| ([\d.]+) +\| ([\d.]+) +\|$", text, re.MULTILINE)
    assert len(rows) == 6
    for dtype, cuda, triton in rows:
        if dtype == "float32":
            assert float(cuda) < float(triton)
    large = [(dtype, float(cuda) < float(triton)) for dtype, cuda, triton in rows][::3]
    assert large == [("float32", True), ("bfloat16", False)]
