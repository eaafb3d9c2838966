"""The CUDA kernel of the long convolution, run on the CPU by the emulation, and how its backend is chosen."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator

import cuda_emulation as cuda
import numpy as np
import pytest
import torch
from test_long_convolution import draw, exact_gelu, oracle

from tgdp_fast.ops import (
    BackendUnavailableError,
    LongConvolution,
    _triton,
    long_convolution,
    prepare_long_convolution,
    use_backend,
)
from tgdp_fast.ops.long_convolution import _pack_for_cuda, _reader, _unsupported_by_cuda, packed_for
from tgdp_fast.runtime import native

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FLOAT32, BFLOAT16, FLOAT16)
ORDERS = ((cuda.FORWARD, 0), (cuda.REVERSE, 0), (cuda.RANDOM, 1), (cuda.RANDOM, 2))
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True)
def _usual_order() -> Iterator[None]:
    yield
    cuda.choose()


def prepare(taps, dtype, *, exact=False):
    """As prepare_long_convolution where the CUDA kernel serves; with `exact`, float32 spectra whatever the dtype."""
    half = dtype != FLOAT32 and not exact
    return LongConvolution(taps, *_pack_for_cuda(taps, (taps.shape[1] + 1) // 2, half))


def points_of(length):
    return next(points for points in (256, 512, 1024) if points >= length)


def limit(length, dtype, half):
    """Relative L2 error of a channel.

    A transform of M points makes log2 M sums and half as many products in float32, each off by 0.6 units of 2^-24 at
    most on average, and two of them are made, with weights: 3 log2 M + 6 roundings, whose errors add as squares; a
    factor of 2 for what is not average. Spectra in float16 add 0.6 of 2^-11, the output's dtype half a unit.
    """
    single = 2 * 0.6 * math.sqrt(3 * math.log2(points_of(length)) + 6) * 2**-24
    spectra = 0.6 * 2**-11 if half else 0.0
    # GELU is exact to 4e-7 for float32, and to 3e-5 where 16 bits round it.
    return single + spectra + (4e-7 if dtype == FLOAT32 else 3e-5 + torch.finfo(dtype).eps / 2)


def check(got, u, taps, gelu=True, *, half=None):
    assert got.dtype == u.dtype
    exact = oracle(u, taps, gelu)
    errors, sizes = (np.linalg.norm(values, axis=2) for values in (got.double().numpy() - exact, exact))
    # GELU makes little of what is far below zero: such errors are relative to what comes in.
    floor = np.linalg.norm(oracle(u, taps, gelu=False), axis=2) * 0.5 if gelu else 0.0
    half = u.dtype != FLOAT32 if half is None else half
    bound = limit(u.shape[2], u.dtype, half) * np.maximum(sizes, floor)
    np.testing.assert_array_less(errors, bound + 1e-300)


@cuda.needs_compiler
@each_dtype
@pytest.mark.parametrize("length", [1, 2, 31, 100, 255, 256, 257, 500, 512, 513, 999, 1000, 1024])
def test_matches_the_sum(length, dtype):
    # Blocks of 4 or 8 signals that are not full, and channels that change within one.
    for batch, channels, gelu in ((1, 3, True), (3, 3, False)):
        u, taps = draw(batch, channels, length, dtype)
        check(cuda.long_convolution(u, prepare(taps, dtype), gelu=gelu), u, taps, gelu)


@cuda.needs_compiler
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
@pytest.mark.parametrize("length", [200, 400, 1000])
def test_spectra_may_be_more_exact_than_signals(length, dtype):
    u, taps = draw(2, 3, length, dtype)
    check(cuda.long_convolution(u, prepare(taps, dtype, exact=True)), u, taps, half=False)


@cuda.needs_compiler
@pytest.mark.parametrize(("before", "after"), [(FLOAT32, BFLOAT16), (FLOAT32, FLOAT16), (FLOAT16, BFLOAT16)])
@pytest.mark.parametrize("length", [200, 400, 999])
def test_the_result_may_be_of_another_dtype(length, before, after):
    # As residual blocks ask for it, in rows that have room.
    u, taps = draw(2, 3, length, before)
    got = cuda.long_convolution(u, prepare(taps, after), room=5, dtype=after, saturate=True)
    assert got.dtype == after
    # Compared as if the result's dtype had been that of the input: the same bounds, with the same rounding at the end.
    exact = oracle(u, taps, True)
    errors, sizes = (np.linalg.norm(values, axis=2) for values in (got.double().numpy() - exact, exact))
    floor = np.linalg.norm(oracle(u, taps, gelu=False), axis=2) * 0.5
    np.testing.assert_array_less(errors, limit(length, after, True) * np.maximum(sizes, floor) + 1e-300)


@cuda.needs_compiler
@pytest.mark.parametrize("saturate", [False, True])
def test_what_float16_does_not_hold(saturate):
    u = torch.tensor([2e5, -2e5, 3.0, math.nan]).reshape(4, 1, 1)
    prepared = prepare(torch.ones(1, 1, dtype=torch.float64), FLOAT16)
    got = cuda.long_convolution(u, prepared, gelu=False, dtype=FLOAT16, saturate=saturate).flatten()
    largest = 65504.0 if saturate else math.inf
    assert got[:2].tolist() == [largest, -largest]
    assert abs(float(got[2]) - 3.0) < 2**-8
    assert bool(got[3].isnan())


@cuda.needs_compiler
def test_dtypes_without_a_kernel_are_refused():
    u, taps = draw(1, 2, 40, BFLOAT16)
    with pytest.raises(cuda.EmulationError, match="no kernel has these dtypes"):
        cuda.long_convolution(u, prepare(taps, BFLOAT16), dtype=FLOAT16)
    with pytest.raises(cuda.EmulationError, match="needs float16 spectra"):
        cuda.long_convolution(u.float(), prepare(taps, FLOAT32), dtype=BFLOAT16)


@cuda.needs_compiler
def test_float32_is_as_exact_as_a_network_needs():
    u, taps = draw(2, 4, 1000)
    got, exact = cuda.long_convolution(u, prepare(taps, FLOAT32)), oracle(u, taps)
    # A network of 72 such layers has to stay within 1e-5 of float64; the bound of the CPU kernel.
    assert np.linalg.norm(got.double().numpy() - exact) < 3e-7 * np.linalg.norm(exact)


@cuda.needs_compiler
@each_dtype
def test_gelu_is_the_exact_one(dtype):
    # One position and a tap of 1: y = gelu(u).
    u = torch.linspace(-12, 12, 601).reshape(-1, 1, 1).to(dtype)
    got = cuda.long_convolution(u, prepare(torch.ones(1, 1, dtype=torch.float64), dtype)).double().flatten().numpy()
    value = u.double().flatten().numpy()
    exact = exact_gelu(value)
    # The polynomial's error, and what the transform of the number makes of it; float16 spectra and the output's dtype.
    error, rounding = (4e-7, 2**-22) if dtype == FLOAT32 else (4e-5, 2**-11 + torch.finfo(dtype).eps / 2)
    assert (np.abs(got - exact) <= error + rounding * np.abs(value)).all()


@cuda.needs_compiler
@each_dtype
@pytest.mark.parametrize("length", [77, 301, 777])
def test_strided_and_misaligned_memory(length, dtype):
    u, taps = draw(3, 5, length, dtype)
    prepared = prepare(taps, dtype)
    expected = cuda.long_convolution(u, prepared)
    wide = torch.full((6, 12, length + 9), math.nan, dtype=dtype)
    for view in (wide[::2, 3:8, 5 : 5 + length], wide[1::2, 1:10:2, 9:]):
        view.copy_(u)
        assert torch.equal(cuda.long_convolution(view, prepared, room=7), expected)
    assert torch.equal(cuda.long_convolution(cuda.shifted(u, 1), prepared, shift=1), expected)
    repeated = u[:1].expand(3, -1, -1)
    assert torch.equal(cuda.long_convolution(repeated, prepared), expected[:1].expand(3, -1, -1))


@cuda.needs_compiler
@each_dtype
@pytest.mark.parametrize("length", [250, 500, 1000])
def test_a_signal_does_not_depend_on_the_others(length, dtype):
    u, taps = draw(7, 3, length, dtype)
    together = cuda.long_convolution(u, prepare(taps, dtype))
    for sample in (0, 3, 6):
        assert torch.equal(cuda.long_convolution(u[sample : sample + 1], prepare(taps, dtype))[0], together[sample])
    alone = cuda.long_convolution(u[:, 1:2], prepare(taps[1:2], dtype))
    assert torch.equal(alone[:, 0], together[:, 1])


@cuda.needs_compiler
@pytest.mark.parametrize("length", [250, 500, 1000])
def test_the_order_of_threads_and_blocks_changes_nothing(length):
    u, taps = draw(5, 3, length)
    results = []
    for order, seed in ORDERS:
        cuda.choose(order, seed)
        results.append(cuda.long_convolution(u, prepare(taps, FLOAT32)))
    assert all(torch.equal(result, results[0]) for result in results[1:])


@cuda.needs_compiler
@pytest.mark.parametrize("length", [250, 500, 1000])
def test_every_barrier_is_needed(length):
    u, taps = draw(1, 1, length)
    prepared = prepare(taps, FLOAT32)
    cuda.choose(forget=True)
    cuda.long_convolution(u, prepared)
    places = cuda.barriers()
    assert places == 2
    for left_out in range(places):
        for order, seed in ORDERS:
            cuda.choose(order, seed, left_out)
            with pytest.raises(cuda.EmulationError, match="race|nothing has written"):
                cuda.long_convolution(u, prepared)


@cuda.needs_compiler
@each_dtype
@pytest.mark.parametrize("length", [250, 500, 1000])
def test_no_access_to_shared_memory_waits_for_a_bank(length, dtype):
    u, taps = draw(3, 3, length, dtype)
    cuda.access_conflicts(watch=True)
    cuda.long_convolution(u, prepare(taps, dtype))
    assert cuda.access_conflicts(watch=False) == 0


@cuda.needs_compiler
@each_dtype
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("length", [100, 300, 600])
def test_nan_stays_in_its_channel_and_sample(length, value, dtype):
    u, taps = draw(3, 3, length, dtype)
    expected = cuda.long_convolution(u, prepare(taps, dtype))
    u[1, 2, 50] = value
    got = cuda.long_convolution(u, prepare(taps, dtype))
    assert got[1, 2].isnan().all()
    expected[1, 2] = got[1, 2] = 0
    assert torch.equal(got, expected)
    taps[0, 3] = value
    got = cuda.long_convolution(u[2:], prepare(taps, dtype))
    assert got[:, 0].isnan().all()
    assert got[:, 1:].isfinite().all()


@cuda.needs_compiler
@each_dtype
def test_filters_of_any_size(dtype):
    u, taps = draw(2, 6, 200, dtype)
    taps = taps * torch.logspace(-20, 20, 6, dtype=torch.float64)[:, None]
    taps[3] = 0.0
    if dtype == FLOAT16:
        u, taps = u[:, :3], taps[:3]  # results of the others do not fit
    got, exact = cuda.long_convolution(u, prepare(taps, dtype), gelu=False), oracle(u, taps, gelu=False)
    assert not got[:, 3:4].any()
    if dtype == FLOAT16:  # Subnormal results are rounded to 2^-24.
        np.testing.assert_allclose(got.double().numpy(), exact, rtol=2**-9, atol=2**-9 * np.abs(exact).max())
        return
    errors, sizes = (np.linalg.norm(values, axis=2) for values in (got.double().numpy() - exact, exact))
    assert (errors <= limit(200, dtype, dtype != FLOAT32) * sizes).all()


@cuda.needs_compiler
def test_what_the_launcher_refuses():
    for shape in ((0, 3, 5), (2, 0, 5)):
        prepared = prepare(torch.zeros(shape[1], 9, dtype=torch.float64), FLOAT32)
        assert cuda.long_convolution(torch.zeros(shape), prepared).shape == shape
    u, taps = draw(1, 1, 300)
    half = prepare(taps, BFLOAT16)
    with pytest.raises(cuda.EmulationError, match="float32 signals need float32 spectra"):
        cuda.long_convolution(u, half)
    short = prepare(draw(1, 1, 200)[1], FLOAT32)
    with pytest.raises(cuda.EmulationError, match="more positions than points"):
        cuda.long_convolution(u, short)
    with pytest.raises(cuda.EmulationError, match="256, 512 or 1024 points"):
        cuda.long_convolution(u, short._replace(packed=torch.zeros(1, 300, 2)))
    call = cuda.LongConvolutionCall(batch=2**20, channels=2**11, length=1, points=256)
    with pytest.raises(cuda.EmulationError, match="at most 2.31 - 1 signals"):
        cuda.check(cuda.library().tgdp_cuda_long_convolution(ctypes.byref(call), None))


@each_dtype
@pytest.mark.parametrize("length", [3, 256, 400, 1000])
def test_spectra_are_those_of_the_definition(length, dtype):
    _, taps = draw(1, 2, length)
    prepared = prepare(taps, dtype)
    points = points_of(length)
    lags = np.arange(-(length - 1), length)
    k = np.arange(points)[:, None]
    expected = np.exp(-2j * np.pi * lags * (k - 0.25) / points) @ taps.numpy().T / points
    assert prepared.packed.dtype == (FLOAT32 if dtype == FLOAT32 else FLOAT16)
    assert prepared.packed.shape == (2, points, 2)
    got = torch.view_as_complex(prepared.packed.double()).numpy().T
    if dtype != FLOAT32:
        assert prepared.scales.shape == (2,)
        assert torch.equal(prepared.scales.log2(), prepared.scales.log2().round())
        got = got * prepared.scales.double().numpy()
    else:
        assert prepared.scales.shape == (0,)
    bound = (2**-24 if dtype == FLOAT32 else 2**-11) * np.abs(expected).max()
    assert np.abs(got - expected).max() <= 1.01 * bound


def test_longer_filters_have_no_spectra():
    assert _pack_for_cuda(torch.zeros(1, 2 * 1025 - 1), 1025, False) == (None, None)
    assert packed_for(prepare(torch.zeros(0, 9), BFLOAT16).packed) == "cuda"


def test_whose_spectra_are_kept(monkeypatch):
    monkeypatch.setattr(native, "CUDA_MISSING", None)
    monkeypatch.setattr(_triton, "MISSING", None)
    monkeypatch.setattr(_triton, "DEVICE_TYPE", "cuda")
    for dtype in DTYPES:
        assert _reader("cuda", dtype, "auto") == "cuda"  # the faster one as measured
        for around in ("cuda", "triton"):
            with use_backend(around):
                assert _reader("cuda", dtype, "auto") == around
                assert _reader("cuda", dtype, "triton") == "triton"
        with use_backend("reference"):
            assert _reader("cuda", dtype, "auto") is not None
        assert _reader("cuda", dtype, "cuda") == "cuda"
        assert _reader("cuda", dtype, "reference") is None
        assert _reader("cpu", dtype, "cuda") is None
    monkeypatch.setattr(native, "CUDA_MISSING", "not here")
    assert _reader("cuda", BFLOAT16, "auto") == "triton"
    assert _reader("cuda", FLOAT32, "cuda") is None
    monkeypatch.setattr(_triton, "MISSING", "not here")
    assert _reader("cuda", FLOAT32, "auto") is None


def test_refusals(monkeypatch):
    u, taps = draw(1, 2, 6)
    prepared = prepare(taps, FLOAT32)

    def reason(u=u, prepared=prepared):
        return _unsupported_by_cuda(u, *prepared, True)

    monkeypatch.setattr("tgdp_fast.ops._cuda.unsupported_device", lambda tensor: "an old device")
    assert reason() == "an old device"
    monkeypatch.setattr("tgdp_fast.ops._cuda.unsupported_device", lambda tensor: None)
    assert reason() is None
    assert reason(u.half()) is None
    assert "computes no gradients" in reason(u.clone().requires_grad_())
    assert "not float64" in reason(u.double())
    assert "prepared for inputs of 16 bits" in reason(prepared=prepare(taps, BFLOAT16))
    for packed in (None, torch.zeros(1, 64, 2, 16), torch.zeros(2, 2, 16, 16)):
        assert "backend='cuda')" in reason(prepared=prepared._replace(packed=packed))
    assert "up to 1024 positions, not 1025" in reason(torch.zeros(1, 2, 1025))
    assert "fewer than 2^31 signals" in reason(torch.zeros(1, 1, 1).expand(2**20, 2**11, 1))
    with pytest.raises(BackendUnavailableError, match="it takes cuda tensors|CUDA extension"):
        long_convolution(u, prepared, backend="cuda")
    # Nobody else takes what was packed for it for their own.
    with torch.no_grad():
        assert torch.equal(
            long_convolution(u, prepared), long_convolution(u, prepared._replace(packed=None), backend="reference")
        )
    with pytest.raises(ValueError, match="backend must be one of"):
        prepare_long_convolution(taps, backend="gpu")
