"""`nestling verify`: is a checkpoint what it says it is, and is it inside the elastic one it was cut from?"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from nestling.arch.architecture import Architecture, block_axes
from nestling.arch.nemotron_h import FIELDS
from nestling.arch.submodel import Submodel
from nestling.errors import NestlingError
from nestling.weights.cut import Output
from nestling.weights.elastic import Elastic, open_elastic
from nestling.weights.files import open_regular, reason
from nestling.weights.gather import CHUNK_BYTES, gather
from nestling.weights.header import NUMPY, Entry
from nestling.weights.ranking import identity
from nestling.weights.side_files import SLICE_FILE
from nestling.weights.writing import HASH

_NOT_FINITE: dict[str, tuple[int, int]] = {
    "BF16": (0x7F80, 0x7F80),
    "F8_E4M3": (0x7F, 0x7F),  # no infinity
    "F8_E5M2": (0x7C, 0x7C),
    "F8_E4M3FNUZ": (0xFF, 0x80),  # one NaN, where others have a negative zero
    "F8_E5M2FNUZ": (0xFF, 0x80),
    "F8_E8M0": (0xFF, 0xFF),  # a power of two, or NaN
}
"""Types numpy lacks: (mask, value) of the bits that every infinity and NaN has."""

_OF_KIND = {
    "time_step_min": "M", "num_experts_per_tok": "E", "norm_topk_prob": "E", "routed_scaling_factor": "E"
}  # fmt: skip
"""Fields of an `Architecture` without an axis that only blocks of one kind read."""
_UNLIMITED = [0.0, float("inf")]  # the default of time_step_limit, which NVIDIA's own code clamps to

Advance = Callable[[int], None]


def verify(directory: str | Path, inside: str | Path | None = None, advance: Advance = lambda count: None) -> list[str]:
    """Check a checkpoint; returns one line per thing that was shown. What is wrong is a NestlingError.

    Shapes against the table and config against tensors, checksums where they were recorded, finite values; with
    `inside`, that every tensor is bit for bit the prefix of the elastic checkpoint's. advance: told of bytes read.
    """
    elastic = open_elastic(directory)
    whole = None if inside is None else open_elastic(inside)
    shown = [f"config and {len(elastic.checkpoint.entries)} tensors agree with the table"]
    shown += _check_hashes(elastic)
    for entry in elastic.checkpoint.entries.values():
        check_finite(entry)
        advance(entry.nbytes)
    shown.append("every value is finite")
    if whole is not None:
        _check_inside(elastic, whole, advance)
        shown.append(f"every tensor is a prefix of {inside}, bit for bit")
    return shown


def _check_hashes(elastic: Elastic) -> list[str]:
    expected = elastic.hashes
    if expected and (loose := {entry.file.name for entry in elastic.checkpoint.entries.values()} - expected.keys()):
        raise NestlingError(f"{elastic.checkpoint.path / min(loose)}: was not written here (no {HASH} is recorded)")
    for name, digest in expected.items():
        file = elastic.checkpoint.path / name
        if not file.is_file() or _hash(file) != digest:
            raise NestlingError(f"{file}: is not what was written here ({HASH} differs); cut or download it again")
    files = f"{len(expected)} weight files have their" if len(expected) > 1 else "1 weight file has its"
    return [f"{files} recorded {HASH}"] if expected else []


def _hash(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with open_regular(file) as source:
        try:
            while data := source.read(CHUNK_BYTES):
                digest.update(data)
        except OSError as error:
            raise NestlingError(f"{file}: cannot be read: {reason(error)}") from error
    return digest.hexdigest()


def check_finite(entry: Entry) -> None:
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
    if not (record := small.record):
        raise NestlingError(f"{small.checkpoint.path} has no {SLICE_FILE}; only slices can be looked up inside a model")
    try:
        submodel = whole.submodel(_recorded(small, whole, record))
    except NestlingError as error:
        where = f"{small.checkpoint.path} is not inside {whole.checkpoint.path}"
        raise NestlingError(f"{where}: {error}") from None
    output = Output(whole, submodel, identity(whole.architecture), record["hetero"], record.get("dtype"))
    if different := "; ".join(config_differences(small.checkpoint.config, output.config())):
        raise NestlingError(f"{small.checkpoint.path / 'config.json'}: not what cutting writes: {different}")
    for name, planned in output.planned.items():
        source, mine = whole.checkpoint.entries[name], small.checkpoint.entries.get(planned.name)
        same = mine is not None and (mine.dtype, mine.shape) == (planned.dtype, planned.shape)
        if mine is None or not same or not _equal(gather(mine, [None] * len(mine.shape)), output.read(name)):
            raise NestlingError(f"{small.checkpoint.path}: {planned.name} is not the prefix of {name} in {source.file}")
        advance(mine.nbytes)


def config_differences(mine: Mapping[str, Any], planned: Mapping[str, Any]) -> Iterator[str]:
    """Every field that changes the function and is not as cutting writes it, in either spelling of a config."""
    ours, theirs = (Architecture.from_config(config) for config in (mine, planned))
    kinds = set(theirs.hybrid_override_pattern)
    axes = set().union(*(block_axes(theirs, kind) for kind in ("model", *kinds)))
    pairs = {
        field.name: (getattr(ours, field.name), getattr(theirs, field.name))
        for field in fields(Architecture)
        if (field.name not in FIELDS or FIELDS[field.name].split()[-1] in axes)
        and _OF_KIND.get(field.name, theirs.hybrid_override_pattern) in theirs.hybrid_override_pattern
    }
    if "M" in kinds:
        limit = "time_step_limit"
        pairs[limit] = (mine.get(limit, _UNLIMITED), planned.get(limit, _UNLIMITED))
    pairs["tie_word_embeddings"] = (bool(mine.get(tied := "tie_word_embeddings")), bool(planned.get(tied)))
    yield from (f"{name} is {one!r}, not {other!r}" for name, (one, other) in pairs.items() if one != other)


def _recorded(small: Elastic, whole: Elastic, cut: Mapping[str, Any]) -> Mapping[str, Any]:
    """Which sub-model of `whole` a slice is: cut from it, or cut from what `whole` was cut from too."""
    if (outer := whole.record) and cut.get("source_hashes") != whole.hashes:
        return _seen_from(small, whole, cut["submodel"], outer["submodel"])
    return cut["submodel"]


def _seen_from(small: Elastic, whole: Elastic, inner: Mapping[str, Any], outer: Mapping[str, Any]) -> Mapping[str, Any]:
    """A slice's sub-model with its layers counted among those that a larger slice of the same model kept."""
    wanted, kept = (list(Submodel.from_json(spec).layers or ()) for spec in (inner, outer))
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
