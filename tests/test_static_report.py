"""The predictions for GPUs: their arithmetic, and that the committed text is about the kernels that there are."""

from __future__ import annotations

import sys

import pytest
from native import ROOT

from tgdp_fast.benchmark.binaries import kernel_modules, shipped

pytest.importorskip("triton", reason="Triton is not installed; run `pip install triton`")
sys.path.append(str(ROOT / "bench"))

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
