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
from nestling.train.chunked import distilled, most_at_once
from nestling.train.objective import Objective, cross_entropy, distillation


@dataclass(frozen=True)
class Taught:
    """Part of a batch, its share of the whole loss, and what the teacher made of it."""

    part: Batch
    share: float
    answer: Tensor  # its logits [B, L, v] or, if chunked, the input of its output head at the counted positions, [N, d]
    chunked: bool


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
def teach(teacher: NemotronH, objective: Objective, part: Batch, share: float) -> Taught:
    """Ask the teacher once, for any number of students. Chunked where the logits of the part exceed one chunk."""
    most = most_at_once(objective, teacher.architecture.vocab_size)
    chunked = objective.hidden > 0 or part.inputs_BL.numel() > most
    if chunked:
        hidden_BLd = teacher.hidden(part.inputs_BL, documents_BL=part.documents_BL)
        return Taught(part, share, hidden_BLd[part.counted_BL], chunked)
    return Taught(part, share, teacher(part.inputs_BL, documents_BL=part.documents_BL).logits, chunked)


def student_loss(
    student: NemotronH, widths: Widths, teacher: NemotronH, objective: Objective, taught: Taught
) -> Tensor:
    """The objective of one student on one part, mean over its counted positions."""
    part = taught.part
    if taught.chunked:
        student_Nd = student.hidden(part.inputs_BL, widths, documents_BL=part.documents_BL)[part.counted_BL]
        student_vd, teacher_vd = student.head_weight(widths), teacher.head_weight()
        return distilled(objective, student_Nd, student_vd, taught.answer, teacher_vd, part.targets_BL[part.counted_BL])
    logits_BLv = student(part.inputs_BL, widths, documents_BL=part.documents_BL).logits
    loss = distillation(logits_BLv, taught.answer, part.counted_BL, objective.temperature, objective.top_k)
    if objective.cross_entropy:
        loss = loss + objective.cross_entropy * cross_entropy(logits_BLv, part.targets_BL, part.counted_BL)
    return loss
