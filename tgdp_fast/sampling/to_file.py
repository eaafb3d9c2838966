"""Samples written to a file, in one call."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from tgdp_fast.diffusion.guided import EpsilonModel, Guidance, GuidedDenoiser
from tgdp_fast.sampling.config import SamplingConfig
from tgdp_fast.sampling.sampler import Sampler


def sample_to_file(
    path: str | os.PathLike[str],
    denoiser: EpsilonModel | GuidedDenoiser,
    guidance: Guidance | None = None,
    *,
    num: int,
    shape: tuple[int, ...] | None = None,
    device: str | torch.device | None = None,
    **arguments: Any,
) -> np.ndarray:
    """:func:`sample`, writing ``path`` (.npy) atomically and resuming after a kill at any moment.

    Args:
        path: the .npy file, in an existing folder; float32 [num, *shape].
        denoiser, guidance, num, shape, device: as in :func:`sample`.
        arguments: the fields of :class:`SamplingConfig`, and the arguments of :meth:`Sampler.draw_to_file`.

    Returns:
        The array written.

    Raises:
        ValueError: as in :func:`sample` and :meth:`Sampler.draw_to_file`. Nothing has been written or removed then.
        TypeError: an argument that neither of them has.
        SamplingDivergedError: the state is not finite.
    """
    settings = {field.name: arguments.pop(field.name) for field in fields(SamplingConfig) if field.name in arguments}
    sampler = Sampler(denoiser, guidance, SamplingConfig(**settings), shape=shape, device=device)
    return sampler.draw_to_file(path, num, **arguments)
