"""One training loop for all networks of this package, resumable at any step, and the training of denoisers."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tgdp_fast.diffusion.denoiser import Denoiser, training_target
from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.fit.batches import Batches, draw_noised
from tgdp_fast.fit.config import TIME_DISTRIBUTIONS, TrainingConfig, check_config
from tgdp_fast.fit.data import ArrayLike, checked_labels, count_classes, warn_of_empty_classes, warn_of_scale
from tgdp_fast.models.mlp import ScoreMLP
from tgdp_fast.runtime import distributed
from tgdp_fast.runtime.arrays import CheckedArray
from tgdp_fast.runtime.checkpoint import (
    CheckpointError,
    check_replaceable,
    load_checkpoint,
    remove_checkpoint,
    save_checkpoint,
    signature_of,
)
from tgdp_fast.runtime.checks import check_choice, check_seed
from tgdp_fast.runtime.precision import ordinary_autograd
from tgdp_fast.runtime.progress import progress_bar
from tgdp_fast.runtime.randomness import draws_globally, global_random_state, seeded_initialization

#: loss(generator) -> scalar to minimize; every random draw must come from the generator.
Loss = Callable[[torch.Generator], Tensor]


class TrainingDivergedError(ArithmeticError):
    """The loss became infinite or NaN."""


@ordinary_autograd()
def minimize(
    module: nn.Module,
    loss: Loss,
    settings: TrainingConfig,
    *,
    seed: int = 0,
    progress: bool = False,
    description: str = "training",
    state_dir: str | os.PathLike[str] | None = None,
    signature: str = "",
    save_every: float = 30.0,
) -> list[float]:
    """Minimize ``loss`` over the parameters of ``module``, which ends with the averaged weights, in eval mode.

    Args:
        module: trained in place.
        loss: see :data:`Loss`.
        settings: see :class:`TrainingConfig`.
        seed: of the generator passed to ``loss``.
        progress, description: see :mod:`tgdp_fast.runtime.progress`.
        state_dir: folder where the full state is saved every ``save_every`` seconds and at Ctrl-C. A state with the
            same signature and settings is resumed, and the result equals that of an uninterrupted run. It is removed at
            the end. A folder with other content is refused.
        signature: identifies the data and the model.

    Several processes (:mod:`tgdp_fast.runtime.distributed`) must call it with the same arguments; gradients are
    averaged, and the first process saves the state.

    Returns:
        The loss at about 100 evenly spaced steps.

    Raises:
        TrainingDivergedError: a non-finite loss.
    """
    check_seed(seed)
    run = _Run(module, settings, seed, signature)
    if state_dir is not None:
        check_replaceable(Path(state_dir))
        run.load(Path(state_dir))
        distributed.barrier()
    module.train()
    saved = time.monotonic()
    stride = max(1, settings.steps // 100)
    bar = progress_bar(settings.steps, description, "step", progress, initial=run.step)
    draws = draws_globally(module)
    with _deferred_interrupt(state_dir is not None) as interrupted, bar:
        while run.step < settings.steps:
            with global_random_state(run.global_state) if draws else nullcontext():
                value = run.advance(loss)
            if (run.step - 1) % stride == 0 or run.step == settings.steps:
                run.history.append(float(value.detach()))
                if not math.isfinite(run.history[-1]):
                    raise TrainingDivergedError(
                        f"{description}: the loss is {run.history[-1]} at step {run.step - 1}; lower learning_rate, or "
                        "check that the data have about unit scale"
                    )
                bar.set_postfix(loss=f"{run.history[-1]:.4g}", refresh=False)
            bar.update()
            due = time.monotonic() - saved > save_every or interrupted.is_set()
            if state_dir is not None and due and run.step < settings.steps and distributed.is_first():
                run.save(Path(state_dir))
                saved = time.monotonic()
            if interrupted.is_set():
                raise KeyboardInterrupt
    run.finish()
    if not all(bool(p.isfinite().all()) for p in run.parameters):
        raise TrainingDivergedError(f"{description}: the weights are not finite; lower learning_rate")
    distributed.barrier()
    if state_dir is not None and distributed.is_first():
        remove_checkpoint(state_dir)
    return run.history


def adamw(groups: list[dict[str, Any]], learning_rate: float) -> torch.optim.AdamW:
    """The optimizer of all networks here; one fused pass over all parameters on devices that support it."""
    fused = all(parameter.device.type in ("cpu", "cuda") for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.99), fused=fused)


class _Run:
    """Everything that changes from step to step."""

    def __init__(self, module: nn.Module, settings: TrainingConfig, seed: int, signature: str) -> None:
        self.module = module
        self.settings = settings
        self.identity = {"signature": signature, "settings": asdict(settings), "seed": seed}
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = adamw([group for group in groups if group["params"]], settings.learning_rate)
        self.average = [p.detach().clone() for p in self.parameters]
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.global_state = torch.Generator("cpu").manual_seed(derived_seed(seed, "global generator")).get_state()
        self.history: list[float] = []
        self.step = 0

    def advance(self, loss: Loss) -> Tensor:
        """One step; returns its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(self.step)
        value = loss(self.generator)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        value = distributed.average_gradients(self.parameters, value)
        nn.utils.clip_grad_norm_(self.parameters, self.settings.gradient_clip)
        self.optimizer.step()
        # The average forgets the initial weights quickly for any decay.
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1.0 - decay)
        self.step += 1
        return value

    def finish(self) -> None:
        """Put the averaged weights into the module."""
        with torch.no_grad():
            for parameter, mean in zip(self.parameters, self.average, strict=True):
                parameter.copy_(mean)
        self.module.eval()

    def save(self, folder: Path) -> None:
        """Write the state, atomically."""
        tensors = {"generator": self.generator.get_state(), "global_generator": self.global_state}
        tensors |= {f"buffer.{name}": value for name, value in self.module.named_buffers()}
        for i, (parameter, mean) in enumerate(zip(self.parameters, self.average, strict=True)):
            tensors[f"parameter.{i}"] = parameter.detach()
            tensors[f"average.{i}"] = mean
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{i}.{key}"] = torch.as_tensor(value, device=getattr(value, "device", "cpu"))
        config = {"identity": self.identity, "step": self.step, "history": self.history}
        save_checkpoint(folder, "training_state", config, tensors)

    def load(self, folder: Path) -> None:
        """Restore a saved state of this same run; a missing or damaged one, or one of another run, is ignored."""
        if not folder.exists():
            return
        try:
            config, tensors = load_checkpoint(folder, "training_state")
        except CheckpointError:
            return
        buffers = dict(self.module.named_buffers())
        needed = {f"{kind}.{i}" for kind in ("parameter", "average") for i in range(len(self.parameters))}
        needed |= {"generator", "global_generator", *(f"buffer.{name}" for name in buffers)}
        if config.get("identity") != self.identity or not needed <= tensors.keys():
            return
        with torch.no_grad():
            for i, (parameter, mean) in enumerate(zip(self.parameters, self.average, strict=True)):
                parameter.copy_(tensors[f"parameter.{i}"])
                mean.copy_(tensors[f"average.{i}"])
                prefix = f"optimizer.{i}."
                for name, value in tensors.items():
                    if name.startswith(prefix):
                        # The fused AdamW counts its steps on the device, the other on the host.
                        fused = bool(self.optimizer.defaults["fused"])
                        key = name.removeprefix(prefix)
                        device = parameter.device if fused or key != "step" else value.device
                        self.optimizer.state[parameter][key] = value.clone().to(device)
            for name, buffer in buffers.items():
                buffer.copy_(tensors[f"buffer.{name}"])
        self.generator.set_state(tensors["generator"])
        self.global_state = tensors["global_generator"]
        self.step = int(config["step"])
        self.history = list(config["history"])


@contextmanager
def _deferred_interrupt(active: bool) -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of raising, so that a step is never interrupted; a second one raises at once."""
    event = threading.Event()
    if not active or threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


@ordinary_autograd()
def train_denoiser(
    data: ArrayLike,
    schedule: NoiseSchedule | None = None,
    *,
    labels: ArrayLike | None = None,
    num_classes: int | None = None,
    initial: Denoiser | None = None,
    settings: TrainingConfig | None = None,
    time_distribution: str = "uniform",
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = False,
    description: str = "denoiser",
    state_dir: str | os.PathLike[str] | None = None,
    **network: Any,
) -> Denoiser:
    """Train a denoiser on samples: the source model, the vanilla baseline, or (with ``initial``) the fine-tuned one.

    Args:
        data: [N, ...] of about unit scale.
        schedule: default: VP linear, beta 0.1 to 20; taken from ``initial`` if given.
        labels: class indices [N] or rows [N, K] for a conditional model.
        num_classes: number of classes; default: from the labels.
        initial: a trained denoiser to fine-tune; it is copied, not changed.
        settings: see :class:`TrainingConfig`.
        time_distribution: "uniform" in t or in "logsnr".
        seed: of initial weights, batches, times and noise.
        device: where to train; default: that of ``initial``, else the CPU.
        progress, description, state_dir: see :func:`minimize`.
        network: prediction, width and depth of a new network, see :func:`new_denoiser`; none with ``initial``.

    Returns:
        The trained denoiser, in eval mode.

    Raises:
        ValueError: bad data or settings.
        TrainingDivergedError: a non-finite loss.
    """
    check_choice("time_distribution", time_distribution, TIME_DISTRIBUTIONS)
    check_seed(seed)
    settings = check_config("settings", TrainingConfig() if settings is None else settings, TrainingConfig)
    samples = CheckedArray.samples("data", data)
    x = samples.tensor(device_of(initial) if device is None else device)
    warn_of_scale("data", x)
    if initial is not None:
        if schedule is not None and schedule != initial.schedule:
            raise ValueError(f"schedule must be that of initial, {initial.schedule}, or left out; got {schedule}")
        if network:
            raise ValueError(f"{', '.join(network)} must be left out: initial brings its own network")
        denoiser = copy.deepcopy(initial).requires_grad_(True).to(x.device)
    else:
        classes = count_classes("labels", labels, len(x), num_classes)
        denoiser = new_denoiser(tuple(x.shape[1:]), schedule, num_classes=classes, seed=seed, **network).to(x.device)
    rows = checked_labels("labels", labels, len(x), denoiser.num_classes)
    if num_classes is None and initial is None and denoiser.num_classes:
        warn_of_empty_classes("labels", denoiser.num_classes, rows)
    y = None if rows is None else rows.tensor(x.device)
    batches = Batches(len(x), settings.batch_size)

    def loss(generator: torch.Generator) -> Tensor:
        _, batch, labels = draw_noised(batches, x, y, denoiser.schedule, generator, time_distribution)
        output = denoiser(batch.x, batch.t, labels)
        if denoiser.prediction == "score":
            output = -batch.sigma * output
        target = training_target(denoiser.prediction, batch.x0, batch.epsilon, batch.alpha, batch.sigma)
        return (output - target).square().mean()

    minimize(
        denoiser,
        loss,
        settings,
        seed=seed,
        progress=progress,
        description=description,
        state_dir=state_dir,
        signature="" if state_dir is None else signature_of(samples, rows, denoiser, time_distribution),
    )
    return denoiser


def new_denoiser(
    event_shape: tuple[int, ...],
    schedule: NoiseSchedule | None = None,
    *,
    prediction: str = "v_prediction",
    width: int = 256,
    depth: int = 4,
    num_classes: int = 0,
    seed: int = 0,
) -> Denoiser:
    """An untrained denoiser of vectors: a :class:`tgdp_fast.ScoreMLP` with initial weights from ``seed``."""
    with seeded_initialization(seed):
        network = ScoreMLP(event_shape, width, depth, num_classes)
    return Denoiser(network, schedule or NoiseSchedule.vp_linear(), prediction, time_input="half_log_snr")


def device_of(model: Any) -> torch.device:
    """Device of a module's parameters; the CPU for anything without parameters."""
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            return parameter.device
    return torch.device("cpu")


def derived_seed(seed: int, purpose: str) -> int:
    """Another seed for another purpose, in 0 .. 2^63 - 1; the same for the same arguments."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "big") >> 1
