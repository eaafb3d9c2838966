"""Docstrings as the site reads them: they are written for people, with the marks of Sphinx and of Google's style."""

from __future__ import annotations

import re
from typing import Any

import griffe

#: Cross references, as Sphinx has them.
_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?([^`]*)`")
#: An entry of several names, with its text.
_TOGETHER = re.compile(r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+): (?P<text>.*(?:\n(?P=indent) +\S.*)*)", re.MULTILINE)
_RETURNS = re.compile(r"^( *Returns:\n +)(?=\S)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Plain names for references; an entry per name; the type of what is returned before its text."""
        if obj.docstring is None:
            return
        text = _ROLE.sub(r"`\1`", obj.docstring.value)
        text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
        text = _TOGETHER.sub(_one_by_one, text)
        if isinstance(obj, griffe.Function) and obj.returns is not None:
            # Without it, all up to the first colon of the text would be taken for the type.
            text = _RETURNS.sub(lambda match: f"{match[1]}{obj.returns}: ", text)
        obj.docstring.value = text


def _one_by_one(match: re.Match[str]) -> str:
    return "\n".join(f"{match['indent']}{name}: {match['text']}" for name in match["names"].split(", "))
