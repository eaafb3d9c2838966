"""The report of an ECG transfer: one HTML file with its plots, styles and numbers inside, and no script."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np

from tgdp_fast.ecg import plots
from tgdp_fast.metrics.classification import ClassScore, Interval
from tgdp_fast.metrics.copies import Memorization
from tgdp_fast.metrics.ecg_intervals import Spectra, StatisticComparison
from tgdp_fast.runtime.files import write_atomic

#: Leads whose spectra are shown, where they are there.
SPECTRUM_LEADS = ("II", "V1", "V2", "V5")


@dataclass(frozen=True)
class Cost:
    """Cost of a method; None where it was not measured.

    Attributes:
        trainable_parameters: of the networks trained for this method; a shared source model is a method of its own.
        training_seconds, sampling_seconds: wall-clock.
        memory_bytes: peak during training.
    """

    trainable_parameters: int | None = None
    training_seconds: float | None = None
    sampling_seconds: float | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Method:
    """One method, or the real records, which come first as the reference.

    Attributes:
        name: as in tables and legends.
        description: one sentence.
        samples: records to plot [k, leads, L] in mV, with the leads of the report.
        labels: a caption for each of them, such as its statements.
        metrics: by name, with bootstrap intervals; of a classifier trained on this method's samples.
        augmented: likewise, trained on these samples and the few real records.
        per_class: scores of that classifier.
        quality: numbers by name, such as the Fréchet distance.
        memorization: see :func:`tgdp_fast.metrics.memorization`.
        statistics: see :func:`tgdp_fast.metrics.compare_statistics`.
        spectra: with the leads of the report.
        cost: see :class:`Cost`.
    """

    name: str
    description: str = ""
    samples: np.ndarray | None = None
    labels: Sequence[str] = ()
    metrics: Mapping[str, Interval] = field(default_factory=dict)
    augmented: Mapping[str, Interval] = field(default_factory=dict)
    per_class: Sequence[ClassScore] = ()
    quality: Mapping[str, float] = field(default_factory=dict)
    memorization: Memorization | None = None
    statistics: Sequence[StatisticComparison] = ()
    spectra: Spectra | None = None
    cost: Cost | None = None


@dataclass(frozen=True)
class Report:
    """The content of the file. Empty sections are left out.

    Attributes:
        title: heading.
        methods: in the order of tables and plots.
        rate: samples per second of all signals.
        leads: names of the leads of all signals; the twelve of a standard ECG.
        summary: a few sentences on what was done.
        warnings: of the diagnostics; shown first.
        log_ratios: log density ratios at the records of "source" and "target".
        counts: numbers of records by name.
        provenance: versions, seeds, machine.
        settings: of the run; nested tables are shown flat.
    """

    title: str
    methods: Sequence[Method]
    rate: float
    leads: Sequence[str]
    summary: str = ""
    warnings: Sequence[str] = ()
    log_ratios: Mapping[str, np.ndarray] = field(default_factory=dict)
    counts: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


def write_report(path: str | os.PathLike[str], report: Report) -> None:
    """Write the report as one HTML file, atomically. It needs no other file, no network and no script.

    Raises:
        ValueError: signals of a wrong shape, missing leads or captions.
    """
    write_atomic(path, render(report))


def render(report: Report) -> str:
    """The HTML text of :func:`write_report`."""
    if not report.methods:
        raise ValueError("methods must not be empty")
    names = [method.name for method in report.methods]
    if len(set(names)) < len(names):
        raise ValueError(f"methods must have different names, got {', '.join(names)}")
    sections = [(identifier, title, body) for identifier, title, build in _SECTIONS if (body := build(report))]
    contents = "".join(f'<li><a href="#{identifier}">{title}</a></li>' for identifier, title, _ in sections)
    return "".join(
        [
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(report.title)}</title><style>{_STYLE}</style></head><body>{plots.GRID}",
            f"<header><h1>{escape(report.title)}</h1>",
            "".join(f"<p>{escape(part)}</p>" for part in report.summary.split("\n") if part.strip()),
            f"</header>{_warnings(report)}",
            f'<nav aria-label="Contents"><ol>{contents}</ol></nav><main>',
            *(
                f'<section id="{identifier}" aria-labelledby="{identifier}-title">'
                f'<h2 id="{identifier}-title">{title}</h2>{body}</section>\n'
                for identifier, title, body in sections
            ),
            "</main></body></html>\n",
        ]
    )


# ------------------------------------------------------------------------------------------------ sections


def _warnings(report: Report) -> str:
    if not report.warnings:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in report.warnings)
    count = f"{len(report.warnings)} warning{'s' * (len(report.warnings) > 1)}"
    return (
        '<aside class="warnings" role="note" aria-labelledby="warnings-title">'
        f'<h2 id="warnings-title">⚠ {count}: read before the numbers</h2><ul>{items}</ul></aside>'
    )


def _classification(report: Report) -> str:
    parts = []
    for attribute, text in (
        ("metrics", "A classifier is trained on the samples of a method and tested on real target records."),
        ("augmented", "Trained on the samples together with the few real target records of training."),
    ):
        tables: list[tuple[str, Mapping[str, Interval]]] = [(m.name, getattr(m, attribute)) for m in report.methods]
        columns = _keys(values for _, values in tables)
        if columns:
            rows = [
                [name, *(_interval(values[c]) if c in values else "–" for c in columns)]
                for name, values in tables
                if values
            ]
            intervals = [value for _, values in tables for value in values.values()]
            parts.append(_table(f"{text} {_about(intervals)}", ["Trained on", *columns], rows))
    return "".join(parts)


def _ecgs(report: Report) -> str:
    parts = []
    for method in report.methods:
        if method.samples is None or not len(method.samples):
            continue
        if method.labels and len(method.labels) != len(method.samples):
            raise ValueError(
                f"labels of {method.name} must be one for each of {len(method.samples)} samples, got "
                f"{len(method.labels)}"
            )
        figures = []
        for i, signals in enumerate(method.samples):
            caption = f"{method.name}, record {i + 1}" + (f": {method.labels[i]}" if method.labels else "")
            title = f"Twelve-lead electrocardiogram. {caption}"
            plot = plots.ecg_plot(signals, report.rate, report.leads, title)
            figures.append(f"<figure>{plot}<figcaption>{escape(caption)}</figcaption></figure>")
        about = f"<p>{escape(method.description)}</p>" if method.description else ""
        parts.append(f"<h3>{escape(method.name)}</h3>{about}{''.join(figures)}")
    note = "<p>Printed on A4 in landscape, the paper is to scale: 25 mm are a second, 10 mm a millivolt.</p>"
    return note + "".join(parts) if parts else ""


def _quality(report: Report) -> str:
    columns = _keys(method.quality for method in report.methods)
    remembered = any(method.memorization for method in report.methods)
    extra = ["nearest record, ratio", "5 % nearest, ratio", "nearer than held-out", "copies"] if remembered else []
    rows = []
    for method in report.methods:
        if not method.quality and method.memorization is None:
            continue
        cells = [_number(method.quality[c]) if c in method.quality else "–" for c in columns]
        found = method.memorization
        if found is not None:
            cells += [
                _number(found.median_ratio),
                _number(found.low_ratio),
                f"{found.nearer} ({_number(found.expected_nearer, 1)} expected)",
                f"{found.copies} of {len(found.generated)}",
            ]
        elif remembered:
            cells += ["–"] * len(extra)
        rows.append([method.name, *cells])
    if not rows:
        return ""
    text = "Closeness to real target records, diversity, and distance to the records of training."
    notes = [
        "Fréchet distance: of Gaussians fitted to features of a frozen ECG classifier; 0 is best. It is biased "
        "upwards: compare with that of the real records.",
        "Density: 1 for equal distributions. Coverage: share of real records with a sample near by.",
    ]
    if remembered:
        notes.append(
            "Ratios: distance to the nearest training record, by correlation over shifts in time, divided by that of "
            "held-out real records. Near or above 1: no copying. Copies are equal to a training record up to scale, "
            "offset and shift."
        )
    return _table(text, ["Method", *columns, *extra], rows) + _notes(notes)


def _per_class(report: Report) -> str:
    shown = [method for method in report.methods if method.per_class]
    if not shown:
        return ""
    parts = []
    names = list(dict.fromkeys(score.name for method in shown for score in method.per_class))
    for title, attribute in (("Area under the ROC curve", "auc"), ("F1", "f1")):
        rows = []
        for name in names:
            found = [next((s for s in method.per_class if s.name == name), None) for method in shown]
            positives = next(score.positives for score in found if score is not None)
            values = [math.nan if score is None else float(getattr(score, attribute)) for score in found]
            best = max((v for v in values if not math.isnan(v)), default=math.nan)
            cells = [f"<strong>{_number(v)}</strong>" if v == best else _number(v) for v in values]
            rows.append([name, str(positives), *cells])
        parts.append(
            _table(
                f"{title} of each statement, on real records; the best of a row is bold.",
                ["Statement", "records", *(method.name for method in shown)],
                rows,
                raw=True,
            )
        )
    return "".join(parts)


def _ratios(report: Report) -> str:
    values = {name: np.asarray(v) for name, v in report.log_ratios.items() if np.size(v)}
    if not values:
        return ""
    colors = (1, 4, 3, 5)
    plot = plots.histogram(values, "Histograms of the learned log-ratio", "log r = log q / p (nats)", colors=colors)
    legend = plots.legend([(name, colors[i % 4]) for i, name in enumerate(values)])
    rows = [
        [name, str(len(v)), *(_number(float(q)) for q in np.quantile(v[np.isfinite(v)], [0.05, 0.5, 0.95]))]
        for name, v in values.items()
        if np.isfinite(v).any()
    ]
    caption = "Learned log-ratio of target to source density. The further apart, the better the domains are told apart."
    return f"<figure>{legend}{plot}<figcaption>{caption}</figcaption></figure>" + _table(
        "Quantiles of the log-ratio", ["Records of", "number", "5 %", "median", "95 %"], rows
    )


def _spectra(report: Report) -> str:
    shown = [(i, method) for i, method in enumerate(report.methods) if method.spectra is not None]
    if not shown:
        return ""
    names = [name.lower() for name in report.leads]
    chosen = [name for name in SPECTRUM_LEADS if name.lower() in names] or list(report.leads[:4])
    figures = []
    for lead in chosen:
        row = names.index(lead.lower())
        series = [
            plots.Series(method.name, method.spectra.frequency, method.spectra.decibels[row], i)
            for i, method in shown
            if method.spectra is not None
        ]
        figures.append(
            plots.curves(
                series,
                f"Mean power spectrum of lead {lead}",
                "frequency (Hz)",
                "dB re 1 mV²/Hz",
                heading=f"Lead {lead}",
            )
        )
    legend = plots.legend([(method.name, i) for i, method in shown])
    caption = "<figcaption>Mean power spectra, by Welch's method</figcaption>"
    return f'<figure>{legend}<div class="grid">{"".join(figures)}</div>{caption}</figure>'


def _statistics(report: Report) -> str:
    shown = [method for method in report.methods if method.statistics]
    if not shown:
        return ""
    titles = {
        "heart_rate": "Heart rate",
        "rr_deviation": "Standard deviation of RR intervals",
        "pr": "PR interval",
        "qrs": "QRS duration",
        "qt": "QT interval",
    }
    rows = []
    for name in _keys({s.name: s for s in method.statistics} for method in shown):
        found = [next((s for s in method.statistics if s.name == name), None) for method in shown]
        first = next(s for s in found if s is not None)
        cells = [
            "–"
            if s is None
            else f"{_quartiles(s.generated)}<br><small>W₁ {_number(s.wasserstein, 1)}, n = {s.num_generated}</small>"
            for s in found
        ]
        heading = f"{titles.get(name, name)} ({first.unit})"
        rows.append([heading, f"{_quartiles(first.real)}<br><small>n = {first.num_real}</small>", *cells])
    return _table(
        "Median (quartiles) over the records; W₁ is the Wasserstein-1 distance to the real records.",
        ["Measure", "Reference", *(method.name for method in shown)],
        rows,
        raw=True,
    )


def _costs(report: Report) -> str:
    rows = [
        [
            method.name,
            _or_dash(cost.trainable_parameters, lambda v: f"{int(v):,}"),
            _or_dash(cost.training_seconds, _seconds),
            _or_dash(cost.sampling_seconds, _seconds),
            _or_dash(cost.memory_bytes, lambda v: f"{v / 2**20:,.0f} MiB"),
        ]
        for method in report.methods
        if (cost := method.cost) is not None
    ]
    if not rows:
        return ""
    header = ["Method", "trainable parameters", "training", "sampling", "peak memory"]
    note = "The source model's training is in its own row alone: methods that start from it share it."
    return _table("What each method takes; wall-clock time.", header, rows) + _notes([note])


def _counts(report: Report) -> str:
    rows = [[name, _plain(value)] for name, value in report.counts.items()]
    return _table("Records", ["Part", "records"], rows) if rows else ""


def _provenance(report: Report) -> str:
    parts = []
    for title, values in (("Versions and machine", report.provenance), ("Settings", report.settings)):
        rows = [[name, _plain(value)] for name, value in _flattened(values)]
        if rows:
            parts.append(f"<details open><summary>{title}</summary>{_table(title, ['Entry', 'value'], rows)}</details>")
    return "".join(parts)


_SECTIONS: Sequence[tuple[str, str, Callable[[Report], str]]] = (
    ("classification", "Train on samples, test on real records", _classification),
    ("electrocardiograms", "Electrocardiograms", _ecgs),
    ("quality", "Quality, diversity, memorization", _quality),
    ("classes", "Per statement", _per_class),
    ("intervals", "Heart rate and intervals", _statistics),
    ("spectra", "Spectra", _spectra),
    ("ratios", "Learned density ratio", _ratios),
    ("cost", "Cost", _costs),
    ("data", "Data", _counts),
    ("provenance", "Provenance", _provenance),
)


# -------------------------------------------------------------------------------------------------- pieces


def _table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, raw: bool = False) -> str:
    """An HTML table. All cells are escaped; with ``raw`` only the header and the first column are."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{cell if raw else escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _notes(texts: Sequence[str]) -> str:
    return f'<ul class="notes">{"".join(f"<li>{escape(text)}</li>" for text in texts)}</ul>'


def _number(value: float, digits: int = 3) -> str:
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.3g}"
    return text.replace("-", "−")


def _interval(value: Interval) -> str:
    if math.isnan(value.low):
        return _number(value.value)
    return f"{_number(value.value)} ({_number(value.low)} to {_number(value.high)})"


def _about(intervals: Sequence[Interval]) -> str:
    known = [value for value in intervals if not math.isnan(value.low)]
    if not known:
        return ""
    return (
        f"In brackets {known[0].confidence:.0%} bootstrap intervals over the test records ({known[0].num} resamplings)."
    )


def _quartiles(values: tuple[float, float, float]) -> str:
    low, median, high = (_number(value, 0) for value in values)
    return "–" if median == "–" else f"{median} ({low} to {high})"


def _seconds(value: float) -> str:
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def _or_dash(value: Any, shown: Callable[[Any], str]) -> str:
    return "–" if value is None else shown(value)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    return str(value)


def _flattened(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    entries: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            entries += _flattened(value, f"{prefix}{name}.")
        else:
            entries.append((f"{prefix}{name}", value))
    return entries


def _keys(tables: Any) -> list[str]:
    """Keys of all tables, in the order in which they first appear."""
    return list(dict.fromkeys(key for table in tables for key in table))


_STYLE = """
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
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:.8rem}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.4rem;list-style:none;margin:.2rem 0 .6rem;padding:0;font-size:.95rem}
.legend svg{vertical-align:middle}
.notes{color:var(--soft);font-size:.9rem;max-width:85ch;padding-left:1.2rem}
summary{font-weight:600;cursor:pointer}
details td{white-space:normal;text-align:left;word-break:break-word}
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
