"""The command line as a user runs it: files in, files and text out, errors without tracebacks, resume."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tgdp_fast import TransferModel
from tgdp_fast.cli import main

pytestmark = pytest.mark.usefixtures("quick_ratio", "quick_guidance")


@pytest.fixture
def quick_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guidance fits of a few steps: these tests are about files and messages."""
    import tgdp_fast.transfer as transfer
    from tgdp_fast import Optimisation

    settings = Optimisation(steps=10, batch_size=16, ema_decay=0.5, warmup=1)
    monkeypatch.setattr(transfer, "default_settings", lambda count: settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    np.save(tmp_path / "s.npy", random.standard_normal((80, 2)))
    np.save(tmp_path / "t.npy", random.standard_normal((12, 2)) + [1.0, 0.0])
    np.save(tmp_path / "one.npy", random.standard_normal((1, 2)))
    np.save(tmp_path / "wide.npy", random.standard_normal((12, 3)))
    np.save(tmp_path / "nan.npy", np.array([[0.0, np.nan], [1.0, 2.0]]))
    np.save(tmp_path / "s_labels.npy", np.arange(80) % 2)
    np.save(tmp_path / "t_labels.npy", np.arange(12) % 2)
    np.save(tmp_path / "x_labels.npy", np.arange(7) % 2)
    return tmp_path


def transfer(folder: Path, *extra: str, **changes: str) -> list[str]:
    options = {"--source": "s.npy", "--target": "t.npy", "--out": "x.npy", "--num": "7", "--train-steps": "20"}
    options |= {"--" + k.replace("_", "-"): v for k, v in changes.items()}
    words = ["transfer"]
    for name, value in options.items():
        words += [name, str(folder / value) if value.endswith(".npy") or name in ("--save", "--denoiser") else value]
    return [*words, "--quiet", *extra]


def test_transfer_then_sample(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(transfer(folder, save="model")) == 0
    text = capsys.readouterr().out
    assert "domain classifier, held out: AUC" in text
    assert "effective sample size" in text
    assert "7 samples of shape (2,) written to" in text
    first = np.load(folder / "x.npy")
    assert first.shape == (7, 2)
    assert first.dtype == np.float32
    assert np.isfinite(first).all()
    assert {p.name for p in folder.iterdir() if "x.npy" in p.name} == {"x.npy"}

    again = ["sample", str(folder / "model"), "--num", "7", "--out", str(folder / "y.npy"), "--quiet"]
    assert main(again) == 0
    assert np.array_equal(np.load(folder / "y.npy"), first)
    assert main([*again, "--seed", "1"]) == 0
    assert not np.allclose(np.load(folder / "y.npy"), first)
    assert main(transfer(folder, denoiser="model", out="z.npy")) == 0


def test_conditional_transfer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = {"source_labels": "s_labels.npy", "target_labels": "t_labels.npy"}
    assert main(transfer(folder, **labels, labels="x_labels.npy")) == 0
    assert main(transfer(folder, **labels)) == 2
    assert "belong together; got only --source-labels, --target-labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "nan.npy"}, "--source"),
        ({"target": "one.npy"}, "--target"),
        ({"target": "wide.npy"}, "--target"),
        ({"source": "missing.npy"}, "missing.npy"),
        ({"num": "0"}, "--num must be an integer >= 1, got 0"),
        ({"steps": "0"}, "--steps must be an integer >= 1, got 0"),
        ({"solver": "dmp"}, "--solver must be one of ddim, ddpm"),
        ({"spacing": "even"}, "--spacing must be one of karras, logsnr, uniform"),
        ({"loss": "mse"}, "loss must be one of log_mse, logistic, poisson, ratio_mse"),
        ({"precision": "fp8"}, "--precision must be one of"),
        ({"backend": "tpu"}, "--backend must be one of"),
        ({"scale": "nan"}, "--scale must be finite"),
        ({"out": "no/such/x.npy"}, "--out must lie in an existing folder"),
        ({"train_steps": "0"}, "--train-steps must be"),
        ({"device": "tpu9"}, "--device must be one that torch has here"),
        ({"seed": str(2**64)}, "--seed must be below 2^64"),
        ({"seed": str(2**63)}, "seed must be below 2^63"),
    ],
)
def test_bad_input(folder: Path, changes: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.iterdir())
    assert main(transfer(folder, **changes)) in (1, 2)
    captured = capsys.readouterr().err
    assert captured.startswith("tgdp-fast: error: ")
    assert message in captured
    assert "Traceback" not in captured
    assert sorted(folder.iterdir()) == before  # Nothing half-written.


def test_options_reach_the_sampler(folder: Path) -> None:
    assert main(transfer(folder, save="model")) == 0
    model = TransferModel.load(folder / "model")
    options = {"scale": 3.0, "steps": 4, "solver": "ddim", "spacing": "uniform", "gradient_norm_limit": 0.5, "seed": 9}
    words = [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), str(value))]
    out = ["--num", "5", "--out", str(folder / "y.npy"), "--quiet"]
    assert main(["sample", str(folder / "model"), *out, *words]) == 0
    assert np.allclose(np.load(folder / "y.npy"), model.sample(5, **options), rtol=1e-5)
    assert not np.allclose(np.load(folder / "y.npy"), model.sample(5, **{**options, "scale": 1.0}), rtol=1e-5)


def test_options_reach_the_fit(folder: Path) -> None:
    assert main(transfer(folder, save="model", loss="poisson", consistency="0.25", cycle="0.5", seed="3")) == 0
    config = TransferModel.load(folder / "model").config
    assert {k: config[k] for k in ("loss", "consistency", "cycle", "seed")} == {
        "loss": "poisson",
        "consistency": 0.25,
        "cycle": 0.5,
        "seed": 3,
    }


def test_a_folder_in_the_way_of_the_model_is_noticed_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "taken").mkdir()
    (folder / "taken" / "notes.txt").write_text("mine")
    before = sorted(folder.iterdir())
    assert main(transfer(folder, save="taken")) == 2
    assert "notes.txt" in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before


def test_labels_out_of_range_are_noticed_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(folder / "x_labels.npy", np.array([0, 1, 2, 0, 1, 0, 1]))
    before = sorted(folder.iterdir())
    labels = {"source_labels": "s_labels.npy", "target_labels": "t_labels.npy", "labels": "x_labels.npy"}
    assert main(transfer(folder, **labels)) == 2
    assert "--labels must be in 0..1 (2 classes), got 2 in row 2" in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before


def test_bad_checkpoints(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": torch.zeros(2)}, folder / "model.pt")
    command = ["--num", "3", "--out", str(folder / "y.npy"), "--quiet"]
    assert main(["sample", str(folder / "model.pt"), *command]) == 2
    assert "pickle" in capsys.readouterr().err
    assert main(transfer(folder, save="model")) == 0
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert main(["sample", str(folder / "model"), *command]) == 2
    assert "model.safetensors" in capsys.readouterr().err
    assert not (folder / "y.npy").exists()


def test_an_interrupted_transfer_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tgdp_fast.transfer_model as module

    assert main(transfer(folder, out="whole.npy")) == 0
    real = module.fit_guidance

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "fit_guidance", interrupted)
    assert main(transfer(folder)) == 130
    assert (folder / "x.npy.work").is_dir()
    monkeypatch.setattr(module, "fit_guidance", real)
    monkeypatch.setattr(module, "train_denoiser", interrupted)  # Must not be needed again.
    assert main(transfer(folder)) == 0
    assert np.array_equal(np.load(folder / "x.npy"), np.load(folder / "whole.npy"))
    assert not (folder / "x.npy.work").exists()


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backends"]["guided_step"]["reference"] == "available"
    assert facts["environment"]["torch"] == torch.__version__
    assert main(["info"]) == 0
    assert "mlp_value_and_grad" in capsys.readouterr().out


def test_as_a_module_and_without_a_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tgdp_fast", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("tgdp-fast 0.")
    result = subprocess.run([sys.executable, "-m", "tgdp_fast"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "COMMAND" in result.stderr
