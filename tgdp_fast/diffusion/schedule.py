"""Variance-preserving noise schedules: alpha, sigma and log-SNR as functions of time, and the inverse.

The forward process is ``x_t = alpha(t) x_0 + sigma(t) eps`` with ``alpha^2 + sigma^2 = 1`` (TGDP, Ouyang et
al., NeurIPS 2024, arXiv 2405.16876, section 2; Song et al., ICLR 2021, arXiv 2011.13456, equation 11).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from tgdp_fast.runtime.arrays import as_array
from tgdp_fast.runtime.checks import check_choice, check_number

__all__ = ["NoiseSchedule"]

FloatArray = npt.NDArray[np.float64]
Values = TypeVar("Values", float, npt.NDArray[Any], torch.Tensor)

# The names of a schedule's parameters, per kind: what to_config writes and from_config reads.
_PARAMETERS = {
    "vp_linear": ("beta_min", "beta_max", "t_min", "t_max"),
    "cosine": ("offset", "t_min", "t_max"),
    "discrete": ("alphas_cumprod",),
}


@dataclass(frozen=True, repr=False)
class NoiseSchedule:
    """A variance-preserving noise schedule; immutable, hashable, compared by its parameters.

    Make one with ``vp_linear``, ``cosine``, ``from_betas``, ``from_alphas_cumprod`` or ``from_diffusers``.

    Times are real numbers in ``[t_min, t_max]``, ``t_min`` being the cleanest time used. The time of a
    discrete schedule is the index of its arrays, 0 to N - 1, with log alpha linear between two indices.

    Every method takes a float, a numpy array or a torch tensor of any shape and returns the same kind and
    shape. The arithmetic and the returned arrays are float64. A tensor keeps its device and floating dtype
    (an integer tensor gives float32), and gradients flow. Floats and arrays outside the schedule's domain
    (t >= 0; t <= 1 if cosine; t <= N - 1 if discrete) raise ValueError; tensors give NaN there, because a check
    would have to wait for the device.

    Attributes:
        kind: ``"vp_linear"``, ``"cosine"`` or ``"discrete"``.
        t_min: cleanest time used.
        t_max: noisiest time.
        parameters: (beta_min, beta_max), (offset,) or the N values of alphas_cumprod.
    """

    kind: str
    t_min: float
    t_max: float
    parameters: tuple[float, ...]
    _tables: dict[torch.device, torch.Tensor] = field(default_factory=dict, init=False, compare=False)

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, _PARAMETERS)

    # Constructors

    @classmethod
    def vp_linear(
        cls, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3, t_max: float = 1.0
    ) -> NoiseSchedule:
        """The continuous VP schedule, ``log alpha(t) = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2``.

        Source: Song et al., ICLR 2021, arXiv 2011.13456, equation 33.

        Raises:
            ValueError: unless 0 < beta_min <= beta_max and 0 < t_min < t_max.
        """
        beta_min = check_number("beta_min", beta_min, 0.0, exclusive=True)
        beta_max = check_number("beta_max", beta_max, beta_min)
        return cls("vp_linear", *_time_range(t_min, t_max, math.inf), (beta_min, beta_max))

    @classmethod
    def cosine(cls, offset: float = 0.008, t_min: float = 1e-3, t_max: float = 0.9946) -> NoiseSchedule:
        """The cosine schedule, ``alpha(t) = cos a(t) / cos a(0)``, ``a(t) = pi/2 (t + offset)/(1 + offset)``.

        Source: Nichol & Dhariwal, ICML 2021, arXiv 2102.09672, equation 17; the default ``t_max`` is that of
        Lu et al., NeurIPS 2022, arXiv 2206.00927 (alpha vanishes at t = 1).

        Raises:
            ValueError: unless 0 <= offset and 0 < t_min < t_max < 1.
        """
        offset = check_number("offset", offset, 0.0)
        return cls("cosine", *_time_range(t_min, t_max, 1.0), (offset,))

    @classmethod
    def from_betas(cls, betas: Any) -> NoiseSchedule:
        """The discrete schedule with ``alphas_cumprod = cumprod(1 - betas)``.

        Args:
            betas: [N] numbers in (0, 1), N >= 2: list, numpy array or tensor.

        Raises:
            ValueError: if the array is not one-dimensional, is too short, holds a value outside (0, 1), or falls from
                above 1/2 to below it, as only alphas_cumprod do.
        """
        values = _host_array("betas", betas)
        if values[-1] == 1.0:
            raise _zero_terminal_snr("betas ends with 1")
        _check_open_unit_interval("betas", values)
        if values[0] > 0.5 > values[-1]:
            raise ValueError(
                f"betas must be the noise of each step, got numbers that fall from {values[0]:.4g} to "
                f"{values[-1]:.4g}; if they are alphas_cumprod use NoiseSchedule.from_alphas_cumprod"
            )
        return cls.from_alphas_cumprod(np.cumprod(1.0 - values))

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Any) -> NoiseSchedule:
        """The discrete schedule with ``alpha[i]^2 = alphas_cumprod[i]`` at time i.

        Args:
            alphas_cumprod: [N] strictly decreasing numbers in (0, 1), N >= 2: list, numpy array or tensor.

        Raises:
            ValueError: if the array is not one-dimensional, is too short, holds a value outside (0, 1), ends
                with 0 (zero terminal SNR), or does not strictly decrease.
        """
        values = _host_array("alphas_cumprod", alphas_cumprod)
        if values[-1] == 0.0:
            raise _zero_terminal_snr("alphas_cumprod ends with 0")
        _check_open_unit_interval("alphas_cumprod", values)
        rises = np.flatnonzero(np.diff(values) >= 0.0)
        if rises.size:
            i = int(rises[0])
            raise ValueError(
                f"alphas_cumprod must strictly decrease, got {float(values[i])!r} at index {i} and "
                f"{float(values[i + 1])!r} at index {i + 1}; order it from least to most noise"
            )
        return cls("discrete", 0.0, float(values.size - 1), tuple(values.tolist()))

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> NoiseSchedule:
        """The discrete schedule of a diffusers scheduler: anything with an ``alphas_cumprod`` array.

        Raises:
            TypeError: if ``scheduler`` has no ``alphas_cumprod`` (flow-matching schedulers have none).
            ValueError: as in ``from_alphas_cumprod``, including zero terminal SNR.
        """
        alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
        if alphas_cumprod is None:
            advice = "pass the scheduler itself, not its config, and a variance-preserving one such as DDPMScheduler"
            if hasattr(getattr(scheduler, "scheduler", None), "alphas_cumprod"):  # A pipeline.
                advice = "pass its attribute scheduler"
            raise TypeError(f"scheduler must have an alphas_cumprod array, got {type(scheduler).__name__}; {advice}")
        return cls.from_alphas_cumprod(alphas_cumprod)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule described by ``to_config``.

        Raises:
            ValueError: if the kind is unknown, or a parameter is missing, unknown or invalid.
        """
        values = dict(config)
        kind = check_choice("config['kind']", values.pop("kind", None), _PARAMETERS)
        if set(values) != set(_PARAMETERS[kind]):
            raise ValueError(
                f"config of kind {kind!r} must have exactly the keys kind, {', '.join(_PARAMETERS[kind])}; "
                f"got {', '.join(map(str, config))}"
            )
        if kind == "discrete":
            return cls.from_alphas_cumprod(**values)
        return cls.cosine(**values) if kind == "cosine" else cls.vp_linear(**values)

    def to_config(self) -> dict[str, Any]:
        """A JSON-able description; ``NoiseSchedule.from_config`` gives back an equal schedule."""
        if self.is_discrete:
            return {"kind": self.kind, "alphas_cumprod": list(self.parameters)}
        values = (*self.parameters, self.t_min, self.t_max)
        return {"kind": self.kind, **dict(zip(_PARAMETERS[self.kind], values, strict=True))}

    # Properties

    @property
    def is_discrete(self) -> bool:
        """Whether times are indices of an array."""
        return self.kind == "discrete"

    @property
    def num_train_steps(self) -> int | None:
        """N, the number of indices of a discrete schedule; None for a continuous one."""
        return len(self.parameters) if self.is_discrete else None

    def __repr__(self) -> str:
        if self.is_discrete:
            return f"NoiseSchedule.from_alphas_cumprod(<{self.num_train_steps} values>)"
        config = self.to_config()
        return f"NoiseSchedule.{config.pop('kind')}({', '.join(f'{k}={v!r}' for k, v in config.items())})"

    # Functions of time

    def log_alpha(self, t: Values) -> Values:
        """log alpha(t). Shape, kind and dtype of ``t``."""
        return self._of_time(t, self._log_alpha)

    def alpha(self, t: Values) -> Values:
        """alpha(t), the coefficient of the signal. Shape, kind and dtype of ``t``."""
        return self._of_time(t, lambda t: torch.exp(self._log_alpha(t)))

    def sigma(self, t: Values) -> Values:
        """sigma(t) = sqrt(1 - alpha(t)^2), the coefficient of the noise. Shape, kind and dtype of ``t``."""
        return self._of_time(t, lambda t: torch.sqrt(-torch.expm1(2.0 * self._log_alpha(t))))

    def half_log_snr(self, t: Values) -> Values:
        """lambda(t) = log alpha(t) - log sigma(t), decreasing in t. Shape, kind and dtype of ``t``."""
        return self._of_time(t, self._half_log_snr)

    def log_snr(self, t: Values) -> Values:
        """log(alpha(t)^2 / sigma(t)^2) = 2 lambda(t). Shape, kind and dtype of ``t``."""
        return self._of_time(t, lambda t: 2.0 * self._half_log_snr(t))

    def time_from_half_log_snr(self, half_log_snr: Values) -> Values:
        """The time t with ``half_log_snr(t)`` equal to the argument: the exact inverse.

        Outside its range a discrete schedule returns its nearest end, 0 or N - 1.

        Raises:
            ValueError: if a float or an array holds NaN.
        """
        return _apply("half_log_snr", half_log_snr, self._time, -math.inf, math.inf)

    # Float64 tensors in and out

    def _of_time(self, t: Values, function: Callable[[torch.Tensor], torch.Tensor]) -> Values:
        return _apply("t", t, function, 0.0, self._domain_end)

    @property
    def _domain_end(self) -> float:
        return {"vp_linear": math.inf, "cosine": 1.0, "discrete": self.t_max}[self.kind]

    def _log_alpha(self, t: torch.Tensor) -> torch.Tensor:
        if self.kind == "vp_linear":
            beta_min, beta_max = self.parameters
            value = -t * (0.25 * (beta_max - beta_min) * t + 0.5 * beta_min)
        elif self.kind == "cosine":
            # cos(a) / cos(a_0) - 1, written with the difference a - a_0 so that nothing cancels at small t.
            angle_0, difference = self._angle_0, t * self._angle_rate
            drop = 2.0 * torch.sin(0.5 * difference) ** 2 + math.tan(angle_0) * torch.sin(difference)
            value = torch.log1p(-drop)
        else:
            table = self._log_alpha_table(t.device)
            # nan_to_num: an index must exist for NaN too; the result is overwritten below.
            left = torch.nan_to_num(t).clamp(0, table.numel() - 2).floor()
            index = left.long()
            value = torch.lerp(table[index], table[index + 1], t - left)
        return torch.where((t >= 0.0) & (t <= self._domain_end), value, math.nan)

    def _half_log_snr(self, t: torch.Tensor) -> torch.Tensor:
        log_alpha = self._log_alpha(t)
        return log_alpha - 0.5 * torch.log(-torch.expm1(2.0 * log_alpha))

    def _time(self, half_log_snr: torch.Tensor) -> torch.Tensor:
        if self.kind == "cosine":
            # Sine and cosine of a - a_0 from alpha = cos(a) / cos(a_0), again without differences.
            cos_0, sin_0 = math.cos(self._angle_0), math.sin(self._angle_0)
            alpha = torch.sqrt(torch.sigmoid(2.0 * half_log_snr))
            sigma_squared = torch.sigmoid(-2.0 * half_log_snr)
            sin_a = torch.sqrt(sin_0**2 + sigma_squared * cos_0**2)
            sine = cos_0 * sigma_squared / (sin_a + alpha * sin_0)
            return torch.atan2(sine, alpha * cos_0**2 + sin_a * sin_0) / self._angle_rate
        minus_log_alpha = 0.5 * torch.logaddexp(torch.zeros_like(half_log_snr), -2.0 * half_log_snr)
        if self.kind == "vp_linear":
            beta_min, beta_max = self.parameters
            root = torch.sqrt(0.25 * beta_min**2 + (beta_max - beta_min) * minus_log_alpha)
            # The quadratic's root in the form without a difference.
            return 2.0 * minus_log_alpha / (0.5 * beta_min + root)
        table = -self._log_alpha_table(half_log_snr.device)
        right = torch.searchsorted(table, minus_log_alpha.detach().contiguous()).clamp(1, table.numel() - 1)
        fraction = (minus_log_alpha - table[right - 1]) / (table[right] - table[right - 1])
        return (right - 1) + fraction.clamp(0.0, 1.0)

    @property
    def _angle_rate(self) -> float:
        return 0.5 * math.pi / (1.0 + self.parameters[0])

    @property
    def _angle_0(self) -> float:
        return self.parameters[0] * self._angle_rate

    def _log_alpha_table(self, device: torch.device) -> torch.Tensor:
        if device not in self._tables:
            with torch.inference_mode(False):  # A table made there could not take part in training later.
                self._tables[device] = torch.from_numpy(0.5 * np.log(np.array(self.parameters))).to(device)
        return self._tables[device]


def _apply(
    name: str,
    values: Values,
    function: Callable[[torch.Tensor], torch.Tensor],
    minimum: float,
    maximum: float,
) -> Values:
    """Apply ``function`` to ``values`` in float64, return the kind of ``values``; check values that are on the host."""
    if isinstance(values, torch.Tensor):
        dtype = values.dtype if values.is_floating_point() else torch.float32
        return function(values.to(torch.float64)).to(dtype)
    array = np.array(values, dtype=np.float64)
    outside = ~((array >= minimum) & (array <= maximum))
    if outside.any():
        raise ValueError(f"{name} must be in [{minimum}, {maximum}], got {float(array[outside].flat[0])!r}")
    result = function(torch.from_numpy(array)).numpy()
    return result if isinstance(values, np.ndarray) else float(result)


def _time_range(t_min: float, t_max: float, end: float) -> tuple[float, float]:
    t_max = check_number("t_max", t_max, 0.0, end, exclusive=True)
    return check_number("t_min", t_min, 0.0, t_max, exclusive=True), t_max


def _host_array(name: str, values: Any) -> FloatArray:
    try:
        array = np.array(as_array(name, values), dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"{name} must be a one-dimensional array of numbers, got {values!r}: {error}") from None
    if array.ndim != 1 or array.size < 2:
        raise ValueError(f"{name} must be one-dimensional with at least 2 entries, got shape {array.shape}")
    return array


def _check_open_unit_interval(name: str, array: FloatArray) -> None:
    bad = np.flatnonzero(~((array > 0.0) & (array < 1.0)))
    if bad.size:
        raise ValueError(f"{name} must be in (0, 1), got {float(array[bad[0]])!r} at index {bad[0]}")


def _zero_terminal_snr(what: str) -> ValueError:
    return ValueError(
        f"{what}: with zero terminal SNR x_T carries no signal, so predicted noise gives no predicted data "
        "there; drop the last entry, or build the scheduler with rescale_betas_zero_snr=False"
    )
