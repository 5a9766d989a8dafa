"""How a study judges a size: by the share of problems that it solves, or by its perplexity on text."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

from nestling.errors import NestlingError
from nestling.evaluate.report import short
from nestling.study.seeds import Figure


class Measure(ABC):
    """Worths of sizes: higher is better, and differences are taken of them. What is shown may be another value."""

    noun: str
    unit: str  # of differences
    margin: float  # how much a size may be worth less and still count as as good
    scale: float  # units of a difference in one of worth
    digits: int  # of a difference, after the point

    @abstractmethod
    def worth(self, seen: Mapping[str, float]) -> float:
        """seen: what `train.watch.Watch.measure` saw of a size."""

    @abstractmethod
    def goal(self, parent: float, reach: float) -> float:
        """The worth that is to be reached. parent: the worth of the parent. reach: what is asked for, 0 to 1."""

    @abstractmethod
    def asked(self, reach: float) -> str:
        """`goal` in words."""

    @abstractmethod
    def what(self, rows: int) -> str:
        """What the values that are shown are, in words. rows: held out."""

    @abstractmethod
    def value(self, worth: float) -> float:
        """What is shown of a worth."""

    @abstractmethod
    def said(self, figure: Figure) -> str:
        """A figure of worths, as the values that are shown."""

    def difference(self, figure: Figure) -> str:
        """A difference of worths, as one of the values that are shown or of their logarithms."""
        found = figure.each(lambda worth: self.scale * worth)
        said = found.said(lambda value: f"{value:+.{self.digits}f}").replace("± +", "± ")
        return f"{said} {self.unit}" if figure.values else said

    def amount(self, *worths: float) -> str:
        """`1.2 points`, or `1.2 ± 0.3 points` of a size and half of its interval."""
        return " ± ".join(f"{abs(self.scale) * worth:.{self.digits}f}" for worth in worths) + f" {self.unit}"


class Accuracy(Measure):
    noun, unit, margin, scale, digits = "accuracy", "points", 0.02, 100.0, 1

    def worth(self, seen: Mapping[str, float]) -> float:
        return float(seen["exact"])

    def goal(self, parent: float, reach: float) -> float:
        return reach * parent

    def asked(self, reach: float) -> str:
        return f"{reach:.0%} of the parent's accuracy"

    def what(self, rows: int) -> str:
        return f"the share of {rows} held-out problems that is solved"

    def value(self, worth: float) -> float:
        return worth

    def said(self, figure: Figure) -> str:
        return figure.said(lambda worth: f"{100 * worth:.1f}") + (" %" if figure.values else "")


class Perplexity(Measure):
    """The worth is the mean log probability of a held-out token, in nats; the perplexity is exp(-worth)."""

    noun, unit, margin, scale, digits = "perplexity", "nats of loss", 0.02, -1.0, 3

    def worth(self, seen: Mapping[str, float]) -> float:
        return -float(seen["loss"])

    def goal(self, parent: float, reach: float) -> float:
        return parent + math.log(reach)

    def asked(self, reach: float) -> str:
        return f"at most {1 / reach:.3f} times the parent's perplexity"

    def what(self, rows: int) -> str:
        return f"perplexity on {rows} held-out rows, the lower the better"

    def value(self, worth: float) -> float:
        return math.exp(-worth)

    def said(self, figure: Figure) -> str:
        return figure.each(self.value).said(lambda value: f"{value:.2f}" if value < 100 else short(value))


MEASURES: Mapping[str, Measure] = {"exact": Accuracy(), "loss": Perplexity()}
"""By what study.json calls them: the key of what was seen that they are made of."""


def measure_of(name: str) -> Measure:
    if name not in MEASURES:
        raise NestlingError(
            f"study.json has the measure {name!r}, which this version does not know; it must be one of "
            f"{', '.join(MEASURES)}. Run the recipe again: results that are there are kept"
        )
    return MEASURES[name]
