"""The guidance network, log h(x, t) with its input gradient, and the guided denoiser built from it."""

from __future__ import annotations

import math
import os
from typing import Any, cast

import torch
from torch import Tensor, nn

from tgdp_fast.diffusion.denoiser import number_on, per_sample
from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.models.ecg_stem import ECGStem
from tgdp_fast.models.mlp import TimeEmbedding, check_labels_given, embed_labels
from tgdp_fast.ops import mlp_forward, mlp_value_and_grad
from tgdp_fast.runtime.checkpoint import described, load_checkpoint
from tgdp_fast.runtime.checks import check_choice, check_integer, check_number
from tgdp_fast.runtime.memory import check_memory
from tgdp_fast.runtime.pretrained import Pretrained
from tgdp_fast.runtime.state_dict import restored

STEMS = ("none", "ecg")


class GuidanceNetwork(Pretrained, nn.Module):
    """log h(x, t[, y]) as an MLP, h = exp(f) > 0, so that the guidance gradient is simply grad f.

    f = alpha_t^k (w . a_L + c), a_l = silu(W_l a_{l-1} + b_l); time and labels add to the first bias. The factor
    alpha_t^k ensures that h -> 1 as alpha_t -> 0 (TGDP Theorem 3.1 and section 3.2; Theorem 3.3 for labels).

    Args:
        event_shape: shape of one sample.
        schedule: noise schedule; gives alpha_t and the half log-SNR of a time.
        width, depth: hidden layers (the paper: 4 x 512).
        num_classes: label classes; 0 for an unconditional network.
        alpha_power: k; a larger one is a stronger prior towards no guidance at high noise, which helps with few
            target samples.
        stem: "none", or "ecg" for the two linear convolutions of the paper's ECG network.

    Its parameters are float32, whatever torch's default dtype.

    Raises:
        ValueError: bad sizes, an unknown stem.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...] | list[int],
        schedule: NoiseSchedule,
        *,
        width: int = 128,
        depth: int = 4,
        num_classes: int = 0,
        alpha_power: float = 2.0,
        stem: str = "none",
    ) -> None:
        super().__init__()
        self.event_shape = tuple(check_integer("event_shape entries", size, 1) for size in event_shape)
        self.schedule = schedule
        self.width = check_integer("width", width, 1)
        self.depth = check_integer("depth", depth, 1)
        self.num_classes = check_integer("num_classes", num_classes, 0)
        self.alpha_power = check_number("alpha_power", alpha_power, 0.0)
        self.stem_name = check_choice("stem", stem, STEMS)
        self.stem = ECGStem(self.event_shape) if stem == "ecg" else None
        features = self.stem.num_features if self.stem is not None else math.prod(self.event_shape)
        values, what = (features + depth * width + num_classes) * width, "weights of a network of this width and depth"
        check_memory("width and depth", (width, depth), 4 * values, what, "choose a smaller network")
        sizes = [features] + [width] * depth + [1]
        self.layers = nn.ModuleList(
            nn.Linear(a, b, dtype=torch.float32) for a, b in zip(sizes, sizes[1:], strict=False)
        )
        self.time_embedding = TimeEmbedding(width)
        self.label_embedding = nn.Linear(num_classes, width, bias=False, dtype=torch.float32) if num_classes else None

    def linear_layers(self) -> list[nn.Linear]:
        """The layers of the MLP, the head last."""
        return cast("list[nn.Linear]", list(self.layers))  # A compiled one is of another class.

    def first_bias(self, t: float | Tensor, labels: Tensor | None = None) -> Tensor:
        """Bias of the first layer: [1, width] for a float t without labels, else [B, width]."""
        own = self.linear_layers()[0].bias
        times = torch.as_tensor(t, dtype=torch.float64, device=t.device if isinstance(t, Tensor) else "cpu")
        half_log_snr = number_on(self.schedule.half_log_snr(times), own.device).to(own.dtype)
        bias: Tensor = self.time_embedding(half_log_snr.reshape(-1), own)
        label_bias = self.label_bias(labels)
        return bias if label_bias is None else bias + label_bias

    def label_bias(self, labels: Tensor | None) -> Tensor | None:
        """Contribution of the labels to the first bias: [B, width], or None for an unconditional network.

        Raises:
            ValueError: labels for an unconditional network, or none for a conditional one.
        """
        check_labels_given(labels, self.num_classes, "guidance", "fit it with labels")
        return embed_labels(self.label_embedding, labels)

    def forward(
        self, x: Tensor, t: float | Tensor, labels: Tensor | None = None, *, backend: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """log h and its gradient in x, both differentiable in x and in the parameters (double backward in closed form).

        Shapes: x [B, *event_shape]; t float or [B]; labels None, [B] or [B, K]; returns ([B], [B, *event_shape]).
        """
        features = x.flatten(1) if self.stem is None else self.stem(x)
        layers = self.linear_layers()
        value, gradient = mlp_value_and_grad(
            features,
            self.first_bias(t, labels),
            [layer.weight for layer in layers],
            [layer.bias for layer in layers[1:]],
            backend=backend,
        )
        gradient = gradient.reshape(x.shape) if self.stem is None else self.stem.transpose(gradient)
        alpha = self._alpha(t, value)
        return alpha * value, per_sample(alpha, x) * gradient

    def log_ratio(self, x: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Tensor:
        """log h [B] alone, for the classification and ratio losses.

        Differentiable once in the parameters. If x requires a gradient, differentiable any number of times in x and
        the parameters, by ordinary autograd.
        """
        features = x.flatten(1) if self.stem is None else self.stem(x)
        layers = self.linear_layers()
        value = mlp_forward(
            features,
            self.first_bias(t, labels),
            [layer.weight for layer in layers],
            [layer.bias for layer in layers[1:]],
        ).squeeze(1)
        return self._alpha(t, value) * value

    def _alpha(self, t: float | Tensor, like: Tensor) -> float | Tensor:
        if isinstance(t, Tensor):
            return self.schedule.alpha(t).to(like) ** self.alpha_power
        return float(self.schedule.alpha(float(t)) ** self.alpha_power)

    def log_ratio_and_grad(self, x: Tensor, t: float | Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The :class:`Guidance` protocol: (log h [B], grad_x log h [B, *event_shape])."""
        result: tuple[Tensor, Tensor] = self(x, t, labels)
        return result

    def to_config(self) -> dict[str, Any]:
        """Everything but the weights, JSON-able."""
        return {
            "event_shape": list(self.event_shape),
            "schedule": self.schedule.to_config(),
            "width": self.width,
            "depth": self.depth,
            "num_classes": self.num_classes,
            "alpha_power": self.alpha_power,
            "stem": self.stem_name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GuidanceNetwork:
        """Inverse of :meth:`to_config`, with fresh weights."""
        arguments = dict(config)
        schedule = NoiseSchedule.from_config(arguments.pop("schedule"))
        return cls(arguments.pop("event_shape"), schedule, **arguments)

    def to_checkpoint(self) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
        """Kind, config and tensors of the checkpoint."""
        return "guidance", self.to_config(), self.state_dict()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GuidanceNetwork:
        """Read a checkpoint folder.

        Raises:
            CheckpointError: damaged, of another kind or another architecture.
        """
        return cls.from_parts(*load_checkpoint(path, "guidance"), where=str(path))

    @classmethod
    def from_parts(cls, config: dict[str, Any], tensors: dict[str, Tensor], where: str) -> GuidanceNetwork:
        """The network with a checkpoint's config and tensors, in eval mode; ``where`` names their origin in messages.

        Raises:
            CheckpointError: as in :meth:`load`.
        """
        with described(where, cls.__name__):
            return restored(lambda: cls.from_config(config), config, tensors, where).eval()
