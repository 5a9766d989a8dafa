"""The table of a recipe that names text: sources, how they are blended, cut and learnt from."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveInt, field_validator, model_validator

from nestling.sections import Section
from nestling.tasks import Task


class SourceSection(Section):
    """One source of text: `files`, a `dataset` or a `task`, and its share of the tokens beside the other sources."""

    files: str | None = None  # a file or a pattern: .jsonl with "text" or "messages" in every line, .txt a text each
    dataset: str | None = None  # a directory that datasets saved or of Parquet files, a format, or a hub's name
    config: str | None = None  # of the dataset, where it has several
    split: str = "train"  # of the dataset
    column: str = "text"  # of the dataset: texts, or chats as lists of messages
    data_files: str | None = None  # of the dataset: a pattern or an address
    revision: str | None = None  # of the dataset on a hub
    limit: PositiveInt | None = None  # the dataset's first so many rows; a stream need not have an end
    streaming: bool = False  # the dataset may come from a hub, by name
    task: str | None = None  # reasoning-gym problems, loss on their solutions
    problems: PositiveInt = 100_000  # of the task
    options: dict[str, int] = {}  # of the task
    weight: NonNegativeFloat = 1.0

    @model_validator(mode="after")
    def _one_kind(self) -> "SourceSection":
        if sum(kind is not None for kind in (self.files, self.dataset, self.task)) != 1:
            raise ValueError("a source needs one of files, dataset, task")
        of_dataset = {"config", "split", "column", "data_files", "revision", "limit", "streaming"}
        allowed = {"files": set(), "dataset": of_dataset, "task": {"problems", "options"}}
        kind = next(kind for kind in allowed if getattr(self, kind) is not None)
        if foreign := sorted(self.model_fields_set - allowed[kind] - {kind, "weight"}):
            raise ValueError(f"{foreign[0]} has no meaning for {kind}")
        return self

    @property
    def name(self) -> str:
        return self.files or self.dataset or str(Task(str(self.task), tuple(sorted(self.options.items()))))


def _sources(given: Any) -> Any:
    """A pattern alone, or one source alone, stands for a blend of one."""
    given = {"files": given} if isinstance(given, str) else given
    given = [given] if isinstance(given, dict) else given
    if not isinstance(given, list | tuple) or not all(isinstance(each, dict | SourceSection) for each in given):
        raise ValueError('a blend is a list of tables, such as [{ files = "books/*.txt", weight = 0.6 }, …]')
    return given


Sources = Annotated[tuple[SourceSection, ...], BeforeValidator(_sources)]


class DataSection(Section):
    """Text to train on: a pattern such as "data/*.jsonl", a source, or a list of them, a blend by weight.

    Each source is tokenised once, into OUT/data.
    """

    train: Sources = Field(min_length=1)
    validation: Sources = ()  # held-out text, for perplexity
    calibration: Sources = ()  # for the ranking; the training text if not given
    tokenizer: str | None = None  # a directory with tokenizer.json; the parent model's own if not given
    packing: bool = True  # whole documents side by side in rows of exactly the length, or one per row, padded
    long_documents: Literal["split", "drop"] = "split"  # those longer than a row
    loss_on: Literal["all", "assistant"] = "all"  # of chats: every token, or the assistant's turns only
    skip_bad: bool = False  # leave out (and count) lines that cannot be used, instead of refusing them
    repeat: bool = False  # begin again, in another order, when the data has run out

    @field_validator("train", "validation", "calibration")
    @classmethod
    def _some_weight(cls, given: tuple[SourceSection, ...]) -> tuple[SourceSection, ...]:
        if given and not sum(source.weight for source in given):
            raise ValueError("a blend needs at least one weight above 0")
        return given
