"""The Triton kernels of a residual block: numerics in the interpreter, against the formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from test_residual_block import CPU, error
from triton_interpreter import compiled, interpreted, run_interpreted

from tgdp_fast.benchmark import validate
from tgdp_fast.benchmark.accuracy import PRECISIONS
from tgdp_fast.benchmark.problems import residual_block_inputs
from tgdp_fast.kernels import autotuning
from tgdp_fast.models import SSSDECG
from tgdp_fast.ops import BackendUnavailableError, prepare_long_convolution, residual_block_, use_backend
from tgdp_fast.ops.residual_block import residual_block_reference_

pytest.importorskip("triton", reason="Triton is not installed; run `pip install triton`")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


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
        ((2, 4, 2, 2), "shared", "per sample"),
        ((1, 6, 0, 3), "per sample", "shared"),
        ((2, 17, 40, 65), "per sample", "per sample"),
        ((1, 70, 3, 130), "per sample", "shared"),
    ],
    ids=str,
)
def test_matches_the_formulas_in_float64(shape, labels, steps, dtype):
    inputs = residual_block_inputs(shape, dtype, CPU, labels=labels, steps=steps)
    got = run(inputs)
    assert got.dtype == torch.float32
    assert error(got, inputs) < limit(dtype)


@interpreted
@pytest.mark.parametrize("precision", PRECISIONS)
def test_validates(monkeypatch, precision):
    monkeypatch.setattr(validate, "BLOCKS", validate.BLOCKS[:4])
    rows = list(validate._rows("residual_block_", "triton", precision))
    assert [row["verdict"] for row in rows] == ["passed"] * 4


@interpreted
@each_dtype
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stays_in_its_sample(dtype, value):
    inputs = residual_block_inputs((3, 8, 6, 40), dtype, CPU)
    expected = run(inputs)
    inputs.state[1, 3, 20] = value
    got = run(inputs)
    # Factors of float16 are limited, and infinity among them.
    assert got[1, :8].isnan().any() if dtype == torch.float16 else got[1].isnan().all()
    torch.testing.assert_close(got[[0, 2]], expected[[0, 2]], rtol=0, atol=0)


@interpreted
def test_factors_of_float16_are_limited():
    inputs = residual_block_inputs((1, 8, 6, 40), torch.float16, CPU)
    inputs.state[0, 2, 7] = 1e6
    assert run(inputs).isfinite().all()
    exact = residual_block_reference_(*inputs)
    torch.testing.assert_close(run(inputs), exact, rtol=1e-2, atol=2e-2)


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
@pytest.mark.usefixtures("poisoned")
@each_dtype
@pytest.mark.parametrize("shape", [(2, 20, 12, 33), (1, 33, 20, 70)], ids=str)
def test_candidates(shape, dtype):
    inputs, seen = residual_block_inputs(shape, dtype, CPU), set()

    def policy(run, candidates):
        for candidate in candidates:
            run(candidate)
        seen.update(candidates)
        chosen = candidates[number % len(candidates)]
        return run(chosen)

    for number in range(3):
        with autotuning.deciding(policy):
            assert error(run(inputs), inputs) < limit(dtype)
    assert len(seen) >= 3


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
    refused("up to 512 residual channels, not 513", residual_block_inputs((1, 513, 1, 1), torch.bfloat16, CPU))
    layers = [layer._replace(filters=layer.filters.without_taps()) for layer in (weights.first, weights.second)]
    dropped = inputs._replace(weights=weights._replace(first=layers[0], second=layers[1]))
    assert torch.equal(run(dropped), run(inputs))
    with pytest.raises(BackendUnavailableError, match=r"no transform of torch.func"):
        torch.func.vmap(lambda state: run(inputs._replace(state=state)))(inputs.state[None])


@interpreted
def test_compiled_code_and_the_schema():
    inputs = residual_block_inputs((2, 6, 4, 17), torch.float32, CPU)
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
@pytest.mark.parametrize(("precision", "largest"), [("fp32", 1e-5), ("bf16", 1e-2), ("fp16", 2e-3)])
def test_a_network_compiled_for_sampling(precision, largest):
    torch.manual_seed(1)
    network = SSSDECG(
        in_channels=2, out_channels=2, res_channels=8, skip_channels=6, num_res_layers=2, s4_lmax=40, s4_d_state=8,
        num_classes=3,
    ).eval()  # fmt: skip
    torch.nn.init.normal_(network.final_conv[2].conv.weight)
    x, labels = torch.randn(3, 2, 40), torch.tensor([0, 2, 1])
    with torch.inference_mode():
        exact = network.double()(x.double(), torch.tensor([5.0]), labels)
        with use_backend("triton"):
            got = network.float().compile_for_sampling([5.0], precision=precision)(x, torch.tensor([5.0]), labels)
    assert float((got - exact).norm() / exact.norm()) < largest
