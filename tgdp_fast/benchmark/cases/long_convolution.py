"""The convolution and activation of an S4 layer of SSSD-ECG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor

from tgdp_fast.benchmark import eager
from tgdp_fast.benchmark.accuracy import PRECISIONS, Verdict, error_of
from tgdp_fast.benchmark.cases.base import SEED, Call, Case, Prepared, Work, bytes_of, judge
from tgdp_fast.ops import LongConvolution, long_convolution, prepare_long_convolution
from tgdp_fast.ops.long_convolution import long_convolution_reference
from tgdp_fast.ops.registry import BACKENDS


class Convolution(Case):
    """Layers with filters of their own one after another, as in a network: more than caches hold.

    Args:
        batch: samples of 512 channels and 1000 positions.
    """

    CHANNELS = 512
    LENGTH = 1000
    LAYERS = 12

    def __init__(self, batch: int, *, quick: bool = False) -> None:
        self.batch = batch
        self.name = f"long_convolution/{batch}"
        self.shape = f"[{batch}, {self.CHANNELS}, {self.LENGTH}]"
        self.precisions = ("fp32", "bf16", "fp16")
        self.quick = quick
        self.memory = 40.0 * self.CHANNELS * self.LENGTH * (batch + self.LAYERS)
        self.operators = ("long_convolution",)

    def work(self, precision: str) -> Work:
        size = bytes_of(precision)
        points = 1 << math.ceil(math.log2(self.LENGTH))
        traffic = self.LAYERS * 2.0 * self.CHANNELS * size * (self.batch * self.LENGTH + points)
        flops = self.LAYERS * self.batch * self.CHANNELS * (8.0 * points * math.log2(points) + 25.0 * self.LENGTH)
        return Work(traffic, flops, "fp32")

    def prepare(self, precision: str, device: torch.device) -> Prepared:
        return _PreparedConvolution(self, PRECISIONS[precision], device)


class _PreparedConvolution(Prepared):
    def __init__(self, case: Convolution, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(SEED)
        self.dtype = dtype
        self.u = torch.randn(case.batch, case.CHANNELS, case.LENGTH, generator=generator).to(device, dtype)
        scale = case.LENGTH**-0.5
        self.taps = [
            (scale * torch.randn(case.CHANNELS, 2 * case.LENGTH - 1, generator=generator)).to(device)
            for _ in range(case.LAYERS)
        ]

    @cached_property
    def spectra(self) -> list[Tensor]:
        return [torch.fft.rfft(taps, n=taps.shape[1] + 1) for taps in self.taps]

    def call(self, provider: str) -> Call:
        # Spectra are laid out for one backend each.
        backend = provider if provider in BACKENDS else "auto"
        layers: Sequence[LongConvolution | Tensor] = [
            prepare_long_convolution(taps, self.dtype, backend=backend) for taps in self.taps
        ]
        convolution: Callable[..., Tensor] = partial(long_convolution, backend=provider)
        if provider == "peer":
            layers, convolution = self.spectra, eager.long_convolution
        elif provider == "compile":
            convolution = torch.compile(long_convolution_reference, dynamic=False)

        def call() -> Sequence[Tensor]:
            first, *others = layers
            output = convolution(self.u, first)
            for layer in others:
                convolution(self.u, layer)
            return [output]

        return call

    def check(self, provider: str, call: Call) -> Verdict:
        outputs = call()
        exact, plain = (
            eager.long_convolution(u, torch.fft.rfft(taps, n=taps.shape[1] + 1))
            for u, taps in ((self.u.double(), self.taps[0].double()), (self.u, self.taps[0]))
        )
        return judge(provider, outputs, [exact], error_of([plain], [exact]), self.dtype)
