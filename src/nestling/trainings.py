"""The trainings of a recipe: a model from random weights, and an elastic distillation, each into a directory."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nestling import ranks
from nestling.arch.architecture import Architecture
from nestling.arch.submodel import WHOLE, Submodel
from nestling.data.batches import Stage
from nestling.material import Material
from nestling.model.device import find_device
from nestling.model.store import load_model, save_elastic, save_model
from nestling.recipe import Recipe, budget_targets, parent_architecture, space_of, trained_budgets
from nestling.sections import SPACE, Optimization, ScratchParent, StageSection
from nestling.train.checkpoints import Run
from nestling.train.curriculum import Lesson, token_counts
from nestling.train.distributed import Layout
from nestling.train.elastic import Distillation, distill
from nestling.train.objective import Objective
from nestling.train.pretrain import Pretraining, pretrain
from nestling.train.watch import Watch
from nestling.weights.elastic import LATENCY_FILE, open_elastic, sidecar
from nestling.weights.files import read_json, write_json
from nestling.weights.ranking import read_ranking

NOT_DISTILLATION = {"budgets", "stages", "objective", "teacher", "latency_table", "sizes", "alone", *SPACE}
"""Keys of [train] that say what is trained, not how."""


def from_scratch(
    recipe: Recipe,
    material: Material,
    architecture: Architecture,
    stages: Sequence[StageSection],
    learning_rate: float,
    run: Run,
    out: Path,
) -> None:
    """Train a model of a shape as the recipe trains its parent, but for stages and rate; written in stock format."""
    how = recipe.parent
    assert isinstance(how, ScratchParent)
    given = how.model_dump(include=set(Optimization.model_fields)) | {"learning_rate": learning_rate}
    settings = Pretraining(_steps(stages), **given)
    special = ranks.of_first(lambda: material.save_tokenizer(out))
    data = material.batches(stages, out, recipe.seed)
    watched = watch(recipe, material, out, ("100%",)) if recipe.evaluate.every else None
    model, rows = pretrain(architecture, data, settings, recipe.seed, run, watched, _layout(recipe))
    save_model(model, out)
    if not ranks.first():
        return
    base = {"tie_word_embeddings": False, **special}
    extra = {key: value for key, value in how.architecture.items() if not hasattr(architecture, key)}
    write_json(out / "config.json", architecture.to_config({**base, "dtype": "float32", **extra}))
    _write_metrics(out, rows)


def distilled(
    recipe: Recipe, material: Material, parent: Path, ranked: Path, by_hand: Mapping[str, Submodel], run: Run, out: Path
) -> None:
    """Train a family, from the ranked parent to an elastic checkpoint.

    parent: what it is ranked from, with the tokenizer. by_hand: budget -> sub-model, in place of the router's choice
    and of the recipe's own `train.sizes`.
    """
    how, start, ranking = recipe.train, open_elastic(ranked), read_ranking(ranked)
    assert ranking is not None
    same = ranked if how.objective.hidden else parent  # one function, channels in order
    teacher = Path(how.teacher) if how.teacher else same
    architecture, names = parent_architecture(recipe), trained_budgets(recipe)
    targets, space = budget_targets(architecture, how), space_of(architecture, how)
    settings = Distillation(
        _steps(how.stages),
        objective=Objective(**how.objective.model_dump()),
        lessons=tuple(_lesson(how.alone, stage, list(targets)) for stage in how.stages),
        **how.model_dump(exclude=NOT_DISTILLATION) | ({"budgets_per_step": "one"} if how.alone else {}),
    )
    family = by_hand or {name: Submodel.from_json(spec) for name, spec in how.sizes.items()}
    stored = load_model(start).head_weight().dtype
    trained = distill(
        load_model(start),
        load_model(open_elastic(teacher)),
        material.batches(how.stages, parent, recipe.seed),
        settings,
        targets,
        recipe.seed,
        run,
        space=space,
        ranked_layers=ranking.layers,
        family={"100%": WHOLE, **family} if family else None,
        watch=watch(recipe, material, parent, tuple(names)) if recipe.evaluate.every else None,
        layout=_layout(recipe),
    )
    tokens = token_counts(trained.rows)
    made = {
        "teacher": str(teacher),
        "data": material.to_json(),
        "recipe": how.model_dump(),
        "trained_tokens": tokens,
    }
    content = sidecar(
        architecture,
        {name: size for name, size in trained.family.items() if name in names},
        {**start.sidecar["provenance"], **made},
        targets=targets,
        tokens=tokens["budgets"],
        search_space=space.to_json(),
    )
    save_elastic(trained.model, start, ranking, content, out, stored)
    if not ranks.first():
        return
    if how.latency_table is not None:
        write_json(out / LATENCY_FILE, read_json(Path(how.latency_table)))
    _write_metrics(out, trained.rows)


def watch(recipe: Recipe, material: Material, directory: Path, sizes: tuple[str, ...]) -> Watch:
    """How sizes are looked at along the way. directory: of a model, with its tokenizer."""
    how = recipe.evaluate
    return Watch(material.held_out(how.rows, directory, recipe.seed), how.every or 1, sizes)


def _steps(stages: Sequence[StageSection]) -> tuple[Stage, ...]:
    return tuple(Stage(stage.steps, stage.batch) for stage in stages)


def _lesson(alone: bool, stage: StageSection, names: Sequence[str]) -> Lesson:
    """names: of all budgets. alone: the whole model is never drawn."""
    given = {name: float(name != "100%") for name in names} if alone else stage.budget_probabilities
    probabilities = tuple(given[name] for name in names) if given else ()
    return Lesson(stage.length, stage.learning_rate, stage.router_learning_rate, probabilities)


def _layout(recipe: Recipe) -> Layout:
    given = recipe.layout
    return Layout(**{**given.model_dump(), "device": find_device(given.device)})


def _write_metrics(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
