"""The SSSD-ECG denoiser the way others compute it: as published, and as a careful user of PyTorch would speed it up."""

from __future__ import annotations

import copy
import math
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional

from tgdp_fast.models import SSSDECG
from tgdp_fast.models.s4 import NPLRKernel, S4Block, S4Kernel
from tgdp_fast.models.sssd_ecg.layers import ResidualBlock, WeightNormConv1d


def random_network(blocks: int, width: int, seed: int) -> SSSDECG:
    """A network of the paper's kind in eval mode whose prediction is not zero, as that of a new one is.

    Its kernels are those of ``cauchy="half"``, which released code computes without its CUDA extension.

    Args:
        blocks, width: residual blocks and channels.
        seed: of its parameters.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SSSDECG(res_channels=width, skip_channels=width, num_res_layers=blocks, cauchy="half")
        last = network.final_conv[2].get_submodule("conv")
        assert isinstance(last, nn.Conv1d)
        last.reset_parameters()
    return network.eval()


def published(network: SSSDECG) -> SSSDECG:
    """The network as released code computes it: kernels anew at every call, by the sums that it takes without its CUDA
    extension, weights normalized at every call.

    Returns:
        Another module, with the parameters of ``network``.
    """
    shared = [*network.parameters(), *network.buffers()]
    result = copy.deepcopy(network, {id(tensor): tensor for tensor in shared})
    for module in result.modules():
        if isinstance(module, S4Kernel):
            module.train()  # anew at each call
            module.kernel.forward = MethodType(_published_kernels, module.kernel)  # type: ignore[method-assign]
    return result


def _published_kernels(self: NPLRKernel, dtype: torch.dtype | None = None) -> Tensor:
    """:meth:`NPLRKernel.forward` for ``cauchy="half"``, with every term of the six sums in memory at once."""
    c, b, p, q, w, omega, z = (
        torch.view_as_complex(stored.contiguous())
        for stored in (self.C, self.B, self.P, self.Q, self.w, self.omega, self.z)
    )
    dt = self.log_dt.exp()[:, None]
    numerators = torch.cat([b, p])[:, None] * torch.cat([c, q])[None]
    sums = dt * (numerators[..., None] / (z - (dt * w)[..., None])).sum(dim=-2)
    spectrum = sums[0, :2] - sums[1, :2] * sums[0, 2] / (1 + sums[1, 2])
    return torch.fft.irfft(2 / (1 + omega) * spectrum, n=self.l_max)


class StrongSSSDECG(nn.Module):
    """The network's own layers, one by one, with what can be kept kept: spectra of kernels, normalized weights.

    Each block is compiled by torch.compile where asked for, once for all of them: the embedding of the step, which does
    not compile, stays outside. For 16 bits use autocast.

    Args:
        network: whose parameters it takes, in eval mode.
        compiled: whether to compile the blocks.

    Shapes: as for :class:`tgdp_fast.SSSDECG`, for signals of length l_max.
    """

    def __init__(self, network: SSSDECG, *, compiled: bool) -> None:
        super().__init__()
        self.network = network
        self.stem, self.hidden = (
            _plain(part[0].get_submodule("conv")) for part in (network.init_conv, network.final_conv)
        )
        self.last = network.final_conv[2]
        blocks = [
            _StrongBlock(block) for block in network.residual_layer.residual_blocks if isinstance(block, ResidualBlock)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.eval()
        if compiled:
            for block in blocks:
                block.compile(dynamic=False)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        step, label = self.network.residual_layer.embed_step(time), self.network.embed_labels(labels)
        h = functional.relu(self.stem(x)).to(x.dtype)
        skip = torch.zeros_like(h)
        for block in self.blocks:
            h, term = block(h, step, label)
            skip = skip + term
        skip = skip * math.sqrt(1.0 / len(self.blocks))
        result: Tensor = self.last(functional.relu(self.hidden(skip))).to(x.dtype)
        return result


class _StrongBlock(nn.Module):
    def __init__(self, block: ResidualBlock) -> None:
        super().__init__()
        self.fc_t, self.fc_label = block.fc_t, block.fc_label
        self.convolution = _plain(block.conv_layer.get_submodule("conv"))
        self.first, self.second = _StrongS4(block.S41), _StrongS4(block.S42)
        self.residual, self.skip = _plain(block.res_conv), _plain(block.skip_conv)

    def forward(self, x: Tensor, step: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        h = self.first(self.convolution(x + self.fc_t(step)[:, :, None]))
        if self.fc_label is not None:
            h = h + self.fc_label(label)[:, :, None]
        first, second = self.second(h).chunk(2, dim=1)
        gated = torch.tanh(first) * torch.sigmoid(second)
        return (x + self.residual(gated)) * math.sqrt(0.5), self.skip(gated)


class _StrongS4(nn.Module):
    def __init__(self, block: S4Block) -> None:
        super().__init__()
        taps = block.s4_layer.taps(dtype=torch.float64)
        length = (taps.shape[1] + 1) // 2
        # A power of two, as transforms are fast for.
        self.n = 1 << (2 * length - 2).bit_length()
        circular = torch.roll(functional.pad(taps, (0, self.n - taps.shape[1])), 1 - length, dims=1)
        self.spectrum = torch.fft.rfft(circular).to(torch.complex64)
        self.linear, self.norm = block.s4_layer.output_linear, block.norm_layer

    def forward(self, u: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(u.float(), n=self.n) * self.spectrum
        y = functional.gelu(torch.fft.irfft(spectrum, n=self.n)[..., : u.shape[-1]])
        result: Tensor = self.norm((u + self.linear(y)).transpose(1, 2)).transpose(1, 2)
        return result


def _plain(convolution: nn.Module) -> nn.Conv1d:
    """An ordinary convolution with the normalized weight."""
    assert isinstance(convolution, WeightNormConv1d)
    out_channels, in_channels, size = convolution.weight_v.shape
    result = nn.Conv1d(in_channels, out_channels, size, padding=convolution.padding)
    with torch.no_grad():
        result.weight.copy_(convolution.weight)
        assert result.bias is not None
        result.bias.copy_(convolution.bias)
    return result.to(convolution.weight_v.device)
