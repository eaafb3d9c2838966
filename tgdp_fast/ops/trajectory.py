"""All evaluations of a solver for low-dimensional data, with MLPs as score and guidance networks.

Per evaluation k, with the networks' first biases from a table (time) plus a row per sample (labels)::

    epsilon = input_scale_k x + output_scale_k score(x)
    g = d guidance / dx                                          where guidance_weight_k is not 0
    g = g min(1, limit / (|guidance_weight_k| ||g||))            with a gradient norm limit
    x, history, _ = guided_step(x, epsilon, g, history, ...)     with noise evaluation k + 1

Samples are independent, so an implementation may run a block of them through all evaluations before the next block,
with nothing returned to memory in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tgdp_fast.ops import _cuda, registry
from tgdp_fast.ops.guided_step import SolverStep, guided_step_reference, limit_gradient
from tgdp_fast.ops.mlp import mlp_forward_reference, mlp_value_and_grad_reference
from tgdp_fast.runtime import native
from tgdp_fast.runtime.checks import check_number

__all__ = ["Trajectory", "TrajectoryNetwork", "TrajectoryPlan", "trajectory", "trajectory_reference"]


class TrajectoryNetwork(NamedTuple):
    """A SiLU MLP: weights W_1 [H_1, D] .. and head [O, H_L]; biases b_2 .. b_L and the head's.

    evaluation_bias [T, H_1] holds the first bias of each evaluation, sample_bias [B, H_1] what each sample adds to it,
    both float32.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    evaluation_bias: Tensor
    sample_bias: Tensor | None = None


@dataclass(frozen=True)
class TrajectoryPlan:
    """Host numbers of T evaluations of a solver with H history slots, float64 arrays.

    Attributes:
        matrix: [T, 1 + H, 2 + H], the solver's matrices; see :func:`tgdp_fast.ops.guided_step`.
        noise_scale, guidance_weight, alpha, sigma: [T], as in :func:`tgdp_fast.ops.guided_step`; guidance_weight 0
            leaves the guidance network out.
        input_scale, output_scale: [T]; epsilon = input_scale x + output_scale network(x).
        clamp: limits of x0, or None.
        gradient_norm_limit: largest L2 norm of guidance_weight times the gradient, per sample, or None.

    Raises:
        ValueError: lengths that differ, numbers that are not finite, alpha <= 0 or sigma < 0; a clamp with sigma = 0.
    """

    matrix: np.ndarray
    noise_scale: np.ndarray
    guidance_weight: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    input_scale: np.ndarray
    output_scale: np.ndarray
    clamp: tuple[float, float] | None = None
    gradient_norm_limit: float | None = None

    def __post_init__(self) -> None:
        if self.matrix.ndim != 3 or self.matrix.shape[2] != self.matrix.shape[1] + 1 or self.matrix.shape[1] < 1:
            raise ValueError(f"matrix must have shape (T, 1 + H, 2 + H), got {self.matrix.shape}")
        for name in ("noise_scale", "guidance_weight", "alpha", "sigma", "input_scale", "output_scale"):
            values = getattr(self, name)
            if values.shape != self.matrix.shape[:1] or not np.isfinite(values).all():
                raise ValueError(f"{name} must be {self.matrix.shape[0]} finite numbers, got {values!r}")
        if not np.isfinite(self.matrix).all():
            raise ValueError(f"matrix must be finite, got {self.matrix!r}")
        if (self.alpha <= 0).any() or (self.sigma < 0).any():
            raise ValueError("alpha must be > 0 and sigma >= 0 at every evaluation")
        if self.clamp is not None and not (self.clamp[0] <= self.clamp[1] and (self.sigma > 0).all()):
            raise ValueError(f"clamp must be (lo, hi) with lo <= hi, and needs sigma > 0 everywhere, got {self.clamp}")
        if self.gradient_norm_limit is not None:
            check_number("gradient_norm_limit", self.gradient_norm_limit, 0.0, exclusive=True)

    @property
    def history(self) -> int:
        """H."""
        return self.matrix.shape[1] - 1

    def table(self) -> Tensor:
        """[T, 6 + (1 + H)(2 + H)] float64: the scalars in the order of the native operator, then the matrix."""
        scalars = (self.input_scale, self.output_scale, self.guidance_weight, self.alpha, self.sigma, self.noise_scale)
        rows = np.stack(scalars, axis=1, dtype=np.float64)
        return torch.from_numpy(np.concatenate([rows, self.matrix.reshape(len(rows), -1)], axis=1))


class Trajectory(NamedTuple):
    """x [B, D] after the last evaluation, and the first evaluation with a state that is not finite, or -1."""

    x: Tensor
    diverged: int


def trajectory(
    x: Tensor,
    score: TrajectoryNetwork,
    guidance: TrajectoryNetwork | None,
    plan: TrajectoryPlan,
    *,
    seed: int = 0,
    sample_index: Tensor | None = None,
    bf16x3: bool = False,
    backend: str = "auto",
) -> Trajectory:
    """Run all evaluations of a guided solver on samples [B, D].

    A sampling operator: no autograd graph. A sample depends on its own row, ``seed`` and its ``sample_index`` alone.

    Precision: state, solver and biases in float32; matmuls in the dtype of each network's weights, accumulated
    in float32.

    Cost per sample and evaluation, for P_s and P_g weights: 2 P_s + 4 P_g FLOPs. Memory traffic when nothing else
    leaves the cache: 8 D bytes per sample in all, and the weights once per block of samples.

    Args:
        x: [B, D] float32, the initial state.
        score: network with D outputs.
        guidance: network with one output, or None.
        plan: the solver's numbers.
        seed: 0 <= seed < 2**64.
        sample_index: [B] int64; default 0..B-1.
        bf16x3: see :func:`tgdp_fast.ops.mlp_value_and_grad`.
        backend: "auto", "reference", or a faster implementation by name. "cuda" takes at most 4 history slots, 8 hidden
            layers, both networks in one dtype, and widths up to what shared memory holds: 512 in 16 bit from compute
            capability 8.0 on.

    Returns:
        A :class:`Trajectory`. If it diverged, x is meaningless.

    Raises:
        ValueError: shapes or dtypes do not fit.
        BackendUnavailableError: the requested backend cannot serve the call.

    Source: TGDP Theorem 3.1 with the solver written as a matrix per evaluation.
    """
    _check(x, score, guidance, plan, sample_index)
    if sample_index is None:
        sample_index = torch.arange(x.shape[0], dtype=torch.int64, device=x.device)
    implementation = registry.resolve("trajectory", backend, x, score, guidance, plan)
    with torch.no_grad():
        return Trajectory(*implementation.function(x, score, guidance, plan, seed, sample_index, bf16x3))


def trajectory_reference(
    x: Tensor,
    score: TrajectoryNetwork,
    guidance: TrajectoryNetwork | None,
    plan: TrajectoryPlan,
    seed: int,
    sample_index: Tensor,
    bf16x3: bool = False,
) -> tuple[Tensor, int]:
    """Plain PyTorch twin of :func:`trajectory`, without checks: one evaluation of the whole batch after the other."""
    history = None
    for k in range(len(plan.matrix)):
        weight = float(plan.guidance_weight[k])
        epsilon = float(plan.input_scale[k]) * x + float(plan.output_scale[k]) * _outputs(score, k, x)
        gradient = None
        if guidance is not None and weight != 0.0:
            dtype = guidance.weights[0].dtype
            bias = _first_bias(guidance, k).to(dtype)
            _, gradient = mlp_value_and_grad_reference(x.to(dtype), bias, guidance.weights, guidance.biases)
            if plan.gradient_norm_limit is not None:
                gradient = limit_gradient(gradient.to(x.dtype), weight, plan.gradient_norm_limit)
        x, history, _ = guided_step_reference(
            x,
            epsilon,
            gradient,
            history,
            SolverStep(
                plan.matrix[k].tolist(),
                noise_scale=float(plan.noise_scale[k]),
                guidance_weight=weight if gradient is not None else 0.0,
                alpha=float(plan.alpha[k]),
                sigma=float(plan.sigma[k]),
                clamp=plan.clamp,
            ),
            seed=seed,
            sample_index=sample_index,
            evaluation=k + 1,
        )
        if not x.isfinite().all():
            return x, k
    return x, -1


def _first_bias(network: TrajectoryNetwork, k: int) -> Tensor:
    bias = network.evaluation_bias[k : k + 1]
    return bias if network.sample_bias is None else bias + network.sample_bias


def _outputs(network: TrajectoryNetwork, k: int, x: Tensor) -> Tensor:
    dtype = network.weights[0].dtype
    first_bias = _first_bias(network, k).to(dtype)
    return mlp_forward_reference(x.to(dtype), first_bias, network.weights, network.biases).to(x.dtype)


def _check(
    x: Tensor,
    score: TrajectoryNetwork,
    guidance: TrajectoryNetwork | None,
    plan: TrajectoryPlan,
    sample_index: Tensor | None,
) -> None:
    if x.ndim != 2 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x must be float32 [B, D], got {x.dtype} of shape {tuple(x.shape)}")
    if sample_index is not None and (sample_index.dtype != torch.int64 or sample_index.shape != x.shape[:1]):
        raise ValueError(
            f"sample_index must be int64 of shape [{x.shape[0]}], got {sample_index.dtype} of shape "
            f"{tuple(sample_index.shape)}"
        )
    networks = {"score": (score, x.shape[1])} | ({} if guidance is None else {"guidance": (guidance, 1)})
    for name, (network, outputs) in networks.items():
        if len(network.weights) < 2 or len(network.biases) != len(network.weights) - 1:
            raise ValueError(
                f"{name} must have L + 1 weights and L biases (b_2 .. b_L and the head's), L >= 1, got "
                f"{len(network.weights)} and {len(network.biases)}"
            )
        width = x.shape[1]
        for i, weight in enumerate(network.weights):
            if weight.ndim != 2 or weight.shape[1] != width or weight.dtype != network.weights[0].dtype:
                raise ValueError(
                    f"{name}.weights[{i}] must be {network.weights[0].dtype} of shape [*, {width}], got {weight.dtype} "
                    f"of shape {tuple(weight.shape)}"
                )
            width = weight.shape[0]
            if i > 0 and (network.biases[i - 1].shape != (width,) or network.biases[i - 1].dtype != weight.dtype):
                raise ValueError(
                    f"{name}.biases[{i - 1}] must be {weight.dtype} of shape ({width},), got "
                    f"{network.biases[i - 1].dtype} of shape {tuple(network.biases[i - 1].shape)}"
                )
        if width != outputs:
            raise ValueError(f"{name} must have {outputs} outputs, got {width}")
        first = network.weights[0].shape[0]
        rows = {"evaluation_bias": len(plan.matrix), "sample_bias": x.shape[0]}
        for field, count in rows.items():
            bias = getattr(network, field)
            if bias is not None and (bias.shape != (count, first) or bias.dtype != x.dtype):
                raise ValueError(
                    f"{name}.{field} must be {x.dtype} of shape ({count}, {first}), got {bias.dtype} of shape "
                    f"{tuple(bias.shape)}"
                )


def _trajectory_native(
    x: Tensor,
    score: TrajectoryNetwork,
    guidance: TrajectoryNetwork | None,
    plan: TrajectoryPlan,
    seed: int,
    sample_index: Tensor,
    bf16x3: bool = False,
) -> tuple[Tensor, int]:
    none = TrajectoryNetwork((), (), x.new_zeros((0, 0)))
    other = none if guidance is None else guidance
    result, diverged = torch.ops.tgdp_fast.trajectory(
        x,
        list(score.weights),
        list(score.biases),
        score.evaluation_bias,
        score.sample_bias,
        list(other.weights),
        list(other.biases),
        other.evaluation_bias,
        other.sample_bias,
        plan.table(),
        plan.history,
        None if plan.clamp is None else list(plan.clamp),
        plan.gradient_norm_limit,
        # The operator takes the seed's bits as a signed number.
        seed - (1 << 64) if seed >= 1 << 63 else seed,
        sample_index,
        bf16x3,
    )
    return result, int(diverged)


def _unsupported_by_cpu(
    x: Tensor, score: TrajectoryNetwork, guidance: TrajectoryNetwork | None, _: TrajectoryPlan
) -> str | None:
    networks = [score] if guidance is None else [score, guidance]
    reasons = map(registry.unsupported_float64, (x, *(network.weights[0] for network in networks)))
    return next((reason for reason in reasons if reason is not None), None)


def _unsupported_by_cuda(
    x: Tensor, score: TrajectoryNetwork, guidance: TrajectoryNetwork | None, plan: TrajectoryPlan
) -> str | None:
    reason = _unsupported_by_cpu(x, score, guidance, plan) or _cuda.unsupported_device(x)
    if reason is not None:
        return reason
    dtype = score.weights[0].dtype
    if guidance is not None and guidance.weights[0].dtype != dtype:
        return f"it takes both networks in one dtype, not {dtype} and {guidance.weights[0].dtype}"
    networks = (score.weights, () if guidance is None else guidance.weights)
    widths = [[weight.shape[0] for weight in weights[:-1]] for weights in networks]
    size = score.weights[0].shape[1]
    # The answer depends on the device's shared memory, which the launcher knows to use.
    answer: str = torch.ops.tgdp_fast.cuda_trajectory_refusal(x.get_device(), dtype, size, plan.history, *widths)
    return answer or None


registry.register("trajectory", "cpu", _trajectory_native, _unsupported_by_cpu, missing=native.CPU_MISSING)
registry.register("trajectory", "cuda", _trajectory_native, _unsupported_by_cuda, missing=native.CUDA_MISSING)
registry.register("trajectory", "reference", trajectory_reference)
