"""A whole run under the real torchrun: what one process makes, even where a process is lost on the way."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("reasoning_gym")

import test_pipeline as whole
from nestling.pipeline import Pipeline
from nestling.recipe import read_recipe

DYING = """
import os, signal, sys
from nestling import cli
from nestling.train import elastic

compute = elastic._Elastic.compute

def lost(self, step):
    if (step, os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (4, "1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return compute(self, step)

elastic._Elastic.compute = lost
cli.main()
"""


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of the recipe."""
    out = tmp_path_factory.mktemp("one") / "out"
    Pipeline(recipe(out.parent), "test").run()
    return out


def recipe(directory: Path) -> Any:
    return read_recipe(write_recipe(directory), quick=True, out=str(directory / "out"))


def write_recipe(directory: Path) -> Path:
    file = whole.write_recipe(directory)
    file.write_text(file.read_text() + "[checkpoints]\nevery = 2\n")
    return file


def test_a_run_that_lost_a_process_goes_on_and_makes_what_one_process_makes(one: Path, tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    file, out, logs = write_recipe(tmp_path), tmp_path / "out", tmp_path / "logs"
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "--redirects", "3", "--log-dir", logs]
    command = [*options, tmp_path / "dying.py", "run", file, "--quick", "--out", out]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *map(str, command)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    said = {str(log.relative_to(logs)).split("/", 1)[1]: log.read_text() for log in logs.rglob("*.log")}
    assert done.returncode == 0, (done.stderr, said)
    assert set(said["attempt_0/0/stderr.log"].splitlines()[-1:]) <= ENDS, said
    assert "Traceback" not in "".join(said.values())
    assert "train elastic: going on from step 4" in said["attempt_1/0/stderr.log"]
    assert said["attempt_1/1/stdout.log"] == said["attempt_1/1/stderr.log"] == ""
    assert not (out / ".state").exists()
    for stage in ("parent", "elastic", "uniform", "scratch"):
        rows = [metrics(directory / stage) for directory in (one, out)]
        assert torch.allclose(*(torch.tensor([row["loss"] for row in each]) for each in rows), rtol=0, atol=1e-5)
        weights = [load_file(directory / stage / "model.safetensors") for directory in (one, out)]
        assert weights[0].keys() == weights[1].keys()
        for name, value in weights[0].items() if stage in ("parent", "scratch") else ():  # not led by noise anywhere
            torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-4)
    for directory in (one, out):
        assert [row["name"] for row in json.loads((directory / "report.json").read_text())["rows"]] == whole.NAMES
    assert files(one) == files(out)


ENDS = {
    "nestling: another of the processes has ended or is out of reach; its own message says why, if it could leave one",
    "nestling: stopped",  # torchrun was faster
}


def metrics(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
