"""The optimisation loop and denoiser training: resume, determinism, what is learned, errors."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tgdp_fast.fit.training as training
from tgdp_fast import Denoiser, NoiseSchedule, ScoreMLP, TrainingConfig, TrainingDivergedError, train_denoiser
from tgdp_fast.diffusion.denoiser import PREDICTIONS
from tgdp_fast.fit.baselines import fine_tune, train_vanilla
from tgdp_fast.fit.batches import Batches, add_noise, draw_times
from tgdp_fast.fit.training import minimize
from tgdp_fast.runtime.checkpoint import signature_of

QUICK = TrainingConfig(steps=40, batch_size=32, ema_decay=0.9, warmup=2)


def quadratic(module: nn.Module) -> Any:
    def loss(generator: torch.Generator) -> Tensor:
        x = torch.randn(16, 3, generator=generator)
        return (module(x) - x.sum(1, keepdim=True)).square().mean()

    return loss


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def test_it_minimizes() -> None:
    module = linear()
    history = minimize(module, quadratic(module), TrainingConfig(steps=400, learning_rate=0.05, ema_decay=0.9))
    assert history[-1] < 1e-3 < history[0]
    assert torch.allclose(module.weight, torch.ones(1, 3), atol=0.02)
    assert not module.training


class KilledError(Exception):
    pass


def killed_run(folder: Path, stop: int, module: nn.Module | None = None, **options: Any) -> None:
    """A run of a module (``linear()``) killed after ``stop`` steps, its state left in ``folder``."""
    module = module or linear()
    inner = quadratic(module)
    calls = 0

    def dying(generator: torch.Generator) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > stop:
            raise KilledError
        return inner(generator)

    with pytest.raises(KilledError):
        minimize(module, dying, QUICK, state_dir=folder, save_every=-1.0, **options)


@pytest.mark.parametrize("stop", [1, 7, 39])
def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path, stop: int) -> None:
    whole = linear()
    whole_history = minimize(whole, quadratic(whole), QUICK, seed=3)

    killed_run(tmp_path / "state", stop, seed=3, signature="s")
    again = linear()
    steps = 0
    inner_again = quadratic(again)

    def counting(generator: torch.Generator) -> Tensor:
        nonlocal steps
        steps += 1
        return inner_again(generator)

    history = minimize(again, counting, QUICK, seed=3, state_dir=tmp_path / "state", signature="s")
    assert steps == QUICK.steps - stop
    assert torch.equal(again.weight, whole.weight)
    assert torch.equal(again.bias, whole.bias)
    assert history == whole_history
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("change", [{"signature": "other"}, {"seed": 4}, {"settings": TrainingConfig(steps=41)}])
def test_a_state_of_another_run_is_not_resumed(tmp_path: Path, change: dict[str, Any]) -> None:
    killed_run(tmp_path / "state", 20, seed=3, signature="s")
    options: dict[str, Any] = {"settings": QUICK, "seed": 3, "signature": "s", **change}
    fresh, resumed = linear(), linear()
    minimize(fresh, quadratic(fresh), **options)
    minimize(resumed, quadratic(resumed), state_dir=tmp_path / "state", **options)
    assert torch.equal(fresh.weight, resumed.weight)


def test_a_damaged_state_is_not_resumed(tmp_path: Path) -> None:
    killed_run(tmp_path / "state", 20)
    weights = tmp_path / "state" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    module, fresh = linear(), linear()
    minimize(module, quadratic(module), QUICK, state_dir=tmp_path / "state")
    minimize(fresh, quadratic(fresh), QUICK)
    assert torch.equal(module.weight, fresh.weight)


def test_a_folder_of_somebody_else_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    module = linear()
    with pytest.raises(ValueError, match="thesis.txt"):
        minimize(module, quadratic(module), QUICK, state_dir=tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_ctrl_c_saves_and_the_next_run_goes_on(tmp_path: Path) -> None:
    whole = linear()
    minimize(whole, quadratic(whole), QUICK)
    module = linear()
    inner = quadratic(module)
    calls = 0

    def interrupted(generator: torch.Generator) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 17:
            os.kill(os.getpid(), signal.SIGINT)
        return inner(generator)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        minimize(module, interrupted, QUICK, state_dir=tmp_path / "state")
    assert calls == 17
    assert signal.getsignal(signal.SIGINT) is before
    again = linear()
    steps: list[None] = []
    inner_again = quadratic(again)
    minimize(again, lambda g: (steps.append(None), inner_again(g))[1], QUICK, state_dir=tmp_path / "state")
    assert len(steps) == QUICK.steps - 17
    assert torch.equal(again.weight, whole.weight)


class Noisy(nn.Module):
    """Batch statistics and dropout: state outside the parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x)
        return result


def test_buffers_and_dropout_resume_too(tmp_path: Path) -> None:
    whole, part, again = Noisy(), Noisy(), Noisy()
    minimize(whole, quadratic(whole), QUICK)
    killed_run(tmp_path / "s", 11, part)
    minimize(again, quadratic(again), QUICK, state_dir=tmp_path / "s")
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_average_decay_warm_up_and_clipping_by_hand() -> None:
    """Gradient 1 throughout; AdamW then moves by the learning rate, and the average follows its recursion."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    settings = TrainingConfig(steps=6, learning_rate=0.1, ema_decay=0.25, warmup=2, weight_decay=0.0)
    minimize(module, lambda generator: module.weight.sum(), settings)
    assert settings.rate(0) == pytest.approx(0.1 / 3)
    assert settings.rate(2) == pytest.approx(0.05 * (1 + math.cos(math.pi * 2 / 6)))
    weight = average = 0.0
    for step in range(6):
        weight -= settings.rate(step)
        decay = min(0.25, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    assert float(module.weight.detach()) == pytest.approx(average, rel=1e-4)


def test_weight_decay_spares_biases() -> None:
    module = nn.Linear(2, 2)
    before = module.bias.detach().clone(), module.weight.detach().clone()
    minimize(module, lambda generator: 0.0 * module(torch.ones(1, 2)).sum(), TrainingConfig(steps=5, weight_decay=1.0))
    assert torch.equal(module.bias, before[0])
    assert (module.weight.abs() < before[1].abs()).all()


def test_gradients_are_clipped() -> None:
    module = nn.Linear(4, 1, bias=False)
    seen: list[Tensor] = []
    real = torch.optim.AdamW.step
    settings = TrainingConfig(steps=1, gradient_clip=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda self: (seen.append(module.weight.grad.clone()), real(self))[1])
        minimize(module, lambda generator: 1e6 * module.weight.sum(), settings)
    assert float(seen[0].norm()) == pytest.approx(0.5, rel=1e-4)


def test_divergence_is_reported() -> None:
    module = linear()
    with pytest.raises(TrainingDivergedError, match="the loss is nan at step 0; lower learning_rate"):
        minimize(module, lambda generator: module.weight.sum() * float("nan"), QUICK)


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
        TrainingConfig(**arguments)


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
    settings = TrainingConfig(steps=400, batch_size=256, learning_rate=3e-3, ema_decay=0.98)
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
    settings = TrainingConfig(steps=300, batch_size=128, learning_rate=3e-3, ema_decay=0.98)
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


@pytest.mark.parametrize(("offset", "scale", "size"), [(1000.0, 1.0, "1e\\+03"), (0.0, 0.05, "0.05")])
def test_data_far_from_unit_scale_are_mentioned(offset: float, scale: float, size: str) -> None:
    data = offset + scale * torch.randn(64, 2)
    with pytest.warns(UserWarning, match=f"data should have about unit scale.* {size}.*TransferModel") as warned:
        train_denoiser(data, settings=QUICK, width=4)
    assert len(warned) == 1


def test_bad_labels() -> None:
    data = torch.randn(5, 2)
    with pytest.raises(ValueError, match="labels.*4.*5"):
        train_denoiser(data, labels=np.zeros(4, int), settings=QUICK)
    conditional = Denoiser(ScoreMLP((2,), 4, 1, num_classes=3), NoiseSchedule.cosine(), time_input="half_log_snr")
    with pytest.raises(ValueError, match="labels must be given: the model is conditional on 3 classes"):
        train_denoiser(data, initial=conditional, settings=QUICK)


def test_a_state_of_another_denoiser_or_distribution_is_not_resumed(tmp_path: Path) -> None:
    """Same data and weights; another prediction, time distribution or discrete schedule."""
    data = torch.randn(30, 2)
    schedules = [NoiseSchedule.from_betas(np.linspace(1e-4, end, 37)) for end in (0.02, 0.05)]
    base: dict[str, Any] = {"settings": QUICK, "width": 8, "depth": 1, "schedule": schedules[0]}
    for change in ({"prediction": "epsilon"}, {"time_distribution": "logsnr"}, {"schedule": schedules[1]}):
        state = tmp_path / "-".join(change)
        real = training._Run.advance
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training.time, "monotonic", iter(range(0, 10**7, 1000)).__next__)
            patch.setattr(training._Run, "advance", lambda run, loss, _real=real: _stop_at(run, _real(run, loss)))
            with pytest.raises(KilledError):
                train_denoiser(data, state_dir=state, **base)
        assert state.exists()
        fresh = train_denoiser(data, **{**base, **change})
        resumed = train_denoiser(data, state_dir=state, **{**base, **change})
        assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), resumed.parameters(), strict=True))


def _stop_at(run: Any, value: Tensor) -> Tensor:
    if run.step == 20:
        raise KilledError
    return value


def test_fine_tuning_starts_at_the_source_and_settings_are_used() -> None:
    source = train_denoiser(torch.randn(200, 2), settings=QUICK, width=16, depth=2)
    still = TrainingConfig(steps=3, batch_size=8, learning_rate=1e-12)
    tuned = fine_tune(source, torch.randn(20, 2), settings=still)
    for a, b in zip(source.parameters(), tuned.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-9)
    first = train_vanilla(torch.randn(20, 2), settings=still, width=8)
    second = train_vanilla(torch.randn(20, 2), settings=still, width=8)
    # Different data and hardly any learning: the same initial weights.
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_integer_times_are_rounded() -> None:
    seen: list[Tensor] = []

    class Embedding(nn.Module):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            seen.append(time)
            return x

    Denoiser(Embedding(), NoiseSchedule.vp_linear(), time_scale=1000.0, integer_time=True)(torch.zeros(1, 2), 0.2499999)
    assert seen[0].tolist() == [250]


def test_a_given_network_keeps_its_own_settings() -> None:
    source = train_denoiser(torch.randn(5, 2), settings=QUICK, width=4)
    with pytest.raises(ValueError, match="^width, depth must be left out: initial brings its own network"):
        train_denoiser(torch.randn(5, 2), initial=source, settings=QUICK, width=8, depth=2)


def test_labels_of_a_foreign_network_stay_as_given() -> None:
    """An nn.Embedding wants int64 class indices."""

    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(3, 2)
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
            result: Tensor = self.layer(x) + self.embedding(labels)
            return result

    source = Denoiser(Conditional(), NoiseSchedule.cosine())
    tuned = fine_tune(source, torch.randn(9, 2), labels=np.arange(9) % 3, settings=QUICK)
    assert tuned.epsilon(torch.zeros(3, 2), 0.5, torch.arange(3)).isfinite().all()


@pytest.mark.parametrize("labels", [np.array(["a"] * 5), np.array([0.5] * 5), np.array([0, 1, -1, 0, 1])])
def test_labels_that_are_no_classes(labels: Any) -> None:
    with pytest.raises(ValueError, match="labels must"):
        train_denoiser(torch.randn(5, 2), labels=labels, settings=QUICK)


def test_bfloat16_and_read_only_data_are_taken() -> None:
    def weights(data: np.ndarray | torch.Tensor) -> torch.Tensor:
        denoiser = train_denoiser(data, settings=QUICK, width=4)
        return torch.cat([parameter.detach().flatten() for parameter in denoiser.parameters()])

    rounded = torch.randn(5, 2, dtype=torch.bfloat16)
    exact = rounded.float().numpy()
    expected = weights(exact.copy())
    assert torch.equal(weights(rounded), expected)
    exact.setflags(write=False)
    assert torch.equal(weights(exact), expected)


def test_signatures_tell_data_apart() -> None:
    a = torch.tensor([1.0, 2.0])
    assert signature_of(a) == signature_of(a.clone())
    different = [a.double(), a.reshape(1, 2), a + 1e-7, a[:1]]
    assert len({signature_of(x) for x in [a, *different]}) == 5
    assert signature_of(None) != signature_of("None")
