"""Which flat positions of stored dimensions are kept, from kept positions of axes."""

from collections.abc import Mapping

import numpy as np

from nestling.arch.axes import Dim, Layout, Segment, Sizes, segment_sizes, size

Keep = Mapping[str, np.ndarray]
"""Axis -> kept positions: [k] for all, or [outer, k], one row per entry of the axis outside."""


def positions(layout: Layout, sizes: Sizes, keep: Keep) -> tuple[np.ndarray | None, ...]:
    """For each dim the flat positions `keep` selects, in order; None where it keeps all of them as they are."""
    return tuple(
        dim_positions(dim, sizes, keep) if any(axis in keep for segment in dim for axis in segment) else None
        for dim in layout.dims
    )


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
