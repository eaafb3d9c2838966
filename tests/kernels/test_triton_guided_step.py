"""The Triton guided step and its noise: numerics in the interpreter, against the definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from native import run_with
from solver_step import guided_step
from test_guided_step import COMMON, MATRICES, inputs, run_oracle
from test_noise import KNOWN_ANSWERS, MASK, normal_oracle, philox_oracle
from tolerances import FEW_OPERATIONS, allowed
from triton_interpreter import Far, compiled, interpreted, run_interpreted, run_program

from tgdp_fast.lab import validate
from tgdp_fast.lab.cases import CHECKS
from tgdp_fast.ops import BackendUnavailableError, SolverStep, noise
from tgdp_fast.runtime.precision import PRECISIONS

triton = pytest.importorskip("triton", reason="Triton is not installed; run `pip install triton`")
tl = triton.language

from tgdp_fast.kernels import philox  # noqa: E402
from tgdp_fast.kernels.guided_step import guided_step_kernel, locate  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EDGES = [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0x80000001, MASK - 1, MASK]


@pytest.mark.slow(ci=True)
@compiled
def test_in_the_interpreter():
    # What follows, and the contract that all backends share.
    assert run_interpreted("test_triton_guided_step.py", "test_guided_step.py") > 100


@compiled
def test_nothing_loads_triton_before_the_first_call():
    code = "import sys, tgdp_fast.ops; print(any(name.split('.')[0] == 'triton' for name in sys.modules))"
    assert run_with(code, TRITON_INTERPRET="1").strip() == "False"


# noise ------------------------------------------------------------------------------------------------------


@triton.jit
def _words(output, counters, k0, k1, count: tl.constexpr):
    rows = tl.arange(0, count)
    c0 = tl.load(counters + 4 * rows).to(tl.uint32)
    c1 = tl.load(counters + 4 * rows + 1).to(tl.uint32)
    c2 = tl.load(counters + 4 * rows + 2).to(tl.uint32)
    c3 = tl.load(counters + 4 * rows + 3).to(tl.uint32)
    w0, w1, w2, w3 = philox.philox4x32(c0, c1, c2, c3, k0.to(tl.uint32), k1.to(tl.uint32))
    tl.store(output + 4 * rows, w0.to(tl.int64))
    tl.store(output + 4 * rows + 1, w1.to(tl.int64))
    tl.store(output + 4 * rows + 2, w2.to(tl.int64))
    tl.store(output + 4 * rows + 3, w3.to(tl.int64))


@triton.jit
def _functions(logarithm, cosine, sine, u, theta, count: tl.constexpr):
    lanes = tl.arange(0, count)
    tl.store(logarithm + lanes, philox.log_positive(tl.load(u + lanes)))
    c, s = philox.cos_and_sin(tl.load(theta + lanes))
    tl.store(cosine + lanes, c)
    tl.store(sine + lanes, s)


@triton.jit
def _pairs(output, radius_words, angle_words, count: tl.constexpr):
    lanes = tl.arange(0, count)
    first, second = philox.box_muller(
        tl.load(radius_words + lanes).to(tl.uint32), tl.load(angle_words + lanes).to(tl.uint32)
    )
    tl.store(output + 2 * lanes, first)
    tl.store(output + 2 * lanes + 1, second)


@interpreted
@pytest.mark.parametrize("key", [(0, 0), (MASK, 0x80000000), (0xA4093822, 0x299F31D0)])
def test_words_are_those_of_the_specification(key):
    grid = torch.cartesian_prod(torch.tensor(EDGES), torch.tensor(EDGES))
    counters = torch.stack([grid[:, 0], grid[:, 1], grid[:, 1].flip(0), grid[:, 0].roll(5)], dim=1)
    counters[:3] = torch.tensor([counter for counter, _, _ in KNOWN_ANSWERS])
    got = torch.full_like(counters, -1)
    _words[(1,)](got, counters, *key, count=len(counters))
    assert got.tolist() == [list(philox_oracle(tuple(row), key)) for row in counters.tolist()]
    assert torch.equal(got, torch.stack(noise.philox4x32(tuple(counters.unbind(1)), key), dim=1))
    for row, (_, known_key, answer) in enumerate(KNOWN_ANSWERS):
        if known_key == key:
            assert tuple(got[row].tolist()) == answer


@interpreted
def test_elementary_functions_are_accurate_to_a_unit_in_the_last_place():
    count = 1 << 17
    generator = torch.Generator().manual_seed(1)
    spread = torch.rand(count, generator=generator, dtype=torch.float64)
    # All of [2^-33, 1] in the logarithm, half of it next to 1; all of [0, 2 pi] and the neighbours of its quarters.
    u = torch.where(torch.arange(count) % 2 == 0, 2.0 ** (-33 * spread), 1 - spread / 64).float()
    u[:2] = torch.tensor([2.0**-33, 1.0])
    theta = (2 * np.pi * spread).float()
    quarters = torch.arange(5) * np.pi / 2
    theta[:15] = torch.cat([quarters, quarters * (1 - 1e-7), quarters * (1 + 1e-7)]).float()
    theta.clamp_(0, float(np.float32(2 * np.pi)))
    got = [torch.full((count,), float("nan")) for _ in range(3)]
    _functions[(1,)](*got, u, theta, count=count)
    for value, exact in zip(got, (u.double().log(), theta.double().cos(), theta.double().sin()), strict=True):
        error = (value.double() - exact).abs().numpy()
        assert (error <= np.spacing(np.abs(exact.numpy()).astype(np.float32))).all()
    assert got[0][1] == 0.0


@interpreted
def test_pairs_at_extreme_words():
    edges = torch.cartesian_prod(torch.tensor(EDGES), torch.tensor(EDGES))
    got = torch.full((len(edges), 2), float("nan"))
    _pairs[(1,)](got, edges[:, 0].contiguous(), edges[:, 1].contiguous(), count=len(edges))
    expected = torch.stack(noise._box_muller(edges[:, 0], edges[:, 1]), dim=1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert got.abs().max() > 6.7


@interpreted
@pytest.mark.parametrize(
    "shape",
    [
        *[(2050, 1), (7, 3), (5, 511), (3, 513), (3, 1001)],
        *[(700, 2), (33, 6), (3, 1022), (3, 1026)],
        *[(300, 4), (129, 12), (3, 1020), (3, 1024), (2, 4100)],
    ],
)
def test_noise_is_the_noise_function(shape):
    # Samples of one, two and many to a tile; by elements, by pairs and by groups.
    zeros = torch.zeros(shape)
    index = torch.arange(shape[0]) * 3 - (1 << 35)
    got = guided_step(
        zeros, zeros, matrix=((0.0, 0.0),), noise_scale=1.0, seed=(1 << 63) + 9, sample_index=index, evaluation=MASK,
        backend="triton",
    )  # fmt: skip
    z = noise.normal((1 << 63) + 9, index, shape[1], MASK)
    torch.testing.assert_close(got.x_next, z, rtol=0, atol=1e-6)
    got = guided_step(zeros, zeros, matrix=((0.0, 0.0),), noise_scale=1.0, seed=7, evaluation=1, backend="triton")
    torch.testing.assert_close(got.x_next, noise.normal(7, torch.arange(shape[0]), shape[1], 1), rtol=0, atol=1e-6)


# addresses --------------------------------------------------------------------------------------------------


@triton.jit
def _located(sample, position, start, size, count: tl.constexpr, long: tl.constexpr):
    lanes = tl.arange(0, count)
    found, place = locate(start, lanes, size, long)
    tl.store(sample + lanes, found)
    tl.store(position + lanes, place)


@interpreted
@pytest.mark.parametrize("size", [1, 2, 3, 63, 64, 65, 1000, (1 << 31) - 1, 1 << 31, 3_000_000_001, 1 << 34])
@pytest.mark.parametrize("start", [0, 64, (1 << 31) - 64, 1 << 31, (1 << 34) - 128, 1 << 40])
def test_positions_beyond_32_bits(start, size):
    sample, position = torch.full((64,), -1), torch.full((64,), -1)
    # As in the kernel, where the program's number is 64 bits wide.
    _located[(1,)](sample, position, start, size, count=64, long=size >= 64)
    expected = [divmod(start + lane, size) for lane in range(64)]
    assert list(zip(sample.tolist(), position.tolist(), strict=True)) == expected


@interpreted
@pytest.mark.parametrize("normals", [4, 2, 1])
def test_addresses_beyond_32_bits(monkeypatch, normals):
    # One program in the middle of three samples of over 2^31 elements; of each tensor only what it touches is there.
    block, size = 1024, 3_000_000_000 + normals
    program = (size + 500) // block
    start, elements = program * block, 3 * size
    assert start < size < start + block
    x, epsilon, gradient, history = inputs(1, (block,), torch.float32)
    # With a margin on both sides, in which nothing may be written.
    outputs = [torch.full((3 * block,), float("nan")) for _ in range(3)]
    pointers = [Far(output, start - block) for output in outputs]
    pointers += [Far(tensor, start) for tensor in (x, epsilon, gradient, history[0])]
    index = torch.tensor([5, (1 << 40) + 1, -9])
    step = SolverStep(((0.9, 0.2, -0.3), (0.1, 0.0, 0.7)), 0.4, 0.7, 0.6, 0.8)
    run_program(
        monkeypatch, guided_step_kernel, program, *pointers, index, elements, size, step, 3, -(1 << 31), 5,
        normals=normals, long=True, block=block,
    )  # fmt: skip
    z = np.empty(block)
    for lane in range(block):
        sample, element = divmod(start + lane, size)
        z[lane] = normal_oracle((1 << 63) + 3, int(index[sample]), element, 5)[element % 4]
    x, epsilon, gradient, previous = (t.double().numpy() for t in (x, epsilon, gradient, history[0]))
    guided = epsilon - 0.7 * gradient
    expected = [
        0.9 * x + 0.2 * previous - 0.3 * guided + 0.4 * z,
        0.1 * x + 0.7 * guided,
        (x - 0.8 * guided) / 0.6,
    ]
    for output, exact in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(output[block : 2 * block].numpy(), exact, rtol=0, atol=1e-5)
        assert torch.isnan(output[:block]).all()
        assert torch.isnan(output[2 * block :]).all()


# numerics and contract --------------------------------------------------------------------------------------


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("clamp", [None, (-1.0, 1.0)])
@pytest.mark.parametrize("slots", [0, 1, 2])
@pytest.mark.parametrize("network_dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_error_is_at_most_twice_that_of_the_reference(x_dtype, network_dtype, slots, clamp):
    x, epsilon, gradient, history = inputs(slots, (29, 37))
    x, history = x.to(x_dtype), history.to(x_dtype)
    epsilon, gradient = epsilon.to(network_dtype), gradient.to(network_dtype)
    assert torch.isnan(torch.empty(1000)).all()
    keywords = COMMON | {"matrix": MATRICES[slots], "clamp": clamp}
    expected = run_oracle(x, epsilon, gradient, history, **keywords)
    got = guided_step(x, epsilon, gradient, history, backend="triton", **keywords)
    twin = guided_step(x, epsilon, gradient, history, backend="reference", **keywords)
    for value, reference, exact in zip(got, twin, expected, strict=True):
        if value is None:
            assert slots == 0
            continue
        assert value.dtype == x_dtype
        error, yardstick = (np.abs(t.double().numpy() - exact).max() for t in (value, reference))
        assert error <= allowed(yardstick, FEW_OPERATIONS * np.abs(exact).max())


@interpreted
@pytest.mark.parametrize("precision", PRECISIONS)
def test_validates(precision):
    rows = list(validate.rows_of("guided_step", "triton", precision))
    assert len(rows) == len(CHECKS["guided_step"][0])
    assert validate.failures(rows) == []
    assert {row["verdict"] for row in rows} == {"passed"}


@interpreted
@pytest.mark.parametrize("history_dtype", [*DTYPES, torch.float64])
def test_history_and_gradient_may_have_other_dtypes(history_dtype):
    x, epsilon, gradient, history = (t.float() for t in inputs(2, (9, 31)))
    history, gradient = history.to(history_dtype), gradient.double()
    keywords = COMMON | {"matrix": MATRICES[2]}
    for a, b in zip(
        guided_step(x, epsilon, gradient, history, backend="triton", **keywords),
        guided_step(x, epsilon, gradient, history, backend="reference", **keywords),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@interpreted
def test_gradient_is_not_read_without_weight():
    x, epsilon, _, _ = (t.float() for t in inputs(0))
    bad = torch.full_like(x, float("nan"))
    keywords = COMMON | {"matrix": MATRICES[0], "guidance_weight": 0.0, "backend": "triton"}
    got, clean = guided_step(x, epsilon, bad, **keywords), guided_step(x, epsilon, **keywords)
    assert torch.equal(got.x_next, clean.x_next)
    assert torch.isfinite(got.x_next).all()


@interpreted
@pytest.mark.parametrize("size", [3, 6, 12, 1001, 1026, 1028])
def test_results_do_not_depend_on_the_batch(size):
    x, epsilon, gradient, history = inputs(1, (13, size), torch.float32)
    keywords = COMMON | {"matrix": MATRICES[1], "clamp": (-1.0, 1.0), "backend": "triton"}
    whole = guided_step(x, epsilon, gradient, history, **keywords)
    for rows in (slice(0, 1), slice(4, 11), slice(12, 13)):
        part = guided_step(
            *(tensor[rows] for tensor in (x, epsilon, gradient)),
            history[:, rows],
            sample_index=torch.arange(rows.start, rows.stop),
            **keywords,
        )
        assert torch.equal(part.x_next, whole.x_next[rows])
        assert torch.equal(part.history_next, whole.history_next[:, rows])
        assert torch.equal(part.x0, whole.x0[rows])


@interpreted
def test_refusals():
    x, epsilon, _, _ = inputs(0)
    with pytest.raises(BackendUnavailableError, match="not float64"):
        guided_step(x, epsilon, matrix=MATRICES[0], backend="triton")
    with pytest.raises(BackendUnavailableError, match="at most 2 history slots, not 3"):
        guided_step(x.float(), epsilon, matrix=np.zeros((4, 5)), backend="triton")
    large = torch.zeros(1).expand(1, (1 << 34) + 1)
    with pytest.raises(ValueError, match=r"at most 2\^34 elements"):
        guided_step(large, large, matrix=MATRICES[0], noise_scale=1.0, backend="triton")
    with pytest.raises(BackendUnavailableError, match="the inputs are on meta"):
        guided_step(x.float().to("meta"), epsilon.to("meta"), matrix=MATRICES[0], backend="triton")


@interpreted
def test_inference_mode_and_registration():
    x, epsilon, gradient, history = (t.float() for t in inputs(2))
    keywords = COMMON | {"matrix": MATRICES[2], "backend": "triton"}
    expected = guided_step(x, epsilon, gradient, history, **keywords)
    with torch.inference_mode():
        for a, b in zip(guided_step(x, epsilon, gradient, history, **keywords), expected, strict=True):
            assert torch.equal(a, b)
    operator = torch.ops.tgdp_fast.guided_step_triton.default
    numbers = [0.4, 0.7, 0.6, 0.8, *(entry for row in MATRICES[2] for entry in row)]
    tensors = x, epsilon, gradient, history, torch.arange(5)
    torch.library.opcheck(operator, (*tensors, numbers, [-1.0, 1.0], [1, 2, 3]))
    torch.library.opcheck(operator, (x.mT, epsilon.mT, None, None, None, numbers, None, [1, 2, 3]))


@interpreted
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_without_graph_breaks_with_triton(compiler):
    def step(x, epsilon, gradient, history, k):
        return guided_step(
            x, epsilon, gradient, history, matrix=MATRICES[1], noise_scale=0.4, guidance_weight=0.1 * k, alpha=0.6,
            sigma=0.8, clamp=(-1.0, 1.0), seed=(1 << 63) + 3, evaluation=k, backend="triton",
        )  # fmt: skip

    arguments = [t.float() for t in inputs(1)]
    torch._dynamo.reset()
    compiled_step = torch.compile(step, fullgraph=True, backend=compiler)
    for k in (1, 2, 3):
        for value, expected in zip(compiled_step(*arguments, k), step(*arguments, k), strict=True):
            assert torch.equal(value, expected)
    torch._dynamo.reset()
