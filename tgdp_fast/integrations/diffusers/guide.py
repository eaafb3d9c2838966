"""A pipeline's model guided by log h, for any scheduler of diffusers.

Conventions. diffusers' integer timestep k is the time of ``NoiseSchedule.from_diffusers(scheduler)``, where
alpha_k^2 = alphas_cumprod[k]. What a diffusers model sees is x_k = alpha_k x_0 + sigma_k epsilon with every
variance-preserving scheduler: those that compute in variance-exploding coordinates (Euler, Heun, LMS, ...) scale the
model's input back. So TGDP's guidance (Ouyang et al., NeurIPS 2024, arXiv 2405.16876, Theorem 3.1) is a change of the
model's output alone, whatever the scheduler does with it and however many outputs it remembers.

With g = grad_x log h(x_k, k) and the scale w, from x = alpha x_0 + sigma epsilon and v = alpha epsilon - sigma x_0::

    epsilon        epsilon - w sigma g
    sample         x_0 + w (sigma^2 / alpha) g
    v_prediction   v - w (sigma / alpha) g           (alpha sigma + sigma^3 / alpha = sigma / alpha)
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn

from tgdp_fast.diffusion.denoiser import TIME_INPUTS
from tgdp_fast.diffusion.guided import Guidance, hint_of_guidance, scale_at
from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.integrations.cond_fn import dtype_of, first_parameter, no_autocast
from tgdp_fast.ops import limit_gradient
from tgdp_fast.runtime.checks import check_choice
from tgdp_fast.runtime.evaluation import evaluation_mode
from tgdp_fast.sampling.config import SamplingConfig

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
#: What a scheduler's config says about its model.
_CONFIG_KEYS = ("prediction_type", "rescale_betas_zero_snr", "timestep_type", "use_flow_sigmas")
_MODEL_NAMES = ("unet", "transformer")
_INPUT_NAMES = ("sample", "hidden_states", "x")


def guide(
    pipeline: Any,
    guidance: Guidance | Callable[..., Tensor],
    *,
    scale: float | Callable[[float], float] = 1.0,
    interval: tuple[float, float] | None = None,
    labels: Any = None,
    scheduler: Any = None,
    prediction_type: str | None = None,
    time_input: str = "time",
    gradient_norm_limit: float | None = None,
) -> GuidedModel:
    """Guide the model of a diffusers pipeline until ``restore()``, or inside a ``with`` block::

        with guide(pipeline, guidance, scale=1.0):
            images = pipeline(batch_size=16, num_inference_steps=25).images

    Every caller of the model gets guided predictions: any scheduler, any pipeline, your own loop. The model keeps its
    class, weights, dtype and device, and may be compiled (``torch.compile(model)`` or ``model.compile()``); the
    guidance runs outside the compiled graph. Two guides at once add their gradients, that is, they multiply the density
    ratios; the same guidance twice gives a warning. A guidance network that is a module is in eval mode in each call.

    Args:
        pipeline: a pipeline with ``unet`` or ``transformer`` and ``scheduler``, or such a model alone (then pass
            ``scheduler``). The model is the pipeline's current object: compile or replace it first.
        guidance: one of

            - a :class:`tgdp_fast.GuidanceNetwork`, or any object with ``log_ratio_and_grad(x, t, labels)`` that
              returns (log h [B], grad_x log h [B, ...]);
            - a module or function that returns log h of noised images, [B] or [B, 1], as ``f(x, t)`` or ``f(x, t,
              labels)``; autograd computes its gradient.

            x [B, ...] has the dtype of the guidance's parameters (without parameters: float32, or float64 if x is).
        scale: guidance scale; 1 is exact. A function of diffusers' timestep gives a scale schedule.
        interval: (low, high) in diffusers' timesteps; the guidance does not run outside.
        labels: of the guidance: one class index for all, [n] or [n, K]. A batch of a multiple of n repeats them, as
            classifier-free guidance repeats the batch. Default: the ``class_labels`` of the model's call if
            the guidance has ``num_classes`` > 0; else none. Where classifier-free guidance passes the index that stands
            for no class (DiT: 1000), the guidance receives the class of the same image in the other half.
        scheduler: of a model alone: a diffusers scheduler, whose ``alphas_cumprod`` and ``prediction_type`` are used,
            or a discrete :class:`tgdp_fast.NoiseSchedule`. Default: the pipeline's current one at each call, with the
            config and noise that it has then.
        prediction_type: "epsilon", "sample" or "v_prediction"; default: that of the scheduler's config.
        time_input: the time that the guidance receives, as a float by ``log_ratio_and_grad`` and as a tensor [B] in the
            dtype of x by a module or function. "time": if the guidance has a ``schedule`` (any NoiseSchedule, also a
            continuous one), the time with the same log-SNR on that schedule; else diffusers' timestep 0 .. N - 1.
            "half_log_snr": log(alpha / sigma).
        gradient_norm_limit: largest per-sample L2 norm of scale * sigma * gradient; longer gradients are shortened.

    Returns:
        A :class:`GuidedModel`; the guidance is active from now on.

    Raises:
        ValueError: a bad argument, or a scheduler with continuous timesteps. When the model is called: timesteps that
            differ within a batch or lie outside 0 .. N - 1, labels that are no classes of the guidance, or shapes or
            devices that do not match.
        TypeError: a scheduler without ``alphas_cumprod`` (flow matching, EDM), for which the formulas do not hold.
    """
    config = SamplingConfig(scale=scale, interval=interval, gradient_norm_limit=gradient_norm_limit)
    return GuidedModel(
        pipeline,
        guidance,
        config,
        labels=labels,
        scheduler=scheduler,
        prediction_type=prediction_type,
        time_input=time_input,
    )


@dataclass(frozen=True)
class _Conventions:
    """The conventions of a scheduler's model."""

    schedule: NoiseSchedule
    prediction_type: str
    last: float  # the last timestep; beyond schedule.t_max if the last one has no signal

    @classmethod
    def of(cls, scheduler: Any, prediction_type: str | None) -> _Conventions:
        """Raises ValueError or TypeError unless the scheduler is variance preserving with a known prediction type."""
        if isinstance(scheduler, NoiseSchedule):
            if not scheduler.is_discrete:
                raise ValueError(
                    f"scheduler must be a diffusers scheduler or a discrete NoiseSchedule, got {scheduler}; diffusers' "
                    "timesteps are the indices of its alphas_cumprod"
                )
            return cls(scheduler, check_choice("prediction_type", prediction_type, PREDICTION_TYPES), scheduler.t_max)
        config = getattr(scheduler, "config", {})
        if config.get("use_flow_sigmas", False):
            raise ValueError(
                f"scheduler must be variance preserving, got {type(scheduler).__name__} with use_flow_sigmas=True"
            )
        if config.get("timestep_type") == "continuous":
            raise ValueError(
                "scheduler must call the model with timesteps that index its alphas_cumprod, got "
                f"{type(scheduler).__name__} with timestep_type='continuous', whose model receives log(sigma) / 4"
            )
        if prediction_type is None:
            prediction_type = config.get("prediction_type", "epsilon")
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        if config.get("rescale_betas_zero_snr", False):
            # Without signal h = 1 (TGDP section 3.2): no guidance at the last timestep. Some schedulers store a small
            # number there, which may even exceed the one before.
            schedule = NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod[:-1])
            return cls(schedule, prediction_type, schedule.t_max + 1.0)
        schedule = NoiseSchedule.from_diffusers(scheduler)
        return cls(schedule, prediction_type, schedule.t_max)


class _Known:
    """The conventions of a scheduler, and what they were read from."""

    def __init__(self, state: tuple[Any, ...], alphas_cumprod: Any, conventions: _Conventions) -> None:
        self.state, self.conventions = state, conventions
        self._given, self._version = alphas_cumprod, _version(alphas_cumprod)
        self._values = _on_host(alphas_cumprod)

    def holds(self, alphas_cumprod: Any) -> bool:
        """Whether these are the values that the conventions were read from."""
        version = _version(alphas_cumprod)
        if alphas_cumprod is self._given and version is not None and version == self._version:
            return True  # Without a copy, which would wait for a GPU at each call.
        values = _on_host(alphas_cumprod)
        if values is None or self._values is None:
            return values is self._values
        return torch.equal(values, self._values)


def _version(values: Any) -> int | None:
    """A number that changes with each write into a tensor; None for what has none."""
    return int(values._version) if isinstance(values, Tensor) and not values.is_inference() else None


def _on_host(values: Any) -> Tensor | None:
    """A copy of them on the CPU."""
    if values is None:
        return None
    return torch.as_tensor(values, device=getattr(values, "device", "cpu")).detach().to("cpu", copy=True)


class GuidedModel:
    """The result of :func:`guide`: a context manager that restores the model on exit, also after an exception.

    Attributes:
        model: the guided model.
        scale, interval, gradient_norm_limit: as given; may be changed between two calls of the model.
    """

    def __init__(
        self,
        pipeline: Any,
        guidance: Any,
        config: SamplingConfig,
        *,
        labels: Any,
        scheduler: Any,
        prediction_type: str | None,
        time_input: str,
    ) -> None:
        self.model = _model_of(pipeline)
        if not hasattr(guidance, "log_ratio_and_grad") and not callable(guidance):
            raise ValueError(
                "guidance must have a method log_ratio_and_grad(x, t, labels) or be callable as guidance(x, t), got "
                f"{type(guidance).__name__}{hint_of_guidance(guidance)}"
            )
        if scheduler is None and (self.model is pipeline or not hasattr(pipeline, "scheduler")):
            raise ValueError(
                "scheduler must be given with a model alone: the diffusers scheduler that it was trained with, or its "
                "NoiseSchedule and prediction_type"
            )
        self.guidance = guidance
        self.scale, self.interval = config.scale, config.interval
        self.gradient_norm_limit = config.gradient_norm_limit
        self.labels = None if labels is None else torch.as_tensor(labels, device=getattr(labels, "device", "cpu"))
        self.time_input = check_choice("time_input", time_input, TIME_INPUTS)
        self._pipeline = pipeline
        self._scheduler = scheduler
        self._prediction_type = prediction_type
        self._parameters = _parameter_names(self.model)
        self._known: _Known | None = None
        self._conventions()  # Raise for an unsuitable scheduler here, not at the first call.
        if any(other.model is self.model and other.guidance is guidance for other in _active):
            warnings.warn(
                "this guidance guides the model already, and both add up; restore() the earlier one first, or guide in "
                "a `with`",
                stacklevel=3,
            )
        self._undo: Callable[[], None] | None = self._install()
        _active.add(self)

    def __enter__(self) -> GuidedModel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Restore the model's own predictions. A second call does nothing.

        Raises:
            RuntimeError: another guide was put on a model compiled in place after this one: restore that one first.
        """
        if self._undo is not None:
            self._undo()
            self._undo = None
            _active.discard(self)

    def _install(self) -> Callable[[], None]:
        model: Any = self.model
        compiled = getattr(model, "_compiled_call_impl", None)
        if compiled is None:
            return model.register_forward_hook(self._after_forward, with_kwargs=True).remove

        # model.compile() would trace a hook too, and keep it: the compiled call is wrapped instead.
        def call(*args: Any, **kwargs: Any) -> Any:
            return self._after_forward(model, args, kwargs, compiled(*args, **kwargs))

        def undo() -> None:
            if model._compiled_call_impl is not call:
                raise RuntimeError("restore the guides of a compiled model in reverse order: another one lies on this")
            model._compiled_call_impl = compiled

        model._compiled_call_impl = call
        return undo

    def _conventions(self) -> _Conventions:
        """Those of the scheduler as it is now: another one may have come, and its config and noise may have changed."""
        scheduler = self._pipeline.scheduler if self._scheduler is None else self._scheduler
        config, alphas_cumprod = getattr(scheduler, "config", {}), getattr(scheduler, "alphas_cumprod", None)
        state = (scheduler, *(config.get(name) for name in _CONFIG_KEYS))
        known = self._known
        if known is None or known.state != state or not known.holds(alphas_cumprod):
            known = self._known = _Known(state, alphas_cumprod, _Conventions.of(scheduler, self._prediction_type))
        return known.conventions

    def scale_at(self, timestep: float) -> float:
        """Guidance scale at diffusers' ``timestep``; 0 outside the interval and without signal."""
        if timestep > self._conventions().schedule.t_max:
            return 0.0
        return scale_at(self.scale, self.interval, timestep, "timestep")

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The forward hook: the model's output with guidance, in its original form."""
        if isinstance(output, tuple):
            return (self._after_forward(model, args, kwargs, output[0]), *output[1:])
        if not isinstance(output, Tensor):
            return dataclasses.replace(output, sample=self._after_forward(model, args, kwargs, output.sample))
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        x = next((given[name] for name in _INPUT_NAMES if name in given), args[0] if args else None)
        timestep = given.get("timestep", args[1] if len(args) > 1 else None)
        if x is None or timestep is None:
            raise ValueError(f"model must be called as model(sample, timestep, ...), got the arguments {sorted(given)}")
        return self._guided(output, x, self._one_timestep(timestep), given.get("class_labels"))

    def _one_timestep(self, timestep: Any) -> float:
        values = set(timestep.flatten().tolist() if isinstance(timestep, Tensor) else np.ravel(timestep).tolist())
        if len(values) != 1:
            raise ValueError(f"timestep must be the same for the whole batch, got {sorted(values)}")
        value, last = float(values.pop()), self._conventions().last
        # A pipeline may hand its timesteps over in the model's dtype: 999 is 1000 in bfloat16.
        rounded = isinstance(timestep, Tensor) and timestep.dtype in (torch.float16, torch.bfloat16)
        return last if rounded and last < value <= last * (1.0 + torch.finfo(timestep.dtype).eps) else value

    def _guided(self, prediction: Tensor, x: Tensor, timestep: float, class_labels: Any) -> Tensor:
        conventions = self._conventions()
        if not 0.0 <= timestep <= conventions.last:
            raise ValueError(f"timestep must be in [0, {conventions.last:g}], got {timestep!r}")
        scale = self.scale_at(timestep)
        if scale == 0.0:
            return prediction
        # A model that also predicts a variance appends its channels.
        learns_variance = prediction.ndim > 1 and prediction.shape[1] == 2 * x.shape[1]
        mean, *variance = prediction.chunk(2, dim=1) if learns_variance else (prediction,)
        if mean.shape != x.shape:
            raise ValueError(
                f"model must predict the shape of its input {tuple(x.shape)} (or twice its channels), got "
                f"{tuple(prediction.shape)}; models with more input channels than latents cannot be guided"
            )
        schedule = conventions.schedule
        alpha, sigma = schedule.alpha(timestep), schedule.sigma(timestep)
        with no_autocast(x):
            gradient = self._gradient(x, timestep, schedule, self._labels_of(x, class_labels))
        if self.gradient_norm_limit is not None:
            gradient = limit_gradient(gradient, scale * sigma, self.gradient_norm_limit)
        factor = {"epsilon": -sigma, "sample": sigma**2 / alpha, "v_prediction": -sigma / alpha}
        guided = (mean.to(gradient.dtype) + scale * factor[conventions.prediction_type] * gradient).to(mean.dtype)
        return torch.cat([guided, *variance], dim=1)

    def _gradient(self, x: Tensor, timestep: float, schedule: NoiseSchedule, labels: Tensor | None) -> Tensor:
        """grad_x log h: shape of x, float32 or float64."""
        with evaluation_mode(self.guidance) as (guidance,):
            return self._gradient_of(guidance, x, timestep, schedule, labels)

    def _gradient_of(
        self, guidance: Any, x: Tensor, timestep: float, schedule: NoiseSchedule, labels: Tensor | None
    ) -> Tensor:
        self._check_fit(x)
        state = x.detach().to(dtype_of(guidance, x))
        time = self._guidance_time(timestep, schedule)
        if hasattr(guidance, "log_ratio_and_grad"):
            with torch.no_grad():
                _, gradient = guidance.log_ratio_and_grad(state, time, labels)
        else:
            # Pipelines run without gradients, and some callers in inference mode, whose tensors cannot require them.
            with torch.inference_mode(False), torch.enable_grad():
                state = state.clone().requires_grad_()
                times = torch.full((len(x),), time, dtype=state.dtype, device=x.device)
                if labels is not None and labels.is_inference():
                    labels = labels.clone()
                log_ratio = guidance(state, times) if labels is None else guidance(state, times, labels)
                tensor = isinstance(log_ratio, Tensor)
                if not tensor or log_ratio.shape not in (x.shape[:1], (len(x), 1)) or not log_ratio.requires_grad:
                    came = (
                        f"shape {tuple(log_ratio.shape)}, requires_grad={log_ratio.requires_grad}"
                        if tensor
                        else type(log_ratio).__name__
                    )
                    raise ValueError(
                        f"guidance must give the log ratio of each image, a tensor [{len(x)}] or [{len(x)}, 1], as a "
                        f"differentiable function of it; got {came}"
                    )
                (gradient,) = torch.autograd.grad(log_ratio.sum(), state)
        return gradient.to(torch.float64 if torch.float64 in (x.dtype, gradient.dtype) else torch.float32)

    def _guidance_time(self, timestep: float, schedule: NoiseSchedule) -> float:
        if self.time_input == "half_log_snr":
            return schedule.half_log_snr(timestep)
        own = getattr(self.guidance, "schedule", None)
        if not isinstance(own, NoiseSchedule) or own == schedule:
            return timestep
        return own.time_from_half_log_snr(schedule.half_log_snr(timestep))

    def _labels_of(self, x: Tensor, class_labels: Any) -> Tensor | None:
        labels = self.labels
        if labels is None:
            classes = getattr(self.guidance, "num_classes", 0)
            return _classes_of(class_labels, classes, x) if classes and class_labels is not None else None
        if labels.ndim == 0:
            labels = labels[None]
        if len(x) % len(labels):
            raise ValueError(f"labels must have 1 row or one per sample of the batch of {len(x)}, got {len(labels)}")
        return labels.to(x.device).repeat(len(x) // len(labels), *[1] * (labels.ndim - 1))

    def _check_fit(self, x: Tensor) -> None:
        event_shape = getattr(self.guidance, "event_shape", None)
        if event_shape is not None and math.prod(event_shape) != x[:1].numel():
            raise ValueError(
                f"guidance must take what the model takes, samples of shape {tuple(x.shape[1:])}, but is of "
                f"event_shape {tuple(event_shape)}; for latent diffusion, fit it to latents"
            )
        parameter = first_parameter(self.guidance)
        if parameter is not None and parameter.device != x.device:
            raise ValueError(
                f"guidance must be on the device of the model, {x.device}, got {parameter.device}; move it with "
                f"guidance.to({str(x.device)!r})"
            )


#: Active guides of each model, to detect the same guidance twice, as when a notebook cell runs again.
_active: WeakSet[GuidedModel] = WeakSet()


def _model_of(pipeline: Any) -> nn.Module:
    if isinstance(pipeline, nn.Module):
        return pipeline
    for name in _MODEL_NAMES:
        model = getattr(pipeline, name, None)
        if isinstance(model, nn.Module):
            return model
    raise ValueError(
        f"pipeline must be a torch module or a pipeline with a {' or '.join(_MODEL_NAMES)}, got "
        f"{type(pipeline).__name__}; pass its model itself, with scheduler="
    )


def _parameter_names(model: nn.Module) -> list[str]:
    """Argument names of a model's forward; if it is compiled, of the model inside."""
    inner = getattr(model, "_orig_mod", model)
    return list(inspect.signature(inner.forward).parameters)


def _classes_of(labels: Any, num_classes: int, x: Tensor) -> Tensor:
    """The model's class labels as classes 0 .. num_classes - 1 of the guidance.

    Classifier-free guidance calls the model on a batch of two equal halves, one of them without class, for which models
    have an index of its own, such as DiT's 1000. Its images get the classes of the other half.

    Raises:
        ValueError: another label that is no class.
    """
    labels = torch.as_tensor(labels, device=x.device)
    if labels.ndim > 1:
        return labels  # [B, K]
    labels = labels.reshape(-1).expand(len(x)) if labels.numel() == 1 else labels
    half = len(x) // 2
    no_class = (labels < 0) | (labels >= num_classes)
    if bool(no_class.any()) and len(labels) == 2 * half and torch.equal(x[:half], x[half:]):
        labels = torch.where(no_class, labels.roll(half), labels)
        no_class = (labels < 0) | (labels >= num_classes)
    if bool(no_class.any()):
        raise ValueError(
            f"labels must lie in 0..{num_classes - 1}, the classes of guidance, got the model's class_labels "
            f"{labels.tolist()}; pass guide(..., labels=), the classes of the images"
        )
    return labels
