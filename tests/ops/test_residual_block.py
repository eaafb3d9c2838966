"""residual_block_ against its formulas in float64, and its contract."""

from __future__ import annotations

import math

import pytest
import torch
from native import CAPABILITIES, needs_extension, run_with

from tgdp_fast.lab.cases.residual_block import residual_block_inputs
from tgdp_fast.ops import BackendUnavailableError, residual_block_
from tgdp_fast.ops.residual_block import multiplies_bf16, residual_block_reference_

CPU = torch.device("cpu")
needs_bf16 = pytest.mark.skipif(not multiplies_bf16(), reason="the CPU does not multiply bfloat16")
cpu_dtypes = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, marks=needs_extension),
        pytest.param(torch.bfloat16, marks=needs_bf16),
    ],
)
each_backend = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *(("reference", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        pytest.param("cpu", torch.float32, marks=needs_extension),
        pytest.param("cpu", torch.bfloat16, marks=needs_bf16),
    ],
)
#: B, C, S, L: one position, two, whole and partial tiles of 64 positions and vectors of 16, no skip channels.
SHAPES = (
    (3, 2, 4, 1),
    (2, 4, 2, 2),
    (1, 6, 0, 3),
    (2, 10, 12, 17),
    (1, 16, 16, 64),
    (3, 34, 20, 129),
    (1, 32, 8, 1000),
)


def error(got, inputs):
    """L2 norm of the error, relative to that of what the block has changed."""
    exact = residual_block_reference_(*inputs.double())
    return float((got.double() - exact).norm() / (exact - inputs.state.double()).norm())


def limit(length, dtype):
    """Four products and two transforms, each of its roundings 2^-24: sums of a product are made of parts that are added
    at the end, and a transform of N points has log2 N of them twice. Factors of 16 bits are rounded by half a unit at
    most, two for each of four products, which would be 8 half units if none of them cancelled; half of that.
    """
    single = 2**-24 * (6 + 2 * math.log2(2 * length + 1))
    return single if dtype == torch.float32 else single + 4 * torch.finfo(dtype).eps / 2


def run(inputs, backend="cpu"):
    return residual_block_(inputs.state.clone(), *inputs.others, backend=backend)


@each_backend
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_formulas_in_float64(shape, backend, dtype):
    for labels, steps in (("none", "shared"), ("shared", "per sample"), ("per sample", "shared")):
        inputs = residual_block_inputs(shape, dtype, CPU, labels=labels, steps=steps)
        got = run(inputs, backend)
        assert got.dtype == torch.float32
        assert error(got, inputs) < limit(shape[-1], dtype)


@cpu_dtypes
def test_the_papers_size(dtype):
    inputs = residual_block_inputs((1, 256, 256, 1000), dtype, CPU)
    assert error(run(inputs), inputs) < limit(1000, dtype)


@needs_extension
def test_odd_channels():
    inputs = residual_block_inputs((2, 7, 3, 33), torch.float32, CPU)
    assert error(run(inputs), inputs) < limit(33, torch.float32)
    with pytest.raises(BackendUnavailableError, match="does not multiply bfloat16|an even number of channels, not 7"):
        run(residual_block_inputs((2, 7, 3, 33), torch.bfloat16, CPU))


@each_backend
def test_filters_of_longer_signals(backend, dtype):
    """A shorter signal is the longer one between zeros, as the convolution sees it: the lags that it can see."""
    inputs = residual_block_inputs((2, 8, 8, 100), dtype, CPU)
    for length in (99, 65, 7, 1):
        shorter = inputs._replace(state=inputs.state[..., :length].contiguous())
        assert error(run(shorter, backend), shorter) < limit(100, dtype)


@needs_extension
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set(capability):
    code = """
import torch
from test_residual_block import error, run
from tgdp_fast.lab.cases.residual_block import residual_block_inputs
from tgdp_fast.ops.residual_block import multiplies_bf16
for dtype in (torch.float32, torch.bfloat16)[:1 + multiplies_bf16()]:
    inputs = residual_block_inputs((2, 34, 20, 129), dtype, torch.device("cpu"))
    print(error(run(inputs), inputs))
"""
    errors = [float(line) for line in run_with(code, TGDP_CPU_CAPABILITY=capability).split()]
    assert errors[0] < limit(129, torch.float32)
    assert all(value < limit(129, torch.bfloat16) for value in errors)


@cpu_dtypes
def test_bits_depend_neither_on_the_batch_nor_on_threads(dtype):
    # At this size several samples pass together, and the last ones are fewer.
    inputs = residual_block_inputs((9, 64, 64, 900), dtype, CPU, steps="per sample")
    state, steps, labels, weights = inputs
    together = run(inputs)
    for rows in (slice(0, 1), slice(3, 9), slice(8, 9)):
        alone = residual_block_(state[rows].clone(), steps[rows], labels[rows], weights, backend="cpu")
        assert torch.equal(alone, together[rows])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(run(inputs), together)
    finally:
        torch.set_num_threads(threads)


@cpu_dtypes
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stays_in_its_sample(dtype, value):
    inputs = residual_block_inputs((3, 8, 6, 70), dtype, CPU)
    expected = run(inputs)
    inputs.state[1, 3, 40] = value
    got = run(inputs)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], expected[[0, 2]])


@needs_extension
def test_the_gate_has_its_limits():
    """LayerNorm's bias drives tanh and sigmoid to where they are constant, and to where they vanish."""
    inputs = residual_block_inputs((1, 4, 4, 9), torch.float32, CPU)
    second = inputs.weights.second
    for values in ((60.0, 60.0), (-60.0, 60.0), (60.0, -60.0), (-300.0, -300.0), (1e-4, 0.0)):
        bias = torch.tensor(values).repeat_interleave(4)
        layer = second._replace(norm_weight=torch.full((8,), 1e-3), norm_bias=bias)
        changed = inputs._replace(weights=inputs.weights._replace(second=layer))
        exact = residual_block_reference_(*changed.double())
        torch.testing.assert_close(run(changed).double(), exact, rtol=0, atol=3e-6)


@each_backend
@pytest.mark.usefixtures("poisoned")
def test_in_place_and_nothing_else(backend, dtype):
    inputs = residual_block_inputs((2, 6, 4, 35), dtype, CPU, steps="per sample")
    state, steps, labels, weights = inputs
    changed = state.clone()
    layers = [tensor for layer in (weights.first, weights.second) for tensor in (*layer.filters, *layer[1:-1])]
    tensors = [steps, labels, weights.convolution, weights.output, weights.output_bias, *layers]
    held = [tensor for tensor in tensors if tensor is not None]
    before = [tensor.clone() for tensor in held]
    assert residual_block_(changed, steps, labels, weights, backend=backend) is changed
    assert error(changed, inputs) < limit(35, dtype)
    for tensor, value in zip(held, before, strict=True):
        assert torch.equal(tensor, value)
    # Rows that do not lie side by side.
    spread = torch.stack([labels, torch.full_like(labels, math.nan)], dim=2)[..., 0]
    apart = torch.stack([steps, torch.full_like(steps, math.nan)], dim=1)[:, 0]
    turned = weights._replace(output=weights.output.T.contiguous().T)
    again = residual_block_(state.clone(), apart, spread, turned, backend=backend)
    assert torch.equal(again, changed)


@needs_extension
def test_no_samples():
    inputs = residual_block_inputs((0, 6, 4, 35), torch.float32, CPU)
    assert run(inputs).shape == (0, 10, 35)


@needs_extension
def test_compiled_code_and_the_schema():
    inputs = residual_block_inputs((2, 6, 4, 35), torch.float32, CPU)
    state, steps, labels, weights = inputs
    function = torch.compile(lambda state: residual_block_(state, steps, labels, weights), fullgraph=True)
    with torch.inference_mode():
        assert torch.equal(function(state.clone()), run(inputs))
    first, second = ([*layer.filters[1:], *layer[1:5]] for layer in (weights.first, weights.second))
    arguments = (state, steps, labels, weights.convolution, first, 1e-5, second, 1e-5, weights.output)
    torch.library.opcheck(torch.ops.tgdp_fast.residual_block_.default, (*arguments, weights.output_bias))


@needs_extension
def test_refusals():
    inputs = residual_block_inputs((1, 4, 4, 20), torch.float32, CPU)

    def refused(match, inputs, backend="cpu"):
        with pytest.raises(BackendUnavailableError, match=match):
            run(inputs, backend)

    refused("multiplies float32 and bfloat16, not float16", residual_block_inputs((1, 4, 4, 20), torch.float16, CPU))
    refused("filters of up to 1024 samples", residual_block_inputs((1, 2, 2, 1025), torch.float32, CPU))
    weights = inputs.weights
    layer = weights.second._replace(filters=weights.second.filters.without_taps())
    dropped = inputs._replace(weights=weights._replace(second=layer))
    assert torch.equal(run(dropped), run(inputs))
    refused("the taps were dropped", dropped, "reference")
    with pytest.raises(BackendUnavailableError, match="no transform of torch.func"):
        torch.func.vmap(lambda state: run(inputs._replace(state=state)))(inputs.state[None])


def test_errors():
    inputs = residual_block_inputs((2, 4, 3, 20), torch.float32, CPU)
    state, steps, labels, weights = inputs

    def wrong(match, **changes):
        with pytest.raises(ValueError, match=match):
            residual_block_(*inputs._replace(**changes))

    def wrong_weights(match, **changes):
        wrong(match, weights=weights._replace(**changes))

    wrong(r"state must be contiguous, of shape \[B, 7, L\].*got shape \(2, 8, 20\)", state=torch.zeros(2, 8, 20))
    wrong(r"state must be contiguous.* strides \(280, 40, 2\)", state=torch.zeros(2, 7, 40)[..., ::2])
    wrong("state must be float32 on cpu, got torch.float64", state=state.double())
    wrong(r"step_bias must have shape \[2 or 1, 3, 8\], got \(3, 3, 8\)", step_bias=torch.zeros(3, 3, 8))
    wrong(r"label_bias must have shape \[2 or 1, 8\], got \(8,\)", label_bias=torch.zeros(8))
    wrong("label_bias must be float32 on cpu, got torch.float32 on meta", label_bias=labels.to("meta"))
    wrong("weights must be ResidualBlockWeights, got tuple", weights=tuple(weights))
    wrong_weights("weights.output must be float32, bfloat16 or float16, got torch.int64", output=weights.output.long())
    wrong_weights(r"weights.convolution must be torch.float32 of shape \(8, 12\)", convolution=torch.zeros(8, 11))
    wrong_weights("weights.convolution must be torch.float32", convolution=weights.convolution.half())
    layer = weights.first._replace(norm_bias=torch.zeros(7))
    wrong_weights(r"weights.first.norm_bias must be torch.float32 of shape \(8,\).*\(7,\)", first=layer)
    shorter = residual_block_inputs((2, 4, 3, 19), torch.float32, CPU).weights.second
    wrong_weights(r"weights.second.filters must be for 8 channels and signals of 20 .*length 19", second=shorter)
