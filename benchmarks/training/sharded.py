"""What ranks exchange in a hard step: whole blocks, as FSDP2 gathers them, against the rows that a size needs.

    torchrun --nproc-per-node 2 benchmarks/training/sharded.py
    python benchmarks/training/sharded.py --recipe runs/nano-12b-v2.toml --ranks 64 --flops 4e14 --link 50e9

The first form counts the bytes of the collectives in one step of a small hybrid, per size. The second is arithmetic for
a recipe's sizes: bytes of a rank per micro-batch, and the time of its FLOPs beside that of its bytes.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from hybrid import hybrid
from torch.utils._python_dispatch import TorchDispatchMode

from nestling import ranks
from nestling.arch.architecture import Architecture
from nestling.arch.cost import cost
from nestling.arch.submodel import WHOLE, Submodel, complete, tensors
from nestling.data.batches import Batch
from nestling.dry_run import example
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import hard
from nestling.recipe import parent_architecture, read_recipe
from nestling.train.distributed import spread
from nestling.train.objective import Objective
from nestling.train.optimize import Optimization
from nestling.train.pretrain import initialize
from nestling.train.teaching import student_loss, teach

MODEL = hybrid(512)
SIZES = {
    "100%": WHOLE,
    "70%": Submodel(hidden_size=208, intermediate_size=832),
    "40%": Submodel(hidden_size=160, intermediate_size=640, mamba_num_heads=12, layers=tuple(range(8))),
}
HOW = Optimization(learning_rate=1e-3, warmup=0, decay=0.0, weight_decay=0.0, optimizer="adamw")


class Sent(TorchDispatchMode):
    """Bytes of the whole weights that are gathered, and of the whole gradients that are summed."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("c10d::") and ("gather" in name or "scatter" in name):
            given = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.bytes["gathered" if "gather" in name else "summed"] += max(t.nbytes for t in given)
        return func(*args, **(kwargs or {}))


def needed(architecture: Architecture, submodel: Submodel) -> tuple[int, int]:
    """Weights inside the blocks of a size: of its blocks whole, and of the rows and columns that it computes with."""
    kept = set(complete(architecture, submodel).layers)
    blocks = sum(t.numel for t in tensors(architecture) if t.layer in kept)
    return blocks, sum(t.numel for t in tensors(architecture, submodel) if t.layer is not None)


def measure() -> None:
    """Per size, one step of two rows a rank."""
    student, teacher = (spread(initialize(NemotronH(MODEL), seed), HOW, trained=seed == 0) for seed in (0, 1))
    ids = torch.randint(MODEL.vocab_size, (2, 129), generator=torch.Generator().manual_seed(ranks.rank()))
    part = Batch(ids[:, :-1], ids[:, 1:], torch.ones(2, 128, dtype=torch.bool))
    taught = teach(teacher.requires_grad_(False), part, 1.0)
    print(
        "| size | gathered | summed | whole blocks, ends aside | needed rows | share |\n|---|---:|---:|---:|---:|---:|"
    )
    for name, submodel in SIZES.items():
        with Sent() as sent:
            student_loss(student, hard(MODEL, submodel), teacher, Objective(), taught).backward()
        blocks, rows = needed(MODEL, submodel)
        print(
            f"| {name} | {sent.bytes['gathered'] / 1e6:.1f} MB | {sent.bytes['summed'] / 1e6:.1f} MB | "
            f"{4 * blocks / 1e6:.1f} MB | {4 * rows / 1e6:.1f} MB | {rows / blocks:.0%} |",
            flush=True,
        )


def estimate(given: argparse.Namespace) -> None:
    """bf16 weights twice and float32 gradients once, of one micro-batch of one row."""
    recipe = read_recipe(given.recipe)
    architecture, length = parent_architecture(recipe), recipe.train.stages[0].length or 0
    print(f"{given.ranks} ranks, {length} tokens, {given.flops:.3g} FLOP/s, {given.link:.3g} B/s")
    print("| size | whole blocks | needed rows | compute | whole blocks' time | needed rows' time |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, submodel in example(architecture, recipe.train).items():
        sent = [8 * count * (given.ranks - 1) / given.ranks for count in needed(architecture, submodel)]
        forward = length * cost(architecture, submodel).flops(length // 2)  # the mean context of a causal model
        seconds = 4 * forward / given.flops  # with backward, and forward once more for it
        times = " | ".join(f"{each / given.link:.2f} s" for each in sent)
        print(f"| {name} | {sent[0] / 1e9:.1f} GB | {sent[1] / 1e9:.1f} GB | {seconds:.2f} s | {times} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--flops", type=float, default=4e14, help="reached by a rank, per second")
    parser.add_argument("--link", type=float, default=50e9, help="bytes a second that a rank sends")
    given = parser.parse_args()
    if given.recipe is not None:
        estimate(given)
        return
    with ranks.together():
        measure()


if __name__ == "__main__":
    main()
