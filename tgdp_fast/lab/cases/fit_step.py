"""One step of fitting a guidance network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tgdp_fast.diffusion.guidance import GuidanceNetwork
from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.fit.batches import add_noise
from tgdp_fast.fit.losses import logistic_loss
from tgdp_fast.fit.training import adamw
from tgdp_fast.lab.accuracy import error_of
from tgdp_fast.lab.cases.case import (
    PROVIDERS,
    SEED,
    Call,
    Case,
    Setup,
    backend_of,
    largest_error,
    served_outputs,
)
from tgdp_fast.lab.cases.mlp import hidden_weights
from tgdp_fast.lab.cases.networks import guidance_network
from tgdp_fast.runtime.precision import PRECISIONS, autocast

DEPTH, FREQUENCIES, INPUTS = 4, 32, 2


def case(width: int, *, consistency: bool, batch: int = 4096, quick: bool = False) -> Case:
    """One optimization step of a guidance network on 2-D data: loss, backward, AdamW.

    The logistic loss of a batch of either domain, alone or with the consistency term on the target's batch. The noised
    batches and the denoiser's prediction are given.
    """
    weights = hidden_weights(INPUTS, width, DEPTH) + width
    features, square = FREQUENCIES * width, width**2  # of the time embedding
    per_pair = (20 if consistency else 12) * weights + 2 * (4 * features + 6 * square)
    # AdamW reads weight, gradient and two moments and writes three of them; all in float32.
    traffic = 4.0 * 7 * (weights + features + square)
    return Case(
        f"fit_step/{'consistency' if consistency else 'logistic'}-width{width}",
        f"2 x [{batch}, {INPUTS}], {DEPTH} x {width}",
        ("fp32", "bf16"),
        400.0 * batch * width,
        lambda precision: (traffic, float(batch) * per_pair, precision),
        partial(_setup, width, consistency, batch),
        ("mlp_value_and_grad", "mlp_forward"),
        uncapturable=PROVIDERS,  # AdamW counts its steps on the host
        quick=quick,
    )


def training_step(network: nn.Module, loss: Callable[[], Tensor], rate: float) -> Call:
    """Loss, backward, AdamW; returns the loss and the gradients."""
    optimizer = adamw([{"params": list(network.parameters())}], rate)

    def step() -> list[Tensor]:
        value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        return [value.detach(), *(p.grad for p in network.parameters() if p.grad is not None)]

    return step


class _Batches(NamedTuple):
    """Noised batches of both domains: x [B, D], t [B]; of the target also sigma [B, 1], the noise and epsilon_p."""

    x_source: Tensor
    t_source: Tensor
    x_target: Tensor
    t_target: Tensor
    sigma: Tensor
    epsilon: Tensor
    epsilon_p: Tensor


def _batches(batch: int, device: torch.device) -> _Batches:
    schedule, generator, noised = NoiseSchedule.vp_linear(), torch.Generator().manual_seed(SEED), []
    for _ in range(2):
        x0 = torch.randn(batch, INPUTS, generator=generator)
        t = schedule.t_min + (schedule.t_max - schedule.t_min) * torch.rand(batch, generator=generator)
        noised.append(add_noise(schedule, x0.to(device), t, generator))
    source, target = noised
    epsilon_p = target.epsilon + 0.1 * torch.randn(target.epsilon.shape, generator=generator).to(device)
    sigma = torch.as_tensor(target.sigma).to(source.x)
    return _Batches(source.x, source.t, target.x, target.t, sigma, target.epsilon, epsilon_p)


def _loss(network: GuidanceNetwork, batches: _Batches, consistency: bool, autograd: bool) -> Tensor:
    """The loss of one step; ``autograd``: take the input gradient by autograd and differentiate it again."""
    if not consistency:
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


def _setup(width: int, consistency: bool, batch: int, precision: str, device: torch.device) -> Setup:
    batches, untrained = _batches(batch, device), guidance_network(width, device)

    def call(provider: str) -> Call:
        network = copy.deepcopy(untrained)
        function: Callable[..., Tensor] = _loss
        if provider == "compile":
            function = torch.compile(_loss, dynamic=False)

        def loss() -> Tensor:
            with backend_of(provider), autocast(precision, device.type):
                return function(network, batches, consistency, provider == "peer")

        return training_step(network, loss, 1e-4)

    def check(provider: str, call_: Call) -> float:
        outputs, network = served_outputs(provider, call_), copy.deepcopy(untrained).double()
        value = _loss(network, _Batches(*(tensor.double() for tensor in batches)), consistency, True)
        exact = [value.detach(), *torch.autograd.grad(value, list(network.parameters()))]
        plain = call("reference" if provider == "peer" else "peer")()
        return largest_error(provider, outputs, exact, error_of(plain, exact), PRECISIONS[precision])

    return Setup(call, check)
