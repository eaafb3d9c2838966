"""Timing: every provider of a case in one interleaved run, after each has passed its numeric check."""

from __future__ import annotations

import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from tgdp_fast.lab.benchmark.floors import Floors, synchronize
from tgdp_fast.lab.cases.case import GRAPH, PROVIDERS, Call, Case, InaccurateError, Setup, UnservedError
from tgdp_fast.ops import BackendUnavailableError
from tgdp_fast.runtime.checks import check_choice, check_integer, check_number
from tgdp_fast.runtime.info import environment
from tgdp_fast.runtime.precision import PRECISIONS
from tgdp_fast.sampling import loop as sampling_loop

Row = dict[str, Any]

#: Keys of a row, in their order.
KEYS = ("case", "provider", "shape", "dtype", "median_s", "p20_s", "p80_s", "peak_bytes", "floor_fraction", "max_error")

#: A timing is at least this long; shorter calls are repeated within it.
LEAST_SECONDS = 1e-3


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        device: where.
        providers: names of ``PROVIDERS``; empty for all.
        precisions: "fp32", "bf16", "fp16"; empty for all.
        seconds: time for the rounds of one case, all providers together.
        least_rounds, most_rounds: rounds of a case whatever it takes, and at most.
        warm_up: whether a round that does not count precedes them.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    providers: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    seconds: float = 10.0
    least_rounds: int = 5
    most_rounds: int = 101
    warm_up: bool = True

    def __post_init__(self) -> None:
        for name in self.providers:
            check_choice("--providers", name.removesuffix(GRAPH), PROVIDERS)
        for precision in self.precisions:
            check_choice("--precisions", precision, PRECISIONS)
        check_number("--seconds", self.seconds, 0.0, exclusive=True)
        check_integer("least_rounds", self.least_rounds, 1)
        check_integer("most_rounds", self.most_rounds, self.least_rounds)


@dataclass
class Entry:
    """One provider in one precision, ready to be timed; without a call, it failed its check."""

    provider: str
    precision: str
    call: Call | None
    max_error: float | None
    peak_bytes: int | None = None
    loops: int = 1
    seconds: list[float] = field(default_factory=list)  # per call, one for each round


def run_case(case: Case, options: Options, floors: Floors, report: Callable[[str], None]) -> list[Row]:
    """The rows of one case, providers in their order, precisions within them; ``report`` gets a line about whatever is
    left out.
    """
    available = _available_memory(options.device)
    if available is not None and case.memory > available:
        report(f"{case.name}: left out, needs about {case.memory / 2**30:.1f} GiB, {available / 2**30:.1f} are free")
        return []
    if case.needs_accelerator and options.device.type == "cpu":
        report(f"{case.name}: left out, a call takes minutes on a CPU; --device cuda times it")
        return []
    if options.device.type == "cuda":
        # float32 is float32 for every provider: by default torch's convolutions round their factors to TF32.
        torch.backends.cudnn.allow_tf32 = False
    torch._dynamo.reset()  # Its limit of versions of one function is for a program, not for a list of programs.
    offered = case.providers(options.device)
    chosen = [name for name in offered if not options.providers or name in options.providers]
    entries: list[Entry] = []
    for precision in case.precisions:
        if not options.precisions or precision in options.precisions:
            setup = case.setup(precision, options.device)
            entries += _checked(case, setup, chosen, precision, report)
    timed = [entry for entry in entries if entry.call is not None]
    for entry in timed:
        entry.peak_bytes = peak_memory(entry.call, options.device)  # type: ignore[arg-type]
    if timed:
        if case.rounds is not None and options.device.type == "cpu":
            most = min(options.most_rounds, case.rounds)
            # The numeric check and the measurement of memory were calls enough to warm up.
            least = min(options.least_rounds, most)
            options = replace(options, least_rounds=least, most_rounds=most, warm_up=False)
        interleave(timed, options)
    entries.sort(key=lambda entry: (offered.index(entry.provider), case.precisions.index(entry.precision)))
    return [_row(case, entry, floors) for entry in entries]


def _checked(
    case: Case, setup: Setup, providers: Sequence[str], precision: str, report: Callable[[str], None]
) -> Iterator[Entry]:
    """The providers that serve the case in a precision, after their check."""
    checked: dict[str, tuple[Call, float]] = {}  # each once, also where its captured form follows
    for provider in providers:
        name, failed = provider.removesuffix(GRAPH), Entry(provider, precision, None, None)
        try:
            if name not in checked:
                call = setup.call(name)
                checked[name] = call, setup.check(name, call)
            call, error = checked[name]
            yield Entry(provider, precision, call if provider == name else replayed(call), error)
        except BackendUnavailableError as refusal:
            report(f"{case.name}: no {provider} in {precision}: {refusal.operator}: {refusal.reason}")
        except UnservedError as reason:
            report(f"{case.name}: no {provider} in {precision}: {reason}")
        except InaccurateError as wrong:
            report(f"{case.name}: {provider} in {precision} is wrong, {wrong}; not timed")
            failed.max_error = wrong.error
            yield failed
        except Exception as problem:
            # Whatever goes wrong inside a provider (a compiler, a kernel) must not cost the others' rows.
            first = (str(problem).strip().splitlines() or [""])[0][:200]
            report(f"{case.name}: {provider} in {precision} fails: {type(problem).__name__}: {first}")
            yield failed


def replayed(call: Call) -> Call:
    """The call captured in a CUDA graph, checked once against what it gives as it is.

    Raises:
        RuntimeError: it cannot be captured, or gives something else then.
    """
    current, other = torch.cuda.current_stream(), torch.cuda.Stream()
    other.wait_stream(current)
    with torch.cuda.stream(other):  # as a capture is to be warmed up
        for _ in range(3):
            plain = [output.clone() for output in call()]
    current.wait_stream(other)
    replay, outputs = sampling_loop.capture(lambda: tuple(call()), [])

    def run() -> Sequence[torch.Tensor]:
        replay()
        return outputs

    if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(run(), plain, strict=True)):
        raise RuntimeError("a replay gives something else than the call")
    return run


def interleave(
    entries: Sequence[Entry], options: Options, clock: Callable[[], float] = time.perf_counter, seed: int = 0
) -> None:
    """Time the entries in rounds, each in a random order, after a round that does not count if ``options`` say so.

    Adds one number to ``entry.seconds`` per round; ends when ``options.seconds`` are spent or after the most rounds,
    but not before the least.
    """

    def once(entry: Entry) -> float:
        assert entry.call is not None
        synchronize(options.device)
        started = clock()
        for _ in range(entry.loops):
            entry.call()
        synchronize(options.device)
        return (clock() - started) / entry.loops

    for entry in entries if options.warm_up else ():
        elapsed = once(entry)
        while elapsed * entry.loops < LEAST_SECONDS and entry.loops < 2**20:
            entry.loops = max(2 * entry.loops, math.ceil(LEAST_SECONDS / max(elapsed, 1e-9)))
            elapsed = once(entry)
    generator = random.Random(seed)
    started = clock()
    for rounds in range(options.most_rounds):
        if rounds >= options.least_rounds and clock() - started > options.seconds:
            break
        for entry in generator.sample(list(entries), len(entries)):
            entry.seconds.append(once(entry))


def percentiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """20th percentile, median and 80th percentile, with linear interpolation between order statistics."""
    low, middle, high = np.percentile(np.asarray(seconds, dtype=np.float64), [20, 50, 80])
    return float(low), float(middle), float(high)


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Most bytes of tensors that live at one moment of ``call`` and did not before it, its results among them.

    Counted from torch's own record of allocations, so nothing else in the process disturbs it. Not counted: scratch
    memory that a library or a kernel allocates past torch, or keeps from an earlier call. None where there is no
    record.
    """
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        kept = call()
        synchronize(device)
        del kept
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _without_native_messages(), torch.autograd.profiler.profile(use_kineto=False, profile_memory=True) as profile:
        kept = call()
    del kept
    if profile.kineto_results is None:
        return None
    current = peak = 0
    changes = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


@contextmanager
def _without_native_messages() -> Iterator[None]:
    """Drop what native code writes to the standard error stream: the profiler reports every start and stop there."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def load_average() -> float | None:
    """Processes that wanted to run in the last minute, on average; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def result(rows: Sequence[Row], floors: Floors, load: float | None) -> dict[str, Any]:
    """What ``--json`` writes; ``load`` is the :func:`load_average` before the run, which tells an idle machine."""
    facts = {"load_average_before": load, "floors": floors.to_json()}
    return {"environment": environment() | facts, "rows": list(rows)}


def _row(case: Case, entry: Entry, floors: Floors) -> Row:
    row: Row = dict.fromkeys(KEYS)
    row |= {"case": case.name, "provider": entry.provider, "shape": case.shape, "dtype": entry.precision}
    row["max_error"] = entry.max_error
    if entry.seconds:
        low, middle, high = percentiles(entry.seconds)
        floor = floors.seconds(*case.work(entry.precision))
        row |= {"median_s": middle, "p20_s": low, "p80_s": high}
        row |= {"peak_bytes": entry.peak_bytes, "floor_fraction": floor / middle}
    return row


def _available_memory(device: torch.device) -> float | None:
    """Free bytes; None where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return 1024.0 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None
