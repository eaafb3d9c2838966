"""Solver tables against textbook recurrences, identities, exact solutions and measured orders."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.diffusion.solvers import SOLVERS, SPACINGS, SolverTable, solver_table

Array = np.ndarray
Model = Callable[[Array, float], Array]

SCHEDULES = {
    "vp_linear": NoiseSchedule.vp_linear(),
    "cosine": NoiseSchedule.cosine(),
    # Coarse, so that 20 steps make times collide and leave steps without a midpoint.
    "discrete": NoiseSchedule.from_betas(np.linspace(2e-3, 0.3, 50)),
}
DETERMINISTIC = [name for name, info in SOLVERS.items() if not info.stochastic]
STOCHASTIC = [name for name, info in SOLVERS.items() if info.stochastic]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
every_solver = pytest.mark.parametrize("solver", SOLVERS)


def run(table: SolverTable, epsilon: Model, x: Array, noise: Array | None = None) -> Array:
    """Execute a table in float64: the contract, literally. x [B, D]; noise [K, B, D]."""
    state = np.stack([x, *[np.zeros_like(x)] * table.history])
    for k in range(table.nfe):
        inputs = np.concatenate([state, epsilon(state[0], table.times[k])[None]])
        state = np.einsum("ij,j...->i...", table.matrix[k], inputs)
        if noise is not None:
            state[0] += table.noise_scale[k] * noise[k]
    return state[0]


# Textbook recurrences, in plain state code. Nodes are (time, alpha, sigma); one noise array per evaluation.

Node = tuple[float, float, float]


def lam(node: Node) -> float:
    return math.inf if node[2] == 0.0 else math.log(node[1] / node[2])


def to_data(x: Array, eps: Array, node: Node) -> Array:
    return (x - node[2] * eps) / node[1]


def middle_of(schedule: NoiseSchedule, now: Node, after: Node) -> Node | None:
    t = schedule.time_from_half_log_snr(0.5 * (lam(now) + lam(after)))
    if schedule.is_discrete:
        inside = [i for i in range(schedule.num_train_steps) if after[0] < i < now[0]]
        if not inside:
            return None
        t = float(min(inside, key=lambda i: abs(i - t)))
    return t, schedule.alpha(t), schedule.sigma(t)


def textbook(
    solver: str,
    schedule: NoiseSchedule,
    nodes: list[Node],
    model: Model,
    x: Array,
    noise: list[Array],
    eta: float,
) -> tuple[Array, list[float]]:
    """Solve from nodes[0] to nodes[-1]; returns x and the times of the evaluations."""
    times: list[float] = []

    def evaluate(x: Array, node: Node) -> Array:
        times.append(node[0])
        return model(x, node[0])

    data: list[Array] = []  # predicted data, all of them
    last_sample, last_order = x, 0  # of UniPC
    for k, (now, after) in enumerate(zip(nodes[:-1], nodes[1:], strict=True)):
        (_, a, s), (_, a_n, s_n) = now, after
        h = lam(after) - lam(now)
        eps = evaluate(x, now)
        x0 = to_data(x, eps, now)
        data.append(x0)
        clean = s_n == 0.0
        z = noise[len(times) - 1]
        if solver == "ddpm":  # algorithm 2 of DDPM
            alpha_step = a**2 / a_n**2
            beta = 1.0 - alpha_step
            x = (x - beta / s * eps) / math.sqrt(alpha_step) + math.sqrt(s_n**2 / s**2 * beta) * z
        elif solver == "ddim":  # equations 12 and 16 of DDIM
            sd = eta * math.sqrt((1 - a_n**2) / (1 - a**2)) * math.sqrt(1 - a**2 / a_n**2)
            x = a_n * x0 + math.sqrt(max(1 - a_n**2 - sd**2, 0.0)) * eps + sd * z
        elif solver in ("euler", "euler_ancestral"):  # k-diffusion
            level, level_n, y = s / a, s_n / a_n, x / a
            up = min(level_n, eta * math.sqrt(level_n**2 * (level**2 - level_n**2) / level**2))
            down = math.sqrt(level_n**2 - up**2)
            derivative = (y - (y - level * eps)) / level
            x = a_n * (y + derivative * (down - level) + up * z)
        elif solver == "heun":  # algorithm 1 of EDM, without churn
            level, level_n, y = s / a, s_n / a_n, x / a
            d = (y - x0) / level
            y_n = y + (level_n - level) * d
            if not clean:
                d_n = (y_n - to_data(a_n * y_n, evaluate(a_n * y_n, after), after)) / level_n
                y_n = y + (level_n - level) * (d + d_n) / 2
            x = a_n * y_n
        elif clean:  # the rest: e^{-h} = 0
            x = x0
        elif solver == "dpm_solver_1":
            x = a_n / a * x - s_n * (math.exp(h) - 1) * eps
        elif solver == "dpm_solver_2s":  # algorithm 1 of DPM-Solver, equation 4.1 with general r_1
            mid = middle_of(schedule, now, after)
            y = a_n / a * x - s_n * (math.exp(h) - 1) * eps
            if mid is not None:
                r = (lam(mid) - lam(now)) / h
                u = mid[1] / a * x - mid[2] * (math.exp(r * h) - 1) * eps
                y = y - s_n / (2 * r) * (math.exp(h) - 1) * (evaluate(u, mid) - eps)
            x = y
        elif solver == "dpmpp_2s":  # algorithm 1 of DPM-Solver++
            mid = middle_of(schedule, now, after)
            blend = x0
            if mid is not None:
                r = (lam(mid) - lam(now)) / h
                u = mid[2] / s * x - mid[1] * (math.exp(-r * h) - 1) * x0
                blend = (1 - 1 / (2 * r)) * x0 + 1 / (2 * r) * to_data(u, evaluate(u, mid), mid)
            x = s_n / s * x - a_n * (math.exp(-h) - 1) * blend
        elif solver in ("dpmpp_2m", "dpmpp_2m_sde") or (solver == "dpmpp_3m" and k < 2):
            blend = x0
            if k > 0:
                r = (lam(now) - lam(nodes[k - 1])) / h
                blend = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * data[-2]
            if solver == "dpmpp_2m_sde":
                x = s_n / s * math.exp(-h) * x + a_n * (1 - math.exp(-2 * h)) * blend
                x = x + s_n * math.sqrt(1 - math.exp(-2 * h)) * z
            else:
                x = s_n / s * x - a_n * (math.exp(-h) - 1) * blend
        elif solver == "dpmpp_3m":
            r0 = (lam(now) - lam(nodes[k - 1])) / h
            r1 = (lam(nodes[k - 1]) - lam(nodes[k - 2])) / h
            d1_0, d1_1 = (x0 - data[-2]) / r0, (data[-2] - data[-3]) / r1
            d1 = d1_0 + r0 / (r0 + r1) * (d1_0 - d1_1)
            d2 = (d1_0 - d1_1) / (r0 + r1)
            x = (
                s_n / s * x
                - a_n * (math.exp(-h) - 1) * x0
                + a_n * ((math.exp(-h) - 1) / h + 1) * d1
                - a_n * ((math.exp(-h) - 1 + h) / h**2 - 0.5) * d2
            )
        elif solver == "unipc_2":  # algorithms 1 and 2 of UniPC, B(h) = e^{-h} - 1 with data prediction
            if k > 0:
                x = unipc_update(nodes[k - 1], now, last_sample, data[:-1], last_order, nodes, k - 1, x0)
            last_sample, last_order = x, min(2, k + 1)
            x = unipc_update(now, after, x, data, last_order, nodes, k, None)
    return x, times


def unipc_update(
    now: Node,
    after: Node,
    x: Array,
    data: list[Array],
    order: int,
    nodes: list[Node],
    k: int,
    new: Array | None,
) -> Array:
    """The predictor, or with the data predicted at the end of the step, the corrector."""
    h = lam(after) - lam(now)
    hh = -h
    big_b = math.exp(hh) - 1
    base = after[2] / now[2] * x - after[1] * big_b * data[-1]
    points, differences = [], []
    if order == 2:
        points.append((lam(nodes[k - 1]) - lam(now)) / h)
        differences.append((data[-2] - data[-1]) / points[0])
    if new is None:
        weights = [0.5] * len(points)  # the closed form of order 2
    else:
        points.append(1.0)
        differences.append(new - data[-1])
        phi, factorial, right = (math.exp(hh) - 1) / hh - 1, 1, []
        for i in range(1, order + 1):
            right.append(phi * factorial / big_b)
            factorial *= i + 1
            phi = phi / hh - 1 / factorial
        weights = [0.5] if order == 1 else np.linalg.solve(np.vander(points, increasing=True).T, right)
    return base - after[1] * big_b * sum(w * d for w, d in zip(weights, differences, strict=True))


def nodes_of(table: SolverTable, schedule: NoiseSchedule, denoise_final: bool) -> list[Node]:
    starts = np.concatenate([[True], table.ends_step[:-1]])
    nodes = [(float(t), schedule.alpha(float(t)), schedule.sigma(float(t))) for t in table.times[starts]]
    t_min = schedule.t_min
    return [
        *nodes,
        (math.nan, 1.0, 0.0) if denoise_final else (t_min, schedule.alpha(t_min), schedule.sigma(t_min)),
    ]


def smooth_model(schedule: NoiseSchedule, dimension: int, seed: int = 0) -> Model:
    """A random smooth function of x and t, of order 1."""
    rng = np.random.default_rng(seed)
    weight, offset, shift = rng.normal(size=(dimension, dimension)), rng.normal(size=dimension), rng.normal()

    def epsilon(x: Array, t: float) -> Array:
        return np.tanh(x @ weight + offset * np.cos(3.0 * t / schedule.t_max + shift))

    return epsilon


@every_schedule
@every_solver
@pytest.mark.parametrize("spacing", SPACINGS)
def test_table_is_the_textbook_recurrence(solver: str, schedule: NoiseSchedule, spacing: str) -> None:
    rng = np.random.default_rng(7)
    model = smooth_model(schedule, 3)
    info = SOLVERS[solver]
    for steps in (1, 2, 3, 7, 20):
        for denoise_final in (True, False):
            for eta in (None, 0.0, 0.6) if info.default_eta is not None else (None,):
                table = solver_table(solver, schedule, steps, spacing=spacing, eta=eta, denoise_final=denoise_final)
                x, noise = rng.normal(size=(5, 3)), rng.normal(size=(table.nfe, 5, 3))
                nodes = nodes_of(table, schedule, denoise_final)
                used = (info.default_eta or 0.0) if eta is None else eta
                expected, times = textbook(solver, schedule, nodes, model, x, list(noise), used)
                np.testing.assert_allclose(table.times, times, rtol=1e-12)
                # The states reach |x / alpha| of a few hundred: 1e-10 allows some 1e4 roundings.
                np.testing.assert_allclose(run(table, model, x, noise), expected, rtol=1e-10, atol=1e-10)


def test_discrete_tables_exercise_collisions_and_missing_midpoints() -> None:
    """The cases that the comparison above is meant to cover do occur in it."""
    schedule = SCHEDULES["discrete"]
    table = solver_table("dpmpp_2s", schedule, 20)
    assert 20 < table.nfe < 39
    assert set(np.diff(solver_table("ddim", schedule, 20).times)) >= {-1.0}


# Structure


@every_solver
def test_facts(solver: str) -> None:
    info = SOLVERS[solver]
    table = solver_table(solver, SCHEDULES["vp_linear"], 5)
    assert table.nfe == info.evaluations * 4 + 1
    assert solver_table(solver, SCHEDULES["vp_linear"], 5, denoise_final=False).nfe == info.evaluations * 5
    assert table.is_stochastic == info.stochastic
    assert table.history == info.history <= 2
    assert table.solver == solver
    assert table.spacing == "logsnr"
    assert info.description
    # No slot is carried in vain: the last one is read by some evaluation; the first evaluation reads none.
    if info.history:
        assert np.abs(table.matrix[:, :, table.history]).max() > 0.0
        assert np.abs(table.matrix[0, 0, 1:-1]).max() == 0.0


def test_shapes_and_types() -> None:
    table = solver_table("unipc_2", SCHEDULES["cosine"], 7)
    assert table.matrix.shape == (7, 3, 4)
    assert table.matrix.flags.c_contiguous
    for name in ("times", "alpha", "sigma", "noise_scale"):
        assert getattr(table, name).shape == (7,)
        assert getattr(table, name).dtype == np.float64
    assert table.ends_step.dtype == np.bool_
    assert (table.final_alpha, table.final_sigma) == (1.0, 0.0)
    np.testing.assert_allclose(table.alpha, SCHEDULES["cosine"].alpha(table.times), rtol=1e-15)
    np.testing.assert_allclose(table.sigma, SCHEDULES["cosine"].sigma(table.times), rtol=1e-15)
    with pytest.raises(ValueError, match="read-only"):
        table.matrix[0] = 0.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.solver = "ddim"  # type: ignore[misc]

    end = solver_table("heun", SCHEDULES["cosine"], 7, denoise_final=False)
    assert (end.final_alpha, end.final_sigma) == (
        SCHEDULES["cosine"].alpha(1e-3),
        SCHEDULES["cosine"].sigma(1e-3),
    )
    assert end.steps == 7
    assert end.ends_step.tolist() == [False, True] * 7


def test_signature_is_of_the_contents() -> None:
    first = solver_table("ddim", SCHEDULES["vp_linear"], 10)
    same = solver_table("ddim", NoiseSchedule.vp_linear(), 10, eta=0.0)
    assert first == same
    assert hash(first) == hash(same)
    assert len(first.signature()) == 64
    others = [
        solver_table("ddim", SCHEDULES["vp_linear"], 11),
        solver_table("ddim", SCHEDULES["vp_linear"], 10, eta=0.5),
        solver_table("ddim", SCHEDULES["vp_linear"], 10, spacing="uniform"),
        solver_table("euler", SCHEDULES["vp_linear"], 10),
        solver_table("ddim", SCHEDULES["cosine"], 10),
        dataclasses.replace(first, times=np.nextafter(first.times, 0.0)),
    ]
    assert len({table.signature() for table in (first, *others)}) == 7
    assert first != others[0]
    assert first != "ddim"


# Grids


@pytest.mark.parametrize("name", ["vp_linear", "cosine"])
@pytest.mark.parametrize("denoise_final", [True, False])
def test_continuous_grids(name: str, denoise_final: bool) -> None:
    schedule = SCHEDULES[name]

    def times(spacing: str, **options: float) -> Array:
        table = solver_table("euler", schedule, 9, spacing=spacing, denoise_final=denoise_final, **options)
        return table.times if denoise_final else np.append(table.times, schedule.t_min)

    points = 9 if denoise_final else 10
    for spacing in SPACINGS:
        grid = times(spacing)
        assert grid.size == points
        assert (grid[0], grid[-1]) == (schedule.t_max, schedule.t_min)
    np.testing.assert_allclose(times("uniform"), np.linspace(schedule.t_max, schedule.t_min, points), rtol=1e-14)
    steps = np.diff(schedule.half_log_snr(times("logsnr")))
    np.testing.assert_allclose(steps, steps.mean(), rtol=1e-12)
    for rho in (1.0, 7.0):
        grid = times("karras", rho=rho)
        level = schedule.sigma(grid) / schedule.alpha(grid)
        i = np.arange(points) / (points - 1)
        expected = (level[0] ** (1 / rho) + i * (level[-1] ** (1 / rho) - level[0] ** (1 / rho))) ** rho
        # With rho = 1 the smallest level is what is left of a difference of the largest, about 1e2.
        np.testing.assert_allclose(level, expected, rtol=1e-11, atol=1e-12)


@given(data=st.data(), spacing=st.sampled_from(sorted(SPACINGS)), train_steps=st.integers(2, 60))
def test_discrete_grids(data: st.DataObject, spacing: str, train_steps: int) -> None:
    schedule = NoiseSchedule.from_betas(np.linspace(1e-3, 0.2, train_steps))
    steps = data.draw(st.integers(1, train_steps))
    times = solver_table("ddim", schedule, steps, spacing=spacing).times
    assert (times == np.rint(times)).all()
    assert (np.diff(times) < 0.0).all()
    assert times[0] == train_steps - 1
    assert times[-1] == (0 if steps > 1 else train_steps - 1)
    if spacing == "uniform":
        # Never closer than 1: nothing collides, so every point is the nearest integer.
        ideal = np.linspace(train_steps - 1, 0, steps)
        assert np.abs(times - ideal).max() <= 0.5
    if steps == train_steps:
        assert times.tolist() == list(range(train_steps - 1, -1, -1))


def test_explicit_times() -> None:
    schedule = SCHEDULES["vp_linear"]
    table = solver_table("dpmpp_2m", schedule, times=[0.9, 0.5, 0.01])
    assert table.times.tolist() == [0.9, 0.5, 0.01]
    assert table.spacing == "explicit"
    assert (table.steps, table.final_sigma) == (3, 0.0)
    assert table == solver_table("dpmpp_2m", schedule, 3, times=np.array([0.9, 0.5, 0.01]), spacing="uniform")
    open_ended = solver_table("dpmpp_2m", schedule, times=(0.9, 0.5, 0.01), denoise_final=False)
    assert open_ended.times.tolist() == [0.9, 0.5]
    assert open_ended.final_sigma == schedule.sigma(0.01)
    automatic = solver_table("heun", schedule, 6)
    given_times = solver_table("heun", schedule, times=automatic.times[::2])
    np.testing.assert_array_equal(given_times.matrix, automatic.matrix)
    discrete = solver_table("ddim", SCHEDULES["discrete"], times=[49, 20, 3])
    assert discrete.times.tolist() == [49.0, 20.0, 3.0]


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "dpmpp2m"}, r"solver must be one of ddim, .*did you mean 'dpmpp_2m'"),
        ({"solver": None}, "solver must be one of ddim, ddpm"),
        ({"spacing": "karas"}, r"spacing must be one of karras, logsnr, uniform; got 'karas' \(did you mean"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"steps": 2.0}, "steps must be an integer >= 1, got 2.0"),
        ({"steps": None}, "steps must be an integer >= 1, got None; give steps, or the times"),
        ({"rho": 0.0}, "rho must be finite and in"),
        ({"eta": 1.5}, r"eta must be finite and in \[0.0, 1.0\], got 1.5"),
        ({"eta": math.nan}, "eta must be finite"),
        (
            {"solver": "heun", "eta": 0.0},
            "eta must be None for solver 'heun', got 0.0; only ddim and euler_an",
        ),
        ({"solver": "ddpm", "eta": 1.0}, "eta must be None for solver 'ddpm'"),
        ({"times": [0.5, 0.7]}, "times must strictly decrease"),
        ({"times": [0.5, 0.5]}, "times must strictly decrease"),
        ({"times": [1.5, 0.7]}, r"times must be in \[0.001, 1.0\] for this schedule, got 1.5"),
        ({"times": [0.5, math.nan]}, "times must be in .* got nan"),
        ({"times": []}, "at least 1 entries, got shape"),
        ({"times": [0.5], "denoise_final": False}, "at least 2 entries"),
        ({"times": [[0.5]]}, "one-dimensional"),
        ({"times": [0.5, 0.2], "steps": 3}, "steps must be 2 for these 2 times, got 3"),
        ({"schedule": NoiseSchedule.vp_linear(beta_max=1e4)}, "choose t_min and t_max further inside"),
    ],
)
def test_refuses(arguments: dict, message: str) -> None:
    values = {"solver": "ddim", "schedule": SCHEDULES["vp_linear"], "steps": 5} | arguments
    if "times" in arguments and "steps" not in arguments:
        values["steps"] = None
    with pytest.raises(ValueError, match=message):
        solver_table(**values)


def test_refuses_on_discrete_schedules() -> None:
    schedule = SCHEDULES["discrete"]
    with pytest.raises(ValueError, match=r"steps=51 needs 51 .* num_train_steps=50; use at most 50 steps"):
        solver_table("ddim", schedule, 51)
    with pytest.raises(ValueError, match=r"steps=50 needs 51 .* num_train_steps=50; use at most 49 steps"):
        solver_table("ddim", schedule, 50, denoise_final=False)
    with pytest.raises(ValueError, match="times must be integers on a discrete schedule"):
        solver_table("ddim", schedule, times=[30.5, 2.0])


@given(
    solver=st.sampled_from(sorted(SOLVERS)),
    spacing=st.sampled_from(sorted(SPACINGS)),
    steps=st.integers(1, 50),
    share=st.floats(0.0, 1.0),
    rho=st.floats(0.5, 20.0),
    denoise_final=st.booleans(),
    name=st.sampled_from(sorted(SCHEDULES)),
)
def test_any_arguments_give_a_sound_table(
    solver: str, spacing: str, steps: int, share: float, rho: float, denoise_final: bool, name: str
) -> None:
    info, schedule = SOLVERS[solver], SCHEDULES[name]
    if schedule.is_discrete and not denoise_final:
        steps = min(steps, 49)
    eta = share if info.default_eta is not None else None
    table = solver_table(solver, schedule, steps, spacing=spacing, eta=eta, rho=rho, denoise_final=denoise_final)
    assert np.isfinite(table.matrix).all()
    assert np.isfinite(table.noise_scale).all()
    assert (table.noise_scale >= 0.0).all()
    assert table.steps == steps
    assert table.ends_step[-1]
    regular = steps - denoise_final
    if info.evaluations == 1:
        assert table.nfe == steps
    elif schedule.is_discrete and solver != "heun":
        assert steps <= table.nfe <= 2 * regular + denoise_final
    else:
        assert table.nfe == 2 * regular + denoise_final
    if solver == "heun":  # evaluates each inner node twice: at the end of a step, and at the start of the next
        assert (np.diff(table.times) <= 0.0).all()
    else:
        assert (np.diff(table.times) < 0.0).all()
    assert table.times[0] == schedule.t_max
    assert table.times[-1] >= schedule.t_min


# Identities and exact solutions


@every_schedule
@pytest.mark.parametrize("spacing", SPACINGS)
def test_first_order_identities(schedule: NoiseSchedule, spacing: str) -> None:
    def table(solver: str, eta: float | None = None) -> SolverTable:
        return solver_table(solver, schedule, 12, spacing=spacing, eta=eta, denoise_final=False)

    def assert_same(first: SolverTable, second: SolverTable) -> None:
        # Both are differences of terms up to alpha' / alpha = 1e2, whose roundings remain.
        np.testing.assert_allclose(first.matrix, second.matrix, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(first.noise_scale, second.noise_scale, rtol=1e-11)

    for other in ("euler", "dpm_solver_1"):
        assert_same(table("ddim"), table(other))
    assert_same(table("ddim"), table("euler_ancestral", 0.0))
    for other in ("euler_ancestral", "ddpm"):
        assert_same(table("ddim", 1.0), table(other))
    assert_same(table("ddim", 0.3), table("euler_ancestral", 0.3))
    # A first step is of first order.
    for solver in ("dpmpp_2m", "dpmpp_3m", "unipc_2"):
        first = table(solver).matrix[0, 0][[0, -1]]
        np.testing.assert_allclose(first, table("ddim").matrix[0, 0], rtol=1e-12, atol=1e-13)


@every_schedule
@every_solver
@pytest.mark.parametrize("denoise_final", [True, False])
def test_point_mass_is_solved_exactly(solver: str, schedule: NoiseSchedule, denoise_final: bool) -> None:
    """All data at one point: the predicted data are that point, and the predicted noise never changes."""
    point = np.array([0.7, -1.3])
    table = solver_table(solver, schedule, 6, denoise_final=denoise_final)
    at = {t: (a, s) for t, a, s in zip(table.times, table.alpha, table.sigma, strict=True)}

    def epsilon(x: Array, t: float) -> Array:
        alpha, sigma = at[t]
        return (x - alpha * point) / sigma

    rng = np.random.default_rng(1)
    x, noise = rng.normal(size=(5, 2)), rng.normal(size=(table.nfe, 5, 2))
    result = run(table, epsilon, x, noise)
    if SOLVERS[solver].stochastic and not denoise_final:
        return  # the noise of the last step stays
    expected = table.final_alpha * point + table.final_sigma / table.sigma[0] * (x - table.alpha[0] * point)
    np.testing.assert_allclose(result, expected, rtol=1e-11, atol=1e-11)


@every_schedule
@pytest.mark.parametrize("solver", ["ddim", "euler", "heun", "dpm_solver_1", "dpm_solver_2s"])
def test_noise_prediction_solvers_are_exact_for_constant_noise(solver: str, schedule: NoiseSchedule) -> None:
    constant = np.array([[0.4, -0.9]])
    x = np.array([[1.0, 2.0]])
    table = solver_table(solver, schedule, 5, denoise_final=False)
    scale = table.final_alpha / table.alpha[0]
    expected = scale * x + (table.final_sigma - scale * table.sigma[0]) * constant
    np.testing.assert_allclose(run(table, lambda x, t: constant, x), expected, rtol=1e-11)


def propagated_variance(table: SolverTable, variance: float) -> float:
    """The result's exact variance for data N(0, variance), started from the exact marginal.

    The optimal noise prediction is linear then, so the covariance of [x, m] can be propagated.
    """
    covariance = np.zeros((1 + table.history, 1 + table.history))
    covariance[0, 0] = table.alpha[0] ** 2 * variance + table.sigma[0] ** 2
    for k in range(table.nfe):
        slope = table.sigma[k] / (table.alpha[k] ** 2 * variance + table.sigma[k] ** 2)
        step = table.matrix[k, :, :-1].copy()
        step[:, 0] += slope * table.matrix[k, :, -1]
        covariance = step @ covariance @ step.T
        covariance[0, 0] += table.noise_scale[k] ** 2
    return float(covariance[0, 0])


@pytest.mark.parametrize("variance", [0.1, 2.5])
@pytest.mark.parametrize(
    ("solver", "eta"),
    [*((name, None) for name in SOLVERS), ("ddim", 0.5), ("ddim", 1.0), ("euler_ancestral", 0.5)],
)
def test_variance_of_gaussian_data(solver: str, eta: float | None, variance: float) -> None:
    """The variance converges to the exact one, at the order in SOLVERS."""
    schedule = SCHEDULES["vp_linear"]
    errors = []
    for steps in (64, 128, 256):
        table = solver_table(solver, schedule, steps, eta=eta, denoise_final=False)
        exact = table.final_alpha**2 * variance + table.final_sigma**2
        errors.append(propagated_variance(table, variance) / exact - 1.0)
    orders = np.log2(np.abs(errors[:-1]) / np.abs(errors[1:]))
    assert abs(errors[-1]) < 0.05
    assert orders.min() > SOLVERS[solver].order - 0.25, (errors, orders)
    # To clean data: sigma(t_min)^2 = 1e-4 of noise is taken away as well.
    clean = propagated_variance(solver_table(solver, schedule, 256, eta=eta), variance)
    assert clean == pytest.approx(variance, rel=0.05)


# Convergence on a Gaussian mixture, whose noise prediction is known

MEANS = np.array([[0.5, 0.5], [-0.5, -0.5]])
VARIANCE = 0.1


def mixture_noise(x: Array, alpha: float, sigma: float) -> Array:
    """The exact noise prediction for two equal Gaussians, x [B, 2]."""
    marginal = alpha**2 * VARIANCE + sigma**2
    difference = x[:, None] - alpha * MEANS
    log_weight = -(difference**2).sum(-1) / (2 * marginal)
    weight = np.exp(log_weight - log_weight.max(1, keepdims=True))
    weight /= weight.sum(1, keepdims=True)
    return sigma * (weight[..., None] * difference).sum(1) / marginal


@lru_cache
def probability_flow(name: str) -> tuple[Array, Array]:
    """Start at t_max and end at t_min of the probability-flow ODE, by an adaptive method of order 8."""
    schedule = SCHEDULES[name]
    start = np.random.default_rng(3).normal(size=(6, 2))

    def right_side(half_log_snr: float, y: Array) -> Array:
        level = math.exp(-half_log_snr)
        alpha = 1.0 / math.sqrt(1.0 + level**2)
        # d(x / alpha) / d(sigma / alpha) = eps
        return -level * mixture_noise(alpha * y.reshape(-1, 2), alpha, alpha * level).ravel()

    ends = (schedule.half_log_snr(schedule.t_max), schedule.half_log_snr(schedule.t_min))
    y = start.ravel() / schedule.alpha(schedule.t_max)
    solution = solve_ivp(right_side, ends, y, method="DOP853", rtol=1e-13, atol=1e-13)
    return start, schedule.alpha(schedule.t_min) * solution.y[:, -1].reshape(-1, 2)


@pytest.mark.parametrize("solver", DETERMINISTIC)
@pytest.mark.parametrize("name", ["vp_linear", "cosine"])
def test_order_of_convergence(solver: str, name: str) -> None:
    """Measured on vp_linear: 1.0 ddim, euler, dpm_solver_1; 2.0 heun, 2s, 2m, 3m; 3.0 unipc_2."""
    schedule = SCHEDULES[name]
    start, exact = probability_flow(name)
    errors = []
    for steps in (64, 128, 256):
        table = solver_table(solver, schedule, steps, denoise_final=False)
        at = {t: (a, s) for t, a, s in zip(table.times, table.alpha, table.sigma, strict=True)}
        result = run(table, lambda x, t: mixture_noise(x, *at[t]), start)  # noqa: B023 - used at once
        errors.append(np.abs(result - exact).max())
    orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert errors[-1] < {1: 2e-2, 2: 1e-3, 3: 1e-5}[SOLVERS[solver].order]
    assert np.abs(orders - SOLVERS[solver].order).max() < 0.25, (errors, orders)


@pytest.mark.parametrize("solver", STOCHASTIC)
def test_stochastic_solvers_sample_the_mixture(solver: str) -> None:
    """Mean 0, E[x x^T] = VARIANCE I + mean of m m^T, and both modes equally often."""
    schedule = SCHEDULES["vp_linear"]
    table = solver_table(solver, schedule, 60)
    at = {t: (a, s) for t, a, s in zip(table.times, table.alpha, table.sigma, strict=True)}
    rng = np.random.default_rng(5)
    count = 4000
    x = rng.normal(size=(count, 2))
    samples = run(table, lambda x, t: mixture_noise(x, *at[t]), x, rng.normal(size=(table.nfe, count, 2)))
    # Five standard errors (variance 0.35 per coordinate); 3 % for the discretisation of the second moment.
    assert np.abs(samples.mean(0)).max() < 5 * math.sqrt(0.35 / count)
    second = samples.T @ samples / count
    assert np.abs(second - [[0.35, 0.25], [0.25, 0.35]]).max() < 0.03 * 0.35 + 5 * math.sqrt(2 * 0.35**2 / count)
    assert abs((samples.sum(1) > 0).mean() - 0.5) < 5 * 0.5 / math.sqrt(count)
