"""How much memory a training needs, and how much there is: asked before anything is started."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nestling.arch.architecture import Architecture
from nestling.arch.cost import BF16, FP32
from nestling.arch.submodel import tensors
from nestling.errors import NestlingError
from nestling.recipe import Recipe, parent_architecture
from nestling.sections import LESS_MEMORY, TrainSection
from nestling.sections import Optimization as Section
from nestling.units import decimal

OPTIMIZER_TENSORS = {"muon": 1, "adamw": 2}  # float32 tensors per parameter
BLOCKS_AT_HAND = 2  # whose whole weights a rank holds at once
GPU_CHUNK, SCAN_TENSORS = 128, 3  # positions of a chunk there (model/ssd.py); [T, S] per head and chunk, at a time


@dataclass(frozen=True)
class Layout:
    """How a training is spread over ranks, one GPU each, that all hold a shard of everything (FSDP2).

    micro_batch: rows that a rank computes at a time. reshard: whether it gives a block's whole weights up after its
    forward pass, and gathers them again for its backward pass. offload: keep the teacher's shards in the CPU's memory.
    replicas: groups of ranks that hold everything.
    """

    ranks: int
    micro_batch: int
    activation_checkpointing: bool
    reshard: bool = True
    offload: bool = False
    replicas: int = 1

    @property
    def shards(self) -> int:
        """Ranks that hold all weights together."""
        return self.ranks // self.replicas


def memory(architecture: Architecture, how: TrainSection, *, gpu: bool = False) -> dict[str, int]:
    """Bytes that the worst moment of a step needs on one process, this machine's CPU or a GPU, by what they are for.

    "step" is what exists besides weights, gradients and optimizer: activations, what the teacher said, the logits of a
    chunk (train/footprint.py). It is left out where the length of a sequence is not known.
    """
    found = _held(architecture, how)
    rows = ((min(how.micro_batch or stage.batch, stage.batch), stage.length) for stage in how.stages)
    positions = [count * length for count, length in rows if length is not None]
    if positions:
        found["step"] = _step(architecture, how, max(positions), gpu=gpu)
    return found | {"total": sum(found.values())}


def memory_here(recipe: Recipe, ranks: int, here: int | None) -> dict[str, int]:
    """`memory` on this machine, which runs so many of all ranks on its CPU; None: of one rank, on its GPU."""
    architecture, how, given = parent_architecture(recipe), recipe.train, recipe.layout
    if here is not None and ranks == 1:
        return memory(architecture, how)
    rows = how.micro_batch or -(-max(stage.batch for stage in how.stages) // ranks)
    again, offload = how.activation_checkpointing, given.offload_teacher and here is None
    layout = Layout(ranks, rows, again, given.reshard, offload, given.replicas)
    found = memory_of_rank(architecture, how, layout, gpu=here is None)
    return {name: (here or 1) * size for name, size in found.items()}


def memory_of_rank(
    architecture: Architecture, how: TrainSection, layout: Layout, *, gpu: bool = True
) -> dict[str, int]:
    """Bytes that the worst moment of a step needs on one rank of a layout, by what they are for.

    "activations" is the whole step besides the logits of one chunk, the student's and the teacher's in float32. gpu:
    add what the chunked scan works in there, which on a CPU fits the cache.
    """
    positions = layout.micro_batch * max(stage.length or 0 for stage in how.stages)
    spread = how.model_copy(
        update={"micro_batch": layout.micro_batch, "activation_checkpointing": layout.activation_checkpointing}
    )
    held = {name: -(-size // layout.shards) for name, size in _held(architecture, how).items()}
    if layout.offload:
        held["teacher"] = 0
    step = _step(architecture, spread, positions, sharded=layout.ranks > 1, gpu=gpu)
    chunk = min(how.objective.positions(architecture.vocab_size, _narrow(how)), positions)
    logits = min(2 * FP32 * chunk * architecture.vocab_size, step)
    found = held | {
        "activations": step - logits,
        "logits chunk": logits,
        "whole blocks": _whole(architecture, how, layout),
    }
    if gpu and "M" in architecture.hybrid_override_pattern:
        found["scan"] = SCAN_TENSORS * FP32 * positions * GPU_CHUNK * architecture.mamba_num_heads
    return found | {"total": sum(found.values())}


def _held(architecture: Architecture, how: TrainSection) -> dict[str, int]:
    """What exists all the time, whole."""
    stored = [tensor for tensor in tensors(architecture) if not tensor.buffer]
    total = sum(tensor.numel for tensor in stored)
    inside = sum(tensor.numel for tensor in stored if tensor.layer is not None and len(tensor.shape) == 2)
    optimizer = OPTIMIZER_TENSORS[how.optimizer] * inside + OPTIMIZER_TENSORS["adamw"] * (total - inside)
    return {
        "master weights": FP32 * total,
        "gradients": FP32 * total,
        "optimizer": FP32 * optimizer,
        "teacher": _narrow(how) * total,
    }


def _narrow(how: TrainSection) -> int:
    """Bytes per weight that is computed with."""
    return BF16 if how.precision == "bf16" else FP32


def _whole(architecture: Architecture, how: TrainSection, layout: Layout) -> int:
    """What ranks exchange: weights that are whole for a while, and gradients on their way to their shards.

    Embeddings, head and last norm are whole from the forward pass to the end of the backward pass, the student's in
    float32 (their gradients count as activations). Of the blocks, besides the one at hand the next is on its way (or
    all have stayed); the gradients of the one at hand are whole in what is computed with, and in float32 where they are
    summed.
    """
    sizes = Counter[int | None]()
    for tensor in tensors(architecture):
        sizes[tensor.layer] += 0 if tensor.buffer else tensor.numel
    ends, narrow = sizes.pop(None), _narrow(how)
    if layout.ranks == 1:  # of a teacher that is kept away, what is outside of blocks stays, and one block visits
        return narrow * (ends + max(sizes.values())) if layout.offload else 0
    weights = BLOCKS_AT_HAND * max(sizes.values()) if layout.reshard else sum(sizes.values())
    return (FP32 + narrow) * ends + narrow * weights + (narrow + FP32) * max(sizes.values())


def _step(architecture: Architecture, how: TrainSection, positions: int, *, gpu: bool, sharded: bool = False) -> int:
    from nestling.train.footprint import footprint
    from nestling.train.objective import Objective
    from nestling.train.optimize import Optimization

    settings = Optimization(**how.model_dump(include=set(Section.model_fields)))
    objective = Objective(**how.objective.model_dump())
    kernels = not gpu and bool(how.sizes)  # a router's soft masks go past most of them
    return footprint(architecture, settings, objective, positions, sharded=sharded, kernels=kernels)


def check_memory(needed: Mapping[str, int], what: str, free: int | None = None) -> None:
    """Refuse a training that will not fit into `free` bytes, by default what this process may still take.

    Nothing is said where the system does not tell.
    """
    free = available() if free is None else free
    if free is None or needed["total"] <= free:
        return
    parts = ", ".join(f"{name} {decimal(size)}" for name, size in needed.items() if size and name != "total")
    raise NestlingError(
        f"{what} needs about {decimal(needed['total'])} of memory ({parts}), and {decimal(free)} are free. "
        f"{LESS_MEMORY}; nothing was started"
    )


def available() -> int | None:
    """Bytes that this process may still take, by the system's own word: of the machine, and of its control group."""
    lines = _lines(Path("/proc/meminfo"))
    machine = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    limit, used, parts = (_lines(Path("/sys/fs/cgroup") / f"memory.{name}") for name in ("max", "current", "stat"))
    cached = sum(int(line.split()[1]) for line in parts if line.startswith("file "))  # given back when it is needed
    group = [int(limit[0]) - int(used[0]) + cached] if limit and used and limit[0].isdigit() else []
    return min(machine + group, default=None)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
