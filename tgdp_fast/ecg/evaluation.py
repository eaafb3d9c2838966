"""Evaluation of samples: classifiers that are trained on them and tested on real records, and distances to these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tgdp_fast._version import __version__
from tgdp_fast.ecg.classifier import features, predict, train_ecg_classifier
from tgdp_fast.ecg.cohorts import DOMAINS, Cohorts
from tgdp_fast.ecg.config import SMOKE, to_dict
from tgdp_fast.ecg.density_ratio import new_classifier
from tgdp_fast.ecg.drawing import Drawn
from tgdp_fast.ecg.records.leads import STORED_LEADS, TWELVE_LEADS, twelve_leads
from tgdp_fast.ecg.records.statements import label_names
from tgdp_fast.ecg.report import Cost, Method, Report, write_report
from tgdp_fast.ecg.run import Run
from tgdp_fast.fit.density_ratio import DensityRatio
from tgdp_fast.fit.model import TransferModel
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
    memorization,
    per_class_scores,
    spectra,
    spectral_difference,
)
from tgdp_fast.models.xresnet1d import XResNet1d
from tgdp_fast.runtime.checkpoint import described, load_checkpoint, save_checkpoint, signature_of
from tgdp_fast.runtime.files import save_json
from tgdp_fast.runtime.info import environment
from tgdp_fast.runtime.progress import tracked

REAL = "real"


class _About(NamedTuple):
    """A method's title and description in the report, and the stages that it pays for beside its samples."""

    title: str
    description: str
    stages: tuple[str, ...]


_METHODS = {
    REAL: _About("Real", "The few target records that methods may see, beside those that test.", ()),
    "source": _About(
        "Source model", "The source model without guidance, asked for the target's statements.", ("source",)
    ),
    "vanilla": _About("Vanilla", "A diffusion model trained on the few target records alone.", ("vanilla",)),
    "fine_tune": _About("Fine-tuning", "The source model trained further on the few target records.", ("fine_tune",)),
    "tgdp": _About(
        "TGDP",
        "The frozen source model guided by the density ratio.",
        ("statement_classifier", "density_ratio", "tgdp"),
    ),
}
#: Records whose beats are measured; each takes about 25 ms.
_MEASURED = 200
#: Test records below which the report warns.
_FEW = 100


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


def evaluate(
    run: Run,
    cohorts: Cohorts,
    samples: Mapping[str, Drawn],
    classifier: XResNet1d,
    ratio: DensityRatio,
    model: TransferModel,
) -> Report:
    """Evaluate every method; writes ``results.json`` and ``report.html``.

    The classes are the statements of the target records that methods may see. Metrics and their sources are in
    :mod:`tgdp_fast.metrics`.

    Args:
        run, cohorts: of the run.
        samples: by method, in the order of tables.
        classifier: of statements; its features are compared.
        ratio: whose values are shown.
        model: whose diagnostics are shown.
    """
    few = Drawn(cohorts.target.signals, cohorts.target.labels)
    judge = _Judge(run, cohorts, classifier, few)
    judged = tracked(list({REAL: few, **samples}.items()), "evaluation", "method", run.progress)
    methods = {name: judge.method(name, drawn) for name, drawn in judged}
    report = replace(_report(run, cohorts, list(methods.values()), ratio, model), reference=judge.statistics)

    def write() -> None:
        save_json(run.out / "results.json", _results(run, cohorts, methods, model))
        write_report(run.out / "report.html", report)

    run.once(write)
    return report


class _Judge:
    """Compares sets of records with the real test records, whose statistics are computed once."""

    def __init__(self, run: Run, cohorts: Cohorts, classifier: XResNet1d, few: Drawn) -> None:
        self.run, self.cohorts, self.few = run, cohorts, few
        self.classifier = classifier.to(run.device)
        test = cohorts.test
        self.classes = np.flatnonzero(cohorts.target.labels.any(axis=0))
        self.truth = test.labels[:, self.classes].astype(np.int64)
        self.x_test = cohorts.standardizer.apply(test.signals)
        self.features = features(self.classifier, self.x_test)
        self.statistics = self._statistics(test.signals)
        self.spectra = spectra(test.signals, test.rate)

    def method(self, name: str, drawn: Drawn) -> Method:
        """All that the report says of one method's samples."""
        target, settings = self.cohorts.target, self.run.config.evaluation
        utility = self.train_on(name, [drawn])
        augmented = {}
        if name not in (REAL, "source"):
            together = self.train_on(f"{name}+real", [drawn, self.few])
            augmented = together.intervals(self.truth, settings.bootstrap)
        quality = distances(self.features, features(self.classifier, self.cohorts.standardizer.apply(drawn.signals)))
        own_spectra = spectra(drawn.signals, target.rate)
        quality["Spectrum difference, dB"] = spectral_difference(self.spectra, own_spectra)
        beats = self._statistics(drawn.signals)
        shown = self._shown(drawn.labels)
        names = label_names((drawn.labels[shown] > 0.5).astype(np.uint8), target.vocabulary)
        title, description, stages = _METHODS[name]
        return Method(
            name=title,
            description=description,
            samples=all_leads(drawn.signals[shown], target.leads),
            labels=[", ".join(row) or "no statement" for row in names],
            metrics=utility.intervals(self.truth, settings.bootstrap),
            augmented=augmented,
            per_class=per_class_scores(self.truth, utility.scores.mean(axis=0), target.statements),
            quality=quality,
            memorization=None
            if name == REAL
            else memorization(drawn.signals, self.few.signals, self.cohorts.test.signals),
            statistics=compare_statistics(self.statistics, beats),
            beats=beats,
            spectra=spectra(all_leads(drawn.signals, target.leads), target.rate),
            cost=None if name == REAL else cost(self.run.costs.found, name),
        )

    def _shown(self, labels: np.ndarray) -> list[int]:
        """Rows to plot: one for each of the first label sets of the few real records, so that they can be compared."""
        wanted = list(dict.fromkeys(map(bytes, self.few.labels > 0.5)))[: self.run.config.evaluation.plots]
        found = list(map(bytes, labels > 0.5))
        return [found.index(row) for row in wanted if row in found]

    def train_on(self, name: str, parts: Sequence[Drawn]) -> Utility:
        """Train classifiers on some sets of records together and score the test records."""
        settings, run = self.run.config.evaluation, self.run
        x = self.cohorts.standardizer.apply(np.concatenate([part.signals for part in parts]))
        y = np.concatenate([part.labels for part in parts])[:, self.classes]

        def compute(state_dir: Path | None) -> Utility:
            scores = []
            for index in range(settings.seeds):
                # The same initial weights and batches for all methods.
                seed = run.seed(f"judge {index}")
                network = train_ecg_classifier(
                    x,
                    y,
                    network=new_classifier(settings.classifier, x, len(self.classes), seed),
                    settings=settings.classifier.training,
                    seed=seed,
                    device=run.device,
                    progress=run.progress,
                    description=f"judge of {name}",
                    state_dir=None if state_dir is None else state_dir.with_suffix(f".{index}"),
                )
                scores.append(predict(network, self.x_test))
            return Utility(np.stack(scores))

        signature = signature_of(x, y, self.x_test, asdict(settings.classifier), settings.seeds, run.config.seed)
        return run.stages.run(f"judge-{name}", signature, compute, _save_utility, _load_utility, alone=True)

    def _statistics(self, signals: np.ndarray) -> ECGStatistics:
        return ecg_statistics(signals[:_MEASURED], self.cohorts.target.rate, self.cohorts.target.leads)


def distances(real: np.ndarray, generated: np.ndarray) -> dict[str, float]:
    """Distances between features [N, F] of real test records and of samples."""
    k = min(5, len(real) - 1, len(generated) - 1)
    spread = density_and_coverage(real, generated, k=k)
    return {
        "Fréchet distance": frechet_distance(real, generated),
        f"density (k = {k})": spread.density,
        f"coverage (k = {k})": spread.coverage,
    }


def all_leads(signals: np.ndarray, leads: Sequence[str]) -> np.ndarray:
    """The twelve leads of the eight stored ones; other leads as they are."""
    return twelve_leads(signals) if tuple(leads) == tuple(STORED_LEADS) else signals


def cost(found: Mapping[str, Mapping[str, Any]], name: str) -> Cost:
    """Cost of one method: the networks trained for it, without a source model that it starts from, and its samples.

    Args:
        found: costs by stage, see :class:`tgdp_fast.ecg.costs.Costs`.
        name: of the method.
    """
    trained = [found[stage] for stage in _METHODS[name].stages if stage in found]
    drawn = found.get(f"samples-{name}", {})
    return Cost(
        # The cost of a source model from a checkpoint is unknown.
        trainable_parameters=sum(row.get("parameters", 0) for row in trained) if trained else None,
        training_seconds=sum(row["seconds"] for row in trained) if trained else None,
        sampling_seconds=drawn.get("seconds"),
        memory_bytes=max((row["peak_bytes"] for row in [*trained, drawn] if "peak_bytes" in row), default=None),
    )


def _results(run: Run, cohorts: Cohorts, methods: Mapping[str, Method], model: TransferModel) -> dict[str, Any]:
    """All numbers of the report, JSON-able."""
    copies = ("median_ratio", "low_ratio", "nearer", "copies")
    rows = {
        name: {
            "metrics": {key: asdict(value) for key, value in method.metrics.items()},
            "with_real": {key: asdict(value) for key, value in method.augmented.items()},
            "per_class": [asdict(row) for row in method.per_class],
            "quality": dict(method.quality),
            "memorisation": method.memorization and {key: getattr(method.memorization, key) for key in copies},
            "statistics": [asdict(row) for row in method.statistics],
            "beats": method.beats
            and {"measured": method.beats.measured, "failed": method.beats.failed, "noise": method.beats.noise},
        }
        for name, method in methods.items()
    }
    return {
        "environment": environment(),
        "counts": counts(run, cohorts),
        "dropped": {
            domain: [[problem.record, problem.reason] for problem in getattr(cohorts, domain).problems]
            for domain in DOMAINS
        },
        "diagnostics": model.diagnostics,
        "costs": run.costs.found,
        "methods": rows,
    }


def counts(run: Run, cohorts: Cohorts) -> dict[str, int]:
    """Numbers of records."""
    return {
        "source records": len(cohorts.source),
        "target records that methods see": len(cohorts.target),
        "target records that test": len(cohorts.test),
        "samples of each method": run.config.sampling.num,
        **{f"{domain} records dropped": len(getattr(cohorts, domain).problems) for domain in DOMAINS},
    }


def _report(run: Run, cohorts: Cohorts, methods: Sequence[Method], ratio: DensityRatio, model: TransferModel) -> Report:
    source, tested, config = cohorts.source, len(cohorts.test), run.config
    few_tested = f"{tested} test records are few: differences within the intervals say nothing."
    return Report(
        title="ECG transfer",
        methods=methods,
        rate=source.rate,
        leads=TWELVE_LEADS if source.leads == STORED_LEADS else source.leads,
        summary=(f"{SMOKE[0].upper()}{SMOKE[1:]}.\n" if config.preset == "smoke" else "")
        + (
            f"{config.sampling.num} samples of each method, for the statements of {len(cohorts.target)} "
            f"target records; source model of {len(source)} records. Classifiers trained on samples are tested "
            f"on {tested} real target records that no method has seen."
        ),
        warnings=[*model.diagnostics["warnings"], *([few_tested] if tested < _FEW else [])],
        diagnostics=model.diagnostics,
        sizes={"source model": _size(model.denoiser), "Guidance of TGDP": _size(model.guidance)},
        log_ratios={"source": ratio.source_log_ratio.numpy(), "target": ratio.target_log_ratio.numpy()},
        counts=counts(run, cohorts),
        provenance={"tgdp_fast": __version__, "torch": torch.__version__, **environment()},
        settings=to_dict(config),
    )


def _size(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _save_utility(utility: Utility, path: Path) -> None:
    save_checkpoint(path, "judge", {}, {"scores": torch.from_numpy(utility.scores)})


def _load_utility(path: Path) -> Utility:
    tensors = load_checkpoint(path, "judge")[1]
    with described(path, "Utility"):
        return Utility(tensors["scores"].numpy())
