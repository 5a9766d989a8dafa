"""`nestling train`: a changed recipe is refused by name, and a dry run reads shapes only."""

import signal
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym")

import test_pipeline as whole
from nestling.errors import NestlingError
from nestling.pipeline import Pipeline
from nestling.recipe import read_recipe


def test_a_recipe_that_changed_while_the_training_was_stopped(tmp_path: Path) -> None:
    first, out = whole.write_recipe(tmp_path), tmp_path / "out"
    assert whole.stopped("SIGKILL", 5, first, out).returncode == -signal.SIGKILL
    (tmp_path / "changed").mkdir()
    second = whole.write_recipe(tmp_path / "changed", "learning_rate = 4e-3", "learning_rate = 5e-3")
    changed = read_recipe(second, quick=True, out=str(out))
    with pytest.raises(NestlingError) as caught:
        Pipeline(changed, "test").run(until="train")
    assert "elastic.learning_rate was 0.004, is now 0.005" in str(caught.value)
    assert "--on-change" in str(caught.value)
    assert not (out / "elastic").exists()
    Pipeline(changed, "test", on_change="restart").run(until="train")
    rows = (out / "elastic" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 6
    assert not (out / ".state").exists()
