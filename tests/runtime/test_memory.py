"""Sizes that no machine holds are refused before any work, with an estimate."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tgdp_fast as tgdp
from tgdp_fast.diffusion.solvers import solver_table
from tgdp_fast.ecg.config import load_config
from tgdp_fast.integrations.released import GuidanceQt
from tgdp_fast.models import XResNet1d
from tgdp_fast.runtime import memory
from tgdp_fast.runtime.memory import check_memory, in_bytes

SCHEDULE = tgdp.NoiseSchedule.vp_linear()


@pytest.fixture(autouse=True)
def _machine_of_24_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "machine_memory", lambda device=None: 24 * 10**9)


def denoiser() -> tgdp.Denoiser:
    return tgdp.Denoiser(tgdp.ScoreMLP((2,), width=8, depth=1), SCHEDULE, time_input="half_log_snr")


TOO_LARGE: dict[str, tuple[Callable[[], Any], str]] = {
    "num": (
        lambda: tgdp.sample(denoiser(), num=10**12),
        "num .* got 1000000000000: samples .* need 8 TB, .* has 24 GB",
    ),
    "num of a file": (lambda: tgdp.sample_to_file("x.npy", denoiser(), num=10**12), "num .* need 8 TB"),
    "steps": (lambda: tgdp.SamplingConfig(steps=10**8), "steps .* need 300 GB, .* of which at most 1.5 GB go there"),
    "steps of a table": (lambda: solver_table("ddim", SCHEDULE, 10**8), "steps .* need 300 GB"),
    "batch_size": (lambda: tgdp.TrainingConfig(batch_size=10**12), "batch_size .* need 16 TB"),
    "guidance": (lambda: tgdp.NetworkConfig(width=10**6), "width and depth .* need 64 TB"),
    "depth": (lambda: tgdp.NetworkConfig(depth=10**12), "width and depth"),
    "ScoreMLP": (lambda: tgdp.ScoreMLP((2,), width=10**6), "event_shape, width, depth, num_classes .* need 16 TB"),
    "ScoreMLP of large samples": (lambda: tgdp.ScoreMLP((10**6, 10**6)), "event_shape, .* need 2.05 PB"),
    "GuidanceNetwork": (lambda: tgdp.GuidanceNetwork((2,), SCHEDULE, depth=10**12), "event_shape, width, depth"),
    "d_state": (lambda: tgdp.SSSDECG(d_state=10**6), "d_state"),
    "l_max": (lambda: tgdp.SSSDECG(l_max=10**12), "l_max"),
    "num_classes": (lambda: tgdp.SSSDECG(num_classes=10**12), "num_classes"),
    "step_dims": (lambda: tgdp.SSSDECG(step_dims=(10**6, 10**6, 10**6)), "step_dims"),
    "XResNet1d": (lambda: XResNet1d(8, 3, blocks=(10**9,)), "blocks"),
    "GuidanceQt": (lambda: GuidanceQt(width=10**6), "width"),
}


@pytest.mark.parametrize(("make", "message"), TOO_LARGE.values(), ids=TOO_LARGE)
def test_what_does_not_fit_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "must fit into memory" in str(caught.value)


@pytest.mark.parametrize(
    ("section", "entry", "value"),
    [
        ("data", "seconds", "1e12"),
        ("backbone", "diffusion_steps", 10**12),
        ("backbone", "d_state", 10**6),
        ("backbone", "res_channels", 10**6),
        ("backbone", "num_res_layers", 10**9),
        ("guidance", "width", 10**6),
        ("sampling", "num", 10**9),
        ("sampling", "steps", 10**9),
        ("source", "batch_size", 10**12),
        ("evaluation", "bootstrap", 10**12),
        ("evaluation.classifier", "blocks", [10**9]),
    ],
)
def test_sizes_in_a_configuration(tmp_path: Path, section: str, entry: str, value: Any) -> None:
    (tmp_path / "c.toml").write_text(f"[{section}]\n{entry} = {value}\n")
    with pytest.raises(ValueError, match=rf"c\.toml: .*{entry}.*must fit into memory, got"):
        load_config(tmp_path / "c.toml")


def test_the_bound_is_the_memory_of_the_machine() -> None:
    check_memory("num", 1, 24 * 10**9, "samples", "draw fewer")
    with pytest.raises(
        ValueError, match=re.escape("num must fit into memory, got 1: samples need 24 GB, and this machine")
    ):
        check_memory("num", 1, 24 * 10**9 + 1, "samples", "draw fewer")
    with pytest.raises(ValueError, match="of which at most 6 GB go there"):
        check_memory("num", 1, 6 * 10**9 + 1, "samples", "draw fewer", share=0.25)


def test_the_machine_says_what_it_has() -> None:
    found = memory._physical_memory()
    assert found is None or 2**28 < found < 2**50


@pytest.mark.parametrize(("value", "text"), [(5, "5 bytes"), (24e9, "24 GB"), (10**400, "1e+15 PB")])
def test_bytes_in_words(value: float, text: str) -> None:
    assert in_bytes(value) == text


def test_the_last_index_there_is() -> None:
    model = denoiser()
    last = tgdp.sample(model, num=4, first_index=2**63 - 4, steps=2)
    torch.testing.assert_close(last[1:], tgdp.sample(model, num=3, first_index=2**63 - 3, steps=2))
    assert np.isfinite(last.numpy()).all()
