"""The Triton long convolution: numerics in the interpreter, against the sum that it stands for in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_long_convolution import draw, oracle
from triton_interpreter import Far, compiled, interpreted, run_interpreted, run_program

from tgdp_fast.lab import validate
from tgdp_fast.lab.cases import CHECKS
from tgdp_fast.ops import BackendUnavailableError, long_convolution, prepare_long_convolution
from tgdp_fast.runtime.precision import PRECISIONS

pytest.importorskip("triton", reason="Triton is not installed; run `pip install triton`")

from tgdp_fast.kernels import long_convolution as kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.mark.slow(ci=True)
@compiled
def test_in_the_interpreter():
    assert run_interpreted("test_triton_long_convolution.py") > 30


def limit(dtype):
    """Relative L2 error of a channel.

    Each of eight roundings (signal, results on either side of the spectrum, spectrum, two matrices twice) has an error
    of half a unit in the last of 11 bits at most, on average 0.6 of that; errors add as squares. Float32 has 24 bits;
    there sums, each rounded a hundred times, make four times as much. 16 bits add the rounding of the output.
    """
    roundings = 0.6 * math.sqrt(8)
    return 4 * roundings * 2**-24 if dtype == torch.float32 else roundings * 2**-11 + torch.finfo(dtype).eps / 2


def check(got, u, taps, gelu=True):
    assert got.dtype == u.dtype
    assert got.is_contiguous()
    exact = oracle(u, taps, gelu)
    errors, sizes = (np.linalg.norm(values, axis=2) for values in (got.double().numpy() - exact, exact))
    # GELU makes little of what is far below zero: such errors are relative to what comes in.
    floor = np.linalg.norm(oracle(u, taps, gelu=False), axis=2) * 0.5 if gelu else 0.0
    np.testing.assert_array_less(errors, limit(u.dtype) * np.maximum(sizes, floor) + 1e-300)


@interpreted
@pytest.mark.usefixtures("poisoned")
@each_dtype
@pytest.mark.parametrize("length", [1, 100, 257, 999, 1024])
def test_matches_the_sum(length, dtype):
    for batch, channels, gelu in ((1, 2, True), (5, 2, False)):
        u, taps = draw(batch, channels, length, dtype)
        prepared = prepare_long_convolution(taps, dtype)
        check(long_convolution(u, prepared, gelu=gelu, backend="triton"), u, taps, gelu)


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_validates(precision):
    few = [entry for entry in CHECKS["long_convolution"][0] if math.prod(entry[0][:2]) < 40]
    rows = list(validate.rows_of("long_convolution", "triton", precision, few))
    assert len(rows) == len(few) > 7
    assert validate.failures(rows) == []
    assert [row["verdict"] for row in rows if "1025" not in row["shape"]] == ["passed"] * (len(rows) - 1)


@interpreted
@each_dtype
def test_signals_and_filters_of_any_size(dtype):
    # From where a number is no longer normal to where a sum would overflow; zeros are exact.
    u, taps = draw(3, 6, 40, torch.float32)
    sizes = torch.logspace(-30, 30, 6, dtype=torch.float64)
    taps = taps * sizes[:, None]
    taps[3] = 0.0
    u = (u * torch.tensor([1e-4, 1.0, 1e3])[:, None, None]).to(dtype)
    u[0, 2] = 0.0
    prepared = prepare_long_convolution(taps, dtype)
    launched = torch.empty(u.shape)
    kernels.launch(launched, u, prepared.packed, prepared.scales, activation=False, exact=dtype == torch.float32)
    exact = oracle(u, taps, gelu=False)
    errors, norms = (np.linalg.norm(values, axis=2) for values in (launched.double().numpy() - exact, exact))
    assert (errors <= limit(dtype) * norms).all()
    assert not launched[:, 3].any()
    assert not launched[0, 2].any()


@interpreted
@each_dtype
def test_the_largest_entries_fit(dtype):
    # All energy at one frequency, where the filter's is too: the largest factors that there are.
    length, frequency = 1024, 37
    angles = torch.arange(length, dtype=torch.float64) * (2 * math.pi * (frequency - 0.25) / 1024)
    u = torch.stack([angles.cos(), angles.sin(), (angles.cos() + 0.5).sign()])[None] * 1.999
    u = u.to(dtype)
    taps = torch.zeros(3, 2 * length - 1, dtype=torch.float64)
    taps[:, length - 1 :] = angles.cos()
    got = long_convolution(u, prepare_long_convolution(taps, dtype), gelu=False, backend="triton")
    if dtype != torch.float16:  # whose results do not fit
        check(got, u, taps, gelu=False)
    assert not got.isnan().any()


@interpreted
@pytest.mark.parametrize(
    ("dtype", "value"), [*((dtype, math.nan) for dtype in DTYPES), (torch.bfloat16, math.inf)], ids=str
)
def test_nan_stays_in_its_channel_and_sample(dtype, value):
    u, taps = draw(6, 3, 100, dtype)
    prepared = prepare_long_convolution(taps, dtype)
    expected = long_convolution(u, prepared, backend="triton")
    u[1, 2, 50] = value
    got = long_convolution(u, prepared, backend="triton")
    assert got[1, 2].isnan().all()
    expected[1, 2] = got[1, 2] = 0
    assert torch.equal(got, expected)
    taps[0, 3] = value
    got = long_convolution(u[2:], prepare_long_convolution(taps, dtype), backend="triton")
    assert got[:, 0].isnan().all()
    assert got[:, 1:].isfinite().all()


@interpreted
@pytest.mark.usefixtures("poisoned")
@each_dtype
def test_slices_and_batches_of_triton(dtype):
    u, taps = draw(5, 4, 70, dtype)
    prepared = prepare_long_convolution(taps, dtype)
    expected = long_convolution(u, prepared, backend="triton")
    for sample in (0, 4):
        check(long_convolution(u[sample : sample + 1], prepared, backend="triton"), u[sample : sample + 1], taps)
    wide = torch.full((10, 9, 200), math.nan, dtype=dtype)
    for view in (wide[::2, 3:7, 5:75], wide[1::2, 1::2, 130:], wide[:5, :4, :140:2]):
        view.copy_(u)
        assert torch.equal(long_convolution(view, prepared, backend="triton"), expected)
    # A shorter signal meets the inner taps.
    shorter = long_convolution(u[..., :33], prepared, backend="triton")
    check(shorter, u[..., :33], taps[:, 37 : 2 * 70 - 1 - 37])
    alone = prepare_long_convolution(taps[2:3], dtype)
    assert torch.equal(long_convolution(u[:, 2:3], alone, backend="triton")[:, 0], expected[:, 2])


@interpreted
def test_long_batches_of_triton_are_addressed_beyond_32_bits(monkeypatch):
    sample, channels, length = 3_000_000, 3, 341
    u, taps = draw(1, channels, length)
    packed, scales = prepare_long_convolution(taps)[1:]
    output = torch.full((channels * length + 10,), float("nan"))
    roots, twiddles = kernels._tables(512, u.device)
    parts, channel = sample + 1, 2
    distance = sample * channels * length
    run_program(
        monkeypatch, kernels.long_convolution_kernel, channel * parts + sample, Far(output, distance),
        Far(u, distance), packed, scales, roots, twiddles, parts, channels, length, 1, (channels * length, length),
        (channels * length, length), GELU=True, SATURATE=False, ALIGNMENT=1, A=32, B=16, SAMPLES=1, PRECISION="fp16x4",
    )  # fmt: skip
    exact = oracle(u, taps)[0, 2]
    got = output[2 * length : 3 * length].double().numpy()
    assert np.linalg.norm(got - exact) < limit(torch.float32) * np.linalg.norm(exact)
    assert output[: 2 * length].isnan().all()
    assert output[3 * length :].isnan().all()


@interpreted
def test_refusals_of_triton():
    u, taps = draw(1, 2, 6)
    prepared = prepare_long_convolution(taps)

    def refused(match, u=u, prepared=prepared):
        with pytest.raises(BackendUnavailableError, match=match):
            long_convolution(u, prepared, backend="triton")

    refused("computes no gradients", u.clone().requires_grad_())
    refused("not float64", u.double())
    refused("prepared for inputs of 16 bits", prepared=prepare_long_convolution(taps, torch.bfloat16))
    refused("prepared for another device or dtype", prepared=prepare_long_convolution(taps, torch.float64))
    refused("prepared for another device or dtype", prepared=prepared._replace(packed=torch.zeros(1, 64, 2, 16)))
    long, long_taps = draw(1, 1, 1025)
    refused("up to 1024 positions, not 1025", long, prepare_long_convolution(long_taps))
    half = long_convolution(u.half(), prepared, backend="triton")
    check(half, u.half(), taps)
    without = prepare_long_convolution(taps).without_taps()
    assert torch.equal(long_convolution(u, without, backend="triton"), long_convolution(u, prepared, backend="triton"))


@interpreted
def test_registration_and_compilation_of_triton():
    u, taps = draw(2, 2, 20)
    prepared = prepare_long_convolution(taps)
    operator = torch.ops.tgdp_fast.long_convolution_triton.default
    torch.library.opcheck(operator, (u, prepared.packed, prepared.scales, True))
    torch._dynamo.reset()
    function = torch.compile(
        lambda u, prepared: long_convolution(u, prepared, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    with torch.inference_mode():
        assert torch.equal(function(u, prepared), long_convolution(u, prepared, backend="triton"))
    torch._dynamo.reset()
