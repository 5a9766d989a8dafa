"""Which stages of a run are done, and by what: each directory carries the fingerprint of all it was made of."""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nestling import ranks
from nestling.console import console
from nestling.errors import NestlingError
from nestling.weights.files import read_json, write_json
from nestling.weights.output import output_directory

MARK = "nestling-stage.json"


@dataclass(frozen=True)
class Ledger:
    """The stages of one run below `out`. A stage depends on its settings, on what it reads, and on what all share."""

    out: Path
    seed: int
    material: Any  # what the run learns from, as JSON
    fingerprints: dict[str, str] = field(default_factory=dict)  # of the stages that were asked for
    settings: dict[str, Any] = field(default_factory=dict)  # what those are of, to name what has changed

    def is_done(self, name: str, settings: Any, after: tuple[str, ...]) -> bool:
        """Whether a stage's directory was made by exactly this; notes its fingerprint either way."""
        made_from = {other: self.fingerprints[other] for other in after}
        self.settings[name] = {name: settings, "seed": self.seed, "task": self.material, "made from": made_from}
        self.fingerprints[name] = digest([name, settings, self.seed, self.material, *made_from.values()])
        return ranks.of_first(lambda: self._is_marked(name))

    def _is_marked(self, name: str) -> bool:
        mark = self.out / name / MARK
        return mark.is_file() and read_json(mark).get("fingerprint") == self.fingerprints[name]

    def mark(self, name: str, began: float) -> dict[str, Any]:
        """What a stage that began then leaves in its directory."""
        made = {"fingerprint": self.fingerprints[name], "settings": self.settings[name]}
        return {"stage": name, **made, "seconds": time.monotonic() - began}

    @contextmanager
    def stage(self, name: str, settings: Any, after: tuple[str, ...], keep: bool = False) -> Iterator[Path | None]:
        """A partial directory to fill, or None if the stage is done. Appears under its name when it is whole.

        keep: what another recipe made under this name steps aside then, and is not replaced. Several processes all have
        the directory, for the first one to write to.
        """
        if self.is_done(name, settings, after):
            yield None
            return
        if not ranks.first():
            yield ranks.gathered(None)[0]
            ranks.gathered(None)  # until it is there
            return
        began, aside = time.monotonic(), self._aside(name) if keep else None
        with output_directory(self.out / name, overwrite=True) as partial:
            ranks.gathered(partial)
            yield partial
            write_json(partial / MARK, self.mark(name, began))
            if aside:
                (self.out / name).replace(aside)
        shutil.rmtree(self.out / ".state" / name, ignore_errors=True)
        with suppress(OSError):  # another stage is still under way there, or nothing was
            (self.out / ".state").rmdir()
        ranks.gathered(None)

    def _aside(self, name: str) -> Path | None:
        """Where what another recipe made is going to be kept, if there is any; says what has changed."""
        if not (self.out / name / MARK).is_file():
            return None
        before = read_json(self.out / name / MARK)
        now = json.loads(json.dumps(self.settings[name], default=str))
        said = "; ".join(changes(before["settings"], now)) if "settings" in before else ""
        aside = self.out / f"{name}-before-{before.get('fingerprint')}"
        if aside.exists():
            return None
        why = said or "what it is made from has changed"
        console.print(f"{name} is made again: {why}. What is there will be kept in {aside}", markup=False)
        return aside


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Keep a directory for one run: two would take each other's stages away. A run that was killed holds nothing."""
    with ExitStack() as after:
        ranks.of_first(lambda: _lock(out, after))
        yield


def _lock(out: Path, after: ExitStack) -> None:
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY)
    after.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise NestlingError(
            f"{out}: another run is at work there; wait for it to end, stop it, or take another directory: --out DIR"
        ) from None
    except OSError:  # a file system that locks nothing
        pass


def changes(before: Any, now: Any, key: str = "") -> Iterator[str]:
    """`key was a, is now b` for every leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            yield from changes(before.get(name), now.get(name), f"{key}.{name}".lstrip("."))
    elif before != now:
        yield f"{key} was {before!r}, is now {now!r}"


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
