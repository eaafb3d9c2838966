"""Solver tables against the diffusers schedulers of the same names, on the same integer times and noise.

diffusers keeps its schedules, and some schedulers their sample, in float32. To compare to 1e-10, `float32` is
replaced by `float64` in the scheduler's module for the time of a test: its code runs unchanged, in float64.
One test leaves diffusers alone and derives the tolerance from float32.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.diffusion.solvers import SolverTable, solver_table

diffusers = pytest.importorskip("diffusers")

# diffusers calls its "dpmsolver" algorithm deprecated; its way of making arrays is deprecated by numpy.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

Model = Callable[[torch.Tensor, float], torch.Tensor]
MakeScheduler = Callable[..., Any]

TIMES = [999, 871, 640, 401, 250, 77, 20, 3]


class Float64Module(ModuleType):
    """A stand-in for the module torch or numpy in which float32 means float64."""

    def __init__(self, module: ModuleType) -> None:
        super().__init__(module.__name__)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, "float64" if name == "float32" else name)


@pytest.fixture
def noise() -> torch.Tensor:
    """What the schedulers draw, one entry per step; also the table's."""
    return torch.randn(64, 2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(11))


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, noise: torch.Tensor) -> MakeScheduler:
    """Constructor of a diffusers scheduler whose module computes in float64 and draws the noise above."""

    def construct(module_name: str, class_name: str, **options: Any) -> Any:
        module = importlib.import_module(f"diffusers.schedulers.{module_name}")
        monkeypatch.setattr(module, "torch", Float64Module(torch))
        monkeypatch.setattr(module, "np", Float64Module(np))
        draws: Iterator[torch.Tensor] = iter(noise)
        if hasattr(module, "randn_tensor"):
            monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(draws))
        scheduler = getattr(module, class_name)(num_train_timesteps=1000, **options)
        assert scheduler.alphas_cumprod.dtype == torch.float64
        return scheduler

    return construct


def epsilon(x: torch.Tensor, t: float) -> torch.Tensor:
    """A smooth noise prediction that mixes the last dimension, [2, 3, 5] to [2, 3, 5]."""
    weight = torch.linspace(-1.0, 1.0, 25, dtype=x.dtype).reshape(5, 5).cos()
    return torch.tanh(x @ weight + np.cos(t / 300.0))


def start(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(dtype)


def run_table(table: SolverTable, noise: torch.Tensor) -> torch.Tensor:
    state = torch.stack([start(), *[torch.zeros_like(start())] * table.history])
    for k in range(table.nfe):
        inputs = torch.cat([state, epsilon(state[0], table.times[k])[None]])
        state = torch.tensordot(torch.tensor(table.matrix[k]), inputs, 1)
        state[0] += table.noise_scale[k] * noise[k]
    return state[0]


def run_scheduler(scheduler: Any, alpha: float | None = None, **options: Any) -> torch.Tensor:
    """The usual loop; ``alpha`` is given, at the first time, if the scheduler's state is x / alpha."""
    x = start() if alpha is None else start() / alpha
    for t in scheduler.timesteps:
        prediction = epsilon(scheduler.scale_model_input(x, t), float(t))
        x = scheduler.step(prediction, t, x, **options).prev_sample
    return x


def assert_equal(scheduler_result: torch.Tensor, table_result: torch.Tensor, scale: float = 1.0) -> None:
    # Predicted data reach 1 / alpha = 160 at the first time, so 1e-10 is some 1e4 roundings.
    torch.testing.assert_close(scheduler_result * scale, table_result, rtol=1e-10, atol=1e-10)


def test_ddpm(make: MakeScheduler, noise: torch.Tensor) -> None:
    scheduler = make("scheduling_ddpm", "DDPMScheduler", clip_sample=False)
    scheduler.set_timesteps(timesteps=[*TIMES, 0])
    table = solver_table("ddpm", NoiseSchedule.from_diffusers(scheduler), times=[*TIMES, 0])
    assert_equal(run_scheduler(scheduler), run_table(table, noise))


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", ["ddim", "euler_ancestral"])
def test_ddim(make: MakeScheduler, noise: torch.Tensor, eta: float, name: str) -> None:
    scheduler = make("scheduling_ddim", "DDIMScheduler", clip_sample=False)
    scheduler.set_timesteps(10)
    table = solver_table(name, NoiseSchedule.from_diffusers(scheduler), times=scheduler.timesteps.tolist(), eta=eta)
    assert table.nfe == 10
    assert_equal(run_scheduler(scheduler, eta=eta), run_table(table, noise))


def test_euler(make: MakeScheduler, noise: torch.Tensor) -> None:
    scheduler = make("scheduling_euler_discrete", "EulerDiscreteScheduler")
    scheduler.set_timesteps(timesteps=TIMES)
    table = solver_table("euler", NoiseSchedule.from_diffusers(scheduler), times=TIMES)
    assert_equal(run_scheduler(scheduler, table.alpha[0]), run_table(table, noise))


def test_euler_ancestral(make: MakeScheduler, noise: torch.Tensor) -> None:
    scheduler = make(
        "scheduling_euler_ancestral_discrete", "EulerAncestralDiscreteScheduler", timestep_spacing="trailing"
    )
    scheduler.set_timesteps(9)
    times = scheduler.timesteps.tolist()
    table = solver_table("euler_ancestral", NoiseSchedule.from_diffusers(scheduler), times=times)
    assert_equal(run_scheduler(scheduler, table.alpha[0]), run_table(table, noise))


def test_heun(make: MakeScheduler, noise: torch.Tensor) -> None:
    scheduler = make("scheduling_heun_discrete", "HeunDiscreteScheduler")
    scheduler.set_timesteps(timesteps=TIMES)
    table = solver_table("heun", NoiseSchedule.from_diffusers(scheduler), times=TIMES)
    assert table.times.tolist() == scheduler.timesteps.tolist()
    assert_equal(run_scheduler(scheduler, table.alpha[0]), run_table(table, noise))


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("dpmpp_2m", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
        ("dpmpp_3m", {"algorithm_type": "dpmsolver++", "solver_order": 3}),
        ("dpmpp_2m_sde", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    ],
)
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_multistep(
    make: MakeScheduler, noise: torch.Tensor, solver: str, options: dict[str, Any], steps: int, final: str
) -> None:
    # lower_order_final would lower the order of the last but one step too.
    scheduler = make(
        "scheduling_dpmsolver_multistep",
        "DPMSolverMultistepScheduler",
        lower_order_final=False,
        final_sigmas_type=final,
        **options,
    )
    times = TIMES[:steps]
    scheduler.set_timesteps(timesteps=times)
    schedule = NoiseSchedule.from_diffusers(scheduler)
    if final == "zero":
        table = solver_table(solver, schedule, times=times)
    else:
        table = solver_table(solver, schedule, times=[*times, 0], denoise_final=False)
    assert_equal(run_scheduler(scheduler), run_table(table, noise))


@pytest.mark.parametrize("solver", ["dpm_solver_1", "ddim", "euler"])
def test_dpm_solver_1(make: MakeScheduler, noise: torch.Tensor, solver: str) -> None:
    scheduler = make(
        "scheduling_dpmsolver_multistep",
        "DPMSolverMultistepScheduler",
        algorithm_type="dpmsolver",
        solver_order=1,
        final_sigmas_type="sigma_min",
    )
    scheduler.set_timesteps(timesteps=TIMES)
    schedule = NoiseSchedule.from_diffusers(scheduler)
    table = solver_table(solver, schedule, times=[*TIMES, 0], denoise_final=False)
    assert_equal(run_scheduler(scheduler), run_table(table, noise))


def test_dpmpp_2s(make: MakeScheduler, noise: torch.Tensor) -> None:
    """diffusers counts midpoints as steps: so its times are the table's, with orders 1, 2, ..., 1."""
    scheduler = make("scheduling_dpmsolver_singlestep", "DPMSolverSinglestepScheduler", lower_order_final=True)
    table = solver_table("dpmpp_2s", NoiseSchedule.from_diffusers(scheduler), times=TIMES)
    assert table.nfe == 2 * len(TIMES) - 1
    scheduler.set_timesteps(timesteps=table.times.astype(int).tolist())
    scheduler.order_list = scheduler.get_order_list(table.nfe)
    assert_equal(run_scheduler(scheduler), run_table(table, noise))


def test_dpm_solver_2s(make: MakeScheduler, noise: torch.Tensor) -> None:
    scheduler = make(
        "scheduling_dpmsolver_singlestep",
        "DPMSolverSinglestepScheduler",
        algorithm_type="dpmsolver",
        lower_order_final=False,
        final_sigmas_type="sigma_min",
    )
    schedule = NoiseSchedule.from_diffusers(scheduler)
    table = solver_table("dpm_solver_2s", schedule, times=[*TIMES, 0], denoise_final=False)
    assert table.nfe == 2 * len(TIMES)
    scheduler.set_timesteps(timesteps=table.times.astype(int).tolist())
    scheduler.order_list = scheduler.get_order_list(table.nfe)
    assert_equal(run_scheduler(scheduler), run_table(table, noise))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 12, 25])
def test_unipc(make: MakeScheduler, noise: torch.Tensor, steps: int) -> None:
    scheduler = make("scheduling_unipc_multistep", "UniPCMultistepScheduler", solver_order=2, solver_type="bh2")
    scheduler.set_timesteps(steps)
    table = solver_table("unipc_2", NoiseSchedule.from_diffusers(scheduler), times=scheduler.timesteps.tolist())
    assert_equal(run_scheduler(scheduler), run_table(table, noise))


@pytest.mark.parametrize(
    ("solver", "class_name", "options"),
    [
        ("ddpm", "DDPMScheduler", {"clip_sample": False}),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {}),
        ("heun", "HeunDiscreteScheduler", {}),
    ],
)
def test_unmodified_diffusers_in_float32(solver: str, class_name: str, options: dict[str, Any]) -> None:
    """As a user would: float32 alphas_cumprod and arithmetic on their side, a table made from them on ours.

    The start is kept away from alpha = 0.006, so the largest number is x / alpha, about 20. Float32 rounds it
    by 20 * 6e-8 = 1e-6 per step; sigma^2 = 1 - alphas_cumprod (5e-4 at t = 3) carries 6e-8 of their rounding,
    1e-4 of itself, which moves x by sigma * 1e-4 = 2e-6. With 6 steps all this stays below 1e-4.
    """
    times = TIMES[2:]
    scheduler = getattr(diffusers, class_name)(num_train_timesteps=1000, **options)
    scheduler.set_timesteps(timesteps=times)
    table = solver_table(solver, NoiseSchedule.from_diffusers(scheduler), times=times)
    draws = torch.Generator().manual_seed(8)
    arguments = {"generator": torch.Generator().manual_seed(8)} if solver == "ddpm" else {}
    x = start(torch.float32) / (table.alpha[0] if solver == "heun" else 1.0)
    for t in scheduler.timesteps:
        prediction = epsilon(scheduler.scale_model_input(x, t), float(t))
        x = scheduler.step(prediction, t, x, **arguments).prev_sample
    assert x.dtype == torch.float32
    noise = torch.stack([torch.randn(2, 3, 5, generator=draws) for _ in range(table.nfe)]).double()
    torch.testing.assert_close(x.double(), run_table(table, noise), rtol=1e-4, atol=1e-4)
