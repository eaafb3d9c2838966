"""What can only be seen on a GPU: all of it is skipped elsewhere. ``bench/gpu.sh`` runs it."""

from __future__ import annotations

import pytest
import torch

from tgdp_fast import Sampler, SamplingConfig, sample
from tgdp_fast.lab.cases.networks import guidance_network, source_denoiser
from tgdp_fast.lab.validate import failures, validate
from tgdp_fast.ops import backend_report, long_convolution, prepare_long_convolution
from tgdp_fast.sampling import loop as sampling_loop

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")


@pytest.fixture
def filled_with_nan():
    """New memory holds NaN, so that what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_operators_against_float64_with_poisoned_outputs(filled_with_nan, backend):
    if all(states[backend] != "available" for states in backend_report().values()):
        pytest.skip(f"no operator has the backend {backend} here")
    assert failures(validate(backend)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [129, 500, 999])
def test_a_signal_of_a_long_convolution_does_not_depend_on_its_batch_in_cuda(length, dtype):
    reason = backend_report()["long_convolution"]["cuda"]
    if reason != "available":
        pytest.skip(reason)
    taps = torch.randn(7, 2 * length - 1, device="cuda") * length**-0.5
    prepared = prepare_long_convolution(taps, dtype, backend="cuda")
    u = torch.randn(9, 7, length, device="cuda").to(dtype)
    together = long_convolution(u, prepared, backend="cuda")
    for i in (0, 4, 8):
        assert torch.equal(long_convolution(u[i : i + 1], prepared, backend="cuda")[0], together[i])
    # Left alone, who prepares and who serves agree.
    with torch.no_grad():
        chosen = long_convolution(u, prepare_long_convolution(taps, dtype))
    torch.testing.assert_close(chosen, together, rtol=1e-2, atol=1e-2 if dtype != torch.float32 else 1e-4)


def models(device: str, width: int = 128):
    return source_denoiser(width, torch.device(device)), guidance_network(width, torch.device(device))


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("solver", ["dpmpp_2m", "ddpm"])
def test_samples_are_those_of_the_cpu(solver, backend):
    arguments = {"num": 300, "solver": solver, "steps": 25, "seed": 5}
    on_cpu = sample(*models("cpu"), backend="reference", **arguments)
    on_gpu = sample(*models("cuda"), backend=backend, **arguments).cpu()
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-3)


def test_batches_are_captured_and_change_nothing(monkeypatch):
    captures = []
    real = sampling_loop.capture
    monkeypatch.setattr(sampling_loop, "capture", lambda *call: captures.append(1) or real(*call))
    # With Triton there is no fused run, so that the loop is what runs.
    arguments = {"num": 500, "solver": "ddpm", "steps": 10, "seed": 1, "precision": "bf16", "backend": "triton"}
    networks = models("cuda")
    parts = sample(*networks, batch_size=100, **arguments)
    whole = sample(*networks, batch_size=500, **arguments)
    assert captures == [1]
    torch.testing.assert_close(parts, whole, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_second_draw_of_a_sampler_replays_and_follows_changed_weights(monkeypatch, precision):
    captures = []
    real = sampling_loop.capture
    monkeypatch.setattr(sampling_loop, "capture", lambda *call: captures.append(1) or real(*call))
    networks = models("cuda")
    sampler = Sampler(*networks, SamplingConfig(steps=10, precision=precision, backend="triton"))
    first, second, third = (sampler.draw(100, seed=1) for _ in range(3))
    assert captures == [1]
    assert torch.equal(second, third)
    torch.testing.assert_close(first, second, rtol=2e-2, atol=2e-2)
    with torch.no_grad():
        for parameter in networks[0].parameters():
            parameter.add_(0.05)
    changed = sampler.draw(100, seed=1)
    assert not torch.allclose(changed, first, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(sampler.draw(100, seed=1), changed, rtol=2e-2, atol=2e-2)
    assert captures == [1, 1]


def test_repeated_runs_are_bitwise_equal():
    networks = models("cuda")
    first, second = (sample(*networks, num=256, steps=5, seed=2) for _ in range(2))
    assert torch.equal(first, second)
