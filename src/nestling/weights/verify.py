"""`nestling verify`: is a checkpoint what it says it is, and is it inside the elastic one it was cut from?"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from nestling.arch.submodel import Submodel, tensors
from nestling.errors import NestlingError
from nestling.weights.checkpoint import NUMPY, Entry, gather
from nestling.weights.elastic import Elastic, open_elastic
from nestling.weights.output import read_json
from nestling.weights.transform import SLICE_FILE, prefixes

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
    record = elastic.checkpoint.path / SLICE_FILE
    expected = read_json(record).get("sha256") if record.is_file() else elastic.sidecar.get("sha256")
    if not isinstance(expected, dict):
        return []
    for name, digest in expected.items():
        file = elastic.checkpoint.path / name
        if not file.is_file() or _sha256(file) != digest:
            raise NestlingError(f"{file}: is not what was written here (SHA-256 differs); cut or download it again")
    return [f"{len(expected)} weight files have their recorded SHA-256"]


def _sha256(file: Path) -> str:
    with open(file, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


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
    submodel = _recorded(small, whole)
    for tensor in tensors(whole.architecture, submodel):
        mine, source = small.checkpoint.entries.get(tensor.name), whole.checkpoint.entries[tensor.source]
        positions = tensor.layout.positions(tensor.full, prefixes(tensor, {}))
        same = mine is not None and mine.shape == tensor.shape and mine.dtype == source.dtype
        if mine is None or not same or not _equal(gather(mine, [None] * len(mine.shape)), gather(source, positions)):
            raise NestlingError(
                f"{small.checkpoint.path}: {tensor.name} is not the prefix of {tensor.source} in {source.file}"
            )
        advance(mine.nbytes)


def _recorded(small: Elastic, whole: Elastic) -> Submodel:
    """Which sub-model of `whole` a slice is: cut from it, or cut from what `whole` was cut from too."""
    record, outer = (e.checkpoint.path / SLICE_FILE for e in (small, whole))
    if not record.is_file():
        raise NestlingError(f"{small.checkpoint.path} has no {SLICE_FILE}; only slices can be looked up inside a model")
    cut = read_json(record)
    if outer.is_file() and Path(str(cut.get("source"))).resolve() != whole.checkpoint.path.resolve():
        return whole.submodel(
            _seen_from(small, whole, cut.get("submodel") or {}, read_json(outer).get("submodel") or {})
        )
    return whole.submodel(cut.get("submodel"))


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
