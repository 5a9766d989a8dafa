"""`verify` shows what holds and names what does not."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import nestling
import stock
from nestling.arch.submodel import Architecture, Submodel
from nestling.weights.slicing import SLICE_FILE
from nestling.weights.verify import verify

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


def test_only_slices_can_be_inside(family: Path) -> None:
    with pytest.raises(nestling.NestlingError, match="only slices can be looked up"):
        verify(family / "whole", family / "larger")
