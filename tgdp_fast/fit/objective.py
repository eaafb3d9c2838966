"""The objective of a fit: the loss and the regularizers of a configuration, on fresh batches of both domains."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tgdp_fast.diffusion.denoiser import labels_for
from tgdp_fast.diffusion.guidance import GuidanceNetwork
from tgdp_fast.diffusion.guided import EpsilonModel
from tgdp_fast.fit.batches import Batches, draw_noised
from tgdp_fast.fit.config import GuidanceConfig, TrainingConfig
from tgdp_fast.fit.terms import TransferBatch
from tgdp_fast.runtime.evaluation import evaluation_mode
from tgdp_fast.runtime.precision import autocast


@dataclass(frozen=True)
class TransferData:
    """Samples of both domains on the device of the fit, [M, ...] and [N, ...], and their labels or None."""

    source: Tensor
    target: Tensor
    source_labels: Tensor | None = None
    target_labels: Tensor | None = None
    num_classes: int = 0


class Objective:
    """The sum of ``config.terms`` for one network, as a function of the generator of a step; float32.

    Args:
        network: log h, to be fitted.
        data: of both domains.
        config: of the fit; see :meth:`GuidanceConfig.resolved`.
        source_log_ratio: log r at the source samples [M] (Algorithm 1), if a term needs it.
        denoiser: the frozen source model, if a term needs it.
        classifier: the time-dependent classifier of Algorithm 2, if a term needs it.
    """

    def __init__(
        self,
        network: GuidanceNetwork,
        data: TransferData,
        config: GuidanceConfig,
        *,
        source_log_ratio: Tensor | None = None,
        denoiser: EpsilonModel | None = None,
        classifier: GuidanceNetwork | None = None,
    ) -> None:
        self.network, self.data, self.config = network, data, config
        self.source_log_ratio, self.denoiser, self.classifier = source_log_ratio, denoiser, classifier
        self.training = config.training or TrainingConfig()
        self.source_batches = Batches(len(data.source), self.training.batch_size)
        self.target_batches = Batches(len(data.target), self.training.batch_size)
        self.terms, self.needs = config.terms, config.needs

    def __call__(self, generator: torch.Generator) -> Tensor:
        """The objective on a fresh batch; every random number comes from ``generator``."""
        batch = self.batch(generator)
        first, *others = (term(batch) for term in self.terms)
        return sum(others, start=first)

    def batch(self, generator: torch.Generator) -> TransferBatch:
        """A fresh batch with everything the terms need: both domains under noise, and the network's outputs."""
        data, schedule, times = self.data, self.network.schedule, self.config.time_distribution
        rows, source, source_labels = draw_noised(
            self.source_batches, data.source, data.source_labels, schedule, generator, times
        )
        batch = TransferBatch(source)
        if "source_log_ratio" in self.needs and self.source_log_ratio is not None:
            batch.source_log_ratio = self.source_log_ratio[rows]
        if not any(need.startswith("target") for need in self.needs):
            with self._in_precision():
                batch.source_log_h = self.network.log_ratio(source.x, source.t, self._own(source_labels)).float()
            return batch
        _, batch.target, target_labels = draw_noised(
            self.target_batches, data.target, data.target_labels, schedule, generator, times
        )
        self._add_log_h(batch, self._own(source_labels), self._own(target_labels))
        self._add_references(batch, target_labels)
        return batch

    def _add_log_h(self, batch: TransferBatch, source_labels: Tensor | None, target_labels: Tensor | None) -> None:
        """log h of the network at both domains, with its gradient at the target if a term needs it."""
        network, source, target = self.network, batch.source, batch.target
        with self._in_precision():
            if "target_gradient" in self.needs:
                batch.source_log_h = network.log_ratio(source.x, source.t, source_labels).float()
                value, gradient = network(target.x, target.t, target_labels)
                batch.target_log_h, batch.target_gradient = value.float(), gradient.float()
            else:  # Both in one call.
                both = None
                if source_labels is not None and target_labels is not None:
                    both = torch.cat([source_labels, target_labels])
                x, t = torch.cat([source.x, target.x]), torch.cat([source.t, target.t])
                log_h = network.log_ratio(x, t, both).float()
                batch.source_log_h, batch.target_log_h = log_h.split([len(source.x), len(target.x)])

    @torch.no_grad()
    def _add_references(self, batch: TransferBatch, labels: Tensor | None) -> None:
        """Add the outputs of the frozen source model and the time-dependent classifier at the target samples."""
        target = batch.target
        if "target_epsilon" in self.needs and self.denoiser is not None:
            with evaluation_mode(self.denoiser) as (denoiser,):
                batch.target_epsilon = denoiser.epsilon(target.x, target.t, labels_for(denoiser, labels))
        if "target_classifier_log_h" in self.needs and self.classifier is not None:
            batch.target_classifier_log_h = self.classifier.log_ratio(target.x, target.t, self._own(labels))

    def _own(self, labels: Tensor | None) -> Tensor | None:
        return labels_for(self.network, labels)

    def _in_precision(self) -> AbstractContextManager[Any]:
        return autocast(self.config.precision, self.data.source.device.type)
