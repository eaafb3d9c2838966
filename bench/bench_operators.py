"""Benchmarks of operators; see conftest.py."""

from __future__ import annotations

import pytest

KINDS = ("guided_step", "guided_step_noise", "mlp_value_and_grad")


@pytest.mark.usefixtures("timed")
def test_operators(case, precision, provider):
    """All of it happens in the fixture."""
