"""Recipes: the demo's is read as it is written; anything that a later stage could not do is refused at once."""

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from nestling.arch.presets import PRESETS
from nestling.arch.search import default_space
from nestling.errors import NestlingError
from nestling.recipe import Recipe, parent_architecture, read_recipe, space_of
from nestling.sections import ScratchParent
from nestling.tasks import Task

DEMO = Path(__file__).parent.parent / "runs" / "demo.toml"
RECIPE = """
title = "small"
out = "out/small"
[task]
name = "chain_sum"
max_terms = 2
[parent]
steps = 10
batch = 4
learning_rate = 1e-3
[parent.architecture]
hybrid_override_pattern = "M*-"
vocab_size = 16
hidden_size = 32
intermediate_size = 64
n_groups = 2
mamba_num_heads = 4
mamba_head_dim = 8
num_key_value_heads = 2
num_attention_heads = 4
head_dim = 8
[rank]
batches = 2
[train]
budgets = ["75%", "50%"]
learning_rate = 1e-3
router_steps = 4
stages = [{ steps = 3, batch = 4, options = { max_terms = 1 } }, { steps = 5, batch = 4 }]
[train.search_space]
hidden_size = [12, 14, 15, 16, 22, 24]
intermediate_size = [32, 48]
[controls]
uniform_budget = "50%"
scratch_budget = "75%"
[controls.uniform]
"75%" = { hidden_size = 24 }
"50%" = { hidden_size = 16 }
[quick]
out = "out/quick"
[quick.parent]
steps = 2
"""


SIZES = "hidden_size = [12, 14, 15, 16, 22, 24]"
STAGES = "stages = [{ steps = 3, batch = 4, options = { max_terms = 1 } }, { steps = 5, batch = 4 }]"


def read(tmp_path: Path, text: str = RECIPE, **options: Any) -> Recipe:
    (tmp_path / "recipe.toml").write_text(text)
    return read_recipe(tmp_path / "recipe.toml", **options)


def changed(old: str, new: str) -> str:
    assert RECIPE.count(old) == 1
    return RECIPE.replace(old, new)


# ---- reading


def test_the_demo_and_its_quick_form_are_recipes() -> None:
    full, quick = read_recipe(DEMO), read_recipe(DEMO, quick=True)
    assert full.train.budgets == quick.train.budgets == ("75%", "50%")
    assert full.parent.architecture == quick.parent.architecture
    assert full.evaluate.problems == 1000 > quick.evaluate.problems
    assert full.parent.steps > quick.parent.steps
    assert full.out != quick.out
    assert full.controls == quick.controls
    assert isinstance(full.parent, ScratchParent)


def test_values_are_as_written_and_the_rest_has_defaults(tmp_path: Path) -> None:
    recipe = read(tmp_path)
    assert (recipe.title, recipe.out, recipe.seed) == ("small", "out/small", 0)
    assert recipe.task.task == Task("chain_sum", (("max_terms", 2),))
    assert (recipe.parent.steps, recipe.parent.learning_rate, recipe.rank.batches) == (10, 1e-3, 2)
    assert recipe.train.stages[0].options == {"max_terms": 1}
    assert recipe.train.search_space == {"hidden_size": (12, 14, 15, 16, 22, 24), "intermediate_size": (32, 48)}
    assert (recipe.train.temperature, recipe.train.logit_scale) == ((1.0, 0.05), (1.0, 10.0))
    assert recipe.controls.uniform == {"75%": {"hidden_size": 24}, "50%": {"hidden_size": 16}}
    assert recipe.evaluate.problems == 1000


def test_the_quick_form_is_laid_over_and_options_over_that(tmp_path: Path) -> None:
    quick = read(tmp_path, quick=True)
    assert (quick.out, quick.parent.steps, quick.parent.batch) == ("out/quick", 2, 4)
    named = read(tmp_path, quick=True, seed=7, out="elsewhere")
    assert (named.out, named.seed, named.parent.steps) == ("elsewhere", 7, 2)
    assert read(tmp_path, seed=0).seed == 0


def test_a_recipe_cannot_be_changed(tmp_path: Path) -> None:
    recipe = read(tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3
    with pytest.raises(ValueError, match="frozen"):
        recipe.parent.steps = 3


# ---- refusing


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        # unknown keys, with the nearest
        ("batches = 2", "batchs = 2", "unknown key 'rank.batchs'; did you mean 'batches'?"),
        ('out = "out/small"', 'out = "x"\nsead = 1', "unknown key 'sead'; did you mean 'seed'?"),
        ("router_steps = 4", "router_step = 4", "router_step"),
        (SIZES, "hidden_size = [24]", "first of all for hidden_size"),
        (SIZES, "hidden_size = { from = 8, to = 24, multiples_of = 4 }", "'multiple_of'?"),
        (SIZES, "hidden_size = { from = 8, to = 24 }", "must be a list of sizes, or { from"),
        (SIZES, "hidden_size = { from = 9, to = 11, multiple_of = 4 }", "no multiple of 4"),
        (SIZES, "hidden_size = [1.5]", "train.search_space.hidden_size.0: Input"),
        ("router_steps = 4", "router_steps = 4\nper_layer = true", 'per_layer must be a list, such as ["…"]'),
        ("router_steps = 4", "router_steps = 4\nobjective = 3", "train.objective must be a table, not 3"),
        ("router_steps = 4", 'router_steps = 4\nper_layer = ["hidden_size"]', "is one size for all layers"),
        ("router_steps = 4", 'router_steps = 4\nper_layer = ["mamba_num_heads"]', "set allow_unexportable = true"),
        ("{ steps = 5, batch", "{ steps = 5, bach = 4, batch", "'train.stages.1.bach'; did you mean 'batch'?"),
        ('scratch_budget = "75%"', 'scratch_budgets = "75%"', "did you mean 'scratch_budget'?"),
        ("[quick.parent]\nsteps = 2", "[quick.parent]\nstep = 2", "unknown key 'parent.step'; did you mean 'steps'?"),
        ("router_steps = 4", "router_steps = 4\nobjective = { top_n = 4 }", "objective.top_n'; did you mean 'top_k'?"),
        ("router_steps = 4", "router_steps = 4\nobjective = { chunk = 0 }", "objective.chunk: Input should be greater"),
        ("batch = 4\nlearning", 'batch = 4\noptimizer = "sgd"\nlearning', "should be 'muon' or 'adamw'"),
        ("batch = 4\nlearning", 'batch = 4\nschedule = "step"\nlearning', "should be 'wsd', 'linear' or 'cosine'"),
        ("{ steps = 5", "{ budget_probabilities = { a = 0.5 }, steps = 5", "the probabilities must sum to 1, not 0.5"),
        ("{ steps = 5", "{ budget_probabilities = { a = 1 }, steps = 5", "no meaning unless budgets_per_step = 'one'"),
        ("router_steps = 4\nstages = [{", 'router_steps = 4\nbudgets_per_step = "one"\nstages = [{ '
         'budget_probabilities = { "75%" = 1 },', "must name 100%, 50%, 75%, and no other budget"),
        ("{ steps = 5", "{ length = 1, steps = 5", "train.stages.1.length: Input should be greater than or equal to 2"),
        # missing or of the wrong kind
        ("steps = 10\n", "", "parent.steps is missing"),
        ('title = "small"\n', "", "title is missing"),
        ("steps = 10", "steps = 0", "parent.steps: Input should be greater than 0 (given: 0)"),
        ("steps = 10", "steps = 1.5", "parent.steps"),
        ("steps = 10", 'steps = "many"', "(given: 'many')"),
        ("batches = 2", "batches = []", "rank.batches"),
        ("[quick]\nout = \"out/quick\"\n[quick.parent]\nsteps = 2\n", "", None),  # a recipe needs no quick form
        ("router_steps = 4", "router_steps = 8", "router_steps must be fewer than the steps of all stages, 8"),
        (STAGES, "stages = []", "train.stages: Tuple should have at least 1 item"),
        # sizes that the model cannot have
        ('"M*-"', '"M*X"', "block kinds ['X'] are unknown"),
        ("hidden_size = 32", 'hidden_size = "32"', "hidden_size must be a positive integer"),
        ("mamba_num_heads = 4", "mamba_num_heads = 5", "mamba_num_heads = 5 cannot be shared by n_groups = 2"),
        ('budgets = ["75%", "50%"]', 'budgets = ["75", "half"]', "budget 'half' is not a size"),
        ('budgets = ["75%", "50%"]', 'budgets = ["120%"]', "budget '120%' asks for"),
        ('budgets = ["75%", "50%"]', "budgets = []", "train.budgets: at least one size besides the whole model"),
        ('budgets = ["75%", "50%"]', 'budgets = ["75%", "75%"]', "each one once, and 75% is there twice"),
        ("intermediate_size = [32, 48]", "intermediate_sizes = [32]", "did you mean 'intermediate_size'?"),
        ("intermediate_size = [32, 48]", "intermediate_size = [32, 80]", "intermediate_size = 80 is outside 1 … 64"),
        # controls that do not fit the budgets
        ('"50%" = { hidden_size = 16 }', "", "controls.uniform must have the sizes of 75%, 50%"),
        ('"50%" = { hidden_size = 16 }', '"50%" = { hidden_sizes = 16 }', "did you mean 'hidden_size'?"),
        ('"50%" = { hidden_size = 16 }', '"50%" = { hidden_size = 48 }', "hidden_size = 48 is outside 1 … 32"),
        ('uniform_budget = "50%"', 'uniform_budget = "50"', "'50' is not a budget; did you mean '50%'?"),
        ('scratch_budget = "75%"', 'scratch_budget = "100%"', "controls.scratch_budget = '100%' is not a budget"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_in_one_line(tmp_path: Path, old: str, new: str, words: str | None) -> None:
    text = changed(old, new)
    if words is None:
        read(tmp_path, text)
        return
    with pytest.raises(NestlingError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert words in message
    assert message.startswith(f"{tmp_path / 'recipe.toml'}: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (
            '"75%" = { hidden_size = 24 }\n"50%" = { hidden_size = 16 }',
            "train.sizes: 75% has 23,692 parameters, more than its",
        ),
        ('"75%" = { hidden_size = 16 }\n"50%" = { hidden_size = 12 }', None),
        ('"75%" = { hidden_size = 22 }\n"50%" = { hidden_size = 12, intermediate_size = 48 }', None),
        (
            '"75%" = { hidden_size = 22, intermediate_size = 48 }\n"50%" = { hidden_size = 12 }',
            "train.sizes: 50% is not inside 75%; a smaller size has no axis that is longer",
        ),
    ],
)
def test_sizes_by_hand_are_within_their_budgets_and_one_another(tmp_path: Path, sizes: str, words: str | None) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("[controls]", f"[train.sizes]\n{sizes}\n[controls]"))
    with pytest.raises(NestlingError, match=re.escape(words)) if words else nullcontext():
        read_recipe(tmp_path / "recipe.toml")


def test_a_recipe_is_utf_8_and_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ä")
    text = RECIPE.replace('title = "small"', 'title = "größer ~/"').replace("out/small", "~/small")
    (tmp_path / "recipe.toml").write_bytes(b"\xef\xbb\xbf" + text.encode())  # with the mark that some editors set
    recipe = read_recipe(tmp_path / "recipe.toml")
    assert (recipe.title, str(recipe.out)) == ("größer ~/", "/home/ä/small")


def test_every_key_of_a_section_is_offered_when_none_is_near(tmp_path: Path) -> None:
    with pytest.raises(NestlingError, match=re.escape("'rank.zzz'; allowed: batches, batch")):
        read(tmp_path, changed("batches = 2", "zzz = 2"))


@pytest.mark.parametrize("text", ["title = ", "[task\n", "a = 1\na = 2\n", 'title = "x\n'])
def test_what_is_not_toml_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(NestlingError, match=r"recipe\.toml: not valid TOML: .*(line \d|end of document)"):
        read(tmp_path, text)


def test_a_recipe_that_is_missing_binary_or_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NestlingError, match=r"none\.toml: no such recipe"):
        read_recipe(tmp_path / "none.toml")
    with pytest.raises(NestlingError, match="cannot be read"):
        read_recipe(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(NestlingError, match="not valid TOML"):
        read_recipe(tmp_path / "binary.toml")
    with pytest.raises(NestlingError, match="quick must be a table, not 5"):
        read(tmp_path, "quick = 5\n" + RECIPE[: RECIPE.index("[quick]")])


def test_a_range_is_its_multiples_and_a_repair_keeps_to_them(tmp_path: Path) -> None:
    text = RECIPE.replace("[32, 48]", "{ from = 30, to = 50, multiple_of = 4 }")
    recipe = read(tmp_path, text.replace("router_steps = 4", 'router_steps = 4\nper_layer = ["intermediate_size"]'))
    space = space_of(parent_architecture(recipe), recipe.train)
    assert space["intermediate_size"] == (32, 36, 40, 44, 48, 64)
    assert space.step("intermediate_size@2") == 4
    assert space.axes == ("hidden_size", "intermediate_size@2")


def test_without_a_search_space_there_is_one_that_every_tool_can_hold(tmp_path: Path) -> None:
    start, end = RECIPE.index("[train.search_space]"), RECIPE.index("[controls]")
    recipe = read(tmp_path, RECIPE[:start] + RECIPE[end:])
    space = space_of(parent_architecture(recipe), recipe.train)
    assert space.to_json() == {
        "hidden_size": list(range(16, 33)), "intermediate_size": list(range(32, 65, 8)), "layers": [3],
        "mamba_num_heads": [2, 4], "num_attention_heads": [2, 4],
        "multiple_of": {"hidden_size": 1, "intermediate_size": 8},
    }  # fmt: skip


@pytest.mark.parametrize("name", ["nemotron-nano-12b-v2", "nemotron-h-8b", "nemotron-3-nano-30b-a3b"])
def test_the_space_of_a_large_model_is_of_sizes_that_divide(name: str) -> None:
    model = PRESETS[name]
    space = default_space(model)
    for field, sizes in space.candidates:
        assert len(sizes) <= 18 or field == "layers", field
        assert sizes[-1] == (len(model.hybrid_override_pattern) if field == "layers" else getattr(model, field))
    assert all(size % 64 == 0 for size in space["hidden_size"])
    assert all(heads % model.n_groups == 0 for heads in space["mamba_num_heads"])
    assert all(heads % model.num_key_value_heads == 0 for heads in space["num_attention_heads"])
    assert "mamba_head_dim" not in space
    assert space.axes == tuple(field for field, _ in space.candidates)
