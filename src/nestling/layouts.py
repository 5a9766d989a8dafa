"""Which layout of a training over GPUs is the cheapest that fits, and what would fit where none does."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from nestling.arch.architecture import Architecture
from nestling.errors import NestlingError
from nestling.gpus import GPUS, Gpu
from nestling.memory import Layout, memory_of_rank
from nestling.sections import TrainSection

USABLE = 0.9
"""Share of a GPU's memory that tensors may take: the rest is for CUDA, the buffers of collectives and fragmentation."""
MOST_RANKS = 4096
Bytes = dict[str, int]


@dataclass(frozen=True)
class Choice:
    """A layout, what it needs on a rank, and whether that fits."""

    layout: Layout
    memory: Bytes
    fits: bool


def cheapest(architecture: Architecture, how: TrainSection, ranks: int, gpu: Gpu) -> Choice:
    """The first layout that fits, cheapest first; where none does the one that needs least."""
    check_ranks([stage.batch for stage in how.stages], ranks, f"--gpus {ranks}")
    tried: list[Choice] = []
    for kind in kinds(ranks):
        smallest = _choice(architecture, how, kind, gpu)
        if smallest.fits:
            larger = (_choice(architecture, how, replace(kind, micro_batch=rows), gpu) for rows in _rows(how, ranks))
            return next((choice for choice in larger if choice.fits), smallest)
        tried.append(smallest)
    return min(tried, key=lambda choice: choice.memory["total"])


def _choice(architecture: Architecture, how: TrainSection, layout: Layout, gpu: Gpu) -> Choice:
    found = memory_of_rank(architecture, how, layout)
    return Choice(layout, found, found["total"] <= USABLE * gpu.memory)


def kinds(ranks: int) -> Iterator[Layout]:
    """Every layout with a micro-batch of one row, cheapest first.

    Computing blocks again costs a third of a step, a teacher in the CPU's memory costs its transfers, giving whole
    weights up costs another gathering of them.
    """
    for again, offload, reshard in product((False, True), (False, True), (False, True)):
        if ranks > 1 or reshard:  # one rank has nothing to gather
            yield Layout(ranks, 1, again, reshard, offload)


def _rows(how: TrainSection, ranks: int) -> Iterator[int]:
    """Larger micro-batches, the largest first: each costs the gatherings of weights once."""
    rows = min(stage.batch for stage in how.stages) // ranks
    yield from (2**power for power in range(rows.bit_length() - 1, 0, -1))


def check_ranks(batches: Sequence[int], ranks: int, asked: str, has_parent: bool = False) -> None:
    """Refuse a number of ranks that some stage's batch cannot be shared out to."""
    shared = math.gcd(*batches)
    if shared % ranks == 0:
        return
    allowed = [count for count in range(1, shared + 1) if shared % count == 0]
    near = " and ".join(map(str, sorted(sorted(allowed, key=lambda count: abs(count - ranks))[:2])))
    raise NestlingError(
        f"{asked}: every batch ({', '.join(map(str, batches))} rows{', the parent first' * has_parent}) must be a "
        f"multiple of it; the nearest that fits: {near}"
    )


def would_fit(architecture: Architecture, how: TrainSection, ranks: int, gpu: Gpu) -> list[str]:
    """What to change, each for itself, so that a training fits which does not."""
    shared = math.gcd(*(stage.batch for stage in how.stages))
    more = (count for count in range(2 * ranks, min(shared, MOST_RANKS) + 1, ranks) if shared % count == 0)
    enough = next((count for count in more if cheapest(architecture, how, count, gpu).fits), None)
    needed = cheapest(architecture, how, ranks, gpu).memory["total"]
    larger = sorted((g for g in GPUS.values() if needed <= USABLE * g.memory), key=lambda g: g.memory)
    length = next((half for half in _shorter(how) if _fits_at(architecture, how, ranks, gpu, half)), None)
    return [
        *([f"{enough} GPUs of this kind"] if enough else []),
        *([f"as many {larger[0].name} ({larger[0].memory / 1e9:.0f} GB)"] if larger else []),
        *([f"shorter sequences, of {length:,} tokens for example"] if length else []),
    ]


def _shorter(how: TrainSection) -> Iterator[int]:
    length = max(stage.length or 0 for stage in how.stages)
    while (length := length // 2) >= 512:
        yield length


def _fits_at(architecture: Architecture, how: TrainSection, ranks: int, gpu: Gpu, length: int) -> bool:
    stages = tuple(stage.model_copy(update={"length": min(stage.length or length, length)}) for stage in how.stages)
    smallest = Layout(ranks, 1, activation_checkpointing=True, reshard=True, offload=True)
    found = memory_of_rank(architecture, how.model_copy(update={"stages": stages}), smallest)
    return found["total"] <= USABLE * gpu.memory
