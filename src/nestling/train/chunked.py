"""Losses of logits that never exist as a whole: the output head and its loss, a few positions at a time.

N positions · C positions of a chunk · d hidden · v vocabulary. A batch of 8192 positions over 131072 tokens would have
4 GiB of float32 logits for the student, as many for the teacher, and as many again for each of their gradients.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nestling.model.native.library import runs
from nestling.model.pieces import enough
from nestling.model.pointwise import wide
from nestling.sections import chunk_positions
from nestling.train.objective import Objective, graded, hidden_matching

Loss = Callable[[Tensor, slice, float], tuple[Tensor, Tensor]]
"""(logits [C, v], which of the N positions they are, a share) -> the sum of their losses, and that share of its
gradient by the logits, which may take their place."""

HEAD_BLOCK = 2**22
"""Numbers of a float32 head whose gradient a CPU makes in 16 bits at a time, to add it while it is in the cache."""


def chunk_of(objective: Objective, head_vd: Tensor) -> int:
    """Positions per chunk."""
    return objective.chunk or chunk_positions(len(head_vd), _multiplied_in(head_vd).itemsize)


def predicted(hidden_Nd: Tensor, weight_vd: Tensor, targets_N: Tensor) -> Tensor:
    """The mean of -log p(target) over positions, from the input and the weight of the output head."""
    objective = Objective(cross_entropy=1)

    def loss(logits_Cv: Tensor, rows: slice, share: float) -> tuple[Tensor, Tensor]:
        return graded(objective, logits_Cv, None, targets_N[rows], share)

    return head_loss(hidden_Nd, weight_vd, loss, chunk_of(objective, weight_vd))


def distilled(
    objective: Objective,
    student_Nd: Tensor,
    student_vd: Tensor,
    teacher_Nd: Tensor,
    teacher_vd: Tensor,
    targets_N: Tensor,
) -> Tensor:
    """The mean of an objective over positions, from the inputs and the weights of both output heads."""

    taught_Nd = _narrowed(teacher_Nd)
    taught_vd = teacher_vd.to(taught_Nd.dtype)

    def loss(logits_Cv: Tensor, rows: slice, share: float) -> tuple[Tensor, Tensor]:
        return graded(objective, logits_Cv, taught_Nd[rows] @ taught_vd.T, targets_N[rows], share)

    mean = head_loss(student_Nd, student_vd, loss, chunk_of(objective, student_vd))
    return mean + objective.hidden * hidden_matching(student_Nd, teacher_Nd) if objective.hidden else mean


def head_loss(hidden_Nd: Tensor, weight_vd: Tensor, loss: Loss, chunk: int) -> Tensor:
    """The mean over positions of loss(hidden @ weightᵀ): value and gradients as if at once, in `chunk` positions."""
    mean: Tensor = _HeadLoss.apply(hidden_Nd, weight_vd, loss, chunk)
    return mean


def _multiplied_in(x: Tensor) -> torch.dtype:
    """The type that autocast gives to a product of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype == torch.float32 else x.dtype


def _narrowed(x: Tensor) -> Tensor:
    return x.to(_multiplied_in(x))


class _HeadLoss(torch.autograd.Function):
    """The forward pass also makes the gradients, while a chunk's logits are there; the backward pass scales them.

    With G = ∂loss/∂logits / N [C, v] of a chunk, ∂/∂hidden = G weight and ∂/∂weight = Σ Gᵀ hidden.
    """

    @staticmethod
    def forward(ctx: Any, hidden_Nd: Tensor, weight_vd: Tensor, loss: Loss, chunk: int) -> Tensor:
        hidden, by_hidden, by_weight = _narrowed(hidden_Nd), torch.empty_like(hidden_Nd), torch.empty_like(weight_vd)
        weight, share = weight_vd.to(hidden.dtype), 1 / len(hidden_Nd)
        total = wide(hidden_Nd.new_zeros(()))
        for start in range(0, len(hidden_Nd), chunk):
            rows = slice(start, start + chunk)
            part, slope_Cv = loss(hidden[rows] @ weight.T, rows, share)
            total += part
            slope_Cv = slope_Cv.to(hidden.dtype)
            if by_weight.dtype == hidden.dtype:
                by_hidden[rows] = slope_Cv @ weight
                by_weight.addmm_(slope_Cv.T, hidden[rows], beta=min(start, 1))  # 0: not even NaN that lies there counts
                continue
            summed_Cd = hidden.new_zeros(hidden[rows].shape, dtype=by_weight.dtype)
            for block in _blocks(weight):
                summed_Cd += slope_Cv[:, block] @ weight[block]
                by_block, known = slope_Cv[:, block].T @ hidden[rows], by_weight[block]
                known.copy_(by_block) if start == 0 else known.add_(by_block)
            by_hidden[rows] = summed_Cd
        ctx.slopes = [by_hidden, by_weight]
        return total * share

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, Tensor, None, None]:
        if not ctx.slopes:
            raise RuntimeError("the gradients of a head's loss were given away: make the loss again")
        by_hidden, by_weight = ctx.slopes
        ctx.slopes = []  # whoever takes them over need not copy them: the head's gradient is a long pass
        known = scale.device.type == "cpu" and not isinstance(scale, FakeTensor)  # a GPU would have to be waited for
        if not (known and scale == 1):
            by_hidden, by_weight = by_hidden.mul_(scale), by_weight.mul_(scale)
        return by_hidden, by_weight, None, None


def _blocks(head_vd: Tensor) -> Sequence[slice]:
    """Of the vocabulary: gradients of a block of the head stay in the caches of a CPU."""
    count, rows = len(head_vd), max(HEAD_BLOCK // head_vd.shape[1], 1) if runs(head_vd, narrow=True) else len(head_vd)
    return enough([slice(start, min(start + rows, count)) for start in range(0, count, rows)], head_vd)
