"""Synthetic electrocardiograms made of a few waves, with the leads, rates and shapes of real ones."""

from __future__ import annotations

import numpy as np

from tgdp_fast.runtime.checks import check_integer, check_number, check_seed

# Directions of STORED_LEADS: to the left, down, to the back. Chest leads see the heart from near by.
_LEAD_VECTORS = np.array(
    [
        [1.0, 0.0, 0.0],
        [-0.5, 0.1, -0.9],
        [0.1, 0.1, -1.1],
        [0.4, 0.2, -0.9],
        [0.8, 0.3, -0.5],
        [1.0, 0.3, -0.1],
        [0.9, 0.3, 0.2],
        [0.0, 1.0, 0.0],
    ]
)
# P, Q, R, S, T: dipole in mV, seconds after R, how far that moves with sqrt(RR), standard deviation in seconds.
_DIPOLES = np.array(
    [[0.08, 0.12, 0.02], [-0.08, -0.10, -0.15], [1.00, 0.80, 0.35], [-0.15, -0.20, 0.45], [0.28, 0.22, -0.12]]
)
_FIXED = np.array([0.0, -0.035, 0.0, 0.035, 0.0])
_STRETCHED = np.array([-0.17, 0.0, 0.0, 0.0, 0.31])
_WIDTHS = np.array([0.025, 0.012, 0.014, 0.014, 0.050])
_SLOWEST, _FASTEST = 50.0, 110.0  # beats per minute
# Standard deviation of single intervals between beats, as a share of their mean: regular, and in fibrillation.
_REGULAR, _IRREGULAR = 0.03, 0.20
_ROWS = 512  # records computed at once


def synthetic_ecg(
    num: int, length: int = 1000, *, rate: float = 100.0, seed: int = 0, fibrillation: bool = False
) -> np.ndarray:
    """Records of eight leads: a dipole that turns through P, Q, R, S and T at each beat, seen from eight sides.

    Every record has a heart rate, amplitudes, an electrical axis, a time of the first beat, and per lead a slow drift
    and noise of its own. Each wave is a Gaussian in time, as in McSharry et al., "A dynamical model for generating
    synthetic electrocardiogram signals", IEEE Transactions on Biomedical Engineering 50 (2003). The
    only pathology is the one below: success on these records does not show success on patients.

    Args:
        num: records.
        length: samples of each.
        rate: samples per second.
        seed: the same seed gives the same records.
        fibrillation: records that stand for atrial fibrillation: without P waves, and with intervals between beats that
            vary by 20 % instead of 3 % (standard deviation). They have no fibrillatory waves.

    Returns:
        float32 [num, 8, length] in mV; leads as in :data:`~tgdp_fast.ecg.records.leads.STORED_LEADS`.
    """
    return synthetic_ecg_with_rates(num, length, rate=rate, seed=seed, fibrillation=fibrillation)[0]


def synthetic_ecg_with_rates(
    num: int, length: int = 1000, *, rate: float = 100.0, seed: int = 0, fibrillation: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The records of :func:`synthetic_ecg`, and the heart rate of each in beats per minute, float64 [num].

    Single intervals between beats differ from 60 s / heart rate by 3 % (standard deviation), in fibrillation by 20 %.
    """
    num = check_integer("num", num, 1)
    length = check_integer("length", length, 1)
    rate = check_number("rate", rate, 0.0, exclusive=True)
    random = np.random.default_rng(check_seed(seed))
    parts = [_records(min(_ROWS, num - start), length, rate, random, fibrillation) for start in range(0, num, _ROWS)]
    return np.concatenate([signals for signals, _ in parts]), np.concatenate([beats for _, beats in parts])


def _records(
    num: int, length: int, rate: float, random: np.random.Generator, fibrillation: bool
) -> tuple[np.ndarray, np.ndarray]:
    time = np.arange(length) / rate
    interval = 60.0 / random.uniform(_SLOWEST, _FASTEST, num)
    beats = int(np.ceil(time[-1] * _FASTEST / 60.0)) + 3
    spread = _REGULAR
    if fibrillation:
        # Intervals that vary so much may fall short of their mean all along.
        beats, spread = beats + int(np.ceil(np.sqrt(beats))), _IRREGULAR
    steps = interval[:, None] * (1.0 + spread * random.standard_normal((num, beats)))
    r_peak = np.cumsum(steps, axis=1) - interval[:, None] * (1.0 + random.uniform(size=(num, 1)))
    peak = r_peak[:, :, None] + _FIXED + _STRETCHED * np.sqrt(interval)[:, None, None]  # [num, beats, waves]
    width = _WIDTHS * np.exp(0.15 * random.standard_normal((num, 1, 5)))
    shape = np.zeros((num, 5, length))
    for beat in range(beats):
        shape += np.exp(-0.5 * ((time - peak[:, beat, :, None]) / width[:, 0, :, None]) ** 2)
    dipoles = _DIPOLES.copy()
    if fibrillation:
        dipoles[0] = 0.0  # P
    dipole = dipoles * np.exp(0.3 * random.standard_normal((num, 5, 1))) @ _axes(num, random)
    leads = np.einsum("lc,nwc,nwt->nlt", _LEAD_VECTORS, dipole, shape, optimize=True)
    frequency, phase = random.uniform(0.15, 0.4, (num, 1, 1)), random.uniform(0.0, 2 * np.pi, (num, 8, 1))
    drift = 0.06 * random.standard_normal((num, 8, 1)) * np.sin(2 * np.pi * frequency * time + phase)
    noise = 0.015 * random.standard_normal((num, 8, length))
    return (leads + drift + noise).astype(np.float32), 60.0 / interval


def _axes(num: int, random: np.random.Generator) -> np.ndarray:
    """Rotations [num, 3, 3] by about 15 degrees around random axes (Rodrigues)."""
    x, y, z = 0.26 * random.standard_normal((3, num))
    nil = np.zeros(num)
    cross = np.array([[nil, -z, y], [z, nil, -x], [-y, x, nil]]).transpose(2, 0, 1)
    angle = np.sqrt(x**2 + y**2 + z**2)[:, None, None]
    return np.eye(3) + np.sinc(angle / np.pi) * cross + 0.5 * np.sinc(angle / (2 * np.pi)) ** 2 * cross @ cross
