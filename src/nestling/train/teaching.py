"""What the teacher says about part of a batch, and one student's loss against it. Letters as in train/objective.py."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling import ranks
from nestling.data.batches import Batch
from nestling.errors import NestlingError
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import Widths
from nestling.train.chunked import distilled
from nestling.train.objective import Objective


@dataclass(frozen=True)
class Taught:
    """Part of a batch, its share of the whole loss, and what the teacher made of it."""

    part: Batch
    share: float
    answer_Nd: Tensor  # the input of its output head at the counted positions


def micro_batches(data: Batch, rows: int | None, device: torch.device) -> list[list[tuple[Batch, float]]]:
    """A batch in pieces of at most `rows` rows, each to be forgotten before the next: lists of (part, share of loss).

    Rows of one part are of similar length. Without a limit all parts are in one piece. Of several processes each has
    its own rows, and its shares are of the loss of the whole batch. device: where the parts are needed.
    """
    if not data.counted_BL.any():
        raise NestlingError(
            "a batch has nothing to learn: none of its tokens counts; give larger batches or longer rows, or "
            "learn from more of the text (data.loss_on)"
        )
    rank, count = ranks.rank(), ranks.size()
    pieces = 2 if rows is None else math.ceil(len(data.inputs_BL) / (rows * count))
    parts = [(part.to(device), share) for part, share in data.parts(pieces, rank, count)]
    return [parts] if rows is None else [[part] for part in parts]


@torch.no_grad()
def teach(teacher: NemotronH, part: Batch, share: float) -> Taught:
    """Ask the teacher once, for any number of students."""
    return Taught(part, share, _asked(teacher, part))


def student_loss(
    student: NemotronH, widths: Widths, teacher: NemotronH, objective: Objective, taught: Taught
) -> Tensor:
    """The objective of one student on one part, mean over its counted positions."""
    part = taught.part
    student_Nd, targets_N = _asked(student, part, widths), part.targets_BL[part.counted_BL]
    student_vd, teacher_vd = student.head_weight(widths), teacher.head_weight()
    return distilled(objective, student_Nd, student_vd, taught.answer_Nd, teacher_vd, targets_N)


def _asked(model: NemotronH, part: Batch, widths: Widths | None = None) -> Tensor:
    return model.hidden(part.inputs_BL, widths, documents_BL=part.documents_BL)[part.counted_BL]
