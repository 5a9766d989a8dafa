"""The report page: well-formed, self-contained, complete, honest about controls, and made of nothing but its input."""

import copy
import io
import math
import re
from typing import Any

import pytest

pytest.importorskip("jinja2")

from browser import Page
from nestling.evaluate.report import render, scatter, short, spread, terminal_table, thinned, verdicts  # noqa: E402

WIDTHS = {"100%": 128, "75%": 112, "50%": 96}
OWN = {  # kind -> axis -> size per member
    "M": {"mamba_num_heads": (8, 7, 5), "mamba_head_dim": (32, 32, 28)},
    "*": {"num_attention_heads": (4, 4, 2)},
    "-": {"intermediate_size": (512, 416, 304)},
}
FULL = {"M": 81234, "*": 49152, "-": 131072}
SOLVED = {
    "parent": 968, "100%": 972, "75%": 966, "50%": 951,
    "75% untrained": 214, "50% untrained": 12, "50% uniform": 884, "50% from scratch": 612,
}  # fmt: skip
ROLES = {"untrained": "untrained", "uniform": "uniform", "scratch": "scratch", "parent": "parent"}


def layer(index: int, kind: str, member: int, dropped: bool) -> dict[str, Any]:
    sizes = {"hidden_size": list(WIDTHS.values())[member], **{axis: of[member] for axis, of in OWN[kind].items()}}
    full = {"hidden_size": 128, **{axis: of[0] for axis, of in OWN[kind].items()}}
    parameters = FULL[kind] * math.prod(sizes.values()) // math.prod(full.values())
    return {
        "index": index, "kind": kind, "kept": not dropped, "parameters": 0 if dropped else parameters,
        "of": FULL[kind], "sizes": {} if dropped else sizes,
    }  # fmt: skip


def row(name: str) -> dict[str, Any]:
    share, budget = SOLVED[name] / 1000, None if name == "parent" else name.split()[0]
    wide = 1.96 * math.sqrt(share * (1 - share) / 1000)
    parameters = {"100%": 712345, "75%": 530112, "50%": 352904}.get(budget or "", 712345)
    return {
        "name": name, "role": ROLES.get(name.split()[-1], "elastic"), "parameters": parameters, "exact_match": share,
        "correct": SOLVED[name], "problems": 1000, "interval": [share - wide, share + wide], "budget": budget,
        "tokens_per_second": round(4100 * 712345 / parameters), "bytes": 2 * parameters,
    }  # fmt: skip


def decay(start: float, end: float, steps: int = 300) -> list[list[float]]:
    return [[s, end + (start - end) * math.exp(-s / 40) * (1 + 0.06 * math.sin(s * s))] for s in range(0, steps, 2)]


def sample() -> dict[str, Any]:
    pattern = "M-M*-M-"
    members = [
        {
            "name": name, "parameters": row(name)["parameters"], "target": round(712345 * float(name[:-1]) / 100),
            "layers": [layer(i, kind, m, name == "50%" and i == 5) for i, kind in enumerate(pattern)],
            "submodel": {"layers": list(range(7)), "hidden_size": WIDTHS[name]},
        }
        for m, name in enumerate(WIDTHS)
    ]  # fmt: skip
    choices = {
        name: {axis: decay(of[0], of[m], 120) for own in OWN.values() for axis, of in own.items()}
        | {"hidden_size": decay(128, WIDTHS[name], 120), "layers": decay(7, 7.5 - m / 2, 120)}
        for m, name in enumerate(WIDTHS) if m
    }  # fmt: skip
    return {
        "title": "Nestling demo", "date": "2026-11-24", "seed": 17, "quick": False,
        "versions": {"nestling": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.7"},
        "machine": "AMD EPYC, 2 cores", "command": "nestling run runs/demo.toml",
        "seconds": {"parent": 150.1, "rank": 4.0, "train": 160.0, "uniform": 71.3, "scratch": 68.2, "slice": 1.0,
                    "evaluate": 60.0},
        "task": "chain_sum, 2–3 terms of 1–2 digits; 1000 held-out problems, greedy generation in stock transformers, "
                "judged by the task's own verifier",
        "rows": [row(name) for name in SOLVED],
        "family": {"pattern": pattern, "parent": {"hidden_size": 128, "parameters": 712345}, "members": members},
        "curves": {
            "parent": {"loss": decay(3.6, 0.31, 900)},
            "elastic": {"100%": decay(0.4, 0.002), "75%": decay(2.5, 0.011), "50%": decay(4.2, 0.041),
                        "stages": [[0, "stage 1: 2 terms, soft masks"], [120, "stage 2: 2–3 terms, hard prefixes"]]},
            "router": {"expected": {"75%": decay(1.33, 1.0, 120), "50%": decay(1.9, 0.99, 120)}, "choices": choices},
        },
        "tokens": {"parent": 1900000, "elastic": {"100%": 310000, "75%": 620000, "50%": 930000}, "teacher": 1860000,
                   "uniform": 930000, "scratch": 920000},
        "next": ["nestling generate out/demo/elastic --budget 50% --prompt '50+23-88=' --temperature 0",
                 "nestling slice out/demo/elastic --budget 75% --out out/demo/three-quarters"],
    }  # fmt: skip


def page(report: dict[str, Any]) -> Page:
    parsed = Page(render(report))
    assert not parsed.open
    return parsed


def test_page_is_whole_and_loads_nothing() -> None:
    html = render(sample())
    parsed = page(sample())
    assert html.startswith("<!doctype html>")
    assert parsed.loads == []
    assert "script" not in parsed.tags
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    assert html.count("<svg") == html.count("</svg>") > 20


def test_every_row_stands_with_its_figures() -> None:
    text = page(sample()).reads()
    for one in sample()["rows"]:
        low, high = (f"{100 * bound:.1f}%" for bound in one["interval"])
        assert f"{one['name']}: {100 * one['exact_match']:.1f}%, 95% interval {low} to {high}" in text
        assert f"{one['correct']} of 1,000" in text
        assert f"{one['parameters']:,}" in text
        assert f"{one['tokens_per_second']:,}" in text
    assert "One training run, three models: the 50% size solves 95.1% of held‑out problems, its parent 96.8%." in text


def test_layers_are_nested_and_dropped_ones_hatched() -> None:
    html = render(sample())
    columns = re.findall(r"<title>Layer .*?</svg>", html, re.DOTALL)
    assert len(columns) == 7
    for column in columns:
        boxes = re.findall(r'width="([\d.]+)%" y="([\d.]+)%"', column)
        widths, tops = [float(w) for w, _ in boxes], [float(y) for _, y in boxes]
        assert widths == sorted(widths, reverse=True)
        assert tops == sorted(tops)
    assert [("url(#hatch2)" in column) for column in columns] == [index == 5 for index in range(7)]
    assert "50%: dropped" in columns[5]


def test_hostile_text_is_escaped() -> None:
    report = sample()
    evil = "<script>alert('x')</script>\"&"
    report["title"] = report["task"] = report["machine"] = report["versions"]["torch"] = evil
    report["rows"][3]["name"] = report["family"]["members"][2]["name"] = evil
    report["curves"]["elastic"][evil] = report["curves"]["elastic"].pop("50%")
    report["curves"]["elastic"]["stages"][0][1] = report["next"][0] = report["family"]["pattern"] = evil
    parsed = page(report)
    assert "script" not in parsed.tags
    assert parsed.reads().count(evil) > 8


@pytest.mark.parametrize(
    "missing",
    ["curves", "tokens", "family", "rows", "seconds", "next", "quick", "curves.router", "curves.elastic",
     "curves.parent", "curves.elastic.stages", "curves.router.choices", "tokens.elastic", "tokens.teacher"],
)  # fmt: skip
def test_page_stands_without_optional_parts(missing: str) -> None:
    report = sample()
    *path, key = missing.split(".")
    place = report
    for step in path:
        place = place[step]
    del place[key]
    assert "Where this comes from" in page(report).reads()


@pytest.mark.parametrize("name", SOLVED)
def test_page_and_table_stand_without_a_row(name: str) -> None:
    report = sample()
    report["rows"] = [one for one in report["rows"] if one["name"] != name]
    shown = re.findall(r'<th scope="row"><i class="swatch s\d"></i>([^<]+)', render(report))
    assert shown == [one for one in SOLVED if one != name]
    assert terminal_table(report).row_count == 7


def test_only_what_is_there_gets_a_section() -> None:
    bare = {key: sample()[key] for key in ("title", "date", "seed", "versions", "machine", "command", "task")}
    text = page(bare).reads()
    for heading in ("Results", "Accuracy", "The family", "How it learned", "What it cost", "Try next"):
        assert heading not in text


def test_missing_losses_are_skipped() -> None:
    report = sample()
    report["curves"]["elastic"]["50%"][3][1] = math.nan
    report["curves"]["elastic"]["75%"] = [[0, None], [1, math.inf]]
    html = render(report)
    assert "nan" not in html
    assert "inf" not in re.sub(r"[a-z]inf|inf[a-z]", "", html)


def test_control_that_wins_is_said() -> None:
    report = sample()
    text = page(report).reads()
    assert "The elastic 50% size is ahead of 50% uniform, its closest control: 95.1% against 88.4%." in text
    report["rows"][6] |= {"exact_match": 0.958, "correct": 958, "interval": [0.944, 0.969]}
    said = "50% uniform beats the elastic 50% size: 95.8% against 95.1%, and their 95% intervals overlap."
    assert said in page(report).reads()
    assert said in str(terminal_table(report).caption)
    assert "ahead of 50%" not in page(report).reads()
    report["rows"][6]["exact_match"] = 0.951
    assert "50% uniform equals the elastic 50% size" in page(report).reads()


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all numbers; of a long list (a curve, the layers, the rows) only of its last element."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [path]
    if not isinstance(value, dict | list):
        return []
    if isinstance(value, dict):
        return [leaf for key, one in value.items() for leaf in leaves(one, (*path, key))]
    first = len(value) - 1 if len(value) > 6 else 0
    return [leaf for i in range(first, len(value)) for leaf in leaves(value[i], (*path, i))]


def test_every_number_of_the_input_reaches_the_page() -> None:
    report = sample()
    before = render(report)
    unseen = []
    for *path, key in (leaf for leaf in leaves(report) if leaf[-1] not in ("index", "of") and "submodel" not in leaf):
        place: Any = report
        for step in path:
            place = place[step]
        old = place[key]
        place[key] = old * 2 + 1 if isinstance(old, int) else old * 0.75 + 0.01
        if render(report) == before:
            unseen.append((*path, key))
        place[key] = old
    assert unseen == []


def test_input_is_left_alone() -> None:
    report = sample()
    copied = copy.deepcopy(report)
    render(report)
    assert report == copied


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [(None, "", "–"), (0, "", "0"), (999, "", "999"), (712345, "", "712 k"), (999999, "", "1 M"),
     (1424690, "B", "1.42 MB"), (8888227328, "", "8.89 B"), (17776454656, "B", "17.8 GB")],
)  # fmt: skip
def test_short_numbers(number: float | None, unit: str, text: str) -> None:
    assert short(number, unit) == text


def test_labels_keep_their_distance() -> None:
    placed = spread([99.0, 98.0, 10.0, 97.5], 6.0)
    assert sorted(placed) == [10.0, 88.0, 94.0, 100.0]
    drawn = scatter(sample()["rows"])
    assert drawn is not None
    labels = sorted(p["label"] for p in drawn["points"] if p["label"] is not None and p["left"])
    assert all(b - a >= 5 for a, b in zip(labels, labels[1:], strict=False))


def test_thinned_curves_keep_their_mean() -> None:
    points, run = thinned([[step, float(step)] for step in range(1000)], limit=100)
    assert (len(points), run) == (100, 10)
    assert points[0] == (4.5, 4.5)


def test_terminal_table_prints() -> None:
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(terminal_table(sample()))
    text = console.export_text()
    for name, solved in SOLVED.items():
        assert re.search(rf"{re.escape(name)} .*{solved / 10:.1f}%", text)


def test_of_perplexities_the_lower_is_ahead() -> None:
    def row(name: str, role: str, perplexity: float) -> dict[str, Any]:
        interval = [perplexity - 1, perplexity + 1]
        return {"name": name, "role": role, "budget": "50%", "perplexity": perplexity, "interval": interval}

    elastic = row("50%", "elastic", 20.0)
    ((lost, said),) = verdicts([elastic, row("50% untrained", "untrained", 40.0)])
    assert not lost
    assert "The elastic 50% size is ahead of 50% untrained: 20.00 against 40.00" in said
    ((lost, said),) = verdicts([elastic, row("50% uniform", "uniform", 15.0)])
    assert lost
    assert "50% uniform beats the elastic 50% size: 15.00 against 20.00" in said
    ((lost, said),) = verdicts([elastic, row("50% uniform", "uniform", 20.0)])
    assert not lost
    assert "50% uniform equals the elastic 50% size" in said
