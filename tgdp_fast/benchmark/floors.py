"""What the machine can do at best: copy bandwidth and matrix products, measured in the run whose times they judge."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tgdp_fast.benchmark.accuracy import PRECISIONS
from tgdp_fast.benchmark.problems import perceptron_inputs
from tgdp_fast.ops import mlp_value_and_grad, registry

#: Bytes moved (read and written) by the copies: from what caches hold to what only memory does.
COPIES = (2**18, 2**21, 2**24, 2**29)
#: Rows, depth and columns of the products: large squares, and the tall ones of a network's layers.
PRODUCTS = ((1024, 1024, 1024), (2048, 2048, 2048), (8192, 512, 512))
#: Those of an accelerator besides, which smaller ones do not fill.
LARGE_PRODUCTS = ((8192, 8192, 8192),)
#: Precisions in which networks are timed.
MATRIX_PRECISIONS = ("fp32", "bf16")
_PERCEPTRON = (8192, 512)  # rows, width


@dataclass(frozen=True)
class Floors:
    """Best measured rates.

    Attributes:
        copy: bytes per second (read plus written) by the number of bytes that a copy moved.
        products: FLOP/s of matrix products by precision.
    """

    copy: dict[int, float]
    products: dict[str, float]

    def bandwidth(self, traffic: float) -> float:
        """Bytes per second for a call that moves ``traffic`` bytes: the best of all copies that move as much or more.

        A small call may live in a cache, and then it is measured against the cache.
        """
        fitting = [rate for moved, rate in self.copy.items() if moved >= traffic]
        return max(fitting) if fitting else self.copy[max(self.copy)]

    def seconds(self, traffic: float, flops: float, precision: str) -> float:
        """Least time of a call: max(bytes / copy bandwidth, FLOPs / product rate in that precision)."""
        return max(traffic / self.bandwidth(traffic), flops / self.products[precision])

    def to_json(self) -> dict[str, Any]:
        """For the environment of a result file."""
        return {"copy_bytes_per_second": self.copy, "product_flops_per_second": self.products}


def measure_floors(device: torch.device, seconds: float = 0.3) -> Floors:
    """Measure the rates, each for about ``seconds`` and at least three times; the best one counts."""
    copy = {}
    for moved in COPIES:
        source = torch.ones(moved // 8, device=device)
        target = torch.empty_like(source)
        copy[moved] = moved / best_time(partial(target.copy_, source), device, seconds)
    products = {}
    for precision in MATRIX_PRECISIONS:
        rates = [
            flops / best_time(call, device, seconds / 3)
            for flops, call in _products(PRECISIONS[precision], device)
            if _runs(call)
        ]
        products[precision] = max(rates)
    return Floors(copy, products)


def best_time(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest call in about ``seconds``, after one that does not count."""
    call()
    best, spent, count = float("inf"), 0.0, 0
    while count < 3 or spent < seconds:
        synchronise(device)
        started = time.perf_counter()
        call()
        synchronise(device)
        elapsed = time.perf_counter() - started
        best, spent, count = min(best, elapsed), spent + elapsed, count + 1
    return best


def synchronise(device: torch.device) -> None:
    """Wait for an accelerator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _products(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[float, Callable[[], Any]]]:
    """FLOPs and a call: torch's products, oneDNN's on a CPU, and those inside every backend's MLP.

    The last are a lower bound on the rate of the backend's products, for its pointwise work is in the time.
    """
    for rows, depth, columns in PRODUCTS if device.type == "cpu" else PRODUCTS + LARGE_PRODUCTS:
        a = torch.randn(rows, depth, device=device).to(dtype)
        weight = torch.randn(columns, depth, device=device).to(dtype)
        flops = 2.0 * rows * depth * columns
        yield flops, partial(torch.mm, a, weight.t())
        if device.type == "cpu":
            yield flops, partial(_onednn_linear, a, weight)
    rows, width = _PERCEPTRON
    inputs = perceptron_inputs(rows, width, [width] * 4, dtype, device)
    flops = 4.0 * rows * sum(weight.numel() for weight in inputs.weights)
    for backend, state in registry.backend_report()["mlp_value_and_grad"].items():
        if state == "available" and backend != "reference":
            yield flops, partial(mlp_value_and_grad, *inputs, backend=backend)


def _onednn_linear(a: Tensor, weight: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, weight, None, "none", [], "")
    return result


def _runs(call: Callable[[], Any]) -> bool:
    """Whether this torch and machine have it: a build without oneDNN, a processor without the type's instructions."""
    try:
        call()
    except (RuntimeError, AttributeError):
        return False
    return True
