"""Two pieces of work side by side on one device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

First = TypeVar("First")
Second = TypeVar("Second")


def side_by_side(
    device: torch.device, first: Callable[[], First], second: Callable[[], Second]
) -> tuple[First, Second]:
    """(first(), second()); on a GPU the second on a stream of its own, where it fills what the first leaves idle.

    Neither may write what the other reads. The current stream waits for both, and the other stream for all that the
    current one has been given before: memory that either frees is not used again too early.
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


@cache
def _other_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
