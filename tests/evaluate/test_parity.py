"""`slice --verify`: a slice in stock transformers is its view, and one that is not is refused."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import stock
from nestling.arch.architecture import Architecture
from nestling.arch.submodel import Submodel
from nestling.errors import NestlingError
from nestling.evaluate import parity as module
from nestling.evaluate.parity import parity
from nestling.evaluate.subject import open_subjects
from nestling.weights.cut import Output
from nestling.weights.slicing import plan_slices

MODEL = Architecture(
    "M-*-",
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
MIXED = Submodel(hidden_size=20, intermediate_size=(20, 12))
PLAIN = Submodel(hidden_size=20, intermediate_size=12, mamba_num_heads=2)


def cut(directory: Path, submodel: Submodel, **how: str) -> Output:
    stock.save(MODEL, directory / "whole")
    plan = plan_slices(directory / "whole", {directory / "cut": submodel}, **how)  # type: ignore[arg-type]
    plan.write()
    return plan.outputs[directory / "cut"]


@pytest.mark.parametrize(
    ("submodel", "how"),
    [
        (PLAIN, {}),
        (PLAIN, {"dtype": "bf16"}),
        (PLAIN, {"dtype": "fp16"}),
        (MIXED, {"hetero": "pad"}),
        (MIXED, {"hetero": "code"}),
    ],
)
def test_every_form_is_its_view(tmp_path: Path, submodel: Submodel, how: dict[str, str]) -> None:
    assert "equal the view's to" in parity(cut(tmp_path, submodel, **how), tmp_path / "cut")


def test_sizes_per_layer_are_not_run_by_another_engine_than_asked_for(tmp_path: Path) -> None:
    cut(tmp_path, MIXED, hetero="code")
    with pytest.raises(NestlingError, match="sizes of its own per layer, which --backend nestling cannot run"):
        open_subjects(tmp_path / "cut", [], "nestling")


@pytest.mark.parametrize(
    "name", ["backbone.layers.0.mixer.D", "backbone.layers.3.mixer.up_proj.weight", "lm_head.weight"]
)
def test_one_changed_tensor_is_refused(tmp_path: Path, name: str) -> None:
    output = cut(tmp_path, PLAIN)
    stored = load_file(tmp_path / "cut" / "model.safetensors")
    stored[name] *= 1.001
    save_file(stored, tmp_path / "cut" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NestlingError, match="differ from the view inside .* Do not use it"):
        parity(output, tmp_path / "cut")


def test_a_slice_without_attention_is_compared_too(tmp_path: Path) -> None:
    assert "equal the view's to" in parity(cut(tmp_path, Submodel(layers=(0, 1))), tmp_path / "cut")


def test_too_little_memory_is_said_with_the_way_that_needs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = cut(tmp_path, PLAIN)
    monkeypatch.setattr(module, "_available_memory", lambda: 1000)
    with pytest.raises(NestlingError, match="needs 51.45 kB of memory, 1.00 kB are free.*SLICE --inside ELASTIC"):
        parity(output, tmp_path / "cut")
