"""Recipes: everything a run does, in one TOML file. Unknown keys are errors; `[quick]` holds a smaller form for CI."""

import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from nestling.arch.architecture import Architecture
from nestling.arch.nesting import check_reachable
from nestling.arch.presets import PRESETS
from nestling.arch.search import SearchSpace, default_space
from nestling.arch.submodel import Submodel, complete
from nestling.arch.targets import Target, by_size, parse_target
from nestling.errors import NestlingError, nearest
from nestling.tasks import Task
from nestling.units import parse_count
from nestling.weights.elastic import read_latencies
from nestling.weights.files import read_json

CHUNK_LOGITS = 2**25
"""Logits that exist at a time unless a recipe says otherwise: 128 MiB in float32."""


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
    chunk: PositiveInt | None = (
        None  # positions whose logits exist at a time; as many as make CHUNK_LOGITS if not given
    )

    def positions(self, vocabulary: int) -> int:
        return self.chunk or max(CHUNK_LOGITS // vocabulary, 1)


class TrainSection(Optimization):
    """Elastic distillation. Budgets besides the whole model are wishes: `75%`, `9B`, `16GiB@128k` (arch/targets.py)."""

    budgets: tuple[str, ...]
    latency_table: str | None = None  # of nestling bench --latency; for budgets such as `20ms`
    teacher: str | None = None  # a checkpoint with the same vocabulary; the parent if not given
    stages: tuple[StageSection, ...] = Field(min_length=1)
    router_steps: PositiveInt  # at most: then sizes are frozen
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
    budgets_per_step: Literal["all", "one"] = "all"  # on the same tokens, sharing one teacher pass; or one drawn

    @field_validator("search_space", mode="before")
    @classmethod
    def _ranges(cls, given: Any) -> Any:
        for field, sizes in given.items() if isinstance(given, dict) else ():
            if isinstance(sizes, dict):
                _check_range(field, sizes)
        return given

    @model_validator(mode="after")
    def _can_be_exported(self) -> "TrainSection":
        if "mamba_num_heads" in self.per_layer and not self.allow_unexportable:
            raise ValueError(
                "per_layer: no checkpoint format holds mamba_num_heads per layer, so such sizes run here alone; "
                "leave it out, or set allow_unexportable = true"
            )
        return self

    @model_validator(mode="after")
    def _drawn(self) -> "TrainSection":
        names = {"100%", *self.budgets}
        for stage in self.stages:
            if stage.budget_probabilities and self.budgets_per_step == "all":
                raise ValueError("budget_probabilities have no meaning unless budgets_per_step = 'one'")
            if stage.budget_probabilities and {*stage.budget_probabilities} != names:
                raise ValueError(f"budget_probabilities must name {', '.join(sorted(names))}, and no other budget")
        return self

    @model_validator(mode="after")
    def _same_channels(self) -> "TrainSection":
        if self.teacher is not None and self.objective.hidden:
            raise ValueError("objective.hidden matches channel by channel, which only the parent as teacher can do")
        return self

    @model_validator(mode="after")
    def _router_ends(self) -> "TrainSection":
        if self.router_steps >= (total := sum(stage.steps for stage in self.stages)):
            raise ValueError(f"router_steps must be fewer than the steps of all stages, {total}")
        return self


def _check_range(field: str, given: dict[str, Any]) -> None:
    keys = ("from", "to", "multiple_of")
    if wrong := [key for key in given if key not in keys]:
        raise ValueError(f"{field}: unknown key {wrong[0]!r}; {nearest(str(wrong[0]), keys)}")
    if {*given} != {*keys} or not all(type(value) is int and value > 0 for value in given.values()):
        raise ValueError(f"{field} must be a list of sizes, or {{ from = 3072, to = 4864, multiple_of = 256 }}")
    if not _sizes(given):
        raise ValueError(
            f"{field}: there is no multiple of {given['multiple_of']} from {given['from']} to {given['to']}"
        )


def _sizes(given: Sequence[int] | Mapping[str, int]) -> Sequence[int]:
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


class CheckpointsSection(Section):
    """When the state of a training under way is saved; also when it is stopped."""

    every: PositiveInt = 100  # steps
    minutes: PositiveFloat | None = None  # besides
    keep: PositiveInt = 2


class SourceSection(Section):
    """One source of text: `files`, a `dataset` or a `task`, and its share of the tokens beside the other sources."""

    files: str | None = None  # a file or a pattern: .jsonl with "text" or "messages" in every line, .txt a text each
    dataset: str | None = None  # a directory that Hugging Face datasets saved, or one of Parquet or Arrow files
    split: str = "train"  # of the dataset
    column: str = "text"  # of the dataset: texts, or chats as lists of messages
    streaming: bool = False  # read the dataset as it comes, also from a hub by name
    task: str | None = None  # reasoning-gym problems, loss on their solutions
    problems: PositiveInt = 100_000  # of the task
    options: dict[str, int] = {}  # of the task
    weight: NonNegativeFloat = 1.0

    @model_validator(mode="after")
    def _one_kind(self) -> "SourceSection":
        if sum(kind is not None for kind in (self.files, self.dataset, self.task)) != 1:
            raise ValueError("a source needs one of files, dataset, task")
        allowed = {"files": set(), "dataset": {"split", "column", "streaming"}, "task": {"problems", "options"}}
        kind = next(kind for kind in allowed if getattr(self, kind) is not None)
        if foreign := sorted(self.model_fields_set - allowed[kind] - {kind, "weight"}):
            raise ValueError(f"{foreign[0]} has no meaning for {kind}")
        return self

    @property
    def name(self) -> str:
        return self.files or self.dataset or str(Task(str(self.task), tuple(sorted(self.options.items()))))


def _sources(given: Any) -> Any:
    """A pattern alone, or one source alone, stands for a blend of one."""
    given = {"files": given} if isinstance(given, str) else given
    return [given] if isinstance(given, dict) else given


Sources = Annotated[tuple[SourceSection, ...], BeforeValidator(_sources)]


class DataSection(Section):
    """Text to train on: a pattern such as "data/*.jsonl", a source, or a list of them, a blend by weight.

    Each source is tokenised once, into OUT/data.
    """

    train: Sources = Field(min_length=1)
    validation: Sources = ()  # held-out text, for perplexity
    calibration: Sources = ()  # for the ranking; the training text if not given
    tokenizer: str | None = None  # a directory with tokenizer.json; the parent model's own if not given
    packing: bool = True  # whole documents side by side in rows of exactly the length, or one per row, padded
    long_documents: Literal["split", "drop"] = "split"  # those longer than a row
    loss_on: Literal["all", "assistant"] = "all"  # of chats: every token, or the assistant's turns only
    skip_bad: bool = False  # leave out (and count) lines that cannot be used, instead of refusing them
    repeat: bool = False  # begin again, in another order, when the data has run out

    @field_validator("train", "validation", "calibration")
    @classmethod
    def _some_weight(cls, given: tuple[SourceSection, ...]) -> tuple[SourceSection, ...]:
        if given and not sum(source.weight for source in given):
            raise ValueError("a blend needs at least one weight above 0")
        return given


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
    full, small = (_checked(path, form | given) for form in (values, _overlaid(values, overlay)))
    return small if quick else full


def _checked(path: str | Path, values: dict[str, Any]) -> Recipe:
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
        raise NestlingError(f"{path}: {_first_error(error, kind)}") from None
    except NestlingError as error:
        raise NestlingError(f"{path}: {error}") from None
    return recipe


def _check_controls(recipe: Recipe, architecture: Architecture) -> None:
    """Refuse now what a later stage would refuse after the parent was trained."""
    controls = recipe.controls
    budgets = list(budget_targets(architecture, recipe.train))[1:]
    if controls.scratch_budget and not isinstance(recipe.parent, ScratchParent):
        raise NestlingError("controls.scratch_budget needs a [parent] that says how to train from scratch")
    for spec in controls.uniform.values():
        complete(architecture, Submodel.from_json(spec))
    if controls.uniform and {*controls.uniform} != {*budgets}:
        raise NestlingError(f"controls.uniform must have the sizes of {', '.join(budgets)}, and of no other budget")
    for key in ("uniform_budget", "scratch_budget"):
        if (name := getattr(controls, key)) is not None and name not in budgets:
            raise NestlingError(f"controls.{key} = {name!r} is not a budget; {nearest(name, budgets)}")


def space_of(architecture: Architecture, train: TrainSection) -> SearchSpace:
    """What the router may pick from: as said, or `default_space`."""
    default = default_space(architecture)
    if not train.search_space:
        return SearchSpace.of(architecture, dict(default.candidates), train.per_layer, dict(default.multiples))
    return _space(architecture, train.search_space, train.per_layer)


def _space(
    architecture: Architecture, given: Mapping[str, Sequence[int] | Mapping[str, int]], per_layer: Sequence[str]
) -> SearchSpace:
    candidates = {field: _sizes(sizes) for field, sizes in given.items()}
    multiples = {field: sizes["multiple_of"] for field, sizes in given.items() if isinstance(sizes, Mapping)}
    return SearchSpace.of(architecture, candidates, per_layer, multiples)


def budget_targets(architecture: Architecture, train: TrainSection) -> dict[str, Target]:
    """What every budget may have at most, largest first, the whole model in front."""
    table = None if train.latency_table is None else read_latencies(train.latency_table)
    return by_size(architecture, {name: parse_target(name, architecture, table) for name in ("100%", *train.budgets)})


def search_space(path: str | Path) -> tuple[Architecture, SearchSpace]:
    """The parent's shape and the candidate sizes of a recipe, whose budgets may want a table that is yet to be made."""
    values = _read_toml(Path(path))
    parent, train = values.get("parent"), values.get("train")
    if not isinstance(parent, dict) or not isinstance(train, dict) or not isinstance(train.get("search_space"), dict):
        raise NestlingError(f"{path}: a recipe has [parent] and [train.search_space]")
    try:
        architecture = _shape(parent.get("architecture"), str(parent.get("model")))
        for field, sizes in train["search_space"].items():
            if isinstance(sizes, dict):
                _check_range(field, sizes)
        return architecture, _space(architecture, train["search_space"], train.get("per_layer", ()))
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
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise NestlingError(f"{path}: no such recipe") from None
    except OSError as error:
        raise NestlingError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise NestlingError(f"{path}: not valid TOML: {error}") from None


def _overlaid(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    def merge(key: str) -> Any:
        both = isinstance(base.get(key), dict) and isinstance(overlay.get(key), dict)
        return _overlaid(base[key], overlay[key]) if both else overlay.get(key, base.get(key))

    return {key: merge(key) for key in {**base, **overlay}}


def _first_error(error: ValidationError, kind: type[Section]) -> str:
    """One clear line about the first thing wrong, with the nearest key for an unknown one."""
    errors = error.errors()
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])  # why another is missing
    where = ".".join(step for step in map(str, first["loc"]) if "[" not in step)  # brackets are of alternatives
    if first["type"] == "extra_forbidden":
        return f"unknown key {where!r}; {nearest(str(first['loc'][-1]), _keys_at(kind, first['loc'][:-1]))}"
    if first["type"] == "missing":
        return f"{where} is missing"
    input_ = "" if isinstance(first["input"], dict) else f" (given: {first['input']!r})"  # a whole section says nothing
    return f"{where}: {first['msg'].removeprefix('Value error, ')}{input_}"


def _keys_at(kind: type[Section], path: tuple[Any, ...]) -> list[str]:
    model: Any = kind
    for step in path:
        if isinstance(step, str):
            model = model.model_fields[step].annotation
            model = next((part for part in getattr(model, "__args__", ()) if hasattr(part, "model_fields")), model)
    return list(model.model_fields)
