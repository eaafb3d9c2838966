"""The gate of a residual block, as in DiffWave and SSSD-ECG: tanh of one half of the channels, sigmoid of the other.

output = tanh(x[:, :C] + bias[:C]) * sigmoid(x[:, C:] + bias[C:])
"""

from __future__ import annotations

import torch
from torch import Tensor

from tgdp_fast.ops import registry

__all__ = ["gated_activation", "gated_activation_reference"]

_OPERATOR = "gated_activation"
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def gated_activation(x: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Tanh of the first half of the channels times the sigmoid of the second, with a bias before both.

    Precision: arithmetic in float32 whatever the dtypes, in float64 if x is float64. Works under inference_mode and
    ``torch.compile(fullgraph=True)``. Differentiable any number of times.

    Cost for N = B C L elements of b bytes: 3 N b bytes of memory traffic when each input is read once and the output
    written once (the reference makes one pass per operation), and about 30 N FLOPs.

    Args:
        x: [B, 2 C, L] floating point.
        bias: [2 C] or [B, 2 C], any floating dtype, or None for zeros.
        backend: "auto" or "reference"; there is no other implementation.

    Returns:
        [B, C, L], contiguous, new, in the dtype of x.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the number of channels is odd.
        BackendUnavailableError: the requested backend cannot serve the call.

    Source: Kong et al., "DiffWave", ICLR 2021, arXiv 2009.09761; the gate is that of WaveNet.
    """
    _check(x, bias)
    output: Tensor = registry.resolve(_OPERATOR, backend, x, bias).function(x, bias)
    return output


def gated_activation_reference(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Plain PyTorch twin of :func:`gated_activation`, without checks, under ordinary autograd."""
    precision = torch.float64 if x.dtype == torch.float64 else torch.float32
    z = x.to(precision)
    if bias is not None:
        z = z + bias.to(precision).unsqueeze(-1)
    first, second = z.chunk(2, dim=1)
    return (torch.tanh(first) * torch.sigmoid(second)).to(x.dtype).contiguous()


def _check(x: Tensor, bias: Tensor | None) -> None:
    if x.ndim != 3:
        raise ValueError(f"x must have shape [B, 2 C, L], got {tuple(x.shape)}; use x.unsqueeze(-1) for [B, 2 C]")
    if x.shape[1] % 2:
        raise ValueError(f"x must have an even number of channels, two for each of the output, got {x.shape[1]}")
    if x.dtype not in _FLOATING:
        raise ValueError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}; convert it with .to()")
    if bias is None:
        return
    batch, channels = x.shape[:2]
    if bias.shape not in ((channels,), (batch, channels)):
        raise ValueError(
            f"bias must have shape ({channels},) or ({batch}, {channels}) for x of shape {tuple(x.shape)}, got "
            f"{tuple(bias.shape)}"
        )
    if bias.dtype not in _FLOATING:
        raise ValueError(f"bias must be float16, bfloat16, float32 or float64, got {bias.dtype}")
    if bias.device != x.device:
        raise ValueError(f"bias must be on the device of x, {x.device}, got {bias.device}; move it with .to()")


registry.register(_OPERATOR, "reference", gated_activation_reference)
