"""Recipes: everything a run does, in one TOML file. Unknown keys are errors; `[quick]` holds a smaller form for CI."""

import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from nestling.arch.architecture import Architecture
from nestling.arch.nesting import check_reachable
from nestling.arch.presets import PRESETS
from nestling.arch.search import SearchSpace, default_space
from nestling.arch.submodel import WHOLE, Submodel, complete, is_within
from nestling.arch.targets import Target, by_size, parse_target
from nestling.errors import NestlingError, nearest
from nestling.sections import (
    CheckpointsSection,
    ControlsSection,
    EvaluateSection,
    LayoutSection,
    OwnParent,
    RankSection,
    ScratchParent,
    Section,
    TaskSection,
    TrainSection,
    check_range,
    sizes_of,
)
from nestling.study_section import StudySection
from nestling.text_sections import DataSection
from nestling.weights.elastic import read_latencies
from nestling.weights.files import read_json


class Recipe(Section):
    """A whole run: parent, ranking, elastic training, slices, controls, evaluation, report."""

    title: str
    out: str
    seed: int = Field(0, ge=0)
    task: TaskSection | None = None  # generated problems,
    data: DataSection | None = None  # or text
    parent: ScratchParent | OwnParent
    rank: RankSection | None = None  # None: the defaults, or a parent that is ranked as it is
    train: TrainSection
    controls: ControlsSection = ControlsSection()
    evaluate: EvaluateSection = EvaluateSection()
    checkpoints: CheckpointsSection = CheckpointsSection()
    layout: LayoutSection = LayoutSection()
    study: StudySection | None = None  # then the recipe is what its arms have in common
    tensorboard: bool = False  # write the metrics of every training to OUT/tensorboard too

    @property
    def text_tokenizer(self) -> Path:
        """The directory that has the tokenizer of [data]."""
        own = self.parent.model if isinstance(self.parent, OwnParent) else ""
        return Path(self.data.tokenizer if self.data and self.data.tokenizer else own)

    @property
    def text_cache(self) -> Path:
        """Where the tokens of [data] are kept."""
        return Path(self.out) / "data"

    @model_validator(mode="after")
    def _trained_on_something(self) -> "Recipe":
        if (self.task is None) == (self.data is None):
            raise ValueError("a recipe trains on a [task] or on [data]; it must have one of them, and not both")
        if self.data is not None:
            if any(stage.length is None for stage in self.train.stages):
                raise ValueError("every stage needs a length, the tokens of a row of [data]")
            if isinstance(self.parent, ScratchParent) and not (self.parent.length and self.data.tokenizer):
                raise ValueError("a parent trained from scratch on [data] needs parent.length and data.tokenizer")
        return self


class _FromScratch(Recipe):
    parent: ScratchParent


class _OfAModel(Recipe):
    parent: OwnParent


def read_recipe(path: str | Path, *, quick: bool = False, seed: int | None = None, out: str | None = None) -> Recipe:
    """Read and check a recipe. quick: lay its `[quick]` over it. seed, out: as if written in it."""
    values = _read_toml(Path(path))
    overlay = values.pop("quick", {})
    if not isinstance(overlay, dict):
        raise NestlingError(f"{path}: quick must be a table, not {overlay!r}")
    given = {key: value for key, value in {"seed": seed, "out": out}.items() if value is not None}
    full, small = (checked(path, form | given) for form in (values, overlaid(values, overlay)))
    return small if quick else full


def checked(path: str | Path, values: dict[str, Any]) -> Recipe:
    """A recipe of the values of a file, which is named where they cannot be meant."""
    parent = values.get("parent")
    scratch = isinstance(parent, dict) and any(key in parent for key in ("architecture", "steps", "batch"))
    kind: type[Recipe] = _FromScratch if scratch else _OfAModel  # so that errors are about the one that was meant
    try:
        recipe = kind(**values)
        architecture = parent_architecture(recipe)
        space, targets = space_of(architecture, recipe.train), budget_targets(architecture, recipe.train)
        _check_controls(recipe, architecture)
        check_reachable(architecture, space, targets)
    except ValidationError as error:
        raise NestlingError(f"{path}: {first_error(error, kind)}") from None
    except NestlingError as error:
        raise NestlingError(f"{path}: {error}") from None
    return recipe


def _check_controls(recipe: Recipe, architecture: Architecture) -> None:
    """Refuse now what a later stage would refuse after the parent was trained."""
    controls = recipe.controls
    targets = budget_targets(architecture, recipe.train)
    budgets = list(targets)[1:]
    if isinstance(recipe.parent, OwnParent) and Path(recipe.out).resolve() == Path(recipe.parent.model).resolve():
        raise NestlingError(f"out = {str(recipe.out)!r} is the directory of the parent itself; choose another")
    if controls.scratch_budget and not isinstance(recipe.parent, ScratchParent):
        raise NestlingError("controls.scratch_budget needs a [parent] that says how to train from scratch")
    for spec in (*controls.uniform.values(), *recipe.train.sizes.values()):
        complete(architecture, Submodel.from_json(spec))
    for key, sizes in (("controls.uniform", controls.uniform), ("train.sizes", recipe.train.sizes)):
        if sizes and {*sizes} != {*budgets}:
            raise NestlingError(f"{key} must have the sizes of {', '.join(budgets)}, and of no other budget")
    for key in ("uniform_budget", "scratch_budget"):
        if (name := getattr(controls, key)) is not None and name not in budgets:
            raise NestlingError(f"controls.{key} = {name!r} is not a budget; {nearest(name, budgets)}")
    known = {
        name: Submodel.from_json(spec) for name, spec in recipe.train.sizes.items() if spec
    }  # a study fills the others
    _check_sizes(architecture, known, targets)


def _check_sizes(architecture: Architecture, family: Mapping[str, Submodel], targets: Mapping[str, Target]) -> None:
    """Refuse sizes picked by hand that are larger than their budgets, or not inside one another."""
    before, larger = "100%", WHOLE
    for name in by_size(architecture, targets):
        if name in family:
            target, submodel = targets[name], family[name]
            if (count := target.measure(architecture, submodel)) > target.value:
                most = target.show(target.value)
                raise NestlingError(f"train.sizes: {name} has {target.show(count)}, more than its budget of {most}")
            if not is_within(architecture, submodel, larger):
                raise NestlingError(
                    f"train.sizes: {name} is not inside {before}; a smaller size has no axis that is longer"
                )
            before, larger = name, submodel


def space_of(architecture: Architecture, train: TrainSection) -> SearchSpace:
    """What the router may pick from: as said, or `default_space`."""
    return _space(architecture, train.search_space, train.per_layer)


def _space(
    architecture: Architecture, given: Mapping[str, Sequence[int] | Mapping[str, int]], per_layer: Sequence[str]
) -> SearchSpace:
    if not given:
        default = default_space(architecture)
        return SearchSpace.of(architecture, dict(default.candidates), per_layer, dict(default.multiples))
    candidates = {field: sizes_of(sizes) for field, sizes in given.items()}
    multiples = {field: sizes["multiple_of"] for field, sizes in given.items() if isinstance(sizes, Mapping)}
    return SearchSpace.of(architecture, candidates, per_layer, multiples)


def budget_targets(architecture: Architecture, train: TrainSection) -> dict[str, Target]:
    """What every budget may have at most, largest first, the whole model in front."""
    table = None if train.latency_table is None else read_latencies(train.latency_table)
    return by_size(architecture, {name: parse_target(name, architecture, table) for name in ("100%", *train.budgets)})


def trained_budgets(recipe: Recipe) -> list[str]:
    """The sizes that a training leaves fit for use: of one that is trained alone, the whole model is not."""
    names = list(budget_targets(parent_architecture(recipe), recipe.train))
    return names[1 if recipe.train.alone else 0 :]


def search_space(path: str | Path) -> tuple[Architecture, SearchSpace]:
    """The parent's shape and the candidate sizes of a recipe, whose budgets may want a table that is yet to be made."""
    values = _read_toml(Path(path))
    parent, train = values.get("parent"), values.get("train")
    if not isinstance(parent, dict) or not isinstance(train, dict):
        raise NestlingError(f"{path}: a recipe has [parent] and [train]")
    try:
        architecture = _shape(parent.get("architecture"), str(parent.get("model")))
        given = train.get("search_space", {})
        for field, sizes in given.items():
            if isinstance(sizes, dict):
                check_range(field, sizes)
        return architecture, _space(architecture, given, train.get("per_layer", ()))
    except ValueError as error:
        raise NestlingError(f"{path}: {error}") from None


def parent_architecture(recipe: Recipe) -> Architecture:
    """The shape of the parent, whether it is there already or not."""
    if isinstance(recipe.parent, ScratchParent):
        return _shape(recipe.parent.architecture, "")
    return _shape(None, recipe.parent.model)


def _shape(architecture: Mapping[str, Any] | None, name: str) -> Architecture:
    if architecture is not None:
        return Architecture.from_config({"model_type": "nemotron_h", **architecture})
    if name.lower() in PRESETS:
        return PRESETS[name.lower()]
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise NestlingError(
            f"parent.model = {name!r} is no checkpoint directory, config.json or preset; {nearest(name, PRESETS)}"
        )
    return Architecture.from_config(read_json(path))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return {key: _at_home(value) for key, value in tomllib.loads(path.read_text("utf-8-sig")).items()}
    except FileNotFoundError:
        raise NestlingError(f"{path}: no such recipe") from None
    except OSError as error:
        raise NestlingError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise NestlingError(f"{path}: not valid TOML: {error}") from None


def _at_home(value: Any) -> Any:
    """The same with the user's home for `~` where a text begins with `~/`, as a shell has it."""
    if isinstance(value, dict):
        return {key: _at_home(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_at_home(own) for own in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def overlaid(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """`overlay` laid over `base`: tables key by key, everything else as a whole."""

    def merge(key: str) -> Any:
        both = isinstance(base.get(key), dict) and isinstance(overlay.get(key), dict)
        return overlaid(base[key], overlay[key]) if both else overlay.get(key, base.get(key))

    return {key: merge(key) for key in {**base, **overlay}}


_TOML = {"tuple_type": 'a list, such as ["…"] or [1, 2]', "dict_type": "a table", "model_type": "a table"}
"""Types of pydantic's errors, and what to write instead."""


def first_error(error: ValidationError, kind: type[Section]) -> str:
    """One clear line about the first thing wrong, with the nearest key for an unknown one."""
    errors = error.errors()
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])  # why another is missing
    where = ".".join(step for step in map(str, first["loc"]) if "[" not in step)  # brackets are of alternatives
    if first["type"] == "extra_forbidden":
        return f"unknown key {where!r}; {nearest(str(first['loc'][-1]), _keys_at(kind, first['loc'][:-1]))}"
    if first["type"] == "missing":
        return f"{where} is missing"
    if first["type"] in _TOML:
        return f"{where} must be {_TOML[first['type']]}, not {first['input']!r}"
    input_ = "" if isinstance(first["input"], dict) else f" (given: {first['input']!r})"  # a whole section says nothing
    return f"{where and f'{where}: '}{first['msg'].removeprefix('Value error, ')}{input_}"


def _keys_at(kind: type[Section], path: tuple[Any, ...]) -> list[str]:
    model: Any = kind
    for step in path:
        if isinstance(step, str):
            model = model.model_fields[step].annotation
            model = next((part for part in getattr(model, "__args__", ()) if hasattr(part, "model_fields")), model)
    return list(model.model_fields)
