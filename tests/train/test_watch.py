"""Sizes looked at along the way: right against generation one token at a time, and made when they are due."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("reasoning_gym")

from test_elastic import BY_HAND, ROUTED, TINY, run

from nestling.arch.submodel import WHOLE, Submodel
from nestling.bench.models import cut
from nestling.data.batches import Stage, encoded, worked
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import hard
from nestling.tasks import Task, distinct, problems
from nestling.tokenizer import EOS, character_tokenizer
from nestling.train.checkpoints import Run
from nestling.train.pretrain import Pretraining, pretrain
from nestling.train.watch import Watch

SUMS = Task.parse("chain_sum:min_terms=2,max_terms=2,max_digits=1")
TOKENIZER = character_tokenizer()
ASKED = distinct(problems(SUMS, 3, held_out=True), 12)
HELD_OUT = encoded(ASKED, TOKENIZER)
HALF = Submodel(hidden_size=8, intermediate_size=32)


def written(model: NemotronH, prompt: str, length: int) -> list[int]:
    ids = TOKENIZER.encode(prompt).ids
    for _ in range(length):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-length:]


@torch.no_grad()
def test_a_row_is_exact_when_greedy_decoding_writes_its_solution(tmp_path: Path) -> None:
    how = Pretraining(
        stages=(Stage(40, 12),), learning_rate=0.02, warmup=2, decay=0.3, weight_decay=0.0, optimizer="adamw"
    )
    with torch.enable_grad():
        made, _ = pretrain(TINY, lambda stage, step: HELD_OUT, how, 0, Run(tmp_path / "state", "", ""))
    end = TOKENIZER.token_to_id(EOS)
    found = {}
    for size in (WHOLE, HALF):
        small = cut(made, size, hard(TINY, size))  # a model of its own
        wanted = [[*TOKENIZER.encode(problem.solution).ids, end] for problem in ASKED]
        right = [written(small, p.prompt, len(w)) == w for p, w in zip(ASKED, wanted, strict=True)]
        found[size] = sum(right) / len(right)
        seen = Watch(HELD_OUT, 1).measure(made, hard(TINY, size))
        assert seen["exact"] == pytest.approx(found[size], abs=1e-6)
        losses = [loss for p, w in zip(ASKED, wanted, strict=True) for loss in nats(small, p.prompt, w)]
        assert seen["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert 0 < found[WHOLE] <= 1
    assert found[HALF] < found[WHOLE]


def nats(model: NemotronH, prompt: str, solution: list[int]) -> list[float]:
    """-log p of every token of a solution."""
    ids = TOKENIZER.encode(prompt).ids
    log_p = torch.log_softmax(model(torch.tensor([ids + solution])).logits[0], -1)
    return [-float(log_p[len(ids) + i - 1, token]) for i, token in enumerate(solution)]


def test_looks_come_when_due_and_leave_the_training_as_it_is(tmp_path: Path) -> None:
    watch = Watch(HELD_OUT, 3, ("75%", "50%"))
    plain, watched = run(tmp_path / "plain"), run(tmp_path / "watched", watch=watch)
    assert [row["step"] for row in watched.rows if "held_out" in row] == [2, 5, 7]  # and after the last
    assert [row["loss"] for row in watched.rows] == [row["loss"] for row in plain.rows]
    last = watched.rows[-1]["held_out"]
    assert last == {name: watch.measure(watched.model, hard(TINY, watched.family[name])) for name in ("75%", "50%")}
    assert ROUTED > 3  # the first look is at what the router would have chosen then


def test_sizes_that_are_given_are_looked_at_from_the_first_step(tmp_path: Path) -> None:
    watch = Watch(HELD_OUT, 1, ("50%",))
    rows = run(tmp_path, family=BY_HAND, watch=watch).rows
    assert all({*row["held_out"]} == {"50%"} for row in rows)


def test_problems_that_are_looked_at_are_not_trained_on() -> None:
    seen = {problem.prompt for problem in ASKED}
    data = worked([SUMS], [Stage(20, 32)], TOKENIZER, 3)
    drawn = {
        TOKENIZER.decode(row.tolist()).split("=")[0] + "=" for step in range(20) for row in data(0, step).inputs_BL
    }
    assert drawn
    assert not seen & drawn
