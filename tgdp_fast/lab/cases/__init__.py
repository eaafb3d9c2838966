"""What is measured: a file per operator, and per program made of operators, each with the providers side by side.

Providers: ``peer`` (the way public code does it), ``reference`` (this package in plain PyTorch), ``compile``
(torch.compile of the reference), every backend of the case's operators that serves it, and ``auto`` where that mixes
several of them. Of a whole network: ``published`` (as released code computes it), ``strong`` (as others would speed it
up), ``reference`` and ``sampling`` (compiled for sampling). On a GPU each also ``+graph``: its call captured in a CUDA
graph and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from typing import Any

from tgdp_fast.lab.cases import (
    ecg_guidance,
    fit_step,
    gated_activation,
    guided_step,
    long_convolution,
    mlp,
    residual_block,
    sampling,
    sssd_ecg,
    trajectory,
)
from tgdp_fast.lab.cases.case import Case, Check

#: What ``validate`` checks of every registered operator: entries, and check(draw, *entry).
CHECKS: dict[str, tuple[Sequence[Any], Callable[..., Check]]] = {
    "gated_activation": (gated_activation.SHAPES, gated_activation.check),
    "guided_step": (guided_step.SHAPES, guided_step.check),
    "long_convolution": (long_convolution.SHAPES, long_convolution.check),
    "mlp_value_and_grad": (mlp.SHAPES, mlp.check),
    "mlp_value_and_grad_backward": (mlp.SHAPES, mlp.check_backward),
    "mlp_forward": (mlp.SHAPES_OF_OUTPUTS, mlp.check),
    "mlp_backward": (mlp.SHAPES_OF_OUTPUTS, mlp.check_backward),
    "residual_block_": (residual_block.SHAPES, residual_block.check),
    "trajectory": (trajectory.SHAPES, trajectory.check),
}


def all_cases() -> list[Case]:
    """Every case of ``bench``, in the order in which they run."""
    quick_mlps = {(16, 2, 128), (4096, 2, 128), (4096, 2, 512), (256, 3904, 512)}
    widths, batches, both = (128, 512), (1, 8, 64), (False, True)
    return [
        *(guided_step.case(exponent, quick=exponent in (4, 6)) for exponent in range(4, 9)),
        guided_step.case(6, noise=True),
        *(
            mlp.case(batch, inputs, width, quick=(batch, inputs, width) in quick_mlps)
            for inputs in (2, 64, 3904)
            for width in (128, 256, 512)
            for batch in ((1, 16, 256, 4096, 10000, 65536) if inputs == 2 else (1, 256, 4096, 65536))
        ),
        *(fit_step.case(width, consistency=term, quick=width == 128) for width in widths for term in both),
        *(ecg_guidance.case(consistency=term) for term in both),
        *(long_convolution.case(batch, quick=batch == 1) for batch in batches),
        *(residual_block.case(batch, quick=batch == 1) for batch in batches),
        *(
            kind(num, width, quick=num == 256 and width == 128)
            for kind in (sampling.trajectory_case, sampling.case)
            for width in widths
            for num in (256, 10000)
        ),
        *(sssd_ecg.case(*size, batch, quick=batch == 1) for size in ((4, 64), (36, 256)) for batch in (1, 8)),
        *(sssd_ecg.case(36, 256, batch) for batch in (64, 256)),
    ]


def select(cases: Sequence[Case], only: Sequence[str], *, quick: bool = False) -> list[Case]:
    """The cases whose name contains, or matches as a pattern with ``*`` and ``?``, one of ``only``; no ``only``: all.

    Raises:
        ValueError: a name that fits no case; lists the cases.
    """
    offered = [case for case in cases if case.quick or not quick]
    for text in only:
        if not any(_fits(case.name, text) for case in offered):
            names = ", ".join(case.name for case in offered)
            raise ValueError(f"--only must fit a case{' of --quick' * quick}, got {text!r}; cases: {names}")
    return [case for case in offered if not only or any(_fits(case.name, text) for text in only)]


def _fits(name: str, text: str) -> bool:
    return text in name or fnmatch(name, text)
