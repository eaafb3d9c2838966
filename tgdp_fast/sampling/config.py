"""The settings of a sampler, in one object that checks itself and converts to and from JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from tgdp_fast.diffusion.guided import check_gradient_norm_limit, check_pair, check_scale
from tgdp_fast.diffusion.solvers import SOLVERS, SPACINGS, SolverTable, check_eta, check_steps
from tgdp_fast.ops.registry import BACKENDS
from tgdp_fast.runtime.checks import check_choice
from tgdp_fast.runtime.precision import PRECISIONS

#: fp32 matmuls as three bf16 ones, if the full trajectory is one operator and the CPU supports it; else fp32.
BF16X3 = "bf16x3"


@dataclass(frozen=True)
class SamplingConfig:
    """How to sample, independent of the models and the number of samples. Equal configs compare equal.

    Attributes:
        solver: a name in ``SOLVERS``, or a ready :class:`SolverTable` of the denoiser's schedule (then steps, spacing
            and eta are its own).
        steps: solver steps; two-evaluation solvers run the network up to twice a step (``table.nfe``).
        spacing: "logsnr", "uniform" or "karras".
        eta: stochasticity of ddim and euler_ancestral in [0, 1]; None for the solver's default.
        scale, interval, clamp, gradient_norm_limit: see :class:`GuidedDenoiser`. If scale is a function, it is called
            once for each evaluation in the interval, when a :class:`Sampler` is created.
        precision: of the networks, "fp32", "bf16" or "fp16" (autocast); the state is always fp32. "bf16x3" may compute
            each fp32 matmul as three bf16 ones, with about 16 bits. It is faster than fp32 only on CPUs whose bf16
            units are more than three times as fast.
        backend: "auto", or one that every operator and the networks' layers must use.

    Raises:
        ValueError: a bad value; the message names it.
    """

    solver: str | SolverTable = "dpmpp_2m"
    steps: int = 25
    spacing: str = "logsnr"
    eta: float | None = None
    scale: float | Callable[[float], float] = 1.0
    interval: tuple[float, float] | None = None
    clamp: tuple[float, float] | None = None
    gradient_norm_limit: float | None = None
    precision: str = "fp32"
    backend: str = "auto"

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "scale": check_scale(self.scale),
            "interval": check_pair("interval", self.interval),
            "clamp": check_pair("clamp", self.clamp, finite=True),
            "gradient_norm_limit": check_gradient_norm_limit(self.gradient_norm_limit),
            "precision": check_choice("precision", self.precision, (*PRECISIONS, BF16X3)),
            "backend": check_choice("backend", self.backend, (*BACKENDS, "auto")),
        }
        if not isinstance(self.solver, SolverTable):
            checked["solver"] = check_choice("solver", self.solver, SOLVERS)
            checked["steps"] = check_steps(self.steps)
            checked["spacing"] = check_choice("spacing", self.spacing, SPACINGS)
            if self.eta is not None:
                checked["eta"] = check_eta(self.solver, self.eta)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, JSON-able.

        Raises:
            ValueError: the solver is a ready table, or the scale a function: neither can be written as JSON.
        """
        if isinstance(self.solver, SolverTable):
            raise ValueError(
                f"solver must be a name to be written as JSON, got a ready SolverTable ({self.solver.solver}); give "
                "solver, steps, spacing and eta instead"
            )
        if callable(self.scale):
            raise ValueError(
                f"scale must be a number to be written as JSON, got {self.scale!r}; write the config with a number, "
                "and put the function in with dataclasses.replace"
            )
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> SamplingConfig:
        """Inverse of :meth:`to_dict`; missing fields have their defaults.

        Raises:
            ValueError: an unknown name, a bad value.
        """
        known = [field.name for field in fields(cls)]
        unknown = [str(name) for name in settings if name not in known]
        if unknown:
            raise ValueError(f"settings must be among {', '.join(known)}; got {', '.join(unknown)}")
        return cls(**settings)
