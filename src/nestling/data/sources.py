"""Where a corpus comes from: files, datasets, generated problems, each read in a stream."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from nestling.data.chat import BadDocument
from nestling.data.dataset import Dataset
from nestling.data.lines import decoded, parse, read_lines
from nestling.data.records import Record, Source, Value, matching
from nestling.errors import NestlingError
from nestling.tasks import Task, problems
from nestling.text_sections import SourceSection
from nestling.weights.files import reason


def open_source(section: SourceSection, seed: int) -> Source:
    """seed: of a task's problems."""
    if section.files is not None:
        return Files(section.files, _readable(section.files))
    if section.dataset is not None:
        return Dataset(**{field.name: getattr(section, field.name) for field in fields(Dataset)})
    return Problems(Task(str(section.task), tuple(sorted(section.options.items()))), section.problems, seed)


@dataclass(frozen=True)
class Files:
    """JSON lines, a document in each, and plain texts, a document each."""

    name: str  # the pattern
    files: tuple[Path, ...]

    @property
    def identity(self) -> dict[str, Any]:
        return {"files": self.name}

    @property
    def total(self) -> tuple[int, str]:
        return sum(file.stat().st_size for file in self.files), "B"

    def records(self) -> Iterator[Record]:
        for file in self.files:
            yield from _lines(file) if _suffix(file) in _LINES else _text(file)


_LINES, _TEXTS = (".jsonl", ".ndjson", ".json"), (".txt", ".md")


def _suffix(file: Path) -> str:
    if (suffix := file.suffix.lower()) in _LINES + _TEXTS:
        return suffix
    kinds = ", ".join(_LINES + _TEXTS)
    raise NestlingError(f"{file}: cannot be read as text; files end in {kinds}; Parquet and Arrow go by dataset = …")


def _readable(pattern: str) -> tuple[Path, ...]:
    found = matching(pattern)
    for file in found:
        _suffix(file)
    return found


def _lines(file: Path) -> Iterator[Record]:
    for where, line in read_lines(file):
        yield Record(where, partial(_value, line, where), len(line))


def _value(line: bytes, where: str) -> Value:
    if not line.strip():
        raise BadDocument(f"{where}: is empty")
    value = parse(line, where)
    return value["text"] if isinstance(value.get("text"), str) else value["messages"]


def _text(file: Path) -> Iterator[Record]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise NestlingError(f"{file}: cannot be read: {reason(error)}") from None
    yield Record(str(file), partial(decoded, content, str(file)), len(content))


@dataclass(frozen=True)
class Problems:
    """The first so many training problems of a task; held-out ones are never among them."""

    task: Task
    count: int
    seed: int

    @property
    def name(self) -> str:
        return str(self.task)

    @property
    def identity(self) -> dict[str, Any]:
        return {"task": self.name, "problems": self.count, "seed": self.seed}

    @property
    def files(self) -> tuple[Path, ...]:
        return ()

    @property
    def total(self) -> tuple[int, str]:
        return self.count, "documents"

    def records(self) -> Iterator[Record]:
        drawn = islice(problems(self.task, self.seed, held_out=False), self.count)
        for number, problem in enumerate(drawn):
            yield Record(f"{self.name}, problem {number}", partial(lambda same: same, problem), 1)
