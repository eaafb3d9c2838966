"""A residual block of SSSD-ECG in sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from tgdp_fast.lab.accuracy import PRECISIONS, Verdict, error_of
from tgdp_fast.lab.cases.base import SEED, Call, Case, Prepared, UnservedError, Work, bytes_of, judge
from tgdp_fast.lab.problems import residual_block_inputs
from tgdp_fast.ops import residual_block_
from tgdp_fast.ops.residual_block import residual_block_reference_


class Block(Case):
    """Blocks one after another, as in a network: with more weights than caches hold.

    Args:
        batch: samples of 256 residual and 256 skip channels and 1000 positions.
    """

    CHANNELS = 256
    LENGTH = 1000
    BLOCKS = 3

    def __init__(self, batch: int, *, quick: bool = False) -> None:
        self.batch = batch
        self.name = f"residual_block/{batch}"
        self.shape = f"[{batch}, {2 * self.CHANNELS}, {self.LENGTH}]"
        self.precisions = ("fp32", "bf16")
        self.quick = quick
        self.memory = 40.0 * self.CHANNELS * self.LENGTH * (4 * batch + 8 * self.BLOCKS)
        self.operators = ("residual_block_",)

    def work(self, precision: str) -> Work:
        """Products alone, and weights, spectra and the state once."""
        weights = 16.0 * self.CHANNELS**2
        spectra = 2.0 * 2 * self.CHANNELS * 1024 * 2
        state = 4.0 * 2 * self.batch * 2 * self.CHANNELS * self.LENGTH
        traffic = self.BLOCKS * (bytes_of(precision) * (weights + spectra) + state)
        return Work(traffic, self.BLOCKS * 2.0 * self.batch * self.LENGTH * weights, precision)

    def prepare(self, precision: str, device: torch.device) -> Prepared:
        return _PreparedBlock(self, PRECISIONS[precision], device)


class _PreparedBlock(Prepared):
    def __init__(self, case: Block, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        shape = (case.batch, case.CHANNELS, case.CHANNELS, case.LENGTH)
        self.blocks = [residual_block_inputs(shape, dtype, device, seed=SEED + k) for k in range(case.BLOCKS)]
        self.state = self.blocks[0].state

    def call(self, provider: str) -> Call:
        if provider == "peer":
            raise UnservedError("sssd_ecg times other people's blocks")
        block: Callable[..., Tensor] = partial(residual_block_, backend=provider)
        if provider == "compile":
            block = torch.compile(residual_block_reference_, dynamic=False)
        state = torch.empty_like(self.state)

        def call() -> Sequence[Tensor]:
            state.copy_(self.state)
            for inputs in self.blocks:
                block(state, *inputs.others)
            return [state]

        return call

    def check(self, provider: str, call: Call) -> Verdict:
        exact, plain = self.state.double(), self.state.clone()
        for inputs in self.blocks:
            residual_block_reference_(exact, *inputs.double().others)
            residual_block_reference_(plain, *inputs.others)
        return judge(provider, call(), [exact], error_of([plain], [exact]), self.dtype)
