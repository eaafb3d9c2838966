"""The CUDA kernels, run on the CPU by the emulation, and what the emulation itself must see."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import cuda_emulation as cuda
import pytest
import torch
from solver_step import guided_step_reference
from tolerances import FEW_OPERATIONS, allowed, assert_no_worse_than_eager, largest, of_mlp, unit_roundoff

from tgdp_fast.ops import noise
from tgdp_fast.ops.mlp import _reference_value_and_grad

pytestmark = cuda.needs_compiler

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
ORDERS = ((cuda.FORWARD, 0), (cuda.REVERSE, 0), (cuda.RANDOM, 1), (cuda.RANDOM, 2))


@pytest.fixture(autouse=True)
def _usual_order() -> Iterator[None]:
    yield
    cuda.choose()
    cuda.choose_device()


# emulation --------------------------------------------------------------------------------------------------

FAULTS = (
    ("nothing", None),
    ("no barrier", "race: thread .* reads shared memory that thread .* wrote|nothing has written"),
    ("no barrier before a write", "race: thread .* writes shared memory that .* read|race: .* reads"),
    ("no barrier within a warp", "race: thread .* reads shared memory that thread .* wrote|race: .* writes"),
    ("exit before a barrier", "threads diverge: .* has ended|threads diverge: .* waits at the barrier"),
    ("two barriers", "threads diverge: .* waits at the barrier in .*, thread .* waits at the barrier"),
    ("behind an array", "access outside of shared memory"),
    ("before an array", "access outside of shared memory"),
    ("nothing written", "nothing has written"),
    ("misaligned", "misaligned access"),
    ("no wait for a copy", "before a copy to it has arrived"),
    ("no barrier after a copy", "race: |before a copy|nothing has written"),
    ("lanes that are missing", "threads diverge|never come"),
    ("lanes at another operation", "others of its warp at"),
)


def run_fault(fault: int) -> list[int]:
    source = torch.arange(256, dtype=torch.int32)
    out = torch.zeros(64, dtype=torch.int32)
    cuda.check(cuda.library().test_fault(fault, ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(out.data_ptr())))
    return out.tolist()


def expected_of_a_faultless_kernel() -> list[int]:
    numbers = [(thread + 33) % 64 + 1 for thread in range(64)]
    values = []
    for thread in range(64):
        other = (thread + 33) % 64
        # Thread 3 copies 8 of its 16 bytes.
        values.append(other + numbers[thread ^ 1] + 4 * other + (0 if other == 3 else 4 * other + 3))
    summed = [values[t] + values[t ^ 16] for t in range(64)]
    return [summed[t] + summed[t // 32 * 32 + (t + 1) % 32] for t in range(64)]


@pytest.mark.parametrize(("order", "seed"), ORDERS)
@pytest.mark.parametrize(
    ("fault", "message"), [pytest.param(i, message, id=name) for i, (name, message) in enumerate(FAULTS)]
)
def test_every_fault_is_seen_in_every_order(fault: int, message: str | None, order: int, seed: int) -> None:
    assert len(FAULTS) + 1 == cuda.library().test_faults()
    cuda.choose(order, seed)
    if message is None:
        assert run_fault(fault) == expected_of_a_faultless_kernel()
    else:
        with pytest.raises(cuda.EmulationError, match=message):
            run_fault(fault)


def test_orders_differ() -> None:
    last = []
    for order, seed in ORDERS:
        cuda.choose(order, seed)
        last.append(run_fault(len(FAULTS))[0])
    assert len(set(last)) == len(ORDERS)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
def test_a_product_of_fragments_is_the_product_of_matrices(dtype: torch.dtype, transposed: bool) -> None:
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    given = b.t().contiguous() if transposed else b
    out = cuda.Output((16, 8), FLOAT32)
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (a, given, out.values))
    cuda.check(cuda.library().test_product(cuda.DTYPES[dtype], int(transposed), *pointers))
    exact = a.double() @ b.double()
    # A sum of 17 terms in float32, each at most 2^-24 off.
    bound = 17 * 2.0**-24 * (a.double().abs() @ b.double().abs())
    assert bool(((out.finish().double() - exact).abs() <= bound).all())


def test_bank_conflicts_are_counted() -> None:
    """Rows of 32 bytes, one after the other: eight of them lie in the same banks twice over."""
    a, b = torch.randn(16, 16).to(BFLOAT16), torch.randn(16, 8).to(BFLOAT16)
    out = cuda.Output((16, 8), FLOAT32)
    cuda.bank_conflicts()
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (a, b.t().contiguous(), out.values)]
    cuda.check(cuda.library().test_product(cuda.DTYPES[BFLOAT16], 1, *pointers))
    # All four matrices of the left factor and of the right one.
    assert cuda.bank_conflicts() == 8
    assert cuda.bank_conflicts() == 0


@pytest.mark.parametrize(
    ("stride", "turns"),
    [
        (1, 0 + 1),  # half a warp's pairs have banks of their own; the first words of all pairs are on 16 banks
        (2, 2 * 1 + 3),
        (16, 2 * 15 + 31),  # all on two banks
        (17, 0 + 1),
    ],
)
def test_further_turns_of_accesses_are_counted(stride: int, turns: int) -> None:
    out = torch.zeros(32)
    for watch, expected in ((True, turns), (False, 0)):
        cuda.access_conflicts(watch=watch)
        cuda.check(cuda.library().test_strided_accesses(stride, ctypes.c_void_p(out.data_ptr())))
        assert cuda.access_conflicts(watch=False) == expected
    assert out.eq(1.0).all()


CLUSTER_FAULTS = (
    ("nothing", None),
    ("no barrier at the start", "a block that may not have started"),
    ("no barrier of the cluster", "race: .* of the cluster wrote|nothing has written"),
    ("a barrier of the block", "race: .* of the cluster wrote|nothing has written"),
    ("overwrites what is read", "race: thread .* writes shared memory that .* of the cluster read|race: .* reads"),
    ("two writers", "race: thread .* writes shared memory that thread .* of the cluster wrote"),
    ("a block ends", "others of its cluster wait|a block that has ended"),
    ("writes to one that has ended", "a block that has ended|others of its cluster wait"),
    ("blocks at two barriers", "blocks of a cluster wait at different barriers"),
    ("a block that there is not", "a block outside of the cluster"),
)


@pytest.mark.parametrize(("order", "seed"), ORDERS)
@pytest.mark.parametrize(
    ("fault", "message"), [pytest.param(i, message, id=name) for i, (name, message) in enumerate(CLUSTER_FAULTS)]
)
def test_every_fault_of_clusters_is_seen_in_every_order(fault: int, message: str | None, order: int, seed: int) -> None:
    assert len(CLUSTER_FAULTS) == cuda.library().test_cluster_faults()
    cuda.choose(order, seed)
    out = torch.zeros(16, 64, dtype=torch.int32)
    answer = cuda.library().test_cluster_fault(fault, ctypes.c_void_p(out.data_ptr()))
    if message is not None:
        with pytest.raises(cuda.EmulationError, match=message):
            cuda.check(answer)
        return
    cuda.check(answer)
    block, thread = torch.arange(16)[:, None], torch.arange(64)

    def before(steps):
        # The block so many steps back in the circle of the cluster.
        return block // 8 * 8 + (block - steps) % 8

    expected = 1000 * (before(1) + before(2) + before(1)) + 3 * thread
    assert torch.equal(out, expected.int())


# guided_step ------------------------------------------------------------------------------------------------


def arguments(shape, x_dtype, network_dtype, slots, *, history_dtype=None, gradient=True, shift=0, **settings):
    """A call of guided_step with random values."""
    generator = torch.Generator().manual_seed(slots + 17 * sum(shape))

    def values(*size, dtype):
        return cuda.shifted(torch.randn(size, generator=generator).to(dtype), shift)

    matrix = torch.randn(1 + slots, 2 + slots, generator=generator).tolist()
    tensors = [
        values(*shape, dtype=x_dtype),
        values(*shape, dtype=network_dtype),
        values(*shape, dtype=network_dtype) if gradient else None,
        values(slots, *shape, dtype=history_dtype or x_dtype) if slots else None,
    ]
    keywords = {"matrix": matrix, "alpha": 0.83, "sigma": 0.56, **settings}
    if gradient:
        keywords["guidance_weight"] = 0.71
    return tensors, keywords


def float64_step(tensors, keywords):
    wide = [None if tensor is None else tensor.double() for tensor in tensors]
    return guided_step_reference(*wide, **keywords)


def assert_step_agrees(tensors, keywords, *, shift=0):
    results = cuda.guided_step(*tensors, **keywords, shift=shift)
    eager = guided_step_reference(*tensors, **keywords)
    exact = float64_step(tensors, keywords)
    dtype = tensors[0].dtype
    terms = len(keywords["matrix"]) + 3
    for result, plain, truth in zip(results, eager, exact, strict=True):
        if truth is None:
            assert result is None
            continue
        assert result.shape == truth.shape
        assert result.dtype == dtype
        error, scale = (result.double() - truth).abs(), largest(truth)
        # One rounding to the dtype and, in float32, one per term and for the quotient, of terms up to a few times the
        # largest result.
        bound = unit_roundoff(dtype) * truth.abs() + (terms + 6) * 2.0**-24 * 4 * scale
        assert bool((error <= bound).all()), float((error - bound).max())
        assert float(error.max()) <= allowed(largest(plain.double() - truth), FEW_OPERATIONS * scale)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 2), (2, 1027), (5, 8, 3)])
@pytest.mark.parametrize("slots", [0, 1, 2, 3, 16])
@pytest.mark.parametrize(
    ("x_dtype", "network_dtype"),
    [(FLOAT32, FLOAT32), (FLOAT32, BFLOAT16), (FLOAT32, FLOAT16), (BFLOAT16, BFLOAT16), (FLOAT16, FLOAT16)],
)
def test_guided_step_agrees_with_its_twin(x_dtype, network_dtype, slots, shape) -> None:
    tensors, keywords = arguments(shape, x_dtype, network_dtype, slots, noise_scale=0.4, seed=2**40 + 5, evaluation=9)
    assert_step_agrees(tensors, keywords)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("clamp", [None, (-0.7, 0.6)])
@pytest.mark.parametrize("noise_scale", [0.0, 0.3])
@pytest.mark.parametrize("slots", [0, 1, 2, 3])
def test_guided_step_options(slots, noise_scale, clamp, gradient) -> None:
    tensors, keywords = arguments(
        (3, 37), FLOAT32, FLOAT32, slots, gradient=gradient, noise_scale=noise_scale, clamp=clamp
    )
    assert_step_agrees(tensors, keywords)
    if slots:
        tensors[3] = None  # zeros
        assert_step_agrees(tensors, keywords)


@pytest.mark.parametrize("shift", [1, 2, 4])
@pytest.mark.parametrize("x_dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("slots", [1, 3])
def test_guided_step_takes_misaligned_memory(slots, x_dtype, shift) -> None:
    tensors, keywords = arguments((3, 40), x_dtype, x_dtype, slots, shift=shift, noise_scale=0.4)
    assert_step_agrees(tensors, keywords, shift=shift)


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize(
    ("x_dtype", "network_dtype", "history_dtype"),
    [(FLOAT32, FLOAT32, BFLOAT16), (BFLOAT16, FLOAT32, FLOAT16), (FLOAT16, BFLOAT16, FLOAT32)],
)
def test_guided_step_takes_any_mixture_of_dtypes(x_dtype, network_dtype, history_dtype, slots) -> None:
    tensors, keywords = arguments((4, 9), x_dtype, network_dtype, slots, history_dtype=history_dtype, noise_scale=0.2)
    assert_step_agrees(tensors, keywords)
    tensors[2] = tensors[2].to(FLOAT16)
    assert_step_agrees(tensors, keywords)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8, 12, 37, 64, 1030])
def test_guided_step_noise_is_the_noise_function(size, dtype) -> None:
    samples = torch.tensor([0, -1, 2**33 + 7, 5, 5], dtype=torch.int64)
    zeros = torch.zeros(5, size, dtype=dtype)
    keywords = {"matrix": [[0.0, 0.0]], "noise_scale": 1.0, "seed": 2**63 + 12345, "evaluation": 2**32 - 1}
    result = cuda.guided_step(zeros, zeros, **keywords, sample_index=samples)[0]
    expected = noise._normal_reference(samples, size, *noise.key_words(keywords["seed"], keywords["evaluation"]))
    if dtype == FLOAT32:
        torch.testing.assert_close(result, expected, rtol=0.0, atol=1e-6)
    else:
        # One rounding.
        torch.testing.assert_close(result.float(), expected, rtol=2.0**-8, atol=1e-6)
    plain = cuda.guided_step(zeros, zeros, **keywords)[0]
    assert torch.equal(plain[0], result[0])
    assert not torch.equal(plain[1], result[1])


def test_guided_step_does_not_depend_on_the_order_of_threads_and_blocks() -> None:
    tensors, keywords = arguments((3, 1027), FLOAT32, FLOAT32, 2, noise_scale=0.4)
    results = []
    for order, seed in ORDERS:
        cuda.choose(order, seed)
        results.append(cuda.guided_step(*tensors, **keywords))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_guided_step_keeps_nan_and_refuses_too_many_slots() -> None:
    tensors, keywords = arguments((2, 9), FLOAT32, FLOAT32, 0, clamp=(-1.0, 1.0))
    tensors[1][1, 3] = torch.nan
    x_next, _, x0 = cuda.guided_step(*tensors, **keywords)
    assert torch.equal(x_next.isnan(), tensors[1].isnan())
    assert torch.equal(x0.isnan(), tensors[1].isnan())
    empty, _, _ = cuda.guided_step(torch.empty(0, 3), torch.empty(0, 3), matrix=[[1.0, 1.0]], noise_scale=1.0)
    assert empty.shape == (0, 3)
    tensors, keywords = arguments((2, 3), FLOAT32, FLOAT32, 17)
    with pytest.raises(cuda.EmulationError, match="at most 16"):
        cuda.guided_step(*tensors, **keywords)


# mlp_value_and_grad -----------------------------------------------------------------------------------------


def network(inputs, widths, batch, dtype, *, rows_of_bias=None, stride=0, shift=0):
    """Random (x, first_bias, weights, biases); matrices have `stride` columns more, which hold NaN, and start late."""
    generator = torch.Generator().manual_seed(inputs + sum(widths) + batch)

    def matrix(rows, columns, scale=1.0):
        memory = torch.full((rows, columns + stride + shift), torch.nan, dtype=dtype)
        part = memory[:, shift : shift + columns]
        return part.copy_((scale * torch.randn(rows, columns, generator=generator)).to(dtype))

    sizes = [inputs, *widths, 1]
    weights = [matrix(rows, columns, columns**-0.5) for columns, rows in zip(sizes, sizes[1:], strict=False)]
    biases = [0.3 * torch.randn(rows, generator=generator).to(dtype) for rows in sizes[2:]]
    bias = (
        torch.randn(sizes[1], generator=generator).to(dtype) if rows_of_bias is None else matrix(rows_of_bias, sizes[1])
    )
    return matrix(batch, inputs), bias, weights, biases


def assert_mlp_agrees(call, *, save=False):
    x, first_bias, weights, biases = call
    results = cuda.mlp_value_and_grad(*call, save_pre_activations=save)
    # Eager PyTorch of copies, for it may read what lies beside a slice: here NaN.
    dense = (x.contiguous(), first_bias.contiguous(), [w.contiguous() for w in weights], biases)
    eager = _reference_value_and_grad(*dense, save_pre_activations=save)
    wide = (x.double(), first_bias.double(), [w.double() for w in weights], [b.double() for b in biases])
    exact = _reference_value_and_grad(*wide, save_pre_activations=save)
    flat = [(result[0], result[1], *result[2]) for result in (results, eager, exact)]
    sizes = [weight.shape[1] for weight in weights]
    assert_no_worse_than_eager(*flat, of_mlp(sizes, x.dtype), size=largest)
    return results


each_dtype = pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])


@each_dtype
@pytest.mark.parametrize(
    ("inputs", "widths", "batch"),
    [
        (1, (1,), 1),
        (2, (16,), 3),
        (5, (40, 24), 70),
        (13, (130, 17, 150), 131),
        (64, (128, 128, 128, 128), 65),
        (203, (33,), 17),
        (3, (8,) * 8, 40),
        (2, (512, 512, 512, 512), 34),
    ],
)
def test_mlp_agrees_with_its_twin(inputs, widths, batch, dtype) -> None:
    assert_mlp_agrees(network(inputs, widths, batch, dtype))


@each_dtype
@pytest.mark.parametrize(("stride", "shift"), [(3, 1), (8, 0), (8, 8), (4, 4)])
def test_mlp_takes_slices_biases_of_rows_and_keeps_pre_activations(stride, shift, dtype) -> None:
    call = network(11, (35, 50), 37, dtype, rows_of_bias=37, stride=stride, shift=shift)
    assert_mlp_agrees(call, save=True)
    assert_mlp_agrees(network(11, (35, 50), 37, dtype, rows_of_bias=1, stride=stride, shift=shift), save=True)


@each_dtype
def test_mlp_on_every_device(dtype) -> None:
    """More rows than blocks, slopes in shared and in global memory, many and few rows of a block."""
    call = network(6, (200, 100), 200, dtype)
    results = []
    for device in ((1, 227, 228), (1, 99, 100), (3, 163, 164), (100, 99, 100)):
        cuda.choose_device(*device)
        results.append(assert_mlp_agrees(call, save=True))
    for value, gradient, kept in results[1:]:
        # A row does not depend on those beside it, and slopes are the same wherever they are kept.
        for result, first in zip((value, gradient, *kept), (*results[0][:2], *results[0][2]), strict=True):
            assert torch.equal(result, first)


@each_dtype
def test_mlp_does_not_depend_on_the_order_of_threads_and_blocks(dtype) -> None:
    call = network(9, (70, 140), 100, dtype)
    results = []
    for order, seed in ORDERS:
        cuda.choose(order, seed)
        results.append(cuda.mlp_value_and_grad(*call)[:2])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@each_dtype
def test_mlp_needs_every_barrier(dtype) -> None:
    # Several rows of blocks for each block, and products that end in every stage.
    call = network(40, (70, 140, 30), 160, dtype)
    cuda.choose_device(1)
    cuda.choose(forget=True)
    cuda.mlp_value_and_grad(*call)
    places = cuda.barriers()
    assert places == 3
    for left_out in range(places):
        for order, seed in ORDERS:
            cuda.choose(order, seed, left_out)
            with pytest.raises(cuda.EmulationError, match="race|nothing has written|before a copy"):
                cuda.mlp_value_and_grad(*call)


@pytest.mark.parametrize("batch", [20, 60, 90])
def test_mlp_loads_fragments_without_bank_conflicts(batch) -> None:
    """Blocks of 32, 64 and 96 rows."""
    cuda.choose_device(1)
    cuda.bank_conflicts()
    assert_mlp_agrees(network(40, (70, 140, 30), batch, BFLOAT16))
    assert cuda.bank_conflicts() == 0


@each_dtype
def test_mlp_rows_do_not_mix(dtype) -> None:
    call = network(3, (40, 20), 40, dtype)
    value, gradient, _ = cuda.mlp_value_and_grad(*call)
    call[0][7] = torch.nan
    other_value, other_gradient, _ = cuda.mlp_value_and_grad(*call)
    others = torch.arange(40) != 7
    assert torch.equal(other_value[others], value[others])
    assert torch.equal(other_gradient[others], gradient[others])
    assert bool(other_value[7].isnan())
    assert bool(other_gradient[7].isnan().all())


def test_mlp_far_out_values_stay_finite() -> None:
    for dtype in (FLOAT32, BFLOAT16):
        x, bias, weights, biases = network(3, (20, 20), 5, dtype)
        value, gradient, _ = cuda.mlp_value_and_grad(1e4 * x, bias, weights, biases)
        assert bool(value.isfinite().all())
        assert bool(gradient.isfinite().all())


def test_mlp_refuses_what_does_not_fit() -> None:
    with pytest.raises(cuda.EmulationError, match="1 to 8 hidden layers"):
        cuda.mlp_value_and_grad(*network(2, (4,) * 9, 3, FLOAT32))
    with pytest.raises(cuda.EmulationError, match="too wide for the shared memory"):
        cuda.mlp_value_and_grad(*network(2, (4000,), 3, BFLOAT16))
    value, gradient, _ = cuda.mlp_value_and_grad(*network(2, (4,), 0, FLOAT32))
    assert value.shape == (0,)
    assert gradient.shape == (0, 2)


@each_dtype
@pytest.mark.parametrize("widest", [128, 256, 512])
@pytest.mark.parametrize("shared", [99, 163, 227])
def test_mlp_widths_fit_on_every_architecture(shared, widest, dtype) -> None:
    cuda.choose_device(4, shared, shared + 1)
    assert_mlp_agrees(network(2, (widest, 16), 5, dtype))
