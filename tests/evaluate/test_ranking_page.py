"""`nestling rank --inspect`: page and table hold what the arrays hold, knees are found, bad input is refused."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from browser import Page
from nestling import cli
from nestling.arch.architecture import Architecture
from nestling.arch.presets import PRESETS
from nestling.arch.submodel import tensors
from nestling.errors import NestlingError
from nestling.evaluate.inspection import layer_list, table
from nestling.evaluate.spelling import correlation, figure
from nestling.evaluate.spread import knee, read_spread, spread
from nestling.weights.ranking import FILE, Ranking

pytest.importorskip("jinja2")

from nestling.evaluate.ranking_page import render  # noqa: E402

ARCHITECTURE = Architecture(
    "M-*M-",
    vocab_size=16,
    hidden_size=40,
    intermediate_size=48,
    n_groups=2,
    mamba_num_heads=6,
    mamba_head_dim=20,
    ssm_state_size=4,
    num_key_value_heads=2,
    num_attention_heads=8,
    head_dim=8,
)
SHAPES = {
    "d": (40,), "f.1": (48,), "f.4": (48,), "h.0": (2, 3), "h.3": (2, 3), "p.0": (20,), "p.3": (20,), "q.2": (2, 4),
}  # fmt: skip
STABILITY = {name: 0.5 + 0.05 * place for place, name in enumerate([*SHAPES, "layers"])}
MADE = {
    "by": "nestling 9.8.7", "parent": "models/parent", "samples": 1024, "tokens": 345678, "length": 512, "batch": 8,
    "data": [{"file": "texts.jsonl", "weight": 0.75, "samples": 1011, "sha256": "0123456789abcdef" * 4}],
    "metrics": {"hidden": "l2", "ffn": "post", "mamba_heads": "signed", "mamba_channels": "sum",
                "attention_heads": "ablation"},
    "depth": {"method": "iterative", "rounds": 2}, "seed": 17, "seconds": 93.0,
}  # fmt: skip


def arrays() -> dict[str, np.ndarray]:
    """What a ranking file holds: an iterative one of two rounds that took layer 3 and then layer 1."""
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        score = rng.exponential(1, shape).astype(np.float32)
        found |= {f"score.{name}": score, f"order.{name}": np.argsort(-score, axis=-1)}
    found["rounds"] = np.array([[0.9, 0.2, 0.5, 0.1, 0.7], [0.95, 0.25, 0.6, np.nan, 0.8]], np.float32)
    found["score.layers"] = np.array([0.95, 0.25, 0.6, 0.1, 0.8], np.float32)
    found["order.layers"] = np.array([0, 4, 2, 1, 3])
    return found | {f"stability.{name}": np.array([value], np.float32) for name, value in STABILITY.items()}


def write(directory: Path, stored: dict[str, np.ndarray], made: Any = MADE) -> Path:
    """A checkpoint of zeros with this ranking beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(ARCHITECTURE.to_config({})))
    zeros = {tensor.name: np.zeros(tensor.shape, np.float32) for tensor in tensors(ARCHITECTURE)}
    save_file(zeros, directory / "model.safetensors")
    budgets = {"100%": {"submodel": {}}}
    (directory / "nestling.json").write_text(json.dumps({"format": 1, "budgets": budgets, "provenance": made}))
    save_file(stored, directory / FILE)
    return directory


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("inspect") / "elastic", arrays())


@pytest.fixture(scope="module")
def html(ranked: Path) -> str:
    return render(read_spread(ranked))


def tops(score: np.ndarray, percent: int) -> str:
    """By hand: of each group the best so many percent, added up and divided by everything."""
    rows = [sorted(map(float, row), reverse=True) for row in score.reshape(-1, score.shape[-1])]
    count = max(1, int(len(rows[0]) * percent / 100 + 1e-9))
    return f"{100 * sum(sum(row[:count]) for row in rows) / sum(map(sum, rows)):.1f}%"


# ---- the page


def test_page_is_whole_and_loads_nothing(html: str) -> None:
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert page.loads == []
    assert "script" not in page.tags
    assert not re.search(r"https?://|@import|url\(", html)
    assert "prefers-color-scheme: dark" in html
    assert html.count('role="img"><title>') == html.count('role="img"') - html.count('role="img" viewBox') > 15


def test_every_curve_stands_with_its_figures(html: str, ranked: Path) -> None:
    text, terminal = Page(html).reads(), shown_on_terminal(ranked)
    for name, shape in SHAPES.items():
        score = arrays()[f"score.{name}"]
        layer = name.partition(".")[2]
        said = f"layer {layer}" if layer else "all layers"
        size = f"2 × {shape[1]}" if len(shape) == 2 else f"{shape[0]}"
        shares = [tops(score, percent) for percent in (50, 75, 90)]
        assert re.search(
            rf"{said}, {size} positions\. the best 50% hold {shares[0]}; the best 75% hold {shares[1]}; "
            rf"the best 90% hold {shares[2]}; (no knee|knee \d+ \(\d+%\))\.",
            text,
        ), name
        ends = [f"{float(value):#.3g}" for value in (score.max(), np.median(score), score.min())]
        row = rf"{said} {size} {' '.join(shares)} (no knee|knee \d+ \(\d+%\)) {' '.join(ends)} {STABILITY[name]:.3f}"
        assert re.search(row, text), name
        assert re.search(rf"{layer or '–'} +{size} +{' +'.join(shares)} +(\d+|–) +{STABILITY[name]:.3f}", terminal), (
            name
        )


def test_drawn_curves_are_the_sorted_scores(html: str) -> None:
    drawn = re.findall(r'<polyline class="score" points="([^"]+)"/><polyline class="share" points="([^"]+)"', html)
    assert len(drawn) == len(SHAPES)
    for name, pair in zip(SHAPES, drawn, strict=True):
        score = arrays()[f"score.{name}"].astype(float)
        fallen = np.sort(score.reshape(-1, score.shape[-1]), axis=1)[:, ::-1].mean(0)
        scores, shares = (np.array([point.split(",") for point in line.split()], float) for line in pair)
        at = np.minimum(scores[:, 0] / 100 * len(fallen), len(fallen) - 1).astype(int)
        rises = [fallen[place] / fallen[0] * 100 for place in at]
        if len(fallen) > 32:  # else steps, whose corners belong to two positions
            assert np.allclose(100 - scores[:, 1], rises, atol=0.06)
        assert np.allclose([scores[0, 1], scores[-1, 1]], [0, 100 - fallen[-1] / fallen[0] * 100], atol=0.06)
        assert np.allclose(100 - shares[:, 1], np.interp(
            shares[:, 0], np.linspace(0, 100, len(fallen) + 1), [0, *np.cumsum(fallen) / fallen.sum() * 100]
        ), atol=0.06)  # fmt: skip


def test_a_long_curve_keeps_its_ends_and_its_head() -> None:
    sizes = {"hidden_size": 5000, "intermediate_size": 20}
    score = (1 / np.arange(1, 5001)).astype(np.float32)
    ranking = Ranking({"d": np.arange(5000)}, (0,), {"d": score, "layers": np.ones(1)})
    page = render(spread(Path("x"), Architecture("-", **sizes), ranking, {}))
    points = re.search(r'class="score" points="([^"]+)"', page)
    assert points is not None
    drawn = [tuple(map(float, point.split(","))) for point in points[1].split()]
    assert 40 < len(drawn) < 80
    assert drawn[:2] == [(0, 0), (0.01, 0)]
    assert drawn[-2:] == [(99.99, 99.98), (100, 99.98)]
    assert sum(x < 1 for x, _ in drawn) > 8


def test_head_maps_give_each_head_its_place_in_its_group(html: str) -> None:
    maps = re.findall(r'<table class="map".*?</table>', html, re.DOTALL)
    for name, one in zip(["h.0", "h.3", "q.2"], maps, strict=True):
        order, score = arrays()[f"order.{name}"], arrays()[f"score.{name}"]
        rows = [re.findall(r'<td class="h(\d)" title="([^"]+)">(\d+)</td>', row) for row in one.split("</tr>")[:-1]]
        for group, row in enumerate(rows):
            by_place = sorted(range(len(row)), key=lambda head, row=row: int(row[head][2]))
            assert by_place == order[group].tolist()
            assert [said for _, said, _ in row] == [f"{float(value):#.3g}" for value in score[group]]
            assert [int(shade) for shade, _, _ in row] == [min(5, int(6 * v / score.max())) for v in score[group]]


def test_many_heads_of_a_group_go_on_below() -> None:
    shape = Architecture("*", hidden_size=8, num_key_value_heads=2, num_attention_heads=40, head_dim=4)
    order = np.tile(np.arange(20), (2, 1))
    scores = {"q.0": np.tile(np.linspace(1, 0, 20), (2, 1)), "layers": np.ones(1)}
    page = render(spread(Path("x"), shape, Ranking({"q.0": order}, (0,), scores), {"depth": {"method": "cosine"}}))
    rows = re.findall(r'<tr><th scope="row">(\d?)</th>((?:<td class="h.*?</td>)+)</tr>', page)
    assert [(group, cells.count("<td")) for group, cells in rows] == [("0", 16), ("", 4), ("1", 16), ("", 4)]
    assert "1 − cosine of before and after, in model order" in page


def test_layers_stand_in_model_order_with_place_and_kind(html: str, ranked: Path) -> None:
    said = re.findall(r"<title>Layer (\d), ([\w-]+): place (\d), score ([\d.]+)</title>", html)
    assert said == [
        ("0", "Mamba-2", "1", "0.950"), ("1", "MLP", "4", "0.250"), ("2", "attention", "3", "0.600"),
        ("3", "Mamba-2", "5", "0.100"), ("4", "MLP", "2", "0.800"),
    ]  # fmt: skip
    assert re.findall(r"<b>(\d)</b><svg", html) == ["1", "4", "3", "5", "2"]
    heights = [float(h) for h in re.findall(r'<rect width="100%" y="[\d.]+%" height="([\d.]+)%"', html)]
    assert np.allclose(heights, np.array([0.95, 0.25, 0.6, 0.1, 0.8]) / 0.95 * 100, atol=0.01)
    text = Page(html).reads()
    assert "Of 5 layers, layer 0 (Mamba‑2) matters most and layer 3 (Mamba‑2) least" in text
    order = "1 0 Mamba-2 0.950 stays 2 4 MLP 0.800 stays 3 2 attention 0.600 stays 4 1 MLP 0.250 2 5 3 Mamba-2 0.100 1"
    assert order in text
    assert "0 Mamba-2 0.950" in shown_on_terminal(ranked)


def test_rounds_have_a_cell_for_every_layer_that_was_there(html: str) -> None:
    paths = re.findall(r'<path class="h\d" d="([^"]*)"', html)
    cells = sorted((int(row), int(layer)) for path in paths for layer, row in re.findall(r"M(\d+) (\d+)h1v1", path))
    assert cells == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (1, 2), (1, 4)]


def test_stability_is_on_a_labelled_scale(html: str) -> None:
    dots = re.findall(r'<circle( class="low")? cx="([\d.]+)%" cy="50%" r="4.5"><title>([^:]+): ([\d.]+)</title>', html)
    assert len(dots) == len(STABILITY)
    for low, at, _, value in dots:
        assert float(at) == pytest.approx((float(value) - 0.5) / 0.5 * 100, abs=0.1)
        assert bool(low) == (float(value) < 0.9)
    assert "1 of 9 orders is stable" in Page(html).reads()
    assert "least: 0.550, layer 1" in Page(html).reads()


def test_where_it_comes_from_is_said(html: str) -> None:
    text = Page(html).reads()
    for words in (
        "Parent models/parent", "texts.jsonl: 1011 samples, weight 0.75, sha256 0123456789ab…", "Samples 1,024",
        "Tokens 345,678", "at most 512 tokens", "Batch 8", "Depth iterative, 2 rounds", "Seed 17", "Time 1 min 33 s",
        "nestling 9.8.7", "Hidden channels l2", "FFN neurons post", "Attention heads ablation",
    ):  # fmt: skip
        assert words in text, words


@pytest.mark.parametrize("name", [name for name in arrays() if name.startswith(("score", "stab", "rounds"))])
def test_every_number_reaches_the_page(name: str, html: str, tmp_path: Path) -> None:
    kind, _, own = name.partition(".")
    indices = [index for index, value in np.ndenumerate(arrays()[name]) if np.isfinite(value)]
    for index in indices[:: 8 if len(indices) > 8 else 1]:
        stored = arrays()
        stored[name][index] *= 3 if kind == "rounds" else 0.9
        if kind == "score" and own != "layers":
            stored[f"order.{own}"] = np.argsort(-stored[name], axis=-1)
        assert render(read_spread(write(tmp_path / "elastic", stored))) != html, index


@pytest.mark.parametrize("made", [{}, {"data": "x", "depth": 3, "metrics": [], "length": "?"}])
def test_page_stands_without_provenance(made: Any, tmp_path: Path) -> None:
    assert "At a glance" in Page(render(read_spread(write(tmp_path / "x", arrays(), made)))).reads()


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>\"&"
    made = {**MADE, "parent": evil, "by": evil, "metrics": {"ffn": evil}, "depth": {"method": evil}, "task": evil}
    page = Page(render(read_spread(write(tmp_path / "<i>x", arrays(), made))))
    assert "script" not in page.tags
    assert page.reads().count(evil) >= 5


def test_a_ranking_without_stability_or_rounds_still_has_a_page(tmp_path: Path) -> None:
    kept = {name: array for name, array in arrays().items() if name.startswith(("order", "score"))}
    text = Page(render(read_spread(write(tmp_path / "x", kept)))).reads()
    assert "It was not measured: that needs metrics that look at data" in text
    assert "Round by round" not in text
    assert "Taken in round" not in text


def test_parts_that_never_act_have_no_shares(tmp_path: Path) -> None:
    stored = arrays() | {"score.f.1": np.zeros(48, np.float32), "score.q.2": np.zeros((2, 4), np.float32)}
    found = read_spread(write(tmp_path / "x", stored))
    assert "48 positions. the best 50% hold –; the best 75% hold –; the best 90% hold –; no knee" in render(found)
    assert "nan" not in render(found)


def test_the_page_of_a_large_model_stays_small() -> None:
    rng, shape = np.random.default_rng(0), PRESETS["nemotron-nano-12b-v2"]
    sizes = {"M": {"h": (8, 16), "p": (80,)}, "*": {"q": (8, 5)}, "-": {"f": (20480,)}}
    pattern = shape.hybrid_override_pattern
    wanted = {f"{axis}.{at}": own for at, kind in enumerate(pattern) for axis, own in sizes[kind].items()} | {
        "d": (5120,)
    }
    scores = {name: rng.pareto(1.5, own) for name, own in wanted.items()} | {"layers": rng.pareto(1, 62)}
    orders = {name: np.argsort(-score, axis=-1) for name, score in scores.items()}
    layers = tuple(int(layer) for layer in orders.pop("layers"))
    rounds = np.tile(scores["layers"], (31, 1))
    page = render(spread(Path("wide"), shape, Ranking(orders, layers, scores, {}, rounds), {}))
    assert len(page) < 1_000_000
    assert page.count('<polyline class="score"') == 91
    Page(page)


# ---- knees


@settings(max_examples=200)
@given(st.integers(16, 300), st.data(), st.floats(0.0, 5.0), st.floats(0.1, 100.0))
def test_the_knee_of_a_step_is_the_step(size: int, data: st.DataObject, low: float, height: float) -> None:
    before = data.draw(st.integers(1, size - 1))
    assert knee(np.array([low + height] * before + [low] * (size - before))) == before


@settings(max_examples=200)
@given(st.integers(16, 300), st.data(), st.integers(2, 50))
def test_the_knee_of_two_slopes_is_where_they_meet(size: int, data: st.DataObject, ratio: int) -> None:
    """Exact in integers: `corner` steep steps, then shallow ones, or the other way round."""
    corner = data.draw(st.integers(size // 4, 3 * size // 4))
    steep, shallow = [ratio] * corner, [1] * (size - 1 - corner)
    straight = corner * (1 - corner / (size - 1)) * (ratio - 1)
    height = ratio * corner + size - 1 - corner
    fallen = np.array([height, *(height - np.cumsum([*steep, *shallow]))], float)
    if abs(straight / height - 0.2) > 1e-6:
        assert knee(fallen) == (corner if straight / height > 0.2 else None)
    flipped = fallen[0] - fallen[::-1]  # shallow first: the plateau's last position counts
    if abs(straight / height - 0.2) > 1e-6:
        assert knee(flipped) == (size - corner if straight / height > 0.2 else None)


@settings(max_examples=200)
@given(st.integers(1, 400), st.floats(0.0, 9.0), st.floats(0.001, 9.0))
def test_a_straight_line_has_no_knee(size: int, low: float, slope: float) -> None:
    assert knee(low + slope * np.arange(size)[::-1]) is None
    assert knee(np.full(size, low)) is None


def test_uniform_scores_have_no_knee_and_heavy_tails_have_one() -> None:
    rng = np.random.default_rng(0)
    assert all(knee(np.sort(rng.random(500))[::-1]) is None for _ in range(50))
    assert all(knee(np.sort(rng.pareto(2, 500))[::-1]) for _ in range(50))
    assert knee(np.array([9.0, 1, 0])) is None  # too few to say


@pytest.mark.parametrize(("slopes", "found"), [((12, 5), 50), ((11, 5), None), ((5, 12), 51), ((5, 11), None)])
def test_a_bend_counts_from_a_fifth_of_the_height(slopes: tuple[int, int], found: int | None) -> None:
    """Half the curve at each slope a, b: its middle lies (a - b) / 2(a + b) off the line, here 0.206 or 0.1875."""
    drops = np.repeat(slopes, 50)
    assert knee(np.array([drops.sum(), *(drops.sum() - np.cumsum(drops))], float)) == found


# ---- figures


@pytest.mark.parametrize(
    ("value", "text"), [(1.0, "1.000"), (0.99996, "0.999"), (0.8999, "0.900"), (-0.25, "-0.250"), (None, "–")]
)
def test_only_the_same_order_correlates_with_one(value: float | None, text: str) -> None:
    assert correlation(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1.3, "1.30"), (128.0, "128"), (0.1, "0.100"), (2.4e-5, "2.40e-05"), (np.nan, "–"), (None, "–")],
)
def test_figures_have_three_digits(value: float | None, text: str) -> None:
    assert figure(value) == text


@pytest.mark.parametrize(("least", "low"), [(0.95, 0.9), (0.85, 0.8), (0.6, 0.5), (0.2, 0.0), (-0.3, -1.0)])
def test_the_scale_of_stability_begins_below_the_least(least: float, low: float, tmp_path: Path) -> None:
    stored = arrays() | {f"stability.{name}": np.ones(1, np.float32) for name in STABILITY}
    stored["stability.f.4"] = np.array([least], np.float32)
    page = render(read_spread(write(tmp_path / "x", stored)))
    (dot,) = re.findall(r'cx="([\d.]+)%" cy="50%" r="4.5"><title>layer 4:', page)
    assert float(dot) == pytest.approx(100 * (least - low) / (1 - low), abs=0.1)
    assert f'<text x="0.0%" y="14" text-anchor="middle">{low:g}</text>' in page


def test_layers_of_many_sizes_stand_on_a_log_scale(tmp_path: Path) -> None:
    stored = arrays() | {"score.layers": np.array([1, 0.01, 0.1, 0.001, 0.3], np.float32)}
    page = render(read_spread(write(tmp_path / "x", stored)))
    tall = [float(height) for height in re.findall(r'<rect width="100%" y="[\d.]+%" height="([\d.]+)%"', page)]
    assert tall[0] == 100
    assert tall[0] - tall[2] == pytest.approx(tall[2] - tall[1], abs=0.02) == pytest.approx(tall[1] - tall[3], abs=0.02)
    assert tall[3] > 0
    assert "on a log scale" in page


# ---- the command


def shown_on_terminal(directory: Path, width: int = 80) -> str:
    from rich.console import Console

    found, console = read_spread(directory), Console(width=width, record=True, file=io.StringIO())
    console.print(table(found))
    console.print(layer_list(found))
    return console.export_text()


def test_eighty_columns_are_enough(ranked: Path) -> None:
    assert "…" not in shown_on_terminal(ranked).split("hold", 1)[1]


Inspect = Callable[..., tuple[int, str, str]]


@pytest.fixture
def inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Inspect:
    def run(*options: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nestling", "rank", "--inspect", *map(str, options)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code, *capsys.readouterr())  # type: ignore[return-value]

    return run


def test_the_page_lies_beside_the_checkpoint(
    inspect: Inspect, tmp_path: Path, html: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    elastic = write(tmp_path / "elastic", arrays())
    before = sorted(elastic.iterdir())
    code, out, err = inspect(elastic)
    assert (code, err) == (0, "")
    assert out.endswith(f"{tmp_path / 'elastic-ranking.html'}: the whole picture, to open in a browser\n")
    assert (tmp_path / "elastic-ranking.html").read_text() == html
    assert sorted(elastic.iterdir()) == before
    monkeypatch.chdir(elastic)
    assert inspect(".")[0] == 0  # again, and by another name: the page is ours to replace
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elastic", "elastic-ranking.html"]
    assert inspect(elastic, "--out", tmp_path / "other.html")[0] == 0
    assert (tmp_path / "other.html").read_text() == html


def test_what_is_not_ours_is_not_replaced(inspect: Inspect, ranked: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.html").write_text("<p>mine")
    (tmp_path / "folder.html").mkdir()
    for out, words in {
        "mine.html": "exists and is not a page of nestling rank --inspect; choose another --out",
        "folder.html": "exists and is not a file",
        "page": "with --inspect, --out is the page to write; end it in .html",
        "none/page.html": "cannot be written: No such file or directory",
    }.items():
        code, shown, err = inspect(ranked, "--out", tmp_path / out)
        assert (code, shown) == (2, "")
        assert err.startswith(f"nestling: {tmp_path / out}: ")
        assert words in err
        assert err.count("\n") == 1
    assert (tmp_path / "mine.html").read_text() == "<p>mine"


@pytest.mark.parametrize("option", [["--data", "x.jsonl"], ["--overwrite"], ["--max-drop", "1"], ["--seed", "0"]])
def test_options_of_ranking_are_refused(inspect: Inspect, ranked: Path, option: list[str]) -> None:
    code, shown, err = inspect(ranked, *option)
    assert (code, shown) == (2, "")
    assert err == f"nestling: {option[0]} is of no use with --inspect, which ranks nothing; leave it out\n"


def test_ranking_still_needs_data_and_an_output(monkeypatch: pytest.MonkeyPatch, ranked: Path, capsys: Any) -> None:
    for options in (["--data", "x"], ["--out", "x"]):
        monkeypatch.setattr(sys, "argv", ["nestling", "rank", str(ranked), *options])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        assert "rank needs --data FILE.jsonl and --out DIRECTORY" in capsys.readouterr().err


def test_no_torch_is_needed(ranked: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from nestling import cli
sys.argv = ["nestling", "rank", "--inspect", {str(ranked)!r}, "--out", {str(tmp_path / "x.html")!r}]
try:
    cli.main()
except SystemExit as ended:
    assert ended.code == 0
assert not {{"torch", "transformers"}} & {{name.split(".")[0] for name in sys.modules}}
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)


# ---- bad input


def test_a_model_that_was_not_ranked_is_told_how(inspect: Inspect, tmp_path: Path) -> None:
    directory = write(tmp_path / "plain", arrays())
    (directory / FILE).unlink()
    code, shown, err = inspect(directory)
    assert (code, shown) == (2, "")
    assert err == (
        f"nestling: {directory}: was not ranked, there is no {FILE}; "
        f"rank it: nestling rank {directory} --data TEXTS.jsonl --out ELASTIC\n"
    )
    assert inspect(tmp_path / "none")[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_a_ranking_without_scores_is_told_so(inspect: Inspect, tmp_path: Path) -> None:
    orders = {name: array for name, array in arrays().items() if name.startswith("order")}
    code, _, err = inspect(write(tmp_path / "old", orders))
    assert code == 2
    assert "holds orders but no scores, nothing to look at; rank it: nestling rank" in err


DAMAGES: dict[str, tuple[str, np.ndarray | None, str]] = {
    "no layer scores": ("score.layers", None, "score.layers is missing"),
    "no scores of an axis": ("score.f.4", None, "score.f.4 is missing"),
    "no layer order": ("order.layers", None, "is not a ranking: order.layers is missing"),
    "another model's width": ("score.d", np.ones(41, np.float32), r"score.d is float32[41], the model has [40]"),
    "another model's depth": ("order.layers", np.arange(4), "order.layers is int64[4], the model has [5]"),
    "layers twice": ("order.layers", np.array([0, 0, 1, 2, 3]), "order.layers does not name every position once"),
    "heads across groups": ("order.h.0", np.array([[0, 1, 2], [3, 4, 5]]), "order.h.0 does not name every position"),
    "scores of text": ("score.d", np.ones(40, np.uint8), "score.d is uint8[40]"),
    "not a number": ("score.p.0", np.full(20, np.nan, np.float32), "score.p.0 is not finite"),
    "another order": ("order.f.1", np.arange(48), "order.f.1 does not follow score.f.1"),
    "empty stability": ("stability.d", np.zeros(0, np.float32), "stability.d is float32[0], must be one float"),
    "no correlation": ("stability.d", np.array([7.0], np.float32), "stability.d = 7.0 is no correlation"),
    "undefined correlation": ("stability.d", np.array([np.nan], np.float32), "stability.d = nan is no correlation"),
    "rounds of another model": ("rounds", np.ones((2, 4), np.float32), "rounds has shape [2, 4] for 5 layers"),
    "no rounds": ("rounds", np.ones((0, 5), np.float32), "rounds has shape [0, 5]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_ranking_is_refused(damage: str, inspect: Inspect, tmp_path: Path) -> None:
    name, array, words = DAMAGES[damage]
    stored = {**arrays(), name: array}
    directory = write(tmp_path / "x", {name: one for name, one in stored.items() if one is not None})
    code, shown, err = inspect(directory)
    assert (code, shown) == (2, "")
    assert err.startswith(f"nestling: {directory / FILE}")
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "x-ranking.html").exists()


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_truncated_ranking_is_refused(length: int, tmp_path: Path) -> None:
    directory = write(tmp_path / "x", arrays())
    (directory / FILE).write_bytes((directory / FILE).read_bytes()[:length])
    with pytest.raises(NestlingError, match="truncated"):
        read_spread(directory)


def test_what_the_file_holds_is_what_was_planted(ranked: Path) -> None:
    """The tests above compare with `arrays()`; so does the file."""
    stored = load_file(ranked / FILE)
    assert stored.keys() == arrays().keys()
    assert all(np.array_equal(stored[name], array, equal_nan=True) for name, array in arrays().items())
