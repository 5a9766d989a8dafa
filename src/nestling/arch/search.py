"""`SearchSpace`: the sizes the router may pick from; and reading a nested, exactly budgeted family out of its picks."""

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nestling.arch.nemotron_h import FIELDS
from nestling.arch.submodel import WHOLE, Architecture, Submodel, complete, is_within
from nestling.arch.targets import LEAST, Target, by_size
from nestling.errors import NestlingError, nearest

FINEST = ("intermediate_size", "moe_intermediate_size")
"""The axes a repair may adjust, in multiples of 8 (or of what candidates have in common): the first that is there."""

Choice = dict[str, int]  # field -> size, and "layers" -> how many are kept


@dataclass(frozen=True)
class SearchSpace:
    """Ascending candidate sizes per elastic field, the whole size last; "layers" counts the layers kept."""

    candidates: tuple[tuple[str, tuple[int, ...]], ...]

    @staticmethod
    def of(architecture: Architecture, candidates: Mapping[str, Sequence[int]]) -> "SearchSpace":
        """Check the candidates against the model, and add the whole size of every field that is named."""
        whole = _whole(architecture)
        for field, sizes in candidates.items():
            if field not in whole:
                raise NestlingError(f"search space: unknown axis {field!r}; {nearest(field, whole)}")
            for size in sizes:
                _check_candidate(architecture, field, size, whole[field])
        spelled = {field: tuple(sorted({*sizes, whole[field]})) for field, sizes in candidates.items()}
        return SearchSpace(tuple(sorted(spelled.items())))

    def __getitem__(self, field: str) -> tuple[int, ...]:
        return dict(self.candidates)[field]

    def __contains__(self, field: str) -> bool:
        return field in dict(self.candidates)

    def to_json(self) -> dict[str, list[int]]:
        return {field: list(sizes) for field, sizes in self.candidates}


def _whole(architecture: Architecture) -> Choice:
    sizes = {field: getattr(architecture, field) for field in architecture.elastic_fields}
    return sizes | {"layers": len(architecture.hybrid_override_pattern)}


def _check_candidate(architecture: Architecture, field: str, size: Any, whole: int) -> None:
    if type(size) is not int or not 1 <= size <= whole:
        raise NestlingError(f"search space: {field} = {size!r} is outside 1 … {whole}, the size in the whole model")
    if field != "layers":
        complete(architecture, Submodel.from_json({field: size}))


def layer_order(architecture: Architecture, ranked: Sequence[int]) -> tuple[int, ...]:
    """The ranked layers with the best attention layer first: stock caches break on a model that has none."""
    attention = [layer for layer in ranked if architecture.hybrid_override_pattern[layer] == "*"][:1]
    return (*attention, *(layer for layer in ranked if layer not in attention))


def pick(architecture: Architecture, order: Sequence[int], choice: Mapping[str, int]) -> Submodel:
    """The sub-model of one size per axis: the first `layers` of the order, in their place."""
    sizes = {field: size for field, size in choice.items() if field != "layers"}
    layers = tuple(sorted(order[: choice.get("layers", len(order))]))
    return complete(architecture, Submodel(layers=layers, **sizes))


def read_out(
    architecture: Architecture,
    order: Sequence[int],
    space: SearchSpace,
    targets: Mapping[str, Target],
    picks: Mapping[str, Mapping[str, int]],
) -> dict[str, Submodel]:
    """The family: budgets largest first, each within the one before, each repaired to 98–100 % of its target.

    picks: per budget one candidate per axis (a router's argmax); a budget that wants the whole model needs none.
    Raises if a budget cannot be met inside the space.
    """
    family: dict[str, Submodel] = {}
    before = _whole(architecture)
    for name, target in by_size(architecture, targets).items():
        if target.share(architecture) >= 1:
            family[name] = complete(architecture, WHOLE)
            continue
        wanted = {field: min(size, before[field]) for field, size in picks[name].items()}
        before = {**before, **_repair(architecture, order, space, name, target, wanted, before)}
        family[name] = pick(architecture, order, before)
    assert all(is_within(architecture, small, large) for large, small in itertools.pairwise(family.values()))
    return family


def _repair(
    architecture: Architecture,
    order: Sequence[int],
    space: SearchSpace,
    name: str,
    target: Target,
    wanted: Choice,
    before: Choice,
) -> Choice:
    """The choice nearest to `wanted`, in steps of candidates, that meets the target with its finest axis adjusted."""
    for choice in _nearest_first(space, wanted, before):
        if (repaired := _fit_finest(architecture, order, space, target, choice, before)) is not None:
            return repaired
    smallest = {field: sizes[0] for field, sizes in space.candidates}
    least, most = (target.measure(architecture, pick(architecture, order, c)) for c in (smallest, before))
    which = "smaller" if least > target.value else "more"
    advice = f"add {which} candidates, first of all for {_limit(architecture, order, smallest, target)}"
    if most < target.range[0]:
        advice = "the next larger budget leaves no more; ask for less here, or for more there"
    raise NestlingError(
        f"budget {name} wants {target.show(*target.range)}, which the search space cannot give: its members have "
        f"{target.show(least, most)}; {advice}"
    )


def _limit(architecture: Architecture, order: Sequence[int], smallest: Choice, target: Target) -> str:
    """The axis that limits how small the target gets: most is saved if it goes to a half (or a quarter, …).

    The layers do where no widths, however small, would be enough.
    """
    whole = _whole(architecture)
    here = whole | smallest
    widths = {field: size for field, size in whole.items() if field != "layers"}

    def count(divisor: int, *fields: str) -> float:
        cut = {field: min(here[field], _part(architecture, field, whole[field], divisor)) for field in fields}
        return target.measure(architecture, pick(architecture, order, here | cut))

    divisors = [2**n for n in range(1, 16)]
    if count(divisors[-1], *widths) > target.value:
        return "layers"
    saving = (divisor for divisor in divisors if count(divisor, *widths) < count(1, *widths))
    divisor = next(saving, divisors[-1])
    return min(widths, key=lambda field: count(divisor, field))


def _part(architecture: Architecture, field: str, size: int, divisor: int) -> int:
    """An axis of the whole model divided, as far down as it can go."""
    *outer, _ = FIELDS.get(field, field).split()
    step = architecture.sizes()[outer[0]] if outer else 1
    least = architecture.num_experts_per_tok if field == "n_routed_experts" else step
    return max(size // divisor // step * step, least)


def _nearest_first(space: SearchSpace, wanted: Choice, before: Choice) -> Iterator[Choice]:
    coarse = [field for field, _ in space.candidates if field != _finest(space)]
    allowed = {field: [size for size in space[field] if size <= before[field]] for field in coarse}
    here = {field: _index(allowed[field], wanted[field]) for field in coarse}
    steps = itertools.product(*(range(len(allowed[field])) for field in coarse))
    ordered = sorted(steps, key=lambda at: sum(abs(i - here[field]) for i, field in zip(at, coarse, strict=True)))
    for at in ordered:
        yield {**wanted, **{field: allowed[field][i] for i, field in zip(at, coarse, strict=True)}}


def _finest(space: SearchSpace) -> str | None:
    return next((field for field in FINEST if field in space), None)


def _index(sizes: Sequence[int], wanted: int) -> int:
    return min(range(len(sizes)), key=lambda i: abs(sizes[i] - wanted))


def _fit_finest(
    architecture: Architecture, order: Sequence[int], space: SearchSpace, target: Target, choice: Choice, before: Choice
) -> Choice | None:
    """The choice with the largest FFN that meets the target, or None. What a target counts grows with the FFN."""
    finest = _finest(space)

    def count(size: int) -> float:
        sized = choice if finest is None else {**choice, finest: size}
        return target.measure(architecture, pick(architecture, order, sized))

    if finest is None:
        return choice if target.is_met(count(0)) else None
    smallest, largest = space[finest][0], before[finest]
    if count(smallest) > target.value or count(largest) < LEAST * target.value:
        return None
    step = math.gcd(8, *space[finest])
    sizes = range(smallest, largest + 1, step)
    size = sizes[bisect_right(sizes, target.value, key=count) - 1]
    return {**choice, finest: size} if target.is_met(count(size)) else None
