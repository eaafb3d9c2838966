"""One step of fitting the guidance network of the ECG experiment."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tgdp_fast.diffusion.denoiser import Denoiser
from tgdp_fast.diffusion.guidance import GuidanceNetwork
from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.fit.batches import NoisedBatch, add_noise
from tgdp_fast.fit.losses import LogMSE
from tgdp_fast.lab.cases.case import PROVIDERS, SEED, Call, Case, Setup, backend_of, limited
from tgdp_fast.lab.cases.fit_step import training_step
from tgdp_fast.lab.cases.mlp import hidden_weights
from tgdp_fast.lab.cases.sssd_ecg_peers import published, random_network
from tgdp_fast.models import XResNet1d

LEADS, LENGTH, CLASSES, WIDTH, DEPTH, FEATURES = 8, 1000, 71, 512, 4, 3904

#: Largest relative error of the loss and L2 error of its gradient: float32 through a denoiser (1e-6), 3,904 features
#: and an MLP.
TOLERANCE = 1e-4


def case(*, consistency: bool, blocks: int = 4, channels: int = 64, batch: int = 128) -> Case:
    """One optimization step of the paper's guidance network (TGDP section 4.2; 4 x 512, batch 128): regression on
    log r, with or without the consistency term.

    Providers: ``published``, the structure of the released loop: the domain classifier (xresnet1d50) is evaluated on
    each batch, the denoiser computes its kernels anew, the input gradient is autograd's (differentiated again, which
    the released code leaves out). ``reference``: the ratio is looked up, the denoiser keeps its kernels, the gradient
    is the closed form, all in plain PyTorch. ``auto``: fused kernels, the denoiser compiled for sampling, as in
    :class:`tgdp_fast.ecg.pipeline.Pipeline`. The denoiser has fewer and narrower blocks than the paper's.
    """
    weights = hidden_weights(FEATURES, WIDTH, DEPTH)
    flops = 6.0 * batch * weights
    if consistency:
        flops += 14.0 * batch * weights + 2.0 * batch * LENGTH * blocks * 16 * channels**2
    return Case(
        f"ecg_guidance/{'consistency' if consistency else 'regression'}-batch{batch}",
        f"2 x [{batch}, {LEADS}, {LENGTH}], {DEPTH} x {WIDTH}, {blocks} x {channels}",
        ("fp32",),
        4.0 * batch * LENGTH * (40.0 * channels + 1000.0),
        lambda precision: (4.0 * 7 * weights, flops, precision),
        lambda precision, device: setup(problem_of(blocks, channels, batch, device), consistency),
        only=("published", "reference", "auto"),
        uncapturable=PROVIDERS,  # AdamW counts its steps on the host
        rounds=5,
    )


class Problem(NamedTuple):
    """Models, noised batches of source and target [B, 8, 1000] with their labels [B, 71], log r of the source's [B]."""

    denoiser: Denoiser
    classifier: XResNet1d
    network: GuidanceNetwork
    batches: tuple[NoisedBatch, NoisedBatch]
    labels: Tensor
    log_ratio: Tensor


@lru_cache(maxsize=1)
def _denoiser(blocks: int, channels: int, device: torch.device) -> Denoiser:
    schedule = NoiseSchedule.from_betas(torch.linspace(1e-4, 0.02, 200, dtype=torch.float64).numpy())
    return Denoiser(random_network(blocks, channels, SEED), schedule).to(device).eval()


def problem_of(blocks: int, channels: int, batch: int, device: torch.device) -> Problem:
    """The step's models and batches."""
    denoiser, generator = _denoiser(blocks, channels, device), torch.Generator().manual_seed(SEED)
    batches = []
    for _ in range(2):
        x0 = torch.randn(batch, LEADS, LENGTH, generator=generator).to(device)
        t = torch.randint(0, 200, (batch,), generator=generator).float()
        batches.append(add_noise(denoiser.schedule, x0, t, generator))
    labels = (torch.rand(batch, CLASSES, generator=generator) < 0.05).float().to(device)
    shape: Any = {"width": WIDTH, "depth": DEPTH, "num_classes": CLASSES, "stem": "ecg"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        classifier = XResNet1d(LEADS, 1).to(device).eval()
        network = GuidanceNetwork((LEADS, LENGTH), denoiser.schedule, **shape).to(device)
    source, target = batches
    return Problem(denoiser, classifier, network, (source, target), labels, _ratio(classifier, source))


def _ratio(classifier: XResNet1d, source: NoisedBatch) -> Tensor:
    """log r of the source batch by the domain classifier [B]."""
    with torch.no_grad():
        result: Tensor = -classifier(source.x0)[:, 0]
    return result


def _loss(problem: Problem, consistency: bool, double: bool) -> Tensor:
    """The loss of one step; ``double``: the input gradient by autograd, to be differentiated again."""
    network, (source, target) = problem.network, problem.batches
    labels = problem.labels.to(source.x.dtype)
    total = LogMSE.per_sample(network.log_ratio(source.x, source.t, labels), problem.log_ratio).mean()
    if not consistency:
        return total
    if double:
        x = target.x.detach().requires_grad_()
        value = network.log_ratio(x, target.t, labels)
        (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    else:
        _, gradient = network(target.x, target.t, labels)
    with torch.no_grad():
        epsilon_p = problem.denoiser.epsilon(target.x, target.t, labels)
    residual = epsilon_p - target.sigma * gradient - target.epsilon
    return total + 0.5 * residual.flatten(1).square().sum(1).mean()


def setup(problem: Problem, consistency: bool) -> Setup:
    """The step of every provider, and its check against :func:`exact`."""

    def call(provider: str) -> Call:
        network, denoiser = copy.deepcopy(problem.network), problem.denoiser
        as_published = provider == "published"
        if as_published:
            denoiser = Denoiser(published(denoiser.network), denoiser.schedule)  # type: ignore[arg-type]
        elif provider == "auto" and consistency:
            denoiser = denoiser.compile_for_sampling()
        own = problem._replace(network=network, denoiser=denoiser)

        def loss() -> Tensor:
            given = own
            if as_published:
                given = own._replace(log_ratio=_ratio(own.classifier, own.batches[0]))
            with backend_of(provider):
                return _loss(given, consistency, as_published)

        return training_step(network, loss, 1e-6)

    def check(provider: str, call: Call) -> float:
        return limited(step_error(call(), exact(problem, consistency)), TOLERANCE)

    return Setup(call, check)


def step_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The larger of the loss's relative error and the relative L2 error of all gradients as one vector."""
    value, *gradients = exact
    error = float((found[0].double() - value).abs() / value.abs())
    whole = torch.cat([part.flatten() for part in gradients])
    difference = torch.cat([part.double().flatten() for part in found[1:]]) - whole
    return max(error, float(difference.norm() / whole.norm()))


def exact(problem: Problem, consistency: bool) -> list[Tensor]:
    """Loss and gradients in float64, of the prediction of the reference denoiser in float32."""
    network = copy.deepcopy(problem.network).double()

    def double(part: NoisedBatch) -> NoisedBatch:
        alpha, sigma = torch.as_tensor(part.alpha).double(), torch.as_tensor(part.sigma).double()
        return NoisedBatch(part.x0.double(), part.x.double(), part.epsilon.double(), part.t, alpha, sigma)

    in_double = problem._replace(
        network=network,
        denoiser=_InFloat32(problem.denoiser),  # type: ignore[arg-type]
        batches=(double(problem.batches[0]), double(problem.batches[1])),
        log_ratio=problem.log_ratio.double(),
    )
    value = _loss(in_double, consistency, True)
    return [value.detach(), *torch.autograd.grad(value, list(network.parameters()))]


class _InFloat32:
    """A float32 denoiser for float64 signals."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser

    def epsilon(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.denoiser.epsilon(x.float(), t, labels.float()).double()
