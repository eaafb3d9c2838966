"""Capturing the sampling loop: the logic with a capture in Python, and that nothing in the loop touches the host."""

from __future__ import annotations

import copy
import gc
import logging
import time
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_sampling import random_models
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tgdp_fast import SSSDECG, Denoiser, GuidanceNetwork, NoiseSchedule, Sampler, SamplingConfig, ScoreMLP, sample
from tgdp_fast.ops import measured, use_backend
from tgdp_fast.sampling import loop as looping
from tgdp_fast.sampling import sampler as sampling
from tgdp_fast.sampling.loop import GraphCache, state_of

SCHEDULE = NoiseSchedule.vp_linear()


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a graph does, in Python: static inputs and outputs, and a replay that runs the function again."""
    events: list[str] = []

    def capture(function, inputs):
        events.append("capture")
        assert measured._captured()
        outputs = tuple(torch.full_like(tensor, float("nan")) for tensor in function(*inputs))

        def replay() -> None:
            events.append("replay")
            for output, tensor in zip(outputs, function(*inputs), strict=True):
                output.copy_(tensor)

        return replay, outputs

    monkeypatch.setattr(looping, "capture", capture)
    return events


@pytest.fixture
def on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampler takes the CPU for a device whose work can be captured."""
    monkeypatch.setattr(sampling, "_can_capture", lambda device: True)


def add(x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
    return (2 * x if y is None else x + y,)


def test_the_second_call_is_captured_and_later_ones_are_replayed(captured):
    graphs = GraphCache("a sum")
    for i in range(4):
        x, y = torch.full((3,), float(i)), torch.arange(3.0)
        assert torch.equal(graphs.run(add, x, y)[0], x + y)
    assert captured == ["capture", "replay", "replay", "replay"]


@pytest.mark.parametrize(
    "other",
    [(torch.ones(2), torch.ones(2)), (torch.ones(3), None), (torch.ones(3).double(), torch.ones(3))],
    ids=["shape", "presence", "dtype"],
)
def test_inputs_of_another_shape_have_a_graph_of_their_own(captured, other):
    graphs = GraphCache("a sum")
    first = (torch.ones(3), torch.ones(3))
    for _ in range(2):
        graphs.run(add, *first)
    del captured[:]
    assert torch.equal(graphs.run(add, *other)[0], add(*other)[0])
    assert captured == []
    assert torch.equal(graphs.run(add, *other)[0], add(*other)[0])
    assert torch.equal(graphs.run(add, *first)[0], add(*first)[0])
    assert captured == ["capture", "replay", "replay"]


def test_graphs_are_bounded_in_number_and_the_one_unused_for_longest_goes(captured):
    graphs = GraphCache("a sum", capacity=2)

    def run(size: int) -> str:
        del captured[:]
        assert torch.equal(graphs.run(add, torch.ones(size), None)[0], torch.full((size,), 2.0))
        return " ".join(captured)

    assert [run(1), run(1), run(2), run(2)] == ["", "capture replay"] * 2
    assert run(1) == "replay"
    assert [run(3), run(3)] == ["", "capture replay"]  # in the place of size 2
    assert [run(1), run(2)] == ["replay", ""]


def test_other_settings_drop_all_graphs(captured):
    graphs = GraphCache("a sum")

    def run(settings: str) -> str:
        del captured[:]
        with graphs.checked(settings):
            graphs.run(add, torch.ones(3), None)
        return " ".join(captured)

    assert [run(settings) for settings in ("one", "one", "one")] == ["", "capture replay", "replay"]
    assert [run(settings) for settings in ("two", "one", "one")] == ["", "", "capture replay"]
    with pytest.raises(ValueError, match="x"), graphs.checked("one"):
        raise ValueError("x")
    assert run("one") == ""


def test_what_cannot_be_captured_runs_as_it_is_and_says_so_once(monkeypatch, caplog):
    def capture(function, inputs):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(looping, "capture", capture)
    graphs = GraphCache("the loop")
    with caplog.at_level(logging.WARNING, logger="tgdp_fast.sampling.loop"):
        for size in (2, 2, 2, 3, 3):
            assert torch.equal(graphs.run(lambda x: (x + 1,), torch.zeros(size))[0], torch.ones(size))
    (message,) = [record.message for record in caplog.records]
    assert message.startswith("the loop cannot be captured in a CUDA graph and runs directly: ")
    assert message.endswith("operation not permitted when stream is capturing")


def test_threads_that_share_graphs_wait_for_each_other(captured):
    """The outputs of a graph are one caller's until it leaves the block: the other one writes into them."""
    graphs, inside, most = GraphCache("a sum"), 0, 0

    def double(x: Tensor) -> tuple[Tensor, ...]:
        return (2 * x,)

    def draws(value: float) -> list[bool]:
        nonlocal inside, most
        right = []
        for _ in range(20):
            with graphs.checked():
                inside += 1
                most = max(most, inside)
                (result,) = graphs.run(double, torch.full((5,), value))
                time.sleep(1e-4)
                right.append(torch.equal(result, torch.full((5,), 2 * value)))
                inside -= 1
        return right

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(draws, [1.0, 2.0, 3.0]))
    assert most == 1
    assert all(all(right) for right in found)
    assert Counter(captured) == {"capture": 1, "replay": 59}


def test_a_copy_of_a_sampler_starts_without_graphs():
    sampler = Sampler(*random_models(), SamplingConfig(steps=3))
    drawn = sampler.draw(4, seed=1)
    other = copy.deepcopy(sampler)
    assert torch.equal(other.draw(4, seed=1), drawn)
    assert other._graphs is not sampler._graphs
    assert not other._graphs._graphs


def test_a_call_that_fails_warms_nothing_up(captured):
    graphs = GraphCache("the loop")

    def fail(x: Tensor) -> tuple[Tensor, ...]:
        raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        graphs.run(fail, torch.ones(2))
    graphs.run(lambda x: (x,), torch.ones(2))
    assert captured == []


# Sampler ----------------------------------------------------------------------------------------------------


def models(width: int = 8) -> tuple[Denoiser, GuidanceNetwork]:
    denoiser = Denoiser(ScoreMLP((3,), width, 2, 2), SCHEDULE, "v_prediction", time_input="half_log_snr")
    return denoiser.eval(), GuidanceNetwork((3,), SCHEDULE, width=width, depth=2, num_classes=2).eval()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.usefixtures("on_an_accelerator")
def test_batches_through_a_graph_are_those_without(captured, precision):
    denoiser, guidance = models()
    config = SamplingConfig("ddpm", 5, precision=precision, backend="reference")
    options: dict[str, Any] = {"labels": torch.arange(13) % 2, "batch_size": 4, "seed": 3}
    plain = Sampler(denoiser, guidance, config).draw(13, callback=lambda *_: None, **options)
    sampler = Sampler(denoiser, guidance, config)
    torch.testing.assert_close(sampler.draw(13, **options), plain, rtol=0, atol=0)
    # Four, four captured, four replayed, one as it is.
    assert captured == ["capture", "replay", "replay"]
    del captured[:]
    torch.testing.assert_close(sampler.draw(13, **options), plain, rtol=0, atol=0)
    assert captured == ["replay", "replay", "replay", "capture", "replay"]


@pytest.mark.usefixtures("on_an_accelerator")
def test_the_second_draw_replays_and_one_of_another_shape_does_not(captured):
    denoiser, guidance = random_models()
    config = SamplingConfig(steps=3, backend="reference")
    sampler = Sampler(denoiser, guidance, config)
    for seed, num, expected in [(0, 5, []), (1, 5, ["capture", "replay"]), (2, 5, ["replay"]), (3, 6, [])]:
        drawn = sampler.draw(num, seed=seed)
        assert captured == expected
        del captured[:]
        assert torch.equal(drawn, Sampler(denoiser, guidance, config).draw(num, seed=seed, callback=lambda *_: None))


def replays(sampler: Sampler, captured: list[str], **options: Any) -> bool:
    """Whether a draw replays, after checking its samples against those of a sampler without graphs."""
    del captured[:]
    drawn = sampler.draw(4, **options)
    result = captured == ["replay"]
    new = Sampler(sampler.denoiser, sampler.guidance, sampler.config, shape=sampler.shape)
    assert torch.equal(drawn, new.draw(4, callback=lambda *_: None, **options))
    return result


def warm(captured: list[str], *models: Any, solver: str = "dpmpp_2m", **options: Any) -> Sampler:
    sampler = Sampler(*models, config=SamplingConfig(solver, 3), shape=(3,))
    for _ in range(3):
        is_replayed = replays(sampler, captured, **options)
    assert is_replayed
    return sampler


def hooked_models() -> tuple[Denoiser, GuidanceNetwork]:
    """Models whose full trajectory is no operator."""
    denoiser, guidance = random_models()
    denoiser.network.register_forward_hook(lambda *_: None)
    vars(denoiser.network)["options"] = SimpleNamespace(factor=1.0, sizes=[1, 2])
    return denoiser, guidance


def change_in_place(denoiser: Denoiser, guidance: GuidanceNetwork) -> None:
    with torch.no_grad():
        for parameter in (*denoiser.parameters(), *guidance.parameters()):
            parameter.add_(0.1)


def change_through_data(denoiser: Denoiser, _: GuidanceNetwork) -> None:
    """Which torch does not count: a replay reads the new values."""
    for parameter in denoiser.parameters():
        parameter.data.add_(0.1)


def replace_parameter(denoiser: Denoiser, _: GuidanceNetwork) -> None:
    head: Any = denoiser.network.head
    head.weight = nn.Parameter(2 * head.weight.detach())


def move_parameter(denoiser: Denoiser, _: GuidanceNetwork) -> None:
    head: Any = denoiser.network.head
    head.weight.data = head.weight.data.clone()


def replace_network(denoiser: Denoiser, _: GuidanceNetwork) -> None:
    denoiser.network = hooked_models()[0].network


def change_number(_: Denoiser, guidance: GuidanceNetwork) -> None:
    guidance.alpha_power = 1.0


def change_option(denoiser: Denoiser, _: GuidanceNetwork) -> None:
    vars(denoiser.network)["options"].factor = 2.0


def change_nested_list(denoiser: Denoiser, _: GuidanceNetwork) -> None:
    vars(denoiser.network)["options"].sizes[0] = 3


def add_hook(denoiser: Denoiser, _: GuidanceNetwork) -> None:
    denoiser.network.register_forward_hook(lambda module, inputs, output: 0.5 * output)


@pytest.mark.usefixtures("on_an_accelerator")
def test_changes_that_torch_does_not_count_are_followed_by_a_replay(captured):
    denoiser, guidance = hooked_models()
    sampler = warm(captured, denoiser, guidance)
    change_through_data(denoiser, guidance)
    assert replays(sampler, captured)


CHANGES = [change_in_place, replace_parameter, move_parameter, replace_network, change_number, change_option]
CHANGES += [change_nested_list, add_hook]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.usefixtures("on_an_accelerator")
def test_a_changed_model_makes_its_graphs_stale(captured, change):
    denoiser, guidance = hooked_models()
    sampler = warm(captured, denoiser, guidance)
    change(denoiser, guidance)
    assert [replays(sampler, captured) for _ in range(3)] == [False, False, True]


@pytest.mark.usefixtures("on_an_accelerator")
def test_autocast_and_backend_around_a_draw_make_its_graphs_stale(captured):
    sampler = warm(captured, *hooked_models())
    with torch.autocast("cpu", torch.bfloat16):
        assert not replays(sampler, captured)
    assert not replays(sampler, captured)
    with use_backend("reference"):
        assert not replays(sampler, captured)


@pytest.mark.usefixtures("on_an_accelerator")
def test_the_presence_of_labels_has_a_graph_of_its_own(captured):
    class Either(nn.Module):
        def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
            return x if labels is None else x * labels[:, None]

    sampler = warm(captured, Denoiser(Either(), SCHEDULE))
    labels = torch.arange(4.0)
    assert [replays(sampler, captured, labels=labels) for _ in range(3)] == [False, False, True]
    assert replays(sampler, captured)


@pytest.mark.usefixtures("on_an_accelerator")
def test_the_noise_of_a_stochastic_solver_belongs_to_the_graph(captured):
    sampler = warm(captured, *hooked_models(), solver="ddpm", seed=1)
    assert [replays(sampler, captured, seed=2) for _ in range(3)] == [False, False, True]


@pytest.mark.usefixtures("on_an_accelerator")
def test_what_is_no_module_may_change_unseen_and_is_captured_for_one_draw_only(captured):
    class Plain:
        schedule = SCHEDULE
        factor = 1.0

        def epsilon(self, x: Tensor, t: float, labels: Tensor | None = None) -> Tensor:
            return self.factor * x

    plain = Plain()
    sampler = Sampler(plain, shape=(3,))
    sampler.draw(9, batch_size=3)
    assert captured == ["capture", "replay", "replay"]
    plain.factor = 0.5
    del captured[:]
    assert torch.equal(sampler.draw(3), sample(plain, num=3, shape=(3,), callback=lambda *_: None))
    assert captured == []


DISCRETE = NoiseSchedule.from_betas(torch.linspace(1e-3, 0.1, 50, dtype=torch.float64))


def small_network() -> SSSDECG:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"in_channels": 2, "out_channels": 2, "res_channels": 4, "skip_channels": 4}
    network = SSSDECG(num_res_layers=1, num_classes=0, l_max=16, d_state=4, step_dims=(4, 4, 4), **sizes)
    nn.init.normal_(network.final_conv[2].conv.weight)
    return network.eval()


@pytest.mark.usefixtures("on_an_accelerator")
def test_a_compiled_network_refuses_changed_weights_through_a_graph_too(captured):
    """It holds folded weights, which a replay would go on reading."""
    network = small_network()
    sampler = Sampler(Denoiser(network, DISCRETE).compile_for_sampling(), config=SamplingConfig(steps=3))
    for _ in range(3):
        sampler.draw(2)
    assert captured == ["capture", "replay", "replay"]
    with torch.no_grad():
        network.final_conv[2].conv.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="changed"):
        sampler.draw(2)


def test_a_graph_keeps_what_its_kernels_read(captured):
    """A network may drop a work space, or the user a parameter, whose memory a replay still reads and writes."""

    class Holding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.work = torch.zeros(3)
            self.rows = [torch.zeros(3)]

    model = Holding()
    kept = [weakref.ref(model.work), weakref.ref(model.rows[0])]
    graphs = GraphCache("the loop", (model,))
    for _ in range(2):
        with graphs.checked():
            graphs.run(lambda x: (x,), torch.ones(2))
    assert captured == ["capture", "replay"]
    model.work, model.rows[0] = torch.zeros(4), torch.zeros(4)
    gc.collect()
    assert all(reference() is not None for reference in kept)
    with graphs.checked():
        graphs.run(lambda x: (x,), torch.ones(2))
    gc.collect()
    assert all(reference() is None for reference in kept)


@pytest.mark.usefixtures("on_an_accelerator")
def test_kernels_that_a_network_keeps_are_followed(captured):
    """S4 computes its kernels again only when it sees changed weights, which a replay does not look for."""
    network = small_network()
    sampler = Sampler(Denoiser(network, DISCRETE), config=SamplingConfig(steps=3))
    plain = [sampler.draw(2) for _ in range(3)][-1]
    assert captured == ["capture", "replay", "replay"]
    with torch.no_grad():
        network.residual_layer.residual_blocks[0].S41.s4_layer.kernel.kernel.C.mul_(3.0)
    changed = sampler.draw(2)
    assert not torch.equal(changed, plain)
    assert torch.equal(changed, sample(sampler.denoiser, num=2, steps=3, callback=lambda *_: None))


def test_a_tensor_without_an_address_is_like_no_other(monkeypatch):
    layer = nn.Linear(2, 2)
    assert state_of(layer) == state_of(layer)

    def refuse(tensor: Tensor) -> int:
        raise RuntimeError("Cannot access data pointer")

    monkeypatch.setattr(Tensor, "data_ptr", refuse)
    assert state_of(layer) != state_of(layer)


# What a capture needs ---------------------------------------------------------------------------------------


class NothingFromTheHost(TorchDispatchMode):
    """Fails where an operator takes a tensor of the host beside one of the device, here "meta", or copies between them.

    Reading a value of the device fails by itself there. A number of the host is no copy but an argument of the launch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        self.calls += any(t.device.type == "meta" for t in tensors)
        # Under inference_mode a conversion arrives here as it is called, not as the copy that it comes to.
        copies = "copy" in str(function) or str(function).startswith("aten.to.")
        kinds = {t.device.type for t in tensors if t.ndim > 0 or copies}
        assert len(kinds) <= 1, f"{function} has tensors on {kinds}"
        return result


@pytest.mark.parametrize("solver", ["dpmpp_2m", "ddpm", "heun"])
def test_the_loop_touches_nothing_of_the_host(solver):
    denoiser, guidance = models()
    config = SamplingConfig(solver, 3, scale=1.5, clamp=(-2.0, 2.0), gradient_norm_limit=1.0)
    sampler = Sampler(denoiser.to("meta"), guidance.to("meta"), config, device="meta")
    request = sampler._request(4, labels=torch.tensor([[0.5, 0.5]] * 4), seed=1)
    x, indices, labels = sampler._initial_state(request, 0, 4)
    with torch.inference_mode(), NothingFromTheHost() as seen:
        x, finite = sampler._loop(x, indices, labels, seed=1)
    assert x.device.type == "meta"
    assert finite.shape == (sampler.table.nfe,)
    assert seen.calls > 20 * sampler.table.nfe  # otherwise nothing was looked at
