"""long_convolution against the sum it stands for in float64, and its contract."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from native import CAPABILITIES, needs_extension, run_with
from torch.nn import functional

from tgdp_fast.models.s4 import S4Layer
from tgdp_fast.ops import (
    BackendUnavailableError,
    LongConvolution,
    long_convolution,
    prepare_long_convolution,
)
from tgdp_fast.ops.long_convolution import long_convolution_reference

each_backend = pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_extension)])
LENGTHS = (1, 2, 3, 17, 64, 65, 250, 512, 999, 1000, 1024)


def draw(batch, channels, length, dtype=torch.float32, seed=1):
    """u and float64 taps that make sums of about the size of u."""
    generator = torch.Generator().manual_seed(seed)
    taps = torch.randn(channels, 2 * length - 1, generator=generator, dtype=torch.float64) / math.sqrt(length)
    return torch.randn(batch, channels, length, generator=generator).to(dtype), taps


def exact_gelu(y):
    return y * 0.5 * np.vectorize(math.erfc)(-y / math.sqrt(2))


def oracle(u, taps, gelu=True):
    """The definition, term by term, in float64."""
    length = u.shape[2]
    y = np.zeros(u.shape)
    for b in range(u.shape[0]):
        for h in range(u.shape[1]):
            y[b, h] = np.convolve(u[b, h].double().numpy(), taps[h].double().numpy())[length - 1 : 2 * length - 1]
    return exact_gelu(y) if gelu else y


def limit(length, dtype):
    """Largest error relative to the largest output.

    A transform of N points in float32 makes an error of about 2^-24 log2 N of its result's size on average, and two of
    them are made; outputs and GELU add some units of 2^-24, and the largest of many errors is several times the mean.
    16 bits add the rounding of an output, and spectra of 2^-11.
    """
    single = 2**-24 * (4 + 2 * math.log2(2 * length + 1))
    spectra = 0.0 if dtype == torch.float32 else 2**-11
    return single + spectra + (0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)


def check(got, exact, length, dtype):
    assert got.dtype == dtype
    assert got.is_contiguous()
    np.testing.assert_allclose(got.double().numpy(), exact, rtol=0, atol=limit(length, dtype) * np.abs(exact).max())


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", LENGTHS)
def test_matches_the_sum(length, dtype, backend):
    for batch, channels, gelu in ((1, 1, True), (2, 16, False), (3, 17, True)):
        u, taps = draw(batch, channels, length, dtype)
        prepared = prepare_long_convolution(taps, dtype)
        check(long_convolution(u, prepared, gelu=gelu, backend=backend), oracle(u, taps, gelu), length, dtype)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_papers_size(dtype, backend):
    u, taps = draw(1, 512, 1000, dtype)
    got = long_convolution(u, prepare_long_convolution(taps, dtype), backend=backend)
    check(got, oracle(u, taps), 1000, dtype)
    if dtype == torch.float32:
        # Three transforms of log2(2 L) stages. A stage rounds its factors, products and two sums: independent errors of
        # 2^-24 at most, together sqrt(4) of that. For 72 layers that is 6e-6: a network has to stay within 1e-5.
        exact = oracle(u, taps)
        bound = math.sqrt(3 * math.log2(2 * 1000)) * 2 * 2**-24
        assert np.linalg.norm(got.double().numpy() - exact) < bound * np.linalg.norm(exact)


@needs_extension
def test_filters_of_a_layer():
    layer = S4Layer(20, d_state=16, l_max=100).eval()
    taps = layer.taps(90)
    u, _ = draw(2, 20, 90)
    with torch.no_grad():
        through = layer.double().output_linear(torch.as_tensor(oracle(u, taps)))
        expected = layer(u.double())
        got = long_convolution(u, prepare_long_convolution(taps), backend="cpu")
    torch.testing.assert_close(through, expected, rtol=0, atol=1e-6)
    check(got, oracle(u, taps), 90, torch.float32)


@needs_extension
def test_gelu_is_the_exact_one():
    # One position and a tap of 1: y = gelu(u).
    u = torch.linspace(-12, 12, 200001).reshape(-1, 1, 1)
    prepared = prepare_long_convolution(torch.ones(1, 1))
    got = long_convolution(u, prepared, backend="cpu").double().flatten().numpy()
    exact = exact_gelu(u.double().flatten().numpy())
    # 4e-7 of the polynomial; the transform of the number alone rounds it by some units in the last place.
    assert (np.abs(got - exact) - 3e-7 * np.abs(exact)).max() < 4e-7
    near = np.abs(u.flatten().numpy()) < 1
    np.testing.assert_allclose(got[near], exact[near], rtol=1.2e-6, atol=0)
    for dtype, error in ((torch.bfloat16, 2**-8), (torch.float16, 2**-10)):
        prepared = prepare_long_convolution(torch.ones(1, 1), dtype)
        got = long_convolution(u.to(dtype), prepared, backend="cpu").double().flatten().numpy()
        exact = exact_gelu(u.to(dtype).double().flatten().numpy())
        assert (np.abs(got - exact) - error * np.abs(exact)).max() < 1e-4


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sample_does_not_depend_on_its_batch(dtype):
    u, taps = draw(19, 37, 250, dtype)
    prepared = prepare_long_convolution(taps, dtype)
    together = long_convolution(u, prepared, backend="cpu")
    for sample in (0, 7, 8, 18):
        assert torch.equal(long_convolution(u[sample : sample + 1], prepared, backend="cpu")[0], together[sample])
    # Nor a channel on the others.
    alone = long_convolution(u[:, 5:6], prepare_long_convolution(taps[5:6], dtype), backend="cpu")
    assert torch.equal(alone[:, 0], together[:, 5])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(long_convolution(u, prepared, backend="cpu"), together)
    finally:
        torch.set_num_threads(threads)


@needs_extension
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_stays_in_its_channel_and_sample(dtype, value):
    u, taps = draw(3, 20, 100, dtype)
    prepared = prepare_long_convolution(taps, dtype)
    expected = long_convolution(u, prepared, backend="cpu")
    u[1, 4, 50] = value
    got = long_convolution(u, prepared, backend="cpu")
    assert got[1, 4].isnan().all()
    expected[1, 4] = got[1, 4] = 0
    assert torch.equal(got, expected)
    taps[7, 3] = value
    got = long_convolution(u, prepare_long_convolution(taps, dtype), backend="cpu")
    assert got[:, 7].isnan().all()
    assert got[:, [*range(4), 5, 6, *range(8, 20)]].isfinite().all()


@each_backend
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slices(dtype, backend):
    u, taps = draw(3, 21, 70, dtype)
    prepared = prepare_long_convolution(taps, dtype)
    expected = long_convolution(u, prepared, backend=backend)
    assert expected.isfinite().all()
    wide = torch.full((6, 50, 200), math.nan, dtype=dtype)
    for view in (wide[::2, 3:24, 5:75], wide[1::2, 1:43:2, 130:], wide[:3, :21, :140:2], wide[3:, 4:25, -140::2]):
        view.copy_(u)
        assert torch.equal(long_convolution(view, prepared, backend=backend), expected)
    turned = torch.full((70, 21, 3), math.nan, dtype=dtype).permute(2, 1, 0)
    turned.copy_(u)
    assert torch.equal(long_convolution(turned, prepared, backend=backend), expected)
    repeated = u[:1].expand(3, -1, -1)
    assert torch.equal(long_convolution(repeated, prepared, backend=backend), expected[:1].expand(3, -1, -1))


@each_backend
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (0, 0, 1)])
def test_nothing(shape, backend):
    prepared = prepare_long_convolution(torch.zeros(shape[1], 2 * shape[2] - 1))
    assert long_convolution(torch.zeros(shape), prepared, backend=backend).shape == shape


@needs_extension
def test_spectra_of_16_bits_are_relative_to_each_channel():
    u, taps = draw(2, 18, 200, torch.bfloat16)
    taps = taps * torch.logspace(-20, 20, 18, dtype=torch.float64)[:, None]
    taps[5] = 0.0
    got = long_convolution(u, prepare_long_convolution(taps, torch.bfloat16), gelu=False, backend="cpu")
    exact = oracle(u, taps, gelu=False)
    for channel in range(18):
        check(got[:, channel].contiguous(), exact[:, channel], 200, torch.bfloat16)


SAME_IN_EACH = """
import torch
from test_long_convolution import LENGTHS, check, draw, oracle
from tgdp_fast.runtime import native
from tgdp_fast.ops import long_convolution, prepare_long_convolution
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for length in LENGTHS:
        u, taps = draw(2, 19, length, dtype)
        got = long_convolution(u, prepare_long_convolution(taps, dtype), backend="cpu")
        check(got, oracle(u, taps), length, dtype)
        alone = long_convolution(u[1:, 17:18], prepare_long_convolution(taps[17:18], dtype), backend="cpu")
        assert torch.equal(alone[0, 0], got[1, 17])
print(native.cpu_capability())
"""


@needs_extension
@pytest.mark.parametrize("name", CAPABILITIES)
def test_each_instruction_set(name):
    shown = run_with(SAME_IN_EACH, TGDP_CPU_CAPABILITY=name, OMP_NUM_THREADS="1").strip()
    assert CAPABILITIES.index(shown) <= CAPABILITIES.index(name)


def test_float64_and_gradients():
    u, taps = draw(2, 3, 5)
    u, taps = u.double().requires_grad_(), taps.requires_grad_()
    np.testing.assert_allclose(
        long_convolution(u, prepare_long_convolution(taps)).detach().numpy(),
        oracle(u.detach(), taps.detach()),
        atol=1e-14,
    )
    assert torch.autograd.gradcheck(lambda u, taps: long_convolution(u, prepare_long_convolution(taps)), (u, taps))
    u, taps = u.detach().float(), taps.detach()
    prepared = prepare_long_convolution(taps)
    u.requires_grad_()
    assert torch.equal(long_convolution(u, prepared), long_convolution_reference(u, prepared))
    assert long_convolution(u, prepared).requires_grad
    twice = torch.func.vmap(lambda u: long_convolution(u, prepared))(u.detach()[None])
    torch.testing.assert_close(twice[0], long_convolution(u, prepared).detach(), rtol=0, atol=1e-6)


@needs_extension
def test_what_the_kernel_refuses():
    u, taps = draw(1, 2, 6)
    prepared = prepare_long_convolution(taps)

    def refused(match, u=u, prepared=prepared):
        with pytest.raises(BackendUnavailableError, match=match):
            long_convolution(u, prepared, backend="cpu")
        assert long_convolution(u, prepared).shape == u.shape

    refused("computes no gradients", u.clone().requires_grad_())
    refused("not float64", u.double())
    refused("prepared for inputs of 16 bits", prepared=prepare_long_convolution(taps, torch.bfloat16))
    refused("prepared for another device or dtype", prepared=prepare_long_convolution(taps, torch.float64))
    long, long_taps = draw(1, 1, 1025)
    refused("up to 1024 positions, not 1025", long, prepare_long_convolution(long_taps))
    with torch.no_grad():
        assert long_convolution(u.clone().requires_grad_(), prepared, backend="cpu").isfinite().all()
    # More exact than asked for is fine.
    half = long_convolution(u.half(), prepared, backend="cpu")
    check(half, oracle(u.half(), taps), 6, torch.float16)


@needs_extension
def test_compiles_without_graph_breaks():
    u, taps = draw(2, 6, 20)
    prepared = prepare_long_convolution(taps)
    torch._dynamo.reset()
    compiled = torch.compile(long_convolution, fullgraph=True, backend="eager")
    with torch.inference_mode():
        assert torch.equal(compiled(u, prepared), long_convolution(u, prepared))
    torch._dynamo.reset()
    torch.library.opcheck(torch.ops.tgdp_fast.long_convolution.default, (u, prepared.packed, prepared.scales, True))


@pytest.mark.parametrize(
    ("u", "taps", "match"),
    [
        (torch.zeros(2, 4), torch.zeros(4, 3), r"u must have shape \[B, H, L\], L at least 1, got \(2, 4\)"),
        (torch.zeros(2, 4, 0), torch.zeros(4, 3), r"u must have shape.*got \(2, 4, 0\)"),
        (torch.zeros(2, 4, 3), torch.zeros(4, 3), r"prepared must be for 4 channels and signals of 3 .*length 2;"),
        (torch.zeros(2, 4, 3), torch.zeros(3, 5), r"4 channels and signals of 3 samples.*got 3 channels.*\(4, 5\)"),
        (torch.zeros(2, 4, 3, dtype=torch.int32), torch.zeros(4, 5), "u must be float16.*got torch.int32"),
        (torch.zeros(2, 4, 3), torch.zeros(4, 5, device="meta"), "prepared must be on the device of u, cpu, got meta"),
        (torch.zeros(2, 4, 3), torch.zeros(4, 6), r"taps must have shape \[H, 2 L - 1\].*got \(4, 6\)"),
        (torch.zeros(2, 4, 3), torch.zeros(5), r"taps must have shape.*got \(5,\)"),
        (torch.zeros(2, 4, 3), torch.zeros(4, 5, dtype=torch.int64), "taps must be float16.*got torch.int64"),
    ],
)
def test_errors(u, taps, match):
    with pytest.raises(ValueError, match=match):
        long_convolution(u, prepare_long_convolution(taps))


def test_other_errors():
    with pytest.raises(ValueError, match="prepared must be a LongConvolution, got Tensor; use prepare_long_conv"):
        long_convolution(torch.zeros(2, 4, 3), torch.zeros(4, 5))
    with pytest.raises(ValueError, match="dtype must be float16, .*got torch.int8"):
        prepare_long_convolution(torch.zeros(4, 5), torch.int8)
    unprepared = LongConvolution(torch.ones(1, 1), None, None)
    assert long_convolution(torch.zeros(1, 1, 1), unprepared, backend="reference").item() == 0.0
    assert torch.equal(
        long_convolution(torch.ones(1, 1, 1), unprepared, backend="reference"), functional.gelu(torch.ones(1, 1, 1))
    )
