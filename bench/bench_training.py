"""Benchmarks of training; see conftest.py."""

from __future__ import annotations

import pytest

KINDS = ("fit_step",)


@pytest.mark.usefixtures("timed")
def test_training(case, precision, provider):
    """All of it happens in the fixture."""
