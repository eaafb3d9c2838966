"""Settings shared by the tests of electrocardiograms."""

from __future__ import annotations

from pathlib import Path

import pytest
from ecg_files import make_folders


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small transfer: both folders, and the configuration."""
    return make_folders(tmp_path_factory.mktemp("ecg"))
