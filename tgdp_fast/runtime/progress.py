"""Progress if no bar can be shown."""

from __future__ import annotations

import sys


def announce(text: str, progress: bool) -> None:
    """Print a line when a stage begins, if standard error is not a terminal and therefore has no progress bar."""
    if progress and not sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
