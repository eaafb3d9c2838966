"""Plots of the experiments. matplotlib is imported only here, and only when a plot is drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tgdp_fast.runtime.files import write_atomic
from tgdp_fast.runtime.optional import optional

Key = tuple[int, str]


def pyplot() -> Any:
    """matplotlib.pyplot on a backend that needs no display.

    Raises:
        ImportError: matplotlib is missing; says how to install it.
    """
    optional("matplotlib", "plots need").use("agg")
    return optional("matplotlib.pyplot", "plots need")


def available() -> bool:
    """Whether plots can be drawn. If not, print why: an experiment continues without them."""
    try:
        pyplot()
    except ImportError as error:
        print(f"no plots: {error}", flush=True)
        return False
    return True


def scatter_grid(
    path: Path,
    num_target: Sequence[int],
    methods: Sequence[str],
    drawn: Mapping[Key, np.ndarray],
    given: Mapping[int, np.ndarray],
    extent: float,
) -> Path:
    """A row per number of target samples, a column per method; the given target samples in red."""
    plt = pyplot()
    figure, axes = plt.subplots(
        len(num_target),
        len(methods),
        figsize=(2.0 * len(methods), 2.2 * len(num_target)),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for row, n in zip(axes, num_target, strict=True):
        for axis, method in zip(row, methods, strict=True):
            x = drawn[n, method][:2000]
            axis.scatter(x[:, 0], x[:, 1], s=1.5, alpha=0.35, color="tab:blue", linewidths=0, rasterized=True)
            if method not in ("target", "source", "means") and not method.startswith("oracle"):
                shown = given[n][:100]
                axis.scatter(shown[:, 0], shown[:, 1], s=7, color="tab:red", marker="x", linewidths=0.7)
            axis.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal", xticks=[], yticks=[])
        row[0].set_ylabel(f"n = {n}")
    for axis, method in zip(axes[0], methods, strict=True):
        axis.set_title(method, fontsize=9)
    return save_figure(figure, path)


def ratio_grid(
    path: Path, num_target: Sequence[int], exact: np.ndarray, ratios: Mapping[Key, np.ndarray], extent: float
) -> Path:
    """Exact log h in the first column, learned log h beside it, on one color scale, clipped."""
    plt = pyplot()
    methods = list(dict.fromkeys(method for _, method in ratios))
    figure, axes = plt.subplots(
        len(num_target),
        1 + len(methods),
        figsize=(2.1 * (1 + len(methods)) + 0.6, 2.2 * len(num_target)),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    limit = 8.0
    image = None
    for row, n in zip(axes, num_target, strict=True):
        for axis, method in zip(row, ["exact", *methods], strict=True):
            values = exact if method == "exact" else ratios[n, method]
            image = axis.imshow(
                values.clip(-limit, limit),
                origin="lower",
                extent=(-extent, extent, -extent, extent),
                cmap="RdBu_r",
                vmin=-limit,
                vmax=limit,
            )
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"n = {n}")
    for axis, method in zip(axes[0], ["exact", *methods], strict=True):
        axis.set_title(method, fontsize=9)
    figure.colorbar(image, ax=axes, label="log h at t_min", shrink=0.7)
    return save_figure(figure, path)


def image_grid(path: Path, groups: Mapping[str, np.ndarray], shape: tuple[int, int], columns: int = 20) -> Path:
    """A block of small images per group [N, H * W]."""
    plt = pyplot()
    figure, axes = plt.subplots(len(groups), 1, figsize=(8.0, 1.3 * len(groups)), squeeze=False, layout="constrained")
    for axis, (name, images) in zip(axes[:, 0], groups.items(), strict=True):
        shown = images[: 2 * columns].reshape(-1, *shape)
        # One pixel of background around each image, and blanks to fill the last row.
        framed = np.pad(shown, ((0, -len(shown) % columns), (1, 1), (1, 1)), constant_values=float(shown.min()))
        tiles = framed.reshape(-1, columns, shape[0] + 2, shape[1] + 2)
        axis.imshow(tiles.transpose(0, 2, 1, 3).reshape(-1, columns * (shape[1] + 2)), cmap="gray_r")
        axis.set(xticks=[], yticks=[])
        axis.set_title(name, fontsize=9, loc="left")
    return save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> Path:
    """Write a PNG, atomically, and close the figure."""
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format="png")
    pyplot().close(figure)
    write_atomic(path, content.getvalue())
    return path
