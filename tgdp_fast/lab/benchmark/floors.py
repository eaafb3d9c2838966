"""What the machine can do at best: copy bandwidth and matmul rates, measured in the run whose times they judge."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tgdp_fast.lab.cases.mlp import mlp_inputs
from tgdp_fast.ops import mlp_value_and_grad, registry
from tgdp_fast.runtime.precision import PRECISIONS

#: Bytes moved (read and written) by the copies: from what caches hold to what only memory does.
COPIES = (2**18, 2**21, 2**24, 2**29)
#: Rows, depth and columns of the matmuls: large squares, and the tall ones of a network's layers.
MATMULS = ((1024, 1024, 1024), (2048, 2048, 2048), (8192, 512, 512))
#: In addition on an accelerator, which smaller ones do not fill.
LARGE_MATMULS = ((8192, 8192, 8192),)
#: Rows and width of the MLPs whose matmuls count too.
MLP = (8192, 512)


@dataclass(frozen=True)
class Floors:
    """Best measured rates.

    Attributes:
        copy: bytes per second (read plus written) by the number of bytes that a copy moved.
        matmul: FLOP/s by precision.
    """

    copy: dict[int, float]
    matmul: dict[str, float]

    def bandwidth(self, traffic: float) -> float:
        """Bytes per second for a call that moves ``traffic`` bytes: the best of all copies that move as much or more.

        A small call may live in a cache, and is then measured against the cache.
        """
        fitting = [rate for moved, rate in self.copy.items() if moved >= traffic]
        return max(fitting) if fitting else self.copy[max(self.copy)]

    def seconds(self, traffic: float, flops: float, precision: str) -> float:
        """Least time of a call: max(bytes / copy bandwidth, FLOPs / matmul rate in that precision)."""
        return max(traffic / self.bandwidth(traffic), flops / self.matmul[precision])

    def to_json(self) -> dict[str, Any]:
        """For the environment of a result file."""
        return {"copy_bytes_per_second": self.copy, "product_flops_per_second": self.matmul}


def measure_floors(device: torch.device, seconds: float = 0.3) -> Floors:
    """Measure the rates, each for about ``seconds`` and at least three times; the best one counts."""
    copy = {}
    for moved in COPIES:
        source = torch.ones(moved // 8, device=device)
        copy[moved] = moved / best_time(partial(torch.empty_like(source).copy_, source), device, seconds)
    matmul = {}
    for precision in ("fp32", "bf16"):  # those in which networks are timed
        calls = [(flops, call) for flops, call in _matmuls(PRECISIONS[precision], device) if _runs(call)]
        matmul[precision] = max(flops / best_time(call, device, seconds / 3) for flops, call in calls)
    return Floors(copy, matmul)


def best_time(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest call in about ``seconds``, after one that does not count."""
    call()
    best, spent, count = float("inf"), 0.0, 0
    while count < 3 or spent < seconds:
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        elapsed = time.perf_counter() - started
        best, spent, count = min(best, elapsed), spent + elapsed, count + 1
    return best


def synchronize(device: torch.device) -> None:
    """Wait for an accelerator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _matmuls(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[float, Callable[[], Any]]]:
    """FLOPs and a call: torch's matmuls, oneDNN's on a CPU, and those inside every backend's MLP.

    The last are a lower bound on the rate of the backend's matmuls, for its pointwise work is in the time.
    """
    for rows, depth, columns in MATMULS if device.type == "cpu" else MATMULS + LARGE_MATMULS:
        a = torch.randn(rows, depth, device=device).to(dtype)
        weight = torch.randn(columns, depth, device=device).to(dtype)
        flops = 2.0 * rows * depth * columns
        yield flops, partial(torch.mm, a, weight.t())
        if device.type == "cpu":
            yield flops, partial(_onednn_linear, a, weight)
    rows, width = MLP
    inputs = mlp_inputs(rows, width, [width] * 4, dtype, device)
    flops = 4.0 * rows * sum(weight.numel() for weight in inputs.weights)
    for backend, state in registry.backend_report()["mlp_value_and_grad"].items():
        if state == "available" and backend != "reference":
            yield flops, partial(mlp_value_and_grad, *inputs, backend=backend)


def _onednn_linear(a: Tensor, weight: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, weight, None, "none", [], "")
    return result


def _runs(call: Callable[[], Any]) -> bool:
    """Whether this torch and machine have it: a build without oneDNN, a CPU without the type's instructions."""
    try:
        call()
    except (RuntimeError, AttributeError):
        return False
    return True
