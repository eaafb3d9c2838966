"""Operators of the sampling loop. Each has a plain PyTorch reference and may have faster implementations."""

from __future__ import annotations

from tgdp_fast.ops.gated_activation import gated_activation
from tgdp_fast.ops.guided_step import SolverStep, guided_epsilon, guided_step, limit_gradient
from tgdp_fast.ops.long_convolution import LongConvolution, long_convolution, prepare_long_convolution
from tgdp_fast.ops.mlp import mlp_forward, mlp_value_and_grad
from tgdp_fast.ops.registry import BackendUnavailableError, backend_report, use_backend
from tgdp_fast.ops.residual_block import ResidualBlockWeights, S4Weights, residual_block_
from tgdp_fast.ops.trajectory import TrajectoryNetwork, TrajectoryPlan, trajectory

__all__ = [
    "BackendUnavailableError",
    "LongConvolution",
    "ResidualBlockWeights",
    "S4Weights",
    "SolverStep",
    "TrajectoryNetwork",
    "TrajectoryPlan",
    "backend_report",
    "gated_activation",
    "guided_epsilon",
    "guided_step",
    "limit_gradient",
    "long_convolution",
    "mlp_forward",
    "mlp_value_and_grad",
    "prepare_long_convolution",
    "residual_block_",
    "trajectory",
    "use_backend",
]
