"""Configurations of a fit: JSON and back, refusals, and a loss and a regularizer of one's own in one class each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tgdp_fast import Consistency, Cycle, GuidanceConfig, Logistic, NetworkConfig, TrainingConfig, fit_guidance
from tgdp_fast.cli.main import main
from tgdp_fast.data.gaussians import exact_denoiser, paper_source
from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.fit.losses import LOSSES, Loss, RatioMSE
from tgdp_fast.fit.regularizers import REGULARIZERS, Regularizer
from tgdp_fast.fit.terms import TransferBatch

TINY = TrainingConfig(steps=6, batch_size=16, ema_decay=0.5, warmup=1)


@pytest.mark.parametrize(
    "config",
    [
        GuidanceConfig(),
        GuidanceConfig(Logistic(smoothing=0.1), [Consistency(0.5), Cycle(0.0)], num_classes=3, conditional=False),
        GuidanceConfig("poisson", (), NetworkConfig(8, 2, 1.0, "ecg"), TINY, precision="bf16", diagnostics=False),
    ],
)
def test_json_and_back(config: GuidanceConfig) -> None:
    assert GuidanceConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_names_stand_for_objects() -> None:
    assert GuidanceConfig("ratio_mse", ["consistency", "cycle"]) == GuidanceConfig(
        RatioMSE(), (Consistency(1.0), Cycle(1.0))
    )
    assert GuidanceConfig(regularizers="cycle") == GuidanceConfig(regularizers=(Cycle(),))


def test_what_none_stands_for() -> None:
    with_denoiser = GuidanceConfig().resolved(TINY, 3, has_denoiser=True)
    assert with_denoiser == GuidanceConfig(regularizers=(Consistency(1.0),), training=TINY, num_classes=3)
    assert GuidanceConfig().resolved(TINY, 0, has_denoiser=False).terms == (Logistic(),)
    own = GuidanceConfig(regularizers=(Cycle(0.0),), training=TrainingConfig())
    assert own.resolved(TINY, 0, has_denoiser=True) == GuidanceConfig(
        regularizers=(Cycle(0.0),), training=TrainingConfig(), num_classes=0
    )
    assert own.terms == (Logistic(),)  # The weight 0 leaves it out.
    assert own.needs == {"target_log_h"}


def test_the_config_of_a_fit_is_what_was_used() -> None:
    fit = fit_guidance(torch.randn(20, 2), torch.randn(6, 2), config=GuidanceConfig(training=TINY, diagnostics=False))
    used = GuidanceConfig.from_dict(json.loads(json.dumps(fit.config)))
    assert used == GuidanceConfig(regularizers=(), training=TINY, num_classes=0, diagnostics=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "logistc"}, "loss must be one of log_mse, logistic, poisson, ratio_mse; .*did you mean 'logistic'"),
        ({"loss": 5}, "loss must be one of"),
        ({"loss": {"name": "logistic", "smooth": 0.1}}, "entry of logistic must be one of smoothing; .* 'smoothing'"),
        ({"regularizers": ["cicle"]}, "regularizer must be one of consistency, cycle; .*did you mean 'cycle'"),
        ({"regularizers": [Cycle(), Cycle(2.0)]}, "regularizers must be different ones, got cycle, cycle"),
        ({"network": {"width": 3}}, "network must be a NetworkConfig, got dict"),
        ({"training": 5}, "training must be a TrainingConfig, got int"),
        ({"num_classes": -1}, "num_classes must be an integer >= 0"),
        ({"time_distribution": "log"}, "time_distribution must be one of"),
        ({"precision": "tf32"}, "precision must be one of"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GuidanceConfig(**arguments)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Cycle(-1.0), "cycle must be finite and in"),
        (lambda: Consistency(float("nan")), "consistency must be finite"),
        (lambda: Logistic(smoothing=0.6), "smoothing must be finite and in"),
        (lambda: NetworkConfig(width=0), "width must be an integer >= 1"),
        (lambda: NetworkConfig(alpha_power=-1.0), "alpha_power must be"),
        (lambda: NetworkConfig(stem="eeg"), "stem must be one of ecg, none; .*did you mean 'ecg'"),
        (lambda: GuidanceConfig.from_dict({"consistancy": 1.0}), "entry of the configuration must be one of"),
        (lambda: GuidanceConfig.from_dict({"network": {"widht": 3}}), "entry of network .*did you mean 'width'"),
        (lambda: GuidanceConfig.from_dict({"training": {"steps": 0}}), "steps must be an integer >= 1"),
    ],
)
def test_bad_parts_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# -------------------------------------------------------------------------------------------- of one's own


@pytest.fixture
def own_terms(monkeypatch: pytest.MonkeyPatch) -> tuple[type[Loss], type[Regularizer]]:
    """A loss and a regularizer, each one class, and nothing else anywhere; forgotten after the test."""
    monkeypatch.setattr(Loss, "known", dict(LOSSES))
    monkeypatch.setattr(Regularizer, "known", dict(REGULARIZERS))

    @dataclass(frozen=True)
    class Huber(Loss):
        """Huber's loss of the log ratio."""

        name = "huber"
        needs = ("source_log_ratio",)
        delta: float = 1.0

        def __call__(self, batch: TransferBatch) -> Tensor:
            difference = batch.source_log_h - batch.source_log_ratio
            return torch.nn.functional.huber_loss(difference, torch.zeros_like(difference), delta=self.delta)

    class Flat(Regularizer):
        """The squared norm of the guidance gradient at the target samples."""

        name = "flat"
        needs = ("target_gradient",)

        def __call__(self, batch: TransferBatch) -> Tensor:
            return self.weight * batch.target_gradient.square().sum(1).mean()

    return Huber, Flat


def test_a_loss_and_a_regularizer_of_ones_own(own_terms: tuple[Any, Any]) -> None:
    """Known by name as soon as they are defined: to a fit, to JSON and to messages."""
    loss, regularizer = own_terms
    x, y = torch.randn(40, 2), torch.randn(10, 2) + 1
    configs = [
        GuidanceConfig("huber", ["flat"], training=TINY, diagnostics=False),
        GuidanceConfig(loss(1.0), [regularizer(1.0)], training=TINY, diagnostics=False),
        GuidanceConfig(loss(1.0), [regularizer(0.0)], training=TINY, diagnostics=False),
    ]
    fits = [fit_guidance(x, y, config=config) for config in configs]
    weights = [torch.cat([p.detach().flatten() for p in fit.guidance.parameters()]) for fit in fits]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert fits[0].config["loss"] == {"name": "huber", "delta": 1.0}
    assert fits[0].config["regularizers"] == [{"name": "flat", "weight": 1.0}]
    assert GuidanceConfig.from_dict(fits[0].config).terms == (loss(1.0), regularizer(1.0))
    with pytest.raises(ValueError, match="loss must be one of huber, log_mse, logistic, poisson, ratio_mse"):
        GuidanceConfig("none of them")
    with pytest.raises(ValueError, match="regularizer must be one of consistency, cycle, flat"):
        GuidanceConfig(regularizers=["none of them"])


def test_what_a_term_needs_is_given_and_nothing_else(own_terms: tuple[Any, Any]) -> None:
    class Forgetful(Regularizer):
        name = "forgetful"

        def __call__(self, batch: TransferBatch) -> Tensor:
            return batch.target_epsilon.mean()

    denoiser = exact_denoiser(paper_source(), NoiseSchedule.vp_linear())
    config = GuidanceConfig("huber", ["forgetful"], training=TINY, diagnostics=False)
    with pytest.raises(AttributeError, match="a term that reads it must list 'target_epsilon' in its needs"):
        fit_guidance(torch.randn(40, 2), torch.randn(10, 2), config=config, denoiser=denoiser)
    with pytest.raises(ValueError, match="needs of Misspelt must be one of .*did you mean 'target_log_h'"):

        class Misspelt(Regularizer):
            name = "misspelt"
            needs = ("target_log_hh",)


def test_the_command_line_lists_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["transfer", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"{', '.join(LOSSES)} (logistic)" in text
    for name, kind in REGULARIZERS.items():
        assert f"weight of the {name} term ({kind.default:g})" in text
