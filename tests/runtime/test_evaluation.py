"""Networks in eval mode for one caller."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tgdp_fast as tgdp
from tgdp_fast.runtime.evaluation import evaluation_mode

SCHEDULE = tgdp.NoiseSchedule.vp_linear()


class Network(nn.Module):
    """Dropout and batch normalization; counts its calls in an attribute, as hooks of users do."""

    def __init__(self, core: nn.Module | None = None) -> None:
        super().__init__()
        self.core = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5)) if core is None else core
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        result: Tensor = self.core(x)
        return result


def in_threads(*works: Callable[[], Any]) -> None:
    """Run all at once; the first error is raised here."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], Any]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_only_the_caller_sees_eval_mode() -> None:
    network = Network()
    network.core[0].eval()
    modes = [module.training for module in network.modules()]
    x = torch.ones(4, 2)
    with evaluation_mode(network, None, "not a module") as (view, nothing, text):
        assert (nothing, text) == (None, "not a module")
        assert isinstance(view, Network)
        assert not any(module.training for module in view.modules())
        assert [module.training for module in network.modules()] == modes
        assert torch.equal(view(x, x), view(x, x))
        view.core.train()  # A network that draws dropout on purpose keeps it.
        assert not torch.equal(view(x, x), view(x, x))
        assert [module.training for module in network.modules()] == modes
    expected = copy.deepcopy(network).eval()(x, x)
    assert network.calls == 4  # A view has no attributes of its own.
    with evaluation_mode(network) as (view,):
        assert torch.equal(view(x, x), expected)
        assert next(view.parameters()) is next(network.parameters())
        assert view == network
        assert {view: 1}[network] == 1
        assert type(copy.deepcopy(view)) is Network


class InList(Network):
    def __init__(self) -> None:
        super().__init__()
        self.steps = [self.core]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        result: Tensor = self.steps[0](x)
        return result


def patched() -> nn.Module:
    network = Network()
    network.forward = functools.partial(Network.forward, network)  # type: ignore[method-assign]
    return network


def closed_over() -> nn.Module:
    network = Network()
    core = network.core
    network.forward = lambda x, t: core(x)  # type: ignore[method-assign]
    return network


WITHOUT_VIEW = {
    "list": InList,
    "patched": patched,
    "closure": closed_over,
    "compiled": lambda: torch.compile(Network(), backend="eager"),
}


@pytest.mark.parametrize("name", WITHOUT_VIEW)
def test_a_network_without_a_view_is_put_in_eval_mode_until_its_last_user_leaves(name: str) -> None:
    network = WITHOUT_VIEW[name]()
    modes = [module.training for module in network.modules()]
    assert all(modes)
    x = torch.ones(3, 2)
    with evaluation_mode(network) as (one,):

        def fail() -> None:
            with evaluation_mode(network) as (two,):
                assert one is network is two
                assert torch.equal(network(x, x), network(x, x))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert not any(module.training for module in network.modules())
    assert [module.training for module in network.modules()] == modes


def small_fit(seed: int, denoiser: tgdp.Denoiser) -> tgdp.GuidanceNetwork:
    generator = torch.Generator().manual_seed(seed)
    source, target = torch.randn(40, 2, generator=generator), 0.5 * torch.randn(20, 2, generator=generator)
    config = tgdp.GuidanceConfig(
        network=tgdp.NetworkConfig(width=8, depth=1),
        training=tgdp.TrainingConfig(steps=3, batch_size=16),
        diagnostics=False,
    )
    return tgdp.fit_guidance(source, target, config=config, denoiser=denoiser, seed=seed).guidance


def flattened(module: nn.Module) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in module.state_dict().values()])


def test_a_slice_of_a_view_is_in_eval_mode() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9), nn.Linear(2, 2), nn.Dropout(0.9))
    parts = nn.ModuleList(network)
    x = torch.ones(3, 2)
    with evaluation_mode(network, parts) as (view, listed):
        assert torch.equal(view[1:3](x), network[2](x))  # As the middle block of a U-Net of diffusers does.
        assert torch.equal(type(view)(*view[1:3])(x), network[2](x))
        assert [layer.training for layer in listed[1:]] == [False] * 3
    assert all(module.training for module in network.modules())


def test_threads_that_sample_and_train_at_once_give_what_each_gives_alone() -> None:
    """16 threads and 1,000 draws of a network in training mode, beside fits and training loops that share it."""
    torch.manual_seed(0)
    shared = Network().core
    denoiser = tgdp.Denoiser(Network(shared), SCHEDULE)
    other = nn.Sequential(shared, nn.Linear(2, 1))

    def draw(seed: int) -> Tensor:
        return tgdp.sample(denoiser, num=8, steps=2, seed=seed, shape=(2,))

    expected = [draw(seed) for seed in range(10)]
    networks = [small_fit(seed, denoiser) for seed in range(6)]
    trained = tgdp.train_denoiser(torch.randn(20, 2), initial=denoiser, settings=tgdp.TrainingConfig(steps=3))
    wrong: list[str] = []

    def sampling() -> None:
        wrong.extend("sample" for k in range(100) if not torch.equal(draw(k % 10), expected[k % 10]))

    def fitting() -> None:
        for seed, network in enumerate(networks):
            if not torch.equal(flattened(small_fit(seed, denoiser)), flattened(network)):
                wrong.append("fit")

    def training() -> None:  # A loop of the user, with a validation pass in each epoch.
        for _ in range(100):
            other.train()
            assert shared[2].training
            other(torch.ones(4, 2)).sum().backward()
            other.eval()

    stop = threading.Event()

    def failing() -> None:
        broken = tgdp.Denoiser(Network(nn.Sequential(shared, nn.Linear(3, 2))), SCHEDULE)
        while not stop.is_set():
            with pytest.raises(RuntimeError, match="denoiser.network was called"):
                tgdp.sample(broken, num=2, steps=1, shape=(2,))
            torch.manual_seed(1)
            torch.rand(3)

    # Batch statistics follow from the training loop's batches: none of its batches may change them here.
    shared[1].momentum = 0.0
    helper = threading.Thread(target=failing)
    helper.start()
    try:
        in_threads(*[sampling] * 10, *[fitting] * 3, training)
    finally:
        stop.set()
        helper.join()
    assert not wrong
    assert trained.network.core[2].p == 0.5
