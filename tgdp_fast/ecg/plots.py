"""Plots as inline SVG text: ECGs on paper, curves, histograms. No library, no script, no reference to a file.

Lengths of an ECG plot are millimetres of paper: 25 mm are a second, 10 mm a millivolt, or less where it says so.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MM_PER_SECOND = 25.0
MM_PER_MILLIVOLT = 10.0
#: Rows of the usual print: four columns of a quarter of the record each, and below them lead II in full.
LAYOUT = (("I", "aVR", "V1", "V4"), ("II", "aVL", "V2", "V5"), ("III", "aVF", "V3", "V6"))
RHYTHM_LEAD = "II"
#: Leads of a small picture, where they are there.
STRIP_LEADS = ("II", "V1", "V5")

PAPER, FINE_LINE, COARSE_LINE, TRACE = "#fffafa", "#f6d3d3", "#e9a3a3", "#16161d"
#: Line colors (after Okabe and Ito: told apart with color blindness too) and dashes, in the order of series.
COLORS = ("#16161d", "#0072b2", "#b06a00", "#00805c", "#c2410c", "#7b4fa3", "#5c5c5c")
DASHES = ("", "6 3", "2 2", "8 2 2 2", "", "4 2", "1 3")

_MARGIN = 5.0  # mm, around everything
_PULSE = 10.0  # mm, room for the calibration pulse before each row
_MOST = 35.0  # mm above or below a baseline; larger signals are drawn at a smaller scale
_LARGEST = 20.0  # mV; larger values are cut off
_STRIP_SECONDS = 4.0
_UNIT = 100  # paths are written in hundredths of a millimetre: whole numbers are short

#: The two grids of ECG paper; once in a page, before the first plot.
GRID = (
    '<svg width="0" height="0" style="position:absolute" aria-hidden="true" focusable="false"><defs>'
    '<pattern id="fine-grid" width="1" height="1" patternUnits="userSpaceOnUse">'
    f'<path d="M1 0H0V1" fill="none" stroke="{FINE_LINE}" stroke-width="0.1"/></pattern>'
    '<pattern id="coarse-grid" width="5" height="5" patternUnits="userSpaceOnUse">'
    f'<rect width="5" height="5" fill="url(#fine-grid)"/>'
    f'<path d="M5 0H0V5" fill="none" stroke="{COARSE_LINE}" stroke-width="0.22"/></pattern>'
    "</defs></svg>"
)


@dataclass(frozen=True)
class Series:
    """A curve: its name, x [P] and y [P], and its place in ``COLORS``."""

    name: str
    x: np.ndarray
    y: np.ndarray
    color: int


def gain(*signals: np.ndarray) -> float:
    """Millimetres per millivolt, 10 or a half, a quarter, ... of it, at which no lead is higher than ``_MOST`` mm."""
    largest = max(float(np.abs(_clean(part)).max(initial=0.0)) for part in signals)
    return MM_PER_MILLIVOLT * 0.5 ** max(0, math.ceil(math.log2(max(largest, 1e-9) * MM_PER_MILLIVOLT / _MOST)))


def ecg_plot(signals: np.ndarray, rate: float, leads: Sequence[str], title: str) -> str:
    """Twelve leads on ECG paper: three rows of four, each a quarter of the time, and lead II in full.

    Each row begins with a calibration pulse of 1 mV and 0.2 s. All leads of a column show the same seconds, as the
    recorder prints them. A row is as high as its signals and their names need; large signals are drawn at 5 mm/mV or
    less, as is written below. Values beyond 20 mV, which no heart has, are cut off.

    Args:
        signals: [12, L] in mV.
        rate: samples per second.
        leads: names of the leads, in any case.
        title: description for screen readers.

    Raises:
        ValueError: other shapes, a lead is missing.
    """
    array, names = _checked(signals, leads)
    missing = [name for row in LAYOUT for name in row if name.lower() not in names]
    if missing:
        raise ValueError(f"leads must hold the twelve of a standard ECG, {', '.join(missing)} are missing")
    length = array.shape[1]
    bounds = [round(length * i / 4) for i in range(5)]
    spans = [[(name, bounds[i], max(bounds[i] + 1, bounds[i + 1])) for i, name in enumerate(group)] for group in LAYOUT]
    spans.append([(RHYTHM_LEAD, 0, length)])
    return _paper(array, rate, names, spans, title, gain(array), pulse=_PULSE, letter=3.6)


def strip_plot(signals: np.ndarray, rate: float, leads: Sequence[str], title: str, scale: float) -> str:
    """A small picture, one of several side by side: three leads, the first seconds, at ``scale`` mm/mV.

    Arguments and errors as of :func:`ecg_plot`, but any leads will do.
    """
    array, names = _checked(signals, leads)
    length = min(array.shape[1], max(2, round(_STRIP_SECONDS * rate)))
    shown = [name for name in STRIP_LEADS if name.lower() in names] or list(leads[:3])
    spans = [[(name, 0, length)] for name in shown]
    return _paper(array, rate, names, spans, title, scale, pulse=0.0, letter=6.0)


def _checked(signals: np.ndarray, leads: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    array, names = np.asarray(signals, dtype=np.float64), [name.lower() for name in leads]
    if array.ndim != 2 or len(array) != len(names):
        raise ValueError(f"signals must have shape [{len(names)}, L], got {list(array.shape)}")
    return _clean(array), names


def _clean(signals: np.ndarray) -> np.ndarray:
    array = np.asarray(signals, dtype=np.float64)
    return np.nan_to_num(array, nan=0.0, posinf=_LARGEST, neginf=-_LARGEST).clip(-_LARGEST, _LARGEST)


def _paper(
    array: np.ndarray,
    rate: float,
    names: Sequence[str],
    spans: Sequence[Sequence[tuple[str, int, int]]],
    title: str,
    scale: float,
    *,
    pulse: float,
    letter: float,
) -> str:
    """Rows of (lead, start, stop) on paper, at ``scale`` mm/mV, with letters of ``letter`` mm."""
    left = _MARGIN + pulse
    across = max(stop for row in spans for _, _, stop in row) / rate * MM_PER_SECOND
    # Whole large squares, so that the paper ends with a line.
    width = 5.0 * math.ceil((left + across + _MARGIN) / 5.0)
    traces, marks, texts, pulses = [], [], [], []
    top = _MARGIN
    for row in spans:
        shown = [array[names.index(name.lower()), start:stop] for name, start, stop in row]
        above = _squares(scale * max(float(y.max()) for y in shown) + letter)  # Names stand above the traces.
        below = _squares(-scale * min(float(y.min()) for y in shown) + 1.0)
        baseline = top + above
        if pulse:
            pulses.append(f"M{_MARGIN + 1:g} {baseline:g}h2v-{scale:g}h5v{scale:g}h2")
        for (name, start, _), y in zip(row, shown, strict=True):
            x = left + np.arange(start, start + len(y)) / rate * MM_PER_SECOND
            traces.append(path(_UNIT * x, _UNIT * (baseline - scale * y)))
            texts.append(f'<text x="{x[0] + 1:.4g}" y="{top + 0.7 * letter:.4g}">{html.escape(name)}</text>')
            if start:
                marks.append(f"M{x[0]:.4g} {baseline - 5:.4g}v-3M{x[0]:.4g} {baseline + 5:.4g}v3")
        top = baseline + below
    height = top + 5.0 * math.ceil(letter / 5.0)
    return (
        f'<svg class="ecg" role="img" viewBox="0 0 {width:g} {height:g}" style="--paper-width:{width:g}mm">'
        f"<title>{html.escape(title)}</title>"
        f'<rect width="{width:g}" height="{height:g}" fill="{PAPER}"/>'
        f'<rect width="{width:g}" height="{height:g}" fill="url(#coarse-grid)"/>'
        f'<path d="{"".join(pulses + marks)}" fill="none" stroke="{TRACE}" stroke-width="0.3"/>'
        f'<g transform="scale({1 / _UNIT:g})" fill="none" stroke="{TRACE}" '
        f'stroke-width="{0.09 * _UNIT * letter:g}" stroke-linejoin="round">'
        f"{''.join(f'<path d={chr(34)}{d}{chr(34)}/>' for d in traces)}</g>"
        f'<g font-size="{letter:g}" font-weight="600" fill="{TRACE}" stroke="{PAPER}" stroke-width="0.9" '
        f'paint-order="stroke">{"".join(texts)}</g>'
        f'<text x="{_MARGIN:g}" y="{height - 1.6:g}" font-size="{0.8 * letter:g}" fill="{TRACE}">25 mm/s · '
        f"{scale:g} mm/mV</text></svg>"
    )


def _squares(need: float) -> float:
    """Whole large squares, 5 mm, that hold ``need`` mm, and at least three."""
    return max(15.0, 5.0 * math.ceil(need / 5.0))


def path(x: np.ndarray, y: np.ndarray) -> str:
    """A polyline as an SVG path of whole numbers: start, then steps, rounded so that errors do not add up."""
    points = np.rint(np.stack([x, y], axis=1)).astype(np.int64)
    steps = np.diff(points, axis=0)
    return f"M{points[0, 0]} {points[0, 1]}l" + " ".join(f"{a} {b}" for a, b in steps) if len(steps) else ""


def curves(series: Sequence[Series], title: str, x_label: str, y_label: str, *, heading: str = "") -> str:
    """Lines over one pair of axes. Points that are not finite are left out.

    Args:
        series: at least one.
        title: for screen readers.
        x_label, y_label: of the axes.
        heading: written above.
    """
    shown = [_finite(s) for s in series]
    x_range = _limits([s.x for s in shown])
    frame = _Frame(520, 300, x_range, _padded(_limits([s.y for s in shown])))
    lines = "".join(
        f'<path d="{path(10 * frame.x(s.x), 10 * frame.y(s.y))}" fill="none" stroke="{COLORS[s.color % 7]}" '
        f'stroke-width="16" stroke-dasharray="{_scaled(DASHES[s.color % 7])}" stroke-linejoin="round"/>'
        for s in shown
        if len(s.x) > 1
    )
    return frame.svg(f'<g transform="scale(.1)">{lines}</g>', title, x_label, y_label, heading)


def histogram(
    values: Mapping[str, np.ndarray], title: str, x_label: str, *, colors: Sequence[int] = (1, 4, 3, 5), bins: int = 40
) -> str:
    """Histograms over ``bins`` common bins, each as a density in filled steps.

    Bins span the central 99.8 % of all values; values outside are counted in the first and last one.
    """
    finite = {name: np.asarray(v, dtype=np.float64)[np.isfinite(v)] for name, v in values.items()}
    everything = np.concatenate([*finite.values(), np.zeros(0)])
    low, high = (float(q) for q in np.quantile(everything, [0.001, 0.999])) if len(everything) else (0.0, 1.0)
    low, high = _padded((low, high), 0.02)
    edges = np.linspace(low, high, bins + 1)
    density = {
        name: np.histogram(v.clip(low, high), edges)[0] / (max(1, len(v)) * (edges[1] - edges[0]))
        for name, v in finite.items()
    }
    top = max((float(d.max()) for d in density.values()), default=1.0) or 1.0
    frame = _Frame(760, 280, (low, high), (0.0, 1.08 * top))
    shapes = ""
    for i, d in enumerate(density.values()):
        x, y = np.repeat(edges, 2), np.concatenate([[0.0], np.repeat(d, 2), [0.0]])
        color = colors[i % len(colors)]
        shapes += (
            f'<path d="{path(10 * frame.x(x), 10 * frame.y(y))}" fill="{COLORS[color]}" fill-opacity="0.22" '
            f'stroke="{COLORS[color]}" stroke-width="16" stroke-dasharray="{_scaled(DASHES[color])}"/>'
        )
    if low < 0 < high:
        zero = 10 * float(frame.x(np.zeros(1))[0])
        shapes += f'<path d="M{zero:.0f} {10 * frame.top:g}V{10 * frame.bottom:g}" stroke="#555" stroke-width="8"/>'
    return frame.svg(f'<g transform="scale(.1)">{shapes}</g>', title, x_label, "density", "")


def legend(entries: Sequence[tuple[str, int]]) -> str:
    """Names with a piece of their line, as an HTML list."""
    items = "".join(
        f'<li><svg width="34" height="10" aria-hidden="true"><path d="M1 5h32" stroke="{COLORS[color % 7]}" '
        f'stroke-width="2.4" stroke-dasharray="{DASHES[color % 7]}"/></svg> {html.escape(name)}</li>'
        for name, color in entries
    )
    return f'<ul class="legend">{items}</ul>'


class _Frame:
    """Axes: maps data to pixels, and draws ticks and labels."""

    def __init__(self, width: int, height: int, x_range: tuple[float, float], y_range: tuple[float, float]) -> None:
        self.width, self.height = width, height
        self.x_range, self.y_range = x_range, y_range
        self.left, self.right, self.top, self.bottom = 58.0, width - 12.0, 24.0, height - 42.0

    def x(self, values: np.ndarray) -> np.ndarray:
        low, high = self.x_range
        result: np.ndarray = self.left + (np.asarray(values) - low) / (high - low) * (self.right - self.left)
        return result

    def y(self, values: np.ndarray) -> np.ndarray:
        low, high = self.y_range
        inside = np.clip(values, low, high)
        result: np.ndarray = self.bottom - (inside - low) / (high - low) * (self.bottom - self.top)
        return result

    def svg(self, content: str, title: str, x_label: str, y_label: str, heading: str) -> str:
        grid, labels = "", ""
        for value in ticks(*self.x_range, 6):
            place = float(self.x(np.array(value)))
            grid += f"M{place:.1f} {self.top:g}V{self.bottom:g}"
            labels += f'<text x="{place:.1f}" y="{self.bottom + 15:g}" text-anchor="middle">{value:g}</text>'
        for value in ticks(*self.y_range, 5):
            place = float(self.y(np.array(value)))
            grid += f"M{self.left:g} {place:.1f}H{self.right:g}"
            labels += f'<text x="{self.left - 6:g}" y="{place + 4:.1f}" text-anchor="end">{value:g}</text>'
        middle = (self.top + self.bottom) / 2
        return (
            f'<svg class="chart" role="img" viewBox="0 0 {self.width} {self.height}">'
            f"<title>{html.escape(title)}</title>"
            f'<path d="{grid}" stroke="#e4e4ea" stroke-width="1" fill="none"/>{content}'
            f'<path d="M{self.left:g} {self.top:g}V{self.bottom:g}H{self.right:g}" stroke="#777" fill="none"/>'
            f'<g font-size="11" fill="#333">{labels}'
            f'<text x="{(self.left + self.right) / 2:g}" y="{self.height - 8}" text-anchor="middle">'
            f"{html.escape(x_label)}</text>"
            f'<text transform="translate(14 {middle:g}) rotate(-90)" text-anchor="middle">{html.escape(y_label)}</text>'
            f'<text x="{self.left:g}" y="15" font-size="13" font-weight="600">{html.escape(heading)}</text>'
            "</g></svg>"
        )


def ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers from ``low`` to ``high``: steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * f for f in (1, 2, 5, 10) if span / (power * f) <= count)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _finite(series: Series) -> Series:
    x, y = np.asarray(series.x, dtype=np.float64), np.asarray(series.y, dtype=np.float64)
    keep = np.isfinite(x) & np.isfinite(y)
    return Series(series.name, x[keep], y[keep], series.color)


def _limits(parts: Sequence[np.ndarray]) -> tuple[float, float]:
    values = np.concatenate([*parts, np.zeros(0)])
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _padded(limits: tuple[float, float], share: float = 0.05) -> tuple[float, float]:
    low, high = limits
    pad = share * (high - low) or 0.5
    return low - pad, high + pad


def _scaled(dashes: str) -> str:
    """Dashes for a group that is drawn in tenths of a pixel."""
    return " ".join(str(10 * int(part)) for part in dashes.split())
