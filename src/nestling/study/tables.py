"""The paper's three tables with what was measured beside what it printed, and what every arm ended at."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nestling.arch.architecture import Architecture
from nestling.arch.cost import Cost, cost
from nestling.arch.submodel import Submodel
from nestling.evaluate.report import BLANK, short
from nestling.study.claims import saved, times
from nestling.study.seeds import Figure
from nestling.study.tokens import COUNTS, Json, Results, Spent

CONTEXT, STREAMS = 4096, 16
"""Tokens of a conversation, and conversations at a time, that caches are counted for."""


@dataclass(frozen=True)
class Table:
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def tables(results: Results) -> list[Table]:
    """All of them; those that compare with an elastic arm only where the study has one."""
    if results.first("elastic") is None:
        return [ends(results)]
    goals = [make(goal) for goal in results.goals() for make in (tokens, each_size)]
    return [*goals, memory(results), compare(results), ends(results)]


def share(figure: Figure) -> str:
    return figure.said(lambda value: f"{100 * value:.1f}") + (" %" if figure.values else "")


def count(figure: Figure) -> str:
    return figure.said(lambda value: short(value))


# ---- tokens

SYSTEMS = (
    ("alone", False, "each size distilled alone"),
    ("searched", False, "each size distilled alone, as a search chose it; the search not counted"),
    ("searched", True, "each size distilled alone, and the search of it"),
    ("scratch", False, "each size from nothing"),
)


def tokens(results: Results) -> Table:
    """Tokens until every size has reached what is asked for, and their ratio to the elastic run's."""
    ours = str(results.first("elastic"))
    rows: list[tuple[str, ...]] = [
        ("published: one elastic run", "110 B (1×)", *[BLANK] * 3),
        ("published: NanoV2 compression, 480 B of it exploring", "750 B (7×)", *[BLANK] * 3),
        ("published: pre-training 6B and 9B", "40 T (360×)", *[BLANK] * 3),
    ]
    for arm in [*results.arms("elastic"), *results.arms("uniform")]:
        spent = {seed: results.spent(arm, seed) for seed in results.seeds}
        rows.append((_name(results, arm), *_counts(results, spent, results.sizes(arm), itself=arm == ours)))
    for role, search, name in SYSTEMS:
        for arms in results.rivals(role):
            sizes, spent = results.covered(arms), {seed: results.apart(arms, seed, search) for seed in results.seeds}
            rows.append((f"{name} ({' and '.join(sizes)})", *_counts(results, spent, sizes)))
    return Table(
        f"Tokens until every size has {results.measure.asked(results.reach)}",
        ("", *(f"tokens {words}" for words in COUNTS.values())),
        tuple(rows),
        f"In brackets: how many times those of {ours}, for the same sizes and seed by seed. ≥: not reached with some "
        f"seed, so that what was spent is a lower bound; ≤: {ours} did not get there. Without a mean the seeds stand "
        "one by one; a ratio is missing where neither side got there. ± is half of Student's 95 % interval. Work "
        "counts a token that is learnt from three times, at the size's share of the parameters.",
    )


def _counts(results: Results, spent: dict[int, Spent | None], sizes: list[str], itself: bool = False) -> Iterator[str]:
    ours = str(results.first("elastic"))
    for kind in COUNTS:
        ratio = "1×" if itself else times(results.against(ours, spent, kind, sizes))
        yield f"{count(results.taken(spent, kind))} ({ratio})"


def each_size(results: Results) -> Table:
    """For every arm that trains a size: what that size alone had read when it got there."""
    sizes = results.sizes(str(results.first("elastic")))
    arms = [name for name, arm in results.about["arms"].items() if arm["role"] not in ("untrained", "sampling")]

    rows = [
        (
            _name(results, arm),
            *(count(results.read(arm, size)) if size in results.sizes(arm) else "–" for size in sizes),
        )
        for arm in arms
        if {*results.sizes(arm)} & {*sizes}
    ]
    return Table(
        f"Tokens that a size itself has read when it has {results.measure.asked(results.reach)}",
        ("", *sizes),
        tuple(rows),
        "Of a family, the tokens of the other sizes are not counted here.",
    )


# ---- memory


def memory(results: Results) -> Table:
    ours = str(results.first("elastic"))
    whole = Architecture.from_config(results.about["architecture"])

    def members(row: Json) -> list[Cost]:
        return [cost(whole, Submodel.from_json(member["submodel"])) for member in row["family"].values()]

    def caches(row: Json) -> int:
        return max(STREAMS * (one.kv_bytes(CONTEXT) + one.ssm_bytes_per_sequence) for one in members(row))

    def taken(fold: Callable[[list[int]], int], serving: bool = False) -> Figure:
        return results.over(
            [ours], lambda rows: float(fold([m.bytes for m in members(rows[0])]) + serving * caches(rows[0]))
        )

    kept = Figure.of(results.seeds, lambda seed: saved(results, ours, seed))
    served, rivals = taken(max, True), taken(sum, True)
    return Table(
        "Memory in BF16",
        ("", "to store", "to serve"),
        (
            ("published: 6B + 9B + 12B in one", "24 GB", "–"),
            ("published: 9B + 12B apart", "42 GB (43 % saved)", "–"),
            ("one elastic checkpoint, every size a view of it", _bytes(taken(max)), _bytes(served)),
            ("a checkpoint for each size", _bytes(taken(sum)), _bytes(rivals)),
            ("saved", share(kept), share(_saved(served, rivals))),
        ),
        f"Counted from the sizes, not measured on a process. To serve: the weights, and the caches of {STREAMS} "
        f"conversations of {CONTEXT:,} tokens with the largest size; at this scale caches weigh more than weights.",
    )


def _saved(one: Figure, other: Figure) -> Figure:
    return Figure.of(one.asked, lambda seed: 1 - one.values[seed] / other.values[seed] if seed in one.values else None)


def _bytes(figure: Figure) -> str:
    return figure.said(lambda value: short(value, "B"))


# ---- how good


APART = {
    "alone": "distilled alone",
    "searched": "searched, then distilled alone",
    "scratch": "from nothing",
    "untrained": "sliced, untrained",
}


def compare(results: Results) -> Table:
    """The announcement's table: what each way of making the family ends at, and what it cost."""
    rows: list[tuple[str, ...]] = [
        ("published: Nemotron Elastic (12B, 9B, 6B)", "77.41", "75.95, 70.61", "110 B", "24 GB"),
        ("published: NanoV2 compression (12B, 9B)", "77.38", "75.99", "750 B", "42 GB"),
    ]
    for arm in results.arms("elastic") + results.arms("uniform"):
        stored = results.over([arm], lambda rows: max(_weights(rows)))
        rows.append(_row(results, _name(results, arm), results.at(arm, "100%"), [arm], stored))
    for role, name in APART.items():
        if arms := results.begun(role):
            stored = results.over(arms, lambda rows: sum(_weights(rows)) + rows[0]["parent"]["bytes"])
            rows.append(_row(results, f"each size {name}", results.parent(), arms, stored))
    return Table(
        f"Compare: {results.measure.noun}, tokens, memory",
        ("", "the whole model", "its sizes, at the end of the run", "tokens read by students, in all", "BF16 memory"),
        tuple(rows),
        f"Sizes: {results.measure.what(results.about['rows'])}; the same rows for every arm of a seed. Published: "
        "the mean accuracy over its benchmarks. Of sizes made apart, the whole model is the parent, which memory "
        "counts too. Tokens are all that were spent, a search of sizes included.",
    )


def _row(results: Results, name: str, whole: Figure, arms: list[str], stored: Figure) -> tuple[str, ...]:
    sizes = ", ".join(
        f"{size} {results.measure.said(results.at(arm, size))}" for arm in arms for size in results.sizes(arm)
    )
    return name, results.measure.said(whole), sizes, count(results.total(arms)), _bytes(stored)


def _weights(rows: list[Json]) -> list[int]:
    return [member["bytes"] for row in rows for member in row["family"].values()]


def ends(results: Results) -> Table:
    """Every arm: how good its sizes ended, and its time on the clock."""
    rows = []
    for arm, about in results.about["arms"].items():
        there = [str(seed) for seed in results.seeds if (arm, seed) in results.rows]
        cells = ", ".join(f"{size} {results.measure.said(results.at(arm, size))}" for size in results.sizes(arm))
        seconds = results.seconds(arm).said(lambda value: f"{value:.0f}")
        rows.append((arm, about["about"], ", ".join(there) or "missing", cells, seconds))
    return Table(
        "Every arm",
        ("", "what it is", "seeds", f"{results.measure.noun} at the end", "seconds of training"),
        tuple(rows),
        "Seconds on the clock, of whatever else ran on the machine too: an indication, no timing.",
    )


def _name(results: Results, arm: str) -> str:
    return str(results.about["arms"][arm]["about"] or arm)
