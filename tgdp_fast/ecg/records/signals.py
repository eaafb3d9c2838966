"""The signals of one record: read, checked, resampled, cropped."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from tgdp_fast.ecg.records.entries import ECGEntry, check_rate
from tgdp_fast.ecg.records.leads import find_leads, lead_name
from tgdp_fast.ecg.records.registry import read_signals_of
from tgdp_fast.ecg.records.wfdb import RecordError, Root
from tgdp_fast.runtime.checks import check_number
from tgdp_fast.runtime.optional import optional

_LARGEST_FACTOR = 1000  # of a ratio of rates: for larger ones the filter is longer than records


class TooShortError(RecordError):
    """An intact record that is shorter than the length that is kept."""


def read_entry(entry: ECGEntry, root: Root, *, rate: float, seconds: float, leads: Sequence[str]) -> np.ndarray:
    """The first ``seconds`` of a record.

    All leads of the record that are among the twelve are checked in the part that is used, also those that are not
    asked for.

    Args:
        entry: the record.
        root: its folder.
        rate: samples per second to resample to.
        seconds: kept, from the start.
        leads: names.

    Returns:
        float32 [len(leads), round(seconds * rate)] in mV.

    Raises:
        TooShortError: the record is shorter.
        RecordError: it is broken; the message says in which way.
        ImportError: SciPy is missing and the record is to be resampled, or is a MATLAB file.
    """
    signals, names, found = read_signals_of(entry.form, entry.path, root, seconds)
    return fit(signals, names, found, rate=rate, seconds=seconds, leads=leads)


def fit(
    signals: np.ndarray, names: Sequence[str], found: float, *, rate: float, seconds: float, leads: Sequence[str]
) -> np.ndarray:
    """Check, resample and crop signals [leads, samples] at ``found`` samples per second; see :func:`read_entry`."""
    check_rate(found, rate)
    needed = check_crop(found, seconds)
    if signals.shape[1] < needed:
        raise TooShortError(f"it has {signals.shape[1] / found:g} s, less than {seconds:g} s")
    try:
        places = find_leads(names, leads)
    except ValueError as error:
        raise RecordError(str(error)) from None
    up, down = rate_ratio(found, rate)
    used = signals[:, : min(signals.shape[1], needed + _reach(up, down))]
    checked = [place for place, name in enumerate(names) if lead_name(name) or place in places]
    check_signals(used[checked], [names[place] for place in checked])
    return resample(used[places], up, down)[:, : round(seconds * rate)]


def check_signals(signals: np.ndarray, names: Sequence[str]) -> None:
    """Refuse signals [leads, samples] with NaN, infinite values or a flat lead.

    Raises:
        RecordError: names the leads.
    """
    low, high = signals.min(axis=1), signals.max(axis=1)  # NaN where one is
    bad = [name for name, spread in zip(names, high - low, strict=True) if not np.isfinite(spread)]
    if bad:
        count = int((~np.isfinite(signals)).sum())
        raise RecordError(f"{count} samples are NaN or infinite, in the leads {', '.join(bad)}")
    flat = [name for name, a, b in zip(names, low, high, strict=True) if a == b]
    if flat:
        raise RecordError(f"flat: the leads {', '.join(flat)} have one value throughout")


@lru_cache(maxsize=64)
def rate_ratio(old: float, new: float) -> tuple[int, int]:
    """Factors up and down with new = old * up / down.

    Raises:
        RecordError: no such factors up to 1000.
    """
    ratio = Fraction(new / old).limit_denominator(_LARGEST_FACTOR)
    if ratio <= 0 or abs(float(ratio) * old - new) > 1e-9 * new or ratio.numerator > _LARGEST_FACTOR:
        raise RecordError(f"it cannot be resampled from {old:g} to {new:g} Hz: the ratio is not one of small integers")
    return ratio.numerator, ratio.denominator


def resample(signals: np.ndarray, up: int, down: int) -> np.ndarray:
    """Resample by the factor up / down through a polyphase filter against aliasing (SciPy's ``resample_poly``).

    The ends are padded with the first and last values, so that an offset of a lead makes no step there; SciPy pads
    with zeros.

    Args:
        signals: floating point [..., L].
        up, down: integers without a common factor.

    Returns:
        [..., ceil(L * up / down)].
    """
    if up == down:
        return signals
    resample_poly = optional("scipy.signal", "resampling needs").resample_poly
    length = -(-signals.shape[-1] * up // down)
    margin = _reach(up, down)
    ends = [(0, 0)] * (signals.ndim - 1) + [(margin, margin)]
    filtered = resample_poly(np.pad(signals, ends, mode="edge"), up, down, axis=-1, window=_filter(up, down))
    start = margin * up // down
    return np.ascontiguousarray(filtered[..., start : start + length], dtype=signals.dtype)


def _reach(up: int, down: int) -> int:
    """How many samples around one the filter sees, rounded up to whole multiples of ``down``."""
    if up == down:
        return 0
    half = 10 * max(up, down)
    return -(-(half // up + 1) // down) * down


@lru_cache(maxsize=64)
def _filter(up: int, down: int) -> np.ndarray:
    """SciPy's default: a low-pass of half length 10 * max(up, down) with a Kaiser window, beta = 5."""
    from scipy.signal import firwin

    most = max(up, down)
    weights: np.ndarray = firwin(20 * most + 1, 1.0 / most, window=("kaiser", 5.0))
    return weights.astype(np.float32)


def check_crop(rate: float, seconds: float) -> int:
    """Samples of ``seconds`` at ``rate``.

    Raises:
        ValueError: one is not positive, or they make less than one sample.
    """
    rate = check_number("rate", rate, 0.0, exclusive=True)
    seconds = check_number("seconds", seconds, 0.0, exclusive=True)
    length = round(rate * seconds)
    if length < 1:
        raise ValueError(f"rate * seconds must be at least one sample, got {rate:g} Hz and {seconds:g} s")
    return length
