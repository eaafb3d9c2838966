"""An array written to a file in blocks, so that a killed run resumes."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from tgdp_fast.runtime.files import save_array, write_atomic
from tgdp_fast.runtime.locks import folder_lock

# Possible files in the folder: finished blocks, the identity of their run, and a save that was killed.
_OWN_FILE = re.compile(
    r"(block-\d{12}\.npy|arguments\.json)|\.(block-\d{12}\.npy|arguments\.json)\.[0-9a-f]{8}\.partial"
)
_DIGEST_BYTES = hashlib.sha256().digest_size
_HEADER_BYTES = 4096  # more than the header of any block


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
    ) -> np.ndarray:
        """Write the file atomically, from blocks that an earlier call finished and new ones.

        Args:
            shape: of the float32 array, rows first.
            identity: text that identifies everything the rows depend on. Finished blocks with another identity are
                discarded once there is a new block.
            block_size: rows of a new block.
            block: block(start, stop) -> rows start to stop.
            finish: applied to the whole array before it is written.

        Returns:
            The array written.

        Raises:
            InUseError: another run writes this file.
        """
        with self.owned():
            result = np.empty(shape, dtype=np.float32)
            self._fill(result, identity, block_size, block)
            if finish is not None:
                result = finish(result)
            save_array(self.target, result)
            self._discard_blocks()
        return result

    def owned(self) -> AbstractContextManager[None]:
        """Keep other runs from the folder and the file, inside the block.

        Raises:
            InUseError: another run writes them.
        """
        return folder_lock(self.folder, self.target)

    def _fill(
        self,
        result: np.ndarray,
        identity: str,
        block_size: int,
        block: Callable[[int, int], np.ndarray],
    ) -> None:
        stamp, num = self.folder / "arguments.json", len(result)
        resumes = stamp.is_file() and stamp.read_bytes() == identity.encode()
        stop = 0
        while (start := stop) < num:
            file = self.folder / f"block-{start:012d}.npy"
            # The block size is that of the earlier run.
            values = _load_block(file, identity, (num - start, *result.shape[1:])) if resumes else None
            if values is None:
                values = block(start, min(start + block_size, num))
                if not resumes:  # Only now, so that a run that fails at once discards no finished blocks.
                    self._discard_blocks()
                    write_atomic(stamp, identity)
                    resumes = True
                save_array(file, values, _seal(file, identity))
            stop = start + len(values)
            result[start:stop] = values

    def _discard_blocks(self) -> None:
        """Remove the files that this class wrote."""
        for file in list(self.folder.iterdir()):
            if _OWN_FILE.fullmatch(file.name) and file.is_file():
                file.unlink(missing_ok=True)


def _load_block(file: Path, identity: str, most: tuple[int, ...]) -> np.ndarray | None:
    """A block of at most the shape ``most``, or None: missing, damaged, of another run, or of another place in it."""
    limit = np.prod(most, dtype=object) * 4 + _HEADER_BYTES + _DIGEST_BYTES
    if not file.is_file() or file.stat().st_size > limit:
        return None
    content = file.read_bytes()
    content, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    seal = _seal(file, identity)
    seal.update(content)
    if digest != seal.digest():
        return None
    values: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
    return values


def _seal(file: Path, identity: str) -> hashlib._Hash:
    """The hash of a block, before its content."""
    return hashlib.sha256(b"\0".join((identity.encode(), file.name.encode(), b"")))
