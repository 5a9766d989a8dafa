"""How wide a layer runs: prefix views of its weights (hard), or masks on its activations (soft).

A sub-model is *computed* as one in hard mode: `prefix_linear` multiplies by the kept prefix of a stored weight. In soft
mode every weight is whole and four mask sites say what counts: the residual write, the MLP hidden, the attention heads
and the SSM output before the gated norm; the norms divide by the active width. At 0/1 masks the two are equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.arch.architecture import Architecture
from nestling.arch.axes import Dim, Layout, Sizes, segment_sizes, size
from nestling.arch.submodel import WHOLE, Submodel, complete, layer_sizes
from nestling.model.native import product as native
from nestling.model.native.layer import Bound
from nestling.model.native.product import Kept


@dataclass(frozen=True)
class Width:
    """The width of one layer: `kept` sizes are computed; `masks` hold a weight in [0, 1] per position of an axis."""

    full: Sizes
    kept: Sizes
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    gate: Tensor | float = 1.0  # of the layer's residual write; 0 is a skipped layer
    held: Mapping[str, Tensor] = field(default_factory=dict)  # kept prefixes by name that were looked up beforehand
    pieces: Mapping[str, Kept] = field(default_factory=dict)  # prefixes in pieces, which kernels read as they lie
    bound: Bound | None = None  # the layer as one kernel
    derived: Mapping[str, Tensor] = field(default_factory=dict)  # of them, what the layer computes from vectors alone

    @property
    def masked(self) -> bool:
        """Whether `mask` changes anything, so that no kernel may go past it."""
        return bool(self.masks)

    def mask(self, x: Tensor, *axes: str) -> Tensor:
        """x [..., *axes sizes] times the masks of its trailing axes. An axis without a mask may be of any size."""
        for place, axis in enumerate(reversed(axes)):
            if (mask := self.masks.get(axis)) is not None:
                x = x * mask.reshape(-1, *(1,) * place)
        return x

    def active(self, *axes: str) -> Tensor | int:
        """How many positions of the product of axes count: what a norm divides by."""
        count: Tensor | int = 1
        for axis in axes:
            count = count * (self.masks[axis].sum() if axis in self.masks else size(axis, self.kept))
        return count


@dataclass(frozen=True)
class Widths:
    """The width of a whole model: of the residual stream at its two ends, and of each layer that runs."""

    ends: Width
    layers: tuple[tuple[int, Width], ...]


@cache
def hard(architecture: Architecture, submodel: Submodel = WHOLE) -> Widths:
    """Compute the sub-model as a sub-model: its own FLOPs, prefix views of the stored weights."""
    full = architecture.sizes()
    ends = Width(full, full | {"d": complete(architecture, submodel).hidden_size})
    return Widths(ends, tuple((layer, Width(full, kept)) for layer, _, kept in layer_sizes(architecture, submodel)))


def masked(
    architecture: Architecture, submodel: Submodel, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Widths:
    """The same sub-model at full cost: 0/1 prefix masks on the whole model, skipped layers as gates of 0."""

    def masks(width: Width) -> Width:
        cut = {axis: kept for axis, kept in width.kept.items() if kept != width.full[axis]}
        prefix = {axis: (torch.arange(width.full[axis], device=device) < kept).to(dtype) for axis, kept in cut.items()}
        return replace(width, kept=width.full, masks=prefix)

    widths = hard(architecture, submodel)
    running = dict(widths.layers)
    ends = masks(widths.ends)
    skipped = replace(ends, gate=0.0)
    count = len(architecture.hybrid_override_pattern)
    layers = ((layer, masks(running[layer]) if layer in running else skipped) for layer in range(count))
    return Widths(ends, tuple(layers))


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in] -> [..., out], plus bias."""
    kernel = native.kernel(x, weight)
    return F.linear(x, weight, bias) if kernel is None else native.product(kernel, x, weight, bias)


def prefix_linear(x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, width: Width) -> Tensor:
    """x [..., in'] times the kept prefix of a stored weight [out, in] -> [..., out'], plus the prefix of its bias.

    A plain prefix is a strided view. A prefix inside groups has no strides of its own: its rows are packed into one
    transient copy, whose cost against the product is one over the number of tokens. A few tokens are cheaper multiplied
    by what lies between the groups as well: by zeros, and into outputs that are then left out.
    """
    if bias is not None:
        bias = prefix(bias, Layout(layout.dims[:1]), width)
    rows, columns = layout.dims
    if x.numel() > FEW * x.shape[-1] or not in_pieces(layout, width):
        return product(x, prefix(weight, layout, width), bias)
    if _grouped(columns, width):
        (segment,) = columns
        x = _spread(x, segment, width)
    else:
        weight = _prefix_dim(weight, 1, columns, width)
    if not _grouped(rows, width):
        return product(x, _prefix_dim(weight, 0, rows, width), bias)
    y = _prefix_dim(product(x, weight), x.ndim - 1, rows, width)
    return y if bias is None else y + bias


FEW = 48
"""Tokens up to which computing twice as much costs less than a copy of the weight."""


def in_place(stored: Tensor, layout: Layout, width: Width) -> Kept:
    """The kept prefix of a stored matrix by the numbers of its rows and columns."""
    return replace(_places(layout, tuple(width.full.items()), tuple(width.kept.items())), weight=stored)


@cache
def _places(layout: Layout, full: tuple[tuple[str, int], ...], kept: tuple[tuple[str, int], ...]) -> Kept:
    """`in_place` of any matrix; layers alike share it."""
    width = Width(dict(full), dict(kept))
    rows, columns = (
        _prefix_dim(torch.arange(sum(segment_sizes(dim, width.full))), 0, dim, width).contiguous()
        for dim in layout.dims
    )
    edges = torch.cat([torch.tensor([0]), (columns.diff() != 1).nonzero().flatten() + 1, torch.tensor([len(columns)])])
    return Kept(torch.empty(0), rows, torch.stack([columns[edges[:-1]], edges.diff()], 1), len(columns))


def in_pieces(layout: Layout, width: Width) -> bool:
    """Whether no strided view can express the kept prefix."""
    return any(_grouped(dim, width) for dim in layout.dims)


def _grouped(dim: Dim, width: Width) -> bool:
    """Whether the kept prefix of a dim is in several pieces: cut inside an outer axis, or before another segment."""
    pieces = 1
    for segment in dim:
        outer = 1
        for axis in segment:
            if size(axis, width.full) != size(axis, width.kept):
                pieces = max(pieces, outer, len(dim))
            outer *= size(axis, width.kept)
    return pieces > 1


def _spread(x: Tensor, segment: tuple[str, ...], width: Width) -> Tensor:
    """x [..., kept] -> [..., whole], zero where nothing was kept."""
    x = x.unflatten(-1, [size(axis, width.kept) for axis in segment])
    missing = (size(axis, width.full) - size(axis, width.kept) for axis in reversed(segment))
    return F.pad(x, [side for count in missing for side in (0, count)]).flatten(-len(segment))


def prefix(stored: Tensor, layout: Layout, width: Width) -> Tensor:
    """The kept prefix of every axis of a stored tensor: a view where strides can say it, else a packed copy."""
    if (kept := layout.shape(width.kept)) == stored.shape:
        return stored
    if not in_pieces(layout, width):  # one step back to a gradient of the whole, where a cut per axis takes several
        return stored.as_strided(kept, stored.stride())
    for place, dim in sorted(enumerate(layout.dims), key=lambda item: len(item[1]) + len(item[1][0])):
        stored = _prefix_dim(stored, place, dim, width)
    return stored


def _prefix_dim(stored: Tensor, place: int, dim: Dim, width: Width) -> Tensor:
    if all(size(axis, width.full) == size(axis, width.kept) for segment in dim for axis in segment):
        return stored
    parts = stored.split(segment_sizes(dim, width.full), place)
    kept = [_prefix_segment(part, place, segment, width) for part, segment in zip(parts, dim, strict=True)]
    return torch.cat(kept, place) if len(kept) > 1 else kept[0]


def _prefix_segment(part: Tensor, place: int, segment: tuple[str, ...], width: Width) -> Tensor:
    part = part.unflatten(place, [size(axis, width.full) for axis in segment])
    for offset, axis in enumerate(segment):
        if size(axis, width.full) != size(axis, width.kept):
            part = part.narrow(place + offset, 0, size(axis, width.kept))
    return part.flatten(place, place + len(segment) - 1)
