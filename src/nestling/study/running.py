"""One arm with one seed: trained, its sizes looked at along the way, its tokens counted."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nestling.arch.architecture import Architecture
from nestling.arch.cost import cost
from nestling.arch.nesting import read_out
from nestling.arch.search import layer_order
from nestling.arch.submodel import Submodel, complete, standalone
from nestling.arch.targets import Target
from nestling.pipeline import Pipeline
from nestling.recipe import Recipe, space_of
from nestling.sections import OwnParent, StageSection
from nestling.study.arms import Arm, scratch_parent
from nestling.weights.elastic import open_elastic
from nestling.weights.ranking import read_ranking

Json = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """An arm, a seed, the seed's ranked parent, and where the arm's own directories go."""

    arm: Arm
    seed: int
    parent: Pipeline  # done up to its ranking
    out: Path
    source: str
    sizes: Mapping[str, Json]  # budget -> the sub-model that another arm found, in an arm that takes it from there

    @property
    def architecture(self) -> Architecture:
        return self.parent.architecture

    def run(self) -> Json:
        """Its points, its family, its seconds, and what a search of sizes took."""
        role = self.arm.section.role
        if role == "untrained":
            return self._untrained()
        if role == "scratch":
            return self._scratch()
        search = self._search() if role == "searched" else None
        made = self._distilled(self.out, self.recipe(self.out, search["chosen"] if search else self.sizes))
        return made | ({"search": search} if search else {})

    def recipe(self, out: Path, sizes: Mapping[str, Json], stages: tuple[StageSection, ...] = ()) -> Recipe:
        """The arm's recipe, of the seed's ranked parent."""
        train = self.arm.recipe.train
        changed = ({"sizes": dict(sizes)} if sizes else {}) | ({"stages": stages} if stages else {})
        given = {
            "parent": OwnParent(model=str(self.parent.ranked_directory)),
            "rank": None,
            "seed": self.seed,
            "out": str(out),
            "train": train.model_copy(update=changed),
        }
        return self.arm.recipe.model_copy(update=given)

    def _distilled(self, out: Path, recipe: Recipe) -> Json:
        pipeline = Pipeline(recipe, self.source)
        pipeline.run(until="train")
        rows = _metrics(out / "elastic")
        family = open_elastic(out / "elastic").budgets
        return {"points": points(rows), "family": self._family(family), "seconds": _seconds(rows)}

    def _scratch(self) -> Json:
        name = self.arm.sizes[0]
        submodel = Submodel.from_json(self.sizes[name] if self.sizes else self.arm.recipe.train.sizes[name])
        shape = standalone(self.architecture, submodel)
        recipe = self.arm.recipe.model_copy(
            update={
                "parent": scratch_parent(self.arm, shape.to_config({})),
                "seed": self.seed,
                "out": str(self.out),
            }
        )
        Pipeline(recipe, self.source).run(until="parent")
        rows = _metrics(self.out / "parent")
        family = self._family({name: complete(self.architecture, submodel)})
        return {"points": points(rows, name), "family": family, "seconds": _seconds(rows)}

    def _untrained(self) -> Json:
        from nestling.model.store import load_model
        from nestling.model.width import hard
        from nestling.trainings import watch

        ranked = self.parent.ranked_directory
        recipe = self.recipe(self.out, self.sizes)
        model, held = load_model(open_elastic(ranked)), watch(recipe, self.parent.material, ranked, ())
        family = {name: complete(self.architecture, Submodel.from_json(spec)) for name, spec in self.sizes.items()}
        seen = {name: held.measure(model, hard(self.architecture, size)) for name, size in family.items()}
        point = {"step": 0, "tokens": 0, "student": dict.fromkeys(family, 0), "teacher": 0, "sizes": seen}
        return {"points": [point], "family": self._family(family), "seconds": 0.0}

    # --- a search of sizes

    def _search(self) -> Json:
        """Short runs of candidates, all of the same length; the one of the lowest loss is chosen."""
        how, train = self.arm.section, self.arm.recipe.train
        first = train.stages[0].model_copy(update={"steps": how.candidate_steps})
        tried: list[Json] = []
        for number, sizes in enumerate(self._candidates(int(how.candidates or 1))):
            out = self.out / f"candidate-{number}"
            made = self._distilled(out, self.recipe(out, sizes, (first,)))
            last = made["points"][-1]
            seen = {key: last["sizes"][name][key] for name in sizes for key in ("exact", "loss")}
            tokens = {"tokens": last["tokens"], "student": sum(last["student"].values()), "teacher": last["teacher"]}
            tried.append({"sizes": sizes, **seen, **tokens, "seconds": made["seconds"]})
        best = min(tried, key=lambda one: one["loss"])
        totals = {key: sum(one[key] for one in tried) for key in ("tokens", "student", "teacher", "seconds")}
        return {"tried": tried, "chosen": best["sizes"], **totals}

    def _candidates(self, count: int) -> Iterable[dict[str, Json]]:
        """The size that is picked by hand, if there is one, and others drawn from the search space, none twice."""
        ranking = read_ranking(self.parent.ranked_directory)
        assert ranking is not None
        budget = self.arm.sizes[0]
        order = layer_order(self.architecture, ranking.layers)
        space = space_of(self.architecture, self.arm.recipe.train)
        targets: dict[str, Target] = {name: self.parent.targets[name] for name in ("100%",)}
        targets |= {budget: Pipeline(self.arm.recipe, "").targets[budget]}
        random = np.random.default_rng(self.seed)
        found: list[Json] = []
        if by_hand := self.parent.recipe.controls.uniform.get(budget):
            found.append(complete(self.architecture, Submodel.from_json(by_hand)).to_json())
        for _ in range(100 * count):
            if len(found) >= count:
                break
            drawn = {field: int(random.choice(sizes)) for field, sizes in space.candidates}
            family = read_out(self.architecture, order, space, targets, {"100%": drawn, budget: drawn})
            if (spec := family[budget].to_json()) not in found:
                found.append(spec)
        return [{budget: spec} for spec in found[:count]]

    def _family(self, family: Mapping[str, Submodel]) -> Json:
        found = {}
        for name, submodel in family.items():
            spent = cost(self.architecture, submodel)
            found[name] = {"parameters": spent.parameters, "bytes": spent.bytes, "submodel": submodel.to_json()}
        return found


def points(rows: Iterable[Mapping[str, Any]], size: str | None = None) -> list[Json]:
    """Where sizes were looked at: tokens so far, and what each size was worth.

    tokens: that were drawn. student: of each size, that it was trained on. teacher: that the teacher read. size: the
    name of a model that was trained from nothing, whose metrics know of no sizes.
    """
    student: Counter[str] = Counter()
    tokens = teacher = 0
    found = []
    for row in rows:
        tokens += row["tokens"]
        teacher += row.get("teacher_tokens", 0)
        student.update({size: row["tokens"]} if size else row["budget_tokens"])
        if "held_out" in row:
            seen = {size or name: measured for name, measured in row["held_out"].items()}
            about = {"step": row["step"] + 1, "tokens": tokens, "student": dict(student), "teacher": teacher}
            found.append({**about, "sizes": seen})
    return found


def _metrics(directory: Path) -> list[Json]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]


def _seconds(rows: Iterable[Mapping[str, Any]]) -> float:
    return round(math.fsum(row["seconds"] for row in rows), 1)
