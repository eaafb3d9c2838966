"""The arrays of a fit: checked before any work, once each."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from tgdp_fast.runtime.arrays import CheckedArray, Standardizer, as_array
from tgdp_fast.runtime.checks import check_integer

#: Types of samples or labels: an array, a tensor, or one that has been checked already.
ArrayLike = np.ndarray | Tensor | CheckedArray


@dataclass(frozen=True)
class TransferArrays:
    """Samples of both domains, [M, ...] and [N, ...], and their labels, if any.

    Attributes:
        source, target: float32, of one event shape.
        source_labels, target_labels: class indices int64 [.] or rows float32 [., K]; None without labels.
        num_classes: K; 0 without labels.
    """

    source: CheckedArray
    target: CheckedArray
    source_labels: CheckedArray | None
    target_labels: CheckedArray | None
    num_classes: int

    @property
    def labels(self) -> tuple[CheckedArray | None, CheckedArray | None]:
        """The labels of both domains."""
        return self.source_labels, self.target_labels

    @classmethod
    def check(
        cls,
        source: ArrayLike,
        target: ArrayLike,
        source_labels: ArrayLike | None = None,
        target_labels: ArrayLike | None = None,
        *,
        num_classes: int | None = None,
        denoiser: Any = None,
        keep_exact: bool = False,
    ) -> TransferArrays:
        """The arrays of a transfer, or a ValueError that names what is wrong.

        Args:
            source, target, source_labels, target_labels: as given by the user.
            num_classes: of the labels; None: that of a conditional ``denoiser``, else from both sets of labels.
            denoiser: the source model; None if there is none yet.
            keep_exact: for :meth:`standardized`, so that it keeps a spread that float32 does not hold.
        """
        source = CheckedArray.samples("source", source, keep_exact=keep_exact)
        target = CheckedArray.samples("target", target, event_shape=source.values.shape[1:], keep_exact=keep_exact)
        if (source_labels is None) != (target_labels is None):
            raise ValueError("source_labels and target_labels must be given together (or neither)")
        stated = getattr(denoiser, "num_classes", None)
        if source_labels is None and stated:
            raise ValueError(
                f"source_labels and target_labels must be given: the denoiser is conditional on {stated} classes"
            )
        if num_classes is None and stated:
            num_classes = stated
        inferred = num_classes is None
        own = (("source_labels", source_labels, len(source)), ("target_labels", target_labels, len(target)))
        classes = max(count_classes(*labels, num_classes) for labels in own)
        y_source, y_target = (checked_labels(*labels, classes) for labels in own)
        if inferred:
            warn_of_empty_classes("source_labels and target_labels", classes, y_source, y_target)
        return cls(source, target, y_source, y_target, classes)

    def standardized(self, standardizer: Standardizer) -> TransferArrays:
        """With the samples in the coordinates of ``standardizer``, where a value may lie beyond float32."""
        source, target = (
            standardizer.apply(one.exact if standardizer.exceeds_float32 and one.exact is not None else one.values)
            for one in (self.source, self.target)
        )
        return replace(
            self, source=CheckedArray.samples("source", source), target=CheckedArray.samples("target", target)
        )


def count_classes(name: str, labels: ArrayLike | None, count: int, num_classes: int | None) -> int:
    """Number of classes of ``count`` labels: as given, else from the labels, else 0.

    Raises:
        ValueError: as :func:`tgdp_fast.runtime.arrays.check_labels`; a single column, probably of class indices.
    """
    if num_classes is not None:
        return check_integer("num_classes", num_classes, 0)
    if labels is None:
        return 0
    shape = np.shape(labels.values if isinstance(labels, CheckedArray) else as_array(name, labels))
    if len(shape) == 2 and shape[1] == 1:
        raise ValueError(
            f"{name} must have shape [N] (classes) or [N, K] (a column for each of K classes), got "
            f"{list(shape)}; if the column holds classes pass labels[:, 0], if it is one class num_classes=1"
        )
    return CheckedArray.labels(name, labels, count).num_classes


def warn_of_empty_classes(name: str, num_classes: int, *labels: CheckedArray | None) -> None:
    """Warn about classes that no sample has, such as class 0 of labels that count from 1."""
    held = np.zeros(num_classes, dtype=bool)
    for one in labels:
        if one is not None:
            held |= (
                one.values.any(axis=0) if one.values.ndim == 2 else np.bincount(one.values, minlength=num_classes) > 0
            )
    empty = np.flatnonzero(~held).tolist()
    if empty:
        some = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
        warnings.warn(
            f"{name} have {num_classes} classes, but no sample has class {some}: samples of such a class mean nothing. "
            "Classes count from 0; subtract the smallest label if yours count from 1",
            stacklevel=4,
        )


def checked_labels(name: str, labels: ArrayLike | None, count: int, num_classes: int | None) -> CheckedArray | None:
    """Labels of ``count`` samples for a model of ``num_classes``; None for an unconditional model.

    ``num_classes`` None means a network without this attribute: any labels, or none, are accepted.

    Raises:
        ValueError: labels for an unconditional model, none for a conditional one, a count that differs, or classes out
            of range.
    """
    if labels is None:
        if num_classes:
            raise ValueError(f"{name} must be given: the model is conditional on {num_classes} classes")
        return None
    if num_classes == 0:
        raise ValueError(f"{name} were given, but the model is unconditional; leave them out or set num_classes")
    return CheckedArray.labels(name, labels, count, num_classes)


def warn_of_scale(name: str, x: Tensor) -> None:
    """Warn about samples whose scale is far from 1: noise of unit scale would hide them or have no effect."""
    # In parts: float64 copies of mapped samples may exceed the memory.
    squares = sum(float(part.double().square().sum()) for part in x.flatten().split(2**22))
    size = math.sqrt(squares / x.numel())
    if not 0.1 <= size <= 10:
        warnings.warn(
            f"{name} should have about unit scale, but its root mean square is {size:.3g}; expect a bad fit. "
            "Pass (x - mean) / std, with mean and std of the source, or let TransferModel.fit train the denoiser: it "
            "standardises",
            stacklevel=3,
        )
