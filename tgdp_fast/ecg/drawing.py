"""Samples: those of each method of a run, and records from a fitted model that lies in a folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tgdp_fast.diffusion.denoiser import Denoiser
from tgdp_fast.diffusion.guidance import GuidanceNetwork
from tgdp_fast.diffusion.prior import Prior
from tgdp_fast.diffusion.solvers import SolverTable, solver_table
from tgdp_fast.ecg.cohorts import Cohorts
from tgdp_fast.ecg.records.output import MANIFEST, check_new_folder, write_ecg_records
from tgdp_fast.ecg.records.statements import ALIASES, label_names, multi_hot, similar
from tgdp_fast.ecg.run import Run
from tgdp_fast.fit.model import TransferModel
from tgdp_fast.ops.registry import requested_backend, use_backend
from tgdp_fast.runtime import distributed
from tgdp_fast.runtime.checkpoint import CheckpointError, described, load_checkpoint, save_checkpoint, signature_of
from tgdp_fast.runtime.checks import check_device, check_integer
from tgdp_fast.runtime.files import new_partial
from tgdp_fast.runtime.locks import target_lock
from tgdp_fast.sampling.config import SamplingConfig
from tgdp_fast.sampling.sampler import Sampler


@dataclass(frozen=True)
class Drawn:
    """Samples of one method: float32 [N, leads, L] in mV, and the labels [N, K] that they were drawn for."""

    signals: np.ndarray
    labels: np.ndarray


def sample_labels(run: Run, cohorts: Cohorts) -> np.ndarray:
    """Labels [num, K] to draw samples for: those of the target records that methods may see, each equally often."""
    labels, num = cohorts.target.labels, run.config.sampling.num
    random = np.random.default_rng(run.seed("labels"))
    rows = np.concatenate([random.permutation(len(labels)) for _ in range(-(-num // len(labels)))])
    return labels[rows[:num]]


def new_sampler(denoiser: Denoiser, guidance: GuidanceNetwork | None, config: SamplingConfig, device: str) -> Sampler:
    """A sampler whose denoiser is compiled for the times of ``config``, on a device."""
    table = config.solver
    if not isinstance(table, SolverTable):
        table = solver_table(table, denoiser.schedule, config.steps, spacing=config.spacing, eta=config.eta)
    with use_backend(requested_backend(config.backend)):  # Filters are prepared for one backend.
        compiled = denoiser.to(device).compile_for_sampling(table, precision=config.precision)
    # The compiled network has its own precision; the guidance stays in fp32.
    config = replace(config, solver=table, precision="fp32")
    return Sampler(compiled, None if guidance is None else guidance.to(device), config)


def draw_samples(
    run: Run,
    cohorts: Cohorts,
    method: str,
    denoiser: Denoiser,
    guidance: GuidanceNetwork | None,
    prior: Prior | None,
) -> Drawn:
    """Samples of one method for :func:`sample_labels`; several processes draw a part each."""
    sampling, labels, name = run.config.sampling, sample_labels(run, cohorts), f"samples-{method}"

    def compute(state_dir: Path | None) -> np.ndarray:
        assert state_dir is not None
        folder = state_dir.with_suffix(".parts")
        with run.costs.of(name):
            folder.mkdir(parents=True, exist_ok=True)
            parts = distributed.parts(sampling.num)
            files = [folder / f"{part.start}-{part.stop}.npy" for part in parts]
            own, file = parts[distributed.rank()], files[distributed.rank()]
            if own:
                new_sampler(denoiser, guidance, sampling, run.device).draw_to_file(
                    file,
                    len(own),
                    first_index=own.start,
                    labels=labels[own.start : own.stop],
                    prior=prior,
                    seed=sampling.seed,
                    batch_size=sampling.batch_size,
                    progress=run.progress,
                )
            distributed.barrier()
            drawn = [np.load(file, allow_pickle=False) for file, part in zip(files, parts, strict=True) if part]
            distributed.barrier()  # The first process removes the files when it has saved them together.
            denoiser.cpu()
            return cohorts.standardizer.invert(np.concatenate(drawn))

    def save(signals: np.ndarray, place: Path) -> None:
        save_checkpoint(place, "samples", {}, {"signals": torch.from_numpy(signals)})
        shutil.rmtree(place.with_name(f"{name}.parts"))

    def load(place: Path) -> np.ndarray:
        tensors = load_checkpoint(place, "samples")[1]
        with described(place, "set of samples"):
            signals: np.ndarray = tensors["signals"].numpy()
            return signals

    start = [] if prior is None else prior.to_tensors().values()
    signature = signature_of(denoiser, guidance, labels, sampling.to_dict(), *start)
    return Drawn(run.stages.run(name, signature, compute, save, load), labels)


def write_samples(run: Run, cohorts: Cohorts, method: str, drawn: Drawn, model: TransferModel) -> Path:
    """Samples of a method as WFDB records with labels and a manifest, in ``<out>/records``, in place of others.

    Raises:
        ValueError: something else lies there.
    """
    sampling, place = run.config.sampling, run.out / "records"
    facts = {name: getattr(sampling, name) for name in ("solver", "steps", "spacing", "scale", "prior", "precision")}

    def write() -> None:
        if (place / MANIFEST).is_file():  # Anything else in the way is refused by what writes.
            removed = new_partial(place)  # Killed while it removes them, it leaves no half of them in the way.
            os.replace(place, removed)
            shutil.rmtree(removed)
        write_ecg_records(
            place,
            drawn.signals,
            rate=cohorts.source.rate,
            labels=label_names((drawn.labels > 0.5).astype(np.uint8), cohorts.source.vocabulary),
            leads=cohorts.source.leads,
            manifest={
                "method": method,
                "model": model.signature(),
                "seed": sampling.seed,
                **facts,
                **_caution(model, guided=method == "tgdp"),
            },
        )

    run.once(write)
    return place


def draw_records(
    model_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: SamplingConfig | None = None,
    *,
    num: int,
    statements: Sequence[str] = ("NORM",),
    guided: bool = True,
    seed: int = 0,
    batch_size: int = 64,
    device: str = "cpu",
    progress: bool = False,
) -> Path:
    """Draw 12-lead records and write them with :func:`tgdp_fast.ecg.records.output.write_ecg_records`.

    Args:
        model_dir: ``<out>/model`` of a :class:`tgdp_fast.ecg.pipeline.Pipeline`.
        out: new or empty folder for the records.
        config: how to sample, with a name as solver and a number as scale; default ``SamplingConfig(steps=20)``.
        num: records.
        statements: of the records, each entry names joined by commas; records take the entries in turn.
        guided: with guidance towards the target; without it these are samples of the source.
        seed, batch_size: see :func:`tgdp_fast.sample`.
        device: where to draw.
        progress: show progress.

    Returns:
        The folder.

    Raises:
        ValueError: a bad argument, an unknown statement, a model of something else than ECGs.
        InUseError: another process writes this folder.
    """
    check_integer("num", num, 1)
    check_device(device)
    place = check_new_folder(out)
    config = config or SamplingConfig(steps=20)
    facts = config.to_dict()
    model = _load_model(model_dir)
    described = model.config["ecg"]
    rows = _check_statements(statements, tuple(described["statements"]))
    each = [rows[index % len(rows)] for index in range(num)]
    with target_lock(place):
        drawn = new_sampler(model.denoiser, model.guidance if guided else None, config, device).draw(
            num,
            labels=multi_hot(each, tuple(described["statements"])).astype(np.float32),
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
                **{name: facts[name] for name in ("solver", "steps", "spacing", "scale", "precision")},
                **_caution(model, guided=guided),
            },
        )


def _caution(model: TransferModel, *, guided: bool) -> dict[str, Any]:
    """What whoever uses samples of ``model`` must know: the preset, and the warnings of the guidance if it is used."""
    return {
        "preset": model.config["ecg"].get("preset"),  # Models of earlier versions do not say.
        "warnings": list(model.diagnostics.get("warnings", [])) if guided else [],
    }


def _load_model(folder: str | os.PathLike[str]) -> TransferModel:
    """The model in ``<out>/model`` of a run.

    Raises:
        ValueError: the folder holds a model of something else, or none.
    """
    try:
        model = TransferModel.load(folder)
    except CheckpointError as error:
        raise CheckpointError(f"MODEL_DIR: {error}") from None
    if not isinstance(model.config.get("ecg"), dict):
        raise ValueError(f"MODEL_DIR: {folder} is no model of ECGs; give OUT/model of tgdp-fast ecg fit")
    return model


def _check_statements(entries: Sequence[str], vocabulary: Sequence[str]) -> list[tuple[str, ...]]:
    """The names in each entry, all of them known to the model."""
    rows = [tuple(name.strip() for name in entry.split(",") if name.strip()) for entry in entries]
    if not rows:
        raise ValueError("statements must hold at least one entry, such as NORM")
    for name in (name for row in rows for name in row):
        if name not in vocabulary and ALIASES.get(name) not in vocabulary:
            near = similar(name, vocabulary, 3)
            hint = f" (did you mean {' or '.join(near)}?)" if near else ""
            raise ValueError(
                f"statements must be names that the model knows, got {name!r}{hint}; all {len(vocabulary)} with "
                "what they say are in tgdp_fast.ecg.records.statements.DESCRIPTIONS, which docs/ecg.md prints"
            )
    return rows
