"""The CUDA kernel of whole trajectories, run on the CPU by the emulation."""

from __future__ import annotations

from collections.abc import Iterator

import cuda_emulation as cuda
import numpy as np
import pytest
import torch
from tolerances import allowed, of_sums, rms

from tgdp_fast import NoiseSchedule, solver_table
from tgdp_fast.diffusion.denoiser import epsilon_scales
from tgdp_fast.ops import TrajectoryNetwork, TrajectoryPlan
from tgdp_fast.ops.trajectory import trajectory_reference

pytestmark = cuda.needs_compiler

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
ORDERS = ((cuda.FORWARD, 0), (cuda.REVERSE, 0), (cuda.RANDOM, 1))
each_dtype = pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])


@pytest.fixture(autouse=True)
def _usual_order() -> Iterator[None]:
    yield
    cuda.choose()
    cuda.choose_device()


def network(size, widths, outputs, evaluations, dtype, *, batch=None, stride=0, scale=1.0):
    """A random MLP; its matrices have `stride` columns more, which hold NaN."""
    generator = torch.Generator().manual_seed(size + sum(widths) + outputs)

    def matrix(rows, columns, kind, scale=1.0):
        memory = torch.full((rows, columns + stride), torch.nan, dtype=kind)
        return memory[:, :columns].copy_((scale * torch.randn(rows, columns, generator=generator)).to(kind))

    sizes = [size, *widths, outputs]
    weights = [matrix(b, a, dtype, scale * a**-0.5) for a, b in zip(sizes, sizes[1:], strict=False)]
    biases = [0.3 * torch.randn(rows, generator=generator).to(dtype) for rows in sizes[2:]]
    labels = None if batch is None else matrix(batch, widths[0], FLOAT32)
    return TrajectoryNetwork(weights, biases, matrix(evaluations, widths[0], FLOAT32), labels)


def plan(solver="dpmpp_2m", steps=3, **changes):
    schedule = NoiseSchedule.vp_linear()
    table = solver_table(solver, schedule, steps)
    scales = [epsilon_scales("v_prediction", float(a), float(s)) for a, s in zip(table.alpha, table.sigma, strict=True)]
    numbers = {
        "guidance_weight": 0.5 * table.sigma,
        "input_scale": np.array([a for a, _ in scales]),
        "output_scale": np.array([b for _, b in scales]),
    }
    return TrajectoryPlan(
        matrix=table.matrix, noise_scale=table.noise_scale, alpha=table.alpha, sigma=table.sigma, **(numbers | changes)
    )


def call_of(size, score_widths, guidance_widths, batch, dtype, numbers, *, labels=False, stride=0):
    rows = batch if labels else None
    score = network(size, score_widths, size, len(numbers.matrix), dtype, batch=rows, stride=stride)
    guidance = network(size, guidance_widths, 1, len(numbers.matrix), dtype, batch=rows, stride=stride, scale=1.5)
    x = torch.randn(batch, size, generator=torch.Generator().manual_seed(batch))
    return x, score, guidance, numbers


def wide(network):
    if network is None:
        return None
    weights, biases = ([tensor.double() for tensor in tensors] for tensors in (network.weights, network.biases))
    labels = None if network.sample_bias is None else network.sample_bias.double()
    return TrajectoryNetwork(weights, biases, network.evaluation_bias.double(), labels)


def of_trajectory(score, guidance, numbers):
    """The state moves by the score network's output and the gradient of the guidance, up and down its layers."""
    sizes = [weight.shape[1] for weight in score.weights]
    if guidance is not None:
        sizes += 2 * [weight.shape[1] for weight in guidance.weights]
    return of_sums(len(numbers.matrix) * sizes, score.weights[0].dtype)


def assert_agrees(call, *, seed=2**40 + 3, sample_index=None):
    x, score, guidance, numbers = call
    indices = torch.arange(len(x)) if sample_index is None else sample_index
    result, diverged = cuda.trajectory(*call, seed, indices)
    plain, _ = trajectory_reference(*call, seed, indices)
    exact, _ = trajectory_reference(x.double(), wide(score), wide(guidance), numbers, seed, indices)
    assert diverged == -1
    assert bool(exact.isfinite().all())
    error, eager = (rms(tensor.double() - exact) for tensor in (result, plain))
    # The mean over samples, for a clamp makes a few much worse than the rest, other ones here and there.
    assert error <= allowed(eager, of_trajectory(score, guidance, numbers) * rms(exact)), (error, eager)
    return result


@each_dtype
@pytest.mark.parametrize(
    ("size", "score_widths", "guidance_widths", "batch"),
    [
        (1, (1,), (1,), 1),
        (2, (16, 24), (40,), 5),
        (2, (64, 64, 64), (70, 30, 50), 70),
        (5, (130,), (17, 150), 33),
        (37, (40, 24), (33, 20), 40),
        (150, (33,), (20,), 20),
        (3, (8,) * 8, (8,) * 8, 9),
    ],
)
def test_agrees_with_its_twin(size, score_widths, guidance_widths, batch, dtype) -> None:
    assert_agrees(call_of(size, score_widths, guidance_widths, batch, dtype, plan(), stride=3))
    assert_agrees(call_of(size, score_widths, guidance_widths, batch, dtype, plan(), labels=True, stride=3))


@pytest.mark.slow(ci=True)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_the_simulation(dtype) -> None:
    """Two dimensions, the paper's widths, more rows than one block takes."""
    call = call_of(2, (512, 512, 512, 512, 256), (512,) * 4, 100, dtype, plan(steps=2))
    assert_agrees(call)


@each_dtype
@pytest.mark.parametrize(
    "solver", ["ddpm", "ddim", "euler_ancestral", "heun", "dpm_solver_2s", "dpmpp_3m", "dpmpp_2m_sde", "unipc_2"]
)
@pytest.mark.parametrize("size", [2, 9])
def test_every_kind_of_solver(size, solver, dtype) -> None:
    numbers = plan(solver, 4)
    call = call_of(size, (20, 30), (25, 15), 7, dtype, numbers)
    samples = torch.tensor([0, -1, 2**33 + 7, 5, 5, 2**62, 3])
    result = assert_agrees(call, sample_index=samples)
    if numbers.noise_scale.any():
        assert not torch.equal(result, cuda.trajectory(*call, 4, samples)[0])


@each_dtype
@pytest.mark.parametrize(
    "changes",
    [
        {"clamp": (-0.5, 0.7)},
        {"gradient_norm_limit": 0.05},
        {"gradient_norm_limit": 0.05, "clamp": (-0.5, 0.7)},
        {"guidance_weight": np.array([0.0, 0.7, 0.0])},
    ],
)
def test_options(changes, dtype) -> None:
    numbers = plan(solver="dpmpp_2m", steps=3, **changes)
    call = call_of(3, (20, 30), (25, 15), 70, dtype, numbers)
    result = assert_agrees(call)
    assert not torch.equal(result, cuda.trajectory(*call[:3], plan(), 2**40 + 3)[0])


def test_without_guidance() -> None:
    x, score, _, numbers = call_of(2, (20, 30), (25,), 9, FLOAT32, plan())
    assert_agrees((x, score, None, numbers))
    broken = network(2, (25,), 1, 3, FLOAT32, scale=float("nan"))
    silent = plan(guidance_weight=np.zeros(3))
    result, diverged = cuda.trajectory(x, score, broken, silent)
    assert diverged == -1
    assert torch.equal(result, cuda.trajectory(x, score, None, silent)[0])


def test_the_norm_limit_takes_gradients_of_any_size() -> None:
    for scale in (1e-30, 1.0, 1e20, 1e30):
        weight = [torch.tensor([[1.0], [-1.0]]), torch.tensor([[scale, -scale]])]
        guidance = TrajectoryNetwork(weight, [torch.zeros(1)], torch.zeros(1, 2))
        score = TrajectoryNetwork([weight[0], torch.zeros(1, 2)], [torch.zeros(1)], torch.zeros(1, 2))
        one = np.ones(1)
        numbers = TrajectoryPlan(
            np.array([[[1.0, -1.0]]]), 0 * one, 0.5 * one, one, one, 0 * one, one, None, gradient_norm_limit=0.1
        )
        result, diverged = cuda.trajectory(torch.zeros(1, 1), score, guidance, numbers)
        assert diverged == -1
        # x <- x + 0.5 g with 0.5 |g| limited to 0.1.
        torch.testing.assert_close(result.item(), min(0.5 * scale, 0.1), rtol=1e-6, atol=0.0)


@each_dtype
def test_a_sample_does_not_depend_on_the_device_or_its_block(dtype) -> None:
    call = call_of(4, (70, 30), (60, 40, 20), 200, dtype, plan("dpmpp_2m_sde"), labels=True)
    results = []
    for device in ((1, 227, 228), (1, 48, 49), (3, 163, 164), (100, 99, 100)):
        cuda.choose_device(*device)
        results.append(assert_agrees(call))
    assert all(torch.equal(result, results[0]) for result in results[1:])
    x, score, guidance, numbers = call
    last = [network._replace(sample_bias=network.sample_bias[190:]) for network in (score, guidance)]
    part, _ = cuda.trajectory(x[190:], *last, numbers, 2**40 + 3, torch.arange(190, 200))
    assert torch.equal(part, results[0][190:])


@each_dtype
def test_the_order_of_threads_and_blocks_does_not_matter(dtype) -> None:
    call = call_of(3, (40, 140), (70, 30), 100, dtype, plan("dpmpp_3m", gradient_norm_limit=0.2))
    results = []
    for order, seed in ORDERS:
        cuda.choose(order, seed)
        results.append(cuda.trajectory(*call)[0])
    assert all(torch.equal(result, results[0]) for result in results[1:])


@each_dtype
def test_every_barrier_is_needed(dtype) -> None:
    call = call_of(9, (40, 140), (70, 30), 220, dtype, plan("dpmpp_2m_sde", gradient_norm_limit=0.2))
    cuda.choose_device(1)
    cuda.choose(forget=True)
    cuda.trajectory(*call)
    places = cuda.barriers()
    assert places == 5
    for left_out in range(places):
        for order, seed in ORDERS:
            cuda.choose(order, seed, left_out)
            with pytest.raises(cuda.EmulationError, match="race|nothing has written|before a copy"):
                cuda.trajectory(*call)


def test_divergence_names_the_first_evaluation_and_spoils_no_other_sample() -> None:
    x, score, guidance, numbers = call_of(2, (20,), (25,), 100, FLOAT32, plan(steps=5))
    whole, _ = cuda.trajectory(x, score, guidance, numbers)
    score.evaluation_bias[3, 4] = torch.inf
    assert cuda.trajectory(x, score, guidance, numbers)[1] == 3
    score.evaluation_bias[3, 4] = 0.0
    labels = torch.zeros(100, 20)
    labels[71] = torch.nan
    result, diverged = cuda.trajectory(x, score._replace(sample_bias=labels), guidance, numbers)
    assert diverged == 0
    assert bool(result[71].isnan().any())
    labels[71] = 0.0
    others = torch.arange(100) != 71
    assert torch.equal(result[others], cuda.trajectory(x, score, guidance, numbers)[0][others])
    assert not torch.equal(result[others], whole[others])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(cuda.EmulationError, match="1 to 8 hidden layers"):
        cuda.trajectory(*call_of(2, (4,) * 9, (4,), 3, FLOAT32, plan()))
    with pytest.raises(cuda.EmulationError, match="too wide for the shared memory"):
        cuda.trajectory(*call_of(2, (4000,), (4,), 3, BFLOAT16, plan()))
    with pytest.raises(cuda.EmulationError, match="too wide for the shared memory"):
        cuda.trajectory(*call_of(1500, (40,), (4,), 3, BFLOAT16, plan()))
    many = TrajectoryPlan(np.zeros((1, 6, 7)), *(np.ones(1) for _ in range(6)))
    with pytest.raises(cuda.EmulationError, match="at most 4 history slots"):
        cuda.trajectory(*call_of(2, (4,), (4,), 3, FLOAT32, many))
    empty, diverged = cuda.trajectory(*call_of(2, (4,), (4,), 0, FLOAT32, plan()))
    assert empty.shape == (0, 2)
    assert diverged == -1
