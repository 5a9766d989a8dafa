"""A recipe for a model that exists: trained by its own directory, ranked or not, under a teacher that speaks alike."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

pytest.importorskip("reasoning_gym")
pytest.importorskip("jinja2")


import stock
from nestling.arch.architecture import Architecture
from nestling.arch.latency import Latencies
from nestling.arch.submodel import Submodel, complete
from nestling.errors import NestlingError
from nestling.evaluate.story import tell
from nestling.model.nemotron_h import NemotronH
from nestling.model.store import save_model
from nestling.pipeline import Pipeline
from nestling.recipe import read_recipe
from nestling.tokenizer import character_tokenizer, save_tokenizer
from nestling.weights.elastic import open_elastic
from nestling.weights.files import write_json
from nestling.weights.ranking import identity
from nestling.weights.transform import permute

TINY = replace(stock.TINY, hybrid_override_pattern="M*-M-", intermediate_size=48)
RECIPE = """
title = "mine"
out = "{out}"
[task]
name = "chain_sum"
max_terms = 2
max_digits = 1
[parent]
model = "{parent}"
[rank]
batches = 1
batch = 4
[train]
budgets = ["75%", "50%"]
learning_rate = 4e-3
router_steps = 2
stages = [{{ steps = 4, batch = 4 }}]
[train.search_space]
hidden_size = [8, 10, 12, 14]
intermediate_size = [16, 24, 32, 40]
mamba_num_heads = [2]
mamba_head_dim = [2]
num_attention_heads = [1]
layers = [4]
[evaluate]
problems = 4
batch = 4
max_tokens = 3
"""


def model(directory: Path, seed: int = 0, **sizes: Any) -> Path:
    """A stock checkpoint with a tokenizer, as a user brings one."""
    directory.mkdir()
    architecture = Architecture(**{**vars(TINY), **sizes})
    save_model(stock.randomize(NemotronH(architecture), seed), directory)
    write_json(directory / "config.json", architecture.to_config({"pad_token_id": 0, "eos_token_id": 1}))
    save_tokenizer(character_tokenizer(), directory)
    return directory


def pipeline(tmp_path: Path, parent: Path, old: str = "", new: str = "") -> Pipeline:
    assert RECIPE.count(old) == 1 or not old
    text = RECIPE.replace(old, new) if old else RECIPE
    (tmp_path / "recipe.toml").write_text(text.format(out=tmp_path / "out", parent=parent))
    return Pipeline(read_recipe(tmp_path / "recipe.toml"), "test")


def files(directory: Path) -> Mapping[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.iterdir()}


def provenance(tmp_path: Path) -> Any:
    return json.loads((tmp_path / "out" / "elastic" / "nestling.json").read_text())["provenance"]


def test_a_model_of_the_users_becomes_a_family_and_stays_as_it_is(tmp_path: Path) -> None:
    parent = model(tmp_path / "mine")
    before = files(parent)
    pipeline(tmp_path, parent).run()
    assert files(parent) == before
    assert list(open_elastic(tmp_path / "out" / "elastic").budgets) == ["100%", "75%", "50%"]
    assert provenance(tmp_path)["parent"] == provenance(tmp_path)["teacher"] == str(parent)
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["parent", "100%", "75%", "50%", "75% untrained", "50% untrained"]
    tell(tmp_path / "out")  # also from elsewhere
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    pipeline(tmp_path, parent).run()
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_sizes_of_their_own_per_layer_are_cut_counted_and_judged(tmp_path: Path) -> None:
    parent = model(tmp_path / "mine", hybrid_override_pattern="M-*-M-")
    pipeline(tmp_path, parent, "[train]\n", '[train]\nper_layer = ["intermediate_size"]\n').run()
    family = open_elastic(tmp_path / "out" / "elastic").budgets
    assert any(len({*sizes.intermediate_size}) > 1 for sizes in list(family.values())[1:])
    cut, told = (json.loads((tmp_path / "out" / name).read_text())["rows"][1:] for name in ("run.json", "report.json"))
    for about, row in zip(cut, told, strict=True):
        weights = load_file(tmp_path / "out" / about["directory"] / "model.safetensors")
        assert row["parameters"] == sum(weight.numel() for weight in weights.values())


def test_the_parents_own_directory_is_not_written_into(tmp_path: Path) -> None:
    stock.save(TINY, tmp_path / "mine")
    (tmp_path / "r.toml").write_text(RECIPE.format(out=f"{tmp_path}/x/../mine", parent=tmp_path / "mine"))
    with pytest.raises(NestlingError, match="is the directory of the parent itself; choose another"):
        read_recipe(tmp_path / "r.toml")


def test_another_model_in_its_place_is_noticed(tmp_path: Path) -> None:
    parent = model(tmp_path / "mine")
    pipeline(tmp_path, parent).run(until="rank")
    ranked = (tmp_path / "out" / "ranked" / "model.safetensors").read_bytes()
    shutil.rmtree(parent)
    pipeline(tmp_path, model(tmp_path / "mine", seed=1)).run(until="rank")
    assert (tmp_path / "out" / "ranked" / "model.safetensors").read_bytes() != ranked


@pytest.mark.parametrize("file", ["tokenizer.json", "generation_config.json"])
def test_another_tokenizer_in_its_place_is_noticed(tmp_path: Path, file: str) -> None:
    parent = model(tmp_path / "mine")
    pipeline(tmp_path, parent).run(until="rank")
    mark = tmp_path / "out" / "ranked" / "nestling-stage.json"
    before = json.loads(mark.read_text())["fingerprint"]
    (parent / file).write_text((parent / file).read_text() + "\n")
    pipeline(tmp_path, parent).run(until="rank")
    assert json.loads(mark.read_text())["fingerprint"] != before


def test_another_latency_table_in_its_place_is_noticed(tmp_path: Path) -> None:
    parent, table = model(tmp_path / "mine"), tmp_path / "table.json"
    marks = []
    for factor in (1, 2):
        rows = tuple((complete(TINY, Submodel(intermediate_size=size)), factor * size) for size in (16, 32, 48))
        write_json(table, Latencies(TINY, rows, ()).to_json())
        pipeline(tmp_path, parent, "[train]", f'[train]\nlatency_table = "{table}"').run(until="train")
        marks.append(json.loads((tmp_path / "out" / "elastic" / "nestling-stage.json").read_text())["fingerprint"])
    assert marks[0] != marks[1]


def test_a_ranked_parent_is_not_ranked_again(tmp_path: Path) -> None:
    ranked = tmp_path / "ranked"
    permute(model(tmp_path / "mine"), identity(TINY), ranked, provenance={"by": "hand"})
    pipeline(tmp_path, ranked, "[rank]\nbatches = 1\nbatch = 4\n").run()
    assert not (tmp_path / "out" / "ranked").exists()
    assert provenance(tmp_path)["by"] == "hand"
    pipeline(tmp_path, ranked).run(until="rank")  # unless the recipe says how
    assert (tmp_path / "out" / "ranked").exists()


def test_any_teacher_that_speaks_alike(tmp_path: Path) -> None:
    parent, teacher = model(tmp_path / "mine"), model(tmp_path / "teacher", 1, hidden_size=24, intermediate_size=64)
    before = files(teacher)
    pipeline(tmp_path, parent, "[train]", f'[train]\nteacher = "{teacher}"').run(until="train")
    assert files(teacher) == before
    assert provenance(tmp_path)["teacher"] == str(teacher)
    taught = [json.loads(line) for line in (tmp_path / "out" / "elastic" / "metrics.jsonl").read_text().splitlines()]
    assert taught[0]["kl"]["100%"] > 1e-3  # not its own teacher


def test_another_teacher_in_its_place_is_noticed(tmp_path: Path) -> None:
    parent, teacher = model(tmp_path / "mine"), model(tmp_path / "teacher", 1)
    with_teacher = ("[train]", f'[train]\nteacher = "{teacher}"')
    pipeline(tmp_path, parent, *with_teacher).run(until="train")
    trained = (tmp_path / "out" / "elastic" / "model.safetensors").read_bytes()
    shutil.rmtree(teacher)
    model(tmp_path / "teacher", 2)
    pipeline(tmp_path, parent, *with_teacher).run(until="train")
    assert (tmp_path / "out" / "elastic" / "model.safetensors").read_bytes() != trained


def test_sizes_per_layer_are_cut_out_judged_and_told_of(tmp_path: Path) -> None:
    parent = model(tmp_path / "mine")
    pipeline(tmp_path, parent, "[train]", '[train]\nper_layer = ["intermediate_size", "num_attention_heads"]').run()
    family = open_elastic(tmp_path / "out" / "elastic").budgets
    mixed = [name for name, size in family.items() if len({*np.atleast_1d(size.intermediate_size)}) > 1]
    assert mixed
    for name in mixed:  # their own code builds them in transformers
        assert (tmp_path / "out" / "slices" / name.rstrip("%") / "modeling_nestling.py").is_file()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for row in report["rows"][2:4]:  # what the budget counts
        sizes = [m["parameters"] for m in report["family"]["members"] if m["name"] == row["name"]]
        assert row["parameters"] == sizes[0]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "intermediate_size over training steps" in page
    assert "@" not in page.partition("<body")[2]


# ---- refused before anything is started


def test_sizes_that_no_checkpoint_holds_are_refused_before_the_training(tmp_path: Path) -> None:
    mamba = '[train]\nper_layer = ["mamba_num_heads"]\nallow_unexportable = true'
    with pytest.raises(NestlingError, match="or train alone: nestling train"):
        pipeline(tmp_path, model(tmp_path / "mine"), "[train]", mamba).run()
    assert not (tmp_path / "out").exists()
    pipeline(tmp_path, tmp_path / "mine", "[train]", mamba).run(until="train")


def test_the_teacher_of_a_parent_that_is_yet_to_be_trained(tmp_path: Path) -> None:
    config = {key: value for key, value in TINY.to_config({}).items() if key in vars(TINY)}
    scratch = "steps = 2\nbatch = 2\nlearning_rate = 1e-3\n[parent.architecture]\n" + "".join(
        f"{key} = {json.dumps(value)}\n" for key, value in config.items() if isinstance(value, int | str)
    )
    teacher = model(tmp_path / "teacher", 1, vocab_size=20)
    text = RECIPE.replace('model = "{parent}"', scratch).replace("[train]", f'[train]\nteacher = "{teacher}"')
    (tmp_path / "recipe.toml").write_text(text.format(out=tmp_path / "out"))
    with pytest.raises(NestlingError, match="has a vocabulary of 20 tokens and the parent one of 16"):
        Pipeline(read_recipe(tmp_path / "recipe.toml"), "test").run(until="train")
    assert not (tmp_path / "out").exists()


def other_tokenizer(directory: Path) -> None:
    file = directory / "tokenizer.json"
    file.write_text(file.read_text().replace('"7": ', '"x": '))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda teacher: None, r"has a vocabulary of 20 tokens and the parent one of 16"),
        (other_tokenizer, r"has another tokenizer: 1 of 16 tokens of the parent have another number there, or none"),
        (lambda teacher: (teacher / "tokenizer.json").unlink(), r"has no tokenizer.json"),
    ],
)
def test_a_teacher_with_another_vocabulary(tmp_path: Path, change: Any, words: str) -> None:
    parent = model(tmp_path / "mine")
    teacher = model(tmp_path / "teacher", 1, **({"vocab_size": 20} if "20 tokens" in words else {}))
    change(teacher)
    with pytest.raises(NestlingError, match=words):
        pipeline(tmp_path, parent, "[train]", f'[train]\nteacher = "{teacher}"').run(until="train")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "[train]",
            '[train]\nteacher = "x"\nobjective = {{ hidden = 0.1 }}',
            "which only the parent as teacher can do",
        ),
        ("[evaluate]", '[controls]\nscratch_budget = "50%"\n[evaluate]', "needs a [parent] that says how to train"),
        ("[evaluate]", '[data]\ntrain = "x.jsonl"\n[evaluate]', "it must have one of them, and not both"),
        ('model = "{parent}"', 'model = "{parent}/no"', "is no checkpoint directory, config.json or preset"),
        ("[rank]", "[parent.architecture]\n[rank]", "unknown key 'parent.model'"),
    ],
)
def test_recipes_that_cannot_be_meant(tmp_path: Path, old: str, new: str, words: str) -> None:
    with pytest.raises(NestlingError, match=re.escape(words)):
        pipeline(tmp_path, model(tmp_path / "mine"), old, new)
