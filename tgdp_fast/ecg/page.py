"""Pieces of an HTML page: tables, notes, numbers as text, the style."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from tgdp_fast.metrics.classification import Interval


def table(
    caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, raw: bool = False, left: bool = False
) -> str:
    """An HTML table. All cells are escaped; with ``raw`` only the header and the first column are. Cells of numbers
    stand at the right, with ``left`` those of words at the left.
    """
    kind = "words" if left else "numbers"
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{cell if raw else escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table class="{kind}"><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def notes(texts: Sequence[str]) -> str:
    """A list of remarks."""
    return f'<ul class="notes">{"".join(f"<li>{escape(text)}</li>" for text in texts)}</ul>'


def number(value: float, digits: int = 3) -> str:
    """A number with so many decimals, or a dash for NaN."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.3g}"
    return text.replace("-", "−")


def interval(value: Interval) -> str:
    """A value with its interval in brackets, where it has one."""
    if math.isnan(value.low):
        return number(value.value)
    return f"{number(value.value)} ({number(value.low)} to {number(value.high)})"


def about(intervals: Sequence[Interval]) -> str:
    """What the brackets of some intervals are."""
    known = [value for value in intervals if not math.isnan(value.low)]
    if not known:
        return ""
    return (
        f"In brackets {known[0].confidence:.0%} bootstrap intervals over the test records ({known[0].num} resamplings)."
    )


def quartiles(values: tuple[float, float, float]) -> str:
    """Median (lower to upper quartile), or a dash."""
    low, median, high = (number(value, 0) for value in values)
    return "–" if median == "–" else f"{median} ({low} to {high})"


def seconds(value: float) -> str:
    """A time in seconds, minutes or hours."""
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def or_dash(value: Any, shown: Callable[[Any], str]) -> str:
    """The value as ``shown`` writes it, or a dash for None."""
    return "–" if value is None else shown(value)


def plain(value: Any) -> str:
    """A setting as text."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value)
    return str(value)


def flattened(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested tables as ("data.rate", 100.0)."""
    entries: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            entries += flattened(value, f"{prefix}{name}.")
        else:
            entries.append((f"{prefix}{name}", value))
    return entries


def keys(tables: Any) -> list[str]:
    """Keys of all tables, in the order in which they first appear."""
    return list(dict.fromkeys(key for table in tables for key in table))


STYLE = """
:root{color-scheme:light;--ink:#16161d;--soft:#5b5b66;--line:#dcdce4}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem 1.25rem 4rem;max-width:1120px;color:var(--ink);background:#fff;
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
h1{font-size:1.9rem;line-height:1.2;margin:.2em 0 .3em}
h2{font-size:1.35rem;margin:2.4rem 0 .6rem;padding-bottom:.25rem;border-bottom:2px solid var(--line)}
h3{font-size:1.1rem;margin:1.6rem 0 .3rem}
header p{max-width:75ch;margin:.4rem 0}
a{color:#0b57a4}
nav ol{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;padding:.6rem 0;margin:1rem 0 0;list-style:none;
border-block:1px solid var(--line);font-size:.95rem}
.verdict{margin:1rem 0;padding:.6rem 1.2rem;border-left:8px solid #0b57a4;background:#f0f5fb;border-radius:4px}
.verdict p{margin:.3rem 0}
.warnings{margin:1.2rem 0;padding:.8rem 1.2rem;border:1px solid #d39b00;border-left:8px solid #d39b00;
background:#fff7dd;border-radius:4px}
.warnings h2{margin:0 0 .3rem;border:0;font-size:1.1rem}
.warnings ul{margin:0;padding-left:1.2rem}
.scroll{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;min-width:min(100%,46rem);font-size:.92rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);padding-bottom:.4rem;max-width:80ch}
th,td{padding:.32rem .8rem;text-align:right;vertical-align:top;border-bottom:1px solid var(--line)}
th:first-child{text-align:left;padding-left:0}
td{white-space:nowrap}
thead th{border-bottom:2px solid #9a9aa6;font-weight:600}
tbody th{font-weight:500}
tbody tr:hover{background:#f6f7fb}
small{color:var(--soft)}
figure{margin:.8rem 0 1.4rem}
figcaption{color:var(--soft);font-size:.92rem;margin-top:.3rem}
svg.ecg,svg.chart{display:block;width:100%;height:auto}
svg.ecg{border:1px solid #e9a3a3}
svg.chart{max-width:760px}
svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
.strips{display:grid;grid-template-columns:repeat(var(--columns),minmax(190px,1fr));gap:.6rem;align-items:start}
.strips figure{margin:0}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:.8rem}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.4rem;list-style:none;margin:.2rem 0 .6rem;padding:0;font-size:.95rem}
.legend svg{vertical-align:middle}
.notes{color:var(--soft);font-size:.9rem;max-width:85ch;padding-left:1.2rem}
summary{font-weight:600;cursor:pointer}
.words th,.words td{text-align:left}
.words td{white-space:normal}
details .words td{word-break:break-word}
@page{size:A4 landscape;margin:9mm}
@media print{
body{max-width:none;padding:0;font-size:10pt}
nav{display:none}
svg.ecg{width:var(--paper-width);max-width:100%;max-height:185mm;border:0}
svg.ecg,.warnings{print-color-adjust:exact;-webkit-print-color-adjust:exact}
figure,tr{break-inside:avoid}
h2,h3{break-after:avoid}
}
"""
