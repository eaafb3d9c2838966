"""An array written to a file in blocks, so that a killed run resumes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from tgdp_fast.runtime.files import save_array, write_atomic

# Possible files in the folder: finished blocks, the identity of their run, and a save that was killed.
_OWN_FILE = re.compile(
    r"(block-\d{12}\.npy|arguments\.json)|\.(block-\d{12}\.npy|arguments\.json)\.[0-9a-f]{8}\.partial"
)


class BlockFile:
    """A .npy file, and the folder ``<path>.partial`` with its finished blocks until it is complete.

    Args:
        path: the .npy file, in an existing folder.

    Raises:
        ValueError: a path that cannot be used.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.target = Path(path)
        if self.target.suffix != ".npy" or self.target.is_dir():
            raise ValueError(f"path must be a file that ends in .npy, got {str(path)!r}")
        if not self.target.parent.is_dir():
            raise ValueError(
                f"path must lie in an existing folder, got {str(path)!r}; create {self.target.parent} first"
            )
        self.folder = self.target.with_name(self.target.name + ".partial")
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(
                f"path {str(path)!r} needs the folder {self.folder} for its blocks, but that is a file; move it"
            )

    def write(
        self,
        shape: tuple[int, ...],
        identity: str,
        block_size: int,
        block: Callable[[int, int], np.ndarray],
        *,
        finish: Callable[[np.ndarray], np.ndarray] | None,
        progress: bool,
    ) -> np.ndarray:
        """Write the file atomically, from blocks that an earlier call finished and new ones.

        Args:
            shape: of the float32 array, rows first.
            identity: text that identifies everything the rows depend on. Finished blocks with another identity are
                discarded once there is a new block.
            block_size: rows of a new block.
            block: block(start, stop) -> rows start to stop.
            finish: applied to the whole array before it is written.
            progress: whether to show a bar, if there is more than one block.

        Returns:
            The array written.
        """
        stamp = self.folder / "arguments.json"
        resumes = stamp.is_file() and stamp.read_text(encoding="utf-8") == identity
        result = np.empty(shape, dtype=np.float32)
        hidden = None if progress and shape[0] > block_size else True  # None: shown on a terminal only
        stop = 0
        with tqdm(total=shape[0], desc="samples", disable=hidden, leave=False) as bar:
            while (start := stop) < shape[0]:
                file = self.folder / f"block-{start:012d}.npy"
                if resumes and file.is_file():
                    values = np.load(file, allow_pickle=False)  # The block size of the earlier run.
                else:
                    values = block(start, min(start + block_size, shape[0]))
                    if not resumes:  # Only now, so that a run that fails at once discards no finished blocks.
                        self._discard_blocks()
                        self.folder.mkdir(exist_ok=True)
                        write_atomic(stamp, identity)
                        resumes = True
                    save_array(file, values)
                stop = start + len(values)
                result[start:stop] = values
                bar.update(len(values))
        if finish is not None:
            result = finish(result)
        save_array(self.target, result)
        self._discard_blocks()
        return result

    def _discard_blocks(self) -> None:
        """Remove the files that this class wrote, and the folder if nothing else is in it."""
        if not self.folder.is_dir():
            return
        for file in list(self.folder.iterdir()):
            if _OWN_FILE.fullmatch(file.name) and file.is_file():
                file.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()
