"""The compiled MLP kernels against float64, at awkward shapes, dtypes, strides and instruction sets."""

from __future__ import annotations

import math

import pytest
import torch
from native import CAPABILITIES, needs_extension, run_with
from tolerances import assert_no_worse_than_eager, of_mlp, of_mlp_backward, of_sums
from torch import Tensor

from tgdp_fast.ops import BackendUnavailableError, mlp_forward, mlp_value_and_grad, use_backend
from tgdp_fast.ops.mlp import (
    _reference_forward,
    _reference_value_and_grad,
    mlp_backward_reference,
    mlp_value_and_grad_backward_reference,
)
from tgdp_fast.ops.registry import lookup

pytestmark = needs_extension


def _forward_cpu(*call, **keywords):
    return lookup("mlp_value_and_grad", "cpu").function(*call, **keywords)


def _backward_cpu(*call, **keywords):
    return lookup("mlp_value_and_grad_backward", "cpu").function(*call, **keywords)


def outputs_cpu(*call, **keywords):
    return lookup("mlp_forward", "cpu").function(*call, **keywords)


def outputs_backward_cpu(*call, **keywords):
    return lookup("mlp_backward", "cpu").function(*call, **keywords)


# D, H_1, .., H_L and the batch: one hidden layer, one input, odd widths, no row, one row, few inputs and many, blocks
# that end in the middle, batches that pack their weights (over 128) and that do not.
SHAPES = [
    ((1, 1), 1),
    ((5, 33), 3),
    ((21, 33, 50), 2),
    ((128, 64, 130), 4),
    ((3, 16, 16), 0),
    ((8, 130, 7, 64), 129),
    ((9, 17, 80), 131),
    ((2, 128, 128, 128, 128), 100),
    ((64, 130, 66, 65), 65),
    ((3904, 32, 48), 70),
    ((17, 257), 300),
]
# Unit roundoff of the matmuls; bf16x3 keeps 16 bits of each factor.
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def network(sizes, batch, dtype=torch.float32, per_sample=True, seed=0, outputs=1):
    """x, first_bias, weights, biases of order one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size, scale=1.0):
        return (scale * torch.randn(*size, generator=generator)).to(dtype)

    weights = [draw(m, n, scale=1.5 * n**-0.5) for n, m in zip(sizes, (*sizes[1:], outputs), strict=True)]
    biases = [draw(m, scale=0.5) for m in (*sizes[2:], outputs)]
    return draw(batch, sizes[0]), draw(batch if per_sample else 1, sizes[1]), weights, biases


def double(*call):
    return [[t.double() for t in item] if isinstance(item, list) else item.double() for item in call]


def distance(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm())


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", list(ROUNDOFF))
@pytest.mark.parametrize(("sizes", "batch"), SHAPES)
def test_value_gradient_and_kept_pre_activations(sizes, batch, dtype, per_sample):
    call = network(sizes, batch, dtype, per_sample)
    value, gradient, kept = _forward_cpu(*call, save_pre_activations=True)
    eager_value, eager_gradient, eager_kept = _reference_value_and_grad(*call, save_pre_activations=True)
    exact = _reference_value_and_grad(*double(*call), save_pre_activations=True)
    got, eager = (value, gradient, *kept), (eager_value, eager_gradient, *eager_kept)
    assert_no_worse_than_eager(got, eager, (*exact[:2], *exact[2]), of_mlp(sizes, dtype))


# One, a few and many outputs, ends of a vector and of a panel in between.
@pytest.mark.parametrize("outputs", [1, 3, 8, 9, 70])
@pytest.mark.parametrize("dtype", list(ROUNDOFF))
@pytest.mark.parametrize(("sizes", "batch"), SHAPES)
def test_all_outputs_and_their_derivative(sizes, batch, dtype, outputs):
    for per_sample in (False, True):
        call = network(sizes, batch, dtype, per_sample, outputs=outputs)
        cotangent = torch.randn(batch, outputs, generator=torch.Generator().manual_seed(1)).to(dtype)
        results = []
        for forward, backward, convert in (
            (outputs_cpu, outputs_backward_cpu, lambda *tensors: tensors),
            (_reference_forward, mlp_backward_reference, lambda *tensors: tensors),
            (_reference_forward, mlp_backward_reference, double),
        ):
            x, first_bias, weights, biases = convert(*call)
            output, kept = forward(x, first_bias, weights, biases, save_pre_activations=True)
            needs = (True,) * (2 * len(biases) + 3)
            gradients = backward(*convert(cotangent), x, first_bias, weights, kept, needs_grad=needs)
            results.append((output, *kept, *gradients))
        # Up, down, and over the batch.
        assert_no_worse_than_eager(*results, of_sums([*sizes, outputs, *sizes, batch], dtype))


def test_the_gradient_twin_of_all_outputs_is_that_of_autograd():
    x, first_bias, weights, biases = double(*network((3, 20, 30), 50, per_sample=False, outputs=4))
    leaves = [t.requires_grad_() for t in (x, first_bias, *weights, *biases)]
    output, kept = _reference_forward(x, first_bias, weights, biases, save_pre_activations=True)
    cotangent = torch.randn_like(output)
    exact = torch.autograd.grad(output, leaves, cotangent)
    got = mlp_backward_reference(cotangent, x, first_bias, weights, kept, needs_grad=(True,) * 7)
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_without_inputs_the_bias_is_what_counts():
    run_with(
        """
import torch
import test_mlp_native as tests
for batch in (1, 3, 20):
    call = tests.network((1, 130, 70), batch)
    call = (call[0][:, :0], call[1], [call[2][0][:, :0], *call[2][1:]], call[3])
    exact = tests._reference_value_and_grad(*call, save_pre_activations=True)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        got = tests._forward_cpu(*call, save_pre_activations=True)
        torch.testing.assert_close(got[0], exact[0], rtol=1e-5, atol=1e-6)
        assert got[1].shape == (batch, 0)
        outputs = tests.outputs_cpu(*call, save_pre_activations=False)[0]
        torch.testing.assert_close(outputs, exact[0][:, None], rtol=1e-5, atol=1e-6)
"""
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3, 7, 16, 50])
def test_threads_that_share_a_layer_change_nothing(batch, dtype):
    call = network((200, 130, 70, 64), batch, dtype)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            value, gradient, kept = _forward_cpu(*call, save_pre_activations=True)
            results.append((value, gradient, *kept, *outputs_cpu(*call, save_pre_activations=False)[:1]))
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("cotangents", ["value", "gradient", "both"])
@pytest.mark.parametrize("dtype", list(ROUNDOFF))
@pytest.mark.parametrize(("sizes", "batch"), SHAPES)
def test_joint_derivative(sizes, batch, dtype, cotangents):
    for per_sample in (False, True):
        x, first_bias, weights, biases = call = network(sizes, batch, dtype, per_sample)
        value_cotangent = torch.randn(batch).to(dtype) if cotangents != "gradient" else None
        gradient_cotangent = torch.randn(x.shape).to(dtype) if cotangents != "value" else None
        results = []
        for forward, backward, convert in (
            (_forward_cpu, _backward_cpu, lambda t: t),
            (_reference_value_and_grad, mlp_value_and_grad_backward_reference, lambda t: t),
            (
                _reference_value_and_grad,
                mlp_value_and_grad_backward_reference,
                lambda t: None if t is None else t.double(),
            ),
        ):
            x, first_bias = convert(call[0]), convert(call[1])
            weights, biases = [convert(w) for w in call[2]], [convert(b) for b in call[3]]
            kept = forward(x, first_bias, weights, biases, save_pre_activations=True)[2]
            pair = convert(value_cotangent), convert(gradient_cotangent)
            needs = (True,) * (2 * len(biases) + 3)
            results.append(backward(*pair, x, first_bias, weights, kept, needs_grad=needs))
        assert_no_worse_than_eager(*results, of_mlp_backward(sizes, batch, dtype))


def test_only_what_is_needed_comes_back_and_is_the_same():
    x, first_bias, weights, biases = network((4, 20, 30), 50)
    kept = _forward_cpu(x, first_bias, weights, biases, save_pre_activations=True)[2]
    cotangents = torch.randn(50), torch.randn(50, 4)
    everything = _backward_cpu(*cotangents, x, first_bias, weights, kept, needs_grad=(True,) * 7)
    for chosen in range(7):
        needs = tuple(i == chosen for i in range(7))
        got = _backward_cpu(*cotangents, x, first_bias, weights, kept, needs_grad=needs)
        assert [g is not None for g in got] == list(needs)
        assert torch.equal(got[chosen], everything[chosen])


@pytest.mark.parametrize("sizes", [(2, 64, 64), (100, 130, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_depends_on_no_other_row(sizes, dtype):
    x, first_bias, weights, biases = network(sizes, 300, dtype)
    whole = mlp_value_and_grad(x, first_bias, weights, biases, backend="cpu")
    x[7], x[255] = float("nan"), float("inf")
    spoiled = mlp_value_and_grad(x, first_bias, weights, biases, backend="cpu")
    others = [i for i in range(300) if i not in (7, 255)]
    for a, b in zip(whole, spoiled, strict=True):
        assert torch.equal(a[others], b[others])
        assert not b[[7, 255]].isfinite().any()
    # In the smallest batches too, which take another way: sums of as many terms as a layer is wide, in another order.
    tolerance = 2 * math.sqrt(max(sizes)) * ROUNDOFF[dtype]
    few = mlp_value_and_grad(x[6:9], first_bias[6:9], weights, biases, backend="cpu")
    for a, b in zip(whole, few, strict=True):
        torch.testing.assert_close(a[[6, 8]], b[[0, 2]], rtol=tolerance, atol=tolerance)
    # Nor does what an earlier call left in the working memory reach a later one.
    again = mlp_value_and_grad(x[:1], first_bias[:1], weights, biases, backend="cpu")
    for a, b in zip(whole, again, strict=True):
        torch.testing.assert_close(a[:1], b, rtol=tolerance, atol=tolerance)


def test_results_do_not_depend_on_the_number_of_threads_and_repeat():
    call = network((3, 128, 130), 1000)
    cotangents = torch.randn(1000), torch.randn(1000, 3)
    threads = torch.get_num_threads()
    results, gradients = [], []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            value, gradient, kept = _forward_cpu(*call, save_pre_activations=True)
            results.append((value, gradient, *kept))
            gradients.append(_backward_cpu(*cotangents, *call[:3], kept, needs_grad=(True,) * 7))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    # Gradients of the parameters are summed per thread: equal for equal counts.
    assert all(torch.equal(a, b) for a, b in zip(gradients[1], gradients[3], strict=True))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(gradients[0], gradients[2], strict=True))


def test_strides_and_offsets():
    sizes, batch = (12, 40, 24), 37
    x, first_bias, weights, biases = network(sizes, batch)
    expected = mlp_value_and_grad(x, first_bias, weights, biases, backend="cpu")

    def spread(t):  # every second element of a larger tensor
        wide = torch.full([2 * n for n in t.shape], float("nan"))
        wide[tuple(slice(None, None, 2) for _ in t.shape)] = t
        return wide[tuple(slice(None, None, 2) for _ in t.shape)]

    def offset(t):  # an address that is a multiple of 4 bytes and of nothing more
        flat = torch.full((t.numel() + 1,), float("nan"))
        flat[1:] = t.flatten()
        return flat[1:].view(t.shape)

    for change in (spread, offset, lambda t: t.t().contiguous().t() if t.ndim == 2 else t):
        got = mlp_value_and_grad(
            change(x), change(first_bias), [change(w) for w in weights], [change(b) for b in biases], backend="cpu"
        )
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    # One row for all samples, and one weight row for all units, without copies.
    got = mlp_value_and_grad(x[:1].expand(batch, -1), first_bias, [weights[0][:1].expand(40, -1), *weights[1:]], biases)
    want = mlp_value_and_grad(
        x[:1].repeat(batch, 1), first_bias, [weights[0][:1].repeat(40, 1), *weights[1:]], biases, backend="reference"
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_rows_beyond_two_to_the_31_elements():
    # Pages that nobody writes take no memory.
    stride = 2**30 + 64
    try:
        base = torch.empty(2 * stride + 12)
    except RuntimeError:
        pytest.skip("not enough address space")
    _, first_bias, weights, biases = network((12, 16), 3)
    x = base.as_strided((3, 12), (stride, 1))
    for r in range(3):
        x[r] = torch.linspace(-r, 1, 12)
    got = mlp_value_and_grad(x, first_bias, weights, biases, backend="cpu")
    want = mlp_value_and_grad(x.clone(), first_bias, weights, biases, backend="reference")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_split_products_keep_sixteen_bits():
    call = network((40, 96, 96), 200)
    lower = [[t.bfloat16() for t in i] if isinstance(i, list) else i.bfloat16() for i in call]
    results = []
    for inputs, keywords in (
        (call, {"bf16x3": True, "backend": "cpu"}),
        (lower, {"backend": "cpu"}),
        (double(*call), {}),
    ):
        leaves = [t.requires_grad_() for i in inputs for t in (i if isinstance(i, list) else [i])]
        value, gradient = mlp_value_and_grad(leaves[0], leaves[1], leaves[2:5], leaves[5:], **keywords)
        found = torch.autograd.grad((gradient**2).sum() + value.sum(), leaves)
        results.append([t.detach() for t in (value, gradient, *found[:-1])])
    for a, b, truth in zip(*results, strict=True):
        # Both factors of every product keep 16 bits: 2^-17 each, through 3 layers up and 3 down, twice for gradients.
        assert distance(a, truth) <= 12 * 2 * 2.0**-17 * float(truth.norm())
        assert distance(a, truth) < distance(b, truth) / 20


def test_float64_is_refused_when_asked_for_and_served_otherwise():
    call = double(*network((3, 8), 4))
    with pytest.raises(BackendUnavailableError, match="float32, bfloat16 and float16, not float64"):
        mlp_value_and_grad(*call, backend="cpu")
    assert mlp_value_and_grad(*call)[0].dtype == torch.float64


def test_autograd_through_the_kernels_matches_the_reference():
    gradients = []
    for backend in ("cpu", "reference"):
        x, first_bias, weights, biases = network((3, 40, 50), 60)
        leaves = [t.requires_grad_() for t in (x, first_bias, *weights, *biases)]
        with use_backend(backend):
            value, gradient = mlp_value_and_grad(x, first_bias, weights, biases)
            alone = mlp_forward(x, first_bias, weights, biases, backend=backend)
        loss = (gradient**2).mean() + value.exp().mean() + (alone**2).mean()
        gradients.append(torch.autograd.grad(loss, leaves))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    x, first_bias, weights, biases = network((5, 20, 12), 9, dtype)
    torch.library.opcheck(torch.ops.tgdp_fast.mlp_value_and_grad.default, (x, first_bias, weights, biases, True, False))
    kept = _forward_cpu(x, first_bias, weights, biases, save_pre_activations=True)[2]
    torch.library.opcheck(
        torch.ops.tgdp_fast.mlp_value_and_grad_backward.default,
        (x[:, 0].clone(), x.clone(), x, first_bias, weights, list(kept), [True] * 7, False),
    )
    torch.library.opcheck(torch.ops.tgdp_fast.mlp_forward.default, (x, first_bias, weights, biases, True))
    torch.library.opcheck(
        torch.ops.tgdp_fast.mlp_backward.default,
        (x[:, :1].clone(), x, first_bias, weights, list(kept), [True] * 7),
    )


def test_bad_tensors_do_not_reach_the_kernels():
    x, first_bias, weights, biases = network((5, 20), 9)
    operator = torch.ops.tgdp_fast.mlp_value_and_grad
    for call, match in (
        ((x[:, :4], first_bias, weights, biases), "must have 4 columns"),
        ((x, first_bias[:3], weights, biases), "first_bias must be"),
        ((x, first_bias, weights, []), "biases"),
        ((x.bfloat16(), first_bias, weights, biases), "dtypes"),
        ((x.int(), first_bias.int(), [w.int() for w in weights], [b.int() for b in biases]), "got Int"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=match):
            operator(*call, False, False)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set(capability):
    # The choice is made once per process.
    run_with(
        """
import torch
import test_mlp_native as tests
for sizes, batch in tests.SHAPES:
    for dtype in tests.ROUNDOFF:
        tests.test_value_gradient_and_kept_pre_activations(sizes, batch, dtype, True)
        tests.test_joint_derivative(sizes, batch, dtype, "both")
        for outputs in (3, 70):
            tests.test_all_outputs_and_their_derivative(sizes, batch, dtype, outputs)
tests.test_a_row_depends_on_no_other_row((2, 64, 64), torch.float32)
tests.test_strides_and_offsets()
""",
        TGDP_CPU_CAPABILITY=capability,
    )
