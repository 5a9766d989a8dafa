"""What stands between the products, with gradients written out: less is kept for backward, memory is passed less often.

Nothing here is opaque to torch.compile, which fuses these steps further.
"""

from typing import Any

import torch
from torch import Tensor


def normalized(x: Tensor, weight: Tensor, active: Tensor | int, eps: float) -> Tensor:
    """x / sqrt(Σ x² / active + eps) · weight over the last dim; weight may have more dims: [g, i] for groups."""
    if not torch.is_grad_enabled():
        return (x * _scale(x, active, eps)).mul_(weight)
    return _Normalized.apply(x, weight, torch.as_tensor(active, dtype=x.dtype, device=x.device), eps)


def _scale(x: Tensor, active: Tensor | int, eps: float) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(active).add_(eps).rsqrt_()


def squared_relu(x: Tensor) -> Tensor:
    return _SquaredReLU.apply(x) if torch.is_grad_enabled() else torch.relu(x).square_()


class _Normalized(torch.autograd.Function):
    """Keeps x and one number per row. dx = s·w·dy - x · s³ (Σ w·dy·x) / active, with s the scale of the row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, active: Tensor, eps: float) -> Tensor:
        scale = _scale(x, active, eps)
        ctx.save_for_backward(x, weight, active, scale)
        ctx.eps = eps
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, active, scale = ctx.saved_tensors
        dy_x, dnormed = dy * x, dy * weight
        dmean = (dy_x * weight).sum(-1, keepdim=True) * scale**3 / -2  # of Σ x² / active
        dx = (dnormed * scale).addcmul_(x, dmean * (2 / active))
        dweight = (dy_x * scale).flatten(0, -1 - weight.ndim).sum(0)
        dactive = (dmean * (scale**-2 - ctx.eps)).sum() / -active if ctx.needs_input_grad[2] else None
        return dx, dweight, dactive, None


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.relu(x).square_()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.relu(x).mul_(dy).mul_(2)
