"""Few solver steps against the paper's 200, and other starts than N(0, I), from one small SSSD-ECG model.

    python examples/paper/few_steps.py --out runs/few_steps      about 20 minutes of one core

The same command resumes an interrupted run. The measured table is docs/results/few_steps.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from tgdp_fast._version import __version__
from tgdp_fast.diffusion.denoiser import Denoiser
from tgdp_fast.diffusion.prior import EmpiricalPrior, GaussianPrior, Prior
from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.diffusion.solvers import solver_table
from tgdp_fast.ecg.records.leads import STORED_LEADS
from tgdp_fast.ecg.records.synthetic import synthetic_ecg
from tgdp_fast.ecg.records.wfdb import Root, read_leads
from tgdp_fast.fit.config import TrainingConfig
from tgdp_fast.fit.training import train_denoiser
from tgdp_fast.lab.experiments.digits import nearest_distance
from tgdp_fast.lab.tables import (
    Row,
    RowStore,
    check_distinct,
    markdown_table,
    mean_and_deviation,
    write_results,
)
from tgdp_fast.metrics import mmd, sliced_wasserstein
from tgdp_fast.models import SSSDECG
from tgdp_fast.runtime.arrays import Standardizer
from tgdp_fast.runtime.checkpoint import signature_of
from tgdp_fast.runtime.checks import check_choice, check_integer
from tgdp_fast.runtime.progress import say, tracked
from tgdp_fast.runtime.randomness import seeded_initialization
from tgdp_fast.runtime.stages import Stages, owned
from tgdp_fast.sampling.sampler import sample

#: Real signals in the place of samples: how far from the reference a perfect model is.
REAL = "real"
#: Where sampling starts: N(0, I); GaussianPrior and EmpiricalPrior of the training signals.
PRIORS = ("standard", "gaussian", "empirical")
#: Solvers and steps beside those that are measured with every prior.
FEW = ("dpmpp_2m/10", "dpmpp_2m/50", "dpmpp_3m/20", "ddim/10", "ddim/20", "ddim/50")
#: "solver/steps/prior/precision of the compiled network".
METHODS = (
    REAL,
    *(f"ddpm/200/{prior}/fp32" for prior in PRIORS),
    *(f"{name}/{prior}/fp32" for name in ("dpmpp_2m/20", "dpmpp_2m_sde/20") for prior in PRIORS),
    *(f"{name}/{prior}/fp32" for name in FEW for prior in PRIORS[::2]),
    *(f"dpmpp_2m/20/{prior}/bf16" for prior in PRIORS),
)
Priors = dict[str, Prior | None]

#: Principal directions of the reference whose variance is measured: those that N(0, I) has most wrong.
PRINCIPAL = 16

#: Fields of a plan on which no row depends.
_NOT_IN_ROWS = ("out", "records", "seeds", "methods", "progress")


def paper_schedule() -> NoiseSchedule:
    """That of SSSD-ECG: 200 steps, beta from 1e-4 to 0.02; it ends at alpha_bar = 0.13."""
    return NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 200))


@dataclass(frozen=True)
class Plan:
    """What is run. The network has the paper's architecture at a size that a CPU trains in minutes."""

    out: Path
    records: Path | None = None  # folder of WFDB records at 100 Hz, such as PTB-XL's records100
    seeds: int = 3
    num_samples: int = 300
    methods: tuple[str, ...] = METHODS
    num_train: int = 8000
    num_reference: int = 8000
    length: int = 128
    num_res_layers: int = 2
    res_channels: int = 16
    d_state: int = 16
    settings: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(steps=7000, batch_size=32, learning_rate=3e-3, ema_decay=0.998)
    )
    progress: bool = False

    def __post_init__(self) -> None:
        check_integer("seeds", self.seeds, 1)
        check_integer("num_samples", self.num_samples, 10)
        for method in check_distinct("methods", self.methods):
            check_choice("methods", method, METHODS)
        check_integer("num_train", self.num_train, 10)
        check_integer("num_reference", self.num_reference, 10)

    def network(self) -> SSSDECG:
        """The network, untrained."""
        channels = self.res_channels
        return SSSDECG(
            in_channels=len(STORED_LEADS),
            out_channels=len(STORED_LEADS),
            res_channels=channels,
            skip_channels=channels,
            num_res_layers=self.num_res_layers,
            step_dims=(32, 64, 64),
            num_classes=0,
            l_max=self.length,
            d_state=self.d_state,
        )

    def signature(self) -> str:
        """Identifies what a row depends on, its draw and method apart."""
        settings = {name: value for name, value in asdict(self).items() if name not in _NOT_IN_ROWS}
        return json.dumps([__version__, settings], sort_keys=True)


@dataclass(frozen=True)
class Signals:
    """Signals of the experiment, standardised with the training signals; float32 [N, 8, length].

    Attributes:
        train, reference: what the model is trained on, and what samples are measured against.
        fresh: fresh(num, seed), signals of the same distribution.
        description: of the training signals.
    """

    train: np.ndarray
    reference: np.ndarray
    fresh: Callable[[int, int], np.ndarray]
    description: str

    @cached_property
    def principal(self) -> GaussianPrior:
        """The first principal directions of the reference, and its variances along them."""
        return GaussianPrior.fit(self.reference, rank=PRINCIPAL)


def load_signals(plan: Plan) -> Signals:
    """Synthetic signals, training and reference signals apart; or windows of records, where there are too few records
    to set some apart: then windows are training, reference and fresh signals in one.
    """
    if plan.records is not None:
        windows, count = record_windows(plan.records, plan.length)
        windows = Standardizer.fit(windows).apply(windows)
        return Signals(
            windows,
            windows,
            lambda num, seed: windows[np.random.default_rng(seed).choice(len(windows), num)],
            f"{len(windows)} windows of {count} records",
        )
    train = synthetic_ecg(plan.num_train, plan.length, seed=0)
    standardizer = Standardizer.fit(train)
    return Signals(
        standardizer.apply(train),
        standardizer.apply(synthetic_ecg(plan.num_reference, plan.length, seed=1)),
        lambda num, seed: standardizer.apply(synthetic_ecg(num, plan.length, seed=1000 + seed)),
        f"{plan.num_train} synthetic signals",
    )


def record_windows(folder: Path, length: int) -> tuple[np.ndarray, int]:
    """Windows [N, 8, length] of all records at 100 Hz in ``folder``, an eighth of a length apart, and their number.

    Raises:
        ValueError: no such record there.
    """
    headers = sorted(path for path in Root(folder).record_files if path.suffix == ".hea")
    records = [read_leads(path, STORED_LEADS) for path in headers]
    windows = [
        np.lib.stride_tricks.sliding_window_view(signals, length, axis=1)[:, :: max(1, length // 8)]
        for signals, rate in records
        if rate == 100.0 and signals.shape[1] >= length
    ]
    if not windows:
        raise ValueError(
            f"records must be a folder with WFDB records at 100 Hz of {length} samples or more, got {folder}"
        )
    return np.concatenate([part.transpose(1, 0, 2) for part in windows]), len(windows)


def run(plan: Plan) -> list[Row]:
    """Run the plan, resuming finished rows; writes results.json and results.md into ``plan.out``."""
    with owned(plan.out):
        return _run(plan)


def _run(plan: Plan) -> list[Row]:
    signals = load_signals(plan)
    denoiser = source_model(plan, signals)
    gaussian = GaussianPrior.fit(signals.train)
    priors: Priors = {"standard": None, "gaussian": gaussian, "empirical": EmpiricalPrior(signals.train)}
    compiled = {precision: denoiser.compile_for_sampling(precision=precision) for precision in ("fp32", "bf16")}
    store = RowStore(plan.out, signature_of(plan.signature(), signals.train, denoiser))
    rows = []
    for seed in tracked(range(plan.seeds), "experiment", "draw", plan.progress):
        for method in plan.methods:
            compute = partial(run_method, plan, signals, compiled, priors, method, seed)
            row = store.once(f"seed{seed}-{method}", compute)
            if plan.progress:
                say(f"seed {seed}  {method:28s}  SW2 {row['sw2']:.3f}  {row['cpu_seconds']:.0f} s")
            rows.append(row)
    write_results(plan.out, rows, report(rows, plan, signals, start_gain(signals, gaussian)))
    return rows


def source_model(plan: Plan, signals: Signals) -> Denoiser:
    """The model, trained once and kept in ``<out>/source``."""
    with seeded_initialization(0):
        initial = Denoiser(plan.network(), paper_schedule())
    return Stages(plan.out / "source").run(
        "denoiser",
        signature_of(signals.train, initial, asdict(plan.settings)),
        lambda state_dir: train_denoiser(
            signals.train,
            initial=initial,
            settings=plan.settings,
            progress=plan.progress,
            description="SSSD-ECG",
            state_dir=state_dir,
        ),
        Denoiser.save,
        Denoiser.load,
    )


def run_method(
    plan: Plan, signals: Signals, compiled: dict[str, Denoiser], priors: Priors, method: str, seed: int
) -> Row:
    """Draw by one method and measure against the reference. All methods of a seed share their noise."""
    started = time.process_time()
    if method == REAL:
        x, evaluations = signals.fresh(plan.num_samples, seed), 0
    else:
        solver, steps, prior, precision = method.split("/")
        table = solver_table(solver, paper_schedule(), int(steps))
        x = sample(compiled[precision], num=plan.num_samples, solver=table, prior=priors[prior], seed=seed).numpy()
        evaluations = table.nfe
    seconds = time.process_time() - started
    return {
        "method": method,
        "seed": seed,
        "evaluations": evaluations,
        "cpu_seconds": seconds,
        **measure(x, signals),
    }


def measure(x: np.ndarray, signals: Signals) -> Row:
    """Distances of signals ``x`` [N, 8, L] to the reference, and from each to the nearest training signal."""
    reference = signals.reference
    return {
        "sw2": sliced_wasserstein(x, reference),
        "mmd": mmd(x, reference),
        "principal_variance": principal_variance(x, signals.principal),
        "lead_std": float(np.sqrt(np.mean((x.std(axis=(0, 2)) / reference.std(axis=(0, 2)) - 1.0) ** 2))),
        "spectrum_db": float(np.sqrt(np.mean((_spectrum_db(x) - _spectrum_db(reference)) ** 2))),
        "nearest": nearest_distance(x.reshape(len(x), -1), signals.train.reshape(len(signals.train), -1)),
    }


def principal_variance(x: np.ndarray, fitted: GaussianPrior) -> float:
    """Variance of ``x`` along the principal directions of ``fitted``, as a share of its own."""
    along = torch.from_numpy(x).flatten(1).double() @ fitted.directions
    return float((along.var(dim=0) / fitted.variances).mean())


def _spectrum_db(x: np.ndarray) -> np.ndarray:
    """Mean periodogram of each lead [8, L // 2 + 1] in decibels."""
    power: np.ndarray = (np.abs(np.fft.rfft(x.astype(np.float64))) ** 2).mean(axis=0)
    return 10.0 * np.log10(power)


def start_gain(signals: Signals, prior: GaussianPrior) -> float:
    """How much closer the Gaussian prior is to x_T than N(0, I) is, in nats of Kullback-Leibler divergence."""
    schedule = paper_schedule()
    alpha, sigma = schedule.alpha(schedule.t_max), schedule.sigma(schedule.t_max)
    clean = torch.from_numpy(signals.reference)
    x = alpha * clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    standard = -0.5 * (x.flatten(1).double().square() + np.log(2 * np.pi)).sum(1)
    return float((prior.log_prob(x, alpha, sigma) - standard).mean())


_COLUMNS: dict[str, tuple[str, float]] = {
    "SW2": ("sw2", 1.0),
    "MMD² · 10³": ("mmd", 1e3),
    "principal variance": ("principal_variance", 1.0),
    "lead std, %": ("lead_std", 100.0),
    "spectrum, dB": ("spectrum_db", 1.0),
    "nearest": ("nearest", 1.0),
}


def report(rows: Sequence[Row], plan: Plan, signals: Signals, gain: float) -> str:
    """Markdown: a line per method, and bf16 less fp32 on the same noise."""

    def cell(found: Sequence[Row], key: str, scale: float) -> str:
        return mean_and_deviation(scale * row[key] for row in found)

    body, differences = [], []
    for method in plan.methods:
        found = [row for row in rows if row["method"] == method]
        cells = [cell(found, key, scale) for key, scale in _COLUMNS.values()]
        body.append([f"`{method}`", str(found[0]["evaluations"]), *cells, cell(found, "cpu_seconds", 1.0)])
        other = [row for row in rows if row["method"] == method.replace("bf16", "fp32")]
        if other and method.endswith("bf16"):
            pairs = list(zip(found, other, strict=True))
            cells = [
                mean_and_deviation(scale * (a[key] - b[key]) for a, b in pairs) for key, scale in _COLUMNS.values()
            ]
            differences.append([f"`{method}`", *cells])
    text = [
        "# Few steps, and where they start\n",
        f"One SSSD-ECG network ({plan.num_res_layers} blocks of {plan.res_channels} channels, {plan.settings.steps} "
        f"training steps of {plan.settings.batch_size}) on {signals.description}, {len(STORED_LEADS)} leads of "
        f"{plan.length} samples at 100 Hz, standardised; the paper's schedule, alpha_bar_T = "
        f"{paper_schedule().alpha(199.0) ** 2:.3f}. {plan.num_samples} samples a method against "
        f"{len(signals.reference)} signals; mean ± standard deviation over {plan.seeds} seeds. All methods of a seed "
        "share their noise.\n",
        "A method is solver/steps/prior/precision of the compiled network. `real` are signals in the place of samples: "
        "the floor. Priors: `standard` is N(0, I); `gaussian` is GaussianPrior.fit(training signals), "
        f"{gain:.1f} nats closer to x_T than N(0, I) is; `empirical` is EmpiricalPrior(training signals). SW2 is the "
        "sliced Wasserstein-2 distance (128 projections). Principal variance is the variance along the first "
        f"{PRINCIPAL} principal directions of the signals, as a share of their own. Lead std is the relative error of "
        "a lead's standard deviation, and spectrum the difference of mean periodograms: root mean squares over leads "
        "and frequencies. Nearest is the median distance to the nearest training signal: far below that of `real` it "
        "means copies. Times are CPU times.\n",
        markdown_table(["method", "evaluations", *_COLUMNS, "CPU s"], body),
    ]
    if differences:
        text += [
            "## bf16 less fp32, same noise\n",
            markdown_table(["method", *_COLUMNS], differences),
        ]
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study from the command line; ends with exit status 2 on a bad argument."""
    parser = argparse.ArgumentParser(description="Few solver steps and the matched prior, with a small SSSD-ECG model")
    parser.add_argument("--records", type=Path, help="folder of WFDB records at 100 Hz (default: synthetic signals)")
    parser.add_argument("--seeds", type=int, default=3, help="draws (%(default)s)")
    parser.add_argument("--num", type=int, default=300, help="samples drawn per method (%(default)s)")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", default=METHODS, help="default: all")
    parser.add_argument("--out", type=Path, required=True, help="folder; the same command resumes there")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    given = parser.parse_args(arguments)
    try:
        run(Plan(given.out, given.records, given.seeds, given.num, tuple(given.methods), progress=not given.quiet))
    except ValueError as error:
        parser.error(str(error))
    print((given.out / "results.md").read_text())


if __name__ == "__main__":
    main()
