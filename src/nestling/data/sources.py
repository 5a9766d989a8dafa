"""Where a corpus comes from: files, datasets on disk, generated problems, each read in a stream."""

import glob
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from nestling.data.chat import BadDocument, is_chat
from nestling.data.lines import decoded, parse, read_lines
from nestling.errors import NestlingError, nearest
from nestling.tasks import Problem, Task, problems
from nestling.text_sections import SourceSection
from nestling.weights.files import reason

Value = str | list[dict[str, Any]] | Problem
"""A text, a chat, or a problem with its worked solution."""


@dataclass(frozen=True)
class Record:
    """One text, chat or problem: where it is, how to read it (it may be broken), how much of its source it is."""

    where: str
    read: Callable[[], Value]
    amount: int


class Source(Protocol):
    """A place that records come from. Its `identity` and the contents of its `files` decide what they are."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> dict[str, Any]: ...

    @property
    def files(self) -> tuple[Path, ...]: ...

    @property
    def total(self) -> tuple[int, str]:
        """How much there is to read, and the unit; 0 if nobody knows."""

    def records(self) -> Iterator[Record]: ...


def open_source(section: SourceSection, seed: int) -> Source:
    """seed: of a task's problems."""
    if section.files is not None:
        return Files(section.files, _matching(section.files))
    if section.dataset is not None:
        return Dataset(section.dataset, section.split, section.column, section.streaming)
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


def _matching(pattern: str) -> tuple[Path, ...]:
    """The files of a pattern, in order."""
    found = tuple(path for path in map(Path, sorted(glob.glob(pattern, recursive=True))) if path.is_file())
    if not found:
        folder = Path(pattern).parent
        while not folder.is_dir():
            folder = folder.parent
        there = sorted(str(path) for path in folder.iterdir() if not path.name.startswith("."))
        raise NestlingError(f"data: {pattern} matches no file; {nearest(pattern, there[:20])}")
    for file in found:
        _suffix(file)
        if not os.access(file, os.R_OK):
            raise NestlingError(f"{file}: cannot be read: Permission denied")
    return found


@dataclass(frozen=True)
class Dataset:
    """A column of a dataset that Hugging Face `datasets` reads: saved to disk by it, or files such as Parquet."""

    name: str  # a directory, or what a hub calls it
    split: str
    column: str
    streaming: bool

    @property
    def identity(self) -> dict[str, Any]:
        return {"dataset": self.name, "split": self.split, "column": self.column}

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted(path for path in Path(self.name).rglob("*") if path.is_file()))

    @property
    def total(self) -> tuple[int, str]:
        opened = self._opened()
        return (len(opened) if hasattr(opened, "__len__") else 0), "documents"

    def records(self) -> Iterator[Record]:
        with self._telling():
            for number, row in enumerate(self._opened()):
                where = f"{self.name}, {self.split}, row {number}"
                yield Record(where, partial(self._value, row.get(self.column), where), 1)

    def _value(self, value: Any, where: str) -> Value:
        if isinstance(value, str) or is_chat(value):
            return value
        raise BadDocument(f"{where}: column {self.column!r} has neither a text nor a list of messages")

    def _opened(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise NestlingError("dataset = … needs Hugging Face datasets: pip install 'nestling[datasets]'") from None
        if not (there := Path(self.name).is_dir()) and not self.streaming:
            raise NestlingError(
                f"data: {self.name} is not a directory; name one that datasets saved, or one of Parquet files, or set "
                "streaming = true to read a dataset of that name from a hub"
            )
        saved = there and any((Path(self.name) / name).is_file() for name in ("state.json", "dataset_dict.json"))
        with self._telling():
            opened = datasets.load_from_disk(self.name) if saved else None
            if opened is None:
                opened = datasets.load_dataset(self.name, split=self.split, streaming=True)
            elif hasattr(opened, "keys"):
                opened = opened[self.split]
        columns = opened.column_names or [self.column]
        if self.column not in columns:
            raise NestlingError(f"data: {self.name} has no column {self.column!r}; {nearest(self.column, columns)}")
        return opened

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """What the library raises, from pyarrow's errors to a hub's, as one line."""
        try:
            yield
        except NestlingError:
            raise
        except Exception as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            split = f"split {self.split!r}"
            raise NestlingError(f"data: {self.name}, {split} cannot be read as a dataset: {said}") from None


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
