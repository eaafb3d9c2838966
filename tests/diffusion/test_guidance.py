"""Guidance network and guided denoiser: exact gradients, the formula, interval, clamp, limit, save and load."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tgdp_fast import CheckpointError, Denoiser, GuidanceNetwork, GuidedDenoiser, NoiseSchedule, ScoreMLP
from tgdp_fast.data.gaussians import exact_denoiser, exact_guidance, paper_source, paper_target
from tgdp_fast.models.ecg_stem import ECGStem

SCHEDULES = {
    "vp_linear": NoiseSchedule.vp_linear(),
    "cosine": NoiseSchedule.cosine(),
    "discrete": NoiseSchedule.from_betas(torch.linspace(1e-4, 0.02, 200)),
}
SHAPES = [((2,), "none", 0), ((3, 5), "none", 4), ((2, 61), "ecg", 0), ((8, 100), "ecg", 3), ((1, 28), "ecg", 0)]


def build(shape: tuple[int, ...], stem: str, classes: int, schedule: NoiseSchedule, width: int = 7) -> GuidanceNetwork:
    torch.manual_seed(3)
    network = GuidanceNetwork(shape, schedule, width=width, depth=3, num_classes=classes, stem=stem).double()
    return network


@pytest.mark.parametrize(("shape", "stem", "classes"), SHAPES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_gradient_is_that_of_the_value(shape: tuple[int, ...], stem: str, classes: int, name: str) -> None:
    schedule = SCHEDULES[name]
    network = build(shape, stem, classes, schedule)
    x = torch.randn(5, *shape, dtype=torch.float64, requires_grad=True)
    t = torch.linspace(schedule.t_min, schedule.t_max, 5).double()
    labels = torch.arange(5) % classes if classes else None
    value, gradient = network(x, t, labels)
    plain = network.log_ratio(x, t, labels)
    (expected,) = torch.autograd.grad(plain.sum(), x)
    assert torch.allclose(value, plain, atol=1e-12)
    assert torch.allclose(gradient, expected, atol=1e-12)
    assert gradient.abs().max() > 1e-6


@pytest.mark.parametrize(("shape", "stem", "classes"), SHAPES)
def test_training_through_the_gradient_has_the_right_derivative(
    shape: tuple[int, ...], stem: str, classes: int
) -> None:
    schedule = SCHEDULES["vp_linear"]
    network = build(shape, stem, classes, schedule)
    x = torch.randn(4, *shape, dtype=torch.float64)
    t = torch.tensor([0.01, 0.2, 0.6, 0.9], dtype=torch.float64)
    labels = torch.arange(4) % classes if classes else None
    wanted = torch.randn_like(x)

    def loss(value: Tensor, gradient: Tensor) -> Tensor:
        return (gradient - wanted).square().mean() + value.square().mean()

    parameters = list(network.parameters())
    found = torch.autograd.grad(loss(*network(x, t, labels)), parameters, allow_unused=True)
    leaf = x.clone().requires_grad_(True)
    value = network.log_ratio(leaf, t, labels)
    (gradient,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
    expected = torch.autograd.grad(loss(value, gradient), parameters, allow_unused=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_a_float_time_equals_a_tensor_of_it() -> None:
    network = build((3,), "none", 2, SCHEDULES["cosine"])
    x, labels = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1, 0])
    with torch.no_grad():
        one = network.log_ratio_and_grad(x, 0.25, labels)
        many = network.log_ratio_and_grad(x, torch.full((6,), 0.25, dtype=torch.float64), labels)
    assert torch.allclose(one[0], many[0], atol=1e-12)
    assert torch.allclose(one[1], many[1], atol=1e-12)


@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
def test_alpha_power(power: float) -> None:
    schedule = SCHEDULES["vp_linear"]
    plain = GuidanceNetwork((2,), schedule, width=6, depth=2, alpha_power=0.0)
    scaled = GuidanceNetwork((2,), schedule, width=6, depth=2, alpha_power=power)
    scaled.load_state_dict(plain.state_dict())
    x, t = torch.randn(5, 2), 0.6
    factor = schedule.alpha(t) ** power
    for ours, theirs in zip(scaled(x, t), plain(x, t), strict=True):
        assert torch.allclose(ours, factor * theirs, rtol=1e-5)
    assert torch.allclose(scaled.log_ratio(x, torch.full((5,), t)), factor * plain.log_ratio(x, t), rtol=1e-4)


def test_h_tends_to_one_at_high_noise() -> None:
    schedule = NoiseSchedule.vp_linear(beta_max=40.0)
    network = GuidanceNetwork((2,), schedule, width=16, depth=2)
    with torch.no_grad():
        value, gradient = network(100 * torch.randn(50, 2), schedule.t_max)
    # alpha at t_max is below 1e-4, and a network of this size gives at most a few hundred.
    assert value.abs().max() < 0.05
    assert gradient.abs().max() < 1e-3


def test_paper_ecg_sizes() -> None:
    network = GuidanceNetwork((8, 1000), SCHEDULES["discrete"], width=512, depth=4, stem="ecg")
    assert isinstance(network.stem, ECGStem)
    assert network.stem.num_features == 3904
    assert network.layers[0].weight.shape == (512, 3904)


def test_too_short_records_are_refused() -> None:
    with pytest.raises(ValueError, match="length must be at least 28, got 27"):
        GuidanceNetwork((8, 27), SCHEDULES["discrete"], stem="ecg")
    with pytest.raises(ValueError, match="must be \\(leads, length\\)"):
        GuidanceNetwork((8,), SCHEDULES["discrete"], stem="ecg")
    with pytest.raises(ValueError, match="stem must be one of ecg, none"):
        GuidanceNetwork((8,), SCHEDULES["discrete"], stem="eeg")


@pytest.mark.parametrize(("shape", "stem", "classes"), SHAPES)
def test_save_and_load(tmp_path: Any, shape: tuple[int, ...], stem: str, classes: int) -> None:
    network = GuidanceNetwork(shape, SCHEDULES["discrete"], width=6, depth=2, num_classes=classes, stem=stem)
    network.save(tmp_path / "g")
    loaded = GuidanceNetwork.load(tmp_path / "g")
    x, labels = torch.randn(3, *shape), torch.arange(3) % classes if classes else None
    for ours, theirs in zip(network(x, 20.0, labels), loaded(x, 20.0, labels), strict=True):
        assert torch.equal(ours, theirs)


def test_a_denoiser_is_not_a_guidance(tmp_path: Any) -> None:
    Denoiser(ScoreMLP((2,), 4, 1), SCHEDULES["cosine"]).save(tmp_path / "d")
    with pytest.raises(CheckpointError, match="denoiser"):
        GuidanceNetwork.load(tmp_path / "d")


# ------------------------------------------------------------------------------------------- guided denoiser


def exact(**arguments: Any) -> GuidedDenoiser:
    schedule = SCHEDULES["vp_linear"]
    source, target = paper_source(), paper_target()
    return GuidedDenoiser(exact_denoiser(source, schedule), exact_guidance(target, source, schedule), **arguments)


@pytest.mark.parametrize("t", [1e-3, 0.1, 0.5, 1.0])
def test_exact_guidance_turns_the_source_into_the_target(t: float) -> None:
    """Theorem 3.1: epsilon_q = epsilon_p - sigma grad log h."""
    x = torch.randn(40, 2, dtype=torch.float64)
    expected = exact_denoiser(paper_target(), SCHEDULES["vp_linear"]).epsilon(x, t)
    assert torch.allclose(exact().epsilon(x, t), expected, atol=1e-9)


def test_scale_interpolates_between_source_and_target() -> None:
    x, t = torch.randn(7, 2, dtype=torch.float64), 0.4
    source = exact(scale=0.0).epsilon(x, t)
    target = exact(scale=1.0).epsilon(x, t)
    assert torch.allclose(exact(scale=2.5).epsilon(x, t), source + 2.5 * (target - source), atol=1e-10)
    assert torch.allclose(exact(scale=lambda t: 2 * t).epsilon(x, t), source + 0.8 * (target - source), atol=1e-10)


class Counting:
    """Guidance that counts its calls."""

    def __init__(self) -> None:
        self.calls: list[float] = []

    def log_ratio_and_grad(self, x: Tensor, t: float | Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.calls.append(float(t))
        return x.sum(1), torch.full_like(x, 3.0)


def test_guidance_does_not_run_outside_the_interval_or_at_scale_zero() -> None:
    guidance = Counting()
    denoiser = exact_denoiser(paper_source(), SCHEDULES["vp_linear"])
    x = torch.randn(4, 2)
    guided = GuidedDenoiser(denoiser, guidance, interval=(0.2, 0.6))
    for t in (0.1, 0.19, 0.2, 0.4, 0.6, 0.61, 1.0):
        evaluation = guided.evaluate(x, t)
        assert (evaluation.gradient is not None) == (0.2 <= t <= 0.6)
    assert guidance.calls == [0.2, 0.4, 0.6]
    GuidedDenoiser(denoiser, guidance, scale=lambda t: 0.0).evaluate(x, 0.5)
    assert len(guidance.calls) == 3


@pytest.mark.parametrize("scale", [1.0, -2.0, 5.0])
def test_gradient_norm_limit(scale: float) -> None:
    denoiser = exact_denoiser(paper_source(), SCHEDULES["vp_linear"])
    x = torch.randn(4, 2)
    t = 0.5
    free = GuidedDenoiser(denoiser, Counting(), scale=scale).epsilon(x, t) - denoiser.epsilon(x, t)
    bound = 0.5 * float(free.norm(dim=1).min())
    limited = GuidedDenoiser(denoiser, Counting(), scale=scale, gradient_norm_limit=bound).epsilon(x, t)
    change = limited - denoiser.epsilon(x, t)
    assert torch.allclose(change.norm(dim=1), torch.full((4,), bound), rtol=1e-4)
    assert torch.allclose(change / change.norm(dim=1, keepdim=True), free / free.norm(dim=1, keepdim=True), atol=1e-4)
    loose = GuidedDenoiser(denoiser, Counting(), scale=scale, gradient_norm_limit=1e6).epsilon(x, t)
    assert torch.allclose(loose - denoiser.epsilon(x, t), free)


def test_clamp_bounds_the_predicted_sample() -> None:
    x, t = 3 * torch.randn(50, 2, dtype=torch.float64), 0.5
    guided = exact(clamp=(-0.3, 0.2))
    alpha, sigma = guided.schedule.alpha(t), guided.schedule.sigma(t)
    x0 = (x - sigma * guided.epsilon(x, t)) / alpha
    assert float(x0.min()) >= -0.3 - 1e-9
    assert float(x0.max()) <= 0.2 + 1e-9
    assert (x0.max() - 0.2).abs() < 1e-9  # The bound is active.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": float("nan")}, "scale must be finite"),
        ({"interval": (0.5, 0.2)}, "interval must be a pair \\(low, high\\) with low < high"),
        ({"interval": 0.5}, "interval must be a pair"),
        ({"clamp": (1.0,)}, "clamp must be a pair"),
        ({"clamp": (0.0, float("inf"))}, "clamp must be a pair .* finite"),
        ({"gradient_norm_limit": 0.0}, "gradient_norm_limit must be finite"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exact(**arguments)


def test_a_plain_network_is_refused_with_advice() -> None:
    with pytest.raises(ValueError, match="tgdp_fast.Denoiser\\(network, schedule\\)"):
        GuidedDenoiser(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="log_ratio_and_grad"):
        GuidedDenoiser(exact_denoiser(paper_source(), SCHEDULES["cosine"]), torch.nn.Linear(2, 2))  # type: ignore[arg-type]
