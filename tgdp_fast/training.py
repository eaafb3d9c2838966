"""One optimisation loop for every network here, resumable to the step, and the training of denoisers with it."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tgdp_fast._checks import check_choice, check_integer, check_number
from tgdp_fast.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from tgdp_fast.data.arrays import check_labels, check_samples
from tgdp_fast.denoiser import Denoiser, per_sample, training_target
from tgdp_fast.models.mlp import ScoreMLP, encode_labels
from tgdp_fast.schedule import NoiseSchedule

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
        state_dir: folder in which the whole state is kept every ``save_every`` seconds. A state found there with the
            same signature and settings is resumed, and the result is that of an uninterrupted run; removed at the end.
        signature: identifies the data and the model.

    Returns:
        The loss at about 100 evenly spaced steps.

    Raises:
        TrainingDivergedError: a non-finite loss.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.learning_rate, betas=(0.9, 0.99))
    average = [p.detach().clone() for p in parameters]
    generator = torch.Generator().manual_seed(seed)
    identity = {"signature": signature, "settings": asdict(settings), "seed": seed}
    history: list[float] = []
    first = 0
    if state_dir is not None:
        first, history = _load_state(state_dir, identity, parameters, average, optimizer, generator)
    module.train()
    saved = time.monotonic()
    stride = max(1, settings.steps // 100)
    bar = tqdm(
        total=settings.steps,
        initial=first,
        desc=description,
        unit="step",
        disable=None if progress else True,
        leave=False,
    )
    with bar:
        for step in range(first, settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(step)
            value = loss(generator)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(parameters, settings.gradient_clip)
            optimizer.step()
            # The average forgets the initial weights quickly, whatever the decay.
            decay = min(settings.ema_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(average, [p.detach() for p in parameters], 1.0 - decay)
            if step % stride == 0 or step == settings.steps - 1:
                history.append(float(value.detach()))
                if not math.isfinite(history[-1]):
                    raise TrainingDivergedError(
                        f"{description}: the loss is {history[-1]} at step {step}; lower learning_rate, or check that "
                        "the data have about unit scale"
                    )
                bar.set_postfix(loss=f"{history[-1]:.4g}", refresh=False)
            bar.update()
            if state_dir is not None and time.monotonic() - saved > save_every and step + 1 < settings.steps:
                _save_state(state_dir, identity, step + 1, history, parameters, average, optimizer, generator)
                saved = time.monotonic()
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean)
    module.eval()
    if not all(bool(p.isfinite().all()) for p in parameters):
        raise TrainingDivergedError(f"{description}: the weights are not finite; lower learning_rate")
    if state_dir is not None:
        shutil.rmtree(state_dir, ignore_errors=True)
    return history


def _save_state(
    state_dir: str | os.PathLike[str],
    identity: dict[str, Any],
    step: int,
    history: list[float],
    parameters: list[nn.Parameter],
    average: list[Tensor],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> None:
    tensors = {"generator": generator.get_state()}
    for i, (parameter, mean) in enumerate(zip(parameters, average, strict=True)):
        tensors[f"parameter.{i}"] = parameter.detach()
        tensors[f"average.{i}"] = mean
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{i}.{key}"] = torch.as_tensor(value)
    save_checkpoint(state_dir, "training_state", {"identity": identity, "step": step, "history": history}, tensors)


def _load_state(
    state_dir: str | os.PathLike[str],
    identity: dict[str, Any],
    parameters: list[nn.Parameter],
    average: list[Tensor],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> tuple[int, list[float]]:
    """Restore a saved state; (0, []) when there is none or it belongs to another run."""
    if not Path(state_dir).exists():
        return 0, []
    try:
        config, tensors = load_checkpoint(state_dir, "training_state")
    except CheckpointError:
        return 0, []
    if config["identity"] != identity:
        return 0, []
    with torch.no_grad():
        for i, (parameter, mean) in enumerate(zip(parameters, average, strict=True)):
            parameter.copy_(tensors[f"parameter.{i}"])
            mean.copy_(tensors[f"average.{i}"])
            prefix = f"optimizer.{i}."
            for name, value in tensors.items():
                if name.startswith(prefix):
                    optimizer.state[parameter][name.removeprefix(prefix)] = value.clone()
    generator.set_state(tensors["generator"])
    return int(config["step"]), list(config["history"])


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
    """Random rows of a sample set: whole shuffled passes, so that every sample is seen equally often.

    A set smaller than the batch is repeated within it. The order depends on the generator alone.
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
    """x_t = alpha_t x_0 + sigma_t epsilon for a batch of rows."""

    x0: Tensor
    x: Tensor
    epsilon: Tensor
    t: Tensor
    alpha: float | Tensor
    sigma: float | Tensor


def add_noise(schedule: NoiseSchedule, x0: Tensor, t: Tensor, generator: torch.Generator) -> NoisedBatch:
    """Noise x0 [B, ...] to times t [B]; alpha and sigma come back as [B, 1, ...]."""
    epsilon = torch.randn(x0.shape, generator=generator).to(x0.device)
    t = t.to(x0.device)
    alpha, sigma = per_sample(schedule.alpha(t).to(x0), x0), per_sample(schedule.sigma(t).to(x0), x0)
    return NoisedBatch(x0, alpha * x0 + sigma * epsilon, epsilon, t, alpha, sigma)


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
        device: where to train.
        progress, description, state_dir: see :func:`optimise`.

    Returns:
        The trained denoiser, in eval mode.

    Raises:
        ValueError: bad data or settings.
        TrainingDivergedError: a non-finite loss.
    """
    check_choice("time_distribution", time_distribution, TIME_DISTRIBUTIONS)
    settings = settings or Optimisation()
    x = as_samples("data", data, device)
    if initial is not None:
        denoiser = copy_denoiser(initial).to(x.device)
    else:
        schedule = schedule or NoiseSchedule.vp_linear()
        classes = count_classes(labels, num_classes)
        with seeded_initialisation(seed):
            network = ScoreMLP(tuple(x.shape[1:]), width, depth, classes)
        denoiser = Denoiser(network, schedule, prediction, time_input="half_log_snr").to(x.device)
    y = as_label_rows("labels", labels, len(x), denoiser.num_classes, x.device)
    batches = Batches(len(x), settings.batch_size)
    frozen_schedule = denoiser.schedule

    def loss(generator: torch.Generator) -> Tensor:
        rows = batches.draw(generator).to(x.device)
        t = draw_times(frozen_schedule, len(rows), generator, time_distribution)
        batch = add_noise(frozen_schedule, x[rows], t, generator)
        output = denoiser(batch.x, batch.t, None if y is None else y[rows])
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
        signature=signature_of(x, y, repr(denoiser.schedule), *denoiser.state_dict().values()),
    )
    return denoiser


def copy_denoiser(denoiser: Denoiser) -> Denoiser:
    """A trainable copy of a denoiser."""
    return copy.deepcopy(denoiser).requires_grad_(True)


def as_samples(name: str, data: np.ndarray | Tensor, device: str | torch.device | None = None) -> Tensor:
    """Checked float32 tensor [N, ...] on ``device``; see :func:`tgdp_fast.data.arrays.check_samples`."""
    array = data.detach().cpu().numpy() if isinstance(data, Tensor) else data
    return torch.from_numpy(check_samples(name, array)).to(device or "cpu")


def count_classes(labels: np.ndarray | Tensor | None, num_classes: int | None) -> int:
    """Number of classes: as given, else from the labels, else 0."""
    if num_classes is not None:
        return check_integer("num_classes", num_classes, 0)
    if labels is None:
        return 0
    array = np.asarray(labels)
    return int(array.shape[1]) if array.ndim == 2 else int(array.max(initial=-1)) + 1


def as_label_rows(
    name: str, labels: np.ndarray | Tensor | None, count: int, num_classes: int | None, device: torch.device
) -> Tensor | None:
    """Checked labels as rows [N, num_classes] float32, or None for an unconditional model.

    Raises:
        ValueError: labels for an unconditional model, none for a conditional one, or a count that differs.
    """
    if labels is None:
        if num_classes:
            raise ValueError(f"{name} must be given: the model is conditional on {num_classes} classes")
        return None
    if num_classes == 0:
        raise ValueError(f"{name} were given, but the model is unconditional; leave them out or set num_classes")
    array = check_labels(name, np.asarray(labels), count, num_classes)
    tensor = torch.from_numpy(array).to(device)
    return tensor.float() if num_classes is None else encode_labels(tensor, num_classes)


@contextmanager
def seeded_initialisation(seed: int) -> Iterator[None]:
    """Initial weights from ``seed``, leaving the caller's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def signature_of(*parts: Tensor | str | None) -> str:
    """SHA-256 of tensors and strings: tells whether a saved state belongs to this data and model."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()
