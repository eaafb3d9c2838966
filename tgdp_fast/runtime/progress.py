"""Progress of long stages, on standard error: a bar on a terminal; without one, lines that a log can hold.

Lines are written at the start of a stage, after the first seconds if it will take longer than these, every ten seconds
of its first minute, and every minute from then on::

    source model: 2000 steps
    source model: 2000 steps, about 3 min
    source model: 700 of 2000 steps, loss 0.7321, 2 min left
    source model: 2000 steps in 3 min

With several processes the first one alone tells.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO, TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")

_FIRST = 5.0  # s before a rate is known well enough to tell how long a stage takes
_OFTEN, _SELDOM = 10.0, 60.0  # s between lines, in the first minute and later
_WORTH = 15.0  # s; shorter stages are not estimated


class _Lines:
    """The part of tqdm's interface that is used here, in lines. See :func:`progress_bar`."""

    def __init__(
        self, total: int, name: str, unit: str, initial: int, file: TextIO | None, clock: Callable[[], float]
    ) -> None:
        self.total, self.name, self.n = total, name, initial
        self.unit, self.units = unit, unit if total == 1 else unit + "s"
        self._file, self._clock = file, clock
        self._facts: dict[str, str] = {}
        self._began = self._written = clock()
        self._first: tuple[float, int] | None = None  # Time and count after the first update, which also warms up.
        self._estimated = False
        self._write(f"{total} {self.units}" + (f", from {unit} {initial}" if initial else ""))

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        seconds = self._clock() - self._began
        if kind is None and seconds > _WORTH and self.n >= self.total:
            self._write(f"{self.total} {self.units} in {duration(seconds)}")

    def set_postfix(self, refresh: bool = True, **facts: str) -> None:
        """Numbers for the next line, such as the loss."""
        self._facts = facts

    def reset_to(self, n: int) -> None:
        """Go on from ``n``, which is no work of this call."""
        self.n, self._first = n, None

    def update(self, n: int = 1) -> None:
        """``n`` more are done."""
        self.n += n
        now = self._clock()
        if self._first is None:
            self._first = now, self.n
        elapsed, rate = now - self._began, self._rate(now)
        if elapsed < _FIRST or not rate or self.n >= self.total:
            return
        left = (self.total - self.n) / rate
        if not self._estimated:
            self._estimated = True
            if elapsed + left > _WORTH:
                self._write(f"{self.total} {self.units}, about {duration(elapsed + left)}")
        elif now - self._written >= (_OFTEN if elapsed < 60.0 else _SELDOM):
            facts = [f"{name} {value}" for name, value in self._facts.items()]
            told = ", ".join(facts) or f"{rate:.3g} {self.unit}s/s"
            self._write(f"{self.n} of {self.total} {self.units}, {told}, {duration(left)} left")

    def _rate(self, now: float) -> float:
        then, n = self._first or (self._began, self.n)
        return (self.n - n) / (now - then) if now > then else 0.0

    def _write(self, text: str) -> None:
        self._written = self._clock()
        print(f"{self.name}: {text}", file=self._file or sys.stderr, flush=True)


class _Bar(tqdm):
    """tqdm, with what :class:`_Lines` has."""

    def reset_to(self, n: int) -> None:
        """Go on from ``n``, which is no work of this call."""
        if not self.disable:
            self.initial = self.n = n
            self.start_t = self.last_print_t = self._time()


def progress_bar(
    total: int,
    name: str,
    unit: str,
    progress: bool,
    *,
    initial: int = 0,
    file: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Any:
    """A context manager with ``update(n)``, ``set_postfix(loss=...)`` and ``reset_to(n)``.

    Args:
        total: how many there are.
        name: of the stage.
        unit: of what is counted, in the singular.
        progress: whether anything is shown at all.
        initial: how many an earlier call has done.
        file: default: standard error as it is now.
        clock: seconds.
    """
    shown = progress and _is_first()
    place = file or sys.stderr
    shown = shown and place is not None  # Closed by the caller.
    if shown and not place.isatty():
        return _Lines(total, name, unit, initial, file, clock)
    return _Bar(total=total, desc=name, unit=unit, initial=initial, file=file, disable=not shown, leave=False)


def _is_first() -> bool:
    """Whether this process is the first; without torch there is one alone, and no need to load it."""
    if "torch" not in sys.modules:
        return True
    from tgdp_fast.runtime import distributed

    return distributed.is_first()


def tracked(items: Sequence[T], name: str, unit: str, progress: bool) -> Iterator[T]:
    """The items one by one, with a :func:`progress_bar` of those that are done."""
    with progress_bar(len(items), name, unit, progress) as bar:
        for item in items:
            yield item
            bar.update()


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line, on standard output unless ``file`` is given, without breaking a bar on the terminal."""
    place = file or sys.stdout
    if place is not None:  # Closed by the caller.
        tqdm.write(text, file=place)
        place.flush()


def duration(seconds: float) -> str:
    """ "40 s", "3 min", "4 h 30 min": to about a tenth."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
