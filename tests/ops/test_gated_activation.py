"""gated_activation against the formula in float64 numpy, and its contract."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tgdp_fast.ops import BackendUnavailableError, gated_activation
from tgdp_fast.ops.gated_activation import gated_activation_reference


def oracle(x, bias=None):
    """tanh and logistic function in float64 numpy."""
    z = x.double().numpy()
    if bias is not None:
        z = z + bias.double().numpy()[..., None]
    first, second = np.split(z, 2, axis=1)
    return np.tanh(first) / (1 + np.exp(-second))


def draw(*shape, scale=3.0, dtype=torch.float32):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(1))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [None, "shared", "per sample"])
@pytest.mark.parametrize(
    "shape", [(0, 2, 3), (2, 0, 3), (2, 2, 0), (1, 2, 1), (3, 10, 7), (2, 6, 129), (2, 2, 1024), (1, 6, 1025)]
)
def test_matches_the_definition(shape, rows, dtype):
    x = draw(*shape, dtype=dtype)
    bias = {None: None, "shared": draw(shape[1], dtype=dtype), "per sample": draw(*shape[:2], dtype=dtype)}[rows]
    got = gated_activation(x, bias)
    assert got.dtype == dtype
    assert got.shape == (shape[0], shape[1] // 2, shape[2])
    assert got.is_contiguous()
    # float32: results below 1 after about ten roundings of 2^-24, those of the arguments (below 16 in size, for the
    # functions are flat beyond) included; then one to the output's dtype.
    half_ulp = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    subnormal = 0.0 if dtype == torch.float32 else torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    np.testing.assert_allclose(got.double().numpy(), oracle(x, bias), rtol=half_ulp, atol=1e-6 + subnormal)


def test_is_accurate_near_zero_and_far_away():
    magnitudes = torch.logspace(-30, 30, 401)
    first = torch.cat([-magnitudes.flip(0), torch.zeros(1), magnitudes])
    second = torch.linspace(-80, 80, len(first))
    x = torch.stack([first, second])[None]
    got = gated_activation(x)[0, 0].double().numpy()
    exact = oracle(x)[0, 0]
    # Relative: the two functions and their product, some units in the last place (1.2e-7); the exponential of a rounded
    # argument of 80 in size adds 80 * 2^-24 = 5e-6.
    np.testing.assert_allclose(got, exact, rtol=6e-6, atol=0)
    nan = torch.tensor([[[float("nan"), 0.5, 0.5], [0.5, float("nan"), 0.5]]])
    assert torch.isnan(gated_activation(nan)).tolist() == [[[True, True, False]]]
    infinite = torch.tensor([[[float("inf"), -float("inf"), 1.0], [float("inf"), float("inf"), -float("inf")]]])
    assert gated_activation(infinite).tolist() == [[[1.0, -1.0, 0.0]]]


def test_slices_and_other_dtypes_of_the_bias():
    x, bias = draw(3, 10, 33), draw(3, 10)
    expected = gated_activation(x, bias)

    def same(got, expected):
        # PyTorch's functions differ at the ends of rows, by units in the last place.
        torch.testing.assert_close(got, expected, rtol=0, atol=5e-7)

    buffer = torch.full((66, 3, 10), float("nan"))
    scattered = buffer[::2].permute(1, 2, 0).copy_(x)
    wide = torch.full((3, 20), float("nan"))
    wide[:, ::2] = bias
    same(gated_activation(scattered, wide[:, ::2]), expected)
    same(gated_activation(x, bias.double()), expected)
    np.testing.assert_allclose(gated_activation(x, bias.half()).numpy(), oracle(x, bias.half()), rtol=0, atol=1e-6)
    for sample in range(3):
        part = gated_activation(x[sample : sample + 1], bias[sample])
        same(part[0], expected[sample])


def test_float64_and_gradients():
    x, bias = draw(2, 6, 5).double().requires_grad_(), draw(6).double().requires_grad_()
    np.testing.assert_allclose(
        gated_activation(x, bias).detach().numpy(), oracle(x.detach(), bias.detach()), atol=1e-15
    )
    assert torch.autograd.gradcheck(gated_activation, (x, bias))
    assert torch.equal(gated_activation(x, bias), gated_activation_reference(x, bias))


def test_compiles_without_graph_breaks():
    x, bias = draw(2, 6, 5), draw(6)
    torch._dynamo.reset()
    compiled = torch.compile(gated_activation, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, bias), gated_activation(x, bias))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("x", "bias", "match"),
    [
        (torch.zeros(2, 4), None, r"x must have shape \[B, 2 C, L\], got \(2, 4\)"),
        (torch.zeros(2, 5, 3), None, "x must have an even number of channels.*got 5"),
        (torch.zeros(2, 4, 3, dtype=torch.int32), None, "x must be float16.*got torch.int32"),
        (torch.zeros(2, 4, 3), torch.zeros(2), r"bias must have shape \(4,\) or \(2, 4\) for x.*got \(2,\)"),
        (torch.zeros(2, 4, 3), torch.zeros(1, 4), r"bias must have shape.*got \(1, 4\)"),
        (torch.zeros(2, 4, 3), torch.zeros(4, dtype=torch.int64), "bias must be float16.*got torch.int64"),
        (torch.zeros(2, 4, 3), torch.zeros(4, device="meta"), "bias must be on the device of x, cpu, got meta"),
    ],
)
def test_errors(x, bias, match):
    with pytest.raises(ValueError, match=match):
        gated_activation(x, bias)
    with pytest.raises(BackendUnavailableError):
        gated_activation(torch.zeros(2, 4, 3), backend="cpu")
