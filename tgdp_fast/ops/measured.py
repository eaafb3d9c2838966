"""The choice of ``auto`` on a GPU: the faster backend for a call that several backends serve.

Measured on an H200, bench/results/nvidia-h200-2026-11-26.json. Two effects matter. Outside a CUDA graph, launches by
the host take most of the time of a small call: one for a CUDA kernel, 40 us; one per layer with Triton, 80 us each;
PyTorch is in between. In a CUDA graph launches cost nothing and only the kernels count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

#: The card; on another one other thresholds may be right.
CARD = "H200"

_capturing: ContextVar[bool] = ContextVar("tgdp_fast_capturing", default=False)

#: Multiply-adds of an MLP, samples times weights, up to which launches take most of the time of a call outside a graph.
_LAUNCH_MACS = 3e10
#: Multiply-adds above which the CUDA kernel, with few warps to hide its waits, takes longer than PyTorch's launches.
_CUDA_MACS, _CUDA_MACS_FP32 = 3e9, 1e9
#: The same for ``trajectory``, one CUDA kernel for all evaluations, against the loop: 0.7 ms per evaluation for 10,000
#: samples and two networks of width 512, 1.6e10 multiply-adds, where the loop's kernels should take a third, by the sum
#: of their parts.
_RUN_MACS, _RUN_MACS_FP32 = 4e10, 1e10
#: Elements from which the Triton step moves more bytes per second than CUDA's in 16 bits.
_LARGE_STEP = 2**24


@contextmanager
def capturing() -> Iterator[None]:
    """Calls within are or will be captured in a CUDA graph: ``auto`` chooses the same in warm-up and capture."""
    token = _capturing.set(True)
    try:
        yield
    finally:
        _capturing.reset(token)


def _captured() -> bool:
    return _capturing.get() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


# Context variables cannot be traced; see registry._ambient_backend.
_captured._dynamo_marked_constant = True  # type: ignore[attr-defined]


def preferred_to_cuda_step(x: Tensor, epsilon: Tensor, *_: object, **__: object) -> Sequence[str]:
    """For ``guided_step`` of CUDA: 418 us and Triton's 336 us for 1e8 numbers of 16 bits, as long in float32."""
    return ("triton",) if epsilon.dtype != torch.float32 and x.numel() >= _LARGE_STEP else ()


def preferred_to_cuda_mlp(x: Tensor, _: Tensor, weights: Sequence[Tensor], *__: object) -> Sequence[str]:
    """For ``mlp_value_and_grad`` of CUDA."""
    widest, macs = max(weight.shape[0] for weight in weights), _macs(len(x), weights)
    if x.dtype == torch.float32:
        # 80 us and PyTorch's 86 us for 4,096 samples of width 128; 849 and 400 us of width 512.
        slow = widest > 256 or macs > _CUDA_MACS_FP32 or (_captured() and widest > 128)
        return ("reference",) if slow else ()
    if _captured():  # 33 us and 13 us for 4,096 samples of width 128, 280 and 75 us of width 512.
        return ("triton",)
    # 292 us and PyTorch's 262 us for 4,096 samples of width 512; 849 and 306 us for 256 of 3,904 inputs.
    return ("triton", "reference") if macs > _CUDA_MACS or x.shape[1] > 1024 else ()


def preferred_to_triton_mlp(x: Tensor, _: Tensor, weights: Sequence[Tensor], *__: object) -> Sequence[str]:
    """For ``mlp_value_and_grad`` and ``mlp_forward`` of Triton."""
    from tgdp_fast.kernels.small_mlp import fits

    if x.dtype == torch.float32:  # 692 us and PyTorch's 400 us for 4,096 samples of width 512.
        return ("reference",)
    if _captured() or fits(x, weights):
        return ()
    # 659 us and 262 us for 4,096 samples of width 512, as long for 65,536.
    return ("reference",) if _macs(len(x), weights) < _LAUNCH_MACS else ()


def preferred_to_triton_mlp_backward(x: Tensor, _: Tensor, weights: Sequence[Tensor], *__: object) -> Sequence[str]:
    """For the derivatives of both, given the call whose derivative it is: several launches a layer. A step of fitting
    takes 4.8 ms, and 3.4 ms with PyTorch's.
    """
    eager = not _captured() and _macs(len(x), weights) < _LAUNCH_MACS
    return ("reference",) if eager or x.dtype == torch.float32 else ()


def loop_is_faster(samples: int, networks: Sequence[Sequence[Tensor]]) -> bool:
    """Whether the solver's loop, layer by layer in a CUDA graph, is faster than ``trajectory`` of CUDA in one launch.

    Args:
        samples: of the draw.
        networks: weights of the score network and of the guidance network.
    """
    macs = sum(_macs(samples, weights) for weights in networks)
    return macs > (_RUN_MACS_FP32 if networks[0][0].dtype == torch.float32 else _RUN_MACS)


def _macs(samples: int, weights: Sequence[Tensor]) -> float:
    return float(samples) * sum(weight.numel() for weight in weights)
