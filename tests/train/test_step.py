"""One step of elastic distillation, computed in any way: the same gradients, of the student and of the router."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("reasoning_gym")

import test_elastic as whole

from nestling.errors import NestlingError
from nestling.model.compiled import compile_blocks
from nestling.model.nemotron_h import NemotronH
from nestling.train import optimize
from nestling.train.distributed import HERE
from nestling.train.elastic import Distillation, _Elastic
from nestling.train.objective import Objective
from nestling.train.teaching import micro_batches

BATCH = replace(whole.HOW.stages[0], batch=6)
HOW = replace(whole.HOW, stages=(BATCH, BATCH), objective=Objective(cross_entropy=0.5))
Gradients = dict[str, torch.Tensor]


def step(how: Distillation, family: Any, number: int = 0) -> tuple[Gradients, dict[str, Any], NemotronH]:
    """Gradients after one step, its metrics, and the student."""
    student = whole.model(1)
    student.gradient_checkpointing = how.activation_checkpointing
    order, data = (3, 0, 4, 1, 2), whole.sums(how, 5)
    made = _Elastic(student, whole.model(), data, how, whole.TARGETS, 5, whole.SPACE, order, family, HERE.device)
    metrics = made.compute(number)
    parameters = dict(student.on_disk()) | {f"router.{name}": p for name, p in made.router.named_parameters()}
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}, metrics, student


@pytest.mark.parametrize("family", [{}, whole.BY_HAND], ids=["soft", "hard"])
@pytest.mark.parametrize(
    "changed",
    [{"micro_batch": 1}, {"micro_batch": 4}, {"micro_batch": 2, "activation_checkpointing": True},
     {"objective": replace(HOW.objective, chunk=3)}],
    ids=str,
)  # fmt: skip
def test_the_gradients_of_a_batch_do_not_depend_on_how_it_is_computed(family: Any, changed: dict[str, Any]) -> None:
    wanted, before, _ = step(HOW, family)
    found, after, _ = step(replace(HOW, **changed), family)
    assert wanted.keys() == found.keys()
    assert any(name.startswith("router.") for name in found) == (not family)
    for name in wanted:
        torch.testing.assert_close(
            found[name], wanted[name], rtol=1e-3, atol=2e-6 * float(wanted[name].abs().max() + 1)
        )
    assert after["kl"] == pytest.approx(before["kl"], rel=1e-5)
    assert after["tokens"] == before["tokens"]


@pytest.mark.parametrize("family", [{}, whole.BY_HAND], ids=["soft", "hard"])
def test_activation_checkpointing_changes_no_bit_of_a_step(family: Any) -> None:
    wanted, before, _ = step(HOW, family)
    found, after, student = step(replace(HOW, activation_checkpointing=True), family)
    assert after == before
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert student.gradient_checkpointing


def test_a_micro_batch_never_has_more_rows_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    hidden = NemotronH.hidden

    def watched(self: NemotronH, ids: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        rows.append(len(ids))
        return hidden(self, ids, *given, **named)

    monkeypatch.setattr(NemotronH, "hidden", watched)
    step(replace(HOW, micro_batch=2), whole.BY_HAND)
    assert max(rows) == 2
    assert sum(rows) == 6 * (1 + len(whole.TARGETS))  # the teacher and every budget read every row once


def test_bfloat16_leaves_wide_gradients_close_to_the_exact_ones() -> None:
    wanted, before, _ = step(HOW, whole.BY_HAND)
    found, after, _ = step(replace(HOW, precision="bf16"), whole.BY_HAND)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert after["loss"] != before["loss"]
    assert after["loss"] == pytest.approx(before["loss"], rel=0.05)
    off = [((found[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted]
    assert 0 < max(off) < 0.3


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo asks every input
def test_compiled_blocks_train_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimize, "compile_blocks", lambda model: compile_blocks(model, backend="aot_eager"))
    wanted = whole.run(tmp_path / "plain", seed=3)
    found = whole.run(tmp_path / "compiled", seed=3, how=replace(whole.HOW, compile=True))
    assert found.family == wanted.family
    for one, other in zip(found.rows, wanted.rows, strict=True):
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("rows", [None, 1])
def test_a_batch_with_nothing_to_learn_is_refused(rows: int | None) -> None:
    data = whole.sums(HOW, 5)(0, 0)
    with pytest.raises(NestlingError, match="a batch has nothing to learn: none of its tokens counts"):
        micro_batches(replace(data, counted_BL=torch.zeros_like(data.counted_BL)), rows, HERE.device)
