"""Memory that `nestling plan --gpus` says of a rank, against what two ranks of FSDP2 hold.

    torchrun --nproc-per-node 2 benchmarks/training/sharded_memory.py [--device cuda]

Steps of a small hybrid, sharded as a training shards it, with AdamW, on two sizes a step. On the CPU memory is read off
the events of torch's allocator, on CUDA it is max_memory_allocated. One row per configuration, of rank 0.
"""

import argparse
import gc
from itertools import accumulate
from typing import Any

import torch
from hybrid import hybrid
from torch.profiler import ProfilerActivity, profile

from nestling import ranks
from nestling.arch.submodel import WHOLE, Submodel
from nestling.data.batches import Batch
from nestling.memory import Layout, memory_of_rank
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import hard
from nestling.sections import Optimization as Section
from nestling.sections import StageSection, TrainSection
from nestling.train.distributed import Layout as Spread
from nestling.train.distributed import spread
from nestling.train.objective import Objective
from nestling.train.optimize import Optimization
from nestling.train.pretrain import initialize
from nestling.train.teaching import student_loss, teach

MODEL = hybrid()
SIZES = (WHOLE, Submodel(hidden_size=128))
LENGTH, STEPS, CHUNK = 256, 4, 128
ROWS = {
    "fp32": ("fp32", 4, False, True),
    "fp32, checkpointing": ("fp32", 4, True, True),
    "fp32, whole weights kept": ("fp32", 1, True, False),
    "fp32, short": ("fp32", 1, True, True),
    "bf16": ("bf16", 4, False, True),
    "bf16, checkpointing": ("bf16", 1, True, True),
}


def train(name: str, device: str) -> int:
    """Bytes at the worst moment of a step of this rank: what it holds between steps, and what the step adds at most.

    The events of torch's allocator lack what threads of gloo free, so that what they add up to grows from step to step.
    What is held is counted by the tensors there are, and of the steps the one counts that is seen to free most.
    """
    how, reshard = section(name), ROWS[name][3]
    settings = Optimization(**how.model_dump(include=set(Section.model_fields)))
    objective = Objective(**how.objective.model_dump())
    student, teacher = (initialize(NemotronH(MODEL), seed) for seed in (0, 1))
    settings.prepare(student, teacher)
    layout = Spread(torch.device(device), reshard)
    spread(student, settings, layout, trained=True)
    teacher = teacher.to(torch.bfloat16) if how.precision == "bf16" else teacher
    spread(teacher.requires_grad_(False), settings, layout, trained=False)
    optimizer = torch.optim.AdamW(student.parameters())
    added = []
    for step in range(STEPS):
        held, _ = tensors_held(), torch.cuda.reset_peak_memory_stats() if device == "cuda" else None
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
            one_step(student, teacher, objective, settings, ROWS[name][1], step)
            optimizer.step()
            optimizer.zero_grad()
        added.append(_peak(profiled))
    return torch.cuda.max_memory_allocated() if device == "cuda" else held + min(added[1:])


def one_step(
    student: NemotronH, teacher: NemotronH, objective: Objective, how: Optimization, rows: int, step: int
) -> None:
    """Gradients of two sizes on this rank's rows, as a hard step leaves them."""
    drawn = torch.Generator().manual_seed(step)
    device = next(teacher.parameters()).device
    ids = torch.randint(MODEL.vocab_size, (rows, LENGTH + 1), generator=drawn).to(device)
    row = Batch(ids[:, :-1], ids[:, 1:], torch.ones(rows, LENGTH, dtype=torch.bool, device=device))
    with how.autocast(ids):
        taught = teach(teacher, row, 1.0)
        for size in SIZES:
            student_loss(student, hard(MODEL, size), teacher, objective, taught).backward()


def tensors_held() -> int:
    """Bytes of the storages of all tensors of this process."""
    gc.collect()
    stored = {}
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter):
            storage = found.untyped_storage()
            stored[storage._cdata] = storage.nbytes()
    return sum(stored.values())


def _peak(profiled: Any) -> int:
    """Bytes that are allocated at the worst moment, of those that were not before."""
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(accumulate(sizes))


def section(name: str) -> TrainSection:
    precision, rows, again, _ = ROWS[name]
    return TrainSection(
        budgets=("50%",),
        learning_rate=1e-3,
        router_steps=1,
        sizes={"50%": {"hidden_size": 128}},
        optimizer="adamw",
        precision=precision,
        activation_checkpointing=again,
        objective={"chunk": CHUNK},
        stages=(StageSection(steps=STEPS, batch=rows * ranks.size(), length=LENGTH),),
    )


def said(name: str, device: str) -> int:
    _, rows, again, reshard = ROWS[name]
    layout = Layout(ranks.size(), rows, again, reshard)
    return memory_of_rank(MODEL, section(name), layout, gpu=device == "cuda")["total"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", choices=ROWS, help="one row")
    given = parser.parse_args()
    with ranks.together():
        print("| configuration | estimate | measured peak | estimate / measured |\n|---|---:|---:|---:|")
        for name in [given.only] if given.only else ROWS:
            measured, estimate = train(name, given.device), said(name, given.device)
            print(
                f"| {name} | {estimate / 1e6:.0f} MB | {measured / 1e6:.0f} MB | {estimate / measured:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
