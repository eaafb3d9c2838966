"""Handwritten digits that ship with scikit-learn (8 x 8 pixels): real data without a download."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from tgdp_fast._checks import check_integer
from tgdp_fast.data.arrays import check_samples

NUM_CLASSES = 10
_PIXEL_MAXIMUM = 16.0


@dataclass(frozen=True)
class DigitArrays:
    """Source and target of the digit transfer; pixels in [-1, 1], float32, labels int64.

    Attributes:
        source: all digits, [1797, 64].
        source_labels: [1797], 0 to 9.
        target: some images of a few digits, [n, 64].
        target_labels: [n].
    """

    source: np.ndarray
    source_labels: np.ndarray
    target: np.ndarray
    target_labels: np.ndarray


@dataclass(frozen=True)
class DigitJudge:
    """A classifier of real digits, to name what a model drew.

    Attributes:
        accuracy: on real digits that it was not trained on.
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
        """Share of images ``x`` [N, 64] that are called one of ``digits``."""
        return float(np.isin(self.predict(x), digits).mean())


def load_digits_arrays(target_digits: tuple[int, ...] = (3, 8), num_target: int = 20, seed: int = 0) -> DigitArrays:
    """All handwritten digits as the source, a few images of chosen digits as the target.

    Args:
        target_digits: distinct digits 0 to 9.
        num_target: images in the target, divided equally among the digits (the first ones take the
            remainder).
        seed: chooses the images.

    Raises:
        ValueError: digits out of range or repeated, more images asked for than exist.
        ImportError: scikit-learn is missing.
    """
    digits = tuple(check_integer("target_digits entries", digit, 0) for digit in target_digits)
    if not digits or len(set(digits)) != len(digits) or max(digits) >= NUM_CLASSES:
        raise ValueError(f"target_digits must be distinct digits 0 to 9, got {target_digits}")
    num_target = check_integer("num_target", num_target, len(digits), "every target digit needs an image")
    source, labels = _digits()
    generator = np.random.default_rng(check_integer("seed", seed, 0))
    chosen = []
    for position, digit in enumerate(digits):
        rows = np.flatnonzero(labels == digit)
        count = num_target // len(digits) + (position < num_target % len(digits))
        if count > len(rows):
            raise ValueError(f"num_target {num_target} asks for {count} images of digit {digit}, but {len(rows)} exist")
        chosen.append(generator.choice(rows, count, replace=False))
    rows = generator.permutation(np.concatenate(chosen))
    return DigitArrays(source, labels, source[rows], labels[rows])


def digit_judge(seed: int = 0, held_out: float = 0.3) -> DigitJudge:
    """A support vector classifier (RBF) fitted on real digits, with its accuracy on a stratified held-out
    part.

    It knows all ten digits and nothing of any target, so that its verdicts compare models fairly.

    Args:
        seed: chooses the held-out images.
        held_out: their share.

    Raises:
        ImportError: scikit-learn is missing.
    """
    images, labels = _digits()
    split = _scikit_learn("model_selection").train_test_split(
        images, labels, test_size=held_out, random_state=check_integer("seed", seed, 0), stratify=labels
    )
    train, test, train_labels, test_labels = split
    # gamma: the setting customary for these images in 0..16 (0.001), in the units of [-1, 1].
    classifier = _scikit_learn("svm").SVC(gamma=0.001 * (_PIXEL_MAXIMUM / 2) ** 2, C=10.0)
    classifier.fit(train, train_labels)
    accuracy = float((classifier.predict(test) == test_labels).mean())
    return DigitJudge(classifier, accuracy, len(test_labels))


def _digits() -> tuple[np.ndarray, np.ndarray]:
    images, labels = _scikit_learn("datasets").load_digits(return_X_y=True)
    return (images / (_PIXEL_MAXIMUM / 2) - 1).astype(np.float32), labels.astype(np.int64)


def _scikit_learn(module: str) -> Any:
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError:
        raise ImportError(
            "the digits need scikit-learn, which is not installed; run: pip install 'tgdp_fast[data]'"
        ) from None
