"""Networks for the simulation's 2-D data, untrained."""

from __future__ import annotations

import torch
from torch import nn

from tgdp_fast.diffusion.denoiser import Denoiser
from tgdp_fast.diffusion.guidance import GuidanceNetwork
from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.lab.cases.case import SEED
from tgdp_fast.models import ScoreMLP
from tgdp_fast.runtime.randomness import seeded_initialization


def guidance_network(width: int, device: torch.device) -> GuidanceNetwork:
    """An untrained guidance network for 2-D data whose activations are of order one."""
    with seeded_initialization(SEED):
        network = GuidanceNetwork((2,), NoiseSchedule.vp_linear(), width=width, depth=4)
        _scale_weights(network)
    return network.to(device).eval()


def source_denoiser(width: int, device: torch.device) -> Denoiser:
    """An untrained denoiser for 2-D data, set up as ``train_denoiser`` does."""
    with seeded_initialization(SEED + 1):
        network = ScoreMLP((2,), width=width, depth=4)
        _scale_weights(network)
    denoiser = Denoiser(network, NoiseSchedule.vp_linear(), "v_prediction", time_input="half_log_snr")
    return denoiser.to(device).eval()


def _scale_weights(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1.2 * module.in_features**-0.5)
