"""Losses, each a pure function. B batch · L length · v vocabulary; `counted_BL` says which targets count."""

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits_BLv: Tensor, targets_BL: Tensor, counted_BL: Tensor) -> Tensor:
    """Mean of -log p(target) over the counted positions."""
    return F.cross_entropy(logits_BLv[counted_BL], targets_BL[counted_BL])


def distillation(student_BLv: Tensor, teacher_BLv: Tensor, counted_BL: Tensor) -> Tensor:
    """KL(p_teacher ‖ p_student), mean over the counted positions (Nemotron Elastic, section 4: no CE term)."""
    student, teacher = (F.log_softmax(logits[counted_BL], -1) for logits in (student_BLv, teacher_BLv))
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def resource(expected: Tensor, target: float, dead_zone: float) -> Tensor:
    """|C(expected sizes) / target - 1|, zero inside the dead zone (Nemotron Elastic, section 3)."""
    gap = (expected / target - 1).abs()
    return gap * (gap > dead_zone)
