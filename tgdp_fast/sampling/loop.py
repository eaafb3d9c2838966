"""The solver's loop over its evaluations, and its CUDA graphs, which reduce it to one launch by the host.

On a CPU, and with a callback, :class:`Loop` runs directly. On a GPU :class:`GraphCache` runs it: directly the first
time, captured in a CUDA graph the second time, and by replays from then on.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tgdp_fast.diffusion.guided import EpsilonModel, Guidance, evaluate_models
from tgdp_fast.diffusion.solvers import SolverTable
from tgdp_fast.ops import SolverStep, guided_step
from tgdp_fast.ops.measured import capturing

_logger = logging.getLogger(__name__)
_capture = threading.Lock()

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
        """The final state, and whether it was finite after each evaluation, bool [K]. Never waits for an accelerator.

        Args:
            x: [B, ...] floating point, the initial state.
            sample_index: [B] int64, the index for the noise.
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
    """A captured function: static inputs and outputs, the replay, and the other memory that its kernels read."""

    inputs: list[Tensor | None]
    outputs: Tensors
    replay: Callable[[], None]
    kept: list[Any]


class GraphCache:
    """CUDA graphs of one function by the shapes of its inputs.

    The first call with new shapes runs the function directly, which does what a capture cannot: compile kernels, grow
    workspaces. The second call captures it; later calls replay it. If a capture fails, this is logged once and the
    function always runs directly. Threads wait for each other.

    Args:
        name: of the function, for the log.
        models: that the function runs. The tensors in their attributes are kept as long as a graph reads them.
        capacity: number of shapes; the least recently used one is dropped first.
    """

    def __init__(self, name: str, models: Sequence[Any] = (), capacity: int = 4) -> None:
        self.name = name
        self._models = models
        self._capacity = capacity
        self._state: Any = None
        self._graphs: OrderedDict[Hashable, _Graph | None] = OrderedDict()  # None: seen once, not captured yet
        self._ran = False  # Whether the function ran since the state was taken.
        self._refused = False
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy starts without graphs: they can be neither copied nor sent to another process.
        return GraphCache, (self.name, self._models, self._capacity)

    @contextmanager
    def checked(self, settings: Any = None) -> Iterator[None]:
        """Around calls of :meth:`run`: drops all graphs if the models or ``settings`` have changed.

        A replay runs no Python code, so everything that the function reads there must be in ``settings``, which are
        compared, or in the attributes of the models; see :func:`state_of`.
        """
        with self._lock:  # The inputs and outputs of a graph belong to one caller at a time.
            state = settings, [state_of(model) for model in self._models]
            if state != self._state:
                self._graphs.clear()
            self._state, self._ran = None, False
            yield
            # A call of a network, unlike a replay, may change the values that it keeps.
            self._state = (settings, [state_of(model) for model in self._models]) if self._ran else state

    def run(self, function: Callable[..., Tensors], *inputs: Tensor | None) -> Tensors:
        """``function(*inputs)``, within :meth:`checked`.

        Args:
            function: gives a tuple of tensors, without waiting for the device and without reading the host's memory.
            inputs: tensors or None.

        Returns:
            The function's result. The next call may overwrite it.
        """
        key = tuple(None if tensor is None else (tensor.shape, tensor.dtype, tensor.device) for tensor in inputs)
        seen = key in self._graphs
        graph = self._graphs.pop(key, None)
        with capturing():  # The same kernels in the direct call as in the capture.
            if seen and graph is None and not self._refused:
                graph = self._capture(function, inputs)
            if graph is None:
                self._ran = True
                result = function(*inputs)
        self._graphs[key] = graph
        if len(self._graphs) > self._capacity:
            self._graphs.popitem(last=False)
        if graph is None:
            return result
        for static, tensor in zip(graph.inputs, inputs, strict=True):
            if static is not None and tensor is not None:
                static.copy_(tensor)
        graph.replay()
        return graph.outputs

    def _capture(self, function: Callable[..., Tensors], inputs: Sequence[Tensor | None]) -> _Graph | None:
        self._ran = True
        static = [None if tensor is None else tensor.clone() for tensor in inputs]
        try:
            replay, outputs = capture(function, static)
        except Exception as error:
            # If a network cannot be captured, for any reason, this must only cost speed.
            self._refused = True
            first_line = (str(error).strip().splitlines() or [""])[0]
            _logger.warning("%s cannot be captured in a CUDA graph and runs directly: %s", self.name, first_line)
            return None
        return _Graph(static, outputs, replay, [_held(model) for model in self._models])


def capture(function: Callable[..., Tensors], inputs: list[Tensor | None]) -> tuple[Callable[[], None], Tensors]:
    """(replay, outputs): a CUDA graph of ``function(*inputs)``, which reads and writes these tensors at each replay."""
    graph = torch.cuda.CUDAGraph()
    # Autocast caches the weights that it casts: copies from before the capture would not follow their weights in a
    # replay, and copies from the capture hold no values outside it.
    torch.clear_autocast_cache()
    try:
        # One at a time, as captures share a stream; other threads may go on with other work.
        with _capture, torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = function(*inputs)
    finally:
        torch.clear_autocast_cache()
    return graph.replay, outputs


def state_of(model: Any) -> Any:
    """The state of a model: equal at two times if a graph captured at the first one is valid at the second.

    It holds the attributes of all submodules: numbers and texts by value, tensors by address and number of in-place
    changes, containers and other objects by identity and contents, two levels deep. In-place changes count although a
    replay reads the new weights, because a network may keep values computed from the old ones. A model that is no
    module may change undetected, so its state equals no other.
    """
    if model is None:
        return None
    if not isinstance(model, nn.Module):
        return object()
    return [
        (id(module), [(name, _token(value)) for name, value in vars(module).items() if value is not None])
        for module in model.modules()
    ]


_PLAIN = (bool, int, float, str)


def _token(value: Any, depth: int = 2) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        version = 0 if value.is_inference() else value._version
        try:
            return id(value), value.data_ptr(), value.shape, value.stride(), value.dtype, version
        except RuntimeError:  # A tensor subclass made of others, whose changes cannot be detected.
            return object()
    if depth > 0 and isinstance(value, dict):
        return [(key, _token(item, depth - 1)) for key, item in value.items()] if value else ()
    if depth > 0 and isinstance(value, (list, tuple, set)):
        return [_token(item, depth - 1) for item in value]
    if depth > 0 and hasattr(value, "__dict__") and not isinstance(value, (type, ModuleType, nn.Module)):
        return id(value), _token(vars(value), depth)
    return id(value)


def _held(model: Any) -> list[Any]:
    """Everything that :func:`state_of` reads, so that its memory is not reused while a graph reads it."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    values = (value for module in modules for value in vars(module).values())
    return [copy.copy(value) if isinstance(value, dict | list | set) else value for value in values]
