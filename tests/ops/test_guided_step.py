"""guided_step against the formula in float64 numpy, and its contract."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from solver_step import guided_step, guided_step_reference
from tolerances import FEW_OPERATIONS, allowed
from triton_interpreter import interpreted

from tgdp_fast.ops import BackendUnavailableError, noise
from tgdp_fast.runtime import native

MATRICES = {
    0: ((0.9, -0.3),),
    1: ((0.9, 0.2, -0.3), (0.1, 0.0, 0.7)),
    2: ((0.9, 0.2, 0.05, -0.3), (0.0, 0.0, 0.0, 1.0), (0.0, 1.0, 0.0, 0.0)),
}
COMMON = {
    "guidance_weight": 0.7,
    "alpha": 0.6,
    "sigma": 0.8,
    "noise_scale": 0.4,
    "seed": (1 << 63) + 3,
    "evaluation": 5,
}


needs_native = pytest.mark.skipif(native.CPU_MISSING is not None, reason=str(native.CPU_MISSING))
each_backend = pytest.mark.parametrize(
    "backend",
    ["reference", pytest.param("cpu", marks=needs_native), pytest.param("triton", marks=interpreted)],
)


def oracle(x, epsilon, gradient, history, *, matrix, noise_scale, guidance_weight, alpha, sigma, clamp, z):
    """The three lines of the definition, in float64 numpy, with x0 always put back into epsilon."""
    guided = epsilon - guidance_weight * gradient
    x0 = (x - sigma * guided) / alpha
    if clamp is not None:
        x0 = np.clip(x0, *clamp)
        guided = (x - alpha * x0) / sigma
    out = np.tensordot(np.array(matrix), np.stack([x, *history, guided]), axes=1)
    out[0] += noise_scale * z
    return out[0], out[1:], x0


def inputs(slots, shape=(5, 3, 7), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return draw(*shape), draw(*shape), draw(*shape), draw(slots, *shape)


def run_oracle(x, epsilon, gradient, history, *, sample_index=None, seed=0, evaluation=0, **keywords):
    batch, size = x.shape[0], int(np.prod(x.shape[1:]))
    index = torch.arange(batch) if sample_index is None else sample_index
    z = noise.normal(seed, index, size, evaluation).double().numpy().reshape(x.shape)
    arrays = [t.double().numpy() for t in (x, epsilon, gradient, history)]
    return oracle(*arrays, z=z, **({"clamp": None} | keywords))


@pytest.mark.parametrize("clamp", [None, (-0.9, 1.1)])
@pytest.mark.parametrize("slots", [0, 1, 2])
def test_matches_the_definition_in_float64(slots, clamp):
    x, epsilon, gradient, history = inputs(slots)
    keywords = COMMON | {"matrix": MATRICES[slots], "clamp": clamp}
    got = guided_step(x, epsilon, gradient, history, **keywords)
    x_next, history_next, x0 = run_oracle(x, epsilon, gradient, history, **keywords)
    # A dozen float64 operations on numbers of order 10: below 1e-13.
    np.testing.assert_allclose(got.x_next.numpy(), x_next, rtol=0, atol=1e-13)
    np.testing.assert_allclose(got.x0.numpy(), x0, rtol=0, atol=1e-13)
    if slots:
        np.testing.assert_allclose(got.history_next.numpy(), history_next, rtol=0, atol=1e-13)
    else:
        assert got.history_next is None
    if clamp is not None:
        assert ((got.x0 == clamp[0]) | (got.x0 == clamp[1])).any()
        assert ((got.x0 > clamp[0]) & (got.x0 < clamp[1])).any()


@each_backend
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("network_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_low_precision_inputs_use_float32_arithmetic(x_dtype, network_dtype, backend):
    x, epsilon, gradient, history = inputs(2)
    x, history = x.to(x_dtype), history.to(x_dtype)
    epsilon, gradient = epsilon.to(network_dtype), gradient.to(network_dtype)
    keywords = COMMON | {"matrix": MATRICES[2], "clamp": (-1.0, 1.0)}
    got = guided_step(x, epsilon, gradient, history, backend=backend, **keywords)
    expected = run_oracle(x, epsilon, gradient, history, **keywords)
    # float32: intermediate values below 8, at most ten roundings of 2^-24 relative, and the clamp divides by sigma:
    # 1e-5. Then one rounding to the output's dtype, of half an epsilon relative.
    half_ulp = 0.0 if x_dtype == torch.float32 else torch.finfo(x_dtype).eps / 2
    for value, reference in zip(got, expected, strict=True):
        assert value.dtype == x_dtype
        np.testing.assert_allclose(value.double().numpy(), reference, rtol=half_ulp, atol=1e-5)


def test_guidance_is_subtracted_from_epsilon():
    # The sign and factor of the noise-prediction form: x_0 moves along +gradient by weight * sigma / alpha.
    x, epsilon, gradient, _ = inputs(0)
    plain = guided_step(x, epsilon, matrix=MATRICES[0], alpha=0.6, sigma=0.8)
    guided = guided_step(x, epsilon, gradient, matrix=MATRICES[0], alpha=0.6, sigma=0.8, guidance_weight=0.5)
    torch.testing.assert_close(guided.x0 - plain.x0, 0.5 * 0.8 / 0.6 * gradient, rtol=0, atol=1e-13)


@each_backend
def test_unclamped_elements_keep_epsilon_to_the_bit(backend):
    x, epsilon, gradient, _ = (t.float() for t in inputs(0))
    keywords = {"backend": backend, "matrix": ((0.0, 1.0),), "alpha": 1.0, "sigma": 1e-4, "guidance_weight": 0.3}
    plain = guided_step(x, epsilon, gradient, **keywords)
    clamped = guided_step(x, epsilon, gradient, clamp=(-1.0, 1.0), **keywords)
    inside = plain.x0.abs() < 1
    assert 0 < inside.sum() < inside.numel()
    assert torch.equal(clamped.x_next[inside], plain.x_next[inside])
    assert (clamped.x_next[~inside] != plain.x_next[~inside]).all()


@each_backend
def test_clamp_at_vanishing_alpha_and_sigma(backend):
    x, epsilon, _, _ = (t.float() for t in inputs(0))
    clamp = (-1.0, 1.0)
    # alpha so small that the unclamped x0 overflows float32: the clamped step is still finite and exact.
    far = guided_step(x, epsilon, matrix=((0.0, 1.0),), alpha=1e-42, sigma=1.0, clamp=clamp, backend=backend)
    assert far.x0.abs().max() <= 1
    torch.testing.assert_close(far.x_next, x, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="clamp needs sigma > 0"):
        guided_step(x, epsilon, matrix=MATRICES[0], alpha=1.0, sigma=0.0, clamp=clamp, backend=backend)
    assert torch.equal(guided_step(x, epsilon, matrix=MATRICES[0], backend=backend).x0, x)


@each_backend
def test_nan_survives_the_clamp(backend):
    x, epsilon, _, _ = (t.float() for t in inputs(0))
    epsilon[1, 2, 3] = float("nan")
    got = guided_step(x, epsilon, matrix=MATRICES[0], alpha=0.6, sigma=0.8, clamp=(-1.0, 1.0), backend=backend)
    assert torch.isnan(got.x_next[1, 2, 3])
    assert torch.isnan(got.x0[1, 2, 3])
    assert int(torch.isnan(got.x_next).sum()) == 1


@each_backend
def test_missing_history_is_zeros(backend):
    x, epsilon, gradient, history = (t.float() for t in inputs(2))
    keywords = COMMON | {"matrix": MATRICES[2], "backend": backend}
    for a, b in zip(
        guided_step(x, epsilon, gradient, torch.zeros_like(history), **keywords),
        guided_step(x, epsilon, gradient, **keywords),
        strict=True,
    ):
        assert torch.equal(a, b)


@each_backend
def test_noise_belongs_to_the_sample_and_not_to_the_batch(backend):
    x, epsilon, gradient, history = (t.float() for t in inputs(1))
    keywords = COMMON | {"matrix": MATRICES[1], "backend": backend}
    whole = guided_step(x, epsilon, gradient, history, **keywords)
    rows = torch.tensor([4, 1])
    part = guided_step(x[rows], epsilon[rows], gradient[rows], history[:, rows], sample_index=rows, **keywords)
    assert torch.equal(part.x_next, whole.x_next[rows])
    assert torch.equal(part.history_next, whole.history_next[:, rows])
    shifted = guided_step(x, epsilon, gradient, history, sample_index=torch.arange(5) + 1, **keywords)
    assert not torch.isclose(shifted.x_next, whole.x_next).all(dim=(1, 2)).any()
    # Only the state row takes noise.
    assert torch.equal(shifted.history_next, whole.history_next)
    quiet = guided_step(x, epsilon, gradient, history, **(keywords | {"noise_scale": 0.0}))
    z = noise.normal(keywords["seed"], torch.arange(5), 21, keywords["evaluation"]).view_as(x)
    # Differences of numbers below 8: a few units of 2^-22.
    torch.testing.assert_close(whole.x_next - quiet.x_next, 0.4 * z, rtol=0, atol=2e-6)


@each_backend
def test_slices_and_permutations(backend):
    x, epsilon, gradient, history = (t.float() for t in inputs(1))
    keywords = COMMON | {"matrix": MATRICES[1], "clamp": (-1.0, 1.0), "backend": backend}
    expected = guided_step(x, epsilon, gradient, history, **keywords)

    def scatter(tensor):
        # The last two dimensions swapped in memory and every second element of a NaN-filled buffer.
        shape = (*tensor.shape[:-2], tensor.shape[-1], 2 * tensor.shape[-2])
        view = torch.full(shape, float("nan"), dtype=tensor.dtype)[..., ::2].transpose(-1, -2)
        view.copy_(tensor)
        assert not view.is_contiguous()
        return view

    given = [scatter(t) for t in (x, epsilon, gradient, history)]
    before = [t.clone() for t in given]
    index = torch.arange(10)[::2] // 2
    got = guided_step(*given, sample_index=index, **keywords)
    for value, reference in zip(got, expected, strict=True):
        assert torch.equal(value, reference)
        assert value.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(0, 3), (0,), (1,), (1, 1), (3, 0), (2, 2, 2), (300, 1), (129, 17), (4, 64), (3, 85), (1, 257), (2, 256)]
)
def test_batches_and_shapes(shape, dtype, backend):
    # Also: every element is written, at whole vectors and blocks, short of them and beyond.
    x, epsilon, gradient, history = inputs(1, shape, dtype)
    keywords = COMMON | {"matrix": MATRICES[1]}
    got = guided_step(x, epsilon, gradient, history, backend=backend, **keywords)
    assert got.x_next.shape == got.x0.shape == shape
    assert got.history_next.shape == (1, *shape)
    expected = run_oracle(x, epsilon, gradient, history, **keywords)
    half_ulp = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    for value, reference in zip(got, expected, strict=True):
        assert value.dtype == dtype
        np.testing.assert_allclose(value.double().numpy(), reference, rtol=half_ulp, atol=1e-5)


def test_outputs_are_new_and_carry_no_graph():
    x, epsilon, gradient, _ = inputs(0)
    epsilon.requires_grad_()
    got = guided_step(x, epsilon, gradient, matrix=((1.0, 0.0),), alpha=1.0, sigma=0.0)
    assert torch.equal(got.x_next, x)
    for value in (got.x_next, got.x0):
        assert not value.requires_grad
        assert value.untyped_storage().data_ptr() not in {x.data_ptr(), epsilon.data_ptr()}
    with torch.inference_mode():
        again = guided_step(x, epsilon, gradient, matrix=((1.0, 0.0),))
    assert torch.equal(again.x_next, x)


def test_matrix_as_list_and_numpy_give_the_same_bits():
    x, epsilon, gradient, history = inputs(2)
    results = [
        guided_step(x, epsilon, gradient, history, matrix=matrix, **COMMON).x_next
        for matrix in (MATRICES[2], [list(row) for row in MATRICES[2]], np.array(MATRICES[2]))
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_reference_twin_is_what_the_operator_runs():
    x, epsilon, gradient, history = inputs(2)
    keywords = COMMON | {"matrix": MATRICES[2]}
    for a, b in zip(
        guided_step(x, epsilon, gradient, history, backend="reference", **keywords),
        guided_step_reference(x, epsilon, gradient, history, **keywords),
        strict=True,
    ):
        assert torch.equal(a, b)
    with pytest.raises(BackendUnavailableError):
        guided_step(x, epsilon, gradient, history, backend="cuda", **keywords)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"epsilon": torch.zeros(5, 4)}, r"epsilon must have shape \(5, 3\).*got \(5, 4\)"),
        ({"epsilon": torch.zeros(5, 3, dtype=torch.int64)}, "epsilon must be float16.*got torch.int64"),
        ({"gradient": torch.zeros(5, 1)}, r"gradient must have shape \(5, 3\)"),
        ({"gradient": None}, "gradient must be given when guidance_weight is not 0"),
        ({"history": torch.zeros(2, 5, 3)}, r"history must have shape \(1, 5, 3\).*1 history.*got \(2, 5, 3\)"),
        ({"epsilon": torch.zeros(5, 3, device="meta")}, "epsilon must be on the device of x, cpu, got meta"),
        ({"x": torch.tensor(1.0)}, "x must have shape"),
        ({"matrix": ((1.0, 2.0), (1.0, 2.0))}, r"matrix must have shape \(1 \+ H, .*2 rows of lengths \[2, 2\]"),
        ({"matrix": (1.0, 2.0)}, "matrix must be 2-D"),
        ({"matrix": ()}, "matrix must have shape"),
        ({"matrix": torch.ones(2, 3)}, "got a tensor; pass matrix.tolist"),
        ({"matrix": ((1.0, 0.0, float("nan")), (0.0, 0.0, 0.0))}, "matrix entries must be finite"),
        ({"alpha": 0.0}, "alpha must be > 0"),
        ({"alpha": -1.0}, "alpha must be finite and in"),
        ({"sigma": -0.1}, "sigma must be finite and in"),
        ({"noise_scale": float("inf")}, "noise_scale must be finite"),
        ({"guidance_weight": float("nan")}, "guidance_weight must be finite"),
        ({"clamp": (1.0, -1.0)}, "clamp must have lo <= hi"),
        ({"clamp": (1.0,)}, "clamp must be .lo, hi."),
        ({"sample_index": torch.arange(4)}, r"sample_index must be int64 of shape \[5\]"),
        ({"sample_index": torch.arange(5, dtype=torch.int32)}, "sample_index must be int64"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"evaluation": 1 << 32}, r"evaluation must be below 2\^32"),
        ({"backend": "gpu"}, "backend must be one of"),
    ],
)
def test_errors(change, match):
    x = torch.zeros(5, 3)
    arguments = COMMON | {"x": x, "epsilon": x, "gradient": x, "history": x[None], "matrix": MATRICES[1]} | change
    with pytest.raises(ValueError, match=match):
        guided_step(**arguments)


@needs_native
@pytest.mark.parametrize("clamp", [None, (-1.0, 1.0)])
@pytest.mark.parametrize("slots", [0, 1, 2])
@pytest.mark.parametrize("network_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_native_error_is_at_most_twice_that_of_eager(x_dtype, network_dtype, slots, clamp):
    x, epsilon, gradient, history = inputs(slots, (129, 37))
    x, history = x.to(x_dtype), history.to(x_dtype)
    epsilon, gradient = epsilon.to(network_dtype), gradient.to(network_dtype)
    keywords = COMMON | {"matrix": MATRICES[slots], "clamp": clamp}
    expected = run_oracle(x, epsilon, gradient, history, **keywords)
    native = guided_step(x, epsilon, gradient, history, backend="cpu", **keywords)
    eager = guided_step(x, epsilon, gradient, history, backend="reference", **keywords)
    for value, twin, exact in zip(native, eager, expected, strict=True):
        if value is not None:
            error, yardstick = (np.abs(t.double().numpy() - exact).max() for t in (value, twin))
            assert error <= allowed(yardstick, FEW_OPERATIONS * np.abs(exact).max())


@needs_native
@pytest.mark.parametrize("history_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_native_history_may_have_another_dtype(history_dtype):
    x, epsilon, gradient, history = (t.float() for t in inputs(2, (9, 31)))
    history = history.to(history_dtype)
    keywords = COMMON | {"matrix": MATRICES[2]}
    for a, b in zip(
        guided_step(x, epsilon, gradient, history, backend="cpu", **keywords),
        guided_step(x, epsilon, gradient, history, backend="reference", **keywords),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@needs_native
@pytest.mark.parametrize("slots", [3, 4, 7])
def test_native_takes_any_number_of_slots(slots):
    x, epsilon, gradient, history = (t.float() for t in inputs(slots, (9, 31)))
    matrix = np.random.default_rng(slots).uniform(-0.5, 0.5, (1 + slots, 2 + slots))
    keywords = COMMON | {"matrix": matrix}
    got = guided_step(x, epsilon, gradient, history, backend="cpu", **keywords)
    for value, exact in zip(got, run_oracle(x, epsilon, gradient, history, **keywords), strict=True):
        np.testing.assert_allclose(value.numpy(), exact, rtol=0, atol=1e-5)


@needs_native
def test_native_does_not_read_what_is_behind_zeros():
    x, epsilon, gradient, history = (t.float() for t in inputs(2))
    bad = torch.full_like(x, float("nan"))
    matrix = ((0.9, 0.0, 0.2, -0.3), (0.0, 0.0, 0.0, 1.0), (0.0, 0.0, 0.0, 0.0))
    keywords = COMMON | {"matrix": matrix, "guidance_weight": 0.0, "backend": "cpu"}
    got = guided_step(x, epsilon, bad, torch.stack([bad, history[1]]), **keywords)
    clean = guided_step(x, epsilon, None, history, **keywords)
    for a, b in zip(got, clean, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(got.history_next[1], torch.zeros_like(x))


@needs_native
@pytest.mark.parametrize("shape", [(7, 3), (7, 64), (3, 1000)])
def test_native_noise_is_the_noise_function(shape):
    zeros = torch.zeros(shape)
    index = torch.arange(shape[0]) * 3 - (1 << 35)
    got = guided_step(
        zeros, zeros, matrix=((0.0, 0.0),), noise_scale=1.0, seed=(1 << 63) + 9, sample_index=index, evaluation=4,
        backend="cpu",
    )  # fmt: skip
    z = noise.normal((1 << 63) + 9, index, zeros[0].numel(), 4).view(shape)
    assert torch.equal(got.x_next, z)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_native_conversions_of_every_16_bit_number(dtype):
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    zeros = torch.zeros_like(x)
    same = guided_step(x, zeros, matrix=((1.0, 0.0),), backend="cpu").x_next
    torch.testing.assert_close(same, x, rtol=0, atol=0, equal_nan=True)
    # To 16 bits: from float32 numbers at, next to and between the 16-bit ones, beyond the largest too.
    values = x.float()
    values = values[values.isfinite()].sort().values
    middle = (values[1:] + values[:-1]) / 2
    infinity = torch.tensor(float("inf"))
    values = torch.cat([values, middle, middle.nextafter(infinity), middle.nextafter(-infinity), values * 1.5])
    got = guided_step(zeros[:1].expand(len(values)), values, matrix=((0.0, 1.0),), backend="cpu").x_next
    torch.testing.assert_close(got, values.to(dtype), rtol=0, atol=0)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_results_do_not_depend_on_layout_batch_or_threads(dtype):
    # Outputs of more than 16 MiB are written around the caches; samples of odd size put every output off alignment.
    shape = (1001, 3001 if dtype == torch.bfloat16 else 1501)
    x, epsilon, gradient, history = inputs(1, shape, dtype)
    keywords = COMMON | {"matrix": MATRICES[1], "clamp": (-1.0, 1.0), "backend": "cpu"}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = guided_step(x, epsilon, gradient, history, **keywords)
        torch.set_num_threads(2)
        again = guided_step(x, epsilon, gradient, history, **keywords)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(whole, again, strict=True):
        assert torch.equal(a, b)
    start = 0
    for size in (1, 2, 97, 301, 600):
        rows = slice(start, start + size)
        start += size

        def shifted(tensor):
            return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

        part = guided_step(
            *(shifted(tensor[rows]) for tensor in (x, epsilon, gradient)),
            shifted(history[:, rows]),
            sample_index=torch.arange(rows.start, rows.stop),
            **keywords,
        )
        assert torch.equal(part.x_next, whole.x_next[rows])
        assert torch.equal(part.history_next, whole.history_next[:, rows])
        assert torch.equal(part.x0, whole.x0[rows])
    assert start == shape[0]


@needs_native
def test_native_memory_of_large_outputs_is_used_again_when_it_is_free():
    x = torch.randn(1100, 1000)  # 4.4 MB
    arguments = {"matrix": ((0.5, -0.25),), "alpha": 0.8, "sigma": 0.6, "backend": "cpu"}
    first = guided_step(x, x, **arguments)
    second = guided_step(2 * x, x, **arguments)
    held = {t.data_ptr() for result in (first, second) for t in (result.x_next, result.x0)}
    assert len(held) == 4
    assert torch.equal(first.x_next, 0.25 * x)
    assert torch.equal(second.x_next, 0.75 * x)
    part = first.x0[5:7]
    kept = part.clone()
    del first
    third = guided_step(4 * x, x, **arguments)
    # x_next of the first is free, x0 is not while a view of it lives.
    assert third.x0.data_ptr() != part.data_ptr() - 5 * 4000
    assert {third.x_next.data_ptr(), third.x0.data_ptr()} & held
    assert torch.equal(part, kept)
    assert torch.equal(third.x_next, 1.75 * x)
    grown = third.x_next.resize_(2000, 1000)
    assert grown.shape == (2000, 1000)


@needs_native
@pytest.mark.slow(ci=True)
@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_native_copies_of_every_instruction_set(capability):
    if os.environ.get("TGDP_CPU_CAPABILITY"):
        pytest.skip("runs inside one of these")
    environment = {**os.environ, "TGDP_CPU_CAPABILITY": capability}
    ask = "import torch, tgdp_fast.ops.guided_step; print(torch.ops.tgdp_fast.cpu_capability())"
    run = [sys.executable, "-c", ask]
    used = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    if used != capability:
        pytest.skip(f"this CPU runs {used}")
    files = [str(Path(__file__).with_name(name)) for name in ("test_guided_step.py", "test_noise.py")]
    run = [sys.executable, "-m", "pytest", "-q", "-x", *files, "-k", "native or cpu"]
    result = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@needs_native
@pytest.mark.slow
def test_native_addresses_beyond_32_bits():
    # Untouched zeros take no memory: 2^31 + 5 elements need what is written, 4 GiB for each output.
    size = (1 << 31) + 5
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    available = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 0)
    if available < 11 << 20:
        pytest.skip("needs 11 GiB of memory")
    x, epsilon = torch.zeros(1, size, dtype=torch.bfloat16), torch.zeros(1, size, dtype=torch.bfloat16)
    places = torch.tensor([0, 255, (1 << 31) - 1, 1 << 31, size - 1])
    x[0, places] = torch.arange(1.0, 6.0, dtype=torch.bfloat16)
    epsilon[0, places] = 0.5
    got = guided_step(x, epsilon, matrix=((1.0, 1.0),), alpha=1.0, sigma=1.0, backend="cpu")
    assert got.x_next[0, places].tolist() == [1.5, 2.5, 3.5, 4.5, 5.5]
    assert got.x0[0, places].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert all(int(torch.count_nonzero(value)) == 5 for value in (got.x_next, got.x0))


@needs_native
def test_native_refuses_float64_and_auto_takes_it_elsewhere():
    x, epsilon, _, _ = inputs(0)
    with pytest.raises(BackendUnavailableError, match="not float64"):
        guided_step(x, epsilon, matrix=MATRICES[0], backend="cpu")
    assert guided_step(x, epsilon, matrix=MATRICES[0]).x_next.dtype == torch.float64


@needs_native
@pytest.mark.parametrize("slots", [0, 2])
def test_native_operator_is_registered_well(slots):
    x, epsilon, gradient, history = (t.float() for t in inputs(slots))
    matrix = [entry for row in MATRICES[slots] for entry in row]
    operator = torch.ops.tgdp_fast.guided_step.default
    arguments = (matrix, 0.4, 0.7, 0.6, 0.8)
    index = torch.arange(5)
    torch.library.opcheck(operator, (x, epsilon, gradient, history, *arguments, [-1.0, 1.0], 1, 2, index, 3))
    torch.library.opcheck(operator, (x.mT, epsilon.mT, None, None, *arguments, None, 1, 2, None, 3))
    with pytest.raises(ValueError, match="entries"):
        operator(x, epsilon, None, None, matrix[:-1], 0.0, 0.0, 1.0, 0.0, None, 0, 0, None, 0)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiles_without_graph_breaks(backend):
    def step(x, epsilon, gradient, history, k):
        return guided_step(
            x, epsilon, gradient, history, matrix=MATRICES[1], noise_scale=0.4, guidance_weight=0.1 * k, alpha=0.6,
            sigma=0.8, clamp=(-1.0, 1.0), seed=(1 << 63) + 3, evaluation=k,
        )  # fmt: skip

    arguments = [t.float() for t in inputs(1)]
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    try:
        got = compiled(*arguments, 1)
    except torch._dynamo.exc.BackendCompilerFailed as error:  # a machine without a C++ compiler
        if "compiler" in str(error).lower():
            pytest.skip("no working C++ compiler")
        raise
    # Values below 8: a few units in the last place, for fused multiply-adds and the reciprocal of a constant.
    for value, expected in zip(got, step(*arguments, 1), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=5e-6)
    if backend == "eager":
        for k in (2, 3):
            for value, expected in zip(compiled(*arguments, k), step(*arguments, k), strict=True):
                torch.testing.assert_close(value, expected, rtol=0, atol=5e-6)
    torch._dynamo.reset()
