"""Recording the sampling loop: the logic with a recorder of Python, and that nothing in it touches the host."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from tgdp_fast import Denoiser, GuidanceNetwork, NoiseSchedule, ScoreMLP
from tgdp_fast.sampling import graph as captured
from tgdp_fast.sampling import sampler as sampling
from tgdp_fast.sampling.graph import Replayed


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a graph does, in Python: static inputs and outputs, and a replay that runs the function again."""
    events: list[str] = []

    def record(function, inputs):
        events.append("record")
        outputs = tuple(torch.full_like(tensor, float("nan")) for tensor in function(*inputs))

        def replay() -> None:
            events.append("replay")
            for output, tensor in zip(outputs, function(*inputs), strict=True):
                output.copy_(tensor)

        return replay, outputs

    monkeypatch.setattr(captured, "record", record)
    return events


def test_the_second_call_is_recorded_and_later_ones_replayed(recorded):
    calls = []

    def function(x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
        calls.append(x)
        return (2 * x if y is None else x + y,)

    replayed = Replayed(function, "a sum")
    for i in range(4):
        x, y = torch.full((3,), float(i)), torch.arange(3.0)
        assert torch.equal(replayed(x, y)[0], x + y)
    assert recorded == ["record", "replay", "replay", "replay"]
    # Other shapes run as they are.
    assert torch.equal(replayed(torch.ones(2), torch.ones(2))[0], torch.full((2,), 2.0))
    assert torch.equal(replayed(torch.ones(3), None)[0], torch.full((3,), 2.0))
    assert recorded.count("replay") == 3


def test_what_cannot_be_recorded_runs_as_it_is_and_says_so_once(monkeypatch, caplog):
    def record(function, inputs):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(captured, "record", record)
    replayed = Replayed(lambda x: (x + 1,), "the loop")
    with caplog.at_level(logging.WARNING, logger="tgdp_fast.sampling.graph"):
        for _ in range(4):
            assert torch.equal(replayed(torch.zeros(2))[0], torch.ones(2))
    (message,) = [record.message for record in caplog.records]
    assert message.startswith("the loop cannot be recorded in a CUDA graph and runs as it is: ")
    assert message.endswith("operation not permitted when stream is capturing")


def models(width: int = 8) -> tuple[Denoiser, GuidanceNetwork]:
    schedule = NoiseSchedule.vp_linear()
    denoiser = Denoiser(ScoreMLP((3,), width, 2, 2), schedule, "v_prediction", time_input="half_log_snr")
    return denoiser.eval(), GuidanceNetwork((3,), schedule, width=width, depth=2, num_classes=2).eval()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_chunks_through_a_recording_are_those_without(recorded, precision):
    denoiser, guidance = models()
    arguments = {"num": 13, "labels": torch.arange(13) % 2, "batch_size": 4, "solver": "ddpm", "steps": 5, "seed": 3}
    arguments |= {"precision": precision, "backend": "reference"}
    plain = sampling.sample(denoiser, guidance, **arguments)
    plan = sampling._prepare(
        denoiser,
        guidance,
        shape=None,
        spacing="logsnr",
        eta=None,
        scale=1.0,
        interval=None,
        clamp=None,
        gradient_norm_limit=None,
        prior=None,
        first_index=0,
        device=None,
        callback=None,
        **arguments,
    )
    replayed = Replayed(partial(sampling._evaluations, plan, after=None), "the loop")
    parts = []
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.inference_mode(), sampling._backend("reference"), autocast, tqdm(disable=True) as bar:
        for start in range(0, 13, 4):
            parts.append(sampling._run_table(plan, start, min(start + 4, 13), bar, replayed).clone())
    torch.testing.assert_close(torch.cat(parts), plain, rtol=1e-5, atol=1e-5)
    # Four, four recorded, four replayed, one as it is.
    assert recorded == ["record", "replay", "replay"]


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
    plan = sampling._prepare(
        denoiser.to("meta"),
        guidance.to("meta"),
        num=4,
        shape=None,
        labels=torch.tensor([[0.5, 0.5]] * 4),
        solver=solver,
        steps=3,
        spacing="logsnr",
        eta=None,
        scale=1.5,
        interval=None,
        clamp=(-2.0, 2.0),
        gradient_norm_limit=1.0,
        prior=None,
        seed=1,
        first_index=0,
        batch_size=4,
        precision="fp32",
        backend="auto",
        device="meta",
        callback=None,
    )
    x, indices, labels = sampling._initial_state(plan, 0, 4)
    with torch.inference_mode(), NothingFromTheHost() as seen:
        x, finite = sampling._evaluations(plan, x, indices, labels, after=None)
    assert x.device.type == "meta"
    assert finite.shape == (plan.table.nfe,)
    assert seen.calls > 20 * plan.table.nfe  # otherwise nothing was looked at
