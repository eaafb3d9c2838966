"""Draw the picture of the start page from the output of ``tgdp-fast demo``.

tgdp-fast demo --out runs/demo
python docs/images/transfer.py runs/demo docs/images/transfer.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import numpy as np

from tgdp_fast.data.gaussians import paper_target

matplotlib.use("agg")
import matplotlib.pyplot as plt

#: Target samples that the demo gives to every method, and the seed of their draw.
GIVEN, SEED = 100, 1000
SHOWN = 2000
EXTENT = 1.6


def main(demo: Path, picture: Path) -> None:
    """Write the picture: source model, given target samples, samples after transfer, true target."""
    given = paper_target().sample_with_components(GIVEN, seed=SEED)[0].numpy()
    kept = {name: np.load(demo / "samples" / f"n{GIVEN}-{name}.npy")[:SHOWN] for name in ("source", "tgdp", "target")}
    panels = [
        ("1. frozen source model", kept["source"], "tab:gray", 2.0),
        (f"2. {GIVEN} target samples", given, "tab:red", 9.0),
        ("3. source model + guidance", kept["tgdp"], "tab:blue", 2.0),
        ("for comparison: true target", kept["target"], "tab:gray", 2.0),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(9.6, 2.75), sharex=True, sharey=True, layout="constrained")
    for axis, (title, points, color, size) in zip(axes, panels, strict=True):
        axis.scatter(points[:, 0], points[:, 1], s=size, alpha=0.5, color=color, linewidths=0)
        axis.set(xlim=(-EXTENT, EXTENT), ylim=(-EXTENT, EXTENT), aspect="equal", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
        axis.tick_params(labelsize=7, color="0.6", labelcolor="0.4")
        axis.set_title(title, fontsize=10)
    figure.savefig(picture, dpi=110, format="png", facecolor="white")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
