"""A product of few rows by a weight, read once as it lies: for decoding and short prompts."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nestling.model.native.library import available, call

OUTPUTS = 64  # that are one task
ROWS = {torch.float32: (3, 8), torch.bfloat16: (1, 64)}
"""From and to how many rows this is faster than torch (MKL, oneDNN) on a CPU that multiplies no bfloat16 itself."""


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether this is the product to take; it has no gradient, and computes in no other type than it is given."""
    if (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or x.device.type != "cpu"
        or x.dtype != weight.dtype
        or x.dtype not in ROWS
    ):
        return False
    least, most = ROWS[x.dtype]
    count = x.numel() // x.shape[-1]
    if x.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported():
        most = 1  # oneDNN multiplies more rows in bfloat16 itself
    if not least <= count <= most or weight.stride(1) != 1 or isinstance(x, FakeTensor):
        return False
    return not torch.compiler.is_compiling() and available()


def few(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] times weight [out, in] -> [..., out], in the type of x; the weight's rows may lie apart."""
    rows = x.reshape(-1, x.shape[-1]).float().contiguous()
    y = rows.new_empty(len(rows), len(weight))
    sizes = [*y.shape, rows.shape[1], OUTPUTS, torch.get_num_threads()]
    bias = None if bias is None else bias.float().contiguous()
    call("few", torch.float32, *sizes, rows, weight, weight.stride(0), weight.dtype == torch.bfloat16, bias, y)
    return y.to(x.dtype).view(*x.shape[:-1], -1)
