"""A whole layer for a few tokens, as one call (what it computes: model/block.py).

What stays from token to token (weights, sizes) is written down once, when a size is looked up for many steps.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestling.model.native.library import arguments, library
from nestling.model.native.product import Kept, multiplies, rows_of, tiled, weight_fields

ROWS = 64  # tokens, at most; with more of them calls cost nothing
TAPS = (2, 3, 4)
WIDEST = 16  # elements of any machine's vector


@dataclass(frozen=True)
class Bound:
    """A layer at one width: the arguments of its kernel that stay."""

    kernel: str
    fixed: bytes
    held: Sequence[Tensor | int | None]  # the same; it keeps their memory
    dtype: torch.dtype
    hidden: int

    @staticmethod
    def of(
        kernel: str,
        norm: Tensor,
        eps: float,
        weights: Sequence[tuple[Tensor | Kept, Tensor | None]],
        *more: Tensor | float,
    ) -> "Bound | None":
        """norm: the layer's own, [d]; weights: its matrices and their biases, in the order of the kernel's struct."""
        first = weights[0][0]
        stored = first.weight if isinstance(first, Kept) else first
        if not multiplies(stored):
            return None
        fields = [field for weight, bias in weights for field in weight_fields(weight, bias)]
        held = [_field(value) for value in (len(norm), len(norm), eps, _vector(norm), *fields, *map(_vector, more))]
        return Bound(kernel, arguments(held), held, stored.dtype, len(norm))

    def suits(self, x: Tensor) -> bool:
        """Whether the kernel is for these tokens [B, L, d]; it has no gradient."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return False
        rows = x.numel() // self.hidden
        quick = rows in rows_of(self.dtype) or (tiled() and rows > 0)
        return x.dtype == self.dtype and x.is_contiguous() and rows <= ROWS and quick

    def __call__(self, x: Tensor, *moving: Tensor | int) -> Tensor:
        """The residual stream after the layer."""
        y = torch.empty_like(x)
        rows, bfloat = x.numel() // self.hidden, x.dtype == torch.bfloat16
        changing = arguments([*moving, rows, torch.get_num_threads(), bfloat, x, y])
        getattr(library(), f"{self.kernel}_float")(self.fixed + changing)
        return y


def _vector(value: Any) -> Any:
    return value.float().contiguous() if isinstance(value, Tensor) else value


def _field(value: Any) -> Tensor | int | None:
    """A fraction as the bits of its double."""
    if isinstance(value, float):
        (value,) = struct.unpack("q", struct.pack("d", value))
    return value.detach() if isinstance(value, Tensor) else value  # another name for memory that is then kept
