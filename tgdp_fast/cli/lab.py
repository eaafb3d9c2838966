"""The commands that reproduce and measure: ``demo``, ``experiment``, ``bench``, ``bench-report``, ``validate``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from tgdp_fast.cli.arguments import add_command, add_quiet
from tgdp_fast.diffusion.solvers import SOLVERS
from tgdp_fast.runtime.checks import check_device, check_integer


def add_parsers(commands: Any) -> None:
    """Add the commands."""
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
    command.add_argument("--solver", default="dpmpp_3m", help=f"{', '.join(SOLVERS)} (%(default)s)")
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
    add_quiet(command)
    command = add_command(commands, "bench-report", bench_report, kept=None)
    command.add_argument("files", type=Path, nargs="+", help="files written by bench --json")
    command.add_argument("--out", type=Path, help="folder for report.md and plots")
    command = add_command(commands, "validate", validate)
    command.add_argument("--backend", help="this one alone (all that are there)")
    command.add_argument("--operators", nargs="+", default=[], help="names, as in tgdp-fast info (all)")
    command.add_argument("--precisions", nargs="+", default=[], help="fp32, bf16, fp16 (all)")
    command.add_argument("--json", type=Path, help="write the table there")


def demo(options: argparse.Namespace) -> None:
    """The paper's simulation in its quick form: n = 100, one draw, table and plots."""
    from tgdp_fast.fit.config import TrainingConfig
    from tgdp_fast.lab.experiments import gaussians

    methods = (*gaussians.REFERENCES, *gaussians.BASELINES, "tgdp")
    settings = TrainingConfig(steps=2000, batch_size=512, learning_rate=2e-3, ema_decay=0.998)
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
    from tgdp_fast.runtime.progress import say, tracked

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

    def note(line: str) -> None:
        if not options.quiet:
            say(line, sys.stderr)

    try:
        for case in tracked(chosen, "bench", "case", not options.quiet):
            found = runner.run_case(case, settings, measured, note)
            rows += found
            if options.json is not None:
                save_json(options.json, runner.result(rows, measured, load))
            if found:
                say(report.table(found))
    except KeyboardInterrupt:
        kept = f"; {options.json} holds them" if options.json is not None and rows else ""
        print(f"\ninterrupted after {len(rows)} rows{kept}", file=sys.stderr)
        return 130
    return None


def bench_report(options: argparse.Namespace) -> None:
    """Results of bench as one Markdown text, and plots."""
    from tgdp_fast.lab import figures
    from tgdp_fast.lab.benchmark import report
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
