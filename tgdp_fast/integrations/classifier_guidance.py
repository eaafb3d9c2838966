"""Our guidance for samplers with a hook for classifier guidance: ``cond_fn`` of guided-diffusion, and k-diffusion.

A sampler that can be guided by a classifier adds grad_x log p(y | x_t) to the score. TGDP adds grad_x log h(x_t, t)
(Theorem 3.1), so a guidance takes the place of the classifier with nothing else changed:

    from tgdp_fast.integrations.classifier_guidance import KDiffusionDenoiser, as_cond_fn

    cond_fn = as_cond_fn(guidance, NoiseSchedule.from_betas(diffusion.betas))
    samples = diffusion.ddim_sample_loop(model, shape, cond_fn=cond_fn)               guided-diffusion
    samples = k_diffusion.sampling.sample_heun(KDiffusionDenoiser(model, guidance), x, sigmas)

Sources: TGDP (Ouyang et al., NeurIPS 2024, arXiv 2405.16876), Theorem 3.1; Dhariwal & Nichol, NeurIPS 2021, arXiv
2105.05233, algorithms 1 and 2, for ``cond_fn``; EDM (Karras et al., NeurIPS 2022, arXiv 2206.00364), for denoisers in
variance-exploding coordinates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tgdp_fast._checks import check_number
from tgdp_fast.denoiser import evaluation_mode, per_sample
from tgdp_fast.guidance import Guidance, labels_for
from tgdp_fast.schedule import NoiseSchedule

__all__ = ["KDiffusionDenoiser", "as_cond_fn"]


def as_cond_fn(
    guidance: Guidance,
    schedule: NoiseSchedule | None = None,
    *,
    scale: float = 1.0,
    labels: str = "y",
    time_scale: float = 1.0,
) -> Callable[..., Tensor]:
    """``cond_fn(x, t, **model_kwargs) -> scale * grad_x log h(x, t)`` for samplers in the manner of guided-diffusion.

    Sign and factor. The result is the gradient of a log ratio, target over source, with a plus sign: what a classifier
    gives as grad log p(y | x). The sampler multiplies it:

    - ``ddim_sample`` (algorithm 2) does ``eps -= sqrt(1 - alpha_bar_t) * cond_fn``. As sigma_t = sqrt(1 - alpha_bar_t),
      this is eps_q = eps_p - sigma_t grad log h, Theorem 3.1 itself: exact with scale 1.
    - ``p_sample`` (algorithm 1) does ``mean += variance * cond_fn`` at every step. The mean of the reverse step is
      (x + beta_t score) / sqrt(alpha_t), so Theorem 3.1 asks for beta_t / sqrt(alpha_t) grad log h. A sampler whose
      variance is beta_t falls short of it by the factor sqrt(alpha_t), 1 % for beta_t = 0.02; one whose variance is
      the posterior's by sqrt(alpha_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t), which is far from 1 in the last steps
      only. The result's error vanishes with the step size. Between two Gaussians in 100 steps the posterior's variance
      makes it twice that of exact guidance in the same loop, and beta_t a fifth larger. With few steps, use
      ``ddim_sample``.

    Time. ``t`` is the index of the sampler's training schedule, 0 its cleanest, as a tensor [B]. With respaced steps
    the sampler maps its own index to that one before it calls. A guidance with another schedule than the sampler's gets
    the time at which its own log-SNR is the same.

    Args:
        guidance: a :class:`tgdp_fast.GuidanceNetwork`, or anything with ``log_ratio_and_grad``.
        schedule: the sampler's training schedule, discrete; default the guidance's own.
        scale: guidance scale; 1 is exact.
        labels: the entry of ``model_kwargs`` that holds the labels, for a conditional guidance. Others are ignored.
        time_scale: by what the sampler has multiplied the index, ``1000 / N`` with ``rescale_timesteps=True``.

    Returns:
        The function; its result has the shape and dtype of ``x`` and carries no graph.

    Raises:
        ValueError: no discrete schedule; a bad scale; the guidance has no ``log_ratio_and_grad``.
    """
    _check_guidance(guidance)
    own = getattr(guidance, "schedule", None)
    schedule = own if schedule is None else schedule
    if not isinstance(schedule, NoiseSchedule) or not schedule.is_discrete:
        raise ValueError(
            f"schedule must be the sampler's discrete NoiseSchedule, got {schedule!r}; build it with "
            "NoiseSchedule.from_betas(diffusion.betas)"
        )
    sampler_schedule = schedule
    scale = check_number("scale", scale)
    time_scale = check_number("time_scale", time_scale, 0.0, exclusive=True)

    def cond_fn(x: Tensor, t: Tensor, **model_kwargs: Any) -> Tensor:
        times = t.to(torch.float64) / time_scale
        if own is not None and own != sampler_schedule:
            times = _time_at(own, torch.exp(-sampler_schedule.half_log_snr(times)))
        return scale * _gradient(guidance, x, times, model_kwargs.get(labels))

    return cond_fn


class KDiffusionDenoiser:
    """A model ``denoised = model(x, sigma, **extra_args)`` in the manner of k-diffusion, with guidance.

    The state of k-diffusion is x_ve = x_0 + sigma_ve eps. Dividing our x = alpha x_0 + sigma eps by alpha gives it:

        x_ve = x / alpha,   sigma_ve = sigma / alpha,   alpha = 1 / sqrt(1 + sigma_ve^2),   log-SNR/2 = -log sigma_ve

    so the time is that of the log-SNR, and the chain rule gives the gradient, grad_{x_ve} = alpha grad_x. The score of
    x_ve is (denoised - x_ve) / sigma_ve^2 (EDM, equation 3). Adding grad_{x_ve} log h to it gives

        denoised_q = denoised_p + scale sigma_ve^2 alpha grad_x log h(alpha x_ve, t)

    which is x0 + (sigma^2 / alpha) grad log h, Theorem 3.1 for predicted data: exact with scale 1, whatever the solver
    of k-diffusion, for all of them see denoised_q alone. (A ratio of densities is the same in both coordinates: their
    Jacobians cancel.)

    Times outside the guidance's schedule become its nearest end, t_min or t_max.

    Args:
        model: a model of k-diffusion, called with x_ve and sigma_ve [B]; or a :class:`tgdp_fast.Denoiser`, or anything
            with ``schedule`` and ``epsilon``, whose denoised signal is x_ve - sigma_ve eps(alpha x_ve, t).
        guidance: a :class:`tgdp_fast.GuidanceNetwork`, or anything with ``log_ratio_and_grad``; None for no guidance.
        schedule: of the guidance; default the one that it states.
        scale: guidance scale; 1 is exact.
        labels: the entry of ``extra_args`` that holds the labels for conditional guidance and denoisers of ours.

    Raises:
        ValueError: a model or guidance that cannot be called so; a guidance without a schedule; a bad scale.
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
            _check_guidance(guidance)
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
        """x_ve [B, ...], sigma_ve [B] > 0 -> denoised [B, ...]."""
        noise_level = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).expand(len(x))
        labels = extra_args.get(self.labels)
        # float64 and rounded once: alpha x_ve has the rounding of one product.
        alpha = torch.rsqrt(1.0 + noise_level.square())
        state = per_sample(alpha.to(x.dtype), x) * x
        model, guidance = self.model, self.guidance
        if hasattr(model, "epsilon"):
            time = _time_at(model.schedule, noise_level)
            with torch.no_grad(), evaluation_mode(model):
                epsilon = model.epsilon(state, time, labels_for(model, labels))
            denoised: Tensor = x - per_sample(noise_level.to(x.dtype), x) * epsilon
        else:
            denoised = model(x, sigma, **extra_args)
        if guidance is None or self.scale == 0.0 or self.schedule is None:
            return denoised
        gradient = _gradient(guidance, state, _time_at(self.schedule, noise_level), labels)
        weight = self.scale * noise_level.square() * alpha
        return denoised + per_sample(weight.to(x.dtype), x) * gradient


def _check_guidance(guidance: Any) -> None:
    if not hasattr(guidance, "log_ratio_and_grad"):
        raise ValueError(f"guidance must have a method log_ratio_and_grad(x, t, labels), got {type(guidance).__name__}")


def _time_at(schedule: NoiseSchedule, noise_level: Tensor) -> Tensor:
    """The time of sigma / alpha [B], at most the schedule's ends: refusing a tensor would wait for its device."""
    times = schedule.time_from_half_log_snr(-noise_level.log()).clamp(schedule.t_min, schedule.t_max)
    if schedule.is_discrete:
        # sigma in float32 moves an index by up to 1e-5; networks keep tables for the indices themselves.
        nearest = times.round()
        times = torch.where((times - nearest).abs() < 1e-4, nearest, times)
    return times


def _gradient(guidance: Guidance, x: Tensor, times: Tensor, labels: Tensor | None) -> Tensor:
    with torch.no_grad(), evaluation_mode(guidance):
        gradient = guidance.log_ratio_and_grad(x, times, labels_for(guidance, labels))[1]
    return gradient.to(x.dtype)
