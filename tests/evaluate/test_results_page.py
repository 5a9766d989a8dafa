"""The page of evaluations: figures gathered and averaged right, the front by brute force, whole and self-contained."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("jinja2")

from nestling.errors import NestlingError  # noqa: E402
from nestling.evaluate.results import compare, front, gather, tokens_of  # noqa: E402
from nestling.evaluate.results_page import _label, markdown, render, write_page  # noqa: E402

SIZES = {"100%": 4_000_000, "75%": 3_000_000, "50%": 2_000_000}
SCORES = {"100%": (0.9, 0.6), "75%": (0.88, 0.5), "50%": (0.8, 0.42), "other-3M": (0.7, 0.55)}


def result(name: str, task: str, place: int, directory: str = "/models/owl") -> dict[str, Any]:
    parameters, score = SIZES.get(name, 3_000_000), SCORES[name][place]
    found = {
        "metric": "pass@1", "score": score, "interval": [score - 0.04, score + 0.03], "problems": 200, "samples": 1,
        "tokens": 1000 * (place + 1), "tokens_per_second": 8e9 / parameters, "no_answer": place * 7, "cut_off": 0,
    }  # fmt: skip
    settings = {
        "problems": 200, "samples": 1, "sampling": {"temperature": 0.0, "top_p": 1.0, "max_tokens": 64},
        "scorer": "its verifier", "files": {"model.safetensors": "abcdef0123456789"},
    }  # fmt: skip
    backend = "nestling" if name in SIZES else "transformers"
    about = {"name": name, "backend": backend, "directory": directory, "parameters": parameters}
    return {
        "format": 1, "task": task, "model": about | {"bytes": 2 * parameters}, "result": found, "settings": settings,
        "seed": 0, "date": "2026-11-24", "versions": {"nestling": "0.1.0"}, "machine": "a machine",
        "command": "nestling eval <x>",
    }  # fmt: skip


def reading(name: str, perplexity: float) -> dict[str, Any]:
    one = result(name, "perplexity:file=t.jsonl", 0)
    one["result"] = {"metric": "perplexity", "score": perplexity, "interval": None, "tokens": 9}
    one["settings"] = {"documents": 40, "window": 64, "stride": 32, "scorer": "every token", "files": {}}
    return one


@pytest.fixture
def evals(tmp_path: Path) -> Path:
    rows = [result(name, task, k) for name in SIZES for k, task in enumerate(("sums", "owls<&>"))]
    rows += [result("other-3M", task, k, "/models/other") for k, task in enumerate(("sums", "owls<&>"))]
    rows += [reading(name, 7.25 + k) for k, name in enumerate(SIZES)]
    for number, row in enumerate(rows):
        (tmp_path / "out" / str(number)).mkdir(parents=True)
        (tmp_path / "out" / str(number) / "t.json").write_text(json.dumps(row))
    (tmp_path / "out" / "foreign.json").write_text('{"something": "else"}')
    return tmp_path / "out"


def test_models_are_gathered_the_family_first_largest_first(evals: Path) -> None:
    results = gather([evals])
    assert [(model.name, model.member) for model in results.models] == [
        ("100%", True), ("75%", True), ("50%", True), ("other-3M", False)
    ]  # fmt: skip
    assert results.averaged == ["sums", "owls<&>"]
    mean, low, high = results.average(results.models[0]) or (0, 0, 0)
    assert mean == pytest.approx(0.75)
    assert mean - low == pytest.approx(0.04 / 2**0.5)
    assert high - mean == pytest.approx(0.03 / 2**0.5)
    assert results.models[2].tokens_per_second == pytest.approx(4000)
    assert results.models[1].score("perplexity:file=t.jsonl") == (8.25, 8.25, 8.25)
    assert results.models[3].score("perplexity:file=t.jsonl") is None


@given(points=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_the_front_is_what_none_beats(points: list[tuple[float, float]]) -> None:
    for more in (False, True):
        cost = (lambda p: -p[0]) if more else (lambda p: p[0])
        kept = {points[place] for place in front(points, more=more)}
        beaten = {
            a for a in points for b in points if a != b and cost(b) <= cost(a) and b[1] >= a[1]
        }  # fmt: skip
        assert kept == set(points) - beaten


def test_the_family_is_one_system_and_its_sizes_apart_another(evals: Path) -> None:
    sidecar = {"provenance": {"trained_tokens": {"teacher": 12_000_000}}}
    family, apart, other = compare(gather([evals]), sidecar)
    assert family["sizes"] == [2_000_000, 3_000_000, 4_000_000]
    assert family["averages"] == pytest.approx([0.61, 0.69, 0.75])
    assert (family["bytes"], apart["bytes"], other["bytes"]) == (8_000_000, 18_000_000, 6_000_000)
    assert (family["tokens"], apart["tokens"], other["tokens"]) == (12_000_000, None, None)
    assert tokens_of({"budgets": {"a": {"tokens": 5}, "b": {"tokens": 7}}}) == 7
    assert tokens_of({}) is None


def test_the_page_is_whole_and_needs_nothing_else(evals: Path) -> None:
    page = render(gather([evals]), {"family": None})
    assert not re.findall(r"""(?:src|href)=|url\((?!#)|https?://(?!www\.w3)""", page)
    for told in ("100%", "other-3M", "90.0", "± 3.5", "7.250", "7 without an answer", "abcdef0123456789", "a machine"):
        assert told in page, told
    assert "owls&lt;&amp;&gt;" in page
    assert "owls<" not in page
    assert "nestling eval &lt;x&gt;" in page
    assert page.count('class="line front"') == 3
    assert page.count("NaN") == page.count("None") == 0
    assert [len(re.findall(rf"<{tag}[ >]", page)) for tag in ("section", "table", "div")] == [
        page.count(f"</{tag}>") for tag in ("section", "table", "div")
    ]


def test_names_do_not_cover_one_another() -> None:
    points = [
        {"name": f"model {n}", "x": 80 + n % 3, "y": 50 + n, "whisker": [55 + n, 45 + n], "label": None}
        for n in range(5)
    ]
    apart = copy.deepcopy(points[:3])
    _label(apart, 280)
    for a in apart:
        for b in apart:
            (x, y), (u, v) = a["label"], b["label"]
            assert a is b or abs(y - v) >= 1500 / 280 or abs(x - u) >= 2 * (1.6 * 7 + 1)


def test_of_two_results_of_a_task_the_later_is_shown(evals: Path) -> None:
    for time, score, folder in (("09:00:00", 0.1, "a"), ("10:00:00", 0.2, "b"), ("09:30:00", 0.3, "c")):
        again = result("100%", "sums", 0) | {"time": time}
        again["result"]["score"] = score
        (evals / folder).mkdir()
        (evals / folder / "t.json").write_text(json.dumps(again))
    (found,) = [model for model in gather([evals]).models if model.name == "100%"]
    assert found.results["sums"]["result"]["score"] == 0.2


def test_the_markdown_has_the_same_figures(evals: Path) -> None:
    text = markdown(gather([evals]), {})
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == "| model | parameters | sums | owls<&> | perplexity:file=t.jsonl | average |"
    assert rows[2] == "| 100% | 4,000,000 | 90.0 ± 3.5 | 60.0 ± 3.5 | 7.250 ± 0.000 | 75.0 ± 2.5 |"
    assert rows[5].startswith("| other-3M | 3,000,000 | 70.0 ± 3.5 | 55.0 ± 3.5 | – |")
    assert len({row.count("|") for row in rows[:6]}) == 1
    assert "- sums: 200 problems; 1 answer each; greedy; at most 64 tokens; its verifier" in text


def test_pages_are_written_and_never_over_what_is_not_ours(evals: Path, tmp_path: Path) -> None:
    page, card = write_page([evals], None)
    assert (page, card) == (evals / "report.html", evals / "report.md")
    write_page([evals], None)
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    with pytest.raises(NestlingError, match="is not a page of nestling report"):
        write_page([evals], tmp_path / "mine.html")
    with pytest.raises(NestlingError, match=r"must end in \.html"):
        write_page([evals], tmp_path / "page.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NestlingError, match="no results of nestling eval"):
        write_page([tmp_path / "empty"], None)
    with pytest.raises(NestlingError, match="no such directory"):
        write_page([tmp_path / "none"], None)
