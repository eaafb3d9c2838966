"""Settings shared by all tests.

Slow tests carry ``@pytest.mark.slow`` and are skipped unless asked for:

    pytest                   the quick tests
    pytest --run-slow=ci     also those marked ``@pytest.mark.slow(ci=True)``, a fixed slice
    pytest --run-slow=all    all

``make test`` adds ``--numprocesses auto --dist worksteal`` (pytest-xdist): a process for each core, which share them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

os.environ.setdefault("MPLBACKEND", "Agg")  # before anything imports matplotlib: plots need no display

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before anything imports torch: there are as many processes as cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest
import torch

# No deadline: the first call of an operator may be much slower than the next. In CI the examples are always
# the same, so that a change is judged by its own effect.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("fixed" if os.environ.get("CI") else "local")


@pytest.fixture
def quick_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Domain classifiers of a few steps, where a test is not about them."""
    import tgdp_fast.fit.guidance as transfer
    from tgdp_fast import TrainingConfig

    real = transfer.cross_fitted
    settings = TrainingConfig(steps=5, batch_size=16, ema_decay=0.5, warmup=1)
    monkeypatch.setattr(transfer, "cross_fitted", lambda *a, **k: real(*a, **{**k, "settings": settings}))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New tensors hold NaN, so that an element that is not written shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--run-slow",
        choices=("none", "ci", "all"),
        default="none",
        help="which tests marked slow to run (default: none)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if "TGDP_TEST_SCRATCH" not in os.environ:
        # What is built once for all processes of a run; they find it by this variable.
        scratch = os.environ["TGDP_TEST_SCRATCH"] = tempfile.mkdtemp(prefix="tgdp_tests_")
        config.add_cleanup(lambda: shutil.rmtree(scratch, ignore_errors=True))
        config.add_cleanup(lambda: os.environ.pop("TGDP_TEST_SCRATCH", None))
    # The tensors of tests are small: more threads only wait for each other, and for other processes.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(2, os.cpu_count() or 1))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        # Another test runs these in a process of its own: triton_interpreter.py.
        left_out = [item for item in items if item.get_closest_marker("interpreted")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("interpreted")]
    # What takes long comes first, so that no process is left with it at the end.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    wanted = config.getoption("--run-slow")
    skip = pytest.mark.skip(reason="slow; run with --run-slow=all")
    for item in items:
        marker = item.get_closest_marker("slow")
        if marker and wanted != "all" and not (wanted == "ci" and marker.kwargs.get("ci", False)):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fixed_random_state() -> None:
    """Give every test the same global random state, so that it does not depend on the tests before it."""
    torch.manual_seed(0)
    np.random.seed(0)
