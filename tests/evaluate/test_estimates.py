"""Estimates against brute force, intervals against simulation."""

from itertools import combinations
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestling.evaluate.estimates import mean_interval, pass_at_k, ratio_interval, wilson


@given(flags=st.lists(st.booleans(), min_size=1, max_size=8), data=st.data())
def test_pass_at_k_is_the_share_of_all_draws_with_a_right_answer(flags: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(flags)))
    drawn = [any(draw) for draw in combinations(flags, k)]
    assert pass_at_k(len(flags), sum(flags), k) == pytest.approx(fmean(drawn), abs=1e-12)


@given(flags=st.lists(st.booleans(), min_size=1, max_size=300))
def test_with_one_answer_each_the_interval_is_wilsons(flags: list[bool]) -> None:
    assert mean_interval([float(flag) for flag in flags]) == pytest.approx(wilson(sum(flags), len(flags)), abs=1e-9)


@given(scores=st.lists(st.sampled_from([0, 0.25, 0.5, 0.75, 1]), min_size=1, max_size=60))
def test_an_interval_holds_the_mean_and_stays_within_its_two_extremes(scores: list[float]) -> None:
    low, high = mean_interval(scores, 4)
    mean = fmean(scores)
    assert 0 <= low <= mean + 1e-12
    assert mean - 1e-12 <= high <= 1
    widest, narrowest = wilson(mean * len(scores), len(scores)), wilson(mean * 4 * len(scores), 4 * len(scores))
    assert high - low <= widest[1] - widest[0] + 1e-9
    assert high - low >= min(narrowest[1] - narrowest[0], high - low) - 1e-9


@pytest.mark.parametrize(("problems", "samples"), [(30, 8), (100, 4), (60, 16)])
def test_the_interval_of_a_mean_of_n_covers_the_truth_about_as_often_as_it_says(problems: int, samples: int) -> None:
    """Problems differ in difficulty (Beta 1, 1), so answers to one are alike: counting answers alone is too sure."""
    random = np.random.default_rng(0)
    ours = naive = 0
    for _ in range(1500):
        rates = random.beta(1.0, 1.0, problems)
        scores = random.binomial(samples, rates) / samples
        low, high = mean_interval(list(scores), samples)
        ours += low <= 0.5 <= high
        low, high = wilson(scores.sum() * samples, problems * samples)
        naive += low <= 0.5 <= high
    assert ours / 1500 == pytest.approx(0.95, abs=0.02)
    assert naive / 1500 < 0.88


def test_the_interval_of_a_ratio_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(1500):
        weights = random.integers(10, 200, 50).astype(float)
        totals = weights * (2 + random.normal(0, 0.5, 50)) + random.normal(0, 1, 50) * np.sqrt(weights)
        low, high = ratio_interval(list(totals), list(weights)) or (0, 0)
        covered += low <= 2 <= high
    assert covered / 1500 == pytest.approx(0.95, abs=0.025)
    assert ratio_interval([1.0], [1.0]) is None
