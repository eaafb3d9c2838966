"""What is timed: the cases, one file per kind, and for each the providers that compute it side by side.

Providers: ``peer`` (the way public code does it), ``reference`` (this package in plain PyTorch), ``compile``
(torch.compile of the reference), every backend of the case's operators that serves it, and ``auto`` where that mixes
several of them. Of a whole network: ``published`` (as released code computes it), ``strong`` (as others would speed it
up), ``reference`` and ``sampling`` (compiled for sampling). On a GPU each also ``+graph``: its call recorded in a CUDA
graph and replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch

from tgdp_fast.lab.cases.base import GRAPH, PROVIDERS, Call, Case, UnservedError
from tgdp_fast.lab.cases.ecg_guidance import ECGFitStep
from tgdp_fast.lab.cases.fit_step import FitStep
from tgdp_fast.lab.cases.guided_step import GuidedStep
from tgdp_fast.lab.cases.long_convolution import Convolution
from tgdp_fast.lab.cases.perceptron import Perceptron
from tgdp_fast.lab.cases.residual_block import Block
from tgdp_fast.lab.cases.sampling import Sampling, Trajectory
from tgdp_fast.lab.cases.sssd_ecg import SSSDECGCall

__all__ = [
    "GRAPH",
    "PROVIDERS",
    "Block",
    "Call",
    "Case",
    "Convolution",
    "ECGFitStep",
    "FitStep",
    "GuidedStep",
    "Perceptron",
    "SSSDECGCall",
    "Sampling",
    "Trajectory",
    "UnservedError",
    "all_cases",
    "select",
]


def all_cases() -> list[Case]:
    """Every case, in the order in which they run."""
    quick_perceptrons = {(16, 2, 128), (4096, 2, 128), (4096, 2, 512), (256, 3904, 512)}
    cases: list[Case] = [GuidedStep(exponent, quick=exponent in (4, 6)) for exponent in range(4, 9)]
    cases += [GuidedStep(6, noise=True)]
    cases += [
        Perceptron(batch, inputs, width, quick=(batch, inputs, width) in quick_perceptrons)
        for inputs in (2, 64, 3904)
        for width in (128, 256, 512)
        for batch in ((1, 16, 256, 4096, 10000, 65536) if inputs == 2 else (1, 256, 4096, 65536))
    ]
    cases += [
        FitStep(width, consistency=consistency, quick=width == 128)
        for width in (128, 512)
        for consistency in (False, True)
    ]
    cases += [ECGFitStep(consistency=consistency) for consistency in (False, True)]
    cases += [Convolution(batch, quick=batch == 1) for batch in (1, 8, 64)]
    cases += [Block(batch, quick=batch == 1) for batch in (1, 8, 64)]
    cases += [Trajectory(num, width, quick=num == 256 and width == 128) for width in (128, 512) for num in (256, 10000)]
    cases += [Sampling(num, width, quick=num == 256 and width == 128) for width in (128, 512) for num in (256, 10000)]
    cases += [
        SSSDECGCall(blocks, width, batch, quick=batch == 1)
        for blocks, width in ((4, 64), (36, 256))
        for batch in (1, 8)
    ]
    cases += [SSSDECGCall(36, 256, batch) for batch in (64, 256)]
    return cases


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
