"""The stages of an ECG transfer (TGDP section 4.2), each kept in a folder and resumable after a kill at any moment.

Several processes under torchrun run the same stages together: trainings share batches, samples are drawn in parts.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tgdp_fast._version import __version__
from tgdp_fast.diffusion.denoiser import Denoiser
from tgdp_fast.diffusion.prior import EmpiricalPrior, GaussianPrior, Prior
from tgdp_fast.diffusion.solvers import solver_table
from tgdp_fast.ecg.classifier import features, train_ecg_classifier
from tgdp_fast.ecg.cohorts import Cohorts, load_cohorts
from tgdp_fast.ecg.config import Classifier, Config, to_dict
from tgdp_fast.ecg.costs import Costs
from tgdp_fast.ecg.records.output import MANIFEST, write_ecg_records
from tgdp_fast.ecg.records.statements import label_names
from tgdp_fast.fit.density_ratio import DensityRatio, fit_density_ratio
from tgdp_fast.fit.diagnostics import TransferDiagnostics, diagnose
from tgdp_fast.fit.guidance import fit_guidance, mean_h
from tgdp_fast.fit.model import TransferModel, load_fit, save_fit
from tgdp_fast.fit.training import Optimisation, derived_seed, seeded_initialisation, train_denoiser
from tgdp_fast.models import SSSDECG
from tgdp_fast.models.xresnet1d import XResNet1d
from tgdp_fast.runtime import distributed
from tgdp_fast.runtime.arrays import Standardizer
from tgdp_fast.runtime.checkpoint import checkpoint_kind, load_checkpoint, save_checkpoint, signature_of
from tgdp_fast.runtime.files import save_json
from tgdp_fast.runtime.stages import Stages
from tgdp_fast.sampling.to_file import sample_to_file

#: Source records that a prior is fitted to: its cost grows with their square.
_PRIOR_ROWS = 2000


@dataclass(frozen=True)
class Drawn:
    """Samples of one method: float32 [N, leads, L] in mV, and the labels [N, K] that they were drawn for."""

    signals: np.ndarray
    labels: np.ndarray


class Pipeline:
    """One run in one folder: ``cache`` (records), ``stages`` (networks, ratios, samples), ``model``, ``costs.json``.

    Everything is computed when it is first asked for, and loaded where the folder has it already.

    Args:
        config: see :mod:`tgdp_fast.ecg.config`.
        out: the folder.
        device: of this process, where it differs from the configuration's.
        progress: show progress.
    """

    def __init__(
        self, config: Config, out: str | os.PathLike[str], *, device: str | None = None, progress: bool = False
    ) -> None:
        self.config = config
        self.device = device or config.device
        self.out = Path(out)
        self.progress = progress
        self.stages = Stages(self.out / "stages")
        self.costs = Costs(self.out / "costs.json", self.device)
        if distributed.is_first():
            self.out.mkdir(parents=True, exist_ok=True)
            save_json(self.out / "config.json", {"tgdp_fast": __version__, **to_dict(config)})
        distributed.barrier()

    # ------------------------------------------------------------------------------------------------- data

    @cached_property
    def cohorts(self) -> Cohorts:
        """Records of both domains, divided, and how they are standardised."""
        cohorts = load_cohorts(self.config.data, self.out / "cache", progress=self.progress)
        if not self.config.backbone.checkpoint:
            return cohorts
        model = self._given
        if isinstance(model, TransferModel):
            return replace(cohorts, standardizer=model.standardizer)
        if self.config.backbone.checkpoint_units == "standardised":
            return cohorts
        return replace(cohorts, standardizer=Standardizer.identity(cohorts.source.signals.shape[1:]))

    @cached_property
    def x_source(self) -> np.ndarray:
        """Source training signals in the coordinates of the networks: float32 [M, leads, L]."""
        return self.cohorts.standardizer.apply(np.asarray(self.cohorts.source.signals))

    @cached_property
    def x_target(self) -> np.ndarray:
        """The target signals that methods may see, likewise."""
        return self.cohorts.standardizer.apply(np.asarray(self.cohorts.target.signals))

    # --------------------------------------------------------------------------------------------- denoisers

    def untrained(self, name: str) -> Denoiser:
        """A denoiser with fresh weights."""
        backbone, cohorts = self.config.backbone, self.cohorts
        leads, length = cohorts.source.signals.shape[1:]
        with seeded_initialisation(derived_seed(self.config.seed, name)):
            network = SSSDECG(
                in_channels=leads,
                out_channels=leads,
                res_channels=backbone.res_channels,
                skip_channels=backbone.res_channels,
                num_res_layers=backbone.num_res_layers,
                step_dims=(backbone.step_features, backbone.step_embedding, backbone.step_embedding),
                num_classes=len(cohorts.vocabulary),
                label_dim=backbone.label_dim,
                l_max=length,
                d_state=backbone.d_state,
            )
        return Denoiser(network, self.config.backbone.schedule())

    @cached_property
    def source_model(self) -> Denoiser:
        """Trained on the source, or loaded from the checkpoint that the configuration names."""
        if self.config.backbone.checkpoint:
            return self._released()
        return self._trained("source", self.untrained("source"), self.config.source)

    @cached_property
    def vanilla(self) -> Denoiser:
        """Trained on the few target records alone (TGDP section 4, "vanilla diffusion")."""
        return self._trained("vanilla", self.untrained("vanilla"), self.config.vanilla)

    @cached_property
    def fine_tuned(self) -> Denoiser:
        """The source model trained further on the few target records."""
        return self._trained("fine_tune", self.source_model, self.config.fine_tune)

    def _trained(self, name: str, initial: Denoiser, settings: Optimisation) -> Denoiser:
        data = self.cohorts.source if name == "source" else self.cohorts.target
        x = self.x_source if name == "source" else self.x_target
        seed = derived_seed(self.config.seed, f"training {name}")

        def train(state_dir: Path | None) -> Denoiser:
            with self.costs.of(name, initial):
                return train_denoiser(
                    x,
                    labels=data.labels,
                    initial=initial.to(self.device),
                    settings=settings,
                    seed=seed,
                    progress=self.progress,
                    description=name,
                    state_dir=state_dir,
                ).cpu()

        signature = signature_of(x, data.labels, initial, asdict(settings), seed)
        return self.stages.run(name, signature, train, Denoiser.save, Denoiser.load)

    @cached_property
    def _given(self) -> Denoiser | TransferModel:
        """The model that the configuration names: one of this package, or a released file of SSSD-ECG."""
        backbone = self.config.backbone
        path = Path(backbone.checkpoint)
        if not path.is_dir():
            return Denoiser(SSSDECG.from_checkpoint(path, cauchy=backbone.cauchy), backbone.schedule())
        return TransferModel.load(path) if checkpoint_kind(path) == "transfer_model" else Denoiser.load(path)

    def _released(self) -> Denoiser:
        """That model's denoiser, for signals of this length and these statements."""
        path, model = self.config.backbone.checkpoint, self._given
        denoiser = model.denoiser if isinstance(model, TransferModel) else model
        wanted = tuple(self.cohorts.source.signals.shape[1:])
        if denoiser.event_shape != wanted or denoiser.num_classes != len(self.cohorts.vocabulary):
            raise ValueError(
                f"backbone.checkpoint: {path} works on signals of shape {denoiser.event_shape} with "
                f"{denoiser.num_classes} statements, but the records have {wanted} and "
                f"{len(self.cohorts.vocabulary)}; change data.rate or data.seconds, or train a source model"
            )
        return denoiser.eval()

    # ----------------------------------------------------------------------------------------------- guidance

    @cached_property
    def statement_classifier(self) -> XResNet1d:
        """Trained on the source's statements; frozen, it makes features of signals."""
        settings = self.config.evaluation.classifier
        seed = derived_seed(self.config.seed, "statement classifier")

        def train(state_dir: Path | None) -> XResNet1d:
            with self.costs.of("statement_classifier"):
                return train_ecg_classifier(
                    self.x_source,
                    self.cohorts.source.labels,
                    network=new_classifier(settings, self.x_source, len(self.cohorts.vocabulary), seed),
                    settings=settings.training,
                    seed=seed,
                    progress=self.progress,
                    state_dir=state_dir,
                    device=self.device,
                )

        signature = signature_of(self.x_source, self.cohorts.source.labels, asdict(settings), seed)
        return self.stages.run("statement_classifier", signature, train, XResNet1d.save, XResNet1d.load, alone=True)

    def features(self, x: np.ndarray) -> np.ndarray:
        """Features [N, F] of standardised signals, by the frozen statement classifier."""
        return features(self.statement_classifier.to(self.device), x)

    @cached_property
    def _labels(self) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
        if not self.config.guidance.conditional:
            return None, None
        return self.cohorts.source.labels, self.cohorts.target.labels

    @cached_property
    def ratio(self) -> tuple[DensityRatio, TransferDiagnostics]:
        """Density ratio of target to source at all records, computed once (Algorithm 1), and what to think of it."""
        guidance, settings = self.config.guidance, self.config.evaluation.classifier
        seed = derived_seed(self.config.seed, "density ratio")
        source_labels, target_labels = self._labels
        by_features = guidance.domain_classifier == "features"

        def fit(state_dir: Path | None) -> tuple[DensityRatio, TransferDiagnostics]:
            with self.costs.of("density_ratio"):
                described = [torch.from_numpy(self.features(x)) for x in (self.x_source, self.x_target)]
                # Perceptrons want features of unit scale.
                deviation, mean = torch.std_mean(described[0], dim=0)
                described = [(part - mean) / deviation.clamp_min(1e-6) for part in described]
                inputs = described if by_features else [torch.from_numpy(x) for x in (self.x_source, self.x_target)]
                ratio = fit_density_ratio(
                    *(part.to(self.device) for part in inputs),
                    source_labels=_tensor(source_labels, self.device),
                    target_labels=_tensor(target_labels, self.device),
                    build=None if by_features else self._domain_classifier(settings),
                    settings=None if by_features else settings.training,
                    seed=seed,
                    progress=self.progress,
                )
                return ratio, diagnose(described[0], described[1], ratio)

        signature = signature_of(
            self.statement_classifier,
            self.x_source,
            self.x_target,
            source_labels,
            target_labels,
            asdict(guidance),
            seed,
        )
        return self.stages.run("density_ratio", signature, fit, _save_ratio, _load_ratio, alone=True)

    def _domain_classifier(self, settings: Classifier) -> Any:
        leads = self.x_source.shape[1]
        classes = len(self.cohorts.vocabulary) if self.config.guidance.conditional else 0
        return lambda: SignalDomainClassifier(settings, leads, classes)

    @cached_property
    def model(self) -> TransferModel:
        """Source model and guidance with the standardisation and all that sampling needs; kept in ``<out>/model``."""
        guidance, cohorts = self.config.guidance, self.cohorts
        ratio, diagnostics = self.ratio
        source_labels, _ = self._labels
        denoiser = self.source_model
        stem = "ecg" if self.x_source.shape[2] >= _LONG else "none"
        seed = derived_seed(self.config.seed, "guidance")

        def fit(state_dir: Path | None) -> Any:
            with self.costs.of("tgdp"):
                # In the consistency term the source model is only evaluated: so by its fast form.
                compiled = denoiser.to(self.device).compile_for_sampling() if guidance.consistency else None
                fitted = fit_guidance(
                    self.x_source,
                    self.x_target,
                    denoiser.schedule if compiled is None else None,
                    denoiser=compiled,
                    source_labels=cohorts.source.labels,
                    target_labels=cohorts.target.labels,
                    num_classes=len(cohorts.vocabulary),
                    conditional=guidance.conditional,
                    loss=guidance.loss,
                    consistency=guidance.consistency,
                    cycle=guidance.cycle,
                    ratio=ratio,
                    width=guidance.width,
                    depth=guidance.depth,
                    alpha_power=guidance.alpha_power,
                    stem=stem,
                    settings=guidance.training,
                    time_distribution=guidance.time_distribution,
                    diagnostics=False,
                    seed=seed,
                    device=self.device,
                    progress=self.progress,
                    state_dir=state_dir,
                )
                self.costs.count("tgdp", fitted.guidance)
                return fitted

        signature = signature_of(
            self.x_source, self.x_target, cohorts.source.labels, cohorts.target.labels, denoiser, asdict(guidance),
            seed, ratio.source_log_ratio, stem,
        )  # fmt: skip
        fitted = self.stages.run("guidance", signature, fit, save_fit, lambda path: load_fit(path, None))
        denoiser.cpu()
        network = fitted.guidance.cpu()
        diagnostics = replace(diagnostics, warnings=list(diagnostics.warnings))
        diagnostics.add_mean_h(
            mean_h(network, torch.from_numpy(self.x_source), labels=_tensor(source_labels, "cpu"), limit=512, seed=seed)
        )
        config = {"ecg": {"rate": cohorts.rate, "leads": list(cohorts.leads), "statements": list(cohorts.vocabulary)}}
        prior = self._prior("tgdp")
        model = TransferModel(
            denoiser, network, cohorts.standardizer, diagnostics.to_dict(), {**fitted.config, **config}, prior
        )
        if distributed.is_first():
            model.save(self.out / "model")
        distributed.barrier()
        return model

    def _prior(self, method: str) -> Prior | None:
        kind = self.config.sampling.prior
        if kind == "standard":
            return None
        x, weights = (self.x_source, None) if method in ("source", "tgdp") else (self.x_target, None)
        if method == "tgdp":
            weights = self.ratio[0].source_log_ratio.double().softmax(0).numpy()
        if len(x) > _PRIOR_ROWS:
            rows = np.random.default_rng(self.config.seed).permutation(len(x))[:_PRIOR_ROWS]
            x, weights = x[rows], None if weights is None else weights[rows]
        return GaussianPrior.fit(x, weights=weights) if kind == "gaussian" else EmpiricalPrior(x, weights=weights)

    # ------------------------------------------------------------------------------------------------- samples

    @cached_property
    def sample_labels(self) -> np.ndarray:
        """Labels [num, K] to draw samples for: those of the target records that methods may see, each equally often."""
        labels = self.cohorts.target.labels
        random = np.random.default_rng(derived_seed(self.config.seed, "labels"))
        passes = -(-self.config.sampling.num // len(labels))
        rows = np.concatenate([random.permutation(len(labels)) for _ in range(passes)])
        return labels[rows[: self.config.sampling.num]]

    def denoiser(self, method: str) -> Denoiser:
        """The denoiser that ``method`` samples with."""
        if method == "vanilla":
            return self.vanilla
        return self.fine_tuned if method == "fine_tune" else self.source_model

    def samples(self, method: str) -> Drawn:
        """Samples of one of the methods, for :attr:`sample_labels`."""
        sampling, labels = self.config.sampling, self.sample_labels
        denoiser = self.denoiser(method)
        guidance = self.model.guidance if method == "tgdp" else None
        name = f"samples-{method}"
        prior = self.model.prior if method == "tgdp" else self._prior(method)

        def draw(state_dir: Path | None) -> np.ndarray:
            assert state_dir is not None
            with self.costs.of(name):
                folder = state_dir.with_suffix(".parts")
                folder.mkdir(parents=True, exist_ok=True)
                table = solver_table(sampling.solver, denoiser.schedule, sampling.steps, spacing=sampling.spacing)
                compiled = denoiser.to(self.device).compile_for_sampling(table, precision=sampling.precision)
                parts = distributed.parts(sampling.num)
                files = [folder / f"{part.start}-{part.stop}.npy" for part in parts]
                own, file = parts[distributed.rank()], files[distributed.rank()]
                if len(own):
                    sample_to_file(
                        file,
                        compiled,
                        None if guidance is None else guidance.to(self.device),
                        num=len(own),
                        first_index=own.start,
                        labels=labels[own.start : own.stop],
                        solver=table,
                        scale=sampling.scale,
                        gradient_norm_limit=sampling.gradient_norm_limit or None,
                        prior=prior,
                        seed=sampling.seed,
                        batch_size=sampling.batch_size,
                        progress=self.progress,
                    )
                distributed.barrier()
                drawn = [np.load(file, allow_pickle=False) for file, part in zip(files, parts, strict=True) if part]
                distributed.barrier()  # The first process removes the files when it has saved them together.
                denoiser.cpu()
                return self.cohorts.standardizer.invert(np.concatenate(drawn))

        def save(signals: np.ndarray, place: Path) -> None:
            save_checkpoint(place, "samples", {}, {"signals": torch.from_numpy(signals)})
            shutil.rmtree((self.stages.folder or self.out) / f"{name}.parts")

        signature = signature_of(
            denoiser,
            guidance,
            labels,
            asdict(sampling),
            *([] if prior is None else prior.to_tensors().values()),
        )
        signals = self.stages.run(
            name, signature, draw, save, lambda path: load_checkpoint(path, "samples")[1]["signals"].numpy()
        )
        return Drawn(signals, labels)

    def write_records(self, method: str) -> Path:
        """Samples of a method as WFDB records with labels and a manifest, in ``<out>/records``, in place of others."""
        drawn, sampling, cohorts = self.samples(method), self.config.sampling, self.cohorts
        place = self.out / "records"
        if distributed.is_first():
            if (place / MANIFEST).is_file():  # Anything else in the way is refused by what writes.
                shutil.rmtree(place)
            write_ecg_records(
                place,
                drawn.signals,
                rate=cohorts.rate,
                labels=label_names((drawn.labels > 0.5).astype(np.uint8), cohorts.vocabulary),
                leads=cohorts.leads,
                manifest={
                    "method": method,
                    "model": self.model.signature(),
                    "seed": sampling.seed,
                    "solver": sampling.solver,
                    "steps": sampling.steps,
                    "spacing": sampling.spacing,
                    "scale": sampling.scale,
                    "prior": sampling.prior,
                    "precision": sampling.precision,
                },
            )
        distributed.barrier()
        return place


#: From this length on the guidance network has the two convolutions of the paper's before its perceptron.
_LONG = 256


class SignalDomainClassifier(nn.Module):
    """P(target | x[, y]) from signals: an xresnet1d's features and label rows into one linear layer.

    ``forward(x [B, leads, L], label rows [B, K] or None)`` gives the logit [B].
    """

    def __init__(self, settings: Classifier, leads: int, num_classes: int = 0) -> None:
        super().__init__()
        self.body = XResNet1d(leads, 1, blocks=settings.blocks, expansion=settings.expansion, width=settings.width)
        self.label = nn.Linear(num_classes, 1, bias=False) if num_classes else None

    def forward(self, x: Tensor, label_rows: Tensor | None = None) -> Tensor:
        logit: Tensor = self.body(x)
        if self.label is not None and label_rows is not None:
            logit = logit + self.label(label_rows)
        return logit[:, 0]


def new_classifier(settings: Classifier, x: np.ndarray, num_classes: int, seed: int) -> XResNet1d:
    """An untrained classifier of signals like ``x`` [N, leads, L]."""
    with seeded_initialisation(seed):
        return XResNet1d(
            x.shape[1], num_classes, blocks=settings.blocks, expansion=settings.expansion, width=settings.width
        )


def _tensor(labels: np.ndarray | None, device: str) -> Tensor | None:
    return None if labels is None else torch.from_numpy(labels).float().to(device)


_RATIO = ("source_log_ratio", "target_log_ratio", "source_logit", "target_logit")


def _save_ratio(result: tuple[DensityRatio, TransferDiagnostics], path: Path) -> None:
    ratio, diagnostics = result
    config = {"slope": ratio.slope, "mean_ratio": ratio.mean_ratio, "diagnostics": diagnostics.to_dict()}
    save_checkpoint(path, "density_ratio", config, {name: getattr(ratio, name) for name in _RATIO})


def _load_ratio(path: Path) -> tuple[DensityRatio, TransferDiagnostics]:
    config, tensors = load_checkpoint(path, "density_ratio")
    ratio = DensityRatio(
        **{name: tensors[name] for name in _RATIO},
        slope=config["slope"],
        mean_ratio=config["mean_ratio"],
        classifiers=(),
    )
    return ratio, TransferDiagnostics(**config["diagnostics"])
