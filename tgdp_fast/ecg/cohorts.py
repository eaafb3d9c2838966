"""Two folders of records as the cohorts of a transfer: read, divided, standardized."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from tgdp_fast.ecg.config import Data
from tgdp_fast.ecg.records.cache import ECGDataset, build_ecg_cache
from tgdp_fast.ecg.records.folder import open_ecg_folder
from tgdp_fast.runtime import distributed
from tgdp_fast.runtime.arrays import Standardizer

#: PTB-XL's recommended division: folds 1 to 8 train, 9 and 10 are kept.
_LAST_TRAINING_FOLD = 8
DOMAINS = ("source", "target")


@dataclass(frozen=True)
class Cohorts:
    """Source training records, target records that methods may see, target records that test; no patient in two.

    Attributes:
        source, target, test: rows of the two data sets, with one rate, one vocabulary and the same leads.
        standardizer: from mV to the coordinates of the networks; per lead, from the source training records alone
            unless a given model brings its own.
    """

    source: ECGDataset
    target: ECGDataset
    test: ECGDataset
    standardizer: Standardizer

    @cached_property
    def x_source(self) -> np.ndarray:
        """Source training signals in the coordinates of the networks: float32 [M, leads, L]."""
        return self.standardizer.apply(self.source.signals)

    @cached_property
    def x_target(self) -> np.ndarray:
        """The target signals that methods may see, likewise."""
        return self.standardizer.apply(self.target.signals)


def check_folders(data: Data) -> None:
    """Refuse a configuration without both folders."""
    for domain in DOMAINS:
        if not getattr(data, domain):
            raise ValueError(
                f"--{domain} DIR (or data.{domain} in the file of --config) must be given: the folder of "
                f"the {domain}'s records"
            )


def load_cohorts(data: Data, cache: Path, *, progress: bool = False) -> Cohorts:
    """Read both folders, which must be given, through caches in ``cache``, and divide them.

    Raises:
        ValueError: a folder without usable records, too few to divide; at the first broken one if ``data.on_problem``
            is "raise".
    """
    folders = {}
    for domain in DOMAINS:  # Both, before either is read.
        try:
            folders[domain] = open_ecg_folder(getattr(data, domain), rate=data.rate)
        except ValueError as error:
            raise ValueError(f"--{domain} (data.{domain}): {error}") from None
    datasets: dict[str, ECGDataset] = {}
    for domain, folder in folders.items():
        place = cache / domain
        if distributed.is_first():
            try:
                build_ecg_cache(
                    folder,
                    place,
                    rate=data.rate,
                    seconds=data.seconds,
                    on_problem=data.on_problem,
                    progress=progress,
                )
            except ValueError as error:
                raise ValueError(f"--{domain} (data.{domain}): {folder.path}: {error}") from None
        distributed.barrier()
        datasets[domain] = ECGDataset.load(place)
    source, target = datasets["source"], datasets["target"]
    kept = np.flatnonzero(source.folds <= _LAST_TRAINING_FOLD)  # -1, not known, among them
    if len(kept) < 2:
        raise ValueError(f"data.source: {data.source} must hold at least 2 usable training records, it has {len(kept)}")
    seen, unseen = divide(target, data)
    return Cohorts(source.rows(kept), target.rows(seen), target.rows(unseen), source.standardizer(kept))


def divide(dataset: ECGDataset, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Rows that methods may see, and rows that test: whole patients, of each statement about the fraction asked.

    Raises:
        ValueError: not enough records to have at least two on both sides.
    """
    count = len(dataset)
    fraction = max(data.target_fraction, data.least_target / count)
    if fraction * count > count - 2:
        raise ValueError(
            f"data.target: {count} usable records cannot be divided into {round(fraction * count)} that methods may "
            "see and at least 2 that test; lower data.target_fraction or data.least_target, or give more records"
        )
    seen, rest = dataset.split_by_patient((fraction, 1.0 - fraction), data.seed)
    if min(len(seen), len(rest)) < 2:
        raise ValueError(
            f"data.target: its {count} records are of too few patients to be divided; give records of more patients"
        )
    return seen, rest
