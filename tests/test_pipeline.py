"""The main job end to end, on a model of a few thousand parameters: what it leaves, and when it does nothing again."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("reasoning_gym")
pytest.importorskip("jinja2")

import nestling
import stock
from nestling import checks, cli
from nestling.arch.submodel import Submodel, is_within
from nestling.errors import NestlingError
from nestling.ledger import MARK, held
from nestling.pipeline import Pipeline
from nestling.recipe import read_recipe
from nestling.weights.elastic import open_elastic

DEMO = (Path(__file__).parent.parent / "runs" / "demo.toml").read_text()
QUICK = """
[quick]                      # the demo's stages, a far smaller model
[quick.parent]
steps = 5
batch = 4
[quick.parent.architecture]
hidden_size = 32
intermediate_size = 96
mamba_head_dim = 8
ssm_state_size = 8
head_dim = 8
[quick.rank]
batches = 1
batch = 4
[quick.train]
learning_rate = 4e-3
router_steps = 3
stages = [{ steps = 2, batch = 4, options = { max_terms = 2 } }, { steps = 4, batch = 4 }]
[quick.train.search_space]
hidden_size = [16, 20, 24, 28]
intermediate_size = [32, 40, 48, 56, 64, 72, 80, 88]
mamba_head_dim = [4, 6]
[quick.controls.uniform]
"75%" = { hidden_size = 28, intermediate_size = 88 }
"50%" = { hidden_size = 20, intermediate_size = 72 }
[quick.evaluate]
problems = 4
batch = 4
max_tokens = 3
"""
NAMES = ["parent", "100%", "75%", "50%", "75% untrained", "50% untrained", "50% uniform", "50% from scratch"]
REPORT = {"report.json", "report.html", "run.json"}  # these are written again by every run


def write_recipe(directory: Path, old: str = "", new: str = "") -> Path:
    """The demo with the small quick form, in which `old` may be replaced."""
    assert QUICK.count(old) == 1 or not old
    file = directory / "recipe.toml"
    file.write_text(DEMO[: DEMO.index("[quick]")] + QUICK.replace(old, new))
    return file


Nestling = Callable[..., None]


@pytest.fixture(scope="module")
def call() -> Iterator[Nestling]:
    """Runs the command line in this process; it must succeed."""
    handler = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["nestling", *map(str, arguments)])
            with pytest.raises(SystemExit) as ended:
                cli.main()
        assert ended.value.code == 0

    yield call
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, call: Nestling) -> Path:
    """The directory of a whole run."""
    directory = tmp_path_factory.mktemp("run")
    call("run", write_recipe(directory), "--quick", "--out", directory / "out")
    return directory / "out"


@pytest.fixture(scope="module")
def report(made: Path) -> dict[str, Any]:
    return json.loads((made / "report.json").read_text())


def times(directory: Path) -> dict[str, int]:
    """When every file and directory below was last changed, but for the report and the top itself."""
    paths = [path for path in directory.rglob("*") if path.name not in REPORT]
    return {str(path.relative_to(directory)): path.stat().st_mtime_ns for path in paths}


def stages(directory: Path) -> dict[str, str]:
    """Stage -> its fingerprint and when it was made."""
    marks = [
        mark for mark in directory.rglob("nestling-stage.json") if "-before-" not in str(mark.relative_to(directory))
    ]
    return {
        str(m.parent.relative_to(directory)): f"{json.loads(m.read_text())['fingerprint']} {m.stat().st_mtime_ns}"
        for m in marks
    }


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


# ---- what a run leaves


def test_the_report_has_a_row_for_every_model(made: Path, report: dict[str, Any]) -> None:
    assert [row["name"] for row in report["rows"]] == NAMES
    for row in report["rows"]:
        assert row["problems"] == 4
        assert 0 <= row["exact_match"] <= 1
        assert row["correct"] == round(4 * row["exact_match"])
        assert row["tokens_per_second"] > 0
        low, high = row["interval"]
        assert low <= row["exact_match"] <= high
    directories = ["parent", "slices/100", "slices/75", "slices/50", "slices/75-untrained", "slices/50-untrained"]
    directories += ["slices/50-uniform", "scratch"]
    for row, directory in zip(report["rows"], directories, strict=True):
        assert row["parameters"] == stock.numel(stock.load(made / directory))
    assert {row["name"]: row["role"] for row in report["rows"]} == dict(
        zip(NAMES, ["parent", *["elastic"] * 3, *["untrained"] * 2, "uniform", "scratch"], strict=True)
    )


def test_the_report_says_how_it_was_made(made: Path, report: dict[str, Any]) -> None:
    assert report["seed"] == 0
    assert report["quick"] is True
    assert {"python", "torch", "transformers", "reasoning-gym"} <= report["versions"].keys()
    assert report["versions"]["torch"] == torch.__version__
    assert list(report["seconds"]) == ["parent", "rank", "train", "uniform", "scratch", "slice", "evaluate"]
    assert all(seconds > 0 for seconds in report["seconds"].values())
    assert report["command"].endswith("recipe.toml --quick")
    assert report["task"].startswith("chain_sum")
    assert "4 held-out problems" in report["task"]
    assert any(str(made / "elastic") in command for command in report["next"])
    page = (made / "report.html").read_text()
    assert all(name in page for name in NAMES)


def test_the_report_has_the_curves_of_the_run(made: Path, report: dict[str, Any]) -> None:
    curves = report["curves"]
    rows = [json.loads(line) for line in (made / "elastic" / "metrics.jsonl").read_text().splitlines()]
    assert [step for step, _ in curves["parent"]["loss"]] == list(range(5))
    assert [step for step, _ in curves["elastic"]["50%"]] == list(range(6))
    assert [value for _, value in curves["elastic"]["50%"]] == [row["kl"]["50%"] for row in rows]
    assert curves["elastic"]["stages"] == [
        [0, "stage 1: max_terms 2"],
        [2, "stage 2"],
        [3, "sizes frozen, hard prefixes"],
    ]
    assert [step for step, _ in curves["router"]["expected"]["75%"]] == [0, 1, 2]
    assert report["tokens"]["elastic"] == dict.fromkeys(["100%", "75%", "50%"], sum(row["tokens"] for row in rows))


def test_the_family_is_on_budget_and_nested(made: Path) -> None:
    written = json.loads((made / "elastic" / "nestling.json").read_text())
    elastic = open_elastic(made / "elastic")
    assert list(written["budgets"]) == ["100%", "75%", "50%"]
    whole = written["budgets"]["100%"]["parameters"]
    for share, budget in zip((1, 0.75, 0.5), written["budgets"].values(), strict=True):
        assert budget["target"] == {"of": "parameters", "value": int(share * whole)}
        assert 0.98 * share * whole <= budget["parameters"] <= share * whole
        assert budget["tokens"] > 0
    sizes = list(elastic.budgets.values())
    assert is_within(elastic.architecture, sizes[1], sizes[0])
    assert is_within(elastic.architecture, sizes[2], sizes[1])
    assert set(written["search_space"]) == {
        "hidden_size", "intermediate_size", "mamba_num_heads", "mamba_head_dim", "num_attention_heads", "layers"
    }  # fmt: skip
    assert written["provenance"]["teacher"] == str(made / "parent")


@pytest.mark.parametrize(
    ("directory", "stage", "budget"),
    [("100", "elastic", "100%"), ("75", "elastic", "75%"), ("50", "elastic", "50%"), ("50-uniform", "uniform", "50%")],
)
def test_a_slice_in_stock_transformers_is_the_view_of_the_family(
    made: Path, directory: str, stage: str, budget: str
) -> None:
    ids = stock.tokens(16, 3, 12)
    with torch.no_grad():
        viewed = nestling.load(made / stage)[budget](ids).logits
    sliced = stock.load(made / "slices" / directory)
    stock.assert_same(viewed, stock.logits(sliced, ids), 1e-5)


def test_an_untrained_slice_is_the_parents_prefix_at_the_sizes_of_the_family(made: Path) -> None:
    ids, ranked = stock.tokens(16, 3, 12), nestling.load(made / "ranked")
    for name in ("75", "50"):
        size = open_elastic(made / "elastic").budgets[f"{name}%"]
        with torch.no_grad():
            viewed = ranked[size](ids).logits
        stock.assert_same(viewed, stock.logits(stock.load(made / "slices" / f"{name}-untrained"), ids), 1e-5)
    parent = stock.logits(stock.load(made / "parent"), ids)
    stock.assert_same(stock.logits(stock.load(made / "ranked"), ids), parent, 1e-5)
    assert not torch.allclose(stock.logits(stock.load(made / "elastic"), ids), parent, atol=1e-3)  # it was trained


def test_the_model_from_scratch_has_the_sizes_of_the_family_but_its_own_weights(made: Path) -> None:
    written = json.loads((made / "scratch" / "config.json").read_text())
    small = json.loads((made / "slices" / "50" / "config.json").read_text())
    for field in (*Submodel.__annotations__, "hybrid_override_pattern", "vocab_size"):
        assert written.get(field) == small.get(field), field
    assert weights(made / "scratch") != weights(made / "slices" / "50")


def test_every_model_is_judged_on_the_same_held_out_problems(made: Path) -> None:
    judged = [json.loads(file.read_text()) for file in sorted((made / "evaluations").rglob("evaluation.json"))]
    assert len(judged) == len(NAMES)
    assert len({tuple(output["prompt"] for output in result["outputs"]) for result in judged}) == 1
    assert {result["backend"] for result in judged} == {"transformers"}


def test_nothing_is_left_over(made: Path) -> None:
    assert not list(made.rglob(".*"))
    assert {path.name for path in made.iterdir()} == REPORT | {
        "parent", "ranked", "elastic", "uniform", "scratch", "slices", "evaluations"
    }  # fmt: skip


# ---- running it again


def test_a_second_run_does_nothing(made: Path, call: Nestling) -> None:
    before = times(made)
    call("run", made.parent / "recipe.toml", "--quick", "--out", made)
    assert times(made) == before
    assert len(stages(made)) == 5 + 6 + 8


def test_a_run_beside_another_is_refused(made: Path) -> None:
    recipe = read_recipe(made.parent / "recipe.toml", quick=True, seed=None, out=str(made))
    with (
        held(made),
        pytest.raises(NestlingError, match="another run is at work there; wait for it to end, stop it, or"),
    ):
        Pipeline(recipe, "", quick=True).run()
    Pipeline(recipe, "", quick=True).run(until="train")  # it is free again


def test_the_card_of_a_slice_has_its_accuracy_now_and_later(made: Path, tmp_path: Path) -> None:
    judged = json.loads((made / "evaluations" / "50" / "evaluation.json").read_text())
    line = f"| {judged['task']} | {judged['exact_match']:.1%} solved |"
    nestling.slice(made / "elastic", "50%", tmp_path / "later")
    for directory in (made / "slices" / "50", tmp_path / "later"):
        assert line in (directory / "README.md").read_text()
    assert line not in (made / "slices" / "50-untrained" / "README.md").read_text()


def test_the_report_can_be_written_again(made: Path, call: Nestling, report: dict[str, Any]) -> None:
    before = times(made)
    (made / "report.html").unlink()
    call("report", made)
    assert json.loads((made / "report.json").read_text()) | {"date": ""} == report | {"date": ""}
    assert (made / "report.html").is_file()
    assert times(made) == before


def rerun(made: Path, tmp_path: Path, call: Nestling, old: str, new: str) -> tuple[Path, set[str]]:
    """A copy of the run, run again with a changed recipe; and the stages that were made anew."""
    copy = shutil.copytree(made, tmp_path / "copy")
    before = stages(copy)
    call("run", write_recipe(tmp_path, old, new), "--quick", "--out", copy)
    after = stages(copy)
    assert after.keys() == before.keys()
    changed = {name for name in after if after[name] != before[name]}
    assert all(after[name].split()[0] != before[name].split()[0] for name in changed)
    return copy, changed


def test_a_changed_evaluation_reruns_the_evaluations_only(made: Path, tmp_path: Path, call: Nestling) -> None:
    copy, changed = rerun(made, tmp_path, call, "max_tokens = 3", "max_tokens = 1")
    assert changed == {name for name in stages(made) if name.startswith("evaluations/")}
    report = json.loads((copy / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == NAMES


def test_a_changed_distillation_reruns_what_comes_after_it(
    made: Path, tmp_path: Path, call: Nestling, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads((made / "elastic" / MARK).read_text())["fingerprint"]
    copy, changed = rerun(made, tmp_path, call, "learning_rate = 4e-3", "learning_rate = 5e-3")
    said = "".join(capsys.readouterr().err.split())
    kept = copy / f"elastic-before-{before}"
    assert "elasticismadeagain:elastic.learning_ratewas0.004,isnow0.005.Whatisthere" in said
    assert weights(kept) == weights(made / "elastic")
    assert {"elastic", "uniform", "scratch", "slices/50", "evaluations/50", "evaluations/50-from-scratch"} <= changed
    assert not {"parent", "ranked", "evaluations/parent"} & changed
    assert weights(copy / "elastic") != weights(made / "elastic")
    assert weights(copy / "slices" / "50") != weights(made / "slices" / "50")


def test_a_file_of_someone_elses_in_a_stage_is_never_deleted(made: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(made, tmp_path / "copy")
    (copy / "ranked" / "notes.txt").write_text("mine")
    recipe = read_recipe(write_recipe(tmp_path, "batches = 1", "batches = 2"), quick=True, out=str(copy))
    with pytest.raises(NestlingError, match=r"not replaced, 'notes\.txt' is not ours"):
        Pipeline(recipe, "test").run(until="rank")
    assert (copy / "ranked" / "notes.txt").read_text() == "mine"
    assert weights(copy / "ranked") == weights(made / "ranked")


def test_a_seed_changes_every_stage(made: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(made, tmp_path / "copy")
    for seed, done in ((0, True), (1, False)):
        recipe = read_recipe(made.parent / "recipe.toml", quick=True, seed=seed, out=str(copy))
        made_by = Pipeline(recipe, "test")
        settings = [("parent", recipe.parent.model_dump(), ()), ("ranked", recipe.rank.model_dump(), ("parent",))]
        assert [made_by.ledger.is_done(*each) for each in settings] == [done, done]


def test_a_run_that_could_not_be_judged_is_refused_before_it_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = read_recipe(write_recipe(tmp_path), quick=True, out=str(tmp_path / "out"))
    monkeypatch.setattr(checks, "find_spec", lambda name: None if name == "transformers" else name)
    with pytest.raises(NestlingError, match=r"a whole run needs transformers: pip install 'nestling\[demo\]'"):
        Pipeline(recipe, "test").run()
    assert not (tmp_path / "out").exists()


# ---- stopped and killed

STOPPED = """
import os, signal, sys
from dataclasses import replace
from nestling import cli
from nestling.pipeline import Pipeline
from nestling.data import batches as data

how, at, recipe, out = sys.argv[1:]
training, batch, under_way, seen = Pipeline._training, data.batch, [], []

def noting(self, name):
    under_way.append(name)
    return replace(training(self, name), every=2)

def stopping(*given):
    seen.extend(under_way[-1:] if under_way[-1:] == ["elastic" if how == "SIGKILL" else "parent"] else [])
    if len(seen) == int(at):
        os.kill(os.getpid(), getattr(signal, how))
    return batch(*given)

Pipeline._training, data.batch = noting, stopping
sys.argv = ["nestling", "train", recipe, "--quick", "--out", out]
cli.main()
"""


def stopped(how: str, at: int, recipe: Path, out: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STOPPED, how, str(at), str(recipe), str(out)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_run_that_was_stopped_and_killed_ends_as_the_undisturbed_one(
    made: Path, tmp_path: Path, call: Nestling, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    first = stopped("SIGINT", 4, recipe, out)
    assert first.returncode == 130, first.stderr
    assert first.stderr.splitlines()[-2:] == [
        "stopped after step 4 of 5; the same command goes on from here",
        "nestling: stopped",
    ]
    assert "Traceback" not in first.stderr
    assert [path.name for path in out.iterdir()] == [".state"]
    second = stopped("SIGKILL", 5, recipe, out)
    assert second.returncode == -signal.SIGKILL, second.stderr
    assert "train parent: going on from step 4" in second.stderr
    assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == {"parent", "ranked"}
    capsys.readouterr()
    call("train", recipe, "--quick", "--out", out)
    assert "train elastic: going on from step 4" in " ".join(capsys.readouterr().err.split())
    for stage in ("parent", "ranked", "elastic"):
        assert weights(out / stage) == weights(made / stage), stage
    order = "elastic/ranking.safetensors"
    assert (out / order).read_bytes() == (made / order).read_bytes()
    mine, undisturbed = (json.loads((root / "elastic" / "nestling.json").read_text()) for root in (out, made))
    for budget in undisturbed["budgets"].values():
        assert budget.pop("evaluations")  # of the later stages, which only the undisturbed run has gone through
    assert mine["budgets"] == undisturbed["budgets"]
    assert {path.name for path in out.iterdir()} == {"parent", "ranked", "elastic"}


def test_a_stage_can_be_made_alone(tmp_path: Path, made: Path, call: Nestling) -> None:
    call("pretrain", write_recipe(tmp_path), "--quick", "--out", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"parent"}
    assert weights(tmp_path / "out" / "parent") == weights(made / "parent")
