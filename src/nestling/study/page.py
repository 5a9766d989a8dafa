"""A study on one self-contained page, and its tables in Markdown. Reads study.json and results.jsonl, nothing else."""

import statistics
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from nestling.console import console
from nestling.evaluate.report import Scale, fitted, short, spread, templates
from nestling.study.claims import FAILS, HOLDS, claims
from nestling.study.tables import Table, tables
from nestling.study.tokens import Results, read_results
from nestling.weights.files import write_file_atomically

Json = dict[str, Any]
DRAWN = (("elastic", 2), ("alone", 1), ("scratch", 3), ("searched", 0))
"""Roles that have curves, and the strength of their colour."""


def tell(out: str | Path) -> None:
    """Write report.html and report.md of a study's output."""
    out = Path(out)
    results = read_results(out)
    write_file_atomically(out / "report.html", render(results).encode())
    write_file_atomically(out / "report.md", markdown(results).encode())
    for claim in claims(results):
        console.print(f"{claim.verdict}: {claim.what}: {claim.measured}", soft_wrap=True)
    console.print(f"\nThe whole story: {out / 'report.html'}")


def head(results: Results) -> Json:
    asked = len(results.about["arms"]) * len(results.seeds)
    return {
        "title": results.about["title"],
        "command": results.about["command"],
        "task": results.about["task"],
        "quick": results.about["quick"],
        "done": f"{len(results.rows)} of {asked} results are there",
        "missing": missing(results),
        "seeds": ", ".join(map(str, results.seeds)),
        "parent": results.measure.said(results.parent()),
        "noun": results.measure.noun,
        "what": results.measure.what(results.about["rows"]),
        "machine": "; ".join(sorted({row["machine"] for row in results.rows.values()})),
        "versions": "; ".join(
            sorted({", ".join(f"{k} {v}" for k, v in row["versions"].items()) for row in results.rows.values()})
        ),
    }


def missing(results: Results) -> list[str]:
    """`eight-sizes: seeds 1, 2` for every arm that has not been run with all seeds."""
    found = {arm: [str(s) for s in results.seeds if (arm, s) not in results.rows] for arm in results.about["arms"]}
    return [f"{arm}: seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}" for arm, seeds in found.items() if seeds]


def render(results: Results) -> str:
    """The page: it works offline, in light and dark, on a phone and on paper."""
    source = files("nestling.study").joinpath("study.html.j2").read_text("utf-8")
    found = claims(results)
    return templates().from_string(source).render(
        head=head(results),
        claims=found,
        counts={verdict: sum(claim.verdict == verdict for claim in found) for verdict in (HOLDS, FAILS)},
        tables=tables(results),
        plots=plots(results),
        holds=HOLDS,
        fails=FAILS,
    )  # fmt: skip


def markdown(results: Results) -> str:
    about = head(results)
    lines = [
        f"# {about['title']}",
        "",
        f"`{about['command']}` · seeds {about['seeds']} · {about['done']} · {about['task']} · parents "
        f"{about['parent']} ({about['what']}) · {about['machine']} · {about['versions']}",
        *(
            ["", f"Missing: {'; '.join(about['missing'])}. Nothing is averaged over missing seeds."]
            if about["missing"]
            else []
        ),
        "",
    ]
    rows = tuple((claim.what, claim.published, claim.measured, claim.verdict, claim.words) for claim in claims(results))
    first = Table("Claims", ("claim", "published", "measured here", "verdict", "in words"), rows)
    return "\n".join([*lines, *(_table(table) for table in [first, *tables(results)])])


def _table(table: Table) -> str:
    lines = [f"## {table.title}", "", "| " + " | ".join(table.head) + " |", "|---" * len(table.head) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in table.rows]
    return "\n".join([*lines, "", *([table.note, ""] if table.note else [])])


# ---- curves


def plots(results: Results) -> list[Json]:
    """Per size how good it is against the tokens that it has read itself, one curve per arm: the mean over seeds."""
    sizes = dict.fromkeys(size for role, _ in DRAWN for arm in results.arms(role) for size in results.sizes(arm))
    return [one for size in sizes if (one := plot(results, size))]


def plot(results: Results, size: str) -> Json | None:
    found = []
    for role, strength in DRAWN:
        for arm in results.arms(role):
            line = curve(results, arm, size)
            if line:
                found.append((arm, strength, line))
    if not found:
        return None
    x = fitted([tokens for *_, line in found for tokens, _ in line], log=True)
    share = results.measure.noun == "accuracy"
    y = Scale(0, 1) if share else fitted([value for *_, line in found for _, value in line], log=True)
    labels = spread([y.top(line[-1][1]) for *_, line in found], 8)
    parent = results.parent().mean
    return {
        "title": f"{size}: {results.measure.noun}",
        "height": 240,
        "x_ticks": [(x.at(tick), short(tick)) for tick in x.ticks(4)],
        "y_ticks": [(y.top(tick), f"{tick:.0%}" if share else short(tick)) for tick in y.ticks(4)],
        "goal": None if parent is None else y.top(results.measure.value(results.measure.goal(parent, results.reach))),
        "lines": [
            {
                "name": arm,
                "strength": strength,
                "dashed": strength in [other for _, other, _ in found[:number]],  # the second of one colour
                "label": labels[number],
                "points": [(x.at(a), y.top(b)) for a, b in line],
            }
            for number, (arm, strength, line) in enumerate(found)
        ],
    }


def curve(results: Results, arm: str, size: str) -> Sequence[tuple[float, float]]:
    """(tokens that the size has read, what it shows): means over the seeds; nothing where a seed is missing."""
    measure = results.measure
    runs = [results.rows[arm, seed]["points"] for seed in results.seeds if (arm, seed) in results.rows]
    if len(runs) < len(results.seeds) or size not in results.sizes(arm):
        return []
    return [
        (
            max(statistics.fmean(point["student"].get(size, 0) for point in step), 1.0),
            statistics.fmean(measure.value(measure.worth(point["sizes"][size])) for point in step),
        )
        for step in zip(*runs, strict=False)
        if all(size in point["sizes"] for point in step)
    ]
