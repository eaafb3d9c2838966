"""Noise schedules against closed forms in 40-digit arithmetic; their inverse, kinds of input and errors."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from types import SimpleNamespace

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tgdp_fast.diffusion.schedule import NoiseSchedule

BETAS = np.linspace(1e-4, 0.02, 200)
SCHEDULES = {
    "vp_linear": NoiseSchedule.vp_linear(),
    "cosine": NoiseSchedule.cosine(),
    "discrete": NoiseSchedule.from_betas(BETAS),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def grid(schedule: NoiseSchedule, points: int = 37) -> np.ndarray:
    """Times that crowd towards t_min, both ends included."""
    return schedule.t_min + (schedule.t_max - schedule.t_min) * np.linspace(0.0, 1.0, points) ** 3


def exact_log_alpha(schedule: NoiseSchedule, t: float) -> mpmath.mpf:
    """The definition, in the arithmetic of mpmath."""
    t = mpmath.mpf(t)
    if schedule.kind == "vp_linear":
        beta_min, beta_max = map(mpmath.mpf, schedule.parameters)
        return -(t**2) * (beta_max - beta_min) / 4 - t * beta_min / 2
    if schedule.kind == "cosine":
        offset = mpmath.mpf(schedule.parameters[0])
        angle = (t + offset) / (1 + offset) * mpmath.pi / 2
        angle_0 = offset / (1 + offset) * mpmath.pi / 2
        return mpmath.log(mpmath.cos(angle) / mpmath.cos(angle_0))
    left = min(int(t), len(schedule.parameters) - 2)
    ends = [mpmath.log(mpmath.mpf(schedule.parameters[left + i])) / 2 for i in (0, 1)]
    return ends[0] + (t - left) * (ends[1] - ends[0])


@every_schedule
def test_matches_the_definition_in_high_precision(schedule: NoiseSchedule) -> None:
    times = grid(schedule)
    with mpmath.workdps(40):
        log_alpha = [exact_log_alpha(schedule, t) for t in times]
        exact = {
            "log_alpha": [float(v) for v in log_alpha],
            "alpha": [float(mpmath.exp(v)) for v in log_alpha],
            "sigma": [float(mpmath.sqrt(1 - mpmath.exp(2 * v))) for v in log_alpha],
            "half_log_snr": [float(v - mpmath.log(1 - mpmath.exp(2 * v)) / 2) for v in log_alpha],
            "log_snr": [float(2 * v - mpmath.log(1 - mpmath.exp(2 * v))) for v in log_alpha],
        }
    # A continuous log alpha is a few roundings away. A discrete one comes from log(alphas_cumprod), with the
    # condition number 1 / (1 - alphas_cumprod) = 1e4 near 1: 1e4 roundings of 1e-16.
    tolerance = 1e-12 if schedule.is_discrete else 2e-14
    for name, values in exact.items():
        np.testing.assert_allclose(getattr(schedule, name)(times), values, rtol=tolerance, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("name", ["vp_linear", "cosine"])
def test_sigma_is_accurate_far_below_t_min(name: str) -> None:
    schedule = SCHEDULES[name]
    times = np.array([1e-12, 1e-9, 1e-6])
    with mpmath.workdps(60):
        exact = [float(mpmath.sqrt(1 - mpmath.exp(2 * exact_log_alpha(schedule, t)))) for t in times]
    np.testing.assert_allclose(schedule.sigma(times), exact, rtol=1e-14)
    assert schedule.sigma(0.0) == 0.0
    assert schedule.alpha(0.0) == 1.0


@every_schedule
def test_alpha_and_sigma_are_variance_preserving(schedule: NoiseSchedule) -> None:
    times = grid(schedule)
    np.testing.assert_allclose(schedule.alpha(times) ** 2 + schedule.sigma(times) ** 2, 1.0, rtol=1e-15)
    assert (np.diff(schedule.half_log_snr(times)) < 0.0).all()


@every_schedule
@given(fraction=st.floats(0.0, 1.0))
def test_inverse_is_exact(schedule: NoiseSchedule, fraction: float) -> None:
    t = schedule.t_min + fraction * (schedule.t_max - schedule.t_min)
    back = schedule.time_from_half_log_snr(schedule.half_log_snr(t))
    # |d lambda / dt| is at least about 5 / t_max; lambda itself carries a few roundings of about 10.
    assert back == pytest.approx(t, rel=1e-12, abs=1e-12 * schedule.t_max)


@given(half_log_snr=st.floats(-5.0, 30.0))
@pytest.mark.parametrize("name", ["vp_linear", "cosine"])
def test_inverse_from_the_other_side(name: str, half_log_snr: float) -> None:
    schedule = SCHEDULES[name]
    back = schedule.half_log_snr(schedule.time_from_half_log_snr(half_log_snr))
    assert back == pytest.approx(half_log_snr, rel=1e-13, abs=1e-12)


def test_discrete_inverse_answers_the_nearest_end_outside() -> None:
    schedule = SCHEDULES["discrete"]
    assert schedule.time_from_half_log_snr(50.0) == 0.0
    assert schedule.time_from_half_log_snr(-50.0) == schedule.t_max


def test_discrete_values_are_those_of_the_arrays() -> None:
    alphas_cumprod = np.cumprod(1.0 - BETAS)
    index = np.arange(200)
    for schedule in (NoiseSchedule.from_betas(BETAS), NoiseSchedule.from_alphas_cumprod(alphas_cumprod)):
        # log, halving and exp: three roundings, the first amplified by |log| <= 2.
        np.testing.assert_allclose(schedule.alpha(index), np.sqrt(alphas_cumprod), rtol=1e-15)
        np.testing.assert_allclose(schedule.sigma(index), np.sqrt(1.0 - alphas_cumprod), rtol=2e-12)
    between = schedule.log_alpha(np.array([3.25]))
    expected = 0.75 * np.log(alphas_cumprod[3]) / 2 + 0.25 * np.log(alphas_cumprod[4]) / 2
    np.testing.assert_allclose(between, expected, rtol=1e-12)
    assert (schedule.t_min, schedule.t_max, schedule.num_train_steps) == (0.0, 199.0, 200)
    assert schedule.is_discrete
    assert not SCHEDULES["cosine"].is_discrete
    assert SCHEDULES["cosine"].num_train_steps is None


@every_schedule
@pytest.mark.parametrize("method", ["log_alpha", "alpha", "sigma", "half_log_snr", "log_snr", "time_from_half_log_snr"])
def test_returns_the_kind_it_was_given(schedule: NoiseSchedule, method: str) -> None:
    function = getattr(schedule, method)
    array = grid(schedule, 7)
    if method == "time_from_half_log_snr":
        array = schedule.half_log_snr(array)
    expected = function(array)
    assert isinstance(expected, np.ndarray)
    assert expected.dtype == np.float64

    one = function(float(array[3]))
    assert type(one) is float
    assert one == expected[3]
    assert type(function(array[3])) is float
    assert function(np.array(array[3])).shape == ()

    reverse = array[::-2]  # negative strides
    np.testing.assert_array_equal(function(reverse), expected[::-2])
    # Twice the numbers may be computed in vectors where these were computed one by one: the last digit of a logarithm,
    # divided by the steps of 0.01 and more that a discrete schedule interpolates in.
    np.testing.assert_allclose(function(np.stack([array, array])), [expected, expected], rtol=1e-12, atol=1e-12)

    tensor = torch.from_numpy(np.repeat(array, 2))[::2]  # a strided view
    result = function(tensor)
    assert result.dtype == torch.float64
    np.testing.assert_array_equal(result.numpy(), expected)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        narrow = tensor.to(dtype)
        result = function(narrow)
        assert result.dtype == dtype
        # float64 inside: nothing is lost but the last rounding.
        torch.testing.assert_close(result, function(narrow.double()).to(dtype), rtol=0, atol=0, equal_nan=True)
    assert function(tensor.reshape(7, 1)).shape == (7, 1)
    assert function(tensor[:0]).shape == (0,)


def test_integer_tensors_give_float32() -> None:
    schedule = SCHEDULES["discrete"]
    index = torch.tensor([0, 3, 199])
    assert schedule.sigma(index).dtype == torch.float32
    torch.testing.assert_close(schedule.sigma(index), schedule.sigma(index.double()).float(), rtol=0, atol=0)
    assert schedule.sigma(5) == schedule.sigma(5.0)


@every_schedule
def test_gradients_flow(schedule: NoiseSchedule) -> None:
    # Mid-interval times: a discrete schedule has kinks at its indices.
    t = torch.from_numpy(np.floor(grid(schedule, 5)[1:-1]) + 0.5 if schedule.is_discrete else grid(schedule, 5)[1:-1])
    t.requires_grad_(True)
    for method in (schedule.log_alpha, schedule.sigma, schedule.half_log_snr):
        assert torch.autograd.gradcheck(method, t, eps=1e-7, atol=1e-5, rtol=1e-5)
    half_log_snr = schedule.half_log_snr(t).detach().requires_grad_(True)
    assert torch.autograd.gradcheck(schedule.time_from_half_log_snr, half_log_snr, eps=1e-6, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize(("name", "outside"), [("vp_linear", -1e-3), ("cosine", 1.01), ("discrete", 200.0)])
def test_outside_the_domain(name: str, outside: float) -> None:
    schedule = SCHEDULES[name]
    for value in (outside, math.nan, -1.0):
        with pytest.raises(ValueError, match=r"t must be in \[0.0, .*\], got"):
            schedule.alpha(value)
        with pytest.raises(ValueError, match="t must be in"):
            schedule.half_log_snr(np.array([0.5, value]))
        result = schedule.sigma(torch.tensor([value, 0.5, math.inf]))
        assert result[0].isnan()
        assert result[1].isfinite()
    with pytest.raises(ValueError, match="half_log_snr must be in"):
        schedule.time_from_half_log_snr(math.nan)


@every_schedule
def test_config_round_trip(schedule: NoiseSchedule) -> None:
    config = json.loads(json.dumps(schedule.to_config()))
    again = NoiseSchedule.from_config(config)
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert again.to_config() == config
    for clone in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert clone == schedule
        assert clone.alpha(schedule.t_max) == schedule.alpha(schedule.t_max)


def test_equality_repr_and_immutability() -> None:
    assert NoiseSchedule.vp_linear() == NoiseSchedule.vp_linear()
    assert NoiseSchedule.vp_linear() != NoiseSchedule.vp_linear(t_min=2e-3)
    assert NoiseSchedule.vp_linear() != NoiseSchedule.cosine()
    assert repr(NoiseSchedule.cosine(t_max=0.99)) == "NoiseSchedule.cosine(offset=0.008, t_min=0.001, t_max=0.99)"
    assert eval(repr(NoiseSchedule.vp_linear())) == NoiseSchedule.vp_linear()
    assert repr(SCHEDULES["discrete"]) == "NoiseSchedule.from_alphas_cumprod(<200 values>)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        NoiseSchedule.vp_linear().t_min = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta_min": 0.0}, "beta_min must be finite and in"),
        ({"beta_max": 0.05}, "beta_max must be finite and in"),
        ({"beta_max": math.nan}, "beta_max must be finite"),
        ({"beta_max": "x"}, "beta_max must be a number"),
        ({"beta_max": "20"}, "beta_max must be a number, got '20'"),
        ({"t_min": 0.0}, "t_min must be finite and in"),
        ({"t_min": 1.0}, "t_min must be finite and in"),
        ({"t_max": math.inf}, "t_max must be finite"),
    ],
)
def test_vp_linear_refuses(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.vp_linear(**arguments)


def test_cosine_refuses() -> None:
    with pytest.raises(ValueError, match="t_max must be finite and in"):
        NoiseSchedule.cosine(t_max=1.0)
    with pytest.raises(ValueError, match="offset must be finite and in"):
        NoiseSchedule.cosine(offset=-0.1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.9, 0.5, 0.0], "zero terminal SNR"),
        ([0.9, 0.5, 0.6], r"strictly decrease, got 0.5 at index 1 and 0.6 at index 2"),
        ([0.9, 0.5, 0.5], "strictly decrease"),
        ([0.9, math.nan, 0.5], r"in \(0, 1\), got nan at index 1"),
        ([1.0, 0.5], r"in \(0, 1\), got 1.0 at index 0"),
        ([0.9, -0.5], r"in \(0, 1\), got -0.5 at index 1"),
        ([0.9], r"at least 2 entries, got shape \(1,\)"),
        ([], "at least 2 entries"),
        ([[0.9, 0.5]], r"one-dimensional with at least 2 entries, got shape \(1, 2\)"),
        (["a", "b"], "one-dimensional array of numbers"),
        (None, "must be an array, got None"),
    ],
)
def test_from_alphas_cumprod_refuses(values: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_alphas_cumprod(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.1, 1.0], "zero terminal SNR"),
        ([0.1, 0.0], r"betas must be in \(0, 1\), got 0.0 at index 1"),
        ([0.1, math.nan], r"betas must be in \(0, 1\), got nan"),
        ([0.1], "betas must be one-dimensional"),
        ([0.99, 0.6, 0.1], "fall from 0.99 to 0.1; if they are alphas_cumprod use NoiseSchedule.from_alphas_cumprod"),
    ],
)
def test_from_betas_refuses(values: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_betas(values)


def test_arrays_of_every_kind() -> None:
    expected = NoiseSchedule.from_betas(BETAS)
    assert NoiseSchedule.from_betas(BETAS.tolist()) == expected
    assert NoiseSchedule.from_betas(torch.from_numpy(np.repeat(BETAS, 2))[::2]) == expected
    parameter = torch.nn.Parameter(torch.tensor([0.75, 0.5], dtype=torch.bfloat16))
    assert NoiseSchedule.from_alphas_cumprod(parameter).parameters == (0.75, 0.5)
    mine = np.array([0.9, 0.5])
    schedule = NoiseSchedule.from_alphas_cumprod(mine)
    mine[0] = 0.1
    assert schedule.parameters[0] == 0.9


def test_from_diffusers_is_duck_typed() -> None:
    scheduler = SimpleNamespace(alphas_cumprod=torch.tensor([0.75, 0.5]))
    assert NoiseSchedule.from_diffusers(scheduler) == NoiseSchedule.from_alphas_cumprod([0.75, 0.5])
    scheduler.alphas_cumprod = torch.tensor([0.75, 0.5, 0.0])
    with pytest.raises(ValueError, match="rescale_betas_zero_snr=False"):
        NoiseSchedule.from_diffusers(scheduler)
    with pytest.raises(TypeError, match="alphas_cumprod array, got SimpleNamespace; pass the scheduler itself"):
        NoiseSchedule.from_diffusers(SimpleNamespace())
    with pytest.raises(TypeError, match="pass its attribute scheduler"):
        NoiseSchedule.from_diffusers(SimpleNamespace(scheduler=scheduler))  # a pipeline


def test_from_config_refuses() -> None:
    with pytest.raises(ValueError, match="must be one of cosine, discrete, vp_linear; got 'cosin'"):
        NoiseSchedule.from_config({"kind": "cosin"})
    with pytest.raises(ValueError, match="must be one of"):
        NoiseSchedule.from_config({})
    with pytest.raises(ValueError, match="exactly the keys kind, offset, t_min, t_max; got kind, offset"):
        NoiseSchedule.from_config({"kind": "cosine", "offset": 0.008})
    with pytest.raises(ValueError, match="kind must be one of"):
        NoiseSchedule("linear", 0.1, 1.0, (1.0,))
