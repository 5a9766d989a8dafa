"""A recipe on GPUs: the paper's 12B against figures worked out by hand, what fits and what would, bad input."""

import json
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import two_processes
from nestling import cli, scale
from nestling.arch.submodel import WHOLE, Submodel, complete
from nestling.dry_run import example, stage_figures
from nestling.errors import NestlingError
from nestling.gpus import GPUS, find_gpu
from nestling.layouts import kinds
from nestling.memory import Layout, memory_of_rank
from nestling.recipe import Recipe, parent_architecture, read_recipe
from nestling.sections import LayoutSection, TrainSection
from nestling.units import show_count, show_span

NANO = Path(__file__).parent.parent / "runs" / "nano-12b-v2.toml"
COUNT, ENDS = 12_310_001_152, 2 * 131_072 * 5120 + 5120
MLP = 2 * 5120 * 20480 + 5120
MAMBA = 5120 * (2 * 10240 + 2 * 1024 + 128) + 10240 * 5120 + 5120 + 10240 + 3 * 128 + 12288 * 5


@pytest.fixture(scope="module")
def nano() -> Recipe:
    return read_recipe(NANO)


@pytest.mark.parametrize("ranks", [8, 64, 512])
def test_the_papers_recipe_on_gpus(nano: Recipe, ranks: int) -> None:
    found = scale.figures(nano, ranks, GPUS["b200"], mfu=0.5)
    memory, layout = found["memory"], found["layout"]
    assert (memory["master weights"], memory["gradients"]) == (-(-4 * COUNT // ranks),) * 2
    assert memory["optimizer"] == -(-8 * COUNT // ranks)
    assert memory["teacher"] == (0 if layout["offload"] else -(-2 * COUNT // ranks))
    largest = max(MLP, MAMBA)
    blocks = 2 * 2 * largest if layout["reshard"] else 2 * (COUNT - ENDS)
    assert memory["whole blocks"] == ENDS * (4 + 2) + blocks + largest * (2 + 4)
    assert memory["logits chunk"] == 2 * 4 * 256 * 131072
    assert memory["activations"] > 49152 * 62 * 5120 * 4  # the input of every block, in float32
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total")
    assert found["fits"]
    assert memory["total"] <= 0.9 * 180e9
    assert not layout["offload"]
    assert layout["activation_checkpointing"]
    seconds = sum(stage["seconds"] for stage in found["stages"])
    flops = 1.203e22  # 110e9 tokens: the teacher once and the students four times, both stages
    assert seconds == pytest.approx(flops / (ranks * 2250e12 * 0.5), rel=0.01)
    assert found["elastic"]["tokens"] == pytest.approx(110e9, rel=1e-3)
    assert found["elastic"]["gpu_hours"] == pytest.approx(seconds * ranks / 3600)


@pytest.mark.parametrize(
    ("seconds", "count", "said"),
    [
        (1080000, 110e9, ("12.50 days", "110.00B")),
        (11520, 1250000, ("3.2 hours", "1.25M")),
        (2400, 12288, ("40 minutes", "12,288")),
        (0.41, 0, ("0.41 seconds", "0")),
    ],
)
def test_times_and_counts_of_any_size_can_be_read(seconds: float, count: float, said: tuple[str, str]) -> None:
    assert (show_span(seconds), show_count(count)) == said


def test_separate_distillations_take_the_tokens_of_each(nano: Recipe) -> None:
    found = scale.figures(nano, 64, GPUS["b200"])
    assert found["apart_total"]["tokens"] == 3 * found["elastic"]["tokens"]
    assert found["published"]["tokens"] == 750e9
    whole, nine, six = (row["gpu_hours"] for row in found["apart"].values())
    assert whole > found["elastic"]["gpu_hours"] > six
    a_token = (nine + six) / 2 / found["elastic"]["tokens"]
    assert found["published"]["gpu_hours"] == pytest.approx(750e9 * a_token)
    teacher_and_student = 110e9 * 2 * (COUNT - ENDS / 2) * (1 + 4) / (2250e12 * 0.35) / 3600
    assert whole == pytest.approx(teacher_and_student, rel=0.15)  # two FLOPs a weight; attention and states besides


def test_what_does_not_fit_says_what_would(nano: Recipe) -> None:
    found = scale.figures(nano, 64, GPUS["h100"])
    assert not found["fits"]
    assert found["layout"]["offload"]
    said = " ".join(found["would_fit"])
    assert re.search(r"as many B200 \(180 GB\)", said)
    length = int(re.search(r"shorter sequences, of ([\d,]+) tokens for example", said)[1].replace(",", ""))  # type: ignore[index]
    stages = tuple(s.model_copy(update={"length": min(s.length or 0, length)}) for s in nano.train.stages)
    shorter = nano.model_copy(update={"train": nano.train.model_copy(update={"stages": stages})})
    assert scale.figures(shorter, 64, GPUS["h100"])["fits"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--gpus", "64", "--gpu", "h10"], "--gpu 'h10' is unknown; did you mean 'h100'?"),
        (["--gpus", "100"], "must be a multiple of it; the nearest that fits: 64 and 128"),
        (["--gpus", "0"], "--gpus"),
        (["--gpus", "8", "--gpu-memory", "much"], "--gpu-memory: 'much' is not a number of bytes"),
        (["--gpu", "h100"], "say how many GPUs there are: --gpus 8"),
        (["--gpus", "8", "--context", "8k"], "a recipe has lengths of its own"),
    ],
)
def test_bad_input_is_refused(
    given: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(["plan", str(NANO), *given], monkeypatch) == 2
    assert words in capsys.readouterr().err


def ended(command: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "argv", ["nestling", *command])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code


def test_a_plan_and_a_dry_run_of_a_recipe_print_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--gpus", "64", "--gpu", "b200"]
    said = []
    for command in (["plan", str(NANO)], ["train", str(NANO), "--dry-run"]):
        assert ended([*command, *options], monkeypatch) == 0
        said.append(capsys.readouterr().out)
        assert ended([*command, *options, "--json"], monkeypatch) == 0
        assert json.loads(capsys.readouterr().out)["scale"]["gpus"] == 64
    assert said[0] == said[1]
    assert "64 × B200 (180.00 GB, 2.25 PFLOP/s in bf16)" in said[0]


def test_a_plan_says_what_to_write_into_the_recipe(nano: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    found = scale.figures(nano, 8, replace(GPUS["b200"], memory=174 * 10**9))  # 2 % less, and the teacher must go away
    scale.show(found)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("In the recipe: "))
    parts = dict(part.split("] ") for part in line.removeprefix("In the recipe: ").split("; "))
    written = tomllib.loads("\n".join(f"{name}]\n{keys.replace(', ', chr(10))}" for name, keys in parts.items()))
    assert written["train"] == {"micro_batch": 1, "activation_checkpointing": True}
    assert written["train"].keys() <= TrainSection.model_fields.keys()
    assert LayoutSection(**written["layout"]) == LayoutSection(reshard=True, offload_teacher=True)


def test_a_teacher_that_is_away_leaves_its_ends_and_the_visiting_block(nano: Recipe) -> None:
    architecture, how = parent_architecture(nano), nano.train
    assert {layout.offload for layout in kinds(1)} == {False, True}
    away, here = (memory_of_rank(architecture, how, Layout(1, 1, True, offload=offload)) for offload in (True, False))
    assert (away["teacher"], away["whole blocks"]) == (0, 2 * (ENDS + max(MLP, MAMBA)))
    assert (here["teacher"], here["whole blocks"]) == (2 * COUNT, 0)


def test_sizes_that_are_given_are_the_ones_that_are_counted(tmp_path: Path) -> None:
    size = {"hidden_size": 88, "intermediate_size": 240, "mamba_num_heads": 6, "num_attention_heads": 6}
    demo = read_recipe(NANO.with_name("demo.toml"))
    alone = demo.train.model_copy(update={"budgets": ("50%",), "sizes": {"50%": size}, "alone": True})
    architecture = parent_architecture(demo)
    family = example(architecture, alone)
    assert family == {"100%": WHOLE, "50%": complete(architecture, Submodel.from_json(size))}
    stage = alone.stages[1].model_copy(update={"length": 16})
    found = stage_figures(architecture, alone.model_copy(update={"stages": (stage,)}), family, 0)
    assert found["budget_tokens"] == {"100%": 0, "50%": 360 * 128 * 16}


def test_a_gpu_of_ones_own() -> None:
    own = find_gpu(None, "24GB", 1e14)
    assert (own.memory, own.flops) == (24 * 10**9, 1e14)
    assert find_gpu("H100", "94GB", None).memory == 94 * 10**9
    with pytest.raises(NestlingError, match="allowed: a100, h100"):
        find_gpu("tpu", None, None)


def test_the_script_of_a_training_on_one_gpu_runs() -> None:
    """On the CPU, so that it is ready where there is a GPU; without one it says so."""
    script = NANO.parents[1] / "benchmarks" / "training" / "one_gpu.py"

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, check=False)

    tiny = run("--device", "cpu", "--model", "tiny", "--batch", "2", "--length", "32", "--steps", "4")
    assert tiny.returncode == 0, tiny.stderr
    said = dict(line.strip("| ").split(" | ") for line in tiny.stdout.splitlines() if line.startswith("| "))
    assert said["model"].startswith("tiny, 68,812 parameters; 2 rows of 32 tokens")
    seconds, speed, flops = said["a step"].split(", ", 2)
    counted = float(flops.removesuffix(" FLOPs"))
    assert float(said["speed"].split()[0]) == pytest.approx(counted / float(seconds.split()[0]), rel=0.02)
    assert int(speed.split()[0].replace(",", "")) == pytest.approx(64 / float(seconds.split()[0]), rel=0.02)
    if not torch.cuda.is_available():
        without = run()
        assert (without.returncode, without.stderr.count("\n")) == (1, 1)
        assert "finds no GPU here; 'cpu' is allowed" in without.stderr


def test_what_is_said_of_a_rank_is_what_two_ranks_hold() -> None:
    """Against the events of torch's allocator, in steps of FSDP2 (the others: benchmarks/training)."""
    script = NANO.parents[1] / "benchmarks" / "training" / "sharded_memory.py"
    said = two_processes.start([str(script), "--only", "bf16, checkpointing"])[0].splitlines()
    (row,) = (line for line in said if line.startswith("| bf16, checkpointing |"))  # the profiler may print too
    assert 0.9 < float(row.split("|")[-2]) < 1.15
