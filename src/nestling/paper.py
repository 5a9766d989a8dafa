"""The papers' memory, cost and comparison tables beside what shapes and tokens give. `nestling plan --paper`.

Facts of Nemotron Elastic, arXiv 2511.16664 (its results table, its training stages, and the Compare table of its
announcement), and of Star Elastic, arXiv 2605.07182 (abstract). Only what they print is written down here; the
computed side comes from the presets and from arithmetic on the tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

from nestling.arch.cost import BF16, cost, parameters
from nestling.arch.presets import PRESETS

NEMOTRON_ELASTIC, STAR_ELASTIC = "arXiv 2511.16664", "arXiv 2605.07182"
GB, GIB = 10**9, 2**30
_12B, _9B = "nemotron-nano-12b-v2", "nemotron-nano-9b-v2"
_30B_MOE, _12B_MOE = "nemotron-3-nano-30b-a3b", "star-elastic-12b-a2b"


@dataclass(frozen=True)
class Figure:
    """One figure: as printed, with the printed digits (None where nothing is printed), and as computed here."""

    what: str
    printed: Decimal | None
    computed: Fraction | None  # None where it cannot be
    unit: str
    source: str

    @property
    def difference(self) -> Fraction | None:
        """Computed minus printed."""
        if self.printed is None or self.computed is None:
            return None
        return self.computed - Fraction(self.printed)

    @property
    def agrees(self) -> bool | None:
        """Whether the computed figure rounds to the printed one: within half a unit of its last digit."""
        if self.printed is None or self.difference is None:
            return None
        return abs(self.difference) <= Fraction(10) ** int(self.printed.as_tuple().exponent) / 2

    def to_json(self) -> dict[str, Any]:
        numbers = {"printed": self.printed, "computed": self.computed, "difference": self.difference}
        shown = {key: _number(value) for key, value in numbers.items()}
        return {"what": self.what, **shown, "agrees": self.agrees, "unit": self.unit, "source": self.source}


def _number(value: Decimal | Fraction | None) -> int | float | None:
    if value is None:
        return None
    return int(value) if value == int(value) else float(value)


# ---- memory

ELASTIC, APART, SAVED = Decimal("24"), Decimal("42"), Decimal("43")
STAR, STAR_APART = Decimal("58.9"), Decimal("126.1")


def memory() -> tuple[Figure, ...]:
    """Bytes of bf16 weights. A family needs those of its largest member, which holds the others."""
    elastic, apart, star = _bytes(_12B), _bytes(_12B, _9B), _bytes(_30B_MOE)
    saved, rounded = 1 - Fraction(elastic, apart), 1 - Fraction(ELASTIC) / Fraction(APART)
    return (
        Figure("Elastic: 12B that holds 9B and 6B", ELASTIC, Fraction(elastic, GB), "GB", NEMOTRON_ELASTIC),
        Figure("NanoV2: 12B + 9B", APART, Fraction(apart, GB), "GB", NEMOTRON_ELASTIC),
        Figure("saved", SAVED, 100 * saved, "%", NEMOTRON_ELASTIC),
        Figure("saved, from 24 and 42 as printed", SAVED, 100 * rounded, "%", NEMOTRON_ELASTIC),
        Figure("Star: 30B that holds 23B and 12B", STAR, Fraction(star, GB), "GB", STAR_ELASTIC),
        Figure("Star: the same in GiB", STAR, Fraction(star, GIB), "GiB", STAR_ELASTIC),
        Figure("Star: 30B + 23B + 12B", STAR_APART, None, "GB", STAR_ELASTIC),
    )


def _bytes(*names: str) -> int:
    return sum(cost(PRESETS[name]).bytes for name in names)


def _left_for_23b(unit: int) -> float:
    """Billions of parameters that the printed total of the three Star sizes leaves for the 23B, counted in `unit`."""
    others = parameters(PRESETS[_30B_MOE]) + parameters(PRESETS[_12B_MOE])
    return float((Fraction(STAR_APART) * unit / BF16 - others) / 10**9)


# ---- tokens


@dataclass(frozen=True)
class Stage:
    """One stage of the elastic run."""

    billions: int  # of tokens, "about"
    length: int
    batch: int

    @property
    def steps(self) -> Fraction:
        return Fraction(self.billions * 10**9, self.length * self.batch)


STAGES = (Stage(65, 8192, 1536), Stage(45, 49152, 512))
PRETRAINING = Decimal("40")  # trillions of tokens, for 6B and 9B from scratch
COMPRESSION = (480, 270)  # billions of tokens, Minitron-SSM


def tokens() -> tuple[Figure, ...]:
    """Tokens to get the 6B and the 9B out of the 12B, and the steps that its stages make of them."""
    elastic, compression = Fraction(sum(stage.billions for stage in STAGES)), Fraction(sum(COMPRESSION))
    ne = NEMOTRON_ELASTIC
    return (
        Figure("pre-training 6B and 9B", PRETRAINING, None, "T", ne),
        Figure(f"Minitron-SSM, {_sum(COMPRESSION)}", Decimal("750"), compression, "B", ne),
        Figure(f"one elastic run, {_sum(stage.billions for stage in STAGES)}", Decimal("110"), elastic, "B", ne),
        Figure("pre-training / elastic", Decimal("3.6E+2"), 1000 * Fraction(PRETRAINING) / elastic, "×", ne),
        Figure("Minitron-SSM / elastic", Decimal("7"), compression / elastic, "×", ne),
        *(
            Figure(f"stage {n}, {stage.batch} × {stage.length} a step", None, stage.steps, "steps", ne)
            for n, stage in enumerate(STAGES, 1)
        ),
    )


def _sum(billions: Any) -> str:
    return " + ".join(f"{count}B" for count in billions)


# ---- scores, all of them published ones: pass@1 in %, reasoning on

TASKS = ("MATH-500", "AIME-24", "AIME-25", "GPQA", "LiveCodeBench v5", "MMLU-Pro")
SCORES: Mapping[str, tuple[str, str]] = {  # the printed average, and the row of `TASKS`
    "Elastic-6B": ("70.61", "96.50 77.64 68.13 53.78 60.95 66.65"),
    "Elastic-9B": ("75.95", "97.25 80.26 75.42 62.50 66.82 73.45"),
    "Elastic-12B": ("77.41", "97.70 83.44 75.83 63.25 68.01 76.20"),
    "NanoV2-9B": ("75.99", "97.30 80.89 71.43 63.01 67.30 73.61"),
    "NanoV2-12B": ("77.38", "97.50 82.90 72.50 65.28 67.61 78.47"),
    "Qwen3-8B": ("72.68", "96.3 75.83 69.31 59.61 59.5 75.50"),
}


def averages() -> tuple[Figure, ...]:
    """The published averages, and the means of their published rows."""
    return tuple(
        Figure(model, Decimal(shown), _mean(row), "%", NEMOTRON_ELASTIC) for model, (shown, row) in SCORES.items()
    )


def _mean(row: str) -> Fraction:
    scores = [Fraction(score) for score in row.split()]
    return sum(scores, Fraction(0)) / len(scores)


# ---- all of it


def compare() -> list[dict[str, Any]]:
    """The Compare table of the announcement: published scores, and cost as printed and as computed."""
    elastic_memory, apart_memory, *_ = memory()
    _, compression, elastic_run, *_ = tokens()
    return [
        _system("Nemotron Elastic", ("Elastic-6B", "Elastic-9B", "Elastic-12B"), elastic_run, elastic_memory),
        _system("NanoV2 compression", ("NanoV2-9B", "NanoV2-12B"), compression, apart_memory),
        _system("Qwen3-8B", ("Qwen3-8B",), None, None),
    ]


def _system(name: str, models: tuple[str, ...], run: Figure | None, weights: Figure | None) -> dict[str, Any]:
    means = {figure.what: figure.to_json() for figure in averages()}
    return {
        "system": name,
        "sizes": [int(model.split("-")[1].removesuffix("B")) for model in models],
        "scores": "published",
        "averages": [means[model] for model in models],
        "tokens": run and run.to_json(),
        "memory": weights and weights.to_json(),
    }


def notes() -> list[str]:
    """What the figures cannot say, and what their differences mean."""
    return [
        "The sizes of the published Elastic 9B and 6B are not public: the family is counted as its largest member, "
        "and what the three would take apart cannot be counted.",
        "24 GB is the 12B cut to whole GB; 43 % follows from the two rounded figures.",
        f"Star Elastic's GB seem to be 2^30 bytes: 126.1 of them leave {_left_for_23b(GIB):.1f}B parameters for the "
        f"23B, 126.1 of 10^9 bytes {_left_for_23b(GB):.1f}B. The 23B's sizes are not among the presets.",
        "Scores are published ones (pass@1, reasoning on), not measured here; computed is the mean of the published "
        f"row of {len(TASKS)} tasks: {', '.join(TASKS)}.",
        "The tokens of the two stages are printed as about 65B and 45B; no steps are printed.",
    ]


def tables() -> dict[str, Any]:
    """Every table as JSON: figures printed, computed, and the difference (computed minus printed)."""
    parts = {"memory": memory(), "tokens": tokens(), "averages": averages()}
    return {
        **{name: [figure.to_json() for figure in figures] for name, figures in parts.items()},
        "compare": compare(),
        "notes": notes(),
    }
