"""`nestling run`: the stages of a recipe, each from directories to one directory, skipped when nothing has changed.

parent → ranked → elastic → slices → evaluations → report, and the controls beside them. A stage's fingerprint covers
its own settings and the fingerprints of what it reads; a stage that was killed goes on from its last checkpoint.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nestling import ranks
from nestling.arch.architecture import Architecture
from nestling.arch.submodel import Submodel, standalone
from nestling.arch.targets import Target
from nestling.checks import check
from nestling.evaluate.measures import EVALUATION
from nestling.ledger import MARK, Ledger, digest, held
from nestling.material import Material, material
from nestling.models import checkpoint_files
from nestling.recipe import Recipe, budget_targets, parent_architecture, trained_budgets
from nestling.sections import OwnParent, RankSection, ScratchParent, StageSection
from nestling.weights.elastic import FILE as SIDECAR
from nestling.weights.elastic import open_elastic
from nestling.weights.files import read_json, write_json
from nestling.weights.ranking import FILE as RANKING

ALONE = ("slice", "evaluate", "report")
"""Stages of the first process, for which the others wait."""


@dataclass(frozen=True)
class Row:
    """One line of the report: a standalone directory to be judged."""

    name: str
    role: str
    budget: str | None
    directory: Path
    stage: str  # the stage that makes the directory


@dataclass
class Pipeline:
    """A recipe and its output directory. Every method that makes something is a stage."""

    recipe: Recipe
    source: str  # the command that reproduces it
    quick: bool = False
    on_change: str = "refuse"  # what to do with a stopped training when the recipe has changed: restart, continue

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger(self.out, self.recipe.seed, self.material.to_json())

    @property
    def out(self) -> Path:
        return Path(self.recipe.out)

    @property
    def parent_directory(self) -> Path:
        """The model that the family is made of: the user's own, or the one that is trained first."""
        return Path(self.recipe.parent.model) if isinstance(self.recipe.parent, OwnParent) else self.out / "parent"

    @property
    def ranked_directory(self) -> Path:
        """Where the training starts: a parent that is ranked as it is, or the one that is ranked first."""
        ranked = self.recipe.rank is None and (self.parent_directory / RANKING).is_file()
        return self.parent_directory if ranked else self.out / "ranked"

    @cached_property
    def architecture(self) -> Architecture:
        return parent_architecture(self.recipe)

    @cached_property
    def targets(self) -> dict[str, Target]:
        """What every budget may have at most, largest first, the whole model in front."""
        return budget_targets(self.architecture, self.recipe.train)

    @cached_property
    def material(self) -> Material:
        return material(self.recipe)

    def run(self, until: str = "report") -> None:
        """Make everything up to a stage, in order. Several processes share out rankings and trainings."""
        with ranks.said_once():
            check(self.recipe, self.material, until, is_trained=(self.out / "elastic" / MARK).is_file())
        with held(self.out):
            for name, make in self.stages().items():
                ranks.of_first(make) if name in ALONE else make()
                if name == until:
                    return

    def stages(self) -> dict[str, Callable[[], None]]:
        return {
            "parent": self.parent,
            "rank": self.rank,
            "train": self.train,
            "controls": self.controls,
            "slice": self.slices,
            "evaluate": self.evaluate,
            "report": self.report,
        }

    # --- stages

    def parent(self) -> None:
        """Train the parent from scratch, in stock format; or look at the one that is given."""
        how = self.recipe.parent
        if isinstance(how, OwnParent):
            self.ledger.fingerprints["parent"] = digest(checkpoint_files(self.parent_directory))
            return
        with self.ledger.stage("parent", how.model_dump(), after=(), keep=True) as partial:
            if partial:
                self._method()  # refuse now what ranking would refuse after the training
                stages = (StageSection(steps=how.steps, batch=how.batch, length=how.length),)
                self._from_scratch("parent", partial, self.architecture, stages, how.learning_rate)

    def rank(self) -> None:
        """Measure importance and permute: the elastic checkpoint, still untrained."""
        if self.ranked_directory == self.parent_directory:
            self.ledger.fingerprints["ranked"] = self.ledger.fingerprints["parent"]
            return
        how, parent = self.recipe.rank or RankSection(), self.parent_directory
        if self.ledger.is_done("ranked", how.model_dump() | self.material.read("calibration"), ("parent",)):
            return
        from nestling.model.device import find_device
        from nestling.model.store import load_model
        from nestling.train.importance import rank
        from nestling.weights.transform import permute

        began, method = time.monotonic(), self._method()
        batches, read = self.material.calibration(how, parent, self.recipe.seed)
        model = load_model(open_elastic(parent)).to(find_device(self.recipe.layout.device))
        ranking = rank(model, batches, method)
        made = {
            "parent": str(parent),
            **read,
            **method.to_json(self.architecture),
            "seconds": round(time.monotonic() - began, 1),
        }
        mark = self.ledger.mark("ranked", began)
        ranks.of_first(
            lambda: permute(parent, ranking, self.out / "ranked", provenance=made, overwrite=True, also={MARK: mark})
        )

    def train(self) -> None:
        """Elastic distillation: the router finds the sizes, then every budget is trained as a prefix."""
        with self.ledger.stage("elastic", self._training_settings(), after=("ranked",), keep=True) as partial:
            if partial:
                self._distill("elastic", partial, {})

    def controls(self) -> None:
        """The rivals at equal budget: hand-picked sizes trained the same way, and training from scratch."""
        how, train = self.recipe.controls, self.recipe.train
        if how.uniform:
            settings = {**self._training_settings(), "uniform": how.uniform}
            with self.ledger.stage("uniform", settings, after=("ranked",), keep=True) as partial:
                if partial:
                    self._distill("uniform", partial, {b: Submodel.from_json(s) for b, s in how.uniform.items()})
        if how.scratch_budget:
            settings = {**train.model_dump(), **how.model_dump()}
            with self.ledger.stage("scratch", settings, after=("elastic",), keep=True) as partial:
                if partial:
                    chosen = open_elastic(self.out / "elastic").submodel(how.scratch_budget)
                    assert isinstance(self.recipe.parent, ScratchParent)
                    rate = how.scratch_learning_rate or self.recipe.parent.learning_rate
                    self._from_scratch("scratch", partial, standalone(self.architecture, chosen), train.stages, rate)

    def slices(self) -> None:
        """Cut every size that is judged out into a standalone directory."""
        family = open_elastic(self.out / "elastic").budgets
        for row in self.rows():
            if row.role in ("elastic", "untrained", "uniform"):
                self._slice(row, family[str(row.budget)].to_json() if row.role == "untrained" else str(row.budget))

    def evaluate(self) -> None:
        """Judge every directory in stock transformers, on the same held-out problems."""
        how = self.recipe.evaluate
        settings = how.judging | self.material.read("validation")
        for row in self.rows():
            name = f"evaluations/{_slug(row.name)}"
            after = (row.stage if row.role in ("parent", "scratch") else f"slices/{_slug(row.name)}",)
            with self.ledger.stage(name, settings, after=after) as partial:
                if partial:
                    title, device = f"evaluate {row.name}", self.recipe.layout.device
                    self.material.judge(row.directory, how, self.recipe.seed, title, partial, device)

    def report(self) -> None:
        """report.json, report.html, and the table in the terminal."""
        from nestling.evaluate.story import tell

        self._record_evaluations()
        write_json(self.out / "run.json", self._summary())
        tell(self.out)

    # --- what is judged

    def rows(self) -> list[Row]:
        """The lines of the report, in order."""
        budgets = trained_budgets(self.recipe)
        controls = self.recipe.controls
        rows = [Row("parent", "parent", None, self.parent_directory, "parent")]
        rows += [self._sliced(budget, "elastic", budget, "elastic") for budget in budgets]
        rows += [self._sliced(f"{b} untrained", "untrained", b, "ranked") for b in budgets if b != "100%"]
        if (budget := controls.uniform_budget) and controls.uniform:
            rows.append(self._sliced(f"{budget} uniform", "uniform", budget, "uniform"))
        if budget := controls.scratch_budget:
            rows.append(Row(f"{budget} from scratch", "scratch", budget, self.out / "scratch", "scratch"))
        return rows

    def _sliced(self, name: str, role: str, budget: str, stage: str) -> Row:
        return Row(name, role, budget, self.out / "slices" / _slug(name), stage)

    def _summary(self) -> dict[str, Any]:
        """run.json: what a report needs to know besides the directories."""
        rows = [
            {
                "name": row.name,
                "role": row.role,
                "budget": row.budget,
                "directory": os.path.relpath(row.directory, self.out),
            }
            | {"evaluation": f"evaluations/{_slug(row.name)}"}
            for row in self.rows()
        ]
        how = self.recipe
        return {
            "title": how.title,
            "command": self.source,
            "seed": how.seed,
            "quick": self.quick,
            "task": self.material.title,
            "prompt": self.material.prompt,
            "judged": self.material.judged(how.evaluate),
            "stages": [
                [sum(s.steps for s in how.train.stages[:i]), ", ".join(f"{k} {v}" for k, v in stage.options.items())]
                for i, stage in enumerate(how.train.stages)
            ],
            "rows": rows,
        }

    # --- how

    def _from_scratch(
        self, name: str, out: Path, architecture: Architecture, stages: Sequence[StageSection], rate: float
    ) -> None:
        from nestling.trainings import from_scratch

        from_scratch(self.recipe, self.material, architecture, stages, rate, self._training(name), out)

    def _distill(self, name: str, out: Path, by_hand: Mapping[str, Submodel]) -> None:
        from nestling.trainings import distilled

        places = self.parent_directory, self.ranked_directory
        distilled(self.recipe, self.material, *places, by_hand, self._training(name), out)

    def _slice(self, row: Row, chosen: Any) -> None:
        from nestling.weights.slicing import slice as cut

        name = f"slices/{_slug(row.name)}"
        if self.ledger.is_done(name, chosen, (row.stage,)):
            return
        began = time.monotonic()
        source = self.ranked_directory if row.stage == "ranked" else self.out / row.stage
        mark = self.ledger.mark(name, began)
        cut(source, chosen, row.directory, hetero="code", overwrite=True, also={MARK: mark})  # code: if sizes differ

    def _record_evaluations(self) -> None:
        """Into the elastic checkpoint, for the card of every later slice, and into the cards of those made here."""
        from nestling.weights.slicing import write_card

        rows = [row for row in self.rows() if row.role == "elastic"]
        before, after = read_json(self.out / "elastic" / SIDECAR), read_json(self.out / "elastic" / SIDECAR)
        for row in rows:
            judged = read_json(self.out / "evaluations" / _slug(row.name) / EVALUATION)
            after["budgets"][row.budget]["evaluations"] = [{k: v for k, v in judged.items() if k != "outputs"}]
        if after == before:
            return
        write_json(self.out / "elastic" / SIDECAR, after)
        for row in rows:
            write_card(self.out / "elastic", row.directory)

    def _training_settings(self) -> dict[str, Any]:
        """[train], and the content of the files that it names."""
        how = self.recipe.train
        teacher = {} if how.teacher is None else {"teacher files": checkpoint_files(Path(how.teacher))}
        table = {} if how.latency_table is None else {"latencies": read_json(Path(how.latency_table))}
        return how.model_dump() | teacher | table

    def _method(self) -> Any:
        from nestling.train.importance import Method

        how = self.recipe.rank or RankSection()
        method = Method.of(how.metrics, how.depth, how.max_drop, self.recipe.seed)
        method.rounds(len(self.architecture.hybrid_override_pattern))
        return method

    def _training(self, name: str) -> Any:
        from nestling.train.checkpoints import Run

        return Run(
            self.out / ".state" / name,
            self.ledger.fingerprints[name],
            f"train {name}",
            **self.recipe.checkpoints.model_dump(),
            settings=self.ledger.settings[name],
            tensorboard=self.out / "tensorboard" / name if self.recipe.tensorboard else None,
            on_change=self.on_change,
        )


def _slug(name: str) -> str:
    """`75% untrained` -> `75-untrained`: a name for a directory."""
    return name.replace("%", "").replace(" ", "-")
