"""Records from a fitted model that lies in a folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from tgdp_fast.diffusion.solvers import solver_table
from tgdp_fast.ecg.records.output import check_new_folder, write_ecg_records
from tgdp_fast.ecg.records.statements import ALIASES, multi_hot
from tgdp_fast.fit.model import TransferModel
from tgdp_fast.runtime.checkpoint import CheckpointError
from tgdp_fast.runtime.checks import check_device, check_integer
from tgdp_fast.sampling.sampler import sample


def draw_records(
    model_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    num: int,
    statements: Sequence[str] = ("NORM",),
    guided: bool = True,
    solver: str = "dpmpp_2m",
    steps: int = 20,
    spacing: str = "logsnr",
    scale: float = 1.0,
    precision: str = "fp32",
    seed: int = 0,
    batch_size: int = 64,
    device: str = "cpu",
    progress: bool = False,
) -> Path:
    """Draw 12-lead records and write them with :func:`tgdp_fast.ecg.records.output.write_ecg_records`.

    Args:
        model_dir: ``<out>/model`` of a :class:`tgdp_fast.ecg.pipeline.Pipeline`.
        out: new or empty folder for the records.
        num: records.
        statements: of the records, each entry names joined by commas; records take the entries in turn.
        guided: with guidance towards the target; without it these are samples of the source.
        solver, steps, spacing, scale, precision, seed, batch_size: see :func:`tgdp_fast.sample`.
        device: where to draw.
        progress: show progress.

    Returns:
        The folder.

    Raises:
        ValueError: a bad argument, an unknown statement, a model of something else than ECGs.
    """
    check_integer("num", num, 1)
    check_device(device)
    check_new_folder(out)
    try:
        model = TransferModel.load(model_dir)
    except CheckpointError as error:
        raise CheckpointError(f"MODEL_DIR: {error}") from None
    described = model.config.get("ecg")
    if not isinstance(described, dict):
        raise ValueError(f"MODEL_DIR: {model_dir} is no model of ECGs; give OUT/model of tgdp-fast ecg fit")
    rows = [tuple(name.strip() for name in entry.split(",") if name.strip()) for entry in statements]
    if not rows:
        raise ValueError("statements must hold at least one entry, such as NORM")
    for row in rows:
        _check_names(row, tuple(described["statements"]))
    each = [rows[index % len(rows)] for index in range(num)]
    labels = multi_hot(each, tuple(described["statements"])).astype(np.float32)
    table = solver_table(solver, model.denoiser.schedule, steps, spacing=spacing)
    compiled = model.denoiser.to(device).compile_for_sampling(table, precision=precision)
    drawn = sample(
        compiled,
        model.guidance.to(device) if guided else None,
        num=num,
        labels=labels,
        solver=table,
        scale=scale,
        prior=model.prior if guided else None,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    return write_ecg_records(
        out,
        model.standardizer.invert(drawn.cpu().numpy()),
        rate=float(described["rate"]),
        labels=each,
        leads=described["leads"],
        manifest={
            "method": "tgdp" if guided else "source",
            "model": model.signature(),
            "seed": seed,
            "solver": solver,
            "steps": steps,
            "spacing": spacing,
            "scale": scale,
            "precision": precision,
        },
    )


def _check_names(names: Sequence[str], vocabulary: Sequence[str]) -> None:
    for name in names:
        if name not in vocabulary and ALIASES.get(name) not in vocabulary:
            near = get_close_matches(name.upper(), vocabulary, n=3)
            hint = f" (did you mean {' or '.join(near)}?)" if near else ""
            raise ValueError(
                f"statements must be names that the model knows, got {name!r}{hint}; all {len(vocabulary)} with "
                "what they say are in tgdp_fast.ecg.records.statements.DESCRIPTIONS, which docs/ecg.md prints"
            )
