"""Every operator, backend and precision on awkward shapes, against float64 and beside eager PyTorch's own error."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tgdp_fast.lab.accuracy import Error, error_of, within
from tgdp_fast.lab.cases import CHECKS
from tgdp_fast.lab.cases.case import Draw
from tgdp_fast.lab.tables import markdown_table
from tgdp_fast.ops import BackendUnavailableError, registry
from tgdp_fast.runtime.checks import check_choice
from tgdp_fast.runtime.precision import PRECISIONS

Row = dict[str, Any]

KEYS = (
    "operator", "backend", "dtype", "shape", "max_error", "mean_error", "eager_max_error", "eager_mean_error", "verdict"
)  # fmt: skip

_SEED = 11


def validate(backend: str | None = None, operators: Sequence[str] = (), precisions: Sequence[str] = ()) -> list[Row]:
    """Check every operator on every backend that is available here, or on ``backend`` alone.

    Args:
        backend: a backend's name.
        operators: names of operators; empty for all.
        precisions: "fp32", "bf16", "fp16"; empty for all.

    Returns:
        A row per operator, backend, dtype and shape; ``verdict`` is "passed", "failed", "unchecked" (an operator that
        has no checks here: a failure), or "refused: reason" where the backend says that it does not take such a call.

    Raises:
        ValueError: no such backend, operator or precision, or a backend that no operator has here.
    """
    report = registry.backend_report()
    for name in operators:
        check_choice("--operators", name, report)
    for name in precisions:
        check_choice("--precisions", name, PRECISIONS)
    if backend is not None:
        check_choice("--backend", backend, registry.BACKENDS)
        reasons = {states[backend] for states in report.values()}
        if "available" not in reasons:
            raise ValueError(f"--backend must be one that is available here, got {backend!r}: {'; '.join(reasons)}")
    rows: list[Row] = []
    for operator, states in report.items():
        if operators and operator not in operators:
            continue
        names = [name for name, state in states.items() if state == "available" and backend in (None, name)]
        if operator not in CHECKS:
            empty = dict.fromkeys(KEYS)
            rows += [empty | {"operator": operator, "backend": name, "verdict": "unchecked"} for name in names]
            continue
        for name, precision in itertools.product(names, precisions or PRECISIONS):
            rows += rows_of(operator, name, precision)
    return rows


def rows_of(operator: str, backend: str, precision: str, shapes: Sequence[Any] | None = None) -> Iterator[Row]:
    """The rows of one operator on one backend in one precision, for ``shapes`` of ``CHECKS`` (default: all)."""
    dtype = PRECISIONS[precision]
    # Triton serves CPU tensors in its interpreter.
    cuda = backend == "cuda" or (backend == "triton" and torch.cuda.is_available())
    draw = Draw(dtype, torch.device("cuda" if cuda else "cpu"), _SEED)
    everything, check = CHECKS[operator]
    for entry in everything if shapes is None else shapes:
        shape, outputs, exact, eager = check(draw, *entry)
        yardstick, error = error_of(eager, exact), Error(math.nan, math.nan)
        try:
            got = outputs(backend)
        except BackendUnavailableError as refusal:
            verdict = f"refused: {refusal.reason}"
        except (RuntimeError, ValueError) as problem:
            verdict = f"failed: {str(problem).splitlines()[0]}"
        else:
            error = error_of(got, exact)
            right = within(error, yardstick, dtype) and all(value.dtype == dtype for value in got)
            verdict = "passed" if right else "failed"
        values = (operator, backend, precision, shape, *error, *yardstick, verdict)
        yield dict(zip(KEYS, values, strict=True))


def failures(rows: Sequence[Row]) -> list[Row]:
    """The rows that are neither passed nor refused."""
    return [row for row in rows if row["verdict"] != "passed" and not row["verdict"].startswith("refused")]


def table(rows: Sequence[Row]) -> str:
    """Markdown with a line per row."""
    header = ["operator", "backend", "dtype", "shape", "max", "mean", "eager max", "eager mean", "verdict"]
    return markdown_table(header, [[_text(row[key]) for key in KEYS] for row in rows])


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.1e}" if isinstance(value, float) else str(value)
