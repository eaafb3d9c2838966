"""tgdp_fast.integrations.diffusers: closed form with Gaussians, and digits through diffusers' own pipelines.

With source N(a, s^2) and target N(b, s'^2) in every element, x_t is Gaussian for both, so that the exact predictions of
either and grad log q_t / p_t are known. Guiding the exact model of the source must give the exact model of the target.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tgdp_fast import GuidanceConfig, GuidanceNetwork, NetworkConfig, NoiseSchedule, TrainingConfig, fit_guidance
from tgdp_fast.data.digits import load_digits_arrays

diffusers = pytest.importorskip("diffusers")
guide = pytest.importorskip("tgdp_fast.integrations.diffusers").guide

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad"),
]

SOURCE, TARGET = (0.4, 0.6), (-0.3, 0.25)  # mean and standard deviation
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
SCHEDULERS = [
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
]
# diffusers does not implement the prediction type "sample" for these.
WITHOUT_SAMPLE = ("PNDMScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler")


class GaussianModel(nn.Module):
    """The exact model of N(mean, std^2) in every element, called as diffusers calls its own."""

    def __init__(
        self,
        scheduler: Any,
        law: tuple[float, float],
        prediction_type: str,
        form: str = "output",
        variance: bool = False,
    ) -> None:
        super().__init__()
        alphas_cumprod = scheduler.alphas_cumprod.double()
        last = -1 if scheduler.config.get("rescale_betas_zero_snr") else None
        self.schedule = NoiseSchedule.from_alphas_cumprod(alphas_cumprod[:last])
        self.law, self.prediction_type, self.form, self.variance = law, prediction_type, form, variance
        self.inputs: list[Tensor] = []

    def forward(
        self, sample: Tensor, timestep: Any, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> Any:
        self.inputs.append(sample)
        t = float(torch.as_tensor(timestep).flatten()[0])
        alpha, sigma = (self.schedule.alpha(t), self.schedule.sigma(t)) if t <= self.schedule.t_max else (0.0, 1.0)
        mean, std = self.law
        x = sample.double()
        epsilon = sigma * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        x0 = mean + alpha * std**2 * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        output = {"epsilon": epsilon, "sample": x0, "v_prediction": alpha * epsilon - sigma * x0}[self.prediction_type]
        output = output.to(sample.dtype)
        if self.variance:
            output = torch.cat([output, torch.full_like(output, 7.0)], dim=1)
        if self.form == "tensor":
            return output
        return diffusers.models.unets.unet_2d.UNet2DOutput(sample=output) if return_dict else (output,)


class ExactRatio:
    """log q_t / p_t of the two Gaussians, [B], and its gradient; the time is that of its schedule."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule
        self.times: list[float] = []
        self.batches: list[tuple[torch.Size, torch.dtype]] = []

    def log_ratio(self, x: Tensor, t: Tensor | float) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float64).reshape(-1, *[1] * (x.ndim - 1))
        alpha, sigma = self.schedule.alpha(t).to(x.dtype), self.schedule.sigma(t).to(x.dtype)
        terms = torch.zeros(())
        for sign, (mean, std) in ((1.0, TARGET), (-1.0, SOURCE)):
            variance = (alpha * std) ** 2 + sigma**2
            terms = terms - sign * 0.5 * ((x - alpha * mean) ** 2 / variance + torch.log(variance))
        return terms.flatten(1).sum(1)

    def log_ratio_and_grad(self, x: Tensor, t: float, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.times.append(t)
        self.batches.append((x.shape, x.dtype))
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = self.log_ratio(x, t)
            return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def make_scheduler(name: str, **options: Any) -> Any:
    clip = {"clip_sample": False} if name in ("DDPMScheduler", "DDIMScheduler") else {}
    return getattr(diffusers, name)(**clip, **options)


def run(scheduler: Any, model: nn.Module, x: Tensor, steps: int = 7) -> Tensor:
    """The usual loop, from unit noise."""
    scheduler.set_timesteps(steps)
    x = x * scheduler.init_noise_sigma
    generator = torch.Generator().manual_seed(3)
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model(scheduler.scale_model_input(x, t), t).sample, t, x, **options).prev_sample
    return x


def noise(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(5, 1, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(dtype)


def predict(model: nn.Module, x: Tensor, t: Any) -> Tensor:
    with torch.no_grad():
        return model(x, t).sample


# Closed form ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("t", [0, 3, 412, 998])
def test_a_guided_source_model_is_the_target_model(prediction_type: str, t: int) -> None:
    scheduler = make_scheduler("DDPMScheduler", prediction_type=prediction_type)
    model, target = (GaussianModel(scheduler, law, prediction_type) for law in (SOURCE, TARGET))
    pipeline = SimpleNamespace(unet=model, scheduler=scheduler)
    source = predict(model, noise(), t)
    with guide(pipeline, ExactRatio(model.schedule)) as guided:
        assert guided.model is model
        torch.testing.assert_close(predict(model, noise(), t), predict(target, noise(), t), rtol=1e-9, atol=1e-9)
    assert torch.equal(predict(model, noise(), t), source)


@pytest.mark.parametrize(
    ("name", "prediction_type"),
    [
        (name, prediction_type)
        for name in SCHEDULERS
        for prediction_type in PREDICTION_TYPES
        if prediction_type != "sample" or name not in WITHOUT_SAMPLE
    ],
)
def test_every_scheduler_sees_the_target_model(name: str, prediction_type: str) -> None:
    scheduler = make_scheduler(name, prediction_type=prediction_type)
    model, target = (GaussianModel(scheduler, law, prediction_type) for law in (SOURCE, TARGET))
    expected = run(make_scheduler(name, prediction_type=prediction_type), target, noise())
    unguided = run(make_scheduler(name, prediction_type=prediction_type), model, noise())
    with guide(SimpleNamespace(unet=model, scheduler=scheduler), ExactRatio(model.schedule)):
        result = run(scheduler, model, noise())
    # diffusers' own arithmetic is partly float32.
    torch.testing.assert_close(result, expected, rtol=2e-4, atol=2e-4)
    assert (unguided - expected).abs().mean() > 0.3


def test_guided_samples_have_the_moments_of_the_target() -> None:
    """DDIM with 200 steps: the error in the moments is of the order of the step, 1 / 200, and that of 20,000 draws."""
    scheduler = make_scheduler("DDIMScheduler")
    model = GaussianModel(scheduler, SOURCE, "epsilon")
    with guide(model, ExactRatio(model.schedule), scheduler=scheduler):
        samples = run(scheduler, model, torch.randn(20_000, 1, 1, 1, dtype=torch.float64), steps=200)
    assert abs(float(samples.mean()) - TARGET[0]) < 0.02
    assert abs(float(samples.std()) - TARGET[1]) < 0.02


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_scale_and_its_interval_act_by_timestep(prediction_type: str) -> None:
    scheduler = make_scheduler("DDPMScheduler", prediction_type=prediction_type)
    model = GaussianModel(scheduler, SOURCE, prediction_type)
    x, ratio = noise(), ExactRatio(model.schedule)
    for t, expected in ((99, 0.0), (100, 0.5), (400, 2.0), (401, 0.0)):
        alpha, sigma = model.schedule.alpha(float(t)), model.schedule.sigma(float(t))
        source = predict(model, x, t)
        gradient = ratio.log_ratio_and_grad(x, float(t))[1]
        change = {"epsilon": -sigma, "sample": sigma**2 / alpha, "v_prediction": -sigma / alpha}[prediction_type]
        ratio.times.clear()
        with guide(model, ratio, scheduler=scheduler, scale=lambda t: t / 200.0, interval=(100, 400)):
            result = predict(model, x, t)
        torch.testing.assert_close(result, source + expected * change * gradient, rtol=1e-10, atol=1e-10)
        assert len(ratio.times) == (expected != 0.0)


def test_long_gradients_are_shortened() -> None:
    scheduler = make_scheduler("DDPMScheduler")
    model = GaussianModel(scheduler, SOURCE, "epsilon")
    source = predict(model, noise(), 50)
    with guide(model, ExactRatio(model.schedule), scheduler=scheduler, scale=2.0, gradient_norm_limit=0.125):
        change = predict(model, noise(), 50) - source
    torch.testing.assert_close(change.flatten(1).norm(dim=1), torch.full((5,), 0.125, dtype=torch.float64))


# Times ---------------------------------------------------------------------------------------------------------


def test_the_guidance_gets_the_time_of_its_own_schedule() -> None:
    """A continuous schedule: at the time with the same log-SNR it has the same alpha and sigma, so all is exact."""
    scheduler = make_scheduler("DDPMScheduler")
    model, target = (GaussianModel(scheduler, law, "epsilon") for law in (SOURCE, TARGET))
    ratio = ExactRatio(NoiseSchedule.vp_linear())
    with guide(model, ratio, scheduler=scheduler):
        for t in (1, 500, 998):
            torch.testing.assert_close(predict(model, noise(), t), predict(target, noise(), t), rtol=1e-9, atol=1e-9)
    for t, time in zip((1, 500, 998), ratio.times, strict=True):
        assert ratio.schedule.log_snr(time) == pytest.approx(model.schedule.log_snr(float(t)), abs=1e-9)


@pytest.mark.parametrize("time_input", ["time", "half_log_snr"])
def test_a_plain_module_gives_the_same_guidance(time_input: str) -> None:
    scheduler = make_scheduler("DDPMScheduler")
    model, target = (GaussianModel(scheduler, law, "epsilon") for law in (SOURCE, TARGET))
    ratio = ExactRatio(model.schedule)
    seen = []

    class LogRatio(nn.Module):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            assert not self.training
            seen.append(time)
            t = time if time_input == "time" else model.schedule.time_from_half_log_snr(time)
            return ratio.log_ratio(x, t)[:, None]

    network = LogRatio().train()
    x = noise()
    with guide(model, network, scheduler=scheduler, time_input=time_input):
        for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
            with context:
                result = model(x.clone(), torch.tensor(321)).sample
            torch.testing.assert_close(result, predict(target, x, 321), rtol=1e-6, atol=1e-6)
            assert not result.requires_grad
    assert network.training
    expected = 321.0 if time_input == "time" else model.schedule.half_log_snr(321.0)
    torch.testing.assert_close(seen[0], torch.full((5,), expected, dtype=torch.float64))


def test_a_fractional_timestep() -> None:
    """Euler's default grid has them; alpha is log-linear in between for both."""
    scheduler = make_scheduler("EulerDiscreteScheduler")
    scheduler.set_timesteps(9)
    t = scheduler.timesteps[3]
    assert float(t) != round(float(t))
    model, target = (GaussianModel(scheduler, law, "epsilon") for law in (SOURCE, TARGET))
    with guide(model, ExactRatio(model.schedule), scheduler=scheduler):
        torch.testing.assert_close(predict(model, noise(), t), predict(target, noise(), t), rtol=1e-9, atol=1e-9)


def test_a_timestep_in_half_precision() -> None:
    """As some pipelines hand it to their model; 999 is 1000 in bfloat16, which the schedule does not have."""

    class Model(GaussianModel):
        def forward(self, sample: Tensor, timestep: Tensor) -> Any:
            return super().forward(sample, timestep.float().clamp(max=999.0))

    scheduler = make_scheduler("DDPMScheduler")
    model, target = Model(scheduler, SOURCE, "epsilon"), GaussianModel(scheduler, TARGET, "epsilon")
    with guide(model, ExactRatio(model.schedule), scheduler=scheduler):
        for t, same in ((999, 999), (500, 500), (3, 3)):
            result = predict(model, noise(), torch.tensor([t] * 5, dtype=torch.bfloat16))
            torch.testing.assert_close(result, predict(target, noise(), same), rtol=1e-9, atol=1e-9)
        with pytest.raises(ValueError, match=r"timestep must be in \[0, 999\], got 1000.0"):
            predict(model, noise(), torch.tensor(1000.0))
        with pytest.raises(ValueError, match=r"timestep must be in \[0, 999\], got 1024.0"):
            predict(model, noise(), torch.tensor(1024.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_zero_terminal_signal(name: str) -> None:
    scheduler = make_scheduler(name, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    model, target = (GaussianModel(scheduler, law, "v_prediction") for law in (SOURCE, TARGET))
    with guide(model, ExactRatio(model.schedule), scheduler=scheduler):
        torch.testing.assert_close(predict(model, noise(), 998), predict(target, noise(), 998), rtol=1e-6, atol=1e-6)
        # v = -x_0, the mean of the source: not guided.
        torch.testing.assert_close(predict(model, noise(), 999), torch.full_like(noise(), -SOURCE[0]))


# The model -----------------------------------------------------------------------------------------------------


def make_unet(**options: Any) -> Any:
    arguments: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
        "add_attention": False,
    }
    return diffusers.UNet2DModel(**{**arguments, **options}).eval()


@pytest.mark.parametrize("compiled", ["no", "module", "in place"])
def test_the_model_is_restored_also_after_an_exception(compiled: str) -> None:
    unet = make_unet(block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    model: Any = unet
    if compiled == "module":
        model = torch.compile(unet, backend="eager")
    elif compiled == "in place":
        unet.compile(backend="eager")
    pipeline = SimpleNamespace(unet=model, scheduler=make_scheduler("DDPMScheduler"))
    ratio = ExactRatio(NoiseSchedule.from_diffusers(pipeline.scheduler))
    x = torch.randn(3, 1, 8, 8)
    source = predict(model, x, torch.tensor(300))
    expected = source - 0.5 * float(ratio.schedule.sigma(300.0)) * ratio.log_ratio_and_grad(x, 300.0)[1]

    def use_and_fail() -> None:
        with guide(pipeline, ratio, scale=0.5):
            torch.testing.assert_close(predict(model, x, torch.tensor(300)), expected, rtol=1e-5, atol=1e-5)
            raise KeyError

    with pytest.raises(KeyError):
        use_and_fail()
    assert torch.equal(predict(model, x, torch.tensor(300)), source)

    guided = guide(pipeline, ratio, scale=1.5)
    tripled = source + 3.0 * (expected - source)
    torch.testing.assert_close(predict(model, x, torch.tensor(300)), tripled, rtol=1e-5, atol=1e-5)
    guided.restore()
    guided.restore()
    assert torch.equal(predict(model, x, torch.tensor(300)), source)
    assert not model._forward_hooks
    assert (unet._compiled_call_impl is not None) == (compiled == "in place")


@pytest.mark.parametrize("in_place", [False, True])
def test_two_guides_add_up(in_place: bool) -> None:
    class Model(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return torch.tanh(sample)

    scheduler, model = make_scheduler("DDPMScheduler"), Model()
    ratio = ExactRatio(NoiseSchedule.from_diffusers(scheduler))
    t = torch.tensor(200)
    with guide(model, ratio, scheduler=scheduler, scale=1.75):
        expected = model(noise(), t)
    if in_place:
        model.compile(backend="eager")
    first = guide(model, ratio, scheduler=scheduler, scale=1.0)
    with pytest.warns(UserWarning, match="guides the model already"):  # as a notebook cell does that runs again
        second = guide(model, ratio, scheduler=scheduler, scale=0.75)
    torch.testing.assert_close(model(noise(), t), expected)
    if in_place:
        with pytest.raises(RuntimeError, match="reverse order"):
            first.restore()
    second.restore()
    first.restore()
    torch.testing.assert_close(model(noise(), t), torch.tanh(noise()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guide(model, ratio, scheduler=scheduler).restore()
        with guide(model, ratio, scheduler=scheduler), guide(model, lambda x, t: x.sum((1, 2, 3)), scheduler=scheduler):
            pass


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    """The guidance sees float32; only the result is rounded, so it is the rounding of the exact one."""
    scheduler = make_scheduler("DDPMScheduler")
    model = GaussianModel(scheduler, SOURCE, "epsilon")
    ratio = ExactRatio(model.schedule)
    x = noise(dtype)
    source = predict(model, x, 250)
    gradient = ratio.log_ratio_and_grad(x.double(), 250.0)[1]
    expected = (source.double() - model.schedule.sigma(250.0) * gradient).to(dtype)
    ratio.batches.clear()
    with guide(model, ratio, scheduler=scheduler):
        result = predict(model, x, 250)
    assert result.dtype == dtype
    assert ratio.batches == [(x.shape, torch.float32)]
    torch.testing.assert_close(result, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_the_guidance_sees_its_own_dtype() -> None:
    scheduler = make_scheduler("DDPMScheduler")
    network = GuidanceNetwork((1, 3, 7), NoiseSchedule.from_diffusers(scheduler), width=8, depth=2).to(torch.bfloat16)
    model = GaussianModel(scheduler, SOURCE, "epsilon")
    with guide(model, network, scheduler=scheduler):
        assert predict(model, noise(torch.float32), 10).dtype == torch.float32


@pytest.mark.parametrize("form", ["output", "tuple", "tensor"])
def test_every_form_of_output(form: str) -> None:
    scheduler = make_scheduler("DDPMScheduler")
    model, target = (GaussianModel(scheduler, law, "epsilon", "tensor") for law in (SOURCE, TARGET))
    model.form = "tensor" if form == "tensor" else "output"
    expected = target(noise(), 77)
    with guide(model, ExactRatio(model.schedule), scheduler=scheduler):
        output = model(timestep=77, sample=noise(), return_dict=form != "tuple")
    if form == "output":
        assert isinstance(output, diffusers.models.unets.unet_2d.UNet2DOutput)
        output = output.sample
    elif form == "tuple":
        assert isinstance(output, tuple)
        output = output[0]
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)


def test_a_learned_variance_stays_as_it_is() -> None:
    scheduler = make_scheduler("DDPMScheduler")
    model = GaussianModel(scheduler, SOURCE, "epsilon", variance=True)
    target = GaussianModel(scheduler, TARGET, "epsilon")
    with guide(model, ExactRatio(model.schedule), scheduler=scheduler):
        mean, variance = predict(model, noise(), 600).chunk(2, dim=1)
    torch.testing.assert_close(mean, predict(target, noise(), 600), rtol=1e-9, atol=1e-9)
    assert bool((variance == 7.0).all())


def test_a_transformer_takes_hidden_states() -> None:
    scheduler = make_scheduler("DDIMScheduler")
    model, target = (GaussianModel(scheduler, law, "epsilon", "tensor") for law in (SOURCE, TARGET))

    class Transformer(nn.Module):
        def forward(self, encoder_states: Tensor, hidden_states: Tensor, timestep: Tensor) -> Tensor:
            return model(hidden_states, timestep)

    transformer = Transformer()
    with guide(SimpleNamespace(transformer=transformer, scheduler=scheduler), ExactRatio(model.schedule)):
        for result in (
            transformer(noise() + 1.0, noise(), torch.tensor(70)),
            transformer(timestep=torch.tensor([70] * 5), hidden_states=noise(), encoder_states=noise() + 1.0),
        ):
            torch.testing.assert_close(result, target(noise(), 70), rtol=1e-9, atol=1e-9)


def test_the_scheduler_may_change_meanwhile() -> None:
    scheduler = make_scheduler("DDPMScheduler")
    pipeline = SimpleNamespace(unet=GaussianModel(scheduler, SOURCE, "epsilon"), scheduler=scheduler)
    with guide(pipeline, ExactRatio(pipeline.unet.schedule)):
        pipeline.unet.prediction_type = "v_prediction"
        pipeline.scheduler = make_scheduler("DDIMScheduler", prediction_type="v_prediction")
        target = GaussianModel(scheduler, TARGET, "v_prediction")
        torch.testing.assert_close(
            predict(pipeline.unet, noise(), 9), predict(target, noise(), 9), rtol=1e-9, atol=1e-9
        )


def test_the_scheduler_may_be_changed_in_place() -> None:
    """Its prediction type and its noise, as scripts for v-prediction checkpoints do; kinds without a formula raise."""
    scheduler = make_scheduler("DDIMScheduler")
    pipeline = SimpleNamespace(unet=GaussianModel(scheduler, SOURCE, "epsilon"), scheduler=scheduler)
    with guide(pipeline, ExactRatio(pipeline.unet.schedule)) as guided:

        def check(prediction_type: str) -> None:
            target = GaussianModel(scheduler, TARGET, prediction_type)
            pipeline.unet.prediction_type, pipeline.unet.schedule = prediction_type, target.schedule
            guided.guidance.schedule = target.schedule
            torch.testing.assert_close(
                predict(pipeline.unet, noise(), 500), predict(target, noise(), 500), rtol=1e-9, atol=1e-9
            )

        check("epsilon")
        for prediction_type in ("v_prediction", "sample", "epsilon"):
            scheduler.register_to_config(prediction_type=prediction_type)
            check(prediction_type)
        scheduler.alphas_cumprod.mul_(0.9)
        check("epsilon")
        scheduler.alphas_cumprod = make_scheduler("DDIMScheduler", beta_schedule="scaled_linear").alphas_cumprod
        check("epsilon")
        scheduler.set_timesteps(7)
        check("epsilon")
        scheduler.register_to_config(prediction_type="flow_prediction")
        with pytest.raises(ValueError, match="prediction_type must be one of"):
            predict(pipeline.unet, noise(), 500)
        scheduler.register_to_config(prediction_type="epsilon", timestep_type="continuous")
        with pytest.raises(ValueError, match="timestep_type='continuous'"):
            predict(pipeline.unet, noise(), 500)
        pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        with pytest.raises(TypeError, match="alphas_cumprod"):
            predict(pipeline.unet, noise(), 500)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_may_change_its_dtype_and_run_in_autocast(dtype: torch.dtype) -> None:
    """log h is computed in float32 either way, so the guided output moves by what float32 guidance moves it."""
    scheduler, unet = make_scheduler("DDPMScheduler"), make_unet()
    network = GuidanceNetwork((1, 8, 8), NoiseSchedule.from_diffusers(scheduler), width=8, depth=2).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    sigma = network.schedule.sigma(300.0)
    gradient = network.log_ratio_and_grad(x.to(dtype).float(), 300.0)[1]
    guided = guide(unet, network, scheduler=scheduler)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = predict(unet, x.to(dtype).float(), 300)
        guided.restore()
        expected = predict(unet, x.to(dtype).float(), 300).float() - sigma * gradient
    torch.testing.assert_close(seen, expected.to(seen.dtype), rtol=0.0, atol=0.0)
    with guide(unet, network, scheduler=scheduler):
        unet.to(dtype)
        seen = predict(unet, x.to(dtype).to(memory_format=torch.channels_last), 300)
    expected = (predict(unet, x.to(dtype), 300).float() - sigma * gradient).to(dtype)
    assert seen.dtype == dtype
    torch.testing.assert_close(seen, expected, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_no_class_is_that_of_the_same_image() -> None:
    """Classifier-free guidance doubles the batch and gives one half the index after the last class, as DiT does."""
    scheduler = make_scheduler("DDIMScheduler")
    model, x = GaussianModel(scheduler, SOURCE, "epsilon"), noise()[:2]

    class Conditional:
        num_classes = 3
        seen: Any = None

        def log_ratio_and_grad(self, x: Tensor, t: float, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
            self.seen = labels
            return x.flatten(1).sum(1), labels.to(x.dtype).reshape(-1, 1, 1, 1).expand_as(x)

    guidance, doubled = Conditional(), torch.cat([x, x])
    with guide(model, guidance, scheduler=scheduler):
        for class_labels in ([0, 2, 3, 3], [3, 3, 0, 2], [0, 2, -1, 3]):
            first, second = predict_with(model, doubled, torch.tensor(class_labels)).chunk(2)
            assert guidance.seen.tolist() == [0, 2, 0, 2]
            assert torch.equal(first, second)
        predict_with(model, doubled, 2)
        assert guidance.seen.tolist() == [2, 2, 2, 2]
        for images, class_labels in ((noise()[:4], [0, 2, 3, 3]), (doubled, [0, 3, 1, 3]), (noise()[:3], [0, 1, 3])):
            with pytest.raises(ValueError, match=r"class_labels .*3.*pass guide\(\.\.\., labels=\)"):
                predict_with(model, images, torch.tensor(class_labels))
    with guide(model, guidance, scheduler=scheduler, labels=[0, 2]):
        predict_with(model, doubled, torch.tensor([700, 900, 1000, 1000]))
        assert guidance.seen.tolist() == [0, 2, 0, 2]


def test_the_pipeline_of_dit() -> None:
    """Classifier-free guidance with class 1000 and a learned variance: as with the classes given to the guide."""
    scheduler = make_scheduler("DDIMScheduler")
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    pipeline = diffusers.DiTPipeline(transformer.eval(), vae.eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    schedule = NoiseSchedule.from_diffusers(scheduler)
    network = GuidanceNetwork((4, 8, 8), schedule, width=8, depth=1, num_classes=1000).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))

    def draw() -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipeline([3, 7], num_inference_steps=2, generator=generator, output_type="np").images

    unguided = draw()
    with guide(pipeline, network):
        found = draw()
    with guide(pipeline, network, labels=[3, 7]):
        expected = draw()
    np.testing.assert_array_equal(found, expected)
    assert np.abs(found - unguided).max() > 1e-4


def predict_with(model: nn.Module, x: Tensor, class_labels: Any) -> Tensor:
    with torch.no_grad():
        return model(x, 500, class_labels=class_labels).sample


def test_labels() -> None:
    scheduler = make_scheduler("DDPMScheduler")
    model = GaussianModel(scheduler, SOURCE, "epsilon")

    class Conditional:
        num_classes = 3
        seen: Any = None

        def log_ratio_and_grad(self, x: Tensor, t: float, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
            self.seen = labels
            return x.flatten(1).sum(1), torch.ones_like(x)

    guidance = Conditional()
    x = torch.randn(4, 1, 3, 7)
    with guide(model, guidance, scheduler=scheduler):
        model(x, 5, torch.tensor([0, 1, 2, 1]))
        assert guidance.seen.tolist() == [0, 1, 2, 1]
        guidance.num_classes = 0
        model(x, 5, torch.tensor([0, 1, 2, 1]))
        assert guidance.seen is None
    with guide(model, guidance, scheduler=scheduler, labels=[2, 0]):
        model(x, 5)
        assert guidance.seen.tolist() == [2, 0, 2, 0]  # as classifier-free guidance stacks the batch
        with pytest.raises(ValueError, match="one per sample of the batch of 3, got 2"):
            model(x[:3], 5)
    with guide(model, guidance, scheduler=scheduler, labels=1):
        model(x, 5)
        assert guidance.seen.tolist() == [1, 1, 1, 1]


# Refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"guidance": 3}, ValueError, "guidance must have a method log_ratio_and_grad"),
        ({"pipeline": SimpleNamespace(vae=nn.Linear(1, 1))}, ValueError, "unet or transformer"),
        ({"pipeline": nn.Linear(1, 1)}, ValueError, "scheduler must be given"),
        ({"scale": float("nan")}, ValueError, "scale must be finite"),
        ({"interval": (5, 5)}, ValueError, "interval must be a pair"),
        ({"interval": 5}, ValueError, "interval must be a pair"),
        ({"gradient_norm_limit": 0.0}, ValueError, "gradient_norm_limit"),
        ({"prediction_type": "score"}, ValueError, "prediction_type must be one of"),
        ({"time_input": "sigma"}, ValueError, "time_input must be one of"),
        ({"scheduler": "flow"}, TypeError, "alphas_cumprod"),
        ({"scheduler": "flow sigmas"}, ValueError, "variance preserving"),
        ({"scheduler": "continuous"}, ValueError, "timestep_type='continuous'"),
        ({"scheduler": NoiseSchedule.vp_linear()}, ValueError, "discrete NoiseSchedule"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    scheduler = make_scheduler("DDPMScheduler")
    model = GaussianModel(scheduler, SOURCE, "epsilon")
    arguments = {"pipeline": SimpleNamespace(unet=model, scheduler=scheduler), **change}
    arguments.setdefault("guidance", ExactRatio(model.schedule))
    if arguments.get("scheduler") == "flow":
        arguments["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler()
    elif arguments.get("scheduler") == "flow sigmas":
        arguments["scheduler"] = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True)
    elif arguments.get("scheduler") == "continuous":
        arguments["scheduler"] = diffusers.EulerDiscreteScheduler(
            timestep_type="continuous", prediction_type="v_prediction"
        )
    with pytest.raises(error, match=message):
        guide(**arguments)
    assert not model._forward_hooks


def test_bad_calls() -> None:
    scheduler = make_scheduler("DDPMScheduler")
    model = GaussianModel(scheduler, SOURCE, "epsilon")
    with guide(model, ExactRatio(model.schedule), scheduler=scheduler):
        with pytest.raises(ValueError, match=r"timestep must be the same for the whole batch, got \[1, 2\]"):
            model(noise()[:2], torch.tensor([1, 2]))
        model(noise()[:2], torch.tensor([2, 2]))
    network = GuidanceNetwork((1, 4, 4), model.schedule, width=8, depth=1)
    with guide(model, network, scheduler=scheduler), pytest.raises(ValueError, match=r"event_shape \(1, 4, 4\)"):
        model(noise(), 5)
    with guide(model, lambda x, t: x.mean(), scheduler=scheduler), pytest.raises(ValueError, match="of each image"):
        model(noise(), 5)
    with guide(model, lambda x, t: t, scheduler=scheduler), pytest.raises(ValueError, match="requires_grad=False"):
        model(noise(), 5)


# Digits --------------------------------------------------------------------------------------------------------

DIGITS = (3, 8)


class AnyPipeline(diffusers.DDPMPipeline):
    """DDPMPipeline for every scheduler: it hands ``generator`` only to those whose step takes it."""

    @torch.no_grad()
    def __call__(self, batch_size: int, num_inference_steps: int, generator: Any, **_: Any) -> Any:
        shape = (batch_size, self.unet.config.in_channels, *[self.unet.config.sample_size] * 2)
        image = diffusers.utils.torch_utils.randn_tensor(shape, generator=generator, dtype=self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps)
        takes = "generator" in inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator} if takes else {}
        for t in self.progress_bar(self.scheduler.timesteps):
            image = self.scheduler.step(self.unet(image, t).sample, t, image, **options).prev_sample
        return SimpleNamespace(images=(image / 2 + 0.5).clamp(0, 1))


class LogRatio(nn.Module):
    """A small convolutional log ratio of 8 x 8 images, f(x, half log-SNR) -> [B], that vanishes without signal."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.head = nn.Linear(512, 1)

    def forward(self, x: Tensor, half_log_snr: Tensor) -> Tensor:
        level = torch.tanh(half_log_snr / 3.0).reshape(-1, 1, 1, 1).expand_as(x)
        hidden = functional.silu(self.first(torch.cat([x, level], dim=1)))
        hidden = functional.silu(self.second(hidden))
        return torch.sigmoid(2.0 * half_log_snr) * self.head(hidden.flatten(1)).squeeze(1)


def train(module: nn.Module, loss: Callable[[], Tensor], steps: int, rate: float, weight_decay: float = 0.0) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=weight_decay)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        decay.step()
    module.eval()


@pytest.fixture(scope="module")
def digits() -> Any:
    """A tiny UNet trained on all digits, two guidances from 20 images of two digits, and a classifier of digits."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    torch.manual_seed(0)
    arrays = load_digits_arrays(DIGITS, 20)
    source, target = (torch.from_numpy(each).reshape(-1, 1, 8, 8) for each in (arrays.source, arrays.target))
    scheduler = make_scheduler("DDPMScheduler")
    schedule = NoiseSchedule.from_diffusers(scheduler)
    unet, network = make_unet(), LogRatio()

    def denoising() -> Tensor:
        x, times = source[torch.randint(len(source), (32,))], torch.randint(1000, (32,))
        epsilon = torch.randn_like(x)
        return functional.mse_loss(unet(scheduler.add_noise(x, epsilon, times), times).sample, epsilon)

    def classification() -> Tensor:
        x = torch.cat([each[torch.randint(len(each), (64,))] for each in (source, target)])
        times = torch.randint(1000, (128,))
        logits = network(scheduler.add_noise(x, torch.randn_like(x), times), schedule.half_log_snr(times))
        return functional.binary_cross_entropy_with_logits(logits, torch.arange(128).ge(64).float())

    train(unet.train(), denoising, 250, 5e-3)
    train(network, classification, 200, 3e-3, weight_decay=0.1)
    settings = TrainingConfig(steps=300, batch_size=128, learning_rate=2e-3, weight_decay=0.1, ema_decay=0.98)
    config = GuidanceConfig(network=NetworkConfig(width=64, depth=3), training=settings, diagnostics=False)
    fit = fit_guidance(arrays.source, arrays.target, schedule, config)
    judge = linear_model.LogisticRegression(max_iter=2000).fit(arrays.source, arrays.source_labels)
    assert judge.score(arrays.held_out, arrays.held_out_labels) > 0.9
    return SimpleNamespace(unet=unet, scheduler=scheduler, fitted=fit.guidance, convolutional=network, judge=judge)


@pytest.mark.parametrize(
    ("pipeline_class", "scheduler_name", "steps", "guidance"),
    [
        (diffusers.DDPMPipeline, "DDPMScheduler", 30, "fitted"),
        (diffusers.DDIMPipeline, "DDIMScheduler", 12, "fitted"),
        (diffusers.DDIMPipeline, "DDIMScheduler", 12, "convolutional"),
        (diffusers.DDPMPipeline, "DPMSolverMultistepScheduler", 12, "fitted"),
        (diffusers.DDPMPipeline, "DPMSolverMultistepScheduler", 12, "convolutional"),
        (AnyPipeline, "UniPCMultistepScheduler", 12, "fitted"),
    ],
)
def test_pipelines_draw_the_digits_of_the_target(
    digits: Any, pipeline_class: Any, scheduler_name: str, steps: int, guidance: str
) -> None:
    pipeline = pipeline_class(digits.unet, digits.scheduler)
    pipeline.scheduler = getattr(diffusers, scheduler_name).from_config(digits.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)

    def share() -> float:
        generator = torch.Generator().manual_seed(1)
        images = pipeline(batch_size=100, num_inference_steps=steps, generator=generator, output_type="pt").images
        return float(np.isin(digits.judge.predict((2.0 * images - 1.0).reshape(-1, 64).numpy()), DIGITS).mean())

    time_input = "half_log_snr" if guidance == "convolutional" else "time"
    before = share()
    # Scale 2, as guidances of so few steps are flatter than the exact one.
    with guide(pipeline, getattr(digits, guidance), scale=2.0, time_input=time_input):
        guided = share()
    # The standard error of a share of 100 images is at most 0.05, that of the difference 0.07.
    assert guided > before + 0.2


def test_a_list_of_generators_and_the_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    """Image i depends on generator i alone, guided too."""
    scheduler = make_scheduler("DDPMScheduler")
    pipeline = diffusers.DDPMPipeline(make_unet(), scheduler)
    ratio = ExactRatio(NoiseSchedule.from_diffusers(scheduler))

    def draw(seeds: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        arguments = {"batch_size": len(seeds), "num_inference_steps": 4, "output_type": "pt"}
        return pipeline(generator=generators, **arguments).images

    unguided = draw([1, 2, 3])
    with guide(pipeline, ratio):
        together, alone = draw([1, 2, 3]), draw([3])
    torch.testing.assert_close(together[2:], alone, rtol=1e-4, atol=1e-5)
    assert (together - unguided).abs().mean() > 0.01
    # One line for each bar, in which a slow machine draws its end more than once.
    assert sum("4/4" in line for line in capsys.readouterr().err.split("\n")) == 3


# The page ------------------------------------------------------------------------------------------------------

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.skipif(not DOCS.is_dir(), reason="the documentation is not here")
def test_the_page_quotes_what_was_measured() -> None:
    """Means and standard errors over the draws of the target, from docs/images/guidance_or_fine_tuning.py."""
    methods = json.loads((DOCS / "images" / "guidance_or_fine_tuning.json").read_text())["methods"]
    page = (DOCS / "diffusers.md").read_text()
    for name, row in methods.items():
        cells = [name]
        for values, digits in ((row["right"], 2), (row["nearest_given"], 2), (row["seconds"], 0)):
            error = np.std(values, ddof=1) / np.sqrt(len(values))
            cells.append(f"{np.mean(values):.{digits}f}" + (f" ± {error:.2f}" if digits else ""))
        assert f"| {' | '.join(cells)} |" in page
