"""Real data: a model of all handwritten digits (8 x 8) transferred to two of them from a handful of images."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from tgdp_fast._version import __version__
from tgdp_fast.data.digits import HELD_OUT, DigitArrays, DigitJudge, digit_judge, load_digits_arrays
from tgdp_fast.diffusion.denoiser import Denoiser
from tgdp_fast.fit import baselines
from tgdp_fast.fit import guidance as transfer
from tgdp_fast.fit.baselines import fine_tune, train_vanilla
from tgdp_fast.fit.config import GuidanceConfig, TrainingConfig
from tgdp_fast.fit.guidance import fit_guidance
from tgdp_fast.fit.training import train_denoiser
from tgdp_fast.lab import figures
from tgdp_fast.lab.tables import Row, RowStore, markdown_table, mean_and_deviation, write_results
from tgdp_fast.metrics import mmd, sliced_wasserstein
from tgdp_fast.runtime.checkpoint import signature_of
from tgdp_fast.runtime.checks import check_integer
from tgdp_fast.runtime.files import save_array
from tgdp_fast.runtime.progress import say, tracked
from tgdp_fast.runtime.stages import Stages, owned
from tgdp_fast.sampling.sampler import sample

METHODS = ("real", "source", "vanilla", "finetune", "tgdp")


@dataclass(frozen=True)
class Plan:
    """What is run."""

    out: Path
    digits: tuple[int, ...] = (3, 8)
    num_target: int = 20
    seeds: int = 3
    num_samples: int = 1000
    source_settings: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(steps=6000, batch_size=256, learning_rate=1e-3, ema_decay=0.999)
    )
    # Chosen for the baselines on other draws of the target images than those reported: images need more steps from
    # scratch, and fewer from the source model, than the two-dimensional simulation for which the defaults were chosen.
    vanilla_settings: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=1000, batch_size=256, learning_rate=2e-3, weight_decay=0.01, ema_decay=0.998
        )
    )
    finetune_settings: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=200, batch_size=256, learning_rate=5e-4, weight_decay=0.01, ema_decay=0.99
        )
    )
    width: int = 384
    progress: bool = False

    def __post_init__(self) -> None:
        check_integer("seeds", self.seeds, 1)
        check_integer("num_samples", self.num_samples, 10)
        load_digits_arrays(self.digits, self.num_target)

    def source_signature(self) -> str:
        """Identifies what the source model depends on."""
        return json.dumps([__version__, HELD_OUT, asdict(self.source_settings), self.width], sort_keys=True)

    def signature(self, method: str) -> str:
        """Identifies what a row of ``method`` depends on, its draw apart."""
        settings = {name: value for name, value in asdict(self).items() if name not in ("out", "seeds", "progress")}
        # Settings of the fits that are no part of the plan. Those of the baselines are literals in their functions.
        fits = {
            "vanilla": [inspect.getsource(baselines)],
            "finetune": [inspect.getsource(baselines)],
            "tgdp": [repr(GuidanceConfig().resolved(transfer.default_training(self.num_target), 0, has_denoiser=True))],
        }
        return json.dumps([__version__, HELD_OUT, settings, signature_of(*fits.get(method, []))], sort_keys=True)


def run(plan: Plan) -> list[Row]:
    """Run the plan, resuming finished rows; writes results.json, results.md and samples.png into ``plan.out``.

    Without matplotlib it says so and draws no plot.

    Raises:
        InUseError: another run works in ``plan.out``.
    """
    plots = figures.available()
    with owned(plan.out):
        return _run(plan, plots)


def _run(plan: Plan, plots: bool) -> list[Row]:
    source = source_model(plan)
    judge = digit_judge()
    rows = []
    tasks = [(seed, method) for seed in range(plan.seeds) for method in METHODS]
    for seed, method in tracked(tasks, "experiment", "row", plan.progress):
        arrays = load_digits_arrays(plan.digits, plan.num_target, seed)
        row = finished_row(plan, source, judge, arrays, method, seed)
        if plan.progress:
            say(f"seed {seed}  {method:10s} called {plan.digits}: {row['target_fraction']:.1%}")
        rows.append(row)
    write_results(plan.out, rows, report(rows, plan, judge))
    if plots:
        _plot(plan)
    return rows


def finished_row(plan: Plan, source: Denoiser, judge: DigitJudge, arrays: DigitArrays, method: str, seed: int) -> Row:
    """The row of one method on one draw of the target images: from disk, or computed and written there.

    The first draw's row is computed again when its images are lost.
    """
    store, files = RowStore(plan.out, plan.signature(method)), (plan.out / f"{method}.npy",)
    return store.once(
        f"seed{seed}-{method}",
        lambda: run_method(plan, source, judge, arrays, method, seed),
        files if seed == 0 else (),
    )


def run_method(plan: Plan, source: Denoiser, judge: DigitJudge, arrays: DigitArrays, method: str, seed: int) -> Row:
    """Draw by one method, its fit included, and measure against held-out images."""
    started = time.perf_counter()
    reference = held_out_images(arrays)
    if method == "real":
        images, reference = halves(arrays, seed)
    else:
        images = draw(plan, source, arrays, method, seed)
    seconds = time.perf_counter() - started
    if seed == 0:
        save_array(plan.out / f"{method}.npy", images)
    calls = judge.predict(images)
    return {
        "n": plan.num_target,
        "seed": seed,
        "method": method,
        "target_fraction": float(np.isin(calls, plan.digits).mean()),
        "fraction_per_digit": [float((calls == digit).mean()) for digit in plan.digits],
        "sw2": sliced_wasserstein(images, reference),
        "mmd": mmd(images, reference),
        "nearest_target_distance": nearest_distance(images, arrays.target),
        "seconds": seconds,
    }


def source_model(plan: Plan) -> Denoiser:
    """The model of all digits, trained once and kept in ``<out>/source``."""
    arrays = load_digits_arrays(plan.digits, plan.num_target)
    return Stages(plan.out / "source").run(
        "denoiser",
        plan.source_signature(),
        lambda state_dir: train_denoiser(
            arrays.source,
            width=plan.width,
            settings=plan.source_settings,
            progress=plan.progress,
            description="source model",
            state_dir=state_dir,
        ),
        Denoiser.save,
        Denoiser.load,
    )


def draw(plan: Plan, source: Denoiser, arrays: DigitArrays, method: str, seed: int) -> np.ndarray:
    """Images [num_samples, 64] in [-1, 1] of one method, its fit included."""
    model, guidance = source, None
    if method == "vanilla":
        model = train_vanilla(
            arrays.target,
            source.schedule,
            settings=plan.vanilla_settings,
            width=plan.width,
            seed=seed,
            progress=plan.progress,
        )
    elif method == "finetune":
        model = fine_tune(source, arrays.target, settings=plan.finetune_settings, seed=seed, progress=plan.progress)
    elif method == "tgdp":
        fit = fit_guidance(arrays.source, arrays.target, denoiser=source, seed=seed, progress=plan.progress)
        guidance = fit.guidance
        if plan.progress:
            say(str(fit.diagnostics))
    return sample(model, guidance, num=plan.num_samples, seed=seed, clamp=(-1.0, 1.0)).numpy()


def held_out_images(arrays: DigitArrays) -> np.ndarray:
    """Real images of the target digits that no model was trained on and no target sample is among."""
    return arrays.held_out[np.isin(arrays.held_out_labels, arrays.target_labels)]


def halves(arrays: DigitArrays, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The images of :func:`held_out_images` in two random halves, every digit in equal parts to within one."""
    rows = np.flatnonzero(np.isin(arrays.held_out_labels, arrays.target_labels))
    rows = np.random.default_rng(seed).permutation(rows)
    rows = rows[np.argsort(arrays.held_out_labels[rows], kind="stable")]
    return arrays.held_out[rows[::2]], arrays.held_out[rows[1::2]]


def nearest_distance(images: np.ndarray, target: np.ndarray) -> float:
    """Median Euclidean distance from an image to the nearest given target image; near 0 means copies."""
    squared = (images**2).sum(1)[:, None] - 2 * images @ target.T + (target**2).sum(1)
    return float(np.median(np.sqrt(np.maximum(squared.min(1), 0.0))))


def report(rows: Sequence[Row], plan: Plan, judge: DigitJudge) -> str:
    """Markdown: mean and standard deviation over draws of the target images."""
    names = " and ".join(str(digit) for digit in plan.digits)
    columns = {
        f"called {names}": "target_fraction",
        "SW2": "sw2",
        "MMD²": "mmd",
        "distance to nearest given image": "nearest_target_distance",
        "seconds": "seconds",
    }
    body = [
        [
            method,
            *(mean_and_deviation(r[key] for r in rows if r["method"] == method) for key in columns.values()),
        ]
        for method in METHODS
    ]
    return (
        f"# Handwritten digits: from all ten to {names} with {plan.num_target} images\n\n"
        f"{plan.num_samples} samples a method, {plan.seeds} draws of the target images; mean ± standard deviation. A "
        f"third of all real images is held out, alike for every digit: the source model, the target images and the "
        f"judge come from the rest. The judge is a classifier of real digits, {judge.accuracy:.1%} right on the "
        f"{judge.num_held_out} held-out ones. SW2 and MMD² are distances to the held-out images of {names}.\n\n"
        "The row `real` is the yardstick: one half of those held-out images, measured against the other half (smaller "
        "sets than the other rows', which raises SW2), and their distance to the nearest given image; a distance far "
        "below it means copies of the given images.\n\n" + markdown_table(["method", *columns], body)
    )


def summary(rows: Sequence[Row]) -> str:
    """A small Markdown table, mean over draws: share called one of the two digits, and distances."""
    columns = {
        "called one of the two": "target_fraction",
        "SW2": "sw2",
        "nearest given image": "nearest_target_distance",
    }
    body = []
    for method in METHODS:
        found = [row for row in rows if row["method"] == method]
        means = [np.mean([row[key] for row in found]) for key in columns.values()]
        body.append([f"`{method}`", f"{means[0]:.1%}", *(f"{mean:.2f}" for mean in means[1:])])
    return markdown_table(["method", *columns], body)


def _plot(plan: Plan) -> None:
    groups = {"given": load_digits_arrays(plan.digits, plan.num_target).target}
    groups |= {method: np.load(plan.out / f"{method}.npy", allow_pickle=False) for method in METHODS}
    figures.image_grid(plan.out / "samples.png", groups, (8, 8))
