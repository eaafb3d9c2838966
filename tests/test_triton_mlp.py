"""Triton kernels of the perceptron operators, in Triton's interpreter: against float64 at awkward shapes."""

from __future__ import annotations

import pytest
import torch
from native import run_with
from test_mlp_native import check, double, network
from triton_interpreter import compiled, interpreted, run_interpreted

from tgdp_fast.ops import BackendUnavailableError, mlp_value_and_grad, perceptron
from tgdp_fast.ops._dispatch import lookup
from tgdp_fast.ops.mlp_value_and_grad import _forward_reference, mlp_value_and_grad_backward_reference

pytest.importorskip("triton", reason="Triton is not installed; run `pip install triton`")

OPERATORS = ("mlp_value_and_grad", "mlp_value_and_grad_backward", "perceptron", "perceptron_backward")
# Layer by layer and, up to 128 units, in one launch; blocks that end in the middle; one row, none; few inputs and more.
SHAPES = [((1, 1), 1), ((5, 33), 3), ((21, 33, 50), 0), ((8, 130, 7, 64), 37), ((2, 128, 128, 128, 128), 65)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@compiled
def test_in_the_interpreter():
    assert run_interpreted("test_triton_mlp.py") == len(SHAPES) * len(DTYPES) * 2 + len(DTYPES) * 3 + 3


@compiled
@pytest.mark.slow(ci=True)
@pytest.mark.parametrize("operator", OPERATORS)
def test_validates_in_the_interpreter(operator):
    code = f"""
import triton_interpreter, torch
from tgdp_fast.benchmark import validate
torch.use_deterministic_algorithms(True)  # new tensors hold NaN
assert torch.isnan(torch.empty(100)).all()
rows = [row for precision in ("fp32", "bf16", "fp16") for row in validate._rows({operator!r}, "triton", precision)]
print(len(rows), len(validate.failures(rows)), {{row["verdict"] for row in rows}})
"""
    assert run_with(code, TRITON_INTERPRET="1").split(maxsplit=2) == ["36", "0", "{'passed'}\n"]


def run(operator, *call, **keywords):
    return lookup(operator, "triton").function(*call, **keywords)


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sizes", "batch"), SHAPES)
def test_value_gradient_and_kept_pre_activations(sizes, batch, dtype, per_sample):
    call = network(sizes, batch, dtype, per_sample)
    value, gradient, kept = run("mlp_value_and_grad", *call, save_pre_activations=True)
    eager_value, eager_gradient, eager_kept = _forward_reference(*call, save_pre_activations=True)
    exact = _forward_reference(*double(*call), save_pre_activations=True)
    check(
        (value, gradient, *kept), (eager_value, eager_gradient, *eager_kept), (*exact[:2], *exact[2]), dtype, max(sizes)
    )


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("cotangents", ["value", "gradient", "both"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_joint_derivative(dtype, cotangents):
    x, first_bias, weights, biases = call = network((5, 40, 33), 37, dtype)
    generator = torch.Generator().manual_seed(1)
    fb = torch.randn(37, generator=generator).to(dtype) if cotangents != "gradient" else None
    gb = torch.randn(x.shape, generator=generator).to(dtype) if cotangents != "value" else None
    kept = _forward_reference(*call, save_pre_activations=True)[2]
    needs = (True,) * 7
    got = run("mlp_value_and_grad_backward", fb, gb, x, first_bias, weights, kept, needs_grad=needs)
    eager = mlp_value_and_grad_backward_reference(fb, gb, x, first_bias, weights, kept, needs_grad=needs)
    x, first_bias, weights, biases = double(*call)
    kept = _forward_reference(x, first_bias, weights, biases, save_pre_activations=True)[2]
    pair = [None if cotangent is None else cotangent.double() for cotangent in (fb, gb)]
    exact = mlp_value_and_grad_backward_reference(*pair, x, first_bias, weights, kept, needs_grad=needs)
    check(got, eager, exact, dtype, 40)


@interpreted
@pytest.mark.usefixtures("poisoned")
def test_gives_only_what_is_needed_and_the_same_again():
    x, first_bias, weights, biases = call = network((4, 20, 30), 50)
    kept = _forward_reference(*call, save_pre_activations=True)[2]
    cotangents = torch.randn(50), torch.randn(50, 4)
    arguments = (*cotangents, x, first_bias, weights, kept)
    everything = run("mlp_value_and_grad_backward", *arguments, needs_grad=(True,) * 7)
    for chosen in range(7):
        needs = tuple(i == chosen for i in range(7))
        got = run("mlp_value_and_grad_backward", *arguments, needs_grad=needs)
        assert [g is not None for g in got] == list(needs)
        assert torch.equal(got[chosen], everything[chosen])


@interpreted
@pytest.mark.usefixtures("poisoned")
def test_takes_any_strides():
    x, first_bias, weights, biases = network((6, 20, 30), 21)
    wide = torch.full((21, 12), float("nan"))
    wide[:, ::2] = x
    turned = [weight.t().contiguous().t() for weight in weights]
    plain = mlp_value_and_grad(x, first_bias, weights, biases, backend="triton")
    strided = mlp_value_and_grad(wide[:, ::2], first_bias, turned, biases, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(plain, strided, strict=True))


@interpreted
@pytest.mark.usefixtures("poisoned")
def test_refuses_what_it_cannot_serve():
    call = double(*network((3, 8), 4))
    for operator in (mlp_value_and_grad, perceptron):
        with pytest.raises(BackendUnavailableError, match="not float64"):
            operator(*call, backend="triton")
