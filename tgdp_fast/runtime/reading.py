"""Where files of others are read: a damaged or hostile one is an error that names the file, never a traceback."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def refused(kind: type[ValueError], text: str, advice: str = "") -> Iterator[None]:
    """Every fault inside becomes ``kind(f"{text}: {reason}{advice}")``, for code that only parses a file's content.

    Parsers raise many types on bytes that nobody wrote on purpose: KeyError, TypeError, RecursionError, MemoryError,
    ``zlib.error``, ``SafetensorError``, ... OSError (the disk) and errors that are of ``kind`` already pass unchanged.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or (kind is not ValueError and isinstance(error, kind)):
            raise
        raise kind(f"{text}: {reason_of(error)}{advice}") from None


def reason_of(error: BaseException) -> str:
    """An error in one line; its type only where the text alone would not tell."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[0][:500] if lines else type(error).__name__
    if isinstance(error, MemoryError):
        return f"it asks for more memory than there is ({text})"
    if isinstance(error, RecursionError):
        return f"it is nested too deeply ({text})"
    if isinstance(error, KeyError):
        return f"KeyError: {text} is missing or unknown"
    return text if isinstance(error, ValueError | OSError | EOFError) else f"{type(error).__name__}: {text}"


def read_bytes(path: str | os.PathLike[str], limit: int, kind: type[ValueError], what: str) -> bytes:
    """The content of a file of settings, which is small.

    Raises:
        kind: the file is larger than ``limit`` bytes; ``what`` names its content.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        size = Path(path).stat().st_size
        raise kind(f"{path} has {size} bytes, expected {what} of at most {limit}; it is another or a damaged file")
    return content


def parse_json(content: bytes, kind: type[ValueError], text: str, advice: str = "") -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        kind: ``text``, what is wrong with it, ``advice``.
    """
    with refused(kind, text, advice):
        return json.loads(content.decode("utf-8"))
