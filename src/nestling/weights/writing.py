"""Writing safetensors checkpoints as a stream: never a whole tensor in memory unless it comes so."""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nestling.errors import NestlingError, nearest
from nestling.weights.checkpoint import INDEX, ITEMSIZE, SINGLE, Typed
from nestling.weights.output import reason, write_file_atomically


@dataclass(frozen=True)
class Planned(Typed):
    """A tensor to be written."""


def write_weights(
    directory: Path,
    tensors: Sequence[Planned],
    produce: Callable[[str], Iterable[Any]],
    *,
    shard_bytes: int = 5 * 10**9,
    advance: Callable[[int], None] | None = None,
) -> dict[str, str]:
    """Stream tensors into one model.safetensors, or into shards of at most `shard_bytes` (or one tensor) and an index.

    `produce(name)` yields a tensor's bytes in pieces. It is called in the given order, except that within a file wider
    types come first: safetensors allows no padding, and readers need each tensor aligned to its item size. `advance`
    hears the bytes of each piece. Returns the SHA-256 of each file written, by name.
    """
    _check_planned(tensors)
    shards = _plan_shards(tensors, shard_bytes)
    if len(shards) == 1:
        return {SINGLE: _write_file(directory / SINGLE, shards[0], produce, advance)}
    digests: dict[str, str] = {}
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        digests[name] = _write_file(directory / name, shard, produce, advance)
        where |= {tensor.name: name for tensor in shard}
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)}, "weight_map": where}
    data = (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    write_file_atomically(directory / INDEX, data)
    return digests | {INDEX: hashlib.sha256(data).hexdigest()}


def _check_planned(tensors: Sequence[Planned]) -> None:
    seen = set()
    for tensor in tensors:
        if tensor.dtype not in ITEMSIZE:
            raise NestlingError(f"tensor {tensor.name!r}: type {tensor.dtype!r}; {nearest(tensor.dtype, ITEMSIZE)}")
        if tensor.name in seen:
            raise NestlingError(f"tensor {tensor.name!r} would be written twice")
        seen.add(tensor.name)


def _plan_shards(tensors: Sequence[Planned], shard_bytes: int) -> list[list[Planned]]:
    """Fill one shard after the other in the given order; within each, wider items first."""
    shards: list[list[Planned]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return [sorted(shard, key=lambda tensor: -tensor.itemsize) for shard in shards]


def _header(tensors: Sequence[Planned]) -> bytes:
    """Length and JSON of a safetensors header, padded so that the data starts at a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        offsets = [at, at + tensor.nbytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        at += tensor.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_file(
    path: Path,
    tensors: Sequence[Planned],
    produce: Callable[[str], Iterable[Any]],
    advance: Callable[[int], None] | None,
) -> str:
    """Write one safetensors file and return its SHA-256."""
    digest = hashlib.sha256()
    try:
        with open(path, "xb", buffering=0) as file:
            for data in _contents(tensors, produce, advance):
                digest.update(data)
                _write_all(file, data)
    except OSError as error:
        raise NestlingError(f"{path}: cannot be written: {reason(error)}") from error
    return digest.hexdigest()


def _contents(
    tensors: Sequence[Planned], produce: Callable[[str], Iterable[Any]], advance: Callable[[int], None] | None
) -> Iterator[memoryview]:
    """The header, then each tensor's bytes as they are produced; their number must be as planned."""
    yield memoryview(_header(tensors))
    for tensor in tensors:
        done = 0
        for data in produce(tensor.name):
            view = np.frombuffer(data, np.uint8).data
            done += len(view)
            yield view
            if advance:
                advance(len(view))
        if done != tensor.nbytes:
            raise NestlingError(f"tensor {tensor.name!r}: {done} bytes were produced, {tensor.nbytes} were planned")


def _write_all(file: io.FileIO, view: memoryview) -> None:
    """An unbuffered write may take only a part, above all of more than 2 GiB."""
    while view:
        view = view[file.write(view) :]
