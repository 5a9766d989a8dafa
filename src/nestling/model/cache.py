"""What decoding keeps: per sequence states of a fixed size, and keys and values that grow by a column per token.

B sequences (rows) · S columns · G KV heads · c head channels. Attention has no positions here, so a key may lie in any
column, and rows that have seen different numbers of tokens go on side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

PAGE = 64
"""Columns by which keys and values grow."""
GROWING = ("key", "value")


@dataclass
class Cache:
    """Per layer its tensors (arch/nemotron_h.py, CACHES), one row per sequence, changed in place as tokens come."""

    layers: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    length: int = 0  # tokens of the longest row
    lengths: tuple[int, ...] | None = None  # tokens of each row where they differ; then one token at a time follows
    at_B: Tensor | None = None  # the same as a tensor, counted by whoever gave it; the columns are all held

    def advance(self, count: int) -> None:
        self.length += count
        if self.lengths is not None:
            self.lengths = tuple(length + count for length in self.lengths)

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows, in this order. A row that is named several times is copied: its sequences part from here."""
        if self.lengths is not None:
            self._be([self.lengths[row] for row in rows])
        columns = paged(self.length)
        for state in self.layers.values():
            for name, held in state.items():
                kept = held[:, :, :columns] if name in GROWING else held
                state[name] = kept.index_select(0, torch.tensor(rows, device=held.device))

    def join(self, other: "Cache", rows: int, more: int) -> None:
        """Behind these `rows` the `more` rows of another cache."""
        self._be([*self.each(rows), *other.each(more)])
        for layer, state in self.layers.items():
            for name, held in state.items():
                new = other.layers[layer][name]
                if name in GROWING:
                    held, new = _widened(held, paged(self.length)), _widened(new, paged(self.length))
                state[name] = torch.cat([held, new])

    def unpad(self, lengths: Sequence[int]) -> None:
        """After a start that was padded on the left to a common length: keys move to the first columns of their row."""
        longest = self.length
        if min(lengths) == longest:
            return
        for state in self.layers.values():
            for name in GROWING & state.keys():
                held = state[name]
                columns = torch.arange(held.shape[2], device=held.device)
                moved = columns + (longest - torch.tensor(lengths, device=held.device))[:, None]
                state[name] = torch.take_along_dim(held, moved.clamp(max=len(columns) - 1)[:, None, :, None], 2)
        self._be(lengths)

    def _be(self, lengths: Sequence[int]) -> None:
        self.length = max(lengths, default=0)
        self.lengths = None if len(set(lengths)) < 2 else tuple(lengths)

    def each(self, rows: int) -> tuple[int, ...]:
        """Tokens of each of the rows."""
        return self.lengths or (self.length,) * rows

    def copy(self) -> "Cache":
        layers = {layer: {name: held.clone() for name, held in state.items()} for layer, state in self.layers.items()}
        return Cache(layers, self.length, self.lengths)

    @property
    def nbytes(self) -> int:
        return sum(held.nbytes for state in self.layers.values() for held in state.values())


def paged(length: int) -> int:
    """Columns that are held for `length` tokens."""
    return -(-length // PAGE) * PAGE


def _widened(held_BGSc: Tensor, columns: int) -> Tensor:
    """The first columns, behind them zeros (what is masked must still be finite)."""
    if held_BGSc.shape[2] >= columns:
        return held_BGSc[:, :, :columns]
    wide = held_BGSc.new_zeros(*held_BGSc.shape[:2], columns, held_BGSc.shape[3])
    wide[:, :, : held_BGSc.shape[2]] = held_BGSc
    return wide


def extend(state: dict[str, Tensor], name: str, new_BGLc: Tensor, past: int, at_B: Tensor | None) -> Tensor:
    """Write new keys (or values) behind the `past` columns, or each row's into its own column; returns all in use."""
    end = past + new_BGLc.shape[2]
    held = state.get(name, new_BGLc[:, :, :0])
    if held.shape[2] < end:
        held = state[name] = _widened(held, paged(end))
    if at_B is None:
        held[:, :, past:end] = new_BGLc
    else:
        held[torch.arange(len(at_B), device=at_B.device), :, at_B] = new_BGLc[:, :, 0]
    return held[:, :, :end]
