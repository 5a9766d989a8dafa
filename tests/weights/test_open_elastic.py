"""Opening model directories: what is read, and what is refused in which words."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import nestling
import stock
from nestling.arch.architecture import Architecture
from nestling.arch.cost import parameters
from nestling.arch.submodel import WHOLE, Submodel, complete
from nestling.arch.targets import Target
from nestling.errors import NestlingError
from nestling.weights.elastic import FORMAT, open_elastic, sidecar
from nestling.weights.ranking import identity
from nestling.weights.transform import permute

HYBRID = Architecture(
    "M-*",
    vocab_size=19,
    hidden_size=12,
    intermediate_size=10,
    n_groups=2,
    mamba_num_heads=4,
    mamba_head_dim=3,
    ssm_state_size=2,
    num_key_value_heads=2,
    num_attention_heads=4,
    head_dim=2,
)
SMALL = Submodel(hidden_size=8, mamba_num_heads=2)


def write_sidecar(directory: Path, **changed: Any) -> None:
    budgets = {"100%": {"submodel": {}}, "Small": {"submodel": SMALL.to_json()}}
    (directory / "nestling.json").write_text(json.dumps({"format": 1, "budgets": budgets} | changed))


def budget(**changed: Any) -> dict[str, Any]:
    return {"budgets": {"50%": {"submodel": {}} | changed}}


EVALUATION = {"task": "x", "exact_match": 0.5, "interval": [0.4, 0.6], "problems": 9, "backend": "x"}


# ---- what is read


def test_a_stock_directory_is_a_family_of_one(tmp_path: Path) -> None:
    stock.save(HYBRID, tmp_path)
    elastic = open_elastic(tmp_path)
    assert elastic.architecture == HYBRID
    assert elastic.budgets == {"100%": WHOLE}
    assert elastic.sidecar == {}
    assert set(elastic.checkpoint.entries) == set(stock.tensors(tmp_path))


def test_budgets_are_found_by_name_in_any_case(tmp_path: Path) -> None:
    stock.save(HYBRID, tmp_path)
    write_sidecar(tmp_path)
    elastic = open_elastic(tmp_path)
    assert list(elastic.budgets) == ["100%", "Small"]
    spelled = complete(HYBRID, SMALL)
    for wish in ("small", "SMALL", "Small", SMALL, spelled, {"hidden_size": 8, "mamba_num_heads": 2}):
        assert elastic.submodel(wish) == spelled
    for wish in (None, "100%", WHOLE, {}):
        assert elastic.submodel(wish) == complete(HYBRID, WHOLE)


def test_shards_are_one_model(tmp_path: Path) -> None:
    model = stock.build(HYBRID)
    model.save_pretrained(tmp_path / "model", max_shard_size="2KB")
    assert len(list(tmp_path.glob("model/model-*.safetensors"))) > 2
    ids = stock.tokens(19)
    view = nestling.load(tmp_path / "model", dtype=torch.float64)["100%"]
    stock.assert_same(view(ids).logits, stock.logits(stock.float64(model), ids))
    nestling.slice(tmp_path / "model", SMALL, tmp_path / "cut")
    assert stock.numel(stock.load(tmp_path / "cut")) == parameters(HYBRID, SMALL)


def test_multi_token_heads_are_left_aside(tmp_path: Path) -> None:
    """As in stock transformers."""
    stock.save(HYBRID, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    extra = stock.tensors(tmp_path / "model") | {"mtp.layers.0.norm.weight": torch.ones(12)}
    assert open_elastic(stock.write(tmp_path / "mtp", config, extra)).architecture == HYBRID
    assert stock.numel(stock.load(tmp_path / "mtp")) == parameters(HYBRID)


# ---- tied embeddings: stock keeps two tensors whatever the config says; files made elsewhere hold one


def tied(directory: Path) -> tuple[Path, torch.nn.Module]:
    """A tied checkpoint of one matrix, and the stock model it stands for, whose head is a copy of its embeddings."""
    model = stock.build(HYBRID, tie_word_embeddings=True)
    model.lm_head.load_state_dict(model.model.embeddings.state_dict())
    model.save_pretrained(directory / "two")
    stored = stock.tensors(directory / "two")
    assert torch.equal(stored.pop("lm_head.weight"), stored["backbone.embeddings.weight"])
    config = json.loads((directory / "two" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    return stock.write(directory / "one", config, stored), model


def test_a_tied_file_counts_once_and_its_head_is_the_embedding(tmp_path: Path) -> None:
    directory, model = tied(tmp_path)
    family = nestling.load(directory, dtype=torch.float64)
    assert family.elastic.architecture == replace(HYBRID, untied=False)
    assert family["100%"].parameters == stock.numel(model) - 19 * 12
    assert sum(parameter.numel() for parameter in family.model.parameters()) == family["100%"].parameters
    ids = stock.tokens(19)
    stock.assert_same(family["100%"](ids).logits, stock.logits(stock.float64(model), ids))


def test_a_tied_file_is_sliced_and_permuted_as_one(tmp_path: Path) -> None:
    directory, model = tied(tmp_path)
    nestling.slice(directory, SMALL, tmp_path / "cut")
    assert "lm_head.weight" not in stock.tensors(tmp_path / "cut")
    ids = stock.tokens(19)
    family = nestling.load(tmp_path / "cut", dtype=torch.float64)
    by_hand = stock.prune(stock.float64(model), stock.picks(HYBRID, SMALL))
    stock.assert_same(family["100%"](ids).logits, stock.logits(by_hand, ids))
    assert family["100%"].parameters == stock.numel(by_hand) - 19 * 8
    permute(directory, identity(replace(HYBRID, untied=False)), tmp_path / "ranked")
    assert stock.tensors(tmp_path / "ranked").keys() == stock.tensors(directory).keys()


def test_a_tied_file_of_two_matrices_has_two(tmp_path: Path) -> None:
    model = stock.save(HYBRID, tmp_path, tie_word_embeddings=True)
    family = nestling.load(tmp_path, dtype=torch.float64)
    assert family["100%"].parameters == stock.numel(model)
    ids = stock.tokens(19)
    stock.assert_same(family["100%"](ids).logits, stock.logits(stock.float64(model), ids))


# ---- what is refused

Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]
UP = "backbone.layers.1.mixer.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config, stored: config.update(model_type="llama"), "config.json: model_type 'llama' is not supported"),
        (lambda config, stored: config.update(n_groups=3), "config.json: mamba_num_heads = 4 cannot be shared"),
        (lambda config, stored: config.update(tie_word_embeddings=[1]), "tie_word_embeddings must be true or false"),
        (lambda config, stored: config.update(layer_norm_epsilon=10**400), "must be a number from 0 to 1, not 1000"),
        (
            lambda config, stored: config.update(layers_block_type=["moe"] * 3, n_routed_experts=9999),
            "config.json: a model of 9,999 experts has more than the 20 tensors of these weights",
        ),
        (
            lambda config, stored: config.update(layers_block_type=["moe"] * 10**5),
            "config.json: a model of 100,000 layers has more than the 20 tensors of these weights",
        ),
        (lambda config, stored: stored.pop(UP), f"tensor {UP} of shape [10, 12] is missing from the weights"),
        (lambda config, stored: stored.pop("lm_head.weight"), "tensor lm_head.weight of shape [19, 12] is missing"),
        (
            lambda config, stored: config.update(hidden_size=13),
            "backbone.embeddings.weight has shape [19, 12]; config.json implies [19, 13]",
        ),
        (
            lambda config, stored: stored.update({UP: torch.ones(9, 12)}),
            f"{UP} has shape [9, 12]; config.json implies [10, 12]",
        ),
        (
            lambda config, stored: stored.update({UP: torch.ones(12, 10)}),
            f"{UP} has shape [12, 10]; config.json implies [10, 12]",
        ),
        (
            lambda config, stored: stored.update({"backbone.layers.3.norm.weight": torch.ones(12)}),
            "tensor backbone.layers.3.norm.weight is not part of a nemotron_h of this config",
        ),
        (
            lambda config, stored: config.update(mlp_bias=True),
            "tensor backbone.layers.1.mixer.up_proj.bias of shape [10] is missing",
        ),
        (
            lambda config, stored: stored.update({"backbone.layers.1.mixer.up_proj.bias": torch.ones(10)}),
            "tensor backbone.layers.1.mixer.up_proj.bias is not part of a nemotron_h",
        ),
    ],
)
def test_weights_that_do_not_fit_their_config(tmp_path: Path, change: Change, words: str) -> None:
    stock.save(HYBRID, tmp_path / "model")
    config, stored = json.loads((tmp_path / "model" / "config.json").read_text()), stock.tensors(tmp_path / "model")
    change(config, stored)
    stock.write(tmp_path / "bad", config, stored)
    with pytest.raises(NestlingError, match=re.escape(words)) as caught:
        open_elastic(tmp_path / "bad")
    assert str(tmp_path / "bad") in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"format": 2}, "nestling.json: format 2 cannot be read; this version reads format 1"),
        ({"format": None}, "nestling.json: format null cannot be read"),
        ({"format": True}, "nestling.json: format true cannot be read"),
        ({"budgets": []}, "nestling.json: budgets is []; allowed: an object; correct it, or take the file from where"),
        ({"budgets": {}}, "nestling.json: budgets is {}; a family has one size at least"),
        ({"budgets": {"50%": 3}}, "nestling.json: budgets.50% is 3; allowed: an object"),
        ({"budgets": {"50%": {}}}, "nestling.json: 'submodel' is missing in budgets.50%"),
        ({"budgets": {"a\nb": {"submodel": {}}}}, r'the key "a\nb" in budgets is not allowed; allowed: a name'),
        (budget(submodel={"hidden_size": 99}), "nestling.json: budget '50%': sub-model: hidden_size = 99 is"),
        (budget(submodel={"width": 3}), "nestling.json: budget '50%': sub-model: unknown key 'width'"),
        (budget(submodel=[1]), "nestling.json: budgets.50%.submodel is [1]; allowed: an object"),
        (budget(tokens="many"), 'nestling.json: budgets.50%.tokens is "many"; allowed: an integer, zero or above'),
        (budget(tokens=-1), "nestling.json: budgets.50%.tokens is -1; allowed: an integer, zero or above"),
        (budget(target={"of": "parameters"}), "nestling.json: 'value' is missing in budgets.50%.target"),
        (budget(evaluations=3), "nestling.json: budgets.50%.evaluations is 3; allowed: a list"),
        (budget(evaluations=[{}]), "nestling.json: 'task' is missing in budgets.50%.evaluations.0"),
        (
            budget(evaluations=[EVALUATION | {"interval": [0.1, float("nan")]}]),
            "nestling.json: budgets.50%.evaluations.0.interval is [0.1, NaN]; allowed: null, or two numbers",
        ),
        ({"provenance": [1]}, "nestling.json: provenance is [1]; allowed: an object"),
        ({"provenance": {"seconds": "long"}}, 'nestling.json: provenance.seconds is "long"; allowed: a number'),
        ({"xxh3_128": None}, "nestling.json: xxh3_128 is null; allowed: an object"),
        ({"xxh3_128": {"model.safetensors": [1]}}, "xxh3_128.model.safetensors is [1]; allowed: 32 hexadecimal digits"),
        ({"xxh3_128": {"../x": "0" * 32}}, 'the key "../x" in xxh3_128 is not allowed; allowed: the name of a file'),
    ],
)
def test_sidecars_refused(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    stock.save(HYBRID, tmp_path)
    write_sidecar(tmp_path, **changed)
    with pytest.raises(NestlingError, match=re.escape(words)):
        open_elastic(tmp_path)


@pytest.mark.parametrize(
    ("small", "large"),
    [
        ({"hidden_size": 4}, {"hidden_size": 8, "intermediate_size": 5}),
        ({"layers": [0, 1]}, {"layers": [0, 2], "hidden_size": 11}),
        ({"mamba_num_heads": 2}, {"hidden_size": 11}),
    ],
)
def test_a_family_whose_sizes_are_not_nested_is_refused(
    tmp_path: Path, small: dict[str, Any], large: dict[str, Any]
) -> None:
    stock.save(HYBRID, tmp_path)
    write_sidecar(tmp_path, budgets={"small": {"submodel": small}, "100%": {"submodel": {}}, "x": {"submodel": large}})
    with pytest.raises(NestlingError, match="json: budget '(small|x)' is not inside '(small|x)', the next larger one"):
        open_elastic(tmp_path).submodel("50%")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "format null cannot be read"),
        ('{"format": 1, "format": 1}', "broken JSON: 'format' appears twice"),
        ("[" * 50_000, "broken JSON"),
        ('{"format": 1, "x": ' + "[" * 120 + "]" * 120 + "}", "lists and objects lie more than 100 deep"),
        ('{"format": 1, "x": ' + "9" * 5000 + "}", "broken JSON"),
    ],
)
def test_sidecars_that_are_no_json_of_ours_are_refused(tmp_path: Path, text: str, words: str) -> None:
    stock.save(HYBRID, tmp_path)
    (tmp_path / "nestling.json").write_text(text)
    with pytest.raises(NestlingError, match=re.escape(f"nestling.json: {words}")):
        open_elastic(tmp_path)


@pytest.mark.parametrize("name", ["nestling.json", "nestling-slice.json", "ranking.safetensors"])
def test_side_files_that_are_no_files_are_refused(tmp_path: Path, name: str) -> None:
    stock.save(HYBRID, tmp_path)
    write_sidecar(tmp_path)
    file = tmp_path / name
    file.unlink(missing_ok=True)
    for make, words in ((lambda: file.symlink_to("gone"), "No such file"), (lambda: os.mkfifo(file), "not a regular")):
        make()
        with pytest.raises(NestlingError, match=f"{re.escape(name)}: .*{words}"):
            open_elastic(tmp_path).submodel("90%")
        file.unlink()


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ("smal", "has no budget 'smal'; did you mean 'Small'? (allowed: 100%, Small)"),
        ("x7b", "has no budget 'x7b'; allowed: 100%, Small; budget 'x7b' is not a size; write a share"),
        ("7b", "budget '7b' asks for 7,000,000,000 parameters; the whole model has"),
        ({"hidden": 3}, "unknown key 'hidden'; did you mean 'hidden_size'?"),
        (Submodel(layers=(3,)), "layer 3 does not exist; the model has layers 0 … 2"),
        (3, "a sub-model is a JSON object"),
    ],
)
def test_wishes_refused(tmp_path: Path, wish: Any, words: str) -> None:
    stock.save(HYBRID, tmp_path)
    write_sidecar(tmp_path)
    with pytest.raises(NestlingError, match=re.escape(words)):
        open_elastic(tmp_path).submodel(wish)


# ---- what is written beside the weights


def test_a_sidecar_lists_budgets_largest_first_and_is_read_back(tmp_path: Path) -> None:
    tiny, small = Submodel(hidden_size=4, layers=(0, 2), mamba_num_heads=2), SMALL
    budgets = {"tiny": tiny, "100%": WHOLE, "small": small}
    written = sidecar(HYBRID, budgets, {"by": "test"}, targets=dict.fromkeys(budgets, Target("parameters", 9)))
    assert written["format"] == FORMAT
    assert list(written["budgets"]) == ["100%", "small", "tiny"]
    assert written["budgets"]["small"] == {
        "target": {"of": "parameters", "value": 9},
        "submodel": {"hidden_size": 8, "mamba_num_heads": 2},
        "parameters": parameters(HYBRID, small),
        "tokens": 0,
    }
    stock.save(HYBRID, tmp_path)
    (tmp_path / "nestling.json").write_text(json.dumps(written))
    elastic = open_elastic(tmp_path)
    assert {name: elastic.submodel(name) for name in elastic.budgets} == {
        name: complete(HYBRID, spec) for name, spec in (("100%", WHOLE), ("small", small), ("tiny", tiny))
    }
    assert list(elastic.budgets) == ["100%", "small", "tiny"]
    assert elastic.sidecar == written
