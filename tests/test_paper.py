"""The papers' tables: what is printed, what stock's models and plain arithmetic give, and the difference."""

import json
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction
from statistics import mean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import stock
from nestling import paper, printout
from nestling.arch.presets import PRESETS


def test_memory_is_two_bytes_per_parameter_of_the_stock_models() -> None:
    twelve, nine, thirty = (
        2 * stock.numel(stock.on_meta(PRESETS[name]))
        for name in ("nemotron-nano-12b-v2", "nemotron-nano-9b-v2", "nemotron-3-nano-30b-a3b")
    )
    computed = [figure.computed and float(figure.computed) for figure in paper.memory()]
    assert computed == pytest.approx(
        [twelve / 1e9, (twelve + nine) / 1e9, 100 * nine / (twelve + nine), 100 * 18 / 42]
        + [thirty / 1e9, thirty / 1024**3, None]
    )


def test_memory_as_printed_and_where_it_differs() -> None:
    found = [(str(figure.printed), figure.unit, figure.agrees) for figure in paper.memory()]
    assert found == [
        ("24", "GB", False),  # 24.62
        ("42", "GB", True),  # 42.40
        ("43", "%", False),  # 41.93
        ("43", "%", True),  # of the rounded ones
        ("58.9", "GB", False),  # 63.16
        ("58.9", "GiB", False),  # 58.82
        ("126.1", "GB", None),
    ]


def test_tokens_and_steps() -> None:
    pretraining, compression, elastic, *ratios, first, second = paper.tokens()
    assert (pretraining.printed, pretraining.unit, pretraining.computed) == (40, "T", None)
    assert (compression.printed, compression.computed) == (750, 480 + 270)
    assert (elastic.printed, elastic.computed) == (110, 65 + 45)
    assert [(float(ratio.printed), round(float(ratio.computed), 2)) for ratio in ratios] == [(360, 363.64), (7, 6.82)]
    assert all(figure.agrees for figure in (compression, elastic, *ratios))
    assert first.printed is second.printed is None
    assert [round(first.computed), round(second.computed)] == [5166, 1788]


def test_averages_are_the_means_of_their_rows_but_for_one() -> None:
    figures = {figure.what: figure for figure in paper.averages()}
    for model, (_, row) in paper.SCORES.items():
        assert float(figures[model].computed) == pytest.approx(mean(map(float, row.split())))
        assert len(row.split()) == len(paper.TASKS)
    assert [model for model, figure in figures.items() if not figure.agrees] == ["NanoV2-9B"]
    assert figures["NanoV2-9B"].difference == Fraction("-0.40")


@given(st.fractions(-(10**6), 10**6), st.integers(-2, 4))
def test_a_figure_agrees_with_its_own_rounding_and_with_no_other(value: Fraction, digits: int) -> None:
    exact = Decimal(value.numerator) / Decimal(value.denominator)
    step = Decimal(1).scaleb(-digits)
    rounded = (exact / step).quantize(Decimal(1), ROUND_HALF_UP).scaleb(-digits)
    figure = paper.Figure("", rounded, Fraction(exact), "", "")
    assert figure.agrees
    assert figure.difference == Fraction(exact) - Fraction(rounded)
    for wrong in (rounded + 2 * step, rounded - 2 * step):
        assert not paper.Figure("", wrong, Fraction(exact), "", "").agrees


def test_the_compare_table() -> None:
    found = {row["system"]: row for row in paper.compare()}
    assert all(row["scores"] == "published" for row in found.values())

    def summary(row: dict[str, Any]) -> tuple[Any, ...]:
        scores = [average["printed"] for average in row["averages"]]
        return row["sizes"], scores, *(row[key] and row[key]["printed"] for key in ("tokens", "memory"))

    assert {system: summary(row) for system, row in found.items()} == {
        "Nemotron Elastic": ([6, 9, 12], [70.61, 75.95, 77.41], 110, 24),
        "NanoV2 compression": ([9, 12], [75.99, 77.38], 750, 42),
        "Qwen3-8B": ([8], [72.68], None, None),
    }


def test_the_tables_as_json_say_printed_computed_and_their_difference() -> None:
    found = json.loads(json.dumps(paper.tables()))
    assert list(found) == ["memory", "tokens", "averages", "compare", "notes"]
    assert found["memory"][0] == {
        "what": "Elastic: 12B that holds 9B and 6B",
        "printed": 24,
        "computed": 24.620002304,
        "difference": 0.620002304,
        "agrees": False,
        "unit": "GB",
        "source": "arXiv 2511.16664",
    }
    assert all(entry["source"].startswith("arXiv ") for part in list(found)[:3] for entry in found[part])


@pytest.mark.parametrize("width", [80, 160])
def test_the_printout_fits_and_says_what_is_published(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    printout.show_paper(paper.tables())
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= width
    for words in (
        "70.61 / 75.95 / 77.41   110 B  24 GB (24.62)",
        "75.99 (75.59) / 77.38   750 B  42 GB (42.40)",
        "Compare: published scores",
        "The sizes of the published Elastic 9B and 6B are not public",
    ):
        assert words in text
    assert all(
        "differs" in line or "agrees" in line for line in text.splitlines() if "-0.400" in line or "+0.3" in line
    )
    assert "leave 23.7B parameters" in " ".join(text.split())
