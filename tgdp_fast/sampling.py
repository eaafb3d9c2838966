"""Sampling: one loop over a solver table, in chunks, with noise that depends on seed and sample index alone."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tgdp_fast._checks import check_choice, check_integer
from tgdp_fast.checkpoint import save_array, write_atomic
from tgdp_fast.denoiser import evaluation_mode
from tgdp_fast.guidance import EpsilonModel, Guidance, GuidedDenoiser
from tgdp_fast.noise import normal
from tgdp_fast.ops import guided_step
from tgdp_fast.ops._dispatch import use_backend
from tgdp_fast.solvers import SolverTable, solver_table

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

#: callback(step, t, x, x0): solver step, its time, the state after it, the predicted clean sample.
Callback = Callable[[int, float, Tensor, Tensor], None]


class SamplingDivergedError(ArithmeticError):
    """The state became infinite or NaN; carries ``evaluation`` (0-based) and ``time``."""

    def __init__(self, evaluation: int, time: float, table: SolverTable) -> None:
        self.evaluation = evaluation
        self.time = time
        super().__init__(
            f"sampling diverged: x is not finite after evaluation {evaluation} of {table.nfe} (t = {time:.4g}, solver "
            f"{table.solver}, {table.spacing} spacing). Lower scale, set gradient_norm_limit or clamp, use more steps, "
            "or a first-order solver (ddim)"
        )


def sample(
    denoiser: EpsilonModel | GuidedDenoiser,
    guidance: Guidance | None = None,
    *,
    num: int,
    shape: tuple[int, ...] | None = None,
    labels: Any = None,
    solver: str | SolverTable = "dpmpp_2m",
    steps: int = 25,
    spacing: str = "logsnr",
    eta: float | None = None,
    scale: float | Callable[[float], float] = 1.0,
    interval: tuple[float, float] | None = None,
    clamp: tuple[float, float] | None = None,
    gradient_norm_limit: float | None = None,
    seed: int = 0,
    first_index: int = 0,
    batch_size: int | None = None,
    precision: str = "fp32",
    backend: str = "auto",
    device: str | torch.device | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Draw samples of the target domain (TGDP section 3.1, Theorem 3.1).

    Sample ``i`` depends on ``seed`` and ``first_index + i`` alone: not on ``batch_size``, nor on which process drew it
    (up to rounding of the network's products).

    Args:
        denoiser: a :class:`Denoiser`, anything with ``schedule`` and ``epsilon(x, t, labels)``, or a
            :class:`GuidedDenoiser` (then the guidance arguments below must be left at their defaults).
        guidance: a :class:`GuidanceNetwork` or anything with ``log_ratio_and_grad``; None samples the source.
        num: number of samples.
        shape: shape of one sample; may be left out when the denoiser states its ``event_shape``.
        labels: one class index for all, indices [num], or soft / multi-hot rows [num, K].
        solver: a name in ``SOLVERS``, or a ready :class:`SolverTable` (then steps, spacing and eta are its own).
        steps: solver steps; two-evaluation solvers run the network up to twice a step (``table.nfe``).
        spacing: "logsnr", "uniform" or "karras".
        eta: stochasticity of ddim and euler_ancestral.
        scale, interval, clamp, gradient_norm_limit: see :class:`GuidedDenoiser`.
        seed: 0 <= seed < 2**64.
        first_index: index of the first sample; shards draw disjoint ranges of one sample set.
        batch_size: samples in flight; bounds memory, which does not grow with steps.
        precision: of the networks, "fp32", "bf16" or "fp16" (autocast); the state is fp32 always.
        backend: of the operators, "auto", "reference", ...
        device: default is that of the denoiser's parameters.
        callback: called after each solver step of each batch.
        progress: show a progress bar over network evaluations.

    Returns:
        float32 [num, *shape] on ``device``.

    Raises:
        ValueError: a bad argument, before any work.
        SamplingDivergedError: the state is not finite.
    """
    num = check_integer("num", num, 0)
    first_index = check_integer("first_index", first_index, 0)
    guided = _guided(denoiser, guidance, scale, interval, clamp, gradient_norm_limit)
    shape = _event_shape(shape, guided)
    dtype = PRECISIONS[check_choice("precision", precision, PRECISIONS)]
    table = solver if isinstance(solver, SolverTable) else _table(solver, guided, steps, spacing, eta)
    device = torch.device(device) if device is not None else _device_of(guided.denoiser)
    all_labels = _labels(labels, num, device)
    elements = math.prod(shape)
    if batch_size is None:
        batch_size = max(1, min(8192, 2**21 // max(elements, 1)))
    batch_size = check_integer("batch_size", batch_size, 1)

    result = torch.empty((num, *shape), dtype=torch.float32, device=device)
    chunks = range(0, num, batch_size)
    autocast = torch.autocast(device.type, dtype) if dtype is not None else nullcontext()
    hidden = None if progress else True  # None: shown on a terminal only
    bar = tqdm(total=len(chunks) * table.nfe, desc="sampling", unit="evaluation", disable=hidden, leave=False)
    networks = (guided.denoiser, guided.guidance)
    with torch.inference_mode(), evaluation_mode(*networks), _backend(backend), autocast, bar:
        for start in chunks:
            stop = min(start + batch_size, num)
            indices = torch.arange(first_index + start, first_index + stop, device=device)
            chunk_labels = None if all_labels is None else all_labels[start:stop]
            result[start:stop] = _run_table(guided, table, shape, chunk_labels, seed, indices, callback, bar)
    return result.clone() if result.is_inference() else result


def _run_table(
    guided: GuidedDenoiser,
    table: SolverTable,
    shape: tuple[int, ...],
    labels: Tensor | None,
    seed: int,
    indices: Tensor,
    callback: Callback | None,
    bar: Any,
) -> Tensor:
    """All evaluations of one chunk. The hot loop."""
    device = indices.device
    x = normal(seed, indices, math.prod(shape), 0, device=device).reshape(len(indices), *shape)
    history = x.new_zeros((table.history, *x.shape)) if table.history else None
    finite = []
    step = 0
    for k in range(table.nfe):
        t = float(table.times[k])
        evaluation = guided.evaluate(x, t, labels)
        x, history, x0 = guided_step(
            x,
            evaluation.epsilon,
            evaluation.gradient,
            history,
            matrix=table.matrix[k],
            noise_scale=float(table.noise_scale[k]),
            guidance_weight=evaluation.weight,
            alpha=float(table.alpha[k]),
            sigma=float(table.sigma[k]),
            clamp=guided.clamp,
            seed=seed,
            sample_index=indices,
            evaluation=k + 1,
        )
        finite.append(x.isfinite().all())
        if device.type == "cpu" and not finite[-1]:  # On an accelerator asking would wait for it at every evaluation.
            raise SamplingDivergedError(k, t, table)
        if table.ends_step[k]:
            if callback is not None:
                callback(step, t, x, x0)
            step += 1
        bar.update()
    verdict = torch.stack(finite)
    if not verdict.all():
        first = int((~verdict).int().argmax())
        raise SamplingDivergedError(first, float(table.times[first]), table)
    return x


def sample_to_file(
    path: str | os.PathLike[str],
    denoiser: EpsilonModel | GuidedDenoiser,
    guidance: Guidance | None = None,
    *,
    num: int,
    finish: Callable[[np.ndarray], np.ndarray] | None = None,
    signature: str = "",
    block_size: int | None = None,
    labels: Any = None,
    first_index: int = 0,
    progress: bool = False,
    **arguments: Any,
) -> np.ndarray:
    """:func:`sample`, writing ``path`` (.npy) atomically and resuming after a kill at any moment.

    Finished blocks lie in the folder ``<path>.partial`` until the file is complete.

    Args:
        path: the .npy file; float32 [num, *shape].
        finish: applied to the whole array before it is written (e.g. undoing a standardisation).
        signature: anything that identifies the models (a hash); blocks of another signature, or of other arguments, are
            discarded.
        block_size: samples per saved block (default: 16 batches' worth, at least 1,000).
        num, labels, first_index, progress, arguments: as in :func:`sample`.

    Returns:
        The array written.
    """
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    num = check_integer("num", num, 0)
    all_labels = _labels(labels, num, torch.device("cpu"))
    if block_size is None:
        block_size = max(1000, 16 * int(arguments.get("batch_size") or 0))
    identity = {
        "signature": signature,
        "first_index": first_index,
        "num": num,
        "block_size": block_size,
        "labels": None if all_labels is None else all_labels.tolist(),
        # Neither memory nor the bar changes the samples.
        "arguments": {k: str(v) for k, v in sorted(arguments.items()) if k not in ("batch_size", "callback")},
    }
    text = json.dumps(identity, sort_keys=True)
    stamp = partial / "arguments.json"
    if not (stamp.is_file() and stamp.read_text() == text):
        _discard_blocks(partial)
        partial.mkdir(parents=True, exist_ok=True)
        write_atomic(stamp, text)
    blocks = []
    for start in tqdm(
        range(0, num, block_size), desc="blocks", disable=None if progress and num > block_size else True, leave=False
    ):
        stop = min(start + block_size, num)
        block = partial / f"block-{start:012d}.npy"
        if not block.is_file():
            drawn = sample(
                denoiser,
                guidance,
                num=stop - start,
                labels=None if all_labels is None else all_labels[start:stop],
                first_index=first_index + start,
                progress=progress,
                **arguments,
            )
            save_array(block, drawn.cpu().numpy())
        blocks.append(np.load(block, allow_pickle=False))
    result = np.concatenate(blocks) if blocks else sample(denoiser, guidance, num=0, **arguments).cpu().numpy()
    if finish is not None:
        result = finish(result)
    save_array(target, result)
    _discard_blocks(partial)
    return result


def _discard_blocks(folder: Path) -> None:
    """Remove the blocks this module wrote, and the folder if nothing else lies in it."""
    if not folder.is_dir():
        return
    for file in [*folder.glob("block-*.npy"), folder / "arguments.json"]:
        file.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _guided(
    denoiser: EpsilonModel | GuidedDenoiser,
    guidance: Guidance | None,
    scale: float | Callable[[float], float],
    interval: tuple[float, float] | None,
    clamp: tuple[float, float] | None,
    gradient_norm_limit: float | None,
) -> GuidedDenoiser:
    if not isinstance(denoiser, GuidedDenoiser):
        return GuidedDenoiser(
            denoiser,
            guidance,
            scale=scale,
            interval=interval,
            clamp=clamp,
            gradient_norm_limit=gradient_norm_limit,
        )
    given = {
        "guidance": guidance,
        "interval": interval,
        "clamp": clamp,
        "gradient_norm_limit": gradient_norm_limit,
    }
    repeated = [name for name, value in given.items() if value is not None] + (["scale"] if scale != 1.0 else [])
    if repeated:
        raise ValueError(f"{', '.join(repeated)}: set on the GuidedDenoiser that was passed, not again in sample()")
    return denoiser


def _event_shape(shape: tuple[int, ...] | None, guided: GuidedDenoiser) -> tuple[int, ...]:
    known = getattr(guided.denoiser, "event_shape", None) or getattr(guided.guidance, "event_shape", None)
    if shape is None:
        if known is None:
            raise ValueError(
                "shape must be given (the shape of one sample): the denoiser does not state its event_shape"
            )
        return tuple(known)
    try:
        shape = tuple(check_integer("shape entries", size, 1) for size in shape)
    except TypeError:
        raise ValueError(f"shape must be a tuple of integers, the shape of one sample, got {shape!r}") from None
    if known is not None and shape != tuple(known):
        raise ValueError(f"shape must be {tuple(known)}, the event_shape of the model, got {shape}")
    return shape


def _table(solver: str, guided: GuidedDenoiser, steps: int, spacing: str, eta: float | None) -> SolverTable:
    return solver_table(solver, guided.schedule, steps, spacing=spacing, eta=eta)


def _device_of(model: Any) -> torch.device:
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            return parameter.device
    return torch.device("cpu")


def _labels(labels: Any, num: int, device: torch.device) -> Tensor | None:
    """None, or labels with one row per sample."""
    if labels is None:
        return None
    result = torch.as_tensor(labels, device=device)
    if result.ndim == 0:
        result = result.expand(num)
    if result.ndim > 2 or len(result) != num:
        raise ValueError(
            f"labels must be one class index, {num} indices, or {num} rows of class weights (num = {num}), got shape "
            f"{tuple(result.shape)}"
        )
    return result


@contextmanager
def _backend(name: str) -> Iterator[None]:
    if name == "auto":
        yield
    else:
        with use_backend(name):
            yield
