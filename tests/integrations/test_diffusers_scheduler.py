"""TableScheduler against diffusers' own schedulers and solver tables, and inside pipelines."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
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


# Configs of other schedulers -----------------------------------------------------------------------------------


def scheduler_classes() -> list[Any]:
    """Every scheduler of diffusers that can be imported and made without arguments."""
    found = {}
    for module in pkgutil.iter_modules(diffusers.schedulers.__path__, "diffusers.schedulers."):
        try:
            members = vars(importlib.import_module(module.name)).values()
        except ImportError:  # torchsde
            continue
        found.update(
            {each.__name__: each for each in members if inspect.isclass(each) and hasattr(each, "from_config")}
        )
    required = [
        [one for one in list(inspect.signature(each).parameters.values()) if one.default is one.empty]
        for each in found.values()
    ]
    return [
        each
        for each, missing in zip(found.values(), required, strict=True)
        if not missing and hasattr(each, "set_timesteps") and each.__module__.startswith("diffusers.schedulers.")
    ]


NO_VARIANCE_PRESERVING_NOISE = (
    "FlowMatch", "FlowMap", "EDM", "CMStochastic", "Consistency", "LCM", "TCD", "UnCLIP", "ScoreSde", "CogVideoX",
    "SCM", "IPNDM", "KarrasVe", "Wuerstchen", "LTX", "Helios", "Piflow", "MiniMax", "BlockRefinement",
    "DiscreteDDIM", "EntropyBound",
)  # fmt: skip


@pytest.mark.parametrize("scheduler_class", scheduler_classes(), ids=lambda each: each.__name__)
@pytest.mark.parametrize("form", ["object", "file", "name alone"])
def test_a_scheduler_is_followed_or_refused(scheduler_class: Any, form: str, tmp_path: Path) -> None:
    """All of diffusers: the same alphas_cumprod and prediction type, also where they are defaults of the class."""
    other = scheduler_class()
    config = other.config
    if form == "file":
        other.save_pretrained(tmp_path)
        config = scheduler_class.load_config(tmp_path)
    elif form == "name alone":
        config = {"_class_name": scheduler_class.__name__}
        if not hasattr(diffusers, scheduler_class.__name__):
            pytest.skip("diffusers does not export it")
    if any(name in scheduler_class.__name__ for name in NO_VARIANCE_PRESERVING_NOISE):
        with pytest.raises(ValueError, match="config must"):
            TableScheduler.from_config(config)
        return
    ours = TableScheduler.from_config(config, solver="ddim")  # which has RePaint's eta
    assert torch.equal(ours.alphas_cumprod, other.alphas_cumprod)
    assert ours.config.prediction_type == other.config.get("prediction_type", "epsilon")


LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
FAMOUS = {
    "Stable Diffusion 1.5": {
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **LATENT, "set_alpha_to_one": False,
        "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False,
    },
    "Stable Diffusion 2.1": {
        "_class_name": "DDIMScheduler", **LATENT, "clip_sample": False, "prediction_type": "v_prediction",
        "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
    },
    "SDXL": {
        "_class_name": "EulerDiscreteScheduler", **LATENT, "clip_sample": False, "interpolation_type": "linear",
        "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True,
        "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None, "use_karras_sigmas": False,
    },
    "ddpm-cifar10-32": {
        "_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "beta_end": 0.02, "beta_schedule": "linear",
        "beta_start": 0.0001, "clip_sample": True, "num_train_timesteps": 1000, "trained_betas": None,
        "variance_type": "fixed_large", "tensor_format": "pt", "timestep_values": None,
    },
    "DiT": {
        "_class_name": "DDIMScheduler", "beta_end": 0.02, "beta_schedule": "linear", "beta_start": 0.0001,
        "clip_sample": False, "num_train_timesteps": 1000, "prediction_type": "epsilon", "set_alpha_to_one": True,
        "steps_offset": 0, "trained_betas": None,
    },
    "cosine": {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
    "sigmoid": {"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"},
    "own betas": {
        "_class_name": "DDIMScheduler", "num_train_timesteps": 200,
        "trained_betas": np.linspace(1e-4, 0.03, 200).tolist(),
    },
}  # fmt: skip
REFUSED = {
    "Stable Video Diffusion": (
        {**FAMOUS["SDXL"], "timestep_type": "continuous", "sigma_max": 700.0, "sigma_min": 0.002}, "timestep_type"
    ),
    "Karras sigmas": ({**FAMOUS["SDXL"], "use_karras_sigmas": True}, "use_karras_sigmas=True"),
    "exponential sigmas": ({**FAMOUS["SDXL"], "use_exponential_sigmas": True}, "use_exponential_sigmas"),
    "beta sigmas": ({**FAMOUS["SDXL"], "use_beta_sigmas": True}, "use_beta_sigmas"),
    "flow sigmas": (
        {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0}, "use_flow_sigmas"
    ),
    "flow prediction": ({**FAMOUS["SDXL"], "prediction_type": "flow_prediction"}, "prediction_type must be one of"),
    "log-linear": ({**FAMOUS["SDXL"], "interpolation_type": "log_linear"}, "interpolation_type"),
    "last sigma": ({**FAMOUS["SDXL"], "final_sigmas_type": "sigma_min"}, "final_sigmas_type"),
    "thresholding": ({"_class_name": "DDPMScheduler", "thresholding": True}, "thresholding must be False"),
    "shift": ({**LATENT, "_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "Flow.* with shift=3.0"),
    "old prediction type": ({**FAMOUS["DiT"], "predict_epsilon": False}, "predict_epsilon=False"),
    "unknown": ({**FAMOUS["DiT"], "noise_warp": 0.3}, "noise_warp=0.3"),
    "unknown array": ({**FAMOUS["DiT"], "all_sigmas": np.ones(3)}, "all_sigmas="),
    "exp": ({"_class_name": "HeunDiscreteScheduler", "beta_schedule": "exp"}, "beta_schedule must be"),
    "betas of another number": ({**FAMOUS["DiT"], "trained_betas": [0.1, 0.2, 0.3]}, "trained_betas must have"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMOUS)
def test_configs_of_known_models(name: str) -> None:
    config = FAMOUS[name]
    other = getattr(diffusers, config["_class_name"]).from_config(config)
    ours = TableScheduler.from_config(config)
    assert torch.equal(ours.alphas_cumprod, other.alphas_cumprod)
    assert ours.config.prediction_type == other.config.prediction_type
    assert ours.config.clip_sample == config.get("clip_sample", False)


@pytest.mark.parametrize("name", REFUSED)
def test_configs_that_betas_do_not_describe(name: str) -> None:
    config, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        TableScheduler.from_config(config)


def test_an_entry_may_be_replaced(tmp_path: Path) -> None:
    """Then the saved config is free of it, and loads."""
    config = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True, prediction_type="sample").config
    scheduler = TableScheduler.from_config(config, use_karras_sigmas=None, spacing="karras", prediction_type="epsilon")
    assert (scheduler.config.spacing, scheduler.config.prediction_type) == ("karras", "epsilon")
    scheduler.save_pretrained(tmp_path)
    assert TableScheduler.from_pretrained(tmp_path).config.spacing == "karras"
    assert TableScheduler.from_config(str(tmp_path)).config.spacing == "karras"
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path)
    for load in (TableScheduler.from_pretrained, TableScheduler.from_config):
        with pytest.raises(ValueError, match=r"FlowMatchEulerDiscreteScheduler with shift=1\.0"):
            load(str(tmp_path))
    with pytest.raises(ValueError, match="use_karras_sigmas=True"):
        TableScheduler.from_config({**config, "_class_name": "DPMSolverMultistepScheduler"}, spacing="karras")
    cog = {"_class_name": "CogVideoXDDIMScheduler"}
    shifted = TableScheduler.from_config(cog, snr_shift_scale=None)
    assert torch.equal(shifted.alphas_cumprod, TableScheduler.from_config(FAMOUS["SDXL"]).alphas_cumprod)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("total", [1000, 250, 37])
def test_grids_of_every_length(spacing: str, total: int) -> None:
    """diffusers' grid, of which rounding makes "trailing" one time too long (61, 103, 122, ... of 1000)."""
    ours = TableScheduler(num_train_timesteps=total, solver="euler", spacing=spacing)
    reference = diffusers.DDIMScheduler(num_train_timesteps=total, timestep_spacing=spacing)
    for steps in {*range(1, 131), total // 2, total - 1, total, 703} & {*range(1, total + 1)}:
        for scheduler in (ours, reference):
            scheduler.set_timesteps(steps)
        times = ours.timesteps.tolist()
        assert len(set(times)) == len(times) == steps
        assert times[-1] >= 0
        assert times == reference.timesteps.tolist()[:steps]


def test_a_config_changed_in_place_is_followed() -> None:
    scheduler, x = TableScheduler(solver="euler", spacing="leading"), start()
    scheduler.register_to_config(
        solver="heun", spacing="trailing", steps_offset=0, clip_sample=True, prediction_type="sample"
    )
    expected = TableScheduler(solver="heun", spacing="trailing", clip_sample=True, prediction_type="sample")
    for each in (scheduler, expected):
        each.set_timesteps(5)
    assert (scheduler.order, scheduler.timesteps.tolist()) == (2, expected.timesteps.tolist())
    assert torch.equal(*[each.step(3.0 * x, each.timesteps[0], x).prev_sample for each in (scheduler, expected)])


# Image to image ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [name for name, info in SOLVERS.items() if info.evaluations == 2])
@pytest.mark.parametrize("spacing", ["logsnr", "trailing"])
def test_step_k_begins_at_entry_k_times_order(solver: str, spacing: str) -> None:
    """As pipelines slice: by strength, ``t_start * order``; by denoising_start, an odd number of entries from the end.

    Also where a step has no timestep inside, from 20 steps on in log-SNR.
    """
    scheduler = TableScheduler(solver=solver, spacing=spacing)
    for steps in (1, 2, 7, 20, 33, 60):
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps.tolist()
        assert len(timesteps) == 2 * steps - 1
        assert sorted(timesteps, reverse=True) == timesteps
        for begin in {0, 2 * (steps // 3), 2 * (steps - 1)}:
            scheduler.set_timesteps(steps)
            scheduler.set_begin_index(begin)
            x = start(torch.float64)
            for t in timesteps[begin:]:
                x = scheduler.step(Model()(x, t).sample, t, x).prev_sample
            grid = scheduler.table.times[np.concatenate([[True], scheduler.table.ends_step[:-1]])]
            table = solver_table(solver, SCHEDULE, times=grid[begin // 2 :])
            assert scheduler.step_index == len(timesteps)
            torch.testing.assert_close(x, apply_table(table, start(torch.float64)), rtol=1e-9, atol=1e-9)


def apply_table(table: Any, x: Tensor) -> Tensor:
    """The recurrence of SolverTable's documentation in float64."""
    state = [x, *[torch.zeros_like(x)] * table.history]
    for t, matrix in zip(table.times, table.matrix, strict=True):
        terms = torch.stack([*state, Model().epsilon(state[0], float(t))])
        state = list(torch.einsum("ij,j...->i...", torch.from_numpy(matrix.copy()), terms))
    return state[0]


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
