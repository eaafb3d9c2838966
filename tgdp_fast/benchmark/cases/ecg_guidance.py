"""One step of fitting the guidance network of the ECG experiment."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from tgdp_fast.benchmark.accuracy import Verdict
from tgdp_fast.benchmark.cases.base import SEED, Call, Case, Prepared, Work, backend_of, hidden_weights
from tgdp_fast.benchmark.sssd_ecg import published, random_network
from tgdp_fast.diffusion.denoiser import Denoiser
from tgdp_fast.diffusion.guidance import GuidanceNetwork
from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.fit.density_ratio import ratio_loss
from tgdp_fast.fit.training import NoisedBatch, adamw, add_noise
from tgdp_fast.models import XResNet1d

#: Largest relative error of the loss and L2 error of its gradient: float32 through a denoiser (1e-6), 3,904 features
#: and an MLP.
TOLERANCE = 1e-4


class ECGFitStep(Case):
    """One optimisation step of the paper's guidance network (TGDP section 4.2; 4 x 512, batch 128): regression on
    log r, with the consistency term or without it.

    Providers: ``published``, the structure of the released loop: the domain classifier (xresnet1d50) is evaluated on
    each batch, the denoiser computes its kernels anew, the input gradient is autograd's (differentiated again, which
    the released code leaves out). ``reference``: the ratio is looked up, the denoiser keeps its kernels, the gradient
    is the closed form, all in plain PyTorch. ``auto``: fused kernels, the denoiser compiled for sampling, as in
    :class:`tgdp_fast.ecg.pipeline.Pipeline`. The denoiser has fewer and narrower blocks than the paper's.
    """

    LEADS, LENGTH, CLASSES, WIDTH, DEPTH, FEATURES = 8, 1000, 71, 512, 4, 3904

    def __init__(self, *, consistency: bool, blocks: int = 4, channels: int = 64, batch: int = 128) -> None:
        self.consistency, self.blocks, self.channels, self.batch = consistency, blocks, channels, batch
        self.name = f"ecg_guidance/{'consistency' if consistency else 'regression'}-batch{batch}"
        self.shape = f"2 x [{batch}, {self.LEADS}, {self.LENGTH}], {self.DEPTH} x {self.WIDTH}, {blocks} x {channels}"
        self.precisions = ("fp32",)
        self.quick = False
        self.memory = 4.0 * batch * self.LENGTH * (40.0 * channels + 1000.0)
        self.operators = ("mlp_forward", "mlp_value_and_grad", "residual_block_")
        self.recordable = False  # AdamW counts its steps on the host
        self.rounds = 5

    def providers(self, device: torch.device | None = None) -> tuple[str, ...]:
        return ("published", "reference", "auto")

    def work(self, precision: str) -> Work:
        weights = hidden_weights(self.FEATURES, self.WIDTH, self.DEPTH)
        flops = 6.0 * self.batch * weights
        if self.consistency:
            flops += 14.0 * self.batch * weights + 2.0 * self.batch * self.LENGTH * self.blocks * 16 * self.channels**2
        return Work(4.0 * 7 * weights, flops, precision)

    def prepare(self, precision: str, device: torch.device) -> Prepared:
        return _PreparedECGFitStep(self, device)


@lru_cache(maxsize=1)
def _denoiser(blocks: int, channels: int, device: torch.device) -> Denoiser:
    schedule = NoiseSchedule.from_betas(torch.linspace(1e-4, 0.02, 200, dtype=torch.float64).numpy())
    return Denoiser(random_network(blocks, channels, SEED), schedule).to(device).eval()


class _PreparedECGFitStep(Prepared):
    def __init__(self, case: ECGFitStep, device: torch.device) -> None:
        self.case = case
        self.denoiser = _denoiser(case.blocks, case.channels, device)
        generator = torch.Generator().manual_seed(SEED)
        batches = []
        for _ in range(2):
            x0 = torch.randn(case.batch, case.LEADS, case.LENGTH, generator=generator).to(device)
            t = torch.randint(0, 200, (case.batch,), generator=generator).float()
            batches.append(add_noise(self.denoiser.schedule, x0, t, generator))
        self.source, self.target = batches
        rows = torch.rand(case.batch, case.CLASSES, generator=generator) < 0.05
        self.labels = rows.float().to(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            self.classifier = XResNet1d(case.LEADS, 1).to(device).eval()
            self.network = GuidanceNetwork(
                (case.LEADS, case.LENGTH),
                self.denoiser.schedule,
                width=case.WIDTH,
                depth=case.DEPTH,
                num_classes=case.CLASSES,
                stem="ecg",
            ).to(device)
        self.log_ratio = self.ratio_of_batch()

    def ratio_of_batch(self) -> Tensor:
        """log r of the source batch by the domain classifier [B]."""
        with torch.no_grad():
            result: Tensor = -self.classifier(self.source.x0)[:, 0]
        return result

    def loss(
        self,
        network: GuidanceNetwork,
        denoiser: Denoiser,
        log_ratio: Tensor,
        batches: Sequence[NoisedBatch],
        double: bool,
    ) -> Tensor:
        """The loss of one step; ``double``: the input gradient by autograd, to be differentiated again."""
        source, target = batches
        labels = self.labels.to(source.x.dtype)
        total = ratio_loss("log_mse", network.log_ratio(source.x, source.t, labels), log_ratio)
        if not self.case.consistency:
            return total
        if double:
            x = target.x.detach().requires_grad_()
            value = network.log_ratio(x, target.t, labels)
            (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        else:
            _, gradient = network(target.x, target.t, labels)
        with torch.no_grad():
            epsilon_p = denoiser.epsilon(target.x, target.t, labels)
        residual = epsilon_p - target.sigma * gradient - target.epsilon
        return total + 0.5 * residual.flatten(1).square().sum(1).mean()

    def call(self, provider: str) -> Call:
        network = copy.deepcopy(self.network)
        optimizer = adamw([{"params": list(network.parameters())}], 1e-6)
        as_published = provider == "published"
        denoiser = self.denoiser
        if as_published:
            network_p = published(self.denoiser.network)  # type: ignore[arg-type]
            denoiser = Denoiser(network_p, self.denoiser.schedule)
        elif provider == "auto" and self.case.consistency:
            denoiser = self.denoiser.compile_for_sampling()

        def step() -> list[Tensor]:
            log_ratio = self.ratio_of_batch() if as_published else self.log_ratio
            with backend_of("reference" if as_published else provider):
                value = self.loss(network, denoiser, log_ratio, (self.source, self.target), as_published)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            return [value.detach(), *(p.grad for p in network.parameters() if p.grad is not None)]

        return step

    def check(self, provider: str, call: Call) -> Verdict:
        found = call()
        value, *gradients = self.exact()
        error = float((found[0].double() - value).abs() / value.abs())
        whole = torch.cat([part.flatten() for part in gradients])
        difference = torch.cat([part.double().flatten() for part in found[1:]]) - whole
        error = max(error, float(difference.norm() / whole.norm()))
        return Verdict(error <= TOLERANCE, error)

    def exact(self) -> list[Tensor]:
        """Loss and gradients in float64, of the prediction of the reference denoiser in float32."""
        network = copy.deepcopy(self.network).double()
        double = [
            NoisedBatch(
                part.x0.double(),
                part.x.double(),
                part.epsilon.double(),
                part.t,
                torch.as_tensor(part.alpha).double(),
                torch.as_tensor(part.sigma).double(),
            )
            for part in (self.source, self.target)
        ]
        exact_denoiser = _InFloat32(self.denoiser)
        value = self.loss(network, exact_denoiser, self.log_ratio.double(), double, True)  # type: ignore[arg-type]
        return [value.detach(), *torch.autograd.grad(value, list(network.parameters()))]


class _InFloat32:
    """A float32 denoiser for float64 signals."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser

    def epsilon(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.denoiser.epsilon(x.float(), t, labels.float()).double()
