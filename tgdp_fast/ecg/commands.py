"""The commands ``tgdp-fast ecg ...``. Arguments in, library calls, text out."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SHOWN = 20  # problems, and labels, that are printed one by one


def inspect(options: argparse.Namespace) -> int | None:
    """What a folder of electrocardiograms holds, and which records would be dropped and why."""
    from tgdp_fast.data.ecg_folder import open_ecg_folder
    from tgdp_fast.data.ecg_inspection import inspect_ecg_folder

    folder = open_ecg_folder(options.folder, rate=options.rate or None, minimum_likelihood=options.minimum_likelihood)
    found = inspect_ecg_folder(folder, options.seconds, read=options.read, progress=not options.json)
    broken = [problem for problem in found["problems"] if not problem["short"]]
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        _print_inspection(found)
    return 1 if broken and options.strict else None


def _print_inspection(found: dict[str, Any]) -> None:
    short = [problem for problem in found["problems"] if problem["short"]]
    broken = [problem for problem in found["problems"] if not problem["short"]]
    print(f"{found['path']}: {found['kind']}")
    line = f"usable records    {found['usable']}"
    print(line + (" (headers and tables; --read looks at the signals)" if not found["read"] else ""))
    print(f"rates             {', '.join(f'{count} at {rate} Hz' for rate, count in found['rates'].items()) or 'none'}")
    if found["seconds"]:
        print(f"seconds           {found['seconds']['least']:g} to {found['seconds']['most']:g}")
    if found["unknown_length"]:
        print(f"length unknown    {found['unknown_length']} records do not say it without --read")
    print(f"patients          {found['patients'] or 'not known'}")
    if found["folds"]:
        print(f"folds             {', '.join(f'{fold}: {count}' for fold, count in found['folds'].items())}")
    labels = list(found["labels"].items())
    more = f", and {len(labels) - _SHOWN} more" if len(labels) > _SHOWN else ""
    print(f"labels            {', '.join(f'{name} {count}' for name, count in labels[:_SHOWN]) or 'none'}{more}")
    if found["unlabelled"]:
        print(f"without labels    {found['unlabelled']}")
    for note in found["notes"]:
        print(f"note: {note}")
    print(f"dropped: too short {len(short)}, broken {len(broken)}")
    # Broken ones first: short ones are as expected.
    for problem in (broken + short)[:_SHOWN]:
        print(f"  record {problem['record']}: {problem['reason']}")
    rest = Counter("too short" if problem["short"] else "broken" for problem in (broken + short)[_SHOWN:])
    for kind, count in rest.items():
        print(f"  and {count} more {kind}; --json lists all")


# ------------------------------------------------------------------------------------------------------ parser


def add_parser(commands: Any) -> None:
    """Add ``ecg`` with its commands to the subparsers of ``tgdp-fast``."""
    ecg = commands.add_parser("ecg", help="electrocardiograms: from folders of records to samples and results")
    names = ecg.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = _command(names, "inspect", inspect)
    command.add_argument("folder", metavar="DIR", type=Path, help="PTB-XL, ICBEB2018, or any WFDB records")
    command.add_argument(
        "--rate", type=float, default=100.0, help="samples per second wanted; 0: the highest there is (%(default)g)"
    )
    command.add_argument("--seconds", type=float, default=10.0, help="kept of each record (%(default)g)")
    command.add_argument(
        "--minimum-likelihood", type=float, metavar="PERCENT", help="leave out statements of PTB-XL below this"
    )
    command.add_argument("--read", action="store_true", help="read all signals: checksums, NaN, flat leads, lengths")
    command.add_argument("--strict", action="store_true", help="exit status 1 if a record is broken")
    command.add_argument("--json", action="store_true", help="machine-readable, with every problem")


def _command(commands: Any, name: str, function: Callable[[argparse.Namespace], int | None]) -> argparse.ArgumentParser:
    text = function.__doc__ or ""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=function)
    return parser
