"""Running Triton kernels as Python on the CPU: whether a process must be told to before it loads a kernel.

So tests of the numerics carry a marker and are left out of an ordinary run (conftest.py), and one test of each file
runs them in a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tgdp_fast.ops import _triton

ROOT = Path(__file__).resolve().parent.parent

interpreted = pytest.mark.interpreted
compiled = pytest.mark.skipif(_triton.INTERPRETED, reason="runs in the interpreter already")


def run_interpreted(*names: str) -> int:
    """Run the tests of these files whose name contains "triton" in the interpreter; the number that passed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TGDP_", "PYTEST_"))}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "triton", "-p", "no:cacheprovider"]
    command += [name if name.startswith("-") else str(next((ROOT / "tests").rglob(name))) for name in names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    return int(passed[1]) if passed else 0


if _triton.INTERPRETED:
    from triton.runtime import interpreter

    _convert = interpreter._convert_float

    def _round(value: Any, from_type: Any, to_type: Any, mode: Any) -> Any:
        """float32 to bfloat16 rounds to nearest, as on a GPU; the interpreter would cut digits off."""
        if (from_type.name, to_type.name) != ("fp32", "bf16"):
            return _convert(value, from_type, to_type, mode)
        rounded = torch.from_numpy(np.array(value, dtype=np.float32)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = _round
    _patch = interpreter._patch_lang_tensor

    def _patch_index(tensor: Any, *scope: Any) -> None:
        """Ends of loops are arrays of one number, which NumPy 2.5 no longer takes for one; Triton 3.6 relies on it."""
        _patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = _patch_index


class Far:
    """A tensor as a kernel sees it that starts ``distance`` elements earlier: only its end is there."""

    def __init__(self, tensor: torch.Tensor, distance: int) -> None:
        self.dtype = tensor.dtype
        self._tensor, self._address = tensor, tensor.data_ptr() - distance * tensor.element_size()

    def data_ptr(self) -> int:
        return self._address


def run_program(monkeypatch: pytest.MonkeyPatch, kernel: Any, program: int, *arguments: Any, **constants: Any) -> None:
    """Run one program of a large grid on tensors that may be :class:`Far`."""
    executor, builder = interpreter.GridExecutor, interpreter.interpreter_builder
    set_index = builder.set_grid_idx

    def at_program(*_: int) -> None:
        builder.set_grid_dim(program + 1, 1, 1)
        set_index(program, 0, 0)

    with monkeypatch.context() as patch:
        patch.setattr(executor, "_init_args_hst", lambda self, given, keywords: (given, keywords))
        patch.setattr(executor, "_restore_args_dev", lambda self, *_: None)
        patch.setattr(builder, "set_grid_idx", at_program)
        kernel[(1,)](*arguments, **constants)
