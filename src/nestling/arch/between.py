"""Sizes that were not trained themselves: the sub-model on the line between two neighbours of a family."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nestling.arch.architecture import Architecture, fields_of
from nestling.arch.nemotron_h import FIELDS, PER_LAYER
from nestling.arch.search import FINEST
from nestling.arch.submodel import WHOLE, Submodel, complete, is_within
from nestling.arch.targets import Target
from nestling.errors import NestlingError

STEPS = 1024  # points tried on the line
NEARBY = 256  # of them on either side, for the one whose fine adjustment meets the target
_FLOOR = {
    "hidden_size": 4,
    "intermediate_size": 4,
    "moe_intermediate_size": 4,
    "moe_shared_expert_intermediate_size": 4,
    "mamba_num_heads": 2,
    "num_attention_heads": 2,
}  # of the smallest member's sizes, one in so many
_FINE = (*FINEST, "hidden_size")  # adjusted last, the first that the model has


def between(
    architecture: Architecture, order: Sequence[int], family: Mapping[str, Submodel], name: str, target: Target
) -> Submodel:
    """The sub-model for `target`, 98–100 % of it, inside its larger neighbour and around its smaller one.

    order: the layers, the one to keep longest first. Below the smallest of the family the line goes on to a quarter of
    its hidden and FFN sizes and half of its heads. Sizes are multiples of 8, of 64 where they are large.
    """
    members = [complete(architecture, submodel) for submodel in (WHOLE, *family.values())]
    members.sort(key=lambda member: -target.measure(architecture, member))
    members.append(_floor(architecture, members[-1]))
    counts = [target.measure(architecture, member) for member in members]
    if target.value >= counts[0]:
        return _whole(name, target, members[0], counts[0])
    if target.value < counts[-1]:
        share = f"; did you mean '{name}%'?" if name.isdigit() and int(name) <= 100 else ""
        least = f"the smallest member that can be cut has {target.show(counts[-1])}"
        raise NestlingError(f"budget {name!r} is too small: {least}{share}")
    place = next(i for i, count in enumerate(counts) if count <= target.value)
    if counts[place] == target.value:
        return members[place]
    return _on_the_line(architecture, order, members[place - 1], members[place], name, target)


def _whole(name: str, target: Target, whole: Submodel, count: float) -> Submodel:
    if target.of in ("parameters", "active parameters") and target.value > count:
        asked, held = target.show(target.value), target.show(count)
        raise NestlingError(f"budget {name!r} asks for {asked}; the whole model has {held}")
    return whole


def _floor(architecture: Architecture, smallest: Submodel) -> Submodel:
    """Where the line ends below the smallest member: the shares of `_FLOOR`, everything else as it is."""

    def cut(field: str, size: int) -> int:
        step = _step(architecture, field)
        return min(max(size // _FLOOR[field] // step, 1) * step, size)

    sizes: dict[str, Any] = {
        field: tuple(cut(field, size) for size in value) if isinstance(value, tuple) else cut(field, value)
        for field, value in smallest.given().items()
        if field in _FLOOR
    }
    return complete(architecture, replace(smallest, **sizes))


def _on_the_line(
    architecture: Architecture, order: Sequence[int], larger: Submodel, smaller: Submodel, name: str, target: Target
) -> Submodel:
    spare = [layer for layer in order if layer in _layers(larger) and layer not in _layers(smaller)]

    def point(dropped: int, at: int, fine: int) -> Submodel:
        layers = sorted({*_layers(smaller), *spare[: len(spare) - dropped]})
        return _point(architecture, layers, larger, smaller, at, fine)

    def count(*steps: int) -> float:
        return target.measure(architecture, point(*steps))

    best = 0.0
    line = _first_within(target, lambda at: count(at * len(spare) // STEPS, at, at))
    for dropped in _nearest_first(line * len(spare) // STEPS, len(spare), len(spare)):
        width = _first_within(target, lambda at, dropped=dropped: count(dropped, at, at))
        for at in _nearest_first(width, STEPS, NEARBY):
            fine = _first_within(target, lambda step, dropped=dropped, at=at: count(dropped, at, step))
            if (found := count(dropped, at, fine)) <= target.value:
                best = max(best, found)
            if target.is_met(found):
                member = point(dropped, at, fine)
                assert is_within(architecture, smaller, member)
                assert is_within(architecture, member, larger)
                return member
    raise NestlingError(
        f"budget {name!r} wants {target.show(*target.range)}; the nearest that sizes in "
        f"steps of {_step(architecture, 'hidden_size')} give is {target.show(best)}"
    )


def _first_within(target: Target, count: Any) -> int:
    """The first step 0 … STEPS at which the count is within the target (it falls with each step), else the last."""
    low, high = 0, STEPS
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if count(middle) <= target.value else (middle + 1, high)
    return low


def _nearest_first(start: int, last: int, reach: int) -> list[int]:
    """The numbers 0 … last that are at most `reach` from start, nearest first."""
    return sorted(range(max(start - reach, 0), min(start + reach, last) + 1), key=lambda at: abs(at - start))


def _point(
    architecture: Architecture, layers: Sequence[int], larger: Submodel, smaller: Submodel, at: int, fine: int
) -> Submodel:
    """These layers, with every width at step `at` of the way from the larger to the smaller, the finest at `fine`."""
    finest = next(field for field in _FINE if field in architecture.elastic_fields)
    kinds = "".join(architecture.hybrid_override_pattern[layer] for layer in layers)
    sizes: dict[str, Any] = {}
    for field, large in larger.given().items():
        if field == "layers" or field not in fields_of(kinds):
            continue
        if (small := getattr(smaller, field)) is None:  # no such block is left in the smaller one
            small = getattr(_floor(architecture, larger), field)
        step, share = _step(architecture, field), fine if field == finest else at
        if field not in PER_LAYER:
            sizes[field] = _between(large, small, share, step)
            continue
        of = [layer for layer in layers if architecture.hybrid_override_pattern[layer] == PER_LAYER[field]]
        first, last = (_per_layer(architecture, field, member) for member in (larger, smaller))
        widest = max(last.values(), default=min(small) if isinstance(small, tuple) else small)
        ends = ((first[layer], min(last.get(layer, widest), first[layer])) for layer in of)
        if of:  # a layer that the smaller one has not narrows like its widest
            sizes[field] = tuple(_between(*pair, share, step) for pair in ends)
    return complete(architecture, Submodel(layers=tuple(layers), **sizes))


def _layers(submodel: Submodel) -> tuple[int, ...]:
    assert submodel.layers is not None
    return submodel.layers


def _per_layer(architecture: Architecture, field: str, submodel: Submodel) -> dict[int, int]:
    """The size of a field in each layer that has it."""
    kind, value = PER_LAYER[field], getattr(submodel, field)
    of = [layer for layer in _layers(submodel) if architecture.hybrid_override_pattern[layer] == kind]
    return dict(zip(of, value if isinstance(value, tuple) else (value,) * len(of), strict=True))


def _between(large: int, small: int, share: int, step: int) -> int:
    """The nearest multiple of `step` where there is one, falling from large to small as share goes from 0 to STEPS."""
    if share in (0, STEPS):
        return small if share else large
    wanted = (large * STEPS - share * (large - small)) / STEPS
    return min(max(round(wanted / step) * step, small), large)


def _step(architecture: Architecture, field: str) -> int:
    """What a size is a multiple of: one head per group, 64 in large models for tensor cores, 8 in others."""
    *outer, _ = FIELDS[field].split()
    whole = getattr(architecture, field)
    if outer:
        return architecture.sizes()[outer[0]]
    if field in ("hidden_size", "moe_shared_expert_intermediate_size") and whole >= 2048:
        return 64
    return 8 if whole >= 64 else 1
