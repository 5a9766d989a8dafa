"""Documents into rows. What is counted are *pairs*: a token to read and the one after it, to predict.

A document of n tokens has n - 1 of them, and none leads from one document into the next. D documents · P pieces, each
a stretch of one document · R rows.
"""

from array import array
from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

from nestling.data.cache import Array, Tokens

OPEN = 64  # rows that are not full yet, among which a piece finds its place


@dataclass(frozen=True)
class Pieces:
    """Stretches of documents that fit into a row, and what became of the documents that did not."""

    documents_P: Array  # which document
    starts_P: Array  # place of the first token to read among all tokens
    sizes_P: Array  # pairs
    split: int = 0  # documents cut into pieces
    dropped: int = 0  # documents left out
    empty: int = 0  # pieces in which nothing counts, left out


def cut(tokens: Tokens, documents_D: Array, length: int, long_documents: str) -> Pieces:
    """These documents in pieces of at most `length` pairs; "drop" leaves out those that are longer."""
    starts_D, sizes_D = tokens.offsets[documents_D], np.diff(tokens.offsets)[documents_D] - 1
    fits = sizes_D <= length
    if long_documents == "drop":
        return Pieces(documents_D[fits], starts_D[fits], sizes_D[fits], dropped=int((~fits).sum()))
    counts = -(-sizes_D // length)
    documents, starts, sizes = (np.repeat(each, counts) for each in (documents_D, starts_D, sizes_D))
    before = (np.arange(len(starts)) - np.repeat(np.cumsum(counts) - counts, counts)) * length
    starts, sizes = starts + before, np.minimum(sizes - before, length)
    useful = _useful(tokens, starts, sizes, np.repeat(~fits, counts))
    documents, starts, sizes = (each[useful] for each in (documents, starts, sizes))
    return Pieces(documents, starts, sizes, split=int((~fits).sum()), empty=int((~useful).sum()))


def _useful(tokens: Tokens, starts: Array, sizes: Array, doubtful: Array) -> Array:
    """Whether there is something to learn in each piece; in a whole document there is."""
    useful = np.ones(len(starts), bool)
    if not tokens.all_counted:
        for piece in np.flatnonzero(doubtful):
            useful[piece] = tokens.counted[starts[piece] + 1 : starts[piece] + sizes[piece] + 1].any()
    return useful


@dataclass(frozen=True)
class Rows:
    """Row r has the pieces order_P[bounds[r] : bounds[r + 1]]."""

    order_P: Array
    bounds: Array  # [R + 1]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, row: int) -> Array:
        """The pieces of a row."""
        return self.order_P[self.bounds[row] : self.bounds[row + 1]]

    def first(self, rows: int) -> Array:
        """The pieces of the first rows."""
        return self.order_P[: self.bounds[rows]]


def alone(pieces: int) -> Rows:
    """Every piece in a row of its own."""
    return Rows(np.arange(pieces), np.arange(pieces + 1))


def pack(sizes_P: Array, length: int) -> Rows:
    """Whole pieces side by side in rows of at most `length` pairs, by best fit.

    A piece goes into the fullest row that has room for it, of the `OPEN` rows that were not closed yet; where none has,
    into a new one, for which the fullest is closed. So the rows follow the order of the pieces, roughly.
    """
    room: list[tuple[int, int]] = []  # (pairs left, row) of the rows still open, least first
    rows: dict[int, list[int]] = {}  # their pieces
    order, bounds = array("q"), array("q", [0])  # of the rows that are closed

    def close(row: int) -> None:
        order.extend(rows.pop(row))
        bounds.append(len(order))

    for piece, size in enumerate(map(int, sizes_P)):
        place = bisect_left(room, (size, -1))
        left, row = room.pop(place) if place < len(room) else (length, piece)  # a row is called after its first piece
        rows.setdefault(row, []).append(piece)
        insort(room, (left - size, row))
        while room and (room[0][0] == 0 or len(room) > OPEN):
            close(room.pop(0)[1])
    for row in sorted(rows):
        close(row)
    return Rows(np.array(order, np.int64), np.array(bounds, np.int64))
