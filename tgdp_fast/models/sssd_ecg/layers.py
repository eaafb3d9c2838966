"""The layers of SSSD-ECG, under the names of the released checkpoints."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from tgdp_fast.models.mlp import check_labels_given, encode_labels
from tgdp_fast.models.s4 import CAUCHY, S4Block
from tgdp_fast.ops import gated_activation
from tgdp_fast.runtime.checks import check_choice, check_integer
from tgdp_fast.runtime.memory import check_network


class WeightNormConv1d(nn.Module):
    """Convolution over time with the weight g v / ||v||, the norm taken over each output channel; zero padding.

    The weight is computed from ``weight_g`` and ``weight_v`` at each use, so no copy can become stale. The initial
    weight is the usual one of a convolution, as in effect in the released training code.

    Shapes: weight_g [out, 1, 1], weight_v [out, in, kernel_size], bias [out]; [B, in, L] -> [B, out, L].

    Source: Salimans & Kingma, "Weight Normalization", NeurIPS 2016, arXiv 1602.07868.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1) -> None:
        super().__init__()
        initial = nn.Conv1d(in_channels, out_channels, kernel_size, dtype=torch.float32)
        assert initial.bias is not None
        self.padding = kernel_size // 2
        self.bias = initial.bias
        self.weight_g = nn.Parameter(_norm(initial.weight.detach()))
        self.weight_v = initial.weight

    @property
    def weight(self) -> Tensor:
        """The normalized weight [out, in, kernel_size]."""
        return self.weight_in(self.weight_v.dtype)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The normalized weight [out, in, kernel_size], computed in ``dtype``."""
        v = self.weight_v.to(dtype)
        return self.weight_g.to(dtype) * v / _norm(v)

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv1d(x, self.weight, self.bias, padding=self.padding)


def _norm(weight: Tensor) -> Tensor:
    return weight.square().sum(dim=(1, 2), keepdim=True).sqrt()


def _named_conv(convolution: nn.Module) -> nn.Sequential:
    """The convolution under its name in checkpoints: ``conv`` of a separate module."""
    return nn.Sequential(OrderedDict(conv=convolution))


def diffusion_step_features(step: Tensor, dim: int) -> Tensor:
    """sin(step * f_i), then cos(step * f_i), with f_i = 10^(-4 i / (dim/2 - 1)): from 1 down to 1e-4 radians per step.

    DiffWave (section 3.1) prints the exponents with the opposite sign; its code and that of SSSD-ECG, which trained the
    checkpoints, use this one. Computed in float64; the float32 of that code differs by up to 1e-5 at step 200.

    Shapes: step [B], integer or fractional; returns float64 [B, dim].
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=step.device) * (-4.0 / (half - 1))
    angles = step.to(torch.float64)[:, None] * torch.pow(10.0, exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class ResidualBlock(nn.Module):
    """One residual block; see the docstring of :mod:`tgdp_fast.models.sssd_ecg.network`.

    Shapes: ``forward(x [B, res_channels, L], step_embedding [B, step_dim], label_embedding [B, label_dim] or None)``
    returns the next x and this block's part of the skip sum [B, skip_channels, L].
    """

    def __init__(
        self,
        res_channels: int,
        skip_channels: int,
        step_dim: int,
        label_dim: int | None,
        l_max: int,
        d_state: int,
        cauchy: str,
    ) -> None:
        super().__init__()
        self.fc_t = nn.Linear(step_dim, res_channels, dtype=torch.float32)
        self.S41 = S4Block(2 * res_channels, d_state, l_max, cauchy)
        self.conv_layer = _named_conv(WeightNormConv1d(res_channels, 2 * res_channels, kernel_size=3))
        self.S42 = S4Block(2 * res_channels, d_state, l_max, cauchy)
        self.res_conv = WeightNormConv1d(res_channels, res_channels)
        self.skip_conv = WeightNormConv1d(res_channels, skip_channels)
        self.fc_label = None
        if label_dim is not None:
            self.fc_label = nn.Linear(label_dim, 2 * res_channels, dtype=torch.float32)

    def forward(self, x: Tensor, step_embedding: Tensor, label_embedding: Tensor | None) -> tuple[Tensor, Tensor]:
        # The zero padding of the convolution excludes the embedding, so both ends differ.
        h = self.S41(self.conv_layer(x + self.fc_t(step_embedding)[:, :, None]))
        if self.fc_label is not None:
            h = h + self.fc_label(label_embedding)[:, :, None]
        gated = gated_activation(self.S42(h))
        return (x + self.res_conv(gated)) * math.sqrt(0.5), self.skip_conv(gated)


class ResidualGroup(nn.Module):
    """The residual blocks with their common embedding of the diffusion step and their skip sum."""

    def __init__(
        self,
        res_channels: int,
        skip_channels: int,
        num_res_layers: int,
        step_dims: tuple[int, int, int],
        label_dim: int | None,
        l_max: int,
        d_state: int,
        cauchy: str,
    ) -> None:
        super().__init__()
        self.skip_channels = skip_channels
        self.fc_t1 = nn.Linear(step_dims[0], step_dims[1], dtype=torch.float32)
        self.fc_t2 = nn.Linear(step_dims[1], step_dims[2], dtype=torch.float32)
        self.residual_blocks = nn.ModuleList(
            ResidualBlock(res_channels, skip_channels, step_dims[2], label_dim, l_max, d_state, cauchy)
            for _ in range(num_res_layers)
        )

    def embed_step(self, step: Tensor) -> Tensor:
        """Diffusion step [B] -> embedding [B, step_dims[2]]."""
        features = diffusion_step_features(step, self.fc_t1.in_features).to(self.fc_t1.weight.dtype)
        embedding: Tensor = functional.silu(self.fc_t2(functional.silu(self.fc_t1(features))))
        return embedding

    def forward(self, x: Tensor, step: Tensor, label_embedding: Tensor | None) -> Tensor:
        step_embedding = self.embed_step(step)
        # x and the sum keep the precision of x, also if autocast computes their terms in 16 bits.
        skip = x.new_zeros((x.shape[0], self.skip_channels, x.shape[2]))
        for block in self.residual_blocks:
            x, term = block(x, step_embedding, label_embedding)
            skip = skip + term
        return skip * math.sqrt(1.0 / len(self.residual_blocks))


class SSSDECGModules(nn.Module):
    """The modules and sizes of :class:`tgdp_fast.SSSDECG`: shared by the network and its compiled form."""

    def __init__(
        self,
        in_channels: int = 8,
        out_channels: int = 8,
        res_channels: int = 256,
        skip_channels: int = 256,
        num_res_layers: int = 36,
        step_dims: tuple[int, int, int] | list[int] = (128, 512, 512),
        num_classes: int = 71,
        label_dim: int = 128,
        l_max: int = 1000,
        d_state: int = 64,
        cauchy: str = "pair",
    ) -> None:
        super().__init__()
        self.in_channels = check_integer("in_channels", in_channels, 1)
        self.out_channels = check_integer("out_channels", out_channels, 1)
        self.res_channels = check_integer("res_channels", res_channels, 1)
        self.skip_channels = check_integer("skip_channels", skip_channels, 1)
        self.num_res_layers = check_integer("num_res_layers", num_res_layers, 1)
        self.step_dims = _check_step_dims(step_dims)
        self.num_classes = check_integer("num_classes", num_classes, 0)
        self.label_dim = check_integer("label_dim", label_dim, 1)
        self.l_max = check_integer("l_max", l_max, 1)
        self.d_state = check_integer("d_state", d_state, 2)
        self.cauchy = check_choice("cauchy", cauchy, CAUCHY)
        features, hidden, embedding = self.step_dims
        block = 14 * res_channels**2 + 12 * res_channels * d_state + 8 * l_max
        block += res_channels * (skip_channels + embedding + label_dim * (num_classes > 0))
        values = num_res_layers * block + hidden * (features + embedding) + num_classes * label_dim + 12 * d_state**2
        values += res_channels * in_channels + skip_channels * (skip_channels + out_channels)
        sizes = {
            **{"in_channels": in_channels, "out_channels": out_channels, "res_channels": res_channels},
            **{"skip_channels": skip_channels, "num_res_layers": num_res_layers, "step_dims": self.step_dims},
            **{"num_classes": num_classes, "label_dim": label_dim, "l_max": l_max, "d_state": d_state},
        }
        check_network(", ".join(sizes), tuple(sizes.values()), values)

        self.init_conv = nn.Sequential(_named_conv(WeightNormConv1d(in_channels, res_channels)), nn.ReLU())
        self.embedding = nn.Embedding(num_classes, label_dim, dtype=torch.float32) if num_classes else None
        self.residual_layer = ResidualGroup(
            res_channels,
            skip_channels,
            num_res_layers,
            self.step_dims,
            label_dim if num_classes else None,
            l_max,
            d_state,
            cauchy,
        )
        last = nn.Conv1d(skip_channels, out_channels, 1, dtype=torch.float32)
        assert last.bias is not None
        nn.init.zeros_(last.weight)  # Initial prediction zero, as in DiffWave.
        nn.init.zeros_(last.bias)
        self.final_conv = nn.Sequential(
            _named_conv(WeightNormConv1d(skip_channels, skip_channels)), nn.ReLU(), _named_conv(last)
        )

    def embed_labels(self, labels: Tensor | None) -> Tensor | None:
        """Labels -> embedding [B, label_dim], or None for an unconditional network.

        Raises:
            ValueError: labels for an unconditional network, or none for a conditional one.
        """
        check_labels_given(labels, self.num_classes, "network", "build it with num_classes > 0")
        if labels is None or self.embedding is None:
            return None
        weight = self.embedding.weight
        return encode_labels(labels, self.num_classes, weight.dtype) @ weight


def _check_step_dims(step_dims: tuple[int, int, int] | list[int]) -> tuple[int, int, int]:
    if not isinstance(step_dims, tuple | list) or len(step_dims) != 3:
        raise ValueError(f"step_dims must be three integers (features, hidden, embedding), got {step_dims!r}")
    features, hidden, embedding = step_dims
    if check_integer("step_dims[0]", features, 4) % 2:
        raise ValueError(f"step_dims[0] must be even (a sine and a cosine for each frequency), got {features}")
    return int(features), check_integer("step_dims[1]", hidden, 1), check_integer("step_dims[2]", embedding, 1)
