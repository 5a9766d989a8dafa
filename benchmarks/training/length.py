"""Memory of one training step against the length of its sequence, on one rank.

    python benchmarks/training/length.py [--packed] [--longest 32768]

A step as `nestling train` makes it, of one row: activation checkpointing, KL in chunks, a hybrid of seven layers. All
tensors are counted as torch makes and frees them, weights, gradients and teacher included; memory is no timing, so
the load of the machine does not matter. --packed: the row holds documents of 512 tokens.
"""

import argparse

import torch

from nestling.arch.architecture import Architecture
from nestling.data.batches import Batch
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import hard
from nestling.train.footprint import Alive
from nestling.train.objective import Objective
from nestling.train.pretrain import initialize
from nestling.train.teaching import student_loss, teach

MODEL = Architecture(
    "M-M*-M-",
    vocab_size=8192,
    hidden_size=192,
    intermediate_size=768,
    n_groups=2,
    mamba_num_heads=8,
    mamba_head_dim=48,
    ssm_state_size=64,
    num_key_value_heads=2,
    num_attention_heads=6,
    head_dim=32,
)
OBJECTIVE = Objective(chunk=512)
DOCUMENT = 512


def peak(length: int, *, packed: bool = False, model: Architecture = MODEL) -> int:
    """Bytes of all tensors at the worst moment of a step."""
    student, teacher = (initialize(NemotronH(model), seed) for seed in (0, 1))
    teacher.requires_grad_(False)
    student.gradient_checkpointing = True
    ids = torch.randint(model.vocab_size, (1, length + 1), generator=torch.Generator().manual_seed(0))
    documents = torch.arange(length)[None] // DOCUMENT if packed else None
    row = Batch(ids[:, :-1], ids[:, 1:], torch.ones(1, length, dtype=torch.bool), documents_BL=documents)
    with Alive() as alive:
        for parameter in [*student.parameters(), *teacher.parameters()]:
            alive.count(parameter)
        taught = teach(teacher, row, 1.0)
        student_loss(student, hard(model), teacher, OBJECTIVE, taught).backward()
    return alive.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--longest", type=int, default=32768)
    given = parser.parse_args()
    print("| tokens | peak | per token |\n|---:|---:|---:|")
    length = 1024
    while length <= given.longest:
        found = peak(length, packed=given.packed)
        print(f"| {length:,} | {found / 1e6:,.1f} MB | {found / length / 1e3:,.1f} kB |", flush=True)
        length *= 2


if __name__ == "__main__":
    main()
