"""The denoisers of a run: the source model, trained or given, and two that are trained on the few target records."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from tgdp_fast.diffusion.denoiser import Denoiser
from tgdp_fast.ecg.cohorts import Cohorts
from tgdp_fast.ecg.config import Backbone
from tgdp_fast.ecg.run import Run
from tgdp_fast.fit.model import TransferModel
from tgdp_fast.fit.training import train_denoiser
from tgdp_fast.models import SSSDECG
from tgdp_fast.runtime.arrays import Standardizer
from tgdp_fast.runtime.checkpoint import checkpoint_kind, signature_of
from tgdp_fast.runtime.randomness import seeded_initialization


def untrained(run: Run, cohorts: Cohorts, name: str) -> Denoiser:
    """An SSSD-ECG of the configuration's size with fresh weights, for signals and statements like the cohorts'."""
    backbone = run.config.backbone
    leads, length = cohorts.source.signals.shape[1:]
    with seeded_initialization(run.seed(name)):
        network = SSSDECG(
            in_channels=leads,
            out_channels=leads,
            res_channels=backbone.res_channels,
            skip_channels=backbone.res_channels,
            num_res_layers=backbone.num_res_layers,
            step_dims=(backbone.step_features, backbone.step_embedding, backbone.step_embedding),
            num_classes=len(cohorts.source.vocabulary),
            label_dim=backbone.label_dim,
            l_max=length,
            d_state=backbone.d_state,
        )
    return Denoiser(network, backbone.schedule())


def train(run: Run, cohorts: Cohorts, name: str, initial: Denoiser) -> Denoiser:
    """Train ``initial`` on the source ("source") or on the few target records ("vanilla", "fine_tune")."""
    data = cohorts.source if name == "source" else cohorts.target
    x = cohorts.x_source if name == "source" else cohorts.x_target
    settings, seed = getattr(run.config, name), run.seed(f"training {name}")

    def compute(state_dir: Path | None) -> Denoiser:
        with run.costs.of(name, initial):
            return train_denoiser(
                x,
                labels=data.labels,
                initial=initial.to(run.device),
                settings=settings,
                seed=seed,
                progress=run.progress,
                description=name,
                state_dir=state_dir,
            ).cpu()

    signature = signature_of(x, data.labels, initial, asdict(settings), seed)
    return run.stages.run(name, signature, compute, Denoiser.save, Denoiser.load)


def given_model(backbone: Backbone) -> Denoiser | TransferModel | None:
    """The model that the configuration names: one of this package, or a released file of SSSD-ECG."""
    if not backbone.checkpoint:
        return None
    path = Path(backbone.checkpoint)
    if not path.is_dir():
        return Denoiser(SSSDECG.from_checkpoint(path, cauchy=backbone.cauchy), backbone.schedule())
    return TransferModel.load(path) if checkpoint_kind(path) == "transfer_model" else Denoiser.load(path)


def in_units_of(given: Denoiser | TransferModel | None, backbone: Backbone, cohorts: Cohorts) -> Cohorts:
    """The cohorts, standardized as a given source model wants its signals."""
    if isinstance(given, TransferModel):
        return replace(cohorts, standardizer=given.standardizer)
    if given is None or backbone.checkpoint_units == "standardized":
        return cohorts
    return replace(cohorts, standardizer=Standardizer.identity(cohorts.source.signals.shape[1:]))


def given_denoiser(given: Denoiser | TransferModel, backbone: Backbone, cohorts: Cohorts) -> Denoiser:
    """The denoiser of a given model.

    Raises:
        ValueError: it is for signals of another length or number of leads, or for other statements.
    """
    denoiser = given.denoiser if isinstance(given, TransferModel) else given
    wanted, statements = tuple(cohorts.source.signals.shape[1:]), len(cohorts.source.vocabulary)
    if denoiser.event_shape != wanted or denoiser.num_classes != statements:
        raise ValueError(
            f"backbone.checkpoint: {backbone.checkpoint} works on signals of shape {denoiser.event_shape} with "
            f"{denoiser.num_classes} statements, but the records have {wanted} and "
            f"{statements}; change data.rate or data.seconds, or train a source model"
        )
    return denoiser.eval()
