"""A product of some rows by the kept part of a stored weight, which is read as it lies (what it computes:
model/width.py)."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nestling.model.native.library import available, call, library

FEW = 8
"""Rows up to which a vector of the machine is a part of a row of the weight; of more rows it is a number of each."""

FLOAT, ANY, SINGLE = range(1, 65), range(1, 2**62), range(1, 3)
"""Rows that are multiplied faster than by MKL in float32, and than by oneDNN in bfloat16 without units for it and with
them."""
SMALL = 2**18
"""Numbers of a float32 weight below which calling MKL is faster."""

PIECES = 256
"""Rows up to which a weight in pieces is not packed for torch's product."""


@dataclass(frozen=True)
class Kept:
    """The part of a stored matrix [out, in] that is kept, where no strides can say it."""

    weight: Tensor
    rows: Tensor | None = None  # of the weight, one per output, int64; None: all
    columns: Tensor | None = None  # first and number of each piece of the kept columns, int64 [piece, 2]; None: all
    inputs: int = 0  # how many columns are kept; 0: all


def kernel(x: Tensor, weight: Tensor, pieces: bool = False) -> str | None:
    """Which kernel multiplies x [..., in] by a weight [out, in], or by pieces of it; None where torch is to do it.

    It has no gradient, and computes in no other type than it is given.
    """
    if torch.is_grad_enabled() or not multiplies(weight) or x.dtype != weight.dtype or x.device != weight.device:
        return None
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return None
    count, fast = x.numel() // x.shape[-1], rows_of(x.dtype)
    if pieces:
        suits = 0 < count <= max(PIECES, fast[-1])
    else:
        suits = count in fast and (x.dtype == torch.bfloat16 or weight.numel() >= SMALL)
    if not suits:
        return None
    if x.dtype == torch.bfloat16 and count not in SINGLE and tiled():
        return "tiled"
    return "few" if count <= FEW else "many"


def rows_of(dtype: torch.dtype) -> range:
    """How many rows are multiplied faster than by torch."""
    if dtype == torch.float32:
        return FLOAT
    return SINGLE if _has_bf16() else ANY


def tiled() -> bool:
    """Whether the processor multiplies tiles of bfloat16, and the system lets it."""
    kernels = library()
    return kernels is not None and bool(kernels.tiles_granted_float())


def multiplies(weight: Tensor) -> bool:
    """Whether there are kernels for weights like this one."""
    known = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16) and weight.stride(1) == 1
    return known and not isinstance(weight, FakeTensor) and available()


def product(kernel: str, x: Tensor, weight: Tensor | Kept, bias: Tensor | None) -> Tensor:
    """x [..., in] times weight [out, in] -> [..., out], in the type of x; the weight's rows may lie apart."""
    given = x.contiguous() if x.dtype == torch.float32 else x.float().contiguous()
    fields = weight_fields(weight, bias)
    outputs, inputs, *_ = fields
    y = given.new_empty((*x.shape[:-1], outputs))
    call(kernel, torch.float32, *fields, given.numel() // inputs, torch.get_num_threads(), given, y)
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def weight_fields(weight: Tensor | Kept, bias: Tensor | None) -> list[Any]:
    """The fields of `Weight`."""
    kept = weight if isinstance(weight, Kept) else Kept(weight)
    stored, rows, columns = kept.weight, kept.rows, kept.columns
    outputs, inputs = len(stored) if rows is None else len(rows), kept.inputs or stored.shape[1]
    layout = [stored.stride(0), stored.dtype == torch.bfloat16, rows, columns, 0 if columns is None else len(columns)]
    return [outputs, inputs, stored, *layout, None if bias is None else bias.float().contiguous()]


@functools.cache
def _has_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported()
