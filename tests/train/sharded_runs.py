"""Small trainings that one process runs, or several that share the rows of every batch and shard the weights.

`python sharded_runs.py DIRECTORY NAME …` is one of the processes that torchrun starts; the first writes
DIRECTORY/NAME.pt: losses and norms of every step, and the final weights. NAME:STEP is stopped in that step.
"""

import os
import signal
import sys
import weakref
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import stock
from nestling import ranks
from nestling.arch.cost import parameters
from nestling.arch.search import SearchSpace
from nestling.arch.submodel import WHOLE, Submodel
from nestling.arch.targets import Target
from nestling.data.batches import Batch, Stage
from nestling.model.nemotron_h import NemotronH
from nestling.model.store import save_model
from nestling.model.width import hard
from nestling.train.checkpoints import Run
from nestling.train.curriculum import Lesson, draw
from nestling.train.distributed import HERE, Layout, spread
from nestling.train.elastic import Distillation, distill
from nestling.train.objective import Objective
from nestling.train.optimize import Optimization
from nestling.train.pretrain import Pretraining, pretrain

MODEL = replace(stock.TINY, intermediate_size=48)
TIED = replace(MODEL, untied=False)
MIXTURE = replace(
    MODEL,
    hybrid_override_pattern="ME*E",
    n_routed_experts=5,
    moe_intermediate_size=8,
    moe_shared_expert_intermediate_size=12,
)
ROWS, LENGTH, STEPS, SOFT = 6, 13, 20, 20
SPACE = {
    "hidden_size": [*range(8, 16)],
    "intermediate_size": [16, 24, 32, 40],
    "mamba_num_heads": [2],
    "num_attention_heads": [1],
    "layers": [2],
}
DEEP = {"hidden_size": [*range(6, 16)], "intermediate_size": [8, 16, 24, 32, 40]}
BY_HAND = {
    "100%": WHOLE,
    "50%": Submodel(hidden_size=12, intermediate_size=32, mamba_num_heads=2, layers=(0, 2)),
}
FEWER = Submodel(hidden_size=12, n_routed_experts=3, moe_intermediate_size=6, layers=(0, 1, 2))
MIXED = {"hidden_size": [*range(8, 16)], "n_routed_experts": [2, 3, 4], "moe_intermediate_size": [*range(4, 8)]}
NARROW = Submodel(hidden_size=8, intermediate_size=16, mamba_num_heads=2)
SHARES = {"100%": 1.0, "50%": 0.5}
HOW = Distillation(
    stages=(Stage(STEPS, ROWS),),
    learning_rate=0.01,
    warmup=2,
    decay=0.5,
    weight_decay=0.1,
    router_steps=SOFT,
    router_learning_rate=0.01,
    resource_weight=1.0,
    dead_zone=0.01,
    temperature=(1.0, 0.05),
    logit_scale=(1.0, 10.0),
    clip=0.05,
)
ROUTED = {"family": None, "stages": (Stage(SOFT + 2, ROWS),)}
PIECES = {"micro_batch": 2, "activation_checkpointing": True}
ADDED = Objective(cross_entropy=0.5, hidden=0.3, chunk=3)
RUNS: dict[str, dict[str, Any]] = {
    "hard": {},
    "hard-pieces": {**PIECES, "architecture": TIED, "optimizer": "adamw", "objective": ADDED},
    "hard-32": {"budgets_per_step": "one", "dtype": torch.float32},
    "soft": {**ROUTED, **PIECES, "architecture": TIED},
    "stopped": {**ROUTED, **PIECES, "architecture": TIED},
    "soft-32": {**ROUTED, "optimizer": "adamw", "dtype": torch.float32},
    "apart": {"budgets_per_step": "rank", "family": {"100%": WHOLE, "50%": NARROW}, "optimizer": "adamw"},
    "apart-soft": {**ROUTED, "budgets_per_step": "rank", "space": DEEP},
    "experts": {**PIECES, "architecture": MIXTURE, "space": MIXED, "family": {"100%": WHOLE, "50%": FEWER}},
    "experts-soft": {**ROUTED, "architecture": MIXTURE, "space": MIXED, "optimizer": "adamw"},
    "kept": {"layout": Layout(reshard=False, offload_teacher=True)},
    "replicas": {"layout": Layout(replicas=2)},
}


def batch(stage: int, step: int) -> Batch:
    """Rows of unlike lengths, in which unlike numbers of tokens count; in two of them none does."""
    drawn = torch.Generator().manual_seed(step)
    ids = torch.randint(MODEL.vocab_size, (ROWS, LENGTH + 1), generator=drawn)
    lengths = torch.randint(4, LENGTH + 1, (ROWS,), generator=drawn)
    counted = torch.rand(ROWS, LENGTH, generator=drawn) < 0.6
    counted &= torch.arange(LENGTH) < lengths[:, None]
    counted[:4, 0] = True
    counted[4:] = False
    return Batch(ids[:, :-1], ids[:, 1:], counted, lengths)


def train(name: str, state: Path, stop: int | None = None) -> dict[str, Any]:
    """What a training makes: losses [step, budget], norms of the gradient, weights, and sizes of the family.

    stop: the step in which the last rank is told to end.
    """

    def data(stage: int, step: int) -> Batch:
        if step == stop and ranks.rank() == ranks.size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(stage, step)

    given = dict(RUNS[name])
    dtype, architecture = given.pop("dtype", torch.float64), given.pop("architecture", MODEL)
    family, layout = given.pop("family", BY_HAND), given.pop("layout", HERE)
    torch.set_default_dtype(dtype)
    try:
        student, teacher = (stock.randomize(NemotronH(architecture), seed) for seed in (1, 2))
        targets = {n: Target("parameters", int(parameters(architecture) * share)) for n, share in SHARES.items()}
        space = SearchSpace.of(architecture, given.pop("space", SPACE))
        run = Run(state, "same", name, every=3 if stop else 1000, asynchronous=name == "stopped")
        how = replace(HOW, **given)
        made = distill(student, teacher, data, how, targets, 5, run, space=space, family=family, layout=layout)
    finally:
        torch.set_default_dtype(torch.float32)
    sizes = {n: size.to_json() for n, size in made.family.items()}
    return told(made.model, made.rows) | {"family": sizes, "routed": [row.get("router") for row in made.rows]}


def first_step_apart(ranks_: int) -> dict[str, Any]:
    """What the first step of "apart" must come to: each rank's rows under the budget that it draws."""
    torch.set_default_dtype(torch.float64)
    try:
        student, teacher = (stock.randomize(NemotronH(MODEL), seed) for seed in (1, 2))
        student.requires_grad_()
        losses: dict[str, list[tuple[float, float]]] = {}
        for rank in range(ranks_):
            name = draw([*SHARES], Lesson(), 5, 0, rank)
            widths = hard(MODEL, RUNS["apart"]["family"][name])
            for part, share in batch(0, 0).parts(2, rank, ranks_):
                logits = [model(part.inputs_BL, w).logits for model, w in ((student, widths), (teacher, None))]
                said, wanted = (x[part.counted_BL].log_softmax(-1) for x in logits)
                loss = torch.nn.functional.kl_div(said, wanted, log_target=True, reduction="batchmean")
                (share * loss).backward()
                losses.setdefault(name, []).append((share, loss.item()))
    finally:
        torch.set_default_dtype(torch.float32)
    norm = torch.stack([p.grad.norm() for p in student.parameters() if p.grad is not None]).norm()
    means = {n: sum(s * x for s, x in all_) / sum(s for s, _ in all_) for n, all_ in losses.items()}
    return {"kl": means, "loss": sum(s * x for all_ in losses.values() for s, x in all_), "norm": norm.item()}


def train_parent(state: Path) -> dict[str, Any]:
    torch.set_default_dtype(torch.float64)
    try:
        fields = {n: v for n, v in vars(HOW).items() if n in Optimization.__dataclass_fields__}
        how = Pretraining(stages=HOW.stages, **fields | {"micro_batch": 2})
        return told(*pretrain(TIED, batch, how, 3, Run(state, "same", "parent", every=1000)))
    finally:
        torch.set_default_dtype(torch.float32)


def exported(directory: Path) -> dict[str, Any]:
    """A deep model, written tensor by tensor, and the most bytes of whole tensors that there were at a time."""
    deep = replace(MODEL, hybrid_override_pattern="M*-" * 8)
    model = spread(stock.randomize(NemotronH(deep), 4), HOW, trained=True)
    gather, now, peak = ranks.whole, 0, 0

    def counted(shard: Any) -> Any:
        nonlocal now, peak
        whole = gather(shard)
        now += whole.nbytes
        peak = max(peak, now)
        weakref.finalize(whole.untyped_storage(), forget, whole.nbytes)
        return whole

    def forget(size: int) -> None:
        nonlocal now
        now -= size

    directory.mkdir()
    ranks.whole = counted
    try:
        save_model(model, directory, torch.bfloat16)
    finally:
        ranks.whole = gather
    shards = sum(p.to_local().nbytes for p in model.parameters())
    return {"peak": peak, "shards": shards, "weights": {n: gather(p.detach()) for n, p in model.on_disk().items()}}


class Gathered(TorchDispatchMode):
    """How often weights are gathered."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name().startswith("c10d::") and "gather" in func.name()
        return func(*args, **(kwargs or {}))


def gatherings() -> list[int]:
    """Of a step of a student, as by default and with whole weights kept, and of a teacher's forward pass."""
    found = []
    for layout, trained in ((HERE, True), (Layout(reshard=False), True), (Layout(reshard=False), False)):
        model = spread(stock.randomize(NemotronH(MODEL), 4).requires_grad_(trained), HOW, layout, trained=trained)
        for _ in range(2):  # the second time shows whether anything was kept
            with Gathered() as counted:
                hidden_BLd = model.hidden(torch.arange(LENGTH)[None])
                if trained:  # as the trainer does, whose loss multiplies by the head outside of the forward pass
                    (hidden_BLd @ model.head_weight().T).sum().backward()
        found.append(counted.count)
    return found


def told(model: NemotronH, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "losses": torch.tensor(
            [[*(row.get("kl", {}).get(name, 0.0) for name in SHARES), row["loss"]] for row in rows], dtype=torch.float64
        ),
        "norms": torch.tensor([row["gradient"] for row in rows], dtype=torch.float64),
        "weights": {n: ranks.whole(p.detach()).clone() for n, p in model.on_disk().items()},
    }


def main() -> None:
    directory, *names = sys.argv[1:]
    with ranks.together():
        for given in names:
            name, _, stop = given.partition(":")
            state = Path(directory, f"{name}.state")
            with suppress(KeyboardInterrupt):
                made = train_parent(state) if name == "parent" else train(name, state, int(stop) if stop else None)
                if name == "hard":
                    torch.save(gatherings(), Path(directory, "gatherings"))
                    torch.save(
                        exported(Path(directory, f"export{ranks.rank()}")), Path(directory, f"{ranks.rank()}.export")
                    )
                if ranks.first():
                    torch.save(made, Path(directory, f"{name}.pt"))


if __name__ == "__main__":
    main()
