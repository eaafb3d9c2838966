"""Initial weights from a seed, and dropout of a training loop, beside other users of the global random state."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

import tgdp_fast as tgdp
from tgdp_fast.fit.training import minimize
from tgdp_fast.models import XResNet1d
from tgdp_fast.runtime.randomness import global_random_state, seeded_initialization


class Drawn(nn.Module):
    """Parameters from every function of torch that draws, with and without an initializer of torch.nn.init."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Linear(3, 5),
                nn.Conv1d(2, 3, 3),
                nn.Embedding(4, 3),
                nn.LSTM(3, 4),
                nn.TransformerEncoderLayer(4, 2, 8),
                nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
                nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
            ]
        )
        for name in ("trunc_normal_", "xavier_uniform_", "kaiming_normal_", "orthogonal_"):
            self.register_buffer(name, getattr(nn.init, name)(torch.empty(6, 7)))
        x = torch.empty(6, 7)
        drawn = [
            torch.rand(6, 7),
            torch.rand_like(x) + torch.randn_like(x) + torch.randint_like(x, 9) + torch.randint_like(x, low=2, high=9),
            torch.normal(0.0, 1.0, (6, 7)) + torch.normal(torch.zeros(6, 7), 1.0),
            torch.randint(0, 9, (6, 7)) + torch.bernoulli(torch.full((6, 7), 0.5)),
            torch.zeros(6, 7).uniform_() + torch.zeros(6, 7).exponential_() + torch.zeros(6, 7).log_normal_(),
            torch.randperm(42).reshape(6, 7) + torch.ones(42).multinomial(42).reshape(6, 7),
            torch.poisson(torch.ones(6, 7)) + torch.rand(6, 7).bernoulli(),
        ]
        for index, tensor in enumerate(drawn):
            self.register_buffer(f"drawn{index}", tensor)


def as_with_the_global_state(seed: int) -> Drawn:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Drawn()


def test_the_weights_are_those_of_the_global_generator_without_its_use() -> None:
    expected = as_with_the_global_state(5).state_dict()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    with seeded_initialization(5):
        found = Drawn().state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []


def test_threads_that_build_at_once_get_the_weights_of_their_seeds() -> None:
    expected = {seed: as_with_the_global_state(seed).state_dict() for seed in range(4)}
    wrong: list[int] = []

    def build(seed: int) -> None:
        for _ in range(5):
            torch.manual_seed(seed)
            with seeded_initialization(seed):
                found = Drawn().state_dict()
            if not all(torch.equal(tensor, found[name]) for name, tensor in expected[seed].items()):
                wrong.append(seed)

    threads = [threading.Thread(target=build, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_networks_of_the_package_are_float32_in_any_default() -> None:
    schedule = tgdp.NoiseSchedule.vp_linear()
    builders = [
        lambda: tgdp.ScoreMLP((2,), width=4, depth=1, num_classes=2),
        lambda: tgdp.GuidanceNetwork((3, 60), schedule, width=4, depth=1, num_classes=2, stem="ecg"),
        lambda: tgdp.SSSDECG(2, 2, 4, 4, 1, (4, 4, 4), 3, 4, 16, 4),
        lambda: XResNet1d(2, 3, (1, 1), 1, 4, hidden=4),
    ]
    before = torch.get_default_dtype()
    for build in builders:
        with seeded_initialization(0):
            expected = build().state_dict()
        try:
            torch.set_default_dtype(torch.float64)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                found = build().state_dict()
        finally:
            torch.set_default_dtype(before)
        assert {tensor.dtype for tensor in found.values()} <= {torch.float32, torch.int64}
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_the_global_state_is_lent_and_given_back() -> None:
    state = torch.Generator("cpu").manual_seed(3).get_state()
    torch.manual_seed(3)
    expected = [torch.rand(2), torch.rand(2)]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    found: list[Tensor] = []
    for _ in range(2):
        with global_random_state(state), global_random_state(state.clone()):
            pass
        with global_random_state(state):
            found.append(torch.rand(2))
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_that_train_with_dropout_at_once_get_the_weights_that_each_gets_alone() -> None:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))

    def train(seed: int) -> Tensor:
        with seeded_initialization(seed):
            network = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        minimize(network, lambda _: network(x).square().mean(), tgdp.TrainingConfig(steps=10), seed=seed)
        return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])

    expected = {seed: train(seed) for seed in range(4)}
    found: dict[int, Tensor] = {}
    threads = [threading.Thread(target=lambda seed=seed: found.update({seed: train(seed)})) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(expected[seed], found[seed]) for seed in expected)
