"""What samples are worth: classifiers trained on them and tested on real records, and how they differ from those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tgdp_fast._version import __version__
from tgdp_fast.ecg.classifier import predict, train_ecg_classifier
from tgdp_fast.ecg.config import SMOKE
from tgdp_fast.ecg.pipeline import Drawn, Pipeline, new_classifier
from tgdp_fast.ecg.records.leads import STORED_LEADS, TWELVE_LEADS, twelve_leads
from tgdp_fast.ecg.records.statements import label_names
from tgdp_fast.ecg.report import Cost, Method, Report, write_report
from tgdp_fast.fit.training import derived_seed
from tgdp_fast.metrics import (
    ECGStatistics,
    Interval,
    bootstrap_interval,
    compare_statistics,
    density_and_coverage,
    ecg_statistics,
    f_max,
    frechet_distance,
    macro_auc_by_ranks,
    memorisation,
    per_class_scores,
    spectra,
    spectral_difference,
)
from tgdp_fast.runtime import distributed
from tgdp_fast.runtime.checkpoint import load_checkpoint, save_checkpoint, signature_of
from tgdp_fast.runtime.files import save_json
from tgdp_fast.runtime.info import environment

REAL = "real"
_DESCRIPTIONS = {
    REAL: "The few target records that methods may see, beside those that test.",
    "source": "The source model without guidance, asked for the target's statements.",
    "vanilla": "A diffusion model trained on the few target records alone.",
    "fine_tune": "The source model trained further on the few target records.",
    "tgdp": "The frozen source model guided by the density ratio.",
}
_TITLES = {REAL: "Real", "source": "Source model", "vanilla": "Vanilla", "fine_tune": "Fine-tuning", "tgdp": "TGDP"}
#: Stages that each method pays for, beside its samples.
_STAGES = {
    "source": ("source",),
    "vanilla": ("vanilla",),
    "fine_tune": ("fine_tune",),
    "tgdp": ("statement_classifier", "density_ratio", "tgdp"),
}
#: Records whose beats are measured: a fortieth of a second each.
_MEASURED = 200


@dataclass(frozen=True)
class Utility:
    """Test scores of classifiers trained on one set of records: float32 [seeds, N, K], K classes of the target."""

    scores: np.ndarray

    def intervals(self, labels: np.ndarray, num: int) -> dict[str, Interval]:
        """Macro AUC and Fmax of the mean score over seeds, with bootstrap intervals over test records."""
        score = self.scores.mean(axis=0, dtype=np.float64)
        return {
            "macro AUC": bootstrap_interval(macro_auc_by_ranks, labels, score, num=num),
            "Fmax": bootstrap_interval(lambda y, s: f_max(y, s).value, labels, score, num=num),
        }


def evaluate(pipeline: Pipeline) -> Report:
    """Evaluate every method of the configuration; writes ``results.json`` and ``report.html``.

    Classes that are judged are the target's: statements of the records that methods may see. Metrics and their
    sources: :mod:`tgdp_fast.metrics`.
    """
    cohorts, settings = pipeline.cohorts, pipeline.config.evaluation
    samples = {name: pipeline.samples(name) for name in pipeline.config.methods}
    classes = np.flatnonzero(cohorts.target.labels.any(axis=0))
    names = cohorts.statements_of(cohorts.target)
    test = Drawn(np.asarray(cohorts.test.signals), cohorts.test.labels)
    few = Drawn(np.asarray(cohorts.target.signals), cohorts.target.labels)
    truth = test.labels[:, classes].astype(np.int64)
    real_statistics, real_spectra = statistics(test.signals, pipeline), spectra(test.signals, cohorts.rate)
    test_features = pipeline.features(cohorts.standardizer.apply(test.signals))
    methods = []
    for name in (REAL, *pipeline.config.methods):
        drawn = few if name == REAL else samples[name]
        utility = train_on(pipeline, name, [drawn], classes)
        score = utility.scores.mean(axis=0)
        augmented = {}
        if name not in (REAL, "source"):
            augmented = train_on(pipeline, f"{name}+real", [drawn, few], classes).intervals(truth, settings.bootstrap)
        found_features = pipeline.features(cohorts.standardizer.apply(drawn.signals))
        quality = distances(test_features, found_features)
        own_spectra = spectra(drawn.signals, cohorts.rate)
        quality["Spectrum difference, dB"] = spectral_difference(real_spectra, own_spectra)
        shown = slice(0, settings.plots)
        methods.append(
            Method(
                name=_TITLES[name],
                description=_DESCRIPTIONS[name],
                samples=all_leads(drawn.signals[shown], cohorts.leads),
                labels=[", ".join(row) or "no statement" for row in _names(drawn.labels[shown], cohorts.vocabulary)],
                metrics=utility.intervals(truth, settings.bootstrap),
                augmented=augmented,
                per_class=per_class_scores(truth, score, names),
                quality=quality,
                memorisation=None if name == REAL else memorisation(drawn.signals, few.signals, test.signals),
                statistics=compare_statistics(real_statistics, statistics(drawn.signals, pipeline)),
                spectra=spectra(all_leads(drawn.signals, cohorts.leads), cohorts.rate),
                cost=None if name == REAL else cost(pipeline, name),
            )
        )
    report = _report(pipeline, methods)
    if distributed.is_first():
        save_json(pipeline.out / "results.json", results(pipeline, methods))
        write_report(pipeline.out / "report.html", report)
    distributed.barrier()
    return report


def train_on(pipeline: Pipeline, name: str, parts: Sequence[Drawn], classes: np.ndarray) -> Utility:
    """Train classifiers on some sets of records together and score the test records."""
    cohorts, settings = pipeline.cohorts, pipeline.config.evaluation
    x = cohorts.standardizer.apply(np.concatenate([part.signals for part in parts]))
    y = np.concatenate([part.labels for part in parts])[:, classes]
    x_test = cohorts.standardizer.apply(np.asarray(cohorts.test.signals))

    def compute(state_dir: Path | None) -> Utility:
        scores = []
        for index in range(settings.seeds):
            # The same initial weights and batches for all methods.
            seed = derived_seed(pipeline.config.seed, f"judge {index}")
            network = train_ecg_classifier(
                x,
                y,
                network=new_classifier(settings.classifier, x, len(classes), seed),
                settings=settings.classifier.training,
                seed=seed,
                device=pipeline.device,
                progress=pipeline.progress,
                description=f"judge of {name}",
                state_dir=None if state_dir is None else state_dir.with_suffix(f".{index}"),
            )
            scores.append(predict(network, x_test))
        return Utility(np.stack(scores))

    signature = signature_of(x, y, x_test, asdict(settings.classifier), settings.seeds, pipeline.config.seed)
    return pipeline.stages.run(f"judge-{name}", signature, compute, _save_utility, _load_utility, alone=True)


def distances(real: np.ndarray, generated: np.ndarray) -> dict[str, float]:
    """Distances between features [N, F] of real test records and of samples."""
    k = min(5, len(real) - 1, len(generated) - 1)
    spread = density_and_coverage(real, generated, k=k)
    return {
        "Fréchet distance": frechet_distance(real, generated),
        f"density (k = {k})": spread.density,
        f"coverage (k = {k})": spread.coverage,
    }


def statistics(signals: np.ndarray, pipeline: Pipeline) -> ECGStatistics:
    """Heart rates and intervals of the first records."""
    return ecg_statistics(signals[:_MEASURED], pipeline.cohorts.rate, pipeline.cohorts.leads)


def all_leads(signals: np.ndarray, leads: Sequence[str]) -> np.ndarray:
    """The twelve leads of the eight stored ones; other leads as they are."""
    return twelve_leads(signals) if tuple(leads) == tuple(STORED_LEADS) else signals


def cost(pipeline: Pipeline, name: str) -> Cost:
    """Of one method: what is trained for it, the source model for itself alone, and its samples."""
    found = pipeline.costs.found
    trained = [found[stage] for stage in _STAGES[name] if stage in found]
    drawn = found.get(f"samples-{name}", {})
    return Cost(
        # Nothing is known of a source model that a checkpoint brought.
        trainable_parameters=sum(row.get("parameters", 0) for row in trained) if trained else None,
        training_seconds=sum(row["seconds"] for row in trained) if trained else None,
        sampling_seconds=drawn.get("seconds"),
        memory_bytes=max((row["peak_bytes"] for row in [*trained, drawn] if "peak_bytes" in row), default=None),
    )


def results(pipeline: Pipeline, methods: Sequence[Method]) -> dict[str, Any]:
    """Everything that the report says in numbers, JSON-able."""
    rows = {}
    for key, method in zip((REAL, *pipeline.config.methods), methods, strict=True):
        copies = method.memorisation
        rows[key] = {
            "metrics": {name: asdict(value) for name, value in method.metrics.items()},
            "with_real": {name: asdict(value) for name, value in method.augmented.items()},
            "per_class": [asdict(row) for row in method.per_class],
            "quality": dict(method.quality),
            "memorisation": None
            if copies is None
            else {name: getattr(copies, name) for name in ("median_ratio", "low_ratio", "nearer", "copies")},
            "statistics": [asdict(row) for row in method.statistics],
        }
    cohorts = pipeline.cohorts
    return {
        "environment": environment(),
        "counts": counts(pipeline),
        "dropped": {
            domain: [[problem.record, problem.reason] for problem in problems]
            for domain, problems in cohorts.problems.items()
        },
        "diagnostics": pipeline.model.diagnostics,
        "costs": pipeline.costs.found,
        "methods": rows,
    }


def counts(pipeline: Pipeline) -> dict[str, int]:
    """Numbers of records."""
    cohorts = pipeline.cohorts
    dropped = {f"{domain} records dropped": len(problems) for domain, problems in cohorts.problems.items()}
    return {
        "source records": len(cohorts.source),
        "target records that methods see": len(cohorts.target),
        "target records that test": len(cohorts.test),
        "samples of each method": pipeline.config.sampling.num,
        **dropped,
    }


def _report(pipeline: Pipeline, methods: Sequence[Method]) -> Report:
    cohorts, ratio = pipeline.cohorts, pipeline.ratio[0]
    eight = tuple(cohorts.leads) == tuple(STORED_LEADS)
    return Report(
        title="ECG transfer",
        methods=methods,
        rate=cohorts.rate,
        leads=TWELVE_LEADS if eight else cohorts.leads,
        summary=(f"{SMOKE[0].upper()}{SMOKE[1:]}.\n" if pipeline.config.preset == "smoke" else "")
        + (
            f"{pipeline.config.sampling.num} samples of each method, for the statements of {len(cohorts.target)} "
            f"target records; source model of {len(cohorts.source)} records. Classifiers trained on samples are tested "
            f"on {len(cohorts.test)} real target records that no method has seen."
        ),
        warnings=[*pipeline.model.diagnostics["warnings"], *_size_warnings(pipeline)],
        log_ratios={"source": ratio.source_log_ratio.numpy(), "target": ratio.target_log_ratio.numpy()},
        counts=counts(pipeline),
        provenance={"tgdp_fast": __version__, "torch": torch.__version__, **environment()},
        settings=asdict(pipeline.config),
    )


def _size_warnings(pipeline: Pipeline) -> list[str]:
    tested = len(pipeline.cohorts.test)
    if tested < 100:
        return [f"{tested} test records are few: differences within the intervals say nothing."]
    return []


def _names(labels: np.ndarray, vocabulary: Sequence[str]) -> list[tuple[str, ...]]:
    return label_names((labels > 0.5).astype(np.uint8), vocabulary)


def _save_utility(utility: Utility, path: Path) -> None:
    save_checkpoint(path, "judge", {}, {"scores": torch.from_numpy(utility.scores)})


def _load_utility(path: Path) -> Utility:
    return Utility(load_checkpoint(path, "judge")[1]["scores"].numpy())
