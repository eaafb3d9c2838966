"""Network architectures that checkpoints can name. Each has ``to_config`` and takes its own config as arguments."""

from __future__ import annotations

from torch import nn

from tgdp_fast.models.mlp import ScoreMLP, TimeEmbedding, encode_labels
from tgdp_fast.models.sssd_ecg.compiled import CompiledSSSDECG
from tgdp_fast.models.sssd_ecg.network import SSSDECG
from tgdp_fast.models.xresnet1d import XResNet1d
from tgdp_fast.runtime.state_dict import unwrapped

#: Architecture name in a checkpoint's config.json -> class.
ARCHITECTURES: dict[str, type[ScoreMLP] | type[SSSDECG]] = {"score_mlp": ScoreMLP, "sssd_ecg": SSSDECG}

__all__ = ["ARCHITECTURES", "SSSDECG", "ScoreMLP", "TimeEmbedding", "XResNet1d", "encode_labels", "uncompiled"]


def uncompiled(network: nn.Module) -> nn.Module:
    """The network whose weights a checkpoint holds: that in wrappers, the source of a compiled one, else itself."""
    network = unwrapped(network)
    return unwrapped(network.source) if isinstance(network, CompiledSSSDECG) else network
