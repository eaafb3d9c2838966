"""The gated activation of an S4 layer; it is timed as part of a residual block."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from tgdp_fast.lab.cases.case import Check, Draw, place
from tgdp_fast.ops import gated_activation

#: For validate: shape of the output, rows of the bias, layout.
SHAPES = (
    ((0, 2, 3), "shared", "contiguous"),
    ((3, 2, 0), "shared", "contiguous"),
    ((1, 1, 37), "no", "contiguous"),
    ((65, 3, 1), "per sample", "contiguous"),
    ((2, 7, 129), "shared", "contiguous"),
    ((3, 5, 33), "per sample", "strided"),
    ((2, 3, 1000), "per sample", "misaligned"),
    ((1, 5, 1025), "shared", "contiguous"),
    ((2, 64, 61), "no", "contiguous"),
)


def eager_gated_activation(x: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`tgdp_fast.ops.gated_activation` in the dtype of x throughout; x [B, 2 C, L], bias [2 C] or [B, 2 C]."""
    first, second = (x if bias is None else x + bias.unsqueeze(-1)).chunk(2, dim=1)
    return torch.tanh(first) * torch.sigmoid(second)


def check(draw: Draw, shape: tuple[int, int, int], bias_rows: str, layout: str) -> Check:
    """The operator on an entry of :data:`SHAPES`, with inputs up to where both functions are flat."""
    batch, channels, length = shape
    x = draw(batch, 2 * channels, length, scale=4.0)
    sizes: dict[str, tuple[int, ...]] = {"shared": (2 * channels,), "per sample": (batch, 2 * channels)}
    bias = None if bias_rows == "no" else draw(*sizes[bias_rows])
    call = partial(gated_activation, place(x, layout), bias)
    return Check(
        f"{list(shape)}, {bias_rows} bias, {layout}",
        lambda backend: [call(backend=backend)],
        [eager_gated_activation(x.double(), None if bias is None else bias.double())],
        [eager_gated_activation(x, bias)],
    )
