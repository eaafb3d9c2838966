"""The commands ``tgdp-fast ecg ...``. Arguments in, library calls, text out."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgdp_fast.cli.arguments import add_command, add_quiet, warn, with_flags

if TYPE_CHECKING:
    from tgdp_fast.ecg.pipeline import Pipeline

#: Settings of :class:`tgdp_fast.sampling.config.SamplingConfig` that ``ecg sample`` takes.
SETTINGS = ("solver", "steps", "spacing", "scale", "precision")
_SHOWN = 20  # problems, and labels, that are printed one by one


def inspect(options: argparse.Namespace) -> int | None:
    """Summarize a folder of electrocardiograms, and list the records that would be dropped and why."""
    from tgdp_fast.ecg.records.folder import open_ecg_folder
    from tgdp_fast.ecg.records.inspection import inspect_ecg_folder
    from tgdp_fast.ecg.records.registry import SeveralDataSetsError

    try:
        folder = open_ecg_folder(
            options.folder, rate=options.rate or None, minimum_likelihood=options.minimum_likelihood
        )
        found = inspect_ecg_folder(folder, options.seconds, read=options.read, progress=not options.json)
    except ValueError as error:
        text = with_flags(
            str(error).replace("rate * seconds must", "--rate times --seconds must"), options, {"path": "DIR"}
        )
        if not isinstance(error, SeveralDataSetsError):
            raise ValueError(text) from None
        print(f"tgdp-fast: {text}", file=sys.stderr)
        return 1
    broken = [problem for problem in found["problems"] if not problem["short"]]
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        _print_inspection(found)
    if not found["usable"]:
        print(f"tgdp-fast: no record of {options.folder} can be used", file=sys.stderr)
    return 1 if not found["usable"] or (broken and options.strict) else None


def _print_inspection(found: dict[str, Any]) -> None:
    from tgdp_fast.ecg.records.statements import in_words

    short = [problem for problem in found["problems"] if problem["short"]]
    other = found.get("other_labels", {})
    foreign = set(other.get("records", ()))
    broken = [each for each in found["problems"] if not each["short"] and each["record"] not in foreign]
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
    print(f"labels            {_counts(found['labels'])}")
    if found["unlabelled"]:
        print(f"without labels    {found['unlabelled']}")
    if foreign:
        counts = {in_words(label): count for label, count in other["counts"].items()}
        print(f"other labels      {_counts(counts)}")
        print(f"expected          {other['expected']}")
    for note in found["notes"]:
        print(f"note: {note}")
    more = f", with other labels {len(foreign)}" if foreign else ""
    print(f"dropped: too short {len(short)}, broken {len(broken)}{more}")
    # Broken ones first: short ones are as expected, and other labels are told above.
    listed = [("broken", each) for each in broken] + [("too short", each) for each in short]
    for _, problem in listed[:_SHOWN]:
        print(f"  record {problem['record']}: {problem['reason']}")
    for kind, count in Counter(kind for kind, _ in listed[_SHOWN:]).items():
        print(f"  and {count} more {kind}; --json lists all")


def _counts(labels: Mapping[str, int]) -> str:
    shown = ", ".join(f"{name} {count}" for name, count in list(labels.items())[:_SHOWN])
    return (shown or "none") + (f", and {len(labels) - _SHOWN} more" if len(labels) > _SHOWN else "")


def fit(options: argparse.Namespace) -> None:
    """Read both folders, train or load the source model, fit the guidance; the model is kept in OUT/model."""
    with _pipeline(options) as pipeline:
        _warn(pipeline.fit().diagnostics["warnings"])
        _say(f"model saved in {pipeline.run.out / 'model'}")


def evaluate(options: argparse.Namespace) -> None:
    """Train the baselines, draw samples of every method, compare them with real records: OUT/report.html."""
    with _pipeline(options, evaluates=True, judges_anew=True) as pipeline:
        _print_report(pipeline)


def run(options: argparse.Namespace) -> None:
    """From two folders to samples and report: fit and evaluate, and the samples of TGDP as records in OUT/records."""
    with _pipeline(options, evaluates=True) as pipeline:
        _print_report(pipeline)
        _say(f"samples of TGDP as WFDB records in {pipeline.write_records('tgdp')}")


def _print_report(pipeline: Pipeline) -> None:
    report = pipeline.evaluate()
    _warn(report.warnings)
    for method in report.methods:
        found = [
            f"{name} {value.value:.3f} ({value.low:.3f} to {value.high:.3f})" for name, value in method.metrics.items()
        ]
        found += [f"{name} {value:.3g}" for name, value in list(method.quality.items())[:1]]
        _say(f"{method.name:14s} {'   '.join(found)}")
    _say(f"written: {pipeline.run.out / 'report.html'} and results.json")


@contextmanager
def _pipeline(options: argparse.Namespace, *, evaluates: bool = False, judges_anew: bool = False) -> Iterator[Pipeline]:
    """The run that the options describe; under torchrun in each process. What can fail at its end fails now.

    Args:
        options: of the command.
        evaluates: the run needs the packages of evaluation.
        judges_anew: settings of evaluation may be others than those of results that the folder has.
    """
    from tgdp_fast.ecg.config import SMOKE, ConfigError, load_config
    from tgdp_fast.ecg.pipeline import Pipeline
    from tgdp_fast.ecg.preconditions import EVALUATED_ANEW, MEASURING, check_same_run
    from tgdp_fast.runtime import distributed
    from tgdp_fast.runtime.optional import require
    from tgdp_fast.runtime.stages import owned

    try:
        config = load_config(
            options.config,
            preset=options.preset,
            data__source=_text(options.source),
            data__target=_text(options.target),
            sampling__num=options.num,
            seed=options.seed,
            device=options.device,
        )
    except ConfigError as error:
        if options.config is not None:  # In whose words the error is.
            raise
        text = str(error).removeprefix("the configuration: ").removeprefix("sampling.")
        raise ValueError(with_flags(text, options, {})) from None
    require(MEASURING if evaluates else (), "this run needs")
    check_same_run(options.out, config, EVALUATED_ANEW if judges_anew else ())
    with distributed.process_group(config.device), owned(options.out):
        check_same_run(options.out, config, EVALUATED_ANEW if judges_anew else ())  # Another run may have ended now.
        try:
            pipeline = Pipeline(config, options.out, progress=not options.quiet)
        except ValueError as error:
            raise ValueError(with_flags(str(error), options, {})) from None
        yield pipeline
        if config.preset == "smoke":
            _say(SMOKE)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _say(text: str) -> None:
    """Print in the first process alone."""
    from tgdp_fast.runtime import distributed

    if distributed.is_first():
        print(text, flush=True)


def _warn(texts: Sequence[str]) -> None:
    """Warn in the first process alone."""
    from tgdp_fast.runtime import distributed

    if distributed.is_first():
        warn(texts)


def sample(options: argparse.Namespace) -> None:
    """Draw 12-lead records from a fitted model, as WFDB records with labels and a manifest."""
    from tgdp_fast.ecg.config import SMOKE
    from tgdp_fast.ecg.drawing import draw_records
    from tgdp_fast.ecg.records.output import MANIFEST
    from tgdp_fast.sampling.config import SamplingConfig

    check_model_folder(options.model)
    try:
        place = draw_records(
            options.model,
            options.out,
            SamplingConfig(**{name: getattr(options, name) for name in SETTINGS}),
            num=options.num,
            statements=options.statements,
            guided=not options.unguided,
            seed=options.seed,
            batch_size=options.batch_size,
            device=options.device,
            progress=not options.quiet,
        )
    except ValueError as error:
        raise ValueError(with_flags(str(error), options, {"folder": "--out"})) from None
    told = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
    warn([*told["warnings"], *([SMOKE] if told["preset"] == "smoke" else [])])
    print(f"{options.num} records written to {place}")


def check_model_folder(model: Path) -> None:
    """Refuse the folder of a run where its model is meant."""
    if (model / "stages").is_dir() and (inside := model / "model").is_dir():
        raise ValueError(f"MODEL_DIR: {model} is the folder of a run; did you mean {inside}?")


# ------------------------------------------------------------------------------------------------------ parser


def add_parser(commands: Any) -> None:
    """Add ``ecg`` with its commands to the subparsers of ``tgdp-fast``."""
    ecg = commands.add_parser("ecg", help="Electrocardiograms: from folders of records to samples and results.")
    names = ecg.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = add_command(names, "inspect", inspect)
    command.add_argument("folder", metavar="DIR", type=Path, help="PTB-XL, ICBEB2018, or any WFDB records")
    command.add_argument(
        "--rate", type=float, default=100.0, help="samples per second; 0: the highest there is (%(default)g)"
    )
    command.add_argument("--seconds", type=float, default=10.0, help="length that is kept of each record (%(default)g)")
    command.add_argument(
        "--minimum-likelihood",
        type=float,
        metavar="PERCENT",
        help="ignore statements of lower likelihood (PTB-XL)",
    )
    command.add_argument("--read", action="store_true", help="read all signals: checksums, NaN, flat leads, lengths")
    command.add_argument("--strict", action="store_true", help="exit status 1 if a record is broken")
    command.add_argument("--json", action="store_true", help="machine-readable, with every problem")

    for name, function in (("fit", fit), ("evaluate", evaluate), ("run", run)):
        command = add_command(names, name, function, together=True)
        command.add_argument("--config", type=Path, help="TOML file of settings; every entry is optional")
        command.add_argument(
            "--preset", help="paper, small or smoke: settings that the file leaves out (smoke, which takes minutes)"
        )
        command.add_argument("--source", type=Path, help="folder of source records, such as PTB-XL")
        command.add_argument("--target", type=Path, help="folder of target records, such as ICBEB2018")
        command.add_argument(
            "--num", type=int, help="samples of each method (of the preset: smoke 64, small 400, paper 1000)"
        )
        command.add_argument("--seed", type=int, help="seed of everything random (0)")
        command.add_argument("--device", help="cpu, cuda, ... (cpu)")
        command.add_argument(
            "--out", type=Path, required=True, help="folder of the run; the same command resumes there"
        )
        add_quiet(command)

    command = add_command(names, "sample", sample)
    command.add_argument("model", metavar="MODEL_DIR", type=Path, help="OUT/model of fit or run")
    command.add_argument("--out", type=Path, required=True, help="new folder for the records")
    command.add_argument("--num", type=int, required=True, help="records to draw")
    command.add_argument(
        "--statements", nargs="+", default=["NORM"], metavar="NAMES",
        help="statements of each record, joined by commas; records take turns: NORM AFIB,CRBBB (%(default)s)",
    )  # fmt: skip
    command.add_argument("--unguided", action="store_true", help="draw from the source model, without guidance")
    command.add_argument("--solver", default="dpmpp_2m", help="see tgdp-fast sample --help (%(default)s)")
    command.add_argument("--steps", type=int, default=20, help="solver steps (%(default)s)")
    command.add_argument("--spacing", default="logsnr", help="logsnr, uniform or karras (%(default)s)")
    command.add_argument("--scale", type=float, default=1.0, help="guidance scale; 1 is exact (%(default)s)")
    command.add_argument("--precision", default="fp32", help="fp32, bf16 or fp16 (%(default)s)")
    command.add_argument("--seed", type=int, default=0, help="the same seed gives the same records (%(default)s)")
    command.add_argument("--batch-size", type=int, default=64, help="records drawn at once (%(default)s)")
    command.add_argument("--device", default="cpu", help="cpu, cuda, ... (%(default)s)")
    add_quiet(command)
