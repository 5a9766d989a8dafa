"""Losses of logits by a kernel (what they are: train/objective.py)."""

import struct

import torch
from torch import Tensor

from nestling.model.native.library import call, runs, summed_in


def suits(student: Tensor, teacher: Tensor | None) -> bool:
    both = (student,) if teacher is None else (student, teacher)
    return student.ndim == 2 and student.numel() > 0 and runs(*both, narrow=True)


def losses(
    student: Tensor, teacher: Tensor | None, targets: Tensor, temperature: float, kl: float, ce: float, share: float
) -> tuple[Tensor, Tensor]:
    """Of every row of logits [N, v] its loss [N], and its gradient times share [N, v], which may take the place of the
    logits.

    temperature is of kl's distributions; it must be 1 where ce is not 0. The teacher's logits may be lost.
    """
    assert temperature == 1 or ce == 0
    student, teacher = student.contiguous(), None if teacher is None else teacher.contiguous()
    found = student.new_empty(len(student), dtype=summed_in(student.dtype))
    numbers = struct.unpack("4q", struct.pack("4d", temperature, kl, ce, share))
    of = [student, teacher, targets.to(torch.int64).contiguous()]
    call("losses", student.dtype, *student.shape, torch.get_num_threads(), *of, *numbers, found)
    return found, student
