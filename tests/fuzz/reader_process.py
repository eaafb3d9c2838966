"""Reads changed and hostile files in a process with little memory, and writes what happened as JSON.

    python reader_process.py SCRATCH RESULT MUTATIONS [FORMAT]

MUTATIONS is their number for each kind of file. An outcome is "accepted", "refused" (the errors that the package
documents for files) or "fault": another exception, more memory than ``MEMORY``, more time than ``SECONDS``.
"""

from __future__ import annotations

import json
import random
import re
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from formats import Format, formats, fresh
from hostile import HOSTILE

#: Bytes beyond those of the process before its first file, and seconds, for one file.
MEMORY, SECONDS = 2 * 1024**3, 20
# What an allocation that failed says: on a machine with more memory it would have been made.
_ALLOCATION = re.compile(r"more memory than there is|[Cc]an't allocate|Unable to allocate|not enough memory")


class TookTooLongError(BaseException):
    """No reader catches it."""


def attempt(read: Callable[[], Any]) -> dict[str, Any]:
    """What happens when ``read`` is called."""

    def stop(*_: Any) -> None:
        raise TookTooLongError(f"{SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    start = time.perf_counter()
    try:
        read()
        outcome, error = "accepted", ""
    except (ValueError, OSError) as caught:
        error = f"{type(caught).__name__}: {caught}"
        known = not isinstance(caught, UnicodeError) and not _ALLOCATION.search(error)
        outcome = "refused" if known else "fault"
    except BaseException as caught:
        if isinstance(caught, KeyboardInterrupt):
            raise
        frame = traceback.extract_tb(caught.__traceback__)[-1]
        outcome, error = "fault", f"{type(caught).__name__}: {caught} ({Path(frame.filename).name}:{frame.lineno})"
    finally:
        signal.alarm(0)
    return {"outcome": outcome, "error": error[:2000], "seconds": time.perf_counter() - start}


def changed(place: Path, name: str, form: Format, numbers: range) -> list[dict[str, Any]]:
    """The outcomes of the mutations with these numbers."""
    folder = fresh(place / re.sub(r"\W", "_", name))
    form.make(folder)
    file = folder / form.file
    original = file.read_bytes()
    kept = {other: other.read_bytes() for other in file.parent.iterdir() if other.is_file()}
    found = []
    for number in numbers:
        for other, content in kept.items():
            other.write_bytes(content)
        file.write_bytes(form.change(original, random.Random(f"{name} {number}")))
        form.after(folder)
        found.append({"name": name, "number": number} | attempt(lambda: form.read(folder)))
    return found


def main(scratch: Path, result: Path, mutations: int, only: str = "") -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    warnings.simplefilter("ignore")
    outcomes = []
    known = formats()
    for name, form in known.items():
        kind = name.split("/")[0]
        if only and kind != only:
            continue
        share = max(1, mutations // sum(other.split("/")[0] == kind for other in known))
        outcomes += changed(scratch, name, form, range(share))
    for name, read in HOSTILE.items():
        if not only or name.startswith(only):
            folder = fresh(scratch / "hostile")
            outcomes.append({"name": f"hostile: {name}", "number": 0} | attempt(lambda read=read, at=folder: read(at)))
    report = {
        "outcomes": outcomes,
        "exploded": (scratch / "exploded").exists() or (scratch / "hostile/exploded").exists(),
    }
    report["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result.write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
