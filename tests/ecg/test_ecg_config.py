"""The configuration of an ECG transfer, and how it divides the records."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ecg_files import make_folders, write_ptbxl

from tgdp_fast.cli import main as cli
from tgdp_fast.ecg.cohorts import load_cohorts
from tgdp_fast.ecg.config import PRESETS, ConfigError, load_config, to_dict
from tgdp_fast.ecg.records.leads import STORED_LEADS
from tgdp_fast.ecg.records.statements import STATEMENTS
from tgdp_fast.sampling.config import SamplingConfig

# ------------------------------------------------------------------------------------------------ configuration


def test_presets_are_what_they_say() -> None:
    paper = PRESETS["paper"]
    backbone, guidance = paper.backbone, paper.guidance
    assert (backbone.num_res_layers, backbone.res_channels, backbone.diffusion_steps) == (36, 256, 200)
    assert (paper.vanilla.steps, paper.vanilla.learning_rate) == (100_000, 2e-4)
    assert (paper.fine_tune.steps, paper.fine_tune.learning_rate) == (50_000, 2e-5)
    assert (guidance.width, guidance.depth) == (512, 4)
    assert (guidance.training.steps, guidance.training.batch_size) == (50_000, 128)
    schedule = backbone.schedule()
    assert float(schedule.alpha(199.0)) ** 2 == pytest.approx(np.prod(1 - np.linspace(1e-4, 0.02, 200)), rel=1e-9)
    assert load_config(None).preset == "smoke"
    for name, preset in PRESETS.items():
        assert load_config(None, preset=name) == preset


def test_a_file_changes_a_preset(config: Path) -> None:
    found = load_config(config, sampling__num=7, data__target=None)
    assert found.preset == "smoke"
    assert found.data.source == str(config.parent / "ptbxl")
    assert (found.sampling.num, found.sampling.steps) == (7, 3)
    assert found.evaluation.classifier.blocks == (1, 1)
    assert found.guidance.loss == PRESETS["smoke"].guidance.loss
    assert json.loads(json.dumps(to_dict(found)))["evaluation"]["classifier"]["blocks"] == [1, 1]


def test_a_file_may_say_what_the_package_samples_with(tmp_path: Path) -> None:
    """Settings of a sampler are flat entries of [sampling]; what is not said is written down as before."""
    path = tmp_path / "some.toml"
    path.write_text("[sampling]\ninterval = [10.0, 80.5]\nsolver = 'ddim'\neta = 0.5\ngradient_norm_limit = 2\nnum = 5")
    found = load_config(path).sampling
    assert isinstance(found, SamplingConfig)
    assert (found.interval, found.eta, found.gradient_norm_limit, found.num) == ((10.0, 80.5), 0.5, 2.0, 5)
    assert to_dict(found)["interval"] == [10.0, 80.5]
    assert to_dict(PRESETS["smoke"].sampling) == {
        "num": 64,
        "solver": "dpmpp_2m",
        "steps": 10,
        "spacing": "logsnr",
        "scale": 1.0,
        "gradient_norm_limit": 0.0,
        "prior": "gaussian",
        "precision": "fp32",
        "seed": 0,
        "batch_size": 16,
    }
    # Names and values enter the signatures of stages: others would train a kept folder again.
    assert to_dict(PRESETS["smoke"].guidance) == {
        "domain_classifier": "features",
        "conditional": True,
        "loss": "poisson",
        "consistency": 0.0,
        "cycle": 0.0,
        "width": 128,
        "depth": 4,
        "alpha_power": 2.0,
        "time_distribution": "uniform",
        "training": {
            "steps": 200,
            "batch_size": 32,
            "learning_rate": 2e-3,
            "weight_decay": 1.0,
            "ema_decay": 0.98,
            "warmup": 50,
            "gradient_clip": 1.0,
        },
    }
    path.write_text("[backbone]\ncheckpoint_units = 'standardised'")  # As earlier versions spelled it.
    assert load_config(path).backbone.checkpoint_units == "standardized"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("preset = 'papper'", "preset must be one of paper, small, smoke; got 'papper' .did you mean 'paper'"),
        ("[sampling]\nsolvr = 'ddim'", "entry of .sampling. must be one of .*; got 'solvr' .did you mean 'solver'"),
        ("[sampling]\nsolver = 'dpm'", "sampling.solver must be one of"),
        ("[sampling]\nsteps = 1.5", "sampling.steps must be of type int, got 1.5"),
        ("[sampling]\nnum = 1", "sampling.num must be an integer >= 2, got 1"),
        ("sampling = 3", "sampling must be a table, written as .sampling., got 3"),
        ("[guidance.training]\nsteps = 0", "guidance.training.steps must be an integer >= 1"),
        ("[evaluation.classifier]\nblocks = ['a']", "evaluation.classifier.blocks must be a list of int, got"),
        ("[sampling]\nprecision = 'bf16x3'", "sampling.precision must be one of bf16, fp16, fp32; got 'bf16x3'"),
        ("[sampling]\ninterval = [3.0]", "sampling.interval must be"),
        ("[sampling]\nclamp = 'x'", "sampling.clamp must be"),
        ("methods = ['source']", "methods must be different ones of source, vanilla, fine_tune, tgdp, tgdp among them"),
        ("[data", "is no TOML file"),
    ],
)
def test_what_a_file_must_not_say(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path)
    assert "bad.toml" in str(error.value)


def test_a_configuration_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ecg", "run", "--config", str(tmp_path / "no.toml"), "--out", str(tmp_path / "out")]) == 2
    assert "no.toml cannot be read: No such file" in capsys.readouterr().err
    assert cli.main(["ecg", "run", "--out", str(tmp_path / "out"), "--quiet"]) == 2
    assert "--source DIR (or data.source in the file of --config) must be given" in capsys.readouterr().err
    arguments = ["--source", str(tmp_path), "--out", str(tmp_path / "out"), "--quiet"]
    assert cli.main(["ecg", "run", *arguments]) == 2
    assert "--target DIR (or data.target in the file of --config) must be given" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------ cohorts


def test_cohorts_share_no_record_and_no_statistics(config: Path, tmp_path: Path) -> None:
    data = load_config(config).data
    cohorts = load_cohorts(data, tmp_path)
    assert len(cohorts.target) == len(cohorts.test) == 4
    assert not set(cohorts.target.names) & set(cohorts.test.names)
    assert cohorts.source.leads == cohorts.target.leads == STORED_LEADS
    assert cohorts.source.vocabulary == STATEMENTS
    assert cohorts.target.statements == cohorts.test.statements == ["AFIB", "NORM"]
    assert not set(cohorts.target.patients) & set(cohorts.test.patients)
    assert cohorts.source.signals.shape[1:] == cohorts.test.signals.shape[1:] == (8, 120)
    # Folds 9 and 10 are nobody's here: 12 records of 6 patients are in folds 1 to 6.
    assert len(cohorts.source) == 12
    source = cohorts.source.signals.astype(np.float64)
    assert np.allclose(cohorts.standardizer.mean.numpy()[:, 0], source.mean(axis=(0, 2)), rtol=1e-6, atol=1e-9)
    assert np.allclose(cohorts.standardizer.std.numpy()[:, 0], source.std(axis=(0, 2)), rtol=1e-6)


def test_folds_nine_and_ten_do_not_train(tmp_path: Path) -> None:
    make_folders(tmp_path)
    write_ptbxl(tmp_path / "ptbxl", 20, seconds=1.2)
    assert len(load_cohorts(load_config(tmp_path / "tiny.toml").data, tmp_path / "cache").source) == 16


def test_a_folder_that_is_not_there_is_named_before_anything_is_read(config: Path, tmp_path: Path) -> None:
    data = load_config(config, data__target=str(tmp_path / "nowhere")).data
    with pytest.raises(
        ValueError, match=r"--target .data.target.: path must be a folder of records, but .*nowhere does not"
    ):
        load_cohorts(data, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_too_few_target_records(config: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"data.target: 8 usable records cannot be divided into 7 that methods may see"
    ):
        load_cohorts(load_config(config, data__least_target=7).data, tmp_path)
