"""One evaluation of the SSSD-ECG denoiser."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from tgdp_fast.lab.cases.case import SEED, Call, Case, Setup, UnservedError, bytes_of, limited
from tgdp_fast.lab.cases.sssd_ecg_peers import StrongSSSDECG, published, random_network
from tgdp_fast.models import SSSDECG
from tgdp_fast.runtime.precision import autocast

LEADS, LENGTH, CLASSES = 8, 1000, 71

#: Largest relative L2 error of the prediction. In bf16 factors are rounded to 2^-9 at four matmuls in a block; errors
#: of a block are carried on by the residual stream, so they grow with the number of blocks.
FP32, BF16, BF16_MANY_BLOCKS = 1e-5, 1e-2, 3e-2
_FEW_BLOCKS = 4
_STEP = 100.0


def case(blocks: int, width: int, batch: int, *, quick: bool = False) -> Case:
    """The noise predicted for [B, 8, 1000] with soft labels, all samples at one diffusion step.

    Providers: ``published``, ``strong``, ``reference`` (the network in eval mode, kernels kept) and ``sampling``
    (``compile_for_sampling``). The first is float32 only. In bf16 the others but the last run under autocast. Work: the
    blocks' matmuls (three taps, two of 2 C features, residual and skip), with weights read once.
    """
    weights = blocks * width**2 * (6 + 4 + 4 + 2)
    signals = 4.0 * 2 * batch * LEADS * LENGTH
    # Weights and spectra of a few copies; a network's own temporary tensors, and those of the published kernels.
    memory = 4.0 * (blocks * (100.0 * width**2 + 40000.0 * width) + 80.0 * width * LENGTH * batch) + 2.0e6 * width
    return Case(
        f"sssd_ecg/blocks{blocks}-width{width}-batch{batch}",
        f"[{batch}, {LEADS}, {LENGTH}], {blocks} x {width}",
        ("fp32", "bf16"),
        memory,
        lambda precision: (bytes_of(precision) * weights + signals, 2.0 * batch * LENGTH * weights, precision),
        partial(_setup, blocks, width, batch),
        only=("published", "strong", "reference", "sampling"),
        quick=quick,
        rounds=2 if blocks * width > 1000 else None,  # A published call of this size takes half a minute.
        needs_accelerator=blocks * width * batch > 100_000,
    )


@lru_cache(maxsize=1)
def _network(blocks: int, width: int, device: torch.device) -> SSSDECG:
    return random_network(blocks, width, SEED).to(device)


@lru_cache(maxsize=1)
def _inputs(batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x, diffusion steps and labels."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(batch, LEADS, LENGTH, generator=generator)
    labels = torch.rand(batch, CLASSES, generator=generator)
    return x.to(device), torch.full((batch,), _STEP, device=device), labels.to(device)


@lru_cache(maxsize=1)
def _exact(blocks: int, width: int, batch: int, device: torch.device) -> Tensor:
    """The prediction in float64; both precisions are judged by it."""
    x, steps, labels = _inputs(batch, device)
    with torch.inference_mode():
        result: Tensor = copy.deepcopy(_network(blocks, width, device)).double()(x.double(), steps, labels.double())
    return result


def _provided(network: SSSDECG, provider: str, precision: str) -> nn.Module:
    if provider == "published":
        return published(network)
    if provider == "strong":
        return StrongSSSDECG(network, compiled=True)
    if provider == "sampling":
        return network.compile_for_sampling([_STEP], precision=precision)
    return network


def _setup(blocks: int, width: int, batch: int, precision: str, device: torch.device) -> Setup:
    def call(provider: str) -> Call:
        x, steps, labels = _inputs(batch, device)
        if provider == "published" and precision != "fp32":
            raise UnservedError("released code computes in float32")
        if provider == "sampling":
            steps = torch.full((1,), _STEP)  # on the host, as a Denoiser passes it on
        network = _provided(_network(blocks, width, device), provider, precision)

        def run() -> Sequence[Tensor]:
            with torch.inference_mode(), autocast(precision, device.type):
                return [network(x, steps, labels)]

        return run

    def check(provider: str, call: Call) -> float:
        (found,) = call()
        exact = _exact(blocks, width, batch, device)
        limit = FP32 if precision == "fp32" else BF16 if blocks <= _FEW_BLOCKS else BF16_MANY_BLOCKS
        return limited(float((found.double() - exact).norm() / exact.norm()), limit)

    return Setup(call, check)
