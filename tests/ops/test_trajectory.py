"""The operator `trajectory` and the sampling that uses it: twin against closed forms, kernel against twin."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from native import CAPABILITIES, needs_extension, run_with
from torch import nn

from tgdp_fast import Denoiser, GuidanceNetwork, NoiseSchedule, sample, solver_table
from tgdp_fast.data.gaussians import paper_source
from tgdp_fast.models import ScoreMLP
from tgdp_fast.ops import BackendUnavailableError, TrajectoryNetwork, TrajectoryPlan, trajectory
from tgdp_fast.sampling.full_trajectory import FullTrajectory
from tgdp_fast.sampling.loop import Loop
from tgdp_fast.sampling.sampler import SamplingDivergedError

SCHEDULE = NoiseSchedule.vp_linear()


def models(size=2, width=40, depth=3, classes=0, prediction="v_prediction", seed=0):
    """An untrained denoiser and guidance network, with outputs of order one."""
    torch.manual_seed(seed)
    network = ScoreMLP((size,), width, depth, classes)
    guidance = GuidanceNetwork((size,), SCHEDULE, width=width + 3, depth=depth, num_classes=classes)
    with torch.no_grad():
        network.head.weight.mul_(50)
        for layer in guidance.linear_layers():
            layer.weight.mul_(1.5)
    return Denoiser(network, SCHEDULE, prediction, time_input="half_log_snr").eval(), guidance.eval()


def both(denoiser, guidance, num=70, **arguments):
    """The samples of the loop over the reference operators, and of the fused run."""
    arguments = {"num": num, "solver": "dpmpp_2m", "steps": 6, "seed": 5, **arguments}
    return sample(denoiser, guidance, backend="reference", **arguments), sample(denoiser, guidance, **arguments)


def linear_network(slope, width=2, evaluations=3):
    """An MLP that is the linear map x -> slope x in one dimension: silu(z) - silu(-z) = z."""
    weights = [torch.tensor([[1.0], [-1.0]]), torch.tensor([[slope, -slope]])]
    return TrajectoryNetwork(weights, [torch.zeros(1)], torch.zeros(evaluations, width))


def plan(evaluations=3, **changes):
    ones = np.ones(evaluations)
    arguments = {
        "matrix": np.tile(np.array([[[1.0, -0.5]]]), (evaluations, 1, 1)),
        "noise_scale": 0 * ones,
        "guidance_weight": 0.25 * ones,
        "alpha": ones,
        "sigma": ones,
        "input_scale": 0 * ones,
        "output_scale": ones,
    }
    return TrajectoryPlan(**(arguments | changes))


def backends():
    return ["reference", pytest.param("cpu", marks=needs_extension)]


@pytest.mark.parametrize("backend", backends())
def test_linear_networks_give_a_geometric_sequence(backend):
    x = torch.linspace(-2, 2, 9)[:, None]
    # epsilon = 0.3 x, and the guidance value 2 x has the gradient 2: x <- x - 0.5 (0.3 x - 0.25 * 2).
    result = trajectory(x, linear_network(0.3), linear_network(2.0), plan(), backend=backend)
    expected = x
    for _ in range(3):
        expected = expected - 0.5 * (0.3 * expected - 0.5)
    torch.testing.assert_close(result.x, expected, rtol=1e-6, atol=1e-6)
    assert result.diverged == -1
    # The norm of what is subtracted from epsilon, 0.5, limited to 0.1; and epsilon scaled and shifted by x.
    limited = plan(gradient_norm_limit=0.1, input_scale=np.full(3, 0.2), output_scale=np.full(3, 2.0))
    result = trajectory(x, linear_network(0.3), linear_network(2.0), limited, backend=backend)
    expected = x
    for _ in range(3):
        expected = expected - 0.5 * (0.2 * expected + 0.6 * expected - 0.1)
    torch.testing.assert_close(result.x, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", backends())
def test_guidance_with_weight_zero_does_not_run(backend):
    x = torch.ones(3, 1)
    broken = linear_network(float("nan"))
    weights = np.array([0.0, 0.0, 0.0])
    result = trajectory(x, linear_network(0.3), broken, plan(guidance_weight=weights), backend=backend)
    assert result.diverged == -1
    weights = np.array([0.0, 1.0, 0.0])
    result = trajectory(x, linear_network(0.3), broken, plan(guidance_weight=weights), backend=backend)
    assert result.diverged == 1


@needs_extension
@pytest.mark.parametrize("solver", ["ddpm", "ddim", "heun", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "unipc_2"])
@pytest.mark.parametrize("size", [1, 2, 8, 9, 37])
def test_fused_run_equals_the_loop(solver, size):
    loop, fused = both(*models(size), solver=solver)
    # Design: backends agree to 1e-4 on a whole trajectory in fp32.
    torch.testing.assert_close(fused, loop, rtol=1e-4, atol=1e-4)


@needs_extension
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "score"])
def test_every_prediction_type_and_option(prediction):
    denoiser, guidance = models(prediction=prediction)
    for options in (
        {},
        {"clamp": (-0.5, 0.7)},
        {"gradient_norm_limit": 0.3},
        {"interval": (0.2, 0.6)},
        {"scale": lambda t: 1.0 - t},
        {"scale": 0.0},
    ):
        loop, fused = both(denoiser, guidance, **options)
        torch.testing.assert_close(fused, loop, rtol=1e-4, atol=1e-4)
    loop, fused = both(denoiser, None)
    torch.testing.assert_close(fused, loop, rtol=1e-4, atol=1e-4)


@needs_extension
def test_labels():
    denoiser, guidance = models(classes=3)
    labels = torch.arange(70) % 3
    loop, fused = both(denoiser, guidance, labels=labels)
    torch.testing.assert_close(fused, loop, rtol=1e-4, atol=1e-4)
    rows = torch.softmax(torch.randn(70, 3), dim=1)
    loop, fused = both(denoiser, guidance, labels=rows)
    torch.testing.assert_close(fused, loop, rtol=1e-4, atol=1e-4)
    # A conditional source with an unconditional guidance.
    loop, fused = both(denoiser, models()[1], labels=labels)
    torch.testing.assert_close(fused, loop, rtol=1e-4, atol=1e-4)


@needs_extension
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_samples_depend_on_neither_batches_nor_threads_to_the_bit(precision):
    denoiser, guidance = models(size=3)
    arguments = {"num": 333, "solver": "dpmpp_2m_sde", "steps": 4, "seed": 2**63 + 11, "precision": precision}
    whole = sample(denoiser, guidance, **arguments)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for batch_size in (1 if count == 1 else 50, 64, 100, 333):
                assert torch.equal(sample(denoiser, guidance, batch_size=batch_size, **arguments), whole)
    finally:
        torch.set_num_threads(threads)
    shard = sample(denoiser, guidance, **(arguments | {"num": 100, "first_index": 200}))
    assert torch.equal(shard, whole[200:300])


@needs_extension
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_error_of_16_bits_is_at_most_twice_eagers(precision):
    denoiser, guidance = models(size=5, width=64)
    arguments = {"num": 400, "solver": "dpmpp_2m", "steps": 8, "seed": 1}
    exact = sample(denoiser, guidance, backend="reference", **arguments)
    eager = sample(denoiser, guidance, backend="reference", precision=precision, **arguments)
    fused = sample(denoiser, guidance, precision=precision, **arguments)
    assert (fused - exact).norm() <= 2 * (eager - exact).norm()
    assert not torch.equal(fused, exact)


@needs_extension
def test_split_products_are_nearly_fp32():
    denoiser, guidance = models(size=12, width=64)
    arguments = {"num": 100, "solver": "dpmpp_2m", "steps": 8, "seed": 1}
    exact = sample(denoiser, guidance, **arguments)
    split = sample(denoiser, guidance, precision="bf16x3", **arguments)
    lower = sample(denoiser, guidance, precision="bf16", **arguments)
    assert (split - exact).norm() <= (lower - exact).norm() / 20
    # The loop has no such matmuls: it takes those in fp32.
    loop = {**arguments, "backend": "reference"}
    assert torch.equal(sample(denoiser, guidance, precision="bf16x3", **loop), sample(denoiser, guidance, **loop))


@needs_extension
def test_which_models_run_fused():
    denoiser, guidance = models()
    table = solver_table("ddim", SCHEDULE, 3)

    def fused(denoiser, guidance, backend="auto"):
        return FullTrajectory.of(Loop(denoiser, guidance, table, table.sigma), torch.float32, backend) is not None

    assert fused(denoiser, guidance)
    assert not fused(denoiser, guidance, "reference")

    class Changed(ScoreMLP):
        def forward(self, *arguments):
            return super().forward(*arguments) + 1

    changed = Denoiser(Changed((2,), 8, 1), SCHEDULE, time_input="half_log_snr")
    assert not fused(changed, guidance)
    hooked, _ = models()
    handle = hooked.network.register_forward_hook(lambda *_: None)
    assert not fused(hooked, guidance)
    handle.remove()
    assert fused(hooked, guidance)
    hooked.network.forward = lambda *arguments: arguments[0]
    assert not fused(hooked, guidance)
    nn.utils.parametrizations.weight_norm(guidance.layers[0])
    assert not fused(denoiser, guidance)
    assert not fused(models()[0].double(), models()[1])
    stem = GuidanceNetwork((8, 60), SCHEDULE, stem="ecg")
    network = Denoiser(ScoreMLP((8, 60), 8, 1), SCHEDULE, time_input="half_log_snr")
    assert not fused(network, stem)


@needs_extension
def test_parameters_changed_between_runs_count():
    denoiser, guidance = models()
    before = both(denoiser, guidance)[1]
    with torch.no_grad():
        guidance.linear_layers()[1].weight.data.mul_(1.1)
    loop, fused = both(denoiser, guidance)
    torch.testing.assert_close(fused, loop, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, fused, atol=1e-3)


@pytest.mark.parametrize("backend", backends())
def test_divergence_names_the_first_evaluation(backend):
    denoiser, guidance = models()
    with torch.no_grad():
        denoiser.network.head.weight.mul_(1e38)
    with pytest.raises(SamplingDivergedError, match="after evaluation [0-3] of 4") as fused:
        sample(denoiser, guidance, num=200, solver="ddim", steps=4, backend=backend)
    assert fused.value.evaluation in range(4)


@needs_extension
def test_a_callback_sees_every_step():
    denoiser, guidance = models()
    seen = []
    arguments = {"num": 20, "solver": "dpmpp_2m", "steps": 5, "seed": 5}
    watched = sample(denoiser, guidance, callback=lambda step, t, x, x0: seen.append(step), **arguments)
    assert seen == list(range(5))
    torch.testing.assert_close(watched, sample(denoiser, guidance, **arguments), rtol=1e-4, atol=1e-4)


def test_simulation_with_both_paths_has_the_same_statistics():
    # A source whose exact score is known, through an untrained guidance of zero: the source's own moments.
    denoiser, _ = models()
    loop, fused = both(denoiser, None, num=2000, solver="dpmpp_3m", steps=12)
    torch.testing.assert_close(fused.mean(0), loop.mean(0), rtol=0, atol=1e-4)
    assert paper_source().dimension == fused.shape[1]


@needs_extension
def test_opcheck_and_empty_batches():
    denoiser, guidance = models()
    table = solver_table("dpmpp_2m", SCHEDULE, 3)
    run = FullTrajectory.of(Loop(denoiser, guidance, table, table.sigma), torch.float32, "auto")
    score, other, host = run.score, run.guidance, run.plan
    x = torch.randn(5, 2)
    arguments = (
        x, list(score.weights), list(score.biases), score.evaluation_bias, None,
        list(other.weights), list(other.biases), other.evaluation_bias, None,
        host.table(), host.history, [-1.0, 1.0], 2.0, -1, torch.arange(5), False,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.tgdp_fast.trajectory.default, arguments)
    empty = trajectory(x[:0], score, other, host, sample_index=torch.arange(0))
    assert empty.x.shape == (0, 2)
    assert empty.diverged == -1


def test_errors():
    x, score, guidance = torch.zeros(4, 1), linear_network(1.0), linear_network(1.0)
    cases = [
        (lambda: trajectory(torch.zeros(4), score, guidance, plan()), r"x must be float32 \[B, D\]"),
        (lambda: trajectory(x.int(), score, guidance, plan()), "x must be float32"),
        (
            lambda: trajectory(x, score._replace(biases=[]), guidance, plan()),
            "score must have L . 1 weights and L biases",
        ),
        (lambda: trajectory(torch.zeros(4, 2), score, guidance, plan()), r"score.weights\[0\] must be .*\[\*, 2\]"),
        (lambda: trajectory(x, score, guidance, plan(4)), r"score.evaluation_bias must be .*\(4, 2\)"),
        (
            lambda: trajectory(x, score, guidance._replace(sample_bias=torch.zeros(3, 2)), plan()),
            r"guidance.sample_bias must be torch.float32 of shape \(4, 2\)",
        ),
        (lambda: trajectory(x, score, guidance, plan(), sample_index=torch.zeros(3)), "sample_index must be int64"),
        (lambda: trajectory(x, score, guidance, plan(), backend="fast"), "backend must be one of"),
        (lambda: plan(alpha=np.zeros(3)), "alpha must be > 0"),
        (lambda: plan(sigma=np.full(2, 1.0)), "sigma must be 3 finite numbers"),
        (lambda: plan(matrix=np.ones((3, 2, 2))), r"matrix must have shape \(T, 1 \+ H, 2 \+ H\)"),
        (lambda: plan(matrix=np.full((3, 1, 2), np.nan)), "matrix must be finite"),
        (lambda: plan(clamp=(1.0, 0.0)), "clamp must be"),
        (lambda: plan(gradient_norm_limit=0.0), "gradient_norm_limit must be"),
    ]
    for call, match in cases:
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(BackendUnavailableError):
        trajectory(x, score, guidance, plan(), backend="triton")


@needs_extension
def test_bad_tensors_do_not_reach_the_kernels():
    score = linear_network(1.0)
    good = [
        torch.zeros(4, 1), list(score.weights), list(score.biases), score.evaluation_bias, None,
        [], [], torch.zeros(0, 0), None, plan().table(), 0, None, None, 0, torch.arange(4), False,
    ]  # fmt: skip
    assert torch.ops.tgdp_fast.trajectory(*good)[1] == -1
    for position, value in (
        (0, torch.zeros(4, 1, dtype=torch.float64)),
        (2, []),
        (3, torch.zeros(2, 2)),
        (4, torch.zeros(3, 2)),
        (9, plan().table().float()),
        (10, 1),
        (11, [0.0]),
        (14, torch.arange(3)),
    ):
        bad = [value if i == position else argument for i, argument in enumerate(good)]
        with pytest.raises((ValueError, RuntimeError), match="tgdp_fast"):
            torch.ops.tgdp_fast.trajectory(*bad)


@needs_extension
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set(capability):
    run_with(
        """
import test_trajectory as tests
for solver in ("dpmpp_2m", "dpmpp_2m_sde"):
    for size in (2, 37):
        tests.test_fused_run_equals_the_loop(solver, size)
tests.test_labels()
""",
        TGDP_CPU_CAPABILITY=capability,
    )


def test_what_the_cuda_kernel_refuses(monkeypatch):
    """Answers that need no GPU, and that the launcher's own reaches the caller."""
    module = importlib.import_module("tgdp_fast.ops.trajectory")
    asked = []

    def launcher(*question):
        asked.append(question)
        return "too wide"

    monkeypatch.setattr(module._cuda, "unsupported_device", lambda tensor: None)
    monkeypatch.setattr(torch.ops.tgdp_fast, "cuda_trajectory_refusal", launcher, raising=False)
    x, score, guidance, numbers = torch.zeros(2, 1), linear_network(0.3), linear_network(2.0), plan()
    assert module._unsupported_by_cuda(x, score, guidance, numbers) == "too wide"
    assert asked == [(x.get_device(), torch.float32, 1, 0, [2], [2])]
    half = score._replace(weights=[weight.bfloat16() for weight in score.weights])
    assert "one dtype" in module._unsupported_by_cuda(x, half, guidance, numbers)
    double = score._replace(weights=[weight.double() for weight in score.weights])
    assert "float64" in module._unsupported_by_cuda(x, double, None, numbers)
    assert len(asked) == 1
