"""Guidance for the samplers of k-diffusion: the model is wrapped, because they have no hook for classifier guidance.

    from tgdp_fast.integrations.k_diffusion import KDiffusionDenoiser

    samples = k_diffusion.sampling.sample_heun(KDiffusionDenoiser(model, guidance), x, sigmas)

For samplers with such a hook see :mod:`tgdp_fast.integrations.cond_fn`.

Sources: TGDP (Ouyang et al., NeurIPS 2024, arXiv 2405.16876), Theorem 3.1; EDM (Karras et al., NeurIPS 2022, arXiv
2206.00364), for denoisers in variance-exploding coordinates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tgdp_fast.diffusion.denoiser import labels_for, per_sample
from tgdp_fast.diffusion.guided import Guidance, check_guidance
from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.integrations.cond_fn import gradient_at, time_at
from tgdp_fast.runtime.checks import check_number
from tgdp_fast.runtime.evaluation import evaluation_mode


class KDiffusionDenoiser:
    """A model ``denoised = model(x, sigma, **extra_args)`` as in k-diffusion, with guidance.

    The state of k-diffusion is x_ve = x_0 + sigma_ve eps. It is x = alpha x_0 + sigma eps divided by alpha:

        x_ve = x / alpha,   sigma_ve = sigma / alpha,   alpha = 1 / sqrt(1 + sigma_ve^2),   log-SNR/2 = -log sigma_ve

    so the time follows from the log-SNR, and the chain rule gives grad_{x_ve} = alpha grad_x. The score of
    x_ve is (denoised - x_ve) / sigma_ve^2 (EDM, equation 3). Adding grad_{x_ve} log h to it gives

        denoised_q = denoised_p + scale sigma_ve^2 alpha grad_x log h(alpha x_ve, t)

    which is x0 + (sigma^2 / alpha) grad log h, Theorem 3.1 for predicted data: exact with scale 1 for every solver
    of k-diffusion, because they only use denoised_q. (A ratio of densities is the same in both coordinates: their
    Jacobians cancel.)

    Times outside the guidance's schedule are clamped to its nearest end, t_min or t_max.

    Args:
        model: a model of k-diffusion, called with x_ve and sigma_ve [B]; or a :class:`tgdp_fast.Denoiser`, or anything
            with ``schedule`` and ``epsilon``, whose denoised signal is x_ve - sigma_ve eps(alpha x_ve, t).
        guidance: a :class:`tgdp_fast.GuidanceNetwork`, or anything with ``log_ratio_and_grad``; None for no guidance.
        schedule: of the guidance; default: its own.
        scale: guidance scale; 1 is exact.
        labels: the entry of ``extra_args`` with the labels for conditional guidance and denoisers of this package.

    Raises:
        ValueError: a model or guidance that cannot be called like this; a guidance without a schedule; a bad scale.
    """

    def __init__(
        self,
        model: Any,
        guidance: Guidance | None = None,
        *,
        schedule: NoiseSchedule | None = None,
        scale: float = 1.0,
        labels: str = "class_cond",
    ) -> None:
        if not hasattr(model, "epsilon") and not callable(model):
            raise ValueError(f"model must be callable as model(x, sigma), got {type(model).__name__}")
        if guidance is not None:
            check_guidance(guidance)
            schedule = getattr(guidance, "schedule", None) if schedule is None else schedule
            if not isinstance(schedule, NoiseSchedule):
                raise ValueError(
                    f"schedule must be the NoiseSchedule of guidance, to find its time from sigma, got {schedule!r}"
                )
        self.model = model
        self.guidance = guidance
        self.schedule = schedule
        self.scale = check_number("scale", scale)
        self.labels = labels

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        """x_ve [B, ...], sigma_ve [B] > 0 -> denoised [B, ...], in the dtype of the model; float32 inside."""
        noise_level = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).expand(len(x))
        labels = extra_args.get(self.labels)
        # In float64 and rounded once: alpha x_ve has the rounding of one multiplication.
        alpha = torch.rsqrt(1.0 + noise_level.square())
        precision = torch.promote_types(x.dtype, torch.float32)
        state = per_sample(alpha.to(precision), x) * x
        model, guidance = self.model, self.guidance
        if hasattr(model, "epsilon"):
            time = time_at(model.schedule, noise_level)
            with torch.no_grad(), evaluation_mode(model) as (model,):
                epsilon = model.epsilon(state.to(x.dtype), time, labels_for(model, labels))
            denoised: Tensor = x - per_sample(noise_level.to(x.dtype), x) * epsilon
        else:
            denoised = model(x, sigma, **extra_args)
        if guidance is None or self.scale == 0.0 or self.schedule is None:
            return denoised
        gradient = gradient_at(guidance, state, time_at(self.schedule, noise_level), labels)
        weight = self.scale * noise_level.square() * alpha
        return (denoised + per_sample(weight.to(precision), x) * gradient).to(denoised.dtype)
