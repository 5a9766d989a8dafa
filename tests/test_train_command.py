"""`nestling train`: a changed recipe is refused by name, and a dry run reads shapes only."""

import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("reasoning_gym")

import test_pipeline as whole
from nestling import dry_run, ranks
from nestling.arch.cost import cost
from nestling.arch.submodel import Submodel, is_within
from nestling.checks import check
from nestling.dry_run import figures
from nestling.errors import NestlingError
from nestling.pipeline import Pipeline
from nestling.recipe import parent_architecture, read_recipe
from nestling.train import tensorboard

RUNS = Path(__file__).parent.parent / "runs"
NANO = RUNS / "nano-12b-v2.toml"


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


def test_tensorboard_is_asked_for_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = whole.write_recipe(tmp_path)
    recipe.write_text("tensorboard = true\n" + recipe.read_text())
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    with pytest.raises(NestlingError, match="tensorboard = true needs tensorboard"):
        Pipeline(read_recipe(recipe, quick=True, out=str(tmp_path / "out")), "test").run(until="parent")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("processes", "layout", "train", "words"),
    [
        (1, 'device = "cuda"', "", r"layout.device = 'cuda': torch .* finds no GPU here; 'cpu' is allowed"),
        (2, "replicas = 3", "", "layout.replicas = 3 does not divide the 2 processes"),
        (2, "", 'budgets_per_step = "rank"', "leave layers out of the search space and of train.sizes, or say 'one'"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, layout: str, train: str, words: str
) -> None:
    monkeypatch.setattr(ranks, "size", lambda: processes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = whole.write_recipe(tmp_path, "[quick.train]\n", f"[quick.train]\n{train}\n")
    recipe.write_text(recipe.read_text() + f"[layout]\n{layout}\n")
    with pytest.raises(NestlingError, match=words):
        Pipeline(read_recipe(recipe, quick=True, out=str(tmp_path / "out")), "test").run(until="train")
    assert not (tmp_path / "out").exists()


SIX, NARROW = "layers = [0, 1, 2, 3, 4, 5]", "hidden_size = 16"


@pytest.mark.parametrize("dropped", [None, "search_space", "sizes", "controls"])
def test_ranks_with_budgets_of_their_own_need_sizes_with_every_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropped: str | None
) -> None:
    monkeypatch.setattr(ranks, "size", lambda: 2)
    file = whole.write_recipe(tmp_path, "[quick.train]\n", '[quick.train]\nbudgets_per_step = "rank"\n')
    text = file.read_text() if dropped == "search_space" else file.read_text().replace("\nlayers = [6]", "")
    if dropped == "sizes":
        text = text.replace(
            "[quick.train]\n",
            f'[quick.train]\nsizes = {{ "75%" = {{ {SIX}, {NARROW} }}, "50%" = {{ {SIX}, {NARROW} }} }}\n',
        )
    if dropped == "controls":
        text = text.replace('"50%" = { ', f'"50%" = {{ {SIX}, ')
    file.write_text(text)
    recipe = read_recipe(file, quick=True, out=str(tmp_path / "out"))
    refused = pytest.raises(NestlingError, match="needs sizes that have every layer") if dropped else nullcontext()
    with refused:
        check(recipe, Pipeline(recipe, "").material, "train", is_trained=False)


def test_ranks_with_budgets_of_their_own_need_sizes_with_every_expert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "size", lambda: 2)
    text = (RUNS / "mixture.toml").read_text().replace("\nlayers = [5]", "")
    (tmp_path / "recipe.toml").write_text(text.replace("[train]", '[train]\nbudgets_per_step = "rank"'))
    recipe = read_recipe(tmp_path / "recipe.toml", out=str(tmp_path / "out"))
    with pytest.raises(NestlingError, match="needs sizes that have every expert, .* leave n_routed_experts out"):
        check(recipe, Pipeline(recipe, "").material, "train", is_trained=False)


# ---- dry runs


@pytest.fixture(scope="module")
def nano() -> dict[str, Any]:
    return figures(read_recipe(NANO))


def test_the_papers_recipe_has_the_papers_figures(nano: dict[str, Any]) -> None:
    first, second = nano["stages"]
    assert (first["length"], first["batch"], second["length"], second["batch"]) == (8192, 1536, 49152, 512)
    assert (first["steps"], second["steps"]) == (5166, 1788)
    assert first["tokens"] == pytest.approx(65e9, rel=1e-3)
    assert second["tokens"] == pytest.approx(45e9, rel=1e-3)
    assert nano["total"]["tokens"] == first["tokens"] + second["tokens"] == pytest.approx(110e9, rel=1e-3)
    assert first["budget_tokens"] == dict.fromkeys(("100%", "9B", "6B"), round(first["tokens"] / 3))
    assert second["budget_tokens"]["9B"] == pytest.approx(0.3 * 45e9, rel=1e-3)
    how = read_recipe(NANO).train
    assert (how.learning_rate, how.router_learning_rate, how.warmup, how.resource_weight) == (9e-5, 1e-2, 60, 1.0)
    assert nano["budgets"]["100%"]["parameters"] == 12_310_001_152
    for name, count in (("9B", 9e9), ("6B", 6e9)):
        assert 0.98 * count <= nano["budgets"][name]["parameters"] <= nano["budgets"][name]["target"] == count


def test_the_sizes_shown_are_nested(nano: dict[str, Any]) -> None:
    whole = parent_architecture(read_recipe(NANO))
    fields = ("layers", "hidden_size", "intermediate_size", "mamba_num_heads", "mamba_head_dim", "num_attention_heads")
    shown = [Submodel.from_json({f: b["shape"][f] for f in fields}) for b in nano["budgets"].values()]
    assert is_within(whole, shown[1], shown[0])
    assert is_within(whole, shown[2], shown[1])


def test_flops_are_those_of_the_steps_one_after_the_other(nano: dict[str, Any]) -> None:
    """Counted position by position where the dry run has a closed form, and step by step."""
    whole, how = cost(parent_architecture(read_recipe(NANO))), read_recipe(NANO).train
    fields = ("layers", "hidden_size", "intermediate_size", "mamba_num_heads", "mamba_head_dim", "num_attention_heads")
    family = {
        name: cost(parent_architecture(read_recipe(NANO)), Submodel.from_json({f: b["shape"][f] for f in fields}))
        for name, b in nano["budgets"].items()
    }
    step, total = 0, 0.0
    for stage in how.stages:

        def sequence(of: Any, length: int = stage.length) -> float:
            return sum(of.flops(position) for position in range(1, length + 1))

        once = {name: sequence(each) for name, each in family.items()}
        teacher = sequence(whole)
        mix = stage.budget_probabilities or dict.fromkeys(family, 1 / 3)
        for _ in range(stage.steps):
            student = sum(mix[name] * (teacher if step < how.router_steps else once[name]) for name in family)
            total += stage.batch * (teacher + 4 * student)  # forward, backward as two, and forward again
            step += 1
    assert nano["total"]["flops"] == pytest.approx(total, rel=1e-9)


def test_memory_is_of_the_weights_and_of_the_longest_micro_batch(nano: dict[str, Any]) -> None:
    count, found = 12_310_001_152, nano["memory"]
    assert (found["master weights"], found["gradients"], found["optimizer"]) == (4 * count, 4 * count, 8 * count)
    assert found["teacher"] == 2 * count
    inputs = 49152 * 62 * 5120 * 4  # of every block, in float32, which activation checkpointing keeps
    assert inputs + 2 * count < found["step"] < 1.5 * (inputs + 2 * count)  # and the weights in bf16
    assert found["total"] == sum(size for name, size in found.items() if name != "total")


def test_a_recipe_without_lengths_has_no_tokens_to_count() -> None:
    found = figures(read_recipe(RUNS / "demo.toml"))
    assert [stage["steps"] for stage in found["stages"]] == [60, 360]
    assert found["total"] == {"steps": 420, "tokens": None, "flops": None}
    assert found["budgets"]["100%"]["parameters"] == 694_728
    matrices = found["memory"]["optimizer"] - 4 * 694_728
    assert 0 < matrices < 4 * 694_728  # Muon keeps one tensor for the matrices inside blocks, AdamW two for the rest


def test_memory_is_of_the_device_that_the_recipe_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    given, asked = read_recipe(RUNS / "demo.toml"), []
    monkeypatch.setattr(dry_run, "memory", lambda *_, gpu: asked.append(gpu))
    for device in ("cpu", "cuda", "auto"):
        figures(given.model_copy(update={"layout": given.layout.model_copy(update={"device": device})}))
    assert asked == [False, True, torch.cuda.is_available()]


PRINTED = """
import sys
from nestling import cli
try:
    cli.main()
finally:
    print(sorted({*sys.modules} & {"torch", "transformers"}))
"""


def test_the_command_prints_it_and_writes_nothing(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "150"}
    command = [sys.executable, "-c", PRINTED, "train", str(NANO), "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "transformers" not in done.stdout.splitlines()[-1]
    for figure in ("12,310,001,152", "5,166", "1,788", "110.00B", "49.24 GB", "128 × 80"):
        assert figure in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_budget_that_the_search_space_cannot_give_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(NANO.read_text().replace('"6B"', '"1B"'))
    with pytest.raises(NestlingError, match=r"budget 1B wants .* which the search space cannot give"):
        figures(read_recipe(tmp_path / "r.toml"))


def test_a_preset_cannot_be_trained() -> None:
    with pytest.raises(NestlingError, match=r"is a preset, a shape without weights; training needs a checkpoint dir"):
        Pipeline(read_recipe(NANO), "test").run(until="train")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('model = "nemotron-nano-12b-v2"', 'model = "nemotron-nano-12b"', "did you mean 'nemotron-nano-12b-v2'?"),
        ('model = "nem', 'modle = "nem', "'parent.modle'; did you mean 'model'?"),
        ("budgets_per_step", "budget_per_step", "'train.budget_per_step'; did you mean 'budgets_per_step'?"),
        ('tokens = "65B"', 'tokens = "65GB"', "tokens = '65GB' is not a count"),
        ('tokens = "65B"', 'tokens = "65%"', "tokens = '65%' is not a count"),
        ('tokens = "65B"', 'tokens = "65B"\nsteps = 4', "give steps or these three"),
        ("length = 8192\n", "", "tokens stand for steps, together with batch and length"),
        ("calibration =", "calibrate =", "unknown key 'data.calibrate'; did you mean 'calibration'?"),
        ('["9B", "6B"]', '["9B", "1B"]', "train: budget_probabilities must name 100%, 1B, 9B"),
        ("minutes = 30", "hours = 30", "'checkpoints.hours'"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_refused_by_a_dry_run(tmp_path: Path, old: str, new: str, words: str) -> None:
    text = NANO.read_text()
    assert text.count(old) >= 1
    (tmp_path / "r.toml").write_text(text.replace(old, new, 1))
    with pytest.raises(NestlingError, match=re.escape(words)):
        figures(read_recipe(tmp_path / "r.toml"))


def test_a_parent_may_be_a_config_or_its_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "nemotron_h", "hybrid_override_pattern": "' + "M-" * 30 + '*-", "hidden_size": 5120, '
        '"intermediate_size": 20480, "mamba_head_dim": 80, "num_attention_heads": 40}'
    )
    found = []
    for parent in (tmp_path, tmp_path / "config.json"):
        text = NANO.read_text().replace('"nemotron-nano-12b-v2"', f'"{parent}"')
        (tmp_path / "r.toml").write_text(text)
        found.append(figures(read_recipe(tmp_path / "r.toml")))
    assert found[0] == found[1]
    assert found[0]["budgets"]["100%"]["shape"]["hybrid_override_pattern"] == "M-" * 30 + "*-"
