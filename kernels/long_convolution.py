"""The two-sided convolution of an S4 layer with its GELU, by transforms that are matmuls, in one pass.

Reference twin ``tgdp_fast.ops.long_convolution.long_convolution_reference``.

A channel of M = A B points, position n = B a + b, frequency k = j + A m, is transformed modulo X^M - i, where the real
part of a product of polynomials is the convolution without wrapping (as the CPU kernel does):

    U[j, b] = sum_a u[a, b] exp(-2 pi i a (j - 1/4) / A)    a matrix from the left
    V[j, b] = U[j, b] exp(-2 pi i b (j - 1/4) / M)
    W[j, m] = sum_b V[j, b] exp(-2 pi i b m / B)            a matrix from the right

and back likewise: twelve real matmuls of 32 x 32 matrices at M = 1024, 0.8 MFLOP for a channel of a sample; the
definition takes 2 and a split-radix transform 0.05. Matrices from both sides leave every sample of a program in its
own columns, then rows, so that nothing is transposed.

Factors are float16, sums float32. For float32 signals a matrix is the sum of two float16 matrices and a signal that of
three, and a matmul takes four (error 2^-24). Signals are scaled by a power of two so that the largest entry is in
1 .. 2, and spectra so that theirs is in 2 .. 4: then no factor exceeds sqrt(32) 2^11 4 = 46,341, which float16 holds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from tgdp_fast.kernels import launching
from tgdp_fast.kernels.launching import Block, Compilation
from tgdp_fast.kernels.matmul import multiply_add, narrow, saturated

#: A and B by the points of a transform.
FACTORS = {256: (16, 16), 512: (32, 16), 1024: (32, 32)}


@triton.jit
def gelu(y):
    """y (1 + erf(y / sqrt 2)) / 2 of float32, to 4e-7 and, where |y| < 1, to 8e-7 of itself; keeps NaN.

    y / 2 + s g(s) with s = y^2, minimax on |y| <= 5.4, beyond which the value is y or 0 to 2e-7.
    """
    # Comparisons with NaN are false.
    above = tl.where(y < -5.4, -5.4, y)
    inside = tl.where(above > 5.4, 5.4, above)
    s = inside * inside
    t = s * 0.068587102 - 1.0
    p = 0.000315638288 * t - 0.000962016173
    p = p * t + 0.00109928823
    p = p * t - 0.00137329358
    p = p * t + 0.00340804388
    p = p * t - 0.00651519746
    p = p * t + 0.00978675857
    p = p * t - 0.0140648279
    p = p * t + 0.0196087863
    p = p * t - 0.0257218294
    p = p * t + 0.0321210288
    p = p * t - 0.0392093249
    p = p * t + 0.0484994017
    p = p * t - 0.0653279871
    p = p * t + 0.130928114
    return s * p + (above - 0.5 * inside)


@triton.jit
def _parts(value, EXACT: tl.constexpr):
    """float32 as float16 and, if EXACT, its remainder as two more."""
    first = value.to(tl.float16)
    if EXACT:
        rest = value - first.to(tl.float32)
        second = rest.to(tl.float16)
        return first, second, (rest - second.to(tl.float32)).to(tl.float16)
    else:
        return first, first, first


@triton.jit
def _minus(parts, EXACT: tl.constexpr):
    if EXACT:
        return -parts[0], -parts[1], -parts[2]
    else:
        minus = -parts[0]
        return minus, minus, minus


@triton.jit
def _from_left(matrix, signal, total, EXACT: tl.constexpr):
    """total + matrix signal, from :func:`_matrix` and :func:`_parts`, without terms below 2^-24; small terms first."""
    if EXACT:
        total = multiply_add(matrix[0], signal[2], total, "ieee")
        total = multiply_add(matrix[1], signal[0], total, "ieee")
        total = multiply_add(matrix[0], signal[1], total, "ieee")
    return multiply_add(matrix[0], signal[0], total, "ieee")


@triton.jit
def _from_right(signal, matrix, total, EXACT: tl.constexpr):
    """total + signal matrix, likewise."""
    if EXACT:
        total = multiply_add(signal[2], matrix[0], total, "ieee")
        total = multiply_add(signal[0], matrix[1], total, "ieee")
        total = multiply_add(signal[1], matrix[0], total, "ieee")
    return multiply_add(signal[0], matrix[0], total, "ieee")


@triton.jit
def _matrix(pointer, row, column, STRIDE: tl.constexpr, SIZE: tl.constexpr, EXACT: tl.constexpr):
    """A matrix of float16 numbers and, if EXACT, their remainders, which are stored SIZE further."""
    pointer += row[:, None] * STRIDE + column[None, :]
    first = tl.load(pointer)
    if EXACT:
        return first, tl.load(pointer + SIZE)
    else:
        return first, first


@triton.jit
def long_convolution_kernel(
    output,
    u,
    packed,
    scales,
    roots,
    twiddles,
    batch,
    channels,
    groups,
    share,
    output_strides,
    u_strides,
    GELU: tl.constexpr,
    SATURATE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    SAMPLES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One channel of ``share`` samples, SAMPLES at a time: output = u convolved with the filter, then GELU.

    output and u [batch, channels, L] with positions in one piece; L and the strides, of a sample and of a channel, are
    in units of ALIGNMENT; packed [channels, 2, A, B], real and imaginary parts relative to scales [channels]; roots and
    twiddles: :func:`_tables`.

    Twin: ``long_convolution_reference``. Moves u and the output once and the spectrum once for each share; about 2^10 *
    (24 * 32 + 70) FLOPs for a channel of a sample at 1024 points, four times the former with PRECISION "fp16x4" instead
    of "fp16".
    """
    EXACT: tl.constexpr = PRECISION == "fp16x4"
    length = groups * ALIGNMENT
    parts = tl.cdiv(batch, share)
    program = tl.program_id(0)
    channel = (program // parts).to(tl.int64)
    first = (program % parts) * share
    a, b, s = tl.arange(0, A), tl.arange(0, B), tl.arange(0, SAMPLES)

    left_re = _matrix(roots, a, a, A, A * A, EXACT)
    left_im = _matrix(roots + 2 * A * A, a, a, A, A * A, EXACT)
    roots += 4 * A * A
    right_re = _matrix(roots, b, b, B, B * B, EXACT)
    right_im = _matrix(roots + 2 * B * B, b, b, B, B * B, EXACT)
    twiddles += a[:, None, None] * B + b[None, None, :]
    packed += channel * (2 * A * B) + a[None, :, None] * B + b[None, None, :]
    scale = tl.load(scales + channel)
    position = a[:, None, None] * B + b[None, None, :]
    u += channel * (u_strides[1] * ALIGNMENT) + position
    output += channel * (output_strides[1] * ALIGNMENT) + position

    for start in range(first, tl.minimum(first + share, batch), SAMPLES):
        sample = (start + s).to(tl.int64)[None, :, None]
        mask = (sample < batch) & (position < length)
        x = tl.load(u + sample * (u_strides[0] * ALIGNMENT), mask=mask, other=0.0).to(tl.float32)
        # The exponent of the largest entry; far from the ends of the range, so that its inverse is a number too.
        largest = tl.max(tl.max(tl.abs(x), 2), 0)
        bits = tl.minimum(tl.maximum(largest.to(tl.int32, bitcast=True) & 0x7F800000, 1 << 23), 253 << 23)
        x *= ((254 << 23) - bits).to(tl.float32, bitcast=True)[None, :, None]
        x = _parts(tl.reshape(x, [A, SAMPLES * B]), EXACT)
        zeros = tl.zeros([A, SAMPLES * B], tl.float32)
        re = tl.reshape(_from_left(left_re, x, zeros, EXACT), [A, SAMPLES, B])
        im = tl.reshape(_from_left(left_im, x, zeros, EXACT), [A, SAMPLES, B])

        turn_re, turn_im = tl.load(twiddles), tl.load(twiddles + A * B)
        re, im = re * turn_re - im * turn_im, re * turn_im + im * turn_re
        re = _parts(tl.reshape(tl.permute(re, [1, 0, 2]), [SAMPLES * A, B]), EXACT)
        im = _parts(tl.reshape(tl.permute(im, [1, 0, 2]), [SAMPLES * A, B]), EXACT)
        zeros = tl.zeros([SAMPLES * A, B], tl.float32)
        minus = _minus(im, EXACT)
        spectrum_re = _from_right(minus, right_im, _from_right(re, right_re, zeros, EXACT), EXACT)
        spectrum_im = _from_right(im, right_re, _from_right(re, right_im, zeros, EXACT), EXACT)

        filter_re, filter_im = tl.load(packed).to(tl.float32), tl.load(packed + A * B).to(tl.float32)
        re = tl.reshape(spectrum_re, [SAMPLES, A, B])
        im = tl.reshape(spectrum_im, [SAMPLES, A, B])
        re, im = re * filter_re - im * filter_im, re * filter_im + im * filter_re

        re = _parts(tl.reshape(re, [SAMPLES * A, B]), EXACT)
        im = _parts(tl.reshape(im, [SAMPLES * A, B]), EXACT)
        minus = _minus(re, EXACT)
        back_re = _from_right(im, right_im, _from_right(re, right_re, zeros, EXACT), EXACT)
        back_im = _from_right(minus, right_im, _from_right(im, right_re, zeros, EXACT), EXACT)
        re = tl.permute(tl.reshape(back_re, [SAMPLES, A, B]), [1, 0, 2])
        im = tl.permute(tl.reshape(back_im, [SAMPLES, A, B]), [1, 0, 2])
        re, im = re * turn_re + im * turn_im, im * turn_re - re * turn_im
        re = _parts(tl.reshape(re, [A, SAMPLES * B]), EXACT)
        im = _parts(tl.reshape(im, [A, SAMPLES * B]), EXACT)
        zeros = tl.zeros([A, SAMPLES * B], tl.float32)
        back = (tl.trans(left_re[0]), tl.trans(left_re[1]))
        y = _from_left(back, re, zeros, EXACT)
        back = (tl.trans(left_im[0]), tl.trans(left_im[1]))
        y = tl.reshape(_from_left(back, im, y, EXACT), [A, SAMPLES, B])
        y *= (bits.to(tl.float32, bitcast=True) * scale)[None, :, None]
        if GELU:
            y = gelu(y)
        y = saturated(y, output.dtype.element_ty) if SATURATE else narrow(y, output.dtype.element_ty)
        tl.store(output + sample * (output_strides[0] * ALIGNMENT), y, mask=mask)


def points_of(length: int) -> int | None:
    """Points of the transform for signals of this length, or None if there is none."""
    return next((points for points in FACTORS if points >= length), None)


def pack(spectra: Tensor, half: bool) -> tuple[Tensor, Tensor]:
    """Spectra [H, M] complex128 as the kernel reads them.

    Returns:
        packed [H, 2, A, B], float16 if ``half``, else float32: real and imaginary parts relative to a power of two
        for each channel; and those, float32 [H].
    """
    channels, points = spectra.shape
    factors = FACTORS[points]
    # Frequency j + A m stands at [j, m].
    values = torch.view_as_real(spectra.unflatten(1, factors[::-1]).mT).permute(0, 3, 1, 2)
    largest = spectra.abs().amax(1) if channels else spectra.real.new_zeros(0)
    usable = largest.isfinite() & (largest > 0)
    scales = torch.exp2(torch.where(usable, largest, 1.0).log2().floor() - 1.0)
    return (values / scales[:, None, None, None]).to(
        torch.float16 if half else torch.float32
    ).contiguous(), scales.float()


@functools.lru_cache(maxsize=8)
def _tables(points: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The constants of a transform.

    For either matrix its real and its imaginary part, each as float16 and its remainder; and the twiddle factors,
    float32 [2, A, B].
    """
    a, b = FACTORS[points]

    def exponentials(left: Tensor, right: Tensor, over: int) -> Tensor:
        angles = (-2.0 * math.pi / over) * torch.remainder(left.double()[:, None] * right.double(), over)
        return torch.stack([angles.cos(), angles.sin()])

    shifted, rows, columns = torch.arange(a) - 0.25, torch.arange(a), torch.arange(b)
    roots = []
    for matrix in (exponentials(shifted, rows, a), exponentials(columns, columns, b)):
        first = matrix.half()
        roots.append(torch.stack([first, (matrix - first.double()).half()], dim=1).flatten())
    # Made on the host, once; inference tensors could not be used elsewhere.
    with torch.inference_mode(False):
        twiddles = exponentials(shifted, columns, points).float()
        return torch.cat(roots).to(device), twiddles.to(device)


def launch(
    output: Tensor,
    u: Tensor,
    packed: Tensor,
    scales: Tensor,
    *,
    activation: bool,
    exact: bool,
    saturate: bool = False,
) -> None:
    """Fill output [B, H, L] from u [B, H, L], whose positions are in one piece each.

    With ``exact``, factors have 24 bits instead of 11; with ``saturate``, numbers beyond float16 become its largest
    one instead of infinity.
    """
    batch, channels, length = u.shape
    if u.numel() == 0:
        return
    a, b = packed.shape[2:]
    roots, twiddles = (
        (packed.new_empty(4 * (a * a + b * b), dtype=torch.float16), packed.new_empty(2, a, b, dtype=torch.float32))
        if u.is_meta
        else _tables(a * b, u.device)
    )
    precision = "fp16x4" if exact else "fp16"
    strides = (*output.stride()[:2], *u.stride()[:2])
    alignment = launching.alignment(length, *strides)
    block = _block(batch)
    share = min(block.elements * _ROUNDS, batch)
    launching.launch(
        long_convolution_kernel,
        (channels * triton.cdiv(batch, share),),
        output,
        u,
        packed,
        scales,
        roots,
        twiddles,
        batch,
        channels,
        length // alignment,
        share,
        tuple(stride // alignment for stride in strides[:2]),
        tuple(stride // alignment for stride in strides[2:]),
        tile=block,
        GELU=activation,
        SATURATE=saturate,
        ALIGNMENT=alignment,
        A=a,
        B=b,
        SAMPLES=block.elements,
        PRECISION=precision,
    )


#: Groups of samples that a program takes one after the other, for which it loads matrices and spectrum once.
_ROUNDS = 4


def _block(batch: int) -> Block:
    """Samples that a program takes at a time: few enough for four programs of 16 bits in a multiprocessor."""
    return Block(min(2, triton.next_power_of_2(max(batch, 1))), 4, 1)


def _without_data(shape: tuple[int, int, int], dtype: torch.dtype) -> Callable[[], None]:
    """A launch on tensors without data."""
    u = torch.empty(shape, dtype=dtype, device="meta")
    points = points_of(shape[2])
    assert points is not None
    exact = dtype == torch.float32
    packed = u.new_empty((shape[1], 2, *FACTORS[points]), dtype=torch.float32 if exact else torch.float16)
    scales = u.new_empty(shape[1], dtype=torch.float32)
    return partial(launch, torch.empty_like(u), u, packed, scales, activation=True, exact=exact)


def shipped() -> list[Compilation]:
    """Layers of 512 channels on 1000 positions for one sample and for several, and odd and short signals."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    return launching.recorded(
        {
            "bf16": _without_data((16, 512, 1000), bf16),
            "fp16": _without_data((16, 512, 1000), fp16),
            "fp32": _without_data((16, 512, 1000), fp32),
            "one": _without_data((1, 512, 1000), bf16),
            "one fp32": _without_data((1, 512, 1000), fp32),
            "odd": _without_data((3, 20, 999), bf16),
            "short": _without_data((3, 20, 250), fp32),
            "middle": _without_data((5, 20, 500), fp16),
        }
    )
