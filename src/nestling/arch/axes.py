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

Sizes = Mapping[str, Any]  # axis -> size: an int, or anything that adds and multiplies (an expected size, a tensor)
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

    def sized(self, sizes: Sizes) -> list[tuple[str, Any]]:
        """The named axes with their sizes."""
        return [(axis, sizes[axis]) for axis in sorted(self.axes) if not axis.isdigit()]

    def shape(self, sizes: Sizes) -> tuple[Any, ...]:
        return tuple(sum(segment_sizes(dim, sizes)) for dim in self.dims)

    def numel(self, sizes: Sizes) -> Any:
        return math.prod(self.shape(sizes))


def size(axis: str, sizes: Sizes) -> Any:
    return int(axis) if axis.isdigit() else sizes[axis]


def segment_sizes(dim: Dim, sizes: Sizes) -> list[Any]:
    return [math.prod([size(axis, sizes) for axis in segment]) for segment in dim]
