"""One step of fitting a guidance network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tgdp_fast.benchmark.accuracy import PRECISIONS, Verdict, error_of
from tgdp_fast.benchmark.cases.base import (
    SEED,
    Call,
    Case,
    Prepared,
    PreparedComposite,
    Work,
    autocast,
    backend_of,
    hidden_weights,
    judge,
)
from tgdp_fast.benchmark.cases.networks import guidance_network
from tgdp_fast.diffusion.guidance import GuidanceNetwork
from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.fit.density_ratio import logistic_loss
from tgdp_fast.fit.training import adamw, add_noise


class FitStep(Case):
    """One optimisation step of a guidance network on 2-D data: loss, backward, AdamW.

    The logistic loss of a batch of either domain, alone or with the consistency term on the target's batch. The noised
    batches and the denoiser's prediction are given.
    """

    DEPTH, FREQUENCIES, INPUTS = 4, 32, 2

    def __init__(self, width: int, *, consistency: bool, batch: int = 4096, quick: bool = False) -> None:
        self.width, self.consistency, self.batch = width, consistency, batch
        self.name = f"fit_step/{'consistency' if consistency else 'logistic'}-width{width}"
        self.shape = f"2 x [{batch}, {self.INPUTS}], {self.DEPTH} x {width}"
        self.precisions = ("fp32", "bf16")
        self.quick = quick
        self.memory = 400.0 * batch * width
        self.operators = ("mlp_value_and_grad", "mlp_forward")
        self.composite = True
        self.recordable = False  # AdamW counts its steps on the host

    def work(self, precision: str) -> Work:
        perceptron = hidden_weights(self.INPUTS, self.width, self.DEPTH) + self.width
        features, square = self.FREQUENCIES * self.width, self.width**2  # of the time embedding
        per_pair = 6 * perceptron + (14 if self.consistency else 6) * perceptron + 2 * (4 * features + 6 * square)
        # AdamW reads weight, gradient and two moments and writes three of them; all in float32.
        return Work(4.0 * 7 * (perceptron + features + square), float(self.batch) * per_pair, precision)

    def prepare(self, precision: str, device: torch.device) -> Prepared:
        return _PreparedFitStep(self, precision, device)


@dataclass(frozen=True)
class _Batches:
    """Noised batches of both domains: x [B, D], t [B]; of the target also sigma [B, 1], the noise and epsilon_p."""

    x_source: Tensor
    t_source: Tensor
    x_target: Tensor
    t_target: Tensor
    sigma: Tensor
    epsilon: Tensor
    epsilon_p: Tensor

    def to(self, dtype: torch.dtype) -> _Batches:
        return _Batches(*(value.to(dtype) for value in vars(self).values()))


class _PreparedFitStep(PreparedComposite):
    def __init__(self, case: FitStep, precision: str, device: torch.device) -> None:
        schedule = NoiseSchedule.vp_linear()
        generator = torch.Generator().manual_seed(SEED)
        noised = []
        for _ in range(2):
            x0 = torch.randn(case.batch, case.INPUTS, generator=generator)
            t = schedule.t_min + (schedule.t_max - schedule.t_min) * torch.rand(case.batch, generator=generator)
            noised.append(add_noise(schedule, x0.to(device), t, generator))
        source, target = noised
        epsilon_p = target.epsilon + 0.1 * torch.randn(target.epsilon.shape, generator=generator).to(device)
        self.case, self.precision, self.device = case, precision, device
        self.batches = _Batches(
            source.x,
            source.t,
            target.x,
            target.t,
            torch.as_tensor(target.sigma).to(source.x),
            target.epsilon,
            epsilon_p,
        )
        self.network = guidance_network(case.width, device)

    def loss(self, network: GuidanceNetwork, batches: _Batches, autograd: bool) -> Tensor:
        """The loss of one step; ``autograd``: take the input gradient by autograd and differentiate it again."""
        if not self.case.consistency:
            x, t = torch.cat([batches.x_source, batches.x_target]), torch.cat([batches.t_source, batches.t_target])
            return logistic_loss(*network.log_ratio(x, t).float().split(len(batches.x_source)))
        f_source = network.log_ratio(batches.x_source, batches.t_source)
        if autograd:
            x = batches.x_target.detach().requires_grad_()
            f_target = network.log_ratio(x, batches.t_target)
            (gradient,) = torch.autograd.grad(f_target.sum(), x, create_graph=True)
        else:
            f_target, gradient = network(batches.x_target, batches.t_target)
        residual = batches.epsilon_p - batches.sigma * gradient - batches.epsilon
        return logistic_loss(f_source, f_target) + 0.5 * residual.square().sum(1).mean()

    def call(self, provider: str) -> Call:
        network = copy.deepcopy(self.network)
        parameters = list(network.parameters())
        optimizer = adamw([{"params": parameters}], 1e-4)
        loss: Callable[..., Tensor] = self.loss
        if provider == "compile":
            loss = torch.compile(self.loss, dynamic=False)

        def step() -> list[Tensor]:
            with backend_of(provider), autocast(self.precision, self.device):
                value = loss(network, self.batches, provider == "peer")
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            return [value.detach(), *(p.grad for p in parameters if p.grad is not None)]

        return step

    def judge(self, provider: str, outputs: Sequence[Tensor]) -> Verdict:
        network = copy.deepcopy(self.network).double()
        value = self.loss(network, self.batches.to(torch.float64), True)
        exact = [value.detach(), *torch.autograd.grad(value, list(network.parameters()))]
        plain = self.call("reference" if provider == "peer" else "peer")()
        return judge(provider, outputs, exact, error_of(plain, exact), PRECISIONS[self.precision])
