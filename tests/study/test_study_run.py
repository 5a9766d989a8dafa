"""A study in its quick form, tiny: every kind of arm end to end, its tokens counted again, nothing made twice."""

import json
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("reasoning_gym")
pytest.importorskip("jinja2")

from tiny import ARMS, recipe

from browser import Page
from nestling import cli, ranks
from nestling.errors import NestlingError
from nestling.recipe import read_recipe
from nestling.study import running
from nestling.study.study import Study
from nestling.study.tokens import read_results
from nestling.tasks import HELD_OUT, Task, problems

ALONE = 'sizes_from = "elastic"\ntrain = { budgets = ["40%"] }'
FEW = ("elastic", "alone-40", "untrained")
ONE_SEED = ("[quick.study]\nseeds = [0, 1]", "[quick.study]\nseeds = [1]")
DROPPED = ("five-sizes", "eight-sizes", "scratch-60", "searched-60", "alone-60")


def study(tmp_path: Path, *changes: tuple[str, str], only: Sequence[str] = FEW) -> Study:
    file = recipe(tmp_path / "study.toml", *changes, only=only)
    return Study(read_recipe(file, quick=True, out=str(tmp_path / "out")), "nestling run study.toml", quick=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an arm of every kind."""
    directory = tmp_path_factory.mktemp("study")
    arms = [name for name in ARMS if name not in DROPPED]
    study(directory, ONE_SEED, only=arms).run()
    return directory / "out"


def rows(out: Path) -> dict[tuple[str, int], Any]:
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return {(line["arm"], line["seed"]): line for line in lines}


def test_every_arm_leaves_its_result(whole: Path) -> None:
    about, found = json.loads((whole / "study.json").read_text()), rows(whole)
    assert {*found} == {(arm, 1) for arm in about["arms"]}
    assert len({row["role"] for row in found.values()}) == 8
    for (arm, _), row in found.items():
        assert row["points"][-1]["sizes"].keys() >= {*about["arms"][arm]["sizes"]}
    ours, alone, scratch = (found[arm, 1] for arm in ("elastic", "alone-40", "scratch-40"))
    assert alone["family"]["40%"] == ours["family"]["40%"] == scratch["family"]["40%"]
    assert len({row["parent"]["loss"] for row in found.values()}) == 1
    search = found["searched-40", 1]["search"]
    assert search["chosen"] == min(search["tried"], key=lambda one: one["loss"])["sizes"]
    assert search["chosen"]["40%"] == found["searched-40", 1]["family"]["40%"]["submodel"]


def drawn(steps: range, **options: int) -> int:
    """Tokens that a batch of 4 problems has at every step, one a character.

    Every row ends with a token of its own, which the longest rows are not asked to read: nothing comes after it.
    """
    given = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2, **options}
    task, total = Task("chain_sum", tuple(given.items())), 0
    for step in steps:
        stream = problems(task, 1, held_out=False, start=step * 4 * HELD_OUT)
        lengths = [len(problem.prompt) + len(problem.solution) + 1 for problem in islice(stream, 4)]
        total += sum(min(length, max(lengths) - 1) for length in lengths)
    return total


def test_tokens_are_those_of_the_problems_that_were_drawn(whole: Path) -> None:
    found = {arm: row for (arm, _), row in rows(whole).items()}
    last = {arm: row["points"][-1] for arm, row in found.items()}
    once, twice = drawn(range(4)), drawn(range(8))
    assert (last["elastic"]["tokens"], last["elastic"]["teacher"]) == (once, once)
    assert last["elastic"]["student"] == dict.fromkeys(("100%", "60%", "40%"), once)
    assert last["two-sizes"]["student"] == dict.fromkeys(("100%", "40%"), once)
    assert last["alone-40"]["student"] == {"40%": once}
    scratch = {key: value for key, value in last["scratch-40"].items() if key != "sizes"}
    assert scratch == {"step": 8, "tokens": twice, "student": {"40%": twice}, "teacher": 0}
    one = last["elastic-one"]
    assert sum(one["student"].values()) == one["teacher"] == one["tokens"] == twice
    assert last["stages-even"]["tokens"] == drawn(range(4), max_terms=2) + drawn(range(4, 8))
    search = found["searched-40"]["search"]
    assert (search["student"], search["teacher"]) == (2 * drawn(range(2)),) * 2
    first = found["elastic"]["points"][0]
    assert (first["step"], first["tokens"]) == (2, drawn(range(2)))


def test_the_page_has_the_paper_s_tables(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["nestling", "report", str(whole)])
    (whole / "report.html").unlink()
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    page = Page((whole / "report.html").read_text())
    assert not page.loads
    text = page.reads()
    for words in ("Memory in BF16", "Compare: accuracy, tokens, memory", "360×", "7×", "42 GB", "stages-weighted"):
        assert words in text
    assert "Missing" not in text
    assert "its figures say nothing" in text
    assert "| 360×" in (whole / "report.md").read_text()


def test_nothing_is_made_twice_and_a_stopped_study_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, int]] = []
    run = running.Cell.run

    def noted(cell: running.Cell) -> Any:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append((cell.arm.name, cell.seed))
        return run(cell)

    monkeypatch.setattr(running.Cell, "run", noted)
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path).run()
    assert made == [("elastic", 0), ("elastic", 1), ("alone-40", 0)]
    before = rows(tmp_path / "out")
    assert read_results(tmp_path / "out").at("alone-40", "40%").missing == (1,)
    made.clear()
    study(tmp_path).run()
    assert made == [("alone-40", 1), ("untrained", 0), ("untrained", 1)]
    assert {key: rows(tmp_path / "out")[key] for key in before} == before
    made.clear()
    study(tmp_path).run()
    assert not made


def test_a_changed_recipe_says_what_is_made_again_and_keeps_what_was_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study(tmp_path, ONE_SEED, only=("elastic", "alone-40")).run()
    before = rows(tmp_path / "out")
    capsys.readouterr()
    study(
        tmp_path, ONE_SEED, (ALONE, ALONE.replace("] }", "], learning_rate = 5e-3 }")), only=("elastic", "alone-40")
    ).run()
    said = " ".join(capsys.readouterr().err.split())
    why = "alone-40, seed 1 is made again, the recipe has changed: arm.train.learning_rate was None, is now 0.005"
    assert why in said
    assert "elastic, seed 1 is made again" not in said
    after = rows(tmp_path / "out")
    assert {key for key in before if after[key] != before[key]} == {("alone-40", 1)}
    kept = [*(tmp_path / "out" / "arms" / "alone-40").glob("1-before-*/result.json")]
    assert [json.loads(file.read_text()) for file in kept] == [before["alone-40", 1]]
    study(tmp_path, ONE_SEED, ("[quick.parent]\nsteps = 3", "[quick.parent]\nsteps = 2"), only=("elastic",)).run()
    again = rows(tmp_path / "out")["elastic", 1]
    assert again["parent"]["loss"] != before["elastic", 1]["parent"]["loss"]
    said = " ".join(capsys.readouterr().err.split())
    assert "elastic, seed 1 is made again, the recipe has changed: recipe.parent.steps was 3, is now 2" in said


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('role = "untrained"\n', 'role = "untrained"\ntrain = { budgets = ["60%"] }\n', "train has no meaning"),
        ('role = "untrained"', 'role = "un"', "study.arms.untrained.role"),
        ("seeds = [0, 1, 2]", "seeds = [0, 0]", "seeds: each one once"),
        ("reach = [0.95, 0.9]", "reach = [95]", "study.reach"),
        ("[study.arms.untrained]", '[study.arms."un/trained"]', "should match pattern"),
        ("every = 15 ", "# ", "evaluate.every = 20"),
        (
            'about = "sliced from the ranked parent, not trained"\nsizes_from = "elastic"',
            'sizes_from = "elastik"',
            "is no family before it; there is elastic",
        ),
        (ALONE, 'train = { budgets = ["50%"] }', "has none for 50%"),
        (ALONE, 'train = { budgets = ["60%", "40%"] }', "alone-40: train: alone = true"),
        (ALONE, 'sizes_from = "elastic"\ntrain = { budgets = ["50%"] }', "elastic has no size '50%'"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_made(
    tmp_path: Path, old: str, new: str, words: str
) -> None:
    with pytest.raises(NestlingError) as refused:
        study(tmp_path, (old, new), *([("every = 2\nrows", "rows")] if "every" in old else [])).run()
    assert words in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('size = "40%"', 'size = "45%"', "study.arms.scratch-40: size"),
        ("parent = { steps = 1600, batch = 64 }", "parent = { step = 1600, batch = 64 }", "unknown key parent.step"),
        ("parent = { steps = 1600, batch = 64 }", "parent = { decay = 2 }", "parent.decay"),
        ('size = "40%"\n', "", "needs size"),
        ("candidate_steps = 60", "candidate_steps = 300", "candidate_steps must be fewer"),
        ("candidates = 4\n", "", "needs candidates"),
    ],
)
def test_arms_that_lack_or_misplace_something(tmp_path: Path, old: str, new: str, words: str) -> None:
    file = recipe(tmp_path / "study.toml", (old, new), only=("elastic", "scratch-40", "searched-40"))
    with pytest.raises(NestlingError) as refused:
        Study(read_recipe(file, out=str(tmp_path / "out")), "").run()
    assert words in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "size", lambda: 2)
    with pytest.raises(NestlingError, match="in one process, and there are 2"):
        study(tmp_path).run()
    assert not (tmp_path / "out").exists()


def test_a_seed_of_its_own_is_not_for_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(tmp_path / "study.toml", only=FEW)
    monkeypatch.setattr(sys, "argv", ["nestling", "run", str(file), "--seed", "5", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "study.seeds" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_baseline_from_nothing_is_a_study_of_one_arm(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "runs" / "scratch.toml").read_text()
    text = text.replace("steps = 20\nbatch = 32", "steps = 2\nbatch = 4").replace("{ steps = 20 }", "{ steps = 4 }")
    text = text.replace("every = 10\nrows = 50", "every = 2\nrows = 10")
    (tmp_path / "scratch.toml").write_text(text)
    Study(read_recipe(tmp_path / "scratch.toml", quick=True, out=str(tmp_path / "out")), "").run()
    row = rows(tmp_path / "out")["scratch", 0]
    assert [point["step"] for point in row["points"]] == [2, 4]
    assert row["family"]["50%"]["parameters"] < row["parent"]["parameters"] / 2
    assert "50% from nothing" not in (tmp_path / "out" / "report.md").read_text()
    assert "50 % from nothing" in (tmp_path / "out" / "report.md").read_text()
