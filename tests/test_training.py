"""The optimisation loop and denoiser training: resume, determinism, what is learned, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tgdp_fast import Denoiser, NoiseSchedule, Optimisation, ScoreMLP, TrainingDivergedError, train_denoiser
from tgdp_fast.baselines import fine_tune, train_vanilla
from tgdp_fast.denoiser import PREDICTIONS
from tgdp_fast.training import Batches, add_noise, draw_times, optimise, signature_of

QUICK = Optimisation(steps=40, batch_size=32, ema_decay=0.9, warmup=2)


def quadratic(module: nn.Linear) -> Any:
    def loss(generator: torch.Generator) -> Tensor:
        x = torch.randn(16, 3, generator=generator)
        return (module(x) - x.sum(1, keepdim=True)).square().mean()

    return loss


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def test_it_minimises() -> None:
    module = linear()
    history = optimise(module, quadratic(module), Optimisation(steps=400, learning_rate=0.05, ema_decay=0.9))
    assert history[-1] < 1e-3 < history[0]
    assert torch.allclose(module.weight, torch.ones(1, 3), atol=0.02)
    assert not module.training


class KilledError(Exception):
    pass


@pytest.mark.parametrize("stop", [1, 7, 39])
def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path, stop: int) -> None:
    whole = linear()
    whole_history = optimise(whole, quadratic(whole), QUICK, seed=3)

    module = linear()
    inner = quadratic(module)
    calls = 0

    def dying(generator: torch.Generator) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > stop:
            raise KilledError
        return inner(generator)

    options: dict[str, Any] = {"seed": 3, "state_dir": tmp_path / "state", "signature": "s", "save_every": -1.0}
    with pytest.raises(KilledError):
        optimise(module, dying, QUICK, **options)
    again = linear()
    steps = 0
    inner_again = quadratic(again)

    def counting(generator: torch.Generator) -> Tensor:
        nonlocal steps
        steps += 1
        return inner_again(generator)

    history = optimise(again, counting, QUICK, **options)
    assert steps == QUICK.steps - stop
    assert torch.equal(again.weight, whole.weight)
    assert torch.equal(again.bias, whole.bias)
    assert history == whole_history
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("change", [{"signature": "other"}, {"seed": 4}, {"settings": Optimisation(steps=41)}])
def test_a_state_of_another_run_is_not_resumed(tmp_path: Path, change: dict[str, Any]) -> None:
    module = linear()
    inner = quadratic(module)
    calls = 0

    def dying(generator: torch.Generator) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise KilledError
        return inner(generator)

    options: dict[str, Any] = {"settings": QUICK, "seed": 3, "signature": "s"}
    with pytest.raises(KilledError):
        optimise(module, dying, state_dir=tmp_path / "state", save_every=-1.0, **options)
    options |= change
    fresh, resumed = linear(), linear()
    optimise(fresh, quadratic(fresh), **options)
    optimise(resumed, quadratic(resumed), state_dir=tmp_path / "state", **options)
    assert torch.equal(fresh.weight, resumed.weight)


def test_a_damaged_state_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "config.json").write_text("{")
    module, fresh = linear(), linear()
    optimise(module, quadratic(module), QUICK, state_dir=tmp_path / "state")
    optimise(fresh, quadratic(fresh), QUICK)
    assert torch.equal(module.weight, fresh.weight)


def test_divergence_is_reported() -> None:
    module = linear()
    with pytest.raises(TrainingDivergedError, match="the loss is nan at step 0; lower learning_rate"):
        optimise(module, lambda generator: module.weight.sum() * float("nan"), QUICK)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be an integer >= 1"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"learning_rate": 0.0}, "learning_rate must be"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"ema_decay": 1.0}, "ema_decay must be"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Optimisation(**arguments)


SCHEDULES = [NoiseSchedule.vp_linear(), NoiseSchedule.cosine(), NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 37))]


@given(
    count=st.integers(1, 200),
    schedule=st.sampled_from(SCHEDULES),
    distribution=st.sampled_from(["uniform", "logsnr"]),
    seed=st.integers(0, 2**31),
)
def test_times_lie_in_the_range(count: int, schedule: NoiseSchedule, distribution: str, seed: int) -> None:
    times = draw_times(schedule, count, torch.Generator().manual_seed(seed), distribution).double()
    assert times.shape == (count,)
    # float32 times may round past a bound that is not a float32 number.
    assert float(times.min()) >= schedule.t_min * (1 - 1e-6)
    assert float(times.max()) <= schedule.t_max * (1 + 1e-6)
    if schedule.is_discrete:
        assert torch.equal(times, times.round())


def test_times_are_stratified_in_the_stated_quantity() -> None:
    schedule = NoiseSchedule.vp_linear()
    for distribution in ("uniform", "logsnr"):
        times = draw_times(schedule, 1000, torch.Generator().manual_seed(0), distribution).double()
        value = times if distribution == "uniform" else schedule.half_log_snr(times)
        low, high = sorted(
            (t if distribution == "uniform" else schedule.half_log_snr(t)) for t in (schedule.t_min, schedule.t_max)
        )
        share = (value.sort().values - low) / (high - low)
        expected = (torch.arange(1000) + 0.5).double() / 1000
        assert float((share - expected).abs().max()) <= 0.5 / 1000 + 1e-4
        assert not torch.equal(value, value.sort().values)


def test_discrete_times_reach_both_ends_equally() -> None:
    schedule = SCHEDULES[2]
    times = draw_times(schedule, 37 * 20, torch.Generator().manual_seed(0)).long()
    assert torch.bincount(times, minlength=37).tolist() == [20] * 37


@given(count=st.integers(1, 40), batch_size=st.integers(1, 100), seed=st.integers(0, 2**31))
def test_small_sets_are_used_evenly(count: int, batch_size: int, seed: int) -> None:
    rows = Batches(count, batch_size).draw(torch.Generator().manual_seed(seed))
    assert rows.shape == (batch_size,)
    assert int(rows.min()) >= 0
    assert int(rows.max()) < count
    if batch_size >= count:
        counts = torch.bincount(rows, minlength=count)
        assert int(counts.max() - counts.min()) <= 1


def test_noise_has_the_schedules_coefficients() -> None:
    schedule = NoiseSchedule.vp_linear()
    batch = add_noise(schedule, torch.full((5, 2, 3), 2.0), torch.full((5,), 0.3), torch.Generator().manual_seed(0))
    expected = schedule.alpha(0.3) * 2.0 + schedule.sigma(0.3) * batch.epsilon
    assert torch.allclose(batch.x, expected, atol=1e-6)


# ------------------------------------------------------------------------------------------------- denoisers


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_type_learns_the_score(prediction: str) -> None:
    """N(0, 1) data: epsilon = sigma x exactly."""
    data = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1))
    settings = Optimisation(steps=400, batch_size=256, learning_rate=3e-3, ema_decay=0.98)
    denoiser = train_denoiser(data, prediction=prediction, width=32, depth=2, settings=settings)
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(2))
    for t in (0.2, 0.5, 0.9):
        with torch.no_grad():
            error = (denoiser.epsilon(x, t) - denoiser.schedule.sigma(t) * x).square().mean().sqrt()
        # A network that ignored its input would be off by sigma, 0.5 to 1; training noise leaves a few percent.
        assert float(error) < 0.15


def test_training_is_reproducible_and_leaves_the_random_state_alone() -> None:
    data = torch.randn(50, 3)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = train_denoiser(data, settings=QUICK, width=8, depth=1, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    second = train_denoiser(data, settings=QUICK, width=8, depth=1, seed=1)
    other = train_denoiser(data, settings=QUICK, width=8, depth=1, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_conditional_training_separates_the_classes() -> None:
    labels = np.repeat([0, 1], 300)
    data = np.where(labels[:, None] == 0, -1.0, 1.0) + 0.1 * np.random.default_rng(0).standard_normal((600, 1))
    settings = Optimisation(steps=300, batch_size=128, learning_rate=3e-3, ema_decay=0.98)
    denoiser = train_denoiser(data.astype(np.float32), labels=labels, width=32, depth=2, settings=settings)
    assert denoiser.num_classes == 2
    x, t = torch.zeros(2, 1), 0.5
    alpha, sigma = denoiser.schedule.alpha(t), denoiser.schedule.sigma(t)
    with torch.no_grad():
        x0 = (x - sigma * denoiser.epsilon(x, t, torch.tensor([0, 1]))) / alpha
    assert x0[:, 0].tolist() == pytest.approx([-1.0, 1.0], abs=0.25)


def test_fine_tuning_copies_the_source_and_moves_towards_the_target() -> None:
    source = train_denoiser(torch.randn(200, 2), settings=QUICK, width=16, depth=2)
    weights = [p.detach().clone() for p in source.parameters()]
    tuned = fine_tune(source, torch.randn(20, 2) + 1, settings=QUICK)
    assert all(torch.equal(a, b) for a, b in zip(weights, source.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights, tuned.parameters(), strict=True))
    assert tuned.schedule == source.schedule
    assert tuned.prediction == source.prediction


def test_vanilla_is_a_denoiser_of_the_target_alone() -> None:
    schedule = NoiseSchedule.cosine()
    denoiser = train_vanilla(torch.randn(20, 4), schedule, settings=QUICK, width=8)
    assert isinstance(denoiser.network, ScoreMLP)
    assert denoiser.schedule == schedule
    assert denoiser.event_shape == (4,)


def test_discrete_schedules_train_on_integer_steps() -> None:
    denoiser = train_denoiser(torch.randn(20, 2), SCHEDULES[2], settings=QUICK, width=8)
    assert denoiser.epsilon(torch.zeros(1, 2), 5.0).isfinite().all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.tensor([[1.0], [float("nan")]]), "data .*1 .*row 1"),
        (torch.zeros(1, 2), "data .*2"),
        (torch.zeros(0, 2), "data"),
        (torch.zeros(3), "data"),
    ],
)
def test_bad_data(data: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_denoiser(data, settings=QUICK)


def test_bad_labels() -> None:
    data = torch.randn(5, 2)
    with pytest.raises(ValueError, match="labels.*4.*5"):
        train_denoiser(data, labels=np.zeros(4, int), settings=QUICK)
    conditional = Denoiser(ScoreMLP((2,), 4, 1, num_classes=3), NoiseSchedule.cosine(), time_input="half_log_snr")
    with pytest.raises(ValueError, match="labels must be given: the model is conditional on 3 classes"):
        train_denoiser(data, initial=conditional, settings=QUICK)


def test_signatures_tell_data_apart() -> None:
    a = torch.tensor([1.0, 2.0])
    assert signature_of(a) == signature_of(a.clone())
    different = [a.double(), a.reshape(1, 2), a + 1e-7, a[:1]]
    assert len({signature_of(x) for x in [a, *different]}) == 5
    assert signature_of(None) != signature_of("None")
