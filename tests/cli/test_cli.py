"""The command line as a user runs it: files in, files and text out, errors without tracebacks, resume."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tgdp_fast import Consistency, Cycle, GuidanceConfig, TransferModel
from tgdp_fast.cli.main import main
from tgdp_fast.fit.losses import Poisson
from tgdp_fast.fit.model import OutOfReachWarning
from tgdp_fast.runtime.locks import folder_lock

pytestmark = pytest.mark.usefixtures("quick_ratio", "quick_guidance")


@pytest.fixture
def quick_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guidance fits of a few steps: these tests are about files and messages."""
    import tgdp_fast.fit.guidance as transfer
    from tgdp_fast import TrainingConfig

    settings = TrainingConfig(steps=10, batch_size=16, ema_decay=0.5, warmup=1)
    monkeypatch.setattr(transfer, "default_training", lambda count: settings)


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
    (tmp_path / "link.npy").symlink_to(tmp_path / "s.npy")
    (tmp_path / "d").mkdir()
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
        ({"loss": "mse"}, "--loss must be one of log_mse, logistic, poisson, ratio_mse"),
        ({"consistency": "-1"}, "--consistency must be"),
        ({"cycle": "nan"}, "--cycle must be"),
        ({"precision": "fp8"}, "--precision must be one of"),
        ({"backend": "tpu"}, "--backend must be one of"),
        ({"backend": "cuda", "source": "missing.npy"}, "backend 'cuda' cannot serve operator"),
        ({"scale": "nan"}, "--scale must be finite, got nan"),
        ({"save": "no/such/model"}, "--save must lie in an existing folder"),
        ({"save": "s.npy"}, "--save: "),
        ({"denoiser": "nothing"}, "--denoiser: "),
        ({"denoiser": "s.npy"}, "--denoiser: "),
        ({"out": "s.npy"}, "--out must be another file than --source, which it would overwrite"),
        ({"out": "../{name}/t.npy"}, "--out must be another file than --target"),
        ({"out": "link.npy"}, "--out must be another file than --source"),
        ({"out": "x_labels.npy", "labels": "x_labels.npy"}, "--out must be another file than --labels"),
        ({"out": "d/x.npy", "save": "d"}, "--out must lie outside the model folder --save"),
        ({"out": "d/x.npy", "denoiser": "d"}, "--out must lie outside the model folder --denoiser"),
        ({"denoiser": "d", "save": "d"}, "--save must be another folder than --denoiser"),
        ({"out": "no/such/x.npy"}, "--out must lie in an existing folder"),
        ({"train_steps": "0"}, "--train-steps must be"),
        ({"device": "tpu9"}, "--device must be one that torch has here"),
        ({"seed": str(2**64)}, "--seed must be below 2^64"),
    ],
)
def test_bad_input(folder: Path, changes: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.iterdir())
    changes = {name: value.format(name=folder.name) for name, value in changes.items()}
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
    options = {"loss": "poisson", "consistency": "0.25", "cycle": "0.5", "seed": str(2**64 - 1)}
    assert main(transfer(folder, save="model", **options)) == 0
    config = TransferModel.load(folder / "model").config
    assert config.pop("seed") == 2**64 - 1
    assert GuidanceConfig.from_dict(config).terms == (Poisson(), Consistency(0.25), Cycle(0.5))


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
    assert "MODEL_DIR: " in (text := capsys.readouterr().err)
    assert "pickle" in text
    assert main(transfer(folder, save="model")) == 0
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert main(["sample", str(folder / "model"), *command]) == 2
    assert "model.safetensors" in capsys.readouterr().err
    assert not (folder / "y.npy").exists()


def test_an_interrupted_transfer_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tgdp_fast.fit.model as module

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


def test_messages_of_an_interrupt_and_a_failure_say_what_was_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import tgdp_fast.fit.model as module

    def raising(error: type[BaseException]) -> Any:
        def function(*_: object, **__: object) -> None:
            raise error("stop")

        return function

    with monkeypatch.context() as patch:
        patch.setattr(module, "train_denoiser", raising(KeyboardInterrupt))
        assert main(transfer(folder)) == 130
        assert capsys.readouterr().err == "tgdp-fast: interrupted; nothing was kept\n"
        assert not (folder / "x.npy.work").exists()
    with monkeypatch.context() as patch:
        patch.setattr(module, "fit_guidance", raising(ArithmeticError))
        assert main(transfer(folder, save="model")) == 1
        kept = f"finished work is kept in {folder / 'x.npy.work'}: the same command goes on from there, or delete it"
        assert capsys.readouterr().err == f"tgdp-fast: error: stop\ntgdp-fast: {kept}\n"
    assert main(transfer(folder, save="model")) == 0
    capsys.readouterr()

    command = ["sample", str(folder / "model"), "--num", "9000", "--steps", "1", "--out", str(folder / "y.npy")]
    with monkeypatch.context() as patch:
        patch.setattr("tgdp_fast.sampling.sampler.normal", raising(KeyboardInterrupt))
        assert main([*command, "--quiet"]) == 130
        assert capsys.readouterr().err == "tgdp-fast: interrupted; nothing was kept\n"
    with monkeypatch.context() as patch:
        patch.setattr(
            "tgdp_fast.sampling.blocks.save_array", interrupt_after(2, "tgdp_fast.sampling.blocks.save_array")
        )
        assert main([*command, "--quiet"]) == 130
        assert f"interrupted; finished work is kept in {folder / 'y.npy.partial'}" in capsys.readouterr().err


def interrupt_after(calls: int, name: str) -> Any:
    """The function ``name``, but for a Ctrl-C at its call number ``calls``."""
    import importlib

    module, attribute = name.rsplit(".", 1)
    function = getattr(importlib.import_module(module), attribute)
    count = itertools.count(1)

    def wrapped(*arguments: object) -> object:
        if next(count) == calls:
            raise KeyboardInterrupt
        return function(*arguments)

    return wrapped


def test_ctrl_c_while_torch_loads_is_one_line(tmp_path: Path) -> None:
    """A torch that presses Ctrl-C; in the way that the installed command starts."""
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from tgdp_fast.cli.main import main\nsys.exit(main(['info']))"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "tgdp-fast: interrupted; nothing was kept\n")


def test_help_names_every_solver_without_torch() -> None:
    from tgdp_fast.diffusion.solvers import SOLVERS

    code = "import sys; sys.modules['torch'] = None\nfrom tgdp_fast.cli.main import main\nmain(['sample', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(SOLVERS) <= set(re.findall(r"\w+", done.stdout))


def test_labels_that_a_model_needs_or_does_not_take(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = {"source_labels": "s_labels.npy", "target_labels": "t_labels.npy"}
    assert main(transfer(folder, **labels, labels="x_labels.npy", save="conditional")) == 0
    assert main(transfer(folder, save="plain")) == 0
    command = ["--num", "7", "--out", str(folder / "y.npy"), "--quiet"]
    capsys.readouterr()
    assert main(["sample", str(folder / "conditional"), *command]) == 2
    assert "--labels must be given: " in (text := capsys.readouterr().err)
    assert "conditional on 2 classes; write one class (0 to 1) for all" in text
    assert "save one class index for each of the 7 samples" in text
    assert main(["sample", str(folder / "plain"), *command, "--labels", str(folder / "x_labels.npy")]) == 2
    assert "--labels must be left out" in capsys.readouterr().err
    assert main(transfer(folder, denoiser="conditional")) == 2
    assert "--labels must be given: --denoiser is conditional on 2 classes" in capsys.readouterr().err


def test_one_class_for_all_samples(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = {"source_labels": "s_labels.npy", "target_labels": "t_labels.npy"}
    assert main(transfer(folder, **labels, labels="1", save="model")) == 0
    command = ["sample", str(folder / "model"), "--num", "7", "--out", str(folder / "y.npy"), "--quiet"]
    assert main([*command, "--labels", "1"]) == 0
    expected = TransferModel.load(folder / "model").sample(7, labels=1)
    for name in ("x.npy", "y.npy"):
        assert np.allclose(np.load(folder / name), expected, rtol=1e-5)
    for wrong in ("2", "-1"):
        capsys.readouterr()
        assert main([*command, "--labels", wrong]) == 2
        assert f"--labels must be in 0..1 (2 classes), got {wrong}" in capsys.readouterr().err
    assert main([*command, "--labels", "9" * 30]) == 2
    assert "--labels must be a class index or a file" in capsys.readouterr().err


def test_samples_that_nobody_named_are_not_replaced(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert main(transfer(folder, save="model", out="samples.npy")) == 0
    transferred = np.load("samples.npy")
    command = ["sample", str(folder / "model"), "--quiet"]
    # The file holds what these would write: not an error, whatever the batches.
    for same in ([], ["--batch-size", "2"]):
        assert main([*command, "--num", "7", *same]) == 0
        assert np.allclose(np.load("samples.npy"), transferred, rtol=1e-5)
    held = (folder / "samples.npy").read_bytes()
    for other in (["--num", "6"], ["--num", "7", "--seed", "1"], ["--num", "7", "--scale", "2"]):
        capsys.readouterr()
        assert main([*command, *other]) == 2
        text = capsys.readouterr().err
        assert "--out must be given: samples.npy, the default, is there already and holds something else" in text
        assert (folder / "samples.npy").read_bytes() == held
    assert main([*command, "--num", "6", "--out", "samples.npy"]) == 0
    assert np.load("samples.npy").shape == (6, 2)
    np.save("samples.npy", np.float32(1.0))
    assert main([*command, "--num", "6"]) == 2
    (folder / "samples.npy").write_bytes(b"notes")
    assert main([*command, "--num", "6"]) == 2
    (folder / "samples.npy").unlink()

    # What was not finished goes on.
    words = [*command, "--num", "9000", "--steps", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(
            "tgdp_fast.sampling.blocks.save_array", interrupt_after(2, "tgdp_fast.sampling.blocks.save_array")
        )
        assert main(words) == 130
    assert (folder / "samples.npy.partial").is_dir()
    assert main(words) == 0
    assert np.load("samples.npy").shape == (9000, 2)
    assert not (folder / "samples.npy.partial").exists()


def test_an_empty_file_is_called_empty(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "empty.npy").touch()
    assert main(transfer(folder, source="empty.npy")) == 2
    assert f"--source: {folder / 'empty.npy'} cannot be read: the file is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sampel"], "tgdp-fast: error: .*'sampel'.*did you mean 'sample'"),
        (["ecg", "inspct"], "tgdp-fast ecg: error: .*did you mean 'inspect'"),
        (["sample", "m", "--num", "1e3"], "tgdp-fast sample: error: --num must be an integer such as 1000, got '1e3'"),
        (["sample", "m", "--num", "1", "--scale", "x"], "tgdp-fast sample: error: --scale must be a number .* got 'x'"),
        (["ecg", "run"], "tgdp-fast ecg run: error: the following arguments are required: --out"),
    ],
)
def test_wrong_words_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(message, line), line
    assert line.endswith("--help")


def test_a_backend_that_is_missing_is_told_in_words_of_the_command_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tgdp_fast.ops.registry import BackendUnavailableError

    def missing(*_: object) -> None:
        raise BackendUnavailableError("guided_step", "triton", "it is not here", ("reference",))

    monkeypatch.setattr("tgdp_fast.cli.transfer._check_backend", missing)
    assert main(["sample", str(folder / "m"), "--num", "1", "--backend", "triton", "--out", str(folder / "y.npy")]) == 1
    text = capsys.readouterr().err
    assert "Use --backend auto to take the fastest that fits" in text
    assert "backend=" not in text


def test_help_states_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    from tgdp_fast.ecg.config import PRESETS
    from tgdp_fast.fit.config import TrainingConfig

    def help_of(*words: str) -> str:
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        return " ".join(capsys.readouterr().out.split())

    text = help_of("transfer")
    assert f"training steps of the source denoiser ({TrainingConfig().steps})" in text
    for stated in ("consistency term (1)", "units of epsilon (no limit)", "at most 8192)"):
        assert stated in text
    nums = ", ".join(f"{name} {PRESETS[name].sampling.num}" for name in ("smoke", "small", "paper"))
    assert f"samples of each method (of the preset: {nums})" in help_of("ecg", "run")
    assert "threads of torch (its own choice" in help_of("bench")
    assert "141 nobody reads" in help_of()


def test_warnings_come_first_and_on_standard_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(folder / "far.npy", np.load(folder / "t.npy") + 50)
    assert main(transfer(folder, target="far.npy", save="m")) == 3
    captured = capsys.readouterr()
    assert captured.err.startswith("WARNING: do not use the samples: the target lies outside the source.")
    assert "WARNING" not in captured.out
    assert "by heart" not in captured.err
    assert np.load(folder / "x.npy").shape == (7, 2)
    assert {path.name for path in folder.iterdir() if "x.npy" in path.name} == {"x.npy"}
    # Whoever draws from the saved model is told the same; but for the source's own samples.
    again = ["sample", str(folder / "m"), "--num", "7", "--out", str(folder / "y.npy"), "--quiet"]
    assert main(again) == 0
    assert capsys.readouterr().err == captured.err
    assert main([*again, "--scale", "0"]) == 0
    assert capsys.readouterr().err == ""
    model = TransferModel.load(folder / "m")
    with pytest.warns(OutOfReachWarning, match="do not use the samples: the target lies outside the source"):
        model.sample(2, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.sample(2, steps=1)
        TransferModel.load(folder / "m").sample(2, steps=1, guided=False)


def test_progress_without_a_terminal_is_a_line_for_each_stage(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = transfer(folder)
    words.remove("--quiet")
    assert main(words) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"finished stages and, every 30 s, training states go to {folder / 'x.npy.work'} until the end"
    assert lines[1] == "source denoiser: 20 steps"
    assert lines[-2:] == ["guidance: 10 steps", "sampling: 7 samples"]


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
    command = [sys.executable, "-m", "tgdp_fast", "info"]
    assert "guided_step" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    result = subprocess.run([sys.executable, "-m", "tgdp_fast"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "COMMAND" in result.stderr


def test_output_that_nobody_reads_is_no_error() -> None:
    run = f"{sys.executable} -m tgdp_fast bench --list | head -n 1; echo status ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", run], capture_output=True, text=True, timeout=120)
    first, status = done.stdout.splitlines()
    assert first == "guided_step/1e4"
    # The list may fit into the pipe before head is gone.
    assert status in ("status 141", "status 0")
    assert done.stderr == ""
    closed = f"{sys.executable} -m tgdp_fast validate --backend reference --operators gated_activation >&-"
    done = subprocess.run(["bash", "-c", closed], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr


def test_the_log_says_why_a_backend_does_not_serve() -> None:
    code = """
import sys, torch
from tgdp_fast.cli.main import main
from tgdp_fast.ops import SolverStep, guided_step
main(["--log-level", sys.argv[1], "info", "--json"])
x = torch.zeros(1, 2, dtype=torch.float64)
guided_step(x, x, step=SolverStep([[1.0, 0.0]]))
"""
    for level, lines in (("info", 1), ("warning", 0)):
        done = subprocess.run([sys.executable, "-c", code, level], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("INFO tgdp_fast.ops.registry: operator guided_step does not use backend cpu") == lines
    done = subprocess.run(
        [sys.executable, "-m", "tgdp_fast", "--log-level", "loud", "info"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "invalid choice: 'loud'" in done.stderr


def test_several_processes_do_not_write_one_file_each(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for words in (
        transfer(folder),
        ["sample", str(folder / "model"), "--num", "3", "--out", str(folder / "y.npy")],
        ["ecg", "sample", str(folder / "model"), "--num", "3", "--out", str(folder / "y")],
        ["demo", "--out", str(folder / "y")],
        ["experiment", "gaussians", "--out", str(folder / "y")],
    ):
        before = sorted(folder.iterdir())
        assert main(words) == 2
        text = capsys.readouterr().err
        assert "this command works in one process, but torchrun started 2 (WORLD_SIZE=2)" in text
        assert text.count("\n") == 1
        assert sorted(folder.iterdir()) == before
    assert main(["ecg", "run", "--out", str(folder / "y"), "--num", "0"]) == 2  # It reads its settings.
    assert "WORLD_SIZE" not in capsys.readouterr().err


def test_a_run_that_another_has_begun_is_refused_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    owned = {
        "x.npy.work": transfer(folder),
        "x.npy.partial": transfer(folder),
        "y": ["experiment", "gaussians", "--out", str(folder / "y"), "--quiet"],
        "z": ["demo", "--out", str(folder / "z"), "--quiet"],
    }
    for place, words in owned.items():
        begun, ended = threading.Event(), threading.Event()

        def own(path: Path, begun: threading.Event = begun, ended: threading.Event = ended) -> None:
            with folder_lock(path):
                begun.set()
                ended.wait()

        thread = threading.Thread(target=own, args=(folder / place,))
        thread.start()
        begun.wait()
        try:
            assert main(words) == 1
        finally:
            ended.set()
            thread.join()
        text = capsys.readouterr().err
        assert f"is being written by process {os.getpid()}" in text
        assert text.count("\n") == 1
    assert not [path for path in folder.rglob("*") if path.name in owned or path.name == ".lock"]


@pytest.mark.parametrize("size", [2_000, 60_000, 400_000])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    resource = pytest.importorskip("resource")
    command = transfer(folder, num="10000", steps="1", save="model")
    assert main(command) == 0
    expected = (folder / "x.npy").read_bytes()
    (folder / "x.npy").unlink()
    shutil.rmtree(folder / "model")
    before = sorted(folder.rglob("*"))
    monkeypatch.chdir(folder)  # Names of the files, with the shorter paths.
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for words in (command, ["sample", "model", "--num", "10000", "--steps", "1", "--out", "y.npy", "--quiet"]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            fits = size > 100_000 and words is not command  # The samples have 80 kB, the states more.
            assert main(words) == (0 if fits else 1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if fits:
            break
        lines = capsys.readouterr().err.splitlines()
        assert re.search(r"error: \[Errno 27\] File too large: '\S+\.(safetensors|json|npy)'", lines[0])
        assert len(lines) == 1 or "finished work is kept in" in lines[1]
        assert main(words) == 0
    found = set(folder.rglob("*")) - set(before)
    assert {path.name for path in found} == {"x.npy", "y.npy", "model", "config.json", "model.safetensors"}
    assert (folder / "x.npy").read_bytes() == expected == (folder / "y.npy").read_bytes()
