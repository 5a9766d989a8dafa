"""Batches of worked problems, each a pure function of (task, seed, step): a resumed run needs no data state."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from tokenizers import Tokenizer
from torch import Tensor

from nestling.tasks import HELD_OUT, Task, problems
from nestling.tokenizer import EOS


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
    def tokens(self) -> int:
        """Tokens a model reads to learn from this batch, padding not counted."""
        return int((self.inputs_BL != 0).sum())


def batch(task: Task, tokenizer: Tokenizer, seed: int, step: int, size: int) -> Batch:
    """`size` training problems, right-padded (nothing after its end reaches a token of a causal model)."""
    drawn = islice(problems(task, seed, held_out=False, start=step * size * HELD_OUT), size)
    pairs = [(problem.prompt, problem.solution) for problem in drawn]
    prompts = tokenizer.encode_batch([prompt for prompt, _ in pairs])
    solutions = tokenizer.encode_batch([solution for _, solution in pairs])
    end: int = tokenizer.token_to_id(EOS)  # type: ignore[assignment]
    rows = [prompt.ids + solution.ids + [end] for prompt, solution in zip(prompts, solutions, strict=True)]
    length = max(map(len, rows))
    ids_BL = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    begins = torch.tensor([[len(prompt.ids)] for prompt in prompts])
    place = torch.arange(length)
    counted_BL = (place >= begins) & (place < torch.tensor([[len(row)] for row in rows]))
    return Batch(ids_BL[:, :-1], ids_BL[:, 1:], counted_BL[:, 1:])
