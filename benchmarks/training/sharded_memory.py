"""Memory that `nestling plan --gpus` says of a rank, against what two ranks of FSDP2 hold.

    torchrun --nproc-per-node 2 benchmarks/training/sharded_memory.py [--device cuda]

Three steps by hand of a small hybrid, sharded per block as a training shards it, with AdamW. On the CPU the peak is
read off the events of torch's allocator, on CUDA it is max_memory_allocated. One row per configuration, of rank 0.
"""

import argparse
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.profiler import ProfilerActivity, profile

from nestling.arch.architecture import Architecture
from nestling.data.batches import Batch
from nestling.memory import Layout, memory_of_rank
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import hard
from nestling.sections import StageSection, TrainSection
from nestling.train.objective import Objective
from nestling.train.pretrain import initialize
from nestling.train.teaching import student_loss, teach

MODEL = Architecture(
    "M-M*-M-M*-",
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=1024,
    n_groups=4,
    mamba_num_heads=16,
    mamba_head_dim=32,
    ssm_state_size=64,
    num_key_value_heads=2,
    num_attention_heads=8,
    head_dim=32,
)
LENGTH, STEPS, CHUNK = 256, 3, 128
ROWS = {
    "fp32": ("fp32", 4, False, True),
    "fp32, checkpointing": ("fp32", 4, True, True),
    "fp32, whole weights kept": ("fp32", 1, True, False),
    "fp32, short": ("fp32", 1, True, True),
    "bf16": ("bf16", 4, False, True),
    "bf16, checkpointing": ("bf16", 1, True, True),
}


def sharded(precision: str, device: str, *, reshard: bool, trained: bool) -> NemotronH:
    """Blocks are exchanged in the precision that is computed in; embeddings, head and last norm as they are stored."""
    narrow = torch.bfloat16 if precision == "bf16" else torch.float32
    model = initialize(NemotronH(MODEL), int(trained)).to(device)
    model = model if trained else model.to(narrow).requires_grad_(False)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(narrow, torch.float32, cast_forward_inputs=False)
    for block in model.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=exact)
    register_fsdp_forward_method(model, "hidden")
    return model


def train(precision: str, rows: int, again: bool, reshard: bool, device: str) -> int:
    """Bytes at the worst moment of the steps, after the models are laid out."""
    activities = [ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True, acc_events=True) as profiled:
        student = sharded(precision, device, reshard=reshard, trained=True)
        teacher = sharded(precision, device, reshard=reshard, trained=False)
        student.gradient_checkpointing = again
        optimizer = torch.optim.AdamW(student.parameters())
        began = time.time_ns()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for step in range(STEPS):
            drawn = torch.Generator().manual_seed(step)
            ids = torch.randint(MODEL.vocab_size, (rows, LENGTH + 1), generator=drawn).to(device)
            counted = torch.ones(rows, LENGTH, dtype=torch.bool, device=device)
            row, objective = Batch(ids[:, :-1], ids[:, 1:], counted), Objective(chunk=CHUNK)
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                taught = teach(teacher, objective, row, 1.0)
                loss = student_loss(student, hard(MODEL), teacher, objective, taught)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return _peak(profiled, began)


def _peak(profiled: Any, began: int) -> int:
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now) if event.start_ns() >= began else now
    return peak


def said(precision: str, rows: int, again: bool, reshard: bool, device: str) -> dict[str, int]:
    how = TrainSection(
        budgets=("50%",),
        learning_rate=1e-3,
        router_steps=1,
        optimizer="adamw",
        precision=precision,
        objective={"chunk": CHUNK},
        stages=(StageSection(steps=STEPS, batch=rows * dist.get_world_size(), length=LENGTH),),
    )
    layout = Layout(dist.get_world_size(), rows, again, reshard)
    return memory_of_rank(MODEL, how, layout, gpu=device == "cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", help="one row")
    given = parser.parse_args()
    device, only = given.device, given.only
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    if dist.get_rank() == 0:
        print("| configuration | estimate | measured peak | estimate / measured |\n|---|---:|---:|---:|")
    for name, row in ROWS.items():
        if only not in (None, name):
            continue
        measured, estimate = train(*row, device), said(*row, device)["total"]
        if dist.get_rank() == 0:
            print(
                f"| {name} | {estimate / 1e6:.0f} MB | {measured / 1e6:.0f} MB | {estimate / measured:.2f} |",
                flush=True,
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
