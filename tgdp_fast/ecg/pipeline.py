"""The stages of an ECG transfer (TGDP section 4.2), each kept in a folder and resumable after a kill at any moment.

Several processes under torchrun run the same stages together: trainings share batches, samples are drawn in parts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from tgdp_fast.diffusion.denoiser import Denoiser
from tgdp_fast.ecg import denoisers
from tgdp_fast.ecg.cohorts import Cohorts, check_folders, load_cohorts
from tgdp_fast.ecg.config import METHODS, Config
from tgdp_fast.ecg.density_ratio import Ratio, estimate_ratio, train_statement_classifier
from tgdp_fast.ecg.drawing import Drawn, draw_samples, write_samples
from tgdp_fast.ecg.evaluation import evaluate
from tgdp_fast.ecg.guidance import fit_model, fit_prior
from tgdp_fast.ecg.report import Report
from tgdp_fast.ecg.run import Run
from tgdp_fast.fit.model import TransferModel
from tgdp_fast.models.xresnet1d import XResNet1d
from tgdp_fast.runtime.checks import check_choice
from tgdp_fast.runtime.stages import owned

P = ParamSpec("P")
R = TypeVar("R")


class NotComputedError(AttributeError):
    """A result was read before the method that computes it was called."""


#: Results by the method that computes them.
_COMPUTED_BY = {
    "cohorts": "read",
    "classifier": "estimate_ratio",
    "ratio": "estimate_ratio",
    "model": "fit",
    "report": "evaluate",
}


def _owning(
    method: Callable[Concatenate[Pipeline, P], R],
) -> Callable[Concatenate[Pipeline, P], R]:
    """The method, with the folder of the run owned meanwhile."""

    @wraps(method)
    def owning(self: Pipeline, *arguments: P.args, **options: P.kwargs) -> R:
        with owned(self.run.out):
            return method(self, *arguments, **options)

    return owning


class Pipeline:
    """One run in one folder: ``cache`` (records), ``stages`` (networks, ratios, samples), ``model``, ``costs.json``.

    The methods :meth:`fit`, :meth:`draw` and :meth:`evaluate`, and their parts :meth:`read`, :meth:`train` and
    :meth:`estimate_ratio`, compute. Each calls the ones that it needs and loads what the folder already has.
    Attributes hold results and never compute.

    Args:
        config: see :mod:`tgdp_fast.ecg.config`.
        out: the folder; nothing is written before the first method is called.
        progress: show progress.

    Attributes:
        run: settings, folder, device, stages and costs.
        cohorts: records of both domains, divided, and how they are standardized.
        denoisers: trained or given, by name: "source", "vanilla", "fine_tune".
        classifier: of statements; frozen, it makes features of signals.
        ratio: density ratio of target to source at all records, and its diagnostics.
        model: source model and guidance with all that sampling needs; also in ``<out>/model``.
        samples: by method.
        report: of :meth:`evaluate`; also ``<out>/report.html``.

    Raises:
        ValueError: a device that torch does not have.
        InUseError: from a method, if another run works in the folder.
        NotComputedError: from an attribute that has not been computed.
    """

    cohorts: Cohorts
    classifier: XResNet1d
    ratio: Ratio
    model: TransferModel
    report: Report

    def __init__(self, config: Config, out: str | os.PathLike[str], *, progress: bool = False) -> None:
        self.run = Run(config, out, progress=progress)
        self.denoisers: dict[str, Denoiser] = {}
        self.samples: dict[str, Drawn] = {}
        self._given: Denoiser | TransferModel | None = None

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name in _COMPUTED_BY:
                raise NotComputedError(f"{name} has not been computed; call pipeline.{_COMPUTED_BY[name]}() first")
            raise AttributeError(f"Pipeline has no attribute {name!r}")

    @_owning
    def read(self) -> Cohorts:
        """Read both folders of records, through caches, and divide them.

        Raises:
            ValueError: a folder is not given, has no usable records or too few to divide.
        """
        if not hasattr(self, "cohorts"):
            config = self.run.config
            check_folders(config.data)
            self.run.open()
            cohorts = load_cohorts(config.data, self.run.out / "cache", progress=self.run.progress)
            self._given = denoisers.given_model(config.backbone)
            self.cohorts = denoisers.in_units_of(self._given, config.backbone, cohorts)
        return self.cohorts

    @_owning
    def train(self, name: str) -> Denoiser:
        """Train one denoiser, or take the given one.

        Args:
            name: "source"; "vanilla", trained on the few target records alone (TGDP section 4, "vanilla diffusion");
                or "fine_tune", the source model trained further on them.

        Raises:
            ValueError: the given model is for other signals or statements.
        """
        if check_choice("name", name, ("source", "vanilla", "fine_tune")) not in self.denoisers:
            cohorts, run = self.read(), self.run
            if name == "source" and self._given is not None:
                denoiser = denoisers.given_denoiser(self._given, run.config.backbone, cohorts)
            else:
                initial = self.train("source") if name == "fine_tune" else denoisers.untrained(run, cohorts, name)
                denoiser = denoisers.train(run, cohorts, name, initial)
            self.denoisers[name] = denoiser
        return self.denoisers[name]

    @_owning
    def estimate_ratio(self) -> Ratio:
        """Train the statement classifier on the source, and estimate the density ratio by its features or signals."""
        if not hasattr(self, "ratio"):
            cohorts = self.read()
            self.classifier = train_statement_classifier(self.run, cohorts)
            self.ratio = estimate_ratio(self.run, cohorts, self.classifier)
        return self.ratio

    @_owning
    def fit(self) -> TransferModel:
        """Train the source model, estimate the ratio, fit the guidance; the model is saved in ``<out>/model``."""
        if not hasattr(self, "model"):
            denoiser = self.train("source")
            self.model = fit_model(self.run, self.read(), denoiser, self.estimate_ratio())
        return self.model

    @_owning
    def draw(self, *methods: str) -> dict[str, Drawn]:
        """Draw samples of some methods, by default all of the configuration; trains what they need."""
        methods = methods or self.run.config.methods
        for method in methods:
            if check_choice("methods", method, METHODS) in self.samples:
                continue
            if method == "tgdp":
                model = self.fit()
                denoiser, guidance, prior = model.denoiser, model.guidance, model.prior
            else:
                denoiser, guidance = self.train(method), None
                prior = fit_prior(self.run, self.read(), method)
            self.samples[method] = draw_samples(self.run, self.read(), method, denoiser, guidance, prior)
        return {method: self.samples[method] for method in methods}

    @_owning
    def evaluate(self) -> Report:
        """Draw samples of every method and compare them with real records; writes ``results.json`` and
        ``report.html``.
        """
        self.fit()
        self.report = evaluate(self.run, self.cohorts, self.draw(), self.classifier, self.ratio[0], self.model)
        return self.report

    @_owning
    def write_records(self, method: str = "tgdp") -> Path:
        """Write the samples of a method as WFDB records with labels and a manifest, in ``<out>/records``.

        Raises:
            ValueError: something else lies there.
        """
        drawn = self.draw(method)[method]
        return write_samples(self.run, self.cohorts, method, drawn, self.fit())
