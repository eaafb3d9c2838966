"""What a machine can hold, and refusals of sizes beyond that before any work."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@lru_cache
def _physical_memory() -> int | None:
    """Bytes of memory, or of this container's share; None where the system does not say."""
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf.
        return None
    try:
        return min(found, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):  # no container, or "max"
        return found


def machine_memory(device: torch.device | None = None) -> int | None:
    """Bytes that a process may have on ``device`` (default: the CPU); None where the system does not say."""
    if device is not None and device.type == "cuda":
        import torch  # Imported here, so that the command line can check sizes without it.

        return int(torch.cuda.get_device_properties(device).total_memory)
    found = _physical_memory()
    try:
        import resource  # Not on Windows.
    except ImportError:
        return found
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return found if found is None or limit == resource.RLIM_INFINITY else min(found, limit)


def check_memory(
    name: str,
    value: Any,
    needed: float,
    what: str,
    advice: str,
    *,
    device: torch.device | None = None,
    share: float = 1.0,
) -> None:
    """Refuse a setting whose least need exceeds the memory of the machine.

    Args:
        name, value: of the argument.
        needed: bytes that cannot be avoided.
        what: these bytes, for the message: "samples of shape (2,)".
        advice: what to do instead.
        device: where they must fit; None: the CPU.
        share: of the memory, for what is only a means.

    Raises:
        ValueError: with the estimate, and the memory that is there.
    """
    available = machine_memory(device)
    if available is not None and needed > available * share:
        where = "this machine" if device is None or device.type == "cpu" else str(device)
        part = "" if share == 1.0 else f", of which at most {in_bytes(available * share)} go there"
        raise ValueError(
            f"{name} must fit into memory, got {value!r}: {what} need {in_bytes(needed)}, and {where} has "
            f"{in_bytes(available)}{part}; {advice}"
        )


def check_network(names: str, sizes: Any, values: int) -> None:
    """Refuse sizes of a network with about ``values`` weights in float32; see :func:`check_memory`."""
    check_memory(names, sizes, 4 * values, "the weights of such a network", "choose a smaller one")


def in_bytes(value: float) -> str:
    """A number of bytes for a reader: "24 GB"."""
    value = min(value, 10**30)  # An integer may be beyond what a float can hold.
    for exponent, unit in ((15, "PB"), (12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if value >= 10**exponent:
            return f"{value / 10**exponent:.3g} {unit}"
    return f"{value:.0f} bytes"
