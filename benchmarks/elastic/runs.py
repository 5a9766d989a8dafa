"""One run of the study: a parent's family trained as a variant says, and its sizes measured along the way."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from controls import Solutions, WholeWidthNorms
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor
from variants import Variant

from nestling.arch.architecture import Architecture
from nestling.arch.cost import parameters
from nestling.arch.nesting import read_out
from nestling.arch.search import SearchSpace, layer_order
from nestling.arch.submodel import WHOLE, Submodel, complete
from nestling.data.batches import Stage, padded
from nestling.model.nemotron_h import NemotronH
from nestling.model.store import load_model
from nestling.model.width import Widths, hard
from nestling.pipeline import Pipeline
from nestling.recipe import Recipe, space_of
from nestling.tasks import Task, distinct, problems
from nestling.tokenizer import EOS, read_tokenizer
from nestling.train.checkpoints import Run
from nestling.train.curriculum import Lesson
from nestling.train.elastic import Distillation, Trained, distill
from nestling.train.objective import Objective
from nestling.train.router import Router
from nestling.weights.elastic import open_elastic
from nestling.weights.ranking import read_ranking

EVERY = 20  # steps between measurements


class HeldOut:
    """Held-out problems and the parent's answers: what every size of a seed is measured on.

    All solution tokens at once, given the right ones before (teacher-forced): a problem is solved if every token is the
    most probable one, which is when greedy decoding writes the worked solution out.
    """

    def __init__(self, task: Task, tokenizer: Tokenizer, parent: NemotronH, seed: int, count: int) -> None:
        asked = distinct(problems(task, seed, held_out=True), count)
        prompts = [tokenizer.encode(problem.prompt).ids for problem in asked]
        end = [tokenizer.token_to_id(EOS)]
        solutions = [tokenizer.encode(problem.solution).ids + end for problem in asked]
        ids, real = padded([p + s for p, s in zip(prompts, solutions, strict=True)])
        counted = (torch.arange(ids.shape[1]) >= torch.tensor([[len(p)] for p in prompts])) & real
        self.inputs, self.targets, self.counted = ids[:, :-1], ids[:, 1:], counted[:, 1:]
        self.terms = torch.tensor([problem.solution.count(";") + 2 for problem in asked])
        self.log_p = self._log_p(parent, None)

    def measure(self, model: NemotronH, widths: Widths | None) -> dict[str, Any]:
        """Share solved, of all problems and of those with so many terms; KL from the parent, nats per token."""
        log_q = self._log_p(model, widths)
        solved = ((log_q.argmax(-1) == self.targets) | ~self.counted).all(1).float()
        kl = (self.log_p.exp() * (self.log_p - log_q)).sum(-1)[self.counted].mean()
        by_terms = {str(n): round(float(solved[self.terms == n].mean()), 4) for n in self.terms.unique().tolist()}
        return {"exact": round(float(solved.mean()), 4), "terms": by_terms, "kl": round(float(kl), 5)}

    @torch.no_grad()
    def _log_p(self, model: NemotronH, widths: Widths | None) -> Tensor:
        return torch.cat([torch.log_softmax(model(rows, widths).logits, -1) for rows in self.inputs.split(250)])


@dataclass(frozen=True)
class Cell:
    """One variant with one seed; `out` holds the seed's parent and ranked checkpoint, made before."""

    variant: Variant
    recipe: Recipe
    out: Path

    @cached_property
    def pipeline(self) -> Pipeline:
        return Pipeline(self.recipe, "")

    @property
    def architecture(self) -> Architecture:
        return self.pipeline.architecture

    @cached_property
    def space(self) -> SearchSpace:
        return space_of(self.architecture, self.recipe.train)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Layers, the one to keep longest first."""
        ranking = read_ranking(self.out / "ranked")
        assert ranking is not None
        count = len(ranking.layers)
        unranked = np.random.default_rng(self.recipe.seed).permutation(count).tolist()
        return layer_order(self.architecture, ranking.layers if self.variant.start == "ranked" else unranked)

    def train(self, state: Path, fingerprint: str, held_out: HeldOut, found: Mapping[str, Submodel]) -> dict[str, Any]:
        """Train and measure; goes on from `state` where it was stopped. found: the router's sizes in the default."""
        tokenizer, parent = read_tokenizer(self.out / "parent"), load_model(open_elastic(self.out / "parent"))
        teacher = parent if self.variant.target == "teacher" else Solutions(parent.architecture, tokenizer)
        student, how, seed = self.student(), self.how(), self.recipe.seed
        run = Run(state, fingerprint, f"{self.variant.name}, seed {seed}", EVERY, keep=10**6)
        trained = distill(
            student,
            teacher,
            self.pipeline.material.batches(self.recipe.train.stages, self.out / "parent", seed),
            how,
            self.pipeline.targets,
            seed,
            run,
            space=self.space,
            ranked_layers=self.order,
            family=self.family(found),
        )
        seconds = sum(row["seconds"] for row in trained.rows)
        family = {name: self.about(submodel) for name, submodel in trained.family.items()}
        return {"family": family, "seconds": round(seconds, 1), "points": list(self.points(run, held_out, trained))}

    def student(self) -> NemotronH:
        stored = load_model(open_elastic(self.out / ("ranked" if self.variant.start == "ranked" else "parent")))
        kind = NemotronH if self.variant.active_width else WholeWidthNorms
        student = kind(self.architecture)
        student.load_state_dict(stored.state_dict())
        return student

    def how(self) -> Distillation:
        given = self.recipe.train
        return Distillation(
            tuple(Stage(stage.steps, stage.batch) for stage in given.stages),
            objective=Objective(**given.objective.model_dump()),
            lessons=tuple(self.lesson(stage.budget_probabilities) for stage in given.stages),
            **given.model_dump(include={field.name for field in fields(Distillation)} - {"stages", "objective"}),
        )

    def lesson(self, probabilities: Mapping[str, float]) -> Lesson:
        return Lesson(probabilities=tuple(probabilities[name] for name in self.pipeline.targets if probabilities))

    # --- sizes

    def family(self, found: Mapping[str, Submodel]) -> dict[str, Submodel]:
        """The sizes that are given from the start; none if the router finds them."""
        kind, _, draw = self.variant.sizes.partition(" ")
        if kind == "router":
            return {}
        if kind == "found":
            return dict(found)
        if kind == "random":
            return self.read_out(self.random_picks(int(draw)))
        uniform = {name: Submodel.from_json(spec) for name, spec in self.recipe.controls.uniform.items()}
        return {name: complete(self.architecture, uniform.get(name, WHOLE)) for name in self.pipeline.targets}

    def random_picks(self, draw: int) -> dict[str, dict[str, int]]:
        """Per budget a candidate of every axis, all alike; the read-out nests them and repairs their cost."""
        random = np.random.default_rng((self.recipe.seed, draw))
        names = self.pipeline.targets
        return {name: {field: int(random.choice(sizes)) for field, sizes in self.space.candidates} for name in names}

    def read_out(self, picks: Mapping[str, Mapping[str, int]]) -> dict[str, Submodel]:
        return read_out(self.architecture, self.order, self.space, self.pipeline.targets, picks)

    def about(self, submodel: Submodel) -> dict[str, Any]:
        return {"parameters": parameters(self.architecture, submodel), "submodel": submodel.to_json()}

    # --- measuring

    def points(self, run: Run, held_out: HeldOut, trained: Trained) -> Iterator[dict[str, Any]]:
        """At the start, and at every checkpoint: tokens so far, and each size that would ship then."""
        shipped, as_trained = NemotronH(self.architecture), self.student()
        tokens = [0, *itertools.accumulate(row["tokens"] for row in trained.rows)]
        computed = [0, *itertools.accumulate(sum(row["budget_tokens"].values()) for row in trained.rows)]
        checkpoints = {int(path.name.split("-")[1]): path for path in run.checkpoints()}
        shipped.load_state_dict(as_trained.state_dict())
        for step in range(0, len(trained.rows) + 1, EVERY):
            family = trained.family
            if step:
                self.load(checkpoints[step], shipped, as_trained)
                family = self.chosen(checkpoints[step]) if "router" in trained.rows[step - 1] else family
            sizes = {name: self.size(shipped, as_trained, held_out, sub) for name, sub in family.items()}
            yield {"step": step, "tokens": tokens[step], "student_tokens": computed[step], "sizes": sizes}

    @torch.no_grad()
    def load(self, checkpoint: Path, *models: NemotronH) -> None:
        with safe_open(checkpoint, framework="pt") as file:
            for model in models:
                for name, parameter in model.on_disk().items():
                    parameter.copy_(file.get_tensor(f"parameter/{name}"))

    def chosen(self, checkpoint: Path) -> dict[str, Submodel]:
        """What the router of a checkpoint would have frozen there."""
        router = Router(self.space, len(self.pipeline.targets), torch.Generator())
        prefix = "parameter/router."
        with safe_open(checkpoint, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - not a dict
            router.load_state_dict({name.removeprefix(prefix): file.get_tensor(name) for name in names})
        return self.read_out({name: router.choose(index) for index, name in enumerate(self.pipeline.targets)})

    def size(self, shipped: NemotronH, as_trained: NemotronH, held_out: HeldOut, submodel: Submodel) -> dict[str, Any]:
        """One size as stock transformers would run it; and as it was trained, where that is not the same."""
        widths = hard(self.architecture, submodel)
        found = held_out.measure(shipped, widths)
        if not self.variant.active_width:
            found["as_trained"] = held_out.measure(as_trained, widths)["exact"]
        return found
