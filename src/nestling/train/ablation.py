"""Heads left out one at a time and judged as layers are: normalized MSE on the logits. Exact and dear.

    s_h = Σ (M_full - M_without h)² / Σ M_full²

A head that is left out is left out as in a slice: the gated norm of its group divides by the heads that remain. So even
a head whose output is zero is not free to drop, which no other metric sees. Nothing below the head's layer is computed
again, and no logits are (train/depth.py). The cost is a branch per head, about N/2 layer passes each on every batch for
a model of N layers.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial as bind

import numpy as np
import torch
from torch import Tensor

from nestling.arch.architecture import Architecture
from nestling.arch.nemotron_h import ordered
from nestling.console import console
from nestling.errors import NestlingError
from nestling.model.context import Context
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import Width, hard
from nestling.progress import progress
from nestling.train.depth import energy, head_gram, last_norm, run
from nestling.train.metrics import key, places
from nestling.train.partial import Batches, Partial, Sums, Tick, accumulate, counter


@dataclass(frozen=True, kw_only=True)
class Headless(Width):
    """A layer some of whose heads are off: `heads` [outer, inner] is 1 where one counts, whatever its group."""

    axis: str
    heads: Tensor

    @property
    def masked(self) -> bool:
        return True

    def mask(self, x: Tensor, *axes: str) -> Tensor:
        return x * self.heads[..., None] if axes[0] == self.axis else super().mask(x, *axes)

    def active(self, *axes: str) -> Tensor | int:
        """Per group, [outer, 1]: what the gated norm divides by."""
        if axes[0] != self.axis:
            return super().active(*axes)
        return self.heads.sum(1, keepdim=True) * self.kept["p"]


def head_sums(model: NemotronH, batches: Batches, axes: Iterable[str], partial: Partial) -> Sums:
    """Over the even and the odd batches: "h.L" or "q.L" [2, outer, inner], Σ (M_full - M_without)² of every head of
    these axes, and "scale" [2], Σ M_full².
    """
    wanted = {layer: axis for axis, layer in places(model.architecture) if layer is not None and axis in axes}
    gram, passes = head_gram(model), planned(model.architecture, wanted)
    count = len(model.layers)
    console.print(
        f"rank heads: {passes:,} layer passes a batch, {len(batches)} batches: as much as "
        f"{passes / count:,.0f} forward passes over the data",
        soft_wrap=True,
    )
    with progress("rank heads", len(batches) * passes, "layers") as show:
        tick = counter(show, partial.done.get("heads", 0) * passes, "layer {}".format)
        return accumulate("heads", batches, bind(without_each_head, model, wanted, gram, tick), partial)


def planned(architecture: Architecture, wanted: dict[int, str]) -> int:
    """Layer passes per batch: the whole model, the walk up, and a branch per head."""
    count = len(architecture.hybrid_override_pattern)
    return 2 * count + sum(int(np.prod(_shape(architecture, axis))) * (count - layer) for layer, axis in wanted.items())


def without_each_head(
    model: NemotronH, wanted: dict[int, str], gram: Tensor, tick: Tick, ids_BL: Tensor, real_BL: Tensor
) -> Sums:
    """What one batch adds to `head_sums`; wanted: layer -> the axis of its heads."""
    count, real = len(model.layers), real_BL.bool()
    x_BLd = model.embed(ids_BL, hard(model.architecture))
    full = last_norm(model, run(model, x_BLd, range(count), tick)[real])
    found = {"scale": energy(full, None, gram)}
    for layer in range(count):
        if (axis := wanted.get(layer)) is not None:
            errors = torch.zeros(_shape(model.architecture, axis), dtype=torch.float64)
            for head in np.ndindex(*errors.shape):
                branch = _without(model, x_BLd, layer, axis, head, tick)
                above = run(model, branch, range(layer + 1, count), tick)
                errors[head] = energy(last_norm(model, above[real]), full, gram).cpu()
            found[key(axis, layer)] = errors
            if not errors.isfinite().all():
                raise NestlingError(f"layer {layer}: the logits of the model without one of its heads are not finite")
        x_BLd = run(model, x_BLd, [layer], tick)
    return found


def _without(model: NemotronH, x_BLd: Tensor, layer: int, axis: str, head: tuple[int, ...], tick: Tick) -> Tensor:
    heads = x_BLd.new_ones(_shape(model.architecture, axis))
    heads[head] = 0
    whole = dict(hard(model.architecture).layers)[layer]
    tick(layer)
    width = Headless(full=whole.full, kept=whole.kept, axis=axis, heads=heads)
    return model.layers[layer](x_BLd, width, Context.of(x_BLd, None, None), None)


def _shape(architecture: Architecture, axis: str) -> tuple[int, ...]:
    sizes = architecture.sizes()
    return tuple(sizes[name] for name in ordered(axis))
