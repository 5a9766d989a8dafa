"""What a stage of elastic training has besides its data: its length, its learning rates and its mix of budgets."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nestling.data.batches import Batch, Stage
from nestling.errors import NestlingError


@dataclass(frozen=True)
class Lesson:
    """One stage's own settings; None is the run's."""

    length: int | None = None  # tokens of a sequence at most; longer ones are cut
    learning_rate: float | None = None
    router_learning_rate: float | None = None
    probabilities: tuple[float, ...] = ()  # of drawing each budget, largest first; empty: all alike


def stage_index(stages: Sequence[Stage], step: int) -> int:
    """Which stage a step of the whole run belongs to."""
    ends = itertools.accumulate(stage.steps for stage in stages)
    return next(index for index, end in enumerate(ends) if step < end)


def draw(budgets: Sequence[str], lesson: Lesson, seed: int, *step: int) -> str:
    """The one budget of a step: a function of seed and step alone (Nemotron Elastic, section 4); or of a rank too."""
    weights = np.array(lesson.probabilities or [1.0] * len(budgets))
    return budgets[int(np.random.default_rng((seed, *step)).choice(len(budgets), p=weights / weights.sum()))]


def shortened(data: Batch, length: int | None) -> Batch:
    """The batch with at most `length` inputs per row."""
    if length is None or data.inputs_BL.shape[1] <= length:
        return data
    if not (short := data.cut(length)).counted_BL.any():
        raise NestlingError(f"length = {length} cuts every solution off; the batch has up to {data.inputs_BL.shape[1]}")
    return short


def token_counts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Tokens that were trained on: {"teacher": n, "budgets": {name: n}, "stages": [{name: n}, …]}, from the metrics."""
    stages: list[Counter[str]] = []
    for row in rows:
        stages += [Counter() for _ in range(row["stage"] + 1 - len(stages))]
        stages[row["stage"]].update(row["budget_tokens"])
    budgets: Counter[str] = sum(stages, Counter())
    teacher = sum(row["teacher_tokens"] for row in rows)
    return {"teacher": teacher, "budgets": dict(budgets), "stages": [dict(stage) for stage in stages]}
