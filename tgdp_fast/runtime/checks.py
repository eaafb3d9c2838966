"""Argument checks. Each error names the argument, the value received and the value expected."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def check_integer(name: str, value: Any, minimum: int, advice: str = "") -> int:
    """Return ``value`` as an int, or raise ValueError unless it is an integer >= ``minimum``."""
    valid = hasattr(value, "__index__") and not isinstance(value, bool)
    if not valid or int(value) < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, got {_shown(value)}{_tail(advice)}")
    if int(value) >= 2**64:
        raise ValueError(f"{name} must be below 2^64, got {_shown(value)}{_tail(advice)}")
    return int(value)


def _shown(value: Any) -> str:
    """``repr``, shortened; Python does not write very long integers at all."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 400 else text[:400] + " ..."


def check_number(
    name: str,
    value: Any,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    *,
    exclusive: bool = False,
) -> float:
    """Return ``value`` as a float, or raise ValueError unless it is finite and within the bounds.

    ``exclusive`` excludes both bounds.
    """
    try:
        if isinstance(value, str | bytes):  # float() would parse a number in a string.
            raise TypeError
        number = float(value)
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must be a number, got {_shown(value)}") from None
    inside = minimum < number < maximum if exclusive else minimum <= number <= maximum
    if not math.isfinite(number) or not inside:
        left = "(" if exclusive or minimum == -math.inf else "["
        right = ")" if exclusive or maximum == math.inf else "]"
        bounded = math.isfinite(minimum) or math.isfinite(maximum)
        expected = f"finite and in {left}{minimum}, {maximum}{right}" if bounded else "finite"
        raise ValueError(f"{name} must be {expected}, got {_shown(value)}")
    return number


def check_seed(seed: Any, name: str = "seed") -> int:
    """Return ``seed`` as an int, or raise ValueError unless it is an integer in 0 .. 2^64 - 1."""
    check_integer(name, seed, 0, "fold a larger seed into this range first")
    if seed >= 2**64:
        raise ValueError(f"{name} must be below 2^64, got {seed}; fold a larger seed into this range first")
    return int(seed)


def check_device(device: Any, name: str = "device") -> torch.device:
    """The torch device with this name, including its index; ValueError if there is none."""
    import torch  # Imported here, so that the command line can check names without it.

    try:
        return torch.empty(0, device=device).device  # "cuda" becomes "cuda:0".
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name} must be one that torch has here (cpu, cuda, ...), got {device!r}: {reason}") from None


def check_choice(name: str, value: Any, choices: Iterable[str], advice: str = "") -> str:
    """Return ``value``, or raise ValueError listing the known names and the nearest one."""
    known = sorted(choices)
    if value in known:
        return str(value)
    near = get_close_matches(str(value), known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}{hint}{_tail(advice)}")


def _tail(advice: str) -> str:
    return f"; {advice}" if advice else ""
