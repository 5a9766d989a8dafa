"""What it took: tokens until sizes were as good as was asked, counted alike on every side."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from nestling.errors import NestlingError
from nestling.study.measure import Measure, measure_of
from nestling.study.seeds import Figure
from nestling.weights.files import read_json

Json = dict[str, Any]
COUNTS = {
    "student": "read by the models that are trained",
    "both": "read by them and by the teacher",
    "tokens": "drawn from the data",
    "work": "of work, in forward passes of the parent",
}
"""Ways to count. In a run that trains all sizes on every batch, a token is drawn once and read by each of them.

Work: a forward pass costs as the parameters it reads, and learning from it twice as much again.
"""


@dataclass(frozen=True)
class Spent:
    """Tokens, and whether what was asked was reached by them; if not, they are what was spent in vain."""

    student: int
    teacher: int
    tokens: int
    work: float
    reached: bool = True

    @property
    def both(self) -> int:
        return self.student + self.teacher

    def __add__(self, other: "Spent") -> "Spent":
        student, teacher, tokens = (getattr(self, k) + getattr(other, k) for k in ("student", "teacher", "tokens"))
        return Spent(student, teacher, tokens, self.work + other.work, self.reached and other.reached)

    def count(self, kind: str) -> float:
        return float(getattr(self, kind))


def work(row: Json, student: Mapping[str, int], teacher: int) -> float:
    """Forward passes of the parent over one token that this much learning is worth (`COUNTS`)."""
    sizes = {name: member["parameters"] for name, member in row["family"].items()}
    whole = row["parent"]["parameters"]
    return teacher + 3 * sum(count * sizes.get(name, whole) for name, count in student.items()) / whole


@dataclass(frozen=True)
class Results:
    """A study's results: what was asked for, and what is there."""

    about: Json
    rows: Mapping[tuple[str, int], Json]
    asked: float | None = None  # `Measure.goal`'s reach; else the first that was asked for

    @property
    def reach(self) -> float:
        return self.asked or float(self.about["reach"][0])

    def goal(self, parent: Json) -> float:
        """The worth that is to be reached, of what was seen of a parent."""
        return self.measure.goal(self.measure.worth(parent), self.reach)

    def goals(self) -> list["Results"]:
        """The same for everything that was asked to be reached."""
        return [replace(self, asked=asked) for asked in self.about["reach"]]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self.about["seeds"])

    @cached_property
    def measure(self) -> Measure:
        return measure_of(str(self.about.get("measure", "exact")))

    @cached_property
    def parents(self) -> dict[int, Json]:
        return {seed: row["parent"] for (_, seed), row in self.rows.items()}

    def arms(self, role: str) -> list[str]:
        return [name for name, arm in self.about["arms"].items() if arm["role"] == role]

    def first(self, role: str) -> str | None:
        return next(iter(self.arms(role)), None)

    def sizes(self, arm: str) -> list[str]:
        return list(self.about["arms"][arm]["sizes"])

    # --- how good

    def parent(self) -> Figure:
        """What the parents are worth."""
        return Figure.of(
            self.seeds, lambda seed: self.measure.worth(self.parents[seed]) if seed in self.parents else None
        )

    def at(self, arm: str, size: str, step: int | None = None) -> Figure:
        """What a size was worth at the end, or at the last look at or before a step."""

        def worth(seed: int) -> float | None:
            points = self.rows[arm, seed]["points"] if (arm, seed) in self.rows else []
            before = [point for point in points if step is None or point["step"] <= step]
            seen = before[-1]["sizes"].get(size) if before else None
            return None if seen is None else self.measure.worth(seen)

        return Figure.of(self.seeds, worth)

    # --- what it took

    def spent(self, arm: str, seed: int, sizes: Iterable[str] = ()) -> Spent | None:
        """Until each of the sizes (else all of the arm's) has reached what is asked for; None: no result.

        What a search of sizes took is not in it.
        """
        if (row := self.rows.get((arm, seed))) is None:
            return None
        wanted, goal = {*(sizes or self.sizes(arm))}, self.goal(row["parent"])
        for point in row["points"]:
            wanted -= {size for size, seen in point["sizes"].items() if self.measure.worth(seen) >= goal}
            if not wanted:
                break
        student, teacher = point["student"], point["teacher"]
        return Spent(sum(student.values()), teacher, point["tokens"], work(row, student, teacher), not wanted)

    def searching(self, arm: str, seed: int) -> Spent | None:
        if (row := self.rows.get((arm, seed))) is None:
            return None
        found = row.get("search", {"student": 0, "teacher": 0, "tokens": 0})
        done = work(row, {self.sizes(arm)[0]: found["student"]}, found["teacher"])
        return Spent(found["student"], found["teacher"], found["tokens"], done)

    def apart(self, arms: Sequence[str], seed: int, search: bool = False) -> Spent | None:
        """The sum over arms of one size each; None if one of them is missing."""
        parts = [self.spent(arm, seed) for arm in arms]
        if search:
            parts += [self.searching(arm, seed) for arm in arms]
        there = [part for part in parts if part is not None]
        return None if not there or len(there) < len(parts) else sum(there[1:], there[0])

    def covered(self, arms: Sequence[str]) -> list[str]:
        return [size for arm in arms for size in self.sizes(arm)]

    def begun(self, role: str) -> list[str]:
        """The arms of a role that have a result with some seed."""
        return [arm for arm in self.arms(role) if any(name == arm for name, _ in self.rows)]

    def rivals(self, role: str) -> list[list[str]]:
        """What is compared with a whole family: the sum of its sizes; but of models from nothing each by itself."""
        arms = self.begun(role)
        return [[arm] for arm in arms] if role == "scratch" else [arms] if arms else []

    def taken(self, spent: Mapping[int, Spent | None], kind: str) -> Figure:
        there = {seed: one for seed, one in spent.items() if one is not None}
        bounds = frozenset(seed for seed, one in there.items() if not one.reached)
        return Figure(self.seeds, {seed: one.count(kind) for seed, one in there.items()}, bounds)

    def ratio(self, arm: str, rivals: Sequence[str], kind: str, search: bool = False) -> Figure:
        """How many times an elastic arm's tokens its rivals took, for the same sizes."""
        theirs = {seed: self.apart(rivals, seed, search) for seed in self.seeds}
        return self.against(arm, theirs, kind, self.covered(rivals))

    def against(self, arm: str, theirs: Mapping[int, Spent | None], kind: str, sizes: Iterable[str] = ()) -> Figure:
        """Others' tokens ÷ those of an arm, until these sizes (else all of the arm's) had got there.

        A bound where the others did not, a ceiling where the arm itself did not; missing where neither did.
        """
        values, bounds, ceilings = {}, set(), set()
        for seed, other in theirs.items():
            ours = self.spent(arm, seed, sizes)
            if ours is None or other is None or not (ours.reached or other.reached):
                continue
            values[seed] = other.count(kind) / ours.count(kind)
            bounds |= set() if other.reached else {seed}
            ceilings |= set() if ours.reached else {seed}
        return Figure(self.seeds, values, frozenset(bounds), frozenset(ceilings))

    def read(self, arm: str, size: str) -> Figure:
        """What a size itself had read when it got there; a bound where it did not."""
        values, bounds = {}, set()
        for seed in self.seeds:
            if (spent := self.spent(arm, seed, [size])) is None:
                continue
            row = self.rows[arm, seed]
            point = next(point for point in row["points"] if point["tokens"] == spent.tokens)
            values[seed] = point["student"].get(size, 0)
            bounds |= set() if spent.reached else {seed}
        return Figure(self.seeds, values, frozenset(bounds))

    # --- of several arms

    def over(self, arms: Iterable[str], fold: Callable[[list[Json]], float]) -> Figure:
        """A figure of the results of some arms, for the seeds that have them all."""
        names = list(arms)

        def value(seed: int) -> float | None:
            there = [self.rows[arm, seed] for arm in names if (arm, seed) in self.rows]
            return fold(there) if there and len(there) == len(names) else None

        return Figure.of(self.seeds, value)

    def total(self, arms: Iterable[str]) -> Figure:
        """Every token that was read by what was trained, to the end of the runs, searches included."""

        def read(row: Json) -> int:
            return int(sum(row["points"][-1]["student"].values()) + row.get("search", {}).get("student", 0))

        return self.over(arms, lambda rows: float(sum(map(read, rows))))

    def seconds(self, arm: str) -> Figure:
        return self.over([arm], lambda rows: rows[0]["seconds"] + rows[0].get("search", {}).get("seconds", 0.0))


def read_results(out: Path) -> Results:
    """study.json and results.jsonl of a study's output, or of where they were kept."""
    if not (out / "study.json").is_file():
        raise NestlingError(f"{out} is not the output of a study: study.json is missing")
    about, rows = read_json(out / "study.json"), {}
    file = out / "results.jsonl"
    for line in file.read_text("utf-8").splitlines() if file.is_file() else ():
        row = json.loads(line)
        rows[row["arm"], row["seed"]] = row
    return Results(about, rows)
