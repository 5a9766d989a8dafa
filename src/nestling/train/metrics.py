"""How much each position of an axis matters: metrics by name, one plain function each.

A metric from data is a *site* of the forward pass, a *statistic* that is added up over calibration batches there, and
the axis's *fold* of those sums to one score per position. Shapes: B samples, L tokens, c channels of the site; axes as
in arch/nemotron_h.py. Sums are over real tokens, in float32 or better inside a piece and in float64 beyond.
The formulas are Nemotron Elastic's (arXiv 2511.16664) and, where it differs, NVIDIA Model-Optimizer's.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nestling.arch.architecture import Architecture, block_axes
from nestling.arch.axes import Sizes, segment_sizes, size
from nestling.arch.nemotron_h import FIELDS, ordered
from nestling.arch.submodel import tensors
from nestling.errors import NestlingError, nearest
from nestling.model.nemotron_h import NemotronH

PIECE = 1 << 19
"""Elements summed at a time: their copy stays in the cache, and its memory is reused instead of asked for anew."""

Statistic = Callable[[Tensor, Tensor, Sizes], Tensor]
"""(x [B, L, c], real [B, L], axis sizes) -> what is added up over batches, float64."""


def absolute(x_BLc: Tensor, real_BL: Tensor, sizes: Sizes) -> Tensor:
    """Σ |x| over tokens, [c]: the paper's sum, with |·| before it so that signs cannot cancel."""
    return _sums(x_BLc, real_BL, torch.abs).sum(0)


def signed(x_BLc: Tensor, real_BL: Tensor, sizes: Sizes) -> Tensor:
    """Σ x over tokens, [c]: the published Mamba score. A channel that swings evenly around zero scores nothing."""
    return _sums(x_BLc, real_BL, lambda x: x).sum(0)


def by_sample(x_BLc: Tensor, real_BL: Tensor, sizes: Sizes) -> Tensor:
    """Σ over samples of (mean over tokens of |x|)², [c]: Model-Optimizer's L2 over samples of the mean over length."""
    return (_sums(x_BLc, real_BL, torch.abs) / real_BL.sum(1, keepdim=True)).square().sum(0)


def squares(x_BLc: Tensor, real_BL: Tensor, sizes: Sizes) -> Tensor:
    """Σ x² over tokens, [c]."""
    return _sums(x_BLc, real_BL, torch.square).sum(0)


def head_norms(x_BLc: Tensor, real_BL: Tensor, sizes: Sizes) -> Tensor:
    """Σ over tokens of ‖the head's slice‖₂, [G q]."""

    def norms(x_BLc: Tensor) -> Tensor:
        dtype = torch.promote_types(x_BLc.dtype, torch.float32)
        return torch.linalg.vector_norm(x_BLc.unflatten(-1, (-1, sizes["c"])), dim=-1, dtype=dtype)

    return _sums(x_BLc, real_BL, norms).sum(0)


def routed(x_BLe: Tensor, real_BL: Tensor, sizes: Sizes) -> Tensor:
    """Σ over an expert's tokens of what it added to them, gate · ‖output‖₂, and how many they are, [2 e].

    Their quotient is what Star Elastic (arXiv 2605.07182) ranks experts by, after REAP.
    """
    return _sums(x_BLe, real_BL, lambda x_BLe: torch.cat([x_BLe.clamp(min=0), (x_BLe >= 0).to(x_BLe)], -1)).sum(0)


def _sums(x_BLc: Tensor, real_BL: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """Σ over a sample's real tokens of `of(x)`, [B, ·] in float64, piece by piece."""
    rows = max(1, PIECE // x_BLc[0].numel())
    tokens = max(1, PIECE // x_BLc.shape[-1])
    padded = not bool(real_BL.all())
    sums = []
    for x, real in zip(x_BLc.split(rows), real_BL.split(rows), strict=True):
        pieces = zip(x.split(tokens, 1), real.split(tokens, 1), strict=True)
        sums.append(torch.stack([_sum(of(piece), own if padded else None) for piece, own in pieces]).sum(0))
    return torch.cat(sums)


def _sum(x_BLc: Tensor, real_BL: Tensor | None) -> Tensor:
    """Σ over tokens; padding is left out by a factor of zero."""
    if real_BL is not None:
        x_BLc = x_BLc * real_BL[..., None]
    return x_BLc.sum(1, dtype=torch.promote_types(x_BLc.dtype, torch.float32)).double()


@dataclass(frozen=True)
class Metric:
    """What is added up where; `finish` turns the sums into the unit of an activation.

    weighted: multiply the sums by Σ w² of the weights that read each channel, as a share of the whole block's.
    """

    site: str  # of model.context.Watch
    statistic: Statistic
    finish: Callable[[Tensor], Tensor] = torch.abs
    weighted: bool = False


def _l2(site: str) -> Metric:
    return Metric(site, by_sample, torch.sqrt)


def _contribution(site: str) -> Metric:
    """√ of what the channels add to the energy of what reads them, Σ x² ‖w‖², cross terms left out."""
    return Metric(site, squares, torch.sqrt, weighted=True)


_MAMBA = {
    "contribution": _contribution("gated"),
    "sum": Metric("x", absolute),
    "signed": Metric("x", signed),
    "l2": _l2("x"),
}

METRICS: dict[str, dict[str, Metric]] = {
    "d": {"contribution": _contribution("norm"), "sum": Metric("norm", absolute), "l2": _l2("norm")},
    "f": {
        "contribution": _contribution("hidden"),
        "post": Metric("hidden", absolute),
        "pre": Metric("up", absolute),
        "post-l2": _l2("hidden"),
        "pre-l2": _l2("up"),
    },
    "h": _MAMBA,
    "p": _MAMBA,
    "q": {"contribution": _contribution("heads"), "sum": Metric("heads", head_norms), "l2": _l2("heads")},
    "e": {"reap": Metric("routed", routed)},
    "m": {"contribution": _contribution("expert"), "post": Metric("expert", absolute)},
    "s": {"contribution": _contribution("shared"), "post": Metric("shared", absolute), "post-l2": _l2("shared")},
}
"""Axis -> metric name -> what it measures. `magnitude` and `random` need no data and exist for every axis."""

FOLDS: dict[str, Callable[[Tensor, Sizes], Tensor]] = {
    "d": lambda sums_Sd, sizes: sums_Sd.sum(0),  # over all norms
    "f": lambda sums_Sf, sizes: sums_Sf[0],
    "h": lambda sums_S, sizes: _heads_channels(sums_S, sizes).norm(dim=-1),  # a head: ‖s‖₂ over its channels
    "p": lambda sums_S, sizes: _heads_channels(sums_S, sizes).flatten(0, 1).norm(dim=0),  # a channel: over all heads
    "q": lambda sums_S, sizes: sums_S[0].unflatten(0, (sizes["G"], sizes["q"], -1)).norm(dim=-1),
    "e": lambda sums_S, sizes: sums_S[0, : sizes["e"]] / sums_S[0, sizes["e"] :].clamp(min=1),  # over its own tokens
    "m": lambda sums_em, sizes: sums_em,
    "s": lambda sums_Ss, sizes: sums_Ss[0],
}
"""Axis -> scores of its positions from the finished sums of the axis's sites, [S, c]."""

READ_BY = {
    "norm": ("d",), "hidden": ("f",), "gated": ("g", "h", "p"), "heads": ("G", "q", "c"), "shared": ("s",),
    "expert": ("m",),
}  # fmt: skip
"""Site -> the columns of the matrices that read it."""

DATA_FREE = ("magnitude", "random")
ABLATED = ("h", "q")
"""Axes that also have the metric `ablation` (train/ablation.py): few enough positions to leave each one out."""

AXES = {
    "hidden": "d", "ffn": "f", "mamba_heads": "h", "mamba_channels": "p", "attention_heads": "q",
    "experts": "e", "expert_ffn": "m", "shared_ffn": "s",
}  # fmt: skip
"""The axes that are ranked, by the names the command line uses."""

FIXED = {
    "g": "the heads of a group share one B and one C, and a group more or less is another recurrence",
    "n": "the state is what a sub-model hands on, and every size keeps all of it",
    "G": "KV heads define the cache that every size shares",
    "c": "attention scores are sums over all channels of a head",
    "k": "the convolution reads this many tokens; leaving one out is another function of the text",
    "v": "its positions are the tokens themselves",
}


def _heads_channels(sums_S: Tensor, sizes: Sizes) -> Tensor:
    return sums_S[0].unflatten(0, (sizes["g"], sizes["h"], sizes["p"]))


def reading(model: NemotronH, site: str, layer: int | None) -> Tensor:
    """Σ w² over the rows of every matrix of a layer (None: the output head) that reads a site, [1, c] in float64.

    Of the site of experts [e, c]: each has its own matrix.
    """
    embedding = "backbone.embeddings.weight" if model.architecture.untied else None
    total: dict[int | None, Tensor] = {}
    stored = model.on_disk()
    for tensor in tensors(model.architecture):
        reads = len(tensor.layout.dims) == 2 and tensor.layout.dims[-1] == (READ_BY[site],)
        if tensor.layer == layer and reads and tensor.name != embedding:
            own = tensor.expert if site == "expert" else None
            total[own] = total.get(own, 0) + _norms(stored[tensor.name], 0).cpu()
    return torch.stack([*total.values()])


def parse(axis: str, metric: str) -> tuple[str, str]:
    """(axis letter, metric name) of `--metric AXIS=METRIC`; AXIS is a name, a config field, or the table's letter."""
    letters = {**AXES, **{field: axes.split()[-1] for field, axes in FIELDS.items()}}
    letter = letters.get(axis, axis)
    if letter in FIXED:
        raise NestlingError(f"axis {axis!r} is fixed and cannot be ranked: {FIXED[letter]}")
    if letter not in METRICS:
        raise NestlingError(f"unknown axis {axis!r}; {nearest(axis, AXES)}")
    allowed = (*METRICS[letter], *DATA_FREE, *(["ablation"] if letter in ABLATED else []))
    if metric not in allowed:
        raise NestlingError(f"unknown metric {metric!r} of axis {axis}; {nearest(metric, allowed)}")
    return letter, metric


def places(architecture: Architecture) -> Iterator[tuple[str, int | None]]:
    """(axis, layer) of every order that a ranking has; the hidden channels have one for all layers."""
    yield "d", None
    for layer, kind in enumerate(architecture.hybrid_override_pattern):
        yield from ((axis, layer) for axis in METRICS if axis != "d" and axis in block_axes(architecture, kind))


def key(axis: str, layer: int | None) -> str:
    """The name of an order in a `Ranking`."""
    return axis if layer is None else f"{axis}.{layer}"


def magnitude(model: NemotronH, axis: str, layer: int | None) -> Tensor:
    """‖all stored weights of a position‖₂, [size] or [outer, size]: a control that needs no data."""
    total = torch.zeros([model.architecture.sizes()[a] for a in ordered(axis)], dtype=torch.float64)
    stored = model.on_disk()
    for tensor in tensors(model.architecture):
        if layer is not None and tensor.layer != layer:
            continue
        own, weight = total if tensor.expert is None or axis not in "em" else total[tensor.expert], stored[tensor.name]
        if axis == "e" and tensor.expert is not None:
            own += _norms(weight).cpu()
        for place, dim in enumerate(tensor.layout.dims):
            if any(axis in segment for segment in dim):
                own += _squares(weight, place, dim, axis, tensor.full).cpu()
    return total.sqrt()


def _norms(weight: Tensor, dim: int | list[int] | None = None) -> Tensor:
    """Σ w² over some dims, or over all, in float64."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=dim, dtype=dtype).double().square()


def _squares(weight: Tensor, place: int, dim: tuple[tuple[str, ...], ...], axis: str, sizes: Sizes) -> Tensor:
    """Σ w² per position of `axis` over one dim of one tensor."""
    others = [other for other in range(weight.ndim) if other != place]
    squares = _norms(weight, others) if others else weight.double().square()
    parts = squares.split(segment_sizes(dim, sizes))
    wanted = ordered(axis)
    found = []
    for part, segment in zip(parts, dim, strict=True):
        if axis in segment:
            shaped = part.unflatten(0, [size(a, sizes) for a in segment])
            summed = [index for index, a in enumerate(segment) if a not in wanted]
            found.append(shaped.sum(summed) if summed else shaped)
    return torch.stack(found).sum(0)


def random(architecture: Architecture, axis: str, layer: int | None, seed: int) -> Tensor:
    """Scores that mean nothing, [size] or [outer, size]: the control every metric must beat."""
    shape = [architecture.sizes()[a] for a in ordered(axis)]
    drawn = np.random.default_rng([seed, zlib.crc32(key(axis, layer).encode())]).random(shape)
    return torch.from_numpy(drawn)


def spelled(metrics: Mapping[str, str]) -> dict[str, str]:
    """Axis letters back to their names, for people."""
    return {name: metrics[letter] for name, letter in AXES.items() if letter in metrics}
