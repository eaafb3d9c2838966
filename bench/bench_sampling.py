"""Benchmarks of sampling; see conftest.py."""

from __future__ import annotations

import pytest

KINDS = ("trajectory", "sampling", "sssd_ecg")


@pytest.mark.usefixtures("timed")
def test_sampling(case, precision, provider):
    """All of it happens in the fixture."""
