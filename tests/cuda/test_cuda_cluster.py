"""The CUDA kernel of trajectories by clusters of blocks, run on the CPU by the emulation."""

from __future__ import annotations

from collections.abc import Iterator

import cuda_emulation as cuda
import numpy as np
import pytest
import torch
from test_cuda_trajectory import BFLOAT16, FLOAT16, FLOAT32, ORDERS, assert_agrees, call_of, each_dtype, plan

pytestmark = cuda.needs_compiler
# Room for many clusters, so that the least rows of a block are the cheapest; and for one, so that the most are.
MANY, ONE = 8000, 8


@pytest.fixture(autouse=True)
def _usual_device() -> Iterator[None]:
    yield
    cuda.choose()
    cuda.choose_device()


def choose_clusters(sms: int = MANY) -> None:
    cuda.choose_device(sms, clusters=1)


def widths(call):
    return [[len(weight) for weight in network.weights[:-1]] for network in call[1:3]]


def rows_of(call):
    """Rows of a cluster; the call must be served by one."""
    x, score, _, numbers = call
    chosen = cuda.trajectory_plan(x.shape[1], *widths(call), len(x), score.weights[0].dtype, numbers.history)
    assert chosen.cluster == 8
    return chosen.rows


def assert_same_bits(call, sms=MANY):
    """As the kernel of single blocks; returns rows of a cluster."""
    cuda.choose_device()
    single, failure = cuda.trajectory(*call, 2**40 + 3)
    choose_clusters(sms)
    rows = rows_of(call)
    result, other_failure = cuda.trajectory(*call, 2**40 + 3)
    assert torch.equal(result, single)
    assert other_failure == failure
    return rows


@each_dtype
@pytest.mark.parametrize(
    ("size", "score_widths", "guidance_widths", "batch"),
    [
        (1, (1,), (130,), 1),
        (2, (130, 24, 70), (70, 30, 150), 20),
        (37, (40, 24), (133, 20), 17),
        (150, (33,), (20,), 5),
        (3, (8,) * 8, (*(8,) * 7, 140), 9),
    ],
)
def test_bit_for_bit_as_single_blocks(size, score_widths, guidance_widths, batch, dtype) -> None:
    numbers = plan("dpmpp_2m_sde")
    assert_same_bits(call_of(size, score_widths, guidance_widths, batch, dtype, numbers, labels=True, stride=3))
    # Rows of the first layers are whole pieces of 16 bytes, which come by asynchronous copies.
    assert_same_bits(call_of(size, score_widths, guidance_widths, batch, dtype, numbers, stride=-size % 8))


@pytest.mark.parametrize(("batch", "rows", "widest"), [(3, 16, 536), (17, 32, 536), (32, 32, 264), (33, 64, 300)])
def test_every_tile_of_clusters(batch, rows, widest) -> None:
    """Panels of blocks that end within a layer, layers wider than a panel of every block, and no bank conflicts."""
    call = call_of(8, (200, widest), (264, 136), batch, BFLOAT16, plan(steps=2))
    cuda.bank_conflicts()
    assert assert_same_bits(call, ONE) == rows
    assert cuda.bank_conflicts() == 0


@pytest.mark.slow(ci=True)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_the_simulation(dtype) -> None:
    choose_clusters()
    call = call_of(2, (512, 512, 512, 512, 256), (512,) * 4, 20, dtype, plan(steps=2))
    assert rows_of(call) == 16
    assert_agrees(call)


@each_dtype
@pytest.mark.parametrize(
    "changes",
    [
        {"clamp": (-0.5, 0.7), "gradient_norm_limit": 0.05},
        # Evaluations with and without guidance: the stream of weights leaves the guidance network out.
        {"guidance_weight": np.array([0.0, 0.7, 0.0])},
        {"guidance_weight": np.array([0.7, 0.0, 0.7])},
    ],
)
def test_options(changes, dtype) -> None:
    assert_same_bits(call_of(3, (20, 130), (25, 15), 20, dtype, plan(steps=3, **changes)))


@each_dtype
def test_without_guidance(dtype) -> None:
    x, score, _, numbers = call_of(2, (20, 130), (25,), 9, dtype, plan())
    results = []
    for clusters in (0, 1):
        cuda.choose_device(MANY, clusters=clusters)
        results.append(assert_agrees((x, score, None, numbers)))
    assert torch.equal(*results)


@each_dtype
def test_the_order_of_threads_and_blocks_does_not_matter(dtype) -> None:
    call = call_of(3, (40, 140), (70, 30), 40, dtype, plan("dpmpp_3m", gradient_norm_limit=0.2))
    choose_clusters()
    results = []
    for order, seed in ORDERS:
        cuda.choose(order, seed)
        results.append(cuda.trajectory(*call)[0])
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_every_barrier_is_needed(dtype) -> None:
    call = call_of(9, (40, 140), (140, 30), 40, dtype, plan("dpmpp_2m_sde", gradient_norm_limit=0.2))
    choose_clusters()
    rows_of(call)
    cuda.choose(forget=True)
    cuda.trajectory(*call)
    places = cuda.barriers()
    # Those of a single block, at the start of a cluster, and after each layer.
    assert places == 7
    for left_out in range(places):
        for order, seed in ORDERS:
            cuda.choose(order, seed, left_out)
            with pytest.raises(
                cuda.EmulationError, match="race|nothing has written|before a copy|may not have started"
            ):
                cuda.trajectory(*call)


def test_divergence_is_reported() -> None:
    call = call_of(2, (20,), (130,), 40, FLOAT32, plan(steps=5))
    call[1].evaluation_bias[3, 4] = torch.inf
    choose_clusters()
    rows_of(call)
    assert cuda.trajectory(*call)[1] == 3


WIDE = ((512, 512, 512, 512, 256), (512,) * 4)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32])
def test_clusters_serve_few_samples_of_devices_that_have_them(dtype) -> None:
    def chosen(batch, clusters, sms=132, shared=227, sizes=WIDE):
        cuda.choose_device(sms, shared, shared + 1, clusters=clusters)
        return cuda.trajectory_plan(2, *sizes, batch, dtype)

    few = chosen(256, 16)
    # Sixteen clusters of eight blocks.
    assert (few.cluster, few.rows, few.blocks, few.scratch_bytes) == (8, 16, 128, 0)
    assert chosen(1, 16).blocks == 8
    assert chosen(256, 0).cluster == 1
    assert chosen(10000, 16).cluster == 1
    # Not where clusters would wait for each other, or a layer takes less time than to meet.
    assert chosen(256, 1, sms=8).cluster == 1
    assert chosen(256, 16, sizes=((32, 32), (32,))).cluster == 1
    # A block of 16 rows fits where none of 32 does, if only in clusters.
    wide = ((1700,), (1700,))
    if dtype != FLOAT32:
        assert chosen(5, 16, sizes=wide).cluster == 8
        with pytest.raises(cuda.EmulationError, match="too wide for the shared memory"):
            chosen(5, 0, sizes=wide)
