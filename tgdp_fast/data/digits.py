"""Handwritten digits that ship with scikit-learn (8 x 8 pixels): real data without a download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tgdp_fast.runtime.arrays import check_samples
from tgdp_fast.runtime.checks import check_integer
from tgdp_fast.runtime.optional import optional

NUM_CLASSES = 10
#: Share of held-out images, the same for every digit.
HELD_OUT = 1 / 3
_PIXEL_MAXIMUM = 16.0


@dataclass(frozen=True)
class DigitArrays:
    """Source and target of the digit transfer; pixels in [-1, 1], float32, labels int64.

    Attributes:
        source: all digits, [1198, 64].
        source_labels: [1198], 0 to 9.
        target: some source images of a few digits, [n, 64].
        target_labels: [n].
        held_out: all digits, [599, 64], for measurements; none of them is in the source.
        held_out_labels: [599].
    """

    source: np.ndarray
    source_labels: np.ndarray
    target: np.ndarray
    target_labels: np.ndarray
    held_out: np.ndarray
    held_out_labels: np.ndarray


@dataclass(frozen=True)
class DigitJudge:
    """A classifier of real digits, to label generated images.

    Attributes:
        accuracy: on held-out real digits.
        num_held_out: their number.
    """

    classifier: Any
    accuracy: float
    num_held_out: int

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Digits [N] of images ``x`` [N, 64] in [-1, 1]."""
        x = check_samples("x", x, minimum=1, event_shape=(64,), event_of="a digit")
        return np.asarray(self.classifier.predict(x))

    def fraction(self, x: np.ndarray, digits: tuple[int, ...]) -> float:
        """Share of images ``x`` [N, 64] that are classified as one of ``digits``."""
        return float(np.isin(self.predict(x), digits).mean())


def load_digits_arrays(target_digits: tuple[int, ...] = (3, 8), num_target: int = 20, seed: int = 0) -> DigitArrays:
    """Two thirds of all handwritten digits as the source, a few of their images as the target, the rest held out.

    Args:
        target_digits: distinct digits 0 to 9.
        num_target: images in the target, divided equally among the digits (the first ones take the
            remainder).
        seed: selects the target images. Source and held-out images are always the same.

    Raises:
        ValueError: digits out of range or repeated, or more images than the source has.
        ImportError: scikit-learn is missing.
    """
    digits = tuple(check_integer("target_digits entries", digit, 0) for digit in target_digits)
    if not digits or len(set(digits)) != len(digits) or max(digits) >= NUM_CLASSES:
        raise ValueError(f"target_digits must be distinct digits 0 to 9, got {target_digits}")
    num_target = check_integer("num_target", num_target, len(digits), "every target digit needs an image")
    source, labels, held_out, held_out_labels = _split_digits()
    generator = np.random.default_rng(check_integer("seed", seed, 0))
    chosen = []
    for position, digit in enumerate(digits):
        rows = np.flatnonzero(labels == digit)
        count = num_target // len(digits) + (position < num_target % len(digits))
        if count > len(rows):
            raise ValueError(
                f"num_target {num_target} asks for {count} images of digit {digit}, but {len(rows)} exist beside the "
                "held-out ones"
            )
        chosen.append(generator.choice(rows, count, replace=False))
    rows = generator.permutation(np.concatenate(chosen))
    return DigitArrays(source, labels, source[rows], labels[rows], held_out, held_out_labels)


def digit_judge() -> DigitJudge:
    """A support vector classifier (RBF) fitted on the source images of :func:`load_digits_arrays`; its accuracy is
    measured on the held-out images.

    It is trained on all ten digits and does not depend on the target, so its labels compare models fairly.

    Raises:
        ImportError: scikit-learn is missing.
    """
    train, train_labels, test, test_labels = _split_digits()
    # gamma: the customary setting for these images in 0..16 (0.001), converted to the units of [-1, 1].
    classifier = _scikit_learn("svm").SVC(gamma=0.001 * (_PIXEL_MAXIMUM / 2) ** 2, C=10.0)
    classifier.fit(train, train_labels)
    accuracy = float((classifier.predict(test) == test_labels).mean())
    return DigitJudge(classifier, accuracy, len(test_labels))


def _split_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Source images and labels, held-out images and labels: one split, stratified by digit."""
    images, labels = _digits()
    source, held_out, source_labels, held_out_labels = _scikit_learn("model_selection").train_test_split(
        images, labels, test_size=HELD_OUT, random_state=0, stratify=labels
    )
    return source, source_labels, held_out, held_out_labels


def _digits() -> tuple[np.ndarray, np.ndarray]:
    images, labels = _scikit_learn("datasets").load_digits(return_X_y=True)
    return (images / (_PIXEL_MAXIMUM / 2) - 1).astype(np.float32), labels.astype(np.int64)


def _scikit_learn(module: str) -> Any:
    return optional(f"sklearn.{module}", "the digits need")
