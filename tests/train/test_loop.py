"""The loop: a run that was stopped and resumed is the run that never was; what cannot be resumed starts again."""

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from nestling.errors import NestlingError
from nestling.train import checkpoints, loop
from nestling.train.checkpoints import METRICS, Metrics, Run
from nestling.train.loop import train
from nestling.train.optimize import Schedule, model_trainee
from nestling.train.sharded import failure

Fresh = Callable[[], Path]
STEPS = 12
TARGETS = {name: torch.randn(shape, generator=torch.Generator().manual_seed(9)) for name, shape in {
    "backbone.layers.0.mixer.up_proj.weight": (6, 4),
    "backbone.layers.0.norm.weight": (4,),
    "backbone.embeddings.weight": (7, 4),
}.items()}  # fmt: skip


class Toy:
    """Pulls its parameters to targets, with noise that depends on the step alone. One is only in use from step 5 on."""

    def __init__(self, every: int = 3) -> None:
        self.parameters = {name: nn.Parameter(torch.zeros_like(target) + 0.1) for name, target in TARGETS.items()}
        self.trainee = model_trainee(self.parameters, 0.05, weight_decay=0.1)
        self.every, self.note, self.before = every, {"seen": 0}, lambda step: None

    def compute(self, step: int) -> Metrics:
        self.before(step)
        self.note = {"seen": step + 1}
        noise = torch.Generator().manual_seed(step)
        used = [name for name in TARGETS if step >= 5 or "norm" not in name]
        gaps = [self.parameters[n] - TARGETS[n] - 0.3 * torch.randn(TARGETS[n].shape, generator=noise) for n in used]
        loss = sum(gap.square().sum() for gap in gaps)
        loss.backward()
        return {"loss": loss.item(), "parts": {"count": len(used)}}

    def train(self, state: Path, fingerprint: str = "a", steps: int = STEPS, **options: Any) -> list[Metrics]:
        run = Run(state, fingerprint, "train toy", self.every, **options)
        return train(
            run, self.trainee, Schedule(steps, 2, 0.5), self.compute, extra=lambda: self.note, resume=self.resume
        )

    def resume(self, note: Mapping[str, Any]) -> None:
        self.note = dict(note)

    def result(self, rows: list[Metrics]) -> tuple[dict[str, list], list[Metrics]]:
        tensors = {name: tensor.tolist() for name, tensor in self.trainee.tensors().items()}
        return tensors, [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list], list[Metrics]]:
    """What an undisturbed run gives: weights, optimizer state and metrics."""
    toy = Toy()
    return toy.result(toy.train(tmp_path_factory.mktemp("whole") / "s"))


def interrupt_at(step: int) -> Callable[[int], None]:
    def before(now: int) -> None:
        if now == step:
            raise KeyboardInterrupt

    return before


# ---- stopped and resumed


@given(stops=st.lists(st.integers(0, STEPS - 1), max_size=4), every=st.integers(1, STEPS))
def test_a_run_that_is_interrupted_anywhere_ends_as_the_undisturbed_one(
    fresh: Fresh, whole: tuple, stops: list[int], every: int
) -> None:
    state = fresh() / "deep" / "state"
    for stop in stops:
        toy = Toy(every)
        toy.before = interrupt_at(stop)
        try:
            toy.train(state)
        except KeyboardInterrupt:
            assert toy.note["seen"] <= stop
    last = Toy(every)
    rows = last.train(state)
    assert last.result(rows) == whole
    assert last.note == {"seen": STEPS}
    files = [path.name for path in state.iterdir()]
    assert sorted({name.split("-")[0] for name in files}) in (["metrics.jsonl"], ["metrics.jsonl", "step"])
    assert len(files) <= 1 + 2  # the last two checkpoints


def test_a_resumed_run_repeats_no_saved_step_and_knows_the_callers_note(tmp_path: Path) -> None:
    first, second, steps = Toy(every=4), Toy(every=4), []
    first.before = interrupt_at(7)
    with pytest.raises(KeyboardInterrupt):
        first.train(tmp_path / "s")
    second.before = lambda step: steps.append((step, second.note["seen"]))
    second.train(tmp_path / "s")
    assert steps == [(step, step) for step in range(4, STEPS)]  # the last state was of step 4


def test_optimizer_state_is_kept_for_every_parameter_that_has_one(tmp_path: Path) -> None:
    toy = Toy(every=3)
    toy.before = interrupt_at(4)
    with pytest.raises(KeyboardInterrupt):
        toy.train(tmp_path / "s")
    with safe_open(latest(tmp_path / "s"), framework="pt") as file:
        names = set(file.keys())
        note = json.loads(file.metadata()["nestling"])
    assert {name for name in names if name.startswith("parameter/")} == {f"parameter/{name}" for name in TARGETS}
    assert "muon/backbone.layers.0.mixer.up_proj.weight/momentum" in names
    assert {name.rsplit("/", 1)[1] for name in names if name.startswith("adamw/")} == {"step", "exp_avg", "exp_avg_sq"}
    assert not any("norm.weight/" in name for name in names)  # it had no gradient yet
    assert note["extra"] == {"seen": 3}
    assert len(note["rows"]) == 3


KILLED = """
import os, signal, sys
from pathlib import Path
from test_loop import Toy
toy = Toy(every=3)
toy.before = lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == 8 else None
toy.train(Path(sys.argv[1]))
"""


def test_a_killed_process_goes_on_as_if_nothing_had_happened(tmp_path: Path, whole: tuple) -> None:
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "s")], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    toy, steps = Toy(), []
    toy.before = steps.append
    assert toy.result(toy.train(tmp_path / "s")) == whole
    assert steps == list(range(6, STEPS))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_step_and_nothing_is_lost(
    tmp_path: Path, whole: tuple, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    toy, handler = Toy(every=100), signal.getsignal(number)
    toy.before = lambda step: os.kill(os.getpid(), number) if step == 6 else None
    with pytest.raises(KeyboardInterrupt):
        toy.train(tmp_path / "s")
    assert toy.note == {"seen": 7}
    assert "stopped after step 7 of 12; the same command goes on from here" in said(capsys)
    assert signal.getsignal(number) is handler
    again, steps = Toy(every=100), []
    again.before = steps.append
    assert again.result(again.train(tmp_path / "s")) == whole
    assert steps == list(range(7, STEPS))
    assert "train toy: going on from step 7" in said(capsys)


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    def twice(step: int) -> None:
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("still running")

    toy = Toy(every=4)
    toy.before = twice
    with pytest.raises(KeyboardInterrupt):
        toy.train(tmp_path / "s")
    assert len(saved_rows(tmp_path / "s")) == 4


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, with the line breaks of a narrow terminal undone."""
    return " ".join(capsys.readouterr().err.split())


def latest(state: Path) -> Path:
    return max(state.glob("step-*.safetensors"))


def saved_rows(state: Path) -> list[Metrics]:
    with safe_open(latest(state), framework="pt") as file:
        return json.loads(file.metadata()["nestling"])["rows"]


# ---- what cannot be resumed


def stopped(state: Path) -> None:
    toy = Toy(every=3)
    toy.before = interrupt_at(7)
    with pytest.raises(KeyboardInterrupt):
        toy.train(state)


def resumed(state: Path, whole: tuple, **changed: Any) -> int:
    """Finish the run, hold it to the undisturbed one; returns the step it went on from."""
    toy, steps = Toy(), []
    toy.before = steps.append
    assert toy.result(toy.train(state, **changed)) == whole
    assert steps == list(range(steps[0], STEPS))
    return steps[0]


SETTINGS = {"toy": {"rate": 0.05, "stages": [{"steps": 12}]}, "seed": 0}


def test_a_changed_recipe_is_refused_and_the_key_named(tmp_path: Path, whole: tuple) -> None:
    toy = Toy(every=3)
    toy.before = interrupt_at(7)
    with pytest.raises(KeyboardInterrupt):
        toy.train(tmp_path / "s", settings=SETTINGS)
    files = sorted(path.name for path in (tmp_path / "s").iterdir())
    now = {"toy": {"rate": 0.06, "stages": [{"steps": 12}], "clip": 2.0}, "seed": 0}
    with pytest.raises(NestlingError) as caught:
        Toy().train(tmp_path / "s", fingerprint="b", settings=now)
    message = str(caught.value)
    assert "toy.rate was 0.05, is now 0.06; toy.clip was None, is now 2.0. Put it back" in message
    assert "nestling train --on-change restart" in message
    assert "seed" not in message
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == files
    assert resumed(tmp_path / "s", whole, settings=SETTINGS) == 6  # put back


@pytest.mark.parametrize(("on_change", "step"), [("restart", 0), ("continue", 6)])
def test_a_changed_recipe_goes_on_as_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], whole: tuple, on_change: str, step: int
) -> None:
    stopped(tmp_path / "s")
    assert resumed(tmp_path / "s", whole, fingerprint="b", on_change=on_change) == step
    assert f"the recipe has changed since it was stopped; {on_change} as asked" in said(capsys)
    assert len(saved_rows(tmp_path / "s")) == STEPS


def test_a_restart_forgets_what_was_there(tmp_path: Path, whole: tuple) -> None:
    stopped(tmp_path / "s")
    toy = Toy(every=1)
    toy.before = interrupt_at(2)
    with pytest.raises(KeyboardInterrupt):
        toy.train(tmp_path / "s", fingerprint="b", on_change="restart")
    assert resumed(tmp_path / "s", whole, fingerprint="b") == 2


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "one bit", "broken note", "another's"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_damaged_checkpoint_is_found_and_the_one_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], whole: tuple, damage: str, count: int
) -> None:
    state = tmp_path / "s"
    stopped(state)
    for path in sorted(state.glob("step-*"), reverse=True)[:count]:
        content = bytearray(path.read_bytes())
        content[-9] ^= 4  # of a tensor
        altered = {"truncated": path.read_bytes()[:-7], "garbage": b"x" * 999, "empty": b"", "one bit": content}
        if damage in altered:
            path.write_bytes(altered[damage])
            continue
        save_file({"x": torch.ones(1)}, path, metadata={"nestling": "{"} if damage == "broken note" else None)
        path.rename(path.with_name(f"{path.name.rsplit('-', 1)[0]}-{checkpoints.checksum(path)}.safetensors"))
    assert resumed(state, whole) == (3 if count == 1 else 0)
    spoken = said(capsys)
    assert spoken.count("is damaged") == count
    assert ("the one before is used" in spoken) == (count == 1 or count == 2)
    assert ("starting train toy again" in spoken) == (count == 2)
    assert len(list(state.glob("*.damaged"))) == count


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_checkpoints_are_kept(tmp_path: Path, keep: int) -> None:
    Toy(every=2).train(tmp_path / "s", keep=keep)
    steps = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "s").glob("step-*"))
    assert steps == [8, 10, 12][-keep:]


def test_a_checkpoint_is_also_made_when_minutes_have_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))  # a second at every look
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    Toy(every=100).train(tmp_path / "s", keep=99, minutes=10 / 60)
    steps = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "s").glob("step-*"))
    assert len(steps) == 3
    assert steps == sorted({steps[0] * n for n in range(1, 4)})


def test_the_metrics_under_way_are_cut_to_the_checkpoint(tmp_path: Path, whole: tuple) -> None:
    def rows() -> list[Metrics]:
        return [json.loads(line) for line in (tmp_path / "s" / METRICS).read_text().splitlines()]

    stopped(tmp_path / "s")
    assert [row["step"] for row in rows()] == list(range(7))
    again = Toy()
    again.before = lambda step: [row["step"] for row in rows()] == list(range(step)) or pytest.fail("not cut")
    assert again.train(tmp_path / "s") == rows()


def test_a_crash_while_the_state_is_written_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(tmp_path / "s")
    before = latest(tmp_path / "s").read_bytes()

    def half(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        Toy().train(tmp_path / "s")
    assert latest(tmp_path / "s").read_bytes() == before


@pytest.mark.parametrize("error", [SafetensorError("No space left on device"), OSError(28, "No space left on device")])
def test_a_disk_that_is_full_is_one_line_and_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    toy, written = Toy(), []

    def full(tensors: Any, file: Path, **given: Any) -> None:
        written.append(file)
        if len(written) == 2:
            file.write_bytes(b"half")
            raise error
        save_file(tensors, file, **given)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(
        NestlingError, match=r"to .*: .*No space left on device.*; step-00000003-.* is kept, and the same"
    ):
        toy.train(tmp_path)
    assert [path.name[:13] for path in tmp_path.glob("*step*")] == ["step-00000003"]
    assert not (tmp_path / ".partial").exists()


def test_a_disk_that_fills_up_behind_a_training_that_goes_on_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def result(self) -> None:
            raise failure()("", {1: (OSError(28, "No space left on device"), traceback.extract_stack(limit=1))})

    run = Run(tmp_path, "same", "toy")
    (tmp_path / ".partial").mkdir()
    monkeypatch.setattr(checkpoints, "_BEGUN", [(Full(), run, lambda: pytest.fail("it was kept"))])
    with pytest.raises(NestlingError, match=r"toy: no checkpoint could be .*No space left.*there is none before it"):
        checkpoints.finish()
    assert not (tmp_path / ".partial").exists()


def test_too_little_memory_of_a_device_says_what_needs_less(tmp_path: Path) -> None:
    toy = Toy()

    def full(step: int) -> None:
        if step == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    toy.before = full
    with pytest.raises(
        NestlingError, match="CUDA out of memory.*activation_checkpointing = true.* the last checkpoint is in"
    ):
        toy.train(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_names_its_step(tmp_path: Path, value: float) -> None:
    toy = Toy()
    compute = toy.compute
    toy.compute = lambda step: compute(step) | ({"loss": value} if step == 5 else {})
    with pytest.raises(NestlingError, match=rf"train toy: the loss is {value} at step 5") as caught:
        toy.train(tmp_path / "s")
    assert "\n" not in str(caught.value)
    assert "on batch 5; the checkpoint before it is kept" in str(caught.value)
    assert len(saved_rows(tmp_path / "s")) == 3


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(tmp_path: Path) -> None:
    toy = Toy()
    compute = toy.compute

    def poisoned(step: int) -> Metrics:
        metrics = compute(step)
        toy.parameters["backbone.embeddings.weight"].grad[0, 0] = float("nan") if step == 1 else 0.0
        return metrics | {"kl": {"50%": 1.0}, "stage": 1}

    toy.compute = poisoned
    with pytest.raises(NestlingError, match="the gradient is nan at step 1, on batch 1 of stage 2; no checkpoint was"):
        toy.train(tmp_path / "s")
    assert all(parameter.isfinite().all() for parameter in toy.parameters.values())


def test_a_loss_that_is_not_finite_names_its_budget(tmp_path: Path) -> None:
    toy = Toy()
    compute = toy.compute
    toy.compute = lambda step: compute(step) | {"kl": {"100%": 1.0, "50%": float("inf")}, "stage": 0}
    with pytest.raises(NestlingError, match="the loss of 50% is inf at step 0, on batch 0 of stage 1"):
        toy.train(tmp_path / "s")


# ---- the pieces


def test_rows_say_what_a_step_was(tmp_path: Path) -> None:
    toy = Toy()
    rows = toy.train(tmp_path / "s")
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert [row["rate"] for row in rows] == [Schedule(STEPS, 2, 0.5).factor(step) for step in range(STEPS)]
    assert all(row["seconds"] > 0 and row["gradient"] > 0 for row in rows)
    assert json.loads(json.dumps(rows)) == rows


def test_a_step_is_said_in_a_few_words() -> None:
    row = {"loss": 0.5, "tokens": 3000, "seconds": 2.0}
    assert loop.note(row) == "1,500 tokens/s · loss 0.5000"
    row |= {"kl": {"100%": 0.01, "50%": 1.25}}
    assert loop.note(row) == "1,500 tokens/s · 100% 0.010 50% 1.250"
    row |= {"router": {"100%": {}, "50%": {"expected": 1.066, "sizes": {}, "temperature": 0.52}}}
    assert loop.note(row) == "1,500 tokens/s · 100% 0.010 50% 1.250 · τ 0.52 · cost 50% 1.07"
