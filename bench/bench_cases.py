"""Benchmarks of all cases; see conftest.py."""

from __future__ import annotations

import pytest


@pytest.mark.usefixtures("timed")
def test_case(case, precision, provider):
    """The fixture checks and times."""
