"""Batches are pure functions of (task, seed, step) and count exactly the solutions."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("reasoning_gym")

from nestling.data.batches import Batch, batch
from nestling.tasks import Task, is_held_out
from nestling.tokenizer import character_tokenizer

SUMS = Task.parse("chain_sum:min_terms=2,max_terms=3,max_digits=2")
TOKENS = character_tokenizer()


def make(seed: int = 0, step: int = 0, size: int = 16, task: Task = SUMS) -> Batch:
    return batch(task, TOKENS, seed, step, size)


def rows(made: Batch) -> list[list[int]]:
    """The whole sequences: every input and the last target, padding included."""
    return torch.cat([made.inputs_BL, made.targets_BL[:, -1:]], 1).tolist()


def text(ids: list[int]) -> str:
    return "".join({0: "_", 1: "$"}.get(token) or TOKENS.id_to_token(token) for token in ids)


def test_a_batch_is_a_function_of_task_seed_and_step_alone() -> None:
    make(seed=9, step=4)
    torch.manual_seed(1)
    first = make(seed=3, step=7)
    torch.manual_seed(2)
    assert rows(first) == rows(make(seed=3, step=7))
    others = [make(seed=3, step=8), make(seed=4, step=7), make(seed=3, step=7, size=17)]
    others.append(make(seed=3, step=7, task=Task.parse("chain_sum:min_terms=2,max_terms=2,max_digits=2")))
    assert all(rows(first) != rows(other) for other in others)


def test_exactly_the_solution_and_the_end_are_counted() -> None:
    for step in range(5):
        made = make(step=step)
        assert made.counted_BL.dtype == torch.bool
        for row, targets, counted in zip(rows(made), made.targets_BL, made.counted_BL, strict=True):
            written = text(row)
            prompt, solution = written.rstrip("_").split("=")
            assert solution.endswith("$")
            assert text(targets[counted].tolist()) == solution
            places = counted.nonzero().flatten() + 1  # of the sequence: targets are one token on
            assert places.tolist() == list(range(len(prompt) + 1, len(prompt) + 1 + len(solution)))
            assert eval(prompt) == int(solution.removesuffix("$").split(";")[-1])


def test_targets_are_the_inputs_one_token_on() -> None:
    made = make()
    assert torch.equal(made.inputs_BL[:, 1:], made.targets_BL[:, :-1])
    assert made.inputs_BL.dtype == torch.long
    lengths = [len(text(row).rstrip("_")) for row in rows(made)]
    assert len(set(lengths)) > 1  # rows are padded on the right
    assert made.real_BL.sum(1).tolist() == [min(length, max(lengths) - 1) for length in lengths]
    assert made.tokens == int(made.real_BL.sum())


def test_batches_hold_no_held_out_problem_and_do_not_repeat() -> None:
    prompts = [text(row).split("=")[0] + "=" for step in range(20) for row in rows(make(step=step))]
    assert not any(map(is_held_out, prompts))
    assert len(set(prompts)) > 0.9 * len(prompts)


def test_the_parts_of_a_batch_have_its_loss_and_its_gradient() -> None:
    data = make(size=9)
    model = torch.nn.Sequential(torch.nn.Embedding(16, 8), torch.nn.Linear(8, 16)).double()

    def loss(part: Batch) -> torch.Tensor:
        return F.cross_entropy(model(part.inputs_BL)[part.counted_BL], part.targets_BL[part.counted_BL])

    whole = loss(data)
    expected = torch.autograd.grad(whole, list(model.parameters()))
    parts = data.parts(2)
    total = sum(share * loss(part) for part, share in parts)
    torch.testing.assert_close(total, whole, rtol=1e-6, atol=0)
    for one, other in zip(torch.autograd.grad(total, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    assert sorted(row for part, _ in parts for row in part.real_BL.sum(1).tolist()) == sorted(
        data.real_BL.sum(1).tolist()
    )
    assert sum(part.inputs_BL.numel() for part, _ in parts) < data.inputs_BL.numel()
    short, long = (part.real_BL.sum(1) for part, _ in parts)
    assert short.max() <= long.min()
    assert all((part.real_BL.sum(1) > 0).all() and part.real_BL[:, -1].any() for part, _ in parts)
