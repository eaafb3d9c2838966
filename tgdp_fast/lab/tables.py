"""Result rows on disk: one file per finished row, so that a killed experiment resumes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tgdp_fast.runtime.files import save_json, write_atomic
from tgdp_fast.runtime.info import environment

Row = dict[str, Any]


class RowStore:
    """Finished rows of one experiment in ``<folder>/rows``; rows of another signature are ignored."""

    def __init__(self, folder: Path, signature: str) -> None:
        self.folder = folder / "rows"
        self.signature = signature
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """File of row ``name``."""
        return self.folder / f"{name.replace('/', '--')}.json"

    def get(self, name: str) -> Row | None:
        """The row, or None when it is missing, damaged or of another signature."""
        try:
            content = json.loads(self.path(name).read_text())
        except (OSError, ValueError):
            return None
        if not isinstance(content, dict) or content.get("signature") != self.signature:
            return None
        row = content.get("row")
        return row if isinstance(row, dict) else None

    def put(self, name: str, row: Row) -> None:
        """Write a row, atomically."""
        save_json(self.path(name), {"signature": self.signature, "row": row})

    def once(self, name: str, compute: Callable[[], Row], files: Iterable[Path] = ()) -> Row:
        """The row, or that of ``compute``, which also writes ``files``; it is computed again if one of them is lost."""
        row = self.get(name)
        if row is None or not all(file.is_file() for file in files):
            # Files and row are of one signature, whenever this is interrupted.
            self.path(name).unlink(missing_ok=True)
            row = compute()
            self.put(name, row)
        return row


def check_distinct(name: str, values: Sequence[Any]) -> Sequence[Any]:
    """Return ``values``, or raise ValueError unless there is at least one and none is repeated."""
    if not values:
        raise ValueError(f"{name} must not be empty")
    if len(set(values)) < len(values):
        raise ValueError(f"{name} must not repeat an entry, got {tuple(values)}")
    return values


def write_results(folder: Path, rows: Sequence[Row], table: str) -> None:
    """Write ``results.json`` ({"environment": ..., "rows": [...]}) and ``results.md``."""
    save_json(folder / "results.json", {"environment": environment(), "rows": list(rows)})
    write_atomic(folder / "results.md", table)


def mean_and_deviation(values: Iterable[float | None]) -> str:
    """ "0.123 +- 0.004" over finite values; the mean alone for one value; "-" for none."""
    finite = [float(v) for v in values if v is not None and math.isfinite(v)]
    if not finite:
        return "-"
    mean = sum(finite) / len(finite)
    if len(finite) == 1:
        return f"{mean:.3f}"
    deviation = math.sqrt(sum((v - mean) ** 2 for v in finite) / (len(finite) - 1))
    return f"{mean:.3f} ± {deviation:.3f}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A GitHub-style table with aligned columns."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    rule = "| " + " | ".join("-" * w for w in widths) + " |"
    return "\n".join([text[0], rule, *text[1:]]) + "\n"
