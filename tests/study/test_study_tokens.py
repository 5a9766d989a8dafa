"""What a study says of planted curves: when a size gets there, what it took, and what is missing."""

import math
import statistics

import pytest
from tiny import planted, result

from nestling.errors import NestlingError
from nestling.study.claims import FAILS, HOLDS, MISSING, OPEN, claims
from nestling.study.seeds import Figure, paired
from nestling.study.tokens import Results

ARMS = {"elastic": "elastic", "alone-60": "alone", "alone-40": "alone", "far": "scratch"}
SIZES = {"elastic": ["60%", "40%"], "alone-60": ["60%"], "alone-40": ["40%"], "far": ["40%"]}
ALONE = ["alone-60", "alone-40"]
WHOLE = [1.0] * 5


def family(seed: int, large: list[float], small: list[float]) -> dict[str, object]:
    return result("elastic", seed, {"100%": WHOLE, "60%": large, "40%": small}, parent=0.5)


def study(*seeds: int) -> Results:
    """Goals of 0.45: 60 % gets there after 200 tokens in the family and 100 alone, 40 % after 400 and 300."""
    rows = []
    for seed in seeds:
        rows += [
            family(seed, [0.3, 0.45, 0.44, 0.5, 0.5], [0.1, 0.2, 0.3, 0.46, 0.47]),
            result("alone-60", seed, {"60%": [0.46, 0.4, 0.5]}, parent=0.5),
            result("alone-40", seed, {"40%": [0.1, 0.449, 0.45]}, parent=0.5),
            result("far", seed, {"40%": [0.1, 0.2, 0.3, 0.4]}, parent=0.5, each=1000),
        ]
    return planted(ARMS, SIZES, *rows)


def test_a_size_has_reached_its_goal_at_the_first_look_that_shows_it() -> None:
    found = study(0)
    spent = found.spent("elastic", 0)
    assert spent is not None
    assert (spent.student, spent.teacher, spent.tokens, spent.both, spent.reached) == (1200, 400, 400, 1600, True)
    large = found.spent("elastic", 0, ["60%"])
    assert large is not None
    assert (large.student, large.tokens) == (600, 200)
    assert found.read("elastic", "60%").values == {0: 200}
    assert found.read("elastic", "40%").values == {0: 400}


def test_every_share_that_was_asked_for_is_counted_to() -> None:
    found = study(0)
    found.about["reach"] = [0.9, 0.6]  # 0.45 and 0.3
    high, low = (each.spent("elastic", 0) for each in found.goals())
    assert high is not None
    assert low is not None
    assert (high.tokens, low.tokens) == (400, 300)
    assert sum("from nothing" in claim.what for claim in claims(found)) == 2


def test_sizes_made_apart_are_added_up_with_their_search() -> None:
    found = study(0)
    both = found.apart(ALONE, 0)
    assert both is not None
    assert (both.student, both.teacher, both.tokens, both.reached) == (400, 400, 400, True)
    searched = {"tried": [], "chosen": {}, "student": 50, "teacher": 60, "tokens": 50, "seconds": 1.0}
    rows = [result("alone-60", 0, {"60%": [0.4, 0.5]}, parent=0.5, search=searched)]
    one = planted({"alone-60": "searched"}, {"alone-60": ["60%"]}, *rows)
    without, with_it = (one.apart(["alone-60"], 0, search) for search in (False, True))
    assert without is not None
    assert with_it is not None
    assert (without.student, with_it.student, with_it.teacher) == (200, 250, 260)


def test_a_sum_lacks_the_seeds_that_one_of_its_arms_lacks() -> None:
    found = study(0, 1)
    rows = {key: row for key, row in found.rows.items() if key != ("alone-40", 1)}
    without = Results(found.about, rows)
    assert without.apart(ALONE, 1) is None
    assert without.ratio("elastic", ALONE, "student").missing == (1, 2)
    none = Results(found.about, {key: row for key, row in found.rows.items() if key[0] != "alone-40"})
    assert none.rivals("alone") == [["alone-60"]]  # an arm that was not begun leaves its size out, on both sides
    assert none.ratio("elastic", ["alone-60"], "student").values == {0: 100 / 600, 1: 100 / 600}


def test_what_was_not_reached_is_a_lower_bound_and_said_to_be() -> None:
    found = study(0, 1, 2)
    ratio = found.ratio("elastic", ["far"], "student")
    assert ratio.values == dict.fromkeys((0, 1, 2), 4000 / 1200)
    assert ratio.bounds == {0, 1, 2}
    assert ratio.half is None
    claim = next(claim for claim in claims(found) if "from nothing" in claim.what)
    assert claim.measured == "≥ 3.33×"
    assert claim.verdict == HOLDS
    assert "lower bound" in claim.words


def test_an_elastic_run_that_did_not_get_there_gives_an_upper_bound() -> None:
    rows = [family(0, WHOLE, [0.1] * 5), result("alone-40", 0, {"40%": [0.5]}, parent=0.5)]
    rows += [family(1, WHOLE, [0.1] * 5), result("alone-40", 1, {"40%": [0.1]}, parent=0.5)]  # nor did this one
    found = planted({"elastic": "elastic", "alone-40": "alone"}, SIZES, *rows)
    ratio = found.ratio("elastic", ["alone-40"], "student")
    assert (ratio.values, ratio.ceilings, ratio.missing) == ({0: 100 / 1500}, {0}, (1, 2))
    assert ratio.said(lambda value: f"{value:.2f}") == "≤ 0.07, missing, missing"
    assert Figure((0, 1), {0: 1.0, 1: 2.0}, frozenset({0}), frozenset({1})).said(str) == "≥ 1.0, ≤ 2.0"


def test_work_counts_learning_three_times_at_the_size_of_what_learns() -> None:
    spent = study(0).spent("elastic", 0)
    assert spent is not None
    assert spent.work == 400 + 3 * 400 * (10 + 10 + 10) / 20  # each of three sizes has 10 of 20 parameters


def test_the_ratio_compares_the_same_sizes() -> None:
    rows = [family(0, [0.1] * 5, [0.1, 0.46, 0.5, 0.5, 0.5]), result("alone-40", 0, {"40%": [0.5]}, parent=0.5)]
    found = planted({"elastic": "elastic", "alone-40": "alone"}, SIZES, *rows)  # 60 % never gets there
    assert found.ratio("elastic", ["alone-40"], "student").values == {0: 100 / 600}


def test_missing_seeds_are_named_and_not_averaged_over() -> None:
    found = study(0, 2)
    accuracy = found.at("elastic", "40%")
    assert (accuracy.missing, accuracy.mean, accuracy.half) == ((1,), None, None)
    assert accuracy.said(lambda value: f"{value:.2f}") == "0.47, missing, 0.47"
    said = {claim.verdict for claim in claims(found) if "alone" in claim.what}
    assert said == {MISSING}
    assert Figure((0, 1), {}).said(str) == "missing"


def test_the_interval_is_student_s() -> None:
    values = {0: 1.0, 1: 2.0, 2: 4.0}
    figure = Figure((0, 1, 2), values)
    t = 4.302652729911275  # of 2 degrees of freedom, 97.5 %
    assert figure.half == pytest.approx(t * statistics.stdev(values.values()) / math.sqrt(3), rel=1e-3)
    assert figure.said(lambda value: f"{value:.1f}") == "2.3 ± 3.8"
    assert paired(figure, Figure((0, 1, 2), {0: 0.5, 2: 3.0})).values == {0: 0.5, 2: 1.0}


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [
        ((0.001, 0.0, -0.001), HOLDS),
        ((0.05, 0.051, 0.052), HOLDS),
        ((-0.05, -0.051, -0.052), FAILS),
        ((-0.05, 0.05, 0.0), OPEN),
        ((0.0, 0.1, 0.05), OPEN),
        ((0.02, 0.05, 0.03), HOLDS),
        ((-0.021, -0.018, -0.019), FAILS),
    ],
)
def test_as_good_as_a_size_made_alone(gaps: tuple[float, ...], verdict: str) -> None:
    rows = []
    for seed, gap in enumerate(gaps):
        rows += [family(seed, WHOLE, [0.5] * 4 + [0.6 + gap]), result("alone-40", seed, {"40%": [0.6]}, parent=0.5)]
    found = planted({"elastic": "elastic", "alone-40": "alone"}, SIZES, *rows)
    assert claims(found)[0].verdict == verdict


def test_what_a_second_stage_lifts_is_counted_from_the_end_of_the_first() -> None:
    rows = [
        result("even", seed, {"100%": [0.5, 0.6, 0.9], "40%": [0.1, 0.2, 0.8 + seed / 1000]}, parent=0.9)
        for seed in (0, 1, 2)
    ]
    found = planted({"even": "sampling"}, {"even": ["40%"]}, *rows)
    found.about["arms"]["even"]["train"] = {"stages": [{"steps": 2}, {"steps": 1}]}
    claim = claims(found)[0]
    assert claim.verdict == HOLDS
    assert claim.measured.startswith("40% +60.1 ± 0.2 points / 100% +30.0 ± 0.0 points")


def on_text(family: list[float], alone: list[float]) -> Results:
    """Losses in nats per token of 40 % with three seeds, the parent's being log(20); at the end, and log(50) before."""
    rows = []
    for seed, (ours, theirs) in enumerate(zip(family, alone, strict=True)):
        start, parent = math.log(50), math.log(20)
        curves = {"100%": [parent, parent], "40%": [start, ours]}
        rows += [
            result("elastic", seed, curves, parent=parent, seen="loss"),
            result("alone-40", seed, {"40%": [start, theirs]}, parent=parent, seen="loss"),
        ]
    found = planted({"elastic": "elastic", "alone-40": "alone"}, SIZES, *rows)
    found.about["measure"] = "loss"
    return found


def test_text_is_compared_by_perplexity_the_lower_the_better() -> None:
    losses = [math.log(value) for value in (22.0, 22.2, 22.3)]
    found = on_text(losses, [math.log(23.0)] * 3)
    assert found.measure.said(found.parent()) == "20.00 ± 0.00"
    assert found.measure.said(found.at("elastic", "40%")).startswith("22.17 ± ")
    spent = [found.spent("elastic", seed, ["40%"]) for seed in (0, 1, 2)]  # at most 20 / 0.9 = 22.22
    assert [one.reached for one in spent if one is not None] == [True, True, False]
    claim = claims(found)[0]
    mean = statistics.fmean(loss - math.log(23.0) for loss in losses)
    assert claim.verdict == HOLDS
    assert claim.measured.startswith(f"{mean:+.3f} ± ")
    assert claim.measured.endswith("nats of loss")
    assert claim.words.startswith(f"The family's size is better by {-mean:.3f} ± ")
    assert "at most 1.111 times the parent's perplexity" in claims(found)[1].what


def test_a_higher_loss_is_worse() -> None:
    found = on_text([math.log(22.0) + 0.05 + seed / 1e4 for seed in range(3)], [math.log(22.0)] * 3)
    claim = claims(found)[0]
    assert (claim.verdict, claim.measured) == (FAILS, "+0.050 ± 0.000 nats of loss")
    assert claim.words == "The family's size is worse by 0.050 ± 0.000 nats of loss."


def test_a_measure_of_another_version_is_refused() -> None:
    found = study(0)
    found.about["measure"] = "token"
    with pytest.raises(NestlingError, match=r"the measure 'token'.* exact, loss\. Run the recipe again"):
        found.parent()
