"""`nestling verify`: is a checkpoint what it says it is, and is it inside the elastic one it was cut from?"""

from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from nestling.errors import NestlingError
from nestling.weights.checkpoint import NUMPY, Entry, open_regular
from nestling.weights.elastic import Elastic, open_elastic
from nestling.weights.gather import CHUNK_BYTES, gather
from nestling.weights.ranking import identity
from nestling.weights.slicing import SLICE_FILE, read_record, recorded_hashes
from nestling.weights.transform import Output
from nestling.weights.writing import HASH

_NOT_FINITE: dict[str, tuple[int, int]] = {"BF16": (0x7F80, 0x7F80), "F8_E4M3": (0x7F, 0x7F), "F8_E5M2": (0x7C, 0x7C)}
"""Types numpy lacks: (mask, value) of the bits that every infinity and NaN has."""

Advance = Callable[[int], None]


def verify(directory: str | Path, inside: str | Path | None = None, advance: Advance = lambda count: None) -> list[str]:
    """Check a checkpoint; returns one line per thing that was shown. What is wrong is a NestlingError.

    Shapes against the table and config against tensors, checksums where they were recorded, finite values; with
    `inside`, that every tensor is bit for bit the prefix of the elastic checkpoint's. advance: told of bytes read.
    """
    elastic = open_elastic(directory)
    shown = [f"config and {len(elastic.checkpoint.entries)} tensors agree with the table"]
    shown += _check_hashes(elastic)
    for entry in elastic.checkpoint.entries.values():
        _check_finite(entry)
        advance(entry.nbytes)
    shown.append("every value is finite")
    if inside is not None:
        whole = open_elastic(inside)
        _check_inside(elastic, whole, advance)
        shown.append(f"every tensor is a prefix of {inside}, bit for bit")
    return shown


def _check_hashes(elastic: Elastic) -> list[str]:
    expected = recorded_hashes(elastic)
    if expected and (loose := {entry.file.name for entry in elastic.checkpoint.entries.values()} - expected.keys()):
        raise NestlingError(f"{elastic.checkpoint.path / min(loose)}: was not written here (no {HASH} is recorded)")
    for name, digest in expected.items():
        file = elastic.checkpoint.path / name
        if not file.is_file() or _hash(file) != digest:
            raise NestlingError(f"{file}: is not what was written here ({HASH} differs); cut or download it again")
    return [f"{len(expected)} weight files have their recorded {HASH}"] if expected else []


def _hash(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with open_regular(file) as source:
        while data := source.read(CHUNK_BYTES):
            digest.update(data)
    return digest.hexdigest()


def _check_finite(entry: Entry) -> None:
    for chunk in gather(entry, [None] * len(entry.shape)):
        if not _finite(entry.dtype, chunk, entry.itemsize):
            raise NestlingError(f"{entry.file}: tensor {entry.name} has values that are not finite")


def _finite(dtype: str, chunk: np.ndarray, itemsize: int) -> bool:
    if dtype in _NOT_FINITE:
        mask, value = _NOT_FINITE[dtype]
        return not ((chunk.view(f"<u{itemsize}") & mask) == value).any()
    values = chunk.view(NUMPY[dtype]) if dtype in NUMPY else chunk
    return bool(np.isfinite(values).all())


def _check_inside(small: Elastic, whole: Elastic, advance: Advance) -> None:
    """Every tensor of the slice against what cutting it out of `whole` again would write."""
    record = read_record(small)
    if not record:
        raise NestlingError(f"{small.checkpoint.path} has no {SLICE_FILE}; only slices can be looked up inside a model")
    try:
        submodel = whole.submodel(_recorded(small, whole, record))
    except NestlingError as error:
        where = f"{small.checkpoint.path} is not inside {whole.checkpoint.path}"
        raise NestlingError(f"{where}: {error}") from None
    form, dtype = record.get("hetero", "auto"), record.get("dtype")
    output = Output(whole, submodel, identity(whole.architecture), form, dtype)
    for name, planned in output.planned.items():
        source, mine = whole.checkpoint.entries[name], small.checkpoint.entries.get(planned.name)
        same = mine is not None and (mine.dtype, mine.shape) == (planned.dtype, planned.shape)
        if mine is None or not same or not _equal(gather(mine, [None] * len(mine.shape)), output.read(name)):
            raise NestlingError(f"{small.checkpoint.path}: {planned.name} is not the prefix of {name} in {source.file}")
        advance(mine.nbytes)


def _recorded(small: Elastic, whole: Elastic, cut: dict[str, Any]) -> dict[str, Any]:
    """Which sub-model of `whole` a slice is: cut from it, or cut from what `whole` was cut from too."""
    outer = read_record(whole)
    if outer and cut.get("source_hashes") != recorded_hashes(whole):
        return _seen_from(small, whole, cut.get("submodel") or {}, outer.get("submodel") or {})
    return cut.get("submodel") or {}


def _seen_from(small: Elastic, whole: Elastic, inner: dict[str, Any], outer: dict[str, Any]) -> dict[str, Any]:
    """A slice's sub-model with its layers counted among those that a larger slice of the same model kept."""
    wanted, kept = inner.get("layers", []), outer.get("layers", [])
    if missing := [layer for layer in wanted if layer not in kept]:
        raise NestlingError(f"{small.checkpoint.path} has layer {missing[0]}, which {whole.checkpoint.path} has not")
    return {**inner, "layers": [kept.index(layer) for layer in wanted]}


def _equal(one: Iterable[np.ndarray], other: Iterable[np.ndarray]) -> bool:
    """Whether two streams of bytes are the same, however they are cut into chunks."""
    return all(a == b for a, b in zip_longest(_blocks(one), _blocks(other)))


def _blocks(chunks: Iterable[np.ndarray], size: int = 1 << 20) -> Iterator[bytes]:
    held = bytearray()
    for chunk in chunks:
        held += chunk.tobytes()
        while len(held) >= size:
            yield bytes(held[:size])
            del held[:size]
    yield bytes(held)
