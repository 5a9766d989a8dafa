"""Draws: what stock transformers' warpers leave in, and the shares that probabilities say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from nestling.errors import NestlingError
from nestling.infer.sampling import Row, Sampling, choose, draw

GRID = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000


@given(
    st.integers(0, 2**32),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    st.sampled_from([0, 1, 3, 50]),
)
def test_draws_have_the_shares_that_stocks_warpers_leave(seed: int, heat: float, top_p: float, top_k: int) -> None:
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    warped = TemperatureLogitsWarper(heat)(None, logits)
    if top_k:
        warped = TopKLogitsWarper(top_k)(None, warped)
    warped = TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped
    found = draw(logits.expand(4000, 9), [Sampling(heat, top_p, top_k)] * 4000, GRID.tolist())
    share = torch.bincount(found, minlength=9) / 4000
    torch.testing.assert_close(share.double(), warped.softmax(-1)[0], atol=1e-3, rtol=0)


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-30])
@pytest.mark.parametrize("uniform", [0.0, 0.3, 1 - 2**-53])
def test_near_temperature_nought_a_draw_is_greedy(temperature: float, uniform: float) -> None:
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0)) * 30
    found = draw(logits, [Sampling(temperature)] * 3, [uniform] * 3)
    assert found.tolist() == logits.argmax(-1).tolist()


def test_every_row_has_its_own_way() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0, 2.0]] * 3)
    ways = [Sampling(), Sampling(1.0, top_k=1), Sampling(1e-3)]
    assert choose(logits, [Row([1], 5, way) for way in ways]) == [2, 2, 2]
    rows = [Row([1], 5, Sampling(2.0), seed="a"), Row([1], 5, Sampling(2.0), seed="a"), Row([1], 5)]
    drawn = [choose(logits, rows) for _ in range(20)]
    assert all(first == second and third == 2 for first, second, third in drawn)
    assert len({first for first, _, _ in drawn}) > 1
    again = Row([1], 5, Sampling(2.0), seed="a")
    assert [choose(logits[:1], [again])[0] for _ in range(20)] == [first for first, _, _ in drawn]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_tokens_that_can_be(uniform: float) -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    for sampling in (Sampling(1.0), Sampling(1.0, top_k=3)):
        assert draw(logits, [sampling], [uniform]).item() in (1, 2)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"temperature": -1.0}, "temperature = -1.0 must be 0 or above"),
        ({"temperature": float("nan")}, "must be 0 or above"),
        ({"top_p": 0.0}, r"top_p = 0.0 is outside \(0, 1\]"),
        ({"top_p": 1.5}, "outside"),
        ({"top_k": -1}, "top_k = -1"),
    ],
)
def test_what_cannot_be_is_refused(changed: dict[str, float], words: str) -> None:
    with pytest.raises(NestlingError, match=words):
        Sampling(**changed)
