"""A figure of several seeds: never a mean over fewer than were asked for, and a 95 % interval beside it."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""97.5 % points of Student's t for 1, 2, … degrees of freedom."""


@dataclass(frozen=True)
class Figure:
    """One value per seed. A seed without one is missing; a bound says that the true value is not below it."""

    asked: tuple[int, ...]
    values: Mapping[int, float]
    bounds: frozenset[int] = field(default_factory=frozenset)

    @staticmethod
    def of(asked: Iterable[int], value: Callable[[int], float | None]) -> "Figure":
        seeds = tuple(asked)
        found = {seed: value(seed) for seed in seeds}
        return Figure(seeds, {seed: given for seed, given in found.items() if given is not None})

    @property
    def missing(self) -> tuple[int, ...]:
        return tuple(seed for seed in self.asked if seed not in self.values)

    @property
    def is_whole(self) -> bool:
        return not self.missing

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values.values()) if self.is_whole else None

    @property
    def half(self) -> float | None:
        """Half of Student's 95 % interval of the mean; None for one seed, and where a bound or a seed is no value."""
        count = len(self.asked)
        if not self.is_whole or self.bounds or count < 2:
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
        """`mean ± half`, or each seed's own value where some are missing; `≥` before what is a bound."""
        if self.mean is not None:
            bound, half = "≥ " if self.bounds else "", self.half
            return f"{bound}{form(self.mean)}" + (f" ± {form(half)}" if half is not None else "")
        if not self.values:
            return "missing"
        each = ("≥ " * (s in self.bounds) + form(self.values[s]) if s in self.values else "missing" for s in self.asked)
        return ", ".join(each)


def paired(one: Figure, other: Figure) -> Figure:
    """one - other, seed by seed; a seed that lacks either is missing."""
    return Figure.of(
        one.asked, lambda s: one.values[s] - other.values[s] if {s} <= {*one.values} & {*other.values} else None
    )
