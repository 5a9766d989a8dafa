"""Reading a nested family, every member of it on its budget, out of a router's picks."""

import heapq
import itertools
import math
from bisect import bisect_right
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from nestling.arch.architecture import Architecture, fields_of
from nestling.arch.cost import block_parameters
from nestling.arch.nemotron_h import FIELDS
from nestling.arch.search import FINEST, Choice, SearchSpace, field_of, layer_order, pick, whole_choice
from nestling.arch.submodel import WHOLE, Submodel, complete, is_within, layer_sizes, least_experts
from nestling.arch.targets import Target, by_size
from nestling.errors import NestlingError

TRIES = 2_000  # combinations of candidates that are looked at for one budget before the search turns greedy
GREED = 1_000  # how much more the distance to the target then counts than the steps away from the picks
RETRIES = 4  # ways to meet a budget that are tried if a smaller one cannot be met within the first


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
    wanting: list[tuple[str, Target]] = []
    for name, target in by_size(architecture, targets).items():
        family[name] = complete(architecture, WHOLE)
        if target.share(architecture) < 1:
            wanting.append((name, target))
    whole = whole_choice(architecture, space)
    for name, choice in _nested(architecture, tuple(order), space, wanting, picks, whole).items():
        family[name] = pick(architecture, order, choice)
    assert all(is_within(architecture, small, large) for large, small in itertools.pairwise(family.values()))
    return family


def check_reachable(architecture: Architecture, space: SearchSpace, targets: Mapping[str, Target]) -> None:
    """Refuse budgets that a search space cannot give, whichever layers a ranking may put first."""
    layers = range(len(architecture.hybrid_override_pattern))
    weight = {layer: block_parameters(architecture, kind, sizes) for layer, kind, sizes in layer_sizes(architecture)}
    light = sorted(layers, key=lambda layer: weight[layer])
    picks = {name: even_picks(space, target.share(architecture)) for name, target in targets.items()}
    refused: NestlingError | None = None
    for order in (light, [*reversed(light)], layers):
        try:
            read_out(architecture, layer_order(architecture, order), space, targets, picks)
            return
        except NestlingError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def even_picks(space: SearchSpace, share: float) -> Choice:
    """About this share of the whole model with every width cut alike; what widths cost goes with their square."""
    return {
        axis: min(space[axis], key=lambda size: abs(size - space[axis][-1] * (share**0.5 if axis != "layers" else 1)))
        for axis in space.axes
    }


def _nested(
    architecture: Architecture,
    order: tuple[int, ...],
    space: SearchSpace,
    wanting: Sequence[tuple[str, Target]],
    picks: Mapping[str, Mapping[str, int]],
    before: Choice,
    larger: str = "the whole model",
) -> dict[str, Choice]:
    """A choice for each budget, within the one before it. The first is as near its picks as the others allow."""
    if not wanting:
        return {}
    (name, target), *rest = wanting
    room = _Room(architecture, order, space, before, target)
    wanted = {axis: min(size, before[axis]) for axis, size in picks[name].items()}
    refused: NestlingError | None = None
    for choice in itertools.islice(room.repaired(wanted), RETRIES):
        inner = {**before, **choice}
        try:
            return {name: inner} | _nested(architecture, order, space, rest, picks, inner, f"budget {name}")
        except NestlingError as error:
            refused = refused or error
    raise refused or room.refusal(name, larger)


@dataclass(frozen=True)
class _Room:
    """Where the choice for a budget is looked for: in the space, and within `before`."""

    architecture: Architecture
    order: tuple[int, ...]
    space: SearchSpace
    before: Choice
    target: Target

    def measure(self, choice: Choice) -> float:
        """What `Target.measure` says of the choice; a block that was counted before is not counted again."""
        sizes = {**self.before, **choice}
        layers = (None, *self.order[: sizes["layers"]])
        return sum(self._block(*self.shaped[layer], sizes) for layer in layers)

    @cached_property
    def shaped(self) -> dict[int | None, tuple[str, tuple[tuple[str, str], ...]]]:
        """The kind of every layer, and by which axis each of its fields is chosen. None: what is outside of layers."""
        kinds: dict[int | None, str] = {None: "model", **dict(enumerate(self.architecture.hybrid_override_pattern))}
        fields = {kind: fields_of("" if kind == "model" else kind) for kind in kinds.values()}
        return {
            layer: (kind, tuple((field, self.space.axis(field, layer)) for field in fields[kind]))
            for layer, kind in kinds.items()
        }

    def _block(self, kind: str, axes: Sequence[tuple[str, str]], sizes: Choice) -> float:
        own = (kind, *(sizes[axis] for _, axis in axes))
        if own not in self.counted:
            named = {field: sizes[axis] for field, axis in axes}
            self.counted[own] = self.target.block(self.architecture, kind, self.architecture.sizes(**named))
        return self.counted[own]

    @cached_property
    def counted(self) -> dict[tuple[object, ...], float]:
        return {}

    @cached_property
    def fine(self) -> tuple[str, ...]:
        """The axes that are adjusted between candidates, those of the best layers first."""
        field = next((field for field in FINEST if field in self.space), None)
        own = dict(self.space.own).get(field or "", ())
        axes = [axis for axis in self.space.axes if field_of(axis) == field]
        ranked = [self.space.axis(field or "", layer) for layer in self.order if layer in own]
        return tuple(ranked or axes)

    @cached_property
    def allowed(self) -> dict[str, tuple[int, ...]]:
        """The candidates of the other axes that the larger budget left."""
        coarse = (axis for axis in self.space.axes if axis not in self.fine)
        return {axis: tuple(size for size in self.space[axis] if size <= self.before[axis]) for axis in coarse}

    @cached_property
    def smallest(self) -> Choice:
        return {axis: self.space[axis][0] for axis in self.space.axes}

    @cached_property
    def stride(self) -> float:
        """The most that one step of one axis can change: all else is as large as it may be."""
        steps = ((axis, pair) for axis, sizes in self.allowed.items() for pair in itertools.pairwise(sizes))
        return max((self.measure({axis: b}) - self.measure({axis: a}) for axis, (a, b) in steps), default=0) or 1

    def gap(self, choice: Choice) -> float:
        """How far the target is from all that the fine axes can make of a choice; 0 within reach."""
        least = self.measure({**choice, **{axis: self.space[axis][0] for axis in self.fine}})
        most = self.measure({**choice, **{axis: self.before[axis] for axis in self.fine}})
        low, high = self.target.range
        return max(least - high, low - most, 0)

    def repaired(self, wanted: Choice) -> Iterator[Choice]:
        """The choices that meet the target, fewest steps of candidates away from `wanted` first.

        In spaces that are too large to look at all that is nearer, those found by closing in on the target.
        """
        if self.measure(self.smallest) > self.target.value or self.measure({}) < self.target.range[0]:
            return
        for greed in (1, GREED):
            if (yield from self._search(wanted, greed)):
                return

    def _search(self, wanted: Choice, greed: int) -> Generator[Choice, None, bool]:
        """A* over steps of candidates (with greed 1); returns whether it has seen all there is."""
        start = tuple(_index(sizes, wanted[axis]) for axis, sizes in self.allowed.items())
        seen, queue = {start}, [(0, 0, start)]
        while queue:
            _, ahead, at = heapq.heappop(queue)
            choice = self._at(wanted, at)
            if (ahead == 0 or at == start) and (found := self.fit(choice)) is not None:
                yield found
            for step in self._steps(at) if len(seen) < TRIES else ():
                if step not in seen:
                    seen.add(step)
                    ahead = math.ceil(greed * self.gap(self._at(wanted, step)) / self.stride)
                    away = sum(abs(a - b) for a, b in zip(step, start, strict=True))
                    heapq.heappush(queue, (away + ahead, ahead, step))
        return len(seen) < TRIES

    def _at(self, wanted: Choice, places: Sequence[int]) -> Choice:
        return {**wanted, **{axis: sizes[i] for (axis, sizes), i in zip(self.allowed.items(), places, strict=True)}}

    def _steps(self, places: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """One candidate up or down on one axis."""
        for i, sizes in enumerate(self.allowed.values()):
            for place in (places[i] - 1, places[i] + 1):
                if 0 <= place < len(sizes):
                    yield (*places[:i], place, *places[i + 1 :])

    def fit(self, choice: Choice) -> Choice | None:
        """The choice with its fine axes moved together, as far up as the target allows, or None."""
        if not self.fine:
            return choice if self.target.is_met(self.measure(choice)) else None
        if self.gap(choice):
            return None
        sizes = [self._sizes(axis) for axis in self.fine]
        start = [_index(each, choice[axis]) for axis, each in zip(self.fine, sizes, strict=True)]

        def at(level: int) -> Choice:
            """Every axis up by level / axes steps; the best layers get what does not divide."""
            up, more = divmod(level, len(sizes))
            places = (begin + up + (i < more) for i, begin in enumerate(start))
            moved = (each[min(max(place, 0), len(each) - 1)] for place, each in zip(places, sizes, strict=True))
            return {**choice, **dict(zip(self.fine, moved, strict=True))}

        reach = len(sizes) * max(map(len, sizes))
        levels = range(-reach, reach + 1)
        found = at(levels[bisect_right(levels, self.target.value, key=lambda level: self.measure(at(level))) - 1])
        return found if self.target.is_met(self.measure(found)) else None

    def _sizes(self, axis: str) -> tuple[int, ...]:
        """Between the smallest candidate and what the larger budget left."""
        least, most = self.space[axis][0], self.before[axis]
        return (*range(least, most, self.space.step(axis)), most)

    def refusal(self, name: str, larger: str) -> NestlingError:
        whole = whole_choice(self.architecture, self.space)
        least, most = self.measure(self.smallest), self.measure({})
        which = "smaller" if least > self.target.value else "more"
        advice = f"add {which} candidates, first of all for {self._limit(whole)}"
        if most < self.target.range[0]:
            advice = f"{larger} leaves no more; ask for less here, or for more there"
        return NestlingError(
            f"budget {name} wants {self.target.show(*self.target.range)}, which the search space cannot give: its "
            f"members have {self.target.show(least, most)}; {advice}"
        )

    def _limit(self, whole: Choice) -> str:
        """The field that limits how small the target gets: most is saved if it goes to a half (or a quarter, …).

        The layers do where no widths, however small, would be enough.
        """
        here = whole | self.smallest
        widths = sorted({field_of(axis) for axis in whole} - {"layers"})

        def count(divisor: int, *fields: str) -> float:
            axes = [axis for axis in whole if field_of(axis) in fields]
            cut = {axis: min(here[axis], _part(self.architecture, axis, whole[axis], divisor)) for axis in axes}
            return self.measure({**here, **cut})

        divisors = [2**n for n in range(1, 16)]
        if count(divisors[-1], *widths) > self.target.value:
            return "layers"
        saving = (divisor for divisor in divisors if count(divisor, *widths) < count(1, *widths))
        divisor = next(saving, divisors[-1])
        return min(widths, key=lambda field: count(divisor, field))


def _part(architecture: Architecture, axis: str, size: int, divisor: int) -> int:
    """An axis of the whole model divided, as far down as it can go."""
    *outer, _ = FIELDS.get(field_of(axis), axis).split()
    step = architecture.sizes()[outer[0]] if outer else 1
    least = least_experts(architecture) if axis == "n_routed_experts" else step
    return max(size // divisor // step * step, least)


def _index(sizes: Sequence[int], wanted: int) -> int:
    return min(range(len(sizes)), key=lambda i: abs(sizes[i] - wanted))
