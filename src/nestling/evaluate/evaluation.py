"""`nestling eval`: tasks × sizes, each resumable, each written with its provenance and every output."""

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from nestling import ranks
from nestling.errors import NestlingError
from nestling.evaluate import reading
from nestling.evaluate.journal import Journal
from nestling.evaluate.machine import machine, versions
from nestling.evaluate.reading import Choices, Perplexity
from nestling.evaluate.solving import Known, Solving
from nestling.evaluate.spec import Spec
from nestling.evaluate.subject import Subject
from nestling.evaluate.suite import SUITE, Overrides, solving
from nestling.progress import progress
from nestling.weights.files import reason, write_json

Task = Solving | Perplexity | Choices
Result = dict[str, Any]
FORMAT = 1


@dataclass(frozen=True)
class Evaluation:
    """What to run, and where its results go (None: nowhere)."""

    tasks: Sequence[Task]
    subjects: Sequence[Subject]
    out: Path | None
    batch: int
    seed: int
    overwrite: bool = False
    command: str = ""

    def run(self, tell: Callable[[Result], None]) -> list[Result]:
        """Every task on every subject; tell: called with each result as soon as it is there."""
        self._check()
        results = []
        with ExitStack() as opened:
            out = self.out or Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="nestling-eval-")))
            for subject in self.subjects:
                for task in self.tasks:
                    results.append(self._one(subject, task, out / slug(subject.name)))
                    tell(results[-1])
        return results

    def _check(self) -> None:
        """Refuse results that would have the same file."""
        places = [f"{slug(s.name)}/{slug(task.name)}.json" for s in self.subjects for task in self.tasks]
        if twice := next((place for place in places if places.count(place) > 1), None):
            raise NestlingError(f"two results would be {twice}; run one of them into another --out")

    def _one(self, subject: Subject, task: Task, directory: Path) -> Result:
        _make(directory)
        name = slug(task.name)
        batch = self.batch if subject.shares_stream else None
        settings = {**task.settings(batch, self.seed), "backend": subject.backend, "files": dict(subject.files)}
        settings["submodel"] = subject.about.get("submodel")
        journal = Journal(directory / f"{name}.jsonl", settings)
        known = ranks.of_first(lambda: journal.open(overwrite=self.overwrite))
        with progress(f"{subject.name} {task.name}"[:40], task.total, "outputs", start=len(known)) as show:
            found = _met(journal, known, task.run(subject, _own(journal), known, self.batch, self.seed, show))
        now = datetime.now()
        result = {
            "format": FORMAT,
            "task": task.name,
            "model": {"name": subject.name, "backend": subject.backend, **subject.about},
            "result": task.result(found),
            "settings": settings,
            "seed": self.seed,
            "batch": self.batch,
            "outputs": f"{name}.jsonl",
            "date": now.date().isoformat(),
            "time": now.strftime("%H:%M:%S"),
            "versions": versions(),
            "machine": machine(),
            "command": self.command,
        }
        if ranks.first():
            write_json(directory / f"{name}.json", result)
        return result


def _own(journal: Journal) -> Journal:
    """Where this process writes."""
    if ranks.first():
        return journal
    part = journal.part(ranks.rank())
    part.open(overwrite=True)
    return part


def _met(journal: Journal, known: Known, found: Known) -> Known:
    """The outputs of all processes; those of the others move to the first one's journal, and their own are removed."""
    first, *others = ranks.gathered({key: record for key, record in found.items() if key not in known})
    for other in others if ranks.first() else ():
        journal.append(other.values())
    ranks.gathered(None)  # nobody's record is removed before it is there
    if not ranks.first():
        journal.part(ranks.rank()).path.unlink(missing_ok=True)
    return {key: record for each in (known, first, *others) for key, record in each.items()}


def make_tasks(specs: Sequence[Spec], given: Overrides, seed: int) -> list[Task]:
    """The tasks of these names; every one is checked before any is run."""
    if not specs:
        raise NestlingError(
            f"name a task: --tasks NAME, one of {', '.join([*SUITE, 'math', *reading.NAMES])}, or of reasoning-gym"
        )
    return [
        reading.reading(spec, given.problems) if spec.name in reading.NAMES else solving(spec, given, seed)
        for spec in specs
    ]


def slug(name: str) -> str:
    """A file name for a size or a task: `50%` is 50, `chain_sum:max_digits=2` chain_sum-max_digits-2."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:100] or "model"


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NestlingError(f"{directory}: cannot be created: {reason(error)}; choose another --out") from None
    if not os.access(directory, os.W_OK):
        raise NestlingError(f"{directory}: cannot be written; choose another --out")


def say(result: Result) -> str:
    """One line for the terminal."""
    found, model = result["result"], result["model"]["name"]
    interval = (
        "" if found["interval"] is None else " (95 % interval {} … {})".format(*map(_figure(found), found["interval"]))
    )
    counts = [
        f"{found[key]:,} {words}"
        for key, words in (("no_answer", "without an answer"), ("cut_off", "cut off at the token limit"))
        if found.get(key)
    ]
    others = [f"pass@{k} {v['score']:.1%}" for k, v in found.get("pass_at", {}).items() if k != "1"]
    others += [f"acc_norm {found['acc_norm']['score']:.1%}"] if "acc_norm" in found else []
    others += [f"{found['bits_per_byte']:.3f} bits per byte"] if "bits_per_byte" in found else []
    told = "".join(f", {text}" for text in (*others, *counts))
    return f"{model}  {result['task']}: {found['metric']} {_figure(found)(found['score'])}{interval}{told}"


def _figure(found: Result) -> Callable[[float], str]:
    return (lambda value: f"{value:.3f}") if found["metric"] == "perplexity" else (lambda value: f"{value:.1%}")
