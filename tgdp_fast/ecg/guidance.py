"""The guided model of a run: source denoiser, guidance network (TGDP Algorithms 2 to 4), and what sampling needs."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from tgdp_fast.diffusion.denoiser import Denoiser
from tgdp_fast.diffusion.prior import EmpiricalPrior, GaussianPrior, Prior
from tgdp_fast.ecg.cohorts import Cohorts
from tgdp_fast.ecg.density_ratio import Ratio, as_tensor
from tgdp_fast.ecg.run import Run
from tgdp_fast.fit.guidance import GuidanceFit, fit_guidance, mean_h
from tgdp_fast.fit.model import TransferModel
from tgdp_fast.runtime.checkpoint import signature_of

#: From this length on the guidance network has the two convolutions of the paper's before its MLP.
_LONG = 256
#: Source records that a prior is fitted to: its cost grows with their square.
_PRIOR_ROWS = 2000


def fit_model(run: Run, cohorts: Cohorts, denoiser: Denoiser, ratio: Ratio) -> TransferModel:
    """Fit the guidance and save the whole model in ``<out>/model``."""
    fitted = _fit_guidance(run, cohorts, denoiser, ratio)
    network = fitted.guidance.cpu()
    source = cohorts.source
    labels = as_tensor(source.labels, "cpu") if run.config.guidance.conditional else None
    diagnostics = replace(ratio[1], warnings=list(ratio[1].warnings))
    x = torch.from_numpy(cohorts.x_source)
    diagnostics.add_mean_h(mean_h(network, x, labels=labels, limit=512, seed=run.seed("guidance")))
    ecg = {"rate": source.rate, "leads": list(source.leads), "statements": list(source.vocabulary)}
    ecg["preset"] = run.config.preset
    model = TransferModel(
        denoiser,
        network,
        cohorts.standardizer,
        diagnostics.to_dict(),
        {**fitted.config, "seed": run.seed("guidance"), "ecg": ecg},
        fit_prior(run, cohorts, "tgdp", ratio),
    )
    run.once(lambda: model.save(run.out / "model"))
    return model


def _fit_guidance(run: Run, cohorts: Cohorts, denoiser: Denoiser, ratio: Ratio) -> GuidanceFit:
    guidance, seed = run.config.guidance, run.seed("guidance")
    source, target, log_ratio = cohorts.source, cohorts.target, ratio[0]
    stem = "ecg" if cohorts.x_source.shape[2] >= _LONG else "none"

    def compute(state_dir: Path | None) -> GuidanceFit:
        with run.costs.of("tgdp"):
            # In the consistency term the source model is only evaluated: so by its fast form.
            compiled = denoiser.to(run.device).compile_for_sampling() if guidance.consistency else None
            fitted = fit_guidance(
                cohorts.x_source,
                cohorts.x_target,
                denoiser.schedule if compiled is None else None,
                guidance.fit_config(stem, len(source.vocabulary)),
                denoiser=compiled,
                source_labels=source.labels,
                target_labels=target.labels,
                ratio=log_ratio,
                seed=seed,
                device=run.device,
                progress=run.progress,
                state_dir=state_dir,
            )
            run.costs.count("tgdp", fitted.guidance)
            return fitted

    signature = signature_of(
        cohorts.x_source,
        cohorts.x_target,
        source.labels,
        target.labels,
        denoiser,
        asdict(guidance),
        seed,
        log_ratio.source_log_ratio,
        stem,
    )
    fitted = run.stages.run("guidance", signature, compute, GuidanceFit.save, GuidanceFit.load)
    denoiser.cpu()
    return fitted


def fit_prior(run: Run, cohorts: Cohorts, method: str, ratio: Ratio | None = None) -> Prior | None:
    """Where a method's sampling starts: None for N(0, I), else fitted to what its model was trained on.

    Args:
        run, cohorts: of the run.
        method: "source", "vanilla", "fine_tune" or "tgdp".
        ratio: of "tgdp", whose source records count by their ratio.
    """
    kind = run.config.sampling.prior
    if kind == "standard":
        return None
    x, weights = cohorts.x_source if method in ("source", "tgdp") else cohorts.x_target, None
    if ratio is not None:
        weights = ratio[0].source_log_ratio.double().softmax(0).numpy()
    if len(x) > _PRIOR_ROWS:
        rows = np.random.default_rng(run.config.seed).permutation(len(x))[:_PRIOR_ROWS]
        x, weights = x[rows], None if weights is None else weights[rows]
    return GaussianPrior.fit(x, weights=weights) if kind == "gaussian" else EmpiricalPrior(x, weights=weights)
