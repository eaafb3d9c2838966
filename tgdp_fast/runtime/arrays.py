"""Arrays of the user: loading without pickle, checks before any work, standardization."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tgdp_fast.runtime.checks import check_device, check_integer
from tgdp_fast.runtime.npy import read_array
from tgdp_fast.runtime.reading import reason_of

Samples = TypeVar("Samples", np.ndarray, Tensor)

_MAPPED_BYTES = 64 * 1024**2  # larger .npy files are mapped, not read
_ROWS, _VALUES = 4_096, 2**23  # rows, and values, converted at once for statistics in float64
_ROUNDING = 1e-12  # relative, of statistics in float64
_FEW_COPIES = 0.1  # share of the rows; so few do not change a statistic of distances much


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
        array = read_array(file, mapped_bytes=_MAPPED_BYTES)
    except Exception as error:  # Damaged files raise errors of many types, from several libraries.
        raise ValueError(f"{name}: {path} cannot be read: {reason_of(error)}") from None
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

    Warns about features whose spread is lost in float32, such as time stamps.

    Raises:
        ValueError: not numeric, fewer than two dimensions, empty or too few samples, another event shape,
            NaN or infinite values (with their number and the first row), values beyond float32.
    """
    return CheckedArray.samples(
        name, array, minimum=minimum, event_shape=event_shape, event_of=event_of, keep_exact=False
    ).values


def _checked_samples(
    name: str, array: np.ndarray, checked: bool, minimum: int, event_shape: tuple[int, ...] | None, event_of: str
) -> np.ndarray:
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
    array = as_array(name, labels)
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

    Attributes:
        values: contiguous, float32 or int64.
        exact: samples as they were given in a wider type, if they are kept.
        lost: the feature whose spread float32 does not hold, in words, or nothing.
    """

    values: np.ndarray
    exact: np.ndarray | None = None
    lost: str = ""

    @classmethod
    def samples(
        cls,
        name: str,
        array: Any,
        *,
        minimum: int = 2,
        event_shape: tuple[int, ...] | None = None,
        event_of: str = "the source",
        keep_exact: bool = False,
    ) -> CheckedArray:
        """Check samples as :func:`check_samples`; ``keep_exact``: for a standardization, which keeps their spread."""
        given = array if isinstance(array, CheckedArray) else None
        found = as_array(name, array) if given is None else given.values
        values = _checked_samples(name, found, given is not None, minimum, event_shape, event_of)
        if given is None:
            wide = np.result_type(found.dtype, np.float32) != np.float32
            given = cls(values, found if wide and keep_exact else None, _lost_spread(found))
        if given.lost and not (keep_exact and given.exact is not None):
            warnings.warn(
                f"{name} is rounded to float32, where its spread is lost: {given.lost}. Subtract that offset in "
                "float64 first, or let TransferModel.fit standardise float64 data",
                stacklevel=3,
            )
        return given

    @property
    def with_spread(self) -> np.ndarray:
        """``values``, or ``exact`` if ``values`` have lost their spread."""
        return self.exact if self.lost and self.exact is not None else self.values

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


def _rows_at_once(array: np.ndarray) -> int:
    """Rows of [N, ...] that are converted together."""
    return max(1, min(_ROWS, _VALUES // max(1, math.prod(array.shape[1:]))))


def _lost_spread(array: np.ndarray) -> str:
    """The first feature (channel of [N, C, ...]) whose spread float32 does not hold, in words, or nothing.

    From at most 4,096 rows: an offset that is large for the spread shows in all of them.
    """
    rows = _rows_at_once(array)
    some = np.asarray(array[:: -(-len(array) // rows)], dtype=np.float64)
    axes = (0, *range(2, array.ndim))
    mean, std = some.mean(axis=axes), some.std(axis=axes)
    varies = std > _ROUNDING * np.abs(mean)
    # A large value that is constant in float32 was perhaps rounded to it before it came here.
    rounded = np.result_type(array.dtype, np.float32) == np.float32
    lost = _is_lost(mean, std) & (varies | (rounded & (_step(mean) > 1.0)))
    if not lost.any():
        return ""
    k = int(lost.argmax())
    return (
        f"feature {k} has mean {mean[k]:.6g}, standard deviation {std[k]:.3g} and steps of {_step(mean)[k]:.2g} there"
    )


def _step(value: np.ndarray) -> np.ndarray:
    """The distance of neighboring float32 numbers at a value."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return np.spacing(np.abs(value).astype(np.float32)).astype(np.float64)


def _is_lost(mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Whether float32 has fewer than 100 numbers within one standard deviation, or none of this size."""
    return np.asarray(~(_step(mean) <= 0.01 * std) | (std > np.finfo(np.float32).max))


def distinct_rows(x: Tensor) -> Tensor:
    """Indices, in order, of the first of all equal rows of ``x`` [N, ...]."""
    rows = np.ascontiguousarray(x.flatten(1).cpu().numpy() + 0.0)  # -0 is 0.
    _, first = np.unique(rows.view(f"V{rows.itemsize * rows.shape[1]}")[:, 0], return_index=True)
    return torch.from_numpy(np.sort(first)).to(x.device)


def without_copies(x: Tensor) -> Tensor:
    """``x`` [N, ...] without the rows that repeat another one, or ``x`` itself if those are at most a tenth."""
    first = distinct_rows(x)
    return x[first] if len(first) < (1.0 - _FEW_COPIES) * len(x) else x


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
            value = torch.as_tensor(getattr(self, name), dtype=torch.float64, device="cpu").detach()
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
        array = as_array("samples", samples)
        if array.ndim < 2 or array.size == 0 or (rows is not None and not len(rows)):
            chosen = "" if rows is None else f", {len(rows)} rows chosen"
            raise ValueError(f"samples must have shape [N, ...] and hold values, got {list(array.shape)}{chosen}")
        axes = (0, *range(2, array.ndim))
        number = len(array) if rows is None else len(rows)
        count = number * (array[0].size // array.shape[1])
        step = _rows_at_once(array)
        chunks = [
            slice(start, start + step) if rows is None else rows[start : start + step]
            for start in range(0, number, step)
        ]
        mean = sum(array[part].sum(axis=axes, dtype=np.float64) for part in chunks) / count
        center = mean.reshape(-1, *[1] * (array.ndim - 2))
        # Two passes: E x^2 - mean^2 would cancel.
        squares = sum(np.square(array[part] - center).sum(axis=axes, dtype=np.float64) for part in chunks)
        std = np.sqrt(squares / count)
        # A spread within the resolution of the value is rounding, not signal.
        exact = array.dtype.itemsize > 4 or (array.dtype.kind in "iu" and array.dtype.itemsize == 4)
        std[std <= (_ROUNDING if exact else np.finfo(np.float32).eps) * np.abs(mean)] = 1.0
        return cls(torch.from_numpy(center), torch.from_numpy(std.reshape(center.shape)))

    @classmethod
    def identity(cls, event_shape: tuple[int, ...]) -> Standardizer:
        """The map that changes nothing, for samples of ``event_shape``."""
        shape = (check_integer("event_shape[0]", event_shape[0], 1), *[1] * (len(event_shape) - 1))
        return cls(torch.zeros(shape, device="cpu"), torch.ones(shape, device="cpu"))

    def apply(self, samples: Samples) -> Samples:
        """(samples - mean) / std for an array or tensor [N, ...], in its own dtype; float32 for integers."""
        return self._mapped(samples, lambda x, mean, std: (x - mean) / std, False)

    def invert(self, samples: Samples) -> Samples:
        """samples * std + mean, the inverse of :meth:`apply`: float64 if float32 cannot hold it.

        Raises:
            OverflowError: the result of finite samples is not finite.
        """
        result = self._mapped(samples, lambda x, mean, std: x * std + mean, True)
        finite: Any = torch.isfinite if isinstance(result, Tensor) else np.isfinite
        if not finite(result).all() and finite(samples).all():
            mean, std = float(self.mean.abs().max()), float(self.std.max())
            raise OverflowError(
                f"samples in data units are not finite: the standardizer has mean up to {mean:.3g} and std up to "
                f"{std:.3g}; fit the model to data in smaller units"
            )
        return result

    @cached_property
    def exceeds_float32(self) -> bool:
        """Whether float32 does not hold the spread of a feature in data units."""
        mean, std = self.mean.numpy(), self.std.numpy()
        return bool((_is_lost(mean, std) & (std != 1.0)).any())  # 1: a constant feature.

    def _mapped(self, samples: Any, function: Callable[[Any, Any, Any], Any], inverse: bool) -> Any:
        if samples.ndim != self.mean.ndim + 1 or samples.shape[1] != self.mean.shape[0]:
            expected = ["N", self.mean.shape[0], *["..."] * (self.mean.ndim - 1)]
            raise ValueError(f"samples must have shape [{', '.join(map(str, expected))}], got {list(samples.shape)}")
        is_tensor = isinstance(samples, Tensor)
        samples = samples if is_tensor else as_array("samples", samples)
        is_float = samples.is_floating_point() if is_tensor else samples.dtype.kind == "f"
        own: Any = samples.dtype if is_float else torch.float32 if is_tensor else np.dtype(np.float32)
        wide = not is_float or own.itemsize < 4 or (own.itemsize == 4 and self.exceeds_float32)
        dtype: Any = (torch.float64 if is_tensor else np.dtype(np.float64)) if wide else own
        if inverse and self.exceeds_float32 and own.itemsize <= 4:
            own = dtype
        if is_tensor:
            mean, std = (value.to(device=samples.device, dtype=dtype) for value in (self.mean, self.std))
            return function(samples.to(dtype), mean, std).to(own)
        center, scale = (value.numpy().astype(dtype) for value in (self.mean, self.std))
        with np.errstate(over="ignore", invalid="ignore"):  # The callers look for it.
            # In parts: mapped samples may be as large as the memory.
            result, step = np.empty(samples.shape, own), _rows_at_once(samples)
            for start in range(0, len(samples), step):
                rows = slice(start, start + step)
                result[rows] = function(samples[rows].astype(dtype, copy=False), center, scale)
        return result

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


def as_array(name: str, value: Any) -> np.ndarray:
    """What a user gave as an array, in its own dtype: an array, a tensor, a table, or nested lists of them.

    Raises:
        ValueError: a path or None, rows of unequal shapes, no real numbers, masked values, a tensor that is sparse or
            quantized or holds no values.
    """
    if isinstance(value, str | os.PathLike):
        raise ValueError(f"{name} must be an array, got the path {os.fspath(value)!r}; read it with numpy.load")
    if value is None:
        raise ValueError(f"{name} must be an array, got None; numpy.load reads one from a file")
    try:
        array = np.asarray(_unmasked(name, value))
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        if isinstance(error, ArgumentError):
            raise
        raise ValueError(f"{name} must be an array, got a {type(value).__name__} of rows of unequal shapes") from None
    if array.dtype.kind == "O" and hasattr(value, "to_numpy"):  # A table with nullable columns.
        with suppress(ValueError, TypeError):
            array = value.to_numpy(dtype=np.float64, na_value=np.nan)
    if array.dtype == object and array.ndim == 0:
        raise ValueError(
            f"{name} must be an array or a tensor of samples [N, ...], got an object of type {type(value).__name__}"
        )
    _check_numeric(name, array)
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


def as_float64(name: str, value: Any) -> Tensor:
    """The same as a float64 tensor: a tensor on its device, all else on the CPU."""
    if isinstance(value, Tensor):
        return as_tensor(name, value).to(torch.float64)
    return torch.from_numpy(np.require(as_array(name, value), np.float64, ["C", "W"]))


def as_tensor(name: str, tensor: Tensor) -> Tensor:
    """A tensor of real numbers without its graph, if it holds its values one by one.

    Raises:
        ValueError: as :func:`as_array`.
    """
    kind, advice = "", ""
    if tensor.layout != torch.strided or tensor.is_nested:
        kind, advice = (
            "a nested tensor" if tensor.is_nested else f"a {tensor.layout} tensor",
            "convert it with tensor.to_dense()",
        )
    elif hasattr(tensor, "get_mask"):
        kind, advice = "a masked tensor", "fill or drop what is masked, with to_tensor(value)"
    elif tensor.is_quantized:
        kind, advice = f"a quantized tensor, {tensor.dtype}", "convert it with tensor.dequantize()"
    elif tensor.is_meta:
        kind, advice = "a tensor on the device meta, which holds no values", "pass the data themselves"
    if kind:
        raise ArgumentError(f"{name} must be a dense array of numbers, got {kind}; {advice}")
    if tensor.is_complex():
        raise ArgumentError(f"{name} must hold real numbers, got dtype {tensor.dtype}{_NUMERIC_ADVICE['c']}")
    return tensor.detach().resolve_conj().resolve_neg()


class ArgumentError(ValueError):
    """A ValueError that names the argument already."""


def _unmasked(name: str, value: Any) -> Any:
    """The value, with the tensors in it as arrays; refused if anything in it is masked."""
    if isinstance(value, Tensor):
        value = as_tensor(name, value).cpu()
        # numpy has none of the others.
        known = value.dtype in _NUMPY_FLOATS or not value.is_floating_point()
        return (value if known else value.float()).numpy()
    mask = getattr(value, "mask", None)
    if isinstance(mask, np.ndarray | np.bool) and np.any(mask.view(bool) if mask.dtype.names else mask):
        flags = np.atleast_1d(mask)
        rows = flags.reshape(len(flags), -1)
        number = int(np.count_nonzero(rows.view(bool) if rows.dtype.names else rows))
        first = "" if rows.dtype.names else f", first in row {int(rows.any(axis=1).argmax())}"
        raise ArgumentError(
            f"{name} must not hold masked values, but {number} of {flags.size} are masked{first}; drop those rows, or "
            "fill the values with array.filled(number)"
        )
    if isinstance(value, np.ma.MaskedArray):
        return value.data
    if isinstance(value, list | tuple) and not all(isinstance(item, int | float) for item in value):
        return [_unmasked(name, item) for item in value]
    return value


_NUMPY_FLOATS = (torch.float16, torch.float32, torch.float64)

_NUMERIC_ADVICE = {
    "U": "; convert texts that are numbers with array.astype(float), and classes to indices 0, 1, ...",
    "S": "; convert texts that are numbers with array.astype(float), and classes to indices 0, 1, ...",
    "c": "; make the real and the imaginary part two features, numpy.concatenate([x.real, x.imag], axis=1)",
    "O": "; convert with array.astype(float), once all rows have one shape",
    "V": "; choose its columns and stack them, numpy.stack([x[name] for name in x.dtype.names], axis=1)",
    "M": "; subtract a reference date and divide by a unit, (x - x.min()) / numpy.timedelta64(1, 's')",
    "m": "; divide by a unit, x / numpy.timedelta64(1, 's')",
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
