"""Records of PhysioNet's WFDB: headers, and samples that are checked against them.

Headers and samples of format 16, such as those of PTB-XL and ICBEB2018, are read directly, because the package wfdb
takes several milliseconds for each header. wfdb reads the samples of every other format, by a header that has nothing
else: it refuses some dates, units and names. Records are written directly.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from tgdp_fast.ecg.records.leads import find_leads, signed_leads
from tgdp_fast.runtime.optional import optional

_HEADER_BYTES = 1 << 20  # a longer header is none
_INVALID = -32768  # of format 16: no sample
_FORMAT = re.compile(r"(\d+)(?:x(\d+))?(?::(\d+))?(?:\+(\d+))?")
_NUMBER = re.compile(r"[-+]?[\d.]")  # how one begins
_GAIN = re.compile(r"([-+]?[\d.]+(?:[eE][-+]?\d+)?)(?:\(([-+\d.eE]+)\))?(?:/(.*))?")
# Symbols and names of prefixes, and one unit in mV. The micro sign has two code points, and is a byte in Latin-1. "MV"
# is mV: no lead is in megavolts, and some devices write capitals alone.
_PREFIXES = (
    (("p", "pico"), 1e-9),
    (("n", "nano"), 1e-6),
    (("u", "\N{MICRO SIGN}", "\N{GREEK SMALL LETTER MU}", "\udcb5", "micro"), 1e-3),
    (("m", "milli"), 1.0),
    (("", ""), 1e3),
    (("k", "kilo"), 1e6),
)
_MILLIVOLTS = {
    prefix + volt: scale for prefixes, scale in _PREFIXES for prefix in prefixes for volt in ("v", "volt", "volts")
}
_GAINS = 1e-30, 1e30  # per mV, which float32 holds with room for the quotient
_DEFAULT_GAIN = 200.0  # where a header gives none, or 0
_DEFAULT_RATE = 250.0
_RATES = 1e-6, 1e6  # Hz; others are damage
_LARGEST = 1 << 62  # samples, bytes
# Of one sample. 310 and 311 hold three samples in 32 bits.
_BITS = {"8": 8, "16": 16, "24": 24, "32": 32, "61": 16, "80": 8, "160": 16, "212": 12, "310": 32 / 3, "311": 32 / 3}
_BLOCK = 1 << 22  # samples that are read at once
#: Samples of each lead that are kept behind the seconds which are asked for: resampling looks ahead.
AHEAD = 1 << 14
_NO_RECORDS = frozenset({"__macosx", "$recycle.bin"})


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
    initial: int
    checksum: int | None
    name: str

    @property
    def fault(self) -> str | None:
        """Why the samples have no value in mV; None where they have one."""
        scale = _MILLIVOLTS.get(self.units.lower())
        if scale is None:
            return f"lead {self.name} is in {self.units}, which is no voltage"
        if not _GAINS[0] <= abs(self.gain / scale) <= _GAINS[1]:
            return f"lead {self.name} has the gain {self.gain:g} per {self.units}, which no lead has"
        return None

    @property
    def per_millivolt(self) -> float:
        """Gain per mV, of a signal without a fault."""
        return self.gain / _MILLIVOLTS[self.units.lower()]


@dataclass(frozen=True)
class RecordHeader:
    """A WFDB header.

    Attributes:
        rate: samples per second.
        length: samples of each signal; None where the header does not say it: all that the file holds.
        signals: in their order; "-aVR" is aVR with a negative gain.
        comments: without "#".
        stored: samples of each signal that the files hold, where the header does not say it and the format tells.
    """

    rate: float
    length: int | None
    signals: tuple[SignalHeader, ...]
    comments: tuple[str, ...]
    stored: int | None = None

    @property
    def leads(self) -> list[str]:
        """Names of the signals."""
        return [signal.name for signal in self.signals]

    @property
    def voltages(self) -> list[int]:
        """Places of the signals that are voltages; records hold pressures, flows and others beside them."""
        return [place for place, signal in enumerate(self.signals) if signal.fault is None]

    def find(self, leads: Sequence[str]) -> list[int]:
        """Places of leads, among the voltages.

        Raises:
            RecordError: one is no voltage.
            ValueError: one is missing, or there twice.
        """
        voltages = self.voltages
        try:
            return [voltages[at] for at in find_leads([self.signals[place].name for place in voltages], leads)]
        except ValueError:
            for place in find_leads(self.leads, leads):
                if fault := self.signals[place].fault:
                    raise RecordError(fault) from None
            raise

    def comment(self, key: str) -> str | None:
        """What follows "key:" in the first comment that begins so, in any case; None where none does."""
        for line in self.comments:
            name, colon, value = line.partition(":")
            if colon and name.strip().lower() == key.lower():
                return value.strip()
        return None

    @property
    def files(self) -> dict[str, list[int]]:
        """Places of the signals of each file."""
        found: dict[str, list[int]] = {}
        for place, signal in enumerate(self.signals):
            found.setdefault(signal.file, []).append(place)
        return found

    @property
    def plain(self) -> bool:
        """Whether all samples are of format 16, one after the other."""
        return all(each.format == "16" and each.samples_per_frame == 1 and each.skew == 0 for each in self.signals)


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
    def visible(self) -> list[tuple[str, list[str]]]:
        """Folders at any depth and the names of their files, without hidden ones and what systems leave behind ("._x",
        "__MACOSX"); linked folders are not entered.
        """
        found = []
        for place, folders, names in os.walk(self.path):
            folders[:] = sorted(name for name in folders if name[0] != "." and name.lower() not in _NO_RECORDS)
            found.append((place, sorted(name for name in names if name[0] != ".")))
        return found

    @cached_property
    def record_files(self) -> list[Path]:
        """Visible WFDB headers and MATLAB files at any depth."""
        return [Path(place, name) for place, names in self.visible for name in names if name.endswith((".hea", ".mat"))]

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


def parse_header(text: str, name: str = "") -> RecordHeader:
    """A header from its text (WFDB header format; its defaults where fields are left out).

    Args:
        text: with bytes that are not UTF-8 as in names of files.
        name: of the file, without ".hea".

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
    first = lines[0] if lines else ""
    # A name with blanks is known from that of the file.
    start = name if name and first.startswith(f"{name} ") else (first.split(None, 1) or [""])[0]
    record = [start, *first[len(start) :].split()]
    # The name may hold a folder; a number behind it counts segments, each of which has a line of two words.
    if re.search(r"/\d+$", start) and all(len(line.split()) < 3 for line in lines[1:2]):
        raise RecordError("the record has several segments, which are not read")
    try:
        count = int(record[1])
        rate = float(re.split(r"[/(]", record[2])[0]) if len(record) > 2 else _DEFAULT_RATE
        length = int(record[3]) if len(record) > 3 else 0
    except (IndexError, ValueError):
        raise RecordError(f"the header does not begin with a record line: {first[:60]!r}") from None
    if not _RATES[0] <= rate <= _RATES[1] or count < 1 or not 0 <= length <= _LARGEST:
        raise RecordError(f"the header says {count} signals of {length} samples at {rate:g} Hz")
    if len(lines) - 1 < count:
        raise RecordError(f"the header says {count} signals and describes {len(lines) - 1}")
    signals = [_signal(line, place) for place, line in enumerate(lines[1 : count + 1])]
    for place, lead, sign in signed_leads(tuple(signal.name for signal in signals)):
        signals[place] = signals[place]._replace(name=lead, gain=sign * signals[place].gain)
    return RecordHeader(rate, length or None, tuple(signals), tuple(comments))


def _signal(line: str, place: int) -> SignalHeader:
    fields = line.split(None, 8)
    try:
        if len(fields) > 3 and not (_FORMAT.fullmatch(fields[1]) and _NUMBER.match(fields[3])):
            fields = _fields_with_blanks(line)
        count = len(fields)
        baseline, gain, units = _gain(fields[2] if count > 2 else "0")
        zero = fields[4] if count > 4 else "0"
        layout = _format(fields[1])
        return SignalHeader(
            fields[0],
            *layout,
            gain,
            _integer(zero) if baseline is None else baseline,
            units,
            _integer(fields[5] if count > 5 else zero) if layout[0] == "8" else 0,
            int(fields[6]) if count > 6 else None,
            fields[8].strip() if count > 8 else f"signal {place}",
        )
    except (ValueError, IndexError, StopIteration):
        raise RecordError(f"the header's line of signal {place} is damaged: {line[:60]!r}") from None


def _fields_with_blanks(line: str) -> list[str]:
    """Fields of a line with blanks in the file's name, which ends before the first word that is a format, or in the
    units, which end before the next number.
    """
    start = next(word.start() for word in re.finditer(r"\S+", line) if word.start() and _FORMAT.fullmatch(word[0]))
    words = line[start:].split()
    end = next((at for at, word in enumerate(words[2:], 2) if _NUMBER.match(word)), len(words))
    rest = line[start:].split(None, end + 5)[end:]
    return [line[:start].rstrip(), words[0], " ".join(words[1:end]), *rest]


# The same few texts stand in every header of a data set.
@lru_cache(maxsize=256)
def _format(text: str) -> tuple[str, int, int, int]:
    found = _FORMAT.fullmatch(text)
    if found is None:
        raise ValueError(text)
    return found[1], int(found[2] or 1), int(found[3] or 0), _integer(found[4] or "0", _LARGEST)


@lru_cache(maxsize=256)
def _gain(text: str) -> tuple[int | None, float, str]:
    found = _GAIN.fullmatch(text)
    if found is None or not np.isfinite(float(found[1])):
        raise ValueError(text)
    return (
        None if found[2] is None else _integer(found[2]),
        float(found[1]) or _DEFAULT_GAIN,
        (found[3] or "").strip() or "mV",
    )


def _integer(text: str, most: int = 1 << 32) -> int:
    """A whole number up to ``most``, which some write as "0.0" or "1e3"."""
    value = float(text)
    if not (abs(value) <= most and value.is_integer()):
        raise ValueError(text)
    return int(value)


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
        header = parse_header(path.read_bytes().decode("utf-8-sig", errors="surrogateescape"), path.stem)
    except OSError as error:
        raise RecordError(f"{path.name} cannot be read: {error.strerror}") from None
    for signal in header.signals:
        if signal.samples_per_frame != 1 or signal.skew:
            raise RecordError(f"lead {signal.name} has several samples in a frame or a skew, which are not read")
    stored = []
    for name, places in header.files.items():
        check_relative(name)
        files.append(root.stamp(path.parent / name))
        stored.append(_stored(header, name, places, files[-1][1]))
    if header.length is None and None not in stored:
        header = replace(header, stored=min(count for count in stored if count is not None))
    return header, files


def _stored(header: RecordHeader, name: str, places: Sequence[int], size: int) -> int | None:
    """Samples of each signal in a file of ``size`` bytes; None where it is compressed and only reading tells."""
    first = header.signals[places[0]]
    bits = _BITS.get(first.format)
    if bits is None:
        return None
    expected = first.offset + math.ceil((header.length or 0) * len(places) * bits / 8)
    if size < expected:
        raise RecordError(f"{name} is truncated: it has {size} bytes, the header asks for {expected}")
    stored = int((size - first.offset) * 8 / bits) // len(places)
    if not stored:
        raise RecordError(f"{name} is truncated: it has 0 samples of each lead")
    return stored


def read_signals(
    path: Path, root: Root | None = None, *, leads: Sequence[str] | None = None, seconds: float | None = None
) -> tuple[np.ndarray, RecordHeader]:
    """Signals of a record in mV. Memory grows with what is kept, not with the record.

    Args:
        path: ``NAME.hea``.
        root: see :func:`read_header`.
        leads: their names; None: all that are voltages.
        seconds: kept from the start, with what resampling looks ahead; None: all.

    Returns:
        float32 [signals, samples], NaN where the record says that there is no sample; and the header of these signals.

    Raises:
        RecordError: as :func:`read_header`; or the samples do not have the header's checksum.
        ValueError: a lead is missing, or there twice.
        ImportError: wfdb is missing and the format is not 16.
    """
    header, _ = read_header(path, root)
    places = header.voltages if leads is None else header.find(leads)
    kept = replace(header, signals=tuple(header.signals[place] for place in places))
    baseline = np.array([[signal.baseline] for signal in kept.signals], np.float64).reshape(-1, 1)
    gain = np.array([[signal.per_millivolt] for signal in kept.signals], np.float32).reshape(-1, 1)
    wanted = math.inf if seconds is None else math.ceil(seconds * header.rate) + AHEAD
    sums, count, parts = np.zeros(len(header.signals), np.int64), 0, []
    for samples, missing in _blocks(path, header):
        sums += _column_sums(samples)
        if count < wanted:
            rows = slice(int(min(wanted - count, len(samples))))
            # Exact: a baseline as large as the samples may hide what differs between them.
            part = np.subtract(samples[rows, places].T, baseline, dtype=np.float64).astype(np.float32)
            part /= gain
            part[missing[rows, places].T] = np.nan
            parts.append(part)
        count += len(samples)
        if count >= wanted and all(signal.checksum is None for signal in header.signals):
            break
    else:
        _check_sums(header, sums & 0xFFFF)
    return np.ascontiguousarray(np.concatenate(parts, axis=1)), kept


def _column_sums(samples: np.ndarray) -> np.ndarray:
    """Of each signal. By rows of many samples first: ten times faster than numpy's sum of short rows."""
    wide = len(samples) // 64 * 64
    sums = samples[:wide].reshape(-1, 64 * samples.shape[1]).sum(axis=0, dtype=np.int64).reshape(64, -1).sum(axis=0)
    return sums + samples[wide:].sum(axis=0, dtype=np.int64)


def _check_sums(header: RecordHeader, found: np.ndarray) -> None:
    for signal, value in zip(header.signals, found, strict=True):
        # Additions modulo 2^16, in whatever type.
        if signal.checksum is not None and signal.checksum & 0xFFFF != value:
            raise RecordError(
                f"{signal.file} has another checksum in lead {signal.name} than its header: {value}, not "
                f"{signal.checksum & 0xFFFF}"
            )


def _blocks(path: Path, header: RecordHeader) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Samples [samples, signals] of all signals, and where there is none."""
    length = header.length or header.stored
    if length is None:
        raise RecordError(f"its header must say how many samples there are in the format {header.signals[0].format}")
    if not header.plain:
        yield from _read_by_wfdb(path, header, length)
        return
    step = max(1, _BLOCK // len(header.signals))
    for start in range(0, length, step):
        samples = _read_plain(path.parent, header, start, min(step, length - start))
        yield samples, samples == _INVALID


def _read_plain(folder: Path, header: RecordHeader, start: int, count: int) -> np.ndarray:
    files = header.files
    samples = np.empty((count, len(header.signals)), "<i2")
    for name, places in files.items():
        offset = header.signals[places[0]].offset + 2 * start * len(places)
        try:
            content = np.fromfile(folder / name, "<i2", count * len(places), offset=offset)
        except OSError as error:
            raise RecordError(f"{name} cannot be read: {error.strerror or error}") from None
        if len(content) < count * len(places):
            raise RecordError(f"{name} is truncated: it has {start + len(content) // len(places)} samples of each lead")
        if len(files) == 1:
            return content.reshape(count, len(places))
        samples[:, places] = content.reshape(count, len(places))
    return samples


def _read_by_wfdb(path: Path, header: RecordHeader, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    wfdb = optional("wfdb", f"{path.name} has the format {header.signals[0].format}, which needs")
    step = max(1, _BLOCK // len(header.signals))
    initial = [signal.initial for signal in header.signals]
    with TemporaryDirectory() as place:
        names = {name: f"{number}.dat" for number, name in enumerate(header.files)}
        for name, link in names.items():
            _link(path.parent / name, Path(place, link))
        for start in range(0, length, step):
            stop = min(start + step, length)
            _write_bare_header(Path(place, "r.hea"), header, names, initial)
            try:
                record = wfdb.rdrecord(str(Path(place, "r")), sampfrom=start, sampto=stop, physical=False)
                samples = np.asarray(record.d_signal)
                missing = np.isnan(record.dac())
            except Exception as error:  # whatever a damaged file makes of it
                text = str(error)
                for name, link in names.items():
                    text = text.replace(str(Path(place, link)), name)
                raise RecordError(f"wfdb cannot read {path.name}: {text}") from None
            if samples.ndim != 2 or samples.shape[1] != len(header.signals):
                raise RecordError(f"wfdb reads {path.name} as samples of shape {list(samples.shape)}")
            if len(samples) < stop - start:
                raise RecordError(f"{header.signals[0].file} is truncated: it has {len(samples)} samples of each lead")
            yield samples, missing
            initial = samples[-1].tolist()  # format 8 holds differences


def _link(file: Path, link: Path) -> None:
    try:
        link.symlink_to(os.path.abspath(file))
    except OSError:  # systems without links
        shutil.copyfile(file, link)


def _write_bare_header(path: Path, header: RecordHeader, names: Mapping[str, str], initial: Sequence[int]) -> None:
    """What tells about samples alone."""
    lines = [f"r {len(header.signals)} 1 {header.length or header.stored}"]
    for place, (signal, first) in enumerate(zip(header.signals, initial, strict=True)):
        lines.append(f"{names[signal.file]} {signal.format}+{signal.offset} 200(0)/mV 0 0 {first} 0 0 s{place}")
    path.write_text("\n".join(lines) + "\n", encoding="ascii")


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
        signals, found = read_signals(path, leads=leads)
        return signals, found.rate
    except RecordError as error:
        raise ValueError(f"{path} must be the header of a WFDB record whose files are whole: {error}") from None
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
