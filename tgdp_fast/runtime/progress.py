"""Progress where no bar can be shown."""

from __future__ import annotations

import sys


def announce(text: str, progress: bool) -> None:
    """Print a line for a stage that begins, where standard error is no terminal and so has no progress bar."""
    if progress and not sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
