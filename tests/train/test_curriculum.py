"""Stages with their own lengths, rates and mixes of budgets; every token that was trained on is counted."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("reasoning_gym")

import test_elastic as whole

from nestling.data.batches import Stage, batch
from nestling.errors import NestlingError
from nestling.model.nemotron_h import NemotronH
from nestling.tokenizer import character_tokenizer
from nestling.train.curriculum import Lesson, draw, shortened, stage_index, token_counts

NAMES = list(whole.TARGETS)
MIX = Lesson(probabilities=(0.5, 0.3, 0.2))
ONE = replace(whole.HOW, budgets_per_step="one", lessons=(Lesson(), MIX))


def test_budgets_are_drawn_with_the_probabilities_of_the_stage() -> None:
    for lesson, wanted in (
        (MIX, MIX.probabilities),
        (Lesson(), (1 / 3,) * 3),
        (Lesson(probabilities=(0, 1, 0)), (0, 1, 0)),
    ):
        drawn = Counter(draw(NAMES, lesson, 7, step) for step in range(3000))
        shares = [drawn[name] / 3000 for name in NAMES]
        assert shares == pytest.approx(wanted, abs=0.03)  # three standard deviations


@given(seed=st.integers(0, 2**40), step=st.integers(0, 2**40))
def test_a_draw_is_a_function_of_seed_and_step(seed: int, step: int) -> None:
    torch.manual_seed(step % 1000)
    assert draw(NAMES, MIX, seed, step) == draw(NAMES, MIX, seed, step)


def test_seeds_draw_differently() -> None:
    one, other = ([draw(NAMES, MIX, seed, step) for step in range(50)] for seed in (0, 1))
    assert one != other


@given(steps=st.lists(st.integers(1, 9), min_size=1, max_size=5), data=st.data())
def test_a_step_belongs_to_the_stage_it_falls_into(steps: list[int], data: st.DataObject) -> None:
    stages = [Stage(count, 1) for count in steps]
    spelled = [index for index, count in enumerate(steps) for _ in range(count)]
    step = data.draw(st.integers(0, len(spelled) - 1))
    assert stage_index(stages, step) == spelled[step]


# ---- a run


def test_one_budget_per_batch_is_the_one_drawn_and_alone_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[bool] = []
    hidden = NemotronH.hidden

    def counting(self: NemotronH, *given: Any, **named: Any) -> Any:
        passes.append(self.training)
        return hidden(self, *given, **named)

    monkeypatch.setattr(NemotronH, "hidden", counting)
    rows = whole.run(tmp_path / "s", how=ONE).rows
    drawn = [draw(NAMES, ONE.lesson(row["stage"]), 5, row["step"]) for row in rows]
    assert [list(row["kl"]) for row in rows] == [[name] for name in drawn]
    assert [row["loss"] for row in rows] == [row["kl"][name] for row, name in zip(rows, drawn, strict=True)]
    assert len(set(drawn)) > 1
    assert passes.count(True) == passes.count(False) == 2 * len(rows)  # two parts; one student, one teacher
    for row, name in zip(rows[: whole.ROUTED], drawn, strict=False):
        assert row["router"].keys() == {name}


@pytest.mark.parametrize("how", [ONE, whole.HOW], ids=["one", "all"])
def test_every_token_is_counted(tmp_path: Path, how: Any) -> None:
    rows = whole.run(tmp_path / "s", how=how, family=whole.BY_HAND).rows
    stages = [0] * 3 + [1] * 5
    read = [batch(whole.SUMS, character_tokenizer(), 5, step, 4).tokens for step in range(8)]
    assert [row["stage"] for row in rows] == stages
    counts = token_counts(rows)
    assert counts["teacher"] == sum(read)
    expected: list[Counter[str]] = [Counter(), Counter()]
    for step, stage in enumerate(stages):
        for name in [draw(NAMES, how.lesson(stage), 5, step)] if how is ONE else NAMES:
            expected[stage][name] += read[step]
    assert counts["stages"] == expected
    assert counts["budgets"] == expected[0] + expected[1]


def test_a_stage_has_its_own_rates(tmp_path: Path) -> None:
    """A stage whose learning rate is next to nothing moves nothing; the other group goes on."""
    start = whole.weights(whole.model())
    still = {"model": Lesson(learning_rate=1e-12), "router": Lesson(router_learning_rate=1e-12)}
    moved = {}
    for name, lesson in still.items():
        how = replace(whole.HOW, lessons=(lesson, lesson))
        trained = whole.run(tmp_path / name, how=how)
        now = whole.weights(trained.model)
        moved[name] = max(float((now[key] - start[key]).abs().max()) for key in start)
        sizes = [row["router"]["50%"]["expected"] for row in trained.rows[: whole.ROUTED]]
        assert len(set(sizes)) == whole.ROUTED
    assert moved["model"] < 1e-8 < 1e-3 < moved["router"]
    assert [whole.HOW.scale(step) for step in (0, 7)] == [{"router": 1.0, "": 1.0}] * 2
    mixed = replace(whole.HOW, lessons=(Lesson(), Lesson(learning_rate=0.02, router_learning_rate=0.001)))
    assert mixed.scale(2) == {"router": 1.0, "": 1.0}
    assert mixed.scale(3) == pytest.approx({"router": 0.1, "": 2.0})


def test_a_stage_cuts_its_rows_to_its_length() -> None:
    data = batch(whole.SUMS, character_tokenizer(), 5, 0, 4)
    begins = int(data.counted_BL.int().argmax(1).min())
    short = shortened(data, begins + 1)
    assert short.inputs_BL.shape == short.counted_BL.shape == (4, begins + 1)
    assert torch.equal(short.targets_BL, data.targets_BL[:, : begins + 1])
    assert shortened(data, None) is shortened(data, 99) is data
    with pytest.raises(NestlingError, match="length = 2 cuts every solution off"):
        shortened(data, 2)


def test_the_length_of_a_stage_reaches_its_batches(tmp_path: Path) -> None:
    rows = {
        n: whole.run(tmp_path / str(n), how=replace(whole.HOW, lessons=(Lesson(), Lesson(length=n)))).rows
        for n in (5, 99)
    }
    tokens = {n: [row["tokens"] for row in found] for n, found in rows.items()}
    assert tokens[5][:3] == tokens[99][:3]
    assert all(short <= 4 * 5 for short in tokens[5][3:])
    assert sum(tokens[5]) < sum(tokens[99])
