"""The guidance network, log h(x, t) with its input gradient, and the guided denoiser built from it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from tgdp_fast._checks import check_choice, check_integer, check_number
from tgdp_fast.checkpoint import load_checkpoint, load_state_dict_checked, save_checkpoint
from tgdp_fast.cond_fn import as_cond_fn, check_guidance
from tgdp_fast.denoiser import labels_for, number_on, per_sample
from tgdp_fast.models.mlp import TimeEmbedding, check_labels_given, encode_labels
from tgdp_fast.ops import guided_epsilon, limit_gradient, mlp_value_and_grad, perceptron
from tgdp_fast.pretrained import Pretrained
from tgdp_fast.schedule import NoiseSchedule
from tgdp_fast.streams import side_by_side

STEMS = ("none", "ecg")


class Guidance(Protocol):
    """What the sampler asks of a guidance: the closed-form oracle and the learned network both provide it."""

    def log_ratio_and_grad(self, x: Tensor, t: float | Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, ...], t -> (log h [B], grad_x log h [B, ...])."""
        ...


class EpsilonModel(Protocol):
    """What the sampler asks of a denoiser."""

    schedule: NoiseSchedule

    def epsilon(self, x: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Tensor:
        """x [B, ...], t -> epsilon [B, ...]."""
        ...


class ECGStem(nn.Module):
    """Two strided convolutions with nothing between or after them: an affine map, so its gradient is a transpose.

    x [B, channels, L] -> features [B, 16 * L''], with kernel 10 and stride 2 in both (L = 1000 gives 3,904). This is
    the stem of the guidance network in the paper's ECG experiment (TGDP section 4.2).
    """

    def __init__(self, event_shape: tuple[int, ...], channels: int = 16, kernel: int = 10, stride: int = 2) -> None:
        super().__init__()
        if len(event_shape) != 2:
            raise ValueError(f"event_shape must be (leads, length) for the stem 'ecg', got {event_shape}")
        leads, length = event_shape
        self.lengths = [length]
        for _ in range(2):
            self.lengths.append((self.lengths[-1] - kernel) // stride + 1)
        if self.lengths[-1] < 1:
            raise ValueError(f"event_shape length must be at least {kernel + stride * (kernel - 1)}, got {length}")
        self.stride = stride
        self.conv1 = nn.Conv1d(leads, channels, kernel, stride)
        self.conv2 = nn.Conv1d(channels, channels, kernel, stride)
        self.num_features = channels * self.lengths[-1]

    def forward(self, x: Tensor) -> Tensor:
        """x [B, leads, L] -> features [B, num_features]."""
        result: Tensor = self.conv2(self.conv1(x)).flatten(1)
        return result

    def transpose(self, cotangent: Tensor) -> Tensor:
        """Gradient in the features [B, num_features] -> gradient in x [B, leads, L]; differentiable like
        ``forward``.
        """
        gradient = cotangent.unflatten(1, (-1, self.lengths[2]))
        for layer, inner, outer in ((self.conv2, 2, 1), (self.conv1, 1, 0)):
            reached = (self.lengths[inner] - 1) * self.stride + layer.kernel_size[0]
            gradient = functional.conv_transpose1d(
                gradient, layer.weight, stride=self.stride, output_padding=self.lengths[outer] - reached
            )
        return gradient


class GuidanceNetwork(Pretrained, nn.Module):
    """log h(x, t[, y]) as an MLP, h = exp(f) > 0, so that the guidance gradient is simply grad f.

    f = alpha_t^k (w . a_L + c), a_l = silu(W_l a_{l-1} + b_l); time and labels add to the first bias. The factor
    alpha_t^k builds in that h -> 1 as alpha_t -> 0 (TGDP Theorem 3.1 and section 3.2; Theorem 3.3 for labels).

    Args:
        event_shape: shape of one sample.
        schedule: noise schedule; gives alpha_t and the half log-SNR of a time.
        width, depth: hidden layers (the paper: 4 x 512).
        num_classes: label classes; 0 for an unconditional network.
        alpha_power: k; a larger one is a stronger prior towards no guidance at high noise, which helps with few
            target samples.
        stem: "none", or "ecg" for the two linear convolutions of the paper's ECG network.

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
        sizes = [features] + [width] * depth + [1]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.time_embedding = TimeEmbedding(width)
        self.label_embedding = nn.Linear(num_classes, width, bias=False) if num_classes else None

    def linear_layers(self) -> list[nn.Linear]:
        """The layers of the perceptron, the head last."""
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    def first_bias(self, t: float | Tensor, labels: Tensor | None = None) -> Tensor:
        """Bias of the first layer: [1, width] for a float t without labels, else [B, width]."""
        own = self.linear_layers()[0].bias
        times = torch.as_tensor(t, dtype=torch.float64, device=t.device if isinstance(t, Tensor) else "cpu")
        half_log_snr = number_on(self.schedule.half_log_snr(times), own.device).to(own.dtype)
        bias: Tensor = self.time_embedding(half_log_snr.reshape(-1), own)
        label_bias = self.label_bias(labels)
        return bias if label_bias is None else bias + label_bias

    def label_bias(self, labels: Tensor | None) -> Tensor | None:
        """What labels add to the first bias: [B, width], or None for an unconditional network.

        Raises:
            ValueError: labels for an unconditional network, or none for a conditional one.
        """
        check_labels_given(labels, self.num_classes, "guidance", "fit it with labels")
        if labels is None or self.label_embedding is None:
            return None
        rows = encode_labels(labels, self.num_classes, self.label_embedding.weight.dtype)
        result: Tensor = self.label_embedding(rows)
        return result

    def forward(
        self, x: Tensor, t: float | Tensor, labels: Tensor | None = None, *, backend: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """log h and its gradient in x, both differentiable in x and in the parameters (double backward closed form).

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
        """log h [B] alone: what the classification and ratio losses need.

        Differentiable once in the parameters; where x requires a gradient, in x and the parameters as often as one
        likes, by ordinary autograd.
        """
        features = x.flatten(1) if self.stem is None else self.stem(x)
        layers = self.linear_layers()
        value = perceptron(
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

    def as_cond_fn(
        self, schedule: NoiseSchedule | None = None, *, scale: float = 1.0, labels: str = "y", time_scale: float = 1.0
    ) -> Callable[..., Tensor]:
        """``cond_fn(x, t, **model_kwargs)`` for samplers with that hook: :func:`tgdp_fast.cond_fn.as_cond_fn`."""
        return as_cond_fn(self, schedule, scale=scale, labels=labels, time_scale=time_scale)

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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint folder (config.json, model.safetensors), atomically; ``save_pretrained`` adds a card."""
        save_checkpoint(path, *self.to_checkpoint())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GuidanceNetwork:
        """Read a checkpoint folder.

        Raises:
            CheckpointError: damaged, of another kind or another architecture.
        """
        config, tensors = load_checkpoint(path, "guidance")
        network = cls.from_config(config)
        load_state_dict_checked(network, tensors, str(path))
        return network.eval()


@dataclass(frozen=True)
class GuidedEvaluation:
    """One evaluation: epsilon of the source, grad log h (None outside the interval), and the weight scale * sigma."""

    epsilon: Tensor
    gradient: Tensor | None
    weight: float


class GuidedDenoiser:
    """A frozen denoiser with guidance: epsilon_q = epsilon_p - scale * sigma_t * grad log h  (TGDP Theorem 3.1).

    Args:
        denoiser: the source model.
        guidance: anything with ``log_ratio_and_grad``; None leaves the source unguided.
        scale: guidance scale; 1 is exact. A function of the schedule time t gives a scale schedule.
        interval: (t_low, t_high) outside which the guidance network is not run at all.
        clamp: (low, high) to which the predicted x0 is clamped; epsilon is recomputed from it.
        gradient_norm_limit: largest per-sample L2 norm of scale * sigma_t * grad log h (what is subtracted from
            epsilon, whose own norm is about sqrt(number of elements)); longer gradients are shortened.

    Raises:
        ValueError: a bad scale, interval, clamp or limit.
    """

    def __init__(
        self,
        denoiser: EpsilonModel,
        guidance: Guidance | None = None,
        *,
        scale: float | Callable[[float], float] = 1.0,
        interval: tuple[float, float] | None = None,
        clamp: tuple[float, float] | None = None,
        gradient_norm_limit: float | None = None,
    ) -> None:
        if not hasattr(denoiser, "epsilon"):
            raise ValueError(
                f"denoiser must have a method epsilon(x, t, labels), got {type(denoiser).__name__}; "
                "wrap a plain network as tgdp_fast.Denoiser(network, schedule)"
            )
        if guidance is not None:
            check_guidance(guidance)
        self.denoiser = denoiser
        self.guidance = guidance
        self.scale = scale if callable(scale) else check_number("scale", scale)
        self.interval = _check_pair("interval", interval)
        self.clamp = _check_pair("clamp", clamp, finite=True)
        self.gradient_norm_limit = (
            None
            if gradient_norm_limit is None
            else check_number("gradient_norm_limit", gradient_norm_limit, 0.0, exclusive=True)
        )

    @property
    def schedule(self) -> NoiseSchedule:
        """The denoiser's noise schedule."""
        return self.denoiser.schedule

    def scale_at(self, t: float) -> float:
        """Guidance scale at schedule time ``t``; 0 outside the interval or without guidance."""
        if self.guidance is None:
            return 0.0
        if self.interval is not None and not self.interval[0] <= t <= self.interval[1]:
            return 0.0
        return check_number("scale(t)", self.scale(t)) if callable(self.scale) else self.scale

    def evaluate(self, x: Tensor, t: float, labels: Tensor | None = None) -> GuidedEvaluation:
        """Run the denoiser and, where the scale is not 0, the guidance network. x [B, ...]."""
        scale = self.scale_at(t)
        guidance = self.guidance
        if scale == 0.0 or guidance is None:
            return GuidedEvaluation(self.denoiser.epsilon(x, t, labels_for(self.denoiser, labels)), None, 0.0)
        weight = scale * float(self.schedule.sigma(t))
        epsilon, (_, gradient) = side_by_side(
            x.device,
            lambda: self.denoiser.epsilon(x, t, labels_for(self.denoiser, labels)),
            lambda: guidance.log_ratio_and_grad(x, t, labels_for(guidance, labels)),
        )
        if self.gradient_norm_limit is not None:
            gradient = limit_gradient(gradient, weight, self.gradient_norm_limit)
        return GuidedEvaluation(epsilon, gradient, weight)

    def epsilon(self, x: Tensor, t: float, labels: Tensor | None = None) -> Tensor:
        """Guided epsilon [B, ...], clamp included; what a sampler outside this package should call."""
        evaluation = self.evaluate(x, t, labels)
        alpha, sigma = float(self.schedule.alpha(t)), float(self.schedule.sigma(t))
        return guided_epsilon(x, evaluation.epsilon, evaluation.gradient, evaluation.weight, alpha, sigma, self.clamp)[
            0
        ]


def _check_pair(name: str, pair: tuple[float, float] | None, finite: bool = False) -> tuple[float, float] | None:
    if pair is None:
        return None
    try:
        low, high = (float(value) for value in pair)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a pair (low, high), got {pair!r}") from None
    if not low < high or (finite and not math.isfinite(high - low)):
        raise ValueError(f"{name} must be a pair (low, high) with low < high{', finite' * finite}, got {pair!r}")
    return low, high
