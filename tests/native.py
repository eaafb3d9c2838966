"""Helpers for tests of the compiled extension: skipping without it, and running code under other instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tgdp_fast.runtime import native

ROOT = Path(__file__).resolve().parent.parent
CAPABILITIES = ("baseline", "avx2", "avx512", "avx512_bf16")

needs_extension = pytest.mark.skipif(native.CPU_MISSING is not None, reason=str(native.CPU_MISSING))


def run_with(code: str, **environment: str) -> str:
    """What the code prints in a new interpreter with further environment variables; fails if it fails."""
    folders = [path for path in (ROOT / "tests").iterdir() if path.is_dir()]
    paths = os.pathsep.join(map(str, [ROOT, ROOT / "tests", *folders]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return done.stdout
