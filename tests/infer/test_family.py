"""A family: every size from one storage."""

import json
from pathlib import Path

import pytest
import torch

import nestling
import stock
from nestling.arch.architecture import Architecture
from nestling.arch.cost import parameters
from nestling.arch.submodel import WHOLE, Submodel, complete
from nestling.errors import NestlingError
from nestling.infer.family import Family, View
from nestling.model.cache import Cache
from nestling.model.width import hard, prefix

HYBRID = Architecture(
    "M-*",
    vocab_size=19,
    hidden_size=12,
    intermediate_size=10,
    n_groups=1,
    mamba_num_heads=4,
    mamba_head_dim=3,
    ssm_state_size=2,
    num_key_value_heads=1,
    num_attention_heads=4,
    head_dim=2,
)
HALF = Submodel(hidden_size=8, intermediate_size=5, num_attention_heads=2, mamba_num_heads=2)


@pytest.fixture
def family(tmp_path: Path) -> Family:
    stock.save(HYBRID, tmp_path)
    budgets = {"100%": {"submodel": {}}, "Half": {"submodel": HALF.to_json()}}
    (tmp_path / "nestling.json").write_text(json.dumps({"format": 1, "budgets": budgets}))
    return nestling.load(tmp_path)


def test_a_family_is_a_mapping_of_its_budgets(family: Family) -> None:
    assert list(family) == ["100%", "Half"]
    assert len(family) == 2
    assert "half" in family
    assert "HALF" in family
    assert "75%" not in family
    assert 3 not in family
    assert {name: view.submodel for name, view in family.items()} == {
        "100%": complete(HYBRID, WHOLE),
        "Half": complete(HYBRID, HALF),
    }


def test_a_size_is_looked_up_by_name_value_or_json(family: Family) -> None:
    ids = stock.tokens(19)
    expected = family["Half"](ids).logits
    for wish in ("half", HALF, HALF.to_json(), complete(HYBRID, HALF)):
        assert isinstance(family[wish], View)
        assert family[wish].submodel == complete(HYBRID, HALF)
        assert torch.equal(family[wish](ids).logits, expected)
    assert family["Half"].parameters == parameters(HYBRID, HALF) < family["100%"].parameters


def test_a_family_shows_its_sizes_and_not_its_tensors(family: Family) -> None:
    assert repr(family).endswith("', 100%, Half)")
    assert len(repr(family)) < 200


@pytest.mark.parametrize("wish", ["no", "400%", {"hidden_size": 13}, Submodel(layers=(9,)), {"hidden": 1}])
def test_an_unknown_size_is_refused(family: Family, wish: object) -> None:
    with pytest.raises(NestlingError):
        family[wish]


def test_all_sizes_are_views_of_one_storage(family: Family) -> None:
    assert family["Half"].model is family["100%"].model is family.model
    stored = family.model.on_disk()
    (_, narrow), *_ = (pair for pair in family["Half"].widths.layers if pair[0] == 1)
    block = family.model.layers[1]
    for name, shape in (("mixer.up_proj.weight", (5, 8)), ("mixer.down_proj.weight", (8, 5)), ("norm.weight", (8,))):
        whole, part = (
            stored[f"backbone.layers.1.{name}"],
            prefix(block.get_parameter(name), block.layouts[name], narrow),
        )
        assert part.shape == shape
        assert part.data_ptr() == whole.data_ptr()
        assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_using_sizes_makes_no_parameters_and_changes_none(family: Family) -> None:
    ids = stock.tokens(19)
    before = {name: (value.data_ptr(), value.clone()) for name, value in family.model.on_disk().items()}
    first = family["Half"](ids).logits
    family["100%"](ids)
    assert torch.equal(family["Half"](ids).logits, first)
    for name, value in family.model.on_disk().items():
        assert value.data_ptr() == before[name][0]
        assert torch.equal(value, before[name][1])
        assert not value.requires_grad


def test_a_change_in_the_storage_is_seen_by_every_size(family: Family) -> None:
    ids = stock.tokens(19)
    sizes = {name: view(ids).logits for name, view in family.items()}
    with torch.no_grad():
        family.model.on_disk()["backbone.norm_f.weight"].mul_(2)
    for name, view in family.items():
        torch.testing.assert_close(view(ids).logits, 2 * sizes[name])


def test_the_stored_dtype_is_kept_and_another_is_a_copy(tmp_path: Path, family: Family) -> None:
    assert {value.dtype for value in family.model.parameters()} == {torch.float32}
    assert not family.model.training
    exact = nestling.load(tmp_path, dtype=torch.float64)
    assert {value.dtype for value in exact.model.parameters()} == {torch.float64}
    ids = stock.tokens(19)
    stock.assert_same(family["half"](ids).logits.double(), exact["half"](ids).logits, 1e-5)


def test_each_size_decodes_with_its_own_cache(family: Family) -> None:
    ids = stock.tokens(19)
    caches = {name: Cache() for name in family}
    for name, view in family.items():
        expected = view(ids).logits
        parts = [view(piece, cache=caches[name]).logits for piece in ids.split([4, 3, 1, 1, 1, 1], 1)]
        stock.assert_same(torch.cat(parts, 1), expected, 1e-5)
    assert caches["Half"].layers[0]["ssm"].shape == (2, 1, 2, 3, 2)
    assert caches["100%"].layers[0]["ssm"].shape == (2, 1, 4, 3, 2)


def test_loading_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(NestlingError, match="no such directory"):
        nestling.load(tmp_path / "nowhere")


def test_widths_are_remembered_not_rebuilt(family: Family) -> None:
    assert family["half"].widths is family[HALF].widths is hard(HYBRID, complete(HYBRID, HALF))
