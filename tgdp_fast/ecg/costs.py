"""What each stage of a run cost: seconds, memory, trainable parameters, in a file beside the results."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tgdp_fast.runtime import distributed
from tgdp_fast.runtime.files import save_json

_SECONDS_BETWEEN_LOOKS = 0.05


class Costs:
    """Costs by stage. A stage that was interrupted and resumed counts all its runs, except those that were killed.

    Args:
        path: the JSON file; its entries are kept.
        device: where memory is measured: on CUDA the peak of PyTorch, else the growth of the process since the start
            of the stage.
    """

    def __init__(self, path: Path, device: str) -> None:
        self.path = path
        self.device = torch.device(device)
        self.found: dict[str, dict[str, Any]] = {}
        if path.is_file():
            try:
                self.found = dict(json.loads(path.read_text()))
            except ValueError:
                self.found = {}

    @contextmanager
    def of(self, stage: str, network: nn.Module | None = None) -> Iterator[None]:
        """Measure the block as ``stage``, or a part of it; the stage trains ``network``."""
        if network is not None:
            self.count(stage, network)
        started, peak = time.monotonic(), [0]
        try:
            with self._memory(peak):
                yield
        finally:
            row = self.found.setdefault(stage, {})
            row["seconds"] = row.get("seconds", 0.0) + time.monotonic() - started
            row["processes"] = distributed.size()
            row["peak_bytes"] = max(row.get("peak_bytes", 0), peak[0])
            self._save()

    def count(self, stage: str, network: nn.Module) -> None:
        """Record the number of parameters that ``stage`` trains."""
        self.found.setdefault(stage, {})["parameters"] = sum(p.numel() for p in network.parameters())

    def _save(self) -> None:
        if distributed.is_first():
            save_json(self.path, self.found)

    @contextmanager
    def _memory(self, peak: list[int]) -> Iterator[None]:
        """Record the peak memory of the block as the only entry of ``peak``."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            yield
            peak[0] = torch.cuda.max_memory_allocated(self.device)
            return
        ended, before = threading.Event(), resident_bytes()

        def look() -> None:
            while not ended.wait(_SECONDS_BETWEEN_LOOKS):
                peak[0] = max(peak[0], resident_bytes() - before)

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


def resident_bytes() -> int:
    """Resident memory of this process in bytes; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
