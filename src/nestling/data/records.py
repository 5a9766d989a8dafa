"""What every source of text gives: records, and where each is."""

import difflib
import glob
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nestling.errors import NestlingError, nearest
from nestling.tasks import Problem

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


def matching(pattern: str) -> tuple[Path, ...]:
    """The readable files of a pattern, in order; an error if there are none."""
    found = tuple(path for path in map(Path, sorted(glob.glob(pattern, recursive=True))) if path.is_file())
    if not found:
        folder = Path(pattern).parent
        while not folder.is_dir():
            folder = folder.parent
        there = sorted(str(path) for path in folder.iterdir() if not path.name.startswith("."))
        raise NestlingError(
            f"data: {pattern} matches no file; {nearest(pattern, difflib.get_close_matches(pattern, there, 5, 0))}"
        )
    for file in found:
        if not os.access(file, os.R_OK):
            raise NestlingError(f"{file}: cannot be read: Permission denied")
    return found
