"""The order of waiting between two streams, with streams that only write down what they are told."""

from __future__ import annotations

import contextlib

import pytest
import torch

from tgdp_fast.runtime import streams


class Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def test_the_second_starts_after_what_came_before_and_ends_before_what_follows(monkeypatch: pytest.MonkeyPatch):
    log: list[str] = []
    current, other = Stream("current", log), Stream("other", log)

    @contextlib.contextmanager
    def on(stream: Stream):
        log.append(f"on {stream.name}")
        yield
        log.append("back")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(streams, "_other_stream", lambda device: other)
    result = streams.side_by_side(
        torch.device("cuda", 0), lambda: log.append("first") or 1, lambda: log.append("second") or 2
    )
    assert result == (1, 2)
    assert log == ["other waits for current", "on other", "second", "back", "first", "current waits for other"]


def test_elsewhere_one_follows_the_other():
    order: list[int] = []
    assert streams.side_by_side(torch.device("cpu"), lambda: order.append(1), lambda: order.append(2)) == (None, None)
    assert order == [1, 2]
