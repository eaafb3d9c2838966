"""log h as ``cond_fn``, the hook for classifier guidance in samplers like those of guided-diffusion.

    cond_fn = as_cond_fn(guidance, NoiseSchedule.from_betas(diffusion.betas))
    samples = diffusion.ddim_sample_loop(model, shape, cond_fn=cond_fn)

Such a sampler adds grad_x log p(y | x_t) to the score. TGDP adds grad_x log h(x_t, t) (Ouyang et al., NeurIPS 2024,
arXiv 2405.16876, Theorem 3.1), so a guidance can replace the classifier. The samplers are algorithms 1 and 2 of
Dhariwal & Nichol (NeurIPS 2021, arXiv 2105.05233).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tgdp_fast.diffusion.denoiser import labels_for
from tgdp_fast.diffusion.guided import check_guidance
from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.runtime.checks import check_number
from tgdp_fast.runtime.evaluation import evaluation_mode


def as_cond_fn(
    guidance: Any,
    schedule: NoiseSchedule | None = None,
    *,
    scale: float = 1.0,
    labels: str = "y",
    time_scale: float = 1.0,
) -> Callable[..., Tensor]:
    """``cond_fn(x, t, **model_kwargs) -> scale * grad_x log h(x, t)`` for samplers like those of guided-diffusion.

    Sign and factor. The result is the gradient of a log ratio, target over source, with a plus sign, like a
    classifier's grad log p(y | x). The sampler multiplies it:

    - ``ddim_sample`` (algorithm 2) does ``eps -= sqrt(1 - alpha_bar_t) * cond_fn``. As sigma_t = sqrt(1 - alpha_bar_t),
      this is eps_q = eps_p - sigma_t grad log h, Theorem 3.1 itself: exact with scale 1.
    - ``p_sample`` (algorithm 1) does ``mean += variance * cond_fn`` at every step. The mean of the reverse step is
      (x + beta_t score) / sqrt(alpha_t), so Theorem 3.1 asks for beta_t / sqrt(alpha_t) grad log h. A sampler with
      variance beta_t is too small by the factor sqrt(alpha_t), 1 % for beta_t = 0.02. One with the posterior variance
      is too small by sqrt(alpha_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t), which is far from 1 only in the last
      steps. The error of the result vanishes with the step size. Between two Gaussians in 100 steps it is twice that of
      exact guidance in the same loop with the posterior variance, and a fifth larger with beta_t. With few steps, use
      ``ddim_sample``.

    Time. ``t`` is the index of the sampler's training schedule as a tensor [B], where 0 is the cleanest. With respaced
    steps the sampler maps its own index to this one before the call. A guidance with another schedule receives the time
    at which its own log-SNR is the same.

    Args:
        guidance: a :class:`tgdp_fast.GuidanceNetwork`, or anything with ``log_ratio_and_grad``.
        schedule: the sampler's training schedule, discrete; default the guidance's own.
        scale: guidance scale; 1 is exact.
        labels: the entry of ``model_kwargs`` that holds the labels, for a conditional guidance. Others are ignored.
        time_scale: factor by which the sampler multiplied the index, ``1000 / N`` with ``rescale_timesteps=True``.

    Returns:
        The function; its result has the shape and dtype of ``x`` and carries no graph. The guidance runs in the dtype
        of its parameters, without parameters in float32 (float64 if ``x`` is), whatever the dtype of ``x``.

    Raises:
        ValueError: no discrete schedule; a bad scale; the guidance has no ``log_ratio_and_grad``. When the function is
            called: ``t`` beyond the schedule, as with ``rescale_timesteps=True`` without ``time_scale`` (told on the
            CPU; elsewhere the result is NaN).
    """
    check_guidance(guidance)
    own, given = getattr(guidance, "schedule", None), schedule is not None
    schedule = own if schedule is None else schedule
    if not isinstance(schedule, NoiseSchedule) or not schedule.is_discrete:
        came = f"got {schedule!r}" if given else f"but none was given and the guidance's own is {schedule!r}"
        raise ValueError(
            f"schedule must be the sampler's discrete NoiseSchedule, {came}; build it with "
            "NoiseSchedule.from_betas(diffusion.betas)"
        )
    sampler_schedule = schedule
    scale = check_number("scale", scale)
    time_scale = check_number("time_scale", time_scale, 0.0, exclusive=True)

    def cond_fn(x: Tensor, t: Tensor, **model_kwargs: Any) -> Tensor:
        times = torch.as_tensor(t, device=x.device).to(torch.float64) / time_scale
        last = sampler_schedule.t_max
        # Only on the host: elsewhere the check would wait for the device.
        if times.device.type == "cpu" and bool(((times < 0.0) | (times > last)).any()):
            low, high = (time_scale * float(each) for each in (times.min(), times.max()))
            raise ValueError(
                f"t must be in [0, {time_scale * last:g}], got values from {low:g} to {high:g}; for a sampler with "
                "rescale_timesteps=True call as_cond_fn with time_scale=1000 / N"
            )
        if own is not None and own != sampler_schedule:
            times = time_at(own, torch.exp(-sampler_schedule.half_log_snr(times)))
        return (scale * gradient_at(guidance, x, times, model_kwargs.get(labels))).to(x.dtype)

    return cond_fn


def time_at(schedule: NoiseSchedule, noise_level: Tensor) -> Tensor:
    """The time of sigma / alpha [B], at most the schedule's ends: refusing a tensor would wait for its device."""
    times = schedule.time_from_half_log_snr(-noise_level.log()).clamp(schedule.t_min, schedule.t_max)
    if schedule.is_discrete:
        # sigma in float32 moves an index by up to 1e-5; networks keep tables for the indices themselves.
        nearest = times.round()
        times = torch.where((times - nearest).abs() < 1e-4, nearest, times)
    return times


def gradient_at(guidance: Any, x: Tensor, times: Tensor, labels: Tensor | None) -> Tensor:
    """grad_x log h [B, ...] without a graph, in the dtype of ``x`` or float32 for half precision."""
    state = x.detach().to(dtype_of(guidance, x))
    with torch.no_grad(), evaluation_mode(guidance) as (guidance,), no_autocast(x):
        gradient: Tensor = guidance.log_ratio_and_grad(state, times, labels_for(guidance, labels))[1]
    return gradient.to(torch.promote_types(x.dtype, torch.float32))


def dtype_of(guidance: Any, x: Tensor) -> torch.dtype:
    """The dtype of the guidance's parameters; without parameters float32, or float64 if ``x`` is."""
    parameter = first_parameter(guidance)
    if parameter is not None:
        return parameter.dtype
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def first_parameter(guidance: Any) -> Tensor | None:
    """The first floating-point parameter of a module; None for anything else."""
    if not isinstance(guidance, nn.Module):
        return None
    return next((each for each in guidance.parameters() if each.is_floating_point()), None)


def no_autocast(x: Tensor) -> torch.autocast:
    """A context without autocast: log h differs little between samples, so half precision would leave noise of it."""
    return torch.autocast(x.device.type, enabled=False)
