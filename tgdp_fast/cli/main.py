"""The command ``tgdp-fast``. Arguments in, library calls, text out: no numerics here."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tgdp_fast._version import __version__
from tgdp_fast.cli import ecg as ecg_commands
from tgdp_fast.cli.arguments import Parser, add_command, add_quiet
from tgdp_fast.runtime.checks import check_choice, check_device, check_integer, check_number, check_seed

#: As in tgdp_fast.diffusion.solvers, which loads torch; --help does not wait for it.
SOLVER_NAMES = (
    "ddpm",
    "ddim",
    "euler",
    "euler_ancestral",
    "heun",
    "dpm_solver_1",
    "dpm_solver_2s",
    "dpmpp_2m",
    "dpmpp_2s",
    "dpmpp_3m",
    "dpmpp_2m_sde",
    "unipc_2",
)

#: Where samples go without --out. Whoever writes --out samples.npy gives another object, and means it.
SAMPLES = Path("samples.npy")

#: Exceptions that say what the user can do; shown without a traceback.
EXPECTED = (OSError, ArithmeticError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 1 failed while running, 2 bad arguments, 130
    interrupted, 141 nobody read the output any more).
    """
    options = argparse.Namespace()
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
        text = str(error)
        if options.command in (transfer, sample):  # In the words of the command line.
            text = text.replace("backend='auto'", "--backend auto")
        print(f"tgdp-fast: error: {text}", file=sys.stderr)
        if kept := _kept(options):
            print(f"tgdp-fast: {kept}", file=sys.stderr)
        return 1


def _kept(options: argparse.Namespace) -> str:
    """What a run that did not finish has left, or nothing."""
    if "out" not in options or options.command is bench_report:
        return ""
    if options.command in (transfer, sample):
        places = [_work(options.out), options.out.with_name(options.out.name + ".partial")]
        places = places if options.command is transfer else places[1:]
        found = [str(place) for place in places if place.is_dir() and any(place.iterdir())]
    else:
        kept = ("rows/*", "source/*", "stages/*", "cache/*")
        found = [str(options.out)] if any(any(options.out.glob(pattern)) for pattern in kept) else []
    if not found:
        return ""
    return f"finished work is kept in {' and '.join(found)}: the same command goes on from there, or delete it"


def _work(out: Path) -> Path:
    return out.with_name(out.name + ".work")


# ---------------------------------------------------------------------------------------------------- commands


def info(options: argparse.Namespace) -> None:
    """What this installation is and which backends it has."""
    from tgdp_fast.ops.registry import backend_report
    from tgdp_fast.runtime.info import describe, environment
    from tgdp_fast.runtime.native import cpu_capability

    facts = {"environment": environment() | {"cpu_kernels": cpu_capability()}, "backends": backend_report()}
    print(json.dumps(facts, indent=2) if options.json else describe(facts))


def demo(options: argparse.Namespace) -> None:
    """The paper's simulation in its quick form: n = 100, one draw, table and plots."""
    from tgdp_fast.fit.training import Optimisation
    from tgdp_fast.lab.experiments import gaussians

    methods = (*gaussians.REFERENCES, *gaussians.BASELINES, "tgdp")
    settings = Optimisation(steps=2000, batch_size=512, learning_rate=2e-3, ema_decay=0.998)
    jobs = min(3, os.cpu_count() or 1)
    plan = gaussians.Plan(
        options.out, (100,), 1, methods, source_settings=settings, jobs=jobs, progress=not options.quiet
    )
    _gaussians(plan)
    print(
        "SW2: lower is better; NLL: the nearer to that of `target` the better. `oracle` has the exact score and\n"
        "guidance, `means` is what the 100 given samples can tell. `tgdp` should come near it, below `vanilla` and\n"
        "`finetune` in SW2. This is one draw; docs/results has five."
    )


def experiment_gaussians(options: argparse.Namespace) -> None:
    """The paper's simulation, section 4.1."""
    from tgdp_fast.lab.experiments import gaussians

    plan = gaussians.Plan(
        options.out,
        tuple(options.n),
        options.seeds,
        tuple(options.methods or gaussians.METHODS),
        num_samples=options.num,
        solver=options.solver,
        steps=options.steps,
        jobs=options.jobs,
        progress=not options.quiet,
    )
    _gaussians(plan)


def _gaussians(plan: Any) -> None:
    from tgdp_fast.lab.experiments import gaussians

    gaussians.run(plan)
    print((plan.out / "results.md").read_text())
    print(f"written: {', '.join(sorted(p.name for p in plan.out.iterdir() if p.is_file()))} in {plan.out}")


def experiment_digits(options: argparse.Namespace) -> None:
    """Real data: all handwritten digits to two of them, from 20 images."""
    from tgdp_fast.lab.experiments import digits

    plan = digits.Plan(options.out, tuple(options.digits), options.n, options.seeds, progress=not options.quiet)
    digits.run(plan)
    print((plan.out / "results.md").read_text())


def bench(options: argparse.Namespace) -> int | None:
    """Time the operators, a training step and sampling, beside public ways to do the same."""
    import torch

    from tgdp_fast.lab import cases
    from tgdp_fast.lab.benchmark import floors, report, runner
    from tgdp_fast.runtime.files import save_json

    check_device(options.device, "--device")
    if options.threads is not None:
        torch.set_num_threads(check_integer("--threads", options.threads, 1))
    chosen = cases.select(cases.all_cases(), options.only, quick=options.quick)
    if options.list:
        print("\n".join(case.name for case in chosen))
        return None
    seconds = options.seconds if options.seconds is not None else 1.0 if options.quick else 10.0
    settings = runner.Options(
        device=torch.device(options.device),
        providers=tuple(options.providers),
        precisions=tuple(options.precisions),
        seconds=seconds,
        least_rounds=3 if options.quick else 5,
    )
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise ValueError(f"--json must lie in an existing folder, got {options.json}")
    load = runner.load_average()
    measured = floors.measure_floors(settings.device, 0.1 if options.quick else 0.5)
    rows: list[dict[str, Any]] = []
    try:
        for case in chosen:
            found = runner.run_case(case, settings, measured, lambda line: print(line, file=sys.stderr, flush=True))
            rows += found
            if options.json is not None:
                save_json(options.json, runner.result(rows, measured, load))
            if found:
                print(report.table(found), flush=True)
    except KeyboardInterrupt:
        kept = f"; {options.json} holds them" if options.json is not None and rows else ""
        print(f"\ninterrupted after {len(rows)} rows{kept}", file=sys.stderr)
        return 130
    return None


def bench_report(options: argparse.Namespace) -> None:
    """Results of bench as one Markdown text, and plots."""
    from tgdp_fast.lab.benchmark import report
    from tgdp_fast.runtime import figures
    from tgdp_fast.runtime.files import write_atomic

    results = {path.stem: report.load(path) for path in options.files}
    if len(results) < len(options.files):
        raise ValueError("files must have different names: they are the headings of the report")
    text = report.markdown(results)
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        write_atomic(options.out / "report.md", text)
        if figures.available():
            report.plot(results, options.out)


def validate(options: argparse.Namespace) -> int | None:
    """Check every operator, backend and precision on awkward shapes against float64; exit status 1 on failure."""
    from tgdp_fast.lab import validate as checks
    from tgdp_fast.runtime.files import save_json
    from tgdp_fast.runtime.info import environment

    rows = checks.validate(options.backend, options.operators, options.precisions)
    print(checks.table(rows))
    if options.json is not None:
        save_json(options.json, {"environment": environment(), "rows": rows})
    failed = checks.failures(rows)
    print(f"{len(rows)} checks, {len(failed)} failed")
    return 1 if failed else None


def transfer(options: argparse.Namespace) -> None:
    """Two arrays in, target samples out."""
    from tgdp_fast.diffusion.denoiser import Denoiser
    from tgdp_fast.fit.density_ratio import RATIO_LOSSES
    from tgdp_fast.fit.diagnostics import TransferDiagnostics
    from tgdp_fast.fit.guidance import common_classes
    from tgdp_fast.fit.model import TransferModel
    from tgdp_fast.fit.training import Optimisation
    from tgdp_fast.runtime.arrays import check_labels, check_samples, load_array
    from tgdp_fast.runtime.checkpoint import check_replaceable, checkpoint_kind
    from tgdp_fast.runtime.stages import Stages

    _check_sampling(options)
    check_choice("--loss", options.loss, RATIO_LOSSES)
    check_number("--cycle", options.cycle, 0.0)
    if options.consistency is not None:
        check_number("--consistency", options.consistency, 0.0)
    if options.train_steps is not None:
        check_integer("--train-steps", options.train_steps, 1)
    if options.save is not None:
        _check_folder("--save", options.save)
        _named("--save", check_replaceable, options.save)
    source = check_samples("--source", load_array(options.source, "--source"))
    target = check_samples("--target", load_array(options.target, "--target"), event_shape=source.shape[1:])
    denoiser: Denoiser | TransferModel | None = None
    if options.denoiser is not None:
        kind = _named("--denoiser", checkpoint_kind, options.denoiser)
        load = TransferModel.load if kind == "transfer_model" else Denoiser.load
        denoiser = _named("--denoiser", load, options.denoiser)
        _move(denoiser, options.device)
    labels = {}
    for name, count in (("source_labels", len(source)), ("target_labels", len(target)), ("labels", options.num)):
        path = getattr(options, name)
        flag = "--" + name.replace("_", "-")
        found = None if path is None else _labels(path, count) if name == "labels" else load_array(path, flag)
        labels[name] = None if found is None else check_labels(flag, found, count)
    given = [name for name, value in labels.items() if value is not None]
    if given and len(given) < 3:
        raise ValueError(
            "--source-labels, --target-labels and --labels (of the samples to draw) belong together; got only "
            + ", ".join("--" + name.replace("_", "-") for name in given)
        )
    stated = denoiser.denoiser if isinstance(denoiser, TransferModel) else denoiser
    if stated is not None and stated.num_classes and not given:
        raise ValueError(
            "--source-labels, --target-labels and --labels must be given: --denoiser is conditional on "
            f"{stated.num_classes} classes"
        )
    if given:
        classes = common_classes(
            labels["source_labels"],
            labels["target_labels"],
            len(source),
            len(target),
            None,
            None if stated is None else stated.num_classes,
        )
        check_labels("--labels", labels["labels"], options.num, classes)
    work = _work(options.out)
    if not options.quiet:
        print(f"finished stages and, every 30 s, training states go to {work} until the end", file=sys.stderr)
    model = TransferModel.fit(
        source,
        target,
        source_labels=labels["source_labels"],
        target_labels=labels["target_labels"],
        denoiser=denoiser,
        denoiser_settings=None if options.train_steps is None else Optimisation(steps=options.train_steps),
        loss=options.loss,
        consistency=options.consistency,
        cycle=options.cycle,
        work_dir=work,
        seed=options.seed,
        device=options.device,
        progress=not options.quiet,
    )
    report = TransferDiagnostics(**model.diagnostics)
    for text in report.warnings:
        print(f"WARNING: {text}", file=sys.stderr)
    print(report.summary(), flush=True)
    if options.save is not None:
        model.save(options.save)
        print(f"model saved in {options.save}")
    _draw(model, options, labels["labels"])
    Stages(work).remove("denoiser", "guidance")


def sample(options: argparse.Namespace) -> None:
    """Samples from a saved model."""
    from tgdp_fast.fit.model import TransferModel
    from tgdp_fast.runtime.arrays import check_labels

    _check_sampling(options)
    ecg_commands.check_model_folder(options.model)
    model = _named("MODEL_DIR", TransferModel.load, options.model)
    classes, labels = model.guidance.num_classes, None
    if options.labels is None and classes:
        if "ecg" in model.config:
            raise ValueError(
                f"MODEL_DIR: {options.model} is a model of ECGs; draw records of named statements with tgdp-fast ecg "
                f"sample {options.model} --num {options.num} --statements NORM --out DIR, or arrays with --labels"
            )
        raise ValueError(
            f"--labels must be given: {options.model} is conditional on {classes} classes; write one class (0 to "
            f"{classes - 1}) for all, or save one class index for each of the {options.num} samples as .npy"
        )
    if options.labels is not None:
        if not classes:
            raise ValueError(f"--labels must be left out: {options.model} was fitted without labels")
        labels = check_labels("--labels", _labels(options.labels, options.num), options.num, classes)
    if options.out is SAMPLES and SAMPLES.exists():
        _check_own(model, options, labels)
    _draw(model, options, labels)


def _check_own(model: Any, options: argparse.Namespace, labels: Any) -> None:
    """Refuse to write over a file that nobody named, unless the same command has written it."""
    from tgdp_fast.runtime.arrays import load_array

    try:
        held = load_array(SAMPLES, "--out")
    except ValueError:  # Something else, or damaged: somebody's all the same.
        held = None
    _move(model, options.device)
    if held is None or not model.drew(held, options.num, labels=labels, **_settings(options)):
        raise ValueError(
            f"--out must be given: {SAMPLES}, the default, is there already and holds something else; give another "
            f"file, or --out {SAMPLES} to replace it"
        )


def _draw(model: Any, options: argparse.Namespace, labels: Any) -> None:
    _move(model, options.device)
    drawn = model.sample_to_file(
        options.out,
        options.num,
        labels=labels,
        **_settings(options),
        progress=not options.quiet,
    )
    print(f"{len(drawn)} samples of shape {tuple(drawn.shape[1:])} written to {options.out}")


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of sampling that the command line has under the same names."""
    names = ("solver", "steps", "spacing", "scale", "gradient_norm_limit", "seed", "batch_size", "precision", "backend")
    return {name: getattr(options, name) for name in names}


def _labels(given: Path, count: int) -> Any:
    """Labels of the samples to draw: one class for all, or a file."""
    import numpy as np

    from tgdp_fast.runtime.arrays import load_array

    if re.fullmatch(r"-?\d+", str(given)):
        try:
            return np.full(count, int(str(given)), np.int64)
        except OverflowError:
            raise ValueError(f"--labels must be a class index or a file, got {given}") from None
    return load_array(given, "--labels")


def _move(model: Any, device: str | None) -> None:
    """Move a denoiser, or a model's networks, to ``device``."""
    if device is not None:
        for network in (getattr(model, "denoiser", model), getattr(model, "guidance", None)):
            if network is not None:
                network.to(device)


def _named(argument: str, function: Callable[..., Any], *values: Any) -> Any:
    """``function(*values)``, with the argument in front of its message."""
    try:
        return function(*values)
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from None


def _check_folder(argument: str, path: Path) -> None:
    if not path.parent.is_dir():
        raise ValueError(f"{argument} must lie in an existing folder, got {path}; create {path.parent} first")


def _check_overwriting(options: argparse.Namespace) -> None:
    """Refuse to write over what is read."""
    out = options.out.resolve()
    for name in ("source", "target", "source_labels", "target_labels", "labels"):
        path = getattr(options, name, None)
        if path is not None and path.resolve() == out:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"--out must be another file than {flag}, which it would overwrite; got {options.out}")
    folders = {"--denoiser": "denoiser", "--save": "save", "MODEL_DIR": "model"}
    given = {flag: getattr(options, name, None) for flag, name in folders.items()}
    for flag, folder in given.items():
        if folder is not None and folder.resolve() in (out, *out.parents):
            raise ValueError(f"--out must lie outside the model folder {flag} {folder}, got {options.out}")
    save, denoiser = given["--save"], given["--denoiser"]
    if save is not None and denoiser is not None and save.resolve() == denoiser.resolve():
        raise ValueError(f"--save must be another folder than --denoiser, which it would replace; got {save}")


def _check_backend(options: argparse.Namespace) -> None:
    """Draw one sample of small models where a backend is demanded: it may be missing, or refuse the device."""
    from tgdp_fast.diffusion.denoiser import Denoiser
    from tgdp_fast.diffusion.guidance import GuidanceNetwork
    from tgdp_fast.diffusion.schedule import NoiseSchedule
    from tgdp_fast.models import ScoreMLP
    from tgdp_fast.ops.registry import requested_backend
    from tgdp_fast.sampling.sampler import sample

    if requested_backend(options.backend) == "auto":
        return
    schedule, device = NoiseSchedule.vp_linear(), options.device or "cpu"
    denoiser = Denoiser(ScoreMLP((2,), 8, 1), schedule).to(device)
    guidance = GuidanceNetwork((2,), schedule).to(device)
    sample(denoiser, guidance, num=1, steps=1, precision=options.precision, backend=options.backend)


def _check_sampling(options: argparse.Namespace) -> None:
    """Refuse bad sampling options before anything is read or trained."""
    from tgdp_fast.diffusion.solvers import SOLVERS, SPACINGS
    from tgdp_fast.ops.registry import BACKENDS
    from tgdp_fast.runtime.precision import PRECISIONS

    check_integer("--num", options.num, 1)
    check_integer("--steps", options.steps, 1)
    check_seed(options.seed, "--seed")
    if options.batch_size is not None:
        check_integer("--batch-size", options.batch_size, 1)
    check_choice("--solver", options.solver, SOLVERS)
    check_choice("--spacing", options.spacing, SPACINGS)
    check_choice("--precision", options.precision, PRECISIONS)
    check_choice("--backend", options.backend, ("auto", *BACKENDS))
    check_number("--scale", options.scale)
    if options.gradient_norm_limit is not None:
        check_number("--gradient-norm-limit", options.gradient_norm_limit, 0.0, exclusive=True)
    if options.device is not None:
        check_device(options.device, "--device")
    if options.out.suffix != ".npy" or options.out.is_dir():
        raise ValueError(f"--out must be a file that ends in .npy, got {options.out}")
    _check_folder("--out", options.out)
    _check_overwriting(options)
    _check_backend(options)


# ------------------------------------------------------------------------------------------------------ parser


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "tgdp-fast",
        description="Sample a target domain from a source diffusion model and few target samples.",
        epilog="Exit status: 0 done, 1 failed while running, 2 bad arguments, 130 interrupted, 141 nobody reads "
        "the output any more. Runs that write to a folder go on where they stopped when the same command is given "
        "again.",
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
    command.add_argument("--json", action="store_true", help="machine-readable")

    command = add_command(commands, "demo", demo)
    command.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for table and plots (%(default)s)")
    add_quiet(command)

    experiment = commands.add_parser("experiment", help="An experiment with its table and plots.")
    experiments = experiment.add_subparsers(title="experiments", required=True, metavar="NAME")
    command = add_command(experiments, "gaussians", experiment_gaussians)
    command.add_argument("--n", type=int, nargs="+", default=[10, 100, 1000], help="target samples (10 100 1000)")
    command.add_argument("--seeds", type=int, default=5, help="draws of the target samples (%(default)s)")
    command.add_argument("--methods", nargs="+", metavar="METHOD", help="default: all")
    command.add_argument("--num", type=int, default=10_000, help="samples drawn per method (%(default)s)")
    command.add_argument("--solver", default="dpmpp_3m", help=f"{', '.join(SOLVER_NAMES)} (%(default)s)")
    command.add_argument("--steps", type=int, default=25, help="solver steps (%(default)s)")
    command.add_argument("--jobs", type=int, default=1, help="processes (%(default)s)")
    command.add_argument("--out", type=Path, required=True, help="folder; the same command resumes there")
    add_quiet(command)
    command = add_command(experiments, "digits", experiment_digits)
    command.add_argument("--digits", type=int, nargs=2, default=[3, 8], help="target digits (3 8)")
    command.add_argument("--n", type=int, default=20, help="target images (%(default)s)")
    command.add_argument("--seeds", type=int, default=3, help="draws of the target images (%(default)s)")
    command.add_argument("--out", type=Path, required=True, help="folder; the same command resumes there")
    add_quiet(command)

    command = add_command(commands, "bench", bench)
    command.add_argument("--quick", action="store_true", help="few and small cases, few rounds")
    command.add_argument("--only", nargs="+", default=[], metavar="NAME", help="cases: part of a name, or a pattern")
    command.add_argument(
        "--providers",
        nargs="+",
        default=[],
        help="peer, reference, compile, auto, a backend; on a GPU also with +graph (all)",
    )
    command.add_argument("--precisions", nargs="+", default=[], help="fp32, bf16, fp16 (all)")
    command.add_argument("--seconds", type=float, help="time for the rounds of one case (10; quick: 1)")
    command.add_argument(
        "--threads", type=int, help="threads of torch (its own choice: one per core, or OMP_NUM_THREADS)"
    )
    command.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    command.add_argument("--json", type=Path, help="write the results there, after every case")
    command.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    command = add_command(commands, "bench-report", bench_report)
    command.add_argument("files", type=Path, nargs="+", help="files written by bench --json")
    command.add_argument("--out", type=Path, help="folder for report.md and plots")
    command = add_command(commands, "validate", validate)
    command.add_argument("--backend", help="this one alone (all that are there)")
    command.add_argument("--operators", nargs="+", default=[], help="names, as in tgdp-fast info (all)")
    command.add_argument("--precisions", nargs="+", default=[], help="fp32, bf16, fp16 (all)")
    command.add_argument("--json", type=Path, help="write the table there")

    command = add_command(commands, "transfer", transfer)
    command.add_argument("--source", type=Path, required=True, help="source samples, .npy or .npz, [M, ...]")
    command.add_argument("--target", type=Path, required=True, help="target samples, .npy or .npz, [N, ...]")
    command.add_argument(
        "--source-labels", type=Path, help="class indices [M] or rows [M, K]; needs the other two files of labels"
    )
    command.add_argument("--target-labels", type=Path, help="class indices [N] or rows [N, K]")
    command.add_argument("--save", type=Path, help="folder to save the fitted model as, for the command sample")
    command.add_argument(
        "--denoiser", type=Path, help="saved model whose source denoiser to use instead of training one"
    )
    command.add_argument("--train-steps", type=int, help="training steps of the source denoiser (2000)")
    command.add_argument("--loss", default="logistic", help="logistic, ratio_mse, poisson or log_mse (%(default)s)")
    command.add_argument("--consistency", type=float, help="weight of the consistency term (1)")
    command.add_argument("--cycle", type=float, default=0.0, help="weight of the cycle term (%(default)s)")
    _sampling(command)

    command = add_command(commands, "sample", sample)
    command.add_argument("model", metavar="MODEL_DIR", type=Path, help="folder written by transfer --save")
    _sampling(command)

    ecg_commands.add_parser(commands)
    return parser


def _sampling(command: argparse.ArgumentParser) -> None:
    command.add_argument("--num", type=int, required=True, help="samples to draw")
    command.add_argument("--out", type=Path, default=SAMPLES, help=".npy to write them to (%(default)s)")
    command.add_argument(
        "--labels",
        type=Path,
        help="one class index for all samples, or a .npy with one for each (conditional models only)",
    )
    command.add_argument("--solver", default="dpmpp_2m", help=f"{', '.join(SOLVER_NAMES)} (%(default)s)")
    command.add_argument("--steps", type=int, default=25, help="solver steps (%(default)s)")
    command.add_argument("--spacing", default="logsnr", help="logsnr, uniform or karras (%(default)s)")
    command.add_argument("--scale", type=float, default=1.0, help="guidance scale; 1 is exact (%(default)s)")
    command.add_argument(
        "--gradient-norm-limit", type=float, help="limit of the guidance per sample, in units of epsilon (no limit)"
    )
    command.add_argument(
        "--seed", type=int, default=0, help="of everything random; the same seed gives the same samples (%(default)s)"
    )
    command.add_argument(
        "--batch-size",
        type=int,
        help="samples in flight; bounds memory (as many as have 2 million values, at most 8192)",
    )
    command.add_argument("--precision", default="fp32", help="fp32, bf16 or fp16 (%(default)s)")
    command.add_argument(
        "--backend",
        default="auto",
        help="auto, reference, cpu, triton or cuda, as far as tgdp-fast info lists them (%(default)s: the fastest)",
    )
    command.add_argument("--device", help="cpu, cuda, ... (default: cpu)")
    add_quiet(command)


if __name__ == "__main__":
    sys.exit(main())
