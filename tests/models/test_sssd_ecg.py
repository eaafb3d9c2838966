"""SSSD-ECG against the model's definition written out in float64 numpy, and as a denoiser."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tgdp_fast import SSSDECG, Denoiser, NoiseSchedule, TrainingConfig, sample, train_denoiser
from tgdp_fast.models.s4 import NPLRKernel, fourier_nodes
from tgdp_fast.models.sssd_ecg.layers import WeightNormConv1d, diffusion_step_features

# Every size another number, so that none can stand for another.
TINY = {
    "in_channels": 3,
    "out_channels": 2,
    "res_channels": 8,
    "skip_channels": 7,
    "num_res_layers": 2,
    "step_dims": (10, 6, 9),
    "num_classes": 4,
    "label_dim": 5,
    "l_max": 50,
    "d_state": 6,
}
MEDIUM = {"res_channels": 64, "skip_channels": 64, "num_res_layers": 4, "l_max": 250}
BLOCKS = "residual_layer.residual_blocks."
KERNEL = f"{BLOCKS}0.S41.s4_layer.kernel.kernel."


def randomised(**config):
    """A network with random values in all parameters, also those that start at 0 or 1."""
    network = SSSDECG(**config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("weight_g"):
                parameter.mul_(1.0 + torch.rand_like(parameter))
            elif "norm_layer" in name or name.startswith("final_conv"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return network.eval()


def arguments(network, batch=2, length=None, dtype=torch.float32):
    length = network.l_max if length is None else length
    x = torch.randn(batch, network.in_channels, length, dtype=torch.float64).to(dtype)
    steps = torch.linspace(0, 199, batch).round()
    labels = torch.rand(batch, network.num_classes) if network.num_classes else None
    return x, steps, labels


def relative(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


# the definition ---------------------------------------------------------------------------------------------


def conv(x, weight, bias):
    """Cross-correlation over time with zero padding; x [C, L], weight [O, C, k]."""
    length, reach = x.shape[1], weight.shape[2] // 2
    y = np.tile(bias[:, None], (1, length))
    for t in range(length):
        for k in range(weight.shape[2]):
            if 0 <= t + k - reach < length:
                y[:, t] += weight[:, :, k] @ x[:, t + k - reach]
    return y


def weight_norm_conv(x, state, prefix):
    v, g = state[f"{prefix}weight_v"], state[f"{prefix}weight_g"]
    weight = np.stack([g[o, 0, 0] * v[o] / np.sqrt((v[o] ** 2).sum()) for o in range(len(v))])
    return conv(x, weight, state[f"{prefix}bias"])


def swish(x):
    return x / (1 + np.exp(-x))


def linear(x, state, prefix):
    return state[f"{prefix}weight"] @ x + state[f"{prefix}bias"]


def pair_kernels(state, prefix, l_max):
    """[2, H, l_max] by the recurrence of the dense state space."""

    def values(name):
        return state[prefix + name][..., 0] + 1j * state[prefix + name][..., 1]

    def full(half):
        return np.concatenate([half, half.conj()], axis=-1)

    dt = np.exp(state[f"{prefix}log_dt"])
    result = np.zeros((2, len(dt), l_max))
    for h in range(len(dt)):
        a = np.diag(full(values("w")[h])) - np.outer(full(values("P")[0, h]), full(values("Q")[0, h]))
        identity = np.eye(len(a))
        inverse = np.linalg.inv(identity - dt[h] / 2 * a)
        a_bar, s = inverse @ (identity + dt[h] / 2 * a), inverse @ full(values("B")[0, h]) * dt[h]
        c = full(values("C")[:, h]) @ np.linalg.inv(identity - np.linalg.matrix_power(a_bar, l_max))
        for t in range(l_max):
            result[:, h, t] = (c @ s).real
            s = a_bar @ s
    return result


def half_kernels(state, prefix, l_max):
    """[2, H, l_max] by the sums over the stored poles, and an explicit inverse transform."""

    def values(name):
        return state[prefix + name][..., 0] + 1j * state[prefix + name][..., 1]

    z, omega, dt = values("z"), values("omega"), np.exp(state[f"{prefix}log_dt"])[:, None]

    def r(x, y):
        return dt * sum(x[:, n, None] * y[:, n, None] / (z - dt * values("w")[:, n, None]) for n in range(x.shape[1]))

    b, p, q = values("B")[0], values("P")[0], values("Q")[0]
    result = np.zeros((2, len(dt), l_max))
    for channel, c in enumerate(values("C")):
        spectrum = 2 / (1 + omega) * (r(b, c) - r(p, c) * r(b, q) / (1 + r(p, q)))
        for t in range(l_max):
            for j in range(len(z)):
                wave = spectrum[:, j] * np.exp(2j * np.pi * j * t / l_max)
                result[channel, :, t] += (1 if j == 0 or 2 * j == l_max else 2) * wave.real / l_max
    return result


def s4_block(u, state, prefix, kernels):
    features, length = u.shape
    past, future = kernels
    y = state[f"{prefix}s4_layer.D"][0][:, None] * u
    for t in range(length):
        for s in range(length):
            y[:, t] += (past[:, t - s] if s <= t else future[:, s - t - 1]) * u[:, s]
    y = 0.5 * y * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
    weight, bias = (state[f"{prefix}s4_layer.output_linear.{name}"] for name in ("weight", "bias"))
    v = u + weight @ y + bias
    for t in range(length):
        centered = v[:, t] - v[:, t].mean()
        v[:, t] = centered / np.sqrt((centered**2).mean() + 1e-5)
        v[:, t] = v[:, t] * state[f"{prefix}norm_layer.weight"] + state[f"{prefix}norm_layer.bias"]
    return v


def definition(network, x, steps, labels):
    """The prediction for one sample at a time, from the state dict alone."""
    state = {name: value.double().numpy() for name, value in network.state_dict().items()}
    generate = pair_kernels if network.cauchy == "pair" else half_kernels
    blocks = [f"residual_layer.residual_blocks.{n}." for n in range(network.num_res_layers)]
    kernels = {
        prefix: generate(state, f"{prefix}s4_layer.kernel.kernel.", network.l_max)
        for block in blocks
        for prefix in (f"{block}S41.", f"{block}S42.")
    }
    predictions = []
    for sample_index, signal in enumerate(x.double().numpy()):
        half = network.step_dims[0] // 2
        angles = [float(steps[sample_index]) * 10 ** (-4 * i / (half - 1)) for i in range(half)]
        step = np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
        step = swish(linear(step, state, "residual_layer.fc_t1."))
        step = swish(linear(step, state, "residual_layer.fc_t2."))
        label = None if labels is None else labels[sample_index].double().numpy() @ state["embedding.weight"]

        h = np.maximum(weight_norm_conv(signal, state, "init_conv.0.conv."), 0)
        skip = np.zeros((network.skip_channels, signal.shape[1]))
        for block in blocks:
            u = h + linear(step, state, f"{block}fc_t.")[:, None]
            u = weight_norm_conv(u, state, f"{block}conv_layer.conv.")
            u = s4_block(u, state, f"{block}S41.", kernels[f"{block}S41."])
            if label is not None:
                u = u + linear(label, state, f"{block}fc_label.")[:, None]
            u = s4_block(u, state, f"{block}S42.", kernels[f"{block}S42."])
            first, second = u[: network.res_channels], u[network.res_channels :]
            gated = np.tanh(first) / (1 + np.exp(-second))
            h = (h + weight_norm_conv(gated, state, f"{block}res_conv.")) / math.sqrt(2)
            skip += weight_norm_conv(gated, state, f"{block}skip_conv.")
        skip /= math.sqrt(network.num_res_layers)
        hidden = np.maximum(weight_norm_conv(skip, state, "final_conv.0.conv."), 0)
        predictions.append(conv(hidden, state["final_conv.2.conv.weight"], state["final_conv.2.conv.bias"]))
    return np.stack(predictions)


def exact_nodes(network):
    """In float64, with nodes exact to float64: the recurrence holds for those only."""
    network = network.double()
    for module in network.modules():
        if isinstance(module, NPLRKernel):
            module.omega, module.z = fourier_nodes(module.l_max)
    return network


@pytest.mark.parametrize("cauchy", ["pair", "half"])
@pytest.mark.parametrize("length", [50, 33, 1])
@pytest.mark.parametrize("l_max", [50, 51])
def test_float64_matches_the_definition(cauchy, length, l_max):
    network = exact_nodes(randomised(**{**TINY, "l_max": l_max}, cauchy=cauchy))
    x, steps, labels = arguments(network, length=length, dtype=torch.float64)
    with torch.no_grad():
        found = network(x, steps, labels.double())
    assert found.shape == (2, 2, length)
    # Some dozens of roundings of 1e-16, those of kernels times a condition of up to 1e4; LayerNorm divides by the
    # spread of 16 features, which is of order one.
    assert relative(found, definition(network, x, steps, labels)) < 1e-12


def test_unconditional_network_matches_the_definition():
    network = exact_nodes(randomised(**{**TINY, "num_classes": 0}))
    x, steps, _ = arguments(network, length=20, dtype=torch.float64)
    with torch.no_grad():
        assert relative(network(x, steps), definition(network, x, steps, None)) < 1e-12


@pytest.mark.parametrize("cauchy", ["pair", "half"])
def test_float32_is_close_to_float64(cauchy):
    network = randomised(**MEDIUM, cauchy=cauchy)
    assert network.event_shape == (8, 250)
    reference = copy.deepcopy(network).double()
    for length in (250, 101):
        x, steps, labels = arguments(network, length=length)
        with torch.no_grad():
            found, exact = network(x, steps, labels), reference(x.double(), steps, labels.double())
        assert found.dtype == torch.float32
        # Kernels are within 2e-6, everything else within some roundings of 6e-8 for each of 8 S4 layers.
        assert relative(found, exact) < 3e-6
        assert exact.abs().mean() > 0.1


def test_the_two_sums_are_different_networks():
    network = randomised(**MEDIUM)
    other = SSSDECG(**MEDIUM, cauchy="half").eval()
    other.load_state_dict(network.state_dict())
    call = arguments(network, 1)
    with torch.no_grad():
        assert relative(other(*call), network(*call)) > 0.05


# parts ------------------------------------------------------------------------------------------------------


def test_step_features_have_the_exponents_of_the_code_not_of_the_paper():
    features = diffusion_step_features(torch.tensor([0.0, 1.0, 199.0]), 128)
    assert features.dtype == torch.float64
    assert features[0].tolist() == [0.0] * 64 + [1.0] * 64
    frequencies = torch.asin(features[1, :64])
    assert frequencies[0].item() == pytest.approx(1.0)
    assert frequencies[63].item() == pytest.approx(1e-4)
    torch.testing.assert_close(frequencies[1:] / frequencies[:-1], torch.full((63,), 10 ** (-4 / 63)).double())
    # In float32 throughout, angles of up to 199 radians carry errors of 199 * 2^-24.
    rounded = 199 * torch.exp(torch.arange(64) * (-math.log(10000) / 63))
    single = torch.cat([rounded.sin(), rounded.cos()]).double()
    assert 0 < (features[2] - single).abs().max() < 2 * 199 * 2**-24
    assert torch.equal(diffusion_step_features(torch.tensor([199]), 128)[0], features[2])


def test_padding_does_not_see_the_step_embedding():
    """What a table of biases per step must reproduce: the two ends differ from the inside."""
    block = randomised(**TINY).double().residual_layer.residual_blocks[0]
    x, embedding = torch.randn(1, 8, 7, dtype=torch.float64), torch.randn(1, 9, dtype=torch.float64)
    seen = []
    block.S41.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    block(x, embedding, torch.zeros(1, 5, dtype=torch.float64))
    bias = torch.einsum("oik,i->ok", block.conv_layer.conv.weight, block.fc_t(embedding)[0])
    difference = seen[0][0] - block.conv_layer(x)[0]
    whole, first, last = bias.sum(dim=1), bias[:, 1:].sum(dim=1), bias[:, :2].sum(dim=1)
    torch.testing.assert_close(difference[:, 1:-1], whole[:, None].expand(-1, 5))
    torch.testing.assert_close(difference[:, 0], first)
    torch.testing.assert_close(difference[:, -1], last)
    assert (whole - first).abs().max() > 0.01


def test_weight_norm_has_no_second_weight():
    convolution = WeightNormConv1d(3, 4, 3)
    assert list(convolution.state_dict()) == ["bias", "weight_g", "weight_v"]
    torch.testing.assert_close(convolution.weight, convolution.weight_v)  # at first
    x = torch.randn(2, 3, 6)
    before = convolution(x) - convolution.bias[:, None]
    with torch.no_grad():
        convolution.weight_g.mul_(2.0)
        torch.testing.assert_close(convolution(x) - convolution.bias[:, None], 2 * before)
        convolution.weight_v.mul_(5.0)
        torch.testing.assert_close(convolution(x) - convolution.bias[:, None], 2 * before)
        convolution.load_state_dict(
            {"bias": torch.zeros(4), "weight_g": torch.full((4, 1, 1), 3.0), "weight_v": torch.ones(4, 3, 3)}
        )
    torch.testing.assert_close(convolution(torch.ones(1, 3, 3))[0, :, 1], torch.full((4,), 9.0))
    parameters = [torch.randn_like(value).double().requires_grad_() for value in convolution.parameters()]

    def call(x, *values):
        return torch.func.functional_call(
            convolution, dict(zip(("bias", "weight_g", "weight_v"), values, strict=True)), x
        )

    assert torch.autograd.gradcheck(call, (x.double(), *parameters))


def test_a_new_network_predicts_zero():
    network = SSSDECG(**TINY)
    x, steps, labels = arguments(network)
    assert not network(x, steps, labels).any()


# labels -----------------------------------------------------------------------------------------------------


def test_labels_are_weights_of_class_embeddings():
    network = randomised(**TINY)
    x, steps = torch.randn(1, 3, 50).expand(3, -1, -1), torch.full((3,), 7)
    with torch.no_grad():
        by_index = network(x, steps, torch.tensor([0, 2, 3]))
        by_row = network(x, steps, torch.eye(4)[[0, 2, 3]])
        assert torch.equal(by_index, by_row)
        assert relative(by_index[0], by_index[1]) > 1e-3
        weight = network.embedding.weight
        rows = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.25, 0.75, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
        expected = torch.stack([weight[0] + weight[2], 0.25 * weight[0] + 0.75 * weight[1], 0 * weight[0]])
        torch.testing.assert_close(network.embed_labels(rows), expected)
        assert torch.equal(network.embed_labels(rows.bool()), network.embed_labels(rows.ceil()))


def test_errors_of_calls():
    network = SSSDECG(**TINY)
    x, steps, labels = arguments(network)
    with pytest.raises(ValueError, match="labels are required: this network is conditional on 4 classes"):
        network(x, steps)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.3, got values from 0 to 4"):
        network(x, steps, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"rows \[B, 4\], got torch.float32 of shape \(2, 5\)"):
        network(x, steps, torch.zeros(2, 5))
    with pytest.raises(ValueError, match="this network is unconditional; build it with num_classes > 0"):
        SSSDECG(**{**TINY, "num_classes": 0})(x, steps, labels)
    for shape in [(2, 3), (2, 4, 50), (2, 3, 51), (2, 3, 0)]:
        with pytest.raises(ValueError, match=r"x must have shape \[B, 3, L\] with L in 1\.\.50, got"):
            network(torch.zeros(shape), steps, labels)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"res_channels": 0}, "res_channels must be an integer >= 1, got 0"),
        ({"num_res_layers": 1.5}, "num_res_layers must be an integer >= 1, got 1.5"),
        ({"step_dims": (7, 4, 4)}, r"step_dims\[0\] must be even .* got 7"),
        ({"step_dims": (2, 4, 4)}, r"step_dims\[0\] must be an integer >= 4, got 2"),
        ({"step_dims": (8, 4)}, r"step_dims must be three integers \(features, hidden, embedding\), got \(8, 4\)"),
        ({"num_classes": -1}, "num_classes must be an integer >= 0, got -1"),
        ({"d_state": 5}, "d_state must be even"),
        ({"cauchy": "full"}, "cauchy must be one of half, pair; got 'full'"),
    ],
)
def test_errors_of_arguments(config, message):
    with pytest.raises(ValueError, match=message):
        SSSDECG(**{**TINY, **config})


# batches, precision, gradients ------------------------------------------------------------------------------


def test_batches():
    network = randomised(**TINY)
    x, steps, labels = arguments(network, 5)
    with torch.no_grad():
        together = network(x, steps, labels)
        for i in range(5):
            alone = network(x[i : i + 1], steps[i : i + 1], labels[i : i + 1])
            # Sums in another order: some roundings of float32, amplified by LayerNorm.
            torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)
        assert network(x[:0], steps[:0], labels[:0]).shape == (0, 2, 50)
        scattered = torch.full((50, 5, 6), float("nan"))
        scattered[..., ::2] = x.permute(2, 0, 1)
        found = network(scattered[..., ::2].permute(1, 2, 0), steps.long(), labels)
        torch.testing.assert_close(found, together, rtol=1e-4, atol=1e-5)


def test_one_channel_everywhere():
    smallest = dict.fromkeys(("in_channels", "out_channels", "res_channels", "skip_channels", "num_res_layers"), 1)
    network = exact_nodes(randomised(**smallest, step_dims=(4, 1, 1), num_classes=1, label_dim=1, l_max=3, d_state=2))
    x, steps, labels = arguments(network, dtype=torch.float64)
    with torch.no_grad():
        found = network(x, steps, labels.double())
    np.testing.assert_allclose(found, definition(network, x, steps, labels), rtol=0, atol=1e-10)


def test_autocast():
    network = randomised(**MEDIUM)
    call = arguments(network)
    with torch.no_grad():
        exact = network(*call)
        with torch.autocast("cpu", torch.bfloat16):
            found = network(*call)
    assert found.dtype == torch.float32
    # 8 bits, through 4 blocks of 4 products each.
    assert relative(found, exact) < 2e-2


def test_kernels_are_computed_once_for_sampling_and_again_after_a_change(monkeypatch):
    network = randomised(**TINY)
    calls = []
    real = NPLRKernel._generate
    monkeypatch.setattr(NPLRKernel, "_generate", lambda self, *a: calls.append(1) or real(self, *a))
    call = arguments(network)
    with torch.no_grad():
        first = network(*call)
        assert torch.equal(network(*call), first)
        assert len(calls) == 4
        network.get_parameter(f"{KERNEL}C").mul_(2.0)
        changed = network(*call)
        assert len(calls) == 5
        assert not torch.equal(changed, first)
        assert torch.equal(changed, copy.deepcopy(network)(*call))


def test_every_parameter_has_a_gradient():
    network = randomised(**TINY).train()
    network(*arguments(network)).square().mean().backward()
    for name, parameter in network.named_parameters():
        if name.startswith(f"{BLOCKS}1.res_conv."):  # Nothing comes after the last block's x.
            assert parameter.grad is None
            continue
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name
    assert not any(buffer.requires_grad for buffer in network.buffers())


def test_gradients_match_finite_differences():
    network = randomised(**{**TINY, "l_max": 7}).double()
    x, steps, labels = arguments(network, 1, dtype=torch.float64)
    labels = labels.double()
    network(x, steps, labels).square().sum().backward()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            kept, direction = parameter.clone(), torch.randn_like(parameter)
            sides = []
            for size in (1e-5, -1e-5):
                parameter.copy_(kept + size * direction)
                sides.append(network(x, steps, labels).square().sum().item())
            parameter.copy_(kept)
            found = 0.0 if parameter.grad is None else (parameter.grad * direction).sum().item()
            # Central differences: error of the order of 1e-10 from the third derivative, 1e-11 from rounding.
            assert found == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-5, abs=1e-7), name


# as a denoiser ----------------------------------------------------------------------------------------------

SCHEDULE = NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 200))
SQUARE = {**TINY, "out_channels": 3, "l_max": 20}


def test_sampling(tmp_path: Path):
    denoiser = Denoiser(randomised(**SQUARE), SCHEDULE)
    assert denoiser.event_shape == (3, 20)
    labels = torch.tensor([[1.0, 0.0, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0]])
    drawn = sample(denoiser, num=2, labels=labels, steps=5, seed=0, progress=False)
    assert drawn.shape == (2, 3, 20)
    assert torch.isfinite(torch.as_tensor(drawn)).all()
    rounded = sample(denoiser, num=2, labels=labels, steps=5, seed=0, progress=False, precision="bf16")
    assert relative(rounded, drawn) < 5e-2


def test_the_network_receives_the_index_of_the_step():
    network = randomised(**SQUARE)
    x, _, labels = arguments(network)
    denoiser = Denoiser(network, SCHEDULE)
    with torch.no_grad():
        assert torch.equal(denoiser.epsilon(x, 17.0, labels), network(x, torch.tensor([17, 17]), labels))


@pytest.mark.parametrize("cauchy", ["pair", "half"])
def test_checkpoint_folder(tmp_path: Path, cauchy):
    denoiser = Denoiser(randomised(**SQUARE, cauchy=cauchy), SCHEDULE)
    denoiser.save(tmp_path / "model")
    loaded = Denoiser.load(tmp_path / "model")
    assert isinstance(loaded.network, SSSDECG)
    assert loaded.network.to_config() == denoiser.network.to_config()
    assert loaded.network.cauchy == cauchy
    x, _, labels = arguments(denoiser.network)
    with torch.no_grad():
        assert torch.equal(loaded.epsilon(x, 3.0, labels), denoiser.epsilon(x, 3.0, labels))


def test_fine_tuning_changes_the_kernels():
    denoiser = Denoiser(randomised(**SQUARE), SCHEDULE)
    data, labels = torch.randn(8, 3, 20), torch.randint(4, (8,))
    settings = TrainingConfig(steps=4, batch_size=4, ema_decay=0.5, warmup=1)
    tuned = train_denoiser(data, labels=labels, initial=denoiser, settings=settings)
    before, after = (each.network.get_parameter(f"{KERNEL}C") for each in (denoiser, tuned))
    assert not torch.equal(before, after)
    x, labels = data[:2], labels[:2]
    with torch.no_grad():
        found = tuned.epsilon(x, 3.0, labels)
        assert torch.equal(found, copy.deepcopy(tuned).epsilon(x, 3.0, labels)), "no kept kernel is stale"
        assert not torch.equal(found, denoiser.epsilon(x, 3.0, labels))
