"""One evaluation of the SSSD-ECG denoiser."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from tgdp_fast.lab.accuracy import Verdict
from tgdp_fast.lab.cases.base import GRAPH, SEED, Call, Case, Prepared, UnservedError, Work, autocast, bytes_of
from tgdp_fast.lab.cases.sssd_ecg_peers import StrongSSSDECG, published, random_network
from tgdp_fast.models import SSSDECG

#: Largest relative L2 error of the prediction. In bf16 factors are rounded to 2^-9 at four products in a block; errors
#: of a block are carried on by the residual stream, so they grow with the number of blocks.
FP32, BF16, BF16_MANY_BLOCKS = 1e-5, 1e-2, 3e-2
_FEW_BLOCKS = 4
_STEP = 100.0


class SSSDECGCall(Case):
    """The noise predicted for [B, 8, 1000] with soft labels, all samples at one diffusion step.

    Providers: ``published``, ``strong``, ``reference`` (the network in eval mode, kernels kept) and ``sampling``
    (``compile_for_sampling``). The first is float32 only. In bf16 the others but the last run under autocast.
    """

    LEADS, LENGTH, CLASSES = 8, 1000, 71

    def __init__(self, blocks: int, width: int, batch: int, *, quick: bool = False) -> None:
        self.blocks, self.width, self.batch = blocks, width, batch
        self.name = f"sssd_ecg/blocks{blocks}-width{width}-batch{batch}"
        self.shape = f"[{batch}, {self.LEADS}, {self.LENGTH}], {blocks} x {width}"
        self.precisions = ("fp32", "bf16")
        self.quick = quick
        # Weights and spectra of a few copies; a network's own temporary tensors, and those of the published kernels.
        self.memory = 4.0 * (blocks * (100.0 * width**2 + 40000.0 * width) + 80.0 * width * self.LENGTH * batch)
        self.memory += 2.0e6 * width
        self.operators = ("residual_block_",)
        self.rounds = 2 if blocks * width > 1000 else None  # A published call of this size takes half a minute.
        self.needs_accelerator = blocks * width * batch > 100_000

    def providers(self, device: torch.device | None = None) -> tuple[str, ...]:
        names = ("published", "strong", "reference", "sampling")
        if device is None or device.type != "cuda":
            return names
        return tuple(name + ending for name in names for ending in ("", GRAPH))

    def work(self, precision: str) -> Work:
        """The blocks' products: three taps, two mixtures of 2 C features, residual and skip. Weights are read once."""
        weights = self.blocks * self.width**2 * (6 + 4 + 4 + 2)
        signals = 4.0 * 2 * self.batch * self.LEADS * self.LENGTH
        return Work(bytes_of(precision) * weights + signals, 2.0 * self.batch * self.LENGTH * weights, precision)

    def prepare(self, precision: str, device: torch.device) -> Prepared:
        return _PreparedCall(self, precision, device)


@lru_cache(maxsize=1)
def _network(blocks: int, width: int, device: torch.device) -> SSSDECG:
    return random_network(blocks, width, SEED).to(device)


@lru_cache(maxsize=1)
def _inputs(batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x, diffusion steps and labels."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(batch, SSSDECGCall.LEADS, SSSDECGCall.LENGTH, generator=generator)
    labels = torch.rand(batch, SSSDECGCall.CLASSES, generator=generator)
    return x.to(device), torch.full((batch,), _STEP, device=device), labels.to(device)


@lru_cache(maxsize=1)
def _exact(blocks: int, width: int, batch: int, device: torch.device) -> Tensor:
    """The prediction in float64; both precisions are judged by it."""
    x, steps, labels = _inputs(batch, device)
    with torch.inference_mode():
        result: Tensor = copy.deepcopy(_network(blocks, width, device)).double()(x.double(), steps, labels.double())
    return result


class _PreparedCall(Prepared):
    def __init__(self, case: SSSDECGCall, precision: str, device: torch.device) -> None:
        self.case, self.precision, self.device = case, precision, device
        self.network = _network(case.blocks, case.width, device)
        self.inputs = _inputs(case.batch, device)

    def call(self, provider: str) -> Call:
        x, steps, labels = self.inputs
        if provider == "published" and self.precision != "fp32":
            raise UnservedError("released code computes in float32")
        if provider == "sampling":
            steps = torch.full((1,), _STEP)  # on the host, as a Denoiser passes it on
        network = self._network(provider)

        def call() -> Sequence[Tensor]:
            with torch.inference_mode(), autocast(self.precision, self.device):
                return [network(x, steps, labels)]

        return call

    def _network(self, provider: str) -> nn.Module:
        if provider == "published":
            return published(self.network)
        if provider == "strong":
            return StrongSSSDECG(self.network, compiled=True)
        if provider == "sampling":
            return self.network.compile_for_sampling([_STEP], precision=self.precision)
        return self.network

    def check(self, provider: str, call: Call) -> Verdict:
        (found,) = call()
        exact = _exact(self.case.blocks, self.case.width, self.case.batch, self.device)
        error = float((found.double() - exact).norm() / exact.norm())
        if self.precision == "fp32":
            return Verdict(error <= FP32, error)
        return Verdict(error <= (BF16 if self.case.blocks <= _FEW_BLOCKS else BF16_MANY_BLOCKS), error)
