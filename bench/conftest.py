"""pytest-benchmark over the cases of ``tgdp-fast bench``: one benchmark per case, precision and provider.

pytest bench/ --benchmark-only                the quick cases
pytest bench/ --benchmark-only --all-cases    all of them
pytest bench/ --benchmark-only -k sampling    as any pytest selection
"""

from __future__ import annotations

import pytest
import torch

from tgdp_fast.lab.cases import all_cases
from tgdp_fast.lab.cases.case import Case, InaccurateError, UnservedError
from tgdp_fast.ops import BackendUnavailableError


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-cases", action="store_true", help="also the cases that --quick leaves out")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    everything = metafunc.config.getoption("--all-cases")
    parameters = [
        pytest.param(case, precision, provider, id=f"{case.name}-{precision}-{provider}")
        for case in all_cases()
        if case.quick or everything
        for precision in case.precisions
        for provider in case.providers()
    ]
    metafunc.parametrize(("case", "precision", "provider"), parameters)


@pytest.fixture
def timed(benchmark, case: Case, precision: str, provider: str) -> None:
    """Check the provider against float64, then time it."""
    torch._dynamo.reset()
    setup = case.setup(precision, torch.device("cpu"))
    try:
        call = setup.call(provider)
        error = setup.check(provider, call)
    except (BackendUnavailableError, UnservedError) as reason:
        pytest.skip(str(reason))
    except InaccurateError as wrong:
        pytest.fail(str(wrong))
    benchmark.group = f"{case.name} {precision}"
    benchmark.extra_info["max_error"] = error
    benchmark(call)
