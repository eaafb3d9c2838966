"""TransferModel: two arrays in any units to samples, saving, loading, resuming stage by stage."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tgdp_fast import (
    CheckpointError,
    Cycle,
    Denoiser,
    EmpiricalPrior,
    GaussianPrior,
    GuidanceConfig,
    NetworkConfig,
    NoiseSchedule,
    SamplingConfig,
    TrainingConfig,
    TransferModel,
)
from tgdp_fast.runtime import arrays as runtime_arrays
from tgdp_fast.runtime.arrays import CheckedArray
from tgdp_fast.runtime.stages import Stages

TINY = TrainingConfig(steps=8, batch_size=16, ema_decay=0.5, warmup=1)


def arrays(count: int = 60, target: int = 12) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    scale, offset = np.array([1000.0, 0.01]), np.array([5000.0, -3.0])
    return (
        (offset + scale * random.standard_normal((count, 2))).astype(np.float32),
        (offset + scale * (0.5 + random.standard_normal((target, 2)))).astype(np.float32),
    )


def fit(**arguments: Any) -> TransferModel:
    source, target = arrays()
    config = arguments.pop("config", GuidanceConfig(training=TINY))
    return TransferModel.fit(source, target, config, **{"denoiser_training": TINY, **arguments})


@pytest.mark.slow(ci=True)
def test_samples_come_in_the_units_of_the_data() -> None:
    source, target = arrays(2000, 200)
    settings = TrainingConfig(steps=400, batch_size=256, learning_rate=2e-3, weight_decay=0.1, ema_decay=0.99)
    model = TransferModel.fit(source, target, GuidanceConfig(training=settings), denoiser_training=settings)
    drawn = model.sample(3000, seed=1)
    # 200 samples place the target's mean to 0.07 standard deviations; the fit adds about as much.
    assert np.allclose(drawn.mean(0), target.mean(0), atol=0.3 * source.std(0))
    assert np.allclose(model.sample(3000, seed=1, guided=False).mean(0), source.mean(0), atol=0.2 * source.std(0))


def test_save_and_load_draw_the_same_samples(tmp_path: Path) -> None:
    model = fit()
    model.save(tmp_path / "model")
    loaded = TransferModel.load(tmp_path / "model")
    assert np.array_equal(model.sample(9, seed=3, steps=4), loaded.sample(9, seed=3, steps=4))
    assert loaded.signature() == model.signature()
    assert loaded.diagnostics["auc"] == pytest.approx(model.diagnostics["auc"])
    assert loaded.config["loss"]["name"] == "logistic"


def test_a_plain_denoiser_is_not_a_transfer_model(tmp_path: Path) -> None:
    fit().denoiser.save(tmp_path / "d")
    with pytest.raises(CheckpointError, match="denoiser"):
        TransferModel.load(tmp_path / "d")


def test_an_existing_model_lends_its_denoiser_and_its_units() -> None:
    first = fit()
    source, target = arrays()
    second = TransferModel.fit(source, target[::-1].copy(), GuidanceConfig(training=TINY), denoiser=first)
    assert second.denoiser is first.denoiser and second.standardizer is first.standardizer  # noqa: PT018
    plain = TransferModel.fit(source, target, GuidanceConfig(training=TINY), denoiser=first.denoiser)
    assert np.array_equal(plain.standardizer.apply(source), source)


class KilledError(Exception):
    pass


def test_finished_stages_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tgdp_fast.fit.model as module

    whole = fit(seed=5)
    real_fit = module.fit_guidance

    def dying(*_: Any, **__: Any) -> Any:
        raise KilledError

    monkeypatch.setattr(module, "fit_guidance", dying)
    with pytest.raises(KilledError):
        fit(seed=5, work_dir=tmp_path / "work")
    monkeypatch.setattr(module, "fit_guidance", real_fit)
    monkeypatch.setattr(module, "train_denoiser", dying)
    resumed = fit(seed=5, work_dir=tmp_path / "work")
    assert resumed.signature() == whole.signature()
    # Everything is there now; other data are noticed, and the source denoiser is trained anew.
    monkeypatch.setattr(module, "fit_guidance", dying)
    assert fit(seed=5, work_dir=tmp_path / "work").signature() == whole.signature()
    with pytest.raises(KilledError):
        fit(seed=6, work_dir=tmp_path / "work")


def test_a_foreign_network_resumes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tgdp_fast.fit.model as module

    class Foreign(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.layer(x)
            return result

    denoiser = Denoiser(Foreign(), NoiseSchedule.cosine())
    first = fit(denoiser=denoiser, work_dir=tmp_path)
    monkeypatch.setattr(module, "fit_guidance", None)
    assert fit(denoiser=denoiser, work_dir=tmp_path).signature() == first.signature()
    assert all(p.requires_grad for p in denoiser.parameters())  # Frozen by us, not for its owner.


@pytest.mark.parametrize(
    "change",
    [
        {"schedule": NoiseSchedule.cosine()},
        {"config": GuidanceConfig(regularizers=(Cycle(0.5),), training=TINY)},
        {"denoiser_training": TrainingConfig(steps=9)},
    ],
)
def test_stages_of_other_settings_are_not_used(tmp_path: Path, change: dict[str, Any]) -> None:
    fit(work_dir=tmp_path)
    assert fit(work_dir=tmp_path, **change).signature() == fit(**change).signature()


def test_files_of_the_user_in_the_work_folder_survive(tmp_path: Path) -> None:
    (tmp_path / "guidance").mkdir()
    (tmp_path / "guidance" / "notes.txt").write_text("mine")
    (tmp_path / "other.txt").write_text("mine")
    with pytest.raises(ValueError, match="notes.txt"):
        fit(work_dir=tmp_path)
    assert (tmp_path / "guidance" / "notes.txt").read_text() == "mine"
    (tmp_path / "guidance" / "notes.txt").unlink()
    fit(work_dir=tmp_path)
    Stages(tmp_path).remove("denoiser", "guidance")
    assert [p.name for p in tmp_path.iterdir()] == ["other.txt"]


def test_guided_and_unguided_files_do_not_mix(tmp_path: Path) -> None:
    model = fit()
    guided = model.sample_to_file(tmp_path / "x.npy", 5, steps=3)
    plain = model.sample_to_file(tmp_path / "x.npy", 5, steps=3, guided=False)
    assert np.allclose(plain, model.sample(5, steps=3, guided=False), rtol=1e-4)
    assert not np.allclose(plain, guided, rtol=1e-4)


def test_signatures_know_the_settings() -> None:
    model = fit()
    before = model.signature()
    model.guidance.alpha_power = 0.0
    assert model.signature() != before


def test_stages_survive_damage(tmp_path: Path) -> None:
    def build(_: Path | None) -> Denoiser:
        return fit().denoiser

    stages = Stages(tmp_path)
    stages.run("denoiser", "a", build, Denoiser.save, Denoiser.load)
    (tmp_path / "denoiser" / "model.safetensors").write_bytes(b"half")
    again = stages.run("denoiser", "a", build, Denoiser.save, Denoiser.load)
    assert isinstance(again, Denoiser)
    assert isinstance(Denoiser.load(tmp_path / "denoiser"), Denoiser)


def test_conditional_model_and_file(tmp_path: Path) -> None:
    labels = {"source_labels": np.arange(60) % 3, "target_labels": np.arange(12) % 2}
    model = fit(**labels)
    assert model.denoiser.num_classes == 3
    drawn = model.sample_to_file(tmp_path / "x.npy", 5, labels=[0, 1, 2, 0, 1], steps=3)
    assert np.array_equal(np.load(tmp_path / "x.npy"), drawn)
    assert np.allclose(model.sample(5, labels=torch.tensor([0, 1, 2, 0, 1]), steps=3), drawn, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": GuidanceConfig(network=NetworkConfig(stem="ecg"))}, "event_shape must be"),
        ({"config": TINY}, "config must be a GuidanceConfig, got TrainingConfig"),
        ({"seed": -1}, "seed must be"),
        ({"denoiser_training": {"steps": 3}}, "denoiser_training must be a TrainingConfig, got dict"),
        ({"denoiser": object()}, "denoiser must be a Denoiser, .* got object"),
        ({"denoiser": torch.nn.Linear(2, 2)}, "denoiser must be a Denoiser, .* got Linear"),
        ({"device": "gpu"}, "device must be one that torch has here .* got 'gpu'"),
        ({"source_labels": np.zeros(60, int)}, "source_labels and target_labels must be given together"),
        ({"source_labels": np.zeros(59, int), "target_labels": np.zeros(12, int)}, "source_labels.*59.*60"),
    ],
)
def test_bad_arguments_are_refused_before_training(
    change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tgdp_fast.fit.model.train_denoiser", None)
    with pytest.raises(ValueError, match=message):
        fit(**change)


def test_shapes_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tgdp_fast.fit.model.train_denoiser", None)
    source, target = arrays()
    with pytest.raises(ValueError, match="target"):
        TransferModel.fit(source, target[:, :1])
    other = Denoiser(torch.nn.Linear(3, 3), NoiseSchedule.cosine())
    other.network.event_shape = (3,)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="denoiser works on samples of shape \\(3,\\)"):
        TransferModel.fit(source, target, denoiser=other)


def test_guided_samples_start_from_the_prior_which_is_saved(tmp_path: Path) -> None:
    model = fit(config=GuidanceConfig(training=TINY, diagnostics=False))
    before, guided, plain = model.signature(), model.sample(5, steps=3), model.sample(5, steps=3, guided=False)
    model.prior = GaussianPrior.fit(3.0 + np.random.default_rng(0).standard_normal((20, 2)))
    model.save(tmp_path / "model")
    loaded = TransferModel.load(tmp_path / "model")
    assert loaded.signature() == model.signature() != before
    drawn = loaded.sample(5, steps=3)
    assert np.array_equal(drawn, model.sample(5, steps=3))
    assert np.allclose(loaded.sample_to_file(tmp_path / "x.npy", 5, steps=3), drawn, rtol=1e-4)
    assert not np.allclose(drawn, guided, rtol=1e-4)
    assert np.array_equal(loaded.sample(5, steps=3, prior=None), guided)
    assert np.array_equal(loaded.sample(5, steps=3, guided=False), plain)


@pytest.mark.parametrize(
    ("name", "value"),
    [("diagnostics", {"warnings": 5}), ("diagnostics", {"outside_fraction": "all"}), ("config", {"ecg": 1})],
)
def test_a_file_whose_warnings_cannot_be_read_is_refused(tmp_path: Path, name: str, value: object) -> None:
    model = fit(config=GuidanceConfig(training=TINY, diagnostics=False))
    setattr(model, name, value)
    model.save(tmp_path / "m")
    with pytest.raises(CheckpointError, match="does not describe a TransferModel"):
        TransferModel.load(tmp_path / "m")


def test_a_prior_in_the_units_of_the_data_is_mentioned(tmp_path: Path) -> None:
    model = fit(config=GuidanceConfig(training=TINY, diagnostics=False))
    raw = 500.0 + 20.0 * np.random.default_rng(0).standard_normal((50, 2))
    for prior in (GaussianPrior.fit(raw), EmpiricalPrior(raw)):
        with pytest.warns(UserWarning, match="fit it to model.standardizer.apply"):
            model.sample(2, steps=1, prior=prior)
        with pytest.warns(UserWarning, match="fit it to model.standardizer.apply"):
            model.sample_to_file(tmp_path / "x.npy", 2, steps=1, prior=prior)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.sample(2, steps=1, prior=GaussianPrior.fit((raw - 500.0) / 20.0))


def test_arrays_are_checked_and_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Source, target and both in standardized coordinates: four arrays, of which two tell stages apart."""
    scanned: list[tuple[int, ...]] = []
    hashed: list[tuple[int, ...]] = []
    real_check, real_digest = runtime_arrays._checked_samples, CheckedArray.digest.func

    def check(name: str, array: np.ndarray, checked: bool, *requirements: Any) -> Any:
        if not checked:
            scanned.append(np.shape(array))
        return real_check(name, array, checked, *requirements)

    class Counted:
        def __get__(self, instance: CheckedArray, owner: type) -> str:
            if "digest" not in vars(instance):
                hashed.append(instance.values.shape)
                vars(instance)["digest"] = real_digest(instance)
            return str(vars(instance)["digest"])

    monkeypatch.setattr(runtime_arrays, "_checked_samples", check)
    monkeypatch.setattr(CheckedArray, "digest", Counted())
    fit(work_dir=tmp_path)
    assert sorted(scanned) == [(12, 2), (12, 2), (60, 2), (60, 2)]
    assert sorted(hashed) == [(12, 2), (60, 2)]
    hashed.clear()
    fit()  # Nothing is kept, so nothing is told apart.
    assert sorted(hashed) == []


def test_a_sampler_is_kept_for_equal_settings() -> None:
    model = fit(config=GuidanceConfig(training=TINY, diagnostics=False))
    config = SamplingConfig(steps=3)
    sampler = model.sampler(config)
    assert model.sampler(steps=3) is sampler
    drawn = model.sample(5, config, seed=1)
    assert model.sampler(SamplingConfig(), steps=3) is sampler
    assert np.array_equal(drawn, model.sample(5, steps=3, seed=1))
    assert np.array_equal(drawn, model.standardizer.invert(sampler.draw(5, seed=1).numpy()))
    assert model.sampler(steps=3, guided=False) is not sampler
    # Networks that are replaced are other ones; a copy has a sampler of its own.
    model.guidance = copy.deepcopy(model.guidance)
    assert model.sampler(steps=3).guidance is model.guidance
    other = copy.deepcopy(model)
    assert np.array_equal(other.sample(5, steps=3, seed=1), drawn)
    assert other.sampler(steps=3).guidance is other.guidance
    # A function is called again: its values may have changed.
    scales = [1.0]

    def scale_of(t: float) -> float:
        return scales[0]

    model.sample(5, steps=3, seed=1, scale=scale_of)
    scales[0] = 0.0
    changed = model.sample(5, steps=3, seed=1, scale=scale_of)
    assert np.array_equal(changed, model.sample(5, steps=3, seed=1, scale=0.0))


def test_samples_are_known_by_the_model_that_drew_them() -> None:
    model = fit(config=GuidanceConfig(training=TINY, diagnostics=False))
    config = SamplingConfig(steps=3)
    drawn = model.sample(300, config, seed=1)
    assert model.reproduces(drawn, 300, config, seed=1)
    assert model.reproduces(drawn, 300, seed=1, steps=3, batch_size=7)
    assert not model.reproduces(drawn, 300, config, seed=2)
    assert not model.reproduces(drawn, 299, config, seed=1)
    assert not model.reproduces(drawn, 300, config, seed=1, guided=False)


def test_offsets_that_float32_loses_survive_a_transfer() -> None:
    random = np.random.default_rng(0)
    source = np.stack([random.normal(size=400), 1.7e9 + 5.0 * random.normal(size=400)], axis=1)
    target = np.repeat(source[:1], 5, axis=0)  # Its own spread is none, but the source's standardization tells it.
    config = GuidanceConfig(network=NetworkConfig(width=8, depth=1), training=TINY)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*float32.*")
        model = TransferModel.fit(source, target, config, denoiser_training=TINY)
    z = model.standardizer.apply(source)
    assert np.allclose(z.std(0), 1.0)
    assert np.allclose(z[:, 1], (source[:, 1] - source[:, 1].mean()) / source[:, 1].std(), atol=1e-6)
    drawn = model.sample(50, steps=3)
    assert drawn.dtype == np.float64
    inside = model.sampler(steps=3).draw(50).numpy()
    assert np.allclose((drawn - model.standardizer.mean.numpy()) / model.standardizer.std.numpy(), inside, atol=1e-5)
