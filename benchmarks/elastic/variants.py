"""What is compared: the default of study.toml, and variants of it that change one thing each."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nestling.recipe import Recipe

ROUTER = "router's sizes"  # the default
PICKED = "hand-picked sizes"  # where a question is not about the router: less noise between runs, and no soft steps
STEPS, BATCH = 120, 64  # as in study.toml


@dataclass(frozen=True)
class Variant:
    """One training run. Its settings are the recipe's with `train` laid over [train]; the rest no recipe can say."""

    name: str
    question: str
    train: Mapping[str, Any] = field(default_factory=dict)
    against: str = PICKED  # the variant its differences are taken from
    wave: int = 1  # runs of a lower wave are made first
    sizes: str = "uniform"  # by hand; or "router", "random 0", "random 1", or "found": the router's, from step 0
    start: str = "ranked"  # or "unranked": the channels as they came, layers in a random order
    target: str = "teacher"  # or "solution": cross-entropy alone
    active_width: bool = True  # norms divide by how many channels are on; or always by all of them

    def recipe(self, base: Recipe, seed: int) -> Recipe:
        """The checked settings of one run."""
        train = {**base.train.model_dump(exclude_unset=True), **self.train}
        return Recipe(**{**base.model_dump(exclude_unset=True), "train": train, "seed": seed})

    def to_json(self) -> dict[str, Any]:
        """What a run depends on besides its recipe."""
        return {key: getattr(self, key) for key in ("sizes", "start", "target", "active_width")}


def _variants() -> Iterator[Variant]:
    yield Variant(ROUTER, "Who picks the sizes?", against=ROUTER, sizes="router")
    for questions in (_sizes, _layers, _masks, _start, _loss, _budgets, _length, _norms, _optimizer):
        yield from questions()


def _sizes() -> Iterator[Variant]:
    question = "Who picks the sizes?"
    yield Variant(PICKED, question, against=ROUTER)
    yield Variant("random sizes", question, against=ROUTER, sizes="random 0")
    yield Variant("random sizes, second draw", question, against=ROUTER, sizes="random 1", wave=2)
    yield Variant("router's sizes, hard from step 0", question, against=ROUTER, sizes="found")


def _masks() -> Iterator[Variant]:
    question = "How long are masks soft?"
    for share, steps in (("1/6", STEPS // 6), ("2/3", STEPS * 2 // 3)):
        yield Variant(f"soft for {share} of the steps", question, {"router_steps": steps}, ROUTER, 2, sizes="router")
    yield Variant("soft but for the last step", question, {"router_steps": STEPS - 1}, ROUTER, sizes="router")


def _layers() -> Iterator[Variant]:
    """With a reference of their own: the router that can do this reads families out otherwise than the one before."""
    question, one = "One size for all layers, or one for each?", "one for all"
    fields = ["intermediate_size", "num_attention_heads"]  # what a checkpoint can hold per layer
    yield Variant(one, question, {"per_layer": []}, one, 2, sizes="router")
    yield Variant("one for each", question, {"per_layer": fields}, one, 2, sizes="router")


def _start() -> Iterator[Variant]:
    question = "Does the ranking matter once a family is trained?"
    yield Variant("unranked, hand-picked", question, start="unranked")
    yield Variant("unranked, router", question, against=ROUTER, sizes="router", start="unranked")


def _loss() -> Iterator[Variant]:
    question = "What does a student learn from?"
    yield Variant("CE alone", question, target="solution")
    yield Variant("KL + CE", question, {"objective": {"cross_entropy": 1.0}})
    for temperature, wave in ((0.5, 2), (2.0, 1), (4.0, 2)):
        yield Variant(f"T = {temperature:g}", question, {"objective": {"temperature": temperature}}, wave=wave)


def _budgets() -> Iterator[Variant]:
    question = "All budgets on every batch, or one?"
    one = {"budgets_per_step": "one"}
    thrice = one | {"warmup": 30}
    halves = {"100%": 1 / 3, "50%": 1 / 3, "30%": 1 / 3}, {"100%": 0.5, "50%": 0.3, "30%": 0.2}
    adjusted = _stages(*((3 * STEPS // 2, {"budget_probabilities": half}) for half in halves))
    yield Variant("one per step, same tokens", question, one)
    yield Variant("one per step, same student tokens", question, thrice | _stages((3 * STEPS, {})))
    yield Variant("then 0.5 / 0.3 / 0.2", question, thrice | adjusted, "one per step, same student tokens")


def _length() -> Iterator[Variant]:
    """A problem of two terms has 7.7 tokens, one of two or three 10.6: the same tokens within 4 %."""
    question = "Does stage 2 help by its length, or by its tokens?"
    short, same = {"options": {"max_terms": 2}}, "two terms all along"
    yield Variant(same, question, _stages((140, short)), against=same)
    yield Variant("two terms, then two or three", question, _stages((60, short), (60, {})), same)
    yield Variant("two or three terms all along", question, _stages((100, {})), same)


def _norms() -> Iterator[Variant]:
    question = "Must norms divide by the active width?"
    yield Variant("by the whole width, hand-picked", question, active_width=False)
    yield Variant("by the whole width, router", question, against=ROUTER, sizes="router", active_width=False, wave=2)


def _optimizer() -> Iterator[Variant]:
    question = "Muon (at 0.004) or AdamW?"
    for rate, wave in ((1e-3, 2), (2e-3, 1), (4e-3, 2)):
        yield Variant(f"AdamW at {rate:g}", question, {"optimizer": "adamw", "learning_rate": rate}, wave=wave)
    for rate in (2e-3, 8e-3):
        yield Variant(f"Muon at {rate:g}", question, {"learning_rate": rate}, wave=2)


def _stages(*stages: tuple[int, dict[str, Any]]) -> dict[str, Any]:
    return {"stages": [{"steps": steps, "batch": BATCH, **more} for steps, more in stages]}


VARIANTS = {variant.name: variant for variant in _variants()}
