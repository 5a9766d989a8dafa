"""A tiny random model of each published pattern, MoE ones too: saved by stock, sliced, loaded by stock, and counted."""

from dataclasses import replace
from pathlib import Path

import pytest

import nestling
import stock
from nestling.arch.architecture import Architecture
from nestling.arch.presets import PRESETS
from nestling.arch.submodel import Submodel
from nestling.plan import figures


def tiny(name: str) -> Architecture:
    """The preset's layers and flags, at the smallest sizes that still have groups, heads and experts to cut."""
    return replace(
        stock.TINY,
        hybrid_override_pattern=PRESETS[name].hybrid_override_pattern,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=6,
        moe_shared_expert_intermediate_size=10,
    )


def cut(architecture: Architecture) -> Submodel:
    """Every axis that the pattern has is cut, and every third layer dropped but for the attention layers."""
    pattern = architecture.hybrid_override_pattern
    kept = tuple(layer for layer, kind in enumerate(pattern) if layer % 3 or kind == "*")
    experts = {"n_routed_experts": 3, "moe_intermediate_size": 4, "moe_shared_expert_intermediate_size": 7}
    sizes = experts if "E" in pattern else {"intermediate_size": 14}
    return Submodel(kept, hidden_size=10, mamba_num_heads=2, mamba_head_dim=3, num_attention_heads=1, **sizes)


def raw(directory: Path) -> dict[str, tuple[str, list[int], bytes]]:
    stored = stock.tensors(directory)
    return {
        name: (str(value.dtype), list(value.shape), value.contiguous().numpy().tobytes())
        for name, value in stored.items()
    }


@pytest.mark.parametrize("name", PRESETS)
def test_a_tiny_model_of_each_published_pattern_round_trips(tmp_path: Path, name: str) -> None:
    architecture = tiny(name)
    stock.save(architecture, tmp_path / "parent")
    nestling.slice(tmp_path / "parent", "100%", tmp_path / "full")
    assert raw(tmp_path / "full") == raw(tmp_path / "parent")
    nestling.slice(tmp_path / "parent", cut(architecture), tmp_path / "small")
    planned, whole = figures(str(tmp_path / "small")), figures(str(tmp_path / "full"))
    model = stock.load(tmp_path / "small")
    assert planned["parameters"] == stock.numel(model) < whole["parameters"]
    assert whole["parameters"] == stock.numel(stock.load(tmp_path / "full"))
    assert planned["shape"]["hybrid_override_pattern"] == "".join(
        kind for layer, kind in enumerate(architecture.hybrid_override_pattern) if layer % 3 or kind == "*"
    )
    assert stock.logits(model, stock.tokens(16)).isfinite().all()
