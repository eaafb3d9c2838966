"""TableScheduler against diffusers' own schedulers and solver tables, and inside pipelines."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tgdp_fast import SOLVERS, NoiseSchedule, sample, solver_table
from tgdp_fast.ops.noise import normal

diffusers = pytest.importorskip("diffusers")
integration = importlib.import_module("tgdp_fast.integrations.diffusers")
TableScheduler = integration.TableScheduler

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
]

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
SCHEDULE = NoiseSchedule.from_diffusers(diffusers.DDPMScheduler())


class Model(nn.Module):
    """The exact model of N(0.4, 0.6^2) in every element, a little bent; unit scale and smooth in every prediction."""

    def __init__(self, prediction_type: str = "epsilon") -> None:
        super().__init__()
        self.prediction_type = prediction_type
        self.schedule = SCHEDULE
        self.config = SimpleNamespace(in_channels=2, sample_size=3)
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def epsilon(self, x: Tensor, t: float, labels: Tensor | None = None) -> Tensor:
        alpha, sigma = SCHEDULE.alpha(float(t)), SCHEDULE.sigma(float(t))
        x0 = 0.4 + alpha * 0.36 * (x - alpha * 0.4) / (alpha**2 * 0.36 + sigma**2)
        x0 = x0 + 0.1 * torch.sin(3.0 * x)
        return (x - alpha * x0) / sigma

    def forward(self, x: Tensor, t: Any) -> Any:
        alpha, sigma = SCHEDULE.alpha(float(t)), SCHEDULE.sigma(float(t))
        epsilon = self.epsilon(x, float(t))
        x0 = (x - sigma * epsilon) / alpha
        output = {"epsilon": epsilon, "sample": x0, "v_prediction": alpha * epsilon - sigma * x0}[self.prediction_type]
        return diffusers.models.unets.unet_2d.UNet2DOutput(sample=output)


def start(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(dtype)


def run(scheduler: Any, model: nn.Module, x: Tensor, first: int = 0, **options: Any) -> Tensor:
    for t in scheduler.timesteps[first:]:
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t).sample, t, x, **options).prev_sample
    return x


# The same as diffusers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("solver", "class_name", "options", "spacing"),
    [
        ("ddim", "DDIMScheduler", {}, "leading"),
        ("ddim", "DDIMScheduler", {}, "trailing"),
        ("ddim", "DDIMScheduler", {"eta": 0.6}, "leading"),
        ("ddpm", "DDPMScheduler", {}, "leading"),
        ("ddpm", "DDPMScheduler", {}, "linspace"),
        ("ddpm", "DDPMScheduler", {}, "trailing"),
    ],
)
def test_ddim_and_ddpm(
    solver: str, class_name: str, options: dict[str, Any], spacing: str, prediction_type: str
) -> None:
    """The same grid, and the same noise from a generator of the same seed.

    DDIMScheduler steps by 1000 // steps whatever its grid, so it fits that of "linspace" never and others only where
    the steps divide 1000.
    """
    reference = getattr(diffusers, class_name)(
        timestep_spacing=spacing, clip_sample=False, prediction_type=prediction_type, steps_offset=1
    )
    ours = TableScheduler.from_config(reference.config, solver=solver, spacing=spacing)
    for scheduler in (reference, ours):
        scheduler.set_timesteps(10)
    assert ours.timesteps.tolist() == reference.timesteps.tolist()
    assert ours.timesteps.dtype == reference.timesteps.dtype
    results = [
        run(each, Model(prediction_type), start(torch.float64), generator=torch.Generator().manual_seed(1), **options)
        for each in (ours, reference)
    ]
    assert_equal_to_diffusers(*results)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("solver", "class_name", "options"),
    [
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {"lower_order_final": False}),
        ("dpmpp_3m", "DPMSolverMultistepScheduler", {"lower_order_final": False, "solver_order": 3}),
        ("unipc_2", "UniPCMultistepScheduler", {}),
    ],
)
def test_multistep_solvers(solver: str, class_name: str, options: dict[str, Any], prediction_type: str) -> None:
    reference = getattr(diffusers, class_name)(prediction_type=prediction_type, **options)
    reference.set_timesteps(12)
    ours = TableScheduler.from_config(reference.config, solver=solver)
    ours.set_timesteps(timesteps=reference.timesteps.tolist())
    results = []
    for each in (ours, reference):
        takes = "generator" in inspect.signature(each.step).parameters
        noise = {"generator": torch.Generator().manual_seed(1)} if takes else {}
        results.append(run(each, Model(prediction_type), start(torch.float64), **noise))
    assert_equal_to_diffusers(*results)


def test_multistep_solver_of_the_reverse_sde() -> None:
    """diffusers draws this one's noise in float32, so all is float32 here: 12 steps of 1e-6 each."""
    reference = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", lower_order_final=False)
    reference.set_timesteps(12)
    ours = TableScheduler.from_config(reference.config, solver="dpmpp_2m_sde")
    ours.set_timesteps(timesteps=reference.timesteps.tolist())
    results = [run(each, Model(), start(), generator=torch.Generator().manual_seed(1)) for each in (ours, reference)]
    torch.testing.assert_close(*results, rtol=5e-5, atol=5e-5)


def test_heun_has_two_evaluations_a_step() -> None:
    reference = diffusers.HeunDiscreteScheduler(timestep_spacing="trailing", beta_start=0.0001, beta_end=0.02)
    reference.set_timesteps(7)
    ours = TableScheduler.from_config(reference.config, solver="heun")
    times = reference.timesteps.tolist()
    ours.set_timesteps(timesteps=times[:1] + times[1::2])
    assert ours.order == reference.order == 2
    assert ours.timesteps.tolist() == times
    assert ours.num_inference_steps == 7
    x = start(torch.float64)
    expected = run(reference, Model(), x * float(ours.table.alpha[0]) ** -1)
    assert_equal_to_diffusers(run(ours, Model(), x), expected)


def assert_equal_to_diffusers(ours: Tensor, reference: Tensor) -> None:
    """diffusers keeps its coefficients, and some schedulers their sample, in float32."""
    torch.testing.assert_close(ours, reference.to(ours.dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_clipping(solver: str) -> None:
    """As DDPM clips, and DDIM with use_clipped_model_output."""
    name = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler"}[solver]
    reference = getattr(diffusers, name)(clip_sample=True, clip_sample_range=0.5)
    ours = TableScheduler.from_config(reference.config, solver=solver, spacing="leading")
    options = {"use_clipped_model_output": True} if solver == "ddim" else {}
    results = []
    for each in (ours, reference):
        each.set_timesteps(10)
        results.append(run(each, Model(), start(torch.float64), generator=torch.Generator().manual_seed(1), **options))
    assert_equal_to_diffusers(*results)
    assert results[0].abs().max() <= 0.5
    free = TableScheduler.from_config(reference.config, solver=solver, spacing="leading", clip_sample=False)
    free.set_timesteps(10)
    assert run(free, Model(), start()).abs().max() > 0.6


# The same as our own sampling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_counter_noise_gives_the_samples_of_sample(solver: str) -> None:
    """Seed and sample index decide, as in tgdp_fast.sample: the same samples, in any batch."""
    expected = sample(Model(), num=5, shape=(2, 3, 5), solver=solver, steps=6, seed=7, first_index=3)
    scheduler = TableScheduler(solver=solver)
    results = []
    for first, stop in ((3, 7), (7, 8)):
        scheduler.set_seed(7, first_index=first)
        scheduler.set_timesteps(6)
        assert len(scheduler.timesteps) == solver_table(solver, SCHEDULE, 6).nfe
        x = normal(7, torch.arange(first, stop), 30, 0).reshape(-1, 2, 3, 5)
        with torch.no_grad():
            results.append(run(scheduler, Model(), x))
    torch.testing.assert_close(torch.cat(results), expected, rtol=1e-4, atol=1e-4)


def test_which_noise_is_drawn() -> None:
    scheduler = TableScheduler(solver="ddpm")

    def draw(seed: int | None, generator: int | None) -> Tensor:
        scheduler.set_seed(seed)
        scheduler.set_timesteps(5)
        options = {} if generator is None else {"generator": torch.Generator().manual_seed(generator)}
        return run(scheduler, Model(), start(), **options)

    torch.manual_seed(4)
    first = draw(None, None)
    assert not torch.equal(draw(None, None), first)
    torch.manual_seed(4)
    assert torch.equal(draw(None, None), first)
    assert torch.equal(draw(1, None), draw(1, None))
    assert not torch.equal(draw(1, None), draw(2, None))
    assert torch.equal(draw(1, 3), draw(None, 3))


def test_variance_noise_is_used_as_it_is() -> None:
    scheduler = TableScheduler(solver="ddpm")
    scheduler.set_timesteps(5)
    t, x = scheduler.timesteps[0], start()
    output = Model()(x, t).sample
    zero = scheduler.step(output, t, x, variance_noise=torch.zeros_like(x)).prev_sample
    scheduler.set_timesteps(5)
    one = scheduler.step(output, t, x, variance_noise=torch.ones_like(x)).prev_sample
    torch.testing.assert_close(one - zero, torch.full_like(x, float(scheduler.table.noise_scale[0])))


# A run ---------------------------------------------------------------------------------------------------------


def test_step_returns_both_predictions_in_both_forms() -> None:
    scheduler = TableScheduler()
    scheduler.set_timesteps(4)
    t, x = scheduler.timesteps[0], start()
    output = Model()(x, t).sample
    named = scheduler.step(output, t, x)
    scheduler.set_timesteps(4)
    plain = scheduler.step(output, t, x, return_dict=False)
    assert isinstance(plain, tuple)
    assert torch.equal(plain[0], named.prev_sample)
    assert torch.equal(plain[1], named.pred_original_sample)
    alpha, sigma = SCHEDULE.alpha(999.0), SCHEDULE.sigma(999.0)
    torch.testing.assert_close(plain[1], (x - sigma * output) / alpha, rtol=1e-4, atol=1e-4)  # 1 / alpha is 157


@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc_2", "heun"])
def test_a_run_may_begin_later(solver: str) -> None:
    """As pipelines that begin with an image do; then with a first-order step, without any history."""
    scheduler = TableScheduler(solver=solver)
    scheduler.set_timesteps(8)
    first = 3 * scheduler.order
    times = scheduler.table.times[np.concatenate([[True], scheduler.table.ends_step[:-1]])][3:]
    alone = TableScheduler(solver=solver)
    alone.set_timesteps(timesteps=times.tolist())
    expected = run(alone, Model(), start())
    assert torch.equal(run(scheduler, Model(), start(), first), expected)
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(first)
    assert scheduler.step_index is None
    assert torch.equal(run(scheduler, Model(), start(), first), expected)
    assert scheduler.begin_index == first
    assert scheduler.step_index == len(scheduler.timesteps)


def test_set_timesteps_forgets_the_run_before() -> None:
    scheduler = TableScheduler()
    scheduler.set_timesteps(6)
    expected = run(scheduler, Model(), start())
    scheduler.set_timesteps(6)
    for t in scheduler.timesteps[:3]:
        scheduler.step(start(), t, start())
    scheduler.set_timesteps(6)
    assert torch.equal(run(scheduler, Model(), start()), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """One step: the rounding of the float32 result."""
    scheduler = TableScheduler()
    scheduler.set_timesteps(6)
    t, x = scheduler.timesteps[0], start(dtype)
    output = Model()(x.float(), t).sample.to(dtype)
    result = scheduler.step(output, t, x).prev_sample
    assert result.dtype == dtype
    scheduler.set_timesteps(6)
    assert torch.equal(result, scheduler.step(output.float(), t, x.float()).prev_sample.to(dtype))


def test_a_learned_variance_is_ignored() -> None:
    scheduler = TableScheduler()
    scheduler.set_timesteps(3)
    t, x = scheduler.timesteps[0], start()
    expected = scheduler.step(x, t, x).prev_sample
    scheduler.set_timesteps(3)
    assert torch.equal(scheduler.step(torch.cat([x, x + 1.0], dim=1), t, x).prev_sample, expected)


def test_noising_is_that_of_diffusers() -> None:
    reference, ours = diffusers.DDPMScheduler(), TableScheduler()
    x, noise, times = start(), start().flip(0), torch.tensor([0, 17, 500, 999])
    # sigma^2 = 1 - alphas_cumprod has lost digits to float32 there: 6e-8 of 1e-4 at the first time.
    torch.testing.assert_close(
        ours.add_noise(x, noise, times), reference.add_noise(x, noise, times), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        ours.get_velocity(x, noise, times), reference.get_velocity(x, noise, times), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(ours.add_noise(x, noise, times[2]), reference.add_noise(x, noise, times[2]))


# Inside diffusers ----------------------------------------------------------------------------------------------


def test_it_is_a_scheduler_like_others() -> None:
    scheduler = TableScheduler()
    assert isinstance(scheduler, diffusers.SchedulerMixin)
    assert scheduler.init_noise_sigma == 1.0
    assert scheduler.order == 1
    assert len(scheduler) == 1000
    assert scheduler.timesteps.tolist() == list(range(999, -1, -1))
    x = start()
    assert scheduler.scale_model_input(x, 5) is x
    assert diffusers.DDIMScheduler in scheduler.compatibles


def public(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def test_the_config_travels(tmp_path: Path) -> None:
    scheduler = TableScheduler(
        solver="unipc_2", spacing="karras", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
        prediction_type="v_prediction",
    )  # fmt: skip
    scheduler.save_pretrained(tmp_path)
    loaded = TableScheduler.from_pretrained(tmp_path)
    assert public(loaded.config) == public(scheduler.config)
    assert torch.equal(loaded.alphas_cumprod, scheduler.alphas_cumprod)
    # Its betas reach other schedulers, and come back.
    other = diffusers.DPMSolverMultistepScheduler.from_config(scheduler.config)
    assert torch.equal(other.alphas_cumprod, scheduler.alphas_cumprod)
    assert other.config.prediction_type == "v_prediction"
    again = TableScheduler.from_config(other.config, solver="ddim")
    assert torch.equal(again.alphas_cumprod, scheduler.alphas_cumprod)
    assert again.config.solver == "ddim"


@pytest.mark.parametrize("betas", ["numpy", "list"])
def test_own_betas(betas: str) -> None:
    values = np.linspace(1e-4, 0.02, 200)
    scheduler = TableScheduler(num_train_timesteps=200, trained_betas=values if betas == "numpy" else values.tolist())
    assert len(scheduler) == 200
    np.testing.assert_allclose(scheduler.alphas_cumprod, np.cumprod(1.0 - values), rtol=1e-5)


def test_rescaled_betas() -> None:
    """Their last step is from next to no signal: finite for v_prediction, and of the data's scale."""
    scheduler = TableScheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", beta_schedule="scaled_linear"
    )
    scheduler.set_timesteps(8)
    x = start()
    for t in scheduler.timesteps:
        alpha, sigma = scheduler.schedule.alpha(float(t)), scheduler.schedule.sigma(float(t))
        epsilon = (x - alpha * 0.3) / sigma  # of data that are 0.3 everywhere
        x = scheduler.step(alpha * epsilon - sigma * 0.3, t, x).prev_sample
    torch.testing.assert_close(x, torch.full_like(x, 0.3), rtol=1e-4, atol=1e-4)


def make_pipeline(pipeline_class: Any = diffusers.DDPMPipeline) -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=4, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip
    pipeline = pipeline_class(unet.eval(), diffusers.DDPMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, **options: Any) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    arguments = {"batch_size": 3, "num_inference_steps": 5, "output_type": "pt", **options}
    images: Tensor = pipeline(generator=generators, **arguments).images
    return images


def test_ddpm_pipeline() -> None:
    """With the solver of its own scheduler it draws what it drew before, a list of generators included."""
    pipeline = make_pipeline()
    expected = draw(pipeline)
    pipeline.scheduler = TableScheduler.from_config(pipeline.scheduler.config, solver="ddpm", spacing="leading")
    torch.testing.assert_close(draw(pipeline), expected, rtol=1e-5, atol=1e-5)


def test_ddim_pipeline_hands_its_eta() -> None:
    pipeline = make_pipeline(diffusers.DDIMPipeline)
    expected = {eta: draw(pipeline, eta=eta) for eta in (0.0, 0.7)}
    assert not torch.equal(expected[0.0], expected[0.7])
    config = pipeline.scheduler.config
    pipeline.scheduler = TableScheduler.from_config(config, solver="ddim", spacing="leading")
    for eta in (0.7, 0.0, 0.7):
        torch.testing.assert_close(draw(pipeline, eta=eta), expected[eta], rtol=1e-5, atol=1e-5)
    # A config that states eta prevails.
    pipeline.scheduler = TableScheduler.from_config(config, solver="ddim", spacing="leading", eta=0.7)
    torch.testing.assert_close(draw(pipeline, eta=0.0), expected[0.7], rtol=1e-5, atol=1e-5)
    for solver in ("dpmpp_2m", "euler_ancestral", "heun"):
        pipeline.scheduler = TableScheduler.from_config(config, solver=solver)
        assert draw(pipeline).isfinite().all()


def test_a_saved_pipeline_loads_with_it(tmp_path: Path) -> None:
    pipeline = make_pipeline()
    pipeline.scheduler = TableScheduler.from_config(pipeline.scheduler.config, solver="unipc_2")
    pipeline.save_pretrained(tmp_path)
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is TableScheduler
    assert torch.equal(draw(loaded), draw(pipeline))


class Ratio:
    """log q / p of Gaussians of the model's scale whose means differ by 0.5."""

    schedule = SCHEDULE

    def log_ratio_and_grad(self, x: Tensor, t: float, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
        gradient = torch.full_like(x, alpha * 0.5 / (alpha**2 * 0.36 + sigma**2))
        return (gradient * x).flatten(1).sum(1), gradient


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("solver", ["ddpm", "unipc_2"])
def test_guided_it_draws_what_sample_draws(solver: str, prediction_type: str) -> None:
    """The whole chain: guide() on the model, then the table, against sample() with the same seed."""
    settings: dict[str, Any] = {"scale": lambda t: 1.0 + t / 500.0, "interval": (40.0, 900.0)}
    expected = sample(Model(), Ratio(), num=4, shape=(2, 3, 5), solver=solver, steps=9, seed=7, **settings)
    unguided = sample(Model(), num=4, shape=(2, 3, 5), solver=solver, steps=9, seed=7)
    model, scheduler = Model(prediction_type), TableScheduler(solver=solver, prediction_type=prediction_type)
    scheduler.set_seed(7)
    scheduler.set_timesteps(9)
    x = normal(7, torch.arange(4), 30, 0).reshape(-1, 2, 3, 5)
    with integration.guide(SimpleNamespace(unet=model, scheduler=scheduler), Ratio(), **settings):
        result = run(scheduler, model, x)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    assert (expected - unguided).mean() > 0.3


# Refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "dpm"}, "solver must be one of"),
        ({"spacing": "exponential"}, "spacing must be one of"),
        ({"prediction_type": "flow_prediction"}, "prediction_type must be one of"),
        ({"thresholding": True}, "thresholding must be False"),
        ({"clip_sample_range": 0.0}, "clip_sample_range"),
        ({"eta": 0.5}, "eta must be None for solver 'dpmpp_2m'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TableScheduler(**options)


def test_bad_calls() -> None:
    scheduler = TableScheduler(solver="heun")
    with pytest.raises(ValueError, match="either num_inference_steps or timesteps"):
        scheduler.set_timesteps()
    with pytest.raises(ValueError, match="steps=1001 needs 1001 different times"):
        scheduler.set_timesteps(1001)
    with pytest.raises(ValueError, match="strictly decrease"):
        scheduler.set_timesteps(timesteps=[3, 5])
    scheduler.set_timesteps(timesteps=[900, 500, 100])
    with pytest.raises(ValueError, match=r"begins, \[900, 500, 100\], got 200"):
        scheduler.step(start(), 200, start())
    x = start()
    for t in scheduler.timesteps:
        x = scheduler.step(start(), t, x).prev_sample
    with pytest.raises(ValueError, match="run of 5 evaluations is over"):
        scheduler.step(start(), 100, x)
    with pytest.raises(ValueError, match="seed"):
        scheduler.set_seed(-1)
