"""sample(): the right distribution, the same samples however they are computed, callbacks, errors, resume."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
from pathlib import Path
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
from tgdp_fast.noise import normal

SCHEDULE = NoiseSchedule.vp_linear()


def oracle() -> tuple[Any, Any]:
    source, target = paper_source(), paper_target()
    return exact_denoiser(source, SCHEDULE), exact_guidance(target, source, SCHEDULE)


def random_models(classes: int = 0, shape: tuple[int, ...] = (3,)) -> tuple[Denoiser, GuidanceNetwork]:
    torch.manual_seed(0)
    denoiser = Denoiser(ScoreMLP(shape, 16, 2, classes), SCHEDULE, "v_prediction", time_input="half_log_snr")
    return denoiser, GuidanceNetwork(shape, SCHEDULE, width=16, depth=2, num_classes=classes)


def test_oracle_guidance_reaches_the_sampling_floor() -> None:
    """The sampler is right: SW2 of 10,000 guided samples is at most 1.5 times that of two fresh target sets."""
    denoiser, guidance = oracle()
    target = paper_target()
    found, floor = [], []
    for seed in range(5):
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
    assert metrics.negative_log_likelihood(target, drawn) == pytest.approx(target.entropy(), abs=0.08)


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
        gc.collect()
        held: list[int] = []

        def count(*_: Any) -> None:
            held.append(sum(t.numel() for t in gc.get_objects() if isinstance(t, Tensor)))

        sample(denoiser, guidance, num=512, steps=steps, callback=count)
        return max(held)

    peak(5)
    assert peak(60) <= 1.05 * peak(5)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num": -1}, "num must be an integer >= 0, got -1"),
        ({"num": 2.5}, "num must be an integer"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"solver": "dpmpp2m"}, "solver must be one of ddim, .*did you mean 'dpmpp_2m'"),
        ({"spacing": "linear"}, "spacing must be one of karras, logsnr, uniform"),
        ({"precision": "int8"}, "precision must be one of bf16, fp16, fp32"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1"),
        ({"backend": "rocm"}, "backend must be one of"),
        ({"shape": (4,)}, "shape must be \\(3,\\), the event_shape of the model, got \\(4,\\)"),
        ({"shape": 4}, "shape must be a tuple of integers"),
        ({"labels": [0, 1]}, "labels must be one class index, 5 indices"),
        ({"seed": -1}, "seed"),
        ({"eta": 0.5}, "eta"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    denoiser, guidance = random_models()
    with pytest.raises(ValueError, match=message):
        sample(denoiser, guidance, **{"num": 5, "steps": 2, **arguments})


def test_shape_is_needed_when_no_model_states_it() -> None:
    with pytest.raises(ValueError, match="shape must be given"):
        sample(Denoiser(Exploding(), SCHEDULE), num=3)


def test_a_ready_table_is_used_as_it_is() -> None:
    denoiser, guidance = random_models()
    table = solver_table("dpmpp_3m", SCHEDULE, 6, spacing="karras")
    by_name = sample(denoiser, guidance, num=5, solver="dpmpp_3m", steps=6, spacing="karras")
    assert torch.equal(sample(denoiser, guidance, num=5, solver=table), by_name)


# -------------------------------------------------------------------------------------------------- to file


def test_file_equals_sample_and_leaves_nothing_else(tmp_path: Path) -> None:
    denoiser, guidance = random_models()
    expected = sample(denoiser, guidance, num=17, steps=3).numpy()
    found = sample_to_file(tmp_path / "x.npy", denoiser, guidance, num=17, steps=3, block_size=5)
    assert np.allclose(found, expected, atol=1e-4)
    assert np.array_equal(np.load(tmp_path / "x.npy"), found)
    assert [p.name for p in tmp_path.iterdir()] == ["x.npy"]


class InterruptedRunError(Exception):
    pass


class Interrupting(nn.Module):
    """Stops the run after a number of evaluations."""

    def __init__(self, evaluations: float) -> None:
        super().__init__()
        self.left = evaluations
        self.rows = 0

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        if self.left <= 0:
            raise InterruptedRunError
        self.left -= 1
        self.rows += len(x)
        return 0.3 * x


def test_an_interrupted_file_resumes_where_it_was(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num": 20, "shape": (2,), "steps": 4, "block_size": 6, "seed": 8}
    path = tmp_path / "x.npy"
    with pytest.raises(InterruptedRunError):
        sample_to_file(path, Denoiser(Interrupting(10), SCHEDULE), **options)
    assert not path.exists()
    again = Interrupting(math.inf)
    found = sample_to_file(path, Denoiser(again, SCHEDULE), batch_size=3, **options)
    assert again.rows == 4 * (20 - 12)  # Two blocks of six were finished and are not drawn again.
    expected = sample(Denoiser(Interrupting(math.inf), SCHEDULE), num=20, shape=(2,), steps=4, seed=8)
    assert np.allclose(found, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("change", [{"seed": 9}, {"steps": 3}, {"signature": "other model"}, {"num": 21}])
def test_blocks_of_another_run_are_not_used(tmp_path: Path, change: dict[str, Any]) -> None:
    options: dict[str, Any] = {"num": 20, "shape": (2,), "steps": 4, "block_size": 6, "seed": 8}
    with pytest.raises(InterruptedRunError):
        sample_to_file(tmp_path / "x.npy", Denoiser(Interrupting(10), SCHEDULE), **options)
    options |= change
    again = Interrupting(math.inf)
    sample_to_file(tmp_path / "x.npy", Denoiser(again, SCHEDULE), **options)
    assert again.rows == options["steps"] * options["num"]


def test_a_folder_in_the_way_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "x.npy.partial").mkdir()
    (tmp_path / "x.npy.partial" / "notes.txt").write_text("mine")
    sample_to_file(tmp_path / "x.npy", Denoiser(Interrupting(math.inf), SCHEDULE), num=3, shape=(2,), steps=2)
    assert (tmp_path / "x.npy.partial" / "notes.txt").read_text() == "mine"


def test_ten_thousand_points_fit_in_a_gigabyte() -> None:
    """Peak of the whole process, measured by the operating system in a fresh one."""
    program = (
        "import resource, torch, tgdp_fast as t\n"
        "s = t.NoiseSchedule.vp_linear()\n"
        "d = t.Denoiser(t.ScoreMLP((2,), 512, 5), s, 'v_prediction', time_input='half_log_snr')\n"
        "t.sample(d, t.GuidanceNetwork((2,), s, width=512), num=10_000, steps=3)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    kilobytes = int(result.stdout)
    assert kilobytes * 1024 < 1e9


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
