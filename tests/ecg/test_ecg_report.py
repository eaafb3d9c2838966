"""The report of an ECG transfer: what the file holds, and what a browser shows."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tgdp_fast.ecg import plots
from tgdp_fast.ecg.records.leads import STORED_LEADS
from tgdp_fast.ecg.records.synthetic import synthetic_ecg
from tgdp_fast.ecg.report import Cost, Method, Report, render, write_report
from tgdp_fast.fit.diagnostics import TransferDiagnostics
from tgdp_fast.metrics import ClassScore, ECGStatistics, Interval, Memorization, Spectra, StatisticComparison

TWELVE = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
NAMES = ("Real records", "Source model", "Vanilla", "Fine-tune", 'TGDP <guided> & "co"')
NAN = float("nan")


def twelve(count: int, seed: int) -> np.ndarray:
    """[count, 12, 1000] mV, by the relations of Einthoven and Goldberger."""
    x = synthetic_ecg(count, 1000, seed=seed)
    first, foot = x[:, STORED_LEADS.index("I")], x[:, STORED_LEADS.index("aVF")]
    second = foot + first / 2
    third = second - first
    limbs = [first, second, third, -(first + second) / 2, first - second / 2, foot]
    chest = [x[:, STORED_LEADS.index(f"V{i}")] for i in range(1, 7)]
    return np.stack([*limbs, *chest], axis=1)


def method(i: int, name: str) -> Method:
    random = np.random.default_rng(i)
    comparison = StatisticComparison("qt", "ms", (381.0, 402.0, 423.0), (377.0 + i, 399.0 + i, 431.0), 40, 39, 5.5 + i)
    frequency = np.arange(1, 101) / 2.0
    return Method(
        name,
        f"Sentence {i}.",
        samples=twelve(2, i),
        labels=["NORM", "AFIB, PVC"],
        metrics={"macro AUC": Interval(0.71 + i / 100, 0.65, 0.78 + i / 100, 0.95, 200, 3), "F-max": _alone(0.6)},
        augmented={"macro AUC": Interval(0.81 + i / 100, 0.75, 0.88, 0.95, 200, 3)} if i else {},
        per_class=[ClassScore("NORM", 21, 0.9 - i / 50, 0.8, 0.7, 0.6), ClassScore("STE_", 0, NAN, NAN, NAN, NAN)],
        quality={"Fréchet": 10.125 + i, "density": 0.91, "coverage": 0.87},
        memorization=Memorization(
            random.uniform(0.5, 1, 64), random.uniform(0.5, 1, 50), np.zeros(64, int), 1.013 + i, 0.981, 2, 1.3, i
        ),
        statistics=[comparison],
        spectra=Spectra(frequency, -10 - 0.4 * frequency + random.standard_normal((12, 100)) + 0 * frequency),
        cost=Cost(123_456 + i, 75.5, 7_300.0, 3 * 2**28) if i else None,
    )


def _alone(value: float) -> Interval:
    return Interval(value, NAN, NAN, 0.95, 0, 0)


def report(**changes: Any) -> Report:
    random = np.random.default_rng(0)
    values: dict[str, Any] = {
        "title": "ECG transfer: PTB-XL to <ICBEB2018>",
        "methods": [method(i, name) for i, name in enumerate(NAMES)],
        "rate": 100.0,
        "leads": TWELVE,
        "summary": "First part.\nSecond part.",
        "warnings": ["The ratio saturates: 41 % of <records>.", "Few target records."],
        "log_ratios": {"source": random.normal(-2, 1, 500), "target": random.normal(1.5, 1.2, 80)},
        "counts": {"source records": 68, "target records, training": 8},
        "provenance": {"tgdp_fast": "0.1.0", "torch": "2.13.0"},
        "settings": {"seed": 7, "data": {"rate": 100.0, "leads": ["I", "aVF"]}},
    }
    return Report(**(values | changes))


class Page(HTMLParser):
    """What a page is made of; fails where elements are not closed in order."""

    VOID = {"meta", "br", "rect", "path"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.titles: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open[-1:] == ["title"]:
            self.titles.append(data)
        if "table" in self.open and {"th", "td"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def table(self, header: str) -> list[list[str]]:
        return next(table for table in self.tables if header in table[0])


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render(report()))


def test_the_file_needs_nothing_else(tmp_path: Path, page: Page) -> None:
    write_report(tmp_path / "new" / "report.html", report())
    text = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    assert text == render(report())
    assert os.listdir(tmp_path / "new") == ["report.html"]
    assert {"script", "link", "img", "iframe", "object", "use", "foreignobject"}.isdisjoint(t for t, _ in page.tags)
    for _, attributes in page.tags:
        assert not {"src", "srcset", "data", "xlink:href"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
        for value in attributes.values():
            assert all(place.startswith("#") for place in re.findall(r"url\(([^)]*)\)", value or ""))
    assert not re.search(r"@import|@font-face|https?:", text)
    assert len(text) < 500_000  # Ten ECGs of twelve leads and all else.


def test_anchors_and_references_exist_once(page: Page) -> None:
    identifiers = [a["id"] for _, a in page.tags if "id" in a]
    assert len(set(identifiers)) == len(identifiers)
    wanted = {a["href"][1:] for _, a in page.tags if a.get("href")}  # type: ignore[index]
    wanted |= {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a}  # type: ignore[misc]
    assert wanted <= set(identifiers)
    assert {"classification", "electrocardiograms", "cost", "ratios", "provenance"} <= wanted


def test_every_plot_is_there_and_says_what_it_is(page: Page) -> None:
    for name in NAMES:
        for label in ("NORM", "AFIB, PVC"):
            assert f"Twelve-lead electrocardiogram. {name}: {label}" in page.titles
            assert f"Three leads. {name}: {label}" in page.titles
    plots_shown = [a for tag, a in page.tags if tag == "svg" and a.get("role") == "img"]
    assert [a["class"] for a in plots_shown].count("ecg") == 2 * 10
    assert [a["class"] for a in plots_shown].count("chart") == 4 + 1
    # The page itself and every image has a title.
    assert len(page.titles) == 1 + len(plots_shown)


def test_tables_show_the_numbers_given(page: Page) -> None:
    scores = page.table("Trained on")
    assert scores[0] == ["Trained on", "macro AUC", "F-max"]
    assert scores[1] == ["Real records", "0.710 (0.650 to 0.780)", "0.600"]
    assert scores[5] == [NAMES[4], "0.750 (0.650 to 0.820)", "0.600"]
    assert page.text.count("95% bootstrap intervals over the test records (200 resamplings)") == 2
    costs = page.table("trainable parameters")
    assert len(costs) == 1 + 4
    assert costs[1] == ["Source model", "123,457", "75.5 s", "2.0 h", "768 MiB"]
    quality = page.table("copies")
    assert quality[2] == [
        "Source model", "11.125", "0.910", "0.870", "2.013", "0.981", "2 (1.3 expected)", "1 of 64"
    ]  # fmt: skip
    classes = page.table("Statement")
    assert classes[1] == ["NORM", "21", "0.900", "0.880", "0.860", "0.840", "0.820"]
    assert classes[2] == ["STE_", "0", *["–"] * 5]
    intervals = page.table("Measure")
    assert intervals[1][:2] == ["QT interval (ms)", "402 (381 to 423)n = 40"]
    assert intervals[1][3] == "400 (378 to 431)W₁ 6.5, n = 39"
    quantiles = page.table("Records of")
    assert quantiles[1][:2] == ["source", "500"]
    assert float(quantiles[1][3].replace("−", "-")) == pytest.approx(-2, abs=0.2)
    assert ["source records", "68"] in page.table("Part")
    settings = [row for table in page.tables if table[0] == ["Entry", "value"] for row in table]
    assert ["data.rate", "100"] in settings
    assert ["data.leads", "I, aVF"] in settings


def test_text_is_escaped_and_warnings_come_first(page: Page) -> None:
    text = render(report())
    assert "<ICBEB2018>" not in text
    assert "<guided>" not in text
    assert "ECG transfer: PTB-XL to <ICBEB2018>" in page.text
    assert "2 warnings" in page.text
    assert page.text.index("The ratio saturates: 41 % of <records>.") < page.text.index("macro AUC")
    assert "warnings-title" not in render(report(warnings=()))


def test_sections_without_content_are_left_out() -> None:
    bare = Page(render(report(methods=[Method("Real records")], log_ratios={}, counts={}, warnings=())))
    sections = [a["id"] for tag, a in bare.tags if tag == "section"]
    assert sections == ["provenance"]


def diagnostics(**changes: Any) -> dict[str, Any]:
    return TransferDiagnostics(
        **{
            "num_source": 68, "num_target": 8, "auc": 0.91, "calibration_error": 0.1, "calibration_slope": 0.4,
            "effective_sample_size": 20.0, "mean_ratio": 0.8, "outside_fraction": 0.1, "mean_h": [(0.0, 0.5, 0.1)],
        }
        | changes
    ).to_dict()  # fmt: skip


def measured(records: int, noise: int, failed: int) -> ECGStatistics:
    rate = np.where(np.arange(records) < failed, np.nan, 70.0)
    return ECGStatistics(rate, rate, rate, rate, rate, "II", failed, noise)


def test_the_top_says_what_the_numbers_say() -> None:
    methods = [dataclasses.replace(method(i, name), beats=measured(64, 0, 0)) for i, name in enumerate(NAMES[:3])]
    methods[1] = dataclasses.replace(methods[1], beats=measured(64, 59, 60), memorization=None)
    text = Page(render(report(methods=methods, diagnostics=diagnostics(), warnings=()))).text
    top = text[: text.index("Contents") if "Contents" in text else text.index("Is the target within reach?")]
    assert "Most samples of Source model do not look like an ECG" in top
    assert "Samples of Vanilla copy training records." in top
    assert "Vanilla has the best macro AUC, 0.730 (0.650 to 0.800); next is Source model, 0.720" in top
    assert "The intervals overlap: no method is shown to be better." in top
    assert "out of reach of the source" not in top
    page = Page(render(report(methods=methods, diagnostics=diagnostics(outside_fraction=1.0))))
    assert "The target is out of reach of the source: do not use samples of TGDP." in page.text
    rows = {row[0]: row[1] for row in page.table("good")[1:]}
    assert rows["AUC of the domains, held out"] == "0.910"
    assert rows["Effective sample size"] == "20 of 68 (29%)"
    assert rows["Mean of the fitted h, E_p[h]"] == "0.5 to 0.5 over t"


def test_what_was_not_measured_is_counted() -> None:
    methods = [dataclasses.replace(method(i, name), beats=measured(64, 59, 60)) for i, name in enumerate(NAMES[:2])]
    nothing = StatisticComparison("qt", "ms", (381.0, 402.0, 423.0), (NAN, NAN, NAN), 40, 0, NAN)
    methods[1] = dataclasses.replace(methods[1], statistics=[nothing])
    table = Page(render(report(methods=methods, reference=measured(8, 0, 0)))).table("Measure")
    assert table[1] == ["Records measured", "8 of 8", *["4 of 6459 noise, 1 no beats"] * 2]
    assert table[2][-1] == "–"


def test_bold_is_what_is_better_than_all_others() -> None:
    def scores(*values: float) -> list[Method]:
        return [
            Method(name, per_class=[ClassScore("NORM", 3, value, NAN, NAN, NAN)])
            for name, value in zip(NAMES, values, strict=False)
        ]

    for values, bold in (
        ((0.0, 0.0, 0.0), []),
        ((1.0, 1.0, 1.0), []),
        ((0.5, 0.9, 0.9), []),
        ((0.5, 0.90001, 0.9), []),
        ((0.5, 0.9, NAN), ["0.900"]),
        ((0.0, 0.0, 0.2), ["0.200"]),
    ):
        text = render(report(methods=scores(*values)))
        assert re.findall(r"<td><strong>(.*?)</strong></td>", text) == bold


def test_settings_are_folded_and_sizes_told() -> None:
    text = render(report(sizes={"source model": 24_216, "Guidance of TGDP": 583_201}))
    assert "<details><summary>Settings" in text
    assert "Guidance of TGDP: 583,201 parameters, 24.1 times the 24,216 of the source model." in text


def test_sections_have_the_order_of_the_guide() -> None:
    page = Page(render(report(diagnostics=diagnostics())))
    order = [a["id"] for tag, a in page.tags if tag == "section"]
    assert order == [
        "ratios", "classification", "classes", "quality", "electrocardiograms", "intervals", "spectra", "cost", "data",
        "provenance",
    ]  # fmt: skip


def layout(plot: str) -> tuple[float, float, list[float]]:
    """Width and height of a plot, and the baselines of its rows, from the calibration pulses; mm at 10 mm/mV."""
    size = re.search(r'viewBox="0 0 (\d+) (\d+)"', plot)
    assert size
    return float(size[1]), float(size[2]), [float(y) for y in re.findall(r"M6 (\d+)h2v-10h5v10h2", plot)]


def test_rows_are_as_high_as_their_signals() -> None:
    x = np.zeros((12, 1000))
    width, height, rows = layout(plots.ecg_plot(x, 100.0, TWELVE, "t"))
    assert (width, height) == (270.0, 130.0)
    assert np.diff(rows).tolist() == [30.0] * 3
    x[TWELVE.index("V5"), 800] = 2.2
    x[TWELVE.index("V6"), 10] = 2.2  # not in the quarter that is shown
    x[TWELVE.index("V1"), 600] = -2.6
    _, height, rows = layout(plots.ecg_plot(x, 100.0, TWELVE, "t"))
    # 22 mm and the name above V5, 26 mm and a line's width below V1.
    assert np.diff(rows).tolist() == [30 + 30, 15 + 15, 15 + 15]
    assert height == 130 + 15 + 15


def boxes(plot: str) -> list[tuple[float, float, float, float]]:
    """Left, right, top and bottom of every trace, mm."""
    found = []
    for start, steps in re.findall(r'<path d="M([\d.-]+ [\d.-]+)l([^"]*)"/>', plot):
        points = np.cumsum([[int(v) for v in start.split()], *np.array(steps.split(), int).reshape(-1, 2)], axis=0)
        (left, top), (right, bottom) = points.min(axis=0) / 100, points.max(axis=0) / 100
        found.append((left, right, top, bottom))
    return found


@pytest.mark.parametrize("largest", [0.4, 3.4, 4.9, 8.0, 1e6])
def test_leads_neither_clip_nor_overlap(largest: float) -> None:
    """Traces stay on the paper, below the names of their rows and off each other, at a scale that is written down."""
    x = largest * np.random.default_rng(0).uniform(-1, 1, (12, 1000))
    x[3, 7], x[9, 900] = largest, -largest
    scale = plots.gain(x)
    for plot in (plots.ecg_plot(x, 100.0, TWELVE, "t"), plots.strip_plot(x, 100.0, TWELVE, "t", scale)):
        width, height, _ = layout(plot)
        assert f"25 mm/s · {scale:g} mm/mV" in plot
        places = boxes(plot)
        assert len(places) in (13, 3)
        for i, (left, right, top, bottom) in enumerate(places):
            assert 0 < left < right < width
            assert 0 < top < bottom < height - 3.6  # Above the line of text.
            for other_left, other_right, other_top, other_bottom in places[:i]:
                assert left >= other_right or right <= other_left or top >= other_bottom or bottom <= other_top
        for name_x, name_y in re.findall(r'<text x="([\d.]+)" y="([\d.]+)">', plot):
            for left, right, top, bottom in places:
                inside = left <= float(name_x) <= right and top < float(name_y) < bottom
                assert not inside
    assert plots.gain(x / largest) == 10.0  # 1 mV has the size of the calibration pulse.
    assert scale == {0.4: 10.0, 3.4: 10.0, 4.9: 5.0, 8.0: 2.5, 1e6: 1.25}[largest]


def test_paths_are_the_signals() -> None:
    """From the path of lead V1, third quarter of a row, back to millivolts: rounding is 0.005 mm, 0.0005 mV."""
    x = twelve(1, 3)[0]
    text = plots.ecg_plot(x, 100.0, TWELVE, "t")
    paths = re.findall(r'<path d="(M[\d.-]+ [\d.-]+l[^"]*)"', text)
    assert len(paths) == 13
    start, steps = paths[2][1:].split("l")
    points = np.cumsum([[int(v) for v in start.split()], *np.array(steps.split(), int).reshape(-1, 2)], axis=0) / 100
    assert len(points) == 250
    expected = x[TWELVE.index("V1"), 500:750]
    assert np.diff(points[:, 0]) == pytest.approx(0.25, abs=0.011)
    baseline = points[:, 1] + 10 * expected
    assert baseline == pytest.approx(np.full(250, baseline.mean()), abs=0.011)
    _, _, rows = layout(text)
    assert baseline.mean() == pytest.approx(rows[0], abs=0.011)
    # The rhythm strip has all of lead II.
    assert len(paths[12].split("l")[1].split()) == 2 * 999
    for name in TWELVE:
        assert f">{name}</text>" in text


def test_wild_signals_and_short_ones_are_drawn() -> None:
    x = twelve(1, 0)[0]
    x[0, 10], x[1, 3], x[2] = 1e9, np.nan, -np.inf
    assert "nan" not in plots.ecg_plot(x, 100.0, TWELVE, "t")
    assert plots.ecg_plot(x[:, :37], 50.0, [name.lower() for name in TWELVE], "t").count("<path") > 13


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-3.2, 4.1, [-2, 0, 2, 4]),
        (1e-4, 5e-4, [1e-4, 2e-4, 3e-4, 4e-4, 5e-4]),
    ],
)
def test_ticks(low: float, high: float, expected: list[float]) -> None:
    assert plots.ticks(low, high, 5) == pytest.approx(expected)


def test_a_histogram_has_the_area_one() -> None:
    text = plots.histogram({"a": np.random.default_rng(0).standard_normal(3000)}, "t", "x", bins=10)
    assert "NaN" not in plots.histogram({"a": np.array([np.nan]), "b": np.array([2.0, 2.0])}, "t", "x")
    d = re.search(r'<path d="M(\d+ \d+)l([^"]*)" fill="#', text)
    assert d
    steps = np.array(d[2].split(), int).reshape(-1, 2)
    height = -np.cumsum(steps[:, 1])
    filled = (height * np.append(steps[1:, 0], 0)).sum()
    frame_width, frame_height = 10 * (760 - 12 - 58), 10 * (280 - 42 - 24) / 1.08
    # The bars cover the area 1: the tallest is the frame's height / 1.08.
    values = np.random.default_rng(0).standard_normal(3000)
    low, high = np.quantile(values, [0.001, 0.999])
    span = (high - low) * 1.04
    tallest = np.histogram(values.clip(low, high), 10, (low - 0.02 * (high - low), high + 0.02 * (high - low)))[0].max()
    assert filled / frame_width / frame_height * (tallest / 3000 / (span / 10)) * span == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ()}, "methods must not be empty"),
        ({"methods": [Method("a"), Method("a")]}, "methods must have different names"),
        ({"leads": TWELVE[:11]}, r"signals must have shape \[11, L\], got \[12, 1000\]"),
        ({"leads": (*TWELVE[:11], "X")}, "V6 are missing"),
    ],
)
def test_bad_reports(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(report(**changes))
    with pytest.raises(ValueError, match="labels of a must be one for each of 1 samples, got 2"):
        render(report(methods=[Method("a", samples=twelve(1, 0), labels=["x", "y"])]))


# ------------------------------------------------------------------------------------------------ browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def screenshot(page: Path, width: int, height: int) -> np.ndarray:
    """RGB [height, width, 3] of what a headless Chromium shows."""
    from matplotlib.image import imread

    picture = page.with_suffix(".png")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},{height}", f"--screenshot={picture}",
        page.as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return (255 * imread(picture)[:, :, :3]).round().astype(int)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_chromium_shows_paper_and_traces(tmp_path: Path) -> None:
    drawn = [plots.ecg_plot(x, 100.0, TWELVE, "t") for x in twelve(2, 0)]
    style = "body{margin:0 20px}svg.ecg{display:block;width:100%;margin-bottom:60px}"
    page = f"<!DOCTYPE html><style>{style}</style><body>{plots.GRID}{''.join(drawn)}"
    (tmp_path / "report.html").write_text(page)
    image = screenshot(tmp_path / "report.html", 1120, 1700)
    red, green, blue = (image[:, :, i] for i in range(3))
    pink = (red > 225) & (red - green > 6) & (red - blue > 6)
    dark = image.max(axis=2) < 110
    rows = np.flatnonzero(pink.mean(axis=1) > 0.5)
    gaps = np.flatnonzero(np.diff(rows) > 40)
    assert len(gaps) == 1
    for plot, sheet in zip(drawn, (rows[: gaps[0] + 1], rows[gaps[0] + 1 :]), strict=True):
        width, height, baselines = layout(plot)
        top, bottom = int(sheet[0]), int(sheet[-1])
        columns = np.flatnonzero(pink[top : bottom + 1].mean(axis=0) > 0.3)
        left, right = int(columns[0]), int(columns[-1])
        ratio = (bottom - top) / (right - left)
        assert ratio == pytest.approx(height / width, abs=0.03)
        scale = (right - left) / width  # pixels per mm
        # Coarse lines come every 5 mm: the spectrum of the paper across has its peak there.
        profile = (red - green)[top : bottom + 1, left : right + 1].mean(axis=0)
        power = np.abs(np.fft.rfft(profile - profile.mean()))
        low = len(profile) / (8 * scale)
        peak = (power * (np.arange(len(power)) > low))[: int(len(profile) / (2.5 * scale))].argmax()
        assert len(profile) / peak == pytest.approx(5 * scale, rel=0.05)
        # Each row has a trace under most columns of its ten seconds.
        for baseline in baselines:
            strip = slice(top + round((baseline - 15) * scale), top + round((baseline + 15) * scale))
            traced = dark[strip, left + round(15 * scale) : left + round(265 * scale)].any(axis=0)
            assert traced.mean() > 0.9
        # And R peaks: the rhythm strip reaches over at least 5 mm.
        rhythm = dark[strip, left + round(16 * scale) : left + round(265 * scale)].any(axis=1)
        assert rhythm.sum() > 5 * scale
