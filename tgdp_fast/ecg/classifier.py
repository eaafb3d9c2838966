"""Training and use of the ECG classifier: judge of synthetic records, and frozen features of real ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.swa_utils import update_bn

from tgdp_fast.fit.batches import Batches
from tgdp_fast.fit.config import TrainingConfig
from tgdp_fast.fit.training import device_of, minimize, seeded_initialization
from tgdp_fast.models.xresnet1d import XResNet1d
from tgdp_fast.runtime import distributed
from tgdp_fast.runtime.arrays import check_labels, check_samples
from tgdp_fast.runtime.checkpoint import signature_of
from tgdp_fast.runtime.checks import check_device, check_integer, check_seed


def train_ecg_classifier(
    x: np.ndarray | Tensor,
    y: np.ndarray | Tensor,
    *,
    network: XResNet1d | None = None,
    architecture: Mapping[str, Any] | None = None,
    settings: TrainingConfig | None = None,
    crop: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = False,
    description: str = "ECG classifier",
    state_dir: str | os.PathLike[str] | None = None,
) -> XResNet1d:
    """Train an xresnet1d on records with several statements each, by binary cross-entropy of each statement.

    The weights that are kept are a moving average over the steps, so the running means and variances of the batch
    normalisations are computed anew for them, in one pass over ``x``.

    Args:
        x: records [N, leads, L] of about unit scale; millivolts are.
        y: multi-hot or soft statements [N, K] in [0, 1].
        network: trained in place; default a new one of ``architecture``.
        architecture: arguments of :class:`XResNet1d` other than ``in_channels`` and ``num_classes``.
        settings: see :class:`TrainingConfig`.
        crop: train on windows of so many samples, at random places (the benchmark of PTB-XL: 250 of 1000); default
            whole records. Give :func:`predict` the same.
        seed: of initial weights, batches, windows and dropout.
        device: where to train; default that of ``network``, else the CPU.
        progress, description, state_dir: see :func:`tgdp_fast.fit.training.minimize`.

    Returns:
        The trained network, in eval mode.

    Raises:
        ValueError: bad data or settings.
        TrainingDivergedError: a non-finite loss.
    """
    records, labels = check_samples("x", x), check_labels("y", y, len(x))
    if records.ndim != 3:
        raise ValueError(f"x must have shape [N, leads, L], got {list(records.shape)}")
    if labels.ndim != 2:
        raise ValueError(f"y must be multi-hot rows [N, K], got shape {list(labels.shape)}")
    check_seed(seed)
    settings = settings or TrainingConfig(steps=2000, batch_size=128, learning_rate=2e-3, weight_decay=1e-2)
    share = distributed.share(settings.batch_size)
    if share.stop - share.start < 2:
        raise ValueError(
            f"settings.batch_size must be at least {2 * distributed.size()}, got {settings.batch_size}; batch "
            "normalisation needs two records"
        )
    leads, length = records.shape[1:]
    if crop is not None and check_integer("crop", crop, 1) > length:
        raise ValueError(f"crop must be at most {length}, the samples of a record, got {crop}")
    if network is None:
        with seeded_initialization(seed):
            network = XResNet1d(leads, labels.shape[1], **(architecture or {}))
    elif architecture is not None:
        raise ValueError("network and architecture were both given; expected one of them")
    if (network.in_channels, network.num_classes) != (leads, labels.shape[1]):
        raise ValueError(
            f"network must take {leads} leads and give {labels.shape[1]} statements, it has {network.in_channels} and "
            f"{network.num_classes}"
        )
    home = device_of(network) if device is None else check_device(device)
    network = network.to(home)
    signals, target = torch.from_numpy(records).to(home), torch.from_numpy(labels).to(home)
    batches = Batches(len(signals), settings.batch_size)

    def loss(generator: torch.Generator) -> Tensor:
        rows = batches.draw(generator)
        starts = _starts(len(rows), length, crop, generator)
        rows, starts = rows[share], None if starts is None else starts[share]
        return functional.binary_cross_entropy_with_logits(
            network(_windows(signals[rows.to(home)], starts, crop)), target[rows.to(home)]
        )

    minimize(
        network,
        loss,
        settings,
        seed=seed,
        progress=progress,
        description=description,
        state_dir=state_dir,
        signature=signature_of(records, labels, network, crop),
    )
    _recalibrate(network, signals, settings.batch_size, crop, seed)
    return network.eval()


def predict(
    network: XResNet1d, x: np.ndarray | Tensor, batch_size: int = 256, *, crop: int | None = None
) -> np.ndarray:
    """Probabilities of the statements, float32 [N, K].

    Args:
        network: a classifier; used in eval mode, on its device.
        x: records [N, leads, L].
        batch_size: records at once.
        crop: the largest probability over windows of so many samples, half a window apart, as the benchmark of PTB-XL
            does; default whole records. The last window ends with the record.

    Raises:
        ValueError: bad records.
    """
    if crop is None:
        return _in_batches(network, x, batch_size, lambda part: network(part).sigmoid())

    def largest(part: Tensor) -> Tensor:
        length = part.shape[2]
        if check_integer("crop", crop, 1) > length:
            raise ValueError(f"crop must be at most {length}, the samples of a record, got {crop}")
        starts = sorted({*range(0, length - crop, max(1, crop // 2)), length - crop})
        return torch.stack([network(part[:, :, start : start + crop]).sigmoid() for start in starts]).amax(dim=0)

    return _in_batches(network, x, batch_size, largest)


def features(network: XResNet1d, x: np.ndarray | Tensor, batch_size: int = 256) -> np.ndarray:
    """Features of records x [N, leads, L]: what the head sees, float32 [N, network.num_features].

    Raises:
        ValueError: bad records.
    """
    return _in_batches(network, x, batch_size, network.features)


def _in_batches(
    network: XResNet1d, x: np.ndarray | Tensor, batch_size: int, function: Callable[[Tensor], Tensor]
) -> np.ndarray:
    records = check_samples("x", x, minimum=1)
    check_integer("batch_size", batch_size, 1)
    home, was_training = device_of(network), network.training
    network.eval()
    try:
        with torch.no_grad():
            parts = [
                function(torch.from_numpy(np.array(records[start : start + batch_size])).to(home)).cpu().numpy()
                for start in range(0, len(records), batch_size)
            ]
    finally:
        network.train(was_training)
    return np.concatenate(parts)


def _starts(count: int, length: int, crop: int | None, generator: torch.Generator) -> Tensor | None:
    return None if crop is None else torch.randint(length - crop + 1, (count,), generator=generator)


def _windows(x: Tensor, starts: Tensor | None, crop: int | None) -> Tensor:
    """x [B, leads, L] -> windows [B, leads, crop] from ``starts`` [B]; x itself without."""
    if starts is None or crop is None:
        return x
    columns = (starts[:, None] + torch.arange(crop)).to(x.device)
    return x.gather(2, columns[:, None, :].expand(-1, x.shape[1], -1))


def _recalibrate(network: XResNet1d, signals: Tensor, batch_size: int, crop: int | None, seed: int) -> None:
    """Running statistics of the batch normalisations, for the averaged weights (as in stochastic weight averaging)."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(signals), generator=generator)
    # No part has one record alone, which batch normalisation refuses.
    parts = order.tensor_split(max(1, len(order) // batch_size))
    windows = (
        _windows(signals[rows.to(signals.device)], _starts(len(rows), signals.shape[2], crop, generator), crop)
        for rows in parts
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of dropout
        update_bn(windows, network)
