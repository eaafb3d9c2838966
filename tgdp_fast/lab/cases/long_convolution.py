"""The convolution and activation of an S4 layer of SSSD-ECG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from tgdp_fast.lab.accuracy import error_of
from tgdp_fast.lab.cases.case import SEED, Call, Case, Check, Draw, Setup, bytes_of, largest_error, place
from tgdp_fast.ops import LongConvolution, long_convolution, prepare_long_convolution
from tgdp_fast.ops.long_convolution import long_convolution_reference
from tgdp_fast.ops.registry import BACKENDS
from tgdp_fast.runtime.precision import PRECISIONS

#: Channels and positions of a timed sample; layers with filters of their own, one after another as in a network: more
#: than caches hold.
CHANNELS, LENGTH, LAYERS = 512, 1000, 12

#: For validate: shape of u, whether with GELU, layout.
SHAPES = (
    ((0, 3, 5), True, "contiguous"),
    ((2, 0, 5), True, "contiguous"),
    ((3, 2, 1), True, "contiguous"),
    ((1, 17, 2), False, "contiguous"),
    ((2, 5, 63), True, "strided"),
    ((5, 16, 64), False, "contiguous"),
    ((2, 33, 129), True, "misaligned"),
    ((1, 20, 250), True, "contiguous"),
    ((2, 18, 500), False, "strided"),
    ((9, 32, 1000), True, "contiguous"),
    ((1, 3, 1025), True, "contiguous"),
)


def spectrum_of(taps: Tensor) -> Tensor:
    """The real transform of taps [H, 2 L - 1], of 2 L points: [H, L + 1] complex."""
    # Some libraries cannot transform nothing.
    points = taps.shape[1] + 1
    return torch.fft.rfft(taps, n=points) if len(taps) else taps.new_zeros(0, points // 2 + 1, dtype=torch.cdouble)


def eager_long_convolution(u: Tensor, spectrum: Tensor, *, gelu: bool = True) -> Tensor:
    """:func:`tgdp_fast.ops.long_convolution` with the spectrum of the taps given; u [B, H, L].

    Transforms run in the precision of the spectrum, for they have no 16 bits; the activation in the dtype of u.
    """
    length = u.shape[-1]
    y = torch.fft.irfft(torch.fft.rfft(u.to(spectrum.real.dtype), n=2 * length) * spectrum, n=2 * length)
    y = y[..., length - 1 : 2 * length - 1].to(u.dtype)
    return functional.gelu(y) if gelu else y


def check(draw: Draw, shape: tuple[int, int, int], gelu: bool, layout: str) -> Check:
    """The operator on an entry of :data:`SHAPES`."""
    _, channels, length = shape
    u = draw(*shape)
    # Sums of L terms of about the size of u.
    taps = length**-0.5 * torch.randn(channels, 2 * length - 1, generator=draw.generator, dtype=torch.float64)
    taps, placed = taps.to(draw.device), place(u, layout)
    spectrum = spectrum_of(taps)

    def outputs(backend: str) -> Sequence[Tensor]:
        prepared = prepare_long_convolution(taps, draw.dtype, backend=backend)
        return [long_convolution(placed, prepared, gelu=gelu, backend=backend)]

    exact, plain = (
        eager_long_convolution(values, transform, gelu=gelu) if values.numel() else values
        for values, transform in ((u.double(), spectrum), (u, spectrum.to(torch.cfloat)))
    )
    return Check(f"{list(shape)}, {'' if gelu else 'no '}GELU, {layout}", outputs, [exact], [plain])


def case(batch: int, *, quick: bool = False) -> Case:
    """Layers one after another on samples [batch, CHANNELS, LENGTH]."""
    points = 1 << math.ceil(math.log2(LENGTH))
    moved = LAYERS * 2.0 * CHANNELS * (batch * LENGTH + points)
    flops = LAYERS * batch * CHANNELS * (8.0 * points * math.log2(points) + 25.0 * LENGTH)
    return Case(
        f"long_convolution/{batch}",
        f"[{batch}, {CHANNELS}, {LENGTH}]",
        ("fp32", "bf16", "fp16"),
        40.0 * CHANNELS * LENGTH * (batch + LAYERS),
        lambda precision: (bytes_of(precision) * moved, flops, "fp32"),
        partial(_setup, batch),
        ("long_convolution",),
        quick=quick,
    )


def _setup(batch: int, precision: str, device: torch.device) -> Setup:
    dtype, draw = PRECISIONS[precision], Draw(torch.float32, device, SEED)
    u = draw(batch, CHANNELS, LENGTH).to(dtype)
    taps = [draw(CHANNELS, 2 * LENGTH - 1, scale=LENGTH**-0.5) for _ in range(LAYERS)]

    def call(provider: str) -> Call:
        # Spectra are laid out for one backend each.
        backend = provider if provider in BACKENDS else "auto"
        layers: Sequence[LongConvolution | Tensor] = [
            spectrum_of(kernel) if provider == "peer" else prepare_long_convolution(kernel, dtype, backend=backend)
            for kernel in taps
        ]
        convolution: Callable[..., Tensor] = partial(long_convolution, backend=provider)
        if provider == "peer":
            convolution = eager_long_convolution
        elif provider == "compile":
            convolution = torch.compile(long_convolution_reference, dynamic=False)

        def run() -> Sequence[Tensor]:
            first, *others = layers
            output = convolution(u, first)
            for layer in others:
                convolution(u, layer)
            return [output]

        return run

    def check(provider: str, call: Call) -> float:
        outputs = call()
        exact = eager_long_convolution(u.double(), spectrum_of(taps[0].double()))
        plain = eager_long_convolution(u, spectrum_of(taps[0]))
        return largest_error(provider, outputs, [exact], error_of([plain], [exact]), dtype)

    return Setup(call, check)
