"""Safetensors checkpoints as byte rows with an item size: BF16 and FP8 pass through unharmed, without torch.

Only safetensors and JSON are read, and nothing in a file is trusted before it is checked.
"""

import io
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nestling.errors import NestlingError, nearest
from nestling.weights.output import read_json, reason

ITEMSIZE: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
# What numpy can compute with; the other types are shown as unsigned bits of the same size.
NUMPY: Mapping[str, str] = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "F16": "<f2", "U32": "<u4", "I32": "<i4",
    "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8", "C64": "<c8",
}  # fmt: skip
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
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


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face model directory: its config.json and where each tensor lies, in the order of the files."""

    path: Path
    config: Mapping[str, Any]
    entries: Mapping[str, Entry]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Find and check every tensor of a model directory, reading no weights. Anything wrong is a NestlingError.

    `model.safetensors` wins over an index beside it, as in transformers.
    """
    path = Path(path)
    names = _list_directory(path)
    if "config.json" not in names:
        raise NestlingError(f"{path}: no config.json; a Hugging Face model directory is needed")
    config = read_regular_json(path / "config.json")
    if SINGLE in names:
        entries = {entry.name: entry for entry in read_header(path / SINGLE)}
    elif INDEX in names:
        entries = _read_shards(path)
    else:
        raise NestlingError(f"{path}: {_missing_weights(names)}")
    return Checkpoint(path, config, entries)


def _list_directory(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        raise NestlingError(f"{path}: no such directory; download the model first and give its local path") from None
    except NotADirectoryError:
        raise NestlingError(f"{path}: not a directory; give the model directory that holds config.json") from None
    except (OSError, ValueError) as error:
        raise NestlingError(f"{path}: cannot be read: {reason(error)}") from None


def _missing_weights(names: list[str]) -> str:
    found = [name for name in names if name.endswith(".safetensors")]
    if found:
        return f"neither {SINGLE} nor {INDEX}, only {found[0]!r}; restore the index that belongs to it"
    pickles = [name for name in names if Path(name).suffix in PICKLES]
    if pickles:
        convert = "load it where you trust it and call save_pretrained(DIR, safe_serialization=True)"
        return f"{pickles[0]!r} is a pickle, only safetensors and JSON are read; {convert}"
    return f"no weights: neither {SINGLE} nor {INDEX}"


def _read_shards(path: Path) -> dict[str, Entry]:
    """The tensors of every shard that the index names; index and shards must agree."""
    index = path / INDEX
    where = _read_index(index)
    entries: dict[str, Entry] = {}
    for shard in sorted(set(where.values())):
        for entry in read_header(path / shard):
            if entry.name in entries:
                both = f"{entries[entry.name].file.name} and {shard}"
                raise NestlingError(f"{path}: tensor {entry.name!r} is in two files, {both}; remove one")
            entries[entry.name] = entry
    for name, shard in where.items():
        if name not in entries or entries[name].file.name != shard:
            raise NestlingError(f"{index}: tensor {name!r} is not in {shard}, where the index says it is")
    return entries


def _read_index(index: Path) -> dict[str, str]:
    """The index's weight_map, tensor to file: each file named must lie in the directory of the index."""
    where = read_regular_json(index, unique=True).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise NestlingError(f"{index}: must have a weight_map from tensor names to file names")
    for name, shard in where.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise NestlingError(f"{index}: {name!r} is in {shard!r}; allowed: *.safetensors in the same directory")
        if not os.path.lexists(index.with_name(shard)):
            raise NestlingError(f"{index}: names {shard}, which is missing; download it again")
    return where


def _is_plain_name(name: str) -> bool:
    return name.endswith(".safetensors") and name.isprintable() and not any(mark in name for mark in "/\\:")


def read_header(file: str | Path) -> tuple[Entry, ...]:
    """The tensors of one safetensors file, by offset. They must fill it exactly: no hole, no overlap, no tail."""
    file = Path(file)
    with open_regular(file) as source:
        size = os.fstat(source.fileno()).st_size
        length = _header_length(file, source, size)
        header = _parse_header(file, _read(source, file, 8, length).tobytes())
    base = 8 + length
    entries = [_entry(file, base, name, spec) for name, spec in header.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: (entry.start, entry.nbytes))
    _check_cover(file, entries, base, size)
    return tuple(entries)


def _header_length(file: Path, source: io.FileIO, size: int) -> int:
    if size < 8:
        raise NestlingError(f"{file}: truncated: {size} bytes are no safetensors file; download it again")
    start = _read(source, file, 0, 8).tobytes()
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


def read_regular_json(file: Path, *, unique: bool = False) -> dict[str, Any]:
    """As `read_json`, of a regular file."""
    _check_regular(file)
    return read_json(file, unique=unique)


def open_regular(file: Path) -> io.FileIO:
    """Open a regular file, unbuffered."""
    _check_regular(file)
    try:
        return open(file, "rb", buffering=0)
    except OSError as error:
        raise NestlingError(f"{file}: cannot be read: {reason(error)}") from None


def _check_regular(file: Path) -> None:
    """Refuse what is missing, and a fifo or a device, which would hang or never end."""
    try:
        regular = stat.S_ISREG(os.stat(file).st_mode)
    except (OSError, ValueError) as error:
        raise NestlingError(f"{file}: cannot be read: {reason(error)}") from None
    if not regular:
        raise NestlingError(f"{file}: not a regular file")


def _read(source: io.FileIO, file: Path, start: int, length: int) -> np.ndarray:
    """`length` bytes from the offset `start`."""
    data = np.empty(length, np.uint8)
    read_into(source, file, start, data.data)
    return data


def read_into(source: io.FileIO, file: Path, start: int, view: memoryview) -> None:
    """Fill `view` with the bytes from the offset `start`."""
    try:
        source.seek(start)
        done = 0
        while done < len(view):
            count = source.readinto(view[done:])
            if not count:
                raise NestlingError(f"{file}: ends at byte {start + done}, {len(view) - done} before the tensor does")
            done += count
    except OSError as error:
        raise NestlingError(f"{file}: cannot be read: {reason(error)}") from error


def read_tensor(entry: Entry) -> np.ndarray:
    """The whole tensor. BF16 and the 8-bit floats come as their raw bits, uint16 or uint8."""
    with open_regular(entry.file) as source:
        data = _read(source, entry.file, entry.start, entry.nbytes)
    return data.view(NUMPY.get(entry.dtype, f"<u{entry.itemsize}")).reshape(entry.shape)
