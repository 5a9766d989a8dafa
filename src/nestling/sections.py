"""The tables of a recipe: how a model is trained, in how many steps, towards what, and how it is judged."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from nestling.errors import nearest
from nestling.tasks import Task
from nestling.units import parse_count

CHUNK_BYTES = 2**24
"""Of logits that exist at a time unless a recipe says otherwise: about what a cache holds."""

LEAST_CHUNK = 512
"""Bytes of a token's logits in a chunk, at least: with fewer positions, reading the output head again and adding to its
gradient for each chunk costs more than it saves."""


def chunk_positions(vocabulary: int, itemsize: int) -> int:
    """Positions whose logits exist at a time; itemsize: bytes of a logit."""
    return max(CHUNK_BYTES // vocabulary, LEAST_CHUNK) // itemsize


SPACE = ("search_space", "per_layer", "allow_unexportable")
"""The keys of [train] that `space_of` reads."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskSection(Section):
    """A reasoning-gym dataset and its options."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def task(self) -> Task:
        return Task(self.name, tuple(sorted((self.model_extra or {}).items())))


class Optimization(Section):
    """How weights are moved (train/optimize.py)."""

    learning_rate: PositiveFloat
    warmup: int = Field(50, ge=0)  # steps
    decay: float = Field(0.4, ge=0, le=1)  # wsd: share of the steps in which the rate falls
    weight_decay: float = Field(0.1, ge=0)
    optimizer: Literal["muon", "adamw"] = "muon"  # of the matrices inside blocks; the rest has AdamW
    schedule: Literal["wsd", "linear", "cosine"] = "wsd"  # after the warm-up: flat then linear, or a fall from there on
    floor: float = Field(0.0, ge=0, le=1)  # share of the learning rate that is left in the end
    clip: PositiveFloat = 1.0  # largest norm of a gradient
    precision: Literal["fp32", "bf16"] = "fp32"  # of what is computed; master weights are always fp32
    micro_batch: PositiveInt | None = None  # rows computed at a time; their gradients are summed
    activation_checkpointing: bool = False
    compile: bool = False  # the blocks, by torch.compile, which needs a C++ compiler; pays in long runs only


class ScratchParent(Optimization):
    """Train the parent from scratch."""

    steps: PositiveInt
    batch: PositiveInt
    architecture: dict[str, Any]  # Hugging Face config fields
    length: Annotated[int, Field(ge=2)] | None = None  # tokens of a row of [data]


class OwnParent(Section):
    """A model that exists."""

    model: str  # a checkpoint directory, ranked or not; a preset's name or a config.json is enough for a dry run


class RankSection(Section):
    """Calibration: how many batches of how many rows; metric per axis and depth method as of `nestling rank`."""

    batches: PositiveInt = 8
    batch: PositiveInt = 128
    metrics: dict[str, str] = {}
    depth: str = "iterative"
    max_drop: PositiveInt | None = None


class StageSection(Section):
    """Part of the training; what is not given is as in [train]. `tokens` and `length` may stand for `steps`."""

    steps: PositiveInt
    batch: PositiveInt
    tokens: int | str | None = None  # such as 65_000_000_000 or "65B"
    options: dict[str, int] = {}  # task options that differ from [task] in this stage
    length: Annotated[int, Field(ge=2)] | None = None  # tokens of a sequence at most
    learning_rate: PositiveFloat | None = None
    router_learning_rate: PositiveFloat | None = None
    budget_probabilities: dict[str, NonNegativeFloat] = {}  # of every budget, 100% included; all alike if not given

    @model_validator(mode="before")
    @classmethod
    def _steps_of_tokens(cls, given: Any) -> Any:
        """steps = tokens / (batch · length), to the nearest."""
        if not isinstance(given, dict) or "tokens" not in given:
            return given
        sizes: list[Any] = [given.get("batch"), given.get("length")]
        if "steps" in given or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError("tokens stand for steps, together with batch and length; give steps or these three")
        tokens = parse_count(str(given["tokens"]), "tokens")
        return {**given, "steps": max(round(tokens / math.prod(sizes)), 1)}

    @field_validator("budget_probabilities")
    @classmethod
    def _sum_to_one(cls, given: dict[str, float]) -> dict[str, float]:
        if given and abs(total := sum(given.values()) - 1) > 0.01:
            raise ValueError(f"the probabilities must sum to 1, not {total + 1:g}")
        return given


class ObjectiveSection(Section):
    """What the student is trained towards: KL to the teacher, and what is added to it (train/objective.py)."""

    temperature: PositiveFloat = 1.0
    top_k: PositiveInt | None = None  # of the teacher's tokens; all of them if not given
    cross_entropy: NonNegativeFloat = 0.0  # weight
    hidden: NonNegativeFloat = 0.0  # weight of matching the hidden states before the output head
    chunk: PositiveInt | None = None  # positions whose logits exist at a time; `chunk_positions` if not given

    def positions(self, vocabulary: int, itemsize: int) -> int:
        return self.chunk or chunk_positions(vocabulary, itemsize)


class TrainSection(Optimization):
    """Elastic distillation. Budgets besides the whole model are wishes: `75%`, `9B`, `16GiB@128k` (arch/targets.py)."""

    budgets: tuple[str, ...]
    latency_table: str | None = None  # of nestling bench --latency; for budgets such as `20ms`
    teacher: str | None = None  # a checkpoint with the same vocabulary; the parent if not given
    stages: tuple[StageSection, ...] = Field(min_length=1)
    sizes: dict[str, dict[str, Any]] = {}  # budget -> a sub-model picked by hand; then there is no router
    alone: bool = False  # train the one budget and not the whole model too: rank, slice, distil
    router_steps: PositiveInt = 1  # at most: then sizes are frozen
    settle_steps: PositiveInt | None = None  # or as soon as the choice of no budget has changed for so many
    router_learning_rate: PositiveFloat = 1e-2
    resource_weight: float = Field(1.0, ge=0)
    dead_zone: float = Field(0.01, ge=0)
    temperature: tuple[PositiveFloat, PositiveFloat] = (1.0, 0.05)
    logit_scale: tuple[PositiveFloat, PositiveFloat] = (1.0, 10.0)
    search_space: dict[str, tuple[int, ...] | dict[str, int]] = {}  # sizes, or { from, to, multiple_of }; see space_of
    per_layer: tuple[str, ...] = ()  # fields that have a size per layer
    allow_unexportable: bool = False  # Mamba heads per layer, which no checkpoint format of other tools holds
    objective: ObjectiveSection = ObjectiveSection()
    budgets_per_step: Literal["all", "one", "rank"] = "all"  # sharing one teacher pass; one drawn; one of each process

    @field_validator("search_space", mode="before")
    @classmethod
    def _ranges(cls, given: Any) -> Any:
        for field, sizes in given.items() if isinstance(given, dict) else ():
            if isinstance(sizes, dict):
                check_range(field, sizes)
        return given

    @model_validator(mode="after")
    def _can_be_exported(self) -> "TrainSection":
        if "mamba_num_heads" in self.per_layer and not self.allow_unexportable:
            raise ValueError(
                "per_layer: no checkpoint format holds mamba_num_heads per layer, so such sizes run here alone; "
                "leave it out, or set allow_unexportable = true"
            )
        return self

    @field_validator("budgets")
    @classmethod
    def _each_once(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        if not given:
            raise ValueError("at least one size besides the whole model")
        if twice := [name for name, count in Counter(given).items() if count > 1]:
            raise ValueError(f"each one once, and {twice[0]} is there twice")
        return given

    @model_validator(mode="after")
    def _drawn(self) -> "TrainSection":
        names = {"100%", *self.budgets}
        for stage in self.stages:
            if stage.budget_probabilities and self.budgets_per_step == "all":
                raise ValueError("budget_probabilities have no meaning unless budgets_per_step = 'one' or 'rank'")
            if stage.budget_probabilities and {*stage.budget_probabilities} != names:
                raise ValueError(f"budget_probabilities must name {', '.join(sorted(names))}, and no other budget")
        return self

    @model_validator(mode="after")
    def _same_channels(self) -> "TrainSection":
        if self.teacher is not None and self.objective.hidden:
            raise ValueError("objective.hidden matches channel by channel, which only the parent as teacher can do")
        return self

    @model_validator(mode="after")
    def _alone(self) -> "TrainSection":
        if self.alone and len(self.budgets) != 1:
            raise ValueError(f"alone = true trains one size; budgets has {len(self.budgets)}")
        if self.alone and not self.sizes:
            raise ValueError("alone = true needs the size, picked by hand: [train.sizes]")
        if self.alone and any(stage.budget_probabilities for stage in self.stages):
            raise ValueError("budget_probabilities have no meaning with alone = true")
        return self

    @model_validator(mode="after")
    def _router_ends(self) -> "TrainSection":
        if self.sizes:
            return self
        if "router_steps" not in self.model_fields_set:
            raise ValueError("router_steps is missing: for how many steps sizes are looked for, unless [train.sizes]")
        if self.router_steps >= (total := sum(stage.steps for stage in self.stages)):
            raise ValueError(f"router_steps must be fewer than the steps of all stages, {total}")
        return self


def check_range(field: str, given: dict[str, Any]) -> None:
    keys = ("from", "to", "multiple_of")
    if wrong := [key for key in given if key not in keys]:
        raise ValueError(f"{field}: unknown key {wrong[0]!r}; {nearest(str(wrong[0]), keys)}")
    if {*given} != {*keys} or not all(type(value) is int and value > 0 for value in given.values()):
        raise ValueError(f"{field} must be a list of sizes, or {{ from = 3072, to = 4864, multiple_of = 256 }}")
    if not sizes_of(given):
        raise ValueError(
            f"{field}: there is no multiple of {given['multiple_of']} from {given['from']} to {given['to']}"
        )


def sizes_of(given: Sequence[int] | Mapping[str, int]) -> Sequence[int]:
    """Candidates as a list, or every multiple within a range."""
    if not isinstance(given, Mapping):
        return given
    step = given["multiple_of"]
    return range(-(-given["from"] // step) * step, given["to"] + 1, step)


class ControlsSection(Section):
    """What the family is compared with."""

    uniform: dict[str, dict[str, Any]] = {}  # budget -> a hand-picked sub-model
    uniform_budget: str | None = None  # the hand-picked size that is evaluated
    scratch_budget: str | None = None  # the size that is also trained from scratch
    scratch_learning_rate: PositiveFloat | None = None


class EvaluateSection(Section):
    problems: PositiveInt = 1000
    batch: PositiveInt = 250
    max_tokens: PositiveInt = 16
    every: PositiveInt | None = None  # steps of a training between looks at each size, on
    rows: PositiveInt = 250  # held-out rows

    @property
    def judging(self) -> dict[str, int]:
        """What the judgement of a finished size depends on."""
        return self.model_dump(exclude={"every", "rows"})


class CheckpointsSection(Section):
    """When the state of a training under way is saved; also when it is stopped."""

    every: PositiveInt = 100  # steps
    minutes: PositiveFloat | None = None  # besides
    keep: PositiveInt = 2
    asynchronous: bool = False  # several processes go on while it is written, from a copy of their shards


LESS_MEMORY = (
    "A smaller micro_batch, activation_checkpointing = true, a smaller objective.chunk, optimizer = 'muon' and, on a "
    "GPU, layout.offload_teacher = true need less"
)
"""What to change in a recipe whose training does not fit."""


class LayoutSection(Section):
    """Where a recipe runs (train/distributed.py). Nothing of it changes what is learnt, beyond rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"  # of every process; auto: its own GPU, where there is one
    reshard: bool = True  # give a block's whole weights up after its forward pass
    replicas: PositiveInt = 1  # groups of processes that have all shards each
    patience: PositiveFloat = 30  # minutes that a process waits for another within a step before it gives up
    offload_teacher: bool = False  # keep its blocks in the CPU's memory
