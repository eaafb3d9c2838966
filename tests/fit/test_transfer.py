"""fit_guidance: Algorithms 1 to 4 against closed forms, conditional transfer, resume, errors before any work."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tgdp_fast import (
    Consistency,
    Cycle,
    GuidanceConfig,
    GuidanceNetwork,
    Logistic,
    NetworkConfig,
    NoiseSchedule,
    TrainingConfig,
    TransferModel,
    fit_guidance,
    metrics,
    sample,
    train_denoiser,
)
from tgdp_fast.data.gaussians import (
    GaussianMixture,
    exact_denoiser,
    log_density_ratio_and_grad,
    paper_source,
    paper_target,
)
from tgdp_fast.fit.batches import Batches, add_noise, draw_times
from tgdp_fast.fit.guidance import default_training, mean_h
from tgdp_fast.fit.losses import Loss
from tgdp_fast.fit.objective import Objective, TransferData
from tgdp_fast.fit.regularizers import Regularizer

SCHEDULE = NoiseSchedule.vp_linear()
#: One dimension; E_p[r^2] = e^0.36, so that every loss has something to hold on to.
SOURCE, TARGET = GaussianMixture([[0.0]], 1.0), GaussianMixture([[0.6]], 1.0)
QUICK = TrainingConfig(steps=500, batch_size=256, learning_rate=3e-3, weight_decay=0.01, ema_decay=0.99, warmup=10)
TINY = TrainingConfig(steps=6, batch_size=16, ema_decay=0.5, warmup=1)
SMALL = NetworkConfig(width=32, depth=2)
#: A few steps and nothing else, where a test is not about the fit.
SHORT = GuidanceConfig(training=TINY, diagnostics=False)


def error_of(fit: Any, times: tuple[float, ...] = (0.05, 0.2, 0.4)) -> tuple[float, float]:
    """Root mean square error of log h and of its gradient over q_t, each relative to the size of the exact one."""
    value_error = value_size = gradient_error = gradient_size = 0.0
    for t in times:
        alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
        x = TARGET.noised(alpha, sigma).sample(1000, seed=5)
        exact, exact_gradient = log_density_ratio_and_grad(TARGET, SOURCE, x, alpha, sigma)
        with torch.no_grad():
            found, found_gradient = fit.guidance.log_ratio_and_grad(x, t)
        value_error += float((found - exact).square().mean())
        value_size += float(exact.square().mean())
        gradient_error += float((found_gradient - exact_gradient).square().mean())
        gradient_size += float(exact_gradient.square().mean())
    return math.sqrt(value_error / value_size), math.sqrt(gradient_error / gradient_size)


@pytest.mark.parametrize(
    ("terms", "bounds"),
    [
        ({"loss": "logistic", "regularizers": ()}, (0.3, 0.5)),
        ({"loss": "logistic"}, (0.3, 0.3)),
        ({"loss": "ratio_mse", "regularizers": ()}, (0.35, 0.5)),
        ({"loss": "poisson", "regularizers": ()}, (0.35, 0.5)),
        ({"loss": "ratio_mse", "regularizers": (Cycle(1.0), Consistency(1.0))}, (0.35, 0.35)),
    ],
)
def test_every_algorithm_finds_the_exact_ratio(terms: dict[str, Any], bounds: tuple[float, float]) -> None:
    """log h of two unit Gaussians at distance 0.6, from 4,000 and 2,000 samples; a zero guidance has error 1."""
    fit = fit_guidance(
        SOURCE.sample(4000, seed=1),
        TARGET.sample(2000, seed=2),
        config=GuidanceConfig(**terms, training=QUICK, network=SMALL, diagnostics=False),
        denoiser=exact_denoiser(SOURCE, SCHEDULE),
    )
    value, gradient = error_of(fit)
    assert value < bounds[0]
    assert gradient < bounds[1]


def test_log_mse_is_biased_low_as_stated() -> None:
    """f = E[log r | x_t] <= log E[r | x_t]: for these Gaussians lower by 0.36 var(x_0 | x_t) / 2 (Jensen)."""
    fit = fit_guidance(
        SOURCE.sample(4000, seed=1),
        TARGET.sample(2000, seed=2),
        SCHEDULE,
        GuidanceConfig("log_mse", training=QUICK, network=SMALL, diagnostics=False),
    )
    t = 0.4
    alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    x = SOURCE.noised(alpha, sigma).sample(4000, seed=3)
    exact = log_density_ratio_and_grad(TARGET, SOURCE, x, alpha, sigma)[0]
    with torch.no_grad():
        bias = float((fit.guidance.log_ratio(x, t) - exact).mean())
    # var(x_0 | x_t) = sigma^2 for unit-variance data.
    assert bias == pytest.approx(-0.18 * sigma**2, abs=0.07)


def test_samples_move_to_the_target() -> None:
    source, target = paper_source(), paper_target()
    denoiser = exact_denoiser(source, SCHEDULE)
    settings = TrainingConfig(steps=400, batch_size=256, learning_rate=2e-3, weight_decay=0.1, ema_decay=0.99)
    fit = fit_guidance(
        source.sample(10_000, seed=0),
        target.sample(200, seed=1),
        config=GuidanceConfig(training=settings, diagnostics=False),
        denoiser=denoiser,
    )
    fresh = target.sample(5000, seed=2)
    before = metrics.sliced_wasserstein(sample(denoiser, num=5000, seed=3), fresh)
    after = metrics.sliced_wasserstein(sample(denoiser, fit.guidance, num=5000, seed=3), fresh)
    # The source is 0.25 away. A perfect fit to 200 samples is off by about 0.03.
    assert before > 0.2
    assert after < 0.09


def test_conditional_transfer() -> None:
    """Source labels are balanced; in the target, class 0 sits left and class 1 right of where the source has them."""
    generator = torch.Generator().manual_seed(0)
    source, source_labels = torch.randn(3000, 1, generator=generator), np.arange(3000) % 2
    target_labels = np.arange(400) % 2
    shift = torch.from_numpy(np.where(target_labels == 0, -0.8, 0.8)).float()[:, None]
    target = torch.randn(400, 1, generator=generator) + shift
    denoiser = exact_denoiser(SOURCE, SCHEDULE)
    fit = fit_guidance(
        source,
        target,
        config=GuidanceConfig(training=QUICK, network=SMALL),
        denoiser=denoiser,
        source_labels=source_labels,
        target_labels=target_labels,
    )
    assert fit.guidance.num_classes == 2
    for label, centre in ((0, -0.8), (1, 0.8)):
        drawn = sample(denoiser, fit.guidance, num=2000, labels=label, seed=1)
        # The 200 target samples of a class place its mean to 0.07.
        assert float(drawn.mean()) == pytest.approx(centre, abs=0.25)


def test_classes_that_no_source_sample_has_are_named() -> None:
    source, target = torch.randn(60, 2), torch.randn(20, 2)
    source_labels = np.arange(60) % 2

    def warned(target_labels: np.ndarray, **arguments: Any) -> list[str]:
        config = GuidanceConfig(training=TINY, **arguments)
        fit = fit_guidance(source, target, config=config, source_labels=source_labels, target_labels=target_labels)
        assert fit.diagnostics is not None
        return [text for text in fit.diagnostics.warnings if "source sample does" in text]

    assert warned(np.arange(20) % 2) == []
    (text,) = warned(np.where(np.arange(20) < 7, 3, 1))
    assert text.startswith("do not use samples of class 3: 7 of 20 target samples have it")
    # Where the guidance does not take them the denoiser does.
    (text,) = warned(np.where(np.arange(20) < 7, 3, 2), conditional=False)
    assert text.startswith("do not use samples of class 2, 3: 20 of 20")


@pytest.mark.parametrize("highest", [1, 4])
def test_a_single_column_may_hold_classes(highest: int) -> None:
    """Taken for rows it would be one class; with values up to 1 nothing else would tell."""
    source, target = torch.randn(60, 2), torch.randn(20, 2)
    columns = {"source_labels": np.arange(60)[:, None] % (highest + 1), "target_labels": np.ones((20, 1), np.int64)}
    for call in (fit_guidance, TransferModel.fit):
        with pytest.raises(ValueError, match=r"source_labels .* got \[60, 1\]; if the column holds classes pass"):
            call(source, target, **columns)
    if highest == 1:
        fit = fit_guidance(source, target, config=replace(SHORT, num_classes=1), **columns)
        assert fit.guidance.num_classes == 1


def test_columns_of_labels_that_no_source_sample_has_are_named() -> None:
    source, target = torch.randn(60, 2), torch.randn(20, 2)
    rows, seen = np.zeros((20, 3)), np.zeros((60, 3))
    seen[:, 0] = rows[:, 0] = 1
    rows[:2, 2] = 0.5
    fit = fit_guidance(source, target, config=GuidanceConfig(training=TINY), source_labels=seen, target_labels=rows)
    assert fit.diagnostics is not None
    assert any(text.startswith("do not use samples of class 2: 2 of 20") for text in fit.diagnostics.warnings)


def test_without_a_denoiser_there_is_no_consistency_term() -> None:
    fit = fit_guidance(torch.randn(50, 2), torch.randn(10, 2), config=SHORT)
    assert fit.config["regularizers"] == []
    assert fit.guidance.schedule == NoiseSchedule.vp_linear()
    with pytest.raises(ValueError, match="denoiser must be given when consistency > 0"):
        fit_guidance(torch.randn(50, 2), torch.randn(10, 2), config=replace(SHORT, regularizers=(Consistency(1.0),)))


def test_diagnostics_are_complete_and_printable() -> None:
    fit = fit_guidance(torch.randn(200, 2), torch.randn(20, 2), config=GuidanceConfig(training=TINY))
    assert fit.diagnostics is not None
    text = str(fit.diagnostics)
    for words in ("AUC", "calibration", "effective sample size", "E_p[h]", "outside"):
        assert words in text
    assert len(fit.diagnostics.mean_h) == 6
    assert set(fit.diagnostics.to_dict()) >= {"auc", "mean_h", "warnings", "effective_sample_size"}


def test_mean_h_is_one_for_an_untrained_guidance_and_exact_for_a_constant() -> None:
    fit = fit_guidance(torch.randn(50, 2), torch.randn(10, 2), config=SHORT)
    network = fit.guidance
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.layers[-1].bias.fill_(0.5)  # type: ignore[union-attr,operator]
    for t, mean, error in mean_h(network, torch.randn(100, 2)):
        value, _ = network.log_ratio_and_grad(torch.zeros(1, 2), t)
        assert mean == pytest.approx(math.exp(float(value.detach())), rel=1e-5)
        assert error == pytest.approx(0.0, abs=1e-6)


def test_the_same_seed_gives_the_same_guidance_and_keeps_the_denoiser() -> None:
    x, y = torch.randn(50, 2), torch.randn(10, 2)
    denoiser = exact_denoiser(paper_source(), SCHEDULE)
    fits = [fit_guidance(x, y, config=SHORT, denoiser=denoiser, seed=s) for s in (1, 1, 2)]
    weights = [torch.cat([p.flatten() for p in fit.guidance.parameters()]) for fit in fits]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_images_and_the_ecg_stem_fit_too() -> None:
    x, y = torch.randn(20, 2, 40), torch.randn(6, 2, 40)
    fit = fit_guidance(x, y, config=replace(SHORT, network=NetworkConfig(width=8, depth=2, stem="ecg")))
    assert fit.guidance.event_shape == (2, 40)


def test_discrete_schedule() -> None:
    schedule = NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 50))
    fit = fit_guidance(torch.randn(50, 2), torch.randn(10, 2), schedule, GuidanceConfig(training=TINY))
    assert fit.diagnostics is not None
    assert all(t == round(t) for t, *_ in fit.diagnostics.mean_h)


def test_every_weight_of_the_loss_counts() -> None:
    """total = loss + consistency / 2 ||.||^2 + cycle (h - h_c)^2, each evaluated alone from one generator state."""
    x, y = SOURCE.sample(40, seed=1), TARGET.sample(20, seed=2)
    denoiser = exact_denoiser(SOURCE, SCHEDULE)
    torch.manual_seed(0)
    network, classifier = (GuidanceNetwork((1,), SCHEDULE, width=8, depth=2) for _ in range(2))

    def value(*regularizers: Regularizer, loss: Loss | str = "logistic") -> float:
        config = GuidanceConfig(loss, regularizers, training=TINY)
        objective = Objective(network, TransferData(x, y), config, denoiser=denoiser, classifier=classifier)
        return float(objective(torch.Generator().manual_seed(3)).detach())

    plain = value()
    consistency, cycle = value(Consistency(1.0)) - plain, value(Cycle(1.0)) - plain
    assert consistency > 0.01
    assert cycle > 1e-6
    assert value(Consistency(3.0), Cycle(2.0)) == pytest.approx(plain + 3 * consistency + 2 * cycle, rel=1e-5)
    # The terms by hand, from the same draws.
    generator = torch.Generator().manual_seed(3)
    batches = []
    for data in (x, y):
        rows = Batches(len(data), TINY.batch_size).draw(generator)
        t = draw_times(SCHEDULE, len(rows), generator, "uniform")
        batches.append(add_noise(SCHEDULE, data[rows], t, generator))
    source, target = batches
    f_source = network.log_ratio(source.x, source.t)
    f_target, gradient = network(target.x, target.t)
    cross_entropy = -torch.sigmoid(-f_source).log().mean() - torch.sigmoid(f_target).log().mean()
    assert plain == pytest.approx(0.5 * float(cross_entropy.detach()), rel=1e-5)
    smoothed = value(loss=Logistic(smoothing=0.2)) - plain
    assert smoothed == pytest.approx(0.1 * float((f_target.mean() - f_source.mean()).detach()), rel=1e-3, abs=1e-7)
    residual = denoiser.epsilon(target.x, target.t) - target.sigma * gradient - target.epsilon
    assert consistency == pytest.approx(0.5 * float(residual.square().sum(1).mean()), rel=1e-4)
    h, h_classifier = f_target.exp(), classifier.log_ratio(target.x, target.t).exp()
    assert cycle == pytest.approx(float((h - h_classifier).square().mean()), rel=1e-3)


def test_precision_is_that_of_the_products_alone() -> None:
    x, y = SOURCE.sample(400, seed=1), TARGET.sample(200, seed=2)
    torch.manual_seed(0)
    network = GuidanceNetwork((1,), SCHEDULE, width=32, depth=2)
    losses, gradients = [], []
    for precision in ("fp32", "bf16", "fp16"):
        config = GuidanceConfig(regularizers=(Consistency(1.0),), training=TINY, precision=precision)
        objective = Objective(network, TransferData(x, y), config, denoiser=exact_denoiser(SOURCE, SCHEDULE))
        loss = objective(torch.Generator().manual_seed(3))
        assert loss.dtype == torch.float32
        losses.append(float(loss.detach()))
        found = torch.autograd.grad(loss, list(network.parameters()))
        assert {g.dtype for g in found} == {torch.float32}
        gradients.append(torch.cat([g.flatten() for g in found]))
    # Products of three layers up and three down in 8 or 11 bits.
    for loss, gradient, roundoff in zip(losses[1:], gradients[1:], (2.0**-8, 2.0**-11), strict=True):
        assert 0 < abs(loss - losses[0]) < 4 * roundoff * losses[0]
        assert 0 < float((gradient - gradients[0]).norm()) < 6 * roundoff * float(gradients[0].norm())


def test_network_arguments_reach_the_network() -> None:
    config = replace(SHORT, network=NetworkConfig(width=5, depth=1, alpha_power=3.0))
    fit = fit_guidance(torch.randn(9, 2), torch.randn(5, 2), config=config)
    assert (fit.guidance.alpha_power, fit.guidance.width, fit.guidance.depth) == (3.0, 5, 1)


def test_mean_h_does_not_look_at_the_first_samples_only() -> None:
    network = GuidanceNetwork((1,), SCHEDULE, width=8, depth=1)
    source = torch.cat([torch.full((300, 1), -2.0), torch.full((300, 1), 2.0)])
    sorted_, shuffled = (mean_h(network, data, limit=200)[0][1] for data in (source, source[torch.randperm(600)]))
    first, second = (mean_h(network, part)[0][1] for part in source.split(300))
    assert min(first, second) < sorted_ < max(first, second)
    # 200 draws of one of two values: standard error 0.035 of their distance.
    assert sorted_ == pytest.approx(shuffled, abs=0.2 * abs(first - second))


def test_a_conditional_denoiser_decides_the_classes() -> None:
    denoiser = train_denoiser(torch.randn(20, 2), labels=np.arange(20) % 5, settings=TINY, width=4)
    labels = {"source_labels": np.arange(20) % 3, "target_labels": np.arange(6) % 2}
    x, y = torch.randn(20, 2), torch.randn(6, 2)
    fit = fit_guidance(x, y, config=SHORT, denoiser=denoiser, **labels)
    assert fit.guidance.num_classes == 5
    with pytest.raises(ValueError, match="the denoiser is conditional on 5 classes"):
        fit_guidance(x, y, config=SHORT, denoiser=denoiser)


def test_a_state_with_another_denoiser_or_loss_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tgdp_fast.fit.training import _Run

    x, y = torch.randn(50, 2), torch.randn(10, 2)
    first, second = (train_denoiser(x, settings=TINY, width=4, seed=seed) for seed in (1, 2))
    settings = TrainingConfig(steps=30, batch_size=16, ema_decay=0.5, warmup=1)
    config = GuidanceConfig(training=settings, diagnostics=False)
    changes: list[tuple[Any, dict[str, Any]]] = [
        (first, {"denoiser": second}),
        (first, {"config": replace(config, regularizers=(Consistency(0.5),))}),
        (first, {"target": y + 1}),
        (None, {"schedule": NoiseSchedule.cosine()}),
    ]
    for denoiser, change in changes:
        base: dict[str, Any] = {"config": config, "denoiser": denoiser}
        state = tmp_path / "-".join(change)
        with pytest.MonkeyPatch.context() as patch:
            real = _Run.save
            patch.setattr(_Run, "save", lambda run, folder, _real=real: (_real(run, folder), _kill(run.step == 13)))
            patch.setattr("tgdp_fast.fit.training.time.monotonic", iter(range(0, 10**6, 1000)).__next__)
            with pytest.raises(KilledError):
                fit_guidance(x, y, state_dir=state, **base)
        arguments = {"source": x, "target": y, **base, **change}
        fresh, resumed = fit_guidance(**arguments), fit_guidance(**arguments, state_dir=state)
        for a, b in zip(fresh.guidance.parameters(), resumed.guidance.parameters(), strict=True):
            assert torch.equal(a, b)


class KilledError(Exception):
    pass


def test_a_killed_fit_resumes_to_the_same_guidance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tgdp_fast.fit.training import _Run

    x, y = torch.randn(50, 2), torch.randn(10, 2)
    settings = TrainingConfig(steps=30, batch_size=16, ema_decay=0.5, warmup=1)
    options: dict[str, Any] = {"config": GuidanceConfig(training=settings, diagnostics=False), "seed": 4}
    whole = fit_guidance(x, y, **options)

    real = _Run.save
    monkeypatch.setattr(_Run, "save", lambda run, folder: (real(run, folder), _kill(run.step == 13)))
    monkeypatch.setattr("tgdp_fast.fit.training.time.monotonic", iter(range(0, 10**6, 1000)).__next__)
    with pytest.raises(KilledError):
        fit_guidance(x, y, state_dir=tmp_path / "s", **options)
    monkeypatch.setattr(_Run, "save", real)
    resumed = fit_guidance(x, y, state_dir=tmp_path / "s", **options)
    for a, b in zip(whole.guidance.parameters(), resumed.guidance.parameters(), strict=True):
        assert torch.equal(a, b)


def _kill(now: bool) -> None:
    if now:
        raise KilledError


def test_defaults_regularize_more_when_there_are_fewer_samples() -> None:
    decays = [default_training(n).weight_decay for n in (1, 10, 100, 1000, 10_000)]
    assert decays == sorted(decays, reverse=True)
    assert decays[0] > decays[-1]
    with pytest.raises(ValueError, match="num_target"):
        default_training(0)


X, Y = torch.zeros(20, 3).normal_(), torch.zeros(10, 3).normal_()


def test_a_source_far_from_unit_scale_is_mentioned() -> None:
    with pytest.warns(UserWarning, match="source should have about unit scale.*TransferModel") as warned:
        fit_guidance(X + 1000, Y + 1000, config=SHORT)
    assert len(warned) == 1


@pytest.mark.parametrize(
    ("source", "target", "arguments", "message"),
    [
        (
            X,
            Y,
            {"config": GuidanceConfig(network=NetworkConfig(stem="ecg"))},
            "event_shape must be \\(leads, length\\)",
        ),
        (X, Y, {"config": TINY}, "config must be a GuidanceConfig, got TrainingConfig"),
        (X, Y, {"seed": 2**64}, "seed must be below 2\\^64"),
        (X, Y, {"denoiser": object()}, "denoiser must be a Denoiser, .* got object"),
        (X, Y, {"device": "gpu"}, "device must be one that torch has here"),
        (X, Y[:, :2], {}, "target"),
        (X, Y[:0], {}, "target"),
        (X, Y[:1], {}, "target .*2"),
        (X * float("inf"), Y, {}, "source"),
        (X, Y, {"source_labels": np.zeros(20, int)}, "source_labels and target_labels must be given together"),
        (X, Y, {"source_labels": np.zeros(20, int), "target_labels": np.zeros(9, int)}, "target_labels.*9.*10"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    source: Tensor, target: Tensor, arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tgdp_fast.fit.guidance.minimize", None)
    monkeypatch.setattr("tgdp_fast.fit.guidance.cross_fitted", None)
    with pytest.raises(ValueError, match=message):
        fit_guidance(source, target, **arguments)


def test_classes_without_a_sample_are_named() -> None:
    one_based = {"source_labels": np.arange(20) % 3 + 1, "target_labels": np.arange(10) % 3 + 1}
    with pytest.warns(UserWarning, match="have 4 classes, but no sample has class 0: .*Classes count from 0"):
        fit_guidance(X, Y, config=SHORT, **one_based)
    with pytest.warns(UserWarning, match="labels have 6 classes, but no sample has class 1, 2, 4:"):
        train_denoiser(X, labels=np.array([0, 3, 5, 5] * 5), settings=TINY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_guidance(X, Y, config=replace(SHORT, num_classes=4), **one_based)


def test_an_offset_that_float32_loses_is_told_by_a_fit_without_standardization() -> None:
    source, target = (one.double().numpy() / 1e9 + np.array([1.0, 0.0, 0.0]) for one in (X, Y))
    with pytest.warns(
        UserWarning, match="source is rounded to float32, where its spread is lost: feature 0 has mean 1"
    ):
        fit_guidance(source, target, config=SHORT)
