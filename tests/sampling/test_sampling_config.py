"""SamplingConfig: what it takes and refuses, and its way to JSON and back."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

from tgdp_fast import SOLVERS, NoiseSchedule, SamplingConfig, solver_table

EVERY: dict[str, Any] = {
    "solver": "ddim",
    "steps": 7,
    "spacing": "karras",
    "eta": 0.5,
    "scale": 1.5,
    "interval": (0.1, 0.8),
    "clamp": (-2.0, 2.0),
    "gradient_norm_limit": 0.3,
    "precision": "bf16",
    "backend": "reference",
}


@pytest.mark.parametrize("settings", [{}, EVERY, {"precision": "bf16x3", "interval": (0.2, math.inf)}])
def test_json_and_back(settings: dict[str, Any]) -> None:
    config = SamplingConfig(**settings)
    text = json.dumps(config.to_dict())
    assert SamplingConfig.from_dict(json.loads(text)) == config
    assert set(json.loads(text)) == {field.name for field in dataclasses.fields(SamplingConfig)} == set(EVERY)
    assert SamplingConfig.from_dict({}) == SamplingConfig()


def test_values_are_plain_numbers_and_equal_configs_are_equal() -> None:
    other = EVERY | {"steps": np.int64(7), "scale": np.float32(1.5), "interval": [0.1, 0.8], "clamp": np.array([-2, 2])}
    config = SamplingConfig(**other)
    assert config == SamplingConfig(**EVERY)
    assert hash(config) == hash(SamplingConfig(**EVERY))
    assert [type(value) for value in config.to_dict().values()] == [
        str, int, str, float, float, list, list, float, str, str,
    ]  # fmt: skip
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 8  # type: ignore[misc]


def test_what_has_no_form_in_json_is_refused() -> None:
    table = solver_table("heun", NoiseSchedule.vp_linear(), 3)
    with pytest.raises(ValueError, match=r"solver must be a name to be .*, got a ready SolverTable \(heun\)"):
        SamplingConfig(table).to_dict()
    with pytest.raises(ValueError, match="scale must be a number to be written as JSON, got <function"):
        SamplingConfig(scale=lambda t: t).to_dict()


def test_a_ready_table_has_its_own_steps_spacing_and_eta() -> None:
    table = solver_table("heun", NoiseSchedule.vp_linear(), 3)
    assert SamplingConfig(table, eta=0.5) == SamplingConfig(table, eta=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "dpmpp2m"}, "solver must be one of ddim, .*did you mean 'dpmpp_2m'"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"steps": 2.5}, "steps must be an integer >= 1, got 2.5"),
        ({"spacing": "linear"}, "spacing must be one of karras, logsnr, uniform"),
        ({"eta": 0.5}, "eta must be None for solver 'dpmpp_2m', got 0.5; only ddim and euler_ancestral have it"),
        ({"solver": "ddim", "eta": 1.5}, r"eta must be finite and in \[0.0, 1.0\], got 1.5"),
        ({"scale": math.nan}, "scale must be finite, got nan"),
        ({"scale": "1"}, "scale must be a number, got '1'"),
        ({"interval": 0.5}, r"interval must be a pair \(low, high\), got 0.5"),
        ({"interval": (0.5, 0.5)}, r"interval must be a pair \(low, high\) with low < high, got"),
        ({"clamp": (1.0, -1.0)}, r"clamp must be a pair \(low, high\) with low < high, finite, got"),
        ({"clamp": (0.0, math.inf)}, "clamp must be a pair .*, finite, got"),
        ({"gradient_norm_limit": 0.0}, "gradient_norm_limit must be finite and in .*, got 0.0"),
        ({"precision": "int8"}, "precision must be one of bf16, bf16x3, fp16, fp32"),
        ({"backend": "rocm"}, "backend must be one of"),
    ],
)
def test_bad_values_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**settings)
    with pytest.raises(ValueError, match=message):
        SamplingConfig.from_dict(settings)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'stepz'"):
        SamplingConfig(stepz=3)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"settings must be among solver, steps, .*, backend; got stepz, 3"):
        SamplingConfig.from_dict({"stepz": 3, 3: 1})  # type: ignore[dict-item]


def test_eta_goes_with_the_solvers_that_have_it() -> None:
    having = [name for name, info in SOLVERS.items() if info.default_eta is not None]
    assert sorted(having) == ["ddim", "euler_ancestral"]
    assert [SamplingConfig(name, eta=0).eta for name in having] == [0.0, 0.0]
