"""What one step of a training holds besides its weights, found by a step of tensors that have shapes and no values.

The real forward and backward passes run on torch's fake tensors, so this follows whatever the model does; nothing is
allocated. They have as many positions as are asked for: which moment of a step is the worst depends on their number.
"""

import weakref
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nestling.arch.architecture import Architecture
from nestling.model.native.library import counting, expected
from nestling.model.nemotron_h import NemotronH
from nestling.sections import chunk_positions
from nestling.train.chunked import distilled
from nestling.train.objective import Objective
from nestling.train.optimize import Optimization

LONGEST = 2**15  # positions that are tried; from there on every phase of a step grows with their number
LONGEST_SHARDED = 2**12  # where no copies of weights come and go, which in shorter sequences are the most
CHUNKS = 4  # of the loss, likewise
Phases = dict[str, int]
"""Bytes at the worst moment of each phase of a step."""


class Alive(TorchDispatchMode):
    """Counts the bytes of the storages that operations returned and that still exist: now, and at worst per phase."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.phase = ""  # to be set from outside
        self.peaks: Phases = {}
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return out

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.now)
        weakref.finalize(storage, self._forget, key, size)

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def footprint(
    architecture: Architecture,
    how: Optimization,
    objective: Objective,
    positions: int,
    *,
    sharded: bool = False,
    kernels: bool = False,
) -> int:
    """Bytes at the worst moment of a step on `positions` tokens, besides weights, their gradients and the optimizer.

    Activations of the student, what the teacher said, logits of a chunk, and what is there for a moment. In each phase
    of a step it is linear in the number of positions and of blocks of each kind, so that few of them tell it all; which
    phase is the worst depends on how many there are. sharded: the weights of blocks come in the precision that they are
    computed in, as ranks exchange them, and need no copies; gradients of embeddings, head and last norm, which are
    whole until the ranks have summed them, are part of it. kernels: those of a CPU take part, where there are any
    (model/native/), as in a training here; without, torch's operations are counted, as on a GPU.
    """
    kernels = kernels and expected()
    chunk = objective.chunk or chunk_positions(architecture.vocab_size, 2 if how.precision == "bf16" else 4)
    longest = max(LONGEST_SHARDED if sharded else LONGEST, CHUNKS * chunk)
    how = replace(how, micro_batch=how.micro_batch and 1)  # whether there is one is all that matters
    if positions <= longest:
        return max(_of_all_blocks(architecture, how, objective, max(positions, 2), sharded, kernels).values())
    whole, half = (
        _of_all_blocks(architecture, how, objective, tried, sharded, kernels) for tried in (longest, longest // 2)
    )
    steps = (positions - longest) / (longest - longest // 2)
    return max(round(whole[phase] + (whole[phase] - half[phase]) * steps) for phase in whole)


@lru_cache(maxsize=64)
def _of_all_blocks(
    architecture: Architecture, how: Optimization, objective: Objective, length: int, sharded: bool, kernels: bool
) -> Phases:
    counts = Counter(architecture.hybrid_override_pattern)

    def worst(pattern: str) -> Phases:
        token = counting.set(kernels)
        try:
            return _worst(replace(architecture, hybrid_override_pattern=pattern), how, objective, length, sharded)
        finally:
            counting.reset(token)

    once = worst(each := "".join(counts))
    more = [(count - 1, worst(each + kind)) for kind, count in counts.items() if count > 1]
    return {phase: size + sum(count * (other[phase] - size) for count, other in more) for phase, size in once.items()}


def _worst(architecture: Architecture, how: Optimization, objective: Objective, length: int, sharded: bool) -> Phases:
    narrow = torch.bfloat16 if how.precision == "bf16" else torch.float32
    with FakeTensorMode(allow_non_fake_inputs=True):
        student, teacher = (NemotronH(architecture, dtype=dtype) for dtype in (narrow if sharded else None, narrow))
        student.ends = NemotronH(architecture).ends
        teacher.requires_grad_(False)
        student.gradient_checkpointing = how.activation_checkpointing
        summed = student.layers if sharded else student  # whole gradients of the ends come anew with each pass
        for parameter in summed.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with Alive() as alive:
            for parameter in [*student.parameters(), *teacher.parameters()]:
                alive.count(parameter)
                alive.known.update([parameter.grad.untyped_storage()._cdata] if parameter.grad is not None else [])
            before = alive.now
            _step(student, teacher, how, objective, torch.zeros(1, length, dtype=torch.long), alive)
        return {phase: peak - before for phase, peak in alive.peaks.items() if phase}


def _step(
    student: NemotronH, teacher: NemotronH, how: Optimization, objective: Objective, ids: Tensor, alive: Alive
) -> None:
    """As in train/teaching.py, where every position counts: a batch is two parts, a micro-batch is one."""
    parts = [ids] if how.micro_batch else ids.chunk(2, 1)
    with how.autocast(ids):
        alive.phase = "teacher"
        with torch.no_grad():
            taught = [_counted(teacher.hidden(part)) for part in parts]
        losses = [
            _loss(student, teacher, objective, part, said, alive) for part, said in zip(parts, taught, strict=True)
        ]
    alive.phase = "backward of the loss"
    torch.stack(losses).sum().backward()


def _loss(
    student: NemotronH, teacher: NemotronH, objective: Objective, ids: Tensor, taught: Tensor, alive: Alive
) -> Tensor:
    alive.phase = "student"
    entered = student.layers[0].register_forward_pre_hook(lambda _, given: _then(given[0], alive, "embeddings"))
    hidden, head, taught_head = student.hidden(ids), student.head_weight(), teacher.head_weight()
    entered.remove()
    _then(hidden, alive, "blocks")
    alive.phase = "loss"
    return distilled(objective, _counted(hidden), head, taught, taught_head, ids[0])


def _counted(hidden: Tensor) -> Tensor:
    """What counts is copied out."""
    return hidden[0, torch.arange(hidden.shape[1])]


def _then(between: Tensor, alive: Alive, part: str) -> None:
    """Once its gradient is there, the phase is the backward pass of what came before it."""
    between.register_hook(lambda slope: setattr(alive, "phase", f"backward of the {part}"))
