"""Losses, each a pure function. N counted positions · d hidden · v vocabulary.

Logits are widened to float32 at least before anything is summed.
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


def graded(
    objective: Objective, student_Nv: Tensor, teacher_Nv: Tensor | None, targets_N: Tensor, share: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Σ_n (T² KL(p_n ‖ q_n), if there is a teacher, + cross_entropy · CE_n), and `share` of its gradient by the
    student's logits [N, v].

    p = softmax(teacher / T), q = softmax(student / T), in nats at T = 1 (Nemotron Elastic, section 4: no CE term). T²
    keeps the size of the gradients (Hinton et al. 2015, arXiv 1503.02531, section 2.1). With top_k, p is cut to the
    teacher's k most probable tokens and scaled to sum to 1; q stays a distribution over the whole vocabulary, so that
    what it gives to other tokens is still lost. Both logits may be overwritten. On a CPU with a C++ compiler a kernel
    takes the place of what is here.
    """
    kl, temperature = (0.0, 1.0) if teacher_Nv is None else (1.0, objective.temperature)
    simple = objective.top_k is None and (temperature == 1 or not objective.cross_entropy)
    if simple and native.suits(student_Nv, teacher_Nv):
        weights = kl, objective.cross_entropy, share
        losses, slope = native.losses(student_Nv, teacher_Nv, targets_N, temperature, *weights)
        return losses.sum(), slope
    student, terms = wide(student_Nv), []
    if objective.cross_entropy:
        loss, slope = _cross_entropy(student, targets_N)
        terms.append((loss * objective.cross_entropy, slope.mul_(objective.cross_entropy * share)))
    if teacher_Nv is not None:
        loss, slope = _divergence(student, wide(teacher_Nv), temperature, objective.top_k)
        terms.append((loss * temperature**2, slope.mul_(temperature * share)))
    (total, slope), *more = terms
    for loss, by_loss in more:
        total, slope = total + loss, slope.add_(by_loss)
    return total, slope


def _cross_entropy(student_Nv: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """-Σ_n log q_n(target), q = softmax(student), and its gradient by the logits."""
    log_q = student_Nv.log_softmax(-1)
    loss, slope = F.nll_loss(log_q, targets_N, reduction="sum"), log_q.exp_()
    slope[torch.arange(len(slope), device=slope.device), targets_N] -= 1
    return loss, slope


def _divergence(student_Nv: Tensor, teacher_Nv: Tensor, temperature: float, top_k: int | None) -> tuple[Tensor, Tensor]:
    """Σ_n KL(p_n ‖ q_n), and its gradient by the student's logits / T; both logits are divided by T in place."""
    log_q, log_p, places = student_Nv.div_(temperature).log_softmax(-1), teacher_Nv.div_(temperature), None
    known = log_q
    if top_k is not None:
        log_p, places = log_p.topk(min(top_k, log_p.shape[-1]), -1)
        known = log_q.gather(-1, places)
    log_p = log_p.log_softmax(-1)
    p = log_p.exp()
    loss, slope = log_p.sub_(known).mul_(p).sum(), log_q.exp_()
    return loss, slope.sub_(p) if places is None else slope.scatter_add_(-1, places, p.neg_())


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
