"""The paper's three tables with what was measured beside what it printed, and what every arm ended at."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nestling.arch.architecture import Architecture
from nestling.arch.cost import cost
from nestling.arch.submodel import Submodel
from nestling.evaluate.report import short
from nestling.study.claims import saved, times
from nestling.study.seeds import Figure
from nestling.study.tokens import COUNTS, Results, Spent

CONTEXT, STREAMS = 4096, 16
"""Tokens of a conversation, and conversations at a time, that caches are counted for."""


@dataclass(frozen=True)
class Table:
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def tables(results: Results) -> list[Table]:
    return [
        table
        for table in (tokens(results), each_size(results), memory(results), compare(results), ends(results))
        if table.rows
    ]


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
    """Tokens until every size has reached the asked share of its parent, and their ratio to the elastic run's."""
    ours = results.first("elastic")
    rows: list[tuple[str, ...]] = [
        ("published: one elastic run", "110 B", "–", "–", "1×"),
        ("published: NanoV2 compression, 480 B of it exploring", "750 B", "–", "–", "7×"),
        ("published: pre-training 6B and 9B", "40 T", "–", "–", "360×"),
    ]
    for arm in [*results.arms("elastic"), *results.arms("uniform")]:
        spent = {seed: results.spent(arm, seed) for seed in results.seeds}
        rows.append((_name(results, arm), *_counts(results, spent), "1×" if arm == ours else _against(results, arm)))
    for role, search, name in SYSTEMS:
        if results.arms(role) and ours:
            spent = {seed: results.apart(role, seed, search) for seed in results.seeds}
            ratio = times(results.ratio(ours, role, "student", search))
            sizes = " and ".join(results.covered(role))
            rows.append((f"{name} ({sizes})", *_counts(results, spent), ratio))
    return Table(
        f"Tokens until every size has {results.about['reach']:.0%} of the parent's accuracy",
        ("", *(f"tokens {words}" for words in COUNTS.values()), "ratio, by those of the first column"),
        tuple(rows) if ours else (),
        "≥: not reached with some seed, so that what was spent is a lower bound. A ratio compares the same sizes, seed "
        "by seed; it is missing where the elastic run itself did not get there. ± is half of Student's 95 % interval.",
    )


def _counts(results: Results, spent: dict[int, Spent | None]) -> Iterator[str]:
    return (count(results.taken(spent, kind)) for kind in COUNTS)


def _against(results: Results, arm: str) -> str:
    """Another run of a family ÷ the first one."""
    ours = str(results.first("elastic"))
    values, bounds = {}, set()
    for seed in results.seeds:
        one, base = results.spent(arm, seed), results.spent(ours, seed)
        if one and base and base.reached:
            values[seed] = one.student / base.student
            bounds |= set() if one.reached else {seed}
    return times(Figure(results.seeds, values, frozenset(bounds)))


def each_size(results: Results) -> Table:
    """For every arm that trains a size: what that size alone had read when it got there."""
    ours = results.first("elastic")
    sizes = results.sizes(ours) if ours else []
    arms = [name for name, arm in results.about["arms"].items() if arm["role"] != "untrained"]

    def read(arm: str, size: str) -> Figure:
        values, bounds = {}, set()
        for seed in results.seeds:
            if (arm, seed) not in results.rows:
                continue
            row = results.rows[arm, seed]
            goal = results.about["reach"] * row["parent"][results.measure]
            reached = [p for p in row["points"] if size in p["sizes"] and p["sizes"][size][results.measure] >= goal]
            values[seed] = (reached or row["points"][-1:])[0]["student"].get(size, 0)
            bounds |= set() if reached else {seed}
        return Figure(results.seeds, values, frozenset(bounds))

    rows = [
        (_name(results, arm), *(count(read(arm, size)) if size in results.sizes(arm) else "–" for size in sizes))
        for arm in arms
        if {*results.sizes(arm)} & {*sizes}
    ]
    return Table(
        "Tokens that a size itself has read when it gets there",
        ("", *sizes),
        tuple(rows),
        "Of a family, the tokens of the other sizes are not counted here.",
    )


# ---- memory


def memory(results: Results) -> Table:
    ours = results.first("elastic")
    if ours is None or "architecture" not in results.about:
        return Table("", (), ())
    whole = Architecture.from_config(results.about["architecture"])

    def taken(pick: Callable[[list[int], list[int]], int]) -> Figure:
        def value(seed: int) -> float | None:
            if (ours, seed) not in results.rows:
                return None
            members = [Submodel.from_json(m["submodel"]) for m in results.rows[ours, seed]["family"].values()]
            costs = [cost(whole, member) for member in members]
            caches = [STREAMS * (c.kv_bytes(CONTEXT) + c.ssm_bytes_per_sequence) for c in costs]
            return float(pick([c.bytes for c in costs], caches))

        return Figure.of(results.seeds, value)

    kept = Figure.of(results.seeds, lambda seed: saved(results, ours, seed))
    stored, apart = taken(lambda w, c: max(w)), taken(lambda w, c: sum(w))
    served, rivals = taken(lambda w, c: max(w) + max(c)), taken(lambda w, c: sum(w) + max(c))
    return Table(
        "Memory in BF16",
        ("", "to store", "to serve"),
        (
            ("published: 6B + 9B + 12B in one", "24 GB", "–"),
            ("published: 9B + 12B apart", "42 GB (43 % saved)", "–"),
            ("one elastic checkpoint, every size a view of it", _bytes(stored), _bytes(served)),
            ("a checkpoint for each size", _bytes(apart), _bytes(rivals)),
            ("saved", share(kept), share(_saved(served, rivals))),
        ),
        f"Counted from the sizes, not measured on a process. To serve: the weights, and the caches of {STREAMS} "
        f"conversations of {CONTEXT:,} tokens with the largest size; at this scale caches weigh more than weights.",
    )


def _saved(one: Figure, other: Figure) -> Figure:
    return Figure.of(one.asked, lambda seed: 1 - one.values[seed] / other.values[seed] if seed in one.values else None)


def _bytes(figure: Figure) -> str:
    return figure.said(lambda value: short(value, "B"))


# ---- accuracy


def compare(results: Results) -> Table:
    """The announcement's table: what each way of making the family ends at, and what it cost."""
    ours = results.first("elastic")
    if ours is None:
        return Table("", (), ())
    sizes = results.sizes(ours)
    rows = [
        ("published: Nemotron Elastic (12B, 9B, 6B)", "77.41", "75.95, 70.61", "110 B", "24 GB"),
        ("published: NanoV2 compression (12B, 9B)", "77.38", "75.99", "750 B", "42 GB"),
    ]
    for arm in results.arms("elastic") + results.arms("uniform"):
        ends = ", ".join(f"{size} {share(results.at(arm, size))}" for size in sizes)
        spent = _all_spent(results, [arm])
        rows.append(
            (
                _name(results, arm),
                share(results.at(arm, "100%")),
                ends,
                count(spent),
                _bytes(_stored(results, [arm], max)),
            )
        )
    for role, name in (("alone", "distilled alone"), ("searched", "searched, then distilled alone"), ("scratch", "from nothing"), ("untrained", "sliced, untrained")):  # fmt: skip
        if arms := results.arms(role):
            ends = ", ".join(f"{size} {share(results.at(arm, size))}" for arm in arms for size in results.sizes(arm))
            stored = _stored(results, arms, sum, with_parent=True)
            rows.append(
                (f"each size {name}", share(results.parent()), ends, count(_all_spent(results, arms)), _bytes(stored))
            )
    return Table(
        "Compare: accuracy, tokens, memory",
        ("", "the whole model", "its sizes, at the end of the run", "tokens read by students, in all", "BF16 memory"),
        tuple(rows),
        f"Share of {results.about['rows']} held-out problems solved, the same for every row of a seed. Of sizes made "
        "apart, the whole model is the parent, which memory counts too. Tokens are all that were spent, a search of sizes included.",
    )


def _all_spent(results: Results, arms: list[str]) -> Figure:
    def value(seed: int) -> float | None:
        if any((arm, seed) not in results.rows for arm in arms):
            return None
        rows = [results.rows[arm, seed] for arm in arms]
        return float(sum(sum(row["points"][-1]["student"].values()) + row.get("search", {}).get("student", 0) for row in rows))  # fmt: skip

    return Figure.of(results.seeds, value)


def _stored(results: Results, arms: list[str], fold: Callable[[list[int]], int], with_parent: bool = False) -> Figure:
    def value(seed: int) -> float | None:
        if any((arm, seed) not in results.rows for arm in arms):
            return None
        rows = [results.rows[arm, seed] for arm in arms]
        parts = [member["bytes"] for row in rows for member in row["family"].values()]
        return float(fold(parts + ([rows[0]["parent"]["bytes"]] if with_parent else [])))

    return Figure.of(results.seeds, value)


def ends(results: Results) -> Table:
    """Every arm: accuracy of its smallest and largest cut sizes, and its time on the clock."""
    rows = []
    for arm, about in results.about["arms"].items():
        sizes = results.sizes(arm)
        cells = ", ".join(f"{size} {share(results.at(arm, size))}" for size in sizes)
        there = [str(seed) for seed in results.seeds if (arm, seed) in results.rows]
        seconds = Figure.of(results.seeds, lambda seed, arm=arm: _seconds(results, arm, seed))  # type: ignore[misc]
        rows.append(
            (arm, about["about"], ", ".join(there) or "missing", cells, seconds.said(lambda value: f"{value:.0f}"))
        )
    return Table(
        "Every arm",
        ("", "what it is", "seeds", "accuracy at the end", "seconds of training"),
        tuple(rows),
        "Seconds on the clock, of whatever else ran on the machine too: an indication, no timing.",
    )


def _seconds(results: Results, arm: str, seed: int) -> float | None:
    row = results.rows.get((arm, seed))
    return None if row is None else float(row["seconds"] + row.get("search", {}).get("seconds", 0.0))


def _name(results: Results, arm: str) -> str:
    return str(results.about["arms"][arm]["about"] or arm)
