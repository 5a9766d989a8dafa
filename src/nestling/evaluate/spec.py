"""Tasks as they are named on the command line: `math-500:file=math.jsonl,samples=4`."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from nestling.errors import NestlingError, nearest

_OPTION = re.compile(r"[a-z_]+=")
_MEANT = {"true": True, "yes": True, "false": False, "no": False}


@dataclass(frozen=True)
class Spec:
    """A task's name and the options given to it, as text."""

    name: str
    options: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def parse(text: str) -> "Spec":
        name, _, rest = text.partition(":")
        pairs = [piece.partition("=") for piece in rest.split(",") if piece]
        if wrong := [piece for piece, equals, _ in pairs if not equals]:
            raise NestlingError(f"task {text!r}: {wrong[0]!r} has no value; write NAME:option=value,option=value")
        return Spec(name.strip(), {key.strip(): value for key, _, value in pairs})

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}:{options}" if options else self.name

    @property
    def label(self) -> str:
        """What results call the task: without the directories of its file, whose content has a hash of its own."""
        return re.sub(r"(?<=file=)[^,]*/", "", str(self))

    def check(self, allowed: Iterable[str]) -> None:
        """Refuse an option that the task does not have."""
        names = list(allowed)
        if unknown := [key for key in self.options if key not in names]:
            raise NestlingError(f"task {self.name}: unknown option {unknown[0]!r}; {nearest(unknown[0], names)}")

    def number(self, key: str, default: Any, least: float = 0) -> Any:
        """An option as a number of the default's type, `least` at the least."""
        if (text := self.options.get(key)) is None:
            return default
        kind = int if isinstance(default, int) else float
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value < float("inf"):
            raise NestlingError(f"task {self.name}: {key}={text} must be a number, {least} or more")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """An option as yes or no."""
        text = self.options.get(key)
        if text is not None and text not in _MEANT:
            raise NestlingError(f"task {self.name}: {key}={text} must be yes or no")
        return default if text is None else _MEANT[text]


def parse_tasks(given: Iterable[str]) -> list[Spec]:
    """Tasks from `--tasks`, each text one or several: `a,b:x=1,y=2,c` is a, b with x and y, and c.

    A piece `y=2` belongs to the task before it; a value cannot have a comma.
    """
    pieces: list[str] = []
    for text in given:
        for piece in text.split(","):
            if pieces and _OPTION.match(piece):
                pieces[-1] += ("," if ":" in pieces[-1] else ":") + piece
            elif piece:
                pieces.append(piece)
    specs = [Spec.parse(piece) for piece in pieces]
    if twice := [str(spec) for spec in specs if specs.count(spec) > 1]:
        raise NestlingError(f"--tasks names {twice[0]} twice")
    return specs
