"""The search space, wishes for a size, and the family that is read out of a router's picks: nested and on budget."""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stock
from nestling.arch.architecture import Architecture
from nestling.arch.cost import parameters
from nestling.arch.nesting import read_out
from nestling.arch.presets import PRESETS
from nestling.arch.search import SearchSpace, layer_order, pick
from nestling.arch.submodel import WHOLE, Submodel, complete, is_within, layer_sizes, standalone
from nestling.arch.targets import LEAST, Target, parse_target
from nestling.errors import NestlingError

HYBRID = replace(stock.LONG, hidden_size=64, intermediate_size=256, mamba_num_heads=8)
FINE = {
    "hidden_size": range(24, 64, 4),
    "intermediate_size": range(32, 256, 8),
    "mamba_num_heads": [6],
    "mamba_head_dim": [12],
    "num_attention_heads": [4],
    "layers": [6, 7],
}
COARSE = {"hidden_size": [16, 40], "intermediate_size": [192], "mamba_num_heads": [4], "layers": [3, 6]}


def picks_from(space: SearchSpace) -> st.SearchStrategy[dict[str, int]]:
    return st.fixed_dictionaries({field: st.sampled_from(sizes) for field, sizes in space.candidates})


def orders(architecture: Architecture) -> st.SearchStrategy[tuple[int, ...]]:
    layers = range(len(architecture.hybrid_override_pattern))
    return st.permutations(layers).map(lambda ranked: layer_order(architecture, ranked))


def counts(values: Mapping[str, int]) -> dict[str, Target]:
    return {name: Target("parameters", value) for name, value in values.items()}


def check_family(architecture: Architecture, family: Mapping[str, Submodel], targets: Mapping[str, Target]) -> None:
    """Largest first, on budget, nested for every pair, and never without an attention layer."""
    assert list(family) == sorted(targets, key=lambda name: -targets[name].value)
    for name, submodel in family.items():
        count = parameters(architecture, submodel)
        assert 0.98 * targets[name].value <= count <= targets[name].value, name
        assert any(kind == "*" for _, kind, _ in layer_sizes(architecture, submodel)), name
    for larger, smaller in itertools.combinations(family.values(), 2):
        assert is_within(architecture, smaller, larger)
        assert set(smaller.layers) <= set(larger.layers)
        for field, size in smaller.given().items():
            assert field == "layers" or size <= getattr(larger, field), field


# ---- reading out


@given(data=st.data(), shares=st.lists(st.floats(0.4, 0.97), min_size=1, max_size=4, unique=True))
@settings(max_examples=30)
def test_any_picks_become_a_nested_family_on_budget(data: st.DataObject, shares: list[float]) -> None:
    space = SearchSpace.of(HYBRID, FINE)
    whole = parameters(HYBRID)
    targets = counts({"full": whole} | {f"size {i}": int(share * whole) for i, share in enumerate(shares)})
    order = data.draw(orders(HYBRID))
    picks = {name: data.draw(picks_from(space)) for name in targets if name != "full"}
    family = read_out(HYBRID, order, space, targets, picks)
    check_family(HYBRID, family, targets)
    assert family["full"] == complete(HYBRID, WHOLE)


@given(data=st.data(), shares=st.lists(st.floats(0.1, 0.97), min_size=2, max_size=2, unique=True))
@settings(max_examples=40)
def test_a_family_is_refused_exactly_when_no_combination_of_candidates_fits(
    data: st.DataObject, shares: list[float]
) -> None:
    space, whole = SearchSpace.of(HYBRID, COARSE), parameters(HYBRID)
    targets = counts({n: int(share * whole) for n, share in zip("AB", sorted(shares, reverse=True), strict=True)})
    order = data.draw(orders(HYBRID))
    picks = {name: data.draw(picks_from(space)) for name in targets}
    try:
        family = read_out(HYBRID, order, space, targets, picks)
    except NestlingError as error:
        failed = "A" if "budget A" in str(error) else "B"
        within = WHOLE if failed == "A" else read_out(HYBRID, order, space, {"A": targets["A"]}, picks)["A"]
        assert not any(fits(size, targets[failed].value) for size in members(space, order, within))
    else:
        check_family(HYBRID, family, targets)


def fits(submodel: Submodel, target: int) -> bool:
    return LEAST * target <= parameters(HYBRID, submodel) <= target


def members(space: SearchSpace, order: tuple[int, ...], within: Submodel) -> list[Submodel]:
    """Every sub-model of the space, its FFN in steps of 8, that lies within another."""
    axes = dict(space.candidates) | {"intermediate_size": tuple(range(192, 257, 8))}
    every = (pick(HYBRID, order, dict(zip(axes, sizes, strict=True))) for sizes in itertools.product(*axes.values()))
    return [submodel for submodel in every if is_within(HYBRID, submodel, within)]


def test_both_outcomes_of_the_coarse_space_occur() -> None:
    space, order, whole = SearchSpace.of(HYBRID, COARSE), layer_order(HYBRID, range(8)), parameters(HYBRID)
    picked = {"A": {field: sizes[-1] for field, sizes in space.candidates}}
    results = []
    for percent in range(5, 100):
        try:
            read_out(HYBRID, order, space, counts({"A": whole * percent // 100}), picked)
            results.append(True)
        except NestlingError:
            results.append(False)
    assert 10 < sum(results) < 85


def test_picks_that_can_be_met_are_kept_and_only_the_ffn_is_adjusted() -> None:
    space, order = SearchSpace.of(HYBRID, FINE), layer_order(HYBRID, range(8))
    wanted = {"hidden_size": 52, "mamba_num_heads": 6, "mamba_head_dim": 12, "num_attention_heads": 4, "layers": 7}
    for ffn in (96, 104, 200):
        target = parameters(HYBRID, pick(HYBRID, order, wanted | {"intermediate_size": ffn})) + 5
        given = {"A": wanted | {"intermediate_size": 32}}
        found = read_out(HYBRID, order, space, counts({"A": target}), given)["A"]
        assert found == pick(HYBRID, order, wanted | {"intermediate_size": ffn})


def test_a_smaller_budget_may_not_pick_what_a_larger_one_dropped() -> None:
    space, order, whole = SearchSpace.of(HYBRID, FINE), layer_order(HYBRID, range(8)), parameters(HYBRID)
    narrow = {"hidden_size": 36, "mamba_num_heads": 8, "mamba_head_dim": 16, "num_attention_heads": 8, "layers": 8}
    broad = {"hidden_size": 64, "mamba_num_heads": 8, "mamba_head_dim": 16, "num_attention_heads": 8, "layers": 6}
    targets = counts({"B": int(0.4 * whole), "A": int(0.55 * whole)})
    picks = {"A": narrow | {"intermediate_size": 256}, "B": broad | {"intermediate_size": 32}}
    family = read_out(HYBRID, order, space, targets, picks)
    alone = read_out(HYBRID, order, space, {"B": targets["B"]}, picks)
    assert alone["B"].hidden_size > family["A"].hidden_size >= family["B"].hidden_size
    check_family(HYBRID, family, targets)


def test_the_ffn_moves_in_steps_its_candidates_share() -> None:
    odd = replace(HYBRID, intermediate_size=255)
    space = SearchSpace.of(odd, {"hidden_size": range(24, 64, 4), "intermediate_size": [30, 45]})  # steps of 1
    target = parameters(odd) * 6 // 10
    family = read_out(odd, range(8), space, counts({"A": target}), {"A": {"hidden_size": 64, "intermediate_size": 255}})
    assert 0.98 * target <= parameters(odd, family["A"]) <= target
    in_eights = SearchSpace.of(HYBRID, {"hidden_size": range(24, 64, 4), "intermediate_size": [32, 48]})
    family = read_out(
        HYBRID, range(8), in_eights, counts({"A": target}), {"A": {"hidden_size": 64, "intermediate_size": 256}}
    )
    assert family["A"].intermediate_size % 8 == 0


def test_a_budget_of_the_family_has_that_many_parameters_in_stock_transformers() -> None:
    space, order = SearchSpace.of(HYBRID, FINE), layer_order(HYBRID, range(8))
    targets = {name: parse_target(name, HYBRID) for name in ("100%", "75%", "50%")}
    picks = {name: {field: sizes[0] for field, sizes in space.candidates} for name in targets}
    for name, submodel in read_out(HYBRID, order, space, targets, picks).items():
        count = stock.numel(stock.on_meta(standalone(HYBRID, submodel)))
        assert 0.98 * targets[name].value <= count <= targets[name].value


def test_an_impossible_space_names_the_budget_the_range_and_the_axis_to_widen() -> None:
    space = SearchSpace.of(HYBRID, {"hidden_size": [60], "intermediate_size": [64, 128], "mamba_num_heads": [4]})
    picked = {"small": {field: sizes[0] for field, sizes in space.candidates}}
    target = parameters(HYBRID) // 4
    least = parameters(HYBRID, Submodel(hidden_size=60, intermediate_size=64, mamba_num_heads=4))
    with pytest.raises(NestlingError) as caught:
        read_out(HYBRID, range(8), space, counts({"small": target}), picked)
    message = str(caught.value)
    assert "budget small" in message
    assert f"{target:,}" in message
    assert f"{least:,} … {parameters(HYBRID):,}" in message
    assert message.endswith("hidden_size")  # the axis that can shrink least


# ---- the order of layers


@given(ranked=st.permutations(range(8)))
def test_the_best_attention_layer_comes_first_and_the_rest_keep_their_order(ranked: list[int]) -> None:
    order = layer_order(HYBRID, ranked)
    assert sorted(order) == list(range(8))
    assert order[0] == next(layer for layer in ranked if layer in (3, 7))
    assert [layer for layer in ranked if layer != order[0]] == list(order[1:])


def test_a_model_without_attention_keeps_its_ranking() -> None:
    assert layer_order(replace(HYBRID, hybrid_override_pattern="M-M-"), (2, 0, 3, 1)) == (2, 0, 3, 1)


# ---- the space


def test_the_whole_size_is_always_a_candidate_and_sizes_ascend() -> None:
    space = SearchSpace.of(HYBRID, {"hidden_size": [48, 32, 48], "layers": (7,)})
    assert space["hidden_size"] == (32, 48, 64)
    assert space["layers"] == (7, 8)
    assert "hidden_size" in space
    assert "intermediate_size" not in space
    assert SearchSpace.of(HYBRID, space.to_json()) == space
    assert hash(space) == hash(SearchSpace.of(HYBRID, {"layers": [7, 8], "hidden_size": [32, 48]}))


@pytest.mark.parametrize(
    ("candidates", "words"),
    [
        ({"hidden_sizes": [32]}, "unknown axis 'hidden_sizes'; did you mean 'hidden_size'?"),
        ({"n_routed_experts": [2]}, "unknown axis 'n_routed_experts'"),  # this model has none
        ({"ssm_state_size": [4]}, "unknown axis 'ssm_state_size'"),  # never elastic
        ({"hidden_size": [72]}, "hidden_size = 72 is outside 1 … 64"),
        ({"hidden_size": [0]}, "hidden_size = 0 is outside"),
        ({"hidden_size": [32.0]}, "hidden_size = 32.0 is outside"),
        ({"hidden_size": [True]}, "hidden_size = True is outside"),
        ({"mamba_num_heads": [3]}, "mamba_num_heads = 3 cannot be shared by n_groups = 2; nearest: 2, 4"),
        ({"num_attention_heads": [5]}, "num_attention_heads = 5 cannot be shared by num_key_value_heads = 2"),
        ({"layers": [9]}, "layers = 9 is outside 1 … 8"),
    ],
)
def test_a_space_that_does_not_fit_the_model_is_refused(candidates: dict[str, Any], words: str) -> None:
    with pytest.raises(NestlingError) as caught:
        SearchSpace.of(HYBRID, candidates)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- wishes


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("100%", 208_744), ("75%", 156_558), ("0.5%", 1_043), ("40k", 40_000), ("0.04M", 40_000), (" 12345 ", 12_345)],
)
def test_a_wish_is_a_share_or_a_count(text: str, wanted: int) -> None:
    assert parse_target(text, HYBRID) == Target("parameters", wanted)


def test_wishes_of_a_large_model() -> None:
    nano = PRESETS["nemotron-nano-12b-v2"]
    assert parse_target("9B", nano).value == 9_000_000_000
    assert parse_target("100%", nano).value == 12_310_001_152


@pytest.mark.parametrize("text", ["", "half", "-5%", "75 percent", "1e6", "9G", "101%", "0%", "2M", "0"])
def test_a_wish_that_is_no_size_of_the_model_is_refused(text: str) -> None:
    with pytest.raises(NestlingError, match="budget " + repr(text)):
        parse_target(text, HYBRID)
