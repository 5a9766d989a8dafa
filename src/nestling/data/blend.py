"""Rows of several sources, mixed by weight: which row of which source comes when, without counting up to it."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import floor

Shares = tuple[Fraction, ...]
"""What each source gives of the rows; all above 0, their sum is 1."""


def shares(weights: Sequence[float]) -> Shares:
    exact = [Fraction(weight) for weight in weights]
    return tuple(weight / sum(exact) for weight in exact)


def taken(shares: Shares, count: int) -> list[int]:
    """How many of the first `count` rows each source gives.

    Row k of a source with share w is due at (k + 1/2) / w, and rows come as they are due: of the first n rows a source
    never has a row more or less than n · w asks for. At a time t there are ⌊t w + 1/2⌋ of it.
    """
    before = max(count - len(shares), 0)
    given = [floor(before * share + Fraction(1, 2)) for share in shares]
    while sum(given) < count:
        given[_next(shares, given)] += 1
    return given


def blend(shares: Shares, start: int, count: int) -> Iterator[tuple[int, int]]:
    """(source, which row of it) for `count` rows, from row `start` on."""
    given = taken(shares, start)
    for _ in range(count):
        source = _next(shares, given)
        yield source, given[source]
        given[source] += 1


def lasting(shares: Shares, rows: Sequence[int]) -> int:
    """How many rows come before a source has no more, if each has so many."""

    def is_over(count: int) -> bool:
        return any(given > there for given, there in zip(taken(shares, count), rows, strict=True))

    return bisect_right(range(sum(rows) + 1), False, key=is_over) - 1


def _next(shares: Shares, given: Sequence[int]) -> int:
    return min(range(len(shares)), key=lambda source: (given[source] + Fraction(1, 2)) / shares[source])
