"""Training and use of the ECG classifier, which judges synthetic records and computes features of records."""

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
from tgdp_fast.fit.training import device_of, minimize
from tgdp_fast.models.xresnet1d import XResNet1d
from tgdp_fast.runtime import distributed
from tgdp_fast.runtime.arrays import check_labels, check_samples
from tgdp_fast.runtime.checkpoint import signature_of
from tgdp_fast.runtime.checks import check_device, check_integer, check_seed
from tgdp_fast.runtime.evaluation import evaluation_mode
from tgdp_fast.runtime.precision import ordinary_autograd
from tgdp_fast.runtime.randomness import global_random_state, seeded_initialization


@ordinary_autograd()
def train_ecg_classifier(
    x: np.ndarray | Tensor,
    y: np.ndarray | Tensor,
    *,
    network: XResNet1d | None = None,
    architecture: Mapping[str, Any] | None = None,
    settings: TrainingConfig | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = False,
    description: str = "ECG classifier",
    state_dir: str | os.PathLike[str] | None = None,
) -> XResNet1d:
    """Train an xresnet1d on records with several statements each, by binary cross-entropy of each statement.

    The weights that are kept are a moving average over the steps, so the running means and variances of the batch
    normalizations are computed anew for them, in one pass over ``x``.

    Args:
        x: records [N, leads, L] of about unit scale; millivolts are.
        y: multi-hot or soft statements [N, K] in [0, 1].
        network: trained in place; default a new one of ``architecture``.
        architecture: arguments of :class:`XResNet1d` other than ``in_channels`` and ``num_classes``.
        settings: see :class:`TrainingConfig`.
        seed: of initial weights, batches and dropout.
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
    wanted = (records.shape[1], labels.shape[1])
    if network is None:
        with seeded_initialization(seed):
            network = XResNet1d(*wanted, **(architecture or {}))
    elif architecture is not None:
        raise ValueError("network and architecture were both given; expected one of them")
    if (network.in_channels, network.num_classes) != wanted:
        raise ValueError(
            f"network must take {wanted[0]} leads and give {wanted[1]} statements, it has {network.in_channels} and "
            f"{network.num_classes}"
        )
    home = device_of(network) if device is None else check_device(device)
    network = network.to(home)
    signals, target = torch.from_numpy(records).to(home), torch.from_numpy(labels).to(home)
    batches = Batches(len(signals), settings.batch_size)

    def loss(generator: torch.Generator) -> Tensor:
        rows = batches.draw(generator)[share].to(home)
        return functional.binary_cross_entropy_with_logits(network(signals[rows]), target[rows])

    minimize(
        network,
        loss,
        settings,
        seed=seed,
        progress=progress,
        description=description,
        state_dir=state_dir,
        # None stands where earlier versions had a setting, so that their states go on.
        signature=signature_of(records, labels, network, None),
    )
    _recalibrate(network, signals, settings.batch_size, seed)
    return network.eval()


def predict(network: XResNet1d, x: np.ndarray | Tensor, batch_size: int = 256) -> np.ndarray:
    """Probabilities of the statements of records x [N, leads, L], float32 [N, K].

    The network is used in eval mode, on its device, on ``batch_size`` records at once.

    Raises:
        ValueError: bad records.
    """
    return _in_batches(network, x, batch_size, lambda network, part: network(part).sigmoid())


def features(network: XResNet1d, x: np.ndarray | Tensor, batch_size: int = 256) -> np.ndarray:
    """Features of records x [N, leads, L]: what the head sees, float32 [N, network.num_features].

    Raises:
        ValueError: bad records.
    """
    return _in_batches(network, x, batch_size, lambda network, part: network.features(part))


def _in_batches(
    network: XResNet1d, x: np.ndarray | Tensor, batch_size: int, function: Callable[[XResNet1d, Tensor], Tensor]
) -> np.ndarray:
    records = check_samples("x", x, minimum=1)
    check_integer("batch_size", batch_size, 1)
    home = device_of(network)
    with torch.no_grad(), evaluation_mode(network) as (network,):
        parts = [
            function(network, torch.from_numpy(np.array(records[start : start + batch_size])).to(home)).cpu().numpy()
            for start in range(0, len(records), batch_size)
        ]
    return np.concatenate(parts)


def _recalibrate(network: XResNet1d, signals: Tensor, batch_size: int, seed: int) -> None:
    """Running statistics of the batch normalizations, for the averaged weights (as in stochastic weight averaging)."""
    order = torch.randperm(len(signals), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    # No part has one record alone, which batch normalization refuses.
    parts = order.tensor_split(max(1, len(order) // batch_size))
    with global_random_state(torch.Generator("cpu").manual_seed(seed).get_state()):  # of dropout
        update_bn((signals[rows.to(signals.device)] for rows in parts), network)
