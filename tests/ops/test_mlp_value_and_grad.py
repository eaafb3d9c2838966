"""mlp_value_and_grad against autograd of a plain MLP, finite differences and float64."""

from __future__ import annotations

import pytest
import torch
from native import needs_extension
from tolerances import assert_no_worse_than_eager, of_mlp_backward, rms
from torch import Tensor
from torch.nn import functional

from tgdp_fast.ops import BackendUnavailableError, mlp_forward, mlp_value_and_grad, registry
from tgdp_fast.ops.mlp import (
    _reference_value_and_grad,
    mlp_value_and_grad_backward_reference,
    mlp_value_and_grad_reference,
)

SHAPES = {1: (3, 5), 2: (3, 5, 2), 3: (1, 4, 7, 3), 4: (17, 9, 5, 11, 3)}  # D, H_1, .., H_L


def problem(depth=3, batch=4, bias_rows=-1, dtype=torch.float64, widths=None, requires_grad=False, seed=0):
    """x, first_bias, weights, biases; bias_rows: 0 for [H_1], 1 for [1, H_1], -1 for [B, H_1]."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size, scale=1.0):
        value = scale * torch.randn(*size, generator=generator, dtype=torch.float64)
        return value.to(dtype).requires_grad_(requires_grad)

    sizes = widths or SHAPES[depth]
    first = {0: (sizes[1],), 1: (1, sizes[1]), -1: (batch, sizes[1])}[bias_rows]
    weights = [draw(m, n, scale=1.5 * n**-0.5) for n, m in zip(sizes, (*sizes[1:], 1), strict=True)]
    biases = [draw(m, scale=0.5) for m in (*sizes[2:], 1)]
    return draw(batch, sizes[0]), draw(*first), weights, biases


def plain_value(x, first_bias, weights, biases):
    """The usual MLP, nothing from the package."""
    hidden = functional.silu(x @ weights[0].T + first_bias)
    for weight, bias in zip(weights[1:-1], biases[:-1], strict=True):
        hidden = functional.silu(functional.linear(hidden, weight, bias))
    return functional.linear(hidden, weights[-1], biases[-1]).squeeze(1)


def autograd_value_and_grad(x, first_bias, weights, biases, create_graph=False):
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        value = plain_value(x, first_bias, weights, biases)
        (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=create_graph)
    return value, gradient


def flat(x, first_bias, weights, biases):
    return [x, first_bias, *weights, *biases]


@pytest.mark.parametrize("bias_rows", [0, 1, -1])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_value_and_gradient_match_autograd(depth, bias_rows):
    arguments = problem(depth, bias_rows=bias_rows)
    value, gradient = mlp_value_and_grad(*arguments)
    expected_value, expected_gradient = autograd_value_and_grad(*arguments)
    # Sums of at most 17 terms of order one through 5 layers, float64.
    torch.testing.assert_close(value, expected_value, rtol=0, atol=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-13)
    twin = mlp_value_and_grad_reference(*arguments)
    assert torch.equal(twin[0], value)
    assert torch.equal(twin[1], gradient)


@pytest.mark.parametrize("bias_rows", [0, 1, -1])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_gradcheck_of_both_outputs_jointly(depth, bias_rows):
    x, first_bias, weights, biases = problem(depth, batch=3, bias_rows=bias_rows, requires_grad=True)

    def call(*inputs: Tensor):
        return mlp_value_and_grad(inputs[0], inputs[1], inputs[2 : depth + 3], inputs[depth + 3 :])

    assert torch.autograd.gradcheck(call, flat(x, first_bias, weights, biases))


def training_losses(value, gradient, target):
    return {
        "both": ((gradient - target) ** 2).sum() + value.sum() + (value.exp() * gradient[:, 0]).sum(),
        "gradient only": ((gradient - target) ** 2).sum(),
        "value only": (value**2).sum(),
    }


@pytest.mark.parametrize("which", ["both", "gradient only", "value only"])
@pytest.mark.parametrize("bias_rows", [0, 1, -1])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_parameter_gradients_match_double_backward(depth, bias_rows, which):
    arguments = problem(depth, batch=6, bias_rows=bias_rows, requires_grad=True)
    inputs = flat(*arguments)
    target = torch.linspace(-1, 1, arguments[0].numel(), dtype=torch.float64).view_as(arguments[0])
    loss = training_losses(*mlp_value_and_grad(*arguments), target)[which]
    expected = training_losses(*autograd_value_and_grad(*arguments, create_graph=True), target)[which]
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    # The gradient of a loss on the input gradient alone does not depend on c: zeros here, unused there.
    got = torch.autograd.grad(loss, inputs)
    wanted = torch.autograd.grad(expected, inputs, allow_unused=True)
    for a, b, tensor in zip(got, wanted, inputs, strict=True):
        b = torch.zeros_like(tensor) if b is None else b
        assert a.shape == tensor.shape
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_only_the_needed_gradients_are_computed(monkeypatch):
    seen = []

    def spy(*call, needs_grad, **_):
        result = mlp_value_and_grad_backward_reference(*call, needs_grad=needs_grad)
        seen.append([gradient is not None for gradient in result])
        return result

    record = registry.Implementation("mlp_value_and_grad_backward", "reference", spy)
    monkeypatch.setitem(registry._registry["mlp_value_and_grad_backward"], "reference", record)
    full = problem(3, requires_grad=True)
    value, gradient = mlp_value_and_grad(*full)
    everything = torch.autograd.grad((gradient**2).sum() + value.sum(), flat(*full))
    for chosen in range(len(flat(*full))):
        leaves = [t.detach().requires_grad_(i == chosen) for i, t in enumerate(flat(*full))]
        value, gradient = mlp_value_and_grad(leaves[0], leaves[1], leaves[2:6], leaves[6:])
        ((gradient**2).sum() + value.sum()).backward()
        # Same arithmetic whatever else is skipped.
        assert torch.equal(leaves[chosen].grad, everything[chosen])
        assert seen[-1] == [i == chosen for i in range(len(leaves))]


def test_a_loss_on_the_value_alone_skips_the_tangent_pass(monkeypatch):
    missing = []

    def spy(*call, needs_grad, **_):
        missing.append([cotangent is None for cotangent in call[:2]])
        return mlp_value_and_grad_backward_reference(*call, needs_grad=needs_grad)

    record = registry.Implementation("mlp_value_and_grad_backward", "reference", spy)
    monkeypatch.setitem(registry._registry["mlp_value_and_grad_backward"], "reference", record)
    arguments = problem(2, requires_grad=True)
    mlp_value_and_grad(*arguments)[0].sum().backward()
    mlp_value_and_grad(*arguments)[1].sum().backward()
    assert missing == [[False, True], [True, False]]


def test_backward_twin_accepts_missing_cotangents():
    x, first_bias, weights, biases = problem(2)
    _, _, saved = _reference_value_and_grad(x, first_bias, weights, biases, save_pre_activations=True)
    fb, gb = torch.randn(4, dtype=torch.float64), torch.randn_like(x)

    def run(value_cotangent, gradient_cotangent):
        return mlp_value_and_grad_backward_reference(value_cotangent, gradient_cotangent, x, first_bias, weights, saved)

    parts = zip(run(fb, None), run(None, gb), run(fb, gb), strict=True)
    # The joint derivative is linear in the cotangents.
    for of_value, of_gradient, joint in parts:
        torch.testing.assert_close(of_value + of_gradient, joint, rtol=1e-12, atol=1e-12)


def test_no_graph_without_need():
    arguments = problem(2, requires_grad=True)
    with torch.inference_mode():
        value, gradient = mlp_value_and_grad(*arguments)
    assert value.is_inference()
    assert gradient.grad_fn is None
    with torch.no_grad():
        assert mlp_value_and_grad(*arguments)[1].grad_fn is None
    assert mlp_value_and_grad(*problem(2))[1].grad_fn is None
    assert mlp_value_and_grad(*arguments)[1].grad_fn is not None


def test_second_derivative_raises():
    arguments = problem(2, requires_grad=True)
    _, gradient = mlp_value_and_grad(*arguments)
    (first,) = torch.autograd.grad((gradient**2).sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_second_backward_gives_the_same_and_a_changed_weight_raises():
    arguments = problem(2, requires_grad=True)
    value, gradient = mlp_value_and_grad(*arguments)
    loss = (gradient**2).sum() + value.sum()
    first = torch.autograd.grad(loss, flat(*arguments), retain_graph=True)
    second = torch.autograd.grad(loss, flat(*arguments), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with torch.no_grad():
        arguments[2][1].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, flat(*arguments))


@pytest.mark.parametrize("bias_rows", [0, 1, -1])
@pytest.mark.parametrize("batch", [0, 1])
def test_empty_and_single_batch(batch, bias_rows):
    arguments = problem(3, batch=batch, bias_rows=bias_rows, requires_grad=True)
    value, gradient = mlp_value_and_grad(*arguments)
    assert value.shape == (batch,)
    assert gradient.shape == arguments[0].shape
    got = torch.autograd.grad((gradient**2).sum() + value.sum(), flat(*arguments))
    expected = autograd_value_and_grad(*arguments, create_graph=True)
    expected = torch.autograd.grad((expected[1] ** 2).sum() + expected[0].sum(), flat(*arguments))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_slices_of_nan_filled_buffers():
    arguments = problem(3, requires_grad=False)

    def scatter(tensor):
        view = torch.full([2 * size for size in reversed(tensor.shape)], float("nan"), dtype=tensor.dtype)
        view = view[tuple(slice(1, None, 2) for _ in tensor.shape)].permute(*reversed(range(tensor.ndim)))
        return view.copy_(tensor).requires_grad_()

    strided = [scatter(t) for t in flat(*arguments)]
    dense = [t.clone().requires_grad_() for t in flat(*arguments)]
    results = []
    for inputs in (strided, dense):
        value, gradient = mlp_value_and_grad(inputs[0], inputs[1], inputs[2:6], inputs[6:])
        loss = (gradient.exp().sum(1) * value).sum()
        # Cotangents of a sum are expanded, strideless tensors: also an unusual layout.
        results.append([value, gradient, *torch.autograd.grad(loss, inputs)])
    # Another layout may take another matmul routine: rounding only.
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_extension)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_odd_length_in_nan_filled_buffers(dtype, backend):
    """On a CPU with AMX, PyTorch's 16-bit matmuls read one number past each row of odd length."""
    sizes, batch = (11, 35, 51), 37
    dense = flat(*problem(widths=sizes, batch=batch, dtype=dtype))
    cotangents = [torch.randn(batch, columns).to(dtype) for columns in (sizes[0], 1)]

    def row_slice(tensor):
        view = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 5), torch.nan, dtype=dtype)[..., : tensor.shape[-1]]
        return view.copy_(tensor)

    results = []
    for convert in (torch.clone, row_slice):
        leaves = [convert(tensor).requires_grad_() for tensor in dense]
        call = leaves[0], leaves[1], leaves[2:5], leaves[5:]
        value, gradient = mlp_value_and_grad(*call, backend=backend)
        output = mlp_forward(*call, backend=backend)
        both = convert(cotangents[1]), convert(cotangents[0])
        results.append([value, gradient, output])
        results[-1] += torch.autograd.grad((gradient, value), leaves, (both[1], both[0][:, 0]))
        results[-1] += torch.autograd.grad(output, leaves, both[0])
    for ours, expected in zip(*results, strict=True):
        assert ours.isfinite().all()
        # Another layout may take another matmul routine: rounding only, in both.
        tolerance = 2 * of_mlp_backward(sizes, batch, dtype)
        assert rms(ours.double() - expected.double()) <= tolerance * max(rms(expected.double()), 1.0)


def test_inputs_and_cotangents_are_not_written():
    arguments = problem(2, requires_grad=True)
    before = [t.detach().clone() for t in flat(*arguments)]
    value, gradient = mlp_value_and_grad(*arguments)
    cotangents = (torch.randn_like(value), torch.randn_like(gradient))
    copies = [t.clone() for t in cotangents]
    torch.autograd.backward((value, gradient), cotangents)
    assert all(torch.equal(a, b) for a, b in zip(flat(*arguments), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(cotangents, copies, strict=True))


def test_extreme_pre_activations_give_finite_results():
    x, first_bias, weights, biases = problem(2, dtype=torch.float32)
    first_bias = first_bias + torch.tensor([-200.0, -95.0, 0.0, 95.0, 200.0])
    leaves = [t.clone().requires_grad_() for t in flat(x, first_bias, weights, biases)]
    value, gradient = mlp_value_and_grad(leaves[0], leaves[1], leaves[2:5], leaves[5:])
    grads = torch.autograd.grad((gradient**2).sum() + value.sum(), leaves)
    assert all(torch.isfinite(t).all() for t in (value, gradient, *grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [33, 257])
def test_error_is_at_most_twice_that_of_eager_autograd(dtype, batch):
    arguments = problem(batch=batch, widths=(17, 129, 130, 127, 128), dtype=dtype, requires_grad=True)
    exact_inputs = [t.detach().double().requires_grad_() for t in flat(*arguments)]
    exact = autograd_value_and_grad(
        exact_inputs[0], exact_inputs[1], exact_inputs[2:7], exact_inputs[7:], create_graph=True
    )
    exact_grads = torch.autograd.grad((exact[1] ** 2).mean() + exact[0].mean(), exact_inputs)
    results = []
    for value, gradient in (
        mlp_value_and_grad(*arguments),
        autograd_value_and_grad(*arguments, create_graph=True),
    ):
        grads = torch.autograd.grad((gradient**2).mean() + value.mean(), flat(*arguments))
        results.append((value, gradient, *grads))
    assert all(t.dtype == dtype for t in results[0])
    # The mean over all elements, for a maximum over few of them is luck.
    tolerance = of_mlp_backward((17, 129, 130, 127, 128), batch, dtype)
    assert_no_worse_than_eager(*results, (*exact, *exact_grads), tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_of_16_bit_inputs_lose_nothing_to_their_dtype(dtype):
    # One unit per input with weight one: every product is exact, so only the final rounding of silu and of its
    # derivatives is left: half a unit in the last place (1 % for float32 itself, and fp16's subnormal spacing). In
    # bfloat16 a sigmoid may be off by 2^-12 of itself.
    z = torch.linspace(-6, 6, 401).to(dtype)
    x = z[:, None].clone().requires_grad_()
    one = torch.ones(1, 1, dtype=dtype)
    value, gradient = mlp_value_and_grad(x, torch.zeros(1, dtype=dtype), [one, one], [torch.zeros(1, dtype=dtype)])
    gradient.sum().backward()
    exact = z.double().requires_grad_()
    (slope,) = torch.autograd.grad(functional.silu(exact).sum(), exact, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), exact)
    half = 1.01 * torch.finfo(dtype).eps / 2
    rough = 2.0**-12 if dtype == torch.bfloat16 else 0.0
    for got, expected in ((value, functional.silu(exact)), (gradient, slope), (x.grad, curvature)):
        torch.testing.assert_close(got.flatten().double(), expected, rtol=half + rough, atol=1e-7 + rough)


def test_backward_twin_reduces_a_broadcast_bias():
    for bias_rows in (0, 1, -1):
        x, first_bias, weights, biases = problem(2, bias_rows=bias_rows)
        _, _, saved = _reference_value_and_grad(x, first_bias, weights, biases, save_pre_activations=True)
        cotangents = (x.new_ones(4), torch.ones_like(x))
        grads = mlp_value_and_grad_backward_reference(*cotangents, x, first_bias, weights, saved)
        expected = [t.shape for t in flat(x, first_bias, weights, biases)]
        assert [gradient.shape for gradient in grads] == expected


def test_autocast_computes_in_its_dtype():
    arguments = problem(2, dtype=torch.float32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, gradient = mlp_value_and_grad(*arguments)
    assert value.dtype == gradient.dtype == torch.bfloat16
    x, first_bias, *rest = (t.bfloat16() for t in flat(*arguments))
    explicit = mlp_value_and_grad(x, first_bias, rest[:3], rest[3:])
    assert torch.equal(value, explicit[0])
    assert torch.equal(gradient, explicit[1])
    (gradient.float() ** 2).sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in flat(*arguments)[:-1])


def zeros(*shapes):
    return [torch.zeros(shape) for shape in shapes]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": torch.zeros(4, 3, 1)}, r"x must have shape \[B, D\], got \(4, 3, 1\)"),
        ({"x": torch.zeros(4, 3, dtype=torch.int64)}, "x must be float16.*got torch.int64"),
        ({"x": torch.zeros(4, 2)}, r"weights\[0\] must have shape \[H_1, 2\], got \(5, 3\)"),
        ({"first_bias": torch.zeros(5, dtype=torch.float64)}, "first_bias must have the dtype of x, torch.float32"),
        ({"first_bias": torch.zeros(3, 5)}, r"first_bias must have shape .*or \(4, 5\), got \(3, 5\)"),
        ({"first_bias": torch.zeros(5, device="meta")}, "first_bias must be on the device of x, cpu, got meta"),
        ({"weights": zeros((1, 3))}, "weights must hold at least W_1 and the head, got 1"),
        ({"weights": zeros((5, 3), (2, 4), (1, 2))}, r"weights\[1\] must have shape \[H_2, 5\]"),
        ({"weights": zeros((5, 3), (2, 5), (2, 2))}, r"weights\[2\] must have shape \[1, 2\]"),
        ({"biases": zeros((1,))}, "biases must hold 2 tensors.*b_1 belongs into first_bias"),
        ({"biases": zeros((1, 2), (1,))}, r"biases\[0\] must have shape \(2,\), got \(1, 2\)"),
        ({"biases": zeros((2,), ())}, r"biases\[1\] must have shape \(1,\), got \(\)"),
        ({"backend": "fast"}, "backend must be one of"),
    ],
)
def test_errors(change, match):
    arguments = {
        "x": torch.zeros(4, 3),
        "first_bias": torch.zeros(5),
        "weights": [torch.zeros(5, 3), torch.zeros(2, 5), torch.zeros(1, 2)],
        "biases": [torch.zeros(2), torch.zeros(1)],
    }
    with pytest.raises(ValueError, match=match):
        mlp_value_and_grad(**(arguments | change))


def test_backend_is_chosen_in_the_forward_call(monkeypatch):
    x, first_bias, weights, biases = problem(2, requires_grad=True)
    used = []

    def forward(*call, **keywords):
        used.append("forward")
        return _reference_value_and_grad(*call, **keywords)

    def backward(*call, **keywords):
        used.append("backward")
        return mlp_value_and_grad_backward_reference(*call, **keywords)

    monkeypatch.setattr(registry, "_registry", {k: dict(v) for k, v in registry._registry.items()})
    registry.register("mlp_value_and_grad", "triton", forward)
    with pytest.raises(BackendUnavailableError, match="mlp_value_and_grad_backward"):
        mlp_value_and_grad(x, first_bias, weights, biases, backend="triton")
    with torch.no_grad():
        mlp_value_and_grad(x, first_bias, weights, biases, backend="triton")
    registry.register("mlp_value_and_grad_backward", "triton", backward)
    used.clear()
    with registry.use_backend("triton"):
        value, _ = mlp_value_and_grad(x, first_bias, weights, biases)
    # Outside of the block, as an autograd thread would be.
    value.sum().backward()
    assert used == ["forward", "backward"]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiles_without_graph_breaks(backend):
    x, first_bias, weights, biases = problem(2, dtype=torch.float32)
    torch._dynamo.reset()

    def call(x):
        return mlp_value_and_grad(x, first_bias, weights, biases)

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    try:
        got = compiled(x)
    except torch._dynamo.exc.BackendCompilerFailed as error:  # a machine without a C++ compiler
        if "compiler" in str(error).lower():
            pytest.skip("no working C++ compiler")
        raise
    for value, expected in zip(got, mlp_value_and_grad(x, first_bias, weights, biases), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


def test_training_loss_compiles_without_graph_breaks():
    arguments = problem(2, dtype=torch.float64, requires_grad=True)

    def loss(x, first_bias, weights, biases):
        value, gradient = mlp_value_and_grad(x, first_bias, weights, biases)
        return (gradient**2).sum() + value.sum()

    torch._dynamo.reset()
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*arguments), flat(*arguments))
    for a, b in zip(got, torch.autograd.grad(loss(*arguments), flat(*arguments)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()
