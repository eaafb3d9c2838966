"""Network architectures that checkpoints can name. Each has ``to_config`` and takes its own config as arguments."""

from __future__ import annotations

from torch import nn

from tgdp_fast.models.mlp import ScoreMLP, TimeEmbedding, encode_labels
from tgdp_fast.models.sssd_ecg.compiled import CompiledSSSDECG
from tgdp_fast.models.sssd_ecg.network import SSSDECG
from tgdp_fast.models.xresnet1d import XResNet1d

#: Architecture name in a checkpoint's config.json -> class.
ARCHITECTURES: dict[str, type[ScoreMLP] | type[SSSDECG]] = {"score_mlp": ScoreMLP, "sssd_ecg": SSSDECG}

__all__ = ["ARCHITECTURES", "SSSDECG", "ScoreMLP", "TimeEmbedding", "XResNet1d", "encode_labels", "uncompiled"]


def uncompiled(network: nn.Module) -> nn.Module:
    """The network whose weights a checkpoint holds: the source of a compiled one, any other one itself."""
    return network.source if isinstance(network, CompiledSSSDECG) else network
