"""The kernels between the products as functions of tensors; what they compute: model/pointwise.py.

g group · i channel of a group.
"""

import struct
from typing import Any

import torch
from torch import Tensor

from nestling.model.native.library import call

ROWS = 16  # positions that are one task of a norm
ELEMENTS = 2**14  # of a tensor that are one task


def norm(
    x: Tensor, gate: Tensor | None, weight: Tensor, active: int, eps: float, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """y and, if it is to be kept for backward, the scale of every row [..., 1]."""
    x = x.contiguous()
    y, scales = x.new_empty(x.shape), x.new_empty(*x.shape[:-1], 1) if keep else None
    call("norm", x.dtype, *_norm(x, gate, weight, active, eps), y, scales)
    return y, scales


def norm_backward(
    x: Tensor, gate: Tensor | None, weight: Tensor, active: int, eps: float, scales: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of x, gate and weight."""
    x = x.contiguous()
    given = _norm(x, gate, weight, active, eps)
    dx, dgate = x.new_empty(x.shape), None if gate is None else x.new_empty(x.shape)
    dweight = weight.new_empty(-(-given[0] // ROWS), *weight.shape)  # of each task
    step = given[1] * given[2]
    call("norm_backward", x.dtype, *given, scales, dy.contiguous(), dx, dgate, dweight, step, step)
    return dx, dgate, dweight.sum(0)


def _norm(x: Tensor, gate: Tensor | None, weight: Tensor, active: int, eps: float, task: int = ROWS) -> list[Any]:
    """The fields of `Norm`; task: positions that are one."""
    groups, width = weight.numel() // x.shape[-1], x.shape[-1]
    positions = x.numel() // (groups * width) if x.numel() else 0
    step = 0
    if gate is not None:  # [..., g, i], a part of something wider
        rows = gate.reshape(-1, groups * width)  # a view wherever it can be
        gate, step = (rows, rows.stride(0)) if rows.stride(1) == 1 else (rows.contiguous(), groups * width)
    (bits,) = struct.unpack("q", struct.pack("d", eps))
    sizes = [positions, groups, width, active, ROWS, torch.get_num_threads()]
    return [*sizes, x, gate, weight.contiguous(), step, bits]


def squared_relu(x: Tensor, dy: Tensor | None = None) -> Tensor:
    """relu(x)², or the gradient of x."""
    x, dy = x.contiguous(), None if dy is None else dy.contiguous()
    y = x.new_empty(x.shape)
    call("squared_relu", x.dtype, x.numel(), ELEMENTS, torch.get_num_threads(), x, dy, y)
    return y
