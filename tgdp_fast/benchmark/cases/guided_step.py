"""One solver step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tgdp_fast.benchmark import eager
from tgdp_fast.benchmark.accuracy import PRECISIONS, Verdict, error_of
from tgdp_fast.benchmark.cases.base import (
    GRAPH,
    SEED,
    Call,
    Case,
    Prepared,
    Work,
    bytes_of,
    checked_rows,
    judge,
)
from tgdp_fast.benchmark.problems import step_inputs
from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.diffusion.solvers import solver_table
from tgdp_fast.ops import SolverStep, guided_step
from tgdp_fast.ops.guided_step import guided_step_reference
from tgdp_fast.ops.noise import normal


class GuidedStep(Case):
    """One solver step of samples of 1000 elements, all tensors in the precision: DPM-Solver++ 2M, or DDPM's with noise.

    Args:
        elements: in all.
        noise: time a DDPM step, whose noise the operator generates.
    """

    SAMPLE = 1000

    def __init__(self, exponent: int, *, noise: bool = False, quick: bool = False) -> None:
        elements = 10**exponent
        self.noise = noise
        self.batch = elements // self.SAMPLE
        self.name = f"guided_step{'_noise' if noise else ''}/1e{exponent}"
        self.shape = f"[{self.batch}, {self.SAMPLE}]"
        self.precisions = ("fp32", "bf16", "fp16")
        self.quick = quick
        self.memory = 80.0 * elements
        self.operators = ("guided_step",)
        self.table = solver_table("ddpm" if noise else "dpmpp_2m", NoiseSchedule.vp_linear(), 25)

    def providers(self, device: torch.device | None = None) -> tuple[str, ...]:
        # A recording of the peer draws other noise at each replay, so nothing can be compared with it.
        left_out = {"peer" + GRAPH} if self.noise else set()
        return tuple(name for name in super().providers(device) if name not in left_out)

    def work(self, precision: str) -> Work:
        elements, slots = self.batch * self.SAMPLE, self.table.history
        flops = elements * (5 + (1 + slots) * (3 + 2 * slots) + (2 if self.noise else 0))
        return Work(elements * bytes_of(precision) * (5.0 + 2 * slots), flops, "fp32")

    def prepare(self, precision: str, device: torch.device) -> Prepared:
        return _PreparedStep(self, PRECISIONS[precision], device)


class _PreparedStep(Prepared):
    def __init__(self, case: GuidedStep, dtype: torch.dtype, device: torch.device) -> None:
        table, k = case.table, case.table.nfe // 2
        self.case, self.dtype, self.device = case, dtype, device
        self.inputs = step_inputs((case.batch, case.SAMPLE), table.history, dtype, device)
        self.sample_index = torch.arange(case.batch, device=device)
        self.noise_scale = float(table.noise_scale[k])
        self.step: dict[str, Any] = {
            "matrix": tuple(map(tuple, table.matrix[k].tolist())),
            "guidance_weight": float(table.sigma[k]),
            "alpha": float(table.alpha[k]),
            "sigma": float(table.sigma[k]),
        }

    def call(self, provider: str) -> Call:
        x, epsilon, gradient, history = self.inputs
        if provider == "peer":
            if history is not None:
                return lambda: eager.multistep(x, epsilon, gradient, history[0], **self.step)
            return lambda: eager.guided_step(
                *self.inputs, **self.step, noise_scale=self.noise_scale, z=torch.randn_like(x)
            )
        step = SolverStep(**self.step, noise_scale=self.noise_scale)
        arguments = {"seed": SEED, "evaluation": 1, "sample_index": self.sample_index}
        if provider == "compile":
            compiled = torch.compile(guided_step_reference, dynamic=False)
            return lambda: self._flat(compiled(*self.inputs, step, **arguments))
        return lambda: self._flat(guided_step(*self.inputs, step=step, **arguments, backend=provider))

    @staticmethod
    def _flat(result: Sequence[Any]) -> list[Tensor]:
        x_next, history, x0 = result
        return [x_next, x0, *(() if history is None else history.unbind(0))]

    def check(self, provider: str, call: Call) -> Verdict:
        torch.manual_seed(SEED)
        outputs = call()
        if provider != "peer":
            z = normal(SEED, self.sample_index, self.case.SAMPLE, 1, device=self.device) if self.case.noise else None
        else:
            torch.manual_seed(SEED)
            z = torch.randn_like(self.inputs.x) if self.case.noise else None
        rows = checked_rows(self.case.batch, self.device)
        part = self.inputs.map(lambda tensor: tensor.index_select(tensor.ndim - 2, rows))
        noise: dict[str, Any] = {} if z is None else {"noise_scale": self.noise_scale, "z": z[rows].double()}
        exact = eager.guided_step(*part.map(Tensor.double), **(self.step | noise))
        if z is not None:
            noise["z"] = z[rows].to(self.dtype)
        plain = eager.guided_step(*part, **(self.step | noise))
        return judge(provider, [output[rows] for output in outputs], exact, error_of(plain, exact), self.dtype)
