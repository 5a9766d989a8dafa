"""The kernels as functions of tensors; their arguments and results are those of model/scan.py and model/conv.py.

B batch · L length · C chunk · g group · h head in its group · p head channel · n state · k taps · c channels.
"""

from typing import Any

import torch
from torch import Tensor

from nestling.model.native.library import call, lanes

TASKS = 2  # per thread, at least: one that ends early takes another
TAPS = (2, 3, 4)
POSITIONS = 64  # of a row that are one task of the convolution


def states(x_BLghp: Tensor, B_BLgn: Tensor, chunk: int) -> Tensor:
    """Room for the states before and after each chunk [C + 1, B, g, h, n, p]; n and p are those of whole tiles."""
    batch, length, groups, heads, channels = x_BLghp.shape
    state, wide = _up(B_BLgn.shape[-1], 4), _up(channels, lanes(x_BLghp.dtype))
    return x_BLghp.new_empty(-(-length // chunk) + 1, batch, groups, heads, state, wide)


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    documents: Tensor | None,
    chunk: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """y, the last state and, if they are to be kept for backward, y - D x and the states."""
    y, last = x.new_empty(x.shape), x.new_empty(state.shape)
    recalled, before = (x.new_empty(x.shape), states(x, B, chunk)) if keep else (None, None)
    given, _ = _scan(x, dt, A, B, C, D, documents, chunk)
    call("scan", x.dtype, *given, state.contiguous(), y, recalled, before, last)
    return y, last, recalled, before


def scan_backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    documents: Tensor | None,
    chunk: int,
    recalled: Tensor,
    before: Tensor,
    dy: Tensor,
    dlast: Tensor,
) -> tuple[Tensor, ...]:
    given, parts = _scan(x, dt, A, B, C, D, documents, chunk)
    dx, ddt, dstate = (t.new_empty(t.shape) for t in (x, dt, dlast))
    dA, dD = (t.new_empty(len(x), *t.shape) for t in (A, D))  # of each row
    dB, dC = (t.new_empty(parts, *t.shape) for t in (B, C))  # of each part of a group's heads
    of = [recalled, before, dy.contiguous(), dlast.contiguous()]
    call("scan_backward", x.dtype, *given, *of, dx, ddt, dA, dB, dC, dD, dstate)
    return dx, ddt, dA.sum(0), dB.sum(0), dC.sum(0), dD.sum(0), dstate


def _scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, documents: Tensor | None, chunk: int
) -> tuple[list[Any], int]:
    """The fields of `Scan`, and into how many parts the heads of a group are divided so that every thread has work."""
    batch, length, groups, heads, channels = x.shape
    threads = torch.get_num_threads()
    parts = min(heads, -(-TASKS * threads // (batch * groups)))
    x, B, C = (t if t[0, 0].is_contiguous() else t.contiguous() for t in (x, B, C))
    strides = [t.stride(dim) for t in (x, B, C) for dim in (0, 1)]
    sizes = [batch, length, groups, heads, channels, B.shape[-1], chunk, parts, threads]
    inputs = [x, dt.contiguous(), A.contiguous(), B, C, D.contiguous()]
    return [*sizes, *inputs, *strides, _numbers(documents)], parts


def convolves(x_BLc: Tensor, weight_kc: Tensor) -> bool:
    """Whether the convolution has a kernel for these sizes."""
    return len(weight_kc) in TAPS and x_BLc.shape[-1] >= lanes(weight_kc.dtype)


def conv(x: Tensor, weight: Tensor, bias: Tensor, window: Tensor, documents: Tensor | None) -> Tensor:
    y = weight.new_empty(x.shape)
    call("conv", weight.dtype, *_conv(x, weight, bias, window, documents), y)
    return y


def conv_backward(
    x: Tensor, weight: Tensor, bias: Tensor, window: Tensor, documents: Tensor | None, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tasks = len(x) * -(-x.shape[1] // POSITIONS)
    dx, dwindow = weight.new_empty(x.shape), weight.new_empty(window.shape)
    dweight, dbias = weight.new_empty(tasks, *weight.shape), weight.new_empty(tasks, *bias.shape)
    given = _conv(x, weight, bias, window, documents)
    call("conv_backward", weight.dtype, *given, dy.contiguous(), dx, dweight, dbias, dwindow)
    return dx.to(x.dtype), dweight.sum(0), dbias.sum(0), dwindow.to(window.dtype)


def _conv(x: Tensor, weight: Tensor, bias: Tensor, window: Tensor, documents: Tensor | None) -> list[Any]:
    """The fields of `Conv`."""
    x, window = (t if t.stride(-1) == 1 else t.contiguous() for t in (x.to(weight.dtype), window.to(weight.dtype)))
    sizes = [len(weight), *x.shape, POSITIONS, torch.get_num_threads()]
    inputs = [x, weight.contiguous(), bias.contiguous(), window]
    return [*sizes, *inputs, *x.stride()[:2], *window.stride()[:2], _numbers(documents)]


def _numbers(documents: Tensor | None) -> Tensor | None:
    return None if documents is None else documents.to(torch.int64).contiguous()


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
