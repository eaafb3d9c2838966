"""Solvers as tables: a solver's name, a noise schedule and a number of steps give one matrix per evaluation.

Every solver here is linear in the state x, its history m_1..m_H, the predicted noise eps and fresh noise z.
Each is therefore written once below as its textbook recurrence, over *linear forms*: vectors of coefficients in
the basis [x, m_1, m_2, eps]. Running the recurrence once, on the host in float64, gives the rows of the table.

Notation: ``x = alpha x_0 + sigma eps``; lambda = log(alpha / sigma), half the log-SNR; h is a step in lambda;
the predicted data are ``(x - sigma eps) / alpha``; in the variance-exploding coordinates the state is
``x / alpha`` and the noise level ``sigma / alpha``.

Sources, cited below by name:
    DDPM: Ho et al., NeurIPS 2020, arXiv 2006.11239.
    DDIM: Song, Meng & Ermon, ICLR 2021, arXiv 2010.02502.
    EDM: Karras et al., NeurIPS 2022, arXiv 2206.00364.
    DPM-Solver: Lu et al., NeurIPS 2022, arXiv 2206.00927.
    DPM-Solver++: Lu et al., 2022, arXiv 2211.01095.
    UniPC: Zhao et al., NeurIPS 2023, arXiv 2302.04867.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from tgdp_fast.runtime.checks import check_choice, check_integer, check_number
from tgdp_fast.runtime.memory import check_memory

if TYPE_CHECKING:  # It brings torch; the command line lists the names of solvers without.
    from tgdp_fast.diffusion.schedule import NoiseSchedule

__all__ = ["SOLVERS", "SPACINGS", "SolverInfo", "SolverTable", "check_eta", "check_steps", "solver_table"]

#: Memory that a step takes while its table is made, as measured, and the share of all memory that a table may have.
_STEP_BYTES, _TABLE_SHARE = 3000, 1 / 16

FloatArray = npt.NDArray[np.float64]
Form = FloatArray  # [4] coefficients of x, m_1, m_2, eps

SPACINGS: Mapping[str, str] = MappingProxyType(
    {
        "uniform": "uniform in time",
        "logsnr": "uniform in log-SNR (DPM-Solver)",
        "karras": "uniform in (sigma / alpha)^(1 / rho) (EDM, equation 5)",
    }
)


@dataclass(frozen=True)
class SolverInfo:
    """Facts about one solver.

    Attributes:
        evaluations: denoiser evaluations per regular step.
        order: order of convergence in the step size, as the tests measure it; for a stochastic solver the order
            of the variance of the result.
        stochastic: whether it draws noise with the default eta.
        default_eta: the default of ``eta``, or None if the solver has no such parameter.
        history: H, the number of history slots.
        description: the method and its source.
    """

    evaluations: int
    order: int
    stochastic: bool
    default_eta: float | None
    history: int
    description: str


@dataclass(frozen=True, eq=False)
class SolverTable:
    """A solver on a grid, compiled: K evaluations, each one matrix (float64, read-only arrays).

    At evaluation k the denoiser is called at ``times[k]`` on x and returns eps. Then, with z standard normal
    and a history that starts at zero::

        [x, m_1..m_H] <- matrix[k] @ [x, m_1..m_H, eps] + [noise_scale[k] z, 0, ..., 0]

    Attributes:
        solver, spacing: names; spacing is ``"explicit"`` if the times were given.
        times: [K] model times.
        alpha, sigma: [K] the schedule at those times.
        matrix: [K, 1 + H, 2 + H].
        noise_scale: [K].
        ends_step: [K] bool, whether x is the state at a grid point after this evaluation.
        history: H, 0 to 2.
        final_alpha, final_sigma: coefficients of signal and noise in the result: 1 and 0, or the last time's.

    Two tables are equal if their contents are equal.
    """

    solver: str
    spacing: str
    times: FloatArray
    alpha: FloatArray
    sigma: FloatArray
    matrix: FloatArray
    noise_scale: FloatArray
    ends_step: npt.NDArray[np.bool_]
    history: int
    final_alpha: float
    final_sigma: float

    def __post_init__(self) -> None:
        for array in (self.times, self.alpha, self.sigma, self.matrix, self.noise_scale, self.ends_step):
            array.setflags(write=False)

    @property
    def steps(self) -> int:
        """Number of solver steps."""
        return int(self.ends_step.sum())

    @property
    def nfe(self) -> int:
        """Number of denoiser evaluations, K."""
        return self.times.size

    @property
    def is_stochastic(self) -> bool:
        """Whether any evaluation draws noise."""
        return bool((self.noise_scale > 0.0).any())

    def signature(self) -> str:
        """SHA-256 (hexadecimal) of the contents: equal exactly if two tables are equal."""
        digest = hashlib.sha256()
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, np.ndarray):
                little_endian = value.astype(value.dtype.newbyteorder("<"))
                value = (value.shape, little_endian.tobytes())
            digest.update(f"{item.name}={value!r};".encode())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SolverTable) and self.signature() == other.signature()

    def __hash__(self) -> int:
        return hash(self.signature())


def solver_table(
    solver: str,
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    spacing: str = "logsnr",
    eta: float | None = None,
    rho: float = 7.0,
    denoise_final: bool = True,
    times: Sequence[float] | FloatArray | None = None,
) -> SolverTable:
    """Compile a solver on a time grid into a table.

    With ``denoise_final`` the grid has ``steps`` times from t_max to t_min and then clean data (alpha 1,
    sigma 0), reached by a first-order step of one evaluation; without it, ``steps + 1`` times from t_max to
    t_min. A solver with n evaluations per step makes ``n (steps - 1) + 1`` or ``n steps`` evaluations.

    On a discrete schedule all times are integers. Grid points are rounded and, where two collide, moved
    apart. The midpoints of dpm_solver_2s and dpmpp_2s are rounded too, with the coefficients of the rounded
    point. A step with no integer inside is of first order and takes one evaluation.

    Args:
        solver: a name in ``SOLVERS``.
        schedule: the noise schedule the denoiser was trained with.
        steps: number of solver steps, >= 1; may be omitted if ``times`` is given.
        spacing: a name in ``SPACINGS``.
        eta: noise of ddim (default 0) and euler_ancestral (default 1) as a fraction of ddpm's noise, in [0, 1].
        rho: exponent of the karras spacing, > 0.
        denoise_final: whether the last step goes to clean data.
        times: explicit grid times, strictly decreasing, instead of a spacing; with ``denoise_final`` clean data
            follow them.

    Returns:
        The table, float64, a pure function of the arguments.

    Raises:
        ValueError: for an unknown name, an invalid number, ``eta`` for a solver that has none, more steps
            than a discrete schedule has times, or unusable ``times``.
    """
    info = SOLVERS[check_choice("solver", solver, SOLVERS)]
    check_choice("spacing", spacing, SPACINGS)
    rho = check_number("rho", rho, 0.0, exclusive=True)
    eta = check_eta(solver, eta)
    if times is None:
        steps = check_steps(steps)
        grid = _spaced_times(schedule, steps, steps if denoise_final else steps + 1, spacing, rho)
    else:
        grid = _explicit_times(schedule, steps, times, denoise_final)
        spacing = "explicit"

    nodes = _nodes(schedule, grid)
    run = _Run(schedule, nodes, eta)
    rows = [row for k in range(len(nodes) - 1) for row in _STEPS[solver](run, k)]
    if denoise_final:
        # The limit h -> infinity of every solver's first-order step, without noise.
        rows.append(_Row(nodes[-1], _data_prediction(nodes[-1])))

    forms = np.zeros((len(rows), 1 + info.history, 4))
    for k, row in enumerate(rows):
        forms[k, : 1 + len(row.history)] = (row.x, *row.history)
    return SolverTable(
        solver=solver,
        spacing=spacing,
        times=np.array([row.node.time for row in rows]),
        alpha=np.array([row.node.alpha for row in rows]),
        sigma=np.array([row.node.sigma for row in rows]),
        matrix=np.ascontiguousarray(forms[:, :, [*range(1 + info.history), 3]]),
        noise_scale=np.array([row.noise_scale for row in rows]),
        ends_step=np.array([row.ends_step for row in rows]),
        history=info.history,
        final_alpha=1.0 if denoise_final else nodes[-1].alpha,
        final_sigma=0.0 if denoise_final else nodes[-1].sigma,
    )


def check_steps(steps: int | None) -> int:
    """``steps`` as an int; ValueError unless it is positive and its table is small beside the memory of the machine."""
    steps = check_integer("steps", steps, 1, "give steps, or the times themselves")
    needed = steps * _STEP_BYTES
    check_memory("steps", steps, needed, "the coefficients of the solver", "use fewer", share=_TABLE_SHARE)
    return steps


def check_eta(solver: str, eta: float | None) -> float:
    """``eta`` of a named solver, its default for None; ValueError where it has no eta, or for one outside [0, 1]."""
    default = SOLVERS[solver].default_eta
    if default is None:
        if eta is not None:
            having = " and ".join(name for name, other in SOLVERS.items() if other.default_eta is not None)
            raise ValueError(f"eta must be None for solver {solver!r}, got {eta!r}; only {having} have it")
        return 0.0
    return check_number("eta", default if eta is None else eta, 0.0, 1.0)


# Time grids


class _Node(NamedTuple):
    time: float
    alpha: float
    sigma: float
    half_log_snr: float

    @property
    def noise_level(self) -> float:
        """sigma / alpha, the noise level in the variance-exploding coordinates."""
        return self.sigma / self.alpha


def _nodes(schedule: NoiseSchedule, times: FloatArray) -> list[_Node]:
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    unusable = (alpha <= 0.0) | (sigma <= 0.0)
    if unusable.any():
        raise ValueError(
            f"schedule must have alpha > 0 and sigma > 0 at every time used, got {alpha[unusable][0]} and "
            f"{sigma[unusable][0]} at time {times[unusable][0]}; choose t_min and t_max further inside"
        )
    columns = (times, alpha, sigma, schedule.half_log_snr(times))
    return [_Node(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]


def _spaced_times(schedule: NoiseSchedule, steps: int, points: int, spacing: str, rho: float) -> FloatArray:
    first, last, available = schedule.t_max, schedule.t_min, schedule.num_train_steps
    if available is not None and points > available:
        raise ValueError(
            f"steps={steps} needs {points} different times but the schedule has num_train_steps={available}; "
            f"use at most {available - (points - steps)} steps"
        )
    if spacing == "uniform":
        times = np.linspace(first, last, points)
    else:
        noisiest, cleanest = schedule.half_log_snr(first), schedule.half_log_snr(last)
        if spacing == "logsnr":
            half_log_snr = np.linspace(noisiest, cleanest, points)
        else:
            roots = np.linspace(math.exp(-noisiest / rho), math.exp(-cleanest / rho), points)
            half_log_snr = -rho * np.log(roots)
        times = schedule.time_from_half_log_snr(half_log_snr)
    times[-1] = last  # exact ends, without the rounding of the inverse
    times[0] = first
    if available is None:
        return times
    # Round; then push colliding integers down, and lift those that would end below 0.
    index = np.arange(points)
    times = np.minimum.accumulate(np.rint(times) + index) - index
    return np.maximum(times, index[::-1])


def _explicit_times(
    schedule: NoiseSchedule, steps: int | None, times: Sequence[float] | FloatArray, denoise_final: bool
) -> FloatArray:
    grid = np.array(times, dtype=np.float64)
    fewest = 1 if denoise_final else 2
    if grid.ndim != 1 or grid.size < fewest:
        raise ValueError(f"times must be one-dimensional with at least {fewest} entries, got shape {grid.shape}")
    outside = ~((grid >= schedule.t_min) & (grid <= schedule.t_max))
    if outside.any():
        raise ValueError(
            f"times must be in [{schedule.t_min}, {schedule.t_max}] for this schedule, got {float(grid[outside][0])!r}"
        )
    if (np.diff(grid) >= 0.0).any():
        raise ValueError(f"times must strictly decrease, from most to least noise, got {grid.tolist()}")
    if schedule.is_discrete and (grid != np.rint(grid)).any():
        raise ValueError(f"times must be integers on a discrete schedule, got {grid.tolist()}")
    implied = grid.size + 1 - fewest
    if steps is not None and check_integer("steps", steps, 1) != implied:
        raise ValueError(f"steps must be {implied} for these {grid.size} times, got {steps}; or leave it out")
    return grid


# The recurrences. Each function gives the rows of step k, from nodes[k] to nodes[k + 1].

_X, _M1, _M2, _EPS = np.eye(4)


class _Row(NamedTuple):
    node: _Node
    x: Form
    history: tuple[Form, ...] = ()
    noise_scale: float = 0.0
    ends_step: bool = True


@dataclass(frozen=True)
class _Run:
    schedule: NoiseSchedule
    nodes: Sequence[_Node]
    eta: float

    def ends(self, k: int) -> tuple[_Node, _Node, float]:
        """Step k: where it starts, where it ends, and its length h in lambda."""
        now, after = self.nodes[k], self.nodes[k + 1]
        return now, after, after.half_log_snr - now.half_log_snr

    def ratio(self, k: int, back: int = 1) -> float:
        """Length in lambda of the step ``back`` steps before step k, over that of step k."""
        return self.ends(k - back)[2] / self.ends(k)[2]

    @cached_property
    def midpoints(self) -> list[_Node | None]:
        """Per step, the node in its middle in lambda; None where no integer time lies inside the step."""
        times = np.array([node.time for node in self.nodes])
        half_log_snr = np.array([node.half_log_snr for node in self.nodes])
        middle = self.schedule.time_from_half_log_snr(0.5 * (half_log_snr[:-1] + half_log_snr[1:]))
        if not self.schedule.is_discrete:
            return list(_nodes(self.schedule, middle))
        middle = np.clip(np.rint(middle), times[1:] + 1.0, np.maximum(times[:-1] - 1.0, times[1:] + 1.0))
        nodes = _nodes(self.schedule, middle)
        return [node if node.time < before else None for node, before in zip(nodes, times, strict=False)]


_Step = Callable[[_Run, int], list[_Row]]
_STEPS: dict[str, _Step] = {}
_INFO: dict[str, SolverInfo] = {}
SOLVERS: Mapping[str, SolverInfo] = MappingProxyType(_INFO)


def _solver(
    name: str,
    description: str,
    *,
    order: int,
    evaluations: int = 1,
    stochastic: bool = False,
    default_eta: float | None = None,
    history: int = 0,
) -> Callable[[_Step], _Step]:
    def register(step: _Step) -> _Step:
        _INFO[name] = SolverInfo(evaluations, order, stochastic, default_eta, history, description)
        _STEPS[name] = step
        return step

    return register


def _data_prediction(node: _Node) -> Form:
    return (_X - node.sigma * _EPS) / node.alpha


def _data_update(now: _Node, after: _Node, data: Form, x: Form = _X) -> Form:
    """x at ``after``, exact for constant predicted data (DPM-Solver++)."""
    h = after.half_log_snr - now.half_log_snr
    return after.sigma / now.sigma * x - after.alpha * math.expm1(-h) * data


def _noise_update(now: _Node, after: _Node, noise: Form) -> Form:
    """x at ``after``, exact for constant predicted noise (DPM-Solver)."""
    h = after.half_log_snr - now.half_log_snr
    return after.alpha / now.alpha * _X - after.sigma * math.expm1(h) * noise


def _phi(order: int, z: float) -> float:
    """phi_1(z) = (e^z - 1) / z, phi_{n+1}(z) = (phi_n(z) - 1 / n!) / z; a series where these formulas would cancel."""
    if abs(z) < 0.5:
        return math.fsum(z**j / math.factorial(j + order) for j in range(16))
    return math.expm1(z) / z if order == 1 else (_phi(order - 1, z) - 1.0 / math.factorial(order - 1)) / z


@_solver("ddpm", "ancestral sampling, posterior variance (DDPM, equation 7)", order=1, stochastic=True)
def _ddpm(run: _Run, k: int) -> list[_Row]:
    now, after, _ = run.ends(k)
    alpha_step = (now.alpha / after.alpha) ** 2
    beta_step = 1.0 - alpha_step
    mean = (
        after.alpha * beta_step / now.sigma**2 * _data_prediction(now)
        + math.sqrt(alpha_step) * (after.sigma / now.sigma) ** 2 * _X
    )
    return [_Row(now, mean, noise_scale=after.sigma / now.sigma * math.sqrt(beta_step))]


@_solver("ddim", "deterministic with eta 0, ddpm with eta 1 (DDIM, equation 12)", order=1, default_eta=0.0)
def _ddim(run: _Run, k: int) -> list[_Row]:
    now, after, _ = run.ends(k)
    noise = run.eta * after.sigma / now.sigma * math.sqrt(1.0 - (now.alpha / after.alpha) ** 2)
    direction = math.sqrt(after.sigma**2 - noise**2)
    return [_Row(now, after.alpha * _data_prediction(now) + direction * _EPS, noise_scale=noise)]


@_solver("euler", "Euler's method in variance-exploding coordinates; the same as ddim (EDM)", order=1)
def _euler(run: _Run, k: int) -> list[_Row]:
    now, after, _ = run.ends(k)
    change = after.noise_level - now.noise_level
    return [_Row(now, after.alpha * (_X / now.alpha + change * _EPS))]


@_solver(
    "euler_ancestral",
    "Euler's method to a lower noise level, then fresh noise; the same as ddim of that eta (k-diffusion)",
    order=1,
    stochastic=True,
    default_eta=1.0,
)
def _euler_ancestral(run: _Run, k: int) -> list[_Row]:
    now, after, _ = run.ends(k)
    up = run.eta * after.noise_level * math.sqrt(1.0 - (after.noise_level / now.noise_level) ** 2)
    down = math.sqrt(after.noise_level**2 - up**2)
    x = after.alpha * (_X / now.alpha + (down - now.noise_level) * _EPS)
    return [_Row(now, x, noise_scale=after.alpha * up)]


@_solver(
    "heun",
    "Heun's method in variance-exploding coordinates (EDM, algorithm 1)",
    order=2,
    evaluations=2,
    history=1,
)
def _heun(run: _Run, k: int) -> list[_Row]:
    now, after, _ = run.ends(k)
    change = after.noise_level - now.noise_level
    predicted = after.alpha * (_X / now.alpha + change * _EPS)
    half_step = after.alpha * (_X / now.alpha + 0.5 * change * _EPS)
    return [
        _Row(now, predicted, (half_step,), ends_step=False),
        _Row(after, _M1 + 0.5 * after.alpha * change * _EPS),
    ]


@_solver("dpm_solver_1", "noise prediction; the same as ddim (DPM-Solver-1)", order=1)
def _dpm_solver_1(run: _Run, k: int) -> list[_Row]:
    now, after, _ = run.ends(k)
    return [_Row(now, _noise_update(now, after, _EPS))]


@_solver(
    "dpm_solver_2s",
    "single-step, noise prediction (DPM-Solver-2, algorithm 1)",
    order=2,
    evaluations=2,
    history=1,
)
def _dpm_solver_2s(run: _Run, k: int) -> list[_Row]:
    now, after, h = run.ends(k)
    middle = run.midpoints[k]
    if middle is None:
        return _dpm_solver_1(run, k)
    weight = 0.5 * h / (middle.half_log_snr - now.half_log_snr)
    # The update with (1 - weight) eps + weight eps_middle; m_1 holds the part known before eps_middle.
    known = _noise_update(now, after, (1.0 - weight) * _EPS)
    return [
        _Row(now, _noise_update(now, middle, _EPS), (known,), ends_step=False),
        _Row(middle, _M1 - after.sigma * math.expm1(h) * weight * _EPS),
    ]


@_solver(
    "dpmpp_2s",
    "single-step, data prediction (DPM-Solver++(2S), algorithm 1)",
    order=2,
    evaluations=2,
    history=1,
)
def _dpmpp_2s(run: _Run, k: int) -> list[_Row]:
    now, after, h = run.ends(k)
    middle = run.midpoints[k]
    data = _data_prediction(now)
    if middle is None:
        return [_Row(now, _data_update(now, after, data))]
    weight = 0.5 * h / (middle.half_log_snr - now.half_log_snr)
    known = _data_update(now, after, (1.0 - weight) * data)
    return [
        _Row(now, _data_update(now, middle, data), (known,), ends_step=False),
        _Row(middle, _M1 - after.alpha * math.expm1(-h) * weight * _data_prediction(middle)),
    ]


def _extrapolated_data(run: _Run, k: int, data: Form) -> Form:
    """Predicted data in the middle of step k, on the line through the last two; in the first step, ``data`` itself."""
    return data + 0.5 * (data - _M1) / run.ratio(k) if k > 0 else data


@_solver("dpmpp_2m", "multistep, data prediction (DPM-Solver++(2M), algorithm 2)", order=2, history=1)
def _dpmpp_2m(run: _Run, k: int) -> list[_Row]:
    now, after, _ = run.ends(k)
    data = _data_prediction(now)
    return [_Row(now, _data_update(now, after, _extrapolated_data(run, k, data)), (data,))]


@_solver(
    "dpmpp_3m",
    "multistep of three points, data prediction (DPM-Solver++(3M)); of order 2, as published",
    order=2,
    history=2,
)
def _dpmpp_3m(run: _Run, k: int) -> list[_Row]:
    now, after, h = run.ends(k)
    data = _data_prediction(now)
    if k < 2:
        x = _data_update(now, after, _extrapolated_data(run, k, data))
    else:
        r_0, r_1 = run.ratio(k), run.ratio(k, back=2)
        slope_0, slope_1 = (data - _M1) / r_0, (_M1 - _M2) / r_1
        curvature = (slope_0 - slope_1) / (r_0 + r_1)
        slope = slope_0 + r_0 * curvature
        # As published and as in other libraries. The second derivative is twice this curvature: the order would be 3
        # only with a factor of 2 on it, with little difference in error for the usual few steps.
        x = _data_update(now, after, data)
        x = x + after.alpha * h * (_phi(2, -h) * slope + _phi(3, -h) * curvature)
    return [_Row(now, x, (data, _M1))]


@_solver(
    "dpmpp_2m_sde",
    "multistep, data prediction, for the reverse SDE; midpoint form (SDE-DPM-Solver++(2M))",
    order=2,
    stochastic=True,
    history=1,
)
def _dpmpp_2m_sde(run: _Run, k: int) -> list[_Row]:
    now, after, h = run.ends(k)
    data = _data_prediction(now)
    fresh = -math.expm1(-2.0 * h)  # the share of the variance at the end of the step that is new noise
    x = after.sigma / now.sigma * math.exp(-h) * _X + after.alpha * fresh * _extrapolated_data(run, k, data)
    return [_Row(now, x, (data,), noise_scale=after.sigma * math.sqrt(fresh))]


@_solver(
    "unipc_2",
    "multistep predictor-corrector, data prediction, B(h) = e^h - 1 (UniPC-2); of order 3 by its corrector",
    order=3,
    history=2,
)
def _unipc_2(run: _Run, k: int) -> list[_Row]:
    # One evaluation serves twice: it corrects the step that led here, then predicts the next. m_1 holds the
    # corrected x up to the term in the data predicted here, m_2 the data predicted before.
    now, after, h = run.ends(k)
    data = _data_prediction(now)
    x = _M1 + _unipc_corrector(run, k - 1)[1] * data if k > 0 else _X
    base = _data_update(now, after, data, x)
    predicted, (before, next_) = base, _unipc_corrector(run, k)
    if k > 0:
        slope = (data - _M2) / run.ratio(k)
        predicted = base - 0.5 * after.alpha * math.expm1(-h) * slope
        base = base + before * slope
    return [_Row(now, predicted, (base - next_ * data, data))]


def _unipc_corrector(run: _Run, k: int) -> tuple[float, float]:
    """Weights with which step k's corrector adds the slope of the data behind and (next data - data)."""
    _, after, h = run.ends(k)
    if k == 0:
        return 0.0, -0.5 * after.alpha * math.expm1(-h)
    # Exact for data linear and quadratic in lambda, given at -ratio, 0 and 1 (in units of h).
    first, second = after.alpha * h * _phi(2, -h), after.alpha * h * 2.0 * _phi(3, -h)
    before = (first - second) / (1.0 + run.ratio(k))
    return before, first - before
