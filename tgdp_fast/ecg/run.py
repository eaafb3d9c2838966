"""What every stage of a run needs: settings, folder, device, finished stages and costs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from tgdp_fast._version import __version__
from tgdp_fast.ecg.config import Config, to_dict
from tgdp_fast.ecg.costs import Costs
from tgdp_fast.fit.training import derived_seed
from tgdp_fast.runtime import distributed
from tgdp_fast.runtime.checks import check_device
from tgdp_fast.runtime.files import save_json
from tgdp_fast.runtime.stages import Stages

T = TypeVar("T")


class Run:
    """One run in one folder.

    Args:
        config: see :mod:`tgdp_fast.ecg.config`. With "cuda" and several processes each takes a GPU of its own.
        out: the folder; made by :meth:`open`.
        progress: show progress, in the first process.

    Raises:
        ValueError: a device that torch does not have.
    """

    def __init__(self, config: Config, out: str | os.PathLike[str], *, progress: bool = False) -> None:
        self.config = config
        self.device = config.device
        if self.device == "cuda" and distributed.size() > 1:
            self.device = f"cuda:{distributed.rank() % max(1, torch.cuda.device_count())}"
        check_device(self.device)
        self.out = Path(out)
        self.progress = progress and distributed.is_first()
        self.stages = Stages(self.out / "stages")
        self.costs = Costs(self.out / "costs.json", self.device)

    def open(self) -> None:
        """Make the folder and note the settings in it."""
        if distributed.is_first():
            self.out.mkdir(parents=True, exist_ok=True)
            save_json(self.out / "config.json", {"tgdp_fast": __version__, **to_dict(self.config)})
        distributed.barrier()

    def seed(self, name: str) -> int:
        """The seed of one part of the run."""
        return derived_seed(self.config.seed, name)

    def once(self, compute: Callable[[], T]) -> T | None:
        """``compute()`` in the first process, which writes what is not a stage; the others wait."""
        result = compute() if distributed.is_first() else None
        distributed.barrier()
        return result
