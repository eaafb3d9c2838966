"""Work on a GPU recorded once in a CUDA graph and replayed: a solver's loop costs the host one launch then."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

_logger = logging.getLogger(__name__)

Tensors: TypeAlias = tuple[Tensor, ...]
#: function(*inputs) -> outputs, without waiting for the device and without reading the host's memory.
Function: TypeAlias = Callable[..., Tensors]


class Replayed:
    """Calls ``function`` as it is the first time, records the second call and replays it from then on.

    The first call warms up what a recording cannot do: compiling kernels, choosing configurations, growing work spaces.
    Calls whose inputs have other shapes than the first one's run as they are, and so does everything if the recording
    fails, which is logged once.

    Args:
        function: see :data:`Function`; its results must depend on nothing but its inputs.
        name: of the function, for the log.

    Inputs and outputs are tensors or None. The outputs of a call are overwritten by the next one.
    """

    def __init__(self, function: Function, name: str) -> None:
        self.function = function
        self.name = name
        self._shapes: list[torch.Size | None] | None = None
        self._static: list[Tensor | None] = []
        self._outputs: Tensors = ()
        self._replay: Callable[[], None] | None = None
        self._refused = False

    def __call__(self, *inputs: Tensor | None) -> Tensors:
        shapes = [None if tensor is None else tensor.shape for tensor in inputs]
        if self._shapes is None:
            self._shapes = shapes
            return self.function(*inputs)
        if self._refused or shapes != self._shapes:
            return self.function(*inputs)
        if self._replay is None:
            self._static = [None if tensor is None else tensor.clone() for tensor in inputs]
            try:
                self._replay, self._outputs = record(self.function, self._static)
            except Exception as error:
                # Whatever a network does that cannot be recorded: it must only cost speed.
                self._refused = True
                first_line = (str(error).strip().splitlines() or [""])[0]
                _logger.warning("%s cannot be recorded in a CUDA graph and runs as it is: %s", self.name, first_line)
                return self.function(*inputs)
        for static, tensor in zip(self._static, inputs, strict=True):
            if static is not None and tensor is not None:
                static.copy_(tensor)
        self._replay()
        return self._outputs


def record(function: Function, inputs: list[Tensor | None]) -> tuple[Callable[[], None], Tensors]:
    """(replay, outputs): a CUDA graph of ``function(*inputs)``, whose inputs and outputs stay where they are."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function(*inputs)
    return graph.replay, outputs
