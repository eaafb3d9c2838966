"""Real data: a model of all handwritten digits (8 x 8) transferred to two of them from a handful of images."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from tgdp_fast._checks import check_integer
from tgdp_fast._version import __version__
from tgdp_fast.baselines import fine_tune, train_vanilla
from tgdp_fast.checkpoint import save_array
from tgdp_fast.data.digits import DigitArrays, digit_judge, load_digits_arrays
from tgdp_fast.denoiser import Denoiser
from tgdp_fast.experiments.results import Row, RowStore, markdown_table, mean_and_deviation, write_results
from tgdp_fast.metrics import mmd, sliced_wasserstein
from tgdp_fast.sampling import sample
from tgdp_fast.training import Optimisation, train_denoiser
from tgdp_fast.transfer import fit_guidance
from tgdp_fast.transfer_model import Stages

METHODS = ("real", "source", "vanilla", "finetune", "tgdp")


@dataclass(frozen=True)
class Plan:
    """What is run."""

    out: Path
    digits: tuple[int, ...] = (3, 8)
    num_target: int = 20
    seeds: int = 3
    num_samples: int = 1000
    source_settings: Optimisation = field(
        default_factory=lambda: Optimisation(steps=6000, batch_size=256, learning_rate=1e-3, ema_decay=0.999)
    )
    width: int = 384
    progress: bool = False

    def __post_init__(self) -> None:
        check_integer("seeds", self.seeds, 1)
        check_integer("num_samples", self.num_samples, 10)
        load_digits_arrays(self.digits, self.num_target)

    def signature(self) -> str:
        """Identifies the settings that a row depends on."""
        content = [
            __version__,
            self.digits,
            self.num_target,
            self.num_samples,
            asdict(self.source_settings),
            self.width,
        ]
        return json.dumps(content, sort_keys=True)


def run(plan: Plan) -> list[Row]:
    """Run the plan, resuming finished rows; writes results.json, results.md and samples.png into ``plan.out``."""
    plan.out.mkdir(parents=True, exist_ok=True)
    store = RowStore(plan.out, plan.signature())
    source = source_model(plan)
    judge = digit_judge()
    rows = []
    for seed in range(plan.seeds):
        arrays = load_digits_arrays(plan.digits, plan.num_target, seed)
        for method in METHODS:
            name = f"seed{seed}-{method}"
            row = store.get(name)
            if row is None:
                started = time.perf_counter()
                images = draw(plan, source, arrays, method, seed)
                seconds = time.perf_counter() - started
                if seed == 0:
                    save_array(plan.out / f"{method}.npy", images)
                held_out = held_out_images(arrays)
                calls = judge.predict(images)
                row = {
                    "n": plan.num_target,
                    "seed": seed,
                    "method": method,
                    "target_fraction": float(np.isin(calls, plan.digits).mean()),
                    "fraction_per_digit": [float((calls == digit).mean()) for digit in plan.digits],
                    "sw2": sliced_wasserstein(images, held_out),
                    "mmd": mmd(images, held_out),
                    "nearest_target_distance": nearest_distance(images, arrays.target),
                    "seconds": seconds,
                }
                store.put(name, row)
            if plan.progress:
                print(
                    f"seed {seed}  {method:10s} called {plan.digits}: {row['target_fraction']:.1%}",
                    flush=True,
                )
            rows.append(row)
    write_results(plan.out, rows, report(rows, plan, judge.accuracy))
    _plot(plan)
    return rows


def source_model(plan: Plan) -> Denoiser:
    """The model of all digits, trained once and kept in ``<out>/source``."""
    arrays = load_digits_arrays(plan.digits, plan.num_target)
    return Stages(plan.out / "source").run(
        "denoiser",
        plan.signature(),
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
    if method == "real":
        return held_out_images(arrays)
    model, guidance = source, None
    if method == "vanilla":
        model = train_vanilla(arrays.target, source.schedule, width=plan.width, seed=seed, progress=plan.progress)
    elif method == "finetune":
        model = fine_tune(source, arrays.target, seed=seed, progress=plan.progress)
    elif method == "tgdp":
        fit = fit_guidance(arrays.source, arrays.target, denoiser=source, seed=seed, progress=plan.progress)
        guidance = fit.guidance
        if plan.progress:
            print(fit.diagnostics)
    return sample(model, guidance, num=plan.num_samples, seed=seed, clamp=(-1.0, 1.0)).numpy()


def held_out_images(arrays: DigitArrays) -> np.ndarray:
    """Real images of the target digits, those given as target samples left out."""
    given = {row.tobytes() for row in arrays.target}
    wanted = np.isin(arrays.source_labels, np.unique(arrays.target_labels))
    return np.stack([row for row in arrays.source[wanted] if row.tobytes() not in given])


def nearest_distance(images: np.ndarray, target: np.ndarray) -> float:
    """Median Euclidean distance from an image to the nearest given target image; near 0 means copies."""
    squared = (images**2).sum(1)[:, None] - 2 * images @ target.T + (target**2).sum(1)
    return float(np.median(np.sqrt(np.maximum(squared.min(1), 0.0))))


def report(rows: Sequence[Row], plan: Plan, accuracy: float) -> str:
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
        f"{plan.num_samples} samples a method, {plan.seeds} draws of the target images. The judge is a classifier of "
        f"real digits, {accuracy:.1%} right on held-out ones; distances are to held-out real images of the two "
        "digits.\n\n" + markdown_table(["method", *columns], body)
    )


def _plot(plan: Plan) -> None:
    from tgdp_fast.experiments import figures

    groups = {"given": load_digits_arrays(plan.digits, plan.num_target).target}
    groups |= {method: np.load(plan.out / f"{method}.npy", allow_pickle=False) for method in METHODS}
    figures.image_grid(plan.out / "samples.png", groups, (8, 8))
