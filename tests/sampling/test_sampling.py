"""sample(): the right distribution, the same samples however they are computed, callbacks, errors."""

from __future__ import annotations

import functools
import gc
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tgdp_fast import (
    SOLVERS,
    SPACINGS,
    Denoiser,
    GuidanceNetwork,
    GuidedDenoiser,
    NoiseSchedule,
    SamplingDivergedError,
    ScoreMLP,
    metrics,
    sample,
    sample_to_file,
    solver_table,
)
from tgdp_fast.data.gaussians import GaussianMixture, exact_denoiser, exact_guidance, paper_source, paper_target
from tgdp_fast.ops.noise import normal

SCHEDULE = NoiseSchedule.vp_linear()


def oracle() -> tuple[Any, Any]:
    source, target = paper_source(), paper_target()
    return exact_denoiser(source, SCHEDULE), exact_guidance(target, source, SCHEDULE)


@functools.cache
def target_entropy() -> float:
    return paper_target().entropy()


def random_models(classes: int = 0, shape: tuple[int, ...] = (3,)) -> tuple[Denoiser, GuidanceNetwork]:
    torch.manual_seed(0)
    denoiser = Denoiser(ScoreMLP(shape, 16, 2, classes), SCHEDULE, "v_prediction", time_input="half_log_snr")
    return denoiser, GuidanceNetwork(shape, SCHEDULE, width=16, depth=2, num_classes=classes)


def test_oracle_guidance_reaches_the_sampling_floor() -> None:
    """The sampler is right: SW2 of 10,000 guided samples is at most 1.5 times that of two fresh target sets."""
    denoiser, guidance = oracle()
    target = paper_target()
    found, floor = [], []
    for seed in range(3):
        fresh = target.sample(10_000, seed=2000 + seed)
        drawn = sample(denoiser, guidance, num=10_000, solver="dpmpp_2m", steps=25, seed=seed)
        found.append(metrics.sliced_wasserstein(drawn, fresh))
        floor.append(metrics.sliced_wasserstein(target.sample(10_000, seed=3000 + seed), fresh))
    assert np.mean(found) <= 1.5 * np.mean(floor)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_every_solver_samples_the_target_with_many_steps(solver: str) -> None:
    denoiser, guidance = oracle()
    drawn = sample(denoiser, guidance, num=4000, solver=solver, steps=200, seed=1).double()
    target = paper_target()
    # Moments of the target: mean 0 (standard error 0.01), second moments 0.35 on and -0.25 off the diagonal. Standard
    # errors are below 0.009; four of them, plus 0.02 for the first-order solvers' discretisation.
    second = drawn.T @ drawn / len(drawn)
    assert torch.allclose(drawn.mean(0), torch.zeros(2, dtype=torch.float64), atol=0.04)
    expected = torch.tensor([[0.35, -0.25], [-0.25, 0.35]], dtype=torch.float64)
    assert torch.allclose(second, expected, atol=0.056)
    assert metrics.negative_log_likelihood(target, drawn) == pytest.approx(target_entropy(), abs=0.08)


def test_scale_zero_and_no_guidance_sample_the_source() -> None:
    denoiser, guidance = oracle()
    plain = sample(denoiser, num=100, seed=4)
    assert torch.equal(sample(denoiser, guidance, num=100, seed=4, scale=0.0), plain)
    assert not torch.allclose(sample(denoiser, guidance, num=100, seed=4), plain, atol=0.1)


@settings(max_examples=25)
@given(
    num=st.integers(0, 23),
    batch_size=st.integers(1, 30),
    first_index=st.integers(0, 5),
    solver=st.sampled_from(sorted(SOLVERS)),
    spacing=st.sampled_from(sorted(SPACINGS)),
    steps=st.integers(1, 6),
    shape=st.sampled_from([(1,), (3,), (2, 5)]),
)
def test_samples_do_not_depend_on_the_batch_size(
    num: int, batch_size: int, first_index: int, solver: str, spacing: str, steps: int, shape: tuple[int, ...]
) -> None:
    denoiser, guidance = random_models(shape=shape)
    arguments: dict[str, Any] = {"solver": solver, "spacing": spacing, "steps": steps, "seed": 2**63 + 1}
    whole = sample(denoiser, guidance, num=28, **arguments)
    part = sample(denoiser, guidance, num=num, first_index=first_index, batch_size=batch_size, **arguments)
    assert part.shape == (num, *shape)
    assert part.dtype == torch.float32
    # Matrix products of different heights may sum in another order: a few float32 roundings per layer and evaluation,
    # amplified by alpha ratios up to 150 on the way from t_max.
    expected = whole[first_index : first_index + num]
    assert torch.allclose(part, expected, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))


def test_labels_follow_their_sample() -> None:
    denoiser, guidance = random_models(classes=3)
    labels = torch.tensor([0, 1, 2, 2, 1, 0, 1])
    mixed = sample(denoiser, guidance, num=7, labels=labels, seed=5, steps=5, batch_size=3)
    for label in range(3):
        alone = sample(denoiser, guidance, num=7, labels=label, seed=5, steps=5)
        assert torch.allclose(mixed[labels == label], alone[labels == label], atol=1e-4)
    rows = nn.functional.one_hot(labels, 3).float()
    assert torch.allclose(sample(denoiser, guidance, num=7, labels=rows, seed=5, steps=5), mixed, atol=1e-4)


def test_a_conditional_guidance_works_on_an_unconditional_denoiser() -> None:
    denoiser, _ = random_models()
    _, guidance = random_models(classes=2)
    drawn = sample(denoiser, guidance, num=4, labels=[0, 1, 0, 1], steps=3)
    assert drawn.isfinite().all()


def test_one_evaluation_by_hand() -> None:
    """steps = 1 of ddim is the prediction of x0 from pure noise."""
    denoiser, guidance = random_models()
    x = normal(9, torch.arange(5), 3, 0)
    epsilon = GuidedDenoiser(denoiser, guidance, scale=1.5).epsilon(x, SCHEDULE.t_max)
    expected = (x - SCHEDULE.sigma(SCHEDULE.t_max) * epsilon) / SCHEDULE.alpha(SCHEDULE.t_max)
    found = sample(denoiser, guidance, num=5, solver="ddim", steps=1, scale=1.5, seed=9)
    # Dividing by alpha = 0.0066 amplifies the float32 rounding of x - sigma epsilon by 150.
    assert torch.allclose(found, expected, rtol=1e-3, atol=150 * 1e-6)


def test_one_stochastic_step_by_hand() -> None:
    """ddpm from the drawn start with the noise of evaluation 0, which has index 1 and the seed of the run."""
    denoiser, guidance = random_models()
    table = solver_table("ddpm", SCHEDULE, 3, spacing="uniform")
    states: list[Tensor] = []
    sample(
        denoiser,
        guidance,
        num=4,
        solver=table,
        seed=9,
        first_index=3,
        batch_size=3,
        callback=lambda step, t, x, x0: states.append(x) if step == 0 else None,
    )
    indices = torch.arange(3, 7)
    x = normal(9, indices, 3, 0)
    epsilon = GuidedDenoiser(denoiser, guidance).epsilon(x, float(table.times[0]))
    (from_x, from_epsilon), noise_scale = table.matrix[0, 0], table.noise_scale[0]
    assert noise_scale > 0.1
    expected = from_x * x + from_epsilon * epsilon + noise_scale * normal(9, indices, 3, 1)
    # Float32 rounding of three terms of size |coefficient| * 4, and of the network's products in other batches.
    tolerance = 1e-5 * (abs(from_x) + abs(from_epsilon) + noise_scale)
    assert torch.allclose(torch.cat(states), expected.float(), rtol=0, atol=float(tolerance))


def test_callback_sees_every_step_and_cannot_see_another_batch() -> None:
    denoiser, guidance = oracle()
    seen: list[tuple[int, float, Tensor, Tensor]] = []
    result = sample(denoiser, guidance, num=6, steps=7, solver="heun", callback=lambda *a: seen.append(a), seed=3)
    table = solver_table("heun", SCHEDULE, 7)
    assert [s for s, *_ in seen] == list(range(7))
    assert [t for _, t, *_ in seen] == [float(t) for t in table.times[table.ends_step]]
    assert torch.allclose(seen[-1][2], result)
    assert torch.allclose(seen[-1][3], result, atol=1e-5)  # The last step is a jump to the predicted clean sample.
    assert all(x.shape == x0.shape == (6, 2) for _, _, x, x0 in seen)


def test_clamp_bounds_the_result() -> None:
    denoiser, guidance = oracle()
    drawn = sample(denoiser, guidance, num=500, clamp=(-0.4, 0.4))
    assert float(drawn.abs().max()) <= 0.4 + 1e-5
    assert float(drawn.abs().max()) > 0.39


def test_the_guided_denoiser_gives_what_the_arguments_give() -> None:
    denoiser, guidance = random_models()
    options: dict[str, Any] = {"scale": 0.7, "interval": (0.1, 0.8), "clamp": (-2.0, 2.0), "gradient_norm_limit": 0.3}
    by_arguments = sample(denoiser, guidance, num=5, steps=4, **options)
    assert torch.equal(sample(GuidedDenoiser(denoiser, guidance, **options), num=5, steps=4), by_arguments)
    with pytest.raises(ValueError, match="clamp, scale: set on the GuidedDenoiser"):
        sample(GuidedDenoiser(denoiser, guidance), num=5, clamp=(0, 1), scale=2.0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_networks_stay_close(precision: str) -> None:
    denoiser, guidance = random_models()
    exact = sample(denoiser, guidance, num=64, steps=10)
    found = sample(denoiser, guidance, num=64, steps=10, precision=precision)
    assert found.dtype == torch.float32
    difference = (found - exact).norm() / exact.norm()
    # Unit roundoff 2^-8 (bf16) and 2^-11 (fp16), a few of them per evaluation; not zero, or nothing was lowered.
    assert 0 < difference < {"bf16": 0.05, "fp16": 0.01}[precision]


def test_memory_does_not_grow_with_steps() -> None:
    denoiser, guidance = random_models()

    def peak(steps: int) -> int:
        held: list[int] = []

        def count(*_: Any) -> None:
            held.append(sum(t.numel() for t in gc.get_objects() if isinstance(t, Tensor)))

        gc.collect()
        gc.freeze()  # Only what the run makes is listed: quick, and blind to what other tests left.
        try:
            sample(denoiser, guidance, num=512, steps=steps, callback=count)
        finally:
            gc.unfreeze()
        return max(held)

    few = peak(5)
    assert few > 3 * 512  # The state itself is seen.
    assert peak(60) <= 1.05 * few


def test_no_autograd_graph_is_built() -> None:
    denoiser, guidance = random_models()

    class Watching(nn.Module):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            assert not x.requires_grad
            return torch.zeros_like(x)

    drawn = sample(Denoiser(Watching(), SCHEDULE), guidance, num=3, shape=(3,), steps=4)
    assert not drawn.requires_grad
    drawn.requires_grad_(True).sum().backward()  # An ordinary tensor, usable in training.


def test_the_result_is_an_ordinary_tensor_even_in_inference_mode() -> None:
    denoiser, guidance = random_models()
    with torch.inference_mode():
        drawn = sample(denoiser, guidance, num=3, steps=2)
    assert not drawn.is_inference()
    assert torch.equal(drawn, sample(denoiser, guidance, num=3, steps=2))


def test_training_mode_is_restored_and_dropout_is_off() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.9))

    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            result: Tensor = self.inner(x)
            return result

    denoiser = Denoiser(Takes(), SCHEDULE)
    denoiser.train()
    assert torch.equal(sample(denoiser, num=4, shape=(3,), steps=3), sample(denoiser, num=4, shape=(3,), steps=3))
    assert network[1].training


class Exploding(nn.Module):
    """Finite until the schedule time falls below 0.5."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return torch.where(time[:, None] < 0.5, torch.full_like(x, math.inf), torch.zeros_like(x))


def test_divergence_stops_with_the_evaluation_and_advice() -> None:
    table = solver_table("ddim", SCHEDULE, 10, spacing="uniform")
    with pytest.raises(SamplingDivergedError, match="Lower scale") as caught:
        sample(Denoiser(Exploding(), SCHEDULE), num=3, shape=(2,), solver="ddim", steps=10, spacing="uniform")
    assert caught.value.evaluation == int(np.argmax(table.times < 0.5))
    assert caught.value.time == table.times[caught.value.evaluation]
    # At the first evaluation it is not the run that diverged.
    broken = Denoiser(Exploding(), NoiseSchedule.cosine(t_max=0.4))
    with pytest.raises(SamplingDivergedError, match=r"gave no finite numbers: look at denoiser\.epsilon"):
        sample(broken, num=3, shape=(2,))


def test_the_result_of_a_fit_is_no_guidance_but_has_one() -> None:
    fitted = SimpleNamespace(guidance=GuidanceNetwork((2,), SCHEDULE, width=4))
    with pytest.raises(ValueError, match="got SimpleNamespace; pass its attribute guidance"):
        sample(Denoiser(Exploding(), SCHEDULE), fitted, num=3, shape=(2,))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num": -1}, "num must be an integer >= 0, got -1"),
        ({"num": 2.5}, "num must be an integer"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"solver": "dpmpp2m"}, "solver must be one of ddim, .*did you mean 'dpmpp_2m'"),
        ({"spacing": "linear"}, "spacing must be one of karras, logsnr, uniform"),
        ({"precision": "int8"}, "precision must be one of bf16, bf16x3, fp16, fp32"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1"),
        ({"backend": "rocm"}, "backend must be one of"),
        ({"shape": (4,)}, "shape must be \\(3,\\), the event_shape of the model, got \\(4,\\)"),
        ({"shape": 4}, "shape must be a tuple of integers"),
        ({"shape": (3, 0)}, "shape entries must be an integer >= 1, got 0"),
        ({"labels": 7}, "labels must be None, got labels for denoiser and guidance without classes"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"seed": 2**64}, "seed must be below 2\\^64, got 18446744073709551616"),
        ({"first_index": -1}, "first_index must be an integer >= 0"),
        ({"num": 10**400}, "num must be below 2\\^64, got an integer of 1329 bits"),
        ({"scale": 10**400}, "scale must be finite, got an integer of 1329 bits"),
        ({"interval": (0.0, 10**400)}, "interval must be a pair"),
        ({"callback": 5}, "callback must be callable as callback\\(step, t, x, x0\\), got 5"),
        ({"first_index": 2**63 - 4}, "first_index \\+ num must be at most 2\\^63"),
        ({"eta": 0.5}, "eta"),
        ({"device": "abacus"}, "device must be one that torch has here .*'abacus'"),
        (
            {"device": "meta"},
            "the parameters of denoiser are on cpu, but sampling runs on meta; .*denoiser.to\\('meta'\\)",
        ),
        ({"scale": lambda t: math.inf if t < 0.5 else 1.0}, "scale must give a finite number .* at t = 0.001"),
        ({"clamp": (1.0, -1.0)}, "clamp must be a pair"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    denoiser, guidance = random_models()
    denoiser.network.register_forward_hook(never)
    options: dict[str, Any] = {"num": 5, "steps": 2, **arguments}
    with pytest.raises(ValueError, match=message):
        sample(denoiser, guidance, **options)
    with pytest.raises(ValueError, match=message):
        sample_to_file(tmp_path / "x.npy", denoiser, guidance, **options)
    assert not any(tmp_path.iterdir())


def never(*_: Any) -> None:
    raise AssertionError("a network was run")


@pytest.mark.parametrize(
    ("classes", "labels", "message"),
    [
        ((0, 3), None, "labels are required: the guidance is conditional on 3 classes"),
        ((3, 0), None, "labels are required: the denoiser is conditional on 3 classes"),
        ((3, None), None, "labels are required: the denoiser is conditional on 3 classes"),
        ((0, None), 1, "labels must be None, got labels for denoiser without classes"),
        ((3, 3), [0, 1], "labels must be one class index, 5 indices, or 5 rows"),
        ((3, 3), np.zeros((5, 3, 1)), "labels must be one class index"),
        ((3, 3), 3, "labels must be in 0..2 \\(3 classes\\), got 3"),
        ((0, 3), [0, 1, 2, -1, 0], "labels must be in 0..2 \\(3 classes\\), got -1 in row 3"),
        ((3, 2), [0, 1, 2, 0, 0], "labels must be in 0..1 \\(2 classes\\), got 2 in row 2"),
        ((3, 3), [0.5] * 5, "labels must be integers"),
        ((3, 3), np.full((5, 2), 0.5), "labels has 2 columns"),
        ((3, 3), "cat", "labels must be numbers, got str"),
    ],
)
def test_bad_labels_are_refused_before_any_work(
    tmp_path: Path, classes: tuple[int, int | None], labels: Any, message: str
) -> None:
    denoiser, _ = random_models(classes[0])
    guidance = None if classes[1] is None else random_models(classes[1])[1]
    denoiser.network.register_forward_hook(never)
    with pytest.raises(ValueError, match=message):
        sample(denoiser, guidance, num=5, steps=2, labels=labels)
    with pytest.raises(ValueError, match=message):
        sample_to_file(tmp_path / "x.npy", denoiser, guidance, num=5, steps=2, labels=labels)
    assert not any(tmp_path.iterdir())


def test_a_model_of_unknown_classes_gets_the_labels_as_they_come() -> None:
    seen: list[Tensor] = []

    class Foreign(nn.Module):
        def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
            seen.append(labels)
            return torch.zeros_like(x)

    features = torch.linspace(-3, 3, 20, dtype=torch.float64).reshape(5, 4)
    sample(Denoiser(Foreign(), SCHEDULE), num=5, shape=(2,), steps=1, labels=features)
    assert torch.equal(seen[0], features)


def test_models_that_do_not_fit_each_other_are_refused() -> None:
    denoiser, guidance = random_models()
    other = GuidanceNetwork((3,), NoiseSchedule.vp_linear(beta_max=15.0))
    with pytest.raises(
        ValueError, match=r"same noise schedule, got .*beta_max=15.0.* denoiser.schedule = .*beta_max=20"
    ):
        sample(denoiser, other, num=2)
    with pytest.raises(ValueError, match="same noise schedule"):
        sample(GuidedDenoiser(denoiser, other), num=2)
    with pytest.raises(ValueError, match=r"same event_shape, got \(3,\) and \(4,\)"):
        sample(denoiser, GuidanceNetwork((4,), SCHEDULE), num=2)
    with pytest.raises(ValueError, match="the parameters of guidance are on meta, but sampling runs on cpu"):
        sample(denoiser, guidance.to("meta"), num=2)
    with pytest.raises(ValueError, match="table of another noise schedule"):
        sample(denoiser, num=2, solver=solver_table("ddim", other.schedule, 3))
    with pytest.raises(ValueError, match="table of another noise schedule"):
        sample(denoiser, num=2, solver=solver_table("ddim", NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 50)), 3))

    class Bare:
        def epsilon(self, x: Tensor, t: float, labels: Tensor | None = None) -> Tensor:
            return x

    with pytest.raises(ValueError, match="denoiser must have an attribute schedule"):
        sample(Bare(), num=2, shape=(3,))  # type: ignore[arg-type]


def test_a_guidance_without_a_schedule_is_accepted() -> None:
    class Still:
        def log_ratio_and_grad(
            self, x: Tensor, t: float | Tensor, labels: Tensor | None = None
        ) -> tuple[Tensor, Tensor]:
            return x.new_zeros(len(x)), torch.zeros_like(x)

    denoiser, _ = random_models()
    assert torch.equal(sample(denoiser, Still(), num=3, steps=2), sample(denoiser, num=3, steps=2))


def test_shape_is_needed_when_no_model_states_it() -> None:
    with pytest.raises(ValueError, match="shape must be given"):
        sample(Denoiser(Exploding(), SCHEDULE), num=3)


def test_a_ready_table_is_used_as_it_is() -> None:
    denoiser, guidance = random_models()
    table = solver_table("dpmpp_3m", SCHEDULE, 6, spacing="karras")
    by_name = sample(denoiser, guidance, num=5, solver="dpmpp_3m", steps=6, spacing="karras")
    assert torch.equal(sample(denoiser, guidance, num=5, solver=table), by_name)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process its peak")
def test_ten_thousand_points_fit_in_a_gigabyte() -> None:
    """Growth of a fresh process while it samples: its peak less what it held before, an imported torch included.

    VmHWM belongs to the program that runs; ru_maxrss would be that of the process which started it, if greater.
    """
    program = (
        "import torch, tgdp_fast as t\n"
        "def held(name):\n"
        "    line = next(x for x in open('/proc/self/status') if x.startswith(name + ':'))\n"
        "    return int(line.split()[1])\n"
        "s = t.NoiseSchedule.vp_linear()\n"
        "d = t.Denoiser(t.ScoreMLP((2,), 512, 5), s, 'v_prediction', time_input='half_log_snr')\n"
        "g = t.GuidanceNetwork((2,), s, width=512)\n"
        "before = held('VmRSS')\n"
        "t.sample(d, g, num=10_000, steps=2)\n"
        "print(held('VmHWM') - before)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    kilobytes = int(result.stdout)
    assert kilobytes > 10_000  # One layer's activations, 8192 x 512 floats, are 16 MB.
    assert kilobytes * 1024 < 0.75e9


def test_gaussian_source_and_target_have_the_right_variance() -> None:
    """One dimension, closed form: N(0, 1) to N(0.5, 0.49) by guidance."""
    source = GaussianMixture([[0.0]], 1.0)
    target = GaussianMixture([[0.5]], 0.49)
    drawn = sample(
        exact_denoiser(source, SCHEDULE), exact_guidance(target, source, SCHEDULE), num=20_000, steps=40, seed=7
    )
    # Standard errors: 0.7 / sqrt(20000) = 0.005 of the mean, 0.49 sqrt(2 / 20000) = 0.005 of the variance.
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(drawn.var()) == pytest.approx(0.49, abs=0.025)
