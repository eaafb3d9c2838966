"""The documentation holds: its code runs, its commands are ones, its links lead somewhere, its numbers are measured.

A block of code is left out only by a comment with the reason just before it, ``<!-- not run: needs a GPU -->``. A
table after ``<!-- table from FILE, section "NAME" -->`` quotes a table of results, one after
``<!-- medians from FILE -->`` the medians of a benchmark.
"""

from __future__ import annotations

import json
import os
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from argparse import Namespace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

import tgdp_fast
from tgdp_fast import SOLVERS, SPACINGS, metrics, ops
from tgdp_fast.cli import main as cli
from tgdp_fast.ops import registry

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="the documentation is not here")

PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
#: Whose links are checked too.
LINKED = [*PAGES, *sorted(DOCS.rglob("results/**/*.md"))]
#: The other pages of the site.
OTHER_PAGES = [ROOT / "CONTRIBUTING.md", *(path for path in sorted(ROOT.glob("*/README.md")) if path not in LINKED)]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
#: Most blocks of one page, and of all pages, that may be left out.
MOST_LEFT_OUT = 8
#: Columns of code that a page of the site shows without scrolling.
WIDEST = 85

#: Commands of at most a second, which are run; all others are parsed.
CHEAP = (
    ["info"],
    ["info", "--json"],
    ["--log-level", "info", "info"],
    ["--version"],
    ["--help"],
    ["transfer", "--help"],
    ["bench", "--list"],
)


class Block(NamedTuple):
    """A block of code of a page."""

    page: Path
    line: int  # of its first line of code
    language: str
    code: str
    reason: str  # why it is not run, or nothing


def blocks(page: Path, text: str) -> list[Block]:
    pattern = re.compile(
        r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
    )
    found = []
    for match in pattern.finditer(text):
        before = re.search(r"<!-- not run: *(.*?) *-->\s*\Z", text[: match.start()])
        line = text.count("\n", 0, match.start("code")) + 1
        code = textwrap.dedent(match["code"])
        found.append(Block(page, line, match["language"], code, before[1] if before else ""))
    return found


def page_blocks(page: Path) -> list[Block]:
    return blocks(page, page.read_text(encoding="utf-8"))


def commands(code: str) -> list[list[str]]:
    """Arguments of every ``tgdp-fast`` in a block of shell, or of a console ("$ " before it, output below)."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        if words[:1] == ["tgdp-fast"]:
            found.append(words[1:])
        elif "tgdp_fast" in words and words[words.index("tgdp_fast") - 1] == "-m":
            found.append(words[words.index("tgdp_fast") + 1 :])
    return found


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a page registers does not stay."""
    monkeypatch.delenv("TGDP_BACKEND", raising=False)
    monkeypatch.setattr(registry, "_registry", {k: dict(v) for k, v in registry._registry.items()})


@pytest.fixture
def _quiet_logging() -> Any:
    """What a page configures does not stay."""
    import logging

    handlers, level = logging.getLogger().handlers[:], logging.getLogger("tgdp_fast").level
    yield
    logging.getLogger().handlers[:] = handlers
    logging.getLogger("tgdp_fast").setLevel(level)


# code -------------------------------------------------------------------------------------------------------


# The classifiers behind the diagnostics are quick ones here; the examples have real ones.
@pytest.mark.usefixtures("_own_registry", "_quiet_logging", "quick_ratio")
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in page_blocks(page):
        if block.reason:
            continue
        if block.language == "python":
            # Tracebacks show the line of the page.
            code = "\n" * (block.line - 1) + block.code
            exec(compile(code, str(page), "exec"), namespace)
        elif block.language in ("sh", "console"):
            for words in commands(block.code):
                run_or_parse(words, f"{name_of(page)}:{block.line}")


def run_or_parse(words: list[str], where: str) -> None:
    """Run what is cheap, or sized for it and has its files; parse everything else."""
    sized = words[:1] == ["transfer"] and "--train-steps" in words and Path("source.npy").is_file()
    sized |= words[:1] == ["sample"] and Path(words[1]).is_dir()
    sized |= words[:2] == ["ecg", "inspect"] and Path(words[2]).is_dir()
    if words not in CHEAP and not sized:
        parsed(words, where)
        return
    try:
        status = cli.main([*words, "--quiet"] if sized and words[0] != "ecg" else words)
    except SystemExit as stop:  # --help and --version
        status = int(stop.code or 0)
    assert status == 0, f"{where}: tgdp-fast {shlex.join(words)}"


def parsed(words: list[str], where: str) -> Namespace:
    try:
        options = cli._parser().parse_args(words)
    except SystemExit as stop:
        if stop.code:
            pytest.fail(f"{where}: tgdp-fast {shlex.join(words)} does not parse")
        return Namespace()  # --help
    for name, known in (("solver", SOLVERS), ("spacing", SPACINGS), ("precision", ("fp32", "bf16", "fp16"))):
        assert getattr(options, name, None) in (*known, None), f"{where}: --{name}"
    return options


def test_there_are_pages_with_code() -> None:
    found = [block for page in PAGES for block in page_blocks(page)]
    assert sum(block.language == "python" and not block.reason for block in found) > 10
    assert sum(len(commands(block.code)) for block in found if block.language == "sh") > 30
    # "```" alone would hide a block from every check; diagrams are indented instead.
    assert {block.language for block in found} <= {"python", "sh", "console", "toml", "bibtex"}


def test_few_blocks_are_left_out_and_each_has_a_reason() -> None:
    left_out = [block for page in PAGES for block in page_blocks(page) if block.reason]
    for block in left_out:
        print(f"{name_of(block.page)}:{block.line} {block.language}: {block.reason}")
        assert len(block.reason.split()) >= 2
    assert len(left_out) <= MOST_LEFT_OUT
    written = sum(page.read_text(encoding="utf-8").count("<!-- not run") for page in PAGES)
    assert written == len(left_out), "a comment stands before no block"


def too_wide(text: str) -> list[str]:
    """Lines of code of a page, indented ones included, that a reader would have to scroll for."""
    code = [block.code for block in blocks(Path(), text)]
    code += re.findall(
        r"(?<=\n\n)(?: {4}.*\n+)+", re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    )
    return [line for part in code for line in part.splitlines() if len(line) > WIDEST]


@pytest.mark.parametrize("page", [*LINKED, *OTHER_PAGES], ids=name_of)
def test_code_of_a_page_fits_its_column(page: Path) -> None:
    assert too_wide(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_code_of_an_example_fits_its_column(example: Path) -> None:
    lines = example.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > WIDEST and not line.startswith("#")] == []


def test_the_check_of_widths_sees() -> None:
    long = "x" * (WIDEST + 1)
    assert too_wide(f"{long}\n\n```sh\n{long}\n```\n\n    {long[4:]}\n\n| {long} |\n") == [long, f"    {long[4:]}"]
    assert too_wide(f"```sh\n{long[1:]}\n```\n") == []


@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
@pytest.mark.slow(ci=True)
def test_example_runs(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_example_is_made_of_cells(example: Path) -> None:
    text = example.read_text(encoding="utf-8")
    cells = re.findall(r"^# %%(.*)$", text, re.MULTILINE)
    assert text.startswith("# %% [markdown]\n# # ")
    assert set(cells) == {"", " [markdown]"}
    for part in re.split(r"^# %% \[markdown\]\n", text, flags=re.MULTILINE)[1:]:
        prose = part.split("\n# %%", 1)[0].rstrip().splitlines()
        assert all(line.startswith("#") for line in prose), f"a text cell holds code: {prose}"


@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_the_notebook_of_an_example_has_its_code(example: Path, tmp_path: Path) -> None:
    pytest.importorskip("jupytext", reason="jupytext is not installed")
    convert = "-m jupytext --quiet --to ipynb --output"
    assert convert in (ROOT / "Makefile").read_text(encoding="utf-8")
    notebook = tmp_path / "example.ipynb"
    subprocess.run([sys.executable, *convert.split(), notebook, example], check=True)
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4
    parts = re.split(r"^# %%(.*)\n", example.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    cells = [("".join(cell["source"]), cell["cell_type"]) for cell in content["cells"]]
    assert [kind for _, kind in cells] == ["markdown" if "[markdown]" in kind else "code" for kind in parts[::2]]
    code = [text.strip() for kind, text in zip(parts[::2], parts[1::2], strict=True) if "[markdown]" not in kind]
    assert [text for text, kind in cells if kind == "code"] == code


def test_examples_are_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert EXAMPLES
    for example in EXAMPLES:
        assert f"examples/{example.stem}.md" in navigation


# links ------------------------------------------------------------------------------------------------------


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as Python-Markdown makes them."""
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.*?) *#*$", prose, re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if target.is_relative_to(ROOT / "kernels") and not (ROOT / "kernels").is_dir():
            # A source distribution has the kernels inside the package alone.
            target = ROOT / "tgdp_fast" / target.relative_to(ROOT)
        known = target.exists() and target.is_relative_to(ROOT)
        if known and anchor:
            known = anchor in anchors(text if target == page else target.read_text(encoding="utf-8"))
        if not known:
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_resolve(page: Path) -> None:
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


def test_the_link_check_sees() -> None:
    page = DOCS / "index.md"
    bad = "[x](no_such.md) [y](faq.md#no-such) [z](#there)\n\n```\n[w](no.md)\n```\n# Here\n"
    assert broken_links(page, bad) == ["no_such.md", "faq.md#no-such", "#there"]
    assert broken_links(page, "[x](../pyproject.toml) [y](faq.md) `[z](no.md)` [a](#here)\n\n# Here\n") == []
    assert broken_links(page, "[x](../../elsewhere.md)") == ["../../elsewhere.md"]


def test_pages_are_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in LINKED[1:]:
        assert page.relative_to(DOCS).as_posix() in navigation


# reference --------------------------------------------------------------------------------------------------


def test_every_public_name_is_in_the_reference() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    entries = re.findall(r"^::: tgdp_fast\.([\w.]+)$", text, re.MULTILINE)
    assert len(entries) == len(set(entries))
    assert set(tgdp_fast.__all__) <= set(entries)
    assert {f"metrics.{name}" for name in metrics.__all__} <= set(entries)
    operators = (DOCS / "operators.md").read_text(encoding="utf-8")
    known = re.findall(r"^::: tgdp_fast\.ops\.(?:\w+\.)?(\w+)$", operators, re.MULTILINE)
    assert set(ops.__all__) == {*known, "backend_report", "use_backend", "BackendUnavailableError"}
    for entry in entries:
        pkgutil.resolve_name(f"tgdp_fast.{entry}")


def test_every_solver_and_command_is_described() -> None:
    solvers = (DOCS / "solvers.md").read_text(encoding="utf-8")
    for name, info in SOLVERS.items():
        row = re.search(rf"^\| `{name}` \| (\d) \| (\d) \| (.*?) \|", solvers, re.MULTILINE)
        assert row, name
        assert (int(row[1]), int(row[2])) == (info.evaluations, info.order)
        assert (row[3] == "yes") == info.stochastic
    command_line = (DOCS / "command_line.md").read_text(encoding="utf-8")
    usage = cli._parser().format_help()
    for name in re.findall(r"^    ([a-z][\w-]+)\b", usage, re.MULTILINE):
        assert f"`tgdp-fast {name}" in command_line or f"`{name}`" in command_line, name


def test_every_result_file_is_listed() -> None:
    text = (DOCS / "performance.md").read_text(encoding="utf-8")
    for path in (ROOT / "bench" / "results").glob("*.json"):
        assert f"`{path.name}`" in text


def test_exit_codes_are_described() -> None:
    text = (DOCS / "command_line.md").read_text(encoding="utf-8")
    stated = re.findall(r"^\| (\d+) \|", text, re.MULTILINE)
    assert stated == re.findall(r"\b(\d+) [a-z]", " ".join((cli.main.__doc__ or "").split()))


def test_every_logger_is_described() -> None:
    text = (DOCS / "command_line.md").read_text(encoding="utf-8")
    for folder, prefix in (("tgdp_fast", "tgdp_fast"), ("kernels", "tgdp_fast.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.is_relative_to(ROOT / "tgdp_fast" / "kernels") or "getLogger(__name__)" not in path.read_text():
                continue
            name = ".".join([prefix, *path.relative_to(ROOT / folder).with_suffix("").parts])
            assert f"`{name}`" in text


def test_limits_of_the_diagnostics_are_those_of_the_code() -> None:
    source = (ROOT / "tgdp_fast" / "fit" / "diagnostics.py").read_text()
    for text in (
        "_MOST_OUTSIDE = 0.34",
        "0.1 <= mean_ratio <= 10",
        "size < 10",
        "len(target) < 10",
        "auc > 0.999 and len(target) >= 10",
        "mean + 3 * error < 0.2 or mean - 3 * error > 5.0",
    ):
        assert text in source, "docs/when_it_works.md states the limits of the diagnostics: change it too"


def test_environment_variables_are_described() -> None:
    text = (DOCS / "backends.md").read_text(encoding="utf-8")
    files = [ROOT / "setup.py", *(ROOT / "tgdp_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    names = {name for file in files for name in re.findall(r"\bTGDP_[A-Z_]+[A-Z]\b", file.read_text())}
    assert "TGDP_BACKEND" in names
    # That one is for the tests of this repository.
    for name in names - {"TGDP_SANITIZE"}:
        assert f"`{name}" in text, name


# numbers ----------------------------------------------------------------------------------------------------

QUOTED = re.compile(
    r'<!-- (?P<kind>table|medians) from (?P<file>\S+?)(?:, section "(?P<section>[^"]+)")? -->\n+(?P<table>(?:\|.*\n)+)'
)


def rows_of(table: str) -> list[dict[str, str]]:
    lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.strip().splitlines()]
    return [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]


def wrong_numbers(page: Path, text: str) -> list[str]:
    wrong = []
    for match in QUOTED.finditer(text):
        file = page.parent / match["file"]
        check = _not_medians if match["kind"] == "medians" else _not_in_table
        wrong += [f"{name_of(page)}: {problem}" for problem in check(file, match["section"], rows_of(match["table"]))]
    return wrong


def _not_in_table(file: Path, section: str | None, rows: list[dict[str, str]]) -> list[str]:
    text = file.read_text(encoding="utf-8")
    if section is not None:
        text = text.split(f"## {section}\n", 1)[1].split("\n## ", 1)[0]
    tables = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    known = {next(iter(row.values())): row for row in rows_of(tables[0])}
    wrong = []
    for row in rows:
        name = next(iter(row.values()))
        if name not in known:
            wrong.append(f"{name} is not in {file.name}")
        else:
            wrong += [
                f"{name}, {k}: {v}, measured {known[name].get(k)}" for k, v in row.items() if known[name].get(k) != v
            ]
    return wrong


def _not_medians(file: Path, _: str | None, rows: list[dict[str, str]]) -> list[str]:
    measured = {
        (row["case"], row["provider"], row["dtype"]): row["median_s"] for row in json.loads(file.read_text())["rows"]
    }
    wrong = []
    for row in rows:
        key = tuple(row[name].strip("`") for name in ("case", "provider", "dtype"))
        value = measured.get(key)
        if value is None or float(f"{value:.3g}") != float(row["median, s"]):
            wrong.append(f"{key}: {row['median, s']}, measured {value}")
    return wrong


def test_the_chart_of_performance_is_drawn_from_the_result_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    chart = DOCS / "images" / "performance.svg"
    drawn = tmp_path / "performance.svg"
    subprocess.run([sys.executable, chart.with_suffix(".py"), drawn], check=True)
    texts = [re.findall(r"<text [^>]*>(.*?)</text>", path.read_text(encoding="utf-8")) for path in (chart, drawn)]
    assert any("NVIDIA H200" in text for text in texts[0])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("page", PAGES[1:], ids=name_of)
def test_quoted_numbers_are_measured(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(QUOTED.findall(text)) == len(re.findall(r"<!-- (?:table|medians) ", text))
    assert wrong_numbers(page, text) == []


def test_the_check_of_numbers_sees() -> None:
    page = DOCS / "losses.md"
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- table from") >= 3
    assert len(wrong_numbers(page, text.replace("0.170 ± 0.045", "0.160 ± 0.045", 1))) == 1
    assert len(wrong_numbers(page, text.replace("| vanilla ", "| vanilla2 ", 1))) == 1
    page = DOCS / "performance.md"
    text = page.read_text(encoding="utf-8")
    assert len(wrong_numbers(page, text.replace("| 0.0124 ", "| 0.0125 ", 1))) == 1


# the site ---------------------------------------------------------------------------------------------------


class BuiltPage(HTMLParser):
    """Of a page of the site: its anchors, its links, and the text of its article."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.anchors: set[str] = {"__top"}
        self.links: list[str] = []
        self._inside: list[str] = []
        self._text: list[str] = []
        self.cut_tables: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {str(values[name]) for name in ("id", "name") if values.get(name)}
        self.links += [str(values[name]) for name in ("href", "src") if values.get(name)]
        if tag in ("article", "script", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._inside:
            self._inside.remove(tag)

    def handle_data(self, data: str) -> None:
        if self._inside == ["article"]:
            self._text.append(data)
            # A row that no table took up.
            self.cut_tables += [line for line in data.splitlines() if re.match(r"\| .* \|", line)]

    @property
    def words(self) -> int:
        return len(" ".join(self._text).split())


def site_problems(site: Path) -> list[str]:
    """Pages without text, tables that are none, and links of the built site that lead nowhere."""
    pages = {path: BuiltPage(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    problems = []
    for path, page in pages.items():
        name = path.relative_to(site).as_posix()
        if page.words < 40 and name != "404.html":
            problems.append(f"{name}: no text")
        problems += [f"{name}: a row outside a table: {row}" for row in page.cut_tables]
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            root = site if parts.path.startswith("/") else path.parent
            target = (root / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            known = target.is_file() and target.is_relative_to(site)
            if known and parts.fragment and target in pages:
                known = unquote(parts.fragment) in pages[target].anchors
            if not known:
                problems.append(f"{name}: {link}")
    return problems


def test_the_check_of_the_site_sees(tmp_path: Path) -> None:
    site = tmp_path.resolve()
    text = "<article><h1 id='here'>Here</h1>" + "word " * 50 + "{}</article>"
    (site / "404.html").write_text("<article></article>")
    (site / "other.html").write_text(text.format(""))
    (site / "page.html").write_text(
        text.format("<a href='other.html#here'>a</a> <a href='#here'>b</a> <a href='https://arxiv.org/x'>c</a>")
    )
    assert site_problems(site) == []
    (site / "page.html").write_text(
        text.format("<a href='no.html'>a</a> <a href='other.html#no'>b</a> <img src='no.png'> <p>| a | b |</p>")
    )
    (site / "other.html").write_text("<article></article><script>" + "word " * 50 + "</script>")
    assert site_problems(site) == [
        "other.html: no text",
        "page.html: a row outside a table: | a | b |",
        "page.html: no.html",
        "page.html: other.html#no",
        "page.html: no.png",
    ]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed; run `pip install --no-build-isolation -e '.[docs]'`")
    pytest.importorskip(
        "mkdocstrings", reason="mkdocstrings is not installed; run `pip install --no-build-isolation -e '.[docs]'`"
    )
    pytest.importorskip(
        "latex2mathml",
        reason="latex2mathml is not installed; run `pip install --no-build-isolation -e '.[docs]'`",
    )
    pytest.importorskip(
        "material", reason="mkdocs-material is not installed; run `pip install --no-build-isolation -e '.[docs]'`"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.strip() == ""
    reference = (tmp_path / "site" / "api.html").read_text()
    for name in tgdp_fast.__all__:
        assert f'id="tgdp_fast.{name}"' in reference
    for name in ("TransferModel", "Denoiser", "GuidanceNetwork"):
        for method in ("save_pretrained", "from_pretrained"):
            assert f'id="tgdp_fast.{name}.{method}"' in reference
    assert "Draw samples of the target domain" in reference
    assert ":class:" not in reference
    for example in EXAMPLES:
        assert (tmp_path / "site" / "examples" / f"{example.stem}.html").is_file()
    # Nothing is fetched from elsewhere when a page is read.
    for page in (tmp_path / "site").rglob("*.html"):
        fetched = re.findall(r"<(?:script|link|img)\b[^>]*\b(?:src|href)=\"?(https?:[^\" >]+)", page.read_text())
        assert fetched == [], page
    # Formulas are MathML, and tables of results have their pictures.
    assert (tmp_path / "site" / "index.html").read_text().count("<math ") >= 3
    assert not [page for page in (tmp_path / "site").rglob("*.html") if 'class="arithmatex"' in page.read_text()]
    for picture in (DOCS / "results").rglob("*.png"):
        shown = (tmp_path / "site" / picture.relative_to(DOCS).parent / "results.html").read_text()
        assert f'src="{picture.name}"' in shown
    # Every page of docs/ is there as itself.
    for page in PAGES[1:]:
        title = re.search(r"^# (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert title, page
        assert f">{title[1]}" in (tmp_path / "site" / f"{page.stem}.html").read_text()
    assert "Where to go on" in (tmp_path / "site" / "index.html").read_text()
    # What is added from outside docs/ has its text too, and every link leads somewhere.
    assert site_problems((tmp_path / "site").resolve()) == []
    readme = BuiltPage((tmp_path / "site" / "readme.html").read_text(encoding="utf-8"))
    assert anchors((ROOT / "README.md").read_text(encoding="utf-8")) <= readme.anchors
