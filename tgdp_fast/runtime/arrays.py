"""Arrays of the user: loading without pickle, checks before any work, standardization."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tgdp_fast.runtime.checks import check_device, check_integer

Samples = TypeVar("Samples", np.ndarray, Tensor)

_MAPPED_BYTES = 64 * 1024**2  # larger .npy files are mapped, not read
_ROWS, _VALUES = 4_096, 2**23  # rows, and values, converted at once for statistics in float64


def load_array(path: str | os.PathLike[str], name: str) -> np.ndarray:
    """Read one numeric array from ``.npy``, or from ``.npz`` with a single array; pickled objects are never
    loaded.

    A ``.npy`` above 64 MiB is mapped copy-on-write: rows are read when touched, and the file never changes.

    Args:
        path: the file.
        name: argument name for messages.

    Raises:
        ValueError: missing file, another format, Python objects inside, a damaged file, several arrays, no
            numbers.
    """
    file = Path(path)
    if not file.is_file():
        state = "is a folder" if file.is_dir() else "does not exist"
        raise ValueError(f"{name}: {path} {state}; expected a .npy or .npz file")
    if file.suffix.lower() not in (".npy", ".npz"):
        raise ValueError(
            f"{name}: {path} must be a .npy or .npz file, got {file.suffix or 'no suffix'}; convert it with numpy.save"
            f"{_conversion(file)}"
        )
    try:
        with open(file, "rb") as handle:
            start = handle.read(6)
        if not start:
            raise ValueError("the file is empty; save the array again with numpy.save")
        if not start.startswith((b"\x93NUMPY", b"PK", b"\x80")):  # .npy, .npz, a pickle
            raise ValueError(
                f"it is not a NumPy file, whatever its name says (it starts with {start!r}); convert a text table "
                "with numpy.save(path, numpy.loadtxt(table))"
            )
        mapped = file.suffix.lower() == ".npy" and file.stat().st_size > _MAPPED_BYTES
        loaded = np.load(file, mmap_mode="c" if mapped else None, allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            with loaded:
                if len(loaded.files) != 1:
                    raise ValueError(
                        f"it holds {len(loaded.files)} arrays ({', '.join(loaded.files[:5])}), expected one"
                    )
                loaded = loaded[loaded.files[0]]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        cause = str(error)
        if "pickle" in cause or "Object arrays" in cause:
            cause = (
                "it holds Python objects, which are never unpickled because that can run arbitrary code; "
                "save a plain numeric array"
            )
        raise ValueError(f"{name}: {path} cannot be read: {cause}") from None
    array = np.asarray(loaded)
    _check_numeric(name, array)
    return array


def check_samples(
    name: str,
    array: Any,
    *,
    minimum: int = 2,
    event_shape: tuple[int, ...] | None = None,
    event_of: str = "the source",
) -> np.ndarray:
    """Samples as a contiguous float32 array [N, ...], or a ValueError that says what is wrong where.

    Args:
        name: argument name for messages.
        array: array or tensor of numbers, [N, ...] with at least two dimensions; the values of a
            :class:`CheckedArray` are not checked again.
        minimum: smallest N accepted.
        event_shape: required shape of one sample.
        event_of: owner of that shape, for the message.

    Raises:
        ValueError: not numeric, fewer than two dimensions, empty or too few samples, another event shape,
            NaN or infinite values (with their number and the first row), values beyond float32.
    """
    checked = isinstance(array, CheckedArray)
    array = array.values if isinstance(array, CheckedArray) else _as_numpy(name, array)
    _check_numeric(name, array)
    if array.ndim < 2:
        advice = "; for scalar samples use array.reshape(-1, 1)" if array.ndim == 1 else ""
        raise ValueError(f"{name} must have shape [N, ...] with at least 2 dimensions, got {list(array.shape)}{advice}")
    if 0 in array.shape[1:]:
        raise ValueError(f"{name} must hold values, got the empty shape {list(array.shape)}")
    if len(array) < minimum:
        held = {0: "is empty", 1: "holds one sample"}.get(len(array), f"holds {len(array)} samples")
        raise ValueError(f"{name} must hold at least {minimum} samples, but it {held}: shape {list(array.shape)}")
    if event_shape is not None and array.shape[1:] != tuple(event_shape):
        raise ValueError(
            f"{name} holds samples of shape {list(array.shape[1:])}, but {event_of} has {list(event_shape)}; "
            "both must be arrays of the same kind of sample"
        )
    if checked:
        return array
    with np.errstate(over="ignore"):  # reported below as a value beyond float32
        result = np.ascontiguousarray(array, dtype=np.float32)
    with np.errstate(invalid="ignore"):  # inf - inf
        total = result.sum(dtype=np.float64)  # one pass, no temporary: details only if it fails
    if not np.isfinite(total):
        _report_non_finite(name, array, result)
    return result


def check_labels(name: str, labels: Any, count: int, num_classes: int | None = None) -> np.ndarray:
    """Labels as int64 [N] (one class each) or float32 [N, K] (multi-hot or soft), or a ValueError.

    Args:
        name: argument name for messages.
        labels: integers [N] in 0..K-1, or numbers [N, K] in [0, 1].
        count: the number of samples they belong to.
        num_classes: K; None accepts any.

    Raises:
        ValueError: the counts differ, classes are not integers or out of range, values leave [0, 1].
    """
    if isinstance(labels, CheckedArray):
        if len(labels) == count and labels.suits(num_classes):
            return labels.values
        labels = labels.values
    array = _as_numpy(name, labels)
    _check_numeric(name, array)
    if array.ndim not in (1, 2):
        raise ValueError(f"{name} must have shape [N] (classes) or [N, K] (multi-hot), got {list(array.shape)}")
    if len(array) != count:
        raise ValueError(f"{name} holds {len(array)} labels for {count} samples; expected one for each")
    if array.ndim == 1:
        if array.dtype.kind == "f":
            raise ValueError(f"{name} must be integers, got {array.dtype}; convert with labels.astype(int)")
        result = np.ascontiguousarray(array, dtype=np.int64)
        wrong = result < 0 if num_classes is None else (result < 0) | (result >= num_classes)
        if wrong.any():
            row = int(wrong.argmax())
            allowed = ">= 0" if num_classes is None else f"in 0..{num_classes - 1} ({num_classes} classes)"
            raise ValueError(f"{name} must be {allowed}, got {result[row]} in row {row}")
        return result
    if num_classes is not None and array.shape[1] != num_classes:
        raise ValueError(f"{name} has {array.shape[1]} columns, expected one for each of {num_classes} classes")
    soft = np.ascontiguousarray(array, dtype=np.float32)
    outside = ~((soft >= 0) & (soft <= 1))  # NaN too
    if outside.any():
        row, column = (int(index) for index in np.argwhere(outside)[0])
        raise ValueError(f"{name} must be in [0, 1], got {soft[row, column]} in row {row}, column {column}")
    return soft


@dataclass(frozen=True, eq=False)
class CheckedArray:
    """Samples or labels that have passed their check, for functions that would check or hash them again.

    Do not write to ``values`` afterwards.
    """

    values: np.ndarray

    @classmethod
    def samples(cls, name: str, array: Any, **requirements: Any) -> CheckedArray:
        """Check samples with :func:`check_samples`."""
        values = check_samples(name, array, **requirements)
        return array if isinstance(array, CheckedArray) else cls(values)

    @classmethod
    def labels(cls, name: str, labels: Any, count: int, num_classes: int | None = None) -> CheckedArray:
        """Check labels with :func:`check_labels`."""
        values = check_labels(name, labels, count, num_classes)
        return labels if isinstance(labels, CheckedArray) else cls(values)

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def num_classes(self) -> int:
        """For labels: number of columns of rows [N, K], or the largest class of [N] plus one."""
        return int(self.values.shape[1]) if self.values.ndim == 2 else int(self.values.max(initial=-1)) + 1

    def suits(self, num_classes: int | None) -> bool:
        """Whether these labels are valid for ``num_classes`` classes; None accepts any."""
        own = self.num_classes
        return num_classes is None or (own == num_classes if self.values.ndim == 2 else own <= num_classes)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of dtype, shape and bytes."""
        digest = hashlib.sha256(f"{self.values.dtype}{self.values.shape}".encode())
        digest.update(self.values.data)
        return digest.hexdigest()

    def tensor(self, device: str | torch.device | None = None) -> Tensor:
        """A tensor on ``device``; on the CPU it shares memory with ``values`` if they are writeable."""
        values = self.values if self.values.flags.writeable else self.values.copy()
        return torch.from_numpy(values).to(check_device(device or "cpu"))


@dataclass(frozen=True, eq=False)
class Standardizer:
    """An affine map to zero mean and unit standard deviation, per feature of [N, D] or per channel of [N, C,
    ...].

    Attributes:
        mean, std: float64, broadcastable to one sample: [D], or [C, 1, ...]. Constant features have std 1.
    """

    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            value = torch.as_tensor(getattr(self, name)).detach().to(device="cpu", dtype=torch.float64)
            object.__setattr__(self, name, value)
        if self.mean.shape != self.std.shape or not (self.mean.isfinite() & self.std.isfinite()).all():
            raise ValueError(
                f"mean and std must be finite and of one shape, got {list(self.mean.shape)} and {list(self.std.shape)}"
            )
        if not (self.std > 0).all():
            raise ValueError("std must be positive; use 1 for constant features")

    @classmethod
    def fit(cls, samples: np.ndarray | Tensor, *, rows: np.ndarray | None = None) -> Standardizer:
        """Statistics of ``samples`` [N, D] or [N, C, ...], accumulated in float64.

        Args:
            samples: a memory-mapped array is read in parts.
            rows: indices of the samples to use, such as the training part; None: all.
        """
        array = _as_numpy("samples", samples)
        if array.ndim < 2 or array.size == 0 or (rows is not None and not len(rows)):
            chosen = "" if rows is None else f", {len(rows)} rows chosen"
            raise ValueError(f"samples must have shape [N, ...] and hold values, got {list(array.shape)}{chosen}")
        axes = (0, *range(2, array.ndim))
        number = len(array) if rows is None else len(rows)
        count = number * (array[0].size // array.shape[1])
        step = max(1, min(_ROWS, _VALUES // array[0].size))
        chunks = [
            slice(start, start + step) if rows is None else rows[start : start + step]
            for start in range(0, number, step)
        ]
        mean = sum(array[part].sum(axis=axes, dtype=np.float64) for part in chunks) / count
        center = mean.reshape(-1, *[1] * (array.ndim - 2))
        # Two passes: E x^2 - mean^2 would cancel.
        squares = sum(np.square(array[part] - center).sum(axis=axes) for part in chunks)
        std = np.sqrt(squares / count)
        # A spread within float32's resolution of the value is rounding, not signal.
        std[std <= np.finfo(np.float32).eps * np.abs(mean)] = 1.0
        return cls(torch.from_numpy(center), torch.from_numpy(std.reshape(center.shape)))

    @classmethod
    def identity(cls, event_shape: tuple[int, ...]) -> Standardizer:
        """The map that changes nothing, for samples of ``event_shape``."""
        shape = (check_integer("event_shape[0]", event_shape[0], 1), *[1] * (len(event_shape) - 1))
        return cls(torch.zeros(shape, device="cpu"), torch.ones(shape, device="cpu"))

    def apply(self, samples: Samples) -> Samples:
        """(samples - mean) / std for an array or tensor [N, ...], in its own dtype."""
        mean, std = self._like(samples)
        return (samples - mean) / std

    def invert(self, samples: Samples) -> Samples:
        """samples * std + mean, the inverse of :meth:`apply`."""
        mean, std = self._like(samples)
        return samples * std + mean

    def _like(self, samples: Samples) -> tuple[Samples, Samples]:
        if samples.ndim != self.mean.ndim + 1 or samples.shape[1] != self.mean.shape[0]:
            expected = ["N", self.mean.shape[0], *["..."] * (self.mean.ndim - 1)]
            raise ValueError(f"samples must have shape [{', '.join(map(str, expected))}], got {list(samples.shape)}")
        if isinstance(samples, Tensor):
            return self.mean.to(samples), self.std.to(samples)
        return self.mean.numpy().astype(samples.dtype), self.std.numpy().astype(samples.dtype)

    def to_tensors(self) -> dict[str, Tensor]:
        """``{"mean", "std"}``, for a checkpoint."""
        return {"mean": self.mean, "std": self.std}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Standardizer:
        """Inverse of :meth:`to_tensors`."""
        missing = [name for name in ("mean", "std") if name not in tensors]
        if missing:
            raise ValueError(f"tensors must hold mean and std, but {' and '.join(missing)} is missing")
        return cls(tensors["mean"], tensors["std"])


def _as_numpy(name: str, value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        # numpy has no bfloat16.
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if isinstance(value, str | os.PathLike):
        raise ValueError(f"{name} must be an array, got the path {os.fspath(value)!r}; read it with numpy.load")
    if value is None:
        raise ValueError(f"{name} must be an array, got None; numpy.load reads one from a file")
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"{name} must be an array, got a {type(value).__name__} of rows of unequal shapes") from None
    if array.dtype == object and array.ndim == 0:
        raise ValueError(
            f"{name} must be an array or a tensor of samples [N, ...], got an object of type {type(value).__name__}"
        )
    return array


def _conversion(file: Path) -> str:
    """A line of Python that converts a table of numbers; nothing for other files."""
    separator = {".csv": ",", ".tsv": "\t"}.get(file.suffix.lower())
    if file.suffix.lower() == ".parquet":
        read = f"pandas.read_parquet({str(file)!r}).to_numpy(float)"
    elif separator is None:
        return ""
    else:
        with open(file, encoding="utf-8", errors="replace") as handle:
            first = handle.readline(100_000)
        try:
            header = not [float(cell) for cell in first.split(separator) if cell.strip()]
        except ValueError:
            header = True
        skipped = ", skip_header=1" if header else ""
        read = f"numpy.genfromtxt({str(file)!r}, delimiter={separator!r}{skipped})"
    return f", as in numpy.save({str(file.with_suffix('.npy'))!r}, {read}); a column of texts becomes NaN: leave it out"


_NUMERIC_ADVICE = {
    "U": "; convert texts that are numbers with array.astype(float), and classes to indices 0, 1, ...",
    "S": "; convert texts that are numbers with array.astype(float), and classes to indices 0, 1, ...",
    "c": "; make the real and the imaginary part two features, numpy.concatenate([x.real, x.imag], axis=1)",
    "O": "; convert with array.astype(float), once all rows have one shape",
}


def _check_numeric(name: str, array: np.ndarray) -> None:
    if array.dtype.kind not in "biuf":
        advice = _NUMERIC_ADVICE.get(array.dtype.kind, "")
        raise ValueError(f"{name} must hold real numbers, got dtype {array.dtype}{advice}")


def _report_non_finite(name: str, array: np.ndarray, converted: np.ndarray) -> None:
    bad = ~np.isfinite(converted)
    nan, infinite = int(np.isnan(array).sum()), int(np.isinf(array).sum())
    too_large = int(bad.sum()) - nan - infinite
    kinds = [
        f"{number} {'is' if number == 1 else 'are'} {kind}"
        for number, kind in ((nan, "NaN"), (infinite, "infinite"), (too_large, "beyond float32"))
        if number
    ]
    rows = bad.reshape(len(bad), -1).any(axis=1)
    raise ValueError(
        f"{name} must be finite, but of its {bad.size} values {' and '.join(kinds)}, in {int(rows.sum())} of "
        f"{len(rows)} rows, first in row {int(rows.argmax())}; drop or fill those rows"
    )
