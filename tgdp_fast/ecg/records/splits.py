"""Dividing records: all records of a patient on one side, labels spread alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tgdp_fast.runtime.checks import check_seed


def split_by_patient(
    patients: Sequence[str], labels: np.ndarray, fractions: Sequence[float], seed: int = 0
) -> tuple[np.ndarray, ...]:
    """Divide records so that all of a patient are on one side and each label is spread by ``fractions``.

    Patients are assigned one by one, those with the rarest label first, each to the side that lacks this label most and
    is not full yet: iterative stratification (Sechidis, Tsoumakas and Vlahavas, "On the stratification of
    multi-label data", 2011) of patients.

    Args:
        patients: N identifiers.
        labels: multi-hot [N, K]; with K = 0 only the numbers of records are balanced.
        fractions: of the records on each side, positive, with sum 1.
        seed: of the order among ties.

    Returns:
        int64 rows of each side, ascending; each row is on one.

    Raises:
        ValueError: fractions that are not positive or do not sum to 1, or counts that differ.
    """
    shares = np.asarray(fractions, dtype=np.float64)
    if shares.ndim != 1 or not (shares > 0).all() or abs(shares.sum() - 1.0) > 1e-9:
        raise ValueError(f"fractions must be positive with sum 1, got {list(fractions)}")
    labels = np.asarray(labels)
    if labels.ndim != 2 or len(labels) != len(patients):
        raise ValueError(f"labels must have shape [{len(patients)}, K], got {list(labels.shape)}")
    random = np.random.default_rng(check_seed(seed))
    _, group = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    group = group.reshape(-1)
    count = int(group.max()) + 1 if len(group) else 0
    # The last column counts records: it stands for those without a label too.
    content = np.zeros((count, labels.shape[1] + 1))
    np.add.at(content, group, np.column_stack([labels != 0, np.ones(len(labels))]))
    wanted = shares[:, None] * content.sum(axis=0)
    side = np.full(count, -1)
    left = (content > 0).sum(axis=0)  # patients with each label who are not placed yet
    members = [np.flatnonzero(column) for column in content.T]
    while (left > 0).any():
        # Every patient has the last column, so the others come first.
        rare = left[:-1]
        column = int(np.where(rare > 0, rare, count + 1).argmin()) if (rare > 0).any() else len(rare)
        waiting = random.permutation(members[column][side[members[column]] < 0])
        for patient in waiting[np.argsort(-content[waiting, -1], kind="stable")]:
            room = wanted[:, -1] >= content[patient, -1] / 2
            lack = np.where(room | ~room.any(), wanted[:, column], -np.inf)
            best = np.flatnonzero(lack >= lack.max() - 1e-9)
            best = best[wanted[best, -1] >= wanted[best, -1].max() - 1e-9]
            chosen = int(best[random.integers(len(best))])
            side[patient] = chosen
            wanted[chosen] -= content[patient]
            left -= content[patient] > 0
    return tuple(np.flatnonzero(side[group] == each) for each in range(len(shares)))
