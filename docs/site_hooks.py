"""Hooks of mkdocs: files of the repository outside docs/ that pages link to become part of the site.

A page may link to ``../examples/x.py`` or ``../bench/README.md`` as the repository has them. In the site a Markdown
file and an example become pages, of the same path from the root of the repository, and any other file is copied.
Tables of results show the pictures beside them. Formulas become MathML, which browsers render without a script.
"""

from __future__ import annotations

import html
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent

#: Target of a Markdown link: its path, and its anchor or nothing.
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
#: A formula as pymdownx.arithmatex leaves it: inline, or a block of its own.
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config: Any) -> None:
    """The version, at the foot of every page."""
    version = re.search(r'"(.+)"', (ROOT / "tgdp_fast" / "_version.py").read_text(encoding="utf-8").split("=")[1])
    config.copyright = f"tgdp_fast {version[1]}" if version else None


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to, and what the navigation names, outside docs/; added pages link to more."""
    pages = [(f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages()]
    wanted = [path for page, text in pages for path in _outside(page, text)]
    wanted += [_source(uri) for uri in _paths(config.nav) if not (ROOT / "docs" / uri).is_file()]
    while wanted:
        source = wanted.pop(0)
        place = ROOT / source
        uri = _uri(source)
        if not place.is_file() or files.get_file_from_path(uri) is not None:
            continue
        if source.endswith(".md"):
            wanted += _outside(source, place.read_text(encoding="utf-8"))
        if uri.endswith(".md") and not source.endswith(".md"):
            files.append(File.generated(config, uri, content=example_page(place.read_text(encoding="utf-8"), source)))
        else:
            files.append(File.generated(config, uri, abs_src_path=str(place)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are in the site, and the pictures beside a table of results."""
    where = page.file.src_uri
    if where.endswith("/results.md"):
        pictures = sorted((ROOT / "docs" / where).parent.glob("*.png"), reverse=True)
        shown = "".join(f"[![{path.stem.replace('_', ' ')}]({path.name})]({path.name})\n\n" for path in pictures)
        markdown = re.sub(r"(?m)^(?=## |\| )", lambda _: shown, markdown, count=1)
    home = _source(where) if page.file.generated_by else f"docs/{where}"

    def linked(match: re.Match[str]) -> str:
        path = _from_root(home, match[1])
        uri = path.removeprefix("docs/") if path.startswith("docs/") else _uri(path)
        return posixpath.relpath(uri, posixpath.dirname(where) or ".") + (match[2] or "")

    kept: list[str] = []

    def keep(match: re.Match[str]) -> str:
        kept.append(match[0])
        return f"\0{len(kept) - 1}\0"

    text = _LINK.sub(linked, _FENCE.sub(keep, markdown))
    return re.sub(r"\0(\d+)\0", lambda match: kept[int(match[1])], text)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML."""

    def rendered(match: re.Match[str]) -> str:
        formula = convert(html.unescape(match[2]).strip(), display="block" if match[1] == "div" else "inline")
        # The space after a function's name, which the converter leaves out.
        return re.sub(r"(<mi>log</mi>)(?=<m)(?!<mo)", r'\1<mspace width="0.17em" />', formula)

    return _FORMULA.sub(rendered, content)


def example_page(source: str, path: str) -> str:
    """The page of a script with ``# %%`` cells: text cells as Markdown, the others as code."""
    parts = re.split(r"^# %%(.*)$", source, flags=re.MULTILINE)
    page = []
    for kind, text in zip(parts[1::2], parts[2::2], strict=True):
        if "[markdown]" in kind:
            page.append("\n".join(re.sub("^# ?", "", line) for line in text.strip().splitlines()))
        elif text.strip():
            page.append(f"```python\n{text.strip()}\n```")
    return "\n\n".join([*page, f"The whole script: `python {path}`."]) + "\n"


def _uri(path: str) -> str:
    """Where a file of the repository outside docs/ lies in the site's sources."""
    if path == "README.md":  # It would be the first page.
        return "readme.md"
    return path.removesuffix(".py") + ".md" if path.startswith("examples/") else path


def _source(uri: str) -> str:
    """Inverse of :func:`_uri`."""
    if uri == "readme.md":
        return "README.md"
    return uri.removesuffix(".md") + ".py" if uri.startswith("examples/") else uri


def _from_root(page: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def _outside(page: str, text: str) -> list[str]:
    found = [_from_root(page, match[1]) for match in _LINK.finditer(_FENCE.sub("", text))]
    return [path for path in found if not path.startswith(("docs/", "..")) and os.path.isfile(ROOT / path)]


def _paths(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    items = nav if isinstance(nav, list) else list(nav.values())
    return [path for item in items for path in _paths(item)]
