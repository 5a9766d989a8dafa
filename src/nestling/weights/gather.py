"""Cut positions out of stored tensors as a stream of bytes, for one output or for several in a single reading.

A cut is, per dimension, the positions of the file in the order of the output. Permuting, slicing, zero-padding and
cutting several sizes at once are all this and nothing else.
"""

import io
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np

from nestling.errors import NestlingError
from nestling.weights.files import open_regular, read_ahead, read_into, read_scattered
from nestling.weights.header import Entry

ZERO = -1  # a position that nothing is read for: zeros in the output
CHUNK_BYTES = 2 << 20  # small enough for the processor's cache, large enough for the disk
RUN_BYTES = 64 << 10  # neighbours of at least so much are read alone, shorter ones with what lies between them
FEW_RUNS = 8  # columns in runs of at least so many items are copied run by run
MOST_VIEWS = 1024  # that one call may fill, in Linux and macOS

Positions = Sequence[np.ndarray | None]
"""One 1-D integer array per dimension, in any order and with repeats, `ZERO` among them; None takes all of it."""
Piece = tuple[int, np.ndarray]
"""Number of an output, and its next bytes."""
Reading = Callable[[], Iterator[Piece]]
"""Reads a chunk of a file, and cuts it."""


class Buffers:
    """Memory that is used again once nobody looks at it: asking the system for new pages costs more than reading.

    A thread gets what it gave back itself, which still is in the cache of its processor.
    """

    def __init__(self, nbytes: int = CHUNK_BYTES) -> None:
        self.nbytes = nbytes
        self._own = _Own()

    def empty(self, rows: int, width: int) -> np.ndarray:
        """A uint8 array [rows, width] with anything in it. Its memory comes back when its last view is gone."""
        if not self._fits(rows * width):
            return np.empty((rows, width), np.uint8)
        return self._unused().rows(rows, width)

    def spaced(self, rows: int, width: int, gap: int) -> tuple[np.ndarray, list[memoryview]] | None:
        """As `empty`, with views to fill it by a call that reads on: one per row, and one of nowhere per `gap` between.

        None where that takes more views than a call may have, or rows that are no buffer's.
        """
        if 2 * rows - 1 > MOST_VIEWS or not self._fits(rows * width):
            return None
        memory = self._unused()
        if memory.views_of != (rows, width, gap):
            memory.views_of, view = (rows, width, gap), memoryview(memory.data)
            nowhere = memoryview(bytearray(gap))
            kept = (view[at : at + width] for at in range(0, rows * width, width))
            memory.views = [each for row in kept for each in (row, nowhere)][:-1]
        return memory.rows(rows, width), memory.views

    def _fits(self, size: int) -> bool:
        return self.nbytes // 8 <= size <= self.nbytes

    def _unused(self) -> "_Memory":
        memory = next((each for each in self._own.memory if each.array() is None), None)
        if memory is None:
            memory = _Memory(self.nbytes)
            self._own.memory.append(memory)
        return memory


class _Memory:
    def __init__(self, nbytes: int) -> None:
        self.data = bytearray(nbytes)
        self.array: Callable[[], np.ndarray | None] = lambda: None  # a weak reference to what was last made of it
        self.views_of = (0, 0, 0)
        self.views: list[memoryview] = []  # of the last rows with gaps: making them takes as long as reading

    def rows(self, rows: int, width: int) -> np.ndarray:
        whole = np.frombuffer(self.data, np.uint8)  # every view of a view refers to this one
        self.array = weakref.ref(whole)
        return whole[: rows * width].reshape(rows, width)


class _Own(threading.local):
    """What one thread made."""

    def __init__(self) -> None:
        self.memory: list[_Memory] = []


def gather(
    entry: Entry, positions: Positions, chunk_bytes: int = CHUNK_BYTES, buffers: Buffers | None = None
) -> Iterator[np.ndarray]:
    """The bytes of `tensor[np.ix_(*positions)]`, row-major, as flat uint8 arrays of at most about `chunk_bytes`."""
    return (data for _, data in gather_all(entry, [positions], chunk_bytes, buffers))


def gather_all(
    entry: Entry, wanted: Sequence[Positions], chunk_bytes: int = CHUNK_BYTES, buffers: Buffers | None = None
) -> Iterator[Piece]:
    """For each output of `wanted` the bytes of its cut, as (number of the output, its next bytes).

    Outputs whose positions ascend share one pass, in which every byte of the file is read once. buffers: to share
    memory between calls. A position outside the tensor, or a file that ends too early, is a NestlingError.
    """
    return chain.from_iterable(read() for read in readings(entry, wanted, chunk_bytes, buffers))


def readings(
    entry: Entry, wanted: Sequence[Positions], chunk_bytes: int = CHUNK_BYTES, buffers: Buffers | None = None
) -> Iterator[Reading]:
    """`gather_all` a chunk of the file at a time, in calls that threads may do side by side."""
    checked = [_check_positions(entry, positions) for positions in wanted]
    depth = max((dim + 1 for cut in checked for dim, kept in enumerate(cut) if kept is not None), default=0)
    while depth < len(entry.shape) and entry.itemsize * math.prod(entry.shape[depth:]) > chunk_bytes:
        depth += 1
    item = entry.itemsize * math.prod(entry.shape[depth:])
    sizes, row = list(entry.shape[:depth]), item
    columns: list[_Columns | None] = [None] * len(checked)
    if depth > 1 and item * sizes[-1] <= chunk_bytes:  # cut items out of whole rows in memory
        row *= sizes.pop()
        columns = [None if (kept := cut[depth - 1]) is None else _columns(kept, item) for cut in checked]
    rows = [_row_numbers(sizes, cut[: len(sizes)]) for cut in checked]
    source = open_regular(entry.file)
    cutter = _Cutter(entry, source, row, item, chunk_bytes, buffers or Buffers())
    weakref.finalize(cutter, source.close).atexit = False
    return cutter.readings(rows, columns)


def _check_positions(entry: Entry, positions: Positions) -> list[np.ndarray | None]:
    """Positions as int64 arrays within the tensor; None where a whole dimension is taken in order."""
    where = f"{entry.file}: tensor {entry.name!r}"
    if len(positions) != len(entry.shape):
        raise NestlingError(f"{where}: {len(positions)} lists of positions for the shape {list(entry.shape)}")
    checked: list[np.ndarray | None] = []
    for dim, (wanted, size) in enumerate(zip(positions, entry.shape, strict=True)):
        if wanted is not None:
            assert wanted.ndim == 1
            assert wanted.dtype.kind in "iu" or not len(wanted)
            wanted = wanted.astype(np.int64)
            if len(wanted) and (wanted.min() < ZERO or wanted.max() >= size):
                outside = wanted[(wanted < ZERO) | (wanted >= size)]
                raise NestlingError(f"{where}: position {outside[0]} in dimension {dim}; its size is {size}")
            if len(wanted) == size and np.array_equal(wanted, np.arange(size)):
                wanted = None
        checked.append(wanted)
    return checked


def _row_numbers(sizes: list[int], positions: list[np.ndarray | None]) -> np.ndarray:
    """Row-major numbers of `np.ix_(*positions)` in a block of these sizes, flat int64, `ZERO` where any of them is."""
    rows = np.zeros(1, np.int64)
    for size, wanted in zip(sizes, positions, strict=True):
        wanted = np.arange(size) if wanted is None else wanted
        rows = np.where((rows[:, None] < 0) | (wanted < 0), ZERO, rows[:, None] * size + wanted).ravel()
    return rows


def _blocks(rows: list[np.ndarray], count: int) -> Iterator[tuple[np.ndarray, list[tuple[int, np.ndarray]]]]:
    """At most `count` ascending rows to read at once, and what comes of them: (number of an output, its next rows)."""
    if len(rows) == 1 and (not len(rows[0]) or (rows[0][0] >= 0 and (rows[0][1:] > rows[0][:-1]).all())):
        for at in range(0, len(rows[0]), count):
            part = rows[0][at : at + count]
            yield part, [(0, part)]
        return
    filled = [np.maximum.accumulate(numbers) if len(numbers) else numbers for numbers in rows]
    if not all(((numbers < 0) | (numbers == f)).all() for numbers, f in zip(rows, filled, strict=True)):
        for output, numbers in enumerate(rows):
            for at in range(0, len(numbers), count):
                part = numbers[at : at + count]
                yield _distinct(part), [(output, part)]
        return
    union = _distinct(np.concatenate(filled), ZERO)
    for at in range(0, len(union), count):
        block = union[at : at + count]
        parts = [
            (output, numbers[np.searchsorted(f, block[0]) : np.searchsorted(f, block[-1], "right")])
            for output, (numbers, f) in enumerate(zip(rows, filled, strict=True))
        ]
        yield block[block >= 0], parts


def _distinct(rows: np.ndarray, least: int = 0) -> np.ndarray:
    """Ascending, each once, from `least` on."""
    rows = np.sort(rows[rows >= least])
    return rows[np.concatenate([[True], rows[1:] != rows[:-1]])] if len(rows) else rows


def _bounds(positions: np.ndarray) -> list[int]:
    """Where runs of neighbours, or of zeros, begin and end."""
    before, after = positions[:-1], positions[1:]
    joined = np.where(before < 0, after < 0, after == before + 1)
    return [0, *(np.flatnonzero(~joined) + 1).tolist(), len(positions)]


@dataclass(frozen=True)
class _Columns:
    """Items that are kept of each row: their numbers, and where their bytes go and come from, run by run."""

    numbers: np.ndarray
    runs: list[tuple[slice, slice | None]]  # None: zeros

    @property
    def only(self) -> slice | None:
        """Where all of them come from, if that is one run."""
        return self.runs[0][1] if len(self.runs) == 1 else None


def _columns(numbers: np.ndarray, item: int) -> _Columns:
    bounds = _bounds(numbers)
    runs: list[tuple[slice, slice | None]] = []
    for begin, end in zip(bounds, bounds[1:], strict=False):
        first = int(numbers[begin]) * item if len(numbers) else 0
        read = None if first < 0 else slice(first, first + (end - begin) * item)
        runs.append((slice(begin * item, end * item), read))
    return _Columns(numbers, runs)


@dataclass(frozen=True)
class _Cutter:
    """A stored tensor as rows of `row` bytes, each of items of `item` bytes."""

    entry: Entry
    source: io.FileIO
    row: int
    item: int
    chunk: int
    buffers: Buffers

    def readings(self, rows: list[np.ndarray], columns: list[_Columns | None]) -> Iterator[Reading]:
        """Per output its `rows` by number, cut to its `columns`, numbers of items."""
        if not self.row:
            return
        count = max(1, self.chunk // self.row)
        for wanted, parts in _blocks(rows, count):
            self._read_ahead(wanted)
            yield partial(self.pieces, wanted, parts, columns, count)

    def pieces(
        self, wanted: np.ndarray, parts: list[tuple[int, np.ndarray]], columns: list[_Columns | None], count: int
    ) -> Iterator[Piece]:
        """Read the rows that are `wanted`, and cut out of them each output's next ones, at most `count` in a piece."""
        if (read := self._read_columns(wanted, parts, columns)) is not None:
            yield parts[0][0], read
            return
        data = self.read(wanted)
        for output, numbers in parts:
            for at in range(0, len(numbers), count):  # zeros may make it longer than what was read
                rows = numbers if len(numbers) <= count else numbers[at : at + count]
                taken, kept = self._take(data, wanted, rows), columns[output]
                yield output, (taken if kept is None else self._cut_columns(taken, kept)).reshape(-1)

    def _read_ahead(self, rows: np.ndarray) -> None:
        """So that the disk is not idle while every thread writes. Rows far apart are not worth what is between them."""
        if len(rows) and (span := int(rows[-1] - rows[0] + 1)) <= 2 * len(rows):
            read_ahead(self.source, self.entry.start + int(rows[0]) * self.row, span * self.row)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """These ascending rows, uint8 [rows, row]. Short runs close together come with what is between them."""
        if not len(rows):
            return np.empty((0, self.row), np.uint8)
        low, span = int(rows[0]), int(rows[-1] - rows[0] + 1)
        if span == len(rows):
            return self._read_run(low, self.buffers.empty(span, self.row))
        bounds = _bounds(rows)
        if len(rows) * self.row < (len(bounds) - 1) * RUN_BYTES and span * self.row <= min(
            self.chunk, 8 * len(rows) * self.row
        ):
            return self._copied(self._read_run(low, self.buffers.empty(span, self.row)), rows - low)
        data = self.buffers.empty(len(rows), self.row)
        for begin, end in zip(bounds, bounds[1:], strict=False):
            self._read_run(int(rows[begin]), data[begin:end])
        return data

    def _read_columns(
        self, wanted: np.ndarray, parts: list[tuple[int, np.ndarray]], columns: list[_Columns | None]
    ) -> np.ndarray | None:
        """What one output takes, if that is one run of columns of neighbouring rows: read to its place, not cut out.

        None too if the file ends within it: then reading it whole says so.
        """
        if len(parts) > 1 or parts[0][1] is not wanted or (kept := columns[parts[0][0]]) is None:
            return None
        if (run := kept.only) is None or wanted[-1] - wanted[0] + 1 != len(wanted):
            return None
        width = run.stop - run.start
        if (spaced := self.buffers.spaced(len(wanted), width, self.row - width)) is None:
            return None
        taken, views = spaced
        start = self.entry.start + int(wanted[0]) * self.row + run.start
        if read_scattered(self.source, start, views) < len(wanted) * self.row - (self.row - width):
            return None
        return taken.reshape(-1)

    def _read_run(self, first: int, data: np.ndarray) -> np.ndarray:
        """Rows from the `first` on, into `data`."""
        read_into(self.source, self.entry.file, self.entry.start + first * self.row, data.reshape(-1).data)
        return data

    def _take(self, data: np.ndarray, read: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """`rows` out of `data`, which is those that were `read`; without a copy where they are neighbours."""
        if rows is read:
            return data
        if rows[0] >= 0 and (rows[1:] - rows[:-1] == 1).all():
            begin = int(np.searchsorted(read, rows[0]))
            return data[begin : begin + len(rows)]
        if not len(data):
            return np.zeros((len(rows), data.shape[1]), np.uint8)
        zeros = rows < 0
        taken = self._copied(data, np.where(zeros, 0, np.searchsorted(read, rows)))
        taken[zeros] = 0
        return taken

    def _copied(self, data: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return data.take(rows, axis=0, out=self.buffers.empty(len(rows), data.shape[1]), mode="clip")

    def _cut_columns(self, data: np.ndarray, kept: _Columns) -> np.ndarray:
        numbers, item = kept.numbers, self.item
        taken = self.buffers.empty(len(data), len(numbers) * item)
        if len(kept.runs) * FEW_RUNS >= len(numbers) > 0:
            data.view(f"V{item}").take(numbers, axis=1, out=taken.view(f"V{item}"), mode="clip")
            taken.reshape(len(data), len(numbers), item)[:, numbers < 0] = 0
            return taken
        for place, read in kept.runs:
            taken[:, place] = 0 if read is None else data[:, read]
        return taken
