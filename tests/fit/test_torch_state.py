"""Fits, samples and metrics give the same in every state that torch may be in around a call."""

from __future__ import annotations

import ast
import functools
import hashlib
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tgdp_fast as tgdp
from tgdp_fast import metrics
from tgdp_fast.fit import guidance
from tgdp_fast.fit.baselines import fine_tune, train_vanilla
from tgdp_fast.models import XResNet1d
from tgdp_fast.runtime.randomness import seeded_initialization

TRAINING = tgdp.TrainingConfig(steps=3, batch_size=16)
random = np.random.default_rng(0)
SOURCE, TARGET = random.normal(size=(60, 2)), 0.5 * random.normal(size=(30, 2)) + 0.2
LABELS = np.arange(60) % 3, np.arange(30) % 3


def guidance_config(**settings: Any) -> tgdp.GuidanceConfig:
    return tgdp.GuidanceConfig(network=tgdp.NetworkConfig(width=8, depth=1), training=TRAINING, **settings)


def denoiser() -> tgdp.Denoiser:
    with seeded_initialization(1):
        return tgdp.Denoiser(
            tgdp.ScoreMLP((2,), width=8, depth=1), tgdp.NoiseSchedule.vp_linear(), time_input="half_log_snr"
        )


def sampled() -> list[Any]:
    source, guidance = denoiser(), tgdp.fit_guidance(SOURCE, TARGET, config=guidance_config()).guidance
    prior = tgdp.GaussianPrior.fit(SOURCE)
    draws = [
        tgdp.sample(source, guidance, num=6, steps=3, solver=solver, backend=backend)
        for solver, backend in (("dpmpp_2m", "auto"), ("ddpm", "reference"))
    ]
    empirical = tgdp.EmpiricalPrior(SOURCE)
    draws += [tgdp.sample(source, num=6, steps=3, prior=each) for each in (prior, empirical)]
    draws.append(tgdp.Sampler(source, guidance).draw(3, callback=lambda *_: None))
    discrete = tgdp.NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 20))
    with seeded_initialization(2):
        network = tgdp.SSSDECG(2, 2, 4, 4, 1, (4, 4, 4), 3, 4, 16, 4)
    ecg = tgdp.Denoiser(network.eval(), discrete)
    draws.append(tgdp.sample(ecg, num=2, steps=2, labels=1))
    draws.append(tgdp.sample(ecg.compile_for_sampling(), num=2, steps=2, labels=1))
    return draws


def fitted() -> list[Any]:
    rows = tgdp.GuidanceConfig(
        loss="ratio_mse",
        regularizers=[tgdp.Consistency(1.0), tgdp.Cycle(1.0)],
        network=tgdp.NetworkConfig(width=8, depth=1),
        training=TRAINING,
    )
    algorithm = tgdp.fit_guidance(SOURCE, TARGET, config=rows, denoiser=denoiser())
    labeled = tgdp.fit_guidance(
        SOURCE, TARGET, config=guidance_config(), source_labels=LABELS[0], target_labels=LABELS[1]
    )
    return [algorithm.guidance, repr(algorithm.diagnostics), labeled.guidance, repr(labeled.diagnostics)]


def trained() -> list[Any]:
    source = tgdp.train_denoiser(SOURCE, labels=LABELS[0], settings=TRAINING, width=8, depth=1)
    vanilla = train_vanilla(TARGET, settings=TRAINING, time_distribution="logsnr")
    return [source, vanilla, fine_tune(vanilla, TARGET, settings=TRAINING)]


def transferred() -> list[Any]:
    model = tgdp.TransferModel.fit(SOURCE, TARGET, guidance_config(), denoiser_training=TRAINING)
    return [model.sample(5, steps=2), model.guidance, repr(model.diagnostics)]


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 1))

    def forward(self, x: Tensor, label_rows: Tensor | None = None) -> Tensor:
        result: Tensor = self.layers(x)[:, 0]
        return result


def density_ratios() -> list[Any]:
    found = [
        tgdp.fit_density_ratio(SOURCE, TARGET, settings=TRAINING, folds=2, build=build) for build in (None, Dropping)
    ]
    with seeded_initialization(3):
        classifier = XResNet1d(2, 3, (1,), 1, 4, hidden=4)
    return [each.source_log_ratio for each in found] + [classifier, found[1].classifiers[0]]


def measured() -> list[Any]:
    signals = np.random.default_rng(1).normal(size=(6, 2, 40)).astype(np.float32)
    return [
        metrics.sliced_wasserstein(SOURCE, TARGET),
        metrics.mmd(SOURCE, TARGET),
        metrics.frechet_distance(SOURCE, TARGET),
        repr(metrics.density_and_coverage(SOURCE, TARGET)),
        repr(metrics.memorization(TARGET, SOURCE, SOURCE + 0.1)),
        repr(metrics.memorization(signals[:2], signals, signals[3:] + 0.1 * signals[:3])),
    ]


CALLS: dict[str, Callable[[], list[Any]]] = {
    call.__name__: call for call in (sampled, fitted, trained, transferred, density_ratios, measured)
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    # A tensor without a device would hold no values there, as one on a GPU would not meet those on the CPU.
    "meta": lambda: torch.device("meta"),
    "cpu": lambda: torch.device("cpu:0"),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": deterministic,
    "anomaly": lambda: torch.autograd.detect_anomaly(check_nan=True),
}


def fingerprint(values: list[Any]) -> list[str]:
    result = []
    for value in values:
        if isinstance(value, nn.Module):
            assert {t.dtype for t in value.state_dict().values()} <= {torch.float32, torch.int64}
            value = torch.cat([tensor.double().flatten() for tensor in value.state_dict().values()])
        if isinstance(value, Tensor):
            assert value.device.type == "cpu"
            value = value.detach().numpy()
        result.append(value if isinstance(value, str) else hashlib.sha256(np.asarray(value).tobytes()).hexdigest())
    return result


def quietly(call: Callable[[], list[Any]], state: AbstractContextManager[Any]) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with state:
            values = call()
        return fingerprint(values)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Domain classifiers of the fits with few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guidance, "cross_fitted", functools.partial(guidance.cross_fitted, settings=TRAINING))
        yield


@pytest.fixture(scope="module")
def ordinary(quick: None) -> dict[str, list[str]]:
    return {name: quietly(call, nullcontext()) for name, call in CALLS.items()}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("state", STATES)
def test_the_state_around_a_call_changes_nothing(state: str, name: str, ordinary: dict[str, list[str]]) -> None:
    before = torch.get_rng_state()
    assert quietly(CALLS[name], STATES[state]()) == ordinary[name]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_worker_thread_without_gradients_fits_the_same(ordinary: dict[str, list[str]]) -> None:
    found: list[Any] = []

    def work() -> None:
        torch.set_grad_enabled(False)
        found.extend(fingerprint(fitted()))
        assert not torch.is_grad_enabled()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == ordinary["fitted"]


def test_a_data_tensor_of_inference_mode_or_with_a_graph_can_be_fitted() -> None:
    expected = fingerprint([tgdp.fit_guidance(SOURCE, TARGET, config=guidance_config()).guidance])
    with torch.inference_mode():
        source = torch.from_numpy(SOURCE).clone()
    target = torch.from_numpy(TARGET).requires_grad_() * 1.0
    assert fingerprint([tgdp.fit_guidance(source, target, config=guidance_config()).guidance]) == expected


_FACTORIES = {"rand", "randn", "randint", "randperm", "empty", "zeros", "ones", "full", "arange", "linspace"}
_FACTORIES |= {"logspace", "eye", "tensor", "as_tensor"}


def test_every_tensor_that_the_package_makes_names_its_device() -> None:
    """Else it would lie on the default device of the caller. Networks are the exception, as those of torch are."""
    folder = Path(tgdp.__file__).parent
    exempt = {folder / "models", folder / "integrations" / "released" / "networks.py", folder / "lab"}
    exempt.add(folder / "runtime" / "state_dict.py")  # It builds networks on the meta device.
    found = []
    for file in sorted(folder.rglob("*.py")):
        if exempt & {file, *file.parents}:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            torch_s = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            named = {keyword.arg for keyword in node.keywords}
            if torch_s and node.func.attr in _FACTORIES and "device" not in named:
                found.append(f"{file.relative_to(folder)}:{node.lineno}: torch.{node.func.attr}")
            if torch_s and node.func.attr == "Generator" and not node.args:
                found.append(f"{file.relative_to(folder)}:{node.lineno}: torch.Generator")
    assert not found
