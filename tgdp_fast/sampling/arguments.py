"""Checks of a sampler: whether models, solver and settings fit each other, and the labels and prior of a draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tgdp_fast.diffusion.guided import EpsilonModel, Guidance, GuidedDenoiser, check_models, scale_at
from tgdp_fast.diffusion.prior import Prior
from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.diffusion.solvers import SolverTable, solver_table
from tgdp_fast.runtime.arrays import as_array, as_tensor, check_labels
from tgdp_fast.runtime.checks import check_integer
from tgdp_fast.sampling.config import SamplingConfig


def taken_apart(
    denoiser: EpsilonModel | GuidedDenoiser, guidance: Guidance | None, config: SamplingConfig | None
) -> tuple[EpsilonModel, Guidance | None, SamplingConfig]:
    """Denoiser, guidance and settings, those of a :class:`GuidedDenoiser` taken out of it."""
    default = SamplingConfig()
    config = default if config is None else config
    if not isinstance(config, SamplingConfig):
        raise ValueError(
            f"config must be a SamplingConfig, got {type(config).__name__}; SamplingConfig.from_dict makes one of a "
            "dictionary"
        )
    if not isinstance(denoiser, GuidedDenoiser):
        check_models(denoiser, guidance)
        return denoiser, guidance, config
    names = ("interval", "clamp", "gradient_norm_limit", "scale")
    repeated = ["guidance"] * (guidance is not None)
    repeated += [name for name in names if getattr(config, name) != getattr(default, name)]
    if repeated:
        raise ValueError(f"{', '.join(repeated)}: set on the GuidedDenoiser that was passed, not again in sample()")
    config = replace(config, **{name: getattr(denoiser, name) for name in names})
    return denoiser.denoiser, denoiser.guidance, config


def table_of(config: SamplingConfig, schedule: NoiseSchedule) -> SolverTable:
    """The config's solver on the schedule; ValueError for a ready table of another one."""
    table = config.solver
    if not isinstance(table, SolverTable):
        return solver_table(table, schedule, config.steps, spacing=config.spacing, eta=config.eta)
    if not _is_table_of(schedule, table):
        raise ValueError(
            f"solver is a table of another noise schedule than the denoiser's {schedule!r}; build it with "
            "solver_table(name, denoiser.schedule, steps)"
        )
    return table


def check_schedules(models: Mapping[str, Any]) -> None:
    """Raises ValueError for a denoiser without a schedule and a guidance with another one."""
    schedule = getattr(models["denoiser"], "schedule", None)
    if not isinstance(schedule, NoiseSchedule):
        raise ValueError(f"denoiser must have an attribute schedule, a NoiseSchedule, got {schedule!r}")
    other = getattr(models.get("guidance"), "schedule", None)
    if other is not None and other != schedule:
        raise ValueError(
            "guidance and denoiser must have the same noise schedule, got guidance.schedule = "
            f"{other!r} and denoiser.schedule = {schedule!r}; fit the guidance with the denoiser's schedule"
        )


def _is_table_of(schedule: NoiseSchedule, table: SolverTable) -> bool:
    inside = (table.times >= schedule.t_min) & (table.times <= schedule.t_max)
    return bool(inside.all()) and np.allclose(schedule.alpha(table.times), table.alpha, rtol=1e-6, atol=0.0)


def scales_of(config: SamplingConfig, table: SolverTable) -> list[float]:
    """Guidance scale at each time of the table, 0 outside the interval."""
    scales = []
    for t in table.times.tolist():
        try:
            scales.append(scale_at(config.scale, config.interval, t))
        except ValueError as error:
            raise ValueError(
                f"scale must give a finite number at every time of the solver; at t = {t}: {error}"
            ) from None
    return scales


def event_shape_of(shape: tuple[int, ...] | None, models: Mapping[str, Any]) -> tuple[int, ...]:
    """Shape of one sample: ``shape``, or that of the models; ValueError if these differ or there is none."""
    stated = {name: getattr(model, "event_shape", None) for name, model in models.items()}
    known = [tuple(value) for value in stated.values() if value is not None]
    if known and known[0] != known[-1]:
        raise ValueError(f"denoiser and guidance must have the same event_shape, got {known[0]} and {known[-1]}")
    if shape is None:
        if not known:
            raise ValueError(
                "shape must be given (the shape of one sample): the denoiser does not state its event_shape"
            )
        return known[0]
    try:
        shape = tuple(check_integer("shape entries", size, 1) for size in shape)
    except TypeError:
        raise ValueError(f"shape must be a tuple of integers, the shape of one sample, got {shape!r}") from None
    if known and shape != known[0]:
        raise ValueError(f"shape must be {known[0]}, the event_shape of the model, got {shape}")
    return shape


def check_prior(prior: Prior | None, shape: tuple[int, ...]) -> None:
    """Raises ValueError for an object that is no prior, and for a prior of samples of another shape."""
    if prior is None:
        return
    if not isinstance(prior, Prior):
        raise ValueError(
            f"prior must be a GaussianPrior, an EmpiricalPrior or None, got {type(prior).__name__}; see "
            "GaussianPrior.fit"
        )
    if prior.event_shape != shape:
        raise ValueError(f"prior must be of samples of shape {shape}, got one of {prior.event_shape}")


def device_of(device: torch.device | None, models: Mapping[str, Any]) -> torch.device:
    """``device``, or that of the first parameter; the parameters of all models must lie there."""
    places = {
        name: {parameter.device for parameter in model.parameters()}
        for name, model in models.items()
        if isinstance(model, nn.Module)
    }
    if device is None:
        result = next((place for found in places.values() for place in found), torch.device("cpu"))
    else:
        result = device
    for name, found in places.items():
        for place in found - {result}:
            raise ValueError(
                f"the parameters of {name} are on {place}, but sampling runs on {result}; move them with "
                f"{name}.to({str(result)!r}) or choose another device"
            )
    return result


def labels_of(labels: Any, num: int, models: Mapping[str, Any]) -> Tensor | None:
    """None, or labels with one row per sample that every model accepts; ValueError for others.

    A model without ``num_classes`` gets them unchanged.
    """
    counts = {name: getattr(model, "num_classes", None) for name, model in models.items()}
    conditional = {name: count for name, count in counts.items() if count}
    if labels is None:
        for name, count in conditional.items():
            raise ValueError(f"labels are required: the {name} is conditional on {count} classes")
        return None
    if all(count == 0 for count in counts.values()):
        raise ValueError(
            f"labels must be None, got labels for {' and '.join(counts)} without classes (num_classes = 0)"
        )
    if isinstance(labels, str):
        raise ValueError(
            f"labels must be numbers, got {type(labels).__name__}: {labels!r}; pass the index of the class"
        )
    if isinstance(labels, Tensor):
        result = as_tensor("labels", labels)
    else:
        array = as_array("labels", labels)
        if not isinstance(labels, np.ndarray) and array.dtype == np.float64:
            array = array.astype(np.float32)  # Numbers of Python have no type of their own.
        result = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
    if result.ndim == 0:
        result = result.expand(num)
    if result.ndim > 2 or len(result) != num:
        raise ValueError(
            f"labels must be one class index, {num} indices, or {num} rows of class weights (num = {num}), got shape "
            f"{tuple(result.shape)}"
        )
    for count in conditional.values():
        result = torch.from_numpy(check_labels("labels", result, num, count))
    return result
