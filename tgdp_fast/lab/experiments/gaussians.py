"""The paper's simulation (section 4.1): two Gaussian mixtures for which everything is known in closed form."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import active_children, get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tgdp_fast._version import __version__
from tgdp_fast.data.gaussians import (
    GaussianMixture,
    exact_denoiser,
    exact_guidance,
    log_density_ratio,
    paper_source,
    paper_target,
)
from tgdp_fast.diffusion.denoiser import Denoiser
from tgdp_fast.diffusion.guidance import GuidanceNetwork
from tgdp_fast.diffusion.guided import EpsilonModel, Guidance
from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.diffusion.solvers import SOLVERS, solver_table
from tgdp_fast.fit import baselines, density_ratio
from tgdp_fast.fit import guidance as transfer
from tgdp_fast.fit.baselines import fine_tune, train_vanilla
from tgdp_fast.fit.config import GuidanceConfig, TrainingConfig
from tgdp_fast.fit.guidance import fit_guidance
from tgdp_fast.fit.regularizers import Consistency, Cycle
from tgdp_fast.fit.training import train_denoiser
from tgdp_fast.lab import figures
from tgdp_fast.lab.tables import (
    Row,
    RowStore,
    check_distinct,
    markdown_table,
    mean_and_deviation,
    write_results,
)
from tgdp_fast.metrics import average_likelihood, mmd, mode_mass, negative_log_likelihood, sliced_wasserstein
from tgdp_fast.runtime.checkpoint import signature_of
from tgdp_fast.runtime.checks import check_choice, check_integer
from tgdp_fast.runtime.files import save_array
from tgdp_fast.runtime.progress import say, tracked
from tgdp_fast.runtime.stages import Stages, owned
from tgdp_fast.runtime.workers import start_worker
from tgdp_fast.sampling.sampler import sample

#: Guidance fits by name. "tgdp" is the recommended setting, the defaults.
VARIANTS: dict[str, GuidanceConfig] = {
    "tgdp": GuidanceConfig(),
    "tgdp/exact_source": GuidanceConfig(),
    "tgdp/logistic": GuidanceConfig(regularizers=()),
    "tgdp/ratio_mse": GuidanceConfig("ratio_mse", regularizers=()),
    "tgdp/poisson": GuidanceConfig("poisson", regularizers=()),
    "tgdp/log_mse": GuidanceConfig("log_mse", regularizers=()),
    "tgdp/algorithm_4": GuidanceConfig("ratio_mse", (Consistency(1.0), Cycle(1.0))),
    "tgdp/bf16_sampling": GuidanceConfig(),
    "tgdp/bf16": GuidanceConfig(precision="bf16"),
}
#: Variants that also sample with bf16 matmuls.
BF16_SAMPLING = ("tgdp/bf16_sampling", "tgdp/bf16")
#: "means" is the exact target but for the means of its modes, which are estimated from the given samples: how far
#: those samples can tell the target at all, for someone who knows everything else.
REFERENCES = ("target", "means", "source", "oracle", "oracle/dpmpp_2m")
BASELINES = ("vanilla", "finetune")
METHODS = (*REFERENCES, *BASELINES, *VARIANTS)

#: Fields of a plan on which no row depends.
_NOT_IN_ROWS = ("out", "num_target", "seeds", "methods", "jobs", "progress")

#: Cells of the plotted log-ratio, per axis, and the square that it covers.
GRID = 81
EXTENT = 1.6


@dataclass(frozen=True)
class Plan:
    """What is run.

    ``num_target`` and ``methods`` must be distinct. A finished row is used again by every plan that would compute the
    same: ``out``, ``num_target``, ``seeds``, ``methods``, ``jobs`` and ``progress`` may differ.
    """

    out: Path
    num_target: tuple[int, ...] = (10, 100, 1000)
    seeds: int = 5
    methods: tuple[str, ...] = METHODS
    num_source: int = 10_000
    num_samples: int = 10_000
    solver: str = "dpmpp_3m"
    steps: int = 25
    source_settings: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(steps=6000, batch_size=512, learning_rate=2e-3, ema_decay=0.999)
    )
    width: int = 128
    jobs: int = 1
    progress: bool = False

    def __post_init__(self) -> None:
        for n in check_distinct("num_target", self.num_target):
            check_integer("n", n, 2)
        check_integer("seeds", self.seeds, 1)
        check_integer("num_source", self.num_source, 10)
        check_integer("num_samples", self.num_samples, 10)
        check_choice("solver", self.solver, SOLVERS)
        check_integer("steps", self.steps, 1)
        check_integer("width", self.width, 1)
        check_integer("jobs", self.jobs, 1)
        for method in check_distinct("methods", self.methods):
            check_choice("methods", method, METHODS)

    def source_signature(self) -> str:
        """Identifies what the source model depends on."""
        return json.dumps([__version__, self.num_source, asdict(self.source_settings), self.width], sort_keys=True)

    def signature(self, n: int, method: str) -> str:
        """Identifies what a row of ``method`` on ``n`` target samples depends on, its draw apart."""
        settings = {name: value for name, value in asdict(self).items() if name not in _NOT_IN_ROWS}
        return json.dumps([__version__, settings, signature_of(*_recipe(n, method))], sort_keys=True)


def _recipe(n: int, method: str) -> list[str]:
    """Settings of a fit that are no part of a plan: the variant's, and the defaults of the functions it calls."""
    if method in BASELINES:
        # Their settings are literals in the functions.
        return [inspect.getsource(baselines)]
    if method not in VARIANTS:
        return []
    return [
        repr(VARIANTS[method].resolved(transfer.default_training(n), 0, has_denoiser=True)),
        str(inspect.signature(density_ratio.cross_fitted)),
    ]


def run(plan: Plan) -> list[Row]:
    """Run the plan, resuming finished rows; writes results.json, results.md and plots into ``plan.out``.

    Interrupted, it keeps the rows that are finished. Without matplotlib it says so and draws no plots.

    Raises:
        InUseError: another run works in ``plan.out``.
    """
    plots = figures.available()
    tasks = [(plan, n, seed, method) for n in plan.num_target for seed in range(plan.seeds) for method in plan.methods]
    with owned(plan.out):
        source_model(plan)
        if plan.jobs > 1:
            rows = _in_processes(tasks, min(plan.jobs, len(tasks)))
        else:
            rows = [finished_row(*task) for task in tracked(tasks, "experiment", "row", plan.progress)]
        write_results(plan.out, rows, report(rows, plan))
        if plots:
            plot(plan)
    return rows


def _in_processes(tasks: Sequence[tuple[Plan, int, int, str]], workers: int) -> list[Row]:
    """Rows of the tasks in their order, computed by ``workers`` processes that share the threads of this one."""
    threads = max(1, torch.get_num_threads() // workers)
    others = set(active_children())
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (threads,)) as pool:
        try:
            rows = [pool.submit(finished_row, *task) for task in tasks]
            return [row.result() for row in tracked(rows, "experiment", "row", tasks[0][0].progress)]
        except KeyboardInterrupt:
            # Left to itself, the pool would first finish every fit that it has handed out. Without its processes it
            # gives up all others by itself.
            for process in set(active_children()) - others:
                process.terminate()
            raise
        except BrokenProcessPool:
            raise ChildProcessError(
                "a process that computed rows ended early: it was killed, by the system if memory is short; finished "
                "rows are kept, and fewer jobs need less memory"
            ) from None
        except Exception:
            pool.shutdown(cancel_futures=True)
            raise


def _start_worker(threads: int) -> None:
    start_worker()
    torch.set_num_threads(threads)


def source_model(plan: Plan) -> Denoiser:
    """The source model, trained once and kept in ``<out>/source``."""
    return Stages(plan.out / "source").run(
        "denoiser",
        plan.source_signature(),
        lambda state_dir: train_denoiser(
            paper_source().sample(plan.num_source, seed=0),
            NoiseSchedule.vp_linear(),
            width=plan.width,
            settings=plan.source_settings,
            progress=plan.progress,
            description="source model",
            state_dir=state_dir,
        ),
        Denoiser.save,
        Denoiser.load,
    )


def finished_row(plan: Plan, n: int, seed: int, method: str) -> Row:
    """The row of one method on one draw of ``n`` target samples: from disk, or computed and written there.

    The first draw's row is computed again when its arrays for the plots are lost.
    """
    store, files = RowStore(plan.out, plan.signature(n, method)), _kept(plan, n, method).values()
    row = store.once(f"n{n}-seed{seed}-{method}", lambda: run_method(plan, n, seed, method), files if seed == 0 else ())
    if plan.progress:
        say(f"n = {n:5d}  seed {seed}  {method:18s}  SW2 {row['sw2']:.3f}  NLL {row['nll']:.3f}")
    return row


def run_method(plan: Plan, n: int, seed: int, method: str) -> Row:
    """Fit one method, sample, and measure against fresh target samples."""
    q, schedule = paper_target(), NoiseSchedule.vp_linear()
    target, component = _given(n, seed)
    exact = method in ("oracle", "oracle/dpmpp_2m", "tgdp/exact_source")
    denoiser: EpsilonModel = exact_denoiser(paper_source(), schedule) if exact else source_model(plan)
    guidance: Guidance | None = None
    started = time.perf_counter()
    if method == "vanilla":
        denoiser = train_vanilla(target, schedule, width=plan.width, seed=seed, progress=plan.progress)
    elif method == "finetune":
        assert isinstance(denoiser, Denoiser)
        denoiser = fine_tune(denoiser, target, seed=seed, progress=plan.progress)
    elif method.startswith("oracle"):
        guidance = exact_guidance(q, paper_source(), schedule)
    elif method in VARIANTS:
        fit = fit_guidance(
            paper_source().sample(plan.num_source, seed=0),
            target,
            config=replace(VARIANTS[method], diagnostics=False),
            denoiser=denoiser,
            seed=seed,
            progress=plan.progress,
        )
        guidance = fit.guidance
    fit_seconds = time.perf_counter() - started
    started = time.perf_counter()
    if method == "target":
        samples = q.sample(plan.num_samples, seed=3000 + seed)
    elif method == "means":
        means = torch.stack([target[component == mode].mean(0) for mode in range(q.num_components)])
        samples = GaussianMixture(means, q.variance, q.weights).sample(plan.num_samples, seed=3000 + seed)
    else:
        solver = "dpmpp_2m" if method == "oracle/dpmpp_2m" else plan.solver
        precision = "bf16" if method in BF16_SAMPLING else "fp32"
        samples = sample(
            denoiser, guidance, num=plan.num_samples, solver=solver, steps=plan.steps, seed=seed, precision=precision
        )
    sample_seconds = time.perf_counter() - started
    if seed == 0:
        _keep_for_plots(plan, n, method, samples, guidance)
    fresh = q.sample(plan.num_samples, seed=2000 + seed)
    return {
        "n": n,
        "seed": seed,
        "method": method,
        "sw2": sliced_wasserstein(samples, fresh),
        "nll": negative_log_likelihood(q, samples),
        "average_likelihood": average_likelihood(q, samples),
        "mmd": mmd(samples, fresh),
        "mode_mass": mode_mass(q, samples),
        "fit_seconds": fit_seconds,
        "sample_seconds": sample_seconds,
    }


def _given(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw ``seed`` of ``n`` target samples, and the mode of each."""
    return paper_target().sample_with_components(n, seed=1000 + seed)


def _kept(plan: Plan, n: int, method: str) -> dict[str, Path]:
    """Files of the arrays that the plots need of a method's first draw."""
    stem = f"n{n}-{method.replace('/', '--')}"
    kinds = {"samples": f"{stem}.npy"} | ({"log_ratio": f"{stem}-log-ratio.npy"} if method in VARIANTS else {})
    return {kind: plan.out / "samples" / name for kind, name in kinds.items()}


def _keep_for_plots(plan: Plan, n: int, method: str, samples: Tensor, guidance: Guidance | None) -> None:
    files = _kept(plan, n, method)
    files["samples"].parent.mkdir(parents=True, exist_ok=True)
    save_array(files["samples"], samples.numpy())
    if isinstance(guidance, GuidanceNetwork):
        with torch.no_grad():
            learned = guidance.log_ratio(_grid(), guidance.schedule.t_min)
        save_array(files["log_ratio"], learned.reshape(GRID, GRID).numpy())


def _grid() -> Tensor:
    """Points of the plotted square [GRID * GRID, 2], row by row from below."""
    axis = torch.linspace(-EXTENT, EXTENT, GRID)
    return torch.cartesian_prod(axis, axis).flip(1)


def report(rows: Sequence[Row], plan: Plan) -> str:
    """Markdown: mean and standard deviation over seeds, a table per number of target samples."""
    columns: list[tuple[str, Callable[[Row], float | None]]] = [
        ("SW2", lambda row: row["sw2"]),
        ("NLL", lambda row: row["nll"]),
        ("average likelihood", lambda row: row["average_likelihood"]),
        ("MMD² · 10³", lambda row: None if row["mmd"] is None else 1e3 * row["mmd"]),
        ("mass of mode 1", lambda row: row["mode_mass"][0]),
        ("fit s", lambda row: row["fit_seconds"]),
        ("sample s", lambda row: row["sample_seconds"]),
    ]
    evaluations = solver_table(plan.solver, NoiseSchedule.vp_linear(), plan.steps).nfe
    spread = "one draw" if plan.seeds == 1 else f"mean ± standard deviation over {plan.seeds} draws"
    text = [
        "# Simulation of the paper, section 4.1\n",
        f"{plan.num_source} source samples, {plan.num_samples} samples drawn with {plan.solver} in {evaluations} "
        f"evaluations; {spread} of the target samples (half per mode). The "
        f"target's entropy, the NLL of exact samples, is {paper_target().entropy():.3f}. SW2 is the sliced "
        "Wasserstein-2 distance to fresh target samples (128 projections). `means` knows the target but for the mean "
        "of each mode, which it estimates from the given samples.\n",
    ]
    for n in plan.num_target:
        body = []
        for method in plan.methods:
            found = [row for row in rows if row["n"] == n and row["method"] == method]
            body.append([method, *(mean_and_deviation(value(row) for row in found) for _, value in columns)])
        text += [f"## n = {n}\n", markdown_table(["method", *(name for name, _ in columns)], body)]
    return "\n".join(text)


def summary(rows: Sequence[Row]) -> str:
    """One Markdown table of "SW2 / NLL", mean over draws: a line per method, a column per number of target samples."""
    sizes = sorted({row["n"] for row in rows})
    body = []
    for method in [m for m in METHODS if any(row["method"] == m for row in rows)]:
        cells = []
        for n in sizes:
            found = [row for row in rows if row["n"] == n and row["method"] == method]
            cells.append(" / ".join(f"{np.mean([row[key] for row in found]):.3f}" for key in ("sw2", "nll")))
        body.append([f"`{method}`", *cells])
    return markdown_table(["method", *(f"n = {n}" for n in sizes)], body)


def plot(plan: Plan) -> list[Path]:
    """Samples of every method, and learned against exact log-ratios, for the first seed. Needs matplotlib."""
    given = {n: _given(n, 0)[0].numpy() for n in plan.num_target}
    drawn = {
        (n, method): np.load(_kept(plan, n, method)["samples"]) for n in plan.num_target for method in plan.methods
    }
    source, q = paper_source(), paper_target()
    schedule = NoiseSchedule.vp_linear()
    alpha, sigma = schedule.alpha(schedule.t_min), schedule.sigma(schedule.t_min)
    exact = log_density_ratio(q, source, _grid(), alpha, sigma).reshape(GRID, GRID).numpy()
    ratios = {
        (n, method): np.load(_kept(plan, n, method)["log_ratio"])
        for n in plan.num_target
        for method in plan.methods
        if method in VARIANTS
    }
    return [
        figures.scatter_grid(plan.out / "samples.png", plan.num_target, plan.methods, drawn, given, EXTENT),
        figures.ratio_grid(plan.out / "log_ratio.png", plan.num_target, exact, ratios, EXTENT),
    ]
