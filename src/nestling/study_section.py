"""The [study] of a recipe: which arms are compared, on which seeds, and what each arm is for."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from nestling.sections import Section

Role = Literal["elastic", "uniform", "sizes", "sampling", "alone", "searched", "scratch", "untrained"]
"""What an arm is in the comparison.

elastic, uniform: a whole family in one run, with sizes the router found or picked by hand. sizes: the same with another
number of sizes. sampling: two stages, one size drawn per step; the first such arm draws evenly, the second does not.
alone: one size, sliced and distilled. searched: the same, its sizes chosen by short runs of candidates. scratch: one
size from nothing. untrained: sliced, and no more.
"""
FAMILIES = ("elastic", "uniform", "sizes", "sampling")
NAME = r"^[A-Za-z0-9][A-Za-z0-9.+-]*$"
"""Of an arm: it is a directory's."""


class ArmSection(Section):
    """One way to get sizes: the recipe, with some keys laid over it."""

    role: Role
    about: str = ""  # what it is, in a few words
    sizes_from: str | None = None  # an arm of a family, before this one, whose sizes this one's are
    size: str | None = None  # the budget that is trained from nothing
    candidates: PositiveInt | None = None  # how many sizes a search tries, for
    candidate_steps: PositiveInt | None = None  # so many steps each
    train: dict[str, Any] = {}  # laid over [train]
    parent: dict[str, Any] = {}  # laid over how the parent is trained: of a size from nothing

    @model_validator(mode="after")
    def _fits_its_role(self) -> "ArmSection":
        needs = {"scratch": ("size",), "searched": ("candidates", "candidate_steps"), "untrained": ("sizes_from",)}
        for key in needs.get(self.role, ()):
            if getattr(self, key) is None:
                raise ValueError(f"an arm with role = {self.role!r} needs {key}")
        allowed = {"scratch": {"size", "parent"}, "searched": {"candidates", "candidate_steps"}}.get(self.role, set())
        for key in ("size", "parent", "candidates", "candidate_steps"):
            if key in self.model_fields_set and key not in allowed:
                raise ValueError(f"{key} has no meaning in an arm with role = {self.role!r}")
        if self.train and self.role in ("scratch", "untrained"):
            raise ValueError(f"train has no meaning in an arm with role = {self.role!r}, which distils nothing")
        return self


class StudySection(Section):
    """Arms, the most important first: every arm is run with all seeds before the next one."""

    arms: Annotated[dict[Annotated[str, Field(pattern=NAME)], ArmSection], Field(min_length=1)]
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0, 1, 2), min_length=1)
    reach: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field((0.95,), min_length=1)
    """Shares of the parent's accuracy to be reached, the one that matters most first. Not what a result depends on."""

    @model_validator(mode="after")
    def _makes_sense(self) -> "StudySection":
        if len({*self.seeds}) < len(self.seeds):
            raise ValueError(f"seeds: each one once, not {list(self.seeds)}")
        before: list[str] = []
        for name, arm in self.arms.items():
            if arm.sizes_from is not None and arm.sizes_from not in before:
                raise ValueError(
                    f"arms.{name}.sizes_from = {arm.sizes_from!r} is no family before it; "
                    f"there {'is ' + ', '.join(before) if before else 'is none'}"
                )
            before += [name] if arm.role in FAMILIES else []
        return self
