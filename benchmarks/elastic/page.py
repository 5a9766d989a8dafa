"""The study on one self-contained page: small multiples of accuracy against tokens, each variant over its reference."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from tables import SIZES, Results, difference, made_by, parent, share
from variants import VARIANTS, Variant

CUT = SIZES[1:]  # the whole model has little to lose
PER_LAYER, PER_LAYER_SEEDS = ("one for all", "one for each"), (10, 11, 12)  # asked later, of other parents
PROSE = Path(__file__).parent / "2026-11-24-text.md"
POINTS = 32  # either side of zero on the strips of differences

Point = tuple[float, float]  # percent of a picture's width and height, from its top left


def page(results: Results, seeds: Sequence[int]) -> str:
    """The whole page. Variants without a result are named, not drawn."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    variants = [variant for variant in VARIANTS.values() if variant.name not in PER_LAYER]
    return environment.get_template("page.html.j2").render(
        questions=[
            {"title": question, "variants": [_about(results, seeds, v) for v in variants if v.question == question]}
            for question in dict.fromkeys(variant.question for variant in variants)
        ],
        sizes=CUT,
        parents=[f"seed {seed}: {parent(results, seed)}" for seed in seeds],
        done=sum((v.name, seed) in results for v in variants for seed in seeds),
        asked=len(variants) * len(seeds),
        made=made_by(results),
        reach=POINTS,
        per_layer=[_about(results, PER_LAYER_SEEDS, VARIANTS[name]) for name in PER_LAYER],
        prose=prose(),
    )


def prose() -> list[dict[str, Any]]:
    """Of the study on text: perplexity by size, a dot per seed and temperature, on a scale of logarithms."""
    rows = [line.strip("| ").split("|") for line in PROSE.read_text().splitlines() if line[:3] in ("| 0", "| 1", "| 2")]
    found = [[float(cell) for cell in row] for row in rows]
    least, most = (math.log(pick(x for row in found for x in row[2:])) for pick in (min, max))

    def place(perplexity: float) -> float:
        return round(3 + 94 * (math.log(perplexity) - least) / (most - least), 2)

    return [
        {
            "size": size,
            "temperatures": [
                {"temperature": f"{t:g}", "values": [row[2 + at] for row in found if row[1] == t]}
                | {"dots": [place(row[2 + at]) for row in found if row[1] == t]}
                for t in sorted({row[1] for row in found})
            ],
        }
        for at, size in enumerate(("100%", "75%", "50%"))
    ]


def _about(results: Results, seeds: Sequence[int], variant: Variant) -> dict[str, Any]:
    """What is drawn of one variant."""
    have = [seed for seed in seeds if (variant.name, seed) in results]
    about = {"name": variant.name, "have": len(have), "missing": [seed for seed in seeds if seed not in have]}
    if not have:
        return about
    other = None if variant.name == variant.against else variant.against
    both = [seed for seed in have if (other, seed) in results]
    end = max(_tokens(results, name, seeds) for name in (variant.name, variant.against))
    top = statistics.fmean(results[variant.name, seed]["parent"]["exact"] for seed in have)
    return about | {
        "against": other,
        "tokens": f"{_tokens(results, variant.name, have) / 1000:.0f}",
        "parent": 100 * (1 - top),
        "curves": [_curves(results, have, variant.name, size, end) for size in CUT],
        "others": [_curves(results, both, other, size, end) for size in CUT if other and both],
        "ends": [_end(results, have, variant.name, size) for size in CUT],
        "strips": [_strip(results, seeds, variant, size) for size in CUT if other],
    }


def _tokens(results: Results, name: str, seeds: Sequence[int]) -> int:
    """How many a variant was trained on."""
    return max((results[name, seed]["points"][-1]["tokens"] for seed in seeds if (name, seed) in results), default=0)


def _curves(results: Results, seeds: Sequence[int], name: str, size: str, end: int) -> dict[str, list[Point]]:
    """Exact match against tokens: the mean over the seeds, and the outline from the highest to the lowest seed."""
    runs = [results[name, seed]["points"] for seed in seeds]
    steps = list(zip(*runs, strict=True))
    left = [100 * statistics.fmean(point["tokens"] for point in step) / end for step in steps]
    shares = [[100 * (1 - point["sizes"][size]["exact"]) for point in step] for step in steps]
    mean = list(zip(left, map(statistics.fmean, shares), strict=True))
    low, high = (list(zip(left, map(pick, shares), strict=True)) for pick in (max, min))
    return {"mean": mean, "band": [*high, *reversed(low)]}


def _end(results: Results, seeds: Sequence[int], name: str, size: str) -> str:
    return f"{statistics.fmean(share(results, name, seed, size) or 0 for seed in seeds):.1%}"


def _strip(results: Results, seeds: Sequence[int], variant: Variant, size: str) -> dict[str, Any]:
    """A difference: a dot per seed, the mean and its interval, in percent of the strip's width."""
    found = difference(results, seeds, variant, size)
    drawn: dict[str, Any] = {
        "said": str(found).strip("*"),
        "is_clear": found.is_clear,
        "dots": list(map(_place, found.points)),
    }
    if len(found.points) > 1:
        drawn |= {"mean": _place(found.mean), "ends": [_place(found.mean + s * found.error) for s in (-1, 1)]}
    return drawn


def _place(points: float) -> float:
    return round(min(max(50 + 50 * points / POINTS, 0.0), 100.0), 2)
