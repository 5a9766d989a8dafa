"""`verify` shows what holds and names what does not."""

import inspect
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers.models.nemotron_h import modeling_nemotron_h

import nestling
import stock
from nestling.arch.architecture import Architecture
from nestling.arch.submodel import Submodel
from nestling.weights.header import read_header
from nestling.weights.side_files import SLICE_FILE
from nestling.weights.verify import check_finite, config_differences, verify

MODEL = Architecture(
    "M-*-M",
    vocab_size=32,
    hidden_size=24,
    intermediate_size=32,
    n_groups=2,
    mamba_num_heads=4,
    mamba_head_dim=6,
    ssm_state_size=4,
    num_key_value_heads=2,
    num_attention_heads=4,
    head_dim=4,
)
LARGER = Submodel(layers=(0, 1, 2, 4), hidden_size=20, intermediate_size=24)
SMALLER = Submodel(layers=(0, 2, 4), hidden_size=16, mamba_num_heads=2, num_attention_heads=2)


@pytest.fixture
def family(tmp_path: Path) -> Path:
    stock.save(MODEL, tmp_path / "whole")
    nestling.slice(tmp_path / "whole", LARGER, tmp_path / "larger")
    nestling.slice(tmp_path / "whole", SMALLER, tmp_path / "smaller")
    return tmp_path


def change(directory: Path, name: str, to: float, *, forget: bool = True) -> None:
    """Overwrite the first value of a tensor with another tool; forget: and the recorded checksum."""
    tensors = load_file(directory / "model.safetensors")
    tensors[name] = tensors[name].copy()
    tensors[name].flat[0] = to
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    if forget:
        (directory / SLICE_FILE).write_text((directory / SLICE_FILE).read_text().replace('"xxh3_128"', '"was"'))


def test_a_slice_is_inside_the_whole_and_inside_a_larger_slice(family: Path) -> None:
    for outer in ("whole", "larger"):
        assert any("bit for bit" in line for line in verify(family / "smaller", family / outer))
    assert len(verify(family / "whole")) == 2  # nothing recorded its checksum
    assert len(verify(family / "larger")) == 3


def test_a_slice_of_a_slice_is_inside_it(family: Path) -> None:
    nestling.slice(family / "larger", Submodel(layers=(0, 3), hidden_size=8), family / "inner")
    assert any("bit for bit" in line for line in verify(family / "inner", family / "larger"))


def test_a_larger_slice_is_not_inside_a_smaller_one(family: Path) -> None:
    with pytest.raises(nestling.NestlingError, match="smaller: .*layer 1, which"):
        verify(family / "larger", family / "smaller")


def test_one_changed_value_is_found(family: Path) -> None:
    change(family / "smaller", "backbone.layers.1.mixer.q_proj.weight", 7.0)
    assert verify(family / "smaller")
    with pytest.raises(
        nestling.NestlingError, match=r"layers\.1\.mixer\.q_proj\.weight is not the prefix of .*layers\.2"
    ):
        verify(family / "smaller", family / "whole")


def test_a_file_that_changed_is_named(family: Path) -> None:
    change(family / "smaller", "lm_head.weight", 7.0, forget=False)
    with pytest.raises(nestling.NestlingError, match=r"model\.safetensors: is not what was written here"):
        verify(family / "smaller")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(family: Path, bad: float) -> None:
    change(family / "smaller", "backbone.layers.0.mixer.D", bad)
    with pytest.raises(nestling.NestlingError, match=r"layers\.0\.mixer\.D has values that are not finite"):
        verify(family / "smaller")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38, -1.0, 0.0])
def test_bfloat16_is_judged_as_torch_does(family: Path, value: float) -> None:
    import torch
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    tensors = {name: tensor.bfloat16() for name, tensor in load(family / "whole" / "model.safetensors").items()}
    tensors["lm_head.weight"][3, 2] = value
    save(tensors, family / "whole" / "model.safetensors", metadata={"format": "pt"})
    if torch.isfinite(torch.tensor(value, dtype=torch.bfloat16)):
        assert verify(family / "whole")
    else:
        with pytest.raises(nestling.NestlingError, match=r"lm_head\.weight"):
            verify(family / "whole")


def reconfigure(directory: Path, **changed: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


@pytest.mark.parametrize(
    "changed",
    [
        {"layer_norm_epsilon": 0.1},
        {"time_step_min": 0.3},
        {"n_groups": 4, "ssm_state_size": 2},  # every tensor keeps its shape
        {"num_key_value_heads": 1, "head_dim": 8, "num_attention_heads": 1},
    ],
)
def test_a_config_that_computes_something_else_is_named_field_by_field(family: Path, changed: dict[str, Any]) -> None:
    import torch

    cut = family / "grouped"
    nestling.slice(family / "whole", {"num_attention_heads": 2, "hidden_size": 16}, cut)
    before = stock.logits(stock.load(cut), stock.tokens(32))
    reconfigure(cut, **changed)
    assert verify(cut)
    after = stock.logits(stock.load(cut), stock.tokens(32))  # the same tensors in stock, another function
    assert not torch.allclose(before, after, atol=1e-3)
    with pytest.raises(nestling.NestlingError, match=r"config\.json: not what cutting writes") as caught:
        verify(cut, family / "whole")
    for key, value in changed.items():
        assert f"{key} is {value!r}, not " in str(caught.value)


def test_what_stock_reads_of_a_config_is_compared() -> None:
    """Every field that stock's source reads, but for those that change no result of a forward pass in eval mode."""
    source = inspect.getsource(modeling_nemotron_h)
    read = set(re.findall(r"config\.([a-z_]+)", source)) - {"get_text_config", "_attn_implementation", "layer_types"}
    training = {"attention_dropout", "initializer_range", "rescale_prenorm_residual"}
    training |= {"time_step_floor", "time_step_max"}  # of fresh values
    speed = {"chunk_size", "use_mamba_kernels", "num_logits_to_keep"}
    refused = {
        "mamba_hidden_act",
        "mlp_hidden_act",
        "moe_latent_size",
        "n_group",
        "topk_group",
    }  # any but one value, when a config is read
    shape = {"layers_block_type", "num_hidden_layers", "num_local_experts"}  # of the pattern and the experts
    config = Architecture("M*-E", num_experts_per_tok=1).to_config({})
    for key in read - training - speed - refused - shape:
        other = {key: 2 * config[key] if type(config.get(key)) is int else 0.125}
        if type(config.get(key)) is bool or key == "norm_topk_prob":
            other = {key: not config.get(key, True)}
        assert [line.split()[0] for line in differences(config | other, config)] == [key]


def differences(mine: dict[str, Any], planned: dict[str, Any]) -> list[str]:
    return list(config_differences(mine, planned))


def test_fields_that_change_nothing_and_other_spellings_are_no_difference() -> None:
    config = Architecture("M*-").to_config({"chunk_size": 8})
    harmless = {"use_cache": False, "eos_token_id": 7, "chunk_size": 64, "n_routed_experts": 3, "dtype": "bfloat16"}
    assert differences(config | harmless | {"routed_scaling_factor": 9.0}, config) == []
    older = {key: value for key, value in config.items() if key not in ("n_groups", "layers_block_type")}
    assert differences(older | {"mamba_n_groups": 8}, config) == []
    assert differences({"model_type": "nemotron_h", "hybrid_override_pattern": "M*-"}, config) == []
    assert differences(config | {"tie_word_embeddings": True}, config) == ["tie_word_embeddings is True, not False"]
    assert len(differences(config | {"time_step_limit": [0.0, 0.1]}, config)) == 1


@pytest.mark.parametrize(
    ("code", "dtype"),
    [
        ("F8_E4M3", "float8_e4m3fn"),
        ("F8_E5M2", "float8_e5m2"),
        ("F8_E4M3FNUZ", "float8_e4m3fnuz"),
        ("F8_E5M2FNUZ", "float8_e5m2fnuz"),
        ("F8_E8M0", "float8_e8m0fnu"),
    ],
)
def test_every_eight_bit_pattern_is_finite_where_torch_says_so(tmp_path: Path, code: str, dtype: str) -> None:
    import torch

    values = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(getattr(torch, dtype)).float()
    for bits, finite in enumerate(values.isfinite().tolist()):
        header = json.dumps({"t": {"dtype": code, "shape": [2], "data_offsets": [0, 2]}}).encode()
        (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + bytes([8, bits]))
        (entry,) = read_header(tmp_path / "x")
        if finite:
            check_finite(entry)
        else:
            with pytest.raises(nestling.NestlingError, match="not finite"):
                check_finite(entry)


def test_one_file_is_spoken_of_as_one(family: Path) -> None:
    assert "1 weight file has its recorded xxh3_128" in verify(family / "larger")


def test_only_slices_can_be_inside(family: Path) -> None:
    with pytest.raises(nestling.NestlingError, match="only slices can be looked up"):
        verify(family / "whole", family / "larger")
