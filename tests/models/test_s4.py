"""S4 against dense matrices, recurrences and explicit sums in float64 numpy."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.nn import functional

from tgdp_fast.models.s4 import (
    NPLRKernel,
    S4Block,
    S4Kernel,
    S4Layer,
    fourier_nodes,
    hippo_legs,
    length_corrected,
    two_sided_convolution_direct,
    two_sided_taps,
)
from tgdp_fast.ops.long_convolution import two_sided_convolution

SIZES = [(3, 2, 1), (2, 4, 2), (3, 2, 3), (2, 8, 10), (3, 6, 33), (2, 64, 50), (1, 64, 250)]  # features, d_state, l_max


def as_complex(stored):
    return torch.view_as_complex(stored.detach().double().contiguous()).numpy()


def with_conjugates(half):
    return np.concatenate([half, half.conj()], axis=-1)


def relative(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def general_kernel(features, d_state, l_max, cauchy="pair"):
    """A kernel in float64 with nodes exact to float64, and B and P without the special phases of the initial values."""
    kernel = NPLRKernel(features, d_state, l_max, cauchy).double()
    kernel.omega, kernel.z = fourier_nodes(l_max)
    with torch.no_grad():
        kernel.B.copy_(torch.randn(kernel.B.shape))
        kernel.P.copy_(torch.randn(kernel.P.shape))
        kernel.Q.copy_(torch.view_as_real(torch.view_as_complex(kernel.P).conj().resolve_conj()))
        kernel.w[..., 0] = -0.1 - torch.rand(kernel.w.shape[:-1])
        kernel.w[..., 1] += torch.randn(kernel.w.shape[:-1])
    return kernel


def dense(kernel, feature):
    """A, B, C and dt of one feature, all states, as numpy arrays; C undoes the correction that C~ has."""
    c, b, p, q, w = (as_complex(getattr(kernel, name)) for name in ("C", "B", "P", "Q", "w"))
    dt = np.exp(kernel.log_dt.double().numpy()[feature])
    a = np.diag(with_conjugates(w[feature]))
    a = a - np.outer(with_conjugates(p[0, feature]), with_conjugates(q[0, feature]))
    identity = np.eye(kernel.d_state)
    inverse = np.linalg.inv(identity - dt / 2 * a)
    a_bar, b_bar = inverse @ (identity + dt / 2 * a), inverse @ with_conjugates(b[0, feature]) * dt
    correction = np.linalg.inv(identity - np.linalg.matrix_power(a_bar, kernel.l_max))
    return a_bar, b_bar, with_conjugates(c[:, feature]) @ correction


def recurrence(kernel):
    """Re(C Abar^l Bbar), one step at a time: [2, H, l_max]."""
    result = np.zeros((2, kernel.features, kernel.l_max))
    for feature in range(kernel.features):
        a_bar, state, c = dense(kernel, feature)
        for step in range(kernel.l_max):
            result[:, feature, step] = (c @ state).real
            state = a_bar @ state
    return result


def half_sum(kernel):
    """The kernels of the stored poles alone, as sums over poles and nodes: [2, H, l_max]."""
    c, b, p, q, w, omega, z = (as_complex(getattr(kernel, name)) for name in ("C", "B", "P", "Q", "w", "omega", "z"))
    result = np.zeros((2, kernel.features, kernel.l_max))
    for feature in range(kernel.features):
        dt = np.exp(kernel.log_dt.double().numpy()[feature])
        for channel in range(2):
            for j in range(len(z)):

                def pole_sum(x, y, dt=dt, j=j, feature=feature):
                    return dt * sum(x[n] * y[n] / (z[j] - dt * w[feature, n]) for n in range(len(x)))

                to_c, to_q = c[channel, feature], q[0, feature]
                from_b, from_p = b[0, feature], p[0, feature]
                value = pole_sum(from_b, to_c) - pole_sum(from_p, to_c) * pole_sum(from_b, to_q) / (
                    1 + pole_sum(from_p, to_q)
                )
                value *= 2 / (1 + omega[j])
                # The inverse real transform: frequencies 0 and l_max / 2 stand alone, and only their real parts count.
                alone = j == 0 or 2 * j == kernel.l_max
                waves = np.exp(2j * np.pi * j * np.arange(kernel.l_max) / kernel.l_max)
                result[channel, feature] += (1 if alone else 2) * (value * waves).real / kernel.l_max
    return result


# kernels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_pair_kernel_is_the_recurrence(size):
    kernel = general_kernel(*size)
    # float64 roundings (1e-16) times the condition of I - Abar^l_max, at most 1 / (0.1 * 1e-3) for a single step, and
    # of the inverses of I - dt A / 2.
    assert relative(kernel().detach(), recurrence(kernel)) < 1e-11


@pytest.mark.parametrize("size", [(2, 4, 2), (3, 2, 3), (2, 8, 10), (2, 6, 33)])
def test_half_kernel_is_its_sum_and_another_function(size):
    kernel = general_kernel(*size, cauchy="half")
    half = kernel().detach()
    assert relative(half, half_sum(kernel)) < 1e-12
    kernel.cauchy = "pair"
    assert relative(half, kernel().detach()) > 0.1


@pytest.mark.parametrize("length", [250, 251])
def test_initial_kernels_are_the_recurrence_up_to_the_rounding_of_stored_values(length):
    kernel = NPLRKernel(4, 64, length)
    exact = recurrence(kernel)
    # Nodes, poles and numerators of the sums are rounded to float32 (6e-8); near a pole their difference z - dt w is up
    # to |w| / Re(w) = 5,000 times smaller than they are, so single terms are off by up to 3e-4, the sums by 2e-6.
    assert relative(kernel(torch.float64).detach(), exact) < 1e-5
    assert relative(kernel().detach(), kernel(torch.float64).detach()) < 1e-5
    assert kernel().dtype == torch.float32
    assert torch.equal(kernel(torch.float64), copy.deepcopy(kernel).double()())


def test_hippo_is_unitarily_equivalent_to_its_definition():
    for size in (2, 8, 64):
        n = np.arange(size)
        root = np.sqrt(2 * n + 1)
        a = -np.tril(np.outer(root, root), -1) - np.diag(n + 1.0)
        p, b = np.sqrt(n + 0.5), root
        w, found_p, found_b = hippo_legs(size)
        assert np.all(np.abs(w.real + 0.5) < 1e-12)
        assert np.all(np.diff(np.append(0, w.imag)) > 0)
        full_w, full_p, full_b = with_conjugates(w), with_conjugates(found_p), with_conjugates(found_b)
        transformed = np.diag(full_w) - np.outer(full_p, full_p.conj())
        # Equal transfer functions between all inputs and outputs: B and P stand for both.
        for s in (0.3, 2.0 + 5.0j, 40.0j, -0.2 + 300.0j):
            dense_resolvent = np.linalg.inv(s * np.eye(size) - a)
            resolvent = np.linalg.inv(s * np.eye(size) - transformed)
            for left, full_left in ((p, full_p), (b, full_b)):
                for right, full_right in ((p, full_p), (b, full_b)):
                    expected = left @ dense_resolvent @ right
                    assert abs(full_left.conj() @ resolvent @ full_right - expected) < 1e-10 * abs(expected) + 1e-12


@pytest.mark.parametrize("d_state", [2, 8, 16, 64])
@pytest.mark.parametrize("length", [1, 50, 1000])
def test_length_correction(d_state, length):
    w, p, _ = hippo_legs(d_state)
    a = np.diag(with_conjugates(w)) - np.outer(with_conjugates(p), with_conjugates(p).conj())
    dt = torch.tensor([1e-3, 1e-2, 1e-1], dtype=torch.float64)
    c = torch.randn(2, 3, d_state // 2, dtype=torch.complex64)
    found = length_corrected(c, dt, d_state, length).numpy()
    for feature, step in enumerate(dt.numpy()):
        identity = np.eye(d_state)
        a_bar = np.linalg.solve(identity - step / 2 * a, identity + step / 2 * a)
        full = with_conjugates(c[:, feature].numpy().astype(np.complex128))
        expected = full @ (identity - np.linalg.matrix_power(a_bar, length))
        # Powers are accurate to 1e-6, and a row of C has a norm of about sqrt(d_state) <= 8.
        np.testing.assert_allclose(found[:, feature], expected[:, : d_state // 2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 2, 3, 8, 9, 1000])
def test_nodes_belong_together(length, dtype):
    omega, z = fourier_nodes(length, dtype)
    assert omega.dtype == z.dtype == dtype
    assert omega.shape == z.shape == (length // 2 + 1, 2)
    assert torch.isfinite(z).all()
    exact = np.exp(-2j * np.pi * np.arange(length // 2 + 1) / length)
    np.testing.assert_allclose(as_complex(omega), exact, rtol=0, atol=torch.finfo(dtype).eps)
    stored = as_complex(omega)
    # (1 + omega) z = 2 (1 - omega), the identity on which the closed form rests, up to the rounding of z.
    np.testing.assert_allclose((1 + stored) * as_complex(z), 2 * (1 - stored), rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("cauchy", ["pair", "half"])
@pytest.mark.parametrize("l_max", [4, 5])
def test_gradient_of_c(cauchy, l_max):
    kernel = general_kernel(2, 4, l_max, cauchy)
    c = kernel.C.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda value: functional_call(kernel, {"C": value}, ()), (c,))
    # Linear in C, so the gradient says all: the kernel is its product with C.
    jacobian = torch.autograd.functional.jacobian(lambda value: functional_call(kernel, {"C": value}, ()), c)
    torch.testing.assert_close(torch.einsum("xyzabcd,abcd->xyz", jacobian, c.detach()), kernel().detach())


def test_the_backward_pass_keeps_no_cauchy_matrix():
    kernel = NPLRKernel(4, 64, 100)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        value = kernel()
    assert sum(kept) <= kernel.C.numel()
    value.sum().backward()
    assert kernel.C.grad is not None


# convolution ------------------------------------------------------------------------------------------------


def looped(u, taps):
    u, taps = u.double().numpy(), taps.double().numpy()
    length = u.shape[-1]
    y = np.zeros_like(u)
    for t in range(length):
        for s in range(length):
            y[..., t] += taps[:, t - s + length - 1] * u[..., s]
    return y


@pytest.mark.parametrize("shape", [(0, 2, 5), (1, 1, 1), (2, 3, 2), (1, 2, 3), (3, 1, 17), (2, 5, 50), (1, 2, 101)])
def test_convolutions_match_their_definition(shape):
    u, taps = torch.randn(shape, dtype=torch.float64), torch.randn(shape[1], 2 * shape[2] - 1, dtype=torch.float64)
    expected = looped(u, taps)
    size = np.abs(expected).max(initial=1.0)
    direct, transformed = two_sided_convolution_direct(u, taps), two_sided_convolution(u, taps)
    assert direct.shape == transformed.shape == u.shape
    # A hundred terms, and transforms of at most 2^8 points, whose errors grow with the logarithm.
    np.testing.assert_allclose(direct, expected, rtol=0, atol=1e-14 * size)
    np.testing.assert_allclose(transformed, expected, rtol=0, atol=1e-14 * size)
    single = two_sided_convolution(u.float(), taps.float())
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single, expected, rtol=0, atol=5e-6 * size)


@pytest.mark.parametrize("length", [250, 997, 1000])
def test_transforms_are_as_accurate_as_the_direct_sum_needs(length):
    u, taps = torch.randn(2, 3, length), torch.randn(3, 2 * length - 1)
    exact = two_sided_convolution_direct(u.double(), taps.double())
    # log2(2000) = 11 stages of a float32 rounding (6e-8) each way, twice; a prime length goes by way of another one.
    assert relative(two_sided_convolution(u, taps), exact) < 3e-6


def test_order_of_taps():
    past, future = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0])
    taps = two_sided_taps(torch.stack([past, future])[:, None])
    assert taps.tolist() == [[20.0, 10.0, 1.0, 2.0, 3.0]]
    # An impulse in the middle: later outputs see it in their past.
    impulse = torch.tensor([[[0.0, 1.0, 0.0]]])
    assert two_sided_convolution_direct(impulse, taps).tolist() == [[[10.0, 1.0, 2.0]]]
    one = two_sided_taps(torch.tensor([[[5.0]], [[7.0]]]))
    assert one.tolist() == [[5.0]], "one sample has no future"


# layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cauchy", ["pair", "half"])
@pytest.mark.parametrize("length", [1, 2, 33, 49, 50])
def test_layer_of_any_length(length, cauchy):
    layer = S4Layer(6, 4, 50, cauchy).double()
    u = torch.randn(2, 6, length, dtype=torch.float64)
    past, future = layer.kernel.kernel().detach()
    y = torch.zeros_like(u)
    for t in range(length):
        for s in range(length):
            y[..., t] += (past[:, t - s] if s <= t else future[:, s - t - 1]) * u[..., s]
    y = functional.gelu(y + layer.D.T * u)
    expected = torch.einsum("oi,bil->bol", layer.output_linear.weight, y) + layer.output_linear.bias
    torch.testing.assert_close(layer(u), expected, rtol=0, atol=1e-13)
    taps = layer.taps(length)
    assert taps.shape == (6, 2 * length - 1)
    assert not taps.requires_grad
    torch.testing.assert_close(
        layer.output_linear(functional.gelu(two_sided_convolution(u, taps))), expected, rtol=0, atol=1e-13
    )


def test_taps_are_float64_from_the_stored_values():
    layer = S4Layer(3, 8, 20)
    taps = layer.taps()
    assert taps.dtype == torch.float64
    assert taps.shape == (3, 39)
    assert torch.equal(taps, copy.deepcopy(layer).double().taps())
    assert layer.taps(dtype=torch.float32).dtype == torch.float32
    torch.testing.assert_close(layer.taps(7), layer.taps()[:, 13:26], rtol=0, atol=0)
    layer.D.data += 1.0
    difference = layer.taps() - taps
    torch.testing.assert_close(difference[:, 19], torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6)
    difference[:, 19] = 0
    assert not difference.any()


def test_gelu_is_the_exact_one():
    layer = S4Layer(1, 2, 1).double()
    with torch.no_grad():
        layer.kernel.kernel.C.zero_()
        layer.D.fill_(1.0)
        layer.output_linear.weight.fill_(1.0)
        layer.output_linear.bias.zero_()
    u = torch.linspace(-4, 4, 33, dtype=torch.float64)[:, None, None]
    expected = 0.5 * u * (1 + torch.erf(u / np.sqrt(2.0)))
    torch.testing.assert_close(layer(u), expected, rtol=0, atol=1e-15)  # tanh's approximation is off by up to 5e-4


def test_block_is_normalised_over_features():
    block = S4Block(5, 4, 9).double()
    with torch.no_grad():
        block.norm_layer.weight.normal_()
        block.norm_layer.bias.normal_()
    u = torch.randn(3, 5, 7, dtype=torch.float64)
    v = u + block.s4_layer(u)
    centered = v - v.mean(dim=1, keepdim=True)
    normal = centered / (centered.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    expected = normal * block.norm_layer.weight[:, None] + block.norm_layer.bias[:, None]
    torch.testing.assert_close(block(u), expected, rtol=0, atol=1e-13)


def test_gradients_of_a_layer():
    layer = S4Layer(2, 2, 5).double()
    parameters = {name: value.detach().clone().requires_grad_() for name, value in layer.named_parameters()}
    assert sorted(parameters) == ["D", "kernel.kernel.C", "output_linear.bias", "output_linear.weight"]
    u = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)

    def call(signal, *values):
        return functional_call(layer, dict(zip(parameters, values, strict=True)), (signal,))

    assert torch.autograd.gradcheck(call, (u, *parameters.values()))


def test_autocast_leaves_the_convolution_in_float32():
    layer = S4Layer(16, 8, 100)
    u = torch.randn(2, 16, 100)
    with torch.no_grad():
        exact = layer.eval()(u)
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(u)
            from_16_bits = layer(u.to(torch.bfloat16))
            assert torch.equal(layer.kernel.kernel(), layer.kernel(100))
    # Inputs and weights of one product, and its result, rounded to 8 bits.
    assert relative(found.float(), exact) < 3 * 2**-9
    assert relative(from_16_bits.float(), exact) < 4 * 2**-9


# kept kernels -----------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """A kernel module in eval mode, and the list that grows with each computation."""
    calls = []
    real = NPLRKernel._generate
    monkeypatch.setattr(NPLRKernel, "_generate", lambda self, *a: calls.append(1) or real(self, *a))
    return S4Kernel(3, 4, 10).eval(), calls


def fresh(module, length=10):
    return NPLRKernel._generate(module.kernel, module.kernel.C.detach(), module.kernel.C.dtype)[..., :length]


def test_kernels_are_kept_in_eval_mode_without_gradients(counted):
    module, calls = counted
    with torch.no_grad():
        first = module(10)
        assert torch.equal(module(7), first[..., :7])
        assert module(10).data_ptr() == first.data_ptr()
    assert len(calls) == 1
    module.requires_grad_(False)
    module(10)
    assert len(calls) == 1, "frozen: nobody can ask for a gradient"
    module.requires_grad_(True)
    assert module(10).requires_grad
    assert module(10).requires_grad
    assert len(calls) == 3


def test_training_mode_always_computes(counted):
    module, calls = counted
    module.train()
    with torch.no_grad():
        module(10)
        module(10)
    assert len(calls) == 2


def _replace(module):
    module.kernel.C = torch.nn.Parameter(torch.randn_like(module.kernel.C))


def _optimise(module, **options):
    optimiser = torch.optim.Adam(module.parameters(), lr=0.1, **options)
    with torch.enable_grad():
        module(10).square().sum().backward()
    optimiser.step()


CHANGES = {
    "in place": lambda module: module.kernel.C.mul_(2.0),
    "one element": lambda module: module.kernel.C[0, 0, 0, 0].add_(1.0),
    "buffer in place": lambda module: module.kernel.log_dt.sub_(0.5),
    "replaced": _replace,
    "replaced buffer": lambda module: setattr(module.kernel, "B", 2 * module.kernel.B),
    "load_state_dict": lambda module: module.load_state_dict(S4Kernel(3, 4, 10).state_dict()),
    "load_state_dict, assigned": lambda module: module.load_state_dict(S4Kernel(3, 4, 10).state_dict(), assign=True),
    "converted": lambda module: module.double(),
    "data replaced": lambda module: setattr(module.kernel.C, "data", torch.randn_like(module.kernel.C)),
    "other sums": lambda module: setattr(module.kernel, "cauchy", "half"),
    "optimiser": lambda module: _optimise(module, foreach=False),
    "optimiser, foreach": lambda module: _optimise(module, foreach=True),
    "optimiser, fused": lambda module: _optimise(module, fused=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(counted, change):
    module, _ = counted
    with torch.no_grad():
        before = module(10).clone()
        CHANGES[change](module)
        after = module(10)
        assert torch.equal(after, fresh(module))
        assert after.dtype != before.dtype or not torch.equal(after, before)


def test_uncounted_changes_are_noticed_with_the_mode(counted):
    module, _ = counted
    with torch.no_grad():
        module(10)
        module.kernel.C.data.mul_(2.0)
        module.eval()
        assert torch.equal(module(10), fresh(module))
        module.kernel.C.data.mul_(2.0)
        module.train()
        module.eval()
        assert torch.equal(module(10), fresh(module))


def test_inference_mode(counted):
    module, calls = counted
    with torch.inference_mode():
        module(10)
    module.requires_grad_(False)
    u = torch.randn(1, 3, 10, requires_grad=True)
    two_sided_convolution(u, two_sided_taps(module(10))).sum().backward()  # impossible with tensors of inference mode
    assert u.grad is not None
    assert len(calls) == 1
    with torch.inference_mode():
        made_there = S4Kernel(3, 4, 10).eval()
        before = made_there(10).clone()
        made_there.kernel.C.mul_(2.0)  # which is not counted
        torch.testing.assert_close(made_there(10), 2 * before)


def test_copies_and_pickles_hold_no_kernels(counted):
    module, _ = counted
    empty = len(pickle.dumps(module))
    with torch.no_grad():
        module(10)
        assert module._kept is not None
        assert len(pickle.dumps(module)) == empty
        other = copy.deepcopy(module)
        assert other._kept is None
        other.kernel.C.mul_(2.0)
        assert torch.equal(other(10), fresh(other))
        assert torch.equal(module(10), fresh(module))


# errors -----------------------------------------------------------------------------------------------------


def test_errors():
    with pytest.raises(ValueError, match=r"d_state must be even.*got 3"):
        NPLRKernel(2, 3, 4)
    with pytest.raises(ValueError, match=r"cauchy must be one of half, pair; got 'pairs' \(did you mean 'pair'\?\)"):
        NPLRKernel(2, 4, 4, "pairs")
    with pytest.raises(ValueError, match="l_max must be an integer >= 1, got 0"):
        S4Layer(2, 4, 0)
    with pytest.raises(ValueError, match="features must be an integer >= 1, got 0"):
        S4Block(0)
    layer = S4Layer(2, 4, 10)
    for length in (0, 11):
        with pytest.raises(ValueError, match=rf"length must be in 1\.\.10, the number of taps \(l_max\), got {length}"):
            layer(torch.zeros(1, 2, length))
    with pytest.raises(ValueError, match="length must be at most l_max = 10, got 11"):
        layer.taps(11)
    with pytest.raises(ValueError, match=r"float32 or float64, got torch\.bfloat16; keep the model in float32"):
        layer.to(torch.bfloat16)(torch.zeros(1, 2, 10, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"float32 or float64, got torch\.float16"):
        layer.taps(dtype=torch.float16)
