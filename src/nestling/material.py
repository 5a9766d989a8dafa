"""What a recipe learns from: batches for every step, what a ranking looks at, and how a size is judged."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nestling.recipe import EvaluateSection, RankSection, Recipe, StageSection
from nestling.tasks import Task
from nestling.weights.output import write_json


class Material(Protocol):
    """One recipe's [task] or [data]. `directory` is always a model's, with its tokenizer."""

    def to_json(self) -> Any:
        """What every stage depends on; a change of it is a change of them all."""

    def save_tokenizer(self, directory: Path) -> None:
        """The tokenizer of a parent that is trained from scratch."""

    def batches(self, stages: Sequence[StageSection], directory: Path, seed: int) -> Any:
        """`train.data.Data`: (stage, step of the whole run) -> the batch of that step."""

    def calibration(self, how: RankSection, directory: Path, seed: int) -> tuple[Any, dict[str, Any]]:
        """((ids [B, L], real [B, L]), …) for a ranking, and what they are, for the record."""

    def judge(self, directory: Path, how: EvaluateSection, seed: int, title: str, out: Path) -> None:
        """Judge a model in stock transformers, and write the result into a directory."""


@dataclass(frozen=True)
class Problems:
    """Worked problems of a [task], made as they are needed; sizes are judged by how many new ones they solve."""

    task: Task

    def to_json(self) -> str:
        return str(self.task)

    def save_tokenizer(self, directory: Path) -> None:
        from nestling.tokenizer import character_tokenizer, save_tokenizer

        save_tokenizer(character_tokenizer(), directory)

    def batches(self, stages: Sequence[StageSection], directory: Path, seed: int) -> Any:
        from nestling.tokenizer import read_tokenizer
        from nestling.train.data import Stage, worked

        tasks = [Task(self.task.name, tuple(sorted({**dict(self.task.options), **s.options}.items()))) for s in stages]
        return worked(tasks, [Stage(s.steps, s.batch) for s in stages], read_tokenizer(directory), seed)

    def calibration(self, how: RankSection, directory: Path, seed: int) -> tuple[Any, dict[str, Any]]:
        stage = StageSection(steps=how.batches, batch=how.batch)
        data = self.batches([stage], directory, seed + 1)  # a seed of its own: not what is trained on first
        drawn = [data(0, step) for step in range(how.batches)]
        made = {"task": str(self.task), "samples": how.batches * how.batch, "data_seed": seed + 1}
        return [(b.inputs_BL, b.real_BL) for b in drawn], made | {"tokens": sum(b.tokens for b in drawn)}

    def judge(self, directory: Path, how: EvaluateSection, seed: int, title: str, out: Path) -> None:
        from nestling.evaluate.accuracy import accuracy, stock

        result = accuracy(
            stock(directory, how.max_tokens),
            self.task,
            backend="transformers",
            count=how.problems,
            batch=how.batch,
            seed=seed,
            title=title,
        )
        write_json(out / "accuracy.json", result.to_json())


def material(recipe: Recipe) -> Material:
    assert recipe.task is not None
    return Problems(recipe.task.task)
