"""Whether generated samples are copies of training samples, compared with the distances of held-out samples."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tgdp_fast.metrics.two_sample import _points
from tgdp_fast.runtime.checks import check_integer, check_number

#: A sample at a smaller distance is called a copy. For signals this means a correlation above 1 - 5e-7.
COPY = 1e-3
_VALUES = 16_000_000  # correlations of pairs and shifts, or distances of pairs, in memory at once


@dataclass(frozen=True)
class Memorization:
    """Distances of generated samples to the nearest training sample, compared with those of held-out samples.

    Attributes:
        generated, held_out: the distances [G], [H]. For signals from 0 (equal up to scale, offset and shift) to 2. For
            other samples 0 if equal, and about 1 for two random samples.
        nearest: index of the nearest training sample for each generated one, [G].
        median_ratio: median of ``generated`` over that of ``held_out``. Near 1 or above: no copying.
        low_ratio: the same for a low quantile, which shows copies even if they are few.
        nearer: number of generated samples that are nearer to a training sample than every held-out sample.
        expected_nearer: its expectation for samples with the distribution of the held-out ones: G / (H + 1).
        copies: number of generated samples at a distance below 0.001.
    """

    generated: np.ndarray
    held_out: np.ndarray
    nearest: np.ndarray
    median_ratio: float
    low_ratio: float
    nearer: int
    expected_nearer: float
    copies: int


def memorization(
    generated: np.ndarray | Tensor,
    train: np.ndarray | Tensor,
    held_out: np.ndarray | Tensor,
    *,
    max_shift: int | None = None,
    low: float = 0.05,
    device: str | torch.device = "cpu",
) -> Memorization:
    """Look for copies of the training samples: vectors, images, or signals.

    Arrays with three axes are signals [N, leads, L]. A copy of a signal may be scaled, offset per lead, or shifted in
    time: see :func:`nearest_by_correlation` for the distance. Arrays of any other shape are vectors [N, D], images
    [N, channels, height, width] (keep the axis of a single channel) and similar data. Their distance is the Euclidean
    one over all elements, divided by the root mean square distance between training and held-out samples. A coordinate
    counts by its spread: divide vectors of mixed units by the standard deviations of the training data.

    ``held_out`` must be samples of the same distribution that no model has seen, from other patients.

    Args:
        generated: [G, ...]; train: [N, ...]; held_out: [H, ...].
        max_shift: for signals, largest shift of a copy in samples; default L // 10. 0 compares whole signals without
            shift.
        low: quantile of ``low_ratio``.
        device: where it is computed.

    Raises:
        ValueError: different shapes, values that are not finite, a shift that is too large or not for signals.
    """
    check_number("low", low, 0.0, 1.0)
    if len(np.shape(train)) == 3:
        found, nearest = _by_correlation("generated", generated, train, max_shift, device)
        reference, _ = _by_correlation("held_out", held_out, train, max_shift, device)
    else:
        if max_shift is not None:
            raise ValueError(f"max_shift is for signals [N, leads, L], got train of shape {list(np.shape(train))}")
        found, reference, nearest = _by_distance(generated, train, held_out, device)
    if leaked := int((reference < COPY).sum()):
        warnings.warn(
            f"held_out holds {leaked} copies of training samples, at distance 0: the ratios say little; leave them "
            "out of held_out",
            stacklevel=2,
        )
    return Memorization(
        found,
        reference,
        nearest,
        _ratio(float(np.median(found)), float(np.median(reference))),
        _ratio(float(np.quantile(found, low)), float(np.quantile(reference, low))),
        int((found < reference.min()).sum()),
        len(found) / (len(reference) + 1),
        int((found < COPY).sum()),
    )


def nearest_by_correlation(
    signals: np.ndarray | Tensor,
    train: np.ndarray | Tensor,
    *,
    max_shift: int | None = None,
    device: str | torch.device = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """Distance of each signal to the nearest training record, minimized over shifts in time.

    The middle of a signal, L - 2 max_shift samples, is compared with each record at each of the 2 max_shift + 1
    positions in it. Both windows are centered in each lead and divided by their norm over all leads; the distance is
    that of the two unit vectors, (2 - 2 correlation)^(1/2). Correlations come from one FFT over the pairs, in float32.
    The distance at the best position is recomputed in float64, so it is 0 for an exact copy. Memory is bounded. A
    window without any signal correlates with nothing: distance 2^(1/2).

    Args:
        signals: [G, leads, L]; train: [N, leads, L].
        max_shift: default L // 10.
        device: where it is computed.

    Returns:
        distances [G] float64 and indices of records [G] int64.

    Raises:
        ValueError: other shapes, values that are not finite, a shift that is too large.
    """
    return _by_correlation("signals", signals, train, max_shift, device)


def _by_correlation(
    name: str,
    signals: np.ndarray | Tensor,
    train: np.ndarray | Tensor,
    max_shift: int | None,
    device: str | torch.device,
) -> tuple[np.ndarray, np.ndarray]:
    """:func:`nearest_by_correlation` for the argument with this name."""
    x, records = _signals(name, signals).to(device), _signals("train", train).to(device)
    _check_same(name, x.shape, records.shape)
    length = x.shape[2]
    shift = length // 10 if max_shift is None else check_integer("max_shift", max_shift, 0)
    window = length - 2 * shift
    if window < 2:
        raise ValueError(f"max_shift must leave at least two of {length} samples in the middle, got {shift}")
    middle = x[:, :, shift : shift + window]
    # An offset would lose digits in the sums.
    centered = records - records.mean(dim=2, keepdim=True)
    size = 1 << (length - 1).bit_length()
    spectra = torch.fft.rfft(centered, size).permute(2, 1, 0).contiguous()  # [frequencies, leads, N]
    inverse_norm = _inverse_norms(centered, window)  # [N, places]
    places = 2 * shift + 1
    columns = max(1, min(len(records), _VALUES // size))
    rows = max(1, _VALUES // (size * columns))
    distances, nearest = [], []
    for part in middle.split(rows):
        own = torch.fft.rfft(_unit(part), size).permute(2, 0, 1).conj()  # [frequencies, rows, leads]
        best = torch.full((len(part),), -math.inf, dtype=torch.float32, device=x.device)
        where = torch.zeros(len(part), 2, dtype=torch.int64, device=x.device)
        for start in range(0, len(records), columns):
            cross = (own @ spectra[:, :, start : start + columns]).permute(1, 2, 0)
            correlation = torch.fft.irfft(cross, size)[:, :, :places] * inverse_norm[start : start + columns]
            value, index = correlation.flatten(1).max(dim=1)
            better = value > best
            best = torch.where(better, value, best)
            place = torch.stack([start + index // places, index % places], dim=1)
            where = torch.where(better[:, None], place, where)
        distances.append(_distance(part, records, where, window))
        nearest.append(where[:, 0])
    return torch.cat(distances).cpu().numpy(), torch.cat(nearest).cpu().numpy()


def _by_distance(
    generated: np.ndarray | Tensor,
    train: np.ndarray | Tensor,
    held_out: np.ndarray | Tensor,
    device: str | torch.device,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Relative distances [G], [H] to the nearest training sample, and its index for each generated one [G]."""
    named = (("generated", generated), ("train", train), ("held_out", held_out))
    drawn, records, others = (_points(name, value, 1).to(device) for name, value in named)
    for name, value in named:
        _check_same(name, np.shape(value), np.shape(train))
    # The mean square distance of pairs, computed without the pairs.
    apart = (records.mean(dim=0) - others.mean(dim=0)).square().sum()
    spread = [(x - x.mean(dim=0)).square().sum(dim=1).mean() for x in (records, others)]
    unit = math.sqrt(float(apart + sum(spread)))
    if unit == 0.0:
        raise ValueError("train and held_out must hold distinct samples, got one and the same throughout")
    found, nearest = _nearest(drawn, records)
    reference, _ = _nearest(others, records)
    return found / unit, reference / unit, nearest


def _nearest(x: Tensor, records: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Euclidean distance of each row to the nearest record [G], and its index [G]."""
    center = records.mean(dim=0)
    centered = records - center
    squares = centered.square().sum(dim=1)
    distances, nearest = [], []
    for part in x.split(max(1, _VALUES // len(records))):
        index = (squares - 2 * (part - center) @ centered.T).argmin(dim=1)
        # Recomputed without the canceling sums: 0 for a copy.
        distances.append((part - records[index]).norm(dim=1))
        nearest.append(index)
    return torch.cat(distances).cpu().numpy(), torch.cat(nearest).cpu().numpy()


def _check_same(name: str, shape: Sequence[int], train: Sequence[int]) -> None:
    if tuple(shape[1:]) != tuple(train[1:]):
        raise ValueError(f"{name} and train must hold events of one shape, got {list(shape[1:])} and {list(train[1:])}")


def _signals(name: str, value: np.ndarray | Tensor) -> Tensor:
    shape = np.shape(value)
    if len(shape) != 3:
        raise ValueError(f"{name} must have shape [N, leads, L], got {list(shape)}")
    return _points(name, value, 1).reshape(shape).float()


def _unit(x: Tensor) -> Tensor:
    """x centered in each lead and divided by its norm over leads and time; 0 if there is no signal."""
    x = x - x.mean(dim=2, keepdim=True)
    norm = x.flatten(1).norm(dim=1)[:, None, None]
    return torch.where(norm > 0, x / torch.where(norm > 0, norm, 1.0), 0.0)


def _inverse_norms(records: Tensor, window: int) -> Tensor:
    """1 / norm of the centered window at each position, [N, places]; 0 if the window has no signal."""
    x = records.double()
    first = torch.nn.functional.pad(x.cumsum(dim=2), (1, 0))
    second = torch.nn.functional.pad(x.square().cumsum(dim=2), (1, 0))
    total = first[:, :, window:] - first[:, :, :-window]
    squares = (second[:, :, window:] - second[:, :, :-window] - total.square() / window).sum(dim=1)
    # A value below the rounding of these sums is not a signal.
    scale = second[:, :, -1].sum(dim=1, keepdim=True)
    some = squares > 1e-12 * scale
    return torch.where(some, squares.clamp(min=1e-300).rsqrt(), 0.0).float()


def _distance(middle: Tensor, records: Tensor, where: Tensor, window: int) -> Tensor:
    """Distances [rows] in float64 at the positions (record, start) [rows, 2]."""
    columns = where[:, 1:] + torch.arange(window, device=records.device)
    rows = records[where[:, 0]].double()
    found = rows.gather(2, columns[:, None, :].expand(-1, rows.shape[1], -1))
    a, b = _unit(middle.double()), _unit(found)
    distance = (a - b).flatten(1).norm(dim=1)
    empty = (a.flatten(1).norm(dim=1) == 0) | (b.flatten(1).norm(dim=1) == 0)
    return torch.where(empty, math.sqrt(2.0), distance)


def _ratio(value: float, reference: float) -> float:
    """value / reference; 1 for 0 / 0."""
    if reference == 0.0:
        return 1.0 if value == 0.0 else math.inf
    return value / reference
