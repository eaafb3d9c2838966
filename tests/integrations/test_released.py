"""The calls of released code against its formulas, written out here in float64 numpy, in both conventions."""

from __future__ import annotations

import math
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_sssd_ecg import definition, randomised, relative

from tgdp_fast import SSSDECG, CheckpointError, Denoiser, NoiseSchedule, sample, solver_table
from tgdp_fast.integrations.released import (
    RELEASED_LEADS,
    SSSD_ECG,
    Bandit_Critic_Guide,
    GuidanceQt,
    calc_diffusion_hyperparams,
    generate_four_leads,
    sampling_label,
    sampling_label_guided,
)

LENGTH = 40  # the shortest signals that leave the guidance network a few positions
SIZES = {
    "in_channels": 3,
    "out_channels": 3,
    "res_channels": 4,
    "skip_channels": 5,
    "num_res_layers": 2,
    "diffusion_step_embed_dim_in": 6,
    "diffusion_step_embed_dim_mid": 7,
    "diffusion_step_embed_dim_out": 9,
    "s4_lmax": LENGTH,
    "s4_d_state": 4,
    "label_embed_dim": 5,
    "label_embed_classes": 4,
}
STEPS = 5


def network(**arguments) -> SSSD_ECG:
    """Random values in all parameters, the last layer's too, which start at zero."""
    plain = SSSD_ECG(**{**SIZES, "convention": "paper", **arguments})
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return plain.double().eval()


def guidance() -> GuidanceQt:
    """A network whose gradient is of the size of the noise."""
    net = GuidanceQt(in_channels=3, length=LENGTH, width=11, depth=2, time_features=6, time_scale=0.3)
    with torch.no_grad():
        for layer in (net.conv1, net.conv2, net.qt[0], net.qt[2]):
            layer.weight.mul_(3.0)
    return net.double().eval()


# the formulas ----------------------------------------------------------------------------------------------------


def qt_and_gradient(state: dict[str, np.ndarray], x: np.ndarray, t: int) -> tuple[float, np.ndarray]:
    """f and its gradient for one signal [C, L], by the chain rule on the state dict."""

    def strided(weight, bias, signal):
        out, _, kernel = weight.shape
        count = (signal.shape[1] - kernel) // 2 + 1
        result = np.empty((out, count))
        for position in range(count):
            window = signal[:, 2 * position : 2 * position + kernel]
            result[:, position] = np.einsum("ock,ck->o", weight, window) + bias
        return result

    def transposed(weight, cotangent, shape):
        result = np.zeros(shape)
        for position in range(cotangent.shape[1]):
            window = result[:, 2 * position : 2 * position + weight.shape[2]]
            window += np.einsum("ock,o->ck", weight, cotangent[:, position])
        return result

    first = strided(state["conv1.weight"], state["conv1.bias"], x)
    second = strided(state["conv2.weight"], state["conv2.bias"], first)
    angles = 2 * math.pi * state["embed.0.W"] * t
    time = state["embed.1.weight"] @ np.concatenate([np.sin(angles), np.cos(angles)]) + state["embed.1.bias"]
    a, slopes = np.concatenate([second.ravel(), time]), []
    indices = sorted({int(name.split(".")[1]) for name in state if name.startswith("qt.")})
    for index in indices:
        z = state[f"qt.{index}.weight"] @ a + state[f"qt.{index}.bias"]
        gate = 1 / (1 + np.exp(-z))
        a, slope = (z, 1.0) if index == indices[-1] else (z * gate, gate * (1 + z * (1 - gate)))
        slopes.append(slope)
    cotangent = np.ones(1)
    for index, slope in zip(reversed(indices), reversed(slopes), strict=True):
        cotangent = state[f"qt.{index}.weight"].T @ (slope * cotangent)
    grid = cotangent[: second.size].reshape(second.shape)
    return float(a[0]), transposed(state["conv1.weight"], transposed(state["conv2.weight"], grid, first.shape), x.shape)


def ancestral(net, qt, noise, labels, betas, scale, convention) -> np.ndarray:
    """Samples [B, C, L] from the betas and the state dicts alone; float64 throughout."""
    state = {name: value.double().numpy() for name, value in qt.state_dict().items()}
    alphas_bar = [math.prod(1 - b for b in betas[: t + 1]) for t in range(len(betas))]
    x = noise[0].numpy().copy()
    for count, t in enumerate(reversed(range(len(betas)))):
        eps = definition(net, torch.from_numpy(x), [t] * len(x), labels)
        for row in range(len(x)):
            gradient = qt_and_gradient(state, x[row], t)[1]
            if convention == "released":
                eps[row] = eps[row] + scale * gradient
            else:
                eps[row] = eps[row] - scale * math.sqrt(1 - alphas_bar[t]) * gradient
        x = (x - betas[t] / math.sqrt(1 - alphas_bar[t]) * eps) / math.sqrt(1 - betas[t])
        if t > 0:
            variance = betas[t] * (1 - alphas_bar[t - 1]) / (1 - alphas_bar[t])
            x = x + math.sqrt(variance) * noise[count + 1].numpy()
    return x


@pytest.mark.parametrize("convention", ["paper", "released"])
def test_guided_samples_are_those_of_the_formulas(convention):
    net, qt = network(convention=convention), guidance()
    noise = torch.randn(STEPS, 2, 3, LENGTH, dtype=torch.float64)
    labels = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    betas = np.linspace(0.02, 0.3, STEPS).tolist()
    hyperparams = calc_diffusion_hyperparams(STEPS, betas[0], betas[-1], dtype=torch.float64)
    found = sampling_label_guided(
        net, qt, noise.shape[1:], hyperparams, labels, 0.7, convention=convention, noise=noise
    ).numpy()
    expected = ancestral(net, qt, noise, labels, betas, 0.7, convention)
    assert found.dtype == np.float64
    assert found.shape == expected.shape
    # The sums over "half" are the same formula. "pair" is checked against the recurrence, and the nodes z and omega of
    # the sums are stored in float32: 1e-7 each.
    assert relative(found, expected) < 1e-6
    # The other convention is another result, by far more than that.
    other = "released" if convention == "paper" else "paper"
    swapped = sampling_label_guided(
        net, qt, noise.shape[1:], hyperparams, labels, 0.7, convention=other, noise=noise
    ).numpy()
    assert relative(swapped, expected) > 1e-2


def test_paper_is_the_default_and_scale_zero_is_no_guidance():
    net, qt = network(), guidance()
    noise = torch.randn(STEPS, 3, 3, LENGTH, dtype=torch.float64)
    labels = torch.tensor([0, 3, 2])
    hyperparams = calc_diffusion_hyperparams(STEPS, 0.02, 0.3)
    size = noise.shape[1:]
    assert torch.equal(
        sampling_label_guided(net, qt, size, hyperparams, labels, noise=noise),
        sampling_label_guided(net, qt, size, hyperparams, labels, 1.0, noise=noise, convention="paper"),
    )
    plain = sampling_label(net, size, hyperparams, labels, noise=noise)
    for convention in ("paper", "released"):
        unguided = sampling_label_guided(net, qt, size, hyperparams, labels, 0.0, noise=noise, convention=convention)
        assert torch.equal(unguided, plain)
    # Networks see parts of the batch; the noise stays where it was. Products of other shapes round in another order.
    parts = sampling_label(net, size, hyperparams, labels, noise=iter(noise), batch_size=2)
    assert torch.allclose(parts, plain, rtol=0, atol=1e-11)


def test_the_paper_convention_is_what_our_sampler_does():
    """One evaluation of ddpm from the same state: our table and the released recurrence are the same step."""
    qt, plain = guidance(), network(label_embed_classes=0)
    schedule = NoiseSchedule.from_betas(np.linspace(0.02, 0.3, STEPS))
    hyperparams = calc_diffusion_hyperparams(STEPS, 0.02, 0.3, dtype=torch.float64)
    table = solver_table("ddpm", schedule, STEPS, spacing="uniform")
    assert np.allclose(np.append(table.noise_scale[:-1][::-1], 0.0)[:-1], hyperparams["Sigma"][1:], rtol=1e-12)
    assert np.allclose(table.sigma[::-1] ** 2, 1.0 - hyperparams["Alpha_bar"].numpy(), rtol=1e-12)
    # Deterministic from here on: without noise the released loop is the table's matrix.
    zeros = torch.zeros(STEPS - 1, 2, 3, LENGTH, dtype=torch.float64)
    start = torch.randn(1, 2, 3, LENGTH, dtype=torch.float64)
    found = sampling_label_guided(plain, qt, start.shape[1:], hyperparams, None, 0.4, noise=torch.cat([start, zeros]))
    denoiser, x = Denoiser(plain, schedule), start[0]
    with torch.no_grad():
        for k in range(table.nfe):
            t = float(table.times[k])
            _, gradient = qt.log_ratio_and_grad(x, t)
            eps = denoiser.epsilon(x, t) - 0.4 * float(table.sigma[k]) * gradient
            x = float(table.matrix[k][0, 0]) * x + float(table.matrix[k][0, 1]) * eps
    assert relative(found, x) < 1e-10


def test_hyperparameters():
    found = calc_diffusion_hyperparams(200, 1e-4, 0.02)
    assert list(found) == ["T", "Beta", "Alpha", "Alpha_bar", "Sigma"]
    assert found["T"] == 200
    beta, alpha_bar, product = [1e-4 + t * (0.02 - 1e-4) / 199 for t in range(200)], [], 1.0
    for each in beta:
        product *= 1 - each
        alpha_bar.append(product)
    variance = [b * (1 - (alpha_bar[t - 1] if t else 0.0)) / (1 - alpha_bar[t]) for t, b in enumerate(beta)]
    variance[0] = beta[0]
    expected = {"Beta": beta, "Alpha": [1 - b for b in beta], "Alpha_bar": alpha_bar, "Sigma": np.sqrt(variance)}
    for name, values in expected.items():
        assert found[name].dtype == torch.float32
        assert np.allclose(found[name].double(), values, rtol=6e-8, atol=0), name  # one rounding to float32
    assert alpha_bar[-1] == pytest.approx(0.13, abs=5e-3)  # far from pure noise
    for wrong in ((1, 1e-4, 0.02), (200, 0.0, 0.02), (200, 1e-4, 1.0)):
        with pytest.raises(ValueError, match="must be"):
            calc_diffusion_hyperparams(*wrong)


def test_noise_is_the_global_generator_s_or_the_given_one_s():
    net = network(label_embed_classes=0).float()
    hyperparams = calc_diffusion_hyperparams(STEPS, 0.02, 0.3)
    torch.manual_seed(5)
    noise = torch.stack([torch.randn(2, 3, LENGTH) for _ in range(STEPS)])
    torch.manual_seed(5)
    found = sampling_label(net, (2, 3, LENGTH), hyperparams)
    assert torch.equal(found, sampling_label(net, (2, 3, LENGTH), hyperparams, noise=noise))
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(found, sampling_label(net, (2, 3, LENGTH), hyperparams, generator=generator))


def test_other_networks_of_the_same_calls():
    """Any network called with a tuple, any guidance that autograd can differentiate, and compiled networks."""
    qt, net = guidance(), network()
    hyperparams = calc_diffusion_hyperparams(STEPS, 0.02, 0.3)
    noise = torch.randn(STEPS, 2, 3, LENGTH, dtype=torch.float64)
    labels = torch.rand(2, 4, dtype=torch.float64)

    def as_tuple(inputs):
        assert inputs[2].shape == (2, 1)
        return net(inputs)

    expected = sampling_label_guided(net, qt, noise.shape[1:], hyperparams, labels, noise=noise)
    by_autograd = sampling_label_guided(
        as_tuple, lambda x, t: qt(x, t), noise.shape[1:], hyperparams, labels, noise=noise
    )
    assert relative(by_autograd, expected) < 1e-10
    seen = []

    def conditional(x, t, y):
        seen.append(tuple(y.shape))
        return (x.square().sum((1, 2)) * y[:, 0])[:, None]

    sampling_label_guided(
        net, conditional, noise.shape[1:], hyperparams, labels, guidance_cond=labels, noise=noise, batch_size=1
    )
    assert seen == [(1, 4)] * 2 * STEPS
    fast = network().float()
    compiled = fast.compile_for_sampling(NoiseSchedule.from_betas(np.linspace(0.02, 0.3, STEPS)))
    plain, quick = (
        sampling_label(each, noise.shape[1:], hyperparams, labels.float(), noise=noise.float())
        for each in (fast, compiled)
    )
    assert relative(quick, plain) < 1e-5


@pytest.mark.parametrize("form", ["method", "calculate_guidance", "callable"])
def test_a_half_precision_network_and_its_guidance(form):
    """The guidance sees float32 and its gradient is added in float32; one step rounds once more, to the net's dtype."""
    dtype, seen = torch.bfloat16, []

    class Method:
        def log_ratio_and_grad(self, x, t, labels=None):
            seen.append(x.dtype)
            return x.new_zeros(len(x)), torch.cos(x)

    class Released:
        def calculate_guidance(self, x, steps):
            seen.append(x.dtype)
            return torch.cos(x)

    def call(x, t):
        seen.append(x.dtype)
        return torch.sin(x).flatten(1).sum(1)

    qt = {"method": Method(), "calculate_guidance": Released(), "callable": call}[form]
    noise = torch.randn(2, 3, 2, 4).to(dtype)
    hyperparams = calc_diffusion_hyperparams(2, 0.1, 0.3)

    def net(inputs):
        return 0.25 * inputs[0]

    found = sampling_label_guided(net, qt, noise.shape[1:], hyperparams, None, 2.0, noise=noise)
    assert seen == [torch.float32] * 2
    assert found.dtype == dtype
    exact = sampling_label_guided(net, qt, noise.shape[1:], hyperparams, None, 2.0, noise=noise.float())
    # Six roundings of values up to 4 in the two steps.
    torch.testing.assert_close(found.float(), exact, rtol=0.0, atol=6 * 4 * torch.finfo(dtype).eps)


def test_wrong_arguments():
    net, qt = network(), guidance()
    good = {"size": (2, 3, LENGTH), "diffusion_hyperparams": calc_diffusion_hyperparams(3, 0.02, 0.3)}
    labels = torch.tensor([0, 1])
    noise = torch.randn(3, 2, 3, LENGTH, dtype=torch.float64)
    for changes, message in [
        ({"convention": "relased"}, "convention must be one of paper, released; got 'relased'"),
        ({"noise": noise[:2]}, "noise must have 3 entries .* got 2 entries"),
        ({"noise": torch.cat([noise, noise[:1]])}, "got more"),
        ({"noise": noise[:, :1]}, r"got an entry of shape \(1, 3, 40\)"),
        ({"noise": noise, "generator": torch.Generator()}, "leave one out"),
        ({"cond": labels[:1]}, "cond must have one row for each of the 2 samples"),
        ({"diffusion_hyperparams": {"T": 3}}, "Alpha, Alpha_bar, Sigma are missing"),
        ({"diffusion_hyperparams": good["diffusion_hyperparams"] | {"Sigma": torch.ones(2)}}, "'Sigma'.* got 2"),
        ({"guidance_scale": math.nan}, "guidance_scale must be finite"),
        ({"size": (0, 3, LENGTH)}, "size's entries"),
    ]:
        with pytest.raises(ValueError, match=message):
            sampling_label_guided(net, qt, **{"cond": labels, **good, **changes})
    with pytest.raises(ArithmeticError, match="not finite"):
        sampling_label_guided(net, qt, **good, cond=labels, noise=noise * math.inf)


# networks --------------------------------------------------------------------------------------------------------


def test_the_guidance_network():
    full = GuidanceQt()
    assert sum(parameter.numel() for parameter in full.parameters()) == 2_809_169
    names = {"conv1", "conv2", "embed.1", *(f"qt.{index}" for index in (0, 2, 4, 6, 8))}
    assert set(full.state_dict()) == {f"{n}.{w}" for n in names for w in ("weight", "bias")} | {"embed.0.W"}
    assert full.qt[0].in_features == 3936
    assert not full.embed[0].W.requires_grad

    qt, x = guidance(), torch.randn(3, 3, LENGTH, dtype=torch.float64)
    state = {name: value.numpy() for name, value in qt.state_dict().items()}
    t = torch.tensor([0.0, 2.0, 4.0])
    values, gradients = qt.log_ratio_and_grad(x, t)
    assert qt(x, t[:, None]).shape == (3, 1)
    assert torch.allclose(qt(x, t)[:, 0], values, rtol=1e-12)
    for row in range(3):
        value, gradient = qt_and_gradient(state, x[row].numpy(), int(t[row]))
        assert values[row].item() == pytest.approx(value, rel=1e-6)  # features of time are of the weights' dtype
        assert relative(gradients[row].detach(), gradient) < 1e-6
    assert torch.equal(qt.log_ratio_and_grad(x, 2.0)[0][1], values[1]) or torch.allclose(
        qt.log_ratio_and_grad(x, 2.0)[0][1], values[1], rtol=1e-12
    )
    with pytest.raises(ValueError, match="unconditional"):
        qt.log_ratio_and_grad(x, t, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="time_features must be even"):
        GuidanceQt(time_features=3)


def test_it_guides_our_samplers():
    schedule = NoiseSchedule.from_betas(np.linspace(1e-3, 0.3, 9))
    denoiser = Denoiser(network(label_embed_classes=0).float(), schedule)
    guided, plain = (sample(denoiser, each, num=2, steps=4, solver="dpmpp_2m") for each in (guidance().float(), None))
    assert guided.shape == (2, 3, LENGTH)
    assert guided.isfinite().all()
    assert not torch.equal(guided, plain)


@pytest.mark.parametrize("cauchy", ["pair", "half"])
def test_the_network_is_ours(cauchy):
    plain = randomised(
        in_channels=3, out_channels=2, res_channels=4, skip_channels=5, num_res_layers=2, step_dims=(6, 7, 9),
        num_classes=4, label_dim=5, l_max=LENGTH, d_state=4, cauchy=cauchy,
    )  # fmt: skip
    net = SSSD_ECG(**{**SIZES, "out_channels": 2}, cauchy=cauchy).eval()
    assert net.to_config() == plain.to_config()
    net.load_state_dict(plain.state_dict())
    x, steps, labels = torch.randn(2, 3, LENGTH), torch.tensor([[0], [7]]), torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]])
    with torch.no_grad():
        expected = plain(x, steps[:, 0], labels)
        assert torch.equal(net((x, labels, steps)), expected)
        assert torch.equal(net(x, steps[:, 0], labels), expected)


def test_arguments_by_place_are_those_of_released_code():
    by_place = SSSD_ECG(3, 4, 5, 2, 2, 6, 7, 9, LENGTH, 4, 0.0, 1, 1, 8, 10)
    by_name = SSSD_ECG(
        in_channels=3,
        res_channels=4,
        skip_channels=5,
        out_channels=2,
        num_res_layers=2,
        diffusion_step_embed_dim_in=6,
        diffusion_step_embed_dim_mid=7,
        diffusion_step_embed_dim_out=9,
        s4_lmax=LENGTH,
        s4_d_state=4,
        label_embed_classes=8,
        label_embed_dim=10,
    )
    assert by_place.to_config() == by_name.to_config()
    assert GuidanceQt(3904, 0).to(torch.float64).num_classes == 0
    with pytest.raises(ValueError, match="action_dim must be 3904, .* got 3900"):
        GuidanceQt(3900, 0)


def test_a_condition_comes_last():
    """The condition acts as further features behind those of time, which leaves the gradient's formula as it is."""
    qt = GuidanceQt(None, 2, in_channels=3, length=LENGTH, width=11, depth=2, time_features=6, time_scale=0.3).double()
    x, t = torch.randn(3, 3, LENGTH, dtype=torch.float64), torch.tensor([0.0, 2.0, 4.0])
    condition = torch.tensor([[0.5, -1.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    values, gradients = qt.log_ratio_and_grad(x, t, condition)
    assert torch.allclose(qt(x, t, condition)[:, 0], values, rtol=1e-12)
    # With the condition's part in the bias it is an unconditional network.
    for row in range(3):
        state = {name: value.numpy().copy() for name, value in qt.state_dict().items()}
        state["qt.0.bias"] += state["qt.0.weight"][:, -2:] @ condition[row].numpy()
        state["qt.0.weight"] = state["qt.0.weight"][:, :-2]
        value, gradient = qt_and_gradient(state, x[row].numpy(), int(t[row]))
        assert values[row].item() == pytest.approx(value, rel=1e-6)
        assert relative(gradients[row].detach(), gradient) < 1e-6
    # One time for all, and class indices.
    chosen = torch.eye(2, dtype=torch.float64)[[1, 0, 1]]
    assert torch.equal(
        qt.log_ratio_and_grad(x, 2.0, torch.tensor([1, 0, 1]))[0], qt.log_ratio_and_grad(x, 2.0, chosen)[0]
    )
    with pytest.raises(ValueError, match="labels are required"):
        qt(x, t)


def test_the_class_of_released_scripts_guides():
    """Ours, and one as a script has it: with a gradient of its own and nothing else."""
    net, qt = network(), guidance()
    sizes = {"in_channels": 3, "length": LENGTH, "width": 11, "depth": 2, "time_features": 6, "time_scale": 0.3}
    ours = Bandit_Critic_Guide(qt.num_features, 0, SimpleNamespace(device="cpu", alpha=3.0), **sizes).double()
    ours.qt.load_state_dict(qt.state_dict())
    ours.guidance_scale = 0.7

    class Theirs:
        def calculate_guidance(self, a, t, condition=None):
            assert condition is None
            assert t.shape == (2, 1)
            with torch.enable_grad():
                a.requires_grad_(True)
                return 0.7 * torch.autograd.grad(qt(a, t).sum(), a)[0]

    noise = torch.randn(STEPS, 2, 3, LENGTH, dtype=torch.float64)
    hyperparams = calc_diffusion_hyperparams(STEPS, 0.02, 0.3, dtype=torch.float64)
    cond = torch.eye(4, dtype=torch.float64)[:2]
    for convention in ("paper", "released"):
        expected = sampling_label_guided(
            net, qt, noise.shape[1:], hyperparams, cond, 0.7, convention=convention, noise=noise
        )
        for each in (ours, Theirs()):
            found = sampling_label_guided(
                net, guidance_net=each, size=noise.shape[1:], diffusion_hyperparams=hyperparams, cond=cond,
                convention=convention, noise=noise,
            )  # fmt: skip
            assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
            assert not found.requires_grad
    x, steps = noise[0], torch.full((2, 1), 3.0)
    assert torch.allclose(ours.calculate_guidance(x, steps), 0.7 * qt.log_ratio_and_grad(x, 3.0)[1], rtol=1e-12)
    assert not ours.calculate_guidance(x, steps).requires_grad
    guided = sample(Denoiser(network(label_embed_classes=0).float(), NoiseSchedule.from_betas(hyperparams["Beta"])),
                    ours.float(), num=2, steps=3)  # fmt: skip
    assert guided.isfinite().all()


def test_conventions_choose_the_kernels():
    assert SSSD_ECG(**SIZES).cauchy == "pair"
    assert SSSD_ECG(**SIZES, convention="paper").cauchy == "pair"
    assert SSSD_ECG(**SIZES, convention="released").cauchy == "half"
    assert SSSD_ECG(**SIZES, convention="released", cauchy="pair").cauchy == "pair"
    state = SSSD_ECG(**SIZES).state_dict()
    with pytest.warns(UserWarning, match="convention='released'"):
        SSSD_ECG(**SIZES).load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SSSD_ECG(**SIZES, convention="paper").load_state_dict(state)
        SSSD_ECG(**SIZES, cauchy="half").load_state_dict(state)


def test_what_the_network_refuses():
    with pytest.raises(ValueError, match="s4_bidirectional must be true"):
        SSSD_ECG(**SIZES, s4_bidirectional=0)
    with pytest.raises(ValueError, match="convention must be one of"):
        SSSD_ECG(**SIZES, convention="ours")
    net, inputs = SSSD_ECG(**SIZES, s4_dropout=0.1), (torch.randn(1, 3, LENGTH), torch.tensor([0]), torch.tensor([[1]]))
    with pytest.raises(ValueError, match="s4_dropout must be 0 for training"):
        net(inputs)
    with torch.no_grad():
        assert net.eval()(inputs).shape == (1, 3, LENGTH)
    with pytest.raises(ValueError, match="got 2 entries"):
        net(inputs[:2])
    with pytest.raises(ValueError, match="diffusion_steps are missing"):
        net(inputs[0])


# files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bare", [True, False])
def test_files_are_read(tmp_path: Path, bare):
    net, qt, file = network().float(), guidance().float(), tmp_path / "0.pkl"

    def write(module):
        torch.save(module.state_dict() if bare else {"model_state_dict": module.state_dict()}, file)

    write(net)
    loaded = SSSD_ECG.from_checkpoint(
        file, cauchy="half", config={"s4_lmax": LENGTH, "num_res_layers": 2, "s4_dropout": 0.0}
    )
    assert type(loaded) is SSSD_ECG
    assert loaded.cauchy == "half"
    assert not loaded.training
    assert loaded.to_config() == net.to_config() | {"cauchy": "half"}
    for name, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    # The user's own way.
    other = SSSD_ECG(**SIZES, convention="paper")
    content = torch.load(file, weights_only=True)
    other.load_state_dict(content if bare else content["model_state_dict"])
    x = (torch.randn(1, 3, LENGTH), torch.tensor([1]), torch.tensor([[2]]))
    assert torch.equal(other.eval()(x), net(x))
    with pytest.raises(CheckpointError, match="other shape"):
        SSSD_ECG.from_checkpoint(file, cauchy="pair", config={"label_embed_dim": 6})
    with pytest.raises(ValueError, match="all of diffusion_step_embed_dim_in"):
        SSSD_ECG.from_checkpoint(file, cauchy="pair", config={"diffusion_step_embed_dim_in": 6})

    write(qt)
    loaded_qt = GuidanceQt.from_checkpoint(file, length=LENGTH)
    for name, value in qt.state_dict().items():
        assert torch.equal(loaded_qt.state_dict()[name], value), name
    x0 = torch.randn(2, 3, LENGTH)
    assert torch.equal(loaded_qt(x0, torch.tensor([3.0])), qt(x0, torch.tensor([3.0])))
    with pytest.raises(CheckpointError, match=r"other shape: qt\.0\.weight"):
        GuidanceQt.from_checkpoint(file, length=LENGTH + 8)
    with pytest.raises(CheckpointError, match=r"other shape: qt\.0\.weight"):
        GuidanceQt.from_checkpoint(file, length=LENGTH, state_dim=2)
    write(net)
    with pytest.raises(CheckpointError, match=r"no checkpoint of GuidanceQt: conv1\.weight"):
        GuidanceQt.from_checkpoint(file)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return (Path.touch, (self.place,))


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_file_with_code_is_refused_and_not_run(tmp_path: Path, how):
    file, trace = tmp_path / "model.pkl", tmp_path / "trace"
    content = {"model_state_dict": {**guidance().state_dict(), "extra": Payload(trace)}}
    if how == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    for load in (lambda: GuidanceQt.from_checkpoint(file), lambda: SSSD_ECG.from_checkpoint(file, cauchy="pair")):
        with pytest.raises(CheckpointError, match="something else than tensors"):
            load()
    assert not trace.exists()


# leads -----------------------------------------------------------------------------------------------------------


def test_four_leads():
    eight = torch.randn(2, 8, 7, dtype=torch.float64)
    found = generate_four_leads(eight)
    assert found.shape == (2, 12, 7)
    leads = {name: found[:, place] for place, name in enumerate(RELEASED_LEADS)}
    for place, name in enumerate(("I", "V1", "V2", "V3", "V4", "V5", "V6", "aVF")):
        assert torch.equal(leads[name], eight[:, place])
    one, foot = eight[:, 0], eight[:, 7]
    expected = {
        "II": foot + one / 2,
        "III": foot - one / 2,
        "aVR": -3 / 4 * one - foot / 2,
        "aVL": 3 / 4 * one - foot / 2,
    }
    for name, values in expected.items():
        assert torch.allclose(leads[name], values, rtol=1e-12, atol=1e-14), name
    # Taking the places of the stored leads gives them back.
    assert torch.equal(found[:, [0, 2, 3, 4, 5, 6, 7, 11]], eight)
    standard = generate_four_leads(eight, order="standard")
    order = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
    for place, name in enumerate(order):
        assert torch.equal(standard[:, place], leads[name])
    with pytest.raises(ValueError, match=r"\[B, 8, L\]"):
        generate_four_leads(eight[:, :7])


def test_network_class_is_a_plain_one_for_checkpoints(tmp_path: Path):
    denoiser = Denoiser(network().float(), NoiseSchedule.from_betas([0.1, 0.2]))
    denoiser.save(tmp_path / "denoiser")
    assert type(Denoiser.load(tmp_path / "denoiser").network) is SSSDECG
