"""xresnet1d, the ECG classifier of the PTB-XL benchmark: a residual network in one dimension."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tgdp_fast.runtime.checkpoint import described, load_checkpoint, save_checkpoint
from tgdp_fast.runtime.checks import check_integer, check_number
from tgdp_fast.runtime.memory import check_network
from tgdp_fast.runtime.state_dict import restored


class XResNet1d(nn.Module):
    """Residual network with the changes of "Bag of Tricks" (He et al., CVPR 2019), in one dimension.

    It consists of a stem of three convolutions (the first with stride 2, followed by max pooling with stride 2), stages
    of residual blocks (all but the first stage halve the length), concatenated maximum and mean over time, and a small
    MLP. A block that halves the length averages pairs on its shortcut. The last scale of each block starts at zero.

    The defaults are xresnet1d50 of the benchmark (Strodthoff et al., "Deep Learning for ECG Analysis: Benchmarks and
    Insights from PTB-XL", IEEE Journal of Biomedical and Health Informatics 25, 2021): stem of 32, 32 and 64 channels,
    3 + 4 + 6 + 3 blocks of width 64 in every stage, expansion 4, kernel 5, one hidden layer of 128 in the head, dropout
    0.25 and 0.5 there. A CPU trains ``blocks=(1, 1, 1), expansion=1, width=32`` in minutes.

    Args:
        in_channels: leads.
        num_classes: statements, each predicted independently.
        blocks: residual blocks of each stage.
        expansion: 1 for blocks of two convolutions; more for bottlenecks, whose outputs have width * expansion
            channels.
        width: channels inside the blocks; at least ``expansion``.
        kernel_size: of all convolutions except pointwise ones; odd.
        stem_width: channels of the first two convolutions; the third has ``width``.
        hidden: width of the hidden layer in the head; 0 for a linear head.
        dropout: before the last layer; half of it before the hidden layer.

    Shapes: ``forward(x [B, in_channels, L]) -> logits [B, num_classes]``, any L.

    Raises:
        ValueError: bad sizes.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        blocks: Sequence[int] = (3, 4, 6, 3),
        expansion: int = 4,
        width: int = 64,
        kernel_size: int = 5,
        stem_width: int = 32,
        hidden: int = 128,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.in_channels = check_integer("in_channels", in_channels, 1)
        self.num_classes = check_integer("num_classes", num_classes, 1)
        self.blocks = tuple(check_integer("blocks entries", count, 1) for count in blocks)
        self.expansion = check_integer("expansion", expansion, 1)
        self.width = check_integer("width", width, 1)
        self.kernel_size = check_integer("kernel_size", kernel_size, 1)
        self.stem_width = check_integer("stem_width", stem_width, 1)
        self.hidden = check_integer("hidden", hidden, 0)
        self.dropout = check_number("dropout", dropout, 0.0, 1.0 - 1e-6)
        if not self.blocks:
            raise ValueError("blocks must name at least one stage, got none")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        given = (in_channels, num_classes, self.blocks, expansion, width, kernel_size, stem_width, hidden)
        values = kernel_size * (stem_width * (in_channels + stem_width + width) + sum(self.blocks) * width**2)
        values += (2 * width * expansion + num_classes) * max(hidden, 1) + sum(self.blocks) * width**2 * expansion
        names = "in_channels, num_classes, blocks, expansion, width, kernel_size, stem_width, hidden"
        check_network(names, given, values)
        sizes = [self.in_channels, self.stem_width, self.stem_width, self.width]
        self.stem = nn.Sequential(
            *(
                _convolution(sizes[i], sizes[i + 1], self.kernel_size, stride=2 if i == 0 else 1, activation=True)
                for i in range(3)
            ),
            nn.MaxPool1d(3, stride=2, padding=1),
        )
        channels = self.width
        stages: list[nn.Module] = []
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(_ResidualBlock(channels, self.width, self.expansion, self.kernel_size, stride))
                channels = self.width * self.expansion
        self.stages = nn.Sequential(*stages)
        self.num_features = 2 * channels
        self.head = nn.Sequential(*_head(self.num_features, self.hidden, self.num_classes, self.dropout))
        for module in self.modules():
            if isinstance(module, nn.Conv1d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def features(self, x: Tensor) -> Tensor:
        """x [B, in_channels, L] -> [B, num_features]: maxima over time, then means, of the last stage.

        Raises:
            ValueError: another shape.
        """
        if x.ndim != 3 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must have shape [B, {self.in_channels}, L], got {list(x.shape)}")
        y = self.stages(self.stem(x))
        return torch.cat([y.amax(dim=2), y.mean(dim=2)], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.features(x))
        return result

    def to_config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able."""
        return {
            "in_channels": self.in_channels,
            "num_classes": self.num_classes,
            "blocks": list(self.blocks),
            "expansion": self.expansion,
            "width": self.width,
            "kernel_size": self.kernel_size,
            "stem_width": self.stem_width,
            "hidden": self.hidden,
            "dropout": self.dropout,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> XResNet1d:
        """Inverse of :meth:`to_config`, with fresh weights."""
        return cls(**config)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint folder (config.json, model.safetensors), atomically."""
        save_checkpoint(path, "classifier", {"architecture": "xresnet1d", **self.to_config()}, self.state_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> XResNet1d:
        """Read a checkpoint folder; the network is in eval mode.

        Raises:
            CheckpointError: damaged, of another kind or another architecture.
        """
        config, tensors = load_checkpoint(path, "classifier")
        settings = {name: value for name, value in config.items() if name != "architecture"}
        with described(path, cls.__name__):
            return restored(lambda: cls.from_config(settings), settings, tensors, path).eval()


def _convolution(
    inputs: int, outputs: int, kernel_size: int, *, stride: int = 1, activation: bool = False, zero: bool = False
) -> nn.Sequential:
    """Convolution, batch normalization, and ReLU if requested; ``zero`` starts the scale at 0."""
    norm = nn.BatchNorm1d(outputs, dtype=torch.float32)
    nn.init.constant_(norm.weight, 0.0 if zero else 1.0)
    nn.init.constant_(norm.bias, 1e-3)
    convolution = nn.Conv1d(
        inputs, outputs, kernel_size, stride, padding=kernel_size // 2, bias=False, dtype=torch.float32
    )
    return nn.Sequential(convolution, norm, *([nn.ReLU(inplace=True)] if activation else []))


class _ResidualBlock(nn.Module):
    """relu(path(x) + shortcut(x)): [B, inputs, L] -> [B, width * expansion, ceil(L / stride)]."""

    def __init__(self, inputs: int, width: int, expansion: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        outputs = width * expansion
        if expansion == 1:
            path = [
                _convolution(inputs, width, kernel_size, stride=stride, activation=True),
                _convolution(width, outputs, kernel_size, zero=True),
            ]
        else:
            path = [
                _convolution(inputs, width, 1, activation=True),
                _convolution(width, width, kernel_size, stride=stride, activation=True),
                _convolution(width, outputs, 1, zero=True),
            ]
        self.path = nn.Sequential(*path)
        # Average before the pointwise convolution: a strided one would ignore half of the input.
        pool: list[nn.Module] = [nn.AvgPool1d(2, ceil_mode=True)] if stride != 1 else []
        project: list[nn.Module] = [_convolution(inputs, outputs, 1)] if inputs != outputs else []
        self.short_cut = nn.Sequential(*pool, *project)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.path(x) + self.short_cut(x))


def _head(features: int, hidden: int, num_classes: int, dropout: float) -> list[nn.Module]:
    layers: list[nn.Module] = []
    if hidden:
        layers = [
            nn.BatchNorm1d(features, dtype=torch.float32),
            nn.Dropout(dropout / 2),
            nn.Linear(features, hidden, dtype=torch.float32),
            nn.ReLU(inplace=True),
        ]
    last = hidden or features
    return [
        *layers,
        nn.BatchNorm1d(last, dtype=torch.float32),
        nn.Dropout(dropout),
        nn.Linear(last, num_classes, dtype=torch.float32),
    ]
