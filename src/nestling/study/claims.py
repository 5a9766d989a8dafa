"""The paper's claims one by one: what it printed, what was measured here, and what that says in plain words.

Published figures are those of Nemotron Elastic, arXiv 2511.16664, and its announcement.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nestling.study.measure import Measure
from nestling.study.seeds import Figure, paired
from nestling.study.tokens import Results

HOLDS, FAILS, OPEN, MISSING = "holds here", "does not hold here", "not known", "not measured"


@dataclass(frozen=True)
class Claim:
    what: str
    published: str
    measured: str
    verdict: str
    words: str


def claims(results: Results) -> list[Claim]:
    costs = (claim for goal in results.goals() for claim in _cost(goal))
    return [*_quality(results), *costs, *_memory(results), *_stages(results), *_design(results)]


def times(figure: Figure) -> str:
    return figure.said(lambda ratio: f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.0f}×").replace("× ±", " ±")


def gap(results: Results, one: str | None, other: str | None, size: str) -> Figure:
    """Worth at the end of one arm minus another's, paired by seed."""
    if one is None or other is None:
        return Figure(results.seeds, {})
    return paired(results.at(one, size), results.at(other, size))


def _quality(results: Results) -> Iterator[Claim]:
    ours = results.first("elastic")
    for arm in results.arms("alone"):
        size = results.sizes(arm)[0]
        found = gap(results, ours, arm, size)
        yield Claim(
            f"{size} of the family is as good as the same size distilled alone, after as many tokens each",
            "9B: 75.95 against 75.99 on average",
            results.measure.difference(found),
            *_equal(results.measure, found, "the family's size"),
        )


def _equal(measure: Measure, found: Figure, name: str) -> tuple[str, str]:
    """Whether it is as good: not worse by more than the margin, whatever it may be better by."""
    if found.mean is None or found.half is None:
        return MISSING, "Seeds are missing, or one alone says nothing about spread."
    low, high, amount = found.mean - found.half, found.mean + found.half, measure.amount(abs(found.mean), found.half)
    if low > 0:
        return HOLDS, f"{name.capitalize()} is better by {amount}."
    if low >= -measure.margin:
        return HOLDS, f"{name.capitalize()} is worse by {measure.amount(-low)} at most, if at all."
    if high < 0:
        return FAILS, f"{name.capitalize()} is worse by {amount}."
    return OPEN, f"The interval includes no difference, and being worse by more than {measure.amount(measure.margin)}."


def _cost(results: Results) -> Iterator[Claim]:
    rivals = (
        ("alone", False, "Distilling each size alone, no search paid for, takes more tokens than one run", "–", 1.0),
        ("searched", True, "Searching each size and distilling it alone takes more tokens than one run", "7×", 7.0),
        ("scratch", False, "Training each size from nothing takes more tokens than one run", "360×", 360.0),
    )  # fmt: skip
    for ours in results.arms("elastic"):
        for role, search, what, published, factor in rivals:
            for arms in results.rivals(role):
                found = results.ratio(ours, arms, "student", search)
                sizes = " and ".join(results.covered(arms))
                title = f"{what} ({sizes}, to {results.measure.asked(results.reach)}; {ours})"
                there = all((arm, seed) in results.rows for arm in (ours, *arms) for seed in results.seeds)
                said = _cheaper(found, factor) if there else (MISSING, "Runs are missing.")
                yield Claim(title, published, times(found), *said)


def _cheaper(found: Figure, published: float) -> tuple[str, str]:
    if found.mean is None:
        return (
            OPEN,
            "With some seed neither side got there, or each of them did with another seed; so there is no mean.",
        )
    if found.ceilings:
        seeds = ", ".join(map(str, sorted(found.ceilings)))
        words = f"The elastic run did not get there with seed {seeds}, so that this is an upper bound"
        return (FAILS, f"{words}: one run is dearer.") if found.mean < 1 else (OPEN, f"{words}.")
    if found.bounds and found.mean < published:
        seeds = ", ".join(map(str, sorted(found.bounds)))
        words = f"The rival did not get there with seed {seeds}, so that this is a lower bound"
        if min(found.values.values()) > 1:
            return HOLDS, f"{words}: one run is cheaper, by how much is not known."
        return OPEN, f"{words}, and too low a one to say which is cheaper."
    low = found.low if found.low is not None else found.mean
    high = found.high if found.high is not None else found.mean
    if low > 1:
        close = "as the paper says" if high >= published else f"but not {published:g} times"
        return HOLDS, f"One run is cheaper, {close}."
    if high < 1:
        return FAILS, "One run is dearer."
    return OPEN, "The interval includes no saving at all."


def _memory(results: Results) -> Iterator[Claim]:
    ours = results.first("elastic")
    if ours is None:
        return
    found = Figure.of(results.seeds, lambda seed: saved(results, ours, seed))
    verdict = MISSING if found.mean is None else HOLDS
    yield Claim(
        "Memory that all sizes take together, against one checkpoint each",
        "−43 % (12B + 9B apart against three sizes in one)",
        found.said(lambda share: f"−{100 * share:.0f} %" if share > 0.01 else f"{100 * share:.0f} %"),
        verdict,
        "Arithmetic on the sizes: the largest holds the others, for storing and for serving alike.",
    )


def saved(results: Results, arm: str, seed: int) -> float | None:
    """Share of the bytes that one storage saves."""
    if (arm, seed) not in results.rows:
        return None
    sizes = [member["bytes"] for member in results.rows[arm, seed]["family"].values()]
    return float(1 - max(sizes) / sum(sizes))


def _stages(results: Results) -> Iterator[Claim]:
    even, *others = results.arms("sampling") or [""]
    if not even:
        return
    sizes = ["100%", *results.sizes(even)]
    gains = {size: lift(results, even, size) for size in sizes}
    found = paired(gains[sizes[-1]], gains[sizes[0]])
    measure = results.measure
    said = " / ".join(f"{size} {measure.difference(gain)}" for size, gain in reversed(gains.items()))
    yield Claim(
        "The second stage, of longer problems, lifts the smallest size most",
        "AIME-25: 6B +11.3, 9B +6.7, 12B +2.9 points (+19.8 / 9.7 / 4.0 %)",
        said,
        *_more(measure, found, "The smallest gains", "the largest", ("more than", "less than")),
    )
    for weighted in others[:1]:
        largest, smallest = (gap(results, weighted, even, size) for size in (sizes[0], sizes[-1]))
        yield Claim(
            "0.5 / 0.3 / 0.2 in the second stage protects the largest",
            "AIME-25: 12B 72.29 → 75.83",
            f"{sizes[0]} {measure.difference(largest)}",
            *_more(measure, largest, "The largest ends", "where it does with even shares"),
        )
        yield Claim(
            "and does the smallest no harm",
            "AIME-25: 6B 67.71 → 68.13",
            f"{sizes[-1]} {measure.difference(smallest)}",
            *_equal(measure, smallest, "the smallest"),
        )


def lift(results: Results, arm: str, size: str) -> Figure:
    """Worth at the end minus that at the end of the first stage."""
    stage = results.about["arms"][arm]["train"]["stages"][0]["steps"]
    return paired(results.at(arm, size), results.at(arm, size, stage))


def _more(
    measure: Measure,
    found: Figure,
    subject: str,
    against: str,
    sides: tuple[str, str] = ("better than", "worse than"),
) -> tuple[str, str]:
    if found.mean is None or found.half is None:
        return MISSING, "Seeds are missing."
    side = sides[found.mean < 0]
    said = f"{subject} {measure.amount(abs(found.mean), found.half)} {side} {against}"
    if abs(found.mean) <= found.half:
        return OPEN, f"{said}, which may be nothing."
    return (HOLDS if found.mean > 0 else FAILS), f"{said}."


def _design(results: Results) -> Iterator[Claim]:
    ours = results.first("elastic")
    sizes: Sequence[str] = results.sizes(ours) if ours else ()
    rivals = (
        ("uniform", "The router's sizes are better than sizes picked by hand: {}", "not published"),
        ("untrained", "Training is needed at all: {} against the same slice untrained", "not published"),
    )
    for role, what, published in rivals:
        for size in sizes if results.first(role) else ():
            found = gap(results, ours, results.first(role), size)
            said = results.measure.difference(found)
            verdict = _more(results.measure, found, f"{size} ends", "its rival")
            yield Claim(what.format(size), published, said, *verdict)
    if results.begun("sizes"):
        yield _flat(results)


def _flat(results: Results) -> Claim:
    """The smallest size that all runs have, with the most sizes against the fewest."""
    runs = sorted([*results.begun("sizes"), str(results.first("elastic"))], key=lambda arm: len(results.sizes(arm)))
    common = [size for size in results.sizes(runs[0]) if all(size in results.sizes(arm) for arm in runs)]
    size = common[-1]
    said = "; ".join(f"{len(results.sizes(a)) + 1} sizes: {results.measure.said(results.at(a, size))}" for a in runs)
    found = paired(results.at(runs[-1], size), results.at(runs[0], size))
    verdict, words = _equal(results.measure, found, f"{size} among many sizes")
    return Claim(
        f"A run costs the same data however many sizes it makes: {size} after the same tokens drawn",
        "one run, 110B tokens, for any number",
        said,
        verdict,
        f"{words} Each size is trained on every batch, so that computing grows with their number; the data do not.",
    )
