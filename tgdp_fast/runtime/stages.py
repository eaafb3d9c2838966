"""Stages of a long computation, each kept in a folder and loaded if nothing it depends on has changed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

from tgdp_fast.runtime import distributed
from tgdp_fast.runtime.checkpoint import (
    CheckpointError,
    check_replaceable,
    remove_checkpoint,
)
from tgdp_fast.runtime.files import write_atomic
from tgdp_fast.runtime.locks import folder_lock
from tgdp_fast.runtime.reading import parse_json, read_bytes

T = TypeVar("T")


def owned(folder: str | os.PathLike[str] | None) -> AbstractContextManager[None]:
    """Keep other runs from a folder, inside the block; of several processes the first owns it for all. None: nothing.

    Raises:
        InUseError: another run works in it.
    """
    return nullcontext() if folder is None or not distributed.is_first() else folder_lock(Path(folder))


class Stages:
    """Stages of a long run in a folder: a finished stage with the same signature is loaded instead of computed.

    With ``folder=None`` every stage is computed and nothing is written. Several processes
    (:mod:`tgdp_fast.runtime.distributed`) run each stage together, on one file system; the first of them writes.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = None if folder is None else Path(folder)

    def run(
        self,
        name: str,
        signature: str | Callable[[], str],
        compute: Callable[[Path | None], T],
        save: Callable[[T, Path], None],
        load: Callable[[Path], T],
        *,
        alone: bool = False,
    ) -> T:
        """Load stage ``name``, or ``compute(folder for its training state)`` and save it.

        Args:
            name: of the stage's files.
            signature: identifies everything the result depends on; a function is called only if there is a folder.
            compute, save, load: of the result.
            alone: of several processes, only the first computes, and the others load its saved result.

        Returns:
            The result.
        """
        if self.folder is None:
            return compute(None)
        signature = signature if isinstance(signature, str) else signature()
        place, stamp = self.folder / name, self.folder / f"{name}.json"
        if distributed.agreed(stamp.is_file() and _read(stamp) == signature):
            try:
                return load(place)
            except CheckpointError:  # Damaged: compute it again.
                pass
        if distributed.is_first():
            check_replaceable(place)  # Before the work, not after it.
            stamp.unlink(missing_ok=True)
        distributed.barrier()
        if alone and not distributed.is_first():
            distributed.barrier()
            return load(place)
        with distributed.alone() if alone else nullcontext():
            result = compute(self.folder / f"{name}.state")
        if distributed.is_first():
            save(result, place)
            write_atomic(stamp, json.dumps({"signature": signature}))
        distributed.barrier()
        return result

    def remove(self, *names: str) -> None:
        """Remove the files of these stages, and the folder if nothing else is in it."""
        if self.folder is None or not self.folder.is_dir():
            return
        for name in names:
            (self.folder / f"{name}.json").unlink(missing_ok=True)
            remove_checkpoint(self.folder / name)
            remove_checkpoint(self.folder / f"{name}.state")
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


def _read(stamp: Path) -> str:
    try:
        content = parse_json(read_bytes(stamp, 2**20, ValueError, "a signature"), ValueError, f"{stamp} is damaged")
        return str(content.get("signature"))
    except (ValueError, AttributeError):
        return ""
