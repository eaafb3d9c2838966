"""The gate of a residual block, tanh of one half of the channels times the sigmoid of the other, in one pass.

Reference twin ``tgdp_fast.ops.gated_activation.gated_activation_reference``.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from tgdp_fast.kernels.compilation import Compilation

# Elements of a program, at most and at least: eight a thread.
_BLOCK = 1024
_SMALLEST_BLOCK = 128
_NUM_WARPS = 4


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
    block = _block(half)
    tiles = triton.cdiv(half, block)
    gated_activation_kernel[(batch * tiles,)](
        output,
        x,
        bias,
        half,
        tiles,
        length,
        channels,
        per_sample=bias is not None and bias.ndim == 2,
        long=length >= block,
        block=block,
        num_warps=_NUM_WARPS,
        enable_fp_fusion=True,
    )


def _block(half: int) -> int:
    return min(_BLOCK, max(_SMALLEST_BLOCK, triton.next_power_of_2(half)))


def _compilation(
    variant: str, dtype: str, bias: str | None, shape: tuple[int, int, int], *, per_sample: bool = False
) -> Compilation:
    """For an output of this shape."""
    batch, channels, length = shape
    half, block = channels * length, _block(channels * length)
    constants: dict[str, Any] = {"per_sample": per_sample, "long": length >= block, "block": block}
    if bias is None:
        constants["bias_pointer"] = None
    types = {"output_pointer": f"*{dtype}", "x_pointer": f"*{dtype}", "bias_pointer": f"*{bias}"}
    tiles = -(-half // block)
    divisible = [name for name in ("output_pointer", "x_pointer", "bias_pointer") if name not in constants]
    divisible += [name for name, value in (("half", half), ("tiles", tiles)) if value % 16 == 0]
    return Compilation(
        name=f"gated_activation/{variant}",
        kernel=gated_activation_kernel,
        signature={
            name: "constexpr" if name in constants else types.get(name, "i32")
            for name in gated_activation_kernel.arg_names
        },
        constants=constants,
        num_warps=_NUM_WARPS,
        num_stages=3,
        tensor_cores=False,
        problem=f"[{batch}, {channels}, {length}]",
        programs=batch * tiles,
        bytes=float(3 * batch * half * (4 if dtype == "fp32" else 2)),
        flops=30.0 * batch * half,
        divisible=tuple(divisible),
    )


def shipped() -> list[Compilation]:
    """Gates of residual blocks of 256 channels on 1000 positions, and of short and odd sizes."""
    return [
        _compilation("plain", "bf16", None, (64, 256, 1000)),
        _compilation("bias", "bf16", "bf16", (64, 256, 1000)),
        _compilation("sample bias", "fp32", "fp32", (64, 256, 1024), per_sample=True),
        _compilation("odd", "fp16", "fp32", (7, 5, 131), per_sample=True),
    ]
