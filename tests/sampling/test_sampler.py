"""Sampler: one object for many draws, its weights, and that the one-call forms are it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_sampling import SCHEDULE, never, random_models
from torch import Tensor, nn

from tgdp_fast import (
    GaussianPrior,
    GuidanceNetwork,
    GuidedDenoiser,
    Sampler,
    SamplingConfig,
    sample,
    sample_to_file,
    solver_table,
)
from tgdp_fast.ops import SolverStep, guided_step

CONFIG = SamplingConfig("ddpm", 4, scale=1.5, interval=(0.1, 0.9), clamp=(-3.0, 3.0), gradient_norm_limit=0.5)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_second_draw_is_the_first_and_that_of_sample(backend: str) -> None:
    config = dataclasses.replace(CONFIG, backend=backend)
    models = random_models()
    sampler = Sampler(*models, config)
    first = sampler.draw(9, seed=3)
    sampler.draw(5, seed=4)
    assert torch.equal(sampler.draw(9, seed=3), first)
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    assert torch.equal(sample(*models, num=9, seed=3, **settings), first)


def test_ranges_of_indices_are_parts_of_one_sample_set() -> None:
    sampler = Sampler(*random_models(), CONFIG)
    whole = sampler.draw(10, seed=2**64 - 1, first_index=7)
    parts = [sampler.draw(n, seed=2**64 - 1, first_index=7 + i) for i, n in [(0, 4), (4, 0), (4, 5), (9, 1)]]
    # Rounding of a few matmuls in batches of other heights, as in test_samples_do_not_depend_on_the_batch_size.
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-3, atol=1e-3)


def test_every_option_of_a_draw_reaches_it() -> None:
    models, labels = random_models(3), torch.arange(6) % 3
    prior = GaussianPrior.fit(np.random.default_rng(0).normal(size=(20, 3)))
    steps: list[int] = []
    sampler = Sampler(*models, SamplingConfig("heun", 3))
    options: dict[str, Any] = {"labels": labels, "prior": prior, "seed": 1, "first_index": 2, "batch_size": 4}
    drawn = sampler.draw(6, callback=lambda step, *_: steps.append(step), **options)
    assert steps == [0, 1, 2, 0, 1, 2]
    torch.testing.assert_close(drawn, sample(*models, num=6, solver="heun", steps=3, **options), rtol=1e-3, atol=1e-3)


def test_the_file_holds_what_draw_gives(tmp_path: Path) -> None:
    models = random_models()
    sampler = Sampler(*models, CONFIG)
    found = sampler.draw_to_file(tmp_path / "x.npy", 7, seed=5, batch_size=7)
    assert np.array_equal(found, sampler.draw(7, seed=5).numpy())
    by_call = sample_to_file(tmp_path / "y.npy", *models, num=7, seed=5, **dataclasses.asdict(CONFIG))
    assert np.array_equal(by_call, found)
    with pytest.raises(TypeError, match="unexpected keyword argument 'sead'"):
        sampler.draw_to_file(tmp_path / "z.npy", 7, sead=5)


def test_weights_are_scale_times_sigma_and_a_function_is_called_once_for_each() -> None:
    called: list[float] = []

    def scale(t: float) -> float:
        called.append(t)
        return 1.0 + len(called)  # another value whenever it is called

    config = SamplingConfig("heun", 4, spacing="uniform", scale=scale, interval=(0.2, 0.8))
    models = random_models()
    sampler = Sampler(*models, config)
    table = solver_table("heun", SCHEDULE, 4, spacing="uniform")
    inside = [t for t in table.times.tolist() if 0.2 <= t <= 0.8]
    assert called == inside
    values = iter(range(2, 2 + len(inside)))
    expected = [next(values) * float(SCHEDULE.sigma(t)) if 0.2 <= t <= 0.8 else 0.0 for t in table.times.tolist()]
    assert sampler.weights == tuple(expected)
    fused = sampler.draw(4)
    looped = sampler.draw(4, callback=lambda *_: None)
    assert called == inside
    torch.testing.assert_close(fused, looped, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(fused, Sampler(*models, dataclasses.replace(config, scale=1.0)).draw(4), atol=1e-2)


def test_without_guidance_weights_are_zero_and_a_function_is_not_called() -> None:
    sampler = Sampler(random_models()[0], config=SamplingConfig(steps=3, scale=never))
    assert sampler.weights == (0.0,) * 3


def test_a_guided_denoiser_lends_its_parts() -> None:
    denoiser, guidance = random_models()
    guided = GuidedDenoiser(denoiser, guidance, scale=0.7, interval=(0.1, 0.8), clamp=(-2, 2), gradient_norm_limit=0.3)
    sampler = Sampler(guided, config=SamplingConfig(steps=3))
    assert (sampler.denoiser, sampler.guidance) == (denoiser, guidance)
    expected = SamplingConfig(steps=3, scale=0.7, interval=(0.1, 0.8), clamp=(-2.0, 2.0), gradient_norm_limit=0.3)
    assert sampler.config == expected


def test_models_may_change_and_move_between_draws() -> None:
    denoiser, guidance = random_models()
    sampler = Sampler(denoiser, guidance, CONFIG)
    before = sampler.draw(4)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.3)
    after = sampler.draw(4)
    assert not torch.allclose(after, before, atol=1e-2)
    assert torch.equal(after, Sampler(denoiser, guidance, CONFIG).draw(4))
    guidance.to("meta")
    with pytest.raises(ValueError, match="the parameters of guidance are on meta, but sampling runs on cpu"):
        sampler.draw(4)


def test_a_draw_checks_its_own_arguments_and_the_sampler_those_of_every_draw() -> None:
    denoiser, guidance = random_models()
    with pytest.raises(ValueError, match="config must be a SamplingConfig, got dict; SamplingConfig.from_dict"):
        Sampler(denoiser, guidance, {"steps": 3})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="denoiser must have a method epsilon"):
        Sampler(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="same event_shape"):
        Sampler(denoiser, GuidanceNetwork((4,), SCHEDULE))
    with pytest.raises(TypeError, match="unexpected keyword argument 'stepz'"):
        sample(denoiser, guidance, num=3, stepz=3)
    sampler = Sampler(denoiser, guidance, CONFIG)
    denoiser.network.register_forward_hook(never)
    for options, message in [
        ({"num": -1}, "num must be an integer >= 0"),
        ({"num": 1, "seed": -1}, "seed must be an integer >= 0"),
        ({"num": 1, "batch_size": 0}, "batch_size must be an integer >= 1"),
        ({"num": 1, "labels": 1}, "labels must be None"),
        ({"num": 1, "prior": 1}, "prior must be a GaussianPrior"),
    ]:
        with pytest.raises(ValueError, match=message):
            sampler.draw(**options)  # type: ignore[arg-type]


def test_an_environment_that_names_no_backend_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TGDP_BACKEND", "abacus")
    SamplingConfig()
    with pytest.raises(ValueError, match="environment variable TGDP_BACKEND must be one of"):
        Sampler(random_models()[0])


def test_the_loop_is_that_of_a_users_own_sampler() -> None:
    """GuidedDenoiser.evaluate and the operator of a step, from state to state."""
    denoiser, guidance = random_models()
    guided = GuidedDenoiser(denoiser, guidance, scale=1.5, interval=(0.0, 0.7), clamp=(-2, 2), gradient_norm_limit=0.5)
    table = solver_table("ddpm", SCHEDULE, 6)
    states: list[Tensor] = []
    sample(guided, num=3, solver=table, seed=2, callback=lambda step, t, x, x0: states.append(x))
    assert len(states) == 6
    for k in range(1, 6):
        with torch.inference_mode():
            evaluation = guided.evaluate(states[k - 1], float(table.times[k]))
        assert (evaluation.gradient is None) == (table.times[k] > 0.7)
        after = guided_step(
            states[k - 1],
            evaluation.epsilon,
            evaluation.gradient,
            step=SolverStep(
                table.matrix[k],
                noise_scale=float(table.noise_scale[k]),
                guidance_weight=evaluation.weight,
                alpha=float(table.alpha[k]),
                sigma=float(table.sigma[k]),
                clamp=guided.clamp,
            ),
            seed=2,
            sample_index=torch.arange(3),
            evaluation=k + 1,
        )
        assert torch.equal(after.x_next, states[k])
