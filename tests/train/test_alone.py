"""One size trained alone: as a prefix of the whole it is what it is as a model of its own, the Minitron way."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("reasoning_gym")

from test_elastic import HOW, TARGETS, TINY, run, sums

import stock
from nestling import ranks
from nestling.arch.architecture import Architecture
from nestling.arch.cost import parameters
from nestling.arch.search import SearchSpace
from nestling.arch.submodel import WHOLE, Submodel, standalone
from nestling.arch.targets import Target
from nestling.bench.models import cut
from nestling.errors import NestlingError
from nestling.model.nemotron_h import NemotronH
from nestling.model.store import load_model
from nestling.model.width import hard
from nestling.pipeline import Pipeline
from nestling.recipe import read_recipe
from nestling.train.checkpoints import Run
from nestling.train.curriculum import Lesson
from nestling.train.elastic import Distillation, distill
from nestling.weights.elastic import open_elastic
from test_pipeline import QUICK

MINITRON = (Path(__file__).parents[2] / "runs" / "minitron.toml").read_text()
HALF = Submodel(hidden_size=8, intermediate_size=32)
BOTH = {"100%": WHOLE, "50%": HALF}


def exact(seed: int = 0) -> NemotronH:
    return stock.randomize(NemotronH(TINY), seed).double()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_as_a_prefix_and_as_a_model_of_its_own_it_learns_the_same(tmp_path: Path, decay: float) -> None:
    how = Distillation(**{**vars(HOW), "optimizer": "adamw", "weight_decay": decay, "clip": 0.05})
    lessons = tuple(Lesson(probabilities=(0.0, 1.0)) for _ in how.stages)
    prefix = run(
        tmp_path / "prefix", exact(), exact(), how=replace(how, budgets_per_step="one", lessons=lessons),
        targets={name: TARGETS[name] for name in BOTH}, family=BOTH,
    )  # fmt: skip
    small: Architecture = standalone(TINY, HALF)
    alone = distill(
        cut(exact(), HALF, hard(TINY, HALF)).double(), exact(), sums(how, 5), how,
        {"100%": Target("parameters", parameters(small))}, 5, Run(tmp_path / "alone", "same", "alone"),
        space=SearchSpace.of(small, {}), family={"100%": WHOLE},
    )  # fmt: skip
    assert [row["loss"] for row in prefix.rows] == pytest.approx([row["loss"] for row in alone.rows], rel=1e-9)
    assert prefix.rows[0]["loss"] > 1.01 * prefix.rows[-1]["loss"]
    found = cut(prefix.model, HALF, hard(TINY, HALF)).on_disk()
    for name, wanted in alone.model.on_disk().items():
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-7)


SIZE = '"50%" = { hidden_size = 20, intermediate_size = 72 }'


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """runs/minitron.toml with a far smaller quick form."""
    before, _, after = QUICK.partition("[quick.controls.uniform]")
    small = f"{before}[quick.train.sizes]\n{SIZE}\n{after[after.index('[quick.evaluate]') :]}"
    file = tmp_path / "recipe.toml"
    file.write_text(MINITRON[: MINITRON.index("[quick]")] + small)
    return file


def test_a_recipe_leaves_the_size_and_not_the_whole(recipe: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(read_recipe(recipe, quick=True, out=str(tmp_path / "out")), "")
    pipeline.run()
    assert list(open_elastic(tmp_path / "out" / "elastic").budgets) == ["50%"]
    shown = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert [row["name"] for row in shown] == ["parent", "50%", "50% untrained", "50% from scratch"]
    ranked, trained = (load_model(open_elastic(tmp_path / "out" / name)).on_disk() for name in ("ranked", "elastic"))
    head = "lm_head.weight"
    assert torch.equal(ranked[head][:, 20:], trained[head][:, 20:])  # what the size does not have
    assert not torch.equal(ranked[head][:, :20], trained[head][:, :20])


def test_processes_that_cannot_share_a_batch_are_refused_before_anything_is_made(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "size", lambda: 3)
    with pytest.raises(NestlingError, match="3 processes: every batch .* must be a multiple of it"):
        Pipeline(read_recipe(recipe, quick=True, out=str(tmp_path / "out")), "").run()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"50%" = { hidden_size = 88', '"60%" = { hidden_size = 88', "train.sizes must have the sizes of 50%"),
        ('budgets = ["50%"]', 'budgets = ["75%", "50%"]', "alone = true trains one size; budgets has 2"),
        ("[train.sizes]", "[controls.uniform]", "alone = true needs the size, picked by hand"),
        (
            "{ steps = 360, batch = 128 }",
            '{ steps = 9, batch = 1, budget_probabilities = { "50%" = 1 } }',
            "no meaning",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert MINITRON.count(old) == 1
    (tmp_path / "recipe.toml").write_text(MINITRON.replace(old, new))
    with pytest.raises(NestlingError, match=words):
        read_recipe(tmp_path / "recipe.toml")
