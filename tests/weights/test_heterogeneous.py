"""Checkpoints that bring their own code: every layer has its own size on disk, and transformers runs it as it is.

The oracle is pruned by hand, each layer a stock block of its own; its tensors are written under their on-disk names.
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import stock
from nestling.arch.architecture import Architecture
from nestling.arch.cost import parameters
from nestling.arch.submodel import Submodel, standalone, tensors
from nestling.errors import NestlingError
from nestling.weights.heterogeneous import code_config, copy_code, per_layer_sizes
from strategies import architectures, submodels

Fresh = Callable[[], Path]
PER_LAYER = ("intermediate_size", "num_attention_heads")

HYBRID = replace(
    stock.HYBRID, hybrid_override_pattern="M-M*-*-*-*-*", mamba_num_heads=6, num_attention_heads=6, use_bias=False
)
MIXED = Submodel(hidden_size=16, intermediate_size=(8, 12, 3, 12, 6), num_attention_heads=(2, 4, 4, 2, 4))


def written(directory: Path, architecture: Architecture, submodel: Submodel, seed: int = 0) -> torch.nn.Module:
    """Write the sub-model of a random model with its code; returns the stock model of the same weights."""
    whole = stock.build(architecture, seed)
    oracle = stock.prune(whole, stock.picks(architecture, submodel))
    stock.write(
        directory, code_config(architecture, submodel, json.loads(whole.config.to_json_string())), on_disk(oracle)
    )
    copy_code(directory)
    return oracle


def on_disk(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights under the published names: `backbone.` in front, and one tensor per expert."""
    stored = {}
    for name, value in model.state_dict().items():
        name = re.sub(r"^model\.", "backbone.", name)
        if value.ndim == 3 and ".experts." in name:
            stored |= {name.replace("experts.", f"experts.{e}.") + ".weight": v.clone() for e, v in enumerate(value)}
        else:
            stored[name] = value
    return stored


def load(directory: Path) -> torch.nn.Module:
    given = {"trust_remote_code": True, "output_loading_info": True, "experts_implementation": stock.EXPERTS}
    model, info = AutoModelForCausalLM.from_pretrained(directory, **given)
    assert not any(info.values()), info
    return model.eval()


def generated(model: torch.nn.Module, ids: torch.Tensor, use_cache: bool = True) -> list[list[int]]:
    return model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, use_cache=use_cache).tolist()


# ---- in transformers


@given(data=st.data(), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_transformers_runs_every_layer_at_its_own_size(fresh: Fresh, data: st.DataObject, seed: int) -> None:
    architecture = data.draw(architectures(needs="**--", max_layers=6, least=2))
    submodel = data.draw(submodels(architecture, per_layer=PER_LAYER, layers=data.draw(st.booleans())))
    directory = fresh()
    oracle = written(directory, architecture, submodel, seed)
    found, ids = load(directory), stock.tokens(architecture.vocab_size, seed=seed)
    stock.assert_same(stock.logits(found, ids), stock.logits(oracle, ids), 1e-5)
    assert stock.numel(found) == stock.numel(oracle) == parameters(architecture, submodel)
    if "full_attention" in found.config.layers_block_type:  # stock's own cache needs one
        assert generated(found, ids) == generated(oracle, ids)

    config = json.loads((directory / "config.json").read_text())
    again = tensors(Architecture.from_config(config), Submodel(**per_layer_sizes(config)))
    assert {t.name: t.shape for t in again} == {name: (*v.shape,) for name, v in stock.tensors(directory).items()}


def test_generation_with_a_cache_is_generation_without(tmp_path: Path) -> None:
    written(tmp_path, HYBRID, MIXED)
    found, ids = load(tmp_path), stock.tokens(31, batch=4)
    cached = generated(found, ids)
    assert cached == generated(found, ids, use_cache=False)
    assert len({tuple(row[11:]) for row in cached}) > 1


def test_what_transformers_saves_loads_again(tmp_path: Path) -> None:
    oracle = written(tmp_path / "first", HYBRID, MIXED)
    load(tmp_path / "first").save_pretrained(tmp_path / "again")
    ids = stock.tokens(31)
    assert torch.equal(stock.logits(load(tmp_path / "again"), ids), stock.logits(oracle, ids))
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["architectures"] == ["NemotronHForCausalLM"], "vLLM would not know it"
    assert "01" in saved["per_layer_config"]
    assert per_layer_sizes(saved) == {field: getattr(MIXED, field) for field in PER_LAYER}
    assert stock.tensors(tmp_path / "again").keys() == stock.tensors(tmp_path / "first").keys()


def test_the_model_without_its_head_and_one_with_fresh_weights(tmp_path: Path) -> None:
    oracle = written(tmp_path, HYBRID, MIXED)
    base, info = AutoModel.from_pretrained(tmp_path, trust_remote_code=True, output_loading_info=True)
    assert info["missing_keys"] == set()
    assert info["unexpected_keys"] == {"lm_head.weight"}
    ids = stock.tokens(31)
    assert torch.equal(base(ids).last_hidden_state, oracle.model(ids).last_hidden_state)
    fresh = AutoModelForCausalLM.from_config(base.config, trust_remote_code=True)
    assert stock.numel(fresh) == stock.numel(oracle)


def test_without_its_code_it_is_refused_and_stock_checkpoints_still_load(tmp_path: Path) -> None:
    written(tmp_path / "own", HYBRID, MIXED)
    stock.save(HYBRID, tmp_path / "stock")
    load(tmp_path / "own")
    with pytest.raises(RuntimeError, match="'intermediate_size' is a per-layer attribute"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "own", trust_remote_code=False)
    stock.load(tmp_path / "stock")


# ---- the config


def test_the_config_is_stock_s_of_the_widest_layers_and_says_what_each_has(tmp_path: Path) -> None:
    submodel = replace(MIXED, layers=(0, 1, 3, 4, 5), intermediate_size=(8, 12), num_attention_heads=(4, 2))
    written(tmp_path, HYBRID, submodel)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["NemotronHForCausalLM"]
    assert (config["hybrid_override_pattern"], config["num_hidden_layers"]) == ("M-*-*", 5)
    assert (config["intermediate_size"], config["num_attention_heads"], config["hidden_size"]) == (12, 4, 16)
    assert list(config["per_layer_config"].items()) == [
        ("1", {"intermediate_size": 8}),
        ("2", {"num_attention_heads": 4}),
        ("3", {"intermediate_size": 12}),
        ("4", {"num_attention_heads": 2}),
    ]
    read = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    own = [read.get_nemotron_h_config_for_layer(layer) for layer in range(5)]  # as vLLM asks
    assert [own[layer].intermediate_size for layer in (1, 3)] == [8, 12]
    assert [own[layer].num_attention_heads for layer in (2, 4)] == [4, 2]
    assert (read.intermediate_size, read.num_attention_heads) == (12, 4)


def test_a_stock_config_made_from_one_keeps_nothing_of_it() -> None:
    config = code_config(HYBRID, MIXED, {"model_type": "nemotron_h"})
    again = standalone(HYBRID, MIXED).to_config(config)
    assert not {"per_layer_config", "auto_map"} & again.keys()
    assert per_layer_sizes(again) == {}


def test_a_size_left_out_is_the_widest() -> None:
    config = HYBRID.to_config({}) | {"per_layer_config": {"04": {"intermediate_size": 5}, "5": {}}}
    assert per_layer_sizes(config) == {"intermediate_size": (20, 5, 20, 20, 20)}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([8, 12], "per_layer_config must be an object such as"),
        ({"12": {}}, "layer '12' does not exist; the model has layers 0 … 11"),
        ({"-1": {}}, "layer '-1' does not exist"),
        ({"": {}}, "layer '' does not exist"),
        ({"٣": {}}, "layer '٣' does not exist"),
        ({"9" * 5000: {}}, "does not exist"),
        ({"4": {}, "04": {}}, "names layer 4 twice"),
        ({"1": 8}, "layer 1 must be an object of sizes, not 8"),
        ({"1": {"num_attention_heads": 2}}, "layer 1 (mlp) cannot have its own num_attention_heads; allowed: interm"),
        ({"0": {"mamba_num_heads": 2}}, "layer 0 (linear_attention) cannot have its own mamba_num_heads; allowed: not"),
        ({"3": {"skip": ["mlp"]}}, "layer 3 (full_attention) cannot have its own skip; allowed: num_attention_heads"),
        ({"1": {"intermediate_size": "8"}}, "intermediate_size of layer 1 must be an integer, not '8'"),
        ({"1": {"intermediate_size": True}}, "intermediate_size of layer 1 must be an integer, not True"),
        ({"1": {"intermediate_size": 21}}, "intermediate_size = 21 is outside 1 … 20"),
        ({"1": {"intermediate_size": 0}}, "intermediate_size = 0 is outside 1 … 20"),
        ({"3": {"num_attention_heads": 3}}, "num_attention_heads = 3 cannot be shared by num_key_value_heads = 2"),
    ],
)
def test_a_broken_per_layer_config_is_refused(given: Any, words: str) -> None:
    with pytest.raises(NestlingError, match=re.escape(words)) as caught:
        per_layer_sizes(HYBRID.to_config({}) | {"per_layer_config": given})
    assert "per_layer_config" in str(caught.value)
