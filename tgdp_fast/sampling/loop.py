"""The solver's loop over its evaluations, and its CUDA graphs, with which it costs the host one launch.

On a CPU, and where a callback looks on, :class:`Loop` runs as it is. On a GPU :class:`GraphCache` runs it: as it is at
first, captured in a CUDA graph the second time, and from then on by replays.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tgdp_fast.diffusion.guided import EpsilonModel, Guidance, evaluate_models
from tgdp_fast.diffusion.solvers import SolverTable
from tgdp_fast.ops import SolverStep, guided_step
from tgdp_fast.ops.measured import capturing

_logger = logging.getLogger(__name__)

#: after(k, x, x0, finite): the evaluation, the state after it, the predicted clean sample, whether the state is finite.
After: TypeAlias = Callable[[int, Tensor, Tensor, Tensor], None]
Tensors: TypeAlias = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Loop:
    """All evaluations of a solver, one by one.

    Attributes:
        denoiser, guidance: the models.
        table: the solver, K evaluations.
        weights: [K], scale * sigma at each evaluation; 0 leaves the guidance network out.
        clamp, gradient_norm_limit: as in :class:`GuidedDenoiser`.
    """

    denoiser: EpsilonModel
    guidance: Guidance | None
    table: SolverTable
    weights: Sequence[float]
    clamp: tuple[float, float] | None = None
    gradient_norm_limit: float | None = None

    def __call__(
        self,
        x: Tensor,
        sample_index: Tensor,
        labels: Tensor | None = None,
        *,
        seed: int,
        after: After | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The state at the end, and after which evaluations it was finite, bool [K]. Never waits for an accelerator.

        Args:
            x: [B, ...] floating point, the initial state.
            sample_index: [B] int64, to which the noise belongs.
            labels: None, [B] or [B, C].
            seed: of the noise.
            after: called after each evaluation.
        """
        table = self.table
        history = x.new_zeros((table.history, *x.shape)) if table.history else None
        finite = []
        for k, weight in enumerate(self.weights):
            epsilon, gradient = evaluate_models(
                self.denoiser, self.guidance, x, float(table.times[k]), labels, weight, self.gradient_norm_limit
            )
            x, history, x0 = guided_step(
                x,
                epsilon,
                gradient,
                history,
                step=SolverStep(
                    table.matrix[k],
                    noise_scale=float(table.noise_scale[k]),
                    guidance_weight=weight,
                    alpha=float(table.alpha[k]),
                    sigma=float(table.sigma[k]),
                    clamp=self.clamp,
                ),
                seed=seed,
                sample_index=sample_index,
                evaluation=k + 1,
            )
            finite.append(x.isfinite().all())
            if after is not None:
                after(k, x, x0, finite[-1])
        return x, torch.stack(finite)


@dataclass
class _Graph:
    """A captured function: static inputs and outputs, the replay, and what its kernels read besides."""

    inputs: list[Tensor | None]
    outputs: Tensors
    replay: Callable[[], None]
    kept: list[Any]


class GraphCache:
    """CUDA graphs of one function by the shapes of its inputs.

    The first call with new shapes runs the function as it is, which does what a capture cannot: compiling kernels,
    growing work spaces. The second call captures it, and replays from then on. If a capture fails, that is logged once
    and the function always runs as it is. Not for two threads at once.

    Args:
        name: of the function, for the log.
        models: whose parameters the function reads; they are kept as long as a graph reads them.
        capacity: number of shapes; the one not used for the longest time is forgotten first.
    """

    def __init__(self, name: str, models: Sequence[Any] = (), capacity: int = 4) -> None:
        self.name = name
        self._models = models
        self._capacity = capacity
        self._state: Hashable = None
        self._graphs: OrderedDict[Hashable, _Graph | None] = OrderedDict()  # None: seen once, not captured yet
        self._refused = False

    def run(self, function: Callable[..., Tensors], *inputs: Tensor | None, state: Hashable = None) -> Tensors:
        """``function(*inputs)``.

        Args:
            function: gives a tuple of tensors, without waiting for the device and without reading the host's memory;
                the result may depend on nothing but inputs and ``state``.
            inputs: tensors or None.
            state: what a graph holds as it was when captured: with another one than in the call before, all graphs are
                dropped.

        Returns:
            The function's result. The next call may overwrite it.
        """
        if state != self._state:
            self._graphs.clear()
            self._state = state
        key = tuple(None if tensor is None else (tensor.shape, tensor.dtype, tensor.device) for tensor in inputs)
        seen = key in self._graphs
        graph = self._graphs.pop(key, None)
        with capturing():  # the same kernels as it is and captured
            if seen and graph is None and not self._refused:
                graph = self._capture(function, inputs)
            result = function(*inputs) if graph is None else graph.outputs
        self._graphs[key] = graph
        if len(self._graphs) > self._capacity:
            self._graphs.popitem(last=False)
        if graph is None:
            return result
        for static, tensor in zip(graph.inputs, inputs, strict=True):
            if static is not None and tensor is not None:
                static.copy_(tensor)
        graph.replay()
        return result

    def _capture(self, function: Callable[..., Tensors], inputs: Sequence[Tensor | None]) -> _Graph | None:
        static = [None if tensor is None else tensor.clone() for tensor in inputs]
        try:
            replay, outputs = capture(function, static)
        except Exception as error:
            # Whatever a network does that cannot be captured: it must only cost speed.
            self._refused = True
            first_line = (str(error).strip().splitlines() or [""])[0]
            _logger.warning("%s cannot be captured in a CUDA graph and runs as it is: %s", self.name, first_line)
            return None
        return _Graph(static, outputs, replay, [_held(model) for model in self._models])


def capture(function: Callable[..., Tensors], inputs: list[Tensor | None]) -> tuple[Callable[[], None], Tensors]:
    """(replay, outputs): a CUDA graph of ``function(*inputs)``, whose inputs and outputs stay where they are."""
    graph = torch.cuda.CUDAGraph()
    # Autocast keeps weights that it has cast: those from before would not follow their weights in a replay, and those
    # from the capture hold no values outside it.
    torch.clear_autocast_cache()
    try:
        with torch.cuda.graph(graph):
            outputs = function(*inputs)
    finally:
        torch.clear_autocast_cache()
    return graph.replay, outputs


def state_of(model: Any) -> Hashable:
    """What a graph holds as it was of a model that it was captured with. Equal states: the graph is still right.

    Of a module: its submodules, their hooks, numbers and texts, and where their parameters and buffers lie; values that
    change in place are read anew by every replay. A network that was compiled from another one (``uncompiled``) holds
    other forms of that one's weights, so for it such changes count too. Any other object may change unseen: its state
    differs from every other.
    """
    if model is None:
        return None
    if not isinstance(model, nn.Module):
        return object()
    found: list[Hashable] = []
    modules = list(model.modules())
    derived = any(hasattr(module, "uncompiled") for module in modules)
    for module in modules:
        attributes = vars(module)
        plain = [item for item in attributes.items() if isinstance(item[1], bool | int | float | str)]
        found += [id(module), *plain, *module._forward_hooks, *module._forward_pre_hooks]
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                version = tensor._version if derived and not tensor.is_inference() else 0
                found.append((_address(tensor), tensor.shape, tensor.stride(), tensor.dtype, version))
    return tuple(found)


def _address(tensor: Tensor) -> Hashable:
    """Where its values lie; for a tensor made of others, which may move unseen, something equal to nothing else."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return object()


def _held(model: Any) -> list[Any]:
    """All that a module's attributes refer to now, such as its parameters and work spaces."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    values = (value for module in modules for value in vars(module).values())
    return [copy.copy(value) if isinstance(value, dict | list | set) else value for value in values]
