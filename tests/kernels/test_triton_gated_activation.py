"""The Triton gate: numerics in the interpreter, against the definition in float64."""

from __future__ import annotations

import mmap
import sys

import numpy as np
import pytest
import torch
from test_gated_activation import draw, oracle
from triton_interpreter import Far, compiled, interpreted, run_interpreted, run_program

from tgdp_fast.lab import validate
from tgdp_fast.lab.accuracy import PRECISIONS
from tgdp_fast.lab.cases import CHECKS
from tgdp_fast.ops import BackendUnavailableError, gated_activation

pytest.importorskip("triton", reason="Triton is not installed; run `pip install triton`")

from tgdp_fast.kernels.gated_activation import gated_activation_kernel


@compiled
def test_in_the_interpreter():
    # What follows, and the contract that all backends share.
    assert run_interpreted("test_triton_gated_activation.py", "test_gated_activation.py") > 80


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_validates(precision):
    assert torch.isnan(torch.empty(1000)).all()
    rows = list(validate.rows_of("gated_activation", "triton", precision))
    assert len(rows) == len(CHECKS["gated_activation"][0])
    assert validate.failures(rows) == []
    assert {row["verdict"] for row in rows} == {"passed"}


@interpreted
@pytest.mark.parametrize("per_sample", [False, True])
def test_many_samples_are_addressed_beyond_32_bits(monkeypatch, per_sample):
    # One program of the last sample; of each tensor only that sample is there.
    sample, channels, length = 3_000_000, 3, 341
    half = channels * length
    x = draw(1, 2 * channels, length)
    bias = draw(1, 2 * channels) if per_sample else draw(2 * channels)
    output = torch.full((half + 2000,), float("nan"))
    pointers = [Far(output, sample * half - 1000), Far(x, 2 * sample * half)]
    pointers.append(Far(bias, 2 * sample * channels) if per_sample else bias)
    run_program(
        monkeypatch, gated_activation_kernel, sample, *pointers, half, 1, length, channels, per_sample=per_sample,
        long=False, block=1024,
    )  # fmt: skip
    expected = oracle(x, bias)[0].reshape(-1)
    np.testing.assert_allclose(output[1000:-1000].numpy(), expected, rtol=0, atol=1e-6)
    assert torch.isnan(output[:1000]).all()
    assert torch.isnan(output[-1000:]).all()


@interpreted
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs memory that is not there until it is used")
def test_long_samples_are_addressed_beyond_32_bits(monkeypatch):
    # A sample whose halves have over 2^31 elements each, at the end of a channel: 22 GB of addresses, of which a few
    # pages are touched.
    block, channels, length = 1024, 3, 1_200_000_007
    half, tile = channels * length, 2 * length // block
    first = tile * block
    assert 1 << 31 < first > half // 2
    assert first < 2 * length < first + block

    def reserved(elements):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        return torch.frombuffer(mmap.mmap(-1, 2 * elements, flags=flags), dtype=torch.float16)

    x, output = reserved(2 * half), reserved(half)
    values, bias = draw(2, block, dtype=torch.float16), draw(2 * channels)
    x[first : first + block], x[half + first : half + first + block] = values
    run_program(
        monkeypatch, gated_activation_kernel, tile, output, x, bias, half, -(-half // block), length, channels,
        per_sample=False, long=True, block=block,
    )  # fmt: skip
    channel = (first + np.arange(block)) // length
    rows = bias.view(2, channels)[:, channel]
    expected = oracle((values.double() + rows.double())[None])[0, 0]
    np.testing.assert_allclose(output[first : first + block].double().numpy(), expected, rtol=2.0**-11, atol=1e-6)
    assert not output[first - 500 : first].any()
    assert not output[first + block : first + block + 500].any()


@interpreted
def test_refusals():
    x = draw(2, 6, 5)
    with pytest.raises(BackendUnavailableError, match="not float64"):
        gated_activation(x.double(), backend="triton")
    for changed in ((x.clone().requires_grad_(), None), (x, draw(6).requires_grad_())):
        with pytest.raises(BackendUnavailableError, match="computes no gradients"):
            gated_activation(*changed, backend="triton")
        with torch.no_grad():
            assert torch.isfinite(gated_activation(*changed, backend="triton")).all()
    with pytest.raises(RuntimeError, match="computes no gradients"):
        torch.func.jvp(lambda value: gated_activation(value, backend="triton"), (x,), (x,))
    with pytest.raises(BackendUnavailableError, match="the inputs are on meta"):
        gated_activation(x.to("meta"), backend="triton")


@interpreted
def test_inference_mode_registration_and_compilation_with_triton():
    x, bias = draw(2, 6, 5), draw(2, 6)
    expected = gated_activation(x, bias, backend="triton")
    with torch.inference_mode():
        assert torch.equal(gated_activation(x, bias, backend="triton"), expected)
    operator = torch.ops.tgdp_fast.gated_activation_triton.default
    torch.library.opcheck(operator, (x, bias))
    torch.library.opcheck(operator, (x.mT.contiguous().mT, None))
    torch._dynamo.reset()
    for compiler in ("eager", "aot_eager"):
        function = torch.compile(
            lambda x, bias: gated_activation(x, bias, backend="triton"), fullgraph=True, backend=compiler
        )
        assert torch.equal(function(x, bias), expected)
    torch._dynamo.reset()
