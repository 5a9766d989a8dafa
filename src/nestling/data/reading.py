"""Batches of a corpus, each a pure function of the step: a resumed run needs no data state."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from nestling.data.batches import Batch
from nestling.data.blend import Shares, blend, lasting, taken
from nestling.data.cache import Array, Tokens
from nestling.data.packing import Pieces, Rows

WINDOW = 64  # batches whose rows are sorted by length, where there is no packing


@dataclass(frozen=True)
class Part:
    """A source's documents laid out in rows of one length."""

    tokens: Tokens
    documents_D: Array  # in the order they are read in, the dropped ones too
    pieces: Pieces
    rows: Rows
    seed: tuple[int, ...]

    def row(self, number: int) -> Array:
        """The pieces of a row; after the last one they come again, in another order each time."""
        epoch, row = divmod(number, len(self.rows))
        return self.rows[row if epoch == 0 else int(_shuffled(len(self.rows), (*self.seed, epoch))[row])]

    def left(self, rows: int) -> Array | None:
        """The documents of which nothing is in the first `rows` rows; None if all rows were read, or none is left."""
        if rows >= len(self.rows):
            return None
        used = self.pieces.documents_P[self.rows.first(rows)]
        rest = self.documents_D[~np.isin(self.documents_D, used)]
        return rest if len(rest) else None


@lru_cache(maxsize=8)
def _shuffled(count: int, seed: tuple[int, ...]) -> Array:
    return np.random.default_rng(seed).permutation(count)


@dataclass(frozen=True)
class Reading:
    """A corpus in batches of `batch` rows of `length` pairs at most.

    rank, world: of every batch the rows that this process has, of so many processes.
    """

    parts: tuple[Part, ...]
    shares: Shares
    batch_rows: int
    length: int
    packing: bool
    seed: int
    end: int | None  # steps; None: without end
    rank: int = 0
    world: int = 1

    @cached_property
    def steps(self) -> int:
        """Batches before a source has been read once."""
        return lasting(self.shares, [len(part.rows) for part in self.parts]) // self.batch_rows

    def batch(self, step: int) -> Batch:
        if self.end is not None and step >= self.end:
            raise IndexError(f"there are {self.end} batches")
        rows = self._packed(step) if self.packing else self._of_similar_length(step)
        return self._collate(rows[self.rank :: self.world])

    def all(self) -> Iterator[Batch]:
        """Every row of every source once, the last batch with what is left: to measure on."""
        rows = [(source, row) for source, part in enumerate(self.parts) for row in range(len(part.rows))]
        rows.sort(key=self._size)
        for start in range(0, len(rows), self.batch_rows):
            yield self._collate(rows[start : start + self.batch_rows])

    def counts(self) -> dict[str, int]:
        """Rows, and what became of documents that did not fit into one."""
        pieces = [part.pieces for part in self.parts]
        kinds = {kind: sum(getattr(piece, kind) for piece in pieces) for kind in ("split", "dropped", "empty")}
        return {"rows": sum(len(part.rows) for part in self.parts), **kinds}

    def taken(self, steps: int) -> list[int]:
        """Rows that each part gives to the first `steps` batches."""
        return taken(self.shares, steps * self.batch_rows)

    def _packed(self, step: int) -> list[tuple[int, int]]:
        return list(blend(self.shares, step * self.batch_rows, self.batch_rows))

    def _of_similar_length(self, step: int) -> list[tuple[int, int]]:
        """The batch's rows out of a window of batches, sorted by length, the batches in a drawn order."""
        window, place = divmod(step, WINDOW)
        batches = WINDOW if self.end is None else min(self.end - window * WINDOW, WINDOW)
        rows = list(blend(self.shares, window * WINDOW * self.batch_rows, batches * self.batch_rows))
        rows.sort(key=self._size)
        chosen = int(np.random.default_rng((self.seed, window)).permutation(batches)[place])
        return rows[chosen * self.batch_rows : (chosen + 1) * self.batch_rows]

    def _size(self, row: tuple[int, int]) -> int:
        part = self.parts[row[0]]
        return int(part.pieces.sizes_P[part.row(row[1])].sum())

    def _collate(self, rows: list[tuple[int, int]]) -> Batch:
        sizes = [self._size(row) for row in rows]
        shape = (len(rows), self.length if self.packing else max(sizes))
        inputs, targets, documents = (np.zeros(shape, np.int64) for _ in range(3))
        counted = np.zeros(shape, bool)
        for place, (source, number) in enumerate(rows):
            part, at = self.parts[source], 0
            for document, piece in enumerate(part.row(number), 1):
                start, size = part.pieces.starts_P[piece], part.pieces.sizes_P[piece]
                here, read, predicted = (
                    slice(at, at + size),
                    slice(start, start + size),
                    slice(start + 1, start + size + 1),
                )
                inputs[place, here], targets[place, here] = part.tokens.ids[read], part.tokens.ids[predicted]
                counted[place, here], documents[place, here] = part.tokens.counted[predicted], document
                at += size
        given, wanted, learnt, several = (torch.from_numpy(each) for each in (inputs, targets, counted, documents))
        return Batch(given, wanted, learnt, torch.tensor(sizes), several if self.packing else None)
