"""One optimisation loop for every network here, resumable to the step, and the training of denoisers with it."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tgdp_fast.diffusion.denoiser import Denoiser, per_sample, training_target
from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.models.mlp import ScoreMLP
from tgdp_fast.runtime import distributed
from tgdp_fast.runtime.arrays import check_labels, check_samples
from tgdp_fast.runtime.checkpoint import (
    CheckpointError,
    check_replaceable,
    load_checkpoint,
    remove_checkpoint,
    save_checkpoint,
    signature_of,
)
from tgdp_fast.runtime.checks import check_choice, check_device, check_integer, check_number, check_seed
from tgdp_fast.runtime.progress import announce

TIME_DISTRIBUTIONS = ("uniform", "logsnr")

#: loss(generator) -> scalar to minimise; every random draw must come from the generator.
Loss = Callable[[torch.Generator], Tensor]


class TrainingDivergedError(ArithmeticError):
    """The loss became infinite or NaN."""


@dataclass(frozen=True)
class Optimisation:
    """Settings of the loop: AdamW, linear warm-up, cosine decay to zero, moving average of the weights.

    Weight decay applies to matrices, not to biases. The moving average is what is kept.
    """

    steps: int = 2000
    batch_size: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    ema_decay: float = 0.999
    warmup: int = 50
    gradient_clip: float = 1.0

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 1)
        check_integer("batch_size", self.batch_size, 1)
        check_number("learning_rate", self.learning_rate, 0.0, exclusive=True)
        check_number("weight_decay", self.weight_decay, 0.0)
        check_number("ema_decay", self.ema_decay, 0.0, 1.0 - 1e-12)
        check_integer("warmup", self.warmup, 0)
        check_number("gradient_clip", self.gradient_clip, 0.0, exclusive=True)

    def rate(self, step: int) -> float:
        """Learning rate at ``step`` (0-based)."""
        ramp = min(1.0, (step + 1) / (self.warmup + 1))
        return self.learning_rate * ramp * 0.5 * (1.0 + math.cos(math.pi * step / self.steps))


def optimise(
    module: nn.Module,
    loss: Loss,
    settings: Optimisation,
    *,
    seed: int = 0,
    progress: bool = False,
    description: str = "training",
    state_dir: str | os.PathLike[str] | None = None,
    signature: str = "",
    save_every: float = 30.0,
) -> list[float]:
    """Minimise ``loss`` over the parameters of ``module``; leaves the averaged weights in it, in eval mode.

    Args:
        module: trained in place.
        loss: see :data:`Loss`.
        settings: see :class:`Optimisation`.
        seed: of the generator handed to ``loss``.
        progress, description: the progress bar.
        state_dir: folder in which the whole state is kept every ``save_every`` seconds and at Ctrl-C. A state found
            there with the same signature and settings is resumed, and the result is that of an uninterrupted run;
            removed at the end. A folder that holds anything else is refused.
        signature: identifies the data and the model.

    Several processes (:mod:`tgdp_fast.runtime.distributed`) must call it with the same arguments; gradients are
    averaged, and the first process keeps the state.

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
    announce(f"{description}: {settings.steps} steps" + (f", from step {run.step}" if run.step else ""), progress)
    shown = None if progress else True  # None: on a terminal only
    bar = tqdm(total=settings.steps, initial=run.step, desc=description, unit="step", disable=shown, leave=False)
    # Dropout and the like draw from the global generator: seed it, and leave the caller's as it was.
    with torch.random.fork_rng(devices=[]), _deferred_interrupt(state_dir is not None) as interrupted, bar:
        torch.set_rng_state(run.global_state)
        while run.step < settings.steps:
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
    """The optimiser of every network here; one fused pass over all parameters on devices that have it."""
    fused = all(parameter.device.type in ("cpu", "cuda") for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.99), fused=fused)


class _Run:
    """Everything that changes from step to step."""

    def __init__(self, module: nn.Module, settings: Optimisation, seed: int, signature: str) -> None:
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
        self.generator = torch.Generator().manual_seed(seed)
        self.global_state = torch.Generator().manual_seed(derived_seed(seed, "global generator")).get_state()
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
        # The average forgets the initial weights quickly, whatever the decay.
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
        tensors = {"generator": self.generator.get_state(), "global_generator": torch.get_rng_state()}
        tensors |= {f"buffer.{name}": value for name, value in self.module.named_buffers()}
        for i, (parameter, mean) in enumerate(zip(self.parameters, self.average, strict=True)):
            tensors[f"parameter.{i}"] = parameter.detach()
            tensors[f"average.{i}"] = mean
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{i}.{key}"] = torch.as_tensor(value)
        config = {"identity": self.identity, "step": self.step, "history": self.history}
        save_checkpoint(folder, "training_state", config, tensors)

    def load(self, folder: Path) -> None:
        """Restore a saved state of this same run; one that is missing, damaged or another run's is ignored."""
        if not folder.exists():
            return
        try:
            config, tensors = load_checkpoint(folder, "training_state")
        except CheckpointError:
            return
        if config["identity"] != self.identity:
            return
        buffers = dict(self.module.named_buffers())
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
    """Ctrl-C sets the event instead of raising, so that a step is never cut in half; a second one raises at once."""
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


def draw_times(
    schedule: NoiseSchedule, count: int, generator: torch.Generator, distribution: str = "uniform"
) -> Tensor:
    """Training times [count] float32: stratified (one per equal share of the range) in random order.

    "uniform" is uniform in t; "logsnr" uniform in log-SNR. Discrete schedules give integer times.
    """
    order = torch.randperm(count, generator=generator)
    u = (order + torch.rand(count, generator=generator, dtype=torch.float64)) / count
    if distribution == "logsnr":
        low, high = (float(schedule.half_log_snr(t)) for t in (schedule.t_max, schedule.t_min))
        times = schedule.time_from_half_log_snr(low + (high - low) * u)
        times = times.round() if schedule.is_discrete else times
    elif schedule.is_discrete:
        times = (u * (schedule.t_max - schedule.t_min + 1)).floor() + schedule.t_min
    else:
        times = schedule.t_min + (schedule.t_max - schedule.t_min) * u
    return times.clamp(schedule.t_min, schedule.t_max).float()


class Batches:
    """Random rows of a sample set.

    A set that fits into the batch is repeated within it, each sample equally often; from a larger one rows are drawn
    with replacement.
    """

    def __init__(self, count: int, batch_size: int) -> None:
        self.count = count
        self.batch_size = batch_size

    def draw(self, generator: torch.Generator) -> Tensor:
        """Row indices [batch_size]."""
        if self.batch_size >= self.count:
            passes = -(-self.batch_size // self.count)
            rows = torch.cat([torch.randperm(self.count, generator=generator) for _ in range(passes)])
            return rows[: self.batch_size]
        return torch.randint(self.count, (self.batch_size,), generator=generator)


@dataclass(frozen=True)
class NoisedBatch:
    """x_t = alpha_t x_0 + sigma_t epsilon for a batch."""

    x0: Tensor
    x: Tensor
    epsilon: Tensor
    t: Tensor
    alpha: float | Tensor
    sigma: float | Tensor


def add_noise(schedule: NoiseSchedule, x0: Tensor, t: Tensor, generator: torch.Generator) -> NoisedBatch:
    """Noise x0 [B, ...] to times t [B]; alpha and sigma come back as [B, 1, ...]."""
    return _noised(schedule, x0, t, torch.randn(x0.shape, generator=generator))


def _noised(schedule: NoiseSchedule, x0: Tensor, t: Tensor, epsilon: Tensor) -> NoisedBatch:
    t, epsilon = t.to(x0.device), epsilon.to(x0.device)
    alpha, sigma = per_sample(schedule.alpha(t).to(x0), x0), per_sample(schedule.sigma(t).to(x0), x0)
    return NoisedBatch(x0, alpha * x0 + sigma * epsilon, epsilon, t, alpha, sigma)


def draw_noised(
    batches: Batches,
    x: Tensor,
    labels: Tensor | None,
    schedule: NoiseSchedule,
    generator: torch.Generator,
    time_distribution: str = "uniform",
) -> tuple[Tensor, NoisedBatch, Tensor | None]:
    """Rows of ``x`` and ``labels`` at random, noised to random times: this process's share of one batch of all.

    Returns:
        rows [B], the noised samples, labels [B, ...] or None.
    """
    rows = batches.draw(generator)
    t = draw_times(schedule, len(rows), generator, time_distribution)
    epsilon = torch.randn((len(rows), *x.shape[1:]), generator=generator)
    own = distributed.share(len(rows))
    rows = rows[own].to(x.device)
    batch = _noised(schedule, x[rows], t[own], epsilon[own])
    return rows, batch, None if labels is None else labels[rows]


def train_denoiser(
    data: np.ndarray | Tensor,
    schedule: NoiseSchedule | None = None,
    *,
    labels: np.ndarray | Tensor | None = None,
    num_classes: int | None = None,
    initial: Denoiser | None = None,
    prediction: str = "v_prediction",
    width: int = 256,
    depth: int = 4,
    settings: Optimisation | None = None,
    time_distribution: str = "uniform",
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = False,
    description: str = "denoiser",
    state_dir: str | os.PathLike[str] | None = None,
) -> Denoiser:
    """Train a denoiser on samples: the source model, the vanilla baseline, or (with ``initial``) the fine-tuned one.

    Args:
        data: [N, ...] of about unit scale.
        schedule: default VP linear, beta 0.1 to 20; taken from ``initial`` when that is given.
        labels: class indices [N] or rows [N, K] for a conditional model.
        num_classes: number of classes; default from the labels.
        initial: a trained denoiser to fine-tune; it is copied, not changed.
        prediction, width, depth: of the new network.
        settings: see :class:`Optimisation`.
        time_distribution: "uniform" in t or in "logsnr".
        seed: of initial weights, batches, times and noise.
        device: where to train; default that of ``initial``, else the CPU.
        progress, description, state_dir: see :func:`optimise`.

    Returns:
        The trained denoiser, in eval mode.

    Raises:
        ValueError: bad data or settings.
        TrainingDivergedError: a non-finite loss.
    """
    check_choice("time_distribution", time_distribution, TIME_DISTRIBUTIONS)
    check_seed(seed)
    settings = settings or Optimisation()
    if not isinstance(settings, Optimisation):
        raise ValueError(f"settings must be an Optimisation, got {type(settings).__name__}")
    x = as_samples("data", data, device_of(initial) if device is None else device)
    warn_of_scale("data", x)
    if initial is not None:
        if schedule is not None and schedule != initial.schedule:
            raise ValueError(f"schedule must be that of initial, {initial.schedule}, or left out; got {schedule}")
        denoiser = copy_denoiser(initial).to(x.device)
    else:
        schedule = schedule or NoiseSchedule.vp_linear()
        classes = count_classes("labels", labels, len(x), num_classes)
        with seeded_initialisation(seed):
            network = ScoreMLP(tuple(x.shape[1:]), width, depth, classes)
        denoiser = Denoiser(network, schedule, prediction, time_input="half_log_snr").to(x.device)
    y = as_labels("labels", labels, len(x), denoiser.num_classes, x.device)
    batches = Batches(len(x), settings.batch_size)
    frozen_schedule = denoiser.schedule

    def loss(generator: torch.Generator) -> Tensor:
        _, batch, labels = draw_noised(batches, x, y, frozen_schedule, generator, time_distribution)
        output = denoiser(batch.x, batch.t, labels)
        if denoiser.prediction == "score":
            output = -batch.sigma * output
        target = training_target(denoiser.prediction, batch.x0, batch.epsilon, batch.alpha, batch.sigma)
        return (output - target).square().mean()

    optimise(
        denoiser,
        loss,
        settings,
        seed=seed,
        progress=progress,
        description=description,
        state_dir=state_dir,
        signature=signature_of(x, y, denoiser, time_distribution),
    )
    return denoiser


def copy_denoiser(denoiser: Denoiser) -> Denoiser:
    """A trainable copy of a denoiser."""
    return copy.deepcopy(denoiser).requires_grad_(True)


def as_samples(name: str, data: np.ndarray | Tensor, device: str | torch.device | None = None) -> Tensor:
    """Checked float32 tensor [N, ...] on ``device``; see :func:`tgdp_fast.runtime.arrays.check_samples`."""
    array = check_samples(name, data)
    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(check_device(device or "cpu"))


def warn_of_scale(name: str, x: Tensor) -> None:
    """Warn of samples whose scale is far from 1, where noise of unit scale drowns them or does nothing to them."""
    size = float(x.double().square().mean().sqrt())
    if not 0.1 <= size <= 10:
        warnings.warn(
            f"{name} should have about unit scale, but its root mean square is {size:.3g}; expect a bad fit. "
            "Pass (x - mean) / std, with mean and std of the source, or let TransferModel.fit train the denoiser: it "
            "standardises",
            stacklevel=3,
        )


def as_labels(
    name: str, labels: np.ndarray | Tensor | None, count: int, num_classes: int | None, device: torch.device
) -> Tensor | None:
    """Checked labels, int64 [N] or float32 rows [N, K], on ``device``; None for an unconditional model.

    ``num_classes`` None stands for a network that does not state it: any labels, or none, will do.

    Raises:
        ValueError: labels for an unconditional model, none for a conditional one, a count that differs, or classes out
            of range.
    """
    if labels is None:
        if num_classes:
            raise ValueError(f"{name} must be given: the model is conditional on {num_classes} classes")
        return None
    if num_classes == 0:
        raise ValueError(f"{name} were given, but the model is unconditional; leave them out or set num_classes")
    array = check_labels(name, labels, count, num_classes)
    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(device)


def count_classes(name: str, labels: np.ndarray | Tensor | None, count: int, num_classes: int | None) -> int:
    """Number of classes of ``count`` labels: as given, else from the labels, else 0.

    Raises:
        ValueError: as :func:`tgdp_fast.runtime.arrays.check_labels`; a single column, which rather holds the classes.
    """
    if num_classes is not None:
        return check_integer("num_classes", num_classes, 0)
    if labels is None:
        return 0
    if np.ndim(labels) == 2 and np.shape(labels)[1] == 1:
        raise ValueError(
            f"{name} must have shape [N] (classes) or [N, K] (a column for each of K classes), got "
            f"{list(np.shape(labels))}; if the column holds classes pass labels[:, 0], if it is one class num_classes=1"
        )
    array = check_labels(name, labels, count)
    return int(array.shape[1]) if array.ndim == 2 else int(array.max(initial=-1)) + 1


def device_of(model: Any) -> torch.device:
    """Where a module's parameters are; the CPU for anything without parameters."""
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            return parameter.device
    return torch.device("cpu")


def derived_seed(seed: int, purpose: str) -> int:
    """Another seed for another purpose, in 0 .. 2^63 - 1; the same for the same arguments."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "big") >> 1


@contextmanager
def seeded_initialisation(seed: int) -> Iterator[None]:
    """Initial weights from ``seed``, leaving the caller's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
