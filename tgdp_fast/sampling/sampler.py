"""Sampling: models and settings held by one object that draws sample sets, in memory or into a file.

Noise depends only on seed and sample index, so a sample set may be divided into batches, blocks and processes freely.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tgdp_fast.diffusion.guided import EpsilonModel, Guidance, GuidedDenoiser
from tgdp_fast.diffusion.prior import Prior
from tgdp_fast.diffusion.solvers import SolverTable
from tgdp_fast.ops.noise import normal
from tgdp_fast.ops.registry import requested_backend, use_backend
from tgdp_fast.runtime.checkpoint import signature_of
from tgdp_fast.runtime.checks import check_device, check_integer, check_seed
from tgdp_fast.runtime.evaluation import evaluation_mode
from tgdp_fast.runtime.memory import check_memory
from tgdp_fast.runtime.precision import PRECISIONS, autocast
from tgdp_fast.runtime.progress import progress_bar
from tgdp_fast.sampling.arguments import (
    check_prior,
    check_schedules,
    device_of,
    event_shape_of,
    labels_of,
    scales_of,
    table_of,
    taken_apart,
)
from tgdp_fast.sampling.blocks import BlockFile
from tgdp_fast.sampling.config import BF16X3, SamplingConfig
from tgdp_fast.sampling.full_trajectory import FullTrajectory
from tgdp_fast.sampling.loop import GraphCache, Loop

#: callback(step, t, x, x0): solver step, its time, the state after it, the predicted clean sample.
Callback = Callable[[int, float, Tensor, Tensor], None]


class SamplingDivergedError(ArithmeticError):
    """The state became infinite or NaN; carries ``evaluation`` (0-based) and ``time``."""

    def __init__(self, evaluation: int, time: float, table: SolverTable) -> None:
        self.evaluation = evaluation
        self.time = time
        advice = (
            "Lower scale, set gradient_norm_limit or clamp, use more steps, or a first-order solver (ddim)"
            if evaluation > 0
            else "At the first one the models themselves gave no finite numbers: look at denoiser.epsilon(x, t) and at "
            "guidance.log_ratio_and_grad(x, t) of standard normal x"
        )
        super().__init__(
            f"sampling diverged: x is not finite after evaluation {evaluation} of {table.nfe} (t = {time:.4g}, solver "
            f"{table.solver}, {table.spacing} spacing). {advice}"
        )


def sample(
    denoiser: EpsilonModel | GuidedDenoiser,
    guidance: Guidance | None = None,
    *,
    num: int,
    shape: tuple[int, ...] | None = None,
    labels: Any = None,
    prior: Prior | None = None,
    seed: int = 0,
    first_index: int = 0,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    **settings: Any,
) -> Tensor:
    """Draw samples of the target domain in one call (TGDP section 3.1, Theorem 3.1).

    To draw more than once, create a :class:`Sampler`: it keeps everything that does not change between draws.

    Args:
        denoiser, guidance, shape, device: as in :class:`Sampler`.
        num, labels, prior, seed, first_index, batch_size, callback, progress: as in :meth:`Sampler.draw`.
        settings: the fields of :class:`SamplingConfig`: solver, steps, spacing, eta, scale, interval, clamp,
            gradient_norm_limit, precision, backend.

    Returns:
        [num, *shape] float32, on the device.

    Raises:
        ValueError: a bad argument; models that do not match. No network has been run then.
        TypeError: a setting that :class:`SamplingConfig` does not have.
        SamplingDivergedError: the state is not finite. If the full trajectory is one operator, and on an
            accelerator, this is detected at the end of a batch, otherwise at once.
    """
    sampler = Sampler(denoiser, guidance, SamplingConfig(**settings), shape=shape, device=device)
    return sampler.draw(
        num,
        labels=labels,
        prior=prior,
        seed=seed,
        first_index=first_index,
        batch_size=batch_size,
        callback=callback,
        progress=progress,
    )


@dataclass(frozen=True)
class _Request:
    """Checked arguments of one draw."""

    num: int
    labels: Tensor | None  # one row per sample, on the device
    prior: Prior | None  # on the device
    seed: int
    first_index: int
    batch_size: int
    device: torch.device
    callback: Callback | None


class Sampler:
    """Models and settings for any number of draws, with everything derived from them.

    It holds the solver's table, the guidance weight of each evaluation and, on a GPU, the CUDA graphs of its loop by
    batch shape: another draw with the same shape is one replay per batch. Models may change between draws: weights,
    hooks and other attributes are checked before a graph is used. The graph of a stochastic solver belongs to one seed.
    Graphs keep the settings of torch, such as TF32, from their capture. The noise schedule, the scale and the shape of
    a sample are read once, here. Threads may share it: draws with graphs wait for each other.

    Args:
        denoiser: a :class:`Denoiser`, anything with ``schedule`` and ``epsilon(x, t, labels)``, or a
            :class:`GuidedDenoiser` (then guidance, scale, interval, clamp and gradient_norm_limit must be left at their
            defaults).
        guidance: a :class:`GuidanceNetwork` or anything with ``log_ratio_and_grad``; None samples the source.
        config: the settings; default: ``SamplingConfig()``.
        shape: shape of one sample; may be omitted if the denoiser has an ``event_shape``.
        device: where to sample; None: the device of the models' parameters.

    Attributes:
        denoiser, guidance, config, shape: as given, or those of the :class:`GuidedDenoiser`.
        table: the :class:`SolverTable`, K evaluations.
        weights: [K] floats, scale * sigma at each evaluation; 0 outside the interval and without guidance.

    Raises:
        ValueError: a bad argument; models that do not match.
    """

    def __init__(
        self,
        denoiser: EpsilonModel | GuidedDenoiser,
        guidance: Guidance | None = None,
        config: SamplingConfig | None = None,
        *,
        shape: tuple[int, ...] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        self.denoiser, self.guidance, self.config = taken_apart(denoiser, guidance, config)
        config = self.config
        requested_backend(config.backend)  # The environment may name another one.
        self._models = {"denoiser": self.denoiser} | ({} if self.guidance is None else {"guidance": self.guidance})
        check_schedules(self._models)
        self.table = table_of(config, self.denoiser.schedule)
        self.shape = event_shape_of(shape, self._models)
        self._requested_device = None if device is None else check_device(device)
        device_of(self._requested_device, self._models)
        self._scales = [0.0] * self.table.nfe if self.guidance is None else scales_of(config, self.table)
        pairs = zip(self._scales, self.table.sigma.tolist(), strict=True)
        self.weights = tuple(scale * sigma for scale, sigma in pairs)
        limits = config.clamp, config.gradient_norm_limit
        self._loop = Loop(self.denoiser, self.guidance, self.table, self.weights, *limits)
        self._graphs = GraphCache("the sampling loop", (self.denoiser, self.guidance))

    def draw(
        self,
        num: int,
        *,
        labels: Any = None,
        prior: Prior | None = None,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int | None = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draw samples of the target domain.

        Sample ``i`` depends only on ``seed`` and ``first_index + i``, not on ``batch_size`` or on the process that
        draws it (up to rounding of the networks' matmuls).

        Args:
            num: number of samples.
            labels: one class index for all, indices [num], or soft / multi-hot rows [num, K]. Required by conditional
                models, refused if no model uses labels.
            prior: distribution of the first state, a :class:`GaussianPrior` or :class:`EmpiricalPrior`; None for
                N(0, I), which is correct if the schedule ends with almost no signal.
            seed: 0 <= seed < 2**64.
            first_index: index of the first sample; shards draw disjoint ranges of one sample set.
            batch_size: samples per batch; bounds memory, which does not grow with steps. Default: as many as have 2**21
                values, at most 8,192.
            callback: ``callback(step, t, x, x0)`` after each solver step of each batch. With it, evaluations run one by
                one.
            progress: see :mod:`tgdp_fast.runtime.progress`.

        Returns:
            [num, *shape] float32, on the device.

        Raises:
            ValueError: a bad argument. No network has been run then.
            SamplingDivergedError: as :func:`sample`.
        """
        request = self._request(num, labels, prior, seed, first_index, batch_size, callback)
        self._check_size(num, request.device)
        with progress_bar(request.num, "sampling", "sample", progress) as bar:
            return self._run(request, 0, request.num, bar)

    def draw_to_file(
        self,
        path: str | os.PathLike[str],
        num: int,
        *,
        finish: Callable[[np.ndarray], np.ndarray] | None = None,
        signature: str | None = None,
        block_size: int | None = None,
        progress: bool = False,
        **options: Any,
    ) -> np.ndarray:
        """:meth:`draw`, writing ``path`` (.npy) atomically and resuming after a kill at any moment.

        The folder ``<path>.partial`` holds finished blocks until the file is complete. A later call reuses them if it
        requests the same samples of the same models, for any batch_size, block_size, backend and device. Otherwise it
        discards them once it has finished its first block.

        Args:
            path: the .npy file, in an existing folder; float32 [num, *shape].
            num: number of samples.
            finish: applied to the whole array before it is written (e.g. undoing a standardization).
            signature: text that identifies the models, such as a hash; needed only if one is not an ``nn.Module``. The
                default is a hash of their weights and buffers, ``to_config()`` and ``repr``.
            block_size: samples per saved block, the most that a kill can lose. Default: as many as have 2**21 values
                (8 MB), at most 8,192, or one batch if that is more. No batch is larger.
            progress: as in :meth:`draw`.
            options: labels, prior, seed, first_index, batch_size and callback, as in :meth:`draw`.

        Returns:
            The array written.

        Raises:
            ValueError: as :meth:`draw`; a bad path or block_size; no signature for models that need one. Nothing has
                been written or removed then.
            SamplingDivergedError: the state is not finite.
        """
        request = self._request(num, **options)
        self._check_size(num, None)
        if block_size is None:
            block_size = max(request.batch_size, _default_batch_size(self.shape))
        block_size = check_integer("block_size", block_size, 1)
        file = BlockFile(path)
        if signature is None:
            signature = _signature(self._models)
        elif not isinstance(signature, str) or not signature:
            raise ValueError(f"signature must be a text that identifies the models, or None, got {signature!r}")
        identity = json.dumps({"signature": signature, **self._identity(request)}, sort_keys=True)
        shape = (request.num, *self.shape)
        with progress_bar(request.num, "sampling", "sample", progress) as bar:

            def block(start: int, stop: int) -> np.ndarray:
                if bar.n < start:
                    bar.reset_to(start)  # Blocks of an earlier run.
                values: np.ndarray = self._run(request, start, stop, bar).cpu().numpy()
                return values

            return file.write(shape, identity, block_size, block, finish=finish)

    def _request(
        self,
        num: int,
        labels: Any = None,
        prior: Prior | None = None,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int | None = None,
        callback: Callback | None = None,
    ) -> _Request:
        """Check the arguments of a draw without running a network."""
        num = check_integer("num", num, 0)
        first_index = check_integer("first_index", first_index, 0)
        if first_index + num > 2**63:
            raise ValueError(f"first_index + num must be at most 2^63, got {first_index} + {num}")
        seed = check_seed(seed)
        if batch_size is None:
            batch_size = _default_batch_size(self.shape)
        if callback is not None and not callable(callback):
            raise ValueError(f"callback must be callable as callback(step, t, x, x0), got {callback!r}")
        device = device_of(self._requested_device, self._models)
        rows = labels_of(labels, num, self._models)
        check_prior(prior, self.shape)
        return _Request(
            num,
            None if rows is None else rows.to(device),
            None if prior is None else prior.to(device),
            seed,
            first_index,
            check_integer("batch_size", batch_size, 1),
            device,
            callback,
        )

    def _check_size(self, num: int, device: torch.device | None) -> None:
        """Refuse more samples than fit into the memory of ``device``, or of the host (None)."""
        needed, what = 4 * num * math.prod(self.shape), f"samples of shape {self.shape} in float32"
        advice = "draw them in parts: first_index says where each begins"
        check_memory("num", num, needed, what, advice, device=device)

    def _identity(self, request: _Request) -> dict[str, Any]:
        """Everything the samples depend on besides the models, JSON-able; the scales include the interval."""
        return {
            "guided": self.guidance is not None,
            "scales": self._scales,
            "clamp": self.config.clamp,
            "gradient_norm_limit": self.config.gradient_norm_limit,
            "table": self.table.signature(),
            "num": request.num,
            "shape": self.shape,
            "labels": signature_of(request.labels),
            "prior": None if request.prior is None else signature_of(*request.prior.to_tensors().values()),
            "seed": request.seed,
            "first_index": request.first_index,
            "precision": self.config.precision,
        }

    def _run(self, request: _Request, start: int, stop: int, bar: Any) -> Tensor:
        """Samples ``start`` to ``stop`` of a draw: float32 [stop - start, *shape]."""
        device, config, table = request.device, self.config, self.table
        with torch.inference_mode(False):  # An ordinary tensor, also if the caller is in inference mode.
            result = torch.empty((stop - start, *self.shape), dtype=torch.float32, device=device)
        batches = range(start, stop, request.batch_size)
        backend = nullcontext() if config.backend == "auto" else use_backend(config.backend)
        models, settings = evaluation_mode(self.denoiser, self.guidance), self._settings(request)
        with torch.inference_mode(), autocast("fp32", device.type), backend, models as (denoiser, guidance):
            full = None
            if request.callback is None:
                dtype, bf16x3 = PRECISIONS.get(config.precision, torch.float32), config.precision == BF16X3
                full = FullTrajectory.of(self._loop, dtype, config.backend, bf16x3=bf16x3, samples=request.num)
            captured = _can_capture(device) and request.callback is None and full is None
            loop = partial(replace(self._loop, denoiser=denoiser, guidance=guidance), seed=request.seed)
            with self._graphs.checked(settings) if captured else nullcontext():
                for first in batches:
                    last = min(first + request.batch_size, stop)
                    x, indices, labels = self._initial_state(request, first, last)
                    if full is not None:
                        x, diverged = full.run(x, labels, request.seed, indices)
                    else:
                        with autocast(config.precision, device.type):
                            if captured:
                                x, finite = self._graphs.run(loop, x, indices, labels)
                            else:
                                x, finite = loop(x, indices, labels, after=self._after(request, first, last, bar))
                        diverged = -1 if finite.all() else int((~finite).int().argmax())
                    if diverged >= 0:
                        raise SamplingDivergedError(diverged, float(table.times[diverged]), table)
                    result[first - start : last - start] = x
                    bar.update(last - bar.n)
        return result

    def _initial_state(self, request: _Request, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """x_T [B, *shape], sample indices [B] and labels of one batch."""
        device, table = request.device, self.table
        # The last index may be 2^63 - 1, whose successor no int64 holds.
        indices = torch.arange(stop - start, device=device) + (request.first_index + start)
        if request.prior is None:
            x = normal(request.seed, indices, math.prod(self.shape), 0, device=device)
            x = x.reshape(len(indices), *self.shape)
        else:
            x = request.prior.start(request.seed, indices, float(table.alpha[0]), float(table.sigma[0]))
        return x, indices, None if request.labels is None else request.labels[start:stop]

    def _after(
        self, request: _Request, first: int, last: int, bar: Any
    ) -> Callable[[int, Tensor, Tensor, Tensor], None]:
        """Called after each evaluation of samples ``first`` to ``last`` if evaluations run one by one."""
        table = self.table

        def after(k: int, x: Tensor, x0: Tensor, finite: Tensor) -> None:
            # On an accelerator this check would wait for the device at every evaluation.
            if request.device.type == "cpu" and not finite:
                raise SamplingDivergedError(k, float(table.times[k]), table)
            if table.ends_step[k] and request.callback is not None:
                request.callback(int(table.ends_step[:k].sum()), float(table.times[k]), x, x0)
            # Samples on their way count by the share of their evaluations.
            bar.update(first + (last - first) * (k + 1) // table.nfe - bar.n)

        return after

    def _settings(self, request: _Request) -> tuple[Any, ...]:
        """The values that a graph of the loop keeps from its capture, besides those of this object and the models."""
        place = request.device.type
        return (
            request.seed if self.table.is_stochastic else None,  # The key of the noise is an argument of its launches.
            requested_backend(self.config.backend),
            torch.is_autocast_enabled(place),
            torch.get_autocast_dtype(place),
        )


def _default_batch_size(shape: tuple[int, ...]) -> int:
    return max(1, min(8192, 2**21 // math.prod(shape)))


def _signature(models: Mapping[str, Any]) -> str:
    for name, model in models.items():
        # The text of another object may abbreviate it, or be an address that the next object gets.
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"signature must be given, because the {name} ({type(model).__name__}) is no torch.nn.Module, whose "
                "weights would identify it; pass any text that changes with the models"
            )
    parts = (models["denoiser"], models.get("guidance"))
    # The repr of a module shows properties that its weights do not, such as the activations.
    return signature_of(*parts, *map(repr, parts))


def _can_capture(device: torch.device) -> bool:
    return device.type == "cuda"
