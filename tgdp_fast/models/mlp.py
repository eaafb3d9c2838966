"""Fully connected score network, and the time and label inputs that it shares with the guidance network.

Time and labels enter only as a bias of the first layer. In sampling they can therefore be computed once per evaluation
(time) and once per run (labels), and one kernel computes the rest of the network.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tgdp_fast.ops.mlp import mlp_forward
from tgdp_fast.runtime.checks import check_integer
from tgdp_fast.runtime.memory import check_memory


class TimeEmbedding(nn.Module):
    """Half log-SNR -> first-layer bias: sinusoidal features, Linear, SiLU, Linear.

    The half log-SNR (log alpha - log sigma) is the same quantity for every noise schedule, so a network keeps its
    meaning if the schedule is discretized differently.

    Args:
        width: width of the resulting bias.
        num_frequencies: number of sine/cosine pairs, in geometric progression from ``lowest`` to ``highest``.
        lowest, highest: angular frequencies in radians per unit of half log-SNR.
    """

    frequencies: Tensor

    def __init__(self, width: int, num_frequencies: int = 16, lowest: float = 0.1, highest: float = 3.0) -> None:
        super().__init__()
        exponents = torch.linspace(math.log(lowest), math.log(highest), num_frequencies, dtype=torch.float32)
        self.register_buffer("frequencies", exponents.exp())
        self.hidden = nn.Linear(2 * num_frequencies, width, dtype=torch.float32)
        self.output = nn.Linear(width, width, dtype=torch.float32)

    def forward(self, half_log_snr: Tensor, bias: Tensor | None = None) -> Tensor:
        """half_log_snr [B] -> bias [B, width], with the layer's own ``bias`` [width] added when given."""
        angles = half_log_snr.to(self.frequencies.dtype)[:, None] * self.frequencies
        features = torch.cat([angles.sin(), angles.cos()], dim=1)
        hidden, output = self.hidden, self.output
        last_bias = output.bias if bias is None else output.bias + bias
        return mlp_forward(features, hidden.bias, [hidden.weight, output.weight], [last_bias])


def encode_labels(labels: Tensor, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Class indices [B] (integer) or soft / multi-hot rows [B, num_classes] -> rows [B, num_classes] of ``dtype``.

    Raises:
        ValueError: an index outside 0..num_classes-1, or rows of another width.
    """
    if labels.ndim == 1 and not labels.is_floating_point():
        # On an accelerator this check would wait for the device; callers check their labels once.
        checked = labels.device.type == "cpu" and labels.numel() > 0
        if checked and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ValueError(
                f"labels must lie in 0..{num_classes - 1}, got values from {int(labels.min())} to {int(labels.max())}"
            )
        return functional.one_hot(labels.long(), num_classes).to(dtype)
    if labels.ndim != 2 or labels.shape[1] != num_classes:
        raise ValueError(
            f"labels must be integer class indices [B] or rows [B, {num_classes}], got {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )
    return labels.to(dtype)


def embed_labels(embedding: nn.Linear | None, labels: Tensor | None) -> Tensor | None:
    """``embedding`` of labels [B] or [B, K]: [B, width]; None without one of them.

    Raises:
        ValueError: as :func:`encode_labels`.
    """
    if labels is None or embedding is None:
        return None
    result: Tensor = embedding(encode_labels(labels, embedding.in_features, embedding.weight.dtype))
    return result


def check_labels_given(labels: Tensor | None, num_classes: int, model: str, remedy: str) -> None:
    """Refuse labels for an unconditional model (``num_classes`` 0) and missing labels for a conditional one.

    Raises:
        ValueError: names ``model``, and ``remedy`` if the model takes no labels.
    """
    if labels is not None and not num_classes:
        raise ValueError(f"labels were given, but this {model} is unconditional; {remedy}")
    if labels is None and num_classes:
        raise ValueError(f"labels are required: this {model} is conditional on {num_classes} classes")


class ScoreMLP(nn.Module):
    """SiLU network for vector data; takes the half log-SNR as its time input.

    Args:
        event_shape: shape of one sample; flattened inside.
        width, depth: width and number of hidden layers.
        num_classes: number of label classes; 0 for an unconditional network.

    Its parameters are float32, whatever torch's default dtype.

    Shapes: ``forward(x [B, *event_shape], half_log_snr [B], labels=None) -> [B, *event_shape]``.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...] | list[int],
        width: int = 256,
        depth: int = 4,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.event_shape = tuple(check_integer("event_shape entries", size, 1) for size in event_shape)
        self.width = check_integer("width", width, 1)
        self.depth = check_integer("depth", depth, 1)
        self.num_classes = check_integer("num_classes", num_classes, 0)
        elements = math.prod(self.event_shape)
        values = (2 * elements + depth * width + num_classes) * width
        what = "weights of a network of this width and depth"
        check_memory("width and depth", (width, depth), 4 * values, what, "choose a smaller network")
        sizes = [elements] + [width] * depth
        self.layers = nn.ModuleList(
            nn.Linear(a, b, dtype=torch.float32) for a, b in zip(sizes, sizes[1:], strict=False)
        )
        self.head = nn.Linear(width, elements, dtype=torch.float32)
        self.time_embedding = TimeEmbedding(width)
        self.label_embedding = nn.Linear(num_classes, width, bias=False, dtype=torch.float32) if num_classes else None
        with torch.no_grad():  # Initial prediction zero: for v_prediction this is the best linear denoiser.
            self.head.weight.mul_(1e-2)
            self.head.bias.zero_()

    def to_config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able."""
        return {
            "event_shape": list(self.event_shape),
            "width": self.width,
            "depth": self.depth,
            "num_classes": self.num_classes,
        }

    def label_bias(self, labels: Tensor | None) -> Tensor | None:
        """Contribution of the labels to the first bias: [B, width], or None for an unconditional network.

        Raises:
            ValueError: labels for an unconditional network, or none for a conditional one.
        """
        check_labels_given(labels, self.num_classes, "network", "build it with num_classes > 0")
        return embed_labels(self.label_embedding, labels)

    def forward(self, x: Tensor, half_log_snr: Tensor, labels: Tensor | None = None) -> Tensor:
        first, *others = cast("list[nn.Linear]", [*self.layers, self.head])  # A compiled one is of another class.
        bias = self.time_embedding(half_log_snr, first.bias)
        label_bias = self.label_bias(labels)
        if label_bias is not None:
            bias = bias + label_bias
        weights, biases = [first.weight, *(layer.weight for layer in others)], [layer.bias for layer in others]
        return mlp_forward(x.flatten(1), bias, weights, biases).reshape(x.shape)
