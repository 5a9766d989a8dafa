"""A figure of several seeds: never a mean over fewer than were asked for, and a 95 % interval beside it."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""97.5 % points of Student's t for 1, 2, … degrees of freedom."""


@dataclass(frozen=True)
class Figure:
    """One value per seed; a seed without one is missing.

    bounds, ceilings: seeds of which the value is known not to be below, or not to be above, the one given.
    """

    asked: tuple[int, ...]
    values: Mapping[int, float]
    bounds: frozenset[int] = field(default_factory=frozenset)
    ceilings: frozenset[int] = field(default_factory=frozenset)

    @staticmethod
    def of(asked: Iterable[int], value: Callable[[int], float | None]) -> "Figure":
        seeds = tuple(asked)
        found = {seed: value(seed) for seed in seeds}
        return Figure(seeds, {seed: given for seed, given in found.items() if given is not None})

    def each(self, form: Callable[[float], float]) -> "Figure":
        """What a form makes of each value; one that turns their order around is for figures without a bound."""
        return replace(self, values={seed: form(value) for seed, value in self.values.items()})

    @property
    def missing(self) -> tuple[int, ...]:
        return tuple(seed for seed in self.asked if seed not in self.values)

    @property
    def is_whole(self) -> bool:
        return not self.missing

    @property
    def mean(self) -> float | None:
        """Of all seeds, a bound or a ceiling itself if some of them are; None where both are, or one is missing."""
        if not self.is_whole or (self.bounds and self.ceilings):
            return None
        return statistics.fmean(self.values.values())

    @property
    def half(self) -> float | None:
        """Half of Student's 95 % interval of the mean; None for one seed, and where a bound or a seed is no value."""
        count = len(self.asked)
        if not self.is_whole or self.bounds or self.ceilings or count < 2:
            return None
        point = STUDENT_T[count - 2] if count - 2 < len(STUDENT_T) else 1.96
        return point * statistics.stdev(self.values.values()) / math.sqrt(count)

    @property
    def low(self) -> float | None:
        return None if self.mean is None or self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        return None if self.mean is None or self.half is None else self.mean + self.half

    def said(self, form: Callable[[float], str]) -> str:
        """`mean ± half`, or each seed's own value where there is no mean; `≥` and `≤` before what is one-sided."""
        if self.mean is not None:
            side = "≥ " if self.bounds else "≤ " if self.ceilings else ""
            return f"{side}{form(self.mean)}" + (f" ± {form(self.half)}" if self.half is not None else "")
        if not self.values:
            return "missing"
        sides = {**dict.fromkeys(self.bounds, "≥ "), **dict.fromkeys(self.ceilings, "≤ ")}
        return ", ".join(
            sides.get(seed, "") + form(self.values[seed]) if seed in self.values else "missing" for seed in self.asked
        )


def paired(one: Figure, other: Figure) -> Figure:
    """one - other, seed by seed; a seed that lacks either is missing."""
    return Figure.of(
        one.asked, lambda s: one.values[s] - other.values[s] if {s} <= {*one.values} & {*other.values} else None
    )
