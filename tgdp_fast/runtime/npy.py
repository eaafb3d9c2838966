"""Files of NumPy: ``.npy`` and ``.npz``, whose headers are compared with the file before memory is taken for them."""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from tgdp_fast.runtime.memory import in_bytes, machine_memory

_PICKLED = (
    "it holds Python objects, which are never unpickled because that can run arbitrary code; save a plain numeric array"
)
#: Archives beyond both are not unpacked: no samples are so uniform that they shrink so far.
_EXPANSION, _EXPANDED = 200, 2**28
_HEADER_BYTES = 10_000
_NUMBERS = "biufc"


def read_array(file: Path, mapped_bytes: int) -> np.ndarray:
    """The array in a ``.npy`` file, or the single one in a ``.npz``; its content decides which of the two it is.

    Args:
        file: an existing file.
        mapped_bytes: a larger ``.npy`` with this suffix is mapped copy-on-write instead of read.

    Returns:
        The array; an empty one where the dtype is not numeric, which callers refuse.

    Raises:
        Exception: of any type, if the file is damaged. No pickle is loaded.
    """
    size = file.stat().st_size
    with open(file, "rb") as handle:
        start = handle.read(6)
        if not start:
            raise ValueError("the file is empty; save the array again with numpy.save")
        if start.startswith(b"\x80"):
            raise ValueError(_PICKLED)
        if start.startswith(b"PK"):
            return _from_archive(handle, size)
        if start != b"\x93NUMPY":
            raise ValueError(
                f"it is not a NumPy file, whatever its name says (it starts with {start!r}); convert a text table "
                "with numpy.save(path, numpy.loadtxt(table))"
            )
        handle.seek(0)
        dtype = _header(handle, size)
        if dtype.kind not in _NUMBERS:
            return np.empty(0, dtype)
        mapped = file.suffix.lower() == ".npy" and size > mapped_bytes
        if not mapped:
            handle.seek(0)
            return npy.read_array(handle, allow_pickle=False)
    return np.asarray(np.load(file, mmap_mode="c", allow_pickle=False))


def _from_archive(handle: IO[bytes], size: int) -> np.ndarray:
    with zipfile.ZipFile(handle) as archive:
        members = archive.infolist()
        if len(members) != 1:
            names = ", ".join(member.filename.removesuffix(".npy") for member in members[:5])
            raise ValueError(f"it holds {len(members)} arrays ({names}), expected one")
        unpacked = members[0].file_size
        if unpacked > max(_EXPANSION * size, _EXPANDED):
            raise ValueError(
                f"it has {in_bytes(size)} and would unpack to {in_bytes(unpacked)}, as damaged and hostile files do; "
                "save the array uncompressed with numpy.save"
            )
        with archive.open(members[0]) as stream:
            dtype = _header(stream, unpacked)
        if dtype.kind not in _NUMBERS:
            return np.empty(0, dtype)
        with archive.open(members[0]) as stream:
            return npy.read_array(stream, allow_pickle=False)


def _header(stream: IO[bytes], size: int) -> np.dtype:
    """Dtype of the array whose file of ``size`` bytes starts here."""
    version = npy.read_magic(stream)
    packed = stream.read(2 if version == (1, 0) else 4)
    length = int.from_bytes(packed, "little")
    if length > _HEADER_BYTES:
        raise ValueError(f"its header has {length} characters, and that of an array of numbers at most {_HEADER_BYTES}")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(io.BytesIO(packed + stream.read(length)))
    if dtype.hasobject:
        raise ValueError(_PICKLED)
    if any(type(length) is not int or length < 0 for length in shape):
        raise ValueError(f"its header declares the shape {shape}, which no array has")
    count = math.prod(shape)
    declared, rest = count * dtype.itemsize, size - stream.tell()
    if declared > rest:
        raise ValueError(
            f"its header declares the shape {shape} of {dtype}, which takes {declared} bytes, but {rest} follow: it is "
            "damaged or truncated"
        )
    # As float32, as which samples are used.
    available = machine_memory()
    if available is not None and 4 * count > available:
        raise ValueError(
            f"its {count} values take {in_bytes(4 * count)} as float32, and this machine has {in_bytes(available)}; "
            "use fewer samples"
        )
    return dtype
