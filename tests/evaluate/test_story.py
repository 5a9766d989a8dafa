"""From the directories of a run to its report: every figure is one that can be counted on the disk."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jinja2")

import nestling
import stock
from nestling.arch.submodel import Submodel, complete, standalone
from nestling.arch.targets import Target
from nestling.errors import NestlingError
from nestling.evaluate import story
from nestling.evaluate.report import render
from nestling.evaluate.results_page import write_page
from nestling.evaluate.story import POINTS, assemble, tell
from nestling.weights.elastic import open_elastic, sidecar
from nestling.weights.files import read_json, write_json

TINY = replace(stock.TINY, hybrid_override_pattern="M*-M-")
HALF = Submodel(layers=(0, 1, 2, 4), hidden_size=10, intermediate_size=16, mamba_num_heads=2)
STEPS, ROUTED = 400, 120


def metrics(steps: int, **more: Callable[[int], Any]) -> str:
    rows = [
        {"step": s, "loss": 3 - s / steps, "tokens": 10 + s % 3, "seconds": 0.25} | {k: f(s) for k, f in more.items()}
        for s in range(steps)
    ]
    for row in rows:
        if "router" in row and row["step"] >= ROUTED:
            del row["router"]
    return "".join(json.dumps(row) + "\n" for row in rows)


def routed(step: int) -> dict[str, Any]:
    return {
        "100%": {},
        "50%": {"expected": 2 - step / ROUTED, "sizes": {"hidden_size": 16 - step / 20}, "temperature": 1},
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directories that a run leaves, made by hand."""
    run = tmp_path_factory.mktemp("story")
    half = complete(TINY, HALF)
    stock.save(TINY, run / "parent")
    stock.save(TINY, run / "elastic")
    budgets = {"100%": Submodel(), "50%": half}
    targets = {"100%": Target("parameters", 3500), "50%": Target("parameters", 1600)}
    write_json(run / "elastic" / "nestling.json", sidecar(TINY, budgets, {}, targets=targets))
    nestling.slice(run / "elastic", "50%", run / "slices" / "50")
    (run / "parent" / "metrics.jsonl").write_text(metrics(7))
    kl = {"kl": lambda step: {"100%": 0.1, "50%": 1 / (step + 1)}, "router": routed}
    kl |= {"budget_tokens": lambda step: dict.fromkeys(("100%", "50%"), 10 + step % 3)}
    kl |= {"teacher_tokens": lambda step: 10 + step % 3}
    (run / "elastic" / "metrics.jsonl").write_text(metrics(STEPS, **kl))
    for name, seconds in {"parent": 99, "ranked": 4, "elastic": 99, "slices/50": 0.5, "evaluations/parent": 2,
                          "evaluations/50": 3}.items():  # fmt: skip
        (run / name).mkdir(parents=True, exist_ok=True)
        write_json(run / name / "nestling-stage.json", {"stage": name, "fingerprint": "f", "seconds": seconds})
    for name, correct in (("parent", 9), ("50", 4)):
        judged = {"exact_match": correct / 10, "correct": correct, "problems": 10, "interval": [0.1, 0.95]}
        write_json(run / "evaluations" / name / "evaluation.json", judged | {"tokens_per_second": 77.0, "outputs": []})
    rows = [
        {"name": "parent", "role": "parent", "budget": None, "directory": "parent", "evaluation": "evaluations/parent"},
        {"name": "50%", "role": "elastic", "budget": "50%", "directory": "slices/50", "evaluation": "evaluations/50"},
    ]
    about = {"title": "By hand", "command": "nestling run x.toml", "seed": 5, "quick": False, "task": "sums"}
    about |= {"judged": "10 held-out problems", "stages": [[0, "max_terms 2"], [300, ""]], "rows": rows}
    write_json(run / "run.json", about)
    return run


def test_rows_are_the_judgements_and_the_costs_of_what_was_judged(finished: Path) -> None:
    rows = assemble(finished)["rows"]
    assert [row["name"] for row in rows] == ["parent", "50%"]
    assert rows[1] == {
        "name": "50%", "role": "elastic", "budget": "50%", "exact_match": 0.4, "correct": 4, "problems": 10,
        "interval": [0.1, 0.95], "tokens_per_second": 77.0, "bytes": 2 * rows[1]["parameters"],
        "parameters": stock.numel(stock.load(finished / "slices" / "50")),
    }  # fmt: skip
    assert rows[0]["parameters"] == stock.numel(stock.load(finished / "parent"))


def test_the_family_is_counted_layer_by_layer(finished: Path) -> None:
    family = assemble(finished)["family"]
    assert family["pattern"] == "M*-M-"
    whole, small = family["members"]
    assert [member["target"] for member in (whole, small)] == [3500, 1600]
    sliced = stock.load(finished / "slices" / "50")
    blocks = [sum(p.numel() for p in block.parameters()) for block in sliced.model.layers]
    assert [layer["parameters"] for layer in small["layers"]] == [*blocks[:3], 0, blocks[3]]
    assert [layer["kept"] for layer in small["layers"]] == [True, True, True, False, True]
    full = [sum(p.numel() for p in block.parameters()) for block in stock.load(finished / "parent").model.layers]
    assert [layer["of"] for layer in small["layers"]] == [layer["parameters"] for layer in whole["layers"]] == full
    assert small["layers"][0]["sizes"] == {"hidden_size": 10, "mamba_num_heads": 2, "mamba_head_dim": 4}
    assert small["layers"][1]["sizes"] == {"hidden_size": 10, "num_attention_heads": 2}
    assert small["layers"][2]["sizes"] == {"hidden_size": 10, "intermediate_size": 16}
    assert small["layers"][3]["sizes"] == {}
    shape = standalone(TINY, open_elastic(finished / "elastic").budgets["50%"])
    assert (shape.hidden_size, shape.hybrid_override_pattern) == (10, "M*--")


def test_curves_are_thinned_to_the_means_of_neighbours(finished: Path) -> None:
    curves = assemble(finished)["curves"]
    assert curves["parent"]["loss"] == [[step, 3 - step / 7] for step in range(7)]
    line = curves["elastic"]["50%"]
    assert STEPS / 4 < len(line) <= POINTS
    assert line[0] == [2, pytest.approx((1 + 1 / 2 + 1 / 3) / 3)]
    assert line[-1][0] == STEPS - 1
    assert curves["elastic"]["stages"] == [
        [0, "stage 1: max_terms 2"], [ROUTED, "sizes frozen, hard prefixes"], [300, "stage 2"]
    ]  # fmt: skip
    assert curves["router"]["expected"].keys() == {"50%"}
    assert curves["router"]["expected"]["50%"] == [[s, 2 - s / ROUTED] for s in range(ROUTED)]
    assert curves["router"]["choices"]["50%"]["hidden_size"][-1] == [ROUTED - 1, 16 - (ROUTED - 1) / 20]


def test_time_and_tokens_are_sums(finished: Path) -> None:
    report = assemble(finished)
    # of training the steps themselves, so that a run that waited overnight does not count the night
    wanted = {"parent": 7 / 4, "rank": 4, "train": STEPS / 4, "slice": 0.5, "evaluate": 5}
    assert report["seconds"] == wanted
    assert report["tokens"]["parent"] == sum(10 + s % 3 for s in range(7))
    read = sum(10 + s % 3 for s in range(STEPS))
    assert report["tokens"]["elastic"] == {"100%": read, "50%": read}
    assert report["tokens"]["teacher"] == read
    assert report["tokens"]["scratch"] == 0


def test_what_was_said_of_the_run_is_repeated(finished: Path) -> None:
    report = assemble(finished)
    assert (report["title"], report["seed"], report["quick"]) == ("By hand", 5, False)
    assert report["command"] == "nestling run x.toml"
    assert "10 held-out problems" in report["task"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", report["date"])
    assert re.search(r", \d+ cores, ", report["machine"])
    assert all(re.match(r"\d+\.\d+", version) for version in report["versions"].values())
    assert all(f"{finished}/elastic" in command for command in report["next"])


def test_the_report_is_written_and_told(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tell(finished)
    assert json.loads((finished / "report.json").read_text()) == json.loads(json.dumps(report))
    assert "By hand" in (finished / "report.html").read_text()
    said = " ".join(capsys.readouterr().err.split())
    assert "50%" in said
    assert report["next"][0] in said


def test_a_run_without_a_router_or_controls_is_told_too(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = story._metrics
    plain = {"kl": lambda step: {"100%": 0.1, "50%": 0.2}}
    rows = [json.loads(line) for line in metrics(5, **plain).splitlines()]
    monkeypatch.setattr(story, "_metrics", lambda directory: rows if directory.name == "elastic" else real(directory))
    report = assemble(finished)
    curves = report["curves"]
    assert not any(curves["router"]["expected"].values())
    assert not any(curves["router"]["choices"].values())
    assert "By hand" in render(report)
    assert [name for _, name in curves["elastic"]["stages"]] == ["stage 1: max_terms 2", "stage 2"]


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NestlingError, match=r"is not the output of `nestling run`: run\.json is missing"):
        assemble(tmp_path)


def test_a_run_that_drew_one_budget_per_step_has_the_points_of_each(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "drawn"
    shutil.copytree(finished, run)
    drawn = ["50%" if step % 4 == 1 else "100%" for step in range(STEPS)]
    kl = {"kl": lambda step: {drawn[step]: step / 10}, "router": lambda step: {drawn[step]: routed(step)[drawn[step]]}}
    kl |= {"budget_tokens": lambda step: {drawn[step]: 7}, "teacher_tokens": lambda step: 7}
    (run / "elastic" / "metrics.jsonl").write_text(metrics(STEPS, **kl))
    report = assemble(run)
    assert report["tokens"]["elastic"] == {"100%": 7 * 300, "50%": 7 * 100}
    assert report["tokens"]["teacher"] == 7 * STEPS
    assert [step for step, _ in report["curves"]["elastic"]["50%"]] == list(range(1, STEPS, 4))
    assert {step for step, _ in report["curves"]["router"]["expected"]["50%"]} == set(range(1, ROUTED, 4))
    assert render(report)


def test_a_run_and_evaluations_of_it_are_one_page(finished: Path, tmp_path: Path) -> None:
    """With the run's curves beside the scores; text that came from outside is text."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    write_json(run / "run.json", read_json(run / "run.json") | {"title": "Größe <b>&"})
    (tmp_path / "evals" / "50").mkdir(parents=True)
    about = {"name": "50%", "backend": "nestling", "directory": str(run / "elastic"), "parameters": 1600}
    found = {"metric": "pass@1", "score": 0.25, "interval": [0.1, 0.5], "tokens": 9, "tokens_per_second": 3.0}
    settings = {"problems": 20, "samples": 1, "sampling": {"temperature": 0.0, "max_tokens": 4}, "scorer": "its own"}
    write_json(tmp_path / "evals" / "50" / "sums.json", {
        "format": 1, "task": "żółw <i>", "model": about | {"bytes": 3200},
        "result": found | {"no_answer": 0, "cut_off": 0}, "settings": settings | {"files": {}},
        "seed": 0, "date": "2026-11-24", "versions": {}, "machine": "<m>",
        "command": "nestling eval '<x>'",
    })  # fmt: skip
    page, card = write_page([run, tmp_path / "evals"], None)
    text = page.read_text("utf-8")
    assert page == tmp_path / "evals" / "report.html"
    assert "<h2>How it learned</h2>" in text
    assert "<h2>How it learned</h2>" not in write_page([tmp_path / "evals"], tmp_path / "alone.html")[0].read_text(
        "utf-8"
    )
    assert "25.0" in text
    assert "żółw &lt;i&gt;" in text
    assert not any(raw in text for raw in ("<i>", "<b>&", "<m>", "<x>"))
    assert "| 50% | 1,600 | 25.0" in card.read_text("utf-8")
    with pytest.raises(NestlingError, match="and at most one output of nestling run"):
        write_page([run, run], None)
