"""A recipe that trains on text: from a tokenizer and a few lines to sizes that are judged by perplexity."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

pytest.importorskip("jinja2")

import stock
from nestling.errors import NestlingError
from nestling.evaluate.story import tell
from nestling.pipeline import Pipeline
from nestling.recipe import read_recipe
from nestling.weights.elastic import open_elastic

WORDS = [
    "a",
    "bird",
    "sat",
    "in",
    "the",
    "old",
    "tree",
    "and",
    "sang",
    "of",
    "rain",
    "on",
    "leaves",
    "while",
    "small",
    "ones",
    "slept",
    "near",
]
RECIPE = """
title = "birds"
out = "{0}/out"
[data]
train = "{0}/train.jsonl"
validation = "{0}/held.jsonl"
tokenizer = "{0}/words"
repeat = true
[parent]
steps = 3
batch = 2
length = 16
learning_rate = 4e-3
[parent.architecture]
hybrid_override_pattern = "M*-M-"
vocab_size = 20
hidden_size = 16
intermediate_size = 48
n_groups = 2
mamba_num_heads = 4
mamba_head_dim = 4
ssm_state_size = 4
num_key_value_heads = 1
num_attention_heads = 2
head_dim = 8
[rank]
batches = 1
batch = 2
[train]
budgets = ["75%", "50%"]
learning_rate = 4e-3
router_steps = 2
stages = [{{ steps = 2, batch = 2, length = 16 }}, {{ steps = 2, batch = 2, length = 24 }}]
[train.search_space]
hidden_size = [8, 10, 12, 14]
intermediate_size = [16, 24, 32, 40]
mamba_num_heads = [2]
mamba_head_dim = [2]
num_attention_heads = [1]
layers = [4]
[evaluate]
problems = 3
"""


def lines(file: Path, count: int, first: int) -> None:
    texts = [" ".join(WORDS[(first + i * j) % len(WORDS)] for j in range(5 + i % 9)) for i in range(1, count + 1)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_recipe(directory: Path, old: str = "", new: str = "") -> Path:
    assert RECIPE.count(old) == 1 or not old
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<end>", "?", *WORDS])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<end>"])
    (directory / "words").mkdir()
    tokenizer.save(str(directory / "words" / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "pad_token": "<end>"}
    (directory / "words" / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "words" / "generation_config.json").write_text('{"eos_token_id": 0}')
    lines(directory / "train.jsonl", 40, 0)
    lines(directory / "held.jsonl", 5, 3)
    text = RECIPE.replace(old, new) if old else RECIPE
    (directory / "recipe.toml").write_text(text.format(directory))
    return directory / "recipe.toml"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("text")
    Pipeline(read_recipe(write_recipe(directory)), "test").run()
    return directory


def test_every_size_is_judged_by_its_perplexity(made: Path) -> None:
    report = tell(made / "out")
    assert [row["name"] for row in report["rows"]] == ["parent", "100%", "75%", "50%", "75% untrained", "50% untrained"]
    tokenizer = Tokenizer.from_file(str(made / "words" / "tokenizer.json"))
    texts = [json.loads(line)["text"] for line in (made / "held.jsonl").read_text().splitlines()[:3]]
    for row, place in zip(report["rows"][:2], ("parent", "slices/100"), strict=True):
        model, total, count = stock.load(made / "out" / place), 0.0, 0
        for text in texts:
            ids = torch.tensor([[0, *tokenizer.encode(text).ids, 0]])
            with torch.no_grad():
                chances = model(ids).logits.log_softmax(-1)[0, :-1]
            total -= float(chances[torch.arange(ids.shape[1] - 1), ids[0, 1:]].sum())
            count += ids.shape[1] - 1
        assert row["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
        assert row["documents"] == 3
    page = (made / "out" / "report.html").read_text()
    assert "has a held-out perplexity of" in page.replace("\u2011", "-")
    assert f"perplexity {report['rows'][3]['perplexity']:.2f}" in (made / "out/slices/50/README.md").read_text()


def test_the_slices_have_the_tokenizer_and_its_end(made: Path) -> None:
    for size in ("75", "50"):
        directory = made / "out" / "slices" / size
        assert (directory / "tokenizer.json").read_bytes() == (made / "words" / "tokenizer.json").read_bytes()
        assert json.loads((directory / "config.json").read_text())["eos_token_id"] == 0
    provenance = open_elastic(made / "out" / "elastic").sidecar["provenance"]
    assert provenance["data"]["sources"][0]["documents"] == 40


def test_what_is_done_is_not_done_again_until_a_text_changes(made: Path) -> None:
    recipe = read_recipe(made / "recipe.toml")
    before = {path: path.stat().st_mtime_ns for path in (made / "out").rglob("model.safetensors")}
    Pipeline(recipe, "test").run()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    lines(made / "train.jsonl", 41, 0)
    Pipeline(recipe, "test").run(until="parent")
    changed = {path for path in before if path.stat().st_mtime_ns != before[path]}
    assert {path.parent.name for path in changed} == {"parent"}


def test_sizes_are_judged_again_on_other_text_and_in_other_windows(tmp_path: Path) -> None:
    file = write_recipe(tmp_path)
    Pipeline(read_recipe(file), "test").run()
    judged, parent = tmp_path / "out/evaluations/parent/evaluation.json", tmp_path / "out/parent/model.safetensors"
    before, trained = judged.read_bytes(), parent.stat().st_mtime_ns
    lines(tmp_path / "held.jsonl", 5, 7)
    Pipeline(read_recipe(file), "test").run()
    other = judged.read_bytes()
    assert other != before
    lines(tmp_path / "further.jsonl", 5, 9)
    file.write_text(file.read_text().replace("held.jsonl", "further.jsonl"))
    Pipeline(read_recipe(file), "test").run()
    assert judged.read_bytes() != other
    assert parent.stat().st_mtime_ns == trained
    other = judged.read_bytes()
    file.write_text(file.read_text().replace("length = 16 }", "length = 4 }"))
    Pipeline(read_recipe(file), "test").run()
    assert json.loads(judged.read_bytes()) != json.loads(other)
    assert parent.stat().st_mtime_ns == trained


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("repeat = true", "repeat = false\nloss_on = 'all'", None),
        ('tokenizer = "{0}/words"\n', "", "needs parent.length and data.tokenizer"),
        ("steps = 2, batch = 2, length = 24", "steps = 2, batch = 2", "every stage needs a length"),
        ('validation = "{0}/held.jsonl"\n', "", "nestling run judges sizes by data.validation"),
        ("vocab_size = 20", "vocab_size = 10", "outside the model's vocabulary of 10"),
    ],
)
def test_what_could_not_be_finished_is_not_started(tmp_path: Path, old: str, new: str, words: Any) -> None:
    file = write_recipe(tmp_path, old, new)
    if words is None:  # data that runs out is an error of its own, before anything is trained
        text = file.read_text().replace("steps = 3", "steps = 300")
        file.write_text(text)
        words = "data.train lasts for"
    with pytest.raises(NestlingError, match=re.escape(words)):
        Pipeline(read_recipe(file), "test").run()
    assert not (tmp_path / "out" / "parent").exists()


def test_data_that_runs_out_in_the_family_is_refused_before_the_parent_is_trained(tmp_path: Path) -> None:
    file = write_recipe(tmp_path, "repeat = true", "repeat = false")
    file.write_text(
        file.read_text().replace("{ steps = 2, batch = 2, length = 24", "{ steps = 200, batch = 2, length = 24")
    )
    with pytest.raises(NestlingError, match="of stage 2 .* 200 are wanted"):
        Pipeline(read_recipe(file), "test").run()
    assert not (tmp_path / "out" / "parent").exists()
