"""Permuting and slicing checkpoints: the same function, the ranked parts, nested bit for bit."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import nestling
import stock
from nestling.arch.architecture import Architecture
from nestling.arch.cost import parameters
from nestling.arch.submodel import WHOLE, Submodel, standalone
from nestling.errors import NestlingError
from nestling.weights.elastic import open_elastic
from nestling.weights.ranking import Ranking, identity, read_ranking
from nestling.weights.transform import permute
from strategies import architectures, ranking, rankings, submodels

Fresh = Callable[[], Path]

HYBRID = stock.HYBRID
THREE_QUARTERS = Submodel(
    layers=(0, 1, 3, 4, 5), hidden_size=18, intermediate_size=15, mamba_num_heads=6, num_attention_heads=6
)
HALF = Submodel(
    layers=(0, 1, 3, 5),
    hidden_size=12,
    intermediate_size=10,
    mamba_num_heads=4,
    mamba_head_dim=3,
    num_attention_heads=4,
)


def bits(directory: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Every tensor of a checkpoint: its type, shape and bytes."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        if file.name.startswith("model"):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    data = opened.get_tensor(name)
                    raw = data.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                    found[name] = (str(data.dtype), list(data.shape), raw)
    return found


# ---- permuting


def unchanged(directory: Path, architecture: Architecture, order: Ranking, seed: int) -> None:
    model = stock.save(architecture, directory / "parent", seed)
    permute(directory / "parent", order, directory / "ranked")
    ids = stock.tokens(architecture.vocab_size, seed=seed)
    found = stock.load(directory / "ranked")
    stock.assert_same(stock.logits(stock.float64(found), ids), stock.logits(stock.float64(model), ids))


@given(data=st.data(), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_a_model_with_every_axis_permuted_is_the_same_function(fresh: Fresh, data: st.DataObject, seed: int) -> None:
    architecture = data.draw(architectures(needs="M*-", least=2))
    unchanged(fresh(), architecture, data.draw(rankings(architecture)), seed)


@pytest.mark.parametrize("axis", "dfhpqgGncems")
def test_a_model_with_one_axis_permuted_is_the_same_function(fresh: Fresh, axis: str) -> None:
    architecture = replace(HYBRID, hybrid_override_pattern="M*-E", n_routed_experts=5, moe_intermediate_size=6)
    architecture = replace(architecture, moe_shared_expert_intermediate_size=7)
    directory, order = fresh(), ranking(architecture, 3, axis)
    assert list(order.orders) == [key for key in order.orders if key[0] == axis]
    assert len(order.orders) == 1
    unchanged(directory, architecture, order, 1)
    changed = [k for k, v in bits(directory / "ranked").items() if v != bits(directory / "parent")[k]]
    assert changed, "the permutation moved nothing"


def test_ranked_in_float32_is_within_a_hundred_thousandth(tmp_path: Path) -> None:
    model = stock.save(HYBRID, tmp_path / "parent")
    permute(tmp_path / "parent", ranking(HYBRID, 0, "dfhpq"), tmp_path / "ranked")
    ids = stock.tokens(31, length=40)
    view = nestling.load(tmp_path / "ranked")["100%"]
    stock.assert_same(view(ids).logits, stock.logits(model, ids), 1e-5)


def test_the_identity_ranking_moves_no_byte(tmp_path: Path) -> None:
    stock.save(HYBRID, tmp_path / "parent")
    permute(tmp_path / "parent", identity(HYBRID), tmp_path / "ranked")
    assert bits(tmp_path / "ranked") == bits(tmp_path / "parent")


def test_permuting_back_restores_every_byte(tmp_path: Path) -> None:
    stock.save(HYBRID, tmp_path / "parent")
    order = ranking(HYBRID, 5, "dfpnc")
    back = Ranking({axis: np.argsort(places, -1) for axis, places in order.orders.items()}, order.layers)
    moved = {axis: places for axis, places in order.orders.items() if axis[0] != "n"}  # n is ranked inside its group
    permute(tmp_path / "parent", replace(order, orders=moved), tmp_path / "ranked")
    back = replace(back, orders={axis: back.orders[axis] for axis in moved})
    permute(tmp_path / "ranked", back, tmp_path / "again")
    assert bits(tmp_path / "ranked") != bits(tmp_path / "parent")
    assert bits(tmp_path / "again") == bits(tmp_path / "parent")


def test_a_ranked_directory_says_how_it_was_made(tmp_path: Path) -> None:
    stock.save(HYBRID, tmp_path / "parent")
    order = ranking(HYBRID, 1, "dfhpq")
    order = replace(order, scores={"d": np.arange(24, dtype=np.float32)})
    permute(tmp_path / "parent", order, tmp_path / "ranked", provenance={"samples": 4})
    written = json.loads((tmp_path / "ranked" / "nestling.json").read_text())
    whole = parameters(HYBRID)
    assert written["format"] == 1
    assert written["provenance"] == {"by": f"nestling {nestling.__version__}", "samples": 4}
    assert written["budgets"] == {
        "100%": {
            "target": {"of": "parameters", "value": whole},
            "submodel": {},
            "parameters": whole,
            "tokens": 0,
        }
    }
    again = read_ranking(tmp_path / "ranked")
    assert again is not None
    assert again.layers == order.layers
    assert again.orders.keys() == order.orders.keys()
    assert all(np.array_equal(again.orders[key], places) for key, places in order.orders.items())
    assert np.array_equal(again.scores["d"], order.scores["d"])
    assert read_ranking(tmp_path / "parent") is None


# ---- slicing: what is kept


@given(data=st.data(), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_a_slice_of_a_ranked_model_is_its_best_ranked_parts(fresh: Fresh, data: st.DataObject, seed: int) -> None:
    architecture = data.draw(architectures(needs="M*-", least=2))
    submodel = data.draw(submodels(architecture, layers=data.draw(st.booleans())))
    order, directory = data.draw(rankings(architecture, "dfhpqems")), fresh()
    model = stock.save(architecture, directory / "parent", seed)
    permute(directory / "parent", order, directory / "ranked")
    nestling.slice(directory / "ranked", submodel, directory / "cut")
    by_hand = stock.prune(model, stock.picks(architecture, submodel, order.orders))
    found = stock.load(directory / "cut")
    assert found.state_dict().keys() == by_hand.state_dict().keys()
    for name, value in by_hand.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    ids = stock.tokens(architecture.vocab_size, seed=seed)
    stock.assert_same(stock.logits(found, ids), stock.logits(by_hand, ids), 1e-5)
    assert stock.numel(found) == parameters(architecture, submodel)


def test_heads_are_ranked_inside_their_own_group(tmp_path: Path) -> None:
    """By hand, on one tensor: group 0 keeps its head 3, group 1 its head 1."""
    architecture = replace(HYBRID, hybrid_override_pattern="M*")
    stock.save(architecture, tmp_path / "parent")
    order = Ranking(
        {"h.0": np.array([[3, 0, 1, 2], [1, 0, 2, 3]]), "q.1": np.array([[2, 0, 1, 3], [0, 1, 2, 3]])}, (0, 1)
    )
    permute(tmp_path / "parent", order, tmp_path / "ranked")
    nestling.slice(tmp_path / "ranked", Submodel(mamba_num_heads=2, num_attention_heads=2), tmp_path / "cut")
    parent, cut = stock.tensors(tmp_path / "parent"), stock.tensors(tmp_path / "cut")
    name = "backbone.layers.0.mixer.A_log"
    assert cut[name].tolist() == parent[name][[3, 4 + 1]].tolist()
    name = "backbone.layers.1.mixer.q_proj.weight"
    assert torch.equal(cut[name], parent[name].view(8, 4, 24)[[2, 4 + 0]].reshape(8, 24))


# ---- slicing: nested bit for bit


@given(data=st.data(), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_a_slice_of_a_slice_is_the_slice(fresh: Fresh, data: st.DataObject, seed: int) -> None:
    architecture, directory = data.draw(architectures(needs="M*-")), fresh()
    larger = data.draw(submodels(architecture, layers=True))
    between = standalone(architecture, larger)
    smaller = data.draw(submodels(between, layers=True))
    assert larger.layers is not None
    assert smaller.layers is not None
    stock.save(architecture, directory / "whole", seed)
    nestling.slice(directory / "whole", larger, directory / "larger")
    nestling.slice(directory / "larger", smaller, directory / "twice")
    layers = tuple(larger.layers[layer] for layer in smaller.layers)
    nestling.slice(directory / "whole", replace(larger, **{**smaller.given(), "layers": layers}), directory / "once")
    assert bits(directory / "twice") == bits(directory / "once")
    assert (directory / "twice" / "config.json").read_text() == (directory / "once" / "config.json").read_text()


def test_half_is_a_prefix_of_three_quarters_bit_for_bit(tmp_path: Path) -> None:
    stock.save(HYBRID, tmp_path / "whole")
    nestling.slice(tmp_path / "whole", THREE_QUARTERS, tmp_path / "75")
    nestling.slice(tmp_path / "whole", HALF, tmp_path / "50")
    inside = replace(HALF, layers=(0, 1, 2, 4))  # layers 0, 1, 3, 5 are the larger one's 0, 1, 2, 4
    first = stock.prune(stock.load(tmp_path / "75"), stock.picks(standalone(HYBRID, THREE_QUARTERS), inside))
    found = stock.load(tmp_path / "50").state_dict()
    assert found.keys() == first.state_dict().keys()
    for name, value in first.state_dict().items():
        assert torch.equal(found[name], value), name
    # The plainest cases once more, on the files themselves.
    large, small = stock.tensors(tmp_path / "75"), stock.tensors(tmp_path / "50")
    for name in ("backbone.embeddings.weight", "lm_head.weight", "backbone.norm_f.weight"):
        assert torch.equal(small[name], large[name][..., :12])
    heads = large["backbone.layers.0.mixer.dt_bias"].view(2, 3)
    assert torch.equal(small["backbone.layers.0.mixer.dt_bias"].view(2, 2), heads[:, :2])


@given(data=st.data(), seed=st.integers(0, 99))
@settings(max_examples=8)
def test_the_slice_of_full_size_is_the_model_byte_for_byte(fresh: Fresh, data: st.DataObject, seed: int) -> None:
    architecture, directory = data.draw(architectures()), fresh()
    stock.save(architecture, directory / "whole", seed)
    spelled = nestling.slice(directory / "whole", WHOLE, directory / "full")
    assert standalone(architecture, spelled) == architecture
    assert bits(directory / "full") == bits(directory / "whole")


# ---- slicing: sizes that differ between layers


def test_what_is_padded_is_zero(tmp_path: Path) -> None:
    stock.save(HYBRID, tmp_path / "whole")
    spec = Submodel(intermediate_size=(5, 12), num_attention_heads=(6, 2), hidden_size=20)
    nestling.slice(tmp_path / "whole", spec, tmp_path / "cut", hetero="pad")
    whole, cut = stock.tensors(tmp_path / "whole"), stock.tensors(tmp_path / "cut")
    narrow = "backbone.layers.1.mixer.{}_proj.{}".format
    assert cut[narrow("up", "weight")].shape == (12, 20)
    assert torch.equal(cut[narrow("up", "weight")][:5], whole[narrow("up", "weight")][:5, :20])
    for name, rest in (("up", "weight"), ("up", "bias")):
        assert not cut[narrow(name, rest)][5:].any()
    assert not cut[narrow("down", "weight")][:, 5:].any()
    narrow = "backbone.layers.5.mixer.{}_proj.{}".format
    heads = cut[narrow("q", "weight")].view(2, 3, 4, 20)
    assert torch.equal(heads[:, 0], whole[narrow("q", "weight")].view(2, 4, 4, 24)[:, 0, :, :20])
    assert not heads[:, 1:].any()
    assert not cut[narrow("o", "weight")].view(20, 2, 3, 4)[:, :, 1:].any()
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert (config["intermediate_size"], config["num_attention_heads"]) == (12, 6)


@pytest.mark.parametrize(
    ("spec", "hetero", "words"),
    [
        (
            {"intermediate_size": [5, 12]},
            "auto",
            "intermediate_size differs between layers, and a stock config",
        ),
        ({"num_attention_heads": [2, 4]}, "auto", "--hetero pad fills up to the widest with zeros"),
        (
            {"mamba_num_heads": [2, 4]},
            "pad",
            "mamba_num_heads differs between layers: no checkpoint format can hold that",
        ),
        (
            {"mamba_num_heads": [2, 4]},
            "auto",
            "mamba_num_heads differs between layers: no checkpoint format can hold that",
        ),
        ({"hidden_size": 8}, "zeros", "hetero must be one of auto, pad, code, not 'zeros'"),
        ({"hidden_size": 25}, "auto", "hidden_size = 25 is outside 1 … 24"),
        ({"depth": 2}, "auto", "unknown key 'depth'; allowed: layers, hidden_size"),
        ("55%", "auto", "has no budget '55%'; allowed: 100%"),
    ],
)
def test_refused_before_anything_is_written(tmp_path: Path, spec: Any, hetero: str, words: str) -> None:
    stock.save(HYBRID, tmp_path / "whole")
    with pytest.raises(NestlingError, match=re.escape(words)):
        nestling.slice(tmp_path / "whole", spec, tmp_path / "cut", hetero=hetero)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_equal_sizes_per_layer_need_no_padding(tmp_path: Path) -> None:
    stock.save(HYBRID, tmp_path / "whole")
    spelled = nestling.slice(tmp_path / "whole", {"intermediate_size": [8, 8]}, tmp_path / "cut")
    assert spelled.intermediate_size == 8


# ---- slicing: files


def test_a_slice_is_recorded_and_its_companions_come_along(tmp_path: Path) -> None:
    stock.save(HYBRID, tmp_path / "whole")
    (tmp_path / "whole" / "tokenizer.json").write_text("{}")
    (tmp_path / "whole" / "chat_template.jinja").write_text("hello")
    (tmp_path / "whole" / "notes.txt").write_text("mine")
    spelled = nestling.slice(tmp_path / "whole", HALF, tmp_path / "cut")
    assert spelled.hidden_size == 12
    digest = xxhash.xxh3_128_hexdigest((tmp_path / "cut" / "model.safetensors").read_bytes())
    assert json.loads((tmp_path / "cut" / "nestling-slice.json").read_text()) == {
        "format": 1,
        "by": f"nestling {nestling.__version__}",
        "source": str(tmp_path / "whole"),
        "budget": None,
        "submodel": spelled.to_json(),
        "parameters": parameters(HYBRID, HALF),
        "source_hashes": {},
        "hetero": "auto",
        "attends": True,
        "dtype": None,
        "provenance": {},
        "xxh3_128": {"model.safetensors": digest},
    }
    names = {path.name for path in (tmp_path / "cut").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= names
    assert "notes.txt" not in names
    assert (tmp_path / "cut" / "chat_template.jinja").read_text() == "hello"
    assert open_elastic(tmp_path / "cut").architecture == standalone(HYBRID, HALF)


def test_a_budget_is_sliced_by_its_name(tmp_path: Path) -> None:
    stock.save(HYBRID, tmp_path / "whole")
    budgets = {name: {"submodel": spec.to_json()} for name, spec in (("75%", THREE_QUARTERS), ("Half", HALF))}
    (tmp_path / "whole" / "nestling.json").write_text(json.dumps({"format": 1, "budgets": budgets}))
    nestling.slice(tmp_path / "whole", "half", tmp_path / "named")
    nestling.slice(tmp_path / "whole", HALF.to_json(), tmp_path / "spelled")
    assert bits(tmp_path / "named") == bits(tmp_path / "spelled")
    assert json.loads((tmp_path / "named" / "nestling-slice.json").read_text())["budget"] == "Half"


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    stock.save(HYBRID, tmp_path / "whole")
    seen: list[int] = []
    nestling.slice(tmp_path / "whole", HALF, tmp_path / "cut", advance=seen.append)
    assert sum(seen) == 4 * parameters(HYBRID, HALF)


def test_a_written_config_is_read_by_every_spelling(tmp_path: Path) -> None:
    stock.save(HYBRID, tmp_path / "whole")
    nestling.slice(tmp_path / "whole", HALF, tmp_path / "cut")
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert config["hybrid_override_pattern"] == "M-**"
    assert config["layers_block_type"] == ["linear_attention", "mlp", "full_attention", "full_attention"]
    assert config["mamba_ssm_cache_dtype"] == "float32"


# ---- a checkpoint as published: NVIDIA's config, NVIDIA's tensor names, written by hand

PUBLISHED = {
    "architectures": ["NemotronHForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_nemotron_h.NemotronHConfig",
        "AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM",
    },
    "bos_token_id": 1,
    "chunk_size": 8,
    "conv_kernel": 4,
    "eos_token_id": 12,
    "head_dim": 2,
    "hidden_dropout": 0.0,
    "hidden_size": 12,
    "hybrid_override_pattern": "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
    "initializer_range": 0.02,
    "intermediate_size": 10,
    "layer_norm_epsilon": 1e-05,
    "mamba_head_dim": 2,
    "mamba_hidden_act": "silu",
    "mamba_num_heads": 6,
    "mamba_proj_bias": False,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "model_type": "nemotron_h",
    "n_groups": 2,
    "num_attention_heads": 6,
    "num_hidden_layers": 62,
    "num_key_value_heads": 2,
    "num_logits_to_keep": 1,
    "pad_token_id": 0,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "rms_norm_eps": 1e-05,
    "sliding_window": None,
    "ssm_state_size": 3,
    "tie_word_embeddings": False,
    "time_step_floor": 0.0001,
    "time_step_limit": [0.0, float("inf")],
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "torch_dtype": "float32",
    "transformers_version": "4.51.3",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "use_mamba_kernels": True,
    "vocab_size": 17,
}


def published_tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Hidden 12, 6 Mamba heads of 2 in 2 groups of state 3, 6 / 2 attention heads of 2, FFN 10: shapes in numbers."""
    random = torch.Generator().manual_seed(7)

    def matrix(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=random) / shape[-1] ** 0.5).to(dtype)

    def near(value: float, *shape: int) -> torch.Tensor:
        return (value + 0.3 * torch.randn(*shape, generator=random)).to(dtype)

    stored = {"backbone.embeddings.weight": matrix(17, 12), "backbone.norm_f.weight": near(1, 12)}
    stored["lm_head.weight"] = matrix(17, 12)
    for layer, kind in enumerate(PUBLISHED["hybrid_override_pattern"]):
        mixer = f"backbone.layers.{layer}.mixer."
        stored[f"backbone.layers.{layer}.norm.weight"] = near(1, 12)
        if kind == "M":
            stored[mixer + "in_proj.weight"] = matrix(12 + 12 + 6 + 6 + 6, 12)
            stored[mixer + "conv1d.weight"] = matrix(12 + 6 + 6, 1, 4)
            stored[mixer + "conv1d.bias"] = near(0, 12 + 6 + 6)
            stored[mixer + "dt_bias"] = near(0, 6)
            stored[mixer + "A_log"] = near(0, 6)
            stored[mixer + "D"] = near(1, 6)
            stored[mixer + "norm.weight"] = near(1, 12)
            stored[mixer + "out_proj.weight"] = matrix(12, 12)
        elif kind == "*":
            stored[mixer + "q_proj.weight"] = matrix(12, 12)
            stored[mixer + "k_proj.weight"] = matrix(4, 12)
            stored[mixer + "v_proj.weight"] = matrix(4, 12)
            stored[mixer + "o_proj.weight"] = matrix(12, 12)
        else:
            stored[mixer + "up_proj.weight"] = matrix(10, 12)
            stored[mixer + "down_proj.weight"] = matrix(12, 10)
    return stored


CUT = {
    "layers": [*range(12), 16, 17, *range(50, 62)],
    "hidden_size": 8,
    "intermediate_size": 6,
    "mamba_num_heads": 4,
    "num_attention_heads": 4,
}


def test_a_published_checkpoint_is_read_and_sliced_as_stock_runs_it(tmp_path: Path) -> None:
    stock.write(tmp_path / "12b", PUBLISHED, published_tensors(torch.float32))
    family = nestling.load(tmp_path / "12b", dtype=torch.float64)
    model, ids = stock.float64(stock.load(tmp_path / "12b")), stock.tokens(17)
    stock.assert_same(family["100%"](ids).logits, stock.logits(model, ids), what="whole")
    spelled = nestling.slice(tmp_path / "12b", CUT, tmp_path / "cut")
    sliced = stock.logits(stock.float64(stock.load(tmp_path / "cut")), ids)
    stock.assert_same(family[CUT](ids).logits, sliced, what="cut")
    by_hand = stock.prune(model, stock.picks(family.elastic.architecture, spelled))
    stock.assert_same(sliced, stock.logits(by_hand, ids), what="cut by hand")
    order = ranking(family.elastic.architecture, 2, "dfhpq")
    permute(tmp_path / "12b", order, tmp_path / "ranked")
    ranked = nestling.load(tmp_path / "ranked", dtype=torch.float64)
    stock.assert_same(ranked["100%"](ids).logits, stock.logits(model, ids), what="ranked")
    best = stock.prune(model, stock.picks(family.elastic.architecture, spelled, order.orders))
    stock.assert_same(ranked[CUT](ids).logits, stock.logits(best, ids), what="ranked and cut")


def test_a_published_config_keeps_what_is_not_about_shape(tmp_path: Path) -> None:
    stock.write(tmp_path / "12b", PUBLISHED | {"torch_dtype": "bfloat16"}, published_tensors(torch.bfloat16))
    nestling.slice(tmp_path / "12b", CUT, tmp_path / "cut")
    written = json.loads((tmp_path / "cut" / "config.json").read_text())
    shape = ("hidden_size", "intermediate_size", "mamba_num_heads", "num_attention_heads", "num_hidden_layers")
    gone = {"auto_map", "hybrid_override_pattern", *shape}
    assert {k: v for k, v in written.items() if k in PUBLISHED.keys() - gone} == {
        k: v for k, v in (PUBLISHED | {"torch_dtype": "bfloat16"}).items() if k not in gone
    }
    assert written["hybrid_override_pattern"] == "M-M-M-M*-M-M*--M*-M-M-M-M-"
    assert {key: written[key] for key in shape} == {
        "hidden_size": 8,
        "intermediate_size": 6,
        "mamba_num_heads": 4,
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
    }


def test_bfloat16_passes_through_bit_for_bit(tmp_path: Path) -> None:
    stored = published_tensors(torch.bfloat16)
    stock.write(tmp_path / "12b", PUBLISHED | {"torch_dtype": "bfloat16"}, stored)
    nestling.slice(tmp_path / "12b", WHOLE, tmp_path / "full")
    assert bits(tmp_path / "full") == bits(tmp_path / "12b")
    nestling.slice(tmp_path / "12b", CUT, tmp_path / "cut")
    found = stock.load(tmp_path / "cut")
    assert {value.dtype for value in found.parameters()} == {torch.bfloat16}
    by_hand = stock.prune(
        stock.load(tmp_path / "12b"), stock.picks(open_elastic(tmp_path / "12b").architecture, Submodel.from_json(CUT))
    )
    for name, value in by_hand.state_dict().items():
        assert torch.equal(found.state_dict()[name].view(torch.int16), value.view(torch.int16)), name


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16])
def test_other_types_pass_through_too(tmp_path: Path, dtype: torch.dtype) -> None:
    stock.write(tmp_path / "12b", PUBLISHED, published_tensors(torch.float32) | {"mtp.x": torch.ones(3)})
    mixed = {k: v.to(dtype) if k.endswith("proj.weight") else v for k, v in stock.tensors(tmp_path / "12b").items()}
    stock.write(tmp_path / "mixed", PUBLISHED, mixed)
    nestling.slice(tmp_path / "mixed", {"hidden_size": 8}, tmp_path / "cut")
    cut = stock.tensors(tmp_path / "cut")
    name = "backbone.layers.7.mixer.q_proj.weight"
    assert cut[name].dtype == dtype
    assert torch.equal(cut[name].view(torch.uint8), mixed[name][:, :8].contiguous().view(torch.uint8))
    assert "mtp.x" not in cut
