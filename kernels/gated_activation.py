"""The gate of a residual block, tanh of one half of the channels times the sigmoid of the other, in one pass.

Reference twin ``tgdp_fast.ops.gated_activation.gated_activation_reference``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from tgdp_fast.kernels import launching
from tgdp_fast.kernels.autotuning import tuned
from tgdp_fast.kernels.compilation import Compilation
from tgdp_fast.kernels.launching import Block


@triton.jit
def gate(a, b):
    """tanh(a) sigmoid(b), float32, to a few units in the last place; two exponentials and one division."""
    magnitude = tl.abs(a)
    square = a * a
    # tanh(m) = m + m^3 p(m^2), minimax in the relative error, where the quotient below would cancel.
    p = -0.005704996176064014 * square + 0.020639095455408096
    p = p * square - 0.05373971909284592
    p = p * square + 0.13331441581249237
    p = p * square - 0.3333328068256378
    small = magnitude < 0.625
    # tanh(m) = (1 - t) / (1 + t), t = exp(-2 m).
    t = tl.exp(-2.0 * magnitude)
    numerator = tl.where(small, magnitude + (magnitude * square) * p, 1.0 - t)
    denominator = tl.where(small, 1.0, 1.0 + t) * (1.0 + tl.exp(-b))
    result = numerator / denominator
    return tl.where(a < 0.0, -result, result)


@triton.jit
def _bias(pointer, first, lanes, length, channels, inside, long: tl.constexpr):
    """Bias of the channels of the flat positions first + lanes; ``channels`` is how many channels there are.

    Where ``long``, a channel is no shorter than the number of lanes, which then touch two channels at most.
    """
    channel = first // length
    position = first - channel * length + lanes
    if long:
        here = tl.load(pointer + channel).to(tl.float32)
        after = tl.load(pointer + channel + 1, mask=channel + 1 < channels, other=0.0).to(tl.float32)
        return tl.where(position >= length, after, here)
    further = position.to(tl.int32) // length.to(tl.int32)
    return tl.load(pointer + (channel + further), mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["length", "channels"])
def gated_activation_kernel(
    output_pointer,
    x_pointer,
    bias_pointer,
    half,
    tiles,
    length,
    channels,
    per_sample: tl.constexpr,
    long: tl.constexpr,
    block: tl.constexpr,
):
    """One of ``tiles`` parts of one sample: ``block`` of the ``half`` = channels * length elements of its output.

    output [B, channels, length], x [B, 2 channels, length], bias [2 channels], [B, 2 channels] where ``per_sample``, or
    None; contiguous, float32, bfloat16 or float16 each. ``long``: length is no less than block.

    Moves 3 elements of x for each of the output and computes about 30 FLOPs, two of them exponentials.
    """
    program = tl.program_id(0).to(tl.int64)
    sample = program // tiles
    first = (program - sample * tiles) * block
    lanes = tl.arange(0, block)
    offsets = first + lanes
    inside = offsets < half
    # No sample shares a tile with the next, so that all of a tile has one distance between the halves of x and one row
    # of the bias, and addresses stay multiples of what the sizes are multiples of.
    x_sample = x_pointer + 2 * sample * half
    a = tl.load(x_sample + offsets, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_sample + half + offsets, mask=inside, other=0.0).to(tl.float32)
    if bias_pointer is not None:
        row = bias_pointer
        if per_sample:
            row += 2 * sample * channels
        a += _bias(row, first, lanes, length, channels, inside, long)
        b += _bias(row + channels, first, lanes, length, channels, inside, long)
    value = gate(a, b)
    tl.store(output_pointer + sample * half + offsets, value.to(output_pointer.dtype.element_ty), mask=inside)


def launch(output: Tensor, x: Tensor, bias: Tensor | None) -> None:
    """Fill output [B, C, L] from x [B, 2 C, L] and bias [2 C], [B, 2 C] or None, all contiguous."""
    if output.numel() == 0:
        return
    batch, channels, length = output.shape
    half = channels * length

    def run(block: Block) -> None:
        tiles = triton.cdiv(half, block.elements)
        launching.launch(
            gated_activation_kernel,
            (batch * tiles,),
            output,
            x,
            bias,
            half,
            tiles,
            length,
            channels,
            flops=30 * batch * half,
            tile=block,
            per_sample=bias is not None and bias.ndim == 2,
            long=length >= block.elements,
            block=block.elements,
        )

    variant = (x.dtype, None if bias is None else (bias.dtype, bias.ndim))
    tuned(run, _block, _blocks, gated_activation_kernel, x, (batch, half, length), *variant)


def _block(batch: int, half: int, length: int) -> Block:
    """Eight elements a thread, fewer where a sample has no more than 512."""
    return _blocks(batch, half, length)[0]


def _blocks(batch: int, half: int, length: int) -> list[Block]:
    """All choices, none much longer than a sample."""
    most = max(128, triton.next_power_of_2(half))
    return [Block(min(size, most), num_warps) for size, num_warps in ((1024, 4), (512, 4), (1024, 8), (2048, 8))]


def _without_data(
    dtype: torch.dtype, shape: tuple[int, int, int], bias: tuple[torch.dtype, int] | None = None
) -> Callable[[], None]:
    """A launch for a record: an output of this shape, a bias of a dtype and of one dimension or two."""
    batch, channels, length = shape
    output = torch.empty(shape, dtype=dtype, device="meta")
    given = None if bias is None else output.new_empty((batch, 2 * channels)[-bias[1] :], dtype=bias[0])
    return partial(launch, output, output.new_empty(batch, 2 * channels, length), given)


def shipped() -> list[Compilation]:
    """Gates of residual blocks of 256 channels on 1000 positions, and of short and odd sizes."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    return launching.recorded(
        {
            "plain": _without_data(bf16, (64, 256, 1000)),
            "bias": _without_data(bf16, (64, 256, 1000), (bf16, 1)),
            "sample bias": _without_data(fp32, (64, 256, 1024), (fp32, 2)),
            "odd": _without_data(fp16, (7, 5, 131), (fp32, 2)),
        }
    )
