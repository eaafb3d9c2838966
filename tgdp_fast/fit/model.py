"""A complete transfer in one object and one call: standardization, source denoiser, guidance; save, load, sample."""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tgdp_fast.diffusion.denoiser import Denoiser
from tgdp_fast.diffusion.guidance import GuidanceNetwork
from tgdp_fast.diffusion.prior import Prior, prior_from_tensors
from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.fit.config import GuidanceConfig, TrainingConfig, check_config
from tgdp_fast.fit.data import ArrayLike, TransferArrays
from tgdp_fast.fit.diagnostics import is_within_reach
from tgdp_fast.fit.guidance import GuidanceFit, common_schedule, fit_guidance
from tgdp_fast.fit.training import train_denoiser
from tgdp_fast.runtime.arrays import Standardizer
from tgdp_fast.runtime.checkpoint import described, load_checkpoint, signature_of
from tgdp_fast.runtime.checks import check_device, check_seed
from tgdp_fast.runtime.precision import ordinary_autograd
from tgdp_fast.runtime.pretrained import Pretrained
from tgdp_fast.runtime.stages import Stages, owned
from tgdp_fast.sampling.config import SamplingConfig
from tgdp_fast.sampling.sampler import Sampler

KIND = "transfer_model"


class OutOfReachWarning(UserWarning):
    """Samples are drawn from a model whose diagnostics say that the source does not reach the target."""


_COMPARED = 256  # samples compared to identify an array as the same draw


@dataclass
class TransferModel(Pretrained):
    """A source denoiser with guidance towards a target domain, in the units of the data.

    Attributes:
        denoiser: the source model, in standardized coordinates.
        guidance: log density ratio of target to source, in the same coordinates.
        standardizer: from data units to standardized coordinates.
        diagnostics: as a dictionary (see :class:`TransferDiagnostics`); empty if there are none.
        config: the settings of the fit.
        prior: start of guided samples, in standardized coordinates; None for N(0, I). If the schedule does not end near
            pure noise, set it from data that resemble the target: see :mod:`tgdp_fast.diffusion.prior`.
    """

    denoiser: Denoiser
    guidance: GuidanceNetwork
    standardizer: Standardizer
    diagnostics: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    prior: Prior | None = field(default=None, repr=False)
    _warned: bool = field(default=False, init=False, repr=False, compare=False)
    _sampler: tuple[Any, Sampler] | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    @ordinary_autograd()
    def fit(
        cls,
        source: ArrayLike,
        target: ArrayLike,
        config: GuidanceConfig | None = None,
        *,
        source_labels: ArrayLike | None = None,
        target_labels: ArrayLike | None = None,
        denoiser: Denoiser | TransferModel | None = None,
        schedule: NoiseSchedule | None = None,
        denoiser_training: TrainingConfig | None = None,
        work_dir: str | os.PathLike[str] | None = None,
        seed: int = 0,
        device: str | torch.device | None = None,
        progress: bool = False,
    ) -> TransferModel:
        """Two arrays in, a guided model out: standardize, train the source denoiser, fit the guidance.

        Args:
            source, target: [M, ...], [N, ...] in any units.
            config: of the guidance; default ``GuidanceConfig()``.
            source_labels, target_labels: for a class-conditional transfer.
            denoiser: a trained source model to use instead of training one: a :class:`TransferModel` (its denoiser and
                standardization are used), or a :class:`Denoiser` that works in the units of the data.
            schedule: of a denoiser trained here; default: VP linear.
            denoiser_training: of a denoiser trained here.
            work_dir: folder for finished stages and training states; a killed run with the same arguments resumes
                there. The folder is kept; remove it after the model is saved.
            seed: of everything random.
            device: where to train.
            progress: show progress bars.

        Raises:
            ValueError: bad data or settings, before any work.
            InUseError: another run works in ``work_dir``.
        """
        config = check_config("config", GuidanceConfig() if config is None else config, GuidanceConfig)
        if denoiser_training is not None:
            check_config("denoiser_training", denoiser_training, TrainingConfig, "; write TrainingConfig(steps=...)")
        if device is not None:
            check_device(device)
        check_seed(seed)
        own = denoiser.denoiser if isinstance(denoiser, TransferModel) else denoiser
        schedule = common_schedule(schedule, own)
        raw = TransferArrays.check(
            source,
            target,
            source_labels,
            target_labels,
            num_classes=config.num_classes,
            denoiser=own,
            keep_exact=own is None or own is not denoiser,
        )
        event_shape = raw.source.values.shape[1:]
        if own is not None and own.event_shape not in (None, event_shape):
            raise ValueError(
                f"denoiser works on samples of shape {own.event_shape}, but source has shape {event_shape}"
            )
        config.network.check_event_shape(event_shape)
        if isinstance(denoiser, TransferModel):
            standardizer = denoiser.standardizer
        else:
            standardizer = (
                Standardizer.fit(raw.source.with_spread) if own is None else Standardizer.identity(event_shape)
            )
        arrays = raw.standardized(standardizer)
        config = replace(config, num_classes=arrays.num_classes)
        stages, common = Stages(work_dir), {"seed": seed, "device": device, "progress": progress}
        with owned(work_dir):
            if own is None:
                own = _source_model(stages, arrays, schedule, denoiser_training, common)
            result = _guidance(stages, arrays, own, config, common)
        diagnostics = {} if result.diagnostics is None else result.diagnostics.to_dict()
        return cls(own, result.guidance, standardizer, diagnostics, {**result.config, "seed": seed})

    def sampler(
        self,
        config: SamplingConfig | None = None,
        *,
        guided: bool = True,
        device: str | torch.device | None = None,
        **settings: Any,
    ) -> Sampler:
        """The sampler of the target domain (of the source with ``guided=False``), in standardized coordinates.

        The last sampler is kept for the next call with equal settings, with everything that it reuses between draws,
        unless its scale is a function.

        Args:
            config: how to sample; default ``SamplingConfig()``.
            guided: whether to use the guidance.
            device: where to sample; None for where the networks are.
            settings: fields of :class:`tgdp_fast.SamplingConfig` that differ from ``config``.
        """
        config = replace(SamplingConfig() if config is None else config, **settings)
        models = self.denoiser, self.guidance if guided else None
        asked = (*map(id, models), config, device)
        # A scale that is a function may give other values now than when the sampler read it.
        kept = self._sampler
        if kept is None or kept[0] != asked or callable(config.scale):
            kept = self._sampler = asked, Sampler(*models, config, device=device)
        return kept[1]

    def sample(
        self, num: int, config: SamplingConfig | None = None, *, guided: bool = True, **arguments: Any
    ) -> np.ndarray:
        """Samples of the target domain (of the source with ``guided=False``): float32 [num, ...] in data units.

        They are float64 if float32 does not hold the spread of a feature, such as a time stamp.

        The first guided call gives an :class:`OutOfReachWarning` if ``diagnostics`` say not to use the samples.

        Args:
            num: number of samples.
            config, guided: as in :meth:`sampler`.
            arguments: those of :func:`tgdp_fast.sample`. A ``prior`` replaces that of the model and is also in
                standardized coordinates: fit it to ``model.standardizer.apply(samples)``.
        """
        sampler = self._sampler_of(config, guided, arguments)
        return self.standardizer.invert(sampler.draw(num, **arguments).cpu().numpy())

    def sample_to_file(
        self,
        path: str | os.PathLike[str],
        num: int,
        config: SamplingConfig | None = None,
        *,
        guided: bool = True,
        **arguments: Any,
    ) -> np.ndarray:
        """:meth:`sample`, written atomically to ``path`` (.npy) and resumable."""
        sampler = self._sampler_of(config, guided, arguments)
        return sampler.draw_to_file(path, num, finish=self.standardizer.invert, **arguments)

    def reproduces(
        self,
        samples: np.ndarray,
        num: int,
        config: SamplingConfig | None = None,
        *,
        labels: Any = None,
        **arguments: Any,
    ) -> bool:
        """Whether ``samples`` are the ``num`` samples that :meth:`sample` draws with these arguments.

        The first samples are drawn again and compared, up to the rounding of other machines and batches.
        """
        if samples.shape[:1] != (num,):
            return False
        count = min(num, arguments.get("batch_size") or _COMPARED)
        one = labels is None or np.ndim(labels) == 0
        sampler = self._sampler_of(config, arguments.pop("guided", True), arguments)
        drawn = sampler.draw(count, labels=labels if one else labels[:count], **arguments)
        first = self.standardizer.invert(drawn.cpu().numpy())
        tolerance = first.std() * (1e-3 if sampler.config.precision == "fp32" else 5e-2)
        return samples.shape[1:] == first.shape[1:] and np.allclose(samples[:count], first, rtol=0.0, atol=tolerance)

    def _sampler_of(self, config: SamplingConfig | None, guided: bool, arguments: dict[str, Any]) -> Sampler:
        """Remove the sampler's settings from ``arguments`` and add the model's prior if none was given."""
        within_reach, told = _told(self.diagnostics)
        if guided and not self._warned and not within_reach:
            self._warned = True
            warnings.warn(told, OutOfReachWarning, stacklevel=3)
        names = [entry.name for entry in fields(SamplingConfig)] + ["device"]
        settings = {name: arguments.pop(name) for name in names if name in arguments}
        prior = arguments.setdefault("prior", self.prior if guided else None)
        if isinstance(prior, Prior) and prior is not self.prior:
            size = float(
                prior.to("cpu").start(0, torch.arange(256, device="cpu"), 1.0, 0.0).double().square().mean().sqrt()
            )
            if size > 10:
                warnings.warn(
                    "prior should be in standardised coordinates, but its samples have a root mean square of "
                    f"{size:.3g}; fit it to model.standardizer.apply(samples)",
                    stacklevel=3,
                )
        return self.sampler(config, guided=guided, **settings)

    def __getstate__(self) -> dict[str, Any]:
        # A copy creates its own sampler: CUDA graphs cannot be copied.
        return {**vars(self), "_sampler": None}

    def signature(self) -> str:
        """Hash of every weight and setting: equal for two models exactly if they draw the same samples."""
        prior = () if self.prior is None else self.prior.to_tensors().values()
        return signature_of(self.denoiser, self.guidance, *self.standardizer.to_tensors().values(), *prior)

    def _tensors(self) -> dict[str, Tensor]:
        parts = {f"denoiser.{k}": v for k, v in self.denoiser.to_checkpoint()[2].items()}
        parts |= {f"guidance.{k}": v for k, v in self.guidance.state_dict().items()}
        parts |= {f"standardizer.{k}": v for k, v in self.standardizer.to_tensors().items()}
        prior = {} if self.prior is None else self.prior.to_tensors()
        return parts | {f"prior.{k}": v for k, v in prior.items()}

    def to_checkpoint(self) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
        """Kind, config and tensors of the checkpoint."""
        config = {
            "denoiser": self.denoiser.to_config(),
            "guidance": self.guidance.to_config(),
            "diagnostics": self.diagnostics,
            "config": self.config,
        }
        return KIND, config, self._tensors()

    @classmethod
    def load(cls, path: str | os.PathLike[str], network: nn.Module | None = None) -> TransferModel:
        """Read a checkpoint folder; ``network`` as in :meth:`Denoiser.load`.

        Raises:
            CheckpointError: damaged, of another kind or architecture.
        """
        config, tensors = load_checkpoint(path, KIND)

        def part(name: str) -> dict[str, Tensor]:
            prefix = name + "."
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        with described(path, cls.__name__):
            prior, parts = part("prior"), [dict(config[name]) for name in ("denoiser", "diagnostics", "config")]
            guidance = GuidanceNetwork.from_parts(config["guidance"], part("guidance"), f"{path} (guidance)")
            standardizer = Standardizer.from_tensors(part("standardizer"))
            start = prior_from_tensors(prior) if prior else None
            # What is read of them later is there, or left out.
            _told(parts[1])
            dict(parts[2].get("ecg", {}))
        denoiser = Denoiser.from_parts(parts[0], part("denoiser"), network, f"{path} (denoiser)")
        return cls(denoiser, guidance, standardizer, diagnostics=parts[1], config=parts[2], prior=start)


def _told(diagnostics: dict[str, Any]) -> tuple[bool, str]:
    """Whether the target is within reach as far as is known, and all warnings."""
    within_reach = is_within_reach(diagnostics.get("outside_fraction"), diagnostics.get("mean_ratio"))
    return within_reach, " ".join(diagnostics.get("warnings", []))


def _source_model(
    stages: Stages,
    arrays: TransferArrays,
    schedule: NoiseSchedule,
    training: TrainingConfig | None,
    common: dict[str, Any],
) -> Denoiser:
    """The denoiser of the source samples, kept in the work folder; ``common`` as in :func:`_guidance`."""
    settings = None if training is None else asdict(training)
    source, labels, classes = arrays.source, arrays.source_labels, arrays.num_classes

    def train(state_dir: Path | None) -> Denoiser:
        return train_denoiser(
            source,
            schedule,
            labels=labels,
            num_classes=classes,
            settings=training,
            description="source denoiser",
            state_dir=state_dir,
            **common,
        )

    return stages.run(
        "denoiser",
        lambda: signature_of(source, labels, schedule.to_config(), settings, classes, common["seed"]),
        train,
        Denoiser.save,
        lambda path: Denoiser.load(path).to(common["device"] or "cpu"),
    )


def _guidance(
    stages: Stages, arrays: TransferArrays, denoiser: Denoiser, config: GuidanceConfig, common: dict[str, Any]
) -> GuidanceFit:
    """The guidance, kept in the work folder; ``common``: seed, device and progress of every stage."""

    def fit(state_dir: Path | None) -> GuidanceFit:
        return fit_guidance(
            arrays.source,
            arrays.target,
            config=config,
            denoiser=denoiser,
            source_labels=arrays.source_labels,
            target_labels=arrays.target_labels,
            state_dir=state_dir,
            **common,
        )

    def load(path: Path) -> GuidanceFit:
        found = GuidanceFit.load(path)
        found.guidance.to(common["device"] or "cpu")
        return found

    return stages.run(
        "guidance",
        lambda: signature_of(*vars(arrays).values(), config.to_dict(), denoiser, common["seed"]),
        fit,
        GuidanceFit.save,
        load,
    )
