"""Floating-point types without torch, against torch."""

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.errors import NestlingError
from nestling.weights import convert as convert_module
from nestling.weights.convert import DTYPES, converter, parse_dtype, target

TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
EVERY_HALF = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)


def raw(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy()


def assert_as_torch(tensor: torch.Tensor, stored: str, wanted: str) -> None:
    convert = converter(stored, wanted, "t")
    assert convert is not None
    ours = torch.from_numpy(convert(raw(tensor)).copy()).view(TYPES[wanted])
    theirs = tensor.to(TYPES[wanted])
    nan = theirs.isnan()
    assert torch.equal(ours.isnan(), nan)
    assert torch.equal(ours[~nan].view(torch.uint8), theirs[~nan].contiguous().view(torch.uint8))


@pytest.mark.parametrize(("stored", "wanted"), [("BF16", "F32"), ("F16", "F32"), ("F16", "BF16")])
def test_every_sixteen_bit_number(stored: str, wanted: str) -> None:
    assert_as_torch(EVERY_HALF.view(TYPES[stored]), stored, wanted)


def test_every_bfloat16_that_fits_into_float16() -> None:
    values = EVERY_HALF.view(torch.bfloat16)
    assert_as_torch(values[~values.isfinite() | (values.float().abs() < 65520)], "BF16", "F16")


@pytest.mark.parametrize("seed", range(3))
def test_bfloat16_most_of_which_is_normal_in_float16(seed: int) -> None:
    """As weights are: some numbers of every kind among others that need no rounding."""
    draw = torch.Generator().manual_seed(seed)
    values = EVERY_HALF.view(torch.bfloat16)
    values = values[~values.isfinite() | (values.float().abs() < 65520)]
    normal = values[(values.float().abs() >= 2**-14) & values.isfinite()]
    assert_as_torch(normal, "BF16", "F16")
    several = torch.cat([values, normal.repeat(-(-8 * len(values) // len(normal)))])
    assert_as_torch(several[torch.randperm(len(several), generator=draw)], "BF16", "F16")


def test_most_bfloat16_as_float16_is_not_rounded_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded = []
    values = convert_module._values
    monkeypatch.setattr(convert_module, "_values", lambda bits, stored: rounded.extend(bits) or values(bits, stored))
    assert_as_torch(torch.tensor([0.5, 1e-6, -2.0, 0.0, 65024.0] + [2**-14] * 40).bfloat16(), "BF16", "F16")
    assert len(rounded) == 2


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_any_float32_to_bfloat16(bits: list[int]) -> None:
    values = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    fits = ~values.isfinite() | values.to(torch.bfloat16).isfinite()
    assert_as_torch(values[fits], "F32", "BF16")


@given(st.lists(st.floats(-65504, 65504), min_size=1, max_size=64), st.sampled_from(["F16", "BF16", "F32"]))
def test_float64_goes_through_float32_as_in_torch(values: list[float], wanted: str) -> None:
    convert = converter("F64", wanted, "t")
    assert convert is not None
    given = torch.tensor(values, dtype=torch.float64)
    ours = torch.from_numpy(convert(raw(given)).copy()).view(TYPES[wanted]).double()
    assert torch.allclose(ours, given.to(TYPES[wanted]).double(), rtol=2**-11, atol=1e-7)


def rounded_once(value: float) -> Fraction | None:
    """The bfloat16 nearest to a float64, ties to the even significand, by exact arithmetic; None where it overflows."""
    exact = abs(Fraction(value))
    if exact == 0:
        return exact
    exponent = max(exact.numerator.bit_length() - exact.denominator.bit_length(), -126)
    exponent -= exponent > -126 and Fraction(2) ** exponent > exact
    step = Fraction(2) ** (exponent - 7)  # 8 significant bits, fewer below the smallest normal number
    nearest = round(exact / step) * step  # Python's round takes the even one of two
    return None if nearest >= 2**128 else nearest * (1 if value > 0 else -1)


TIES = st.builds(
    lambda bits, exponent, nudge: (1 + bits / 256 + nudge) * 2.0**exponent,
    st.integers(0, 255),
    st.one_of(st.integers(-140, 127), st.sampled_from([-133, -134, -126, 127])),
    st.sampled_from([0.0, 2.0**-30, -(2.0**-30), 2.0**-52, 2.0**-24]),
)


@settings(max_examples=200)
@given(st.lists(TIES | st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=32))
def test_float64_to_bfloat16_is_rounded_once(values: list[float]) -> None:
    convert = converter("F64", "BF16", "t")
    assert convert is not None
    for value in values:
        given, wanted = raw(torch.tensor([value], dtype=torch.float64)), rounded_once(value)
        if wanted is None:
            with pytest.raises(NestlingError, match="does not fit into bf16"):
                convert(given)
        else:
            (found,) = torch.from_numpy(convert(given).copy()).view(torch.bfloat16).tolist()
            assert (Fraction(found), math.copysign(1, found)) == (wanted, math.copysign(1, value)), value


def test_float64_that_is_not_finite_stays_so() -> None:
    convert = converter("F64", "BF16", "t")
    assert convert is not None
    inf = float("inf")
    found = torch.from_numpy(convert(raw(torch.tensor([inf, -inf, float("nan")]).double())).copy()).view(torch.bfloat16)
    assert found[:2].tolist() == [inf, -inf]
    assert found[2].isnan()


def test_a_value_that_does_not_fit_is_named_and_infinity_stays() -> None:
    convert = converter("BF16", "F16", "backbone.x")
    assert convert is not None
    for before in (0, 1, 100):
        with pytest.raises(NestlingError, match=r"backbone\.x: 99840 does not fit into fp16; use bf16 or fp32"):
            convert(raw(torch.tensor([1.0] * before + [99840.0], dtype=torch.bfloat16)))
    infinite = convert(raw(torch.tensor([float("inf"), float("nan")], dtype=torch.bfloat16))).view(np.float16)
    assert np.isposinf(infinite[0])
    assert np.isnan(infinite[1])


@pytest.mark.parametrize(("stored", "wanted"), [pair for pair in product(TYPES, DTYPES.values()) if len({*pair}) == 2])
def test_as_many_numbers_as_there_are(stored: str, wanted: str) -> None:
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, 6e-8])
    values = torch.cat([torch.randn(17, generator=torch.Generator().manual_seed(0)), special]).double()
    for count in (1, 7, len(values)):
        assert_as_torch(values[:count].flip(0).to(TYPES[stored]), stored, wanted)
    convert = converter(stored, wanted, "t")
    assert convert is not None
    assert not convert(np.empty(0, np.uint8)).size


def test_a_nan_of_any_bits_stays_one() -> None:
    """Rounded as a number, the largest would be -0."""
    bits = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, -0x7FFFFF], dtype=torch.int32)
    assert_as_torch(bits.view(torch.float32), "F32", "BF16")


def test_only_plain_floats_change() -> None:
    assert [target(code, "BF16") for code in ("F32", "F16", "F64", "BF16")] == ["BF16"] * 4
    assert [target(code, "F16") for code in ("F8_E4M3", "I64", "BOOL", "U8")] == ["F8_E4M3", "I64", "BOOL", "U8"]
    assert target("F16", None) == "F16"
    assert converter("F16", "F16", "t") is None


def test_types_are_named_as_users_do() -> None:
    assert (parse_dtype("BF16"), parse_dtype("fp32"), parse_dtype(None)) == ("BF16", "F32", None)
    with pytest.raises(NestlingError, match="dtype 'f16' cannot be written; did you mean 'fp16'"):
        parse_dtype("f16")
