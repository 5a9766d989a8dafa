"""`nestling run` of a recipe with a [study]: every arm with every seed, each made once.

OUT/parents/SEED is a seed's parent and its ranking, which all arms share; OUT/arms/ARM/SEED is what an arm made, and
its result.json what was measured. OUT/study.json and OUT/results.jsonl are all that a report reads.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nestling.arch.cost import cost
from nestling.checks import check_looks
from nestling.console import console
from nestling.evaluate.machine import machine, versions
from nestling.ledger import changes, digest
from nestling.pipeline import Pipeline
from nestling.recipe import Recipe, parent_architecture
from nestling.study.arms import BASE_ONLY, Arm, arms_of, study_of
from nestling.study.running import Cell
from nestling.weights.files import read_json, write_file_atomically, write_json

Json = dict[str, Any]
STUDY, RESULTS = "study.json", "results.jsonl"


@dataclass
class Study:
    """A recipe with a [study], and its output directory."""

    recipe: Recipe
    source: str  # the command that reproduces it
    quick: bool = False

    @property
    def out(self) -> Path:
        return Path(self.recipe.out)

    @cached_property
    def arms(self) -> dict[str, Arm]:
        return arms_of(self.recipe)

    def run(self) -> None:
        """Make what is missing, the most important arms first, and tell of it."""
        from nestling.study.page import tell

        seeds = study_of(self.recipe).seeds
        check_looks(self.recipe)
        about = self.about()
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / STUDY, about)
        there: list[Path] = []
        for arm in self.arms.values():
            for seed in seeds:
                there.append(self.make(arm, seed))
                lines = [json.dumps(read_json(file)) + "\n" for file in there]
                write_file_atomically(self.out / RESULTS, "".join(lines).encode())
        tell(self.out)

    def about(self) -> Json:
        """study.json: what was asked for, so that what is missing can be named."""
        section = study_of(self.recipe)
        arms = {name: arm.section.model_dump() | {"sizes": list(arm.sizes)} for name, arm in self.arms.items()}
        how = self.recipe
        return {
            "title": how.title,
            "command": self.source,
            "quick": self.quick,
            "task": Pipeline(how, "").material.title,
            "measure": "exact" if how.task else "loss",
            "architecture": parent_architecture(how).to_config({}),
            "rows": how.evaluate.rows,
            "seeds": list(section.seeds),
            "reach": list(section.reach),
            "arms": arms,
        }

    def parent(self, seed: int) -> Pipeline:
        """The seed's parent, trained and ranked unless it is there."""
        recipe = self.recipe.model_copy(update={"seed": seed, "out": str(self.out / "parents" / str(seed))})
        pipeline = Pipeline(recipe, self.source)
        pipeline.run(until="rank")
        return pipeline

    def make(self, arm: Arm, seed: int) -> Path:
        """The file of one result, made unless it is there with the settings of today."""
        parent = self.parent(seed)
        sizes = self.sizes(arm, seed)
        settings = self.settings(arm, seed, parent, sizes)
        out = self.directory(arm.name, seed)
        file = out / "result.json"
        if file.is_file() and read_json(file)["fingerprint"] == digest(settings):
            return file
        _step_aside(out, settings, f"{arm.name}, seed {seed}")
        console.print(f"study: {arm.name}, seed {seed}")
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "arm.json", {"fingerprint": digest(settings), "settings": settings})
        measured = Cell(arm, seed, parent, out, self.source, sizes).run()
        about = {"arm": arm.name, "role": arm.section.role, "seed": seed, "fingerprint": digest(settings)}
        made = {"versions": versions(), "machine": machine()}
        write_json(file, {**about, **made, "parent": self.score(seed, parent), **measured})
        return file

    def sizes(self, arm: Arm, seed: int) -> dict[str, Json]:
        """The sizes that another arm found with this seed, for an arm that takes them from there."""
        if arm.section.sizes_from is None:
            return {}
        family = read_json(self.directory(arm.section.sizes_from, seed) / "result.json")["family"]
        return {name: family[name]["submodel"] for name in arm.sizes}

    def settings(self, arm: Arm, seed: int, parent: Pipeline, sizes: Mapping[str, Json]) -> Json:
        """Everything a result depends on."""
        return {
            "arm": arm.section.model_dump(exclude={"about"}),
            "recipe": arm.recipe.model_dump(mode="json", exclude=BASE_ONLY | {"seed"}),
            "seed": seed,
            "parent": parent.ledger.fingerprints["ranked"],
            "sizes": dict(sizes),
        }

    def score(self, seed: int, parent: Pipeline) -> Json:
        """What the seed's parent is worth on the rows that its sizes are looked at with; measured once."""
        from nestling.model.store import load_model
        from nestling.trainings import watch
        from nestling.weights.elastic import open_elastic

        file = parent.out / "score.json"
        asked = [parent.ledger.fingerprints["ranked"], self.recipe.evaluate.rows]
        if file.is_file() and (found := read_json(file))["of"] == asked:
            return dict(found["score"])
        seen = watch(parent.recipe, parent.material, parent.parent_directory, ())
        ranked = open_elastic(parent.ranked_directory)
        spent = cost(ranked.architecture)
        found = seen.measure(load_model(ranked), None) | {"parameters": spent.parameters, "bytes": spent.bytes}
        write_json(file, {"of": asked, "score": found})
        return found

    def directory(self, arm: str, seed: int) -> Path:
        return self.out / "arms" / arm / str(seed)


def _step_aside(out: Path, settings: Json, title: str) -> None:
    """Keep what was made with other settings under another name, and say what has changed."""
    if not (out / "arm.json").is_file():
        return
    before = read_json(out / "arm.json")
    if before["fingerprint"] == digest(settings):
        return
    said = "; ".join(changes(before["settings"], json.loads(json.dumps(settings)))) or "what it is made from"
    kept = out.with_name(f"{out.name}-before-{before['fingerprint']}")
    out.replace(kept)
    console.print(f"study: {title} is made again, the recipe has changed: {said}. What was there is in {kept}")
