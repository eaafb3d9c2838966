"""What the parts of the command line share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def add_command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], int | None]
) -> argparse.ArgumentParser:
    """Add a subparser that runs ``function``, whose docstring is its help."""
    text = function.__doc__ or ""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=function)
    return parser


def add_quiet(command: argparse.ArgumentParser) -> None:
    """The option that hides progress."""
    command.add_argument("--quiet", action="store_true", help="no progress")
