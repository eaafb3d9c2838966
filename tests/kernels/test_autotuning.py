"""Choosing launch configurations by time: which one, when nothing may be timed, and what files may do."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from native import ROOT

from tgdp_fast.kernels import autotuning
from tgdp_fast.kernels.autotuning import ENVIRONMENT, LEAST_GAIN, Problem, Tuner, rounded_up, tuned

PROBLEM = Problem("product_kernel", "torch.bfloat16 True", (64, 512), "Some Card", "3.0")
DEFAULT, SECOND, THIRD = CANDIDATES = [(64, 4), (128, 4), (128, 8)]


class Clock:
    """A timer that runs what it times and returns the milliseconds that each candidate is said to take."""

    def __init__(self, **milliseconds: float) -> None:
        self.milliseconds = [milliseconds.get(name, 1.0) for name in ("default", "second", "third")]
        self.ran: list[tuple[int, ...]] = []
        self.timed = 0

    def __call__(self, call) -> float:
        self.timed += 1
        call()
        return self.milliseconds[CANDIDATES.index(self.ran[-1])]


def choose(tuner: Tuner, clock: Clock, problem: Problem = PROBLEM, measure: bool = True, candidates=CANDIDATES):
    return tuner.choose(problem, candidates, clock.ran.append, measure=measure)


def raising(*broken):
    def run(candidate):
        if candidate in broken:
            raise RuntimeError("out of resource: shared memory")

    return run


# choice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"default": 3.0, "second": 2.0, "third": 1.0}, THIRD),
        ({"default": 3.0, "second": 1.0, "third": 2.0}, SECOND),
        ({"default": 1.0, "second": 2.0, "third": 3.0}, DEFAULT),
        ({"default": 1.0, "second": 1.0, "third": 1.0}, DEFAULT),
        ({"default": 1.0, "second": 1.0 - 0.9 * LEAST_GAIN}, DEFAULT),
        ({"default": 1.0, "second": 1.0 - 1.1 * LEAST_GAIN}, SECOND),
        ({"default": 2.0, "second": 1.0, "third": 1.0}, SECOND),
    ],
)
def test_the_fastest_is_chosen_and_the_default_where_nothing_is_gained(times, expected):
    clock = Clock(**times)
    assert choose(Tuner(None, clock), clock) == expected
    assert clock.ran == CANDIDATES


def test_candidates_that_raise_are_left_out():
    times = iter([3.0, 2.0])

    def timer(call):
        call()
        return next(times)

    assert Tuner(None, timer).choose(PROBLEM, CANDIDATES, raising(SECOND), measure=True) == THIRD
    times = iter([3.0, 2.0])
    assert Tuner(None, timer).choose(PROBLEM, CANDIDATES, raising(DEFAULT), measure=True) == THIRD


def test_where_all_raise_the_default_is_left_to_raise_and_nothing_is_remembered(tmp_path: Path):
    clock = Clock(third=0.5)
    tuner = Tuner(tmp_path, clock)
    assert tuner.choose(PROBLEM, CANDIDATES, raising(*CANDIDATES), measure=True) is None
    assert not list(tmp_path.iterdir())
    assert choose(tuner, clock) == THIRD


def test_a_choice_is_measured_once(tmp_path: Path):
    clock = Clock(third=0.5)
    tuner = Tuner(tmp_path, clock)
    for _ in range(3):
        assert choose(tuner, clock) == THIRD
    assert clock.timed == len(CANDIDATES)
    # Another process, which finds the file.
    later = Clock()
    assert choose(Tuner(tmp_path, later), later) == THIRD
    assert later.timed == 0


def test_each_problem_has_its_own_choice(tmp_path: Path):
    tuner = Tuner(tmp_path, clock := Clock(third=0.5))
    assert choose(tuner, clock) == THIRD
    others = [
        replace(PROBLEM, kernel="other_kernel"),
        replace(PROBLEM, variant="torch.float16 True"),
        replace(PROBLEM, sizes=(64, 1024)),
        replace(PROBLEM, device="Another Card"),
        replace(PROBLEM, triton="3.1"),
        replace(PROBLEM, tgdp_fast="another"),
    ]
    clock.milliseconds = [1.0, 0.5, 1.0]
    for problem in others:
        assert choose(tuner, clock, problem) == SECOND
    assert clock.timed == (1 + len(others)) * len(CANDIDATES)
    assert len(list(tmp_path.iterdir())) == 1 + len(others)


def test_threads_that_ask_at_once_measure_once():
    clock = Clock(third=0.5)
    tuner = Tuner(None, clock)
    barrier = threading.Barrier(4)
    found = []

    def ask():
        barrier.wait()
        found.append(choose(tuner, clock))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [THIRD] * 4
    assert clock.timed == len(CANDIDATES)


def test_a_timed_launch_may_contain_another():
    inner_clock, clock = Clock(second=0.5), Clock(third=0.5)
    clocks = [clock, *[inner_clock] * 3, clock, clock]
    tuner = Tuner(None, lambda call: clocks.pop(0)(call))
    inner = replace(PROBLEM, kernel="inner")

    def run(candidate):
        assert tuner.choose(inner, CANDIDATES, inner_clock.ran.append, measure=True) == SECOND
        clock.ran.append(candidate)

    assert tuner.choose(PROBLEM, CANDIDATES, run, measure=True) == THIRD


# files ------------------------------------------------------------------------------------------------------


def test_files_say_what_they_are_about(tmp_path: Path):
    tuner = Tuner(tmp_path / "new" / "folder", clock := Clock(second=0.5))
    choose(tuner, clock)
    (path,) = (tmp_path / "new" / "folder").iterdir()
    assert path.name.startswith("product_kernel-")
    assert json.loads(path.read_text()) == {
        "problem": {
            "kernel": "product_kernel",
            "variant": "torch.bfloat16 True",
            "sizes": [64, 512],
            "device": "Some Card",
            "triton": "3.0",
            "tgdp_fast": PROBLEM.tgdp_fast,
        },
        "choice": [128, 4],
    }


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"problem": ',
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b"{}",
        b'{"problem": {"kernel": "another"}, "choice": [128, 8]}',
        b'{"problem": PROBLEM, "choice": 5}',
        b'{"problem": PROBLEM}',
    ],
)
def test_a_file_that_holds_something_else_is_ignored_with_one_warning(tmp_path: Path, caplog, content):
    problems = [PROBLEM, replace(PROBLEM, sizes=(1, 1))]
    for problem in problems:
        choose(Tuner(tmp_path, clock := Clock()), clock, problem)
    for path in tmp_path.iterdir():
        about = json.dumps(json.loads(path.read_text())["problem"]).encode()
        path.write_bytes(content.replace(b"PROBLEM", about))
    tuner = Tuner(tmp_path, clock := Clock(third=0.5))
    with caplog.at_level(logging.WARNING):
        for problem in problems:
            assert choose(tuner, clock, problem, measure=False) is None
            assert choose(tuner, clock, problem) == THIRD
    assert len(caplog.records) == 1
    assert "is ignored" in caplog.text
    assert "delete it" in caplog.text
    # The measurement has replaced them.
    later = Clock()
    assert choose(Tuner(tmp_path, later), later) == THIRD
    assert later.timed == 0


@pytest.mark.parametrize("choice", [[1, 2], [], ["128", "8"], [[128, 8]]])
def test_a_choice_that_is_no_candidate_is_measured_again(tmp_path: Path, choice):
    choose(Tuner(tmp_path, clock := Clock()), clock)
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"choice": choice}))
    tuner = Tuner(tmp_path, clock := Clock(third=0.5))
    assert choose(tuner, clock, measure=False) is None
    assert choose(tuner, clock) == THIRD
    assert json.loads(path.read_text())["choice"] == list(THIRD)


def test_a_folder_that_cannot_be_written_costs_a_warning_only(tmp_path: Path, caplog):
    (tmp_path / "file").write_text("")
    tuner = Tuner(tmp_path / "file" / "below", clock := Clock(third=0.5))
    with caplog.at_level(logging.WARNING):
        for size in (1, 2):
            problem = replace(PROBLEM, sizes=(size,))
            assert choose(tuner, clock, problem) == choose(tuner, clock, problem) == THIRD
    assert clock.timed == 2 * len(CANDIDATES)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2  # one for reading, one for writing


def test_processes_that_write_at_once_leave_whole_files(tmp_path: Path):
    code = """
import sys
from pathlib import Path
from tgdp_fast.kernels.autotuning import Problem, Tuner
for _ in range(5):
    tuner = Tuner(Path(sys.argv[1]), lambda call: 1.0)
    for size in range(10):
        tuner._choices.clear()
        tuner._write(Problem("kernel", "x" * 2000, (size,), "Some Card", "3.0"), (int(sys.argv[2]), size))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(number)], env=environment) for number in (1, 2)
    ]
    read = 0
    while any(process.poll() is None for process in processes):
        for path in tmp_path.glob("*.json"):
            assert json.loads(path.read_text())["choice"][0] in (1, 2)
            read += 1
    assert [process.returncode for process in processes] == [0, 0]
    assert read > 0
    files = sorted(tmp_path.iterdir())
    assert len(files) == 10  # and nothing half-written beside them
    assert sorted(json.loads(path.read_text())["choice"][1] for path in files) == list(range(10))


@pytest.mark.parametrize(
    ("value", "expected"),
    [("here", Path("HOME") / ".cache"), ("", Path("HOME") / ".cache"), (None, Path("HOME") / ".cache"), ("/x", "/x")],
)
def test_the_folder_is_the_users_cache(monkeypatch, tmp_path, value, expected):
    # A relative path in the variable is to be ignored, by the XDG Base Directory Specification.
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert autotuning.cache_folder() == Path(str(expected).replace("HOME", str(tmp_path))) / "tgdp_fast" / "triton"


def test_a_user_without_a_home_has_choices_in_memory(monkeypatch):
    def refuse():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", refuse)
    assert autotuning.cache_folder() is None
    assert "memory alone" in autotuning.state()


# when -------------------------------------------------------------------------------------------------------


class OnGpu(SimpleNamespace):
    """What a launch sees of a tensor on a GPU."""

    device = torch.device("cuda", 0)


@pytest.fixture
def on(monkeypatch):
    """Autotuning on a card that is not there, in memory; its clock."""
    clock = Clock(third=0.5)
    tuner = Tuner(None, clock)
    monkeypatch.setenv(ENVIRONMENT, "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(autotuning, "_tuner", lambda: tuner)
    monkeypatch.setattr(autotuning, "_device_and_version", lambda device: ("Some Card", "3.0"))
    monkeypatch.setattr(autotuning, "_PLAIN", (OnGpu, torch.Tensor))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return clock


KERNEL = SimpleNamespace(__name__="some_kernel")


def launched(clock: Clock, tensor=None, sizes=(100, 7), *variant: object):
    """The choice that a launch is done with."""

    def run(choice):
        clock.ran.append(choice)
        return choice

    given = OnGpu() if tensor is None else tensor
    return tuned(run, lambda *_: DEFAULT, lambda *_: [SECOND, THIRD, DEFAULT], KERNEL, given, sizes, *variant)


def test_switched_off_nothing_is_listed_timed_or_looked_up(on, monkeypatch):
    def never(*_):
        raise AssertionError

    for value in ("0", "", "yes", None):
        monkeypatch.delenv(ENVIRONMENT)
        if value is not None:
            monkeypatch.setenv(ENVIRONMENT, value)
        monkeypatch.setattr(autotuning, "_tuner", never)
        assert tuned(lambda choice: choice, lambda _: DEFAULT, never, KERNEL, OnGpu(), (1,)) == DEFAULT
        monkeypatch.setenv(ENVIRONMENT, "")


def test_switched_on_a_launch_has_the_fastest(on):
    assert launched(on) == THIRD
    assert on.ran == [*CANDIDATES, THIRD]
    # Sizes that round up to the same are one problem, another variant is another one.
    assert launched(on, None, (128, 5)) == THIRD
    assert on.timed == 3
    launched(on, None, (129, 5))
    launched(on, None, (128, 5), torch.bfloat16)
    assert on.timed == 9


@pytest.mark.parametrize("reason", ["capturing", "compiling", "interpreter", "fake", "cpu", "meta"])
def test_where_nothing_may_be_timed_an_earlier_choice_or_the_default_is_used(on, monkeypatch, reason):
    tensor: object = OnGpu()
    with monkeypatch.context() as patch:
        if reason == "capturing":
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        elif reason == "compiling":
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
        elif reason == "interpreter":
            patch.setenv("TRITON_INTERPRET", "1")
        elif reason == "fake":
            from torch._subclasses.fake_tensor import FakeTensorMode

            with FakeTensorMode():
                tensor = torch.empty(3, device="cuda")
        else:
            tensor = torch.empty(3, device=reason)
        assert not autotuning.measurable(tensor)
        assert launched(on, tensor) == DEFAULT
        assert on.timed == 0
        assert launched(on) == (DEFAULT if reason in ("capturing", "compiling", "interpreter") else THIRD)
    assert launched(on) == THIRD
    assert on.timed == 3
    if reason == "capturing":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert launched(on) == THIRD
        assert launched(on, None, (1000, 7)) == DEFAULT
        assert on.timed == 3


def test_calls_of_a_problem_have_the_same_candidates_and_a_call_without_a_choice_the_heuristic_of_its_sizes(on):
    def listed(size):
        seen = []
        tuned(seen.append, lambda n: (n, 0), lambda n: [(n, 1)], KERNEL, torch.empty(1), (size,))
        with autotuning.deciding(lambda run, candidates: seen.append(candidates)):
            tuned(seen.append, lambda n: (n, 0), lambda n: [(n, 1), (n, 0)], KERNEL, torch.empty(1), (size,))
        return seen

    assert listed(100) == [(100, 0), [(128, 0), (128, 1)]]
    assert listed(128) == [(128, 0), [(128, 0), (128, 1)]]


def test_deterministic_algorithms_are_the_defaults(on):
    assert launched(on) == THIRD
    torch.use_deterministic_algorithms(True)
    try:
        assert launched(on) == DEFAULT
    finally:
        torch.use_deterministic_algorithms(False)
    assert launched(on) == THIRD


def test_nothing_to_do_is_not_timed(on):
    assert launched(on, None, (0, 5)) == DEFAULT
    assert on.timed == 0


def test_a_policy_decides_within_its_block(on):
    with autotuning.deciding(autotuning.all_of_them):
        assert launched(on) == DEFAULT
    assert on.ran == CANDIDATES
    assert on.timed == 0
    assert launched(on) == THIRD


@pytest.mark.parametrize(("size", "expected"), [(0, 0), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (1 << 40, 1 << 40)])
def test_sizes_are_rounded_up(size, expected):
    assert rounded_up(size) == expected


def test_the_state_says_what_is_on_and_where(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert autotuning.state().startswith(f"off; {ENVIRONMENT}=1 ")
    monkeypatch.setenv(ENVIRONMENT, "1")
    folder = autotuning.cache_folder()
    assert folder is not None
    choose(Tuner(folder, clock := Clock()), clock)
    where = os.path.join("~", ".cache", "tgdp_fast", "triton")
    assert autotuning.state() == f"on; choices are kept in {where}, which has 1"
