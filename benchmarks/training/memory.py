"""Memory that a training is said to need (`nestling train --dry-run`) against the peak of one that is run.

    python benchmarks/training/memory.py

Every row is one configuration: three steps of the real trainer, whose tensors are counted as torch makes and frees
them.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from hybrid import hybrid

from nestling.arch.search import SearchSpace
from nestling.arch.submodel import WHOLE, Submodel
from nestling.data.batches import Batch, Stage
from nestling.memory import memory
from nestling.model.nemotron_h import NemotronH
from nestling.recipe import budget_targets
from nestling.sections import StageSection, TrainSection
from nestling.train.checkpoints import Run
from nestling.train.elastic import Distillation, distill
from nestling.train.footprint import Alive
from nestling.train.objective import Objective
from nestling.train.pretrain import initialize

MODEL = hybrid()
LAYERS = range(len(MODEL.hybrid_override_pattern))
FAMILY = {"100%": WHOLE, "50%": Submodel(hidden_size=128)}


def section(**given: Any) -> TrainSection:
    values = {"budgets": ("50%",), "learning_rate": 1e-3, "router_steps": 1, "search_space": {"hidden_size": (128,)}}
    if "router_steps" not in given:
        values["sizes"] = {"50%": {"hidden_size": 128}}
    return TrainSection(**{**values, "stages": (StageSection(steps=3, batch=8, length=256),), **given})


def measured(how: TrainSection, state: Path) -> int:
    """Bytes of all tensors at the worst moment of three steps."""
    stage = how.stages[0]

    def data(stage_index: int, step: int) -> Batch:
        drawn = torch.Generator().manual_seed(step)
        ids = torch.randint(MODEL.vocab_size, (stage.batch, stage.length + 1), generator=drawn)
        return Batch(ids[:, :-1], ids[:, 1:], torch.ones_like(ids[:, 1:], dtype=torch.bool))

    student, teacher = (initialize(NemotronH(MODEL), seed) for seed in (0, 1))
    teacher = teacher.bfloat16() if how.precision == "bf16" else teacher
    kept = {k: v for k, v in how.model_dump().items() if k in Distillation.__dataclass_fields__}
    settings = Distillation(
        **kept | {"stages": (Stage(stage.steps, stage.batch),), "objective": Objective(**how.objective.model_dump())}
    )
    space = SearchSpace.of(MODEL, how.search_space)
    targets = budget_targets(MODEL, how)
    family = FAMILY if how.router_steps == 1 else None
    with Alive() as tracker:
        for model in (student, teacher):
            for parameter in model.parameters():
                tracker.count(parameter)
        distill(
            student,
            teacher,
            data,
            settings,
            targets,
            0,
            Run(state, "", "memory"),
            space=space,
            ranked_layers=LAYERS,
            family=family,
        )
    return tracker.peak


ROUTED = {"hidden_size": range(96, 256, 16), "intermediate_size": range(128, 1024, 64)}
ROWS: dict[str, dict[str, Any]] = {
    "fp32, AdamW": {"optimizer": "adamw"},
    "fp32, the router learning": {"router_steps": 2, "search_space": ROUTED},
    "fp32, Muon": {},
    "fp32, micro-batches of 2": {"micro_batch": 2},
    "fp32, activation checkpointing": {"activation_checkpointing": True},
    "bf16": {"precision": "bf16"},
    "bf16, checkpointing, micro-batches": {"precision": "bf16", "activation_checkpointing": True, "micro_batch": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one row")
    only = parser.parse_args().only
    print("| configuration | estimate | measured peak | estimate / measured |\n|---|---:|---:|---:|")
    for name, given in ROWS.items():
        if only in (None, name):
            how = section(**given)
            with tempfile.TemporaryDirectory() as state:
                peak = measured(how, Path(state))
            said = memory(MODEL, how)
            print(
                f"| {name} | {said['total'] / 1e6:.0f} MB | {peak / 1e6:.0f} MB | {said['total'] / peak:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
