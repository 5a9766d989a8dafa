"""Budgets in every unit: what they count against stock models and caches, and that tight ones are met."""

import itertools
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cost import bf16, cache_bytes, quantized

import stock
from nestling.arch.architecture import Architecture
from nestling.arch.between import between
from nestling.arch.nesting import read_out
from nestling.arch.presets import PRESETS
from nestling.arch.search import SearchSpace, layer_order
from nestling.arch.submodel import WHOLE, Submodel, complete, is_within, standalone
from nestling.arch.targets import Target, by_size, parse_target, parse_wish
from nestling.errors import NestlingError
from strategies import architectures, submodels

HYBRID = stock.LONG
MIXTURE = replace(
    HYBRID,
    hybrid_override_pattern="MEM*EM",
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=256,
    moe_shared_expert_intermediate_size=256,
)
FINE = {
    "hidden_size": range(48, 128, 8),
    "mamba_num_heads": [8, 12],
    "mamba_head_dim": [8, 12],
    "num_attention_heads": [4],
}
SPACES = {
    HYBRID: FINE | {"intermediate_size": range(64, 512, 8), "layers": [6, 7]},
    MIXTURE: FINE | {"moe_intermediate_size": range(32, 256, 8), "n_routed_experts": [4, 6], "layers": [5]},
}
UNITS = ("%", "%-active", "%:bf16", "%@300", "%@300:fp8", "%@40:int4", "%@7:fp32")


# ---- what they count


@given(st.data())
def test_active_parameters_are_those_of_stock_without_the_experts_not_chosen(data: st.DataObject) -> None:
    architecture = data.draw(architectures(needs="E"))
    submodel = data.draw(submodels(architecture, layers=True))
    model = stock.on_meta(alone := standalone(architecture, submodel))
    routed = sum(value.numel() for name, value in model.named_parameters() if ".experts." in name)
    idle = routed * (alone.n_routed_experts - alone.num_experts_per_tok) // alone.n_routed_experts
    assert Target("active parameters", 1).measure(architecture, submodel) == stock.numel(model) - idle


@given(st.data())
@settings(max_examples=15)
def test_bytes_are_those_of_stock_weights_and_of_the_elements_of_its_caches(data: st.DataObject) -> None:
    architecture = data.draw(architectures(needs="M*"))
    submodel = data.draw(submodels(architecture))
    model = bf16(standalone(architecture, submodel))
    context = data.draw(st.integers(1, 9))
    keys, states = cache_bytes(model, batch=1, length=context)
    window = 2 * sum(layer.mixer.conv_kernel_size * layer.mixer.conv_dim for layer in mamba_layers(model))
    sizes = {
        "fp32": 4 * stock.numel(model) + 2 * keys + 2 * window + (states - window),
        "bf16": 2 * stock.numel(model) + keys + states,
        "fp8": quantized(model, lambda matrix: matrix.numel() + 4) + keys // 2 + states,
        "int4": quantized(model, lambda matrix: len(matrix) * ((matrix.shape[1] + 1) // 2 + 2)) + keys + states,
    }
    for precision, size in sizes.items():
        assert Target("bytes", 1, context, precision).measure(architecture, submodel) == size, precision


def mamba_layers(model: object) -> list:
    return [layer for layer in model.model.layers if layer.block_type in ("mamba", "linear_attention")]


def test_published_sizes_at_128k_by_hand() -> None:
    nano, tokens = PRESETS["nemotron-nano-12b-v2"], 131072
    state = 28 * (128 * 80 * 128 * 4 + (128 * 80 + 2 * 8 * 128) * 4 * 2)
    linear = 28 * 5120 * (2 * 10240 + 2 * 1024 + 128 + 10240) + 6 * 5120 * (2 * 5120 + 2 * 1024) + 28 * 2 * 5120 * 20480
    rest = 12_310_001_152 - linear
    matrices = 28 * 2 + 6 * 4 + 28 * 2
    kv = 6 * 2 * 8 * 128 * tokens
    assert Target("bytes", 1, tokens).measure(nano, WHOLE) == 2 * 12_310_001_152 + 2 * kv + state
    assert Target("bytes", 1, tokens, "fp8").measure(nano, WHOLE) == linear + 4 * matrices + 2 * rest + kv + state
    grouped = linear // 2 + 2 * linear // 128  # every row is a multiple of 128 long
    assert Target("bytes", 1, tokens, "int4").measure(nano, WHOLE) == grouped + 2 * rest + 2 * kv + state
    assert parse_wish("3B-active", PRESETS["nemotron-3-nano-30b-a3b"]) == Target("active parameters", 3 * 10**9)
    assert round(Target("active parameters", 1).measure(PRESETS["nemotron-3-nano-30b-a3b"], WHOLE) / 1e9, 2) == 3.58


@given(st.data())
def test_a_target_of_a_whole_is_its_share_of_it(data: st.DataObject) -> None:
    architecture = data.draw(architectures())
    unit = data.draw(st.sampled_from(UNITS))
    whole = parse_wish("100" + unit, architecture)
    assert whole.value == whole.measure(architecture, WHOLE)
    assert parse_wish("50" + unit, architecture).value == whole.value // 2


# ---- tight ones are met


def check(architecture: Architecture, family: Mapping[str, Submodel], targets: Mapping[str, Target]) -> None:
    for name, submodel in family.items():
        assert 0.98 * targets[name].value <= targets[name].measure(architecture, submodel) <= targets[name].value
    for larger, smaller in itertools.combinations(family.values(), 2):
        assert is_within(architecture, smaller, larger)


@given(data=st.data(), shares=st.lists(st.sampled_from(range(62, 98, 5)), min_size=1, max_size=3, unique=True))
@settings(max_examples=20)
def test_any_picks_become_a_nested_family_on_budget_in_every_unit(data: st.DataObject, shares: list[int]) -> None:
    architecture, unit = data.draw(st.sampled_from([HYBRID, MIXTURE])), data.draw(st.sampled_from(UNITS))
    space = SearchSpace.of(architecture, SPACES[architecture])
    targets = {f"{share}{unit}": parse_target(f"{share}{unit}", architecture) for share in shares}
    ranked = data.draw(st.permutations(range(len(architecture.hybrid_override_pattern))))
    picks = {name: {field: data.draw(st.sampled_from(sizes)) for field, sizes in space.candidates} for name in targets}
    family = read_out(architecture, layer_order(architecture, ranked), space, targets, picks)
    assert list(family) == sorted(targets, key=lambda name: -targets[name].value)
    check(architecture, family, targets)


@given(st.data())
@settings(max_examples=40)
def test_a_wish_between_trained_sizes_is_met_in_every_unit(data: st.DataObject) -> None:
    unit = data.draw(st.sampled_from(UNITS))
    family = {"100%": WHOLE, "small": Submodel(hidden_size=64, mamba_num_heads=8, intermediate_size=128)}
    lowest = parse_wish("100" + unit, HYBRID)
    least = round(100 * lowest.measure(HYBRID, family["small"]) / lowest.value) + 1
    wish = f"{data.draw(st.integers(least, 99))}{unit}"
    target = parse_wish(wish, HYBRID)
    check(HYBRID, {wish: between(HYBRID, range(8), family, wish, target)}, {wish: target})


@pytest.mark.parametrize("wish", ["2.4B-active", "3.5B-active", "40GiB@128k", "20GiB@1M:int4", "20B", "90%-active"])
def test_wishes_of_a_published_mixture_are_met(wish: str) -> None:
    nano, sizes = PRESETS["nemotron-3-nano-30b-a3b"], {"moe_intermediate_size": 960, "n_routed_experts": 64}
    family = {"100%": WHOLE, "12b": Submodel(hidden_size=1920, moe_shared_expert_intermediate_size=2752, **sizes)}
    target = parse_wish(wish, nano)
    check(nano, {wish: between(nano, range(52), family, wish, target)}, {wish: target})


def test_budgets_in_different_units_are_nested_by_their_share_of_the_whole() -> None:
    names = ("70%-active", "100%", "45%@300:int4", "85%@300", "30%")
    targets = by_size(MIXTURE, {name: parse_target(name, MIXTURE) for name in names})
    assert list(targets) == ["100%", "85%@300", "70%-active", "45%@300:int4", "30%"]
    space = SearchSpace.of(MIXTURE, SPACES[MIXTURE])
    picks = {name: {field: sizes[-1] for field, sizes in space.candidates} for name in targets}
    family = read_out(MIXTURE, layer_order(MIXTURE, range(6)), space, targets, picks)
    check(MIXTURE, family, targets)


# ---- what cannot be


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "30GiB@128k",
            "asks for 30.00 GiB at 128k tokens in bf16; the whole model, which is always trained, has 26.07 GiB",
        ),
        ("13B-active", "asks for 13,000,000,000 active parameters; the whole model, which is always trained, has"),
        ("120%@4k:int4", "at 4k tokens in int4; the whole model"),
        ("0%@4k", "asks for 0 B"),
    ],
)
def test_a_budget_that_is_the_whole_model_is_not_trained_and_says_so(text: str, words: str) -> None:
    with pytest.raises(NestlingError) as caught:
        parse_target(text, PRESETS["nemotron-nano-12b-v2"])
    assert words in str(caught.value)


def test_bytes_that_only_layers_can_save_name_the_layers_and_the_least_in_their_own_unit() -> None:
    """Keys and values of a long sequence, which no width makes smaller."""
    space = SearchSpace.of(HYBRID, SPACES[HYBRID])
    picks = {"x": {field: sizes[0] for field, sizes in space.candidates}}
    target = parse_target("20%@64k:fp8", HYBRID)
    least = Target("bytes", 1, 65536, "fp8").measure(HYBRID, Submodel(**(picks["x"] | {"layers": (0, 1, 2, 3, 4, 5)})))
    with pytest.raises(NestlingError) as caught:
        read_out(HYBRID, (3, 0, 1, 2, 4, 5, 6, 7), space, {"x": target}, picks)
    message = str(caught.value)
    assert "at 64k tokens in fp8, which the search space cannot give" in message
    assert f"its members have {least / 2**20:.2f} MiB … " in message
    assert message.endswith("add smaller candidates, first of all for layers")


def test_a_budget_that_a_larger_one_in_another_unit_leaves_no_room_for_says_so() -> None:
    space = SearchSpace.of(MIXTURE, SPACES[MIXTURE])
    targets = {name: parse_target(name, MIXTURE) for name in ("70%-active", "69%@300:int4")}
    picks = {name: {field: sizes[-1] for field, sizes in space.candidates} for name in targets}
    with pytest.raises(NestlingError, match="69%@300:int4 wants .* KiB .*; budget 70%-active leaves no more"):
        read_out(MIXTURE, layer_order(MIXTURE, range(6)), space, targets, picks)


@pytest.mark.parametrize(
    ("unit", "candidates", "axis"),
    [
        ("%-active", {"hidden_size": [64], "mamba_num_heads": [8]}, "moe_intermediate_size"),
        ("%", {"hidden_size": [64], "mamba_num_heads": [8], "moe_intermediate_size": [64]}, "n_routed_experts"),
        ("%", {"n_routed_experts": [2], "moe_intermediate_size": [32]}, "hidden_size"),
    ],
)
def test_the_axis_that_limits_depends_on_what_is_counted(unit: str, candidates: dict, axis: str) -> None:
    space = SearchSpace.of(MIXTURE, candidates)
    picks = {"x": {field: sizes[0] for field, sizes in space.candidates}}
    with pytest.raises(NestlingError, match=f"first of all for {axis}$"):
        read_out(MIXTURE, range(6), space, {"x": parse_target(f"10{unit}", MIXTURE)}, picks)


def test_what_holds_everything_is_the_whole() -> None:
    assert between(HYBRID, range(8), {}, "1TB@4k:int4", parse_wish("1TB@4k:int4", HYBRID)) == complete(HYBRID, WHOLE)
