"""The training loop: steps, checkpoints and metrics. What one step computes is the caller's.

Every step is a pure function of (weights, optimizer state, step number): batches and noise are drawn from seeds, so a
run that was stopped and resumed is the run that was never stopped.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nestling.errors import NestlingError
from nestling.progress import console, progress
from nestling.train.optimize import Schedule, Trainee

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Where a run keeps its state while it is under way, and what it must be the same as to go on from it."""

    state: Path
    fingerprint: str
    title: str
    every: int = 100  # steps between checkpoints


def train(
    run: Run,
    trainee: Trainee,
    schedule: Schedule,
    compute: Callable[[int], Metrics],
    *,
    clip: float = 1.0,
    scale: Callable[[int], Mapping[str, float]] = lambda step: {},
    extra: Callable[[], Mapping[str, Any]] = dict,
    resume: Callable[[Mapping[str, Any]], None] = lambda state: None,
) -> list[Metrics]:
    """Run the steps that are left; returns one row of metrics per step.

    compute: step -> metrics, after leaving gradients on the parameters; its "loss" must be finite.
    scale: step -> what each group's learning rate is multiplied by; "" stands for the groups that are not named.
    extra, resume: JSON state of the caller's, saved with every checkpoint and given back on resume.
    """
    rows = _resume(run, trainee, resume)
    with progress(run.title, schedule.steps, start=len(rows)) as show, _between_steps() as stopped:
        for step in range(len(rows), schedule.steps):
            began = time.monotonic()
            metrics = compute(step)
            if not math.isfinite(metrics["loss"]):
                raise NestlingError(f"{run.title}: the loss is {metrics['loss']} at step {step}; {metrics}")
            factor = schedule.factor(step)
            norm = trainee.clip(clip)
            if not math.isfinite(norm):
                raise NestlingError(f"{run.title}: the gradient is {norm} at step {step}; {metrics}")
            scales = scale(step)
            trainee.step({group: factor * scales.get(group, scales.get("", 1.0)) for group in trainee.rates})
            seconds = time.monotonic() - began
            rows.append({"step": step, **metrics, "rate": factor, "gradient": norm, "seconds": seconds})
            show(step + 1, f"loss {metrics['loss']:.4f}")
            if stopped() or (step + 1) % run.every == 0:
                _save(run, trainee, rows, extra())
            if stopped():
                console.print(f"stopped after step {step + 1} of {schedule.steps}; the same command goes on from here")
                raise KeyboardInterrupt
    return rows


@contextmanager
def _between_steps() -> Iterator[Callable[[], bool]]:
    """Hold SIGINT and SIGTERM back until a step is whole; asks whether one came. A second one stops at once."""
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _save(run: Run, trainee: Trainee, rows: list[Metrics], extra: Mapping[str, Any]) -> None:
    run.state.parent.mkdir(parents=True, exist_ok=True)
    partial = run.state.with_suffix(".partial")
    note = {"fingerprint": run.fingerprint, "rows": rows, "extra": dict(extra)}
    contiguous = {name: tensor.contiguous() for name, tensor in trainee.tensors().items()}
    save_file(contiguous, partial, metadata={"nestling": json.dumps(note)})
    partial.replace(run.state)


def _resume(run: Run, trainee: Trainee, resume: Callable[[Mapping[str, Any]], None]) -> list[Metrics]:
    if not run.state.exists():
        return []
    try:
        with safe_open(run.state, framework="pt") as file:
            note = json.loads(file.metadata()["nestling"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        console.print(f"{run.state} is damaged ({error}); starting {run.title} again")
        return []
    if note["fingerprint"] != run.fingerprint:
        console.print(f"{run.title}: the recipe has changed since it was stopped; starting again")
        return []
    trainee.restore(tensors)
    resume(note["extra"])
    console.print(f"{run.title}: going on from step {len(note['rows'])}")
    return note["rows"]
