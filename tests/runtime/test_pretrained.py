"""Folders in the layout of the Hugging Face Hub: exact round trips, cards, replacement, and reading from the Hub."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tgdp_fast
from tgdp_fast import (
    SSSDECG,
    CheckpointError,
    Denoiser,
    GaussianPrior,
    GuidanceNetwork,
    NoiseSchedule,
    ScoreMLP,
    TransferModel,
)
from tgdp_fast.runtime import checkpoint
from tgdp_fast.runtime.arrays import Standardizer
from tgdp_fast.runtime.pretrained import GENERATED

SCHEDULE = NoiseSchedule.from_betas(np.linspace(1e-3, 0.2, 30))


def denoiser(seed: int = 0) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(ScoreMLP((3,), width=5, depth=2), SCHEDULE, time_input="half_log_snr").eval()


def guidance(seed: int = 0) -> GuidanceNetwork:
    torch.manual_seed(seed)
    return GuidanceNetwork((3,), SCHEDULE, width=7, depth=2, alpha_power=1.5).eval()


def transfer_model(seed: int = 0) -> TransferModel:
    rows = np.random.default_rng(seed).normal(3.0, 2.0, (40, 3)).astype(np.float32)
    diagnostics = {"auc": 0.731, "num_target": 12, "warnings": ["too few\nsamples"], "mean_h": [[0.1, 1.0, 0.1]]}
    prior = GaussianPrior.fit(Standardizer.fit(rows).apply(rows))
    return TransferModel(
        denoiser(seed), guidance(seed), Standardizer.fit(rows), diagnostics, {"loss": "logistic"}, prior
    )


MODELS = {"denoiser": denoiser, "guidance": guidance, "transfer_model": transfer_model}


def tensors(model: Any) -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = model.to_checkpoint()[2]
    return result


@pytest.mark.parametrize("kind", MODELS)
def test_round_trip_is_exact(tmp_path: Path, kind: str) -> None:
    model = MODELS[kind]()
    model.save_pretrained(tmp_path / "deep" / "model", license="cc-by-4.0")
    assert sorted(os.listdir(tmp_path / "deep" / "model")) == ["README.md", "config.json", "model.safetensors"]
    assert os.listdir(tmp_path / "deep") == ["model"]
    for read in (type(model).from_pretrained, type(model).load):  # one format
        loaded = read(str(tmp_path / "deep" / "model"))
        assert type(loaded) is type(model)
        assert loaded.to_checkpoint()[:2] == model.to_checkpoint()[:2]
        assert tensors(loaded).keys() == tensors(model).keys()
        for name, value in tensors(model).items():
            assert tensors(loaded)[name].dtype == value.dtype
            assert torch.equal(tensors(loaded)[name], value), name
    if isinstance(model, TransferModel):
        assert loaded.signature() == model.signature()
        assert np.array_equal(loaded.sample(5, steps=3, seed=2), model.sample(5, steps=3, seed=2))


def test_what_save_wrote_is_read_too(tmp_path: Path) -> None:
    guidance().save(tmp_path / "plain")
    loaded = GuidanceNetwork.from_pretrained(tmp_path / "plain")
    assert not loaded.training
    assert torch.equal(tensors(loaded)["layers.0.weight"], tensors(guidance())["layers.0.weight"])


def test_a_compiled_denoiser_is_saved_as_what_it_was_compiled_from(tmp_path: Path) -> None:
    network = SSSDECG(3, 3, 4, 4, 1, (6, 7, 9), num_classes=0, l_max=40, d_state=4).eval()
    compiled = Denoiser(network, SCHEDULE).compile_for_sampling()
    whole = transfer_model()
    whole.denoiser = compiled
    whole.save_pretrained(tmp_path / "model")
    loaded = TransferModel.from_pretrained(tmp_path / "model")
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.denoiser.network.state_dict()[name], value)


# the card ----------------------------------------------------------------------------------------------------------


def front_matter(card: str) -> dict[str, Any]:
    """Keys with a value or a list of words, which is the part of YAML that cards here need."""
    start, body, _ = card.split("---\n", 2)
    assert start == ""
    result: dict[str, Any] = {}
    key = ""
    for line in body.splitlines():
        if line.startswith("- "):
            result[key].append(line[2:])
        else:
            key, _, value = line.partition(":")
            result[key] = value.strip() or []
    return result


def test_the_card(tmp_path: Path) -> None:
    model = transfer_model()
    model.save_pretrained(tmp_path / "model", license="cc-by-4.0")
    card = (tmp_path / "model" / "README.md").read_text()
    assert front_matter(card) == {
        "library_name": "tgdp_fast",
        "license": "cc-by-4.0",
        "tags": ["tgdp_fast", "diffusion", "transfer-learning", "transfer-model"],
    }
    count = sum(value.numel() for value in tensors(model).values())
    for part in (
        f"{count} numbers",
        'tgdp_fast.TransferModel.from_pretrained("FOLDER")',
        "| auc | 0.731 |",
        "| num_target | 12 |",
        "> too few samples",
        "| guidance.alpha_power | 1.5 |",
        "| guidance.schedule.alphas_cumprod | 30 values |",
        "arxiv.org/abs/2405.16876",
    ):
        assert part in card, part
    denoiser().save_pretrained(tmp_path / "other")
    assert "license" not in front_matter((tmp_path / "other" / "README.md").read_text())
    for wrong in ("", "mit\ntags: x", 3):
        with pytest.raises(ValueError, match="license must be an identifier"):
            denoiser().save_pretrained(tmp_path / "third", license=wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "third").exists()


def test_the_card_s_code_runs(tmp_path: Path) -> None:
    for kind, make in MODELS.items():
        make().save_pretrained(tmp_path / kind)
        card = (tmp_path / kind / "README.md").read_text()
        code = card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(tmp_path / kind))
        names: dict[str, Any] = {"denoiser": denoiser()}
        exec(code.replace("1000", "4"), names)
        assert names["samples"].shape == (4, 3)


def test_the_card_of_a_foreign_network_asks_for_it(tmp_path: Path) -> None:
    make = lambda: nn.Linear(3, 3)  # noqa: E731
    Denoiser(make(), NoiseSchedule.cosine()).save_pretrained(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    line = next(line for line in card.splitlines() if "from_pretrained" in line)
    names: dict[str, Any] = {"tgdp_fast": tgdp_fast, "your_network": make()}
    exec(line.replace("FOLDER", str(tmp_path / "model")), names)
    assert isinstance(names["model"], Denoiser)
    with pytest.raises(CheckpointError, match="network="):
        Denoiser.from_pretrained(tmp_path / "model")


def test_an_edited_card_stays_and_a_generated_one_is_renewed(tmp_path: Path) -> None:
    path, card = tmp_path / "model", tmp_path / "model" / "README.md"
    guidance().save_pretrained(path)
    first = card.read_text()
    transfer_model().save_pretrained(path)
    assert card.read_text() != first
    edited = card.read_text().replace(GENERATED, "My words.")
    card.write_text(edited)
    (path / ".gitattributes").write_bytes(b"*.safetensors filter=lfs\n")
    guidance(1).save_pretrained(path)
    assert card.read_text() == edited
    guidance(2).save(path)  # a plain save deletes nothing either
    assert card.read_text() == edited
    assert (path / ".gitattributes").read_bytes() == b"*.safetensors filter=lfs\n"
    assert torch.equal(tensors(GuidanceNetwork.load(path))["layers.0.weight"], guidance(2).linear_layers()[0].weight)
    guidance().save_pretrained(path, card="# Mine\n")
    assert card.read_text() == "# Mine\n"
    (path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"holds notes\.txt"):
        guidance().save_pretrained(path)
    assert os.listdir(tmp_path) == ["model"]


# kills ---------------------------------------------------------------------------------------------------------------


def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new(tmp_path: Path) -> None:
    """A process that ends at once, in front of each call that changes the disk, one after the other."""
    import subprocess

    old, new = guidance(0), guidance(1)
    values = {seed: tensors(model)["layers.0.weight"] for seed, model in ((0, old), (1, new))}
    code = """
import os, sys
import torch
from tgdp_fast.runtime import checkpoint
sys.path.insert(0, sys.argv[3])
from test_pretrained import guidance
place = sys.argv[1]
model = guidance(1)
for moment in range(100):  # each in a process of its own
    folder = f"{place}/{moment}"
    child = os.fork()
    if child == 0:
        guidance(0).save_pretrained(folder)
        count = 0
        def counted(function):
            def call(*arguments, **options):
                global count
                if count == moment:
                    os._exit(9)
                count += 1
                return function(*arguments, **options)
            return call
        for name in ("replace", "fsync"):
            setattr(os, name, counted(getattr(os, name)))
        checkpoint.shutil.rmtree = counted(checkpoint.shutil.rmtree)
        checkpoint.save_file = counted(checkpoint.save_file)
        model.save_pretrained(folder)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status == 0:
        break
print(moment)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), "", str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    moments = int(done.stdout)
    assert moments >= 10  # the tensors, three flushes, three renames of files, two of folders, ...
    seen = set()
    for moment in range(moments + 1):
        loaded = tensors(GuidanceNetwork.from_pretrained(tmp_path / str(moment)))["layers.0.weight"]
        found = [seed for seed, value in values.items() if torch.equal(loaded, value)]
        assert len(found) == 1, moment
        seen.add((found[0], moment == moments))
        # The next save puts everything in order.
        new.save_pretrained(tmp_path / str(moment))
        assert sorted(os.listdir(tmp_path / str(moment))) == ["README.md", "config.json", "model.safetensors"]
    assert (0, False) in seen
    assert (1, True) in seen
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".previous")]


# refusals ------------------------------------------------------------------------------------------------------------


def rewrite(path: Path, change: Any) -> None:
    header = json.loads((path / "config.json").read_text())
    change(header)
    (path / "config.json").write_text(json.dumps(header))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: (p / "config.json").unlink(), r"has no config\.json"),
        (lambda p: (p / "model.safetensors").unlink(), r"model\.safetensors is missing"),
        (lambda p: (p / "config.json").write_text('{"model_type": "bert"}'), "another library, 'bert'"),
        (lambda p: (p / "config.json").write_text('{"_class_name": "UNet2DModel"}'), "another library, 'UNet2DModel'"),
        (lambda p: (p / "config.json").write_text("[1]"), "does not say so"),
        (lambda p: rewrite(p, lambda h: h.update(format_version=99)), "format version 99.*upgrade"),
        (lambda p: rewrite(p, lambda h: h["config"].update(width=8)), r"other shape: layers\.0\.weight \[7, 3\]"),
        (lambda p: rewrite(p, lambda h: h["config"].update(dropout=0.1)), "does not describe a GuidanceNetwork"),
        (lambda p: rewrite(p, lambda h: h["config"].pop("event_shape")), "does not describe a GuidanceNetwork"),
        (lambda p: rewrite(p, lambda h: h["config"].update(stem="cnn")), "stem must be one of"),
        (lambda p: torch.save(guidance().state_dict(), p / "model.safetensors"), "never loaded"),
    ],
)
def test_damaged_and_foreign_folders(tmp_path: Path, change: Any, message: str) -> None:
    guidance().save_pretrained(tmp_path / "model")
    change(tmp_path / "model")
    with pytest.raises(CheckpointError, match=message):
        GuidanceNetwork.from_pretrained(tmp_path / "model")


def test_other_classes_and_missing_folders(tmp_path: Path) -> None:
    denoiser().save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="of kind 'denoiser', expected 'transfer_model'"):
        TransferModel.from_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="does not exist.*pass hub=True"):
        Denoiser.from_pretrained("owner/model")
    with pytest.raises(ValueError, match="revision, local_files_only are for the Hub"):
        Denoiser.from_pretrained(tmp_path / "model", revision="main", local_files_only=True)

    network = nn.Linear(3, 3)
    Denoiser(network, SCHEDULE).save_pretrained(tmp_path / "foreign")
    with pytest.raises(CheckpointError, match="network="):
        Denoiser.from_pretrained(tmp_path / "foreign")
    loaded = Denoiser.from_pretrained(tmp_path / "foreign", network=nn.Linear(3, 3))
    assert torch.equal(loaded.network.weight, network.weight)


# the Hub -------------------------------------------------------------------------------------------------------------


def test_the_hub_is_asked_only_when_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    model = guidance()
    model.save_pretrained(tmp_path / "snapshot")

    def snapshot_download(**arguments: Any) -> str:
        calls.append(arguments)
        if arguments["repo_id"] == "owner/gone":
            raise FileNotFoundError("404\nmore")
        return str(tmp_path / "snapshot")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    GuidanceNetwork.from_pretrained(tmp_path / "snapshot")
    with pytest.raises(CheckpointError, match="pass hub=True"):
        GuidanceNetwork.from_pretrained("owner/model")
    assert not calls
    loaded = GuidanceNetwork.from_pretrained("owner/model", hub=True, revision="v1", cache_dir=tmp_path / "cache")
    assert torch.equal(tensors(loaded)["layers.0.weight"], tensors(model)["layers.0.weight"])
    assert calls == [
        {
            "repo_id": "owner/model",
            "revision": "v1",
            "cache_dir": str(tmp_path / "cache"),
            "local_files_only": False,
            "allow_patterns": ["config.json", "model.safetensors"],
        }
    ]
    with pytest.raises(CheckpointError, match=r"owner/gone could not be had .*FileNotFoundError: 404\)"):
        GuidanceNetwork.from_pretrained("owner/gone", hub=True)
    for wrong in ("../model", "a/b/c", "", tmp_path):
        with pytest.raises(CheckpointError, match="expected 'owner/name'"):
            GuidanceNetwork.from_pretrained(wrong, hub=True)
    assert len(calls) == 2
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"run: pip install huggingface_hub$"):
        GuidanceNetwork.from_pretrained("owner/model", hub=True)


def test_what_the_hub_s_own_library_keeps_is_read(tmp_path: Path) -> None:
    """Its cache is written by hand, links to content as it makes them; no network."""
    pytest.importorskip("huggingface_hub")
    guidance().save_pretrained(tmp_path / "model")
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--owner--model"
    for folder in ("blobs", "refs", f"snapshots/{commit}"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for name in ("config.json", "model.safetensors"):
        os.rename(tmp_path / "model" / name, repository / "blobs" / name)
        os.symlink(f"../../blobs/{name}", repository / "snapshots" / commit / name)
    loaded = GuidanceNetwork.from_pretrained(
        "owner/model", hub=True, cache_dir=tmp_path / "cache", local_files_only=True
    )
    assert torch.equal(tensors(loaded)["layers.0.weight"], tensors(guidance())["layers.0.weight"])
    with pytest.raises(CheckpointError, match="owner/other could not be had"):
        GuidanceNetwork.from_pretrained("owner/other", hub=True, cache_dir=tmp_path / "cache", local_files_only=True)


def test_a_killed_save_is_found_under_its_other_name(tmp_path: Path) -> None:
    guidance().save_pretrained(tmp_path / "model")
    os.rename(tmp_path / "model", checkpoint._previous(tmp_path / "model"))
    assert GuidanceNetwork.from_pretrained(tmp_path / "model").width == 7
