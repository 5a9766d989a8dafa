"""The axis algebra against nested loops."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestling.arch.axes import Layout
from nestling.arch.positions import positions

SIZES = {"a": 2, "b": 3, "c": 4}


def test_a_layout_reads_as_a_sum_of_products() -> None:
    layout = Layout.parse("a b + c, 1, b")
    assert layout.dims == ((("a", "b"), ("c",)), (("1",),), (("b",),))
    assert layout.shape(SIZES) == (2 * 3 + 4, 1, 3)
    assert layout.numel(SIZES) == 30
    assert layout.axes == {"a", "b", "c", "1"}


def test_sizes_may_be_fractions() -> None:
    assert Layout.parse("a b + c, b").numel({"a": 2, "b": 1.5, "c": 4}) == (2 * 1.5 + 4) * 1.5


@st.composite
def kept(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """Sizes, and kept positions of some axes: plain, and of `b` also one row per entry of `a`."""
    sizes = {axis: draw(st.integers(1, 4)) for axis in "abc"}
    keep = {}
    for axis in draw(st.sets(st.sampled_from("abc"))):
        count = draw(st.integers(1, sizes[axis]))
        order = st.permutations(range(sizes[axis])).map(lambda whole, count=count: list(whole[:count]))
        inside = axis == "b" and draw(st.booleans())
        keep[axis] = np.array(
            draw(st.lists(order, min_size=sizes["a"], max_size=sizes["a"])) if inside else draw(order)
        )
    return sizes, keep


@given(kept())
def test_positions_are_those_of_nested_loops(drawn: tuple[dict[str, int], dict[str, np.ndarray]]) -> None:
    sizes, keep = drawn

    def numbers(segment: str) -> list[int]:
        """Row-major numbers of the kept entries of a product, found by counting through all of it."""
        ranges = [range(sizes[axis]) for axis in segment]
        number = {entry: place for place, entry in enumerate(itertools.product(*ranges))}
        wanted = []
        for places in itertools.product(*(range(keep[a].shape[-1] if a in keep else sizes[a]) for a in segment)):
            entry: list[int] = []
            for axis, place in zip(segment, places, strict=True):
                order = keep.get(axis, np.arange(sizes[axis]))
                entry.append(int(order[entry[-1], place] if order.ndim == 2 else order[place]))
            wanted.append(number[tuple(entry)])
        return wanted

    rows, columns = positions(Layout.parse("a b c + c + a b, c"), sizes, keep)
    starts = np.cumsum([0, sizes["a"] * sizes["b"] * sizes["c"], sizes["c"]])
    expected = [
        start + row for start, segment in zip(starts, ("abc", "c", "ab"), strict=True) for row in numbers(segment)
    ]
    assert (np.arange(starts[-1] + sizes["a"] * sizes["b"]) if rows is None else rows).tolist() == expected
    assert (np.arange(sizes["c"]) if columns is None else columns).tolist() == numbers("c")


def test_a_dim_without_kept_axes_is_left_alone() -> None:
    assert positions(Layout.parse("a b, c, 1"), SIZES, {"c": np.array([1])})[::2] == (None, None)
    with pytest.raises(KeyError):
        Layout.parse("a x").shape(SIZES)
