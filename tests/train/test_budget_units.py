"""Budgets in bytes and milliseconds, end to end: a table is made, sizes are cut by it, a family is trained to it."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym")

from test_elastic import SPACE, TINY
from test_elastic import run as distilled

import stock
from nestling.arch.latency import Latencies
from nestling.arch.search import default_space
from nestling.arch.submodel import WHOLE, complete, is_within
from nestling.arch.targets import Target, by_size, parse_target
from nestling.errors import NestlingError
from nestling.infer.timing import candidates
from nestling.recipe import budget_targets, parent_architecture, read_recipe, search_space
from nestling.weights.elastic import open_elastic, read_latencies, sidecar
from nestling.weights.files import write_json
from nestling.weights.slicing import plan_slices
from test_cli import Nestling, run  # noqa: F401 - a fixture

DEMO = Path(__file__).parents[2] / "runs" / "demo.toml"


def imagined() -> Latencies:
    """A machine that needs so much for a layer, and so much for a weight."""
    sizes = candidates(TINY, SPACE, 40, 0)
    times = [len(each.layers or ()) + 1e-3 * Target("parameters", 1).measure(TINY, each) for each in sizes]
    return Latencies(TINY, tuple(zip(sizes, times, strict=True)), ())


@pytest.fixture
def elastic(tmp_path: Path) -> Path:
    stock.save(TINY, tmp_path / "elastic")
    write_json(tmp_path / "elastic" / "nestling.json", sidecar(TINY, {"100%": complete(TINY, WHOLE)}, {}))
    write_json(tmp_path / "table.json", imagined().to_json())
    return tmp_path / "elastic"


def test_a_table_is_made_and_a_wish_in_milliseconds_is_cut_by_it(run: Nestling, elastic: Path, tmp_path: Path) -> None:  # noqa: F811
    timed = ("bench", elastic, "--latency", "--candidates", 16, "--rounds", 3, "--context", 4)
    done = run(*timed, "--out", tmp_path / "made.json")
    assert done.code == 0, done
    assert re.search(r"made.json: 16 sizes, 0\.\d+ … \d+\.\d+ ms a token\n.*off by \d", done.out)
    written = json.loads((tmp_path / "made.json").read_text())
    assert {"machine", "torch", "threads", "date", "batch", "context", "dtype"} <= written.keys()
    assert read_latencies(tmp_path / "made.json").measure(WHOLE) > 0

    wish = f"{0.8 * imagined().measure(WHOLE):.3f}ms"
    run("slice", elastic, "--budget", wish, "--out", tmp_path / "none").refused("needs a table of latencies")
    done = run("slice", elastic, "--budget", wish, "--out", tmp_path / "a", "--latency-table", tmp_path / "table.json")
    assert done.code == 0, done
    (tmp_path / "table.json").rename(elastic / "latency.json")
    assert run("slice", elastic, "--budget", wish, "--out", tmp_path / "b").code == 0
    cut = [json.loads((tmp_path / name / "nestling-slice.json").read_text())["submodel"] for name in "ab"]
    assert cut[0] == cut[1]
    assert 0.98 * float(wish[:-2]) <= imagined().measure(open_elastic(elastic).submodel(cut[0])) <= float(wish[:-2])


def test_bench_refuses_what_it_cannot_do(run: Nestling, elastic: Path, tmp_path: Path) -> None:  # noqa: F811
    run("bench", elastic, "--out", "x.json").refused("--latency")
    run("bench", "nemotron-3-nano-30b-a3b", "--latency", "--out", "x.json").refused("experts")
    run("bench", elastic, "--latency", "--out", elastic / "config.json").refused("is not a latency table")
    run("bench", tmp_path / "r.toml", "--latency", "--out", "x.json").refused("no such recipe")
    run("bench", elastic, "--latency", "--out", tmp_path / "none" / "x.json").refused("there is no directory")
    bare = re.sub(r"\[train.search_space\].*?\n\n", "", DEMO.read_text(), flags=re.DOTALL)
    (tmp_path / "bare.toml").write_text(bare)
    architecture, space = search_space(tmp_path / "bare.toml")
    assert space == default_space(architecture)


def test_a_wish_that_holds_the_whole_model_says_so(run: Nestling, elastic: Path, tmp_path: Path) -> None:  # noqa: F811
    done = run("slice", elastic, "--budget", "1GiB@4k:fp8", "--out", tmp_path / "all")
    assert done.code == 0
    assert re.search(r"note: .*all: 1GiB@4k:fp8 holds the whole model, which has .* at 4k tokens in fp8", done.err)
    assert plan_slices(elastic, {tmp_path / "x": "100%", tmp_path / "y": "60%"}).notes() == {}


def test_a_recipe_may_have_budgets_in_every_unit(tmp_path: Path) -> None:
    architecture, space = search_space(DEMO)
    sizes = candidates(architecture, space, 40, 0)
    count = Target("parameters", 1)
    rows = tuple((each, 1e-5 * count.measure(architecture, each) + len(each.layers or ())) for each in sizes)
    table = Latencies(architecture, rows, ())
    write_json(tmp_path / "latency.json", table.to_json())
    wish = f"{0.8 * table.measure(WHOLE):.2f}ms"
    text = re.sub(r"\[controls\]\n.*?\n\n\[controls.uniform\].*?\n\n", "", DEMO.read_text(), flags=re.DOTALL)
    old = 'budgets = ["75%", "50%"]'
    text = text.replace(old, f'budgets = ["{wish}", "75%@64:int4", "60%-active", "400KB"]\nlatency_table = "TABLE"')
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(NestlingError, match="TABLE"):
        read_recipe(tmp_path / "r.toml")
    assert search_space(tmp_path / "r.toml") == (architecture, space)
    (tmp_path / "r.toml").write_text(text.replace("TABLE", str(tmp_path / "latency.json")))
    recipe = read_recipe(tmp_path / "r.toml")
    targets = budget_targets(parent_architecture(recipe), recipe.train)
    assert {name: target.of for name, target in targets.items()} == {
        "100%": "parameters",
        wish: "latency",
        "75%@64:int4": "bytes",
        "60%-active": "active parameters",
        "400KB": "bytes",
    }
    (tmp_path / "r.toml").write_text(text.replace("TABLE", str(DEMO)))
    with pytest.raises(NestlingError, match="demo.toml"):
        read_recipe(tmp_path / "r.toml")


@pytest.mark.parametrize("names", [("80%@64:int4", "60%@64:int4"), ("80%-active", "62%-active"), ("MS0.8", "MS0.65")])
def test_a_family_is_trained_to_tight_budgets_of_its_unit(tmp_path: Path, names: tuple[str, ...]) -> None:
    table = imagined()
    whole = table.measure(WHOLE)
    wishes = [f"{float(name[2:]) * whole:.4f}ms" if name.startswith("MS") else name for name in names]
    targets = by_size(TINY, {name: parse_target(name, TINY, table) for name in ("100%", *wishes)})
    trained = distilled(tmp_path / "s", targets=targets)
    assert list(trained.family) == ["100%", *wishes]
    for name in wishes:
        assert 0.98 * targets[name].value <= targets[name].measure(TINY, trained.family[name]) <= targets[name].value
        shares = [row["router"][name]["expected"] for row in trained.rows if "router" in row]
        assert shares
        assert all(0.5 < share < 1 / 0.6 for share in shares)  # of this unit, not of another
    assert is_within(TINY, trained.family[wishes[1]], trained.family[wishes[0]])


def test_what_a_budget_asked_for_is_read_from_the_checkpoint(elastic: Path) -> None:
    table, sizes = imagined(), {"100%": complete(TINY, WHOLE), "8ms": complete(TINY, WHOLE)}
    targets = {"100%": Target("bytes", 5, 64, "int4"), "8ms": Target("latency", 8.0, table=table)}
    write_json(elastic / "nestling.json", sidecar(TINY, sizes, {}, targets=targets))
    (elastic.parent / "table.json").rename(elastic / "latency.json")
    written = json.loads((elastic / "nestling.json").read_text())["budgets"]
    assert written["100%"]["target"] == {"of": "bytes", "value": 5, "context": 64, "precision": "int4"}
    assert written["8ms"]["target"] == {"of": "latency", "value": 8.0}
    opened = open_elastic(elastic)
    assert {name: opened.target(name) for name in sizes} == targets
