"""The whole of a transfer in one object and one call: standardisation, source denoiser, guidance; save, load,
sample.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tgdp_fast.diffusion.denoiser import Denoiser
from tgdp_fast.diffusion.guidance import GuidanceNetwork
from tgdp_fast.diffusion.prior import Prior, prior_from_tensors
from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.fit.diagnostics import TransferDiagnostics
from tgdp_fast.fit.guidance import GuidanceFit, check_denoiser, check_fit_arguments, common_classes, fit_guidance
from tgdp_fast.fit.training import Optimisation, train_denoiser
from tgdp_fast.runtime.arrays import Standardizer, check_labels, check_samples
from tgdp_fast.runtime.checkpoint import (
    load_checkpoint,
    load_state_dict_checked,
    save_checkpoint,
    signature_of,
)
from tgdp_fast.runtime.checks import check_device, check_seed
from tgdp_fast.runtime.pretrained import Pretrained
from tgdp_fast.runtime.stages import Stages
from tgdp_fast.sampling.sampler import sample
from tgdp_fast.sampling.to_file import sample_to_file

KIND = "transfer_model"
_COMPARED = 256  # samples that tell whether an array is of the same draw


@dataclass
class TransferModel(Pretrained):
    """A source denoiser with guidance towards a target domain, in the units of the data.

    Attributes:
        denoiser: the source model, in standardised coordinates.
        guidance: log density ratio of target to source, in the same coordinates.
        standardizer: from data units to standardised coordinates.
        diagnostics: as a dictionary (see :class:`TransferDiagnostics`); empty when there are none.
        config: the settings of the fit.
        prior: what guided samples start from, in standardised coordinates; None for N(0, I). Set it, from data that
            are like the target's, where the schedule does not end near pure noise: see
            :mod:`tgdp_fast.diffusion.prior`.
    """

    denoiser: Denoiser
    guidance: GuidanceNetwork
    standardizer: Standardizer
    diagnostics: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    prior: Prior | None = field(default=None, repr=False)

    @classmethod
    def fit(
        cls,
        source: np.ndarray,
        target: np.ndarray,
        *,
        source_labels: np.ndarray | None = None,
        target_labels: np.ndarray | None = None,
        num_classes: int | None = None,
        denoiser: Denoiser | TransferModel | None = None,
        schedule: NoiseSchedule | None = None,
        denoiser_settings: Optimisation | None = None,
        work_dir: str | os.PathLike[str] | None = None,
        seed: int = 0,
        device: str | torch.device | None = None,
        progress: bool = False,
        **guidance_arguments: Any,
    ) -> TransferModel:
        """Two arrays in, a guided model out: standardise, train the source denoiser, fit the guidance.

        Args:
            source, target: [M, ...], [N, ...] in any units.
            source_labels, target_labels, num_classes: for a class-conditional transfer.
            denoiser: a trained source model to use instead of training one: a :class:`TransferModel` (its denoiser and
                standardisation are used), or a :class:`Denoiser` that works in the units of the data.
            schedule: of a denoiser trained here; default VP linear.
            denoiser_settings: of its training.
            work_dir: folder for finished stages and training states; a killed run given the same arguments goes on
                there. The folder stays; remove it when the model has been saved.
            seed: of everything random.
            device: where to train.
            progress: show progress bars.
            guidance_arguments: of :func:`fit_guidance`.

        Raises:
            ValueError: bad data, before any work.
        """
        if denoiser_settings is not None and not isinstance(denoiser_settings, Optimisation):
            raise ValueError(
                f"denoiser_settings must be an Optimisation, got {type(denoiser_settings).__name__}; write "
                "Optimisation(steps=...)"
            )
        if device is not None:
            check_device(device)
        if not isinstance(denoiser, TransferModel):
            check_denoiser(denoiser)
        source = check_samples("source", source)
        target = check_samples("target", target, event_shape=source.shape[1:])
        standardizer = Standardizer.fit(source)
        if isinstance(denoiser, TransferModel):
            standardizer, denoiser = denoiser.standardizer, denoiser.denoiser
        elif denoiser is not None:
            standardizer = Standardizer.identity(source.shape[1:])
        if denoiser is not None and denoiser.event_shape not in (None, source.shape[1:]):
            raise ValueError(
                f"denoiser works on samples of shape {denoiser.event_shape}, but source has shape {source.shape[1:]}"
            )
        if denoiser is not None and schedule is not None and schedule != denoiser.schedule:
            raise ValueError(f"schedule must be that of denoiser, {denoiser.schedule}, or left out; got {schedule}")
        schedule = denoiser.schedule if denoiser is not None else schedule or NoiseSchedule.vp_linear()
        check_fit_arguments(source.shape[1:], schedule, **guidance_arguments)
        check_seed(seed)
        classes = common_classes(
            source_labels, target_labels, len(source), len(target), num_classes, getattr(denoiser, "num_classes", None)
        )
        for name, labels, count in (
            ("source_labels", source_labels, len(source)),
            ("target_labels", target_labels, len(target)),
        ):
            if labels is not None:
                check_labels(name, labels, count, classes)
        x_source, x_target = standardizer.apply(source), standardizer.apply(target)
        stages = Stages(work_dir)
        if denoiser is None:
            settings = None if denoiser_settings is None else asdict(denoiser_settings)
            denoiser = stages.run(
                "denoiser",
                signature_of(x_source, _array(source_labels), schedule.to_config(), settings, classes, seed),
                lambda state_dir: train_denoiser(
                    x_source,
                    schedule,
                    labels=source_labels,
                    num_classes=classes,
                    settings=denoiser_settings,
                    seed=seed,
                    device=device,
                    progress=progress,
                    description="source denoiser",
                    state_dir=state_dir,
                ),
                Denoiser.save,
                lambda path: Denoiser.load(path).to(device or "cpu"),
            )
        source_model = denoiser

        def fit(state_dir: Path | None) -> GuidanceFit:
            return fit_guidance(
                x_source,
                x_target,
                denoiser=source_model,
                source_labels=source_labels,
                target_labels=target_labels,
                num_classes=classes,
                seed=seed,
                device=device,
                progress=progress,
                state_dir=state_dir,
                **guidance_arguments,
            )

        signature = signature_of(
            x_source,
            x_target,
            _array(source_labels),
            _array(target_labels),
            {name: repr(value) for name, value in guidance_arguments.items()},
            source_model,
            seed,
        )
        result = stages.run("guidance", signature, fit, save_fit, lambda path: load_fit(path, device))
        diagnostics = {} if result.diagnostics is None else result.diagnostics.to_dict()
        return cls(source_model, result.guidance, standardizer, diagnostics, result.config)

    def sample(self, num: int, *, guided: bool = True, **arguments: Any) -> np.ndarray:
        """Samples of the target domain (of the source with ``guided=False``): float32 [num, ...] in data units.

        ``arguments`` are those of :func:`tgdp_fast.sample`; a ``prior`` among them replaces that of the model, and is
        in standardised coordinates like it: fit it to ``model.standardizer.apply(samples)``.
        """
        self._add_prior(arguments, guided)
        drawn = sample(self.denoiser, self.guidance if guided else None, num=num, **arguments)
        return self.standardizer.invert(drawn.cpu().numpy())

    def sample_to_file(
        self, path: str | os.PathLike[str], num: int, *, guided: bool = True, **arguments: Any
    ) -> np.ndarray:
        """:meth:`sample`, written atomically to ``path`` (.npy) and resumable."""
        self._add_prior(arguments, guided)
        return sample_to_file(
            path,
            self.denoiser,
            self.guidance if guided else None,
            num=num,
            finish=self.standardizer.invert,
            **arguments,
        )

    def drew(self, samples: np.ndarray, num: int, *, labels: Any = None, **arguments: Any) -> bool:
        """Whether ``samples`` are the ``num`` that :meth:`sample` gives with these arguments.

        An array does not say where it is from, but the same model and settings draw the same again: the first of them
        are compared, up to the rounding of other machines and batches.
        """
        if samples.shape[:1] != (num,):
            return False
        count = min(num, arguments.get("batch_size") or _COMPARED)
        one = labels is None or np.ndim(labels) == 0
        first = self.sample(count, labels=labels if one else labels[:count], **arguments)
        tolerance = first.std() * (1e-3 if arguments.get("precision", "fp32") == "fp32" else 5e-2)
        return samples.shape[1:] == first.shape[1:] and np.allclose(samples[:count], first, rtol=0.0, atol=tolerance)

    def _add_prior(self, arguments: dict[str, Any], guided: bool) -> None:
        """The model's prior where none was given; a warning for one that can hardly be in standardised coordinates."""
        given = arguments.setdefault("prior", self.prior if guided else None)
        if isinstance(given, Prior) and given is not self.prior:
            size = float(given.to("cpu").start(0, torch.arange(256), 1.0, 0.0).double().square().mean().sqrt())
            if size > 10:
                warnings.warn(
                    "prior should be in standardised coordinates, but its samples have a root mean square of "
                    f"{size:.3g}; fit it to model.standardizer.apply(samples)",
                    stacklevel=3,
                )

    def signature(self) -> str:
        """Hash of every weight and setting: the same for two models exactly when they draw the same samples."""
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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint folder (config.json, model.safetensors), atomically; ``save_pretrained`` adds a card."""
        save_checkpoint(path, *self.to_checkpoint())

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

        guidance = GuidanceNetwork.from_config(config["guidance"])
        load_state_dict_checked(guidance, part("guidance"), f"{path} (guidance)")
        prior = part("prior")
        return cls(
            denoiser=Denoiser.from_parts(config["denoiser"], part("denoiser"), network, f"{path} (denoiser)"),
            guidance=guidance.eval(),
            standardizer=Standardizer.from_tensors(part("standardizer")),
            diagnostics=config["diagnostics"],
            config=config["config"],
            prior=prior_from_tensors(prior) if prior else None,
        )


def _array(labels: Any) -> np.ndarray | None:
    return None if labels is None else check_labels("labels", labels, len(labels))


def save_fit(fit: GuidanceFit, path: Path) -> None:
    """A finished fit as a checkpoint folder."""
    config = {
        "guidance": fit.guidance.to_config(),
        "diagnostics": None if fit.diagnostics is None else fit.diagnostics.to_dict(),
        "history": fit.history,
        "config": fit.config,
    }
    save_checkpoint(path, "guidance_fit", config, fit.guidance.state_dict())


def load_fit(path: Path, device: str | torch.device | None) -> GuidanceFit:
    """Inverse of :func:`save_fit`, on ``device``."""
    config, tensors = load_checkpoint(path, "guidance_fit")
    guidance = GuidanceNetwork.from_config(config["guidance"])
    load_state_dict_checked(guidance, tensors, str(path))
    diagnostics = None if config["diagnostics"] is None else TransferDiagnostics(**config["diagnostics"])
    return GuidanceFit(guidance.eval().to(device or "cpu"), diagnostics, config["history"], config["config"])
