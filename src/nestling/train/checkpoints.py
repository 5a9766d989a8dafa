"""Checkpoints of a run under way: whole or not there, each with its checksum in its name, the last few kept.

One is a safetensors file of parameters and optimizer state, with the metrics so far and the caller's state as JSON in
its header: nothing is pickled, and one rename makes it appear. Of several processes it is a directory
(train/sharded.py). Either is gone on from by one process or by several, however many wrote it.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nestling import ranks
from nestling.console import console
from nestling.errors import NestlingError
from nestling.ledger import changes
from nestling.train import sharded
from nestling.train.optimize import Trainee
from nestling.weights.files import checksum

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
    asynchronous: bool = False  # whether several processes go on while one is written
    tensorboard: Path | None = None  # directory for an event file
    on_change: str = "refuse"  # when it has: or "restart", or "continue" as if it had not

    def checkpoints(self) -> list[Path]:
        """Newest first."""
        found = (path for path in self.state.glob("step-*") if path.suffix != ".damaged")
        return sorted(found, key=lambda path: path.name.split("-")[1], reverse=True)


_BEGUN: list[tuple[Any, Run, Callable[[], None]]] = []
"""The checkpoint that several processes are writing: when this rank has written, of which run, what makes it whole."""


def save(run: Run, trainee: Trainee, rows: list[Metrics], extra: Mapping[str, Any]) -> None:
    """Write a checkpoint after step len(rows), then delete those that are too old."""
    run.state.mkdir(parents=True, exist_ok=True)
    partial = run.state / ".partial"
    note = {"fingerprint": run.fingerprint, "settings": run.settings, "rows": [*rows], "extra": dict(extra)}
    if ranks.size() == 1:
        contiguous = {name: tensor.cpu().contiguous() for name, tensor in trainee.tensors().items()}
        with _room(run):
            save_file(contiguous, partial, metadata={"nestling": json.dumps(note)})
            _flush(partial)
            _keep(run, partial, f"step-{len(rows):08d}-{checksum(partial)}.safetensors")
        return
    finish()
    ranks.of_first(lambda: _fresh(partial))
    with _room(run):
        begun = sharded.begin(partial, trainee.tensors(), run.asynchronous)
    _BEGUN.append((begun, run, lambda: _seal(run, partial, note)))
    if not run.asynchronous:
        finish()


@contextmanager
def _room(run: Run) -> Iterator[None]:
    """Say in a line that a checkpoint could not be written; what there is of it gives its room back."""
    try:
        yield
    except (SafetensorError, OSError, sharded.failure()) as error:
        with suppress(OSError):
            _delete(run.state / ".partial")
        kept = run.checkpoints()
        before = f"{kept[0].name} is kept, and the same command goes on from it" if kept else "there is none before it"
        why = " ".join(str(error).split())[:300]
        raise NestlingError(f"{run.title}: no checkpoint could be written to {run.state}: {why}; {before}") from error


def is_written() -> bool:
    """Whether this rank has nothing to write any more of the checkpoint that was begun."""
    return all(begun is None or begun.done() for begun, *_ in _BEGUN)


def finish() -> None:
    """Wait until the checkpoint that was begun, if one was, is whole. All ranks must call it."""
    while _BEGUN:
        begun, run, seal = _BEGUN.pop()
        with _room(run):
            if begun is not None:
                begun.result()
            seal()


def _seal(run: Run, partial: Path, note: dict[str, Any]) -> None:
    sharded.seal(partial, note)
    if ranks.first():
        _keep(run, partial, f"step-{len(note['rows']):08d}-{checksum(partial / sharded.NOTE)}")


def _fresh(directory: Path) -> None:
    _delete(directory)
    directory.mkdir()


def _keep(run: Run, partial: Path, name: str) -> None:
    """Give a checkpoint that is whole its name, and delete those that are too old."""
    partial.replace(run.state / name)
    for old in run.checkpoints()[run.keep :]:
        _delete(old)


def _delete(checkpoint: Path) -> None:
    if checkpoint.is_dir():
        shutil.rmtree(checkpoint)
    else:
        checkpoint.unlink(missing_ok=True)


def resume(run: Run, trainee: Trainee) -> tuple[list[Metrics], Mapping[str, Any] | None]:
    """Restore the newest checkpoint that is whole; returns its metrics and the caller's state, None at a start."""
    _BEGUN.clear()
    if (found := ranks.of_first(lambda: _newest(run))) is None:
        return [], None
    path, note = found
    try:
        trainee.restore(_tensors(path, trainee))
    except (KeyError, RuntimeError, ValueError) as error:
        raise NestlingError(f"{run.title}: {run.state} is of another model ({error}); delete it") from None
    console.print(f"{run.title}: going on from step {len(note['rows'])}")
    return note["rows"], note["extra"]


def _newest(run: Run) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, and its note. None: there is none, or none any more, as the recipe has changed."""
    for path, note in _whole(run):
        if note["fingerprint"] == run.fingerprint or _goes_on(run, note["settings"]):
            return path, note
        for old in run.checkpoints():
            _delete(old)
        break
    return None


def _whole(run: Run) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The checkpoints that are not damaged, with their notes. The others step aside, with a warning."""
    for path in run.checkpoints():
        try:
            note = _note(path)
        except (NestlingError, SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            path.replace(path.with_suffix(".damaged"))
            instead = "the one before is used" if run.checkpoints() else f"starting {run.title} again"
            console.print(f"warning: {path} is damaged ({error}); {instead}")
            continue
        yield path, note


def _note(path: Path) -> Any:
    """What a checkpoint says besides its tensors; refuses one that is not what was written."""
    if checksum(path / sharded.NOTE if path.is_dir() else path) != path.stem.rsplit("-", 1)[1]:
        raise ValueError("its checksum is wrong")
    if path.is_dir():
        return sharded.read_note(path)
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["nestling"])


def _tensors(path: Path, trainee: Trainee) -> dict[str, Tensor]:
    if path.is_dir():
        return sharded.read(path, trainee.like)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


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


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
