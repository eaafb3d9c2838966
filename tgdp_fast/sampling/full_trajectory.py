"""The full trajectory of the MLPs of this package as one operator, ``ops.trajectory``, instead of the loop."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from tgdp_fast.diffusion.denoiser import Denoiser, epsilon_scales, labels_for
from tgdp_fast.diffusion.guidance import GuidanceNetwork
from tgdp_fast.models import ScoreMLP, encode_labels
from tgdp_fast.ops import BackendUnavailableError, TrajectoryNetwork, TrajectoryPlan, trajectory, use_backend
from tgdp_fast.ops.measured import loop_is_faster
from tgdp_fast.ops.registry import requested_backend, resolve
from tgdp_fast.sampling.loop import Loop


@dataclass(frozen=True, eq=False)
class FullTrajectory:
    """A :class:`Loop` with a :class:`ScoreMLP`, and a :class:`GuidanceNetwork` or none, ready for the operator.

    It holds the current weights; create another one after they change.
    """

    loop: Loop
    score: TrajectoryNetwork
    guidance: TrajectoryNetwork | None
    plan: TrajectoryPlan
    bf16x3: bool
    backend: str

    @classmethod
    def of(
        cls, loop: Loop, dtype: torch.dtype, backend: str, *, bf16x3: bool = False, samples: int | None = None
    ) -> FullTrajectory | None:
        """The full trajectory of ``loop``, or None if the models or the available backends need the loop.

        Args:
            loop: models, table and weights.
            dtype: of the factors of the networks' matmuls.
            backend, bf16x3: as for the operators.
            samples: of the draw, so that ``auto`` uses the loop where it is faster.
        """
        denoiser, guidance, table = loop.denoiser, loop.guidance, loop.table
        # Exactly these classes: a subclass or a hook may compute something else.
        if not _is_plain(denoiser, Denoiser) or not _is_plain(denoiser.network, ScoreMLP):
            return None
        if guidance is not None and (not _is_plain(guidance, GuidanceNetwork) or guidance.stem is not None):
            return None
        network = denoiser.network
        times = torch.from_numpy(np.array(table.times, dtype=np.float64))
        device = network.head.weight.device
        layers = [*(layer for layer in network.layers if isinstance(layer, nn.Linear)), network.head]
        score = _network(layers, network.time_embedding, denoiser.network_time(times).to(device), dtype)
        weights = np.array(loop.weights, dtype=np.float64)
        other = None
        if guidance is not None and weights.any():
            weights = weights * np.power(table.alpha, guidance.alpha_power)
            half_log_snr = guidance.schedule.half_log_snr(times).to(device)
            other = _network(guidance.linear_layers(), guidance.time_embedding, half_log_snr, dtype)
        scaled = [
            epsilon_scales(denoiser.prediction, float(a), float(s))
            for a, s in zip(table.alpha, table.sigma, strict=True)
        ]
        plan = TrajectoryPlan(
            table.matrix,
            table.noise_scale,
            weights,
            table.alpha,
            table.sigma,
            np.array([a for a, _ in scaled]),
            np.array([b for _, b in scaled]),
            loop.clamp,
            loop.gradient_norm_limit,
        )
        try:
            chosen = resolve("trajectory", backend, score.evaluation_bias, score, other, plan).backend
        except BackendUnavailableError:
            return None
        if chosen == "cuda" and samples is not None and requested_backend(backend) == "auto":
            networks = [network.weights for network in (score, other) if network is not None]
            if loop_is_faster(samples, networks):
                return None
        return None if chosen == "reference" else cls(loop, score, other, plan, bf16x3, chosen)

    def run(self, x: Tensor, labels: Tensor | None, seed: int, sample_index: Tensor) -> tuple[Tensor, int]:
        """States [B, ...] after all evaluations, and the first evaluation that diverged, or -1.

        Shapes: x [B, ...] float32, the initial states; labels None, [B] or [B, K]; sample_index [B] int64.
        """
        score = self.score._replace(sample_bias=_label_bias(self.loop.denoiser, labels))
        guidance = self.guidance
        if guidance is not None:
            guidance = guidance._replace(sample_bias=_label_bias(self.loop.guidance, labels))
        result, diverged = trajectory(
            x.flatten(1),
            score,
            guidance,
            self.plan,
            seed=seed,
            sample_index=sample_index,
            bf16x3=self.bf16x3,
            backend=self.backend,
        )
        return result.reshape(x.shape), diverged


def _network(
    layers: Sequence[nn.Linear], time_embedding: nn.Module, times: Tensor, dtype: torch.dtype
) -> TrajectoryNetwork:
    weights = [layer.weight.detach().to(dtype) for layer in layers]
    biases = [layer.bias.detach().to(dtype) for layer in layers[1:]]
    evaluation_bias = layers[0].bias.detach() + _rounded_once(time_embedding, times)
    return TrajectoryNetwork(weights, biases, evaluation_bias)


def _label_bias(model: object, labels: Tensor | None) -> Tensor | None:
    network = model.network if isinstance(model, Denoiser) else model
    assert isinstance(network, ScoreMLP | GuidanceNetwork)
    own = labels_for(model, labels)
    if network.label_embedding is None or own is None:
        return None
    return _rounded_once(network.label_embedding, encode_labels(own, network.num_classes))


def _rounded_once(module: nn.Module, inputs: Tensor) -> Tensor:
    """The module's output computed in float64: in float32 it would depend on the number of rows and threads."""
    with torch.no_grad(), use_backend("reference"):
        result: Tensor = copy.deepcopy(module).double()(inputs.double())
    return result.float()


Module = TypeVar("Module", bound=nn.Module)


def _is_plain(model: object, kind: type[Module]) -> TypeGuard[Module]:
    """Whether the model is exactly of this class, in float32 and without hooks."""
    return (
        isinstance(model, kind)
        and model.__class__ is kind
        and all(parameter.dtype == torch.float32 for parameter in model.parameters())
        and not any(
            child._forward_hooks or child._forward_pre_hooks or "forward" in vars(child) or is_parametrized(child)
            for child in model.modules()
        )
    )
