"""sample_to_file(): the samples of sample(), resumed where it stopped if nothing that counts changed."""

from __future__ import annotations

import dataclasses
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_sampling import SCHEDULE, never, oracle, random_models
from torch import Tensor, nn

from tgdp_fast import Denoiser, GuidedDenoiser, sample, sample_to_file, solver_table
from tgdp_fast.runtime.locks import InUseError


def test_file_equals_sample_and_leaves_nothing_else(tmp_path: Path) -> None:
    denoiser, guidance = random_models()
    expected = sample(denoiser, guidance, num=17, steps=3).numpy()
    found = sample_to_file(tmp_path / "x.npy", denoiser, guidance, num=17, steps=3, block_size=5)
    assert np.allclose(found, expected, atol=1e-4)
    assert np.array_equal(np.load(tmp_path / "x.npy"), found)
    assert [p.name for p in tmp_path.iterdir()] == ["x.npy"]


class InterruptedRunError(Exception):
    pass


class Interrupting(nn.Module):
    """Stops the run after a number of evaluations."""

    def __init__(self, evaluations: float) -> None:
        super().__init__()
        self.left = evaluations
        self.rows = 0

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        if self.left <= 0:
            raise InterruptedRunError
        self.left -= 1
        self.rows += len(x)
        return 0.3 * x


def test_an_interrupted_file_resumes_where_it_was(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num": 20, "shape": (2,), "steps": 4, "block_size": 6, "seed": 8}
    path = tmp_path / "x.npy"
    with pytest.raises(InterruptedRunError):
        sample_to_file(path, Denoiser(Interrupting(10), SCHEDULE), **options)
    assert not path.exists()
    again = Interrupting(math.inf)
    found = sample_to_file(path, Denoiser(again, SCHEDULE), batch_size=4, **options)
    assert again.rows == 4 * (20 - 12)  # Two blocks of six were finished and are not drawn again.
    expected = sample(Denoiser(Interrupting(math.inf), SCHEDULE), num=20, shape=(2,), steps=4, seed=8)
    assert np.allclose(found, expected.numpy(), atol=1e-5)


def interrupt(path: Path, *models: Any, **options: Any) -> None:
    """Run sample_to_file until its second block starts."""
    starts = 0

    def stop(step: int, *_: Any) -> None:
        nonlocal starts
        starts += step == 0
        if starts == 2:
            raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        sample_to_file(path, *models, callback=stop, **options)
    assert [p.name for p in sorted(path.with_name(path.name + ".partial").iterdir())] == [
        "arguments.json",
        "block-000000000000.npy",
    ]


def resume(path: Path, *models: Any, **options: Any) -> tuple[np.ndarray, int]:
    """The array of sample_to_file, and how many samples were drawn for it."""
    drawn = 0

    def count(step: int, t: float, x: Tensor, x0: Tensor) -> None:
        nonlocal drawn
        drawn += len(x) if step == 0 else 0

    return sample_to_file(path, *models, callback=count, **options), drawn


BASE: dict[str, Any] = {
    "num": 7,
    "labels": [0, 1, 2, 2, 1, 0, 0],
    "solver": "ddim",
    "steps": 4,
    "scale": 0.5,
    "seed": 8,
    "first_index": 5,
    "block_size": 3,
}


@pytest.mark.parametrize(
    "same",
    [
        {},
        {"batch_size": 2},
        {"block_size": 2},
        {"scale": lambda t: 0.5},
        {"interval": (0.0, 2.0)},
        {"backend": "reference"},
        {"device": "cpu"},
        {"labels": torch.tensor([0, 1, 2, 2, 1, 0, 0], dtype=torch.int32)},
        {"first_index": np.int64(5), "num": np.int64(7), "seed": np.uint64(8)},
        {"solver": solver_table("ddim", SCHEDULE, 4)},
    ],
    ids=lambda same: ",".join(same) or "nothing",
)
def test_a_file_resumes_where_it_was_interrupted(tmp_path: Path, same: dict[str, Any]) -> None:
    models = random_models(3)
    interrupt(tmp_path / "x.npy", *models, **BASE)
    found, drawn = resume(tmp_path / "x.npy", *random_models(3), **(BASE | same))
    assert drawn == 7 - 3
    expected = sample(*models, **{k: v for k, v in BASE.items() if k != "block_size"})
    assert np.allclose(found, expected.numpy(), rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert [p.name for p in tmp_path.iterdir()] == ["x.npy"]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 9},
        {"first_index": 6},
        {"num": 6, "labels": [0, 1, 2, 2, 1, 0]},
        {"labels": [0, 1, 2, 2, 1, 0, 1]},
        {"labels": nn.functional.one_hot(torch.tensor([0, 1, 2, 2, 1, 0, 0]), 3)},
        {"scale": 0.6},
        {"scale": lambda t: 0.5 + 0.1 * t},
        {"interval": (0.0, 0.9)},
        {"clamp": (-2.0, 2.0)},
        {"gradient_norm_limit": 0.1},
        {"solver": "ddpm"},
        {"steps": 5},
        {"spacing": "uniform"},
        {"eta": 0.5},
        {"precision": "bf16"},
        {"signature": "these models"},
    ],
    ids=lambda change: ",".join(change),
)
def test_blocks_of_other_arguments_are_not_used(tmp_path: Path, change: dict[str, Any]) -> None:
    models, options = random_models(3), BASE | change
    interrupt(tmp_path / "x.npy", *models, **BASE)
    found, drawn = resume(tmp_path / "x.npy", *models, **options)
    assert drawn == options["num"]
    expected = sample(*models, **{k: v for k, v in options.items() if k not in ("block_size", "signature")}).numpy()
    # As in test_samples_do_not_depend_on_the_batch_size; bfloat16 may round another way in every layer.
    tolerance = 0.05 if "precision" in change else 1e-3
    assert np.allclose(found, expected, rtol=tolerance, atol=tolerance * float(np.abs(expected).max()))


def test_another_number_of_samples_is_another_run(tmp_path: Path) -> None:
    """The last block of 5 samples is shorter than that of 6. A failing finish costs no blocks."""
    denoiser, _ = random_models()
    options: dict[str, Any] = {"num": 5, "steps": 2, "block_size": 3}

    def fail(_: np.ndarray) -> np.ndarray:
        raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        sample_to_file(tmp_path / "x.npy", denoiser, finish=fail, **options)
    found, drawn = resume(tmp_path / "x.npy", denoiser, finish=lambda array: 2 * array, **(options | {"num": 6}))
    assert drawn == 6
    assert np.allclose(found, 2 * sample(denoiser, num=6, steps=2).numpy(), atol=1e-3)
    with pytest.raises(InterruptedRunError):
        sample_to_file(tmp_path / "x.npy", denoiser, finish=fail, **options)
    assert resume(tmp_path / "x.npy", denoiser, **options)[1] == 0


def _scaled(module: nn.Module, factor: float) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(factor)
    return module


def _variants(kind: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    denoiser, guidance = random_models()
    other_denoiser, other_guidance = random_models()
    if kind == "unguided":
        return (denoiser,), (denoiser, guidance)
    if kind == "scale of a GuidedDenoiser":
        return (GuidedDenoiser(denoiser, guidance, scale=0.0),), (GuidedDenoiser(denoiser, guidance, scale=50.0),)
    if kind == "denoiser weights":
        return (denoiser, guidance), (_scaled(other_denoiser, 1.5), guidance)
    if kind == "guidance weights":
        return (denoiser, guidance), (denoiser, _scaled(other_guidance, 1.5))
    if kind == "prediction":
        return (denoiser, guidance), (Denoiser(denoiser.network, SCHEDULE, time_input="half_log_snr"), guidance)
    assert kind == "activation"
    plain, other = (nn.Sequential(nn.Linear(3, 3), act) for act in (nn.ReLU(), nn.Tanh()))
    other.load_state_dict(plain.state_dict())
    return (Denoiser(_Timeless(plain), SCHEDULE),), (Denoiser(_Timeless(other), SCHEDULE),)


class _Timeless(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        result: Tensor = self.inner(x)
        return result


@pytest.mark.parametrize(
    "kind",
    ["unguided", "scale of a GuidedDenoiser", "denoiser weights", "guidance weights", "prediction", "activation"],
)
def test_blocks_of_other_models_are_not_used(tmp_path: Path, kind: str) -> None:
    first, second = _variants(kind)
    options: dict[str, Any] = {"num": 5, "shape": (3,), "steps": 2, "block_size": 3}
    interrupt(tmp_path / "x.npy", *first, **options)
    _, drawn = resume(tmp_path / "x.npy", *second, **options)
    assert drawn == 5


def test_a_ready_table_counts_by_all_its_values(tmp_path: Path) -> None:
    """The text of a long array leaves out the middle."""
    denoiser, _ = random_models()
    table = solver_table("dpmpp_3m", SCHEDULE, 200)
    matrix = table.matrix.copy()
    matrix[100] *= 1.01
    other = dataclasses.replace(table, matrix=matrix)
    assert str(other) == str(table)
    options: dict[str, Any] = {"num": 5, "block_size": 3}
    interrupt(tmp_path / "x.npy", denoiser, solver=table, **options)
    assert resume(tmp_path / "x.npy", denoiser, solver=other, **options)[1] == 5


def test_models_that_cannot_be_told_apart_need_a_signature(tmp_path: Path) -> None:
    models = oracle()
    options: dict[str, Any] = {"num": 5, "steps": 2, "block_size": 3}
    with pytest.raises(ValueError, match=r"signature must be given, because the denoiser \(ExactDenoiser\)"):
        sample_to_file(tmp_path / "x.npy", *models, **options)
    with pytest.raises(ValueError, match=r"signature must be given, because the guidance \(ExactGuidance\)"):
        sample_to_file(tmp_path / "x.npy", random_models(shape=(2,))[0], models[1], **options)
    with pytest.raises(ValueError, match="signature must be a text"):
        sample_to_file(tmp_path / "x.npy", *models, signature="", **options)
    interrupt(tmp_path / "x.npy", *models, signature="oracle", **options)
    assert resume(tmp_path / "x.npy", *models, signature="oracle", **options)[1] == 2


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("b.bin", {}, "path must be a file that ends in .npy, got .*b.bin"),
        ("folder.npy", {}, "path must be a file that ends in .npy, got .*folder.npy"),
        ("no/such/x.npy", {}, "path must lie in an existing folder, .*create .*no/such first"),
        ("taken.npy", {}, "needs the folder .*taken.npy.partial for its blocks, but that is a file"),
        ("x.npy", {"block_size": -5}, "block_size must be an integer >= 1, got -5"),
        ("x.npy", {"block_size": 0}, "block_size must be an integer >= 1, got 0"),
    ],
)
def test_a_bad_file_is_refused_before_any_work(
    tmp_path: Path, name: str, arguments: dict[str, Any], message: str
) -> None:
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "taken.npy.partial").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    denoiser, _ = random_models()
    denoiser.network.register_forward_hook(never)
    with pytest.raises(ValueError, match=message):
        sample_to_file(tmp_path / name, denoiser, num=4, **arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unknown_argument_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'stepz'"):
        sample_to_file(tmp_path / "x.npy", random_models()[0], num=4, stepz=3)


@pytest.mark.parametrize("mistake", [{"steps": 0}, {"solver": "bad"}, {"seed": -1}, {"labels": None}])
def test_a_mistake_costs_no_finished_blocks(tmp_path: Path, mistake: dict[str, Any]) -> None:
    models = random_models(3)
    interrupt(tmp_path / "x.npy", *models, **BASE)
    with pytest.raises(ValueError, match="."):
        sample_to_file(tmp_path / "x.npy", *models, **(BASE | mistake))
    assert resume(tmp_path / "x.npy", *models, **BASE)[1] == 4


def test_a_run_that_fails_in_its_first_block_leaves_all_as_it_was(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num": 6, "shape": (2,), "steps": 2, "block_size": 4}
    failing = Denoiser(Interrupting(1), SCHEDULE)
    with pytest.raises(InterruptedRunError):
        sample_to_file(tmp_path / "x.npy", failing, **options)
    assert not any(tmp_path.iterdir())
    denoiser = Denoiser(Interrupting(math.inf), SCHEDULE)
    interrupt(tmp_path / "x.npy", denoiser, **options)
    with pytest.raises(InterruptedRunError):
        sample_to_file(tmp_path / "x.npy", failing, **(options | {"seed": 1}))
    assert resume(tmp_path / "x.npy", denoiser, **options)[1] == 2


def test_a_kill_costs_at_most_8192_samples_or_one_batch(tmp_path: Path) -> None:
    denoiser = Denoiser(Interrupting(math.inf), SCHEDULE)
    options: dict[str, Any] = {"num": 8_192 + 30_003, "shape": (1,), "steps": 1}
    interrupt(tmp_path / "x.npy", denoiser, batch_size=8_192 + 30_000, **options)
    found, drawn = resume(tmp_path / "x.npy", denoiser, **options)
    assert drawn == 3
    assert np.allclose(found, sample(denoiser, **options).numpy(), atol=1e-5)
    interrupt(tmp_path / "y.npy", denoiser, **options)
    assert resume(tmp_path / "y.npy", denoiser, batch_size=30_000, **options)[1] == 30_003


def test_no_samples_make_an_empty_file(tmp_path: Path) -> None:
    found = sample_to_file(tmp_path / "x.npy", *random_models(), num=0, steps=2)
    assert found.shape == (0, 3)
    assert np.load(tmp_path / "x.npy").dtype == np.float32


def test_only_files_of_ours_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "x.npy.partial"
    folder.mkdir()
    ours = [
        "block-000000000000.npy",
        ".block-000000000003.npy.0123abcd.partial",  # A save that was killed.
        ".arguments.json.89abcdef.partial",
        "arguments.json",
    ]
    theirs = ["notes.txt", "block-notes.npy", ".block-000000000003.npy.copy.partial", "block-000000000000.npy.bak"]
    for name in ours + theirs:
        (folder / name).write_text("mine")
    (folder / "block-000000000009.npy").mkdir()
    options: dict[str, Any] = {"num": 3, "shape": (2,), "steps": 2}
    sample_to_file(tmp_path / "x.npy", Denoiser(Interrupting(math.inf), SCHEDULE), **options)
    assert {p.name for p in folder.iterdir()} == {*theirs, "block-000000000009.npy"}
    (folder / "block-000000000009.npy").rmdir()
    for name in theirs:
        (folder / name).unlink()
    (folder / ours[1]).write_text("half")
    sample_to_file(tmp_path / "x.npy", Denoiser(Interrupting(math.inf), SCHEDULE), **options)
    assert not folder.exists()


@pytest.mark.parametrize(
    "damage",
    ["empty", "truncated", "longer", "no rows", "scalar", "other columns", "float64", "nan", "bit", "digest", "moved"],
)
def test_a_damaged_block_is_drawn_again(tmp_path: Path, damage: str) -> None:
    denoiser, _ = random_models()
    options: dict[str, Any] = {"num": 9, "steps": 2, "block_size": 3}
    expected = sample_to_file(tmp_path / "whole.npy", denoiser, **options)
    starts = 0

    def stop(step: int, *_: Any) -> None:
        nonlocal starts
        starts += step == 0
        if starts == 3:
            raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        sample_to_file(tmp_path / "x.npy", denoiser, callback=stop, **options)
    first, block = (tmp_path / "x.npy.partial" / f"block-{start:012d}.npy" for start in (0, 3))
    content = block.read_bytes()
    arrays = {
        "no rows": np.zeros((0, 3), np.float32),
        "scalar": np.float32(1.0),
        "other columns": np.zeros((3, 2), np.float32),
        "float64": np.zeros((3, 3)),
        "nan": np.full((3, 3), np.nan, np.float32),
    }
    if damage in arrays:
        np.save(block, arrays[damage])
    else:
        changed = {
            "empty": b"",
            "truncated": content[:-40],
            "longer": content + bytes(2**20),
            "bit": content[:-40] + bytes([content[-40] ^ 1]) + content[-39:],
            "digest": content[:-32],  # As an earlier version wrote it.
            "moved": first.read_bytes(),
        }
        block.write_bytes(changed[damage])
    found, drawn = resume(tmp_path / "x.npy", denoiser, **options)
    assert drawn == 6
    assert np.array_equal(found, expected)
    assert not block.parent.exists()


def test_a_run_within_another_of_the_same_file_does_not_mix_with_it(tmp_path: Path) -> None:
    """As if a second run had been started by mistake, and stopped in its third block."""
    denoiser, _ = random_models()
    options: dict[str, Any] = {"num": 15, "steps": 1, "block_size": 3}
    expected = sample_to_file(tmp_path / "whole.npy", denoiser, seed=5, **options)
    starts = 0

    def intrude(step: int, *_: Any) -> None:
        nonlocal starts
        starts += 1
        if starts == 2:
            interrupted = iter(range(3))
            with pytest.raises(StopIteration):
                sample_to_file(
                    tmp_path / "x.npy", denoiser, seed=77, callback=lambda *_: next(interrupted) and None, **options
                )

    assert np.array_equal(sample_to_file(tmp_path / "x.npy", denoiser, seed=5, callback=intrude, **options), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole.npy", "x.npy"]


def test_a_file_that_another_run_writes_is_refused(tmp_path: Path) -> None:
    denoiser, _ = random_models()
    refused: list[InUseError] = []

    def run() -> None:
        try:
            sample_to_file(tmp_path / "x.npy", denoiser, num=3, steps=1)
        except InUseError as error:
            refused.append(error)

    def start_another(*_: Any) -> None:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    sample_to_file(tmp_path / "x.npy", denoiser, num=3, steps=1, callback=start_another)
    assert "x.npy is being written by process" in str(refused[0])
