"""Batches are pure functions of (task, seed, step) and count exactly the solutions; calibration texts are checked."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("reasoning_gym")

from nestling.errors import NestlingError
from nestling.tasks import Task, is_held_out
from nestling.tokenizer import character_tokenizer
from nestling.train.data import Batch, Stage, batch, read_texts, stage_at
from nestling.train.objective import cross_entropy

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


def test_the_stage_of_a_step() -> None:
    stages = [Stage(SUMS, 3, 8), Stage(SUMS, 2, 16)]
    assert [stage_at(stages, step).batch for step in range(5)] == [8, 8, 8, 16, 16]
    with pytest.raises(IndexError):
        stage_at(stages, 5)


# ---- calibration texts


def lines(tmp_path: Path, *values: object) -> Path:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values))
    return file


def test_texts_are_read_cut_and_padded(tmp_path: Path) -> None:
    file = lines(tmp_path, {"text": "1+2=3", "id": 1}, "", {"text": "7"}, {"text": "10+10=20"}, {"text": "5-5=0"})
    (ids, real), (more, more_real) = read_texts(file, TOKENS, 16, samples=99, length=6, size=2)
    assert [text(row) for row in ids.tolist()] == ["1+2=3_", "10+10="]  # one token is no text to predict
    assert real.tolist() == [[True] * 5 + [False], [True] * 6]
    assert [text(row) for row in more.tolist()] == ["5-5=0"]
    assert more_real.all()
    assert sum(len(ids) for ids, _ in read_texts(file, TOKENS, 16, samples=1, length=6, size=2)) == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "has no text of at least two tokens"),
        (["", " "], "has no text of at least two tokens"),
        ([{"text": "7"}], "has no text of at least two tokens"),
        ([{"text": "1+1=2"}, "", "{oops"], "line 3: not valid JSON"),
        ([{"text": "1+1=2"}, ["1+1"]], 'line 2: needs an object with a "text" string'),
        ([{"texts": "1+1=2"}], 'line 1: needs an object with a "text" string'),
        ([{"text": "1+1=2"}, {"text": "one 1"}], "line 2: 'one 1' has characters"),
        ([{"text": 5}], 'line 1: needs an object with a "text" string'),
    ],
)
def test_bad_texts_are_refused_with_their_line(tmp_path: Path, values: list[object], words: str) -> None:
    with pytest.raises(NestlingError) as caught:
        read_texts(lines(tmp_path, *values), TOKENS, 16, samples=9, length=9, size=2)
    assert words in str(caught.value)
    assert "texts.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_binary_file_and_a_small_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NestlingError, match="cannot be read"):
        read_texts(tmp_path / "none", TOKENS, 16, 9, 9, 2)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(NestlingError, match="cannot be read"):
        read_texts(tmp_path / "binary", TOKENS, 16, 9, 9, 2)
    with pytest.raises(NestlingError, match="token 15 is outside the model's vocabulary of 15"):
        read_texts(lines(tmp_path, {"text": "1;2"}), TOKENS, 15, 9, 9, 2)


def test_the_parts_of_a_batch_have_its_loss_and_its_gradient() -> None:
    data = make(size=9)
    model = torch.nn.Sequential(torch.nn.Embedding(16, 8), torch.nn.Linear(8, 16)).double()
    whole = cross_entropy(model(data.inputs_BL), data.targets_BL, data.counted_BL)
    expected = torch.autograd.grad(whole, list(model.parameters()))
    parts = data.parts(2)
    total = sum(share * cross_entropy(model(p.inputs_BL), p.targets_BL, p.counted_BL) for p, share in parts)
    torch.testing.assert_close(total, whole, rtol=1e-6, atol=0)
    for one, other in zip(torch.autograd.grad(total, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    assert sorted(row for part, _ in parts for row in part.real_BL.sum(1).tolist()) == sorted(
        data.real_BL.sum(1).tolist()
    )
    assert sum(part.inputs_BL.numel() for part, _ in parts) < data.inputs_BL.numel()
    assert all((part.real_BL.sum(1) > 0).all() and part.real_BL[:, -1].any() for part, _ in parts)
