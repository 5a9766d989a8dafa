"""Which stages of a run are done, and by what: each directory carries the fingerprint of all it was made of."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nestling import ranks
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
        return {"stage": name, "fingerprint": self.fingerprints[name], "seconds": time.monotonic() - began}

    @contextmanager
    def stage(self, name: str, settings: Any, after: tuple[str, ...]) -> Iterator[Path | None]:
        """A partial directory to fill, or None if the stage is done. Appears under its name when it is whole.

        Several processes all have it, for the first one to write to.
        """
        if self.is_done(name, settings, after):
            yield None
            return
        if not ranks.first():
            yield ranks.gathered(None)[0]
            ranks.gathered(None)  # until it is there
            return
        began = time.monotonic()
        with output_directory(self.out / name, overwrite=True) as partial:
            ranks.gathered(partial)
            yield partial
            write_json(partial / MARK, self.mark(name, began))
        shutil.rmtree(self.out / ".state" / name, ignore_errors=True)
        with suppress(OSError):  # another stage is still under way there, or nothing was
            (self.out / ".state").rmdir()
        ranks.gathered(None)


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
