"""The axis algebra: a stored dimension is a sum of segments, a segment is a row-major product of named axes.

`Layout.parse("g h p + g n, d")` describes a matrix whose rows are the (group, head, channel) triples followed by the
(group, state) pairs, and whose columns are the hidden channels. Shapes, counts, permutations, slices and views of every
stored tensor are folds over such layouts. An axis named by digits has that size.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

Sizes = Mapping[str, Any]  # axis -> size: an int, or anything that adds and multiplies (an expected size, a tensor)
Keep = Mapping[
    str, np.ndarray
]  # axis -> kept positions: [k] for all, or [outer, k], one row per entry of the axis outside
Segment = tuple[str, ...]
Dim = tuple[Segment, ...]


@dataclass(frozen=True)
class Layout:
    """The dims of one stored tensor."""

    dims: tuple[Dim, ...]

    @staticmethod
    @cache
    def parse(text: str) -> "Layout":
        return Layout(tuple(tuple(tuple(segment.split()) for segment in dim.split("+")) for dim in text.split(",")))

    @property
    def axes(self) -> frozenset[str]:
        return frozenset(axis for dim in self.dims for segment in dim for axis in segment)

    def shape(self, sizes: Sizes) -> tuple[Any, ...]:
        return tuple(sum(segment_sizes(dim, sizes)) for dim in self.dims)

    def numel(self, sizes: Sizes) -> Any:
        return math.prod(self.shape(sizes))

    def positions(self, sizes: Sizes, keep: Keep) -> tuple[np.ndarray | None, ...]:
        """For each dim the flat positions `keep` selects, in order; None where it keeps all of them as they are."""
        return tuple(
            dim_positions(dim, sizes, keep) if any(axis in keep for segment in dim for axis in segment) else None
            for dim in self.dims
        )


def size(axis: str, sizes: Sizes) -> Any:
    return int(axis) if axis.isdigit() else sizes[axis]


def segment_sizes(dim: Dim, sizes: Sizes) -> list[Any]:
    return [math.prod([size(axis, sizes) for axis in segment]) for segment in dim]


def dim_positions(dim: Dim, sizes: Sizes, keep: Keep) -> np.ndarray:
    """Flat positions along one dim, [sum of kept products]: each segment's, offset by the segments before it."""
    starts = np.cumsum([0, *segment_sizes(dim, sizes)[:-1]])
    return np.concatenate(
        [start + segment_positions(segment, sizes, keep) for start, segment in zip(starts, dim, strict=True)]
    )


def segment_positions(segment: Segment, sizes: Sizes, keep: Keep) -> np.ndarray:
    """Row-major flat positions of a product of axes. A 2-D entry of `keep` is indexed by the axis just outside it."""
    flat = outer = np.zeros(1, dtype=np.int64)
    for axis in segment:
        kept = keep.get(axis, np.arange(size(axis, sizes)))
        chosen = np.broadcast_to(kept, (len(outer), kept.shape[-1])) if kept.ndim == 1 else kept[outer]
        flat = (flat[:, None] * size(axis, sizes) + chosen).reshape(-1)
        outer = chosen.reshape(-1)
    return flat
