"""The values: read from configs and JSON, written back, compared; and what is refused, in which words."""

import json
import re
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import stock
from nestling.arch.architecture import Architecture, fields_of
from nestling.arch.presets import PRESETS
from nestling.arch.submodel import WHOLE, Submodel, complete, is_within, layer_sizes, standalone, tensors
from nestling.errors import NestlingError
from strategies import architectures, submodels

HYBRID = Architecture(
    "M-M*-",
    vocab_size=19,
    hidden_size=24,
    intermediate_size=20,
    n_groups=2,
    mamba_num_heads=8,
    mamba_head_dim=4,
    ssm_state_size=3,
    num_key_value_heads=3,
    num_attention_heads=12,
    head_dim=2,
)


def refused(words: str) -> Any:
    return pytest.raises(NestlingError, match=re.escape(words))


# ---- configs


@given(architectures())
def test_an_architecture_survives_its_config(architecture: Architecture) -> None:
    written = json.loads(json.dumps(architecture.to_config({"torch_dtype": "bfloat16"})))
    assert written["torch_dtype"] == "bfloat16"
    assert Architecture.from_config(written) == architecture
    for spelling in ("hybrid_override_pattern", "layers_block_type"):
        assert Architecture.from_config({k: v for k, v in written.items() if k != spelling}) == architecture
    assert hash(Architecture.from_config(written)) == hash(architecture)


@given(architectures())
def test_stock_reads_the_config_as_it_was_meant_and_its_own_is_read_back(architecture: Architecture) -> None:
    config = stock.config(architecture)
    assert config.hybrid_override_pattern == architecture.hybrid_override_pattern
    for field in {field.name for field in fields(architecture)} - {"hybrid_override_pattern", "untied"}:
        assert getattr(config, field) == getattr(architecture, field), field
    assert Architecture.from_config(config.to_dict()) == architecture


def test_bare_configs_have_stock_defaults() -> None:
    from transformers import NemotronHConfig

    assert Architecture.from_config(NemotronHConfig(layers_block_type=["linear_attention"]).to_dict()) == Architecture(
        "M"
    )


@pytest.mark.parametrize(
    ("key", "field", "value"),
    [
        ("mamba_n_groups", "n_groups", 4),
        ("mamba_d_conv", "conv_kernel", 3),
        ("mamba_conv_bias", "use_conv_bias", False),
        ("mamba_dt_min", "time_step_min", 0.25),
        ("num_local_experts", "n_routed_experts", 16),
    ],
)
def test_old_keys_are_read_as_stock_reads_them(key: str, field: str, value: Any) -> None:
    from transformers import NemotronHConfig

    assert getattr(NemotronHConfig(**{key: value}), field) == value
    given = Architecture.from_config({"model_type": "nemotron_h", "hybrid_override_pattern": "ME", key: value})
    assert given == replace(Architecture("ME"), **{field: value})
    assert key not in given.to_config({key: "stale"})


def test_head_dim_as_the_first_published_configs_spell_it() -> None:
    base = {"model_type": "nemotron_h", "hybrid_override_pattern": "*", "attention_head_dim": 64}
    assert Architecture.from_config(base) == Architecture("*", head_dim=64)
    assert Architecture.from_config(base | {"head_dim": 32}) == Architecture("*", head_dim=32)
    written = Architecture("*", head_dim=64).to_config(base)
    assert (written["head_dim"], written["attention_head_dim"]) == (64, 64)


@pytest.mark.parametrize("blocks", [["mamba", "attention", "mlp"], ["linear_attention", "full_attention", "mlp"]])
def test_both_names_of_blocks_are_read(blocks: list[str]) -> None:
    for key in ("layers_block_type", "layer_types"):
        assert Architecture.from_config({"model_type": "nemotron_h", key: blocks}).hybrid_override_pattern == "M*-"


def test_a_written_config_drops_what_would_mislead_a_reader() -> None:
    base = {"auto_map": {"AutoConfig": "x.Y"}, "num_hidden_layers": 62, "chunk_size": 128, "_name_or_path": "elsewhere"}
    written = HYBRID.to_config(base)
    assert not {"auto_map", "untied", "_name_or_path"} & set(written)
    assert written["num_hidden_layers"] == 5
    assert written["chunk_size"] == 128
    assert written["mamba_ssm_cache_dtype"] == "float32"
    assert written["architectures"] == ["NemotronHForCausalLM"]


CONFIG = {"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*-"}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not supported; supported: 'nemotron_h'"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hybrid_override_pattern": "M-X"}, "block kinds ['X'] are unknown; allowed: M, *, -, E"),
        ({"hybrid_override_pattern": ""}, "hybrid_override_pattern is empty"),
        ({"hybrid_override_pattern": None}, "config.json names no layers"),
        ({"hybrid_override_pattern": 5}, "config.json names no layers"),
        ({"layers_block_type": ["full_atention"]}, "'full_atention'; did you mean 'full_attention'?"),
        ({"layers_block_type": [["mlp"]]}, "layers_block_type has ['mlp']"),
        ({"mamba_num_heads": 20}, "mamba_num_heads = 20 cannot be shared by n_groups = 8; nearest: 16, 24"),
        ({"num_attention_heads": 3}, "num_attention_heads = 3 cannot be shared by num_key_value_heads = 8; nearest: 8"),
        ({"hidden_size": "4096"}, "hidden_size must be a positive integer, not '4096'"),
        ({"hidden_size": True}, "hidden_size must be a positive integer, not True"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, not 0"),
        ({"use_bias": "no"}, "use_bias must be true or false, not 'no'"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon must be a number from 0 to 1, not '1e-5'"),
        ({"time_step_min": float("nan")}, "time_step_min must be a number from 0 to 1, not nan"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act = 'silu' is not supported; supported: 'relu2'"),
        ({"mamba_hidden_act": "gelu"}, "mamba_hidden_act = 'gelu' is not supported; supported: 'silu'"),
        ({"attention_bias": True}, "attention_bias = True is not supported; supported: False"),
        ({"moe_latent_size": 8}, "moe_latent_size = 8 is not supported; supported: None"),
        (
            {"hybrid_override_pattern": "E", "num_experts_per_tok": 9},
            "num_experts_per_tok = 9 exceeds n_routed_experts = 8",
        ),
    ],
)
def test_configs_refused(changed: dict[str, Any], words: str) -> None:
    with refused(words):
        Architecture.from_config(CONFIG | changed)


# ---- sub-models


@given(st.data())
def test_a_submodel_survives_its_json(data: st.DataObject) -> None:
    architecture = data.draw(architectures(needs="M*-"))
    mixed = ("intermediate_size", "num_attention_heads", "mamba_num_heads")
    submodel = data.draw(submodels(architecture, per_layer=data.draw(st.sampled_from([(), mixed])), layers=True))
    for value in (submodel, complete(architecture, submodel), WHOLE):
        again = Submodel.from_json(json.loads(json.dumps(value.to_json())))
        assert again == value
        assert hash(again) == hash(value)
        assert {again: 1}[value] == 1


def test_a_submodel_is_spelled_out_once() -> None:
    spelled = complete(HYBRID, Submodel(intermediate_size=(8, 8), layers=(0, 1, 4)))
    assert spelled.to_json() == {
        "layers": [0, 1, 4],
        "hidden_size": 24,
        "intermediate_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 4,
    }  # it keeps no attention layer, so it says nothing of attention heads
    assert complete(HYBRID, spelled) == spelled
    assert complete(HYBRID, Submodel(layers=(0, 3), intermediate_size=())).intermediate_size == 20
    assert Submodel.from_json({"layers": [0]}) == Submodel(layers=(0,)) == Submodel(layers=[0])  # type: ignore[arg-type]


def test_a_lone_size_per_layer_is_that_size() -> None:
    spelled = complete(HYBRID, Submodel(num_attention_heads=(6,)))
    assert spelled.num_attention_heads == 6


def test_standalone_takes_the_widest_and_the_kept_layers() -> None:
    alone = standalone(HYBRID, Submodel(layers=(1, 3, 4), intermediate_size=(8, 12), hidden_size=16))
    assert alone == replace(HYBRID, hybrid_override_pattern="-*-", intermediate_size=12, hidden_size=16)
    assert standalone(HYBRID, WHOLE) == HYBRID


def test_sizes_per_layer_go_to_their_layers() -> None:
    submodel = Submodel(layers=(0, 1, 2, 4), mamba_num_heads=(2, 6), intermediate_size=(7, 9), hidden_size=10)
    sizes = {layer: sizes for layer, _, sizes in layer_sizes(HYBRID, submodel)}
    assert [sizes[layer]["h"] for layer in (0, 2)] == [1, 3]
    assert [sizes[layer]["f"] for layer in (1, 4)] == [7, 9]
    assert {size["d"] for size in sizes.values()} == {10}
    assert [kind for _, kind, _ in layer_sizes(HYBRID, submodel)] == ["M", "-", "M", "-"]


def test_tensors_are_renumbered_and_remember_where_they_come_from() -> None:
    kept = tensors(HYBRID, Submodel(layers=(1, 3)))
    moved = {tensor.name: tensor.source for tensor in kept}
    assert moved["backbone.layers.0.mixer.up_proj.weight"] == "backbone.layers.1.mixer.up_proj.weight"
    assert moved["backbone.layers.1.mixer.q_proj.weight"] == "backbone.layers.3.mixer.q_proj.weight"
    assert [kept[0].name, kept[-2].name, kept[-1].name] == [
        "backbone.embeddings.weight",
        "backbone.norm_f.weight",
        "lm_head.weight",
    ]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"hidden_sizes": 8}, "unknown key 'hidden_sizes'; did you mean 'hidden_size'? (allowed: layers, hidden_size"),
        ({"colour": 8}, "unknown key 'colour'; allowed: layers, hidden_size"),
        ({"n_groups": 1}, "unknown key 'n_groups'"),
        ({"head_dim": 1}, "unknown key 'head_dim'"),
        ({"ssm_state_size": 1}, "unknown key 'ssm_state_size'"),
        (5, 'a sub-model is a JSON object such as {"hidden_size": 4480}, not 5'),
        ({"hidden_size": 25}, "hidden_size = 25 is outside 1 … 24, the size in the whole model"),
        ({"hidden_size": 0}, "hidden_size = 0 is outside 1 … 24"),
        ({"hidden_size": 16.0}, "hidden_size must be an integer, not 16.0"),
        ({"hidden_size": True}, "hidden_size must be an integer, not True"),
        ({"hidden_size": [8, 8]}, "hidden_size must be an integer, not [8, 8]"),
        ({"mamba_head_dim": [2, 4]}, "mamba_head_dim must be an integer, not [2, 4]"),
        ({"intermediate_size": "8"}, "intermediate_size must be an integer, or a list of one per kept layer, not '8'"),
        ({"intermediate_size": [8, 21]}, "intermediate_size = 21 is outside 1 … 20"),
        ({"intermediate_size": [8]}, "intermediate_size lists 1 sizes; the kept layers have 2 of kind mlp"),
        ({"intermediate_size": [8, 8], "layers": [0, 1]}, "intermediate_size lists 2 sizes; the kept layers have 1"),
        ({"mamba_num_heads": 3}, "mamba_num_heads = 3 cannot be shared by n_groups = 2; nearest: 2, 4"),
        ({"mamba_num_heads": [4, 5]}, "mamba_num_heads = 5 cannot be shared by n_groups = 2; nearest: 4, 6"),
        (
            {"num_attention_heads": 4},
            "num_attention_heads = 4 cannot be shared by num_key_value_heads = 3; nearest: 3, 6",
        ),
        ({"layers": 3}, "layers must be a list of layer indices, not 3"),
        ({"layers": ["0"]}, "layers must be a list of layer indices, not ['0']"),
        ({"layers": [0, 5]}, "layer 5 does not exist; the model has layers 0 … 4"),
        ({"layers": [-1]}, "layer -1 does not exist; the model has layers 0 … 4"),
        ({"layers": [1, 0]}, "layers must be ascending indices, each once, at least one; not [1, 0]"),
        ({"layers": [1, 1]}, "layers must be ascending indices, each once, at least one; not [1, 1]"),
        ({"layers": []}, "layers must be ascending indices, each once, at least one; not []"),
    ],
)
def test_submodels_refused(spec: Any, words: str) -> None:
    with refused(words):
        complete(HYBRID, Submodel.from_json(spec))


def test_fewer_experts_than_a_token_uses_are_refused() -> None:
    moe = PRESETS["nemotron-3-nano-30b-a3b"]
    with refused("n_routed_experts must be at least 6: num_experts_per_tok is 6, and transformers needs two"):
        complete(moe, Submodel(n_routed_experts=5))
    assert complete(moe, Submodel(n_routed_experts=6)).n_routed_experts == 6


def test_elastic_fields_are_the_keys_of_a_submodel() -> None:
    assert {"layers", *fields_of("M*-E")} == set(Submodel.__dataclass_fields__)


# ---- nestedness


@pytest.mark.parametrize(
    ("smaller", "larger", "within"),
    [
        (Submodel(hidden_size=8), WHOLE, True),
        (WHOLE, Submodel(hidden_size=8), False),
        (Submodel(hidden_size=8), Submodel(hidden_size=8), True),
        (Submodel(hidden_size=8), Submodel(intermediate_size=8), False),
        (Submodel(layers=(0, 2)), Submodel(layers=(0, 1, 2)), True),
        (Submodel(layers=(0, 2)), Submodel(layers=(0, 1, 3)), False),
        (Submodel(intermediate_size=(8, 10)), Submodel(intermediate_size=(10, 9)), False),
        (Submodel(intermediate_size=(8, 9)), Submodel(intermediate_size=(10, 9)), True),
        (Submodel(layers=(0, 4), intermediate_size=9), Submodel(intermediate_size=(1, 9)), True),
        (Submodel(layers=(0, 4), intermediate_size=9), Submodel(intermediate_size=(9, 1)), False),
    ],
)
def test_is_within(smaller: Submodel, larger: Submodel, within: bool) -> None:
    assert is_within(HYBRID, smaller, larger) is within
