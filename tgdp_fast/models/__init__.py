"""Network architectures that checkpoints can name. Each has ``to_config`` and takes its own config as arguments."""

from __future__ import annotations

from tgdp_fast.models.mlp import ScoreMLP, TimeEmbedding, encode_labels

#: Architecture name in a checkpoint's config.json -> class.
ARCHITECTURES: dict[str, type[ScoreMLP]] = {"score_mlp": ScoreMLP}

__all__ = ["ARCHITECTURES", "ScoreMLP", "TimeEmbedding", "encode_labels"]
