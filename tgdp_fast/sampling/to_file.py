"""Samples written to a file in blocks, so that a killed run goes on where it stopped."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from tgdp_fast.diffusion.guided import EpsilonModel, Guidance, GuidedDenoiser
from tgdp_fast.runtime.checkpoint import signature_of
from tgdp_fast.runtime.checks import check_integer
from tgdp_fast.runtime.files import save_array, write_atomic
from tgdp_fast.runtime.progress import announce
from tgdp_fast.sampling.sampler import _default_batch_size, _draw, _prepare, sample

# What sample_to_file may leave in its folder: finished blocks, the run they belong to, and a save that was killed.
_OWN_FILE = re.compile(
    r"(block-\d{12}\.npy|arguments\.json)|\.(block-\d{12}\.npy|arguments\.json)\.[0-9a-f]{8}\.partial"
)


def sample_to_file(
    path: str | os.PathLike[str],
    denoiser: EpsilonModel | GuidedDenoiser,
    guidance: Guidance | None = None,
    *,
    num: int,
    finish: Callable[[np.ndarray], np.ndarray] | None = None,
    signature: str | None = None,
    block_size: int | None = None,
    progress: bool = False,
    **arguments: Any,
) -> np.ndarray:
    """:func:`sample`, writing ``path`` (.npy) atomically and resuming after a kill at any moment.

    Finished blocks lie in the folder ``<path>.partial`` until the file is complete. A later call takes them up if it
    asks for the same samples of the same models, whatever its batch_size, block_size, backend and device; otherwise it
    discards them, once it has a block of its own.

    Args:
        path: the .npy file, in an existing folder; float32 [num, *shape].
        finish: applied to the whole array before it is written (e.g. undoing a standardisation).
        signature: text that identifies the models, such as a hash; needed only where one is no ``nn.Module``. The
            default is a hash of their weights and buffers, ``to_config()`` and ``repr``.
        block_size: samples per saved block, and the most that a kill can cost (default: 2**21 values' worth, 8 MB, but
            at most 8,192 samples; or one batch, if that is more). No batch is larger.
        num, progress, arguments: as in :func:`sample`.

    Returns:
        The array written.

    Raises:
        ValueError: as in :func:`sample`; a bad path or block_size; no signature for models that need one. Nothing has
            been written or removed then.
        SamplingDivergedError: the state is not finite.
    """
    bound = inspect.signature(sample).bind(denoiser, guidance, num=num, **arguments)
    bound.apply_defaults()
    del bound.arguments["progress"]
    plan = _prepare(**bound.arguments)
    if block_size is None:
        block_size = max(plan.batch_size, _default_batch_size(plan.shape))
    block_size = check_integer("block_size", block_size, 1)
    target, partial = _target(path)
    if signature is None:
        signature = _signature(plan.guided)
    elif not isinstance(signature, str) or not signature:
        raise ValueError(f"signature must be a text that identifies the models, or None, got {signature!r}")
    identity = json.dumps({"signature": signature, **plan.identity()}, sort_keys=True)

    stamp = partial / "arguments.json"
    resumes = stamp.is_file() and stamp.read_text(encoding="utf-8") == identity
    result = np.empty((plan.num, *plan.shape), dtype=np.float32)
    announce(f"sampling: {num} samples", progress)
    hidden = None if progress and plan.num > block_size else True  # None: shown on a terminal only
    stop = 0
    with tqdm(total=plan.num, desc="samples", disable=hidden, leave=False) as bar:
        while (start := stop) < plan.num:
            block = partial / f"block-{start:012d}.npy"
            if resumes and block.is_file():
                values = np.load(block, allow_pickle=False)  # As many as that run saved at once.
            else:
                values = _draw(plan, start, min(start + block_size, plan.num), progress).cpu().numpy()
                if not resumes:  # Only now, so that a run that fails at once costs no finished blocks.
                    _discard_blocks(partial)
                    partial.mkdir(exist_ok=True)
                    write_atomic(stamp, identity)
                    resumes = True
                save_array(block, values)
            stop = start + len(values)
            result[start:stop] = values
            bar.update(len(values))
    if finish is not None:
        result = finish(result)
    save_array(target, result)
    _discard_blocks(partial)
    return result


def _target(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The file to write and the folder for its blocks, both usable."""
    target = Path(path)
    if target.suffix != ".npy" or target.is_dir():
        raise ValueError(f"path must be a file that ends in .npy, got {str(path)!r}")
    if not target.parent.is_dir():
        raise ValueError(f"path must lie in an existing folder, got {str(path)!r}; create {target.parent} first")
    partial = target.with_name(target.name + ".partial")
    if partial.exists() and not partial.is_dir():
        raise ValueError(f"path {str(path)!r} needs the folder {partial} for its blocks, but that is a file; move it")
    return target, partial


def _signature(guided: GuidedDenoiser) -> str:
    models = {"denoiser": guided.denoiser, "guidance": guided.guidance}
    for name, model in models.items():
        # The text of another object may abbreviate it, or be an address that the next object gets.
        if model is not None and not isinstance(model, nn.Module):
            raise ValueError(
                f"signature must be given, because the {name} ({type(model).__name__}) is no torch.nn.Module, whose "
                "weights would identify it; pass any text that changes with the models"
            )
    # The repr of a module tells what its weights do not, such as the activations.
    return signature_of(*models.values(), *map(repr, models.values()))


def _discard_blocks(folder: Path) -> None:
    """Remove the files this module wrote, and the folder if nothing else lies in it."""
    if not folder.is_dir():
        return
    for file in list(folder.iterdir()):
        if _OWN_FILE.fullmatch(file.name) and file.is_file():
            file.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
