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
from typing import Any

import torch

from nestling import ranks
from nestling.console import console
from nestling.errors import NestlingError
from nestling.progress import progress
from nestling.sections import LESS_MEMORY
from nestling.train import checkpoints
from nestling.train.checkpoints import METRICS, Metrics, Run
from nestling.train.optimize import Schedule, Trainee
from nestling.train.tensorboard import event_file


def train(
    run: Run,
    trainee: Trainee,
    schedule: Schedule,
    compute: Callable[[int], Metrics],
    *,
    clip: float = 1.0,
    look: Callable[[int], Metrics] = lambda step: {},
    scale: Callable[[int], Mapping[str, float]] = lambda step: {},
    extra: Callable[[], Mapping[str, Any]] = dict,
    resume: Callable[[Mapping[str, Any]], None] = lambda state: None,
) -> list[Metrics]:
    """Run the steps that are left; returns one row of metrics per step.

    compute: step -> metrics, after leaving gradients on the parameters; its "loss" must be finite.
    look: steps done -> what the weights are worth now, for the row of that step; its time is not counted.
    scale: step -> what each group's learning rate is multiplied by; "" stands for the groups that are not named.
    extra, resume: JSON state of the caller's, saved with every checkpoint and given back on resume.
    """
    rows, state = checkpoints.resume(run, trainee)
    if state is not None:
        resume(state)
    saved = time.monotonic()
    with (
        progress(run.title, schedule.steps, start=len(rows)) as show,
        _between_steps() as stopped,
        _log(run, rows) as log,
        event_file(run.tensorboard if ranks.first() else None, len(rows)) as draw,
    ):
        for step in range(len(rows), schedule.steps):
            began = time.monotonic()
            with _fitting(run):
                metrics = compute(step)
            norm = trainee.clip(clip)
            _check_finite(run, step, metrics, norm)
            factor, scales = schedule.factor(step), scale(step)
            trainee.step({group: factor * scales.get(group, scales.get("", 1.0)) for group in trainee.rates})
            seconds = time.monotonic() - began
            seen = look(step + 1)
            rows.append({"step": step, **metrics, **seen, "rate": factor, "gradient": norm, "seconds": seconds})
            log(rows[-1])
            draw(rows[-1])
            show(step + 1, note(rows[-1]))
            stop, late, written = _agreed(stopped(), _is_late(run, saved), checkpoints.is_written())
            if written:
                checkpoints.finish()
            if stop or late or (step + 1) % run.every == 0:
                checkpoints.save(run, trainee, rows, extra())
                saved = time.monotonic()
            if stop:
                checkpoints.finish()
                console.print(f"stopped after step {step + 1} of {schedule.steps}; the same command goes on from here")
                raise KeyboardInterrupt
        checkpoints.finish()
    return rows


@contextmanager
def _fitting(run: Run) -> Iterator[None]:
    """Say in a line that a device has too little memory, and what would need less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise NestlingError(
            f"{run.title}: {' '.join(str(error).split())[:200]}. {LESS_MEMORY}, and so do more processes; the last "
            f"checkpoint is in {run.state}"
        ) from error


def note(row: Metrics) -> str:
    """A step in a few words: tokens/s, the loss of each size, and of the router its temperature and cost ÷ target."""
    losses = {name: f"{loss:.3f}" for name, loss in row.get("kl", {}).items()} or {"loss": f"{row['loss']:.4f}"}
    parts = [" ".join(f"{name} {loss}" for name, loss in losses.items())]
    routed = {name: said for name, said in row.get("router", {}).items() if said}
    if routed:
        costs = " ".join(f"{name} {said['expected']:.2f}" for name, said in routed.items())
        parts += [f"τ {next(iter(routed.values()))['temperature']:.2f}", f"cost {costs}"]
    speed = [f"{row['tokens'] / max(row['seconds'], 1e-9):,.0f} tokens/s"] if "tokens" in row else []
    return " · ".join(speed + parts)


def _agreed(stop: bool, late: bool, written: bool) -> tuple[bool, bool, bool]:
    """The same on every rank: whether any was told to stop, whether it is late for the first, whether all wrote."""
    stops, lates, all_written = zip(*ranks.gathered((stop, late, written)), strict=True)
    return any(stops), lates[0], all(all_written)


def _is_late(run: Run, saved: float) -> bool:
    return run.minutes is not None and time.monotonic() - saved >= 60 * run.minutes


def _check_finite(run: Run, step: int, metrics: Metrics, norm: float) -> None:
    """Refuse a step before it touches the weights."""
    found = {f"loss of {name}": loss for name, loss in metrics.get("kl", {}).items()}
    for what, value in (found | {"loss": metrics["loss"], "gradient": norm}).items():
        if not math.isfinite(value):
            stage = f" of stage {metrics['stage'] + 1}" if "stage" in metrics else ""
            kept = f"the checkpoint before it is kept in {run.state}" if run.checkpoints() else "no checkpoint was made"
            raise NestlingError(
                f"{run.title}: the {what} is {value} at step {step}, on batch {step}{stage}; {kept}. "
                "A lower learning rate or a longer warm-up may help"
            )


@contextmanager
def _log(run: Run, rows: list[Metrics]) -> Iterator[Callable[[Metrics], None]]:
    """Append to the metrics of a run under way, after cutting off what the checkpoint does not know of.

    Of several processes the first one does.
    """
    if not ranks.first():
        yield lambda row: None
        return
    run.state.mkdir(parents=True, exist_ok=True)
    with open(run.state / METRICS, "w", encoding="utf-8") as file:

        def log(row: Metrics) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        for row in rows:
            log(row)
        yield log


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
