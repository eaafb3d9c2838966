"""All evaluations of a solver for networks that are MLPs, as one operator; it is timed in :mod:`.sampling`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.diffusion.solvers import solver_table
from tgdp_fast.lab.cases.case import Check, Draw
from tgdp_fast.ops import TrajectoryNetwork, TrajectoryPlan, trajectory
from tgdp_fast.ops.trajectory import trajectory_reference

#: For validate: samples and their size, widths of the score and of the guidance network, solver, whether first biases
#: have a part per sample, whether x0 and the gradient's norm are limited.
SHAPES = (
    ((0, 2), (16,), (16,), "dpmpp_2m", False, False),
    ((1, 1), (8,), (12, 5), "dpmpp_2m", False, False),
    ((67, 2), (64, 64), (48, 20), "ddpm", False, False),
    ((33, 9), (33, 17), (130,), "dpmpp_2m", True, False),
    ((130, 8), (40,), (), "heun", False, True),
    ((70, 37), (96, 64), (64, 96), "dpmpp_2m_sde", True, True),
)


class TrajectoryInputs(NamedTuple):
    """Arguments of ``trajectory``."""

    x: Tensor
    score: TrajectoryNetwork
    guidance: TrajectoryNetwork | None
    plan: TrajectoryPlan


def trajectory_inputs(
    shape: tuple[int, int],
    widths: Sequence[int],
    guidance_widths: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    solver: str = "dpmpp_2m",
    sample_bias: bool = False,
    limits: bool = False,
    seed: int = 0,
) -> TrajectoryInputs:
    """Three steps of a solver, on samples of ``shape`` [B, D].

    Args:
        shape, widths: of the samples and of the score network, which predicts v.
        guidance_widths: empty for no guidance network.
        dtype: of the networks' weights.
        device: of all tensors.
        solver: its name.
        sample_bias: whether first biases have a part per sample.
        limits: whether x0 and the gradient's norm are limited.
        seed: of the random numbers.
    """
    table = solver_table(solver, NoiseSchedule.vp_linear(), 3)
    draw = Draw(torch.float32, device, seed)

    def network(hidden: Sequence[int], outputs: int) -> TrajectoryNetwork:
        sizes = (shape[1], *hidden, outputs)
        weights = [draw(m, n, scale=n**-0.5, dtype=dtype) for n, m in itertools.pairwise(sizes)]
        biases = [draw(m, scale=0.3, dtype=dtype) for m in sizes[2:]]
        labels = draw(shape[0], sizes[1], scale=0.3) if sample_bias else None
        return TrajectoryNetwork(weights, biases, draw(table.nfe, sizes[1], scale=0.3), labels)

    plan = TrajectoryPlan(
        table.matrix,
        table.noise_scale,
        0.5 * table.sigma if guidance_widths else np.zeros(table.nfe),
        table.alpha,
        table.sigma,
        table.sigma,  # a v-prediction
        table.alpha,
        (-2.0, 2.0) if limits else None,
        0.2 if limits else None,
    )
    score, guidance = network(widths, shape[1]), network(guidance_widths, 1) if guidance_widths else None
    return TrajectoryInputs(draw(*shape), score, guidance, plan)


def check(draw: Draw, *entry: Any) -> Check:
    """The operator on an entry of :data:`SHAPES`. States are float32 whatever the networks' dtype; the results are
    rounded to it, so that one limit serves all.
    """
    (batch, size), widths, guidance_widths, solver, sample_bias, limits = entry
    options: Any = {"solver": solver, "sample_bias": sample_bias, "limits": limits, "seed": draw.seed}
    shapes = (batch, size), widths, guidance_widths
    x, score, guidance, plan = trajectory_inputs(*shapes, draw.dtype, draw.device, **options)
    seed, index = draw.seed, torch.arange(batch, device=draw.device) * 3 + 2**33
    call = partial(trajectory, x, score, guidance, plan, seed=seed, sample_index=index)
    double = (_double(score), None if guidance is None else _double(guidance))
    networks = f"{'x'.join(map(str, widths))} and {'x'.join(map(str, guidance_widths)) or 'no'} guidance"
    extras = ["labels"] * sample_bias + ["clamp, norm limit"] * limits
    return Check(
        ", ".join([f"[{batch}, {size}]", networks, solver, *extras]),
        lambda backend: [call(backend=backend).x.to(draw.dtype)],
        [trajectory_reference(x.double(), *double, plan, seed, index)[0]],
        [trajectory_reference(x, score, guidance, plan, seed, index)[0]],
    )


def _double(network: TrajectoryNetwork) -> TrajectoryNetwork:
    weights, biases, evaluation_bias, sample_bias = network
    labels = None if sample_bias is None else sample_bias.double()
    weights, biases = [w.double() for w in weights], [b.double() for b in biases]
    return TrajectoryNetwork(weights, biases, evaluation_bias.double(), labels)
