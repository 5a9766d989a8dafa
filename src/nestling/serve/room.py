"""How many bytes the caches of some requests need at most."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch

from nestling.arch.architecture import Architecture
from nestling.arch.nemotron_h import CACHES
from nestling.arch.submodel import Submodel, layer_sizes
from nestling.infer.family import View
from nestling.model.cache import paged


class Holder(Protocol):
    @property
    def view(self) -> View: ...

    @property
    def tokens(self) -> int: ...


@dataclass(frozen=True)
class Room:
    """A fixed number of bytes. While rows join or leave, one layer's tensor is held twice on top of it."""

    limit: int

    def needed(self, requests: Sequence[Holder]) -> int:
        """Bytes at most until they end: rows of one size are as wide as the widest of them."""
        rows: dict[Submodel, list[Holder]] = {}
        for request in requests:
            rows.setdefault(request.view.submodel, []).append(request)
        return sum(len(same) * _row_bytes(same[0].view, max(one.tokens for one in same)) for same in rows.values())


def _row_bytes(view: View, tokens: int) -> int:
    state, column = _bytes(view.model.architecture, view.submodel, view.dtype.itemsize)
    return state + column * paged(tokens)


@lru_cache(maxsize=256)
def _bytes(architecture: Architecture, submodel: Submodel, itemsize: int) -> tuple[int, int]:
    """(bytes per sequence, bytes per column of keys and values); states are kept in float32 or better."""
    wide = max(itemsize, torch.float32.itemsize)
    state = column = 0
    for _, kind, sizes in layer_sizes(architecture, submodel):
        for name, layout in CACHES.get(kind, {}).items():
            if kind == "*":
                column += itemsize * layout.numel(sizes)
            else:
                state += (wide if name == "ssm" else itemsize) * layout.numel(sizes)
    return state, column
