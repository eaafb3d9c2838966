"""Checkpoints: exact round trips, atomic replacement, and a clear refusal of everything else."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tgdp_fast.runtime import checkpoint
from tgdp_fast.runtime.checkpoint import (
    CheckpointError,
    checkpoint_kind,
    load_checkpoint,
    save_checkpoint,
)
from tgdp_fast.runtime.files import save_array, save_json, to_json, write_atomic
from tgdp_fast.runtime.state_dict import load_state_dict_checked

CONFIG = {"width": 7, "layers": [3, 5], "name": "λ", "scale": 0.1, "none": None, "nested": {"flag": True}}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(9, 11, generator=generator)
    return {
        "slice": base[1::2, ::3],
        "transposed": base.T,
        "base": base,
        "alias": base,
        "rows": base[:4],
        "double": torch.randn(3, generator=generator, dtype=torch.float64),
        "half": torch.randn(17, generator=generator).to(torch.bfloat16),
        "steps": torch.tensor(12, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def test_round_trip_is_exact(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "deep" / "model", "denoiser", CONFIG, tensors())
    config, loaded = load_checkpoint(tmp_path / "deep" / "model", "denoiser")
    assert config == CONFIG
    assert_same(loaded, tensors())
    assert checkpoint_kind(tmp_path / "deep" / "model") == "denoiser"
    assert sorted(os.listdir(tmp_path / "deep" / "model")) == ["config.json", "model.safetensors"]
    assert os.listdir(tmp_path / "deep") == ["model"], "no temporary folder may remain"


def test_overwriting_replaces_the_whole_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()  # an empty folder may be taken
    save_checkpoint(path, "denoiser", CONFIG, tensors(0))
    save_checkpoint(path, "guidance", {"width": 1}, {"only": torch.ones(2)})
    config, loaded = load_checkpoint(path)
    assert config == {"width": 1}
    assert list(loaded) == ["only"]
    assert os.listdir(tmp_path) == ["model"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for seed in (0, 1):
        save_checkpoint(tmp_path / "link", "denoiser", {}, tensors(seed))
    assert (tmp_path / "link").is_symlink()
    assert_same(load_checkpoint(tmp_path / "real")[1], tensors(1))


@pytest.mark.parametrize("point", ["save_file", "_sha256", "write_atomic", "replace-0", "replace-1", "replace-2"])
def test_interrupted_save_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    """Stopped at any stage before the new folder is in place: the old one loads, nothing else remains."""
    path = tmp_path / "model"
    save_checkpoint(path, "denoiser", {"generation": 0}, tensors(0))

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    if point.startswith("replace"):
        # os.replace is called for config.json, then old -> previous, then new -> path.
        remaining, real = int(point[-1]), os.replace

        def replace(source: Path, target: Path) -> None:
            nonlocal remaining
            remaining -= 1
            if remaining == -1:
                raise KeyboardInterrupt
            real(source, target)

        monkeypatch.setattr(checkpoint.os, "replace", replace)
    else:
        monkeypatch.setattr(checkpoint, point, interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, "denoiser", {"generation": 1}, tensors(1))
    monkeypatch.undo()
    config, loaded = load_checkpoint(path)
    assert config == {"generation": 0}
    assert_same(loaded, tensors(0))
    assert os.listdir(tmp_path) == ["model"]


def test_killed_between_the_renames(tmp_path: Path) -> None:
    """Killed outright there, the process cannot clean up: the old state is found under its other name."""
    path = tmp_path / "model"
    save_checkpoint(path, "denoiser", {"generation": 0}, tensors(0))
    os.rename(path, tmp_path / ".model.previous")
    assert load_checkpoint(path)[0] == {"generation": 0}
    save_checkpoint(path, "denoiser", {"generation": 1}, tensors(1))
    assert load_checkpoint(path)[0] == {"generation": 1}
    assert os.listdir(tmp_path) == ["model"]


def test_killed_before_the_old_one_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_checkpoint(path, "denoiser", {"generation": 1}, tensors(1))
    save_checkpoint(tmp_path / ".model.previous", "denoiser", {"generation": 0}, tensors(0))
    assert load_checkpoint(path)[0] == {"generation": 1}
    save_checkpoint(path, "denoiser", {"generation": 2}, tensors(2))
    assert load_checkpoint(path)[0] == {"generation": 2}
    assert os.listdir(tmp_path) == ["model"]


def test_refuses_to_overwrite_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"holds chapter\.txt"):
        save_checkpoint(foreign, "denoiser", {}, tensors())
    (foreign / "config.json").write_text('{"model_type": "other"}')
    with pytest.raises(CheckpointError, match=r"holds chapter\.txt"):
        save_checkpoint(foreign, "denoiser", {}, tensors())
    (foreign / "chapter.txt").unlink()
    with pytest.raises(CheckpointError, match=r"holds config\.json"):
        save_checkpoint(foreign, "denoiser", {}, tensors())
    mixed = tmp_path / "mixed"
    save_checkpoint(mixed, "denoiser", {}, tensors())
    (mixed / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds notes\.txt"):
        save_checkpoint(mixed, "denoiser", {}, tensors())
    assert (mixed / "notes.txt").read_text() == "mine"
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        save_checkpoint(file, "denoiser", {}, tensors())


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        ({"x": math.nan}, {}, "finite numbers"),
        ({"x": object()}, {}, "finite numbers"),
        ({}, {"w": np.zeros(3)}, r"tensors\['w'\] must be a dense torch.Tensor, got ndarray"),
        ({}, {"w": torch.eye(2).to_sparse()}, "dense"),
    ],
)
def test_bad_arguments_write_nothing(tmp_path: Path, config: dict, values: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path / "model", "denoiser", config, values)
    assert not os.listdir(tmp_path)


class Bomb:
    """Unpickling this creates a file: the proof that nothing was unpickled is that the file is absent."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("writer", ["torch", "legacy", "pickle2", "pickle4", "pickle5"])
def test_pickles_are_refused_and_never_run(tmp_path: Path, writer: str) -> None:
    fuse = tmp_path / "exploded"
    file = tmp_path / "model.pt"
    if writer in ("torch", "legacy"):
        content = {"w": torch.ones(3), "bomb": Bomb(fuse)}
        torch.save(content, file, _use_new_zipfile_serialization=writer == "torch")
    else:
        file.write_bytes(pickle.dumps(Bomb(fuse), protocol=int(writer[-1])))
    with pytest.raises(CheckpointError, match=r"never loaded.*weights_only=True"):
        load_checkpoint(file)
    path = tmp_path / "model"
    save_checkpoint(path, "denoiser", {}, tensors())
    (path / "model.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=r"pickle or zip archive.*weights_only=True"):
        load_checkpoint(path)
    assert not fuse.exists()


def test_a_safetensors_length_is_not_mistaken_for_a_pickle(tmp_path: Path) -> None:
    """A header of 128 or 384 bytes starts the file with 0x80, as a pickle starts; those files must load."""
    alike = 0
    for count in range(40, 340, 4):
        save_checkpoint(tmp_path / "model", "denoiser", {}, {"n" * count: torch.ones(1)})
        with open(tmp_path / "model" / "model.safetensors", "rb") as file:
            alike += file.read(1) == b"\x80"
        load_checkpoint(tmp_path / "model")
    assert alike >= 2


def test_missing_and_foreign_paths(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("plain text")
    with pytest.raises(CheckpointError, match="is a file; expected a checkpoint folder"):
        load_checkpoint(tmp_path / "notes.txt")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["Other"]}')
    with pytest.raises(CheckpointError, match="not a checkpoint of tgdp_fast"):
        load_checkpoint(tmp_path)


def test_wrong_kind_names_both(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", "guidance", {}, tensors())
    with pytest.raises(CheckpointError, match=r"'guidance', expected 'denoiser'"):
        load_checkpoint(tmp_path / "model", "denoiser")


def edit_header(path: Path, **changes: object) -> None:
    header = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**header, **changes}))


def test_damage_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model"

    def fresh() -> bytes:
        save_checkpoint(path, "denoiser", CONFIG, tensors())
        return (path / "model.safetensors").read_bytes()

    content = fresh()
    for length in (0, 5, len(content) // 2, len(content) - 1):
        (path / "model.safetensors").write_bytes(content[:length])
        message = f"truncated: it has {length} bytes, expected {len(content)}"
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path)
    (path / "model.safetensors").write_bytes(content + b"\0")
    with pytest.raises(CheckpointError, match="another checkpoint"):
        load_checkpoint(path)
    flipped = bytearray(content)
    flipped[-3] ^= 1
    (path / "model.safetensors").write_bytes(flipped)
    with pytest.raises(CheckpointError, match="sha256"):
        load_checkpoint(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="incomplete"):
        load_checkpoint(path)

    (path / "model.safetensors").write_bytes(content)
    text = (path / "config.json").read_text()
    (path / "config.json").write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match="damaged, not JSON"):
        load_checkpoint(path)
    (path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="damaged, not JSON"):
        load_checkpoint(path)
    (path / "config.json").write_text(text)
    edit_header(path, format_version=checkpoint.FORMAT_VERSION + 1, library_version="9.9")
    with pytest.raises(CheckpointError, match=r"written by tgdp_fast 9\.9.*upgrade"):
        load_checkpoint(path)
    for entry, value in (("format_version", "1"), ("kind", 3), ("config", []), ("tensors", {})):
        (path / "config.json").write_text(text)
        edit_header(path, **{entry: value})
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(path)


def test_state_dict_of_another_architecture() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 1))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    other = nn.Sequential(nn.Linear(3, 7), nn.SiLU(), nn.SiLU(), nn.Linear(7, 1)).state_dict()
    with pytest.raises(CheckpointError, match="another architecture") as caught:
        load_state_dict_checked(module, other, "models/a")
    message = str(caught.value)
    for part in (
        "models/a",
        "Sequential",
        "missing: 2.weight, 2.bias",
        "unexpected: 3.weight",
        "0.weight [7, 3], expected [5, 3]",
    ):
        assert part in message
    assert_same(module.state_dict(), before)
    many = {f"extra{i}": torch.ones(1) for i in range(9)}
    with pytest.raises(CheckpointError, match=r"extra3 and 5 more"):
        load_state_dict_checked(module, {**before, **many}, "here")
    load_state_dict_checked(module, {name: value.double() + 1 for name, value in before.items()}, "here")
    assert_same(module.state_dict(), {name: value + 1 for name, value in before.items()})


def test_write_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "new" / "note.txt"
    write_atomic(file, "λ")
    write_atomic(file, b"second")
    assert file.read_bytes() == b"second"

    def failing(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.os, "fsync", failing)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(file, b"third")
    monkeypatch.undo()
    assert file.read_bytes() == b"second"
    assert os.listdir(file.parent) == ["note.txt"]
    with pytest.raises(IsADirectoryError):
        write_atomic(tmp_path, b"")


def test_save_array(tmp_path: Path) -> None:
    array = np.arange(35.0).reshape(5, 7)[::2, 1::3]
    save_array(tmp_path / "x.npy", array)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy", allow_pickle=False), array)
    with pytest.raises(ValueError, match=r"end in \.npy"):
        save_array(tmp_path / "x.npz", array)
    with pytest.raises(ValueError, match="dtype object"):
        save_array(tmp_path / "y.npy", np.array([{}], dtype=object))
    assert os.listdir(tmp_path) == ["x.npy"]


def test_json_of_results(tmp_path: Path) -> None:
    rows = {
        "a": np.float32(0.5),
        "b": [math.nan, -math.inf, np.float64("nan")],
        "c": torch.tensor([1.5, math.nan]),
        "d": (1, True, None),
    }
    expected = {"a": 0.5, "b": [None, None, None], "c": [1.5, None], "d": [1, True, None]}
    assert json.loads(to_json(rows)) == expected
    save_json(tmp_path / "r.json", rows)
    assert json.loads((tmp_path / "r.json").read_text()) == expected
    with pytest.raises(TypeError):
        to_json({"x": object()})


def test_files_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_checkpoint(tmp_path / "model", "denoiser", {}, tensors(), card="text")
    finally:
        os.umask(before)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o750
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert modes == {"config.json": 0o640, "model.safetensors": 0o640, "README.md": 0o640}


@pytest.mark.parametrize("remains", [".model.0123abcd.partial", ".model.previous", ".model.lock"])
@pytest.mark.parametrize("act", ["save", "remove"])
def test_what_a_killed_save_has_left_goes_with_the_next(tmp_path: Path, remains: str, act: str) -> None:
    path, other = tmp_path / "model", tmp_path / ".model.copy.partial"
    save_checkpoint(path, "denoiser", {"generation": 0}, tensors(0))
    other.mkdir()
    if remains.endswith(".lock"):
        (tmp_path / remains).touch()
    else:
        shutil.copytree(path, tmp_path / remains)
    if act == "save":
        save_checkpoint(path, "denoiser", {"generation": 1}, tensors(1))
        assert sorted(os.listdir(tmp_path)) == [other.name, "model"]
    else:
        checkpoint.remove_checkpoint(path)
        assert os.listdir(tmp_path) == [other.name]


@pytest.mark.parametrize("size", [0, 100, 4096])
def test_a_full_disk_is_an_oserror_that_names_the_file(tmp_path: Path, size: int) -> None:
    resource = pytest.importorskip("resource")
    path, large = tmp_path / "model", {"x": torch.zeros(4000)}
    save_checkpoint(path, "denoiser", {"generation": 0}, tensors(0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as found:
            save_checkpoint(path, "denoiser", {"generation": 1}, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert found.value.filename == str(path / "model.safetensors")
    assert load_checkpoint(path)[0] == {"generation": 0}
    assert os.listdir(tmp_path) == ["model"]


def test_a_checkpoint_replaced_while_it_is_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the hash of its tensors and their reading, or between its two files."""
    path, real = tmp_path / "model", {name: getattr(checkpoint, name) for name in ("_sha256", "looks_pickled")}
    for generation, name in enumerate(real):
        save_checkpoint(path, "denoiser", {"generation": generation}, tensors(generation))

        def replace(file: Path, generation: int = generation, name: str = name) -> object:
            result = real[name](file)
            monkeypatch.setattr(checkpoint, name, real[name])
            save_checkpoint(path, "denoiser", {"generation": generation + 10}, tensors(generation + 10))
            return result

        monkeypatch.setattr(checkpoint, name, replace)
        config, loaded = load_checkpoint(path)
        assert config == {"generation": generation + 10}
        assert_same(loaded, tensors(generation + 10))
