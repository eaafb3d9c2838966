"""Records of PhysioNet's WFDB: headers, and samples that are checked against them.

Records of format 16 with all signals in one file, such as those of PTB-XL and ICBEB2018, are read directly, because the
package wfdb takes several milliseconds for each header. wfdb reads every other format. Records are written directly.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tgdp_fast.ecg.records.leads import find_leads

_HEADER_BYTES = 1 << 20  # a longer header is none
_INVALID = -32768  # of format 16: no sample
_FORMAT = re.compile(r"(\d+)(?:x(\d+))?(?::(\d+))?(?:\+(\d+))?")
_GAIN = re.compile(r"([-+]?[\d.]+(?:[eE][-+]?\d+)?)(?:\(([-+]?\d+)\))?(?:/(\S+))?")
_MILLIVOLTS = {"mv": 1.0, "millivolt": 1.0, "uv": 1e-3, "µv": 1e-3, "μv": 1e-3, "microvolt": 1e-3, "v": 1e3}
_DEFAULT_GAIN = 200.0  # where a header gives none, or 0
_DEFAULT_RATE = 250.0
_BITS = {"8": 8, "16": 16, "24": 24, "32": 32, "61": 16, "80": 8, "160": 16, "212": 12}  # of one sample


#: Name in its folder, size, and time of change in ns.
FileStamp = tuple[str, int, int]


class RecordError(ValueError):
    """A record that cannot be used; the message is the reason."""


class SignalHeader(NamedTuple):
    """One signal's line of a header: where its samples are, and value = (sample - baseline) / gain in ``units``."""

    file: str
    format: str
    samples_per_frame: int
    skew: int
    offset: int
    gain: float
    baseline: int
    units: str
    checksum: int | None
    name: str

    @property
    def millivolts(self) -> float:
        """One unit in mV.

        Raises:
            RecordError: not a voltage.
        """
        scale = _MILLIVOLTS.get(self.units.lower())
        if scale is None:
            raise RecordError(f"lead {self.name} is in {self.units}, which is no voltage")
        return scale


@dataclass(frozen=True)
class RecordHeader:
    """A WFDB header: samples per second, samples of each signal (None: as many as the file holds), signals."""

    rate: float
    length: int | None
    signals: tuple[SignalHeader, ...]
    comments: tuple[str, ...]

    @property
    def leads(self) -> list[str]:
        """Names of the signals."""
        return [signal.name for signal in self.signals]

    def comment(self, key: str) -> str | None:
        """What follows "key:" in the first comment that begins so, in any case; None where none does."""
        for line in self.comments:
            name, colon, value = line.partition(":")
            if colon and name.strip().lower() == key.lower():
                return value.strip()
        return None

    @property
    def plain(self) -> bool:
        """Whether all samples lie in one file in format 16, one after the other."""
        first = self.signals[0]
        same = {(each.file, each.format, each.offset) for each in self.signals} == {(first.file, "16", first.offset)}
        return same and all(each.samples_per_frame == 1 and each.skew == 0 for each in self.signals)


class Root:
    """A folder that no path may leave, be it by ``..``, by an absolute path or by a link.

    Args:
        path: the folder; it may itself be a link.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._real = os.path.realpath(path)
        self._folders: dict[str, str] = {}

    def join(self, relative: str) -> Path:
        """A path that a table or a header names.

        Raises:
            RecordError: it is absolute or climbs out.
        """
        return self.path / check_relative(relative)

    @cached_property
    def record_files(self) -> list[Path]:
        """WFDB headers and MATLAB files at any depth; linked folders are not entered."""
        found = []
        for place, folders, names in os.walk(self.path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            found += [Path(place, name) for name in sorted(names) if name.endswith((".hea", ".mat"))]
        return found

    def relative(self, path: Path) -> str:
        """The path as seen from the folder, with slashes."""
        text, start = str(path), str(self.path) + os.sep
        # pathlib takes as long as reading a header.
        return text[len(start) :] if text.startswith(start) else os.path.relpath(path, self.path)

    def status(self, path: Path) -> os.stat_result:
        """Status of a regular file inside.

        Raises:
            RecordError: it is missing, no file, or lies elsewhere.
        """
        folder, name = os.path.split(path)
        real = self._folders.get(folder)
        if real is None:
            real = self._folders[folder] = os.path.realpath(folder)
        if not self._holds(real):
            raise RecordError(f"the path {self._shown(path)} leaves the folder by a link")
        try:
            status = os.lstat(os.path.join(real, name))
            if stat.S_ISLNK(status.st_mode):
                if not self._holds(os.path.realpath(path)):
                    raise RecordError(f"the path {self._shown(path)} leaves the folder by a link")
                status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            raise RecordError(f"{name} is missing") from None
        except OSError as error:
            raise RecordError(f"{name} cannot be read: {error.strerror}") from None
        if not stat.S_ISREG(status.st_mode):
            raise RecordError(f"{name} is not a file")
        return status

    def stamp(self, path: Path) -> FileStamp:
        """Name, size and time of change of a regular file inside.

        Raises:
            RecordError: as :meth:`status`.
        """
        status = self.status(path)
        return self.relative(path), status.st_size, status.st_mtime_ns

    def _holds(self, real: str) -> bool:
        return real == self._real or real.startswith(self._real.rstrip(os.sep) + os.sep)

    def _shown(self, path: Path) -> str:
        return repr(self.relative(path))


def check_relative(path: str) -> str:
    """Return ``path`` unless it is absolute or climbs out.

    Raises:
        RecordError: it does.
    """
    parts = path.replace("\\", "/").split("/")
    if not path or os.path.isabs(path) or ".." in parts or "\0" in path or parts[0].endswith(":"):
        raise RecordError(f"the path {path!r} leaves the folder")
    return path


def parse_header(text: str) -> RecordHeader:
    """A header from its text (WFDB header format; its defaults where fields are left out).

    Raises:
        RecordError: it does not follow the format, or the record has several segments.
    """
    lines, comments = [], []
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("#"):
            comments.append(line[1:].strip())
        elif line:
            lines.append(line)
    record = lines[0].split() if lines else []
    try:
        if "/" in record[0]:
            raise RecordError("the record has several segments, which are not read")
        count = int(record[1])
        rate = float(re.split(r"[/(]", record[2])[0]) if len(record) > 2 else _DEFAULT_RATE
        length = int(record[3]) if len(record) > 3 else 0
    except (IndexError, ValueError) as error:
        if isinstance(error, RecordError):
            raise
        shown = lines[0][:60] if lines else ""
        raise RecordError(f"the header does not begin with a record line: {shown!r}") from None
    if not (np.isfinite(rate) and rate > 0) or count < 1 or length < 0:
        raise RecordError(f"the header says {count} signals of {length} samples at {rate:g} Hz")
    if len(lines) - 1 < count:
        raise RecordError(f"the header says {count} signals and describes {len(lines) - 1}")
    signals = tuple(_signal(line, place) for place, line in enumerate(lines[1 : count + 1]))
    return RecordHeader(rate, length or None, signals, tuple(comments))


def _signal(line: str, place: int) -> SignalHeader:
    fields = line.split(None, 8)
    count = len(fields)
    try:
        baseline, gain, units = _gain(fields[2] if count > 2 else "0")
        if baseline is None:
            baseline = int(fields[4]) if count > 4 else 0
        return SignalHeader(
            fields[0],
            *_format(fields[1]),
            gain,
            baseline,
            units,
            int(fields[6]) if count > 6 else None,
            fields[8].strip() if count > 8 else f"signal {place}",
        )
    except (ValueError, IndexError):
        raise RecordError(f"the header's line of signal {place} is damaged: {line[:60]!r}") from None


# The same few texts stand in every header of a data set.
@lru_cache(maxsize=256)
def _format(text: str) -> tuple[str, int, int, int]:
    found = _FORMAT.fullmatch(text)
    if found is None:
        raise ValueError(text)
    return found[1], int(found[2] or 1), int(found[3] or 0), int(found[4] or 0)


@lru_cache(maxsize=256)
def _gain(text: str) -> tuple[int | None, float, str]:
    found = _GAIN.fullmatch(text)
    if found is None or not np.isfinite(float(found[1])):
        raise ValueError(text)
    return None if found[2] is None else int(found[2]), float(found[1]) or _DEFAULT_GAIN, found[3] or "mV"


def read_header(path: Path, root: Root | None = None) -> tuple[RecordHeader, list[FileStamp]]:
    """A header, checked against the files that it names without reading them.

    Args:
        path: ``NAME.hea``.
        root: the folder that no file may leave; None: that of the header.

    Returns:
        the header, and name (in ``root``), size and time of change (ns) of it and of each file it names.

    Raises:
        RecordError: a file is missing, lies outside of ``root`` or is truncated, or the format is not supported.
    """
    root = root or Root(path.parent)
    files = [root.stamp(path)]
    if files[0][1] > _HEADER_BYTES:
        raise RecordError(f"{path.name} is no header: it has {files[0][1]} bytes")
    try:
        header = parse_header(path.read_bytes().decode("utf-8", errors="replace"))
    except OSError as error:
        raise RecordError(f"{path.name} cannot be read: {error.strerror}") from None
    for signal in header.signals:
        if signal.samples_per_frame != 1 or signal.skew:
            raise RecordError(f"lead {signal.name} has several samples in a frame or a skew, which are not read")
    names = dict.fromkeys(signal.file for signal in header.signals)
    for name in names:
        check_relative(name)
        files.append(root.stamp(path.parent / name))
        _check_size(header, name, files[-1][1])
    return header, files


def _check_size(header: RecordHeader, name: str, size: int) -> None:
    signals = [signal for signal in header.signals if signal.file == name]
    bits = _BITS.get(signals[0].format)
    if bits is None or header.length is None:  # compressed: only reading tells
        return
    expected = signals[0].offset + -(-header.length * len(signals) * bits // 8)
    if size < expected:
        raise RecordError(f"{name} is truncated: it has {size} bytes, the header asks for {expected}")


def read_signals(path: Path, root: Root | None = None) -> tuple[np.ndarray, RecordHeader]:
    """All signals of a record in mV.

    Args:
        path: ``NAME.hea``.
        root: see :func:`read_header`.

    Returns:
        float32 [signals, samples], NaN where the record says that there is no sample; and the header.

    Raises:
        RecordError: as :func:`read_header`; or the samples do not have the header's checksum.
        ImportError: wfdb is missing and the format is not 16.
    """
    header, files = read_header(path, root)
    if header.plain:
        samples = _read_plain(path.parent / header.signals[0].file, header)
        missing = samples == _INVALID
    else:
        samples, missing = _read_by_wfdb(path, header)
    # Additions modulo 2^16, in whatever type.
    found = samples.sum(axis=0, dtype=np.int64) & 0xFFFF
    for signal, value in zip(header.signals, found, strict=True):
        if signal.checksum is not None and signal.checksum & 0xFFFF != value:
            raise RecordError(
                f"{signal.file} has another checksum in lead {signal.name} than its header: {value}, not "
                f"{signal.checksum & 0xFFFF}"
            )
    baseline = np.array([signal.baseline for signal in header.signals], np.float32)
    gain = np.array([signal.gain / signal.millivolts for signal in header.signals], np.float32)
    signals = np.ascontiguousarray(samples.T, dtype=np.float32)
    signals -= baseline[:, None]
    signals /= gain[:, None]
    if missing.any():
        signals[missing.T] = np.nan
    return signals, header


def _read_plain(file: Path, header: RecordHeader) -> np.ndarray:
    count, offset = len(header.signals), header.signals[0].offset
    try:
        content = np.fromfile(file, "<i2", -1 if header.length is None else header.length * count, offset=offset)
    except OSError as error:
        raise RecordError(f"{file.name} cannot be read: {error.strerror or error}") from None
    frames = len(content) // count
    if header.length is not None and frames < header.length or not frames:
        raise RecordError(f"{file.name} is truncated: it has {frames} samples of each lead")
    return content[: frames * count].reshape(frames, count)


def _read_by_wfdb(path: Path, header: RecordHeader) -> tuple[np.ndarray, np.ndarray]:
    try:
        import wfdb
    except ImportError:
        raise ImportError(
            f"{path.name} has the format {header.signals[0].format}, which needs wfdb; it is not installed, run: "
            "pip install 'tgdp_fast[ecg]'"
        ) from None
    try:
        record = wfdb.rdrecord(str(path.with_suffix("")), physical=False)
        samples = np.asarray(record.d_signal)
        missing = np.isnan(record.dac())
    except Exception as error:  # whatever a damaged file makes of it
        raise RecordError(f"wfdb cannot read {path.name}: {error}") from None
    if samples.ndim != 2 or samples.shape[1] != len(header.signals):
        raise RecordError(f"wfdb reads {path.name} as samples of shape {list(samples.shape)}")
    if header.length is not None and len(samples) < header.length:
        raise RecordError(f"{header.signals[0].file} is truncated: it has {len(samples)} samples of each lead")
    return samples, missing


def read_leads(header: str | os.PathLike[str], leads: Sequence[str]) -> tuple[np.ndarray, float]:
    """Some leads of a record.

    Args:
        header: ``NAME.hea``; the signals are in the files that it names.
        leads: their names, in any case.

    Returns:
        float32 [len(leads), samples] in mV, and samples per second.

    Raises:
        ValueError: no such record, a damaged one, or a lead is missing.
        ImportError: wfdb is missing and the record's format needs it.
    """
    path = Path(header)
    try:
        signals, found = read_signals(path)
    except RecordError as error:
        raise ValueError(f"{path} must be the header of a WFDB record whose files are whole: {error}") from None
    try:
        return signals[find_leads(found.leads, leads)], found.rate
    except ValueError as error:
        raise ValueError(f"{path} must have the leads {', '.join(leads)}: {error}") from None


def write_record(
    folder: Path, name: str, digital: np.ndarray, leads: Sequence[str], rate: float, units: int, comments: Sequence[str]
) -> None:
    """Write a record of format 16, byte for byte as the package wfdb writes it, but faster.

    Args:
        folder: it gets ``name.hea`` and ``name.dat``.
        name: of letters, digits, "_" and "-".
        digital: int16 [leads, samples], not -32768.
        leads: names.
        rate: samples per second.
        units: per mV.
        comments: lines of the header.
    """
    sums = digital.sum(axis=1, dtype=np.int64) & 0xFFFF
    lines = [f"{name} {len(leads)} {int(rate) if rate == int(rate) else rate} {digital.shape[1]}"]
    for lead, first, checksum in zip(leads, digital[:, 0].tolist(), sums.tolist(), strict=True):
        lines.append(f"{name}.dat 16 {float(units)}(0)/mV 16 0 {first} {checksum} 0 {lead}")
    lines += [f"# {comment}" for comment in comments]
    (folder / f"{name}.hea").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / f"{name}.dat").write_bytes(np.ascontiguousarray(digital.T, dtype="<i2").tobytes())
