"""Value and input gradient of the guidance network's perceptron."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tgdp_fast.benchmark import eager
from tgdp_fast.benchmark.accuracy import PRECISIONS, Error, Verdict, error_of
from tgdp_fast.benchmark.cases.base import (
    Call,
    Case,
    Prepared,
    Work,
    bytes_of,
    checked_rows,
    hidden_weights,
    judge,
)
from tgdp_fast.benchmark.problems import perceptron_inputs
from tgdp_fast.ops import mlp_value_and_grad
from tgdp_fast.ops.mlp import mlp_value_and_grad_reference

_FEW_ROWS = 64


class Perceptron(Case):
    """Value and input gradient of the guidance network's perceptron, four hidden layers, one shared first bias."""

    DEPTH = 4

    def __init__(self, batch: int, inputs: int, width: int, *, quick: bool = False) -> None:
        self.batch, self.inputs, self.width = batch, inputs, width
        self.name = f"mlp_value_and_grad/batch{batch}-input{inputs}-width{width}"
        self.shape = f"[{batch}, {inputs}], {self.DEPTH} x {width}"
        self.precisions = ("fp32", "bf16")
        self.quick = quick
        self.memory = 20.0 * batch * (3 * inputs + 3 * self.DEPTH * width)
        self.operators = ("mlp_value_and_grad",)

    @property
    def weights(self) -> int:
        """P: numbers in the weight matrices."""
        return hidden_weights(self.inputs, self.width, self.DEPTH) + self.width

    def work(self, precision: str) -> Work:
        numbers = self.batch * (2 * self.inputs + 1) + self.weights + self.DEPTH * self.width
        return Work(bytes_of(precision) * float(numbers), 4.0 * self.batch * self.weights, precision)

    def prepare(self, precision: str, device: torch.device) -> Prepared:
        return _PreparedPerceptron(self, PRECISIONS[precision], device)


class _PreparedPerceptron(Prepared):
    def __init__(self, case: Perceptron, dtype: torch.dtype, device: torch.device) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        self.widths = [case.width] * case.DEPTH
        self.inputs = perceptron_inputs(case.batch, case.inputs, self.widths, dtype, device)

    def call(self, provider: str) -> Call:
        if provider == "peer":
            return lambda: eager.value_and_grad(*self.inputs)
        if provider == "compile":
            return _without_graph(torch.compile(mlp_value_and_grad_reference, dynamic=False), *self.inputs)
        return _without_graph(mlp_value_and_grad, *self.inputs, backend=provider)

    def check(self, provider: str, call: Call) -> Verdict:
        rows = checked_rows(len(self.inputs.x), self.device)
        part = self.inputs._replace(x=self.inputs.x[rows])
        exact = eager.value_and_grad(*part.to(torch.float64))
        other = mlp_value_and_grad_reference if provider == "peer" else eager.value_and_grad
        eager_error = error_of(other(*part), exact)
        if len(rows) < _FEW_ROWS:
            # In a few rows eager's errors may happen to cancel: its usual one is that of further rows of the same
            # network, each against its own scale.
            more = perceptron_inputs(_FEW_ROWS, self.case.inputs, self.widths, self.dtype, self.device)
            usual = zip(*other(*more), *eager.value_and_grad(*more.to(torch.float64)), strict=True)
            errors = [error_of([f[None], g[None]], [exact_f[None], exact_g[None]]) for f, g, exact_f, exact_g in usual]
            eager_error = Error(*(max(values) for values in zip(eager_error, *errors, strict=True)))
        return judge(provider, [output[rows] for output in call()], exact, eager_error, self.dtype)


def _without_graph(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Call:
    def call() -> Sequence[Tensor]:
        with torch.inference_mode():
            result: Sequence[Tensor] = function(*arguments, **keywords)
        return result

    return call
