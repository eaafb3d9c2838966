"""The report of an ECG transfer: one HTML file with its plots, styles and numbers inside, and no script."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np

from tgdp_fast.ecg import page, plots
from tgdp_fast.fit.diagnostics import TransferDiagnostics
from tgdp_fast.metrics.classification import ClassScore, Interval
from tgdp_fast.metrics.copies import Memorization
from tgdp_fast.metrics.ecg_intervals import ECGStatistics, Spectra, StatisticComparison
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
        labels: a caption for each of them, such as its statements; equal ones stand side by side.
        metrics: by name, with bootstrap intervals; of a classifier trained on this method's samples.
        augmented: likewise, trained on these samples and the few real records.
        per_class: scores of that classifier.
        quality: numbers by name, such as the Fréchet distance.
        memorization: see :func:`tgdp_fast.metrics.memorization`.
        statistics: see :func:`tgdp_fast.metrics.compare_statistics`.
        beats: the measurements that were compared, which tell in how many records there was something to measure.
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
    beats: ECGStatistics | None = None
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
        diagnostics: as of :meth:`tgdp_fast.TransferDiagnostics.to_dict`.
        reference: measurements of the real test records.
        sizes: parameters of networks by name, the source model's first.
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
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    reference: ECGStatistics | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
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
            f"<title>{escape(report.title)}</title><style>{page.STYLE}</style></head><body>{plots.GRID}",
            f"<header><h1>{escape(report.title)}</h1>",
            "".join(f"<p>{escape(part)}</p>" for part in report.summary.split("\n") if part.strip()),
            f"</header>{_warnings(report)}{_verdict(report)}",
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


def _verdict(report: Report) -> str:
    """What the numbers say, in a sentence each. The first method is the real records."""
    texts = []
    if report.diagnostics and not TransferDiagnostics(**report.diagnostics).within_reach:
        texts.append("The target is out of reach of the source: do not use samples of TGDP.")
    if noisy := [m.name for m in report.methods[1:] if m.beats is not None and 2 * m.beats.measured < _count(m.beats)]:
        texts.append(f"Most samples of {_listed(noisy)} do not look like an ECG: no beats of one shape were found.")
    if copying := [m.name for m in report.methods[1:] if m.memorization is not None and m.memorization.copies]:
        texts.append(f"Samples of {_listed(copying)} copy training records.")
    name = next(iter(page.keys(m.metrics for m in report.methods[1:])), "")
    drawn = [(m.name, m.metrics[name]) for m in report.methods[1:] if name in m.metrics]
    ranked = sorted(drawn, key=lambda row: -math.inf if math.isnan(row[1].value) else row[1].value, reverse=True)
    if len(ranked) > 1:
        (first, best), (second, next_best) = ranked[:2]
        texts.append(
            f"{first} has the best {name}, {page.interval(best)}; next is {second}, {page.interval(next_best)}."
            + ("" if best.low > next_best.high else " The intervals overlap: no method is shown to be better.")
        )
    return f'<div class="verdict">{"".join(f"<p>{escape(text)}</p>" for text in texts)}</div>' if texts else ""


def _count(beats: ECGStatistics) -> int:
    return len(beats.heart_rate)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


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
        columns = page.keys(values for _, values in tables)
        if columns:
            rows = [
                [name, *(page.interval(values[c]) if c in values else "–" for c in columns)]
                for name, values in tables
                if values
            ]
            intervals = [value for _, values in tables for value in values.values()]
            parts.append(page.table(f"{text} {page.about(intervals)}", ["Trained on", *columns], rows))
    return "".join(parts)


def _ecgs(report: Report) -> str:
    shown = [method for method in report.methods if method.samples is not None and len(method.samples)]
    rows: dict[str, dict[str, np.ndarray]] = {}  # caption -> name of the method -> its record
    for method in shown:
        assert method.samples is not None
        if method.labels and len(method.labels) != len(method.samples):
            raise ValueError(
                f"labels of {method.name} must be one for each of {len(method.samples)} samples, got "
                f"{len(method.labels)}"
            )
        for i, signals in enumerate(method.samples):
            label = method.labels[i] if method.labels else f"record {i + 1}"
            rows.setdefault(label, {}).setdefault(method.name, signals)
    about = "".join(
        f"<li><strong>{escape(m.name)}</strong>: {escape(m.description)}</li>" for m in shown if m.description
    )
    parts = [_side_by_side(report, label, records, [m.name for m in shown]) for label, records in rows.items()]
    return (f'<ul class="notes">{about}</ul>' if about else "") + "".join(parts)


def _side_by_side(report: Report, label: str, records: Mapping[str, np.ndarray], names: Sequence[str]) -> str:
    """Records of one statement, a column for each method at one scale, and below, folded, with all their leads."""
    scale = plots.gain(*records.values())
    small, large = "", ""
    for name in names:
        if name not in records:
            small += f"<figure><figcaption>{escape(name)}</figcaption><p>none of this statement</p></figure>"
            continue
        signals, caption = records[name], f"{name}: {label}"
        strip = plots.strip_plot(signals, report.rate, report.leads, f"Three leads. {caption}", scale)
        small += f"<figure><figcaption>{escape(name)}</figcaption>{strip}</figure>"
        whole = plots.ecg_plot(signals, report.rate, report.leads, f"Twelve-lead electrocardiogram. {caption}")
        large += f"<figure><figcaption>{escape(caption)}</figcaption>{whole}</figure>"
    note = "<p>Printed on A4 in landscape, the paper is to scale: 25 mm are a second.</p>"
    return (
        f'<h3>{escape(label)}</h3><div class="scroll"><div class="strips" style="--columns:{len(names)}">{small}</div>'
        f"</div><details><summary>All twelve leads: {escape(label)}</summary>{note}{large}</details>"
    )


def _quality(report: Report) -> str:
    columns = page.keys(method.quality for method in report.methods)
    remembered = any(method.memorization for method in report.methods)
    extra = ["nearest record, ratio", "5 % nearest, ratio", "nearer than held-out", "copies"] if remembered else []
    rows = []
    for method in report.methods:
        if not method.quality and method.memorization is None:
            continue
        cells = [page.number(method.quality[c]) if c in method.quality else "–" for c in columns]
        found = method.memorization
        if found is not None:
            cells += [
                page.number(found.median_ratio),
                page.number(found.low_ratio),
                f"{found.nearer} ({page.number(found.expected_nearer, 1)} expected)",
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
    return page.table(text, ["Method", *columns, *extra], rows) + page.notes(notes)


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
            rows.append([name, str(positives), *_with_best(values)])
        parts.append(
            page.table(
                f"{title} of each statement, on real records. Bold: better than all others.",
                ["Statement", "records", *(method.name for method in shown)],
                rows,
                raw=True,
            )
        )
    return "".join(parts)


def _with_best(values: Sequence[float]) -> list[str]:
    """Cells; the largest is bold where it is above 0 and no other shows the same number."""
    cells = [page.number(value) for value in values]
    best = max((v for v in values if not math.isnan(v)), default=0.0)
    alone = best > 0 and cells.count(page.number(best)) == 1
    return [f"<strong>{cell}</strong>" if alone and cell == page.number(best) else cell for cell in cells]


def _reach(report: Report) -> str:
    """The diagnostics, and the ratio that they are of."""
    if not report.diagnostics:
        return _ratios(report)
    found = TransferDiagnostics(**report.diagnostics)
    share = found.effective_sample_size / max(1, found.num_source)
    rows = [
        ["Target outside the source", f"{found.outside_fraction:.0%}", "near 0; above 34 %: out of reach"],
        ["Mean ratio over the source", f"{found.mean_ratio:.3g}", "near 1; outside 0.1 to 10: out of reach"],
        [
            "Effective sample size",
            f"{found.effective_sample_size:.0f} of {found.num_source} ({share:.0%})",
            "the larger the better, if the target is within reach",
        ],
        ["AUC of the domains, held out", page.number(found.auc), "0.5: the same domain; 1: separable"],
        ["Calibration slope", page.number(found.calibration_slope, 2), "near 1; well below: overconfident"],
    ]
    if found.mean_h:
        low, high = min(row[1] for row in found.mean_h), max(row[1] for row in found.mean_h)
        rows.append(["Mean of the fitted h, E_p[h]", f"{low:.3g} to {high:.3g} over t", "near 1 at every t"])
    caption = f"Diagnostics of {found.num_source} source and {found.num_target} target records, before sampling."
    return page.table(caption, ["Number", "value", "good"], rows, left=True) + _ratios(report)


def _ratios(report: Report) -> str:
    values = {name: np.asarray(v) for name, v in report.log_ratios.items() if np.size(v)}
    if not values:
        return ""
    colors = (1, 4, 3, 5)
    plot = plots.histogram(values, "Histograms of the learned log-ratio", "log r = log q / p (nats)", colors=colors)
    legend = plots.legend([(name, colors[i % 4]) for i, name in enumerate(values)])
    rows = [
        [name, str(len(v)), *(page.number(float(q)) for q in np.quantile(v[np.isfinite(v)], [0.05, 0.5, 0.95]))]
        for name, v in values.items()
        if np.isfinite(v).any()
    ]
    caption = "Learned log-ratio of target to source density. The further apart, the better the domains are told apart."
    return f"<figure>{legend}{plot}<figcaption>{caption}</figcaption></figure>" + page.table(
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
    rows = [["Records measured", _measured(report.reference), *(_measured(method.beats) for method in shown)]]
    if set(rows[0][1:]) == {"–"}:
        rows = []
    for name in page.keys({s.name: s for s in method.statistics} for method in shown):
        found = [next((s for s in method.statistics if s.name == name), None) for method in shown]
        first = next(s for s in found if s is not None)
        cells = ["–" if s is None or not s.num_generated else _generated(s) for s in found]
        heading = f"{titles.get(name, name)} ({first.unit})"
        rows.append([heading, f"{page.quartiles(first.real)}<br><small>n = {first.num_real}</small>", *cells])
    return page.table(
        "Median (quartiles) over the records; W₁ is the Wasserstein-1 distance to the real records. A record is "
        "measured if its beats are alike; peaks that a detector finds in noise are not.",
        ["Measure", "Reference", *(method.name for method in shown)],
        rows,
        raw=True,
    )


def _generated(found: StatisticComparison) -> str:
    distance = f"W₁ {page.number(found.wasserstein, 1)}, n = {found.num_generated}"
    return f"{page.quartiles(found.generated)}<br><small>{distance}</small>"


def _measured(beats: ECGStatistics | None) -> str:
    """How many of how many records were measured, and why the others were not."""
    if beats is None:
        return "–"
    reasons = [(beats.noise, "noise"), (beats.failed - beats.noise, "no beats")]
    lost = ", ".join(f"{count} {reason}" for count, reason in reasons if count)
    return f"{beats.measured} of {_count(beats)}" + (f"<br><small>{lost}</small>" if lost else "")


def _costs(report: Report) -> str:
    rows = [
        [
            method.name,
            page.or_dash(cost.trainable_parameters, lambda v: f"{int(v):,}"),
            page.or_dash(cost.training_seconds, page.seconds),
            page.or_dash(cost.sampling_seconds, page.seconds),
            page.or_dash(cost.memory_bytes, lambda v: f"{v / 2**20:,.0f} MiB"),
        ]
        for method in report.methods
        if (cost := method.cost) is not None
    ]
    if not rows:
        return ""
    header = ["Method", "trainable parameters", "training", "sampling", "peak memory"]
    notes = ["The source model's training is in its own row alone: methods that start from it share it."]
    (first, own), *others = report.sizes.items() or [("", 0)]
    notes += [
        f"{name}: {size:,} parameters, {size / own:.3g} times the {own:,} of the {first}." for name, size in others
    ]
    return page.table("What each method takes; wall-clock time.", header, rows) + page.notes(notes)


def _counts(report: Report) -> str:
    rows = [[name, page.plain(value)] for name, value in report.counts.items()]
    return page.table("Records", ["Part", "records"], rows) if rows else ""


def _provenance(report: Report) -> str:
    parts = []
    for title, values in (("Versions and machine", report.provenance), ("Settings", report.settings)):
        rows = [[name, page.plain(value)] for name, value in page.flattened(values)]
        if rows:
            table = page.table(title, ["Entry", "value"], rows, left=True)
            parts.append(
                f"<details{' open' * (values is report.provenance)}><summary>{title}</summary>{table}</details>"
            )
    return "".join(parts)


_SECTIONS: Sequence[tuple[str, str, Callable[[Report], str]]] = (
    ("ratios", "Is the target within reach?", _reach),
    ("classification", "Train on samples, test on real records", _classification),
    ("classes", "Per statement", _per_class),
    ("quality", "Quality, diversity, memorization", _quality),
    ("electrocardiograms", "Electrocardiograms", _ecgs),
    ("intervals", "Heart rate and intervals", _statistics),
    ("spectra", "Spectra", _spectra),
    ("cost", "Cost", _costs),
    ("data", "Data", _counts),
    ("provenance", "Provenance", _provenance),
)
