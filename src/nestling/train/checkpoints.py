"""Checkpoints of a run under way: whole or not there, each with its checksum in its name, the last few kept.

One is a safetensors file of parameters and optimizer state, with the metrics so far and the caller's state as JSON in
its header: nothing is pickled, and one rename makes it appear.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nestling.errors import NestlingError
from nestling.progress import console
from nestling.train.optimize import Trainee

Metrics = dict[str, Any]
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Run:
    """Where a run keeps its state while it is under way, and what it must be the same as to go on from it."""

    state: Path  # a directory
    fingerprint: str
    title: str
    every: int = 100  # steps between checkpoints
    minutes: float | None = None  # between checkpoints, besides
    keep: int = 2  # how many
    settings: Mapping[str, Any] = field(default_factory=dict)  # what the fingerprint is of, to name what has changed
    tensorboard: Path | None = None  # directory for an event file
    on_change: str = "refuse"  # when it has: or "restart", or "continue" as if it had not

    def checkpoints(self) -> list[Path]:
        """Newest first."""
        return sorted(self.state.glob("step-*.safetensors"), key=lambda path: path.name.split("-")[1], reverse=True)


def save(run: Run, trainee: Trainee, rows: list[Metrics], extra: Mapping[str, Any]) -> None:
    """Write a checkpoint after step len(rows), then delete those that are too old."""
    run.state.mkdir(parents=True, exist_ok=True)
    partial = run.state / ".partial"
    note = {"fingerprint": run.fingerprint, "settings": run.settings, "rows": rows, "extra": dict(extra)}
    contiguous = {name: tensor.contiguous() for name, tensor in trainee.tensors().items()}
    save_file(contiguous, partial, metadata={"nestling": json.dumps(note)})
    _flush(partial)
    partial.replace(run.state / f"step-{len(rows):08d}-{checksum(partial)}.safetensors")
    for old in run.checkpoints()[run.keep :]:
        old.unlink()


def resume(run: Run, trainee: Trainee) -> tuple[list[Metrics], Mapping[str, Any] | None]:
    """Restore the newest checkpoint that is whole; returns its metrics and the caller's state, None at a start."""
    for note, tensors in _whole(run):
        if note["fingerprint"] != run.fingerprint and not _goes_on(run, note["settings"]):
            for path in run.checkpoints():
                path.unlink()
            break
        try:
            trainee.restore(tensors)
        except (KeyError, RuntimeError, ValueError) as error:
            raise NestlingError(f"{run.title}: {run.state} is of another model ({error}); delete it") from None
        console.print(f"{run.title}: going on from step {len(note['rows'])}")
        return note["rows"], note["extra"]
    return [], None


def _whole(run: Run) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """(note, tensors) of the checkpoints that are not damaged. The others step aside, with a warning."""
    for path in run.checkpoints():
        try:
            if checksum(path) != path.stem.rsplit("-", 1)[1]:
                raise ValueError("its checksum is wrong")
            with safe_open(path, framework="pt") as file:
                note = json.loads(file.metadata()["nestling"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            path.replace(path.with_suffix(".damaged"))
            instead = "the one before is used" if run.checkpoints() else f"starting {run.title} again"
            console.print(f"warning: {path} is damaged ({error}); {instead}")
            continue
        yield note, tensors


def _goes_on(run: Run, settings: Mapping[str, Any]) -> bool:
    """Whether to go on although the recipe has changed since the checkpoint was made. Refuses if nobody said so."""
    if run.on_change == "refuse":
        now = json.loads(json.dumps(run.settings, default=str))
        changed = "; ".join(changes(settings, now)) or "what it was made from has changed"
        raise NestlingError(
            f"{run.title} was stopped and cannot go on with another recipe: {changed}. Put it back, or say "
            f"nestling train --on-change restart (or continue, with the new values); the state is in {run.state}"
        )
    console.print(f"{run.title}: the recipe has changed since it was stopped; {run.on_change} as asked")
    return run.on_change == "continue"


def changes(before: Any, now: Any, key: str = "") -> Iterator[str]:
    """`key was a, is now b` for every leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            yield from changes(before.get(name), now.get(name), f"{key}.{name}".lstrip("."))
    elif before != now:
        yield f"{key} was {before!r}, is now {now!r}"


def checksum(path: Path) -> str:
    """XXH3 of the bytes of a file, 16 hexadecimal digits."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
