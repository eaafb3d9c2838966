"""The Triton kernels of a residual block: numerics in the interpreter, against the formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from test_residual_block import CPU, error
from torch.nn import functional
from triton_interpreter import compiled, interpreted, run_interpreted

from tgdp_fast.kernels import residual_block as kernels
from tgdp_fast.lab import validate
from tgdp_fast.lab.cases import CHECKS
from tgdp_fast.lab.cases.residual_block import residual_block_inputs
from tgdp_fast.models import SSSDECG
from tgdp_fast.ops import BackendUnavailableError, prepare_long_convolution, residual_block_, use_backend
from tgdp_fast.ops.gated_activation import gated_activation_reference
from tgdp_fast.ops.residual_block import residual_block_reference_
from tgdp_fast.runtime.precision import PRECISIONS

triton = pytest.importorskip("triton", reason="Triton is not installed; run `pip install triton`")
tl = triton.language

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.mark.slow(ci=True)
@compiled
def test_in_the_interpreter():
    assert run_interpreted("test_triton_residual_block.py") > 20


def limit(dtype):
    """Four products and two convolutions with two roundings of factors each, as in test_residual_block.py: half a unit
    at most, and half of their sum; a convolution of 16 bits counts as one more rounding, of float16.
    """
    if dtype == torch.float32:
        return 30 * 2**-24
    return 4 * torch.finfo(dtype).eps / 2 + 2**-11


def run(inputs, backend="triton"):
    state, *others = inputs
    return residual_block_(state.clone(), *others, backend=backend)


@interpreted
@pytest.mark.usefixtures("poisoned")
@each_dtype
@pytest.mark.parametrize(
    ("shape", "labels", "steps"),
    [
        ((3, 2, 4, 1), "none", "shared"),
        ((1, 4, 0, 3), "shared", "shared"),
        ((2, 7, 40, 65), "per sample", "per sample"),
    ],
    ids=str,
)
def test_matches_the_formulas_in_float64(shape, labels, steps, dtype):
    inputs = residual_block_inputs(shape, dtype, CPU, labels=labels, steps=steps)
    got = run(inputs)
    assert got.dtype == torch.float32
    assert error(got, inputs) < limit(dtype)


@interpreted
@pytest.mark.usefixtures("poisoned")
@each_dtype
@pytest.mark.parametrize("large", [False, True])
def test_products_of_several_tiles_and_slices(monkeypatch, large, dtype):
    # Of each dimension more than the largest tile holds, and no multiple of anything.
    if large:
        tile = kernels._taps_tile
        monkeypatch.setattr(kernels, "_taps_tile", lambda *_, dtype: tile(1 << 20, 512, 256, dtype=dtype))
    batch, channels, length, rows = 2, 131, 139, 133
    generator = torch.Generator().manual_seed(3)
    state = torch.randn(batch, rows, length, generator=generator)
    weight = torch.randn(rows, 3 * channels, generator=generator).to(dtype)
    steps = torch.randn(batch, 3, rows, generator=generator)
    x = torch.full((batch, length + 2, 144), math.nan, dtype=dtype)
    kernels.transpose(x, state, channels)
    factors = state[:, :channels].to(dtype)
    assert torch.equal(x[:, 1:-1, :channels], factors.mT)
    assert not x[:, [0, -1]].any()
    u = torch.full((batch, rows, 144), math.nan)
    kernels.taps(u, x, weight, steps)
    exact = functional.conv1d(factors.double(), weight.double().unflatten(1, (3, channels)).mT, padding=1)
    exact += steps[:, 0, :, None]
    exact[..., 0] -= steps[:, 1]
    exact[..., -1] -= steps[:, 2]
    limit = 3 * math.sqrt(3 * channels) * 2**-24 * float(exact.abs().max())
    torch.testing.assert_close(u[..., :length].double(), exact, rtol=0, atol=limit)

    gated, bias = weight[:, :channels].contiguous(), torch.randn(rows, generator=generator)
    exact = gated.double() @ factors.double() + bias[:, None]
    exact[:, :channels] += state[:, :channels] * math.sqrt(0.5)
    exact[:, channels:] += state[:, channels:]
    kernels.output(state, x, gated, bias)
    torch.testing.assert_close(state.double(), exact, rtol=0, atol=limit)


@interpreted
@pytest.mark.parametrize("precision", PRECISIONS)
def test_validates(precision):
    rows = list(validate.rows_of("residual_block_", "triton", precision, CHECKS["residual_block_"][0][:3]))
    assert [row["verdict"] for row in rows] == ["passed"] * 3


@triton.jit
def _gates(output, a, b, count: tl.constexpr, size: tl.constexpr):
    lanes = tl.arange(0, size)
    mask = lanes < count
    values = kernels.gate(tl.load(a + lanes, mask=mask, other=0.0), tl.load(b + lanes, mask=mask, other=0.0))
    tl.store(output + lanes, values, mask=mask)


@interpreted
def test_the_gate_is_accurate_near_zero_and_far_away():
    magnitudes = torch.logspace(-30, 30, 401)
    first = torch.cat([-magnitudes.flip(0), torch.zeros(1), magnitudes, torch.tensor([math.nan, 0.5])])
    second = torch.cat([torch.linspace(-80, 80, 803), torch.tensor([0.5, math.nan])])
    got = torch.full_like(first, math.inf)
    _gates[(1,)](got, first, second, count=len(first), size=1024)
    assert got[803:].isnan().all()
    exact = torch.tanh(first.double()) * torch.sigmoid(second.double())
    # Relative: the two functions and their product, some units in the last place (1.2e-7); the exponential of a rounded
    # argument of 80 in size adds 80 * 2^-24 = 5e-6.
    torch.testing.assert_close(got[:803].double(), exact[:803], rtol=6e-6, atol=0)


@interpreted
@pytest.mark.usefixtures("poisoned")
@each_dtype
@pytest.mark.parametrize("gated", [False, True])
def test_mixture_of_several_slices(gated, dtype):
    batch, channels, length = 2, 37, 41
    hidden = 2 * channels
    generator = torch.Generator().manual_seed(4)

    def draw(*size):
        return torch.randn(size, generator=generator)

    y, u = (torch.full((batch, hidden, 48), math.nan) for _ in range(2))
    y[..., :length], u[..., :length] = draw(batch, hidden, length), 3 + draw(batch, hidden, length)
    y, weight, vectors, labels = y.to(dtype), (draw(hidden, hidden) / 9).to(dtype), draw(3, hidden), draw(1, hidden)
    shape = (batch, length + 2, 48) if gated else u.shape
    output = torch.full(shape, math.nan)
    kernels.mixture(output, y, u, weight, tuple(vectors), labels, 1e-5, length, gated=gated)
    exact = (u.double() + weight.double() @ y.double() + vectors[0][:, None])[..., :length].mT
    exact = functional.layer_norm(exact, (hidden,), vectors[1].double(), (vectors[2] + labels[0]).double(), 1e-5).mT
    if gated:
        exact, output = gated_activation_reference(exact), output.mT[:, :channels, 1:]
    torch.testing.assert_close(output[..., :length].double(), exact, rtol=0, atol=5e-6)


@interpreted
@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, math.nan), (torch.bfloat16, math.inf)], ids=str)
def test_nan_stays_in_its_sample(dtype, value):
    inputs = residual_block_inputs((3, 3, 2, 20), dtype, CPU)
    expected = run(inputs)
    inputs.state[1, 2, 11] = value
    got = run(inputs)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], expected[[0, 2]])


@interpreted
def test_factors_of_float16_are_limited():
    inputs = residual_block_inputs((1, 4, 6, 40), torch.float16, CPU)
    inputs.state[0, 2, 7] = 1e6
    got = run(inputs)
    assert got.isfinite().all()
    torch.testing.assert_close(got, residual_block_reference_(*inputs), rtol=1e-2, atol=2e-2)


@interpreted
@pytest.mark.usefixtures("poisoned")
def test_in_place_and_nothing_else():
    inputs = residual_block_inputs((2, 6, 4, 35), torch.bfloat16, CPU)
    state, steps, labels, weights = inputs
    layers = [tensor for layer in (weights.first, weights.second) for tensor in (*layer.filters, *layer[1:-1])]
    held = [steps, labels, weights.convolution, weights.output, weights.output_bias, *layers]
    before = [tensor.clone() for tensor in held]
    changed = state.clone()
    assert residual_block_(changed, steps, labels, weights, backend="triton") is changed
    assert all(torch.equal(tensor, value) for tensor, value in zip(held, before, strict=True))
    # Rows that do not lie side by side, and numbers that do not.
    table = torch.stack([steps, torch.full_like(steps, math.nan)], dim=1)[:, 0]
    spread = torch.stack([labels, torch.full_like(labels, math.nan)], dim=2)[..., 0]
    assert torch.equal(residual_block_(state.clone(), table, spread, weights, backend="triton"), changed)
    # Filters of longer signals.
    shorter = inputs._replace(state=state[..., :9].contiguous())
    assert error(run(shorter), shorter) < limit(torch.bfloat16)
    nothing = residual_block_inputs((0, 6, 4, 35), torch.bfloat16, CPU)
    assert run(nothing).shape == (0, 10, 35)


@interpreted
def test_refusals():
    inputs = residual_block_inputs((1, 4, 4, 20), torch.float32, CPU)
    weights = inputs.weights

    def refused(match, inputs, backend="triton"):
        with pytest.raises(BackendUnavailableError, match=match):
            run(inputs, backend)

    refused("filters of up to 1024 samples", residual_block_inputs((1, 2, 2, 1025), torch.float32, CPU))
    taps = weights.second.filters.taps
    half = weights.second._replace(filters=prepare_long_convolution(taps, torch.bfloat16))
    refused("prepared for 16 bits", inputs._replace(weights=weights._replace(second=half)))
    refused("prepared for the CPU", inputs, "cpu")
    wide = residual_block_inputs((1, 513, 1, 1), torch.bfloat16, CPU)
    refused("up to 512 residual channels, not 513", wide)
    layers = [layer._replace(filters=layer.filters.without_taps()) for layer in (weights.first, weights.second)]
    dropped = inputs._replace(weights=weights._replace(first=layers[0], second=layers[1]))
    assert torch.equal(run(dropped), run(inputs))
    with pytest.raises(BackendUnavailableError, match=r"no transform of torch.func"):
        torch.func.vmap(lambda state: run(inputs._replace(state=state)))(inputs.state[None])


@interpreted
def test_compiled_code_and_the_schema():
    inputs = residual_block_inputs((1, 2, 1, 5), torch.float32, CPU)
    state, steps, labels, weights = inputs
    first, second = ([*layer.filters[1:], *layer[1:5]] for layer in (weights.first, weights.second))
    arguments = (state, steps, labels, weights.convolution, first, 1e-5, second, 1e-5, weights.output)
    operator = torch.ops.tgdp_fast.residual_block_triton_.default
    torch.library.opcheck(operator, (*arguments, weights.output_bias))
    torch._dynamo.reset()
    function = torch.compile(
        lambda state: residual_block_(state, steps, labels, weights, backend="triton"),
        fullgraph=True,
        backend="aot_eager",
    )
    with torch.inference_mode():
        assert torch.equal(function(state.clone()), run(inputs))
    torch._dynamo.reset()


@interpreted
@pytest.mark.parametrize(("precision", "largest"), [("fp32", 1e-5), ("bf16", 1e-2)])
def test_a_network_compiled_for_sampling(precision, largest):
    torch.manual_seed(1)
    network = SSSDECG(
        in_channels=2, out_channels=2, res_channels=4, skip_channels=6, num_res_layers=2, l_max=40, d_state=8,
        num_classes=3,
    ).eval()  # fmt: skip
    torch.nn.init.normal_(network.final_conv[2].conv.weight)
    x, labels = torch.randn(3, 2, 40), torch.tensor([0, 2, 1])
    with torch.inference_mode():
        exact = network.double()(x.double(), torch.tensor([5.0]), labels)
        with use_backend("triton"):
            got = network.float().compile_for_sampling([5.0], precision=precision)(x, torch.tensor([5.0]), labels)
    assert float((got - exact).norm() / exact.norm()) < largest
