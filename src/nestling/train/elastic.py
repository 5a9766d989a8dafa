"""Elastic distillation: one run that trains every size of a family, with the parent as frozen teacher.

While the router learns, steps are *soft*: masks on the whole model. Then its choices are read out, nested and repaired
(arch/search.py), and every later step is *hard*: each budget computes its own prefix.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nestling import ranks
from nestling.arch.nesting import read_out
from nestling.arch.search import SearchSpace, layer_order
from nestling.arch.submodel import Submodel, complete
from nestling.arch.targets import Target
from nestling.console import console
from nestling.data.batches import Data, Stage
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import Widths, hard
from nestling.train import distributed
from nestling.train.checkpoints import Metrics, Run
from nestling.train.curriculum import Lesson, draw, shortened, stage_index
from nestling.train.distributed import HERE, Layout
from nestling.train.expected import block_costs, expected_cost
from nestling.train.loop import train
from nestling.train.objective import Objective, resource
from nestling.train.optimize import Optimization, model_trainee
from nestling.train.router import Router, annealed, soft
from nestling.train.teaching import Taught, micro_batches, student_loss, teach
from nestling.train.watch import Watch


@dataclass(frozen=True)
class Distillation(Optimization):
    """How a family is trained. The router learns until its choice has settled, then sizes are frozen.

    That is when the noise-free choice of no budget has changed for `settle_steps` steps, or after `router_steps`.
    """

    stages: tuple[Stage, ...]
    router_steps: int
    router_learning_rate: float
    resource_weight: float  # λ
    dead_zone: float
    temperature: tuple[float, float]
    logit_scale: tuple[float, float]
    objective: Objective = Objective()
    lessons: tuple[Lesson, ...] = ()  # one per stage; empty: every stage has the run's settings
    budgets_per_step: str = "all"  # on the same tokens, sharing one teacher pass; "one", drawn for every batch; or
    # "rank", drawn by every process for its own rows
    settle_steps: int | None = None

    def lesson(self, stage: int) -> Lesson:
        return self.lessons[stage] if self.lessons else Lesson()

    def scale(self, step: int) -> dict[str, float]:
        """What the stage of a step multiplies the run's learning rates by: of the router, and of all the rest."""
        lesson = self.lesson(stage_index(self.stages, step))
        model = (lesson.learning_rate or self.learning_rate) / self.learning_rate
        router = (lesson.router_learning_rate or self.router_learning_rate) / self.router_learning_rate
        return {"router": router, "": model}

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


@dataclass
class Trained:
    """What a run made: the student, its frozen family (largest first), and a row of metrics per step."""

    model: NemotronH
    family: dict[str, Submodel]
    rows: list[Metrics]


def distill(
    student: NemotronH,
    teacher: NemotronH,
    data: Data,
    how: Distillation,
    targets: Mapping[str, Target],
    seed: int,
    run: Run,
    *,
    space: SearchSpace,
    ranked_layers: Sequence[int] = (),
    family: Mapping[str, Submodel] | None = None,
    watch: Watch | None = None,
    layout: Layout = HERE,
) -> Trained:
    """Train every budget on every batch, sharing one teacher pass, or one budget on each; returns the trained family.

    targets: what every budget may have at most, largest first. family: sub-models chosen by hand; without them the
    router chooses. The teacher must be a model with the same vocabulary; it is never changed. watch: looks at sizes
    along the way.
    """
    how.prepare(student, teacher)
    distributed.spread(student.requires_grad_(), how, layout, trained=True)
    distributed.spread(teacher.requires_grad_(False), how, layout, trained=False)
    kept, chosen = tuple(ranked_layers), dict(family or {})
    made = _Elastic(student, teacher, data, how, dict(targets), seed, space, kept, chosen, layout.device)
    trainee = model_trainee(dict(student.train().on_disk()), how.learning_rate, how.weight_decay, how.optimizer)

    def look(step: int) -> Metrics:
        if watch is None:
            return {}
        now = (made.family or made.read_out()).items()  # what would ship if the sizes were frozen here
        sizes = {name: hard(student.architecture, submodel) for name, submodel in now if name in watch.sizes}
        return watch.look(step, how.steps, student, sizes)

    if not family:
        routing = {f"router.{name}": parameter for name, parameter in made.router.named_parameters()}
        trainee.parameters |= routing
        trainee.add("router", torch.optim.AdamW, routing, how.router_learning_rate, weight_decay=0.0)
    rows = train(
        run,
        trainee,
        how.rates(how.steps),
        made.compute,
        clip=how.clip,
        look=look,
        scale=how.scale,
        extra=made.state,
        resume=made.restore,
    )
    return Trained(student.eval(), made.family, rows)


class _Elastic:
    """One run's fixed parts, and the family once it is frozen."""

    def __init__(
        self,
        student: NemotronH,
        teacher: NemotronH,
        data: Data,
        how: Distillation,
        targets: dict[str, Target],
        seed: int,
        space: SearchSpace,
        ranked_layers: tuple[int, ...],
        family: dict[str, Submodel],
        device: torch.device,
    ) -> None:
        self.student, self.teacher, self.data = student, teacher.eval().requires_grad_(False), data
        self.how, self.targets, self.seed, self.space, self.family = how, targets, seed, space, family
        self.architecture = student.architecture
        every = range(len(self.architecture.hybrid_override_pattern))
        self.order = layer_order(self.architecture, ranked_layers or every)
        self.device = device
        self.router = Router(space, len(targets), torch.Generator().manual_seed(seed)).to(device)
        self.picks: dict[str, dict[str, int]] = {}  # the choices before the last step, and for how long they have stood
        self.unchanged = 0
        if not family:
            self.read_out()  # refuse an impossible search space before the first step
        self.costs = {name: block_costs(self.architecture, space, target) for name, target in targets.items()}

    def compute(self, step: int) -> Metrics:
        """One step: the batch, the teacher once, every budget; leaves gradients behind."""
        frozen = self.freeze() if self.is_due(step) else {}
        index = stage_index(self.how.stages, step)
        lesson = self.how.lesson(index)
        data = shortened(self.data(index, step), lesson.length)
        chosen = self.chosen(lesson, step)
        widths: dict[str, Widths] = {}
        losses = dict.fromkeys(chosen, 0.0)
        notes: Metrics = {}
        batches = micro_batches(data, self.how.micro_batch, self.device)
        again = not self.family and len(batches) > 1  # then the router's part of the graph serves several of them
        for pieces in batches:
            with self.how.autocast(pieces[0][0].inputs_BL):
                taught = [teach(self.teacher, part, share) for part, share in pieces]
            for name in losses:
                if name not in widths:
                    widths[name], note = self.route(name, step)
                    notes |= {name: note} if not self.family else {}
                losses[name] += self.learn(widths[name], taught, again)
        distributed.add_up(parameter.grad for parameter in self.router.parameters())
        total = {"tokens": data.tokens, "stage": index, "teacher_tokens": data.tokens}
        total |= self.told(losses, sum(share for pieces in batches for _, share in pieces), data.tokens)
        return total | ({"router": notes} if notes else {}) | ({"frozen": frozen} if frozen else {})

    def chosen(self, lesson: Lesson, step: int) -> list[str]:
        """The budgets that this rank trains in a step; ranks part once sizes are frozen, as soft and hard steps cannot
        be mixed: FSDP2 exchanges the gradients of embeddings and head at another moment where masks have some too.
        """
        names = list(self.targets)
        if self.how.budgets_per_step == "all":
            return names
        own = (ranks.rank(),) if self.how.budgets_per_step == "rank" and self.family else ()
        return [draw(names, lesson, self.seed, step, *own)]

    def told(self, losses: dict[str, float], share: float, tokens: int) -> Metrics:
        """What all ranks say together: each budget's mean loss, theirs in all, and the tokens that each was trained on.

        losses: this rank's, weighted by its share of what counts in the batch.
        """
        every = ranks.gathered((losses, share))
        counts, weights = Counter[str](), Counter[str]()
        for own, weight in every:
            counts.update(own.keys())
            weights.update(dict.fromkeys(own, weight))
        names = [name for name in self.targets if weights[name]]
        sums = {name: sum(own.get(name, 0.0) for own, _ in every) for name in names}
        return {
            "loss": sum(sums.values()) / sum(weights.values()),
            "kl": {name: total / weights[name] for name, total in sums.items()},
            "budget_tokens": {name: tokens * counts[name] // len(every) for name in names},
        }

    def learn(self, widths: Widths, taught: Sequence[Taught], again: bool) -> float:
        """Leave the gradient of one budget's loss. again: keep the graph, for the widths that others share."""
        with self.how.autocast(taught[0].part.inputs_BL):
            losses = [
                each.share * student_loss(self.student, widths, self.teacher, self.how.objective, each)
                for each in taught
            ]
        loss = torch.stack(losses).sum()
        loss.backward(retain_graph=again)
        return loss.item()

    def route(self, name: str, step: int) -> tuple[Widths, dict[str, Any]]:
        """The widths of one budget; soft ones after its resource loss left its gradient. The largest is the whole."""
        if self.family:
            return hard(self.architecture, self.family[name]), {}
        if (index := list(self.targets).index(name)) == 0:
            return hard(self.architecture), {}
        progress = step / max(self.how.router_steps - 1, 1)
        temperature, scale = annealed(*self.how.temperature, progress), annealed(*self.how.logit_scale, progress)
        noise = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * len(self.targets) + index)
        pi = self.router(index, temperature, scale, noise)
        expected = expected_cost(self.architecture, self.order, self.space, self.costs[name], pi)
        cost = self.how.resource_weight * resource(expected, self.targets[name].value, self.how.dead_zone)
        (cost / ranks.size()).backward(retain_graph=True)  # once in all, as gradients are summed over ranks
        sizes = {f: float(weight.detach() @ weight.new_tensor(self.space[f])) for f, weight in pi.items()}
        note = {"expected": expected.item() / self.targets[name].value, "sizes": sizes, "temperature": temperature}
        return soft(self.architecture, self.order, self.space, pi), note

    def choices(self) -> dict[str, dict[str, int]]:
        """What the router would choose for each budget now, noise aside."""
        return {name: self.router.choose(index) for index, name in enumerate(self.targets)}

    def is_due(self, step: int) -> bool:
        """Whether sizes are to be frozen before this step."""
        if self.family:
            return False
        return step == self.how.router_steps or (self.how.settle_steps is not None and self.has_settled())

    def has_settled(self) -> bool:
        """Whether no choice has changed in the last `settle_steps` steps; to be asked once before every step."""
        picks = self.choices()
        self.unchanged = self.unchanged + 1 if picks == self.picks else 0
        self.picks = picks
        return self.unchanged == self.how.settle_steps

    def read_out(self) -> dict[str, Submodel]:
        return read_out(self.architecture, self.order, self.space, self.targets, self.choices())

    def freeze(self) -> dict[str, Any]:
        """Choose, nest and repair the sizes that are trained from now on; returns them as JSON."""
        self.family = self.read_out()
        for name, submodel in list(self.family.items())[1:]:
            console.print(f"{name}: {submodel.to_json()}")
        return self.state()["family"]

    def state(self) -> dict[str, Any]:
        family = {name: submodel.to_json() for name, submodel in self.family.items()}
        return {"family": family, "picks": self.picks, "unchanged": self.unchanged}

    def restore(self, state: Mapping[str, Any]) -> None:
        given = state["family"].items()
        self.family = {name: complete(self.architecture, Submodel.from_json(spec)) for name, spec in given}
        self.picks, self.unchanged = state["picks"], state["unchanged"]
