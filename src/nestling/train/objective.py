"""Losses, each a pure function. B batch · L length · N counted positions · d hidden · v vocabulary.

`counted_BL` says which targets count. Logits are widened to float32 at least before anything is summed.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.model.native import losses as native
from nestling.model.pointwise import wide


@dataclass(frozen=True)
class Objective:
    """Towards what a student is trained: KL + cross_entropy · CE + hidden · (hidden-state matching)."""

    temperature: float = 1.0  # T of both distributions
    top_k: int | None = None  # how many of the teacher's tokens count; None is all of them
    cross_entropy: float = 0.0  # weight
    hidden: float = 0.0  # weight
    chunk: int | None = None  # positions whose logits exist at a time; None is `sections.chunk_positions`


def cross_entropy(logits_BLv: Tensor, targets_BL: Tensor, counted_BL: Tensor) -> Tensor:
    """Mean of -log p(target) over the counted positions."""
    return F.cross_entropy(wide(logits_BLv[counted_BL]), targets_BL[counted_BL])


def distillation(
    student_BLv: Tensor, teacher_BLv: Tensor, counted_BL: Tensor, temperature: float = 1.0, top_k: int | None = None
) -> Tensor:
    """`divergence`, mean over the counted positions (Nemotron Elastic, section 4: no CE term)."""
    student_Nv, teacher_Nv = student_BLv[counted_BL], teacher_BLv[counted_BL]
    return divergence(student_Nv, teacher_Nv, temperature, top_k) / len(student_Nv)


def divergence(student_Nv: Tensor, teacher_Nv: Tensor, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
    """T² Σ_n KL(p_n ‖ q_n), p = softmax(teacher / T), q = softmax(student / T), in nats at T = 1.

    T² keeps the size of the gradients (Hinton et al. 2015, arXiv 1503.02531, section 2.1). With top_k, p is cut to the
    teacher's k most probable tokens and scaled to sum to 1; q stays a distribution over the whole vocabulary, so that
    what it gives to other tokens is still lost.
    """
    student, teacher = (wide(student_Nv) / temperature).log_softmax(-1), wide(teacher_Nv) / temperature
    if top_k is not None:
        teacher, places = teacher.topk(min(top_k, teacher.shape[-1]), -1)
        student = student.gather(-1, places)
    return temperature**2 * F.kl_div(student, teacher.log_softmax(-1), log_target=True, reduction="sum")


def graded(
    objective: Objective, student_Nv: Tensor, teacher_Nv: Tensor | None, targets_N: Tensor, share: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Σ_n (KL, if there is a teacher, + cross_entropy · CE); a share of its gradient by the student's logits [N, v].

    Either logits may be overwritten. On a CPU with a C++ compiler a kernel takes the place of what is here.
    """
    kl, temperature = (0.0, 1.0) if teacher_Nv is None else (1.0, objective.temperature)
    simple = objective.top_k is None and (temperature == 1 or not objective.cross_entropy)
    if simple and native.suits(student_Nv, teacher_Nv):
        weights = kl, objective.cross_entropy, share
        losses, slope = native.losses(student_Nv, teacher_Nv, targets_N, temperature, *weights)
        return losses.sum(), slope
    student, teacher = wide(student_Nv), None if teacher_Nv is None else wide(teacher_Nv)
    if not simple:
        return _by_autograd(objective, student, teacher, targets_N, share)
    log_q, total = student.div_(temperature).log_softmax(-1), student.new_zeros(())
    if objective.cross_entropy:
        total = total + objective.cross_entropy * F.nll_loss(log_q, targets_N, reduction="sum")
    if teacher is not None:
        log_p = teacher.div_(temperature).log_softmax(-1)
        p = log_p.exp()
        total = total + temperature**2 * log_p.sub_(log_q).mul_(p).sum()
    slope = log_q.exp_().mul_((kl * temperature + objective.cross_entropy) * share)
    if teacher is not None:
        slope.sub_(p, alpha=temperature * share)
    if objective.cross_entropy:
        slope[torch.arange(len(slope), device=slope.device), targets_N] -= objective.cross_entropy * share
    return total, slope


def _by_autograd(
    objective: Objective, student_Nv: Tensor, teacher_Nv: Tensor | None, targets_N: Tensor, share: float
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        logits = student_Nv.detach().requires_grad_()
        total = objective.cross_entropy * F.cross_entropy(logits, targets_N, reduction="sum")
        if teacher_Nv is not None:
            total = total + divergence(logits, teacher_Nv, objective.temperature, objective.top_k)
        (slope,) = torch.autograd.grad(total * share, logits)
    return total.detach(), slope


def hidden_matching(student_Nd: Tensor, teacher_Nd: Tensor) -> Tensor:
    """Mean of ‖s - t‖² / ‖t‖² over positions, t the channels of the teacher that the student has, its first d.

    Both are the input of the output head; the teacher's channels must be in the student's order. A mean squared error
    as in Minitron (arXiv 2407.14679, section 3), divided by the teacher's own size so that its weight needs no tuning.
    """
    teacher_Nd = teacher_Nd[:, : student_Nd.shape[1]]
    return ((student_Nd - teacher_Nd).square().sum(-1) / teacher_Nd.square().sum(-1)).mean()


def resource(expected: Tensor, target: float, dead_zone: float) -> Tensor:
    """|C(expected sizes) / target - 1|, zero inside the dead zone (Nemotron Elastic, section 3)."""
    gap = (expected / target - 1).abs()
    return gap * (gap > dead_zone)
