"""The ECG transfer as a user runs it: stages that survive a kill, several processes, what is written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ecg_files import TINY, real_data

from tgdp_fast.cli import main as cli
from tgdp_fast.diffusion.denoiser import Denoiser
from tgdp_fast.ecg.config import PRESETS, SMOKE, load_config
from tgdp_fast.ecg.costs import Costs
from tgdp_fast.ecg.denoisers import untrained
from tgdp_fast.ecg.density_ratio import SignalDomainClassifier
from tgdp_fast.ecg.drawing import new_sampler
from tgdp_fast.ecg.evaluation import cost
from tgdp_fast.ecg.pipeline import NotComputedError, Pipeline
from tgdp_fast.ecg.preconditions import check_same_run
from tgdp_fast.ecg.records.leads import STORED_LEADS, TWELVE_LEADS
from tgdp_fast.models import SSSDECG
from tgdp_fast.runtime.checkpoint import load_checkpoint
from tgdp_fast.sampling.config import SamplingConfig


@pytest.fixture(scope="module")
def finished(config: Path) -> Path:
    """A whole run."""
    out = config.parent / "run"
    assert cli.main(["ecg", "run", "--config", str(config), "--out", str(out), "--quiet"]) == 0
    return out


# ----------------------------------------------------------------------------------------------------- the run


def test_a_run_leaves_what_it_says(finished: Path, config: Path) -> None:
    import wfdb

    found = json.loads((finished / "results.json").read_text())
    assert list(found["methods"]) == ["real", "source", "vanilla", "fine_tune", "tgdp"]
    assert found["counts"]["source records"] == 12
    for name, row in found["methods"].items():
        for interval in row["metrics"].values():
            assert 0 <= interval["value"] <= 1
            assert interval["low"] <= interval["value"] <= interval["high"] or interval["low"] is None
        assert {entry["name"] for entry in row["per_class"]} == {"AFIB", "NORM"}
        assert (row["memorisation"] is None) == (name == "real")
        assert row["quality"]["Fréchet distance"] >= 0
        assert row["beats"] == {"measured": 0, "failed": 6 if name != "real" else 4, "noise": 0}  # 1.2 s: no beats.
    assert {"source", "vanilla", "fine_tune", "tgdp", "density_ratio", "samples-tgdp"} <= set(found["costs"])
    assert found["costs"]["tgdp"]["parameters"] < found["costs"]["source"]["parameters"] * 100
    page = (finished / "report.html").read_text()
    for title in ("Real", "Source model", "Vanilla", "Fine-tuning", "TGDP"):
        assert title in page
    assert "4 test records are few" in page
    records = sorted((finished / "records" / "records").glob("*.hea"))
    assert len(records) == 6
    record = wfdb.rdrecord(str(records[0].with_suffix("")))
    assert tuple(record.sig_name) == TWELVE_LEADS
    signal = dict(zip(record.sig_name, record.p_signal.T, strict=True))
    assert np.abs(signal["I"] + signal["III"] - signal["II"]).max() < 1e-9
    manifest = json.loads((finished / "records" / "manifest.json").read_text())
    assert (manifest["solver"], manifest["scale"], manifest["seed"]) == ("dpmpp_2m", 1.0, 0)
    # The files hold what was drawn, to half a unit of 1 uV.
    drawn = load_checkpoint(finished / "stages" / "samples-tgdp", "samples")[1]["signals"][0].numpy()
    assert np.abs(signal["V3"] - drawn[STORED_LEADS.index("V3")]).max() <= 0.5e-3 + 1e-6


def test_samples_are_of_the_model_that_is_kept(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`ecg sample` with the labels and settings of the run draws its samples again."""
    labels = (finished / "records" / "labels.csv").read_text().splitlines()[1:]
    statements = [line.split(",", 1)[1].strip('"').replace(" ", ",") for line in labels]
    out = tmp_path / "drawn"
    arguments = ["--num", "6", "--steps", "3", "--quiet", "--statements", *statements]
    assert cli.main(["ecg", "sample", str(finished / "model"), "--out", str(out), *arguments]) == 0
    captured = capsys.readouterr()
    assert "6 records written" in captured.out
    assert "WARNING: 4 target samples are very few" in captured.err
    assert captured.err.splitlines()[-1] == f"WARNING: {SMOKE}"
    with np.load(finished / "records" / "samples.npz") as old, np.load(out / "samples.npz") as new:
        assert np.abs(old["signals"] - new["signals"]).max() < 1e-5
    old, new = (json.loads((folder / "manifest.json").read_text()) for folder in (finished / "records", out))
    for key in ("model", "preset", "warnings"):
        assert old[key] == new[key]
    assert old["preset"] == "smoke"
    assert "4 target samples are very few" in old["warnings"][0]
    out = tmp_path / "unguided"
    arguments = ["--num", "1", "--steps", "1", "--quiet", "--unguided"]
    assert cli.main(["ecg", "sample", str(finished / "model"), "--out", str(out), *arguments]) == 0
    assert capsys.readouterr().err.splitlines() == [f"WARNING: {SMOKE}"]  # No ratio judges samples of the source.
    unguided = json.loads((out / "manifest.json").read_text())
    assert (unguided["preset"], unguided["warnings"]) == ("smoke", [])
    arguments = ["--labels", "0", "--num", "1", "--steps", "1", "--out", str(tmp_path / "x.npy"), "--quiet"]
    assert cli.main(["sample", str(finished / "model"), *arguments]) == 0
    assert f"WARNING: {SMOKE}" in capsys.readouterr().err


def test_what_draws_no_records(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that is wrong is found before anything is drawn."""

    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("drawn")

    monkeypatch.setattr("tgdp_fast.ecg.drawing.Sampler.draw", never)
    model, taken = finished / "model", tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    for folder, changes, message in (
        (model, ["--out", str(taken)], f"--out must be new or empty, but {taken} exists and is not"),
        (tmp_path, [], f"MODEL_DIR: {tmp_path} is not a checkpoint of tgdp_fast"),
        (finished, [], f"MODEL_DIR: {finished} is the folder of a run; did you mean {model}?"),
        (model, ["--statements", "NORM", "SR,AFIBB"], "--statements must be names that the model knows, got 'AFIBB'"),
        (model, ["--statements", "AFIBB"], "(did you mean AFIB"),
        (model, ["--statements", "afib"], "(did you mean AFIB"),
        (model, ["--statements", "NORM,AF"], "(did you mean AFIB"),
        (
            model,
            ["--statements", "FOO"],
            "all 71 with what they say are in tgdp_fast.ecg.records.statements.DESCRIPTIONS",
        ),
        (model, ["--steps", "0"], "--steps must be an integer >= 1, got 0"),
        (model, ["--num", "0"], "--num must be an integer >= 1, got 0"),
    ):
        arguments = ["--out", str(tmp_path / "other"), "--num", "1", "--quiet", *changes]
        assert cli.main(["ecg", "sample", str(folder), *arguments]) == 2, changes
        assert message in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_model_of_ecgs_draws_arrays_only_with_labels(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sample", str(finished / "model"), "--num", "2", "--steps", "1", "--quiet"]
    arguments += ["--out", str(tmp_path / "x.npy")]
    assert cli.main(arguments) == 2
    text = capsys.readouterr().err
    assert f"draw records of named statements with tgdp-fast ecg sample {finished / 'model'} --num 2" in text
    assert cli.main([*arguments, "--labels", "4"]) == 0
    assert np.load(tmp_path / "x.npy").shape == (2, 8, 120)


def test_verbs_compute_and_attributes_do_not(finished: Path, config: Path, tmp_path: Path) -> None:
    """Reading a result never trains: before its verb it is an error that names the verb."""
    pipeline = Pipeline(load_config(config), tmp_path / "unused")
    for name, verb in (
        ("cohorts", "read"),
        ("classifier", "estimate_ratio"),
        ("ratio", "estimate_ratio"),
        ("model", "fit"),
        ("report", "evaluate"),
    ):
        with pytest.raises(NotComputedError, match=rf"^{name} has not been computed; call pipeline.{verb}\(\) first$"):
            getattr(pipeline, name)
    assert (pipeline.denoisers, pipeline.samples) == ({}, {})
    assert not (tmp_path / "unused").exists()
    with pytest.raises(ValueError, match="methods must be one of .*; got 'tgpd'"):
        pipeline.draw("tgpd")
    with pytest.raises(ValueError, match="name must be one of fine_tune, source, vanilla; got 'tgdp'"):
        pipeline.train("tgdp")
    done = Pipeline(load_config(config), finished)
    report = done.evaluate()
    assert done.report is report
    assert done.fit() is done.model
    assert list(done.draw()) == list(done.samples) == ["source", "vanilla", "fine_tune", "tgdp"]
    assert done.draw("tgdp") == {"tgdp": done.samples["tgdp"]}
    assert set(done.denoisers) == {"source", "vanilla", "fine_tune"}
    assert done.ratio == done.estimate_ratio()
    source, vanilla = (untrained(done.run, done.cohorts, name).network for name in ("source", "vanilla"))
    assert not all(torch.equal(a, b) for a, b in zip(source.parameters(), vanilla.parameters(), strict=True))


def test_a_second_run_computes_nothing(finished: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tgdp_fast.fit import training

    def never(*arguments: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(training._Run, "advance", never)
    before = (finished / "results.json").read_text()
    Pipeline(load_config(config), finished).evaluate()
    assert json.loads((finished / "results.json").read_text())["methods"] == json.loads(before)["methods"]


def test_fit_and_evaluate_say_what_they_did(
    finished: Path, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--config", str(config), "--out", str(finished), "--quiet"]
    assert cli.main(["ecg", "fit", *arguments]) == 0
    captured = capsys.readouterr()
    assert f"model saved in {finished / 'model'}" in captured.out
    assert "WARNING: 4 target samples are very few" in captured.err
    assert cli.main(["ecg", "evaluate", *arguments]) == 0
    said = capsys.readouterr().out
    for method in ("Real", "Source model", "Vanilla", "Fine-tuning", "TGDP"):
        assert any(line.startswith(method) and "macro AUC" in line and "Fmax" in line for line in said.splitlines())
    assert "report.html" in said

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "draw", interrupted)
    assert cli.main(["ecg", "run", *arguments]) == 130
    assert f"finished work is kept in {finished}: the same command goes on from there" in capsys.readouterr().err


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_wrong_options_are_named_before_anything_is_made(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = ["--source", str(config.parent / "ptbxl"), "--target", str(config.parent / "icbeb")]
    out = tmp_path / "out"
    for wrong, message in (
        (["--num", "1"], "--num must be an integer >= 2, got 1"),
        (["--seed", "-1"], "--seed must be an integer >= 0, got -1"),
        (["--preset", "papper"], "--preset must be one of paper, small, smoke; got 'papper'"),
        (["--device", "tpu9"], "--device must be one that torch has here"),
        (["--out", str(config)], f"--out must be a folder, new or of a run, got the file {config}"),
    ):
        assert cli.main(["ecg", "run", *folders, "--out", str(out), "--quiet", *wrong]) == 2
        assert capsys.readouterr().err.startswith(f"tgdp-fast: error: {message}")
        assert not out.exists()
    # Which of the two folders has nothing but records that are too short.
    assert cli.main(["ecg", "run", *folders, "--out", str(out), "--quiet"]) == 2
    assert f"--source (data.source): {config.parent / 'ptbxl'}: no record can be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "changes", "message"),
    [
        ("run", ["--seed", "1"], "seed was 0, now 1"),
        ("run", ["--num", "5"], "sampling.num was 6, now 5"),
        ("evaluate", ["--num", "5"], "sampling.num was 6, now 5"),
        ("fit", ["--num", "5"], "sampling.num was 6, now 5"),
        ("run", ["--target", "elsewhere"], "data.target was "),
    ],
)
def test_results_are_not_replaced_by_those_of_other_settings(
    finished: Path, config: Path, command: str, changes: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)
    assert cli.main(["ecg", command, "--config", str(config), "--out", str(finished), "--quiet", *changes]) == 2
    text = capsys.readouterr().err
    assert f"--out must be another folder, or one without results: {finished} has results of other settings" in text
    assert message in text
    assert "give another --out, or delete the folder" in text
    assert contents(finished) == before


def test_settings_that_may_change_in_a_folder(finished: Path, config: Path, tmp_path: Path) -> None:
    """Those that nothing depends on that is there already."""
    import shutil

    changeable = ("evaluation.bootstrap",)
    original = load_config(config)
    for same in (
        original,
        load_config(config, device="cuda"),
        load_config(config, data__source=str(config.parent / "icbeb" / ".." / "ptbxl")),
    ):
        check_same_run(finished, same)
    check_same_run(tmp_path, load_config(config, seed=1))
    with pytest.raises(ValueError, match="sampling.eta was None, now 0.5"):
        check_same_run(finished, load_config(config, sampling__eta=0.5, sampling__solver="ddim"))
    judged = load_config(config, evaluation__bootstrap=20)
    check_same_run(finished, judged, changeable)
    with pytest.raises(ValueError, match="evaluation.bootstrap was 10, now 20"):
        check_same_run(finished, judged)
    many = load_config(None, preset="paper", data__source=original.data.source, data__target=original.data.target)
    with pytest.raises(ValueError, match=r"preset was 'smoke', now 'paper'; .*; and \d+ more\); give"):
        check_same_run(finished, many)

    fitted = tmp_path / "fitted"
    shutil.copytree(finished, fitted, ignore=shutil.ignore_patterns("results.json"))
    check_same_run(fitted, load_config(config, sampling__steps=4, vanilla={"steps": 9}, evaluation__bootstrap=20))
    for changes, message in (
        ({"sampling__prior": "standard"}, "sampling.prior was 'gaussian', now 'standard'"),
        ({"guidance__width": 9}, "guidance.width was 8, now 9"),
        (
            {"evaluation": {"classifier": {"width": 9}}},
            "evaluation.classifier.blocks was .*evaluation.classifier.width was 8, now 9",
        ),
    ):
        with pytest.raises(ValueError, match=f"has a model of other settings .{message}"):
            check_same_run(fitted, load_config(config, **changes))

    # Written by an earlier version: another spelling, and without a setting that is newer.
    written = (fitted / "config.json").read_text()
    stated = json.loads(written)
    stated["backbone"]["checkpoint_units"] = "standardised"
    del stated["guidance"]["time_distribution"]
    (fitted / "config.json").write_text(json.dumps(stated))
    check_same_run(fitted, load_config(config, backbone__checkpoint_units="standardized"))
    with pytest.raises(ValueError, match="guidance.time_distribution was 'uniform', now 'logsnr'"):
        check_same_run(
            fitted,
            load_config(config, guidance__time_distribution="logsnr", backbone__checkpoint_units="standardised"),
        )
    (fitted / "config.json").write_text(written)

    # The data were read from another place, or seen from another folder.
    stated = json.loads((fitted / "config.json").read_text())
    stated["data"]["source"] = "moved/ptbxl"
    (fitted / "config.json").write_text(json.dumps(stated))
    check_same_run(fitted, original)
    (fitted / "config.json").write_text("{")  # Nothing to compare with.
    check_same_run(fitted, load_config(config, seed=1))


def test_samples_are_judged_anew_where_that_is_asked_for(finished: Path, config: Path, tmp_path: Path) -> None:
    import shutil

    out, changed = tmp_path / "run", config.parent / "judged.toml"
    shutil.copytree(finished, out)
    changed.write_text(TINY.replace("bootstrap = 10", "bootstrap = 20"))
    for command, status in (("run", 2), ("evaluate", 0)):
        assert cli.main(["ecg", command, "--config", str(changed), "--out", str(out), "--quiet"]) == status
    assert json.loads((out / "config.json").read_text())["evaluation"]["bootstrap"] == 20
    before, after = contents(finished), contents(out)
    assert before["records/samples.npz"][0] == after["records/samples.npz"][0]
    assert before["results.json"][0] != after["results.json"][0]


def test_packages_that_are_missing_are_named_before_the_first_stage(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "neurokit2", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    for command in ("run", "evaluate"):
        out = tmp_path / command
        assert cli.main(["ecg", command, "--config", str(config), "--out", str(out), "--quiet"]) == 1
        text = capsys.readouterr().err
        assert "this run needs scikit-learn, neurokit2, not installed here" in text
        assert "run: pip install scikit-learn neurokit2\n" in text
        assert not out.exists()


def test_the_smallest_preset_says_what_its_results_are_not(
    finished: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    caution = "preset smoke: shows that everything works; samples and numbers are not good"
    page = (finished / "report.html").read_text()
    assert caution[1:] in page[: page.index("<nav")]
    for command in ("fit", "evaluate", "run"):
        assert cli.main(["ecg", command, "--config", str(config), "--out", str(finished), "--quiet"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == caution


def test_the_source_model_costs_what_it_cost(finished: Path, config: Path) -> None:
    costs = Costs(finished / "costs.json", "cpu").found
    found = cost(costs, "source")
    assert found.trainable_parameters == costs["source"]["parameters"] > 0
    assert found.training_seconds == costs["source"]["seconds"] > 0
    assert cost(costs, "fine_tune").training_seconds == costs["fine_tune"]["seconds"]
    assert "training is in its own row alone" in (finished / "report.html").read_text()
    del costs["source"]  # As where a checkpoint is in its place.
    assert (cost(costs, "source").trainable_parameters, cost(costs, "source").training_seconds) == (None, None)


def test_another_setting_computes_its_stage_and_what_follows(finished: Path, config: Path, tmp_path: Path) -> None:
    """The scale enters the samples of TGDP, and nothing before them."""
    import shutil

    out = tmp_path / "run"
    shutil.copytree(finished, out)
    times = {path.name: path.stat().st_mtime_ns for path in (out / "stages").glob("*.json")}
    pipeline = Pipeline(load_config(config, sampling__scale=2.0), out)
    pipeline.draw("tgdp")
    changed = {name for name, time in times.items() if (out / "stages" / name).stat().st_mtime_ns != time}
    assert changed == {"samples-tgdp.json"}
    pipeline.write_records("tgdp")
    assert json.loads((out / "records" / "manifest.json").read_text())["scale"] == 2.0
    (out / "records" / "manifest.json").unlink()  # Then it is a folder of somebody's.
    with pytest.raises(ValueError, match="folder must be new or empty"):
        pipeline.write_records("tgdp")


def test_a_checkpoint_in_the_place_of_training(config: Path, finished: Path, tmp_path: Path) -> None:
    """A released file works on millivolts; a model of an earlier run brings its standardisation."""
    own = Pipeline(load_config(config), finished)
    released = tmp_path / "100.pkl"
    torch.save({"model_state_dict": own.train("source").network.state_dict()}, released)
    for checkpoint, standardizer in ((released, None), (finished / "model", own.cohorts.standardizer)):
        changes = {"backbone__checkpoint": str(checkpoint), "backbone__cauchy": "pair"}
        pipeline = Pipeline(load_config(config, **changes), tmp_path / f"run-{checkpoint.name}")
        mine, theirs = (each.train("source").state_dict() for each in (pipeline, own))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        if standardizer is None:
            assert np.array_equal(pipeline.cohorts.x_source, pipeline.cohorts.source.signals)
        else:
            assert torch.equal(pipeline.cohorts.standardizer.std, standardizer.std)
        assert "source" not in pipeline.run.costs.found
    wrong = Pipeline(load_config(config, backbone__checkpoint=str(released), data__seconds=1.1), tmp_path / "wrong")
    with pytest.raises(ValueError, match=r"backbone.checkpoint: .* works on signals of shape \(8, 120\)"):
        wrong.train("source")


def test_the_signals_themselves_tell_the_domains(config: Path, finished: Path, tmp_path: Path) -> None:
    changes = {"guidance__domain_classifier": "xresnet1d", "guidance__loss": "poisson", "guidance__conditional": False}
    pipeline = Pipeline(load_config(config, **changes), tmp_path / "run")
    ratio, diagnostics = pipeline.estimate_ratio()
    assert len(ratio.source_log_ratio) == 12
    assert float(ratio.source_log_ratio.double().exp().mean().log()) == pytest.approx(0.0, abs=1e-5)  # E_p[r] = 1
    assert diagnostics.num_target == 4
    assert pipeline.fit().guidance.num_classes == 0
    assert pipeline.draw("tgdp")["tgdp"].signals.shape == (6, 8, 120)


@pytest.mark.parametrize("by_environment", [False, True])
def test_the_layers_are_prepared_for_the_backend_that_samples(
    by_environment: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = SSSDECG(res_channels=8, skip_channels=8, num_res_layers=1, d_state=4, l_max=32)
    denoiser = Denoiser(network.eval(), PRESETS["smoke"].backbone.schedule())
    settings = {"backend": "reference"}
    if by_environment:
        monkeypatch.setenv("TGDP_BACKEND", settings.pop("backend"))
    sampler = new_sampler(denoiser, None, SamplingConfig(steps=2, **settings), "cpu")
    assert sampler.draw(2, labels=torch.zeros(2, network.num_classes), seed=0).shape == (2, 8, 32)


def test_label_rows_shift_the_logit_of_a_domain_classifier() -> None:
    settings = PRESETS["smoke"].evaluation.classifier
    torch.manual_seed(0)
    network = SignalDomainClassifier(settings, 2, 3).eval()
    x, rows = torch.randn(4, 2, 64), torch.eye(3)[[0, 1, 2, 0]]
    assert network(x, rows).shape == (4,)
    assert not torch.equal(network(x, rows), network(x, rows.flip(0)))
    assert torch.equal(network(x), network.body(x)[:, 0])


def test_costs_add_up_over_runs(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    for _ in range(2):
        costs = Costs(path, "cpu")
        with costs.of("training", torch.nn.Linear(3, 2)):
            held = np.ones(8_000_000)
            import time

            time.sleep(0.2)
            del held
    row = json.loads(path.read_text())["training"]
    assert row["parameters"] == 8
    assert 0.4 <= row["seconds"] < 20
    assert row["peak_bytes"] >= 60e6
    with pytest.raises(KeyboardInterrupt), Costs(path, "cpu").of("training"):
        raise KeyboardInterrupt
    found = json.loads(path.read_text())["training"]
    assert found["seconds"] > row["seconds"]
    assert found["peak_bytes"] >= row["peak_bytes"]


# ----------------------------------------------------------------------------------------- kills and processes

# Kills itself with SIGKILL: after the work of a stage and before it is kept, or in the midst of its training.
DEADLY = """
import inspect, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tgdp_fast.cli import main as cli
from tgdp_fast.fit import training
from tgdp_fast.runtime.stages import Stages

stage, config, out = sys.argv[1:]
run = Stages.run
def deadly(self, name, signature, compute, save, load, **options):
    def work(state_dir):
        if stage == name + ":midway":
            advance, own = training._Run.advance, [0]
            inspect.unwrap(training.minimize).__kwdefaults__["save_every"] = 0.0
            def advance_and_die(self, loss):
                if self.step == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                return advance(self, loss)
            training._Run.advance = advance_and_die
        result = compute(state_dir)
        if stage == name:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return run(self, name, signature, work, save, load, **options)
Stages.run = deadly
sys.exit(cli.main(["ecg", "run", "--config", config, "--out", out, "--quiet"]))
"""


def launch(arguments: list[str], place: Path, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, *launcher, *arguments], cwd=place, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow(ci=True)
def test_killed_in_every_stage_it_ends_as_if_it_had_not_been(finished: Path, config: Path, tmp_path: Path) -> None:
    script = tmp_path / "deadly.py"
    script.write_text(DEADLY)
    out = tmp_path / "run"
    for stage in (
        "source:midway",
        "density_ratio",
        "guidance:midway",
        "samples-tgdp",
        "judge-tgdp",
    ):
        died = launch([str(script), stage, str(config), str(out)], tmp_path)
        assert died.returncode == -signal.SIGKILL, (stage, died.stderr[-2000:])
        assert not (out / "results.json").exists(), stage
    ended = launch([str(script), "none", str(config), str(out)], tmp_path)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert methods_of(out) == methods_of(finished)
    for name in ("samples-tgdp", "samples-fine_tune"):
        samples = [load_checkpoint(run / "stages" / name, "samples")[1]["signals"] for run in (out, finished)]
        assert torch.equal(*samples), name
    assert not list((out / "stages").glob("*.parts"))
    assert not list((out / "stages").glob("*.state"))
    assert not list(out.rglob(".*"))


def methods_of(out: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((out / "results.json").read_text())["methods"]
    return found


@pytest.mark.slow(ci=True)
def test_two_processes_give_the_samples_of_one(finished: Path, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    arguments = ["-m", "tgdp_fast", "ecg", "run", "--config", str(config), "--out", str(out), "--quiet"]
    done = launch(arguments, tmp_path, launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("written: ") == 1  # The first process speaks alone.
    for name in ("samples-source", "samples-vanilla", "samples-fine_tune"):
        one, two = (load_checkpoint(run / "stages" / name, "samples")[1]["signals"] for run in (finished, out))
        # A few steps of Adam at a rate of 3e-3 turn rounding into at most a few 1e-5 of the weights.
        assert (one - two).abs().max() <= 5e-3 * one.std(), name
    found = json.loads((out / "costs.json").read_text())
    assert found["source"]["processes"] == 2


@pytest.mark.slow(ci=True)
def test_real_records(tmp_path: Path) -> None:
    """All real records through the whole of it, with networks that have learned next to nothing."""
    config = tmp_path / "real.toml"
    text = TINY.replace('"ptbxl"', json.dumps(str(real_data("ptbxl"))))
    text = text.replace('"icbeb"', json.dumps(str(real_data("icbeb2018")))).replace("seconds = 1.2\n", "")
    config.write_text(text.replace("num = 6", "num = 8"))
    out = tmp_path / "run"
    assert cli.main(["ecg", "run", "--config", str(config), "--out", str(out), "--quiet"]) == 0
    found = json.loads((out / "results.json").read_text())
    assert found["counts"]["source records"] >= 63
    assert found["counts"]["target records that methods see"] + found["counts"]["target records that test"] == 16
    rates = {row["name"]: row["real"] for row in found["methods"]["real"]["statistics"]}
    assert 40 < rates["heart_rate"][1] < 120
    assert 60 < rates["qrs"][1] < 160
