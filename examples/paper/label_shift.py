"""A transfer whose truth is known: beats of two rhythms, of which target and source have different shares.

    python examples/paper/label_shift.py --out runs/label_shift      about 8 minutes of one core

The same command resumes an interrupted run. The measured table is docs/results/label_shift.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import rhythm_beats
import torch
from rhythm_beats import Beats

from tgdp_fast._version import __version__
from tgdp_fast.diffusion.denoiser import Denoiser
from tgdp_fast.diffusion.guidance import GuidanceNetwork
from tgdp_fast.ecg.classifier import predict, train_ecg_classifier
from tgdp_fast.fit import baselines
from tgdp_fast.fit import guidance as transfer
from tgdp_fast.fit.baselines import fine_tune, train_vanilla
from tgdp_fast.fit.config import GuidanceConfig, NetworkConfig, TrainingConfig
from tgdp_fast.fit.density_ratio import DensityRatio, fit_density_ratio
from tgdp_fast.fit.guidance import fit_guidance
from tgdp_fast.fit.training import derived_seed, train_denoiser
from tgdp_fast.lab.tables import Row, RowStore, markdown_table, mean_and_deviation, write_results
from tgdp_fast.metrics import mmd, sliced_wasserstein
from tgdp_fast.models import XResNet1d
from tgdp_fast.runtime.checkpoint import signature_of
from tgdp_fast.runtime.checks import check_integer, check_number
from tgdp_fast.runtime.optional import optional
from tgdp_fast.runtime.progress import say, tracked
from tgdp_fast.runtime.stages import Stages, owned
from tgdp_fast.sampling.sampler import sample

#: Real beats in the place of samples: the source set, the given target set, and more beats of the target's records.
REAL = ("source_set", "target_set", "real")
MODELS = ("source", "vanilla", "finetune", "tgdp", "tgdp_scale_1")
METHODS = (*REAL, *MODELS)
#: How far from the truth TGDP's share may be: ten points.
TOLERANCE = 0.1
#: Shares of the records for the judge and for the source; the rest are the target's.
JUDGE_PART, SOURCE_PART = 1 / 3, 5 / 12

#: Principal components of real beats, and of synthetic ones, whose noise fills the others: whitened, it drowns P waves.
REAL_COMPONENTS, SYNTHETIC_COMPONENTS = 48, 24

#: Algorithm 3, by the loss "poisson". alpha_power is 1, for distributions whose means differ: where alpha_t -> 0, log h
#: is of the order of alpha_t.
GUIDANCE = GuidanceConfig("poisson", regularizers=(), network=NetworkConfig(alpha_power=1.0), diagnostics=False)

#: Fields of a plan on which no row depends.
_NOT_IN_ROWS = ("out", "records", "seeds", "progress")


@dataclass(frozen=True)
class Plan:
    """What is run. The settings were chosen on draws 100 to 102, which are not reported."""

    out: Path
    records: Path | None = None  # folder as load_rhythm_beats reads it
    seeds: int = 3
    num_samples: int = 1000
    num_target: int = 300
    source_share: float = 0.1
    target_share: float = 0.6
    num_components: int = REAL_COMPONENTS
    num_synthetic: int = 100  # synthetic records of each rhythm
    width: int = 256
    # The source's few beats of AF teach an h that is flatter than the true one: at the scale 1, exact for an exact h,
    # too few come out. Both scales are reported.
    scale: float = 1.4
    source_settings: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(steps=3000, batch_size=256, learning_rate=2e-3, ema_decay=0.998)
    )
    classifier_settings: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=200, batch_size=64, learning_rate=2e-3, weight_decay=0.05, ema_decay=0.98, warmup=20
        )
    )
    folds: int = 5
    progress: bool = False

    def __post_init__(self) -> None:
        check_integer("seeds", self.seeds, 1)
        check_integer("num_samples", self.num_samples, 10)
        check_integer("num_target", self.num_target, 10)
        check_integer("num_components", self.num_components, 1)
        check_integer("num_synthetic", self.num_synthetic, 1)
        check_integer("folds", self.folds, 2)
        check_number("scale", self.scale, 0.0)
        for name in ("source_share", "target_share"):
            check_number(name, getattr(self, name), 0.0, 1.0, exclusive=True)

    def signature(self, method: str) -> str:
        """Identifies what a row of ``method`` depends on, its beats and its draw apart."""
        settings = {name: value for name, value in asdict(self).items() if name not in _NOT_IN_ROWS}
        # Settings that are no part of the plan; those of the baselines are literals in their functions.
        fits: dict[str, list[Any]] = {
            "vanilla": [inspect.getsource(baselines)],
            "finetune": [inspect.getsource(baselines)],
        }
        guided = [repr(GUIDANCE.resolved(transfer.default_training(self.num_target), 0, has_denoiser=True))]
        fits |= dict.fromkeys(("tgdp", "tgdp_scale_1"), guided)
        return json.dumps([__version__, settings, signature_of(*fits.get(method, []))], sort_keys=True)


@dataclass(frozen=True)
class Rate:
    """A share, and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, calls: np.ndarray, clusters: np.ndarray | None = None) -> Rate:
        """Of ``calls`` [N] (0 or 1), whose ``clusters`` [N] are independent of each other; default each call."""
        value = float(calls.mean())
        clusters = np.arange(len(calls)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
        sums = np.bincount(clusters, weights=calls - value)
        return cls(value, float(np.sqrt(np.square(sums).sum())) / len(calls))


def corrected_share(called: Rate, true_positive: Rate, false_positive: Rate) -> Rate:
    """Share of a class from the share that a fallible judge calls so (Rogan and Gladen, American Journal of
    Epidemiology 107, 1978): (called - false_positive) / (true_positive - false_positive).

    Its standard error is that to first order in the three errors.
    """
    apart = true_positive.value - false_positive.value
    if apart <= 0:
        return Rate(math.nan, math.nan)
    share = (called.value - false_positive.value) / apart
    errors = (called.error, (1 - share) * false_positive.error, share * true_positive.error)
    return Rate(share, math.hypot(*errors) / apart)


class Draw:
    """Beats of one seed: records divided in three, target and source mixed from theirs.

    All beats are seen through the same window: the first principal components of the source set, in which the models
    live, so that judge and distances do not see what no model can draw.

    Attributes:
        source, target: what the methods are given.
        real: as many beats of the target's records as ``plan.num_samples`` in the target's mixture, or as there are.
        judge: all beats of the judge's records. No method sees them.
        reference: the largest target mixture of them; distances are measured to it.
        held_out: all beats of the other records; on them the judge's errors are measured.

    Raises:
        ValueError: more beats are asked for than there are.
        ImportError: scikit-learn is missing.
    """

    def __init__(self, plan: Plan, beats: Beats, seed: int) -> None:
        self.plan, self.seed = plan, seed
        generator = np.random.default_rng(seed)
        self.judge, source, target = divide(beats, generator)
        share = plan.target_share
        self.source = mixture(source, plan.source_share, None, generator, "source")
        self.target = mixture(target, share, plan.num_target, generator, "target")
        most = mixture(target, share, None, generator, "target")
        count = min(len(most), plan.num_samples)
        self.real = mixture(target, share, count, generator, "target")
        self.reference = mixture(self.judge, share, None, generator, "judge")
        self.held_out = Beats(*(np.concatenate([getattr(part, name) for part in (source, target)]) for name in _FIELDS))
        if plan.num_components > min(self.source.signals.shape):
            raise ValueError(
                f"num_components must be at most {min(self.source.signals.shape)}, got {plan.num_components}"
            )
        self.components = _principal_components(plan.num_components).fit(self.source.signals.astype(np.float64))

    def encode(self, beats: Beats) -> np.ndarray:
        """Beats as whitened principal components, float32 [N, num_components]."""
        return np.asarray(self.components.transform(beats.signals.astype(np.float64)), np.float32)

    def decode(self, coordinates: np.ndarray) -> np.ndarray:
        """Inverse of :meth:`encode`, signals float32 [N, 128]."""
        return np.asarray(self.components.inverse_transform(coordinates.astype(np.float64)), np.float32)

    def seen(self, beats: Beats) -> np.ndarray:
        """Signals of ``beats`` as far as the principal components go."""
        return self.decode(self.encode(beats))

    @cached_property
    def verdict(self) -> tuple[XResNet1d, Rate, Rate]:
        """The judge, and the shares of held-out AF and SNR beats that it calls AF. Records are independent."""
        network = self.classifier(self.judge, "judge")
        calls, held_out = self.calls(network, self.seen(self.held_out)), self.held_out
        rates = [
            Rate.of(calls[held_out.fibrillation == rhythm], held_out.records[held_out.fibrillation == rhythm])
            for rhythm in (True, False)
        ]
        return network, rates[0], rates[1]

    def classifier(self, beats: Beats, purpose: str) -> XResNet1d:
        """A small network that tells AF from SNR, trained on ``beats`` with both rhythms equally often."""
        seed = derived_seed(self.seed, purpose)
        generator = np.random.default_rng(seed)
        rhythms = [generator.permutation(np.flatnonzero(beats.fibrillation == value)) for value in (True, False)]
        rows = np.concatenate([np.resize(rhythm, max(map(len, rhythms))) for rhythm in rhythms])
        return train_ecg_classifier(
            self.seen(beats)[rows][:, None],
            beats.fibrillation[rows][:, None].astype(np.float32),
            architecture=_CLASSIFIER,
            settings=self.plan.classifier_settings,
            seed=seed,
            progress=self.plan.progress,
            description=purpose,
        )

    def calls(self, network: XResNet1d, signals: np.ndarray) -> np.ndarray:
        """Which of ``signals`` [N, 128] the network calls AF: float64 [N], 0 or 1."""
        return (predict(network, signals[:, None])[:, 0] > 0.5).astype(np.float64)


_FIELDS = ("signals", "records", "fibrillation")
_CLASSIFIER = {
    "blocks": (1, 1, 1),
    "expansion": 1,
    "width": 24,
    "kernel_size": 7,
    "stem_width": 12,
    "hidden": 0,
    "dropout": 0.3,
}


def _principal_components(count: int) -> Any:
    pca = optional("sklearn.decomposition", "principal components need").PCA
    return pca(count, whiten=True, svd_solver="full")


def divide(beats: Beats, generator: np.random.Generator) -> tuple[Beats, Beats, Beats]:
    """Beats of the judge, of the source and of the target: no record is in two, both rhythms are divided alike.

    Raises:
        ValueError: fewer than four records of a rhythm.
    """
    parts: list[list[np.ndarray]] = [[], [], []]
    for rhythm in (True, False):
        records = generator.permutation(np.unique(beats.records[beats.fibrillation == rhythm]))
        if len(records) < 4:
            raise ValueError(
                f"records must hold at least four of {_NAMES[rhythm]} to be divided in three, got {len(records)}"
            )
        ends = [round(JUDGE_PART * len(records)), round((JUDGE_PART + SOURCE_PART) * len(records))]
        for part, chosen in zip(parts, np.split(records, ends), strict=True):
            part.append(chosen)
    judge, source, target = (beats.rows(np.isin(beats.records, np.concatenate(part))) for part in parts)
    return judge, source, target


_NAMES = {True: rhythm_beats.FIBRILLATION, False: rhythm_beats.SINUS}


def mixture(beats: Beats, share: float, count: int | None, generator: np.random.Generator, name: str) -> Beats:
    """``count`` beats, a ``share`` of them AF; None: as many as there are in this mixture. In random order.

    Raises:
        ValueError: more are asked for than there are, or there is none of a rhythm in a mixture so small.
    """
    rhythms = [np.flatnonzero(beats.fibrillation == value) for value in (True, False)]
    if count is None:
        count = math.floor(min(len(rhythms[0]) / share, len(rhythms[1]) / (1 - share)))
        count -= count - round(share * count) > len(rhythms[1])  # by rounding
    positive = round(share * count)
    rows = []
    for rhythm, wanted, there in zip((True, False), (positive, count - positive), rhythms, strict=True):
        if not 0 < wanted <= len(there):
            raise ValueError(
                f"the {name} mixture needs {wanted} beats of {_NAMES[rhythm]} for {count} at a share of {share:g}, and "
                f"its records have {len(there)}; ask for {'more' if wanted == 0 else 'fewer'}"
            )
        rows.append(generator.choice(there, wanted, replace=False))
    return beats.rows(generator.permutation(np.concatenate(rows)))


def statement_logits(draw: Draw) -> tuple[np.ndarray, np.ndarray]:
    """Logits of AF at the source and target beats, float64 [M] and [n], by classifiers of the source's statements.

    Cross-fitted over records: a source beat's classifier saw no beat of its record. Those of the target are shared out
    among the same classifiers by record, so that both logits are of one kind. The target's rhythms are not used.
    """
    plan, generator = draw.plan, np.random.default_rng(derived_seed(draw.seed, "folds"))
    beats = (draw.source, draw.target)
    # Rhythm by rhythm, so that every fold has source records of both.
    order = [generator.permutation(np.unique(draw.source.records[draw.source.fibrillation == r])) for r in _NAMES]
    records = (np.concatenate(order), generator.permutation(np.unique(draw.target.records)))
    folds = min(plan.folds, *map(len, order))
    logits = (np.zeros(len(draw.source)), np.zeros(len(draw.target)))
    for fold in range(folds):
        own = [np.isin(part.records, names[fold::folds]) for part, names in zip(beats, records, strict=True)]
        network = draw.classifier(draw.source.rows(~own[0]), f"statements {fold + 1} of {folds}")
        for part, mask, result in zip(beats, own, logits, strict=True):
            if mask.any():
                chance = predict(network, draw.seen(part.rows(mask))[:, None])[:, 0].astype(np.float64)
                result[mask] = np.log(np.clip(chance, 1e-5, 1) / np.clip(1 - chance, 1e-5, 1))
    return logits


def density_ratio(draw: Draw) -> DensityRatio:
    """Ratio of target to source (Algorithm 1) from one feature: the logit of AF.

    Under label shift q(x) / p(x) = sum over y of q(y) / p(y) p(y | x): it depends on x through p(y | x) alone.
    """
    source, target = statement_logits(draw)
    features = [torch.from_numpy((logit - source.mean()) / source.std()).float()[:, None] for logit in (source, target)]
    return fit_density_ratio(features[0], features[1], seed=draw.seed, progress=draw.plan.progress)


def source_model(plan: Plan, draw: Draw) -> Denoiser:
    """The model of the source set, kept in ``<out>/source``."""
    x = draw.encode(draw.source)
    return Stages(plan.out / "source").run(
        f"denoiser{draw.seed}",
        signature_of(x, plan.width, asdict(plan.source_settings), __version__),
        lambda state_dir: train_denoiser(
            x,
            width=plan.width,
            settings=plan.source_settings,
            seed=draw.seed,
            progress=plan.progress,
            description="source model",
            state_dir=state_dir,
        ),
        Denoiser.save,
        Denoiser.load,
    )


def fitted_guidance(plan: Plan, draw: Draw, model: Denoiser) -> GuidanceNetwork:
    """log h of one draw, kept in ``<out>/source``: one fit serves every scale."""
    x, target = draw.encode(draw.source), draw.encode(draw.target)

    def fit(state_dir: Path | None) -> GuidanceNetwork:
        return fit_guidance(
            x,
            target,
            config=GUIDANCE,
            denoiser=model,
            ratio=density_ratio(draw),
            seed=draw.seed,
            progress=plan.progress,
            state_dir=state_dir,
        ).guidance

    return Stages(plan.out / "source").run(
        f"guidance{draw.seed}",
        signature_of(plan.signature("tgdp"), x, target, draw.source.fibrillation, model),
        fit,
        GuidanceNetwork.save,
        GuidanceNetwork.load,
    )


def draw_samples(plan: Plan, draw: Draw, model: Denoiser, method: str) -> np.ndarray:
    """Signals [num_samples, 128] of one method, its fit to the source model included."""
    guidance = None
    target, seed = draw.encode(draw.target), draw.seed
    if method == "vanilla":
        model = train_vanilla(target, model.schedule, width=plan.width, seed=seed, progress=plan.progress)
    elif method == "finetune":
        model = fine_tune(model, target, seed=seed, progress=plan.progress)
    elif method != "source":
        guidance = fitted_guidance(plan, draw, model)
    scale = 1.0 if method == "tgdp_scale_1" else plan.scale
    return draw.decode(sample(model, guidance, num=plan.num_samples, scale=scale, seed=seed).numpy())


def run(plan: Plan) -> list[Row]:
    """Run the plan, resuming finished rows; writes results.json and results.md into ``plan.out``."""
    with owned(plan.out):
        return _run(plan)


def _run(plan: Plan) -> list[Row]:
    beats = load_beats(plan)
    rows = []
    for seed in tracked(range(plan.seeds), "experiment", "draw", plan.progress):
        draw = Draw(plan, beats, seed)
        for method in METHODS:
            row = finished_row(plan, draw, method)
            if plan.progress:
                say(f"seed {seed}  {method:10s}  AF {row['share']:.1%} ± {row['share_error']:.1%}")
            rows.append(row)
    write_results(plan.out, rows, report(rows, plan, beats))
    return rows


def load_beats(plan: Plan) -> Beats:
    """Beats of the records, or of synthetic ones."""
    if plan.records is None:
        return rhythm_beats.synthetic_rhythm_beats(plan.num_synthetic)
    return rhythm_beats.load_rhythm_beats(plan.records)


def finished_row(plan: Plan, draw: Draw, method: str) -> Row:
    """The row of one method on one draw: from disk, or computed and written there."""
    parts = (draw.source, draw.target, draw.real, draw.reference)
    store = RowStore(plan.out, signature_of(plan.signature(method), *(part.signals for part in parts)))
    return store.once(f"seed{draw.seed}-{method}", lambda: run_method(plan, draw, method))


def run_method(plan: Plan, draw: Draw, method: str) -> Row:
    """Draw by one method, and measure. All models of a seed share their noise."""
    if method in MODELS:
        model = source_model(plan, draw)
        started = time.process_time()
        signals, records = draw_samples(plan, draw, model, method), None
        seconds = time.process_time() - started
    else:
        beats = {"source_set": draw.source, "target_set": draw.target, "real": draw.real}[method]
        signals, records, seconds = draw.seen(beats), beats.records, 0.0
    network, true_positive, false_positive = draw.verdict
    called = Rate.of(draw.calls(network, signals), records)
    share = corrected_share(called, true_positive, false_positive)
    reference = draw.seen(draw.reference)
    return {
        "n": plan.num_target,
        "seed": draw.seed,
        "method": method,
        "samples": len(signals),
        "share": share.value,
        "share_error": share.error,
        "called": called.value,
        "true_positive": true_positive.value,
        "true_positive_error": true_positive.error,
        "false_positive": false_positive.value,
        "false_positive_error": false_positive.error,
        "sw2": sliced_wasserstein(signals, reference),
        "mmd": mmd(signals, reference),
        "cpu_seconds": seconds,
    }


_DISTANCES = {"SW2": ("sw2", 1.0), "MMD² · 10³": ("mmd", 1e3)}


def report(rows: Sequence[Row], plan: Plan, beats: Beats) -> str:
    """Markdown: a line per method, the shares of each seed, and what follows for TGDP."""
    found = {method: [row for row in rows if row["method"] == method] for method in METHODS}
    body = [
        [
            f"`{method}`",
            _sizes(found[method]),
            mean_and_deviation(100 * row["share"] for row in found[method]),
            f"{100 * np.mean([row['share_error'] for row in found[method]]):.1f}",
            *(mean_and_deviation(scale * row[key] for row in found[method]) for key, scale in _DISTANCES.values()),
            mean_and_deviation(row["cpu_seconds"] for row in found[method]) if method in MODELS else "-",
        ]
        for method in METHODS
    ]
    by_seed = [
        [f"`{method}`", *(f"{row['share']:.1%} ± {row['share_error']:.1%}" for row in found[method])]
        for method in METHODS
    ]
    judged = found["real"]
    true_positive, false_positive = (
        mean_and_deviation(100 * row[key] for row in judged) for key in ("true_positive", "false_positive")
    )
    return "\n".join(
        [
            "# Label shift: a transfer whose truth is known\n",
            f"Single beats of {_data(plan, beats)}: lead I at 100 Hz, {rhythm_beats.LENGTH} samples around R, each "
            "with mean 0 and variance 1. Records are divided in three for every seed: those of the judge, of the "
            "source and of the target. Besides, source and target differ in the share of atrial fibrillation (AF): "
            f"{plan.source_share:.0%} of the source's beats, {plan.target_share:.0%} of the {plan.num_target} target "
            "beats; the others are of sinus rhythm (SNR). Models draw the first "
            f"{plan.num_components} principal components of the source set; {plan.num_samples} samples a model; mean ± "
            f"standard deviation over {plan.seeds} seeds.\n",
            "The judge is a classifier of the judge's beats, which no model sees. Of held-out beats it calls AF "
            f"{true_positive} % of the AF ones and {false_positive} % of the SNR ones, and shares are corrected for "
            "that. `error` is the standard error of one seed's share: of the samples (of the records, where the beats "
            "are real) and of the judge's two rates. SW2 (sliced Wasserstein-2) and MMD² are distances to beats of the "
            "judge's records in the target's mixture.\n",
            "Real beats: `source_set` and `target_set` are what the methods are given; `real` are more beats of the "
            "target's records in the target's mixture. That is the floor: what is left there is the difference between "
            "patients. `source` is the source model without transfer. `tgdp` is guided by h = E[r | x_t] (Algorithm 3, "
            "loss `poisson`), with the ratio r from a classifier of the source's statements, cross-fitted over "
            f"records, at the guidance scale {plan.scale:g}; `tgdp_scale_1` is the same guidance at the scale 1, which "
            "is exact for an exact h. TGDP uses which source beats are AF; no method is told which target beats are. "
            "Times are CPU times, without the training of the source model; `tgdp_scale_1` needs no fit of its "
            "own.\n",
            markdown_table(["method", "samples", "AF, %", "error", *_DISTANCES, "CPU s"], body),
            f"## AF by seed (truth: {plan.target_share:.0%} in the target)\n",
            markdown_table(["method", *(f"seed {seed}" for seed in range(plan.seeds))], by_seed),
            "## What was found\n",
            *findings(rows, plan),
        ]
    )


def _data(plan: Plan, beats: Beats) -> str:
    counts = [len(np.unique(beats.records[beats.fibrillation == rhythm])) for rhythm in (True, False)]
    text = f"{counts[0]} records of AF and {counts[1]} of SNR"
    if plan.records is not None:
        return f"{text} ({len(beats)} beats)"
    return (
        f"{text} ({len(beats)} beats), all synthetic; records without P waves and with irregular beats stand for AF, "
        "so that nothing here speaks of patients"
    )


def _sizes(rows: Sequence[Row]) -> str:
    sizes = sorted({row["samples"] for row in rows})
    return str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"


def findings(rows: Sequence[Row], plan: Plan) -> list[str]:
    """Paragraphs: whether TGDP recovers the share, and where it is better or worse than the other methods."""

    def values(method: str, key: str) -> np.ndarray:
        return np.array([row[key] for row in rows if row["method"] == method])

    def off(method: str) -> np.ndarray:
        return np.abs(values(method, "share") - plan.target_share)

    shares, within = values("tgdp", "share"), int((off("tgdp") <= TOLERANCE).sum())
    mean_off = abs(float(shares.mean()) - plan.target_share)
    text = [
        f"TGDP's share of AF is {shares.mean():.1%} in the mean, {100 * mean_off:.1f} points from "
        f"{plan.target_share:.0%}: {'within' if mean_off <= TOLERANCE else 'not within'} ten points. Single seeds "
        f"within ten points: {within} of {len(shares)}. The real target set is judged to have "
        f"{values('target_set', 'share').mean():.1%}, the source model to have {values('source', 'share').mean():.1%} "
        f"where its training set has {plan.source_share:.0%}. At the scale 1, which is exact "
        f"for an exact h, TGDP's share is {values('tgdp_scale_1', 'share').mean():.1%}; the scale {plan.scale:g} was "
        "chosen on other draws.\n"
    ]
    for other, name in (("finetune", "fine-tuning"), ("vanilla", "vanilla diffusion")):
        measures = [("distance of the share to the truth", "points", 100 * off("tgdp"), 100 * off(other))]
        for label, (key, scale) in _DISTANCES.items():
            measures.append((label, "", scale * values("tgdp", key), scale * values(other, key)))
        parts = []
        for label, unit, own, its in measures:
            sides = f"{own.mean():.3g} against {its.mean():.3g}{' ' + unit if unit else ''}"
            word = "better" if own.mean() < its.mean() else "worse"
            parts.append(f"{label} {sides}: {word} (better in {int((own < its).sum())} of {len(own)} seeds)")
        text.append(f"TGDP against {name}: {'; '.join(parts)}.\n")
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study from the command line; ends with exit status 2 on a bad argument."""
    parser = argparse.ArgumentParser(
        description="Beats of two rhythms with known shares in source and target: the shares that every method draws"
    )
    parser.add_argument(
        "--records", type=Path, help="folder with records.csv and .npz files of lead I (default: synthetic records)"
    )
    parser.add_argument("--n", "--target-beats", type=int, default=300, help="target beats (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="divisions of the records (%(default)s)")
    parser.add_argument("--num", type=int, default=1000, help="samples drawn per method (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder; the same command resumes there")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    given = parser.parse_args(arguments)
    components = SYNTHETIC_COMPONENTS if given.records is None else REAL_COMPONENTS
    try:
        run(
            Plan(
                given.out,
                given.records,
                given.seeds,
                given.num,
                given.n,
                num_components=components,
                progress=not given.quiet,
            )
        )
    except ValueError as error:
        parser.error(str(error))
    print((given.out / "results.md").read_text())


if __name__ == "__main__":
    main()
