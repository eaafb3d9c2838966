"""Triton kernels of the MLP operators, in Triton's interpreter: against float64 at awkward shapes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from native import run_with
from test_mlp_native import double, network
from tolerances import assert_no_worse_than_eager, of_mlp, of_mlp_backward, of_sums
from triton_interpreter import compiled, interpreted, run_interpreted

from tgdp_fast.ops import BackendUnavailableError, mlp_forward, mlp_value_and_grad
from tgdp_fast.ops.mlp import (
    _reference_forward,
    _reference_value_and_grad,
    mlp_backward_reference,
    mlp_value_and_grad_backward_reference,
)
from tgdp_fast.ops.registry import lookup

pytest.importorskip("triton", reason="Triton is not installed; run `pip install triton`")

OPERATORS = ("mlp_value_and_grad", "mlp_value_and_grad_backward", "mlp_forward", "mlp_backward")
# Layer by layer and, up to 128 units, in one launch; blocks that end in the middle; one row, none; few inputs and more.
SHAPES = [((1, 1), 1), ((5, 33), 3), ((21, 33, 50), 0), ((8, 130, 7, 64), 37), ((2, 128, 128, 128, 128), 33)]
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=["small", "layers"])
def way(request, monkeypatch):
    """In one launch where an MLP is small, and layer by layer whatever its size."""
    if request.param == "layers":
        from tgdp_fast.kernels import small_mlp

        monkeypatch.setattr(small_mlp, "fits", lambda *_: False)


@pytest.mark.slow(ci=True)
@compiled
def test_in_the_interpreter():
    assert run_interpreted("test_triton_mlp.py") == len(SHAPES) * len(DTYPES) * (2 * 2 + 3 + 2) + 13


# The derivatives take minutes there; their other interpreted tests run in CI too.
@compiled
@pytest.mark.parametrize(
    "operator", [pytest.param(name, marks=pytest.mark.slow(ci="backward" not in name)) for name in OPERATORS]
)
def test_validates_in_the_interpreter(operator):
    code = f"""
import triton_interpreter, torch
from tgdp_fast.lab import validate
torch.use_deterministic_algorithms(True)  # new tensors hold NaN
assert torch.isnan(torch.empty(100)).all()
rows = [row for precision in ("bf16", "fp16") for row in validate.rows_of({operator!r}, "triton", precision)]
print(len(rows), len(validate.failures(rows)), {{row["verdict"] for row in rows}})
"""
    assert run_with(code, TRITON_INTERPRET="1").split(maxsplit=2) == ["24", "0", "{'passed'}\n"]


def run(operator, *call, **keywords):
    return lookup(operator, "triton").function(*call, **keywords)


@interpreted
@pytest.mark.usefixtures("poisoned", "way")
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sizes", "batch"), SHAPES)
def test_value_gradient_and_kept_pre_activations(sizes, batch, dtype, per_sample):
    call = network(sizes, batch, dtype, per_sample)
    value, gradient, kept = run("mlp_value_and_grad", *call, save_pre_activations=True)
    eager_value, eager_gradient, eager_kept = _reference_value_and_grad(*call, save_pre_activations=True)
    exact = _reference_value_and_grad(*double(*call), save_pre_activations=True)
    got, eager = (value, gradient, *kept), (eager_value, eager_gradient, *eager_kept)
    assert_no_worse_than_eager(got, eager, (*exact[:2], *exact[2]), of_mlp(sizes, dtype))


def joint_derivatives(sizes, batch, dtype, cotangents, per_sample):
    """Of the kernels, of eager and of float64."""
    call = network(sizes, batch, dtype, per_sample)
    generator = torch.Generator().manual_seed(1)
    fb = torch.randn(batch, generator=generator).to(dtype) if cotangents != "gradient" else None
    gb = torch.randn(batch, sizes[0], generator=generator).to(dtype) if cotangents != "value" else None
    x, first_bias, weights, _ = call
    kept = _reference_value_and_grad(*call, save_pre_activations=True)[2]
    arguments, needs = (fb, gb, x, first_bias, weights, kept), (True,) * (2 * len(weights) + 1)
    got = run("mlp_value_and_grad_backward", *arguments, needs_grad=needs)
    eager = mlp_value_and_grad_backward_reference(*arguments, needs_grad=needs)
    x, first_bias, weights, biases = double(*call)
    kept = _reference_value_and_grad(x, first_bias, weights, biases, save_pre_activations=True)[2]
    pair = [None if cotangent is None else cotangent.double() for cotangent in (fb, gb)]
    return got, eager, mlp_value_and_grad_backward_reference(*pair, x, first_bias, weights, kept, needs_grad=needs)


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("cotangents", ["value", "gradient", "both"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sizes", "batch"), SHAPES)
def test_joint_derivative(sizes, batch, dtype, cotangents):
    per_sample = cotangents != "gradient"
    results = joint_derivatives(sizes, batch, dtype, cotangents, per_sample)
    assert_no_worse_than_eager(*results, of_mlp_backward(sizes, batch, dtype))


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_in_one_launch(dtype, monkeypatch):
    # From 2049 on a program takes more of them; here from the first on.
    from tgdp_fast.kernels import small_mlp

    few, many = (small_mlp._tile(batch, 2, 33) for batch in (2048, 2049))
    assert (few.rows, many.rows) == (16, 32)
    monkeypatch.setattr(small_mlp, "_tile", lambda *size: many)
    call = network((2, 20, 33), 70, dtype)
    got = run("mlp_value_and_grad", *call, save_pre_activations=False)[:2]
    eager = _reference_value_and_grad(*call, save_pre_activations=False)[:2]
    exact = _reference_value_and_grad(*double(*call), save_pre_activations=False)[:2]
    assert_no_worse_than_eager(got, eager, exact, of_mlp((2, 20, 33), dtype))


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_that_is_divided_among_programs(dtype):
    # The gradients of the weights are sums of float32 parts, the last of them shorter.
    from tgdp_fast.kernels.matmul import batch_parts

    assert batch_parts(1100, 1) == 3
    first, *exact = joint_derivatives((3, 16), 1100, dtype, "both", per_sample=False)
    assert_no_worse_than_eager(first, *exact, of_mlp_backward((3, 16), 1100, dtype))
    again = joint_derivatives((3, 16), 1100, dtype, "both", per_sample=False)[0]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@interpreted
@pytest.mark.usefixtures("poisoned", "way")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sizes", "batch"), SHAPES)
def test_all_outputs_and_their_derivative(sizes, batch, dtype):
    # One, few, and more than a slice of them.
    for outputs, per_sample in ((1, True), (3, False), (70, True)):
        call = network(sizes, batch, dtype, per_sample, outputs=outputs)
        cotangent = torch.randn(batch, outputs, generator=torch.Generator().manual_seed(1)).to(dtype)
        needs = (True,) * (2 * len(sizes) + 1)
        results = []
        for forward, backward, convert in (
            (partial(run, "mlp_forward"), partial(run, "mlp_backward"), lambda *tensors: tensors),
            (_reference_forward, mlp_backward_reference, lambda *tensors: tensors),
            (_reference_forward, mlp_backward_reference, double),
        ):
            x, first_bias, weights, biases = convert(*call)
            output, kept = forward(x, first_bias, weights, biases, save_pre_activations=True)
            gradients = backward(*convert(cotangent), x, first_bias, weights, kept, needs_grad=needs)
            results.append((output, *kept, *gradients))
        # Up, down, and over the batch.
        assert_no_worse_than_eager(*results, of_sums([*sizes, outputs, *sizes, batch], dtype))


@interpreted
@pytest.mark.usefixtures("poisoned")
def test_gives_only_what_is_needed_and_the_same_again():
    x, first_bias, weights, biases = call = network((4, 20, 30), 50, torch.bfloat16)
    kept = _reference_value_and_grad(*call, save_pre_activations=True)[2]
    cotangents = torch.randn(50).bfloat16(), torch.randn(50, 4).bfloat16()
    for operator, given in (
        ("mlp_value_and_grad_backward", cotangents),
        ("mlp_backward", (cotangents[0].unsqueeze(1),)),
    ):
        arguments = (*given, x, first_bias, weights, kept)
        everything = run(operator, *arguments, needs_grad=(True,) * 7)
        for chosen in range(7):
            needs = tuple(i == chosen for i in range(7))
            got = run(operator, *arguments, needs_grad=needs)
            assert [g is not None for g in got] == list(needs)
            assert torch.equal(got[chosen], everything[chosen])


@interpreted
@pytest.mark.usefixtures("poisoned", "way")
def test_takes_any_strides():
    x, first_bias, weights, biases = network((6, 20, 30), 21, torch.bfloat16)
    wide = torch.full((21, 12), float("nan"), dtype=torch.bfloat16)
    wide[:, ::2] = x
    wide_bias = torch.full((30, 2), float("nan"), dtype=torch.bfloat16)
    wide_bias[:, 1] = biases[0]
    turned = [weight.t().contiguous().t() for weight in weights]
    plain = mlp_value_and_grad(x, first_bias, weights, biases, backend="triton")
    others = [wide_bias[:, 1], *biases[1:]]
    strided = mlp_value_and_grad(wide[:, ::2], first_bias, turned, others, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(plain, strided, strict=True))


@interpreted
@pytest.mark.usefixtures("poisoned")
def test_refuses_what_it_cannot_serve():
    call = network((3, 8), 4)
    for operator in (mlp_value_and_grad, mlp_forward):
        with pytest.raises(
            BackendUnavailableError, match="serves float16 and bfloat16, not float32; backend='reference'"
        ):
            operator(*call, backend="triton")
        with pytest.raises(BackendUnavailableError, match="not float64"):
            operator(*double(*call), backend="triton")


@interpreted
def test_operators_are_registered_as_they_behave():
    x, first_bias, weights, biases = call = network((5, 20, 12), 9, torch.bfloat16)
    operators = torch.ops.tgdp_fast
    torch.library.opcheck(operators.mlp_value_and_grad_triton.default, (*call, True))
    torch.library.opcheck(operators.mlp_forward_triton.default, (*call, True))
    kept = list(_reference_value_and_grad(*call, save_pre_activations=True)[2])
    saved = (x, first_bias, weights, kept)
    needs = [True, False, True, True, False, True, True]
    for cotangents in ((x[:, 0].clone(), x.clone()), (x[:, 0].clone(), None), (None, x.clone())):
        torch.library.opcheck(operators.mlp_value_and_grad_backward_triton.default, (*cotangents, *saved, needs))
    torch.library.opcheck(operators.mlp_backward_triton.default, (x[:, :1].clone(), *saved, needs))


@interpreted
def test_compiles_and_differentiates_as_the_reference():
    def loss(backend, x, first_bias, *parameters):
        weights, biases = parameters[:3], parameters[3:]
        value, gradient = mlp_value_and_grad(x, first_bias, weights, biases, backend=backend)
        outputs = mlp_forward(x, first_bias, weights, biases, backend=backend)
        return (gradient**2).mean() + value.exp().mean() + (outputs**2).mean()

    def gradients(function, backend, dtype):
        x, first_bias, weights, biases = network((3, 40, 50), 60, torch.float16)
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, first_bias, *weights, *biases)]
        return torch.autograd.grad(function(backend, *leaves), leaves)

    got = gradients(loss, "triton", torch.float16)
    eager, exact = gradients(loss, "reference", torch.float16), gradients(loss, "reference", torch.float64)
    assert_no_worse_than_eager(got, eager, exact, of_mlp_backward((3, 40, 50), 60, torch.float16))
    torch._dynamo.reset()
    compiled_loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    again = gradients(compiled_loss, "triton", torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    torch._dynamo.reset()
    x, first_bias, weights, biases = network((3, 40, 50), 60, torch.float16)
    with torch.inference_mode():
        torch.testing.assert_close(
            loss("triton", x, first_bias, *weights, *biases),
            loss("reference", x, first_bias, *weights, *biases),
            rtol=2.0**-8,
            atol=0,
        )


@interpreted
def test_rows_beyond_two_to_the_31_elements():
    # Pages that nobody writes take no memory.
    stride = 2**30 + 64
    try:
        base = torch.empty(2 * stride + 12, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("not enough address space")
    for width in (16, 130):
        x, *others = network((12, width), 3, torch.bfloat16)
        far = base.as_strided((3, 12), (stride, 1)).copy_(x)
        got = mlp_value_and_grad(far, *others, backend="triton")
        near = mlp_value_and_grad(x, *others, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(got, near, strict=True))


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_no_other_row(dtype):
    for sizes in ((2, 64, 64), (10, 130, 64)):
        x, first_bias, weights, biases = network(sizes, 70, dtype)
        whole = mlp_value_and_grad(x, first_bias, weights, biases, backend="triton")
        x[7], x[65] = float("nan"), float("inf")
        spoiled = mlp_value_and_grad(x, first_bias, weights, biases, backend="triton")
        others = [i for i in range(70) if i not in (7, 65)]
        for a, b in zip(whole, spoiled, strict=True):
            assert torch.equal(a[others], b[others])
            assert not b[[7, 65]].isfinite().any()
