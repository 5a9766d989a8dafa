"""A safetensors file as byte rows with an item size: BF16 and FP8 pass through unharmed, without torch.

Nothing in a file is trusted before it is checked.
"""

import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nestling.errors import NestlingError, nearest
from nestling.weights.files import open_regular, read_bytes, read_into

ITEMSIZE: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip

# What numpy can compute with; the other types are shown as unsigned bits of the same size.
NUMPY: Mapping[str, str] = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "F16": "<f2", "U32": "<u4", "I32": "<i4",
    "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8", "C64": "<c8",
}  # fmt: skip

MAX_HEADER_BYTES = 100_000_000  # as the safetensors library

MAX_DIMS = 32


@dataclass(frozen=True)
class Typed:
    """A name, a safetensors type code such as "BF16", and a shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of one item."""
        return ITEMSIZE[self.dtype]

    @property
    def numel(self) -> int:
        """Number of items; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.numel * self.itemsize


@dataclass(frozen=True)
class Entry(Typed):
    """A stored tensor: its bytes are the `nbytes` from the absolute offset `start` of `file`, row-major."""

    file: Path
    start: int


def read_header(file: str | Path) -> tuple[Entry, ...]:
    """The tensors of one safetensors file, by offset. They must fill it exactly: no hole, no overlap, no tail."""
    file = Path(file)
    with open_regular(file) as source:
        size = os.fstat(source.fileno()).st_size
        length = _header_length(file, source, size)
        header = _parse_header(file, bytes(read_bytes(source, file, 8, length)))
    base = 8 + length
    entries = [_entry(file, base, name, spec) for name, spec in header.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: (entry.start, entry.nbytes))
    _check_cover(file, entries, base, size)
    return tuple(entries)


def _header_length(file: Path, source: io.FileIO, size: int) -> int:
    if size < 8:
        raise NestlingError(f"{file}: truncated: {size} bytes are no safetensors file; download it again")
    start = read_bytes(source, file, 0, 8)
    length = int.from_bytes(start, "little")
    if start == b"version ":
        raise NestlingError(f"{file}: a Git LFS pointer, not the weights; run `git lfs pull`")
    if length > MAX_HEADER_BYTES or length > size - 8:
        limit = min(MAX_HEADER_BYTES, size - 8)
        raise NestlingError(f"{file}: truncated or not safetensors: a header of {length} bytes, at most {limit} fit")
    return length


def _parse_header(file: Path, data: bytes) -> dict[str, Any]:
    try:
        header = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise NestlingError(f"{file}: broken safetensors header: {error}") from None
    if not isinstance(header, dict):
        raise NestlingError(f"{file}: broken safetensors header: must be a JSON object, is a {type(header).__name__}")
    metadata = header.get("__metadata__")
    if metadata is not None and not _is_text_map(metadata):
        raise NestlingError(f"{file}: broken safetensors header: __metadata__ must map strings to strings")
    return header


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a name appears twice")
    return value


def _entry(file: Path, base: int, name: str, spec: Any) -> Entry:
    """One line of the header as an Entry, checked on its own."""
    spec = spec if isinstance(spec, dict) else {}
    dtype, shape, offsets = (spec.get(key) for key in ("dtype", "shape", "data_offsets"))
    where = f"{file}: tensor {name!r}"
    if not _is_unicode(name):
        raise NestlingError(f"{where}: its name is not valid Unicode")
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise NestlingError(f"{where}: data type {dtype!r} cannot be read; {nearest(str(dtype), ITEMSIZE)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMS:
        raise NestlingError(f"{where}: shape {_short(shape)}; allowed: a list of at most {MAX_DIMS} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise NestlingError(f"{where}: data_offsets {_short(offsets)}; allowed: [begin, end]")
    entry = Entry(name, dtype, tuple(shape), file, base + offsets[0])
    if entry.nbytes != offsets[1] - offsets[0]:
        raise NestlingError(f"{where}: {dtype} {_short(shape)} does not fill data_offsets {_short(offsets)}")
    return entry


def _is_unicode(name: str) -> bool:
    """False for the lone surrogates that JSON can spell and UTF-8 cannot."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**48 for size in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_cover(file: Path, entries: list[Entry], base: int, size: int) -> None:
    """Refuse a hole or an overlap between tensors that are sorted by offset, and a file of another size."""
    end = base
    for entry in entries:
        if entry.start != end:
            what = "overlaps the tensor before it" if entry.start < end else f"leaves {entry.start - end} bytes unused"
            raise NestlingError(f"{file}: broken safetensors header: tensor {entry.name!r} {what}")
        end += entry.nbytes
    if end > size:
        raise NestlingError(f"{file}: truncated: {size} bytes, the header asks for {end}; download it again")
    if end < size:
        raise NestlingError(f"{file}: {size - end} bytes after the last tensor; download it again")


def read_tensor(entry: Entry) -> np.ndarray:
    """The whole tensor. BF16 and the 8-bit floats come as their raw bits, uint16 or uint8."""
    with open_regular(entry.file) as source:
        data = np.empty(entry.nbytes, np.uint8)
        read_into(source, entry.file, entry.start, data.data)
    return data.view(NUMPY.get(entry.dtype, f"<u{entry.itemsize}")).reshape(entry.shape)
