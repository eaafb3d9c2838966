"""The samplers of released code: ancestral sampling in T evaluations, plain and guided."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tgdp_fast.integrations.cond_fn import dtype_of, no_autocast
from tgdp_fast.integrations.released.networks import CONVENTIONS
from tgdp_fast.models.sssd_ecg.compiled import CompiledSSSDECG
from tgdp_fast.models.sssd_ecg.network import SSSDECG
from tgdp_fast.runtime.checks import check_choice, check_integer, check_number
from tgdp_fast.runtime.evaluation import evaluation_mode

_ENTRIES = ("T", "Alpha", "Alpha_bar", "Sigma")


def calc_diffusion_hyperparams(
    T: int,  # noqa: N803
    beta_0: float,
    beta_T: float,  # noqa: N803
    *,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """The diffusion process with T steps and a linear schedule, as the dictionary that the samplers accept.

    Beta_t = beta_0 .. beta_T; Alpha_t = 1 - Beta_t; Alpha_bar_t = product of Alpha up to t;
    Sigma_t^2 = Beta_t (1 - Alpha_bar_{t-1}) / (1 - Alpha_bar_t), and Sigma_0^2 = Beta_0 (DiffWave, section 2).

    Args:
        T: number of diffusion steps, at least 2; 200 in the papers.
        beta_0, beta_T: first and last beta, in (0, 1); 1e-4 and 0.02 in the papers.
        dtype: of the tensors. They are computed in float64.

    Returns:
        "T" and the tensors "Beta", "Alpha", "Alpha_bar", "Sigma" of shape [T], on the CPU.
        ``NoiseSchedule.from_betas(hyperparams["Beta"])`` is the same process for the rest of this package.

    Raises:
        ValueError: an argument out of range.
    """
    steps = check_integer("T", T, 2)
    first = check_number("beta_0", beta_0, 0.0, 1.0, exclusive=True)
    last = check_number("beta_T", beta_T, 0.0, 1.0, exclusive=True)
    beta = torch.linspace(first, last, steps, dtype=torch.float64, device="cpu")
    alpha = 1.0 - beta
    alpha_bar = alpha.cumprod(0)
    variance = beta.clone()
    variance[1:] *= (1.0 - alpha_bar[:-1]) / (1.0 - alpha_bar[1:])
    values = {"Beta": beta, "Alpha": alpha, "Alpha_bar": alpha_bar, "Sigma": variance.sqrt()}
    return {"T": steps, **{name: value.to(dtype) for name, value in values.items()}}


def sampling_label(
    net: Callable[..., Tensor],
    size: tuple[int, ...],
    diffusion_hyperparams: Mapping[str, Any],
    cond: Tensor | None = None,
    *,
    noise: Tensor | Iterable[Tensor] | None = None,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Ancestral sampling of the source model, T evaluations (DDPM, algorithm 2). Both conventions agree here.

    See :func:`sampling_label_guided` for the arguments, and :func:`tgdp_fast.sample` for samplers with fewer steps.

    Returns:
        [B, ...] of ``size``, on the network's device.
    """
    return sampling_label_guided(
        net, None, size, diffusion_hyperparams, cond, noise=noise, generator=generator, batch_size=batch_size
    )


def sampling_label_guided(
    net: Callable[..., Tensor],
    guidance_net: Any,
    size: tuple[int, ...],
    diffusion_hyperparams: Mapping[str, Any],
    cond: Tensor | None = None,
    guidance_scale: float = 1.0,
    *,
    guidance_cond: Tensor | None = None,
    convention: str = "paper",
    noise: Tensor | Iterable[Tensor] | None = None,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Ancestral sampling with guidance, T evaluations.

    For t = T - 1 .. 0, with s the guidance scale, f the guidance and z standard normal (none at t = 0)::

        eps = net((x, cond, t))
        eps = eps - s sqrt(1 - Alpha_bar_t) grad_x f(x, t)          convention="paper", TGDP Theorem 3.1
        eps = eps + s grad_x f(x, t)                                convention="released"
        x   = (x - Beta_t / sqrt(1 - Alpha_bar_t) eps) / sqrt(Alpha_t) + Sigma_t z

    Args:
        net: an :class:`SSSD_ECG`, the result of its ``compile_for_sampling`` (faster), a :class:`tgdp_fast.SSSDECG`, or
            any callable like ``net((x, cond, diffusion_steps [B, 1]))``.
        guidance_net: a :class:`Bandit_Critic_Guide`, a :class:`GuidanceQt`, a :class:`tgdp_fast.GuidanceNetwork`,
            any object with ``log_ratio_and_grad(x, t, labels)`` or, as in released code,
            ``calculate_guidance(x, diffusion_steps [B, 1])``, or a callable ``guidance_net(x, t [B])``, which autograd
            differentiates. None for no guidance.
        size: of the result, batch first.
        diffusion_hyperparams: of :func:`calc_diffusion_hyperparams`.
        cond: labels of ``net``, one row per sample; None for a network without labels.
        guidance_scale: s.
        guidance_cond: labels of a conditional ``guidance_net``, its third argument.
        convention: sign and factor of the gradient.
        noise: x_T and then the noise of the steps T - 1 .. 1, as [T, *size] or any iterable of T tensors. Its dtype is
            that of the state. Default: noise drawn on the host, as in released code, or on the generator's device.
        generator: of the noise; default: PyTorch's global one.
        batch_size: samples per call of the networks; bounds memory and does not change the noise.

    Returns:
        [B, ...] of ``size``, on the network's device.

    Raises:
        ValueError: a bad argument; noise with another number of tensors or shape.
        ArithmeticError: the result is not finite.
    """
    check_choice("convention", convention, CONVENTIONS)
    scale = check_number("guidance_scale", guidance_scale)
    size = tuple(check_integer("size's entries", entry, 1) for entry in size)
    batch_size = size[0] if batch_size is None else check_integer("batch_size", batch_size, 1)
    if noise is not None and generator is not None:
        raise ValueError("noise and generator were both given; leave one out")
    steps, coefficients = _coefficients(diffusion_hyperparams)
    for name, labels in (("cond", cond), ("guidance_cond", guidance_cond)):
        if labels is not None and len(labels) != size[0]:
            raise ValueError(f"{name} must have one row for each of the {size[0]} samples of size, got {len(labels)}")
    parameter = next(net.parameters(), None) if isinstance(net, nn.Module) else None
    draws = _noise(noise, generator, steps, size, parameter)
    with torch.no_grad(), evaluation_mode(net, guidance_net) as (net, guidance_net):
        x = next(draws)
        cond, guidance_cond = (None if each is None else each.to(x.device) for each in (cond, guidance_cond))
        for t in reversed(range(steps)):
            direct, from_epsilon, sigma, fresh = coefficients[t]
            weight = -scale * sigma if convention == "paper" else scale
            epsilon = torch.cat(
                [
                    _epsilon(net, guidance_net, x[rows], t, _rows(cond, rows), _rows(guidance_cond, rows), weight)
                    for rows in (slice(first, first + batch_size) for first in range(0, size[0], batch_size))
                ]
            )
            x = direct * x - from_epsilon * epsilon
            if t > 0:
                x = x + fresh * next(draws)
    if next(draws, None) is not None:
        raise ValueError(f"noise must have {steps} entries, one for x_T and one for each step but the last; got more")
    if not x.isfinite().all():
        raise ArithmeticError(
            "sampling diverged: the result is not finite; lower guidance_scale, or check the network's weights"
        )
    return x


def _coefficients(hyperparams: Mapping[str, Any]) -> tuple[int, list[tuple[float, float, float, float]]]:
    """T, and for each step the factors of x and of epsilon (subtracted), sigma_t, and the factor of fresh noise."""
    missing = [name for name in _ENTRIES if name not in hyperparams]
    if missing:
        raise ValueError(
            f"diffusion_hyperparams must have the entries {', '.join(_ENTRIES)}, {', '.join(missing)} are missing; use "
            "calc_diffusion_hyperparams(T, beta_0, beta_T)"
        )
    steps = check_integer("diffusion_hyperparams['T']", hyperparams["T"], 1)
    columns = {}
    for name in ("Alpha", "Alpha_bar", "Sigma", "Beta"):
        given = hyperparams[name] if name in hyperparams else 1.0 - torch.as_tensor(hyperparams["Alpha"], device="cpu")
        columns[name] = torch.as_tensor(given, dtype=torch.float64, device="cpu").tolist()
        if len(columns[name]) != steps:
            raise ValueError(f"diffusion_hyperparams[{name!r}] must have T = {steps} entries, got {len(columns[name])}")
    result = []
    for alpha, alpha_bar, fresh, beta in zip(*columns.values(), strict=True):
        sigma = math.sqrt(1.0 - alpha_bar)
        direct = 1.0 / math.sqrt(alpha)
        result.append((direct, direct * beta / sigma, sigma, fresh))
    return steps, result


def _noise(
    noise: Tensor | Iterable[Tensor] | None,
    generator: torch.Generator | None,
    steps: int,
    size: tuple[int, ...],
    parameter: Tensor | None,
) -> Iterator[Tensor]:
    """``steps`` tensors of ``size`` on the device of ``parameter``, then the rest of the caller's noise."""
    device = None if parameter is None else parameter.device
    if noise is None:
        dtype = torch.float32 if parameter is None else parameter.dtype
        place = torch.device("cpu") if generator is None else generator.device
        for _ in range(steps):
            # In float32 for every dtype of the network, so that a seed gives the same noise.
            drawn = torch.randn(size, generator=generator, device=place, dtype=torch.float32)
            yield drawn.to(place if device is None else device, dtype)
        return
    given = iter(noise)
    for count in range(steps):
        draw = next(given, None)
        if draw is None or tuple(draw.shape) != size:
            came = f"{count} entries" if draw is None else f"an entry of shape {tuple(draw.shape)}"
            raise ValueError(f"noise must have {steps} entries of shape {size}, x_T first; got {came}")
        yield draw if device is None else draw.to(device)
    yield from given


def _rows(labels: Tensor | None, rows: slice) -> Tensor | None:
    return None if labels is None else labels[rows]


def _epsilon(
    net: Callable[..., Tensor],
    guidance: Any,
    x: Tensor,
    t: int,
    cond: Tensor | None,
    guidance_cond: Tensor | None,
    weight: float,
) -> Tensor:
    """epsilon + weight grad f, in the dtype of epsilon; f runs in that of its parameters, without any in float32."""
    steps = torch.full((len(x), 1), float(t), device=x.device, dtype=torch.float32)
    ours = isinstance(net, SSSDECG | CompiledSSSDECG)
    epsilon = net(x, steps[:, 0], cond) if ours else net((x, cond, steps))
    if guidance is None or weight == 0.0:
        return epsilon
    state = x.detach().to(dtype_of(guidance, x))
    with no_autocast(x):
        gradient = _gradient(guidance, state, t, steps, guidance_cond)
    return (epsilon + weight * gradient).to(epsilon.dtype)


def _gradient(guidance: Any, x: Tensor, t: int, steps: Tensor, guidance_cond: Tensor | None) -> Tensor:
    """grad f of any of the forms that :func:`sampling_label_guided` accepts."""
    if hasattr(guidance, "log_ratio_and_grad"):
        gradient: Tensor = guidance.log_ratio_and_grad(x, float(t), guidance_cond)[1]
        return gradient
    labels = () if guidance_cond is None else (guidance_cond,)
    if hasattr(guidance, "calculate_guidance"):
        gradient = guidance.calculate_guidance(x, steps, *labels)
        return gradient
    with torch.enable_grad():
        state = x.requires_grad_()
        (gradient,) = torch.autograd.grad(guidance(state, steps[:, 0], *labels).sum(), state)
    return gradient
