"""The arms of a study as recipes of their own, checked before anything is made."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from nestling.errors import NestlingError, nearest
from nestling.recipe import Recipe, checked, first_error, overlaid
from nestling.sections import ScratchParent
from nestling.study_section import FAMILIES, ArmSection, StudySection

BASE_ONLY = {"title", "out", "study", "controls", "checkpoints", "tensorboard"}
"""Keys of a recipe that no result of an arm depends on."""


@dataclass(frozen=True)
class Arm:
    """One way to get sizes: what is run, but for the seed, the parent, and sizes that another arm finds."""

    name: str
    section: ArmSection
    recipe: Recipe

    @property
    def sizes(self) -> tuple[str, ...]:
        """The budgets that it makes; the whole model is not counted."""
        return (self.section.size,) if self.section.size else self.recipe.train.budgets

    @property
    def trains_family(self) -> bool:
        return self.section.role in FAMILIES


def study_of(recipe: Recipe) -> StudySection:
    if recipe.study is None:
        raise NestlingError("the recipe has no [study]")
    return recipe.study


def arms_of(recipe: Recipe) -> dict[str, Arm]:
    """Every arm, checked; a NestlingError names the arm that cannot be meant."""
    arms: dict[str, Arm] = {}
    for name, section in study_of(recipe).arms.items():
        try:
            arms[name] = _arm(recipe, name, section, arms)
        except NestlingError as error:
            raise NestlingError(f"study.arms.{name}: {str(error).removeprefix(': ')}") from None
    if recipe.evaluate.every is None:
        raise NestlingError("a study looks at sizes along the way: say every how many steps, evaluate.every = 20")
    return arms


def _arm(recipe: Recipe, name: str, section: ArmSection, before: dict[str, Arm]) -> Arm:
    values = recipe.model_dump(exclude_unset=True, exclude={"study", "controls"})
    for stage in values["train"]["stages"]:
        stage.pop("tokens", None)  # they were made steps of
    train = overlaid(values["train"], section.train)
    if section.role in ("alone", "searched"):
        train["alone"] = True
    if sizes := _sizes(recipe, section, train):
        train["sizes"] = sizes
    arm = Arm(name, section, checked("", values | {"train": train}))
    if section.role == "searched":
        _check_search(arm)
    if section.role == "scratch":
        _check_scratch(arm)
    if section.sizes_from:
        _check_sizes(arm, before[section.sizes_from])
    return arm


def _sizes(recipe: Recipe, section: ArmSection, train: Mapping[str, Any]) -> dict[str, Any]:
    """budget -> sub-model, picked by hand; the whole model stands in for sizes that are yet to be found."""
    if section.sizes_from or section.role == "searched":
        return {budget: {} for budget in train["budgets"]}
    if section.role not in ("uniform", "alone", "scratch") or "sizes" in train:
        return {}
    by_hand = recipe.controls.uniform
    if missing := [budget for budget in train["budgets"] if budget not in by_hand]:
        raise NestlingError(f"its sizes are picked by hand, and controls.uniform has none for {missing[0]}")
    return {budget: by_hand[budget] for budget in train["budgets"]}


def _check_search(arm: Arm) -> None:
    steps = arm.section.candidate_steps or 0
    if steps >= arm.recipe.train.stages[0].steps:
        raise NestlingError(f"candidate_steps must be fewer than those of its first stage, not {steps}")


def _check_sizes(arm: Arm, other: Arm) -> None:
    for budget in arm.sizes:
        if budget not in other.sizes:
            raise NestlingError(f"{other.name} has no size {budget!r}; {nearest(budget, other.sizes)}")


def _check_scratch(arm: Arm) -> None:
    if arm.section.size not in arm.recipe.train.budgets:
        raise NestlingError(f"size: {nearest(str(arm.section.size), arm.recipe.train.budgets)}")
    scratch_parent(arm, {})


def scratch_parent(arm: Arm, architecture: dict[str, Any]) -> ScratchParent:
    """How a size is trained from nothing: as the parent was, where the arm does not say otherwise."""
    own = arm.recipe.parent
    given = own.model_dump(exclude_unset=True) if isinstance(own, ScratchParent) else {}
    values = {**given, **arm.section.parent, "architecture": architecture}
    if missing := [key for key in ("steps", "batch", "learning_rate") if key not in values]:
        raise NestlingError(f"parent.{missing[0]} is missing: how the size is trained from nothing")
    if unknown := [key for key in values if key not in ScratchParent.model_fields]:
        raise NestlingError(f"unknown key parent.{unknown[0]}; {nearest(unknown[0], ScratchParent.model_fields)}")
    try:
        return ScratchParent(**values)
    except ValidationError as error:
        raise NestlingError(f"parent.{first_error(error, ScratchParent)}") from None
