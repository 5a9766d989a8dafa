"""The study's results as Markdown: what each variant ends at, and its paired difference to what it is compared with."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from variants import PICKED, ROUTER, VARIANTS, Variant

Results = Mapping[tuple[str, int], Mapping[str, Any]]
SIZES = ("100%", "50%", "30%")
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % points of Student's t for 1, 2, … degrees of freedom."""


@dataclass(frozen=True)
class Difference:
    """Variant minus reference in points, one per seed that has both."""

    points: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.points)

    @property
    def error(self) -> float:
        """Half the 95 % interval of the mean over seeds."""
        count = len(self.points)
        return STUDENT_T[count - 2] * statistics.stdev(self.points) / math.sqrt(count) if count > 1 else math.inf

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero."""
        return bool(self.points) and abs(self.mean) > self.error

    def __str__(self) -> str:
        if not self.points:
            return "missing"
        if len(self.points) == 1:
            return f"{self.mean:+.1f} (one seed)"
        text = f"{self.mean:+.1f} ({self.mean - self.error:+.1f} … {self.mean + self.error:+.1f})"
        return f"**{text}**" if self.is_clear else text


def report(results: Results, seeds: Sequence[int]) -> str:
    questions = list(dict.fromkeys(variant.question for variant in VARIANTS.values()))
    parts = [_head(results, seeds), *(_question(results, seeds, question) for question in questions)]
    return "\n\n".join([*parts, "## Three terms alone", _terms(results, seeds), "## Seconds", _seconds(results, seeds)])


def share(results: Results, name: str, seed: int, size: str, step: int = -1, terms: str | None = None) -> float | None:
    """Share solved, at the end unless a step is given; None where it was not measured."""
    if (result := results.get((name, seed))) is None:
        return None
    points = result["points"]
    point = points[-1] if step < 0 else next((point for point in points if point["step"] == step), None)
    if point is None:
        return None
    found = point["sizes"][size]
    return found["exact"] if terms is None else found["terms"][terms]


def difference(results: Results, seeds: Sequence[int], variant: Variant, size: str, **at: Any) -> Difference:
    pairs = [[share(results, name, seed, size, **at) for name in (variant.name, variant.against)] for seed in seeds]
    return Difference(tuple(100 * (one - other) for one, other in pairs if one is not None and other is not None))


def made_by(results: Results) -> str:
    """The versions that made the results."""
    made = {"; ".join(f"{k} {v}" for k, v in result["made"].items()) for result in results.values()}
    return " · ".join(sorted(made))


def _head(results: Results, seeds: Sequence[int]) -> str:
    arguments = " ".join(map(str, seeds))
    done = sum((name, seed) in results for name in VARIANTS for seed in seeds)
    lines = [
        f"# What elastic training needs: {len(VARIANTS)} variants, {len(seeds)} seeds",
        "",
        f"`OMP_NUM_THREADS=1 python benchmarks/elastic/study.py --seeds {arguments}`, then `--table` · one core of an "
        f"AMD EPYC beside other work, so that seconds are no timing · {made_by(results)}",
        "",
        "Task, parent and the settings that all variants share: study.toml. Each row changes one thing of what it is "
        f"compared with: the default ({ROUTER}: soft for 40 of 120 steps, KL at T = 1, Muon at 0.004, all budgets on "
        f"every batch) or, where a question is not about the router, the same with {PICKED}, hard from the first step.",
        "",
        "Cells are exact match on 500 held-out problems, teacher-forced, mean over the seeds; differences are points, "
        "paired by seed (same parent, same batches, same problems), with Student's 95 % interval over seeds, **bold** "
        "where it excludes zero. A row with fewer seeds says so; nothing is averaged over seeds that are missing.",
        "",
        f"Done: {done} of {len(VARIANTS) * len(seeds)} runs.",
        "",
        "| parent | " + " | ".join(f"seed {seed}" for seed in seeds) + " |",
        "|---|" + "---:|" * len(seeds),
        "| exact match | " + " | ".join(parent(results, seed) for seed in seeds) + " |",
    ]
    return "\n".join(lines)


def parent(results: Results, seed: int) -> str:
    found = {result["parent"]["exact"] for (_, other), result in results.items() if other == seed}
    assert len(found) <= 1, "results of different parents"
    return f"{found.pop():.1%}" if found else "missing"


def _question(results: Results, seeds: Sequence[int], question: str) -> str:
    rows = [variant for variant in VARIANTS.values() if variant.question == question]
    others = list(dict.fromkeys(row.against for row in rows if row.against not in {each.name for each in rows}))
    halfway = " | ".join(f"{size} halfway: difference" for size in SIZES[1:])
    ends = " | ".join(f"{size} | difference" for size in SIZES)
    lines = [f"## {question}", "", f"| | seeds | {ends} | {halfway} |", "|---|---:|" + "---:|" * 8]
    for variant in [*(VARIANTS[name] for name in others), *rows]:
        lines.append(_row(results, seeds, variant, reference=variant.name in others or variant.name == variant.against))
    return "\n".join(lines + _as_trained(results, seeds, rows))


def _row(results: Results, seeds: Sequence[int], variant: Variant, reference: bool) -> str:
    have = [seed for seed in seeds if (variant.name, seed) in results]
    missing = "" if len(have) == len(seeds) else f", missing {', '.join(str(s) for s in seeds if s not in have)}"
    cells = [variant.name, f"{len(have)}{missing}"]
    for size in SIZES:
        cells += [
            mean(results, have, variant.name, size),
            "" if reference else str(difference(results, seeds, variant, size)),
        ]
    cells += ["" if reference else _halfway(results, seeds, variant, size) for size in SIZES[1:]]
    return "| " + " | ".join(cells) + " |"


def _halfway(results: Results, seeds: Sequence[int], variant: Variant, size: str) -> str:
    """Where both took as many steps: after half of them."""
    lengths = {results[name, seed]["points"][-1]["step"] for name in (variant.name, variant.against) for seed in seeds
               if (name, seed) in results}  # fmt: skip
    return str(difference(results, seeds, variant, size, step=lengths.pop() // 40 * 20)) if len(lengths) == 1 else ""


def mean(results: Results, seeds: Sequence[int], name: str, size: str, terms: str | None = None) -> str:
    found = [share(results, name, seed, size, terms=terms) for seed in seeds]
    return f"{statistics.fmean(value for value in found if value is not None):.1%}" if found else "missing"


def _as_trained(results: Results, seeds: Sequence[int], rows: Sequence[Variant]) -> list[str]:
    """What norms that divide by the whole width reach when they are also run like that."""
    lines = []
    for row in rows:
        ends = [results[row.name, seed]["points"][-1]["sizes"] for seed in seeds if (row.name, seed) in results]
        if ends and "as_trained" in ends[0]["50%"]:
            means = (f"{size} {statistics.fmean(end[size]['as_trained'] for end in ends):.1%}" for size in SIZES)
            lines += ["", f"{row.name}: as shipped above; run with the norms it was trained with, {', '.join(means)}."]
    return lines


def _terms(results: Results, seeds: Sequence[int]) -> str:
    """The rows about length, on the problems of three terms only."""
    rows = [variant for variant in VARIANTS.values() if "length" in variant.question]
    lines = ["| | " + " | ".join(f"{size} | difference" for size in SIZES) + " |", "|---|" + "---:|" * 6]
    for variant in rows:
        have = [seed for seed in seeds if (variant.name, seed) in results]
        cells = [variant.name]
        for size in SIZES:
            cells.append(mean(results, have, variant.name, size, terms="3"))
            same = variant.name == variant.against
            cells.append("" if same else str(difference(results, seeds, variant, size, terms="3")))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _seconds(results: Results, seeds: Sequence[int]) -> str:
    """Of training, of the processor's clock on the wall."""
    lines = ["| | tokens | tokens through students | " + " | ".join(f"seed {seed}" for seed in seeds) + " |"]
    lines.append("|---|" + "---:|" * (2 + len(seeds)))
    for name in VARIANTS:
        have = [results[name, seed] for seed in seeds if (name, seed) in results]
        if have:
            last = have[0]["points"][-1]
            cells = [f"{results[name, s]['seconds']:.0f}" if (name, s) in results else "missing" for s in seeds]
            lines.append(f"| {name} | {last['tokens']:,} | {last['student_tokens']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
