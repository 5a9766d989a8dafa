"""Batches of worked problems, each a pure function of (task, seed, step): a resumed run needs no data state."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from nestling.errors import NestlingError
from nestling.tasks import HELD_OUT, Task, problems
from nestling.tokenizer import EOS, token_ids


@dataclass(frozen=True)
class Stage:
    """Part of a run: its problems, its batch size, and for how many steps."""

    task: Task
    steps: int
    batch: int


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that a step of the whole run belongs to."""
    for stage in stages:
        if step < stage.steps:
            return stage
        step -= stage.steps
    raise IndexError("the run is over")


@dataclass(frozen=True)
class Batch:
    """inputs_BL and targets_BL are one token apart; counted_BL is 1 where a target is part of a solution."""

    inputs_BL: Tensor
    targets_BL: Tensor
    counted_BL: Tensor

    @property
    def real_BL(self) -> Tensor:
        """1 where an input is not padding."""
        return self.inputs_BL != 0

    @property
    def tokens(self) -> int:
        """Tokens a model reads to learn from this batch, padding not counted."""
        return int(self.real_BL.sum())

    def parts(self, count: int = 2) -> list[tuple["Batch", float]]:
        """The batch in parts of rows of similar length, each cut to its longest, and each one's share of the loss.

        A mean over counted targets of the whole batch is the sum of share · mean over the parts; padding costs less.
        """
        lengths = self.real_BL.sum(1)
        parts = []
        for rows in lengths.argsort(stable=True).chunk(count):
            end = int(lengths[rows].max())
            cut = (tensor[rows, :end] for tensor in (self.inputs_BL, self.targets_BL, self.counted_BL))
            part = Batch(*cut)
            parts.append((part, float(part.counted_BL.sum() / self.counted_BL.sum())))
        return parts


def batch(task: Task, tokenizer: Tokenizer, seed: int, step: int, size: int) -> Batch:
    """`size` training problems, right-padded (nothing after its end reaches a token of a causal model)."""
    drawn = islice(problems(task, seed, held_out=False, start=step * size * HELD_OUT), size)
    pairs = [(problem.prompt, problem.solution) for problem in drawn]
    prompts = tokenizer.encode_batch([prompt for prompt, _ in pairs])
    solutions = tokenizer.encode_batch([solution for _, solution in pairs])
    end: int = tokenizer.token_to_id(EOS)  # type: ignore[assignment]
    rows = [prompt.ids + solution.ids + [end] for prompt, solution in zip(prompts, solutions, strict=True)]
    ids_BL, real_BL = _padded(rows)
    begins = torch.tensor([[len(prompt.ids)] for prompt in prompts])
    counted_BL = (torch.arange(ids_BL.shape[1]) >= begins) & real_BL
    return Batch(ids_BL[:, :-1], ids_BL[:, 1:], counted_BL[:, 1:])


def read_texts(
    file: Path, tokenizer: Tokenizer, vocabulary: int, samples: int, length: int, size: int
) -> list[tuple[Tensor, Tensor]]:
    """(ids [B, L], real [B, L]) batches of up to `samples` texts of a JSON-lines file, right-padded."""
    rows = [token_ids(tokenizer, text, vocabulary, line)[:length] for line, text in islice(_texts(file), samples)]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise NestlingError(f"{file} has no text of at least two tokens")
    return [_padded(rows[start : start + size]) for start in range(0, len(rows), size)]


def _texts(file: Path) -> Iterator[tuple[str, str]]:
    """(which line, its text) for every line that is not blank."""
    try:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{file}, line {number}", _text(f"{file}, line {number}", line)
    except (OSError, UnicodeDecodeError) as error:
        raise NestlingError(f"{file}: cannot be read: {error}") from None


def _text(where: str, line: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise NestlingError(f"{where}: not valid JSON: {error.msg}") from None
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise NestlingError(f'{where}: needs an object with a "text" string')
    return value["text"]


def _padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    real = torch.arange(length) < torch.tensor([[len(row)] for row in rows])
    return ids, real
