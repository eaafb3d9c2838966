"""Shapes and dtypes of what the compiled operators return, without values: torch's fakes of them.

They are registered together with the operators. Operators of Triton kernels, which return the same, use them too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Channels that a vector of the CPU's long convolution holds, kChannelGroup of csrc/cpu/long_convolution.h.
_CHANNEL_GROUP = 16


def register(kind: str) -> None:
    """Register the fakes of the operators that the extension of this kind defines, "CPU" or "CUDA"."""
    for name, fake in _FAKES[kind].items():
        torch.library.register_fake(f"tgdp_fast::{name}", fake)


def _pre_activations(x: Tensor, weights: list[Tensor], wanted: bool) -> list[Tensor]:
    return [x.new_empty((x.shape[0], weight.shape[0])) for weight in weights[:-1]] if wanted else []


def mlp_forward(
    x: Tensor, first_bias: Tensor, weights: list[Tensor], biases: list[Tensor], save_pre_activations: bool
) -> tuple[Tensor, list[Tensor]]:
    """Outputs and pre-activations."""
    output = x.new_empty((x.shape[0], weights[-1].shape[0]))
    return output, _pre_activations(x, weights, save_pre_activations)


def mlp_value_and_grad(
    x: Tensor, first_bias: Tensor, weights: list[Tensor], biases: list[Tensor], save_pre_activations: bool, *_: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Values, gradients and pre-activations."""
    return x.new_empty(x.shape[0]), x.new_empty(x.shape), _pre_activations(x, weights, save_pre_activations)


def mlp_backward(
    output_cotangent: Tensor | None,
    x: Tensor,
    first_bias: Tensor,
    weights: list[Tensor],
    pre_activations: list[Tensor],
    needs_grad: list[bool],
    *_: bool,
) -> list[Tensor]:
    """The gradients that are needed."""
    shapes = [x.shape, first_bias.shape, *(w.shape for w in weights), *(w.shape[:1] for w in weights[1:])]
    return [x.new_empty(shape) for shape, needed in zip(shapes, needs_grad, strict=True) if needed]


def mlp_value_and_grad_backward(
    value_cotangent: Tensor | None, gradient_cotangent: Tensor | None, *call: Any
) -> list[Tensor]:
    """The gradients that are needed."""
    return mlp_backward(None, *call)


def history_slots(entries: int) -> int:
    """H of a matrix of so many entries: (1 + H) (2 + H) lie between (1 + H)^2 and (2 + H)^2."""
    return math.isqrt(entries) - 1


def step_outputs(x: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """x_next, history_next [H, *x.shape] and x0 of a solver step."""
    return x.new_empty(x.shape), x.new_empty((slots, *x.shape)), x.new_empty(x.shape)


def guided_step(
    x: Tensor, epsilon: Tensor, gradient: Any, history: Any, matrix: list[float], *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """As step_outputs."""
    return step_outputs(x, history_slots(len(matrix)))


def long_convolution(u: Tensor, packed: Tensor, scales: Tensor, gelu: bool) -> Tensor:
    """A tensor like u, contiguous."""
    return u.new_empty(u.shape)


def _pack_long_convolution(spectra: Tensor, half: bool) -> tuple[Tensor, Tensor]:
    groups = (spectra.shape[0] + _CHANNEL_GROUP - 1) // _CHANNEL_GROUP
    packed = spectra.new_empty(
        (groups, spectra.shape[1], 2, _CHANNEL_GROUP), dtype=torch.float16 if half else torch.float32
    )
    return packed, spectra.new_empty((groups * _CHANNEL_GROUP if half else 0,), dtype=torch.float32)


def _trajectory(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty((), dtype=torch.int64)


def _normal_range(samples: Tensor, num_elements: int, first: int, count: int, *_: int) -> Tensor:
    return samples.new_empty((count,), dtype=torch.float32)


def nothing(*_: object) -> None:
    """Of an operator that writes into its arguments."""


_FAKES: dict[str, dict[str, Callable[..., Any]]] = {
    "CPU": {
        "mlp_forward": mlp_forward,
        "mlp_value_and_grad": mlp_value_and_grad,
        "mlp_backward": mlp_backward,
        "mlp_value_and_grad_backward": mlp_value_and_grad_backward,
        "guided_step": guided_step,
        "long_convolution": long_convolution,
        "pack_long_convolution": _pack_long_convolution,
        "residual_block_": nothing,
        "trajectory": _trajectory,
        "normal_range": _normal_range,
    },
    "CUDA": {"cuda_long_convolution_": nothing},
}
