"""What a recipe learns from: batches for every step, what a ranking looks at, and how a size is judged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from nestling import ranks
from nestling.console import console
from nestling.errors import NestlingError
from nestling.evaluate.measures import EVALUATION
from nestling.recipe import Recipe, parent_architecture
from nestling.sections import EvaluateSection, RankSection, StageSection
from nestling.tasks import Task
from nestling.text_sections import DataSection
from nestling.weights.files import write_json


class Material(Protocol):
    """One recipe's [task] or [data]. `directory` is always a model's, with its tokenizer."""

    def to_json(self) -> Any:
        """What every stage depends on; a change of it is a change of them all."""

    def read(self, key: str) -> dict[str, Any]:
        """What a ranking ("calibration") or a judgement ("validation") depends on besides."""

    def check_lasting(self, stages: Sequence[StageSection]) -> None:
        """Refuse now a training for which there is not enough data."""

    prompt: ClassVar[str]  # to try a size with

    @property
    def title(self) -> str:
        """What it is, in a few words."""

    def check(self) -> None:
        """Refuse now what judging a size would refuse after the training."""

    def judged(self, how: EvaluateSection) -> str:
        """How a size is judged, in a sentence."""

    def save_tokenizer(self, directory: Path) -> dict[str, int | None]:
        """Give a parent that is trained from scratch its tokenizer; returns the special tokens of its config."""

    def batches(self, stages: Sequence[StageSection], directory: Path, seed: int) -> Any:
        """`data.batches.Data`: (stage, step of the whole run) -> the batch of that step."""

    def held_out(self, rows: int, directory: Path, seed: int) -> Any:
        """A `data.batches.Batch` that no training sees."""

    def calibration(self, how: RankSection, directory: Path, seed: int) -> tuple[Any, dict[str, Any]]:
        """((ids [B, L], real [B, L]), …) for a ranking, and what they are, for the record."""

    def judge(self, directory: Path, how: EvaluateSection, seed: int, title: str, out: Path, device: str) -> None:
        """Judge a model in stock transformers, and write the result into a directory."""


@dataclass(frozen=True)
class Problems:
    """Worked problems of a [task], made as they are needed; sizes are judged by how many new ones they solve."""

    task: Task
    prompt: ClassVar[str] = "50+23-88="

    def check(self) -> None:
        pass

    def check_lasting(self, stages: Sequence[StageSection]) -> None:
        pass

    def read(self, key: str) -> dict[str, Any]:
        return {}

    def to_json(self) -> str:
        return str(self.task)

    @property
    def title(self) -> str:
        return str(self.task)

    def judged(self, how: EvaluateSection) -> str:
        return (
            f"{how.problems} held-out problems, the same for every row; greedy generation in stock transformers, "
            "judged by the task's own verifier"
        )

    def save_tokenizer(self, directory: Path) -> dict[str, int | None]:
        from nestling.tokenizer import character_tokenizer, save_tokenizer

        save_tokenizer(character_tokenizer(), directory)
        return {"bos_token_id": None, "pad_token_id": 0, "eos_token_id": 1}

    def batches(self, stages: Sequence[StageSection], directory: Path, seed: int) -> Any:
        from nestling.data.batches import Stage, worked
        from nestling.tokenizer import read_tokenizer

        tasks = [Task(self.task.name, tuple(sorted({**dict(self.task.options), **s.options}.items()))) for s in stages]
        return worked(tasks, [Stage(s.steps, s.batch) for s in stages], read_tokenizer(directory), seed)

    def held_out(self, rows: int, directory: Path, seed: int) -> Any:
        from nestling.data.batches import encoded
        from nestling.tasks import distinct, problems
        from nestling.tokenizer import read_tokenizer

        return encoded(distinct(problems(self.task, seed, held_out=True), rows), read_tokenizer(directory))

    def calibration(self, how: RankSection, directory: Path, seed: int) -> tuple[Any, dict[str, Any]]:
        stage = StageSection(steps=how.batches, batch=how.batch)
        data = self.batches([stage], directory, seed + 1)  # a seed of its own: not what is trained on first
        drawn = [data(0, step) for step in range(how.batches)]
        made = {"task": str(self.task), "samples": how.batches * how.batch, "data_seed": seed + 1}
        return [(b.inputs_BL, b.real_BL) for b in drawn], made | {"tokens": sum(b.tokens for b in drawn)}

    def judge(self, directory: Path, how: EvaluateSection, seed: int, title: str, out: Path, device: str) -> None:
        from nestling.evaluate.accuracy import accuracy, stock
        from nestling.model.device import find_device

        result = accuracy(
            stock(directory, how.max_tokens, find_device(device)),
            self.task,
            backend="transformers",
            count=how.problems,
            batch=how.batch,
            seed=seed,
            title=title,
        )
        write_json(out / EVALUATION, result.to_json())


@dataclass(frozen=True)
class Texts:
    """The text of [data], tokenised once into OUT/data; sizes are judged by the perplexity of its validation part."""

    section: DataSection
    tokenizer: Path
    vocabulary: int
    length: int  # of the first stage, for what has no stage: calibration and validation
    cache: Path
    seed: int
    prompt: ClassVar[str] = "The"

    def check(self) -> None:
        if not self.section.validation:
            raise NestlingError(
                "nestling run judges sizes by data.validation, which the recipe does not name; name held-out text "
                "there, or train alone: nestling train"
            )
        self._corpus("validation")

    def check_lasting(self, stages: Sequence[StageSection]) -> None:
        self.batches(stages, self.tokenizer, self.seed)

    def read(self, key: str) -> dict[str, Any]:
        return {key: self._corpus(key).summary()["sources"], "length": self.length}

    @property
    def title(self) -> str:
        return ", ".join(source.name for source in self.section.train)

    def judged(self, how: EvaluateSection) -> str:
        return (
            f"at most {how.problems} held-out documents, the same for every row; stock transformers predicts every "
            f"token once, from all of its document before it or at least half a window of {self.length} tokens"
        )

    def to_json(self) -> dict[str, Any]:
        """What is trained on: the section but for what `read` tells of, and the hashes of its texts and tokenizer."""
        return {
            "data": self.section.model_dump(exclude={"validation", "calibration"}),
            "sources": self._corpus("train").summary()["sources"],
        }

    def save_tokenizer(self, directory: Path) -> dict[str, int | None]:
        from nestling.tokenizer import end_token
        from nestling.weights.transform import copy_companions

        copy_companions(self.tokenizer, directory)
        end = end_token(self.tokenizer)
        return {"bos_token_id": None, "pad_token_id": end, "eos_token_id": end}

    def batches(self, stages: Sequence[StageSection], directory: Path, seed: int) -> Any:
        from nestling.data.corpus import Shape

        return self._corpus("train").data([Shape(s.steps, s.batch, s.length or self.length) for s in stages])

    def held_out(self, rows: int, directory: Path, seed: int) -> Any:
        return self._corpus("validation", {"repeat": True}).batch(0, rows, self.length)

    def calibration(self, how: RankSection, directory: Path, seed: int) -> tuple[Any, dict[str, Any]]:
        alone = {"packing": False, "repeat": True}  # scores are summed over rows of one document each
        corpus = self._corpus("calibration", alone)
        drawn = [corpus.batch(step, how.batch, self.length) for step in range(how.batches)]
        made = {**corpus.summary(), "samples": how.batches * how.batch, "length": self.length}
        return [(b.inputs_BL, b.real_BL) for b in drawn], made | {"tokens": sum(b.tokens for b in drawn)}

    def judge(self, directory: Path, how: EvaluateSection, seed: int, title: str, out: Path, device: str) -> None:
        from nestling.evaluate.held_out import perplexity

        documents = self._corpus("validation").documents()[: how.problems]
        write_json(out / EVALUATION, perplexity(directory, documents, self.length, title, device))

    def _corpus(self, key: Any, changed: Mapping[str, Any] | None = None) -> Any:
        from nestling.data.corpus import open_corpus

        section = self.section.model_copy(update=changed or {})
        with ranks.in_turn():  # who tokenises what is not in the cache yet
            opened: Any = open_corpus(
                section,
                self.tokenizer,
                self.vocabulary,
                seed=self.seed,
                cache=self.cache,
                say=console.print,
                key=key,
            )
        return opened


def material(recipe: Recipe) -> Material:
    if recipe.task is not None:
        return Problems(recipe.task.task)
    assert recipe.data is not None
    return Texts(
        recipe.data,
        recipe.text_tokenizer,
        parent_architecture(recipe).vocab_size,
        recipe.train.stages[0].length or 0,
        recipe.text_cache,
        recipe.seed,
    )
