"""What the parts of the command line share."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Errors in one line that names the argument, without the usage of all others."""

    def error(self, message: str) -> NoReturn:
        """End with exit status 2."""
        for kind, expected in (("int", "an integer such as 1000"), ("float", "a number such as 0.5")):
            message = re.sub(rf"^argument (\S+): invalid {kind} value: ", rf"\1 must be {expected}, got ", message)
        if found := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            near = get_close_matches(found[1], re.findall(r"[\w-]+", found[2]), n=1)
            message += f" (did you mean {near[0]!r}?)" if near else ""
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def kept_in_folder(options: argparse.Namespace) -> list[Path]:
    """The folder --out, where a killed command has finished parts in it."""
    patterns = ("rows/*", "source/*", "stages/*", "cache/*")
    return [options.out] if any(any(options.out.glob(pattern)) for pattern in patterns) else []


def add_command(
    commands: Any,
    name: str,
    function: Callable[[argparse.Namespace], int | None],
    *,
    kept: Callable[[argparse.Namespace], list[Path]] | None = kept_in_folder,
    together: bool = False,
) -> argparse.ArgumentParser:
    """Add a subparser that runs ``function``, whose docstring is its help, and the first paragraph its summary.

    ``kept`` gives the folders in which a run that does not finish leaves its work; None, and for commands without
    --out: none. ``together``: several processes under torchrun work on one --out.
    """
    text = function.__doc__ or ""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text.partition("\n\n")[0], description=text)
    parser.set_defaults(command=function, kept=kept, together=together)
    return parser


def add_quiet(command: argparse.ArgumentParser) -> None:
    """The option that hides progress."""
    command.add_argument("--quiet", action="store_true", help="no progress")


def warn(texts: Iterable[str]) -> None:
    """Print warnings that tell about the samples, --quiet or not."""
    for text in texts:
        print(f"WARNING: {text}", file=sys.stderr, flush=True)


def with_flags(message: str, options: argparse.Namespace, places: dict[str, str]) -> str:
    """An error of the library that begins with its argument's name, with the name that the command line has for it.

    Args:
        message: such as "steps must be ...".
        options: of the command; each is known as ``--its-name``.
        places: names that are none of these options, or not given by a flag: {"model": "MODEL_DIR"}.
    """
    found = re.match(r"(\w+)(?= must|:)", message)
    if not found or (found[0] not in places and found[0] not in options):
        return message
    return places.get(found[0], "--" + found[0].replace("_", "-")) + message[found.end() :]
