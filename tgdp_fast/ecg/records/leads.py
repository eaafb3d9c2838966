"""The twelve leads of an electrocardiogram: names, the stored ones, and how the others follow from these."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    Signals = TypeVar("Signals", np.ndarray, Tensor)

#: In the order of PTB-XL and ICBEB2018.
TWELVE_LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
#: The independent leads of twelve, in the order of SSSD-ECG (Alcaraz and Strodthoff 2023); the other four are linear
#: combinations of I and aVF.
STORED_LEADS = ("I", "V1", "V2", "V3", "V4", "V5", "V6", "aVF")

_BY_NAME = {name.lower(): name for name in TWELVE_LEADS}
_PREFIXES = ("mdc_ecg_lead_", "mdc_ecg_", "ecg", "lead")
# A minus directly before the name, in any of its code points. Behind "ECG" without a blank it may also join two words.
_NEGATED = re.compile(
    r"(?:mdc_ecg_(?:lead_)?|(?:ecg|lead)[\s_:]+)*(?:[-\u2010-\u2015\u2212\ufe58\ufe63\uff0d](?=\S)|minus\s+)(.+)"
)
_JOINED = re.compile(r"(?:ecg|lead)-(\w+)")
_SMALLEST, _LARGEST = -32767, 32767  # of int16; -32768 means "no sample" in WFDB

# Lines: TWELVE_LEADS; columns: STORED_LEADS. Einthoven: III = II - I; Goldberger: aVR = -(I + II) / 2,
# aVL = (I - III) / 2, aVF = (II + III) / 2.
_COMBINATIONS = {"II": (0.5, 1.0), "III": (-0.5, 1.0), "aVR": (-0.75, -0.5), "aVL": (0.75, -0.5)}


@lru_cache(maxsize=1024)
def lead_name(name: str) -> str | None:
    """The name in :data:`TWELVE_LEADS` that ``name`` stands for, in any case ("AVR", "Lead II", "MDC_ECG_LEAD_V1"), or
    None. A name with a minus stands for none: such a channel may have the other sign.
    """
    text = name.strip().lower()
    for prefix in _PREFIXES:
        text = text.removeprefix(prefix).strip(" _:")
    return _BY_NAME.get(text)


@lru_cache(maxsize=256)
def signed_leads(names: tuple[str, ...]) -> tuple[tuple[int, str, int], ...]:
    """Places of names with a minus whose meaning is certain, the lead, and its sign.

    "-aVR" (of Cabrera's order), "ECG -aVR" and "minus aVR" are the negative of a lead. Where all leads are like
    "ECG-II", the minus joins two words; one alone may be either. A lead that is there under its own name is left out.
    """
    own = {lead_name(name) for name in names}
    texts = [name.strip().lower() for name in names]
    found = [
        (place, lead_name(match[1]), -1) for place, text in enumerate(texts) if (match := _NEGATED.fullmatch(text))
    ]
    joined = [(place, lead_name(match[1]), 1) for place, text in enumerate(texts) if (match := _JOINED.fullmatch(text))]
    if len({lead for _, lead, _ in joined}) > 1 and own == {None}:
        found += joined
    return tuple((place, lead, sign) for place, lead, sign in found if lead is not None and lead not in own)


def known_leads(leads: Sequence[str]) -> tuple[str, ...]:
    """Names of leads, in their usual spelling.

    Raises:
        ValueError: none given, one twice, or one that is not of the twelve.
    """
    names = [lead_name(lead) for lead in leads]
    if None in names or not names or len(set(names)) < len(names):
        raise ValueError(f"leads must be different ones of I, II, III, aVR, aVL, aVF, V1 to V6, got {list(leads)}")
    return tuple(name for name in names if name is not None)


def find_leads(names: Sequence[str], wanted: Iterable[str]) -> list[int]:
    """Places of the leads ``wanted`` in ``names``; leads that are not of the twelve are found by their name in any
    case.

    Raises:
        ValueError: a lead is missing, or there twice.
    """
    return list(_places(tuple(names), tuple(wanted)))


@lru_cache(maxsize=256)  # the records of a data set have the same leads
def _places(names: tuple[str, ...], wanted: tuple[str, ...]) -> tuple[int, ...]:
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(_key(name), []).append(place)
    found = [places.get(_key(name), []) for name in wanted]
    missing = [name for name, at in zip(wanted, found, strict=True) if not at]
    if missing:
        raise ValueError(f"the leads {', '.join(missing)} are missing; there are {', '.join(names) or 'none'}")
    twice = [name for name, at in zip(wanted, found, strict=True) if len(at) > 1]
    if twice:
        raise ValueError(f"the leads {', '.join(twice)} are there more than once, among {', '.join(names)}")
    return tuple(at[0] for at in found)


def twelve_leads(stored: Signals) -> Signals:
    """All twelve leads of the eight: II = aVF + I/2, III = aVF - I/2, aVR = -3/4 I - aVF/2, aVL = 3/4 I - aVF/2.

    Args:
        stored: array or tensor [..., 8, L] of floating point, leads as in :data:`STORED_LEADS`.

    Returns:
        [..., 12, L] of the same kind, leads as in :data:`TWELVE_LEADS`; the eight are unchanged.
    """
    _check_eight(stored)
    if not isinstance(stored, np.ndarray):
        import torch

        return torch.stack(_twelve(stored), dim=-2)
    if stored.dtype.kind != "f":
        raise ValueError(f"stored must be of floating point, got {stored.dtype}; integers go to twelve_leads_digital")
    return np.stack(_twelve(stored), axis=-2)


def twelve_leads_digital(stored: np.ndarray, units: float = 1000.0) -> np.ndarray:
    """All twelve leads as int16 whose relations hold in the integers.

    I and aVF are rounded first; the others follow from these integers. I + III = II holds exactly, each of
    aVR = -(I + II)/2, aVL = (I - III)/2 and aVF = (II + III)/2 to half a unit, and aVR + aVL + aVF = 0 to one unit.

    Args:
        stored: [..., 8, L] in mV, finite, leads as in :data:`STORED_LEADS`.
        units: per mV.

    Returns:
        int16 [..., 12, L], leads as in :data:`TWELVE_LEADS`.

    Raises:
        ValueError: another shape, values that are not finite or that int16 cannot hold.
    """
    _check_eight(stored)
    scaled = np.asarray(stored, dtype=np.float64) * units
    if not np.isfinite(scaled).all():
        raise ValueError("stored must be finite; it holds NaN or infinite values")
    rounded = np.rint(scaled).astype(np.int64)
    one, foot = rounded[..., 0, :], rounded[..., 7, :]
    two = foot + (one + 1) // 2
    three = two - one
    right, left = -((one + two + 1) // 2), (one - three + 1) // 2
    chest = [rounded[..., place, :] for place in range(1, 7)]
    digital = np.stack([one, two, three, right, left, foot, *chest], axis=-2)
    if digital.size and (digital.min() < _SMALLEST or digital.max() > _LARGEST):
        peak = float(np.abs(digital).max()) / units
        raise ValueError(
            f"stored must lie within {_LARGEST / units:g} mV, which int16 at {units:g} units/mV can hold; "
            f"a lead reaches {peak:.4g} mV"
        )
    return digital.astype(np.int16)


def _twelve(stored: Any) -> list[Any]:
    lead = {name: stored[..., place, :] for place, name in enumerate(STORED_LEADS)}
    for name, (one, foot) in _COMBINATIONS.items():
        lead[name] = one * lead["I"] + foot * lead["aVF"]
    return [lead[name] for name in TWELVE_LEADS]


def _check_eight(stored: Any) -> None:
    if stored.ndim < 2 or stored.shape[-2] != len(STORED_LEADS):
        raise ValueError(
            f"stored must have shape [..., 8, L] with the leads {', '.join(STORED_LEADS)}, got {list(stored.shape)}"
        )


def _key(name: str) -> str:
    return lead_name(name) or name.strip().lower()
