"""Progress of long stages: lines where there is no terminal, a bar where there is one."""

from __future__ import annotations

import io
import itertools

import pytest

from tgdp_fast.runtime.progress import duration, progress_bar, say, tracked


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(steps: int, seconds: float, *, first: float = 0.0, **options: object) -> list[tuple[float, str]]:
    """What a stage of ``steps`` writes, and when; the first step takes ``first`` seconds more."""
    clock, file = Clock(), io.StringIO()
    told = []

    def read() -> None:
        told.extend((clock.now - 1000.0, line) for line in file.getvalue().splitlines()[len(told) :])

    with progress_bar(steps, "source model", "step", True, file=file, clock=clock, **options) as bar:  # type: ignore[arg-type]
        read()
        for step in range(bar.n, steps):
            clock.now += seconds + (first if step == bar.n == 0 else 0.0)
            bar.set_postfix(loss=f"{1 / (step + 1):.4g}", refresh=False)
            bar.update()
            read()
    read()
    return told


def test_a_long_stage_tells_its_time_first_and_then_a_line_a_minute() -> None:
    told = lines(2000, 0.1)
    assert [text for _, text in told[:3]] == [
        "source model: 2000 steps",
        "source model: 2000 steps, about 3 min",
        "source model: 150 of 2000 steps, loss 0.006667, 3 min left",
    ]
    times = [time for time, _ in told]
    assert times == pytest.approx([0, 5, 15, 25, 35, 45, 55, 115, 175, 200], abs=0.6)
    assert told[-2][1] == "source model: 1755 of 2000 steps, loss 0.0005698, 24 s left"
    assert told[-1][1] == "source model: 2000 steps in 3 min"


def test_a_short_stage_says_that_it_began() -> None:
    assert lines(2000, 0.004) == [(0.0, "source model: 2000 steps")]
    assert lines(1, 2.0) == [(0.0, "source model: 1 step")]
    assert [text for _, text in lines(100, 0.1)] == ["source model: 100 steps"]  # Ten seconds: no estimate.


def test_a_slow_first_step_does_not_count_in_the_rate() -> None:
    """Compilation takes 30 s; the other 199 steps take a second each."""
    told = lines(200, 1.0, first=30.0)
    assert told[1] == (32.0, "source model: 200 steps, about 4 min")
    assert told[2][1].endswith("left")
    assert "188 of 200" not in told[2][1]


def test_no_minute_of_a_slow_stage_is_silent() -> None:
    """Steps of 40 s: a line after each of the first, and at least one in two minutes later."""
    times = [time for time, _ in lines(20, 40.0)]
    assert max(b - a for a, b in itertools.pairwise(times)) <= 80.0


def test_a_resumed_stage_counts_what_it_does_itself() -> None:
    told = [text for _, text in lines(1000, 0.1, initial=600)]
    assert told[:2] == ["source model: 1000 steps, from step 600", "source model: 1000 steps, about 40 s"]
    clock, file = Clock(), io.StringIO()
    with progress_bar(1000, "sampling", "sample", True, file=file, clock=clock) as bar:
        bar.reset_to(600)
        for _ in range(8):
            clock.now += 10.0
            bar.update(50)
    assert "sampling: 750 of 1000 samples, 5 samples/s, 50 s left" in file.getvalue()


def test_a_terminal_has_a_bar_and_silence_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    file = Terminal()
    with progress_bar(3, "guidance", "step", True, file=file) as bar:
        bar.update(3)
    assert "guidance: " in file.getvalue()
    assert "3/3" in file.getvalue() or "0/3" in file.getvalue()
    assert "guidance: 3 steps\n" not in file.getvalue()
    for shown in (Terminal(), io.StringIO()):
        with progress_bar(3, "guidance", "step", False, file=shown) as bar:
            bar.reset_to(1)
            bar.set_postfix(loss="1", refresh=False)
            bar.update(2)
        assert shown.getvalue() == ""
    assert capsys.readouterr().err == ""


def test_closed_streams_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    monkeypatch.setattr("sys.stdout", None)
    assert list(tracked([1, 2], "rows", "row", True)) == [1, 2]
    say("text")


def test_only_the_first_process_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr("tgdp_fast.runtime.distributed.is_first", lambda: False)
    with progress_bar(3, "guidance", "step", True, file=file) as bar:
        bar.update(3)
    assert file.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (89.4, "89 s"), (90, "2 min"), (600, "10 min"), (5300, "88 min"), (16_200, "4 h 30 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
