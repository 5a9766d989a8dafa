"""`nestling data`: tokenises, counts, and shows what a batch is made of."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

import test_recipe as whole
from nestling import cli
from nestling.data.show import opened, show_batch, show_counts
from nestling.errors import NestlingError
from nestling.recipe import read_recipe
from nestling.tokenizer import character_tokenizer, save_tokenizer

TEXTS = ["1+1=2", "3-2=1", "10+5-3=15;12", "7=7", "40-50=-10"]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A small recipe, trained from scratch on lines of text."""
    (tmp_path / "tokenizer").mkdir()
    save_tokenizer(character_tokenizer(), tmp_path / "tokenizer")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    data = f'[data]\ntrain = "{tmp_path}/*.jsonl"\ntokenizer = "{tmp_path}/tokenizer"\nrepeat = true\n'
    text = whole.RECIPE.replace('[task]\nname = "chain_sum"\nmax_terms = 2\n', data)
    text = text.replace("batch = 4\nlearning", "batch = 4\nlength = 8\nlearning").replace(
        '"out/small"', f'"{tmp_path}/out"'
    )
    text = text.replace(
        whole.STAGES, "stages = [{ steps = 3, batch = 2, length = 16 }, { steps = 5, batch = 1, length = 8 }]"
    )
    (tmp_path / "recipe.toml").write_text(text)
    return tmp_path / "recipe.toml"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["nestling", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def printed(recipe: Path, step: int = 0, rows: int = 9, **options: object) -> str:
    out = Console(file=io.StringIO(), width=200, **options)
    made = opened(read_recipe(recipe))
    show_counts(made, out)
    show_batch(made, step, rows, out)
    return out.file.getvalue()


def test_a_batch_shows_whole_documents_and_their_borders(recipe: Path) -> None:
    shown = printed(recipe)
    assert "step 0 of stage 1: 2 rows of 16 tokens" in shown
    rows = re.findall(r"row \d+: (\d+) tokens, documents: (\d+)\n(.*)", shown)
    assert len(rows) == 2
    for tokens, documents, text in rows:
        found = [each.replace("<eos>", "$") for each in text.split("┃")[1:]]
        assert len(found) == int(documents) >= 1
        written = [re.sub("[‹›]", "", each).replace(" ", "") for each in found]
        assert {each.removesuffix("$") for each in written} <= set(TEXTS)
        assert sum(len(each) - 1 for each in written) == int(tokens)  # the last token of each is only predicted
        assert all(re.search("‹.›", each) for each in found)  # the first one of each is only read


def test_a_step_of_a_later_stage_has_its_shape_and_its_pieces(recipe: Path) -> None:
    shown = printed(recipe, step=7)
    assert "step 7 of stage 2: 1 rows of 8 tokens" in shown
    with pytest.raises(NestlingError, match=r"--step 8: the training has 8 steps, 0 to 7"):
        printed(recipe, step=8)
    assert "(1 more rows: --rows)" in printed(recipe, rows=1)


def test_counts_are_those_of_the_text(recipe: Path) -> None:
    shown = printed(recipe)
    total = sum(len(text) + 1 for text in TEXTS)
    assert re.search(rf"│ 1\s+│ 5\s+│ {total}\s+│ {total}\s+│ 0\s+│", shown)
    assert re.search(r"│ 2\s+│ 1 x 8\s+│ 5\s+│ \d+ steps\s+│ [\d.]+%\s+│ 2\s+│ 0\s+│", shown)  # two are longer than 8


def test_colours_tell_documents_apart(recipe: Path) -> None:
    shown = printed(recipe, force_terminal=True, color_system="standard")
    assert "\x1b[36m" in shown or "\x1b[2;36m" in shown
    assert "\x1b[2;36m" in shown  # what is only read is dim


def test_the_command_prints_and_writes_only_the_tokens(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "data", recipe) == 0
    assert "training text" in (said := capsys.readouterr().out)
    assert "row 0" not in said
    assert [path.name for path in (recipe.parent / "out").iterdir()] == ["data"]
    assert run(monkeypatch, "data", "--show", recipe, "--step", 2) == 0
    assert "step 2 of stage 1" in capsys.readouterr().out
    assert run(monkeypatch, "data", "--show", whole.DEMO) == 2
    assert "has no [data] but a [task]" in capsys.readouterr().err
    recipe.write_text(recipe.read_text().replace("repeat = true", ""))
    assert run(monkeypatch, "data", "--show", recipe) == 2
    assert "data.train lasts for 1 steps of stage 1" in capsys.readouterr().err
