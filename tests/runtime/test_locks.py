"""Locks of folders and files: one owner, a refusal that names it, and nothing left when it ends or dies."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tgdp_fast.runtime import locks
from tgdp_fast.runtime.files import save_json, write_atomic
from tgdp_fast.runtime.locks import InUseError, folder_lock, target_lock

HOLDER = """
import sys
from pathlib import Path
from tgdp_fast.runtime.locks import folder_lock, target_lock
lock = {"folder": folder_lock, "target": target_lock}[sys.argv[1]]
with lock(Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(kind: str, place: Path) -> subprocess.Popen[str]:
    """A process that owns a place until its input closes."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, kind, str(place)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("kind", ["folder", "target"])
def test_a_place_has_one_owner_until_that_ends_or_is_killed(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "run"
    lock = {"folder": folder_lock, "target": target_lock}[kind]
    for end in (signal.SIGKILL, None):
        process = holder(kind, place)
        with pytest.raises(InUseError, match=f"run is being written by process {process.pid} on .*; wait"), lock(place):
            pass
        waited: list[bool] = []

        def wait(process: subprocess.Popen[str] = process, waited: list[bool] = waited) -> None:
            with lock(place, wait=True):
                waited.append(process.poll() is not None)

        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.2)
        assert waited == []
        if end is None:
            process.communicate("")
        else:
            process.send_signal(end)
            process.wait()
        thread.join(20)
        assert len(waited) == 1
        with lock(place):
            pass
        assert not any(tmp_path.iterdir())


def test_a_thread_may_own_a_folder_twice_and_two_threads_may_not(tmp_path: Path) -> None:
    refused: list[BaseException] = []

    def other() -> None:
        try:
            with folder_lock(tmp_path / "run"):
                pass
        except InUseError as error:
            refused.append(error)

    with folder_lock(tmp_path / "run"):
        with folder_lock(tmp_path / "run"):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1
    assert not any(tmp_path.iterdir())


def test_a_folder_with_content_stays(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "run"):
        (tmp_path / "run" / "mine").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_the_file_system_has_no_locks_a_file_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(descriptor: int, *, blocking: bool) -> bool:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks, "lock_descriptor", fail)
    refused: list[str] = []

    def other() -> None:
        with pytest.raises(InUseError) as found, folder_lock(tmp_path / "run"):
            pass
        refused.append(str(found.value))

    with folder_lock(tmp_path / "run"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        write_atomic(tmp_path / "x.txt", "written")  # Without locks nobody removes what another writes.
    assert len(refused) == 1
    assert f"process {os.getpid()} on " in refused[0]
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


def test_another_error_of_locking_is_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, *, blocking: bool) -> bool:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(locks, "lock_descriptor", fail)
    with pytest.raises(OSError, match="Input/output error"), folder_lock(tmp_path / "run"):
        pass


def test_a_write_removes_what_killed_ones_have_left_and_no_file_that_is_being_written(tmp_path: Path) -> None:
    target = tmp_path / "x.json"
    abandoned, written, other = (
        tmp_path / name for name in (".x.json.0123abcd.partial", ".x.json.89abcdef.partial", ".x.json.copy.partial")
    )
    for file in (abandoned, other):
        file.touch()
    with open(written, "xb") as file:
        assert locks.lock_open_file(file.fileno(), written)
        save_json(target, {"a": 1})
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([written.name, other.name, "x.json"])
    save_json(target, {"a": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([other.name, "x.json"])
