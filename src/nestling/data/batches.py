"""Batches of worked problems, each a pure function of (task, seed, step): a resumed run needs no data state."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from tokenizers import Tokenizer
from torch import Tensor

from nestling.errors import NestlingError
from nestling.tasks import HELD_OUT, Problem, Task, problems
from nestling.tokenizer import EOS


@dataclass(frozen=True)
class Stage:
    """Part of a run: for how many steps, and how many rows a batch has."""

    steps: int
    batch: int


@dataclass(frozen=True)
class Batch:
    """inputs_BL and targets_BL are one token apart; counted_BL is 1 where a target is to be learnt."""

    inputs_BL: Tensor
    targets_BL: Tensor
    counted_BL: Tensor
    lengths_B: Tensor | None = None  # inputs of every row before its padding, which is on the right; None: no padding
    documents_BL: Tensor | None = None  # 1, 2, … where documents share a row, 0 at padding; None: each row is one

    def to(self, device: torch.device) -> "Batch":
        moved = {name: x.to(device, non_blocking=True) for name, x in vars(self).items() if x is not None}
        return replace(self, **moved)

    @property
    def real_BL(self) -> Tensor:
        """1 where an input is not padding."""
        if self.lengths_B is None:
            return torch.ones_like(self.inputs_BL, dtype=torch.bool)
        return torch.arange(self.inputs_BL.shape[1], device=self.inputs_BL.device) < self.lengths_B[:, None]

    @property
    def tokens(self) -> int:
        """Tokens a model reads to learn from this batch, padding not counted."""
        return self.inputs_BL.numel() if self.lengths_B is None else int(self.lengths_B.sum())

    def cut(self, length: int, rows: Tensor | slice = slice(None)) -> "Batch":
        """The first `length` positions of some rows."""
        lengths = None if self.lengths_B is None else self.lengths_B[rows].clamp(max=length)
        documents = None if self.documents_BL is None else self.documents_BL[rows, :length]
        inputs, targets, counted = (x[rows, :length] for x in (self.inputs_BL, self.targets_BL, self.counted_BL))
        return Batch(inputs, targets, counted, lengths, documents)

    def parts(self, count: int = 2, rank: int = 0, ranks: int = 1) -> list[tuple["Batch", float]]:
        """The batch in parts of rows of similar length, each cut to its longest, and each one's share of the loss.

        A mean over counted targets of the whole batch is the sum of share · mean over the parts; padding costs less.
        Rows in which nothing counts are left out where they would be a part of their own. Of several ranks each has as
        many rows, in as many parts: their shares sum to 1 over all of them, and are 0 where nothing counts.
        """
        if len(self.inputs_BL) % ranks:
            raise NestlingError(
                f"a batch of {len(self.inputs_BL)} rows cannot be shared out to {ranks} processes; "
                "make the batch of every stage a multiple of their number, or start another number of them"
            )
        lengths = self.real_BL.sum(1)
        own = lengths.argsort(stable=True)[rank::ranks]
        parts = [self.cut(int(lengths[rows].max()), rows) for rows in own.chunk(count)]
        total = self.counted_BL.sum()
        shared = [(part, float(part.counted_BL.sum() / total)) for part in parts]
        if ranks == 1:
            return [(part, share) for part, share in shared if share]
        return [(part if share else part.counted_once(), share) for part, share in shared]

    def counted_once(self) -> "Batch":
        """With one target that counts, so that there is a mean to be given no weight."""
        counted = torch.zeros_like(self.counted_BL)
        counted[0, 0] = True
        return replace(self, counted_BL=counted)


Data = Callable[[int, int], Batch]
"""(stage, step of the whole run) -> the batch of that step: a pure function, so a resumed run needs no data state."""


def worked(tasks: Sequence[Task], stages: Sequence[Stage], tokenizer: Tokenizer, seed: int) -> Data:
    """Worked problems of one task per stage."""
    return lambda stage, step: batch(tasks[stage], tokenizer, seed, step, stages[stage].batch)


def batch(task: Task, tokenizer: Tokenizer, seed: int, step: int, size: int) -> Batch:
    """`size` training problems, right-padded (nothing after its end reaches a token of a causal model)."""
    return encoded(islice(problems(task, seed, held_out=False, start=step * size * HELD_OUT), size), tokenizer)


def encoded(drawn: Iterable[Problem], tokenizer: Tokenizer) -> Batch:
    """Worked problems, right-padded; what counts are the solutions and their ends."""
    pairs = [(problem.prompt, problem.solution) for problem in drawn]
    prompts = tokenizer.encode_batch([prompt for prompt, _ in pairs])
    solutions = tokenizer.encode_batch([solution for _, solution in pairs])
    end: int = tokenizer.token_to_id(EOS)  # type: ignore[assignment]
    rows = [prompt.ids + solution.ids + [end] for prompt, solution in zip(prompts, solutions, strict=True)]
    ids_BL, real_BL = padded(rows)
    begins = torch.tensor([[len(prompt.ids)] for prompt in prompts])
    counted_BL = (torch.arange(ids_BL.shape[1]) >= begins) & real_BL
    return Batch(ids_BL[:, :-1], ids_BL[:, 1:], counted_BL[:, 1:], real_BL.sum(1).clamp(max=ids_BL.shape[1] - 1))


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(ids [B, L], real [B, L]), right-padded."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    real = torch.arange(length) < torch.tensor([[len(row)] for row in rows])
    return ids, real
