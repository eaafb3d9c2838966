"""Commands that are killed at a call that changes files, and runs of several processes at once, for tests.

A script, because each of its processes is a fork: that is safe only before torch has started threads.

    python runs_at_once.py kills STRIDE STRIDE
    python runs_at_once.py race ROUNDS
    python runs_at_once.py saves SAVES

It works in the current folder and prints JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tgdp_fast import Denoiser, NoiseSchedule, ScoreMLP, TrainingConfig, sample_to_file
from tgdp_fast.cli import main as cli
from tgdp_fast.fit import guidance, training
from tgdp_fast.runtime.checkpoint import load_checkpoint, save_checkpoint
from tgdp_fast.runtime.locks import InUseError

torch.set_num_threads(1)
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
TINY = TrainingConfig(steps=3, batch_size=16, ema_decay=0.5, warmup=1)


def forked(work: Callable[[], int | None]) -> int:
    """The process id of a child that runs ``work``."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            status = work() or 0
        finally:
            sys.stdout.flush()
            os._exit(status)
    return process


def status_of(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_at_change(number: int) -> None:
    """Kill this process before its change of that number to a file or folder below the current one."""
    place, left = os.getcwd(), number

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in _CHANGES) and isinstance(arguments[0], str | bytes):
            left -= os.path.abspath(os.fsdecode(arguments[0])).startswith(place)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def files_of(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() if path.is_file() else b"" for path in place.rglob("*")}


def run(arguments: list[str], number: int = 0) -> int:
    """The command's exit status; killed at the change of that number."""
    if number:
        kill_at_change(number)
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        return cli.main(arguments)


def kills(transfer_stride: str, sample_stride: str) -> dict[str, Any]:
    """Run commands, killed at every so many changes of files, and once more: how often, and what was wrong."""
    # What torch imports when it is first used: once, and not in each fork.
    importlib.import_module("torch._dynamo")
    importlib.import_module("torch.fx.experimental.symbolic_shapes")
    real = guidance.cross_fitted
    guidance.cross_fitted = lambda *a, **k: real(*a, **{**k, "settings": TINY})  # type: ignore[assignment]
    guidance.default_training = lambda n: TINY  # type: ignore[assignment]
    inspect.unwrap(training.minimize).__kwdefaults__["save_every"] = 0.0  # A training state after each step.
    root, random = Path.cwd(), np.random.default_rng(0)
    np.save("source.npy", random.standard_normal((60, 2)).astype(np.float32))
    np.save("target.npy", random.standard_normal((20, 2)).astype(np.float32))
    inputs = ["--source", str(root / "source.npy"), "--target", str(root / "target.npy"), "--train-steps", "3"]
    drawing = ["--num", "9", "--steps", "1", "--out", "o.npy", "--quiet"]
    found = {"transfer": killed(root, ["transfer", *inputs, "--save", "model", *drawing], int(transfer_stride))}
    shutil.copytree(root / "whole" / "model", root / "model")
    found["sample"] = killed(root, ["sample", str(root / "model"), "--seed", "5", *drawing], int(sample_stride))
    return found


def killed(root: Path, command: list[str], stride: int) -> dict[str, Any]:
    """The same for one command."""

    def start(folder: str) -> Path:
        shutil.rmtree(root / folder, ignore_errors=True)
        (root / folder).mkdir()
        os.chdir(root / folder)
        return root / folder

    place = start("whole")
    assert status_of(forked(lambda: run(command))) == 0
    expected, wrong, points = files_of(place), [], 0
    for number in range(1, 10_000, stride):
        place = start("killed")
        status = status_of(forked(lambda: run(command, number)))  # noqa: B023
        if status == 0:
            break
        points += 1
        again = status_of(forked(lambda: run(command)))
        found = files_of(place)
        if status != -signal.SIGKILL or again != 0 or found != expected:
            wrong.append([number, status, again, sorted(set(found) ^ set(expected))])
    return {"points": points, "wrong": wrong}


def race(rounds: str) -> dict[str, int]:
    """Two runs that draw to one file at the same moment, every other time with the same seed: what came out."""
    torch.manual_seed(0)
    denoiser = Denoiser(ScoreMLP((2,), width=8), NoiseSchedule.vp_linear())
    found: Counter[str] = Counter()

    def draw(path: str, seed: int) -> np.ndarray:
        return sample_to_file(path, denoiser, num=60, steps=1, seed=seed, block_size=4)

    right = {seed: draw(f"right-{seed}.npy", seed) for seed in (5, 77)}
    for number in range(int(rounds)):
        path, (reader, writer) = f"{number}.npy", os.pipe()

        def draw_at_once(seed: int, path: str = path, reader: int = reader, writer: int = writer) -> int:
            os.close(writer)
            os.read(reader, 1)  # Returns when the parent closes the other end: for both at the same moment.
            try:
                return 0 if np.array_equal(draw(path, seed), right[seed]) else 3
            except InUseError:
                return 4

        processes = [forked(lambda seed=seed: draw_at_once(seed)) for seed in (5, 77 if number % 2 else 5)]  # type: ignore[misc]
        os.close(reader)
        os.close(writer)
        outcomes = sorted(status_of(process) for process in processes)
        found[{(0, 0): "both", (0, 4): "one refused"}.get(tuple(outcomes), str(outcomes))] += 1  # type: ignore[call-overload]
        if not any(np.array_equal(np.load(path), values) for values in right.values()):
            found["mixed"] += 1
    found["left"] = sum(not path.name.endswith(".npy") for path in Path.cwd().iterdir())
    return dict(found)


def saves(count: str) -> dict[str, Any]:
    """Three processes that save one checkpoint and two that load it meanwhile: their exit statuses, what is there."""

    def save(value: float) -> None:
        save_checkpoint("model", "numbers", {"value": value}, {"x": torch.full((500,), value)})

    def write(value: int) -> None:
        for step in range(int(count)):
            save(value + 10.0 * step)

    def read() -> None:
        while not Path("done").exists():
            config, tensors = load_checkpoint("model", "numbers")
            assert bool((tensors["x"] == config["value"]).all())

    save(0.0)
    writers = [forked(lambda value=value: write(value)) for value in range(3)]  # type: ignore[misc]
    readers = [forked(read) for _ in range(2)]
    statuses = [status_of(process) for process in writers]
    Path("done").touch()
    statuses += [status_of(process) for process in readers]
    return {"statuses": statuses, "files": sorted(path.name for path in Path.cwd().iterdir())}


if __name__ == "__main__":
    print(json.dumps({"kills": kills, "race": race, "saves": saves}[sys.argv[1]](*sys.argv[2:])))
