"""What a measurement says: one line of the table."""

import statistics
from dataclasses import asdict, dataclass
from typing import Any

MORE = ("× as fast",)  # units in which more is better; in all others less is


@dataclass(frozen=True)
class Figure:
    """One value per round, of which the table shows least, median and most.

    `× as fast` is the rival's time over ours of the same round, `× the time` and `× the memory` ours over the rival's.
    """

    row: str  # its name on the command line
    case: str
    rival: str  # in which setting
    unit: str
    rounds: tuple[float, ...]
    reach: float | None = None  # what the median is to reach
    seconds: float | None = None  # ours, median
    limit: float | None = None  # the share of what the machine could do, of `limit_of`
    limit_of: str = ""
    error: float | None = None  # largest difference from the reference, as a share of its largest value
    points: tuple[tuple[float, float, float], ...] = ()  # (size of the work, seconds, its FLOPs) of a curve

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> tuple[float, float, float]:
        return min(self.rounds), self.median, max(self.rounds)

    @property
    def reached(self) -> bool | None:
        if self.reach is None:
            return None
        return self.median >= self.reach if self.unit in MORE else self.median <= self.reach

    def to_json(self) -> dict[str, Any]:
        least, median, most = self.spread
        return asdict(self) | {"min": least, "median": median, "max": most, "reached": self.reached}
