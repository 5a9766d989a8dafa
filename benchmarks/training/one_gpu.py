"""A real elastic training on one GPU: its speed, and its memory, against what `nestling plan` says of it.

    python benchmarks/training/one_gpu.py [--model large] [--batch 16] [--length 4096] [--steps 20]
    OMP_NUM_THREADS=2 python benchmarks/training/one_gpu.py --device cpu --model tiny --batch 4 --length 64 --steps 4

Random weights and tokens, bf16, Muon, two sizes a step (100 and 50 %, cut by hand) and a teacher, in the trainer that
recipes use and in the layout that `plan` finds the cheapest for this GPU. Times are medians over steps, the first three
left out. MFU counts every FLOP, against the data sheet and against what a large product reaches in the same run.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from hybrid import hybrid

from nestling.arch.architecture import Architecture
from nestling.arch.search import SearchSpace
from nestling.bench.large import BILLION
from nestling.bench.machine import circumstances, measure
from nestling.bench.models import TINY, shape
from nestling.data.batches import Batch, Stage
from nestling.dry_run import example, stage_figures
from nestling.errors import NestlingError
from nestling.gpus import GPUS, Gpu
from nestling.layouts import Choice, cheapest
from nestling.memory import memory
from nestling.model.device import find_device
from nestling.model.nemotron_h import NemotronH
from nestling.recipe import budget_targets
from nestling.sections import StageSection, TrainSection
from nestling.train.checkpoints import Run
from nestling.train.distributed import Layout
from nestling.train.elastic import Distillation, distill
from nestling.train.objective import Objective
from nestling.train.pretrain import initialize

LARGER = shape(3072, 4 * "M-M*-M-M*-", vocab_size=131072, n_groups=8, ssm_state_size=128, num_key_value_heads=8)
MODELS = {"tiny": TINY, "small": hybrid(), "large": BILLION, "larger": LARGER}
WARM = 3


def recipe(architecture: Architecture, batch: int, length: int, steps: int) -> TrainSection:
    return TrainSection(
        budgets=("50%",),
        learning_rate=1e-4,
        router_steps=1,
        precision="bf16",
        stages=(StageSection(steps=steps, batch=batch, length=length),),
    )


def here(device: torch.device, name: str | None) -> Gpu | None:
    """The GPU of the table that this is, by its name; None of a CPU."""
    if device.type == "cpu":
        return None
    called = torch.cuda.get_device_name(device).lower()
    key = name or next((key for key in GPUS if key in called), None)
    if key not in GPUS:
        sys.exit(f"{called}: which of {', '.join(GPUS)} is it? Say --gpu")
    return GPUS[key]


def train(architecture: Architecture, how: TrainSection, device: torch.device) -> list[float]:
    """Seconds of each step of the real trainer."""
    stage = how.stages[0]

    def data(stage_index: int, step: int) -> Batch:
        drawn = torch.Generator().manual_seed(step)
        ids = torch.randint(architecture.vocab_size, (stage.batch, stage.length + 1), generator=drawn)
        return Batch(ids[:, :-1], ids[:, 1:], torch.ones_like(ids[:, 1:], dtype=torch.bool))

    kept = {key: value for key, value in how.model_dump().items() if key in Distillation.__dataclass_fields__}
    changed = {"stages": (Stage(stage.steps, stage.batch),), "objective": Objective(**how.objective.model_dump())}
    student, teacher = (initialize(NemotronH(architecture), seed) for seed in (0, 1))
    with tempfile.TemporaryDirectory() as state:
        made = distill(
            student,
            teacher.bfloat16(),
            data,
            Distillation(**kept | changed),
            budget_targets(architecture, how),
            0,
            Run(Path(state), "", "one GPU", every=10**9),
            space=SearchSpace.of(architecture, how.search_space),
            ranked_layers=range(len(architecture.hybrid_override_pattern)),
            family=example(architecture, how),
            layout=Layout(device),
        )
    return [row["seconds"] for row in made.rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--gpu", choices=GPUS, help="which it is, where its name does not say")
    parser.add_argument("--model", default="large", choices=MODELS)
    parser.add_argument("--batch", type=int, default=16, help="rows")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    if given.steps <= WARM:
        sys.exit(f"--steps {given.steps}: more than {WARM} are needed, the first ones are not counted")
    device = find_device(given.device)
    architecture, gpu = MODELS[given.model], here(device, given.gpu)
    how = recipe(architecture, given.batch, given.length, given.steps)
    choice = cheapest(architecture, how, 1, gpu) if gpu else None
    if choice:
        found = choice.layout
        changed = {"micro_batch": found.micro_batch, "activation_checkpointing": found.activation_checkpointing}
        how = how.model_copy(update=changed)
    said, spent = _said(choice, architecture, how), statistics.median(train(architecture, how, device)[WARM:])
    peak = torch.cuda.max_memory_allocated(device) if gpu else None
    family = example(architecture, how)
    flops = stage_figures(architecture, how, family, 0)["flops"] / given.steps
    limit = measure(given.device, given.model == "tiny").flops
    reached = limit.get("bf16", limit["fp32"])
    print("| what | measured |\n|---|---|")
    for name, value in circumstances(given.device).items():
        print(f"| {name} | {value} |")
    rows = f"{given.batch} rows of {given.length:,} tokens, micro_batch {how.micro_batch}"
    again = "" if how.activation_checkpointing else "no "
    print(f"| model | {given.model}, {_count(architecture)} parameters; {rows}; {again}activation checkpointing |")
    print(f"| a step | {spent:.4g} s, {given.batch * given.length / spent:,.0f} tokens/s, {flops:.4g} FLOPs |")
    print(f"| speed | {flops / spent:.4g} FLOP/s, {flops / spent / reached:.2f} of a large product ({reached:.3g}) |")
    if gpu and peak:
        print(f"| MFU | {flops / spent / gpu.flops:.3f} of {gpu.flops:.3g} FLOP/s ({gpu.source}) |")
        print(f"| memory | {peak / 1e9:.2f} GB, {said / 1e9:.2f} said: {said / peak:.2f} of what was measured |")


def _said(choice: Choice | None, architecture: Architecture, how: TrainSection) -> int:
    return choice.memory["total"] if choice else memory(architecture, how)["total"]


def _count(architecture: Architecture) -> str:
    return f"{sum(each.numel() for each in NemotronH(architecture, device='meta').parameters()):,}"


if __name__ == "__main__":
    try:
        main()
    except NestlingError as error:
        sys.exit(f"error: {error}")
