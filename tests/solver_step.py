"""``guided_step`` and its twin with the numbers of the step as keywords, for tests that vary them one by one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tgdp_fast import ops
from tgdp_fast.ops import SolverStep
from tgdp_fast.ops.guided_step import GuidedStepOutput
from tgdp_fast.ops.guided_step import guided_step_reference as _reference


def _separated(keywords: dict[str, Any]) -> tuple[SolverStep, dict[str, Any]]:
    """The step of those that are its fields, and the others."""
    fields = {name: value for name, value in keywords.items() if name in SolverStep._fields}
    return SolverStep(**fields), {name: value for name, value in keywords.items() if name not in fields}


def guided_step(
    x: Tensor, epsilon: Tensor, gradient: Tensor | None = None, history: Tensor | None = None, **keywords: Any
) -> GuidedStepOutput:
    """:func:`tgdp_fast.ops.guided_step`."""
    step, others = _separated(keywords)
    return ops.guided_step(x, epsilon, gradient, history, step=step, **others)


def guided_step_reference(
    x: Tensor, epsilon: Tensor, gradient: Tensor | None = None, history: Tensor | None = None, **keywords: Any
) -> tuple[Tensor, Tensor | None, Tensor]:
    """:func:`tgdp_fast.ops.guided_step.guided_step_reference`."""
    step, others = _separated(keywords)
    return _reference(x, epsilon, gradient, history, step, **others)
