"""Reading a family out of any picks: nested bit for bit, on budget, with one size per field or one per layer."""

import itertools
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stock
from nestling.arch.architecture import Architecture
from nestling.arch.nemotron_h import PER_LAYER
from nestling.arch.nesting import even_picks, read_out
from nestling.arch.presets import PRESETS
from nestling.arch.search import SearchSpace, field_of, layer_order, pick
from nestling.arch.submodel import WHOLE, Submodel, complete, is_within, layer_sizes, standalone
from nestling.arch.targets import Target
from nestling.errors import NestlingError

HYBRID = replace(stock.LONG, hidden_size=64, intermediate_size=256, mamba_num_heads=8)
EVERY = tuple(PER_LAYER)
UNITS = (Target("parameters", 0), Target("active parameters", 0), Target("bytes", 0, 64), Target("bytes", 0, 4, "fp8"))


@st.composite
def hybrids(draw: st.DrawFn) -> Architecture:
    """Small models of any pattern that has an MLP, large enough that some step of an FFN is less than 2 %."""
    kinds = draw(st.text("M*-", max_size=5)) + "-"
    groups, keys = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return Architecture(
        "".join(draw(st.permutations(kinds))),
        vocab_size=draw(st.integers(20, 60)),
        hidden_size=draw(st.integers(16, 48)),
        intermediate_size=draw(st.integers(64, 200)),
        n_groups=groups,
        mamba_num_heads=groups * draw(st.integers(1, 4)),
        mamba_head_dim=draw(st.integers(1, 6)),
        ssm_state_size=draw(st.integers(1, 5)),
        num_key_value_heads=keys,
        num_attention_heads=keys * draw(st.integers(1, 4)),
        head_dim=draw(st.integers(1, 6)),
    )


@st.composite
def spaces(draw: st.DrawFn, architecture: Architecture) -> SearchSpace:
    """Half of every axis or more, the FFN from a quarter; some fields per layer."""
    full = architecture.sizes()
    outer = {"mamba_num_heads": full["g"], "num_attention_heads": full["G"]}
    candidates: dict[str, list[int]] = {}
    for field in architecture.elastic_fields:
        step, whole = outer.get(field, 1), getattr(architecture, field)
        least = whole // step // (4 if field == "intermediate_size" else 2) or 1
        candidates[field] = [step * n for n in draw(st.sets(st.integers(least, whole // step), max_size=4)) | {least}]
    count = len(architecture.hybrid_override_pattern)
    candidates["layers"] = sorted(draw(st.sets(st.integers((count + 1) // 2, count), max_size=3)))
    per_layer = [field for field in EVERY if field in candidates and draw(st.booleans())]
    return SearchSpace.of(architecture, candidates, per_layer, multiple_of={"intermediate_size": 1})


def check_family(architecture: Architecture, family: Mapping[str, Submodel], targets: Mapping[str, Target]) -> None:
    """On budget, and nested for every pair: per axis, per layer, and for the set of layers."""
    assert family.keys() == targets.keys()
    for name, submodel in family.items():
        assert 0.98 * targets[name].value <= targets[name].measure(architecture, submodel) <= targets[name].value, name
    for larger, smaller in itertools.combinations(family.values(), 2):
        assert is_within(architecture, smaller, larger)
        inside = {layer: sizes for layer, _, sizes in layer_sizes(architecture, larger)}
        for layer, _, sizes in layer_sizes(architecture, smaller):
            assert all(size <= inside[layer][axis] for axis, size in sizes.items())


@given(data=st.data(), shares=st.lists(st.floats(0.55, 0.97), min_size=1, max_size=3, unique=True))
@settings(max_examples=60)
def test_any_picks_of_any_space_become_a_nested_family_on_budget(data: st.DataObject, shares: list[float]) -> None:
    architecture = data.draw(hybrids())
    space = data.draw(spaces(architecture))
    targets = {}
    for place, share in enumerate([1.0, *sorted(shares, reverse=True)]):
        unit = data.draw(st.sampled_from(UNITS[:1] if place == 0 else UNITS))
        whole = unit.measure(architecture, WHOLE)
        targets[f"size {place}"] = Target(unit.of, int(share * whole), unit.context, unit.precision)
    order = layer_order(architecture, data.draw(st.permutations(range(len(architecture.hybrid_override_pattern)))))
    picks = {name: {axis: data.draw(st.sampled_from(space[axis])) for axis in space.axes} for name in targets}
    with suppress(NestlingError):  # that happens: below
        family = read_out(architecture, order, space, targets, picks)
        check_family(architecture, family, targets)
        assert family["size 0"] == complete(architecture, WHOLE)


FINE = {
    "hidden_size": range(24, 64, 4),
    "intermediate_size": range(32, 256, 32),
    "mamba_num_heads": [6],
    "num_attention_heads": [4],
    "layers": [6, 7],
}


@given(data=st.data(), share=st.floats(0.5, 0.95), per_layer=st.sets(st.sampled_from(EVERY)))
@settings(max_examples=30)
def test_a_fine_space_meets_every_budget(data: st.DataObject, share: float, per_layer: set[str]) -> None:
    space = SearchSpace.of(HYBRID, FINE, sorted(per_layer))
    whole = Target("parameters", 0).measure(HYBRID, WHOLE)
    targets = {name: Target("parameters", int(part * whole)) for name, part in (("A", share), ("B", 0.8 * share))}
    order = layer_order(HYBRID, data.draw(st.permutations(range(8))))
    picks = {name: {axis: data.draw(st.sampled_from(space[axis])) for axis in space.axes} for name in targets}
    family = read_out(HYBRID, order, space, targets, picks)
    check_family(HYBRID, family, targets)
    for submodel in family.values():
        assert all(sizes["f"] % 8 == 0 for _, kind, sizes in layer_sizes(HYBRID, submodel) if kind == "-")


# ---- the nearest


COARSE = {"hidden_size": [24, 40], "mamba_num_heads": [2, 4], "num_attention_heads": [2, 4], "layers": [4, 6]}


@given(data=st.data(), share=st.floats(0.2, 0.95), per_layer=st.sets(st.sampled_from(["num_attention_heads"])))
@settings(max_examples=40)
def test_no_choice_that_meets_the_target_is_fewer_steps_away(
    data: st.DataObject, share: float, per_layer: set[str]
) -> None:
    """Against every combination of candidates."""
    space, order = SearchSpace.of(HYBRID, COARSE, sorted(per_layer)), layer_order(HYBRID, range(8))
    target = Target("parameters", int(share * Target("parameters", 0).measure(HYBRID, WHOLE)))
    wanted = {axis: data.draw(st.sampled_from(space[axis])) for axis in space.axes}

    def steps(choice: Mapping[str, int]) -> int:
        return sum(abs(space[axis].index(choice[axis]) - space[axis].index(wanted[axis])) for axis in space.axes)

    every = (dict(zip(space.axes, sizes, strict=True)) for sizes in itertools.product(*(space[a] for a in space.axes)))
    met = [choice for choice in every if target.is_met(target.measure(HYBRID, pick(HYBRID, order, choice)))]
    try:
        found = read_out(HYBRID, order, space, {"A": target}, {"A": wanted})["A"]
    except NestlingError:
        assert not met
        return
    least = min(map(steps, met))
    assert found in [pick(HYBRID, order, choice) for choice in met if steps(choice) == least]


# ---- sizes per layer


OWN = SearchSpace.of(HYBRID, {"intermediate_size": [32, 64, 128], "layers": [5]}, ["intermediate_size"])


def test_an_axis_per_layer_is_named_by_the_layer() -> None:
    assert OWN.axes == ("intermediate_size@1", "intermediate_size@4", "intermediate_size@6", "layers")
    assert [field_of(axis) for axis in OWN.axes] == ["intermediate_size"] * 3 + ["layers"]
    assert OWN["intermediate_size@4"] == (32, 64, 128, 256)
    assert OWN.axis("intermediate_size", 4) == "intermediate_size@4"
    assert OWN.axis("layers", 4) == "layers"
    assert OWN.to_json() == {
        "intermediate_size": [32, 64, 128, 256], "layers": [5, 8], "per_layer": ["intermediate_size"]
    }  # fmt: skip


def test_a_size_belongs_to_its_layer_when_others_are_dropped() -> None:
    choice = {"intermediate_size@1": 32, "intermediate_size@4": 64, "intermediate_size@6": 128, "layers": 5}
    for order, sizes in (
        ((3, 0, 4, 6, 2, 1, 5, 7), (64, 128)),
        ((3, 0, 1, 6, 2, 4, 5, 7), (32, 128)),
        ((3, 0, 2, 5, 6, 4, 1, 7), 128),
    ):
        submodel = pick(HYBRID, order, choice)
        assert submodel.intermediate_size == sizes
        kept = {layer: size["f"] for layer, kind, size in layer_sizes(HYBRID, submodel) if kind == "-"}
        assert all(kept[layer] == choice[f"intermediate_size@{layer}"] for layer in kept)
    assert pick(HYBRID, (3, 0, 2, 5, 7, 4, 1, 6), choice).intermediate_size is None


def test_a_repair_keeps_what_layers_differ_by_and_the_best_ones_get_the_rest() -> None:
    order = layer_order(HYBRID, (6, 4, 1, 0, 2, 3, 5, 7))
    wanted = {"intermediate_size@1": 64, "intermediate_size@4": 128, "intermediate_size@6": 128, "layers": 8}
    for sizes in ((72, 136, 136), (56, 120, 128), (64, 136, 136), (32, 32, 40), (176, 240, 248)):
        target = Target("parameters", 0).measure(HYBRID, Submodel(intermediate_size=sizes)) + 3
        found = read_out(HYBRID, order, OWN, {"A": Target("parameters", target)}, {"A": wanted})["A"]
        assert found == complete(HYBRID, Submodel(intermediate_size=sizes))


def test_a_sub_model_with_sizes_per_layer_has_that_many_parameters_in_stock_layers() -> None:
    """Zero-padded, each layer is as stock; without padding the count is that of what is kept."""
    submodel = pick(HYBRID, range(8), {"intermediate_size@1": 32, "intermediate_size@4": 64, "intermediate_size@6": 32})
    padded = stock.numel(stock.on_meta(standalone(HYBRID, submodel)))
    assert padded - Target("parameters", 0).measure(HYBRID, submodel) == 2 * 32 * 2 * 64


# ---- steps between candidates


@pytest.mark.parametrize(("step", "whole"), [(48, 256), (16, 256), (100, 255)])
def test_the_ffn_moves_in_the_steps_that_are_asked_for(step: int, whole: int) -> None:
    shape = replace(HYBRID, intermediate_size=whole)
    sizes = [*range(step, whole, step)]
    space = SearchSpace.of(
        shape, {"hidden_size": range(24, 64), "intermediate_size": sizes[:1]}, multiple_of={"intermediate_size": step}
    )
    target = Target("parameters", int(0.6 * Target("parameters", 0).measure(shape, WHOLE)))
    found = read_out(shape, range(8), space, {"A": target}, {"A": {"hidden_size": 60, "intermediate_size": step}})["A"]
    assert found.intermediate_size in {*sizes, whole}
    assert space.step("intermediate_size") == step


# ---- large models, and what a larger budget gives way for


def test_a_large_model_with_sizes_per_layer_is_read_out_with_few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    twelve = PRESETS["nemotron-nano-12b-v2"]
    candidates = {
        "hidden_size": range(3072, 5120, 128),
        "intermediate_size": range(7680, 20480, 1280),
        "mamba_num_heads": [96, 104, 112, 120],
        "num_attention_heads": [16, 24, 32],
        "layers": [52, 54, 56, 58, 60],
    }
    space = SearchSpace.of(twelve, candidates, ["intermediate_size", "num_attention_heads"])
    targets = {name: Target("parameters", value) for name, value in (("9B", 9 * 10**9), ("6B", 6 * 10**9))}
    counted = itertools.count()
    block = Target.block
    monkeypatch.setattr(Target, "block", lambda target, *of: (next(counted), block(target, *of))[1])
    for picks in ({axis: space[axis][0] for axis in space.axes}, {axis: space[axis][-1] for axis in space.axes}):
        family = read_out(twelve, layer_order(twelve, range(62)), space, targets, dict.fromkeys(targets, picks))
        check_family(twelve, family, targets)
    assert next(counted) < 4_000


def test_a_larger_budget_gives_way_where_the_smaller_one_could_not_be_met_within_it() -> None:
    """The larger one would keep its picks, within which no member has the smaller target."""
    space = SearchSpace.of(HYBRID, {"hidden_size": [16, 32, 40], "mamba_head_dim": [4, 12]})
    near, far, small = (
        Submodel(hidden_size=hidden, mamba_head_dim=channels) for hidden, channels in ((40, 4), (32, 12), (16, 12))
    )
    count = Target("parameters", 0).measure
    targets = {name: Target("parameters", count(HYBRID, size)) for name, size in (("A", far), ("B", small))}
    picks = {"A": {"hidden_size": 40, "mamba_head_dim": 4}, "B": {"hidden_size": 16, "mamba_head_dim": 4}}
    assert read_out(HYBRID, range(8), space, {"A": targets["A"]}, picks)["A"] == complete(HYBRID, near)
    family = read_out(HYBRID, range(8), space, targets, picks)
    assert family == {"A": complete(HYBRID, far), "B": complete(HYBRID, small)}
    check_family(HYBRID, family, targets)


@pytest.mark.parametrize(
    ("per_layer", "words"),
    [
        (["hidden_size"], "per_layer: 'hidden_size' is one size for all layers"),
        (["intermediate_sizes"], "did you mean 'intermediate_size'"),
        (["mamba_num_heads"], "per_layer: 'mamba_num_heads' has no candidates"),
    ],
)
def test_a_field_that_cannot_be_chosen_per_layer_is_refused(per_layer: list[str], words: str) -> None:
    with pytest.raises(NestlingError) as caught:
        SearchSpace.of(HYBRID, {"hidden_size": [32], "intermediate_size": [64]}, per_layer)
    assert words in str(caught.value)


def test_even_picks_cut_every_width_alike() -> None:
    space = SearchSpace.of(HYBRID, FINE)
    assert even_picks(space, 1.0) == {"hidden_size": 64, "intermediate_size": 256, "layers": 8} | {
        "mamba_num_heads": 8, "num_attention_heads": 8
    }  # fmt: skip
    assert even_picks(space, 0.25)["hidden_size"] == 32
    assert even_picks(space, 0.25)["layers"] == 8
