"""The density ratio of target to source at all records (TGDP Algorithm 1), and the classifiers behind it."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tgdp_fast.ecg.classifier import features, train_ecg_classifier
from tgdp_fast.ecg.cohorts import Cohorts
from tgdp_fast.ecg.config import Classifier
from tgdp_fast.ecg.run import Run
from tgdp_fast.fit.density_ratio import DensityRatio, fit_density_ratio
from tgdp_fast.fit.diagnostics import TransferDiagnostics, diagnose
from tgdp_fast.models.xresnet1d import XResNet1d
from tgdp_fast.runtime.checkpoint import described, load_checkpoint, save_checkpoint, signature_of
from tgdp_fast.runtime.randomness import seeded_initialization

Ratio = tuple[DensityRatio, TransferDiagnostics]


class SignalDomainClassifier(nn.Module):
    """P(target | x[, y]) from signals: an xresnet1d's features and label rows into one linear layer.

    ``forward(x [B, leads, L], label rows [B, K] or None)`` gives the logit [B].
    """

    def __init__(self, settings: Classifier, leads: int, num_classes: int = 0) -> None:
        super().__init__()
        self.body = XResNet1d(leads, 1, blocks=settings.blocks, expansion=settings.expansion, width=settings.width)
        self.label = nn.Linear(num_classes, 1, bias=False, dtype=torch.float32) if num_classes else None

    def forward(self, x: Tensor, label_rows: Tensor | None = None) -> Tensor:
        logit: Tensor = self.body(x)
        if self.label is not None and label_rows is not None:
            logit = logit + self.label(label_rows)
        return logit[:, 0]


def new_classifier(settings: Classifier, x: np.ndarray, num_classes: int, seed: int) -> XResNet1d:
    """An untrained classifier of signals like ``x`` [N, leads, L]."""
    with seeded_initialization(seed):
        return XResNet1d(
            x.shape[1], num_classes, blocks=settings.blocks, expansion=settings.expansion, width=settings.width
        )


def train_statement_classifier(run: Run, cohorts: Cohorts) -> XResNet1d:
    """A classifier of the source's statements; frozen, it makes features of signals."""
    x, labels = cohorts.x_source, cohorts.source.labels
    settings, seed = run.config.evaluation.classifier, run.seed("statement classifier")

    def compute(state_dir: Path | None) -> XResNet1d:
        with run.costs.of("statement_classifier"):
            return train_ecg_classifier(
                x,
                labels,
                network=new_classifier(settings, x, labels.shape[1], seed),
                settings=settings.training,
                seed=seed,
                progress=run.progress,
                state_dir=state_dir,
                device=run.device,
            )

    signature = signature_of(x, labels, asdict(settings), seed)
    return run.stages.run("statement_classifier", signature, compute, XResNet1d.save, XResNet1d.load, alone=True)


def estimate_ratio(run: Run, cohorts: Cohorts, classifier: XResNet1d) -> Ratio:
    """The ratio at all source and target records, computed once, and its diagnostics.

    Args:
        run, cohorts: of the run.
        classifier: of statements; its features are what domains are told apart by, or are at least diagnosed by.
    """
    guidance, settings, seed = run.config.guidance, run.config.evaluation.classifier, run.seed("density ratio")
    x = (cohorts.x_source, cohorts.x_target)
    labels = (cohorts.source.labels, cohorts.target.labels) if guidance.conditional else (None, None)

    def compute(state_dir: Path | None) -> Ratio:
        with run.costs.of("density_ratio"):
            described = [torch.from_numpy(features(classifier.to(run.device), part)) for part in x]
            # An MLP wants features of unit scale.
            deviation, mean = torch.std_mean(described[0], dim=0)
            described = [(part - mean) / deviation.clamp_min(1e-6) for part in described]
            inputs, build, training = described, None, None
            if guidance.domain_classifier != "features":
                inputs, training = [torch.from_numpy(part) for part in x], settings.training
                classes = len(cohorts.source.vocabulary) if guidance.conditional else 0
                build = partial(SignalDomainClassifier, settings, x[0].shape[1], classes)
            source_labels, target_labels = (as_tensor(part, run.device) for part in labels)
            ratio = fit_density_ratio(
                *(part.to(run.device) for part in inputs),
                source_labels=source_labels,
                target_labels=target_labels,
                build=build,
                settings=training,
                seed=seed,
                progress=run.progress,
            )
            return ratio, diagnose(described[0], described[1], ratio)

    signature = signature_of(classifier, *x, *labels, asdict(guidance), seed)
    return run.stages.run("density_ratio", signature, compute, _save_ratio, _load_ratio, alone=True)


def as_tensor(labels: np.ndarray | None, device: str) -> Tensor | None:
    """Labels on a device."""
    return None if labels is None else torch.from_numpy(labels).float().to(device)


_TENSORS = ("source_log_ratio", "target_log_ratio", "source_logit", "target_logit")


def _save_ratio(result: Ratio, path: Path) -> None:
    ratio, diagnostics = result
    config = {"slope": ratio.slope, "mean_ratio": ratio.mean_ratio, "diagnostics": diagnostics.to_dict()}
    save_checkpoint(path, "density_ratio", config, {name: getattr(ratio, name) for name in _TENSORS})


def _load_ratio(path: Path) -> Ratio:
    config, tensors = load_checkpoint(path, "density_ratio")
    with described(path, "DensityRatio"):
        named = {name: tensors[name] for name in _TENSORS}
        ratio = DensityRatio(**named, slope=config["slope"], mean_ratio=config["mean_ratio"], classifiers=())
        return ratio, TransferDiagnostics(**config["diagnostics"])
