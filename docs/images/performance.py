"""Draw the chart of the page on performance from the committed result files.

python docs/images/performance.py docs/images/performance.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"

#: Of each panel: its title, its result file, its cases with their names, and its providers with their names.
PANELS = [
    (
        "CPU: AMD EPYC, 2 threads",
        "cpu-amd-epyc-2core.json",
        {
            "sampling/samples256-width128": "256 samples,\nwidth 128",
            "sampling/samples10000-width128": "10,000 samples,\nwidth 128",
            "sampling/samples10000-width512": "10,000 samples,\nwidth 512",
        },
        {
            ("peer", "fp32"): "public code, fp32",
            ("reference", "fp32"): "plain PyTorch, fp32",
            ("cpu", "fp32"): "fused kernels, fp32",
            ("cpu", "bf16"): "fused kernels, bf16",
        },
    ),
    (
        "GPU: NVIDIA H200",
        "nvidia-h200-2026-11-26.json",
        {
            "trajectory/samples256-width128": "256 samples,\nwidth 128",
            "trajectory/samples10000-width128": "10,000 samples,\nwidth 128",
        },
        {
            ("peer", "bf16"): "public code, bf16",
            ("reference+graph", "bf16"): "plain PyTorch in a CUDA graph, bf16",
            ("triton+graph", "bf16"): "Triton kernels in a CUDA graph, bf16",
        },
    ),
]
COLORS = {"peer": "0.7", "reference": "tab:gray", "cpu": "tab:blue", "triton": "tab:blue"}


def seconds(value: float) -> str:
    """ "7.83 ms", "18.8 s"."""
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def main(picture: Path) -> None:
    """Write the chart: speed relative to public code, by case and provider, a panel per machine."""
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "tgdp_fast", "font.size": 9})
    figure, axes = plt.subplots(1, len(PANELS), figsize=(9.6, 3.9), layout="constrained", width_ratios=[4, 2])
    for axis, (title, file, cases, providers) in zip(axes, PANELS, strict=True):
        rows = json.loads((RESULTS / file).read_text())["rows"]
        medians = {(row["case"], row["provider"], row["dtype"]): row["median_s"] for row in rows}
        width = 0.84 / len(providers)
        first = next(iter(providers))
        for k, ((provider, dtype), name) in enumerate(providers.items()):
            times = [medians[case, provider, dtype] for case in cases]
            ratios = [medians[(case, *first)] / time for case, time in zip(cases, times, strict=True)]
            places = [i + (k - (len(providers) - 1) / 2) * width for i in range(len(cases))]
            color = "tab:green" if provider == "cpu" and dtype == "bf16" else COLORS[provider.removesuffix("+graph")]
            bars = axis.bar(places, ratios, 0.94 * width, color=color, label=name)
            labels = [f"{ratio:.3g}x\n{seconds(time)}" for ratio, time in zip(ratios, times, strict=True)]
            axis.bar_label(bars, labels, fontsize=6.5, padding=1)
        axis.set_title(title, fontsize=10)
        axis.set_ylim(top=axis.get_ylim()[1] * 1.4)
        axis.set_xticks(range(len(cases)), list(cases.values()))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7.5, frameon=False, loc="upper left")
    axes[0].set_ylabel("speed, public code = 1")
    figure.savefig(picture, format="svg", facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
