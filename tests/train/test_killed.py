"""A real process of elastic training, killed again and again: what it ends with is what an undisturbed one has."""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("reasoning_gym")

import test_elastic as whole

from nestling.train.checkpoints import METRICS

LAUNCHER = """
import itertools, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import test_elastic as whole
from nestling.data import batches as data
from nestling.train import checkpoints, teaching

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def killing(step, where):
    batch, distilled, checksum = data.batch, teaching.distilled, checkpoints.checksum
    now, calls = [], itertools.count()

    def noting(task, tokenizer, seed, at, size):
        now.append(at)
        return batch(task, tokenizer, seed, at, size)

    def losing(*given):
        if now[-1] == step and next(calls) == where:
            die()
        return distilled(*given)

    data.batch, teaching.distilled = noting, losing
    if where < 0:  # while the checkpoint after that step is written
        checkpoints.checksum = lambda path: die() if now and now[-1] >= step else checksum(path)

for text in sys.argv[3:]:
    step, where = map(int, text.split(","))
    if not (child := os.fork()):
        killing(step, where)
        whole.run(Path(sys.argv[1]), how=getattr(whole, sys.argv[2]))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
STEPS = whole.HOW.steps


@pytest.mark.parametrize(("seed", "how"), [(0, "HOW"), (1, "SETTLES")])
def test_a_process_killed_at_random_steps_ends_as_the_undisturbed_one(tmp_path: Path, seed: int, how: str) -> None:
    drawn = random.Random(seed)
    steps = sorted(drawn.sample(range(STEPS - 1), 5))
    kills = [f"{step},{drawn.choice([-1, 0, 3, 5])}" for step in steps]
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path / "s"), how, *kills]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["-9"] * 5, done.stderr
    given = getattr(whole, how)
    wanted = whole.result(whole.run(tmp_path / "undisturbed", how=given), tmp_path / "undisturbed")
    assert whole.result(whole.run(tmp_path / "s", how=given), tmp_path / "s") == wanted
    assert timeless(tmp_path / "s") == timeless(tmp_path / "undisturbed")
    names = [{path.name.split("-")[1] for path in (tmp_path / run).glob("step-*")} for run in ("s", "undisturbed")]
    assert names[0] == names[1]


def timeless(state: Path) -> Any:
    import json

    return whole.timeless([json.loads(line) for line in (state / METRICS).read_text().splitlines()])
