"""The whole of a transfer in one object and one call: standardisation, source denoiser, guidance; save, load,
sample.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from tgdp_fast.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_state_dict_checked,
    save_checkpoint,
    write_atomic,
)
from tgdp_fast.data.arrays import Standardizer, check_labels, check_samples
from tgdp_fast.denoiser import Denoiser
from tgdp_fast.density_ratio import TransferDiagnostics
from tgdp_fast.guidance import GuidanceNetwork
from tgdp_fast.sampling import sample, sample_to_file
from tgdp_fast.schedule import NoiseSchedule
from tgdp_fast.training import Optimisation, count_classes, signature_of, train_denoiser
from tgdp_fast.transfer import check_fit_arguments, fit_guidance

KIND = "transfer_model"

T = TypeVar("T")


@dataclass
class TransferModel:
    """A source denoiser with guidance towards a target domain, in the units of the data.

    Attributes:
        denoiser: the source model, in standardised coordinates.
        guidance: log density ratio of target to source, in the same coordinates.
        standardizer: from data units to standardised coordinates.
        diagnostics: as a dictionary (see :class:`TransferDiagnostics`); empty when there are none.
        config: the settings of the fit.
    """

    denoiser: Denoiser
    guidance: GuidanceNetwork
    standardizer: Standardizer
    diagnostics: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict, repr=False)

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
        check_fit_arguments(**guidance_arguments)
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
        x_source, x_target = standardizer.apply(source), standardizer.apply(target)
        stages = Stages(work_dir)
        classes = max(count_classes(source_labels, num_classes), count_classes(target_labels, num_classes))
        if (source_labels is None) != (target_labels is None):
            raise ValueError("source_labels and target_labels must be given together (or neither)")
        for name, labels, count in (
            ("source_labels", source_labels, len(source)),
            ("target_labels", target_labels, len(target)),
        ):
            if labels is not None:
                check_labels(name, labels, count, classes)
        arguments = {
            "seed": seed,
            "schedule": repr(schedule),
            "denoiser": repr(denoiser_settings),
            "classes": classes,
        }
        data = signature_of(*(None if a is None else torch.as_tensor(np.asarray(a)) for a in (x_source, source_labels)))

        if denoiser is None:
            denoiser = stages.run(
                "denoiser",
                signature_of(data, repr(arguments)),
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
                Denoiser.load,
            )
        frozen = denoiser.requires_grad_(False)

        def fit(state_dir: Path | None) -> TransferModel:
            result = fit_guidance(
                x_source,
                x_target,
                denoiser=frozen,
                source_labels=source_labels,
                target_labels=target_labels,
                num_classes=classes,
                seed=seed,
                device=device,
                progress=progress,
                state_dir=state_dir,
                **guidance_arguments,
            )
            diagnostics = result.diagnostics.to_dict() if isinstance(result.diagnostics, TransferDiagnostics) else {}
            return cls(frozen, result.guidance, standardizer, diagnostics, result.config)

        signature = signature_of(
            data,
            torch.as_tensor(x_target),
            None if target_labels is None else torch.as_tensor(np.asarray(target_labels)),
            repr(sorted((k, repr(v)) for k, v in guidance_arguments.items())),
            *frozen.network.state_dict().values(),
            str(seed),
        )
        return stages.run("model", signature, fit, cls.save, cls.load)

    def sample(self, num: int, *, guided: bool = True, **arguments: Any) -> np.ndarray:
        """Samples of the target domain (of the source with ``guided=False``): float32 [num, ...] in data units.

        ``arguments`` are those of :func:`tgdp_fast.sample`.
        """
        drawn = sample(self.denoiser, self.guidance if guided else None, num=num, **arguments)
        return self.standardizer.invert(drawn.cpu().numpy())

    def sample_to_file(
        self, path: str | os.PathLike[str], num: int, *, guided: bool = True, **arguments: Any
    ) -> np.ndarray:
        """:meth:`sample`, written atomically to ``path`` (.npy) and resumable."""
        return sample_to_file(
            path,
            self.denoiser,
            self.guidance if guided else None,
            num=num,
            finish=self.standardizer.invert,
            signature=self.signature(),
            **arguments,
        )

    def signature(self) -> str:
        """Hash of every weight: the same for two models exactly when they draw the same samples."""
        return signature_of(*self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        parts = {f"denoiser.{k}": v for k, v in self.denoiser.network.state_dict().items()}
        parts |= {f"guidance.{k}": v for k, v in self.guidance.state_dict().items()}
        return parts | {f"standardizer.{k}": v for k, v in self.standardizer.to_tensors().items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint folder (config.json, model.safetensors), atomically."""
        config = {
            "denoiser": self.denoiser.to_config(),
            "guidance": self.guidance.to_config(),
            "diagnostics": self.diagnostics,
            "config": self.config,
        }
        save_checkpoint(path, KIND, config, self._tensors())

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
        return cls(
            denoiser=Denoiser.from_parts(config["denoiser"], part("denoiser"), network, f"{path} (denoiser)"),
            guidance=guidance.eval(),
            standardizer=Standardizer.from_tensors(part("standardizer")),
            diagnostics=config["diagnostics"],
            config=config["config"],
        )


class Stages:
    """Stages of a long run in a folder: a finished stage with the same signature is loaded, not computed again.

    With ``folder=None`` every stage is computed and nothing is written.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = None if folder is None else Path(folder)

    def run(
        self,
        name: str,
        signature: str,
        compute: Callable[[Path | None], T],
        save: Callable[[T, Path], None],
        load: Callable[[Path], T],
    ) -> T:
        """Load stage ``name``, or ``compute(folder for its training state)`` and save it."""
        if self.folder is None:
            return compute(None)
        place, stamp = self.folder / name, self.folder / f"{name}.json"
        if stamp.is_file() and _read(stamp) == signature:
            try:
                return load(place)
            except CheckpointError:  # Damaged: compute it again.
                pass
        self.folder.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        result = compute(self.folder / f"{name}.state")
        if place.exists():
            shutil.rmtree(place)
        save(result, place)
        write_atomic(stamp, json.dumps({"signature": signature}))
        return result


def _read(stamp: Path) -> str:
    try:
        return str(json.loads(stamp.read_text()).get("signature"))
    except (ValueError, AttributeError):
        return ""
