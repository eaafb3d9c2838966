"""Result files as Markdown tables and plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tgdp_fast.lab import figures
from tgdp_fast.lab.benchmark.runner import KEYS, Row
from tgdp_fast.lab.cases.case import GRAPH, PROVIDERS
from tgdp_fast.lab.tables import markdown_table
from tgdp_fast.runtime.reading import parse_json, read_bytes

Result = dict[str, Any]

#: Every ratio is to this provider in this precision.
BASELINE = ("reference", "fp32")
FAILED = "failed"
_FILE_BYTES = 64 * 1024**2
#: The cases that docs/performance.md shows, as far as its file holds them: one of each kind and size, slow ones too.
SUMMARY = (
    "guided_step/1e4",
    "guided_step/1e6",
    "guided_step/1e7",
    "guided_step_noise/1e6",
    "mlp_value_and_grad/batch1-input3904-width512",
    *(f"mlp_value_and_grad/batch{n}-input2-width{width}" for n in (16, 4096, 10000) for width in (128, 512)),
    "mlp_value_and_grad/batch256-input3904-width512",
    *(f"fit_step/{loss}-width{width}" for loss in ("logistic", "consistency") for width in (128, 512)),
    *(f"trajectory/samples{num}-width128" for num in (256, 10000)),
    *(f"sampling/samples{num}-width{width}" for num in (256, 10000) for width in (128, 512)),
)


def load(path: Path) -> Result:
    """Read a file that ``tgdp-fast bench --json`` wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file.
    """
    content = read_bytes(path, _FILE_BYTES, ValueError, "a result of tgdp-fast bench")
    content = parse_json(content, ValueError, f"{path} is not JSON")
    good = isinstance(content, dict) and isinstance(content.get("environment"), dict)
    cuda = content["environment"].get("cuda") if good else None
    good = good and (not cuda or (isinstance(cuda, dict) and "device" in cuda))
    rows = content.get("rows") if good else None
    if not isinstance(rows, list) or not all(map(_is_row, rows)):
        raise ValueError(f"{path} is no result of tgdp-fast bench: it needs 'environment' and 'rows' with {KEYS}")
    return {"environment": content["environment"], "rows": rows}


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not set(KEYS) <= set(row):
        return False
    named = all(isinstance(row[name], str) for name in ("case", "provider", "dtype"))
    numbers = {name: row[name] for name in KEYS if name not in ("case", "provider", "dtype", "shape")}
    # NaN and infinity are no JSON, but Python reads them.
    real = all(value is None or (type(value) in (int, float) and 0 <= value < 1e300) for value in numbers.values())
    timed = [numbers[name] for name in ("median_s", "p20_s", "p80_s", "floor_fraction")]
    return named and real and (timed[0] is None or (None not in timed and timed[0] > 0))


def speed(row: Row, rows: Iterable[Row]) -> float | None:
    """How many times as fast as the reference in fp32 on the same case; None where either has no time."""
    for other in rows:
        if (other["case"], other["provider"], other["dtype"]) == (row["case"], *BASELINE):
            if other["median_s"] is None or row["median_s"] is None:
                return None
            return float(other["median_s"] / row["median_s"])
    return None


def table(rows: Sequence[Row]) -> str:
    """Markdown with a line per row."""
    header = ["case", "provider", "dtype", "median", "p20 to p80", "speed", "peak memory", "of the floor", "max error"]
    body = []
    for row in rows:
        error = "-" if row["max_error"] is None else f"{row['max_error']:.1e}"
        cells = [row["case"], row["provider"], row["dtype"]]
        if row["median_s"] is None:
            body.append([*cells, FAILED, "-", "-", "-", "-", error])
            continue
        spread = f"{_seconds(row['p20_s'])} to {_seconds(row['p80_s'])}"
        peak = "-" if row["peak_bytes"] is None else _bytes(row["peak_bytes"])
        ratio = _ratio(speed(row, rows))
        body.append([*cells, _seconds(row["median_s"]), spread, ratio, peak, f"{row['floor_fraction']:.0%}", error])
    return markdown_table(header, body)


def summary(rows: Sequence[Row], cases: Sequence[str] = SUMMARY) -> str:
    """Markdown: a line per case, a column per provider with its speeds in fp32 and bf16 relative to the reference."""
    names = [name for provider in PROVIDERS for name in (provider, provider + GRAPH)]
    providers = [name for name in names if any(row["provider"] == name for row in rows)]
    body = []
    for case in cases:
        found = {(row["provider"], row["dtype"]): row for row in rows if row["case"] == case}
        if found:
            cells = [" / ".join(_cell(found.get((name, d)), rows) for d in ("fp32", "bf16")) for name in providers]
            body.append([f"`{case}`", *("-" if cell == "- / -" else cell for cell in cells)])
    return markdown_table(["case", *(f"`{name}`" for name in providers)], body)


def times(rows: Sequence[Row], cases: Sequence[str], providers: Sequence[str], dtype: str) -> str:
    """Markdown: a line per case with the medians of some providers in a dtype."""
    found = {(row["case"], row["provider"]): row["median_s"] for row in rows if row["dtype"] == dtype}
    body = []
    for case in cases:
        medians = [found.get((case, provider)) for provider in providers]
        body.append([f"`{case}`", *("-" if median is None else _seconds(median) for median in medians)])
    return markdown_table(["case", *(f"`{provider}`" for provider in providers)], body)


def _cell(row: Row | None, rows: Sequence[Row]) -> str:
    if row is None:
        return "-"
    return FAILED if row["median_s"] is None else _ratio(speed(row, rows))


def machine(environment: dict[str, Any]) -> str:
    """One line: CPU or GPU, threads, versions, commit."""
    cuda = environment.get("cuda")
    where = cuda["device"] if cuda else environment.get("cpu")
    threads = f"threads: {environment.get('torch_threads')} of {environment.get('cpu_count')}"
    versions = f"torch {environment.get('torch')}, tgdp_fast {environment.get('tgdp_fast')}"
    return f"{where}, {threads}, {versions} at {environment.get('commit')}"


def markdown(results: dict[str, Result]) -> str:
    """The report of several files, by the name of each."""
    text = [
        "# Benchmarks\n",
        "Medians, 20th to 80th percentile; speed relative to the `reference` in fp32 on the same machine in the same "
        "run; peak memory of tensors during one call; the share of the floor (copy bandwidth and matmul rate measured "
        "in the same run); the largest error against float64 relative to the largest entry (of the `peer`'s samples: "
        "the sliced Wasserstein distance to the reference's, over their standard deviation). A provider that fails the "
        "numeric check has no time.\n",
    ]
    for name, result in results.items():
        text += [f"## {name}\n", machine(result["environment"]) + "\n", table(result["rows"])]
    return "\n".join(text)


def plot(results: dict[str, Result], folder: Path) -> list[Path]:
    """A plot per kind of case: median seconds of every provider, fp32 solid and others dashed. Needs matplotlib."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = dict.fromkeys(_kind(row) for result in results.values() for row in result["rows"])
    return [_plot_kind(kind, results, folder / f"{kind}.png") for kind in kinds]


def _plot_kind(kind: str, results: dict[str, Result], path: Path) -> Path:
    rows = {file: [row for row in result["rows"] if _kind(row) == kind] for file, result in results.items()}
    names = list(dict.fromkeys(row["case"] for found in rows.values() for row in found))
    figure, axis = figures.pyplot().subplots(figsize=(max(5.0, 0.5 * len(names) + 4.0), 4.5), layout="constrained")
    for marker, (file, found) in zip("osv^Dpx*" * len(rows), rows.items(), strict=False):
        timed = [row for row in found if row["median_s"] is not None]
        for provider, dtype in dict.fromkeys((row["provider"], row["dtype"]) for row in timed):
            chosen = [row for row in timed if (row["provider"], row["dtype"]) == (provider, dtype)]
            axis.plot(
                [names.index(row["case"]) for row in chosen],
                [row["median_s"] for row in chosen],
                marker=marker,
                linestyle="-" if dtype == "fp32" else "--",
                color=f"C{PROVIDERS.index(provider) if provider in PROVIDERS else 9}",
                label=f"{provider} {dtype}" + (f" ({file})" if len(rows) > 1 else ""),
            )
    axis.set(yscale="log", ylabel="median seconds", title=kind)
    axis.set_xticks(range(len(names)), [name.partition("/")[2] for name in names], rotation=60, ha="right")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figures.save_figure(figure, path)


def _kind(row: Row) -> str:
    return str(row["case"].partition("/")[0])


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x" if value < 10 else f"{value:.1f}x"


def _seconds(value: float) -> str:
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if value * factor >= 1.0:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def _bytes(value: float) -> str:
    for exponent, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value >= 2**exponent:
            return f"{value / 2**exponent:.3g} {unit}"
    return f"{value:.0f} B"
