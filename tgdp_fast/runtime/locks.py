"""Files and folders that one process at a time writes, by locks of the system, which end with their process."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from filelock import SoftFileLock, Timeout, lock_descriptor

#: Name of the lock in a folder that a run works in. It is there while the run goes on, and after a kill until the next.
LOCK_FILE = ".lock"

#: What a file system without locks answers, such as some network file systems.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
_TRIES = 1000

#: Locks of this process, by thread and path: a run takes the lock of its folder in each of its parts.
_held: set[tuple[int, str]] = set()


class InUseError(OSError):
    """Another process, or another thread, writes to the same place."""


@contextmanager
def folder_lock(folder: Path, place: Path | None = None, *, wait: bool = False) -> Iterator[None]:
    """Own a folder inside the block; it is made, and removed at the end if it is empty.

    The same thread may own it several times.

    Args:
        folder: what the run works in.
        place: what the message names; default: the folder.
        wait: wait for another owner, instead of raising.

    Raises:
        InUseError: another run owns the folder.
    """
    try:
        with _locked(folder / LOCK_FILE, place or folder, wait):
            yield
    finally:
        with suppress(OSError):  # Not empty, or gone.
            folder.rmdir()


@contextmanager
def target_lock(target: Path, *, wait: bool = False) -> Iterator[None]:
    """Own a file or folder that is replaced as a whole, inside the block; the lock lies beside it.

    Raises:
        InUseError: another process writes it, and ``wait`` is False.
    """
    with _locked(target.with_name(f".{target.name}.lock"), target, wait):
        yield


def lock_open_file(descriptor: int, path: Path) -> bool:
    """Lock an open file; False if another process holds it, or if ``path`` no longer names it."""
    return lock_descriptor(descriptor, blocking=False) and _names(path, descriptor)


def remove_unless_locked(path: Path) -> None:
    """Remove a file that a killed process has left, and none that a process holds locked."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDWR)
        try:
            abandoned = lock_open_file(descriptor, path)
        except OSError:
            abandoned = False  # Nobody can tell.
        if abandoned:
            _remove(path, descriptor)
        else:
            os.close(descriptor)


@contextmanager
def _locked(path: Path, place: Path, wait: bool) -> Iterator[None]:
    key = (threading.get_ident(), os.path.realpath(path))
    if key in _held:
        yield
        return
    release, process = _acquire(path, place, wait), os.getpid()
    _held.add(key)
    try:
        yield
    finally:
        _held.discard(key)
        if os.getpid() == process:  # A forked process has a copy of the descriptor.
            release()


def _acquire(path: Path, place: Path, wait: bool) -> Callable[[], None]:
    """Lock a file, which is made; returns what releases and removes it."""
    for _ in range(_TRIES):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # Its last owner has just removed the folder.
            continue
        try:
            locked = lock_descriptor(descriptor, blocking=wait)
            if locked and _names(path, descriptor):
                with suppress(OSError):  # A full disk
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"{os.getpid()}\n{socket.gethostname()}\n{time.ctime()}\n".encode())
                return partial(_remove, path, descriptor)
        except BaseException as error:  # An interrupt too must not leave the lock with this process.
            os.close(descriptor)
            if isinstance(error, OSError) and error.errno in _NO_LOCKS:
                path.unlink(missing_ok=True)
                return _acquire_soft(path, place, wait)
            raise
        os.close(descriptor)
        if not locked:
            raise _in_use(path, place)
    raise _in_use(path, place)


def _acquire_soft(path: Path, place: Path, wait: bool) -> Callable[[], None]:
    """Where the file system has no locks: a file that is there while the lock is held."""
    lock = SoftFileLock(path.with_name(path.name + ".soft"))
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise _in_use(Path(lock.lock_file), place) from None
    return lock.release


def _in_use(path: Path, place: Path) -> InUseError:
    owner = "another process"
    with suppress(OSError, ValueError):
        process, host, *since = path.read_text(encoding="utf-8").splitlines()
        owner = f"process {process} on {host}"
        owner += f", since {since[0]}" if since and len(since) == 1 else ""
    return InUseError(f"{place} is being written by {owner}; wait until that ends, or choose another place")


def _names(path: Path, descriptor: int) -> bool:
    """Whether the path is that of the open file: the last owner of a lock removes it while others wait for it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _remove(path: Path, descriptor: int) -> None:
    """Remove a locked file, and close it, which releases the lock."""
    if os.name == "nt":  # Windows removes no file that any process has open, so nobody waits for this one.
        os.close(descriptor)
    try:
        with suppress(OSError):
            path.unlink()
    finally:
        if os.name != "nt":
            os.close(descriptor)
