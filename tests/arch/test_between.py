"""Sizes between the trained ones: on target, inside the larger neighbour and around the smaller one."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stock
from nestling.arch.between import between
from nestling.arch.cost import cost, parameters
from nestling.arch.presets import PRESETS
from nestling.arch.submodel import WHOLE, Submodel, complete, is_within, standalone
from nestling.arch.targets import Target, parse_wish
from nestling.errors import NestlingError
from nestling.units import parse_bytes

NANO = PRESETS["nemotron-nano-12b-v2"]
ORDER = tuple(range(61, -1, -1))
NINE = Submodel(
    layers=tuple(layer for layer in range(62) if layer not in (3, 11, 20, 29, 33, 44)),
    hidden_size=4480,
    intermediate_size=15680,
    mamba_num_heads=112,
)
SIX = Submodel(layers=NINE.layers[:50], hidden_size=3840, intermediate_size=12288, mamba_num_heads=96)
FAMILY = {"100%": WHOLE, "9b": NINE, "6b": SIX}
SMALL = stock.LONG


@pytest.mark.parametrize("wish", ["11B", "9.5B", "7.5B", "60%", "4B", "17GB", "20GiB@128k", "12.3B"])
def test_a_wish_is_met_and_nested(wish: str) -> None:
    target = parse_wish(wish, NANO)
    found = between(NANO, ORDER, FAMILY, wish, target)
    costs = cost(NANO, found)
    state = costs.kv_bytes_per_token * (131072 if "128k" in wish else 0) + costs.ssm_bytes_per_sequence
    measured = stock.numel(stock.on_meta(standalone(NANO, found)))
    measured = measured if target.of == "parameters" else 2 * measured + state
    assert 0.98 * target.value <= measured <= target.value
    larger = [m for m in FAMILY.values() if parameters(NANO, m) >= parameters(NANO, found)]
    smaller = [m for m in FAMILY.values() if parameters(NANO, m) <= parameters(NANO, found)]
    assert all(is_within(NANO, found, member) for member in larger)
    assert all(is_within(NANO, member, found) for member in smaller)
    assert found.hidden_size is not None
    assert found.hidden_size % 64 == 0
    assert isinstance(found.intermediate_size, int)
    assert found.intermediate_size % 8 == 0


@settings(max_examples=40)
@given(data=st.data())
def test_wishes_in_descending_order_are_met_over_any_family(data: st.DataObject) -> None:
    """Random nested families, also with sizes that differ between layers, layers dropped, and any layer order."""
    members, sizes = {"100%": WHOLE}, (512, 512, 512)
    for name, share in (("large", 3), ("small", 2)):
        sizes = tuple(min(data.draw(st.integers(share * 14, share * 40)) * 4, size) for size in sizes)
        layers = (
            (0, 1, 2, 3, 4, 5, 6, 7) if name == "large" else data.draw(st.sampled_from([(0, 1, 3, 4, 6), (1, 3, 4)]))
        )
        kept = tuple(size for layer, size in zip((1, 4, 6), sizes, strict=True) if layer in layers)
        members[name] = Submodel(layers, share * 24, kept, share * 4)
    whole = parameters(SMALL)
    order = data.draw(st.permutations(range(8)))
    value = data.draw(st.integers(parameters(SMALL, members["small"]), whole))
    found = between(SMALL, order, members, "x", Target("parameters", value))
    assert 0.98 * value <= parameters(SMALL, found) <= value
    for member in members.values():
        if parameters(SMALL, member) >= value:
            assert is_within(SMALL, found, member)
        else:
            assert is_within(SMALL, member, found)


def test_a_trained_size_is_itself() -> None:
    for name in FAMILY:
        target = Target("parameters", parameters(NANO, FAMILY[name]))
        assert between(NANO, ORDER, FAMILY, name, target) == complete(NANO, FAMILY[name])


def test_the_most_important_layers_come_back_first() -> None:
    found = between(NANO, ORDER, FAMILY, "11B", Target("parameters", 11 * 10**9))
    assert found.layers is not None
    back = [layer for layer in found.layers if layer not in (NINE.layers or ())]
    dropped = [layer for layer in range(62) if layer not in (NINE.layers or ())]
    assert back
    assert sorted(back) == sorted(dropped, reverse=True)[: len(back)][::-1]


def test_what_cannot_be_is_refused_and_bytes_that_hold_everything_are_the_whole() -> None:
    with pytest.raises(
        NestlingError, match=r"'13B' asks for 13,000,000,000 parameters; the whole model has 12,310,001,15"
    ):
        between(NANO, ORDER, FAMILY, "13B", parse_wish("13B", NANO))
    with pytest.raises(NestlingError, match="too small: the smallest member that can be cut has"):
        between(NANO, ORDER, FAMILY, "100M", parse_wish("100M", NANO))
    assert between(NANO, ORDER, FAMILY, "1TB", parse_wish("1TB", NANO)) == complete(NANO, WHOLE)
    coarse = replace(
        SMALL, hybrid_override_pattern="M*", n_groups=8, num_key_value_heads=4, hidden_size=64, vocab_size=400
    )
    with pytest.raises(NestlingError, match=r"wants .* parameters; the nearest that sizes in steps of 8 give is"):
        between(coarse, (0, 1), {}, "x", Target("parameters", parameters(coarse) - 400))


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("7.5B", Target("parameters", 7_500_000_000)),
        ("50%", Target("parameters", 6_155_000_576)),
        ("50%-active", Target("active parameters", 6_155_000_576)),
        ("3.5B-active", Target("active parameters", 3_500_000_000)),
        ("3.5b active", Target("active parameters", 3_500_000_000)),
        ("16GiB@128k", Target("bytes", 16 * 2**30, 131072)),
        ("16 gb@4096", Target("bytes", 16 * 10**9, 4096)),
        ("512MiB", Target("bytes", 512 * 2**20)),
        ("16GiB@128k:fp8", Target("bytes", 16 * 2**30, 131072, "fp8")),
        ("8GiB:int4", Target("bytes", 8 * 2**30, 0, "int4")),
        ("50%@1", Target("bytes", 12_384_790_016, 1)),
    ],
)
def test_wishes_are_read(text: str, target: Target) -> None:
    assert parse_wish(text, NANO) == target


@pytest.mark.parametrize(
    "text",
    ["", "many", "16GiB@", "16GiB@long", "16@4k", "-1B", "1e9", "5GB-active", "9B:fp8", "50%-active@4k",
    "16GiB@4k:fp7", "16GiB@4k:"],
)  # fmt: skip
def test_wishes_that_are_none_are_refused(text: str) -> None:
    words = "write a share such as 75%, a count such as 9B|write 4096, 8k, 128k or 1M|allowed: fp32, bf16, fp8, int4"
    with pytest.raises(NestlingError, match=words):
        parse_wish(text, NANO)


@pytest.mark.parametrize(("text", "count"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("100", 100), ("7b", 7)])
def test_bytes_are_read(text: str, count: int) -> None:
    assert parse_bytes(text, "--shard-size") == count


@pytest.mark.parametrize("text", ["", "0", "0.1", "5 gallons", "-1GB", "GB"])
def test_bytes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(NestlingError, match="--shard-size: .* is not a number of bytes"):
        parse_bytes(text, "--shard-size")
