"""A study of text: sizes are judged by their perplexity on held-out rows."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("jinja2")

from nestling.data.corpus import open_corpus
from nestling.model.store import load_model
from nestling.recipe import read_recipe
from nestling.study.study import Study
from nestling.weights.elastic import open_elastic
from test_text_recipe import write_recipe

STUDY = """
every = 2
rows = 3
[study]
seeds = [4]
[study.arms.elastic]
role = "elastic"
[study.arms.alone]
role = "alone"
sizes_from = "elastic"
train = { budgets = ["50%"] }
[study.arms.scratch]
role = "scratch"
size = "50%"
sizes_from = "elastic"
"""


def test_text_is_judged_by_perplexity(tmp_path: Path) -> None:
    file = write_recipe(tmp_path)
    file.write_text(file.read_text() + STUDY)
    recipe = read_recipe(file)
    Study(recipe, "").run()
    assert json.loads((tmp_path / "out" / "study.json").read_text())["measure"] == "loss"
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [(row["arm"], [point["step"] for point in row["points"]]) for row in rows] == [
        ("elastic", [2, 4]),
        ("alone", [2, 4]),
        ("scratch", [2, 3]),
    ]
    assert rows[0]["points"][-1]["tokens"] <= 2 * 2 * 16 + 2 * 2 * 24
    parent = load_model(open_elastic(tmp_path / "out" / "parents" / "4" / "parent"))
    assert recipe.data is not None
    held = open_corpus(recipe.data, tmp_path / "words", 20, seed=4, cache=tmp_path / "c", key="validation")
    batch = held.batch(0, 3, 16)
    with torch.no_grad():
        logits = parent(batch.inputs_BL, documents_BL=batch.documents_BL).logits
    right = (logits.argmax(-1) == batch.targets_BL)[batch.counted_BL].float().mean()
    assert rows[0]["parent"]["token"] == pytest.approx(float(right), abs=1e-6)
    loss = torch.nn.functional.cross_entropy(logits[batch.counted_BL], batch.targets_BL[batch.counted_BL])
    assert rows[0]["parent"]["loss"] == pytest.approx(float(loss), abs=1e-5)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "perplexity on 3 held-out rows, the lower the better" in page
    assert f"parents: {float(loss.exp()):.2f}" in page
