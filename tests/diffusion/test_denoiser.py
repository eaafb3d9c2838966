"""Denoiser: conversions between prediction types, time conventions, save and load."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tgdp_fast import CheckpointError, Denoiser, NoiseSchedule, ScoreMLP
from tgdp_fast.data.gaussians import exact_denoiser, paper_source
from tgdp_fast.diffusion.denoiser import PREDICTIONS, prediction_to_epsilon, training_target


class Constant(nn.Module):
    """Returns a given tensor and remembers how it was called."""

    def __init__(self, output: Tensor | None = None) -> None:
        super().__init__()
        self.output = output
        self.seen: list[Any] = []

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        self.seen.append((time, labels))
        return torch.zeros_like(x) if self.output is None else self.output


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", [0.03, 0.5, 1.0])
def test_every_prediction_type_gives_the_same_epsilon(prediction: str, t: float) -> None:
    schedule = NoiseSchedule.vp_linear()
    generator = torch.Generator().manual_seed(0)
    x0, epsilon = torch.randn(2, 5, 3, 7, generator=generator, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x = alpha * x0 + sigma * epsilon
    output = {
        "epsilon": epsilon,
        "sample": x0,
        "v_prediction": alpha * epsilon - sigma * x0,
        "score": -epsilon / sigma,
    }[prediction]
    found = Denoiser(Constant(output), schedule, prediction).epsilon(x, t)
    # alpha/sigma reaches 40 at t = 0.03 and amplifies the rounding of x0.
    assert torch.allclose(found, epsilon, atol=1e-12)


def test_training_target_is_what_the_conversion_undoes() -> None:
    x0, epsilon = torch.randn(2, 4, 3, dtype=torch.float64)
    alpha, sigma = 0.8, 0.6
    x = alpha * x0 + sigma * epsilon
    for prediction in ("epsilon", "sample", "v_prediction"):
        target = training_target(prediction, x0, epsilon, alpha, sigma)
        assert torch.allclose(prediction_to_epsilon(prediction, target, x, alpha, sigma), epsilon)


def test_per_sample_times_match_one_time_at_a_time() -> None:
    mixture, schedule = paper_source(), NoiseSchedule.vp_linear()

    class Score(nn.Module):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            rows = [
                mixture.noised(schedule.alpha(float(t)), schedule.sigma(float(t))).score(row[None])
                for t, row in zip(time, x, strict=True)
            ]
            return torch.cat(rows)

    denoiser = Denoiser(Score(), schedule, "score")
    x, t = torch.randn(5, 2, dtype=torch.float64), torch.tensor([0.1, 0.3, 0.31, 0.7, 1.0])
    together = denoiser.epsilon(x, t)
    exact = exact_denoiser(mixture, schedule)
    for i in range(5):
        alone = denoiser.epsilon(x[i : i + 1], float(t[i]))
        assert torch.allclose(together[i : i + 1], alone, atol=1e-7)  # the float32 times differ by 1e-8 relative
        assert torch.allclose(alone, exact.epsilon(x[i : i + 1], float(t[i])), atol=1e-6)


def test_time_conventions() -> None:
    schedule = NoiseSchedule.vp_linear()
    x = torch.zeros(3, 2)
    network = Constant()
    Denoiser(network, schedule, time_scale=1000.0).epsilon(x, 0.25)
    Denoiser(network, schedule, time_scale=1000.0, integer_time=True).epsilon(x, 0.25)
    Denoiser(network, schedule, time_input="half_log_snr").epsilon(x, 0.25)
    scaled, integer, half_log_snr = (time for time, _ in network.seen)
    assert scaled.dtype == torch.float32
    assert scaled.tolist() == [250.0] * 3
    assert integer.dtype == torch.int64
    assert integer.tolist() == [250] * 3
    assert half_log_snr.tolist() == pytest.approx([schedule.half_log_snr(0.25)] * 3, rel=1e-6)


def test_labels_reach_the_network_and_wrapped_outputs_are_unwrapped() -> None:
    network = Constant()
    labels = torch.tensor([1, 0, 1])
    Denoiser(network, NoiseSchedule.cosine()).epsilon(torch.zeros(3, 2), 0.5, labels)
    assert network.seen[0][1] is labels

    class Wrapped(nn.Module):
        def forward(self, x: Tensor, time: Tensor) -> Any:
            return SimpleNamespace(sample=x + 1)

    assert torch.equal(Denoiser(Wrapped(), NoiseSchedule.cosine()).epsilon(torch.zeros(3, 2), 0.5), torch.ones(3, 2))


def test_save_and_load_give_the_same_predictions(tmp_path: Any) -> None:
    schedule = NoiseSchedule.from_betas(torch.linspace(1e-4, 0.02, 50))
    denoiser = Denoiser(ScoreMLP((3, 5), width=9, depth=3, num_classes=4), schedule, "v_prediction", time_scale=2.0)
    denoiser.save(tmp_path / "model")
    loaded = Denoiser.load(tmp_path / "model")
    x, labels = torch.randn(6, 3, 5), torch.tensor([0, 1, 2, 3, 0, 1])
    assert torch.equal(denoiser.epsilon(x, 7.0, labels), loaded.epsilon(x, 7.0, labels))
    assert loaded.schedule == schedule
    assert loaded.event_shape == (3, 5)
    assert loaded.num_classes == 4
    assert not loaded.network.training


def test_a_foreign_network_is_passed_in_at_load(tmp_path: Any) -> None:
    denoiser = Denoiser(nn.Linear(2, 2), NoiseSchedule.cosine())
    denoiser.save(tmp_path / "model")
    with pytest.raises(CheckpointError, match="a network that is not of this package; build that .* network="):
        Denoiser.load(tmp_path / "model")
    with pytest.raises(ValueError, match=r"got the class Linear; build it: network=Linear\("):
        Denoiser.load(tmp_path / "model", network=nn.Linear)  # type: ignore[arg-type]
    other = nn.Linear(2, 2)
    Denoiser.load(tmp_path / "model", network=other)
    assert torch.equal(other.weight, denoiser.network.weight)
    with pytest.raises(CheckpointError, match="weight"):
        Denoiser.load(tmp_path / "model", network=nn.Linear(3, 2))


def test_conditional_and_unconditional_networks_say_what_they_need() -> None:
    schedule = NoiseSchedule.vp_linear()
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="labels are required.*4 classes"):
        Denoiser(ScoreMLP((3,), 8, 2, num_classes=4), schedule).epsilon(x, 0.5)
    with pytest.raises(ValueError, match="unconditional"):
        Denoiser(ScoreMLP((3,), 8, 2), schedule).epsilon(x, 0.5, torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.3, got values from 0 to 4"):
        Denoiser(ScoreMLP((3,), 8, 2, num_classes=4), schedule).epsilon(x, 0.5, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"rows \[B, 4\]"):
        Denoiser(ScoreMLP((3,), 8, 2, num_classes=4), schedule).epsilon(x, 0.5, torch.zeros(2, 3))


def test_soft_labels_mix_the_class_embeddings() -> None:
    network = ScoreMLP((3,), 8, 2, num_classes=2)
    one_hot = network(torch.ones(1, 3), torch.zeros(1), torch.tensor([[0.0, 1.0]]))
    index = network(torch.ones(1, 3), torch.zeros(1), torch.tensor([1]))
    assert torch.equal(one_hot, index)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prediction": "noise"}, "prediction must be one of epsilon, sample, score, v_prediction; got 'noise'"),
        ({"time_input": "sigma"}, "time_input must be one of"),
        ({"time_scale": 0.0}, "time_scale must be finite and in"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Denoiser(Constant(), NoiseSchedule.cosine(), **arguments)


def test_bad_network_and_schedule() -> None:
    with pytest.raises(ValueError, match="schedule must be a NoiseSchedule, got float"):
        Denoiser(Constant(), 0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("output", "came"),
    [
        (torch.zeros(5, 1), r"\[5, 1\]"),  # would broadcast
        (torch.zeros(5, 4), r"\[5, 4\]"),  # a learned variance beside the mean
        (SimpleNamespace(other=1), "no tensor"),
        ((), "no tensor"),
    ],
)
def test_a_network_must_return_the_shape_of_its_input(output: Any, came: str) -> None:
    denoiser = Denoiser(Constant(output), NoiseSchedule.cosine())
    for call in (denoiser, denoiser.epsilon):
        with pytest.raises(ValueError, match=rf"of the shape of x, \[5, 2\], got {came}"):
            call(torch.zeros(5, 2), 0.5)


def test_its_conventions_are_printed() -> None:
    shown = repr(Denoiser(nn.Linear(2, 2), NoiseSchedule.cosine(), "v_prediction", time_scale=1000))
    assert "cosine" in shown
    assert "prediction='v_prediction', time_input='time' * 1000" in shown


def test_a_tuple_is_unwrapped() -> None:
    """What diffusers' models return with return_dict=False."""
    x = torch.randn(5, 2)
    assert torch.equal(Denoiser(Constant((x, "more")), NoiseSchedule.cosine())(x, 0.5), x)  # type: ignore[arg-type]


def test_an_error_in_the_network_says_how_it_was_called() -> None:
    schedule, x = NoiseSchedule.cosine(), torch.randn(5, 2)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            result: Tensor = self.layer(x)
            return result

    with pytest.raises(RuntimeError, match="same dtype") as caught:
        Denoiser(Plain().double(), schedule)(x, 0.5)
    assert "network(x float32 [5, 2], time float32 [5]); its parameters are float64" in str(caught.value)
    with pytest.raises(RuntimeError, match=r"x float32 \[5, 3\]"):
        Denoiser(Plain(), schedule)(torch.randn(5, 3), 0.5)
    with pytest.raises(TypeError, match=r"labels int64 \[5\]"):
        Denoiser(Plain(), schedule)(x, 0.5, torch.zeros(5, dtype=torch.long))

    with pytest.raises(RuntimeError, match=r"its parameters are none"):
        Denoiser(lambda x, time: x @ torch.zeros(3, 3), schedule)(x, 0.5)  # type: ignore[arg-type]

    class Full(nn.Module):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError, match=r"^no room$"):
        Denoiser(Full(), schedule)(x, 0.5)


def test_a_factor_on_the_steps_of_a_discrete_schedule_is_mentioned() -> None:
    steps = NoiseSchedule.from_betas([0.01] * 200)
    with pytest.warns(UserWarning, match=r"with times up to 199000; leave time_scale out"):
        Denoiser(Constant(), steps, time_scale=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Denoiser(Constant(), steps, time_scale=5)  # rescaled to 0..1000, as guided-diffusion may do
        Denoiser(Constant(), steps, time_scale=1000, time_input="half_log_snr")
        Denoiser(Constant(), NoiseSchedule.from_betas([0.001] * 4000))
        Denoiser(Constant(), NoiseSchedule.cosine(), time_scale=1000)
