"""Which of a few launch configurations of a kernel is the fastest here: measured once, then remembered.

Off unless the environment variable ``TGDP_TRITON_AUTOTUNE`` is 1: every launch then has its heuristic's configuration,
the default. Switched on, the first call for a problem times the default and a few others on the call's own arguments,
and the fastest serves all calls of that problem. A problem is a kernel with what is compiled into it (dtypes, flags),
sizes rounded up to powers of two, the GPU's name, and the versions of Triton and of this package. Choices are kept in
memory and, one small JSON file a problem, in the user's cache folder, so that processes share them and none can spoil
another's.

Nothing is timed while the current stream is captured in a CUDA graph, while torch.compile traces, on tensors without
data, and in Triton's interpreter: there an earlier choice holds, or the default. So one call as it is before a capture,
as every capture needs, also chooses. A capture by another thread is not seen. Under
``torch.use_deterministic_algorithms(True)`` every choice is the default, for configurations add in different orders:
which one a machine finds faster would show in the last digits.

Timing repeats a launch, which changes nothing: no kernel of this package reads what it writes, adds to it or writes to
an input. A candidate fills tensors of its own, or fills given ones completely, and the chosen one comes last. Times are
medians with a cold level-2 cache (``triton.testing.do_bench``).
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from tgdp_fast._version import __version__
from tgdp_fast.runtime.files import save_json

ENVIRONMENT = "TGDP_TRITON_AUTOTUNE"

#: A candidate must be faster than the default by this share of its time: less is noise.
LEAST_GAIN = 0.02

Choice = TypeVar("Choice", bound=tuple[int, ...])
Result = TypeVar("Result")
#: Milliseconds that a call takes.
Timer: TypeAlias = Callable[[Callable[[], object]], float]

#: Fake and traced tensors are of other classes.
_PLAIN: tuple[type, ...] = (Tensor, torch.nn.Parameter)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """What a choice is for.

    Attributes:
        kernel: its name.
        variant: what is compiled into it, dtypes among it.
        sizes: of the problem, as :func:`rounded_up`.
        device: the GPU's name.
        triton, tgdp_fast: versions.
    """

    kernel: str
    variant: str
    sizes: tuple[int, ...]
    device: str
    triton: str
    tgdp_fast: str = __version__


class Tuner:
    """Measures candidates and remembers the fastest, in memory and in a folder.

    Args:
        folder: of the files, which need not exist; None for no files.
        timer: see :data:`Timer`.

    A file that cannot be read or written, or that holds something else, costs one warning each and no more.
    """

    def __init__(self, folder: Path | None, timer: Timer) -> None:
        self._folder = folder
        self._timer = timer
        self._choices: dict[Problem, tuple[int, ...]] = {}
        self._lock = threading.RLock()  # a launch that is timed may contain another
        self._warned: set[str] = set()

    def recalled(self, problem: Problem) -> tuple[int, ...] | None:
        """The choice that this process has made or read."""
        return self._choices.get(problem)

    def choose(
        self, problem: Problem, candidates: Sequence[Choice], run: Callable[[Choice], object], *, measure: bool
    ) -> Choice | None:
        """The fastest candidate by an earlier measurement, else by one now; None without ``measure``.

        Candidates that raise are left out; None if all do. The first one, the default, wins ties.
        """
        known = self._known(problem, candidates)
        if known is not None or not measure:
            return known
        with self._lock:
            known = self._known(problem, candidates)  # another thread's, meanwhile
            if known is not None:
                return known
            times = {candidate: self._time(problem, candidate, run) for candidate in candidates}
            default = candidates[0]
            fastest = min(candidates, key=lambda candidate: times[candidate])
            if times[fastest] == float("inf"):
                return None
            if times[fastest] > (1.0 - LEAST_GAIN) * times[default]:
                fastest = default
            _logger.info("%s: %s of %s", problem, tuple(fastest), {tuple(c): t for c, t in times.items()})
            self._choices[problem] = fastest
            self._write(problem, fastest)
            return fastest

    def _time(self, problem: Problem, candidate: Choice, run: Callable[[Choice], object]) -> float:
        try:
            return self._timer(lambda: run(candidate))
        except Exception as error:
            # Too much shared memory, a compiler that refuses: what is launched in the end reports its own errors.
            _logger.info("%s: %s is left out: %s: %s", problem, tuple(candidate), type(error).__name__, error)
            return float("inf")

    def _known(self, problem: Problem, candidates: Sequence[Choice]) -> Choice | None:
        choice = self.recalled(problem)
        if choice is None:
            choice = self._read(problem)
        found = next((candidate for candidate in candidates if candidate == choice), None)
        if found is not None:
            self._choices[problem] = found
        return found

    def _path(self, problem: Problem) -> Path | None:
        if self._folder is None:
            return None
        text = json.dumps(asdict(problem), sort_keys=True)
        return self._folder / f"{problem.kernel}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"

    def _read(self, problem: Problem) -> tuple[int, ...] | None:
        path = self._path(problem)
        if path is None:
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["problem"] != json.loads(json.dumps(asdict(problem))):
                raise ValueError("it is about another problem")
            return tuple(content["choice"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            self._warn("read", f"{path} holds no choice and is ignored ({type(error).__name__}: {error}); delete it")
            return None

    def _write(self, problem: Problem, choice: tuple[int, ...]) -> None:
        path = self._path(problem)
        if path is None:
            return
        try:
            save_json(path, {"problem": asdict(problem), "choice": choice})
        except OSError as error:
            self._warn("write", f"{path} cannot be written, so that other processes measure again: {error}")

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            _logger.warning(message)


def tuned(
    run: Callable[[Choice], Result],
    heuristic: Callable[..., Choice],
    others: Callable[..., Iterable[Choice]],
    kernel: Any,
    tensor: Tensor,
    sizes: Sequence[int],
    *variant: object,
) -> Result:
    """``run`` of the configuration that was or is found to be the fastest, or of the heuristic's; see the module.

    Args:
        run: launches with a configuration and returns the results; calling it again must change nothing.
        heuristic: the default for ``*sizes``.
        others: further ones. Candidates are those of the rounded sizes, so that all calls of a problem have the same.
        kernel: the ``triton.jit`` function.
        tensor: an input of the launch.
        sizes: of the problem.
        variant: what else decides the code that is compiled.
    """
    if _policy is None and (not enabled() or 0 in sizes):
        return run(heuristic(*sizes))
    rounded = tuple(map(rounded_up, sizes))

    def candidates() -> list[Choice]:
        return list(dict.fromkeys((heuristic(*rounded), *others(*rounded))))

    if _policy is not None:
        return _policy(run, candidates())
    problem = Problem(kernel.__name__, " ".join(map(str, variant)), rounded, *_device_and_version(tensor.device))
    tuner = _tuner()
    choice: Any = tuner.recalled(problem)
    if choice is None:
        choice = tuner.choose(problem, candidates(), run, measure=measurable(tensor))
    return run(heuristic(*sizes) if choice is None else choice)


def enabled() -> bool:
    """Whether choices are measured, and measured ones used."""
    return os.environ.get(ENVIRONMENT) == "1" and not torch.are_deterministic_algorithms_enabled()


def measurable(tensor: Tensor) -> bool:
    """Whether launches on this tensor can be timed now."""
    return (
        tensor.device.type == "cuda"
        and type(tensor) in _PLAIN
        and os.environ.get("TRITON_INTERPRET") != "1"
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
    )


def rounded_up(size: int) -> int:
    """The smallest power of two that is no less; 0 for 0."""
    return 1 << (size - 1).bit_length() if size > 0 else 0


def cache_folder() -> Path | None:
    """Where choices are kept: ``tgdp_fast/triton`` in ``XDG_CACHE_HOME`` or ``~/.cache``; None without a home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return root / "tgdp_fast" / "triton"


def state() -> str:
    """Whether it is on and where choices are, for people."""
    folder = cache_folder()
    where = "memory alone"
    if folder is not None:
        home = os.path.expanduser("~")
        shown = Path("~", folder.relative_to(home)) if folder.is_relative_to(home) else folder
        held = sum(1 for _ in folder.glob("*.json"))
        where = f"{shown}, which has {held}" if held else str(shown)
    if os.environ.get(ENVIRONMENT) != "1":
        return f"off; {ENVIRONMENT}=1 measures launch configurations once and keeps the choices in {where}"
    return f"on; choices are kept in {where}"


#: What decides instead, within :func:`deciding`.
_policy: Callable[[Callable[[Any], Any], list[Any]], Any] | None = None


@contextmanager
def deciding(policy: Callable[[Callable[[Any], Any], list[Any]], Any]) -> Iterator[None]:
    """Within the block, a launch gives ``policy(run, candidates)``: for tests, which go through all candidates."""
    global _policy
    before, _policy = _policy, policy
    try:
        yield
    finally:
        _policy = before


def all_of_them(run: Callable[[Choice], Result], candidates: list[Choice]) -> Result:
    """A policy that runs every candidate; the result is the default's."""
    return [run(candidate) for candidate in candidates][0]


@functools.cache
def _tuner() -> Tuner:
    return Tuner(cache_folder(), _median_milliseconds)


@functools.cache
def _device_and_version(device: torch.device) -> tuple[str, str]:
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return name, triton.__version__


def _median_milliseconds(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=5, rep=20, return_mode="median"))
