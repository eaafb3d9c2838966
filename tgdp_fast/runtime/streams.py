"""Two pieces of work side by side on one device."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

First = TypeVar("First")
Second = TypeVar("Second")


def side_by_side(
    device: torch.device, first: Callable[[], First], second: Callable[[], Second]
) -> tuple[First, Second]:
    """Return (first(), second()); on a GPU the second runs on its own stream and fills capacity the first leaves idle.

    Neither may write what the other reads. The current stream waits for both. The other stream waits for all earlier
    work of the current one, so memory that either frees is not reused too early.
    """
    if device.type != "cuda":
        return first(), second()
    current, other = torch.cuda.current_stream(device), _other_stream(device)
    other.wait_stream(current)
    with torch.cuda.stream(other):
        result = second()
    main = first()
    current.wait_stream(other)
    return main, result


_of_thread = threading.local()


def _other_stream(device: torch.device) -> torch.cuda.Stream:
    """This thread's own: the launches of another thread must not join a capture in which this one takes part."""
    streams: dict[torch.device, torch.cuda.Stream] = vars(_of_thread).setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return streams[device]
