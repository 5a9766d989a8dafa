"""Problems with verifiers, from reasoning-gym: prompt, worked solution, judgement. Held-out problems stay held out.

A problem is held out by its own text, not by a seed: whatever draws it, training skips it and evaluation takes it.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

from nestling.errors import NestlingError, nearest

HELD_OUT = 8  # one problem in so many
_PER_SEED = 10**9  # indices per seed: no two seeds ever draw the same range


@dataclass(frozen=True)
class Task:
    """A family of problems: a reasoning-gym dataset by name, and its options."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    @staticmethod
    def parse(text: str) -> "Task":
        """`chain_sum:min_terms=2,max_terms=3`."""
        name, _, options = text.partition(":")
        pairs = [pair.partition("=") for pair in options.split(",") if pair]
        if bad := [key for key, _, value in pairs if not re.fullmatch(r"-?\d+", value)]:
            raise NestlingError(f"task option {bad[0]!r} needs an integer, as in chain_sum:min_terms=2,max_terms=3")
        return Task(name, tuple((key, int(value)) for key, _, value in pairs))

    def __str__(self) -> str:
        return ", ".join([self.name, *(f"{key} {value}" for key, value in self.options)])


@dataclass(frozen=True)
class Problem:
    prompt: str  # ends where the model begins
    solution: str  # worked steps, then the answer
    entry: dict[str, Any] = field(compare=False, repr=False)  # what the verifier judges against


def problems(task: Task, seed: int, *, held_out: bool, start: int = 0) -> Iterator[Problem]:
    """An endless deterministic stream of problems, either only the held-out ones or only the others."""
    dataset, write = _dataset(task), _FORMATS[task.name]
    for index in range(seed * _PER_SEED + start, (seed + 1) * _PER_SEED):
        entry = dataset(index)
        problem = write(entry)
        if is_held_out(problem.prompt) == held_out:
            yield problem


def distinct(stream: Iterator[Problem], count: int) -> list[Problem]:
    """The first `count` different problems of a stream; gives up when it has long brought nothing new."""
    found: dict[str, Problem] = {}
    stale = 0
    for problem in stream:
        stale = stale + 1 if problem.prompt in found else 0
        found.setdefault(problem.prompt, problem)
        if len(found) == count:
            return list(found.values())
        if stale > 10 * count:
            raise NestlingError(f"the task has only about {len(found)} held-out problems; {count} were asked for")
    raise NestlingError("the task ran out of problems")


def is_held_out(prompt: str) -> bool:
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8]) % HELD_OUT == 0


def solves(task: Task, problem: Problem, text: str) -> bool:
    """Whether the task's own verifier gives full marks to the answer at the end of a generated text."""
    answer = text.rsplit(";", 1)[-1].strip()
    return _verifier(task)(answer, problem.entry) == 1


def _chain_sum(entry: dict[str, Any]) -> Problem:
    """`50+23-88=` and the running sums `73;-15`."""
    expression = entry["metadata"]["expression"]
    first, *rest = expression.split()
    sums, total = [], int(first)
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        total += int(term) if sign == "+" else -int(term)
        sums.append(str(total))
    return Problem(expression.replace(" ", "") + "=", ";".join(sums or [first]), entry)


_FORMATS = {"chain_sum": _chain_sum}
ALPHABET = "0123456789+-=;"
"""The characters that prompts and solutions are written with."""


@cache
def _source(task: Task) -> Any:
    if task.name not in _FORMATS:
        raise NestlingError(f"unknown task {task.name!r}; {nearest(task.name, _FORMATS)}")
    return generator(task.name, dict(task.options))


def generator(name: str, options: dict[str, Any]) -> Any:
    """A dataset of reasoning-gym, by index; an option that it does not have is refused with those that it has."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise NestlingError("tasks need reasoning-gym: pip install 'nestling[demo]'") from None
    allowed = [each.name for each in fields(DATASETS[name][1]) if each.name not in ("seed", "size")]
    if unknown := [key for key in options if key not in allowed]:
        raise NestlingError(f"task {name} has no option {unknown[0]!r}; {nearest(unknown[0], allowed)}")
    try:
        return reasoning_gym.create_dataset(name, size=1, seed=0, **options)
    except (TypeError, AssertionError, ValueError) as error:
        raise NestlingError(f"task {name}: {error}") from None


def _dataset(task: Task) -> Any:
    """index -> entry; reasoning-gym derives every problem from its index alone."""
    return _source(task).__getitem__


def _verifier(task: Task) -> Any:
    return _source(task).score_answer
