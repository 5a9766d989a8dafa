"""`SearchSpace`: the sizes a router may pick from, one axis per config field or one per layer that it shapes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nestling.arch.architecture import Architecture
from nestling.arch.nemotron_h import PER_LAYER
from nestling.arch.submodel import Submodel, complete, least_experts
from nestling.errors import NestlingError, nearest

FINEST = ("intermediate_size", "moe_intermediate_size")
"""The fields a repair may adjust, between their candidates too: the first that is there."""

Choice = dict[str, int]  # axis -> size, and "layers" -> how many are kept


@dataclass(frozen=True)
class SearchSpace:
    """Ascending candidate sizes per elastic field, the whole size last; "layers" counts the layers kept.

    A field of `own` is chosen for each of its layers; its axes are `field@layer`, with the layer's index in the whole
    model. Between candidates, sizes are multiples of `multiples`, or of what candidates and 8 have in common.
    """

    candidates: tuple[tuple[str, tuple[int, ...]], ...]
    own: tuple[tuple[str, tuple[int, ...]], ...] = ()
    multiples: tuple[tuple[str, int], ...] = ()

    @staticmethod
    def of(
        architecture: Architecture,
        candidates: Mapping[str, Sequence[int]],
        per_layer: Sequence[str] = (),
        multiple_of: Mapping[str, int] | None = None,
    ) -> "SearchSpace":
        """Check the candidates against the model, and add the whole size of every field that is named."""
        whole = whole_choice(architecture)
        for field, sizes in candidates.items():
            if field not in whole:
                raise NestlingError(f"search space: unknown axis {field!r}; {nearest(field, whole)}")
            for size in sizes:
                _check_candidate(architecture, field, size, whole[field])
        spelled = {field: tuple(sorted({*sizes, whole[field]})) for field, sizes in candidates.items()}
        own = {field: _layers_of(architecture, field, candidates) for field in per_layer}
        multiples = tuple(sorted((multiple_of or {}).items()))
        return SearchSpace(tuple(sorted(spelled.items())), tuple(sorted(own.items())), multiples)

    @property
    def axes(self) -> tuple[str, ...]:
        """What is chosen: one size for each."""
        own = dict(self.own)
        names = ([f"{f}@{layer}" for layer in own[f]] if f in own else [f] for f, _ in self.candidates)
        return tuple(axis for each in names for axis in each)

    def axis(self, field: str, layer: int | None) -> str:
        """The axis that a field's size at a layer is chosen by."""
        return f"{field}@{layer}" if field in dict(self.own) else field

    def step(self, axis: str) -> int:
        """What sizes between the candidates are multiples of."""
        return dict(self.multiples).get(field_of(axis)) or math.gcd(8, *self[axis])

    def __getitem__(self, axis: str) -> tuple[int, ...]:
        return dict(self.candidates)[field_of(axis)]

    def __contains__(self, field: str) -> bool:
        return field in dict(self.candidates)

    def to_json(self) -> dict[str, Any]:
        """Candidates by field; which fields differ per layer and what sizes are multiples of, where that is said."""
        more: dict[str, Any] = {"per_layer": [field for field, _ in self.own], "multiple_of": dict(self.multiples)}
        return {field: list(sizes) for field, sizes in self.candidates} | {k: v for k, v in more.items() if v}


def default_space(architecture: Architecture) -> SearchSpace:
    """Half of every width or more, three quarters of the layers or more: what every tool can hold and run fast.

    One size for all layers, and head counts that their groups share. Hidden and FFN sizes in up to 16 steps of 256, the
    blocks of GGUF's k-quants, or of 64 or 8 in smaller models. Head widths stay: kernels are made for them.
    """
    full = architecture.sizes()
    heads = {"mamba_num_heads": full["g"], "num_attention_heads": full["G"], "n_routed_experts": 1}
    fields = [field for field in architecture.elastic_fields if field != "mamba_head_dim"]
    grains = {field: heads.get(field) or _grain(getattr(architecture, field)) for field in fields}
    least = {"n_routed_experts": least_experts(architecture)}
    candidates = {
        field: _halving(getattr(architecture, field), grain, least.get(field, 1)) for field, grain in grains.items()
    }
    count = len(architecture.hybrid_override_pattern)
    multiples = {field: grain for field, grain in grains.items() if field not in heads}
    return SearchSpace.of(architecture, candidates | {"layers": range(-(-3 * count // 4), count)}, (), multiples)


def _grain(whole: int) -> int:
    return next((grain for grain in (256, 64, 8) if whole >= 8 * grain and whole % grain == 0), 1)


def _halving(whole: int, grain: int, least: int) -> list[int]:
    """From half of the whole on, in at most 16 equal steps, each some grains."""
    half = max(-(-whole // 2 // grain) * grain, grain, least)
    stride = max(-(-(whole - half) // grain // 16), 1) * grain
    return [whole - below for below in range(0, whole - half + 1, stride)]


def field_of(axis: str) -> str:
    return axis.partition("@")[0]


def whole_choice(architecture: Architecture, space: SearchSpace | None = None) -> Choice:
    """The whole model, as sizes of all its fields, or of all axes of a space and of the fields that it has not."""
    sizes = {field: getattr(architecture, field) for field in architecture.elastic_fields}
    sizes |= {"layers": len(architecture.hybrid_override_pattern)}
    axes = space.axes if space else ()
    return {f: size for f, size in sizes.items() if f not in map(field_of, axes)} | {
        a: sizes[field_of(a)] for a in axes
    }


def _check_candidate(architecture: Architecture, field: str, size: Any, whole: int) -> None:
    if type(size) is not int or not 1 <= size <= whole:
        raise NestlingError(f"search space: {field} = {size!r} is outside 1 … {whole}, the size in the whole model")
    if field != "layers":
        complete(architecture, Submodel.from_json({field: size}))


def _layers_of(architecture: Architecture, field: str, candidates: Mapping[str, Any]) -> tuple[int, ...]:
    """The layers that a field shapes, where each may have a size of its own."""
    if field not in PER_LAYER:
        raise NestlingError(f"per_layer: {field!r} is one size for all layers; {nearest(field, PER_LAYER)}")
    if field not in candidates:
        raise NestlingError(f"per_layer: {field!r} has no candidates; {nearest(field, candidates)}")
    kind = PER_LAYER[field]
    return tuple(layer for layer, letter in enumerate(architecture.hybrid_override_pattern) if letter == kind)


def layer_order(architecture: Architecture, ranked: Sequence[int]) -> tuple[int, ...]:
    """The ranked layers with the best attention layer first: stock caches break on a model that has none."""
    attention = [layer for layer in ranked if architecture.hybrid_override_pattern[layer] == "*"][:1]
    return (*attention, *(layer for layer in ranked if layer not in attention))


def pick(architecture: Architecture, order: Sequence[int], choice: Mapping[str, int]) -> Submodel:
    """The sub-model of one size per axis: the first `layers` of the order, in their place, each with its own sizes."""
    layers = tuple(sorted(order[: choice.get("layers", len(order))]))
    sizes: dict[str, Any] = {axis: size for axis, size in choice.items() if "@" not in axis and axis != "layers"}
    for field in {field_of(axis) for axis in choice if "@" in axis}:
        of = [layer for layer in layers if architecture.hybrid_override_pattern[layer] == PER_LAYER[field]]
        if of:
            sizes[field] = tuple(choice[f"{field}@{layer}"] for layer in of)
    return complete(architecture, Submodel(layers=layers, **sizes))
