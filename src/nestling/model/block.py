"""A layer of the model: stored tensors, the norm, a mixer, the residual write; and the MLP, the simplest mixer.

B batch · L length · d hidden · f FFN. Parameters carry their on-disk names; their layouts come from the table.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nestling.arch.architecture import Architecture
from nestling.arch.axes import Layout
from nestling.model.context import Context
from nestling.model.native import product as native
from nestling.model.native.layer import Bound
from nestling.model.native.product import Kept
from nestling.model.pointwise import normalized, squared_relu, wide
from nestling.model.width import Width, prefix, prefix_linear, product


class Part(nn.Module):
    """A module that holds some stored tensors under their on-disk names, and multiplies by their prefixes."""

    def __init__(self, rows: dict[str, tuple[Layout, tuple[int, ...]]], **factory: Any) -> None:
        super().__init__()
        self.layouts = {name: layout for name, (layout, _) in rows.items()}
        for name, (_, shape) in rows.items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for step in path:
                if step not in dict(owner.named_children()):
                    owner.add_module(step, nn.Module())
                owner = owner.get_submodule(step)
            owner.register_parameter(leaf, nn.Parameter(torch.empty(shape, **factory)))

    def stored(self, name: str) -> Tensor | None:
        return self.get_parameter(name) if name in self.layouts else None

    def part(self, name: str, width: Width) -> Tensor:
        """The kept prefix of a stored tensor."""
        held = width.held.get(name)
        return prefix(self.get_parameter(name), self.layouts[name], width) if held is None else held

    def derived(self, width: Width) -> dict[str, Tensor]:
        """What a layer computes from its vectors alone, in float32 or better."""
        return {}

    def bound(self, width: Width) -> Bound | None:
        """The layer at a width whose prefixes were looked up, as one kernel for a few tokens, if there is one."""
        return None

    def _matrix(self, name: str, width: Width) -> tuple[Tensor | Kept, Tensor | None]:
        """A matrix that was looked up, and its bias."""
        weight = width.held.get(f"{name}.weight")
        return width.pieces[f"{name}.weight"] if weight is None else weight, width.held.get(f"{name}.bias")

    def linear(self, x: Tensor, name: str, width: Width) -> Tensor:
        bias = width.held.get(f"{name}.bias")
        if (held := width.held.get(f"{name}.weight")) is not None:
            return product(x, held, bias)
        kept = width.pieces.get(f"{name}.weight")
        if kept is not None and (kernel := native.kernel(x, kept.weight, pieces=True)):
            return native.product(kernel, x, kept, bias)
        weight = self.get_parameter(f"{name}.weight")
        return prefix_linear(x, weight, self.stored(f"{name}.bias"), self.layouts[f"{name}.weight"], width)


class Block(Part):
    """norm, mixer, residual write. Subclasses are the mixers."""

    def __init__(self, architecture: Architecture, layer: int, rows: Any, **factory: Any) -> None:
        super().__init__(rows, **factory)
        self.architecture, self.layer = architecture, layer

    def forward(self, x_BLd: Tensor, width: Width, context: Context, cache: dict[str, Tensor] | None) -> Tensor:
        if width.bound is not None and context.plain and width.bound.suits(x_BLd):
            found = self.few(x_BLd, width.bound, width, context, cache)
            if found is not None:
                return found
        normed = rms_norm(x_BLd, self.part("norm.weight", width), width, self.architecture.layer_norm_epsilon)
        self.show(context, "norm", normed)
        written = width.mask(self.mix(normed, width, context, cache), "d")
        if isinstance(width.gate, Tensor):
            return x_BLd + written * width.gate
        return torch.add(x_BLd, written, alpha=width.gate)

    def few(
        self, x_BLd: Tensor, bound: Bound, width: Width, context: Context, cache: dict[str, Tensor] | None
    ) -> Tensor | None:
        """The layer as one kernel; None where it is not for these tokens."""
        return bound(x_BLd)

    def _bound(self, kernel: str, width: Width, matrices: Sequence[str], *more: Tensor | float) -> Bound | None:
        known = {*width.held, *width.pieces}
        if width.masked or width.gate != 1 or not known.issuperset(f"{name}.weight" for name in matrices):
            return None
        norm, eps = width.held["norm.weight"], self.architecture.layer_norm_epsilon
        return Bound.of(kernel, norm, eps, [self._matrix(name, width) for name in matrices], *more)

    def show(self, context: Context, site: str, activation: Tensor) -> None:
        if context.watch is not None:
            context.watch(self.layer, site, activation)

    def mix(self, x_BLd: Tensor, width: Width, context: Context, cache: dict[str, Tensor] | None) -> Tensor:
        raise NotImplementedError


class MLP(Block):
    def bound(self, width: Width) -> Bound | None:
        return self._bound("mlp", width, ("mixer.up_proj", "mixer.down_proj"))

    def mix(self, x_BLd: Tensor, width: Width, context: Context, cache: dict[str, Tensor] | None) -> Tensor:
        up_BLf = self.linear(x_BLd, "mixer.up_proj", width)
        hidden_BLf = squared_relu(up_BLf)
        self.show(context, "up", up_BLf)
        self.show(context, "hidden", hidden_BLf)
        return self.linear(width.mask(hidden_BLf, "f"), "mixer.down_proj", width)


def rms_norm(x: Tensor, weight: Tensor, width: Width, eps: float) -> Tensor:
    """x / sqrt(Σ x² / active width + eps) · weight, over the hidden channels (masked ones are zero in x)."""
    return normalized(wide(x), wide(weight), width.active("d"), eps).to(x.dtype)
