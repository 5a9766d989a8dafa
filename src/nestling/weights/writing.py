"""Writing safetensors checkpoints front to back, in pieces: never a whole tensor in memory unless it comes so."""

import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Self

import numpy as np
import xxhash

from nestling.errors import NestlingError, nearest
from nestling.weights.checkpoint import INDEX, SINGLE
from nestling.weights.files import reason, write_file_atomically
from nestling.weights.header import ITEMSIZE, Typed

SHARD_BYTES = 5 * 10**9
HASH = "xxh3_128"  # as fast as memory: SHA-256 alone would take longer than copying the weights


@dataclass(frozen=True)
class Planned(Typed):
    """A tensor to be written."""


def write_weights(
    directory: Path,
    tensors: Sequence[Planned],
    produce: Callable[[str], Iterable[Any]],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """Write tensors one by one; `produce(name)` yields a tensor's bytes in pieces. Returns the hash of each file."""
    from concurrent.futures import Future, ThreadPoolExecutor  # takes 5 ms, and slices write without

    with WeightsWriter(directory, tensors, shard_bytes) as writer, ThreadPoolExecutor(1) as thread:
        written: Future[None] = thread.submit(lambda: None)
        for tensor in writer.order:
            for data in produce(tensor.name):
                written.result()
                written = thread.submit(writer.write, tensor.name, data)
        written.result()
    return writer.digests


def writing_order(tensors: Sequence[Planned]) -> list[Planned]:
    """Wider types first: safetensors allows no padding, and readers need each tensor aligned to its item size."""
    return sorted(tensors, key=lambda tensor: -tensor.itemsize)


class WeightsWriter:
    """One `model.safetensors`, or shards of at most `shard_bytes` (or one tensor) and an index, being written.

    Tensors are written in `order`, each by as many calls of `write` or `place` as it takes, one after the other from
    any thread. After the block `digests` has the XXH3-128 of each file by name.
    """

    def __init__(self, directory: Path, tensors: Sequence[Planned], shard_bytes: int = SHARD_BYTES) -> None:
        _check_planned(tensors)
        self.directory = directory
        self.order = writing_order(tensors)
        self.digests: dict[str, str] = {}
        self._shards = _name_shards(_fill_shards(self.order, shard_bytes))
        self._todo = [(name, tensor) for name, shard in self._shards.items() for tensor in shard]
        self._done = 0  # bytes of the tensor at hand
        self._at = 0  # its place in the plan
        self._files: list[_OpenFile] = []

    def write(self, name: str, data: Any) -> None:
        """The next bytes of the tensor at hand, or the first ones of the next: any contiguous buffer."""
        self.place(name, data)()

    def place(self, name: str, data: Any) -> Callable[[], None]:
        """Give the next bytes their place, and return what writes them there: in any order, from any thread."""
        view = np.frombuffer(data, np.uint8).data
        while self._todo[self._at][1].name != name:
            self._end_tensor()
        self._done += len(view)
        if self._done > self._todo[self._at][1].nbytes:
            raise self._unplanned()
        return self._open().place(view)

    def _end_tensor(self) -> None:
        if self._done != self._todo[self._at][1].nbytes:
            raise self._unplanned()
        self._open()
        self._at, self._done = self._at + 1, 0

    def _unplanned(self) -> NestlingError:
        tensor = self._todo[self._at][1]
        return NestlingError(f"tensor {tensor.name!r}: {self._done} bytes were produced, {tensor.nbytes} were planned")

    def _open(self) -> "_OpenFile":
        """The file of the tensor at hand."""
        name = self._todo[self._at][0]
        if not self._files or self._files[-1].path.name != name:
            header = _header(self._shards[name])
            nbytes = len(header) + sum(tensor.nbytes for tensor in self._shards[name])
            self._files.append(_OpenFile(self.directory / name, nbytes))
            self._files[-1].place(memoryview(header))()
        return self._files[-1]

    def _finish(self) -> None:
        while self._at < len(self._todo):
            self._end_tensor()
        self.digests |= {file.path.name: file.digest for file in self._files}
        if len(self._shards) > 1:
            self._write_index()

    def _write_index(self) -> None:
        where = {tensor.name: name for name, tensor in self._todo}
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in self.order)}, "weight_map": where}
        data = (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
        write_file_atomically(self.directory / INDEX, data, flush=False)
        self.digests[INDEX] = xxhash.xxh3_128_hexdigest(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for file in self._files:
                with suppress(NestlingError):
                    file.close()


class _OpenFile:
    """A new file of `nbytes`, hashed in order and written in any; it is closed when it is whole."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path = path
        self._digest = xxhash.xxh3_128()
        self._placed = 0
        self._missing = nbytes
        self._counting = Lock()
        try:
            self._file: io.FileIO = open(path, "xb", buffering=0)  # noqa: SIM115 - lives longer than a block
        except OSError as error:
            raise self._failed(error) from error

    @property
    def digest(self) -> str:
        """The hash."""
        return self._digest.hexdigest()

    def place(self, view: memoryview) -> Callable[[], None]:
        """The next bytes; what is returned writes them."""
        at, self._placed = self._placed, self._placed + len(view)
        self._digest.update(view)
        return partial(self._write, view, at)

    def _write(self, view: memoryview, at: int) -> None:
        try:
            rest = view
            while rest:  # the system may take only a part, above all of more than 2 GiB
                done = os.pwrite(self._file.fileno(), rest, at)
                rest, at = rest[done:], at + done
        except Exception as error:
            raise self._failed(error) from error
        with self._counting:
            self._missing -= len(view)
            whole = not self._missing
        if whole:
            self.close()

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:  # a network file system may say only now that it is full
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> NestlingError:
        return NestlingError(f"{self.path}: cannot be written: {reason(error) or type(error).__name__}")


def _check_planned(tensors: Sequence[Planned]) -> None:
    seen = set()
    for tensor in tensors:
        if tensor.dtype not in ITEMSIZE:
            raise NestlingError(f"tensor {tensor.name!r}: type {tensor.dtype!r}; {nearest(tensor.dtype, ITEMSIZE)}")
        if tensor.name in seen:
            raise NestlingError(f"tensor {tensor.name!r} would be written twice")
        seen.add(tensor.name)


def _fill_shards(tensors: Sequence[Planned], shard_bytes: int) -> list[list[Planned]]:
    """Fill one shard after the other, in order."""
    shards: list[list[Planned]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def _name_shards(shards: list[list[Planned]]) -> dict[str, list[Planned]]:
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{n:05}-of-{len(shards):05}.safetensors": shard for n, shard in enumerate(shards, 1)}


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
