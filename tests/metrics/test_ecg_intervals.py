"""Intervals and spectra of ECGs: on records whose heart rate is known, on waves at known places, on real records."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from tgdp_fast.ecg.records.leads import STORED_LEADS
from tgdp_fast.ecg.records.synthetic import synthetic_ecg, synthetic_ecg_with_rates
from tgdp_fast.ecg.records.wfdb import read_leads
from tgdp_fast.metrics import compare_statistics, ecg_statistics, spectra, spectral_difference
from tgdp_fast.metrics.ecg_intervals import STATISTICS, beat_correlation

ROOT = Path(__file__).resolve().parents[2]
#: Of PTB-XL, where a folder of data lies in the checkout or beside it.
FOLDERS = [folder / "shared" / "data" / "ecg" / "ptbxl" / "records100" for folder in (ROOT, ROOT.parent)]
RECORDS = [path for folder in FOLDERS for path in sorted(folder.rglob("*.hea"))][:20]


def regular(pr: float, qt: float, beats: float = 60.0, rate: float = 100.0, num: int = 3) -> np.ndarray:
    """Lead II alone, [num, 1, 1000]: beats of a P wave, a QRS complex and a T wave.

    P begins ``pr`` seconds before the complex, T ends ``qt`` after its begin; a wave of standard deviation s begins 2 s
    before its centre.
    """
    time = np.arange(1000) / rate
    x = 0.004 * np.random.default_rng(0).standard_normal((num, 1, 1000))
    for r in np.arange(0.4, 10.5, 60.0 / beats):
        for height, centre, width in (
            (0.15, -pr, 0.020),
            (-0.1, -0.04, 0.010),
            (1.2, 0.0, 0.012),
            (-0.25, 0.04, 0.010),
            (0.35, qt - 0.12, 0.040),
        ):
            x += height * np.exp(-0.5 * ((time - r - centre) / width) ** 2)
    return x


def test_heart_rates_are_those_of_the_construction() -> None:
    """Ten seconds of intervals that vary by 3 %: their median is off by about 1 %."""
    x, rates = synthetic_ecg_with_rates(12, 1000, seed=4)
    assert np.array_equal(x, synthetic_ecg(12, 1000, seed=4))
    assert rates.min() >= 50
    assert rates.max() <= 110
    found = ecg_statistics(x, 100.0, STORED_LEADS)
    assert found.lead == "II"
    assert found.failed == 0
    assert found.heart_rate == pytest.approx(rates, rel=0.05)
    # 3 % of 545 to 1200 ms, from 7 to 17 intervals, besides P, T and noise that move the peaks.
    expected = 0.03 * 60_000 / rates
    assert np.median(found.rr_deviation / expected) == pytest.approx(1.0, abs=0.35)


def test_intervals_follow_the_waves() -> None:
    """Waves put 40 ms farther apart are found 40 ms farther apart; 500 Hz finds what 100 Hz does."""
    short, long = (ecg_statistics(regular(pr, qt), 100.0, ["II"]) for pr, qt in ((0.14, 0.36), (0.18, 0.40)))
    assert np.median(short.heart_rate) == pytest.approx(60.0, abs=0.5)
    for name, truth in (("pr", 140.0), ("qt", 360.0)):
        first, second = np.median(getattr(short, name)), np.median(getattr(long, name))
        assert first == pytest.approx(truth, abs=40)
        assert second - first == pytest.approx(40.0, abs=12)
    assert np.median(short.qrs) == pytest.approx(90.0, abs=30)
    assert np.median(long.qrs) == pytest.approx(np.median(short.qrs), abs=6)
    assert np.median(short.rr_deviation) < 5


def test_lead_ii_from_others() -> None:
    x = synthetic_ecg(3, 1000, seed=1)
    second = x[:, STORED_LEADS.index("aVF")] + 0.5 * x[:, STORED_LEADS.index("I")]
    derived = ecg_statistics(x, 100.0, STORED_LEADS)
    stored = ecg_statistics(np.stack([x[:, 3], second], axis=1), 100.0, ["v3", "ii"])
    for name in STATISTICS:
        assert np.allclose(getattr(derived, name), getattr(stored, name), equal_nan=True)
    assert ecg_statistics(x[:, :2], 100.0, ["V5", "V6"]).lead == "V5"


def test_records_without_beats_are_counted() -> None:
    x = synthetic_ecg(4, 1000, seed=2)
    x[1] = 0.0
    x[3] = 0.0
    x[3, :, 500] = 1.0  # one spike is no heart beat
    found = ecg_statistics(x, 100.0, STORED_LEADS)
    assert found.failed == 2
    assert np.isnan(found.heart_rate).tolist() == [False, True, False, True]
    assert np.isnan(found.qt).tolist() == [False, True, False, True]


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_noise_has_no_intervals(power: float) -> None:
    """White noise, and noise whose power falls as 1/f: the detector finds peaks, but no beat is like another."""
    random = np.random.default_rng(3)
    frequency = np.maximum(np.fft.rfftfreq(1000, 0.01), 0.5)
    x = np.fft.irfft(np.fft.rfft(random.standard_normal((40, 8, 1000))) / frequency**power, 1000)
    found = ecg_statistics(x, 100.0, STORED_LEADS)
    assert (found.measured, found.failed) == (0, 40)
    assert 30 <= found.noise <= 40  # The others have fewer than three peaks, or no waves.
    for name in STATISTICS:
        assert np.isnan(getattr(found, name)).all()
    beats = ecg_statistics(x / 40 + synthetic_ecg(40, 1000, seed=1), 100.0, STORED_LEADS)
    assert (beats.measured, beats.noise) == (40, 0)


def test_correlation_of_beats() -> None:
    """Equal beats correlate by 1, beats of independent noise by 0 up to 1 / sqrt(samples), too few beats by nothing."""
    random = np.random.default_rng(0)
    peaks = np.arange(300, 9700, 500)
    signal = np.zeros(10_000)
    signal[peaks[:, None] + np.arange(-100, 150)] = random.standard_normal(250)
    assert beat_correlation(signal, peaks, 500.0) == pytest.approx(1.0)
    assert abs(beat_correlation(random.standard_normal(10_000), peaks, 500.0)) < 4 / 250**0.5
    assert beat_correlation(signal, peaks[:2], 500.0) == 0.0
    assert beat_correlation(signal, np.array([50, 300, 800, 9900]), 500.0) == 0.0  # Two are cut.


def test_comparison_of_two_sets() -> None:
    """W1 of values moved by d is d; of an equal set 0."""
    real = ecg_statistics(synthetic_ecg(7, 1000, seed=3), 100.0, STORED_LEADS)
    moved = dataclasses.replace(real, heart_rate=real.heart_rate + 7.0, qt=np.full(7, np.nan))
    rows = {row.name: row for row in compare_statistics(real, moved)}
    assert list(rows) == list(STATISTICS)
    assert rows["heart_rate"].wasserstein == pytest.approx(7.0)
    assert rows["heart_rate"].real[1] == np.median(real.heart_rate)
    assert rows["heart_rate"].generated == pytest.approx(np.quantile(real.heart_rate + 7, [0.25, 0.5, 0.75]))
    assert rows["rr_deviation"].wasserstein == 0.0
    assert rows["qt"].num_generated == 0
    assert math.isnan(rows["qt"].wasserstein)
    assert (rows["pr"].unit, rows["heart_rate"].unit) == ("ms", "beats/min")
    with pytest.raises(ValueError, match="in one lead, got II and V5"):
        compare_statistics(real, dataclasses.replace(real, lead="V5"))


@pytest.mark.skipif(not RECORDS, reason="no real records")
def test_real_records_have_the_intervals_of_patients() -> None:
    """Most of PTB-XL is normal: limits 60 to 100 beats/min, PR 120 to 200 ms, QRS below 120 ms, QT 350 to 450 ms."""
    records = [read_leads(path, ["I", "II"])[0] for path in RECORDS]
    found = ecg_statistics(np.stack(records), 100.0, ["I", "II"])
    assert found.failed <= 1
    assert found.noise == 0
    assert 55 < np.nanmedian(found.heart_rate) < 95
    assert 120 < np.nanmedian(found.pr) < 200
    assert 70 < np.nanmedian(found.qrs) < 130
    assert 350 < np.nanmedian(found.qt) < 450


def test_spectra_of_a_tone_and_of_noise() -> None:
    """White noise of variance v has the density 2 v / rate, a tone of amplitude a the power a^2 / 2."""
    rate = 100.0
    noise = 0.5 * np.random.default_rng(0).standard_normal((40, 2, 1000))
    found = spectra(noise, rate)
    assert found.frequency == pytest.approx(np.arange(1, 101) / 2)
    assert found.decibels.shape == (2, 100)
    # About 9 half-overlapping windows a record, 40 records: relative deviation 1 / sqrt(200), 0.3 dB; the last bin is
    # one-sided already.
    assert found.decibels[:, 2:-1] == pytest.approx(10 * np.log10(2 * 0.25 / rate), abs=1.5)
    tone = 0.2 * np.sin(2 * np.pi * 10 * np.arange(1000) / rate)[None, None].repeat(2, axis=1)
    power = 10 ** (spectra(tone, rate).decibels / 10)
    assert power.argmax(axis=1).tolist() == [19, 19]
    assert power.sum(axis=1) * 0.5 == pytest.approx([0.02, 0.02], rel=1e-3)
    twice = spectra(2 * noise, rate)
    assert spectral_difference(found, twice) == pytest.approx(20 * np.log10(2), abs=1e-6)
    assert spectral_difference(found, found) == 0.0
    high = dataclasses.replace(found, decibels=found.decibels + np.where(found.frequency > 40, 30.0, 0.0))
    assert spectral_difference(found, high) == 0.0
    assert spectral_difference(found, high, None) == pytest.approx(30 * math.sqrt(20 / 100))
    assert spectra(np.zeros((1, 1, 50)), rate).decibels.max() == -300.0


def test_bad_arguments() -> None:
    x = np.zeros((2, 2, 300))
    with pytest.raises(ValueError, match="leads must name the 2 leads of signals, got 1"):
        ecg_statistics(x, 100.0, ["II"])
    with pytest.raises(ValueError, match=r"signals must have shape \[N, leads, L\], got \[2, 300\]"):
        ecg_statistics(x[0], 100.0, ["I", "II"])
    with pytest.raises(ValueError, match="rate must be"):
        spectra(x, 0.0)
    with pytest.raises(ValueError, match="max_frequency must be at least 0.5 Hz, got 0.2"):
        spectral_difference(spectra(x, 100.0), spectra(x, 100.0), 0.2)
    with pytest.raises(ValueError, match="spectra must have the same leads and frequencies"):
        spectral_difference(spectra(x, 100.0), spectra(x[:, :1], 100.0))
