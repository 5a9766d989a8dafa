"""What stands between the products, with gradients written out: less is kept for backward, memory is passed less often.

Nothing here is opaque to torch.compile, which fuses these steps further. Without it kernels in C++ run them on a CPU
(model/native/).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.model.native import pointwise as native
from nestling.model.native.library import runs


def normalized(x: Tensor, weight: Tensor, active: Tensor | int, eps: float, gate: Tensor | None = None) -> Tensor:
    """v / sqrt(Σ v² / active + eps) · weight over the last dim, with v = x, or x silu(gate).

    weight may have more dims: [g, i] for groups.
    """
    if torch.is_grad_enabled():
        return _Normalized.apply(x, gate, weight, active, eps)
    if _native(x, weight, active, gate):
        return native.norm(x, gate, weight, int(active), eps, keep=False)[0]
    v = x if gate is None else F.silu(gate).mul_(x)
    return (v * _scale(v, active, eps)).mul_(weight)


def wide(x: Tensor) -> Tensor:
    """In float32 or better."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _native(x: Tensor, weight: Tensor, active: Tensor | int, gate: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or isinstance(active, Tensor):
        return False
    return runs(x, weight) if gate is None else runs(x, weight, gate)


def _scale(x: Tensor, active: Tensor | int, eps: float) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(active).add_(eps).rsqrt_()


def squared_relu(x: Tensor) -> Tensor:
    return _SquaredReLU.apply(x) if torch.is_grad_enabled() else _squared_relu(x)


def _squared_relu(x: Tensor) -> Tensor:
    if not torch.compiler.is_compiling() and runs(x, narrow=True):
        return native.squared_relu(x)
    return torch.relu(x).square_()


class _Normalized(torch.autograd.Function):
    """Keeps x, the gate and one number per row s. dv = s·w·dy - v · s³ (Σ w·dy·v) / active."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor | None, weight: Tensor, active: Tensor | int, eps: float) -> Tensor:
        ctx.active, ctx.eps = None if isinstance(active, Tensor) else active, eps
        if _native(x, weight, active, gate):
            y, scale = native.norm(x, gate, weight, int(active), eps, keep=True)
        else:
            v = x if gate is None else F.silu(gate).mul_(x)
            scale = _scale(v, active, eps)
            y = (v * scale).mul_(weight)
        ctx.save_for_backward(x, gate, weight, scale, active if isinstance(active, Tensor) else None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, scale, active = ctx.saved_tensors
        active = ctx.active if active is None else active
        if _native(x, weight, active, gate):
            return *native.norm_backward(x, gate, weight, active, ctx.eps, scale, dy), None, None
        v = x if gate is None else F.silu(gate).mul_(x)
        dv = dy * weight
        dmean = (dv * v).sum(-1, keepdim=True) * scale**3 / -2  # of Σ v² / active
        dweight = (dy * v).mul_(scale).flatten(0, -1 - weight.ndim).sum(0)
        dv = dv.mul_(scale).addcmul_(v, dmean * (2 / active))
        dactive = (dmean * (scale**-2 - ctx.eps)).sum() / -active if ctx.needs_input_grad[3] else None
        if gate is None:
            return dv, None, dweight, dactive, None
        del v  # a long row is large
        dx = F.silu(gate).mul_(dv)
        return dx, torch.ops.aten.silu_backward(dv.mul_(x), gate), dweight, dactive, None


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _squared_relu(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if not torch.compiler.is_compiling() and runs(x, dy, narrow=True):
            return native.squared_relu(x, dy)
        return torch.relu(x).mul_(dy).mul_(2)
