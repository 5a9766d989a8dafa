"""The short causal convolution and its silu as one operation with a gradient of its own.

    y_t = silu(bias + Σ_j w_j x_{t - j})        j = 0 … k - 1, inside the document of t

Some positions are worked on at a time, as many as stay in the cache; backward keeps the inputs alone. On a CPU with a
C++ compiler kernels take the place of what is here (model/native/).

B batch · L length · T positions of a piece · k taps · c channels.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nestling.model.native import mamba
from nestling.model.native.library import runs
from nestling.model.pieces import enough

CACHED = 2**17  # elements that a CPU works on at a time


def convolved(x: Tensor, weight: Tensor, bias: Tensor, window: Tensor, documents: Tensor | None) -> Tensor:
    """x [B, L, c], weight [k, c] (the last tap is of the position itself), bias [c], window [B, k - 1, c] before x."""
    if runs(weight, bias) and mamba.convolves(x, weight):
        return mamba.convolved(x, weight, bias, window, documents)
    y = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    for start, length in _pieces(x):
        seen = list(_seen(x, window, documents, start, length, len(weight)))
        torch.ops.aten.silu.out(_weighed(seen, weight, bias), out=y.narrow(1, start, length))
    return y


conv = torch.library.custom_op("nestling::conv", convolved, mutates_args=())


@torch.library.custom_op("nestling::conv_backward", mutates_args=())
def conv_backward(
    x: Tensor, weight: Tensor, bias: Tensor, window: Tensor, documents: Tensor | None, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and window."""
    if runs(weight, bias, dy) and mamba.convolves(x, weight):
        return mamba.conv_backward(x, weight, bias, window, documents, dy)
    dx, dwindow = (
        torch.empty(x.shape, dtype=weight.dtype, device=x.device),
        window.new_zeros(window.shape, dtype=weight.dtype),
    )
    dweight, dbias = weight.new_zeros(weight.shape), bias.new_zeros(bias.shape)
    for start, length in _pieces(x):
        seen = list(_seen(x, window, documents, start, length, len(weight)))
        dsum = torch.ops.aten.silu_backward(dy.narrow(1, start, length), _weighed(seen, weight, bias))
        dbias += dsum.sum((0, 1))
        torch.mul(dsum, weight[-1], out=dx.narrow(1, start, length))
        dweight[-1] += (dsum * seen[0]).sum((0, 1))
        for back, there in enumerate(seen[1:], 1):
            tap = len(weight) - 1 - back
            dweight[tap] += (dsum * there).sum((0, 1))
            same = _same(documents, start, length, back)
            reached = dsum if same is None else dsum * same
            early = min(max(back - start, 0), length)  # so many of these inputs are in the window
            if early:
                dwindow.narrow(1, tap + start, early).addcmul_(reached[:, :early], weight[tap])
            if early < length:
                dx.narrow(1, start + early - back, length - early).addcmul_(reached[:, early:], weight[tap])
    return dx.to(x.dtype), dweight, dbias, dwindow.to(window.dtype)


def _pieces(x_BLc: Tensor) -> Sequence[tuple[int, int]]:
    """The start and length of every piece of the sequence."""
    batch, length, channels = x_BLc.shape
    step = max(CACHED // (batch * channels), 8) if x_BLc.device.type == "cpu" else length
    return enough([(start, min(step, length - start)) for start in range(0, length, step)], x_BLc)


def _seen(
    x_BLc: Tensor, window_Bkc: Tensor, documents: Tensor | None, start: int, length: int, taps: int
) -> Iterator[Tensor]:
    """What the positions of a piece see 0, 1, … k - 1 places back [B, T, c]: zero in another document."""
    place = start
    if start < taps - 1:
        x_BLc, place = torch.cat([window_Bkc, x_BLc.narrow(1, 0, start + length)], 1), start + taps - 1
    for back in range(taps):
        there = x_BLc.narrow(1, place - back, length)
        same = _same(documents, start, length, back)
        yield there if same is None else there * same


def _weighed(seen: list[Tensor], weight_kc: Tensor, bias_c: Tensor) -> Tensor:
    total = torch.addcmul(bias_c, seen[0], weight_kc[-1])
    for back, there in enumerate(seen[1:], 1):
        total.addcmul_(there, weight_kc[-1 - back])
    return total


def _same(documents_BL: Tensor | None, start: int, length: int, back: int) -> Tensor | None:
    """[B, T, 1]: whether the position `back` places before is of the same document; the window is of the first."""
    if documents_BL is None or back == 0:
        return None
    places = torch.arange(start, start + length, device=documents_BL.device)
    return (documents_BL[:, places] == documents_BL[:, (places - back).clamp(min=0)])[..., None]


@conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, window: Tensor, documents: Tensor | None) -> Tensor:
    return x.new_empty(x.shape, dtype=weight.dtype)


@conv_backward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, window: Tensor, documents: Tensor | None, dy: Tensor
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (x, weight, bias, window))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight, dbias, dwindow = conv_backward(*ctx.saved_tensors, dy)
    return dx, dweight, dbias, dwindow, None


conv.register_autograd(_gradients, setup_context=_keep)
