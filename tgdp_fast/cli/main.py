"""The command ``tgdp-fast``. Arguments in, library calls, text out: no numerics here."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence

from tgdp_fast._version import __version__
from tgdp_fast.cli import ecg, lab, transfer
from tgdp_fast.cli.arguments import Parser, add_command
from tgdp_fast.runtime.locks import InUseError

#: Exceptions that say what the user can do; shown without a traceback.
EXPECTED = (OSError, ArithmeticError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 1 failed while running, 2 bad arguments, 3 samples out of
    reach, 130 interrupted, 141 nobody read the output any more).
    """
    options = argparse.Namespace()
    for stream in (sys.stdout, sys.stderr):
        # Names of files and records hold what an encoding may lack: shown escaped, never an error.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        _parser().parse_args(arguments, options)
        logging.basicConfig(level=options.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
        status = _run(options)
        if sys.stdout is not None:  # closed by the caller
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        # As in `tgdp-fast info | head -1`. What is still to be written goes nowhere, also at the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("tgdp-fast: interrupted; " + (_kept(options) or "nothing was kept"), file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    try:
        if "out" in options and not options.together:
            _check_alone()
        command: Callable[[argparse.Namespace], int | None] = options.command
        return command(options) or 0
    except ValueError as error:
        print(f"tgdp-fast: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except Exception as error:
        # Torch comes with it, and some commands do without.
        from tgdp_fast.ops.registry import BackendUnavailableError

        if not isinstance(error, (*EXPECTED, BackendUnavailableError)):
            raise
        # In the words of the command line.
        text = str(error).replace("backend='auto'", "--backend auto") if "backend" in options else str(error)
        print(f"tgdp-fast: error: {text}", file=sys.stderr)
        # Of a run that was refused the work is another's.
        if not isinstance(error, InUseError) and (kept := _kept(options)):
            print(f"tgdp-fast: {kept}", file=sys.stderr)
        return 1


def _check_alone() -> None:
    """Refuse to let several processes of torchrun write one file each for itself."""
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ValueError(
            f"this command works in one process, but torchrun started {processes} (WORLD_SIZE={processes}); start it "
            "without torchrun; of all commands, ecg run, fit and evaluate share their work among processes"
        )


def _kept(options: argparse.Namespace) -> str:
    """What a run that did not finish has left, or nothing."""
    kept = options.kept(options) if "out" in options and options.kept else []
    found = [str(place) for place in kept if place.is_dir() and any(place.iterdir())]
    if not found:
        return ""
    return f"finished work is kept in {' and '.join(found)}: the same command goes on from there, or delete it"


def info(options: argparse.Namespace) -> None:
    """What this installation is and which backends it has."""
    from tgdp_fast.ops.measured import CARD
    from tgdp_fast.ops.registry import backend_report
    from tgdp_fast.runtime.info import describe, environment
    from tgdp_fast.runtime.native import cpu_capability

    further = {"cpu_kernels": cpu_capability(), "measured_on": CARD}
    facts = {"environment": environment() | further, "backends": backend_report()}
    print(json.dumps(facts, indent=2) if options.json else describe(facts, everything=options.all))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "tgdp-fast",
        description="Sample a target domain from a source diffusion model and few target samples.",
        epilog="Exit status: 0 done, 1 failed while running, 2 bad arguments, 3 samples of transfer written but not to "
        "be used (the source does not reach the target), 130 interrupted, 141 nobody reads the output any more. Runs "
        "that write to a folder go on where they stopped when the same command is given again.",
    )
    parser.add_argument("--version", action="version", version=f"tgdp-fast {__version__}")
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="warning",
        help="what to report on standard error; info tells why a backend does not serve (%(default)s)",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = add_command(commands, "info", info)
    command.add_argument("--all", action="store_true", help="every fact, and every backend of each operator")
    command.add_argument("--json", action="store_true", help="the same, machine-readable")
    lab.add_parsers(commands)
    transfer.add_parsers(commands)
    ecg.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
