"""What a run is judged by: how a result is read off a row, compared, and said."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Measure:
    """A figure that every row of a report has under `key`."""

    key: str
    name: str
    higher: bool  # is better
    scale: float  # from the stored figure to the one that is shown
    unit: str
    counted: str  # what it was taken over, under its key
    about: str

    def of(self, row: Row) -> float:
        """The figure as it is drawn."""
        return self.scale * float(row[self.key])

    def ends(self, row: Row) -> list[float]:
        """Its 95 % interval; the figure itself where there is none."""
        return [self.scale * float(end) for end in row["interval"] or (row[self.key],) * 2]

    def text(self, value: float) -> str:
        return f"{value:.1f}%" if self.unit else f"{value:,.{2 if value < 100 else 1 if value < 1000 else 0}f}"

    def say(self, row: Row) -> str:
        return self.text(self.of(row))

    def interval(self, row: Row) -> list[str]:
        return [self.text(end) for end in self.ends(row)]

    def rank(self, row: Row) -> float:
        """Larger is better."""
        return self.of(row) if self.higher else -self.of(row)

    def detail(self, row: Row) -> str:
        count = f"{row[self.counted]:,}"
        return f"{row['correct']:,} of {count}" if "correct" in row else f"{count} {self.counted}"

    def full(self, rows: Sequence[Row]) -> float:
        """What a whole bar stands for."""
        return 100.0 if self.unit else max(end for row in rows for end in self.ends(row))


EXACT_MATCH = Measure("exact_match", "Exact match", True, 100, "%", "problems", "on held-out problems")
PERPLEXITY = Measure("perplexity", "Perplexity", False, 1, "", "documents", "of held-out text, lower is better")
EVALUATION = "evaluation.json"
"""The file with a row's result."""
KEPT = ("exact_match", "correct", "problems", "perplexity", "documents", "interval", "tokens_per_second")


def measure_of(rows: Sequence[Row]) -> Measure:
    return PERPLEXITY if any(PERPLEXITY.key in row for row in rows) else EXACT_MATCH
