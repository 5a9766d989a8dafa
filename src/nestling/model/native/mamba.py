"""The scan and the convolution by kernels (what they compute: model/scan.py, model/conv.py).

The scan is an operation of its own, for it keeps other things for backward. torch.compile keeps what it compiled on
disk under an operation's name: another number of outputs or another shape of one needs another name.

B batch · L length · C chunk · g group · h head in its group · p head channel · n state · k taps · c channels.
"""

from typing import Any

import torch
from torch import Tensor

from nestling.model.native.layer import TAPS, WIDEST
from nestling.model.native.library import call, lanes, numbers, up

CHUNK = 64  # positions; short, for a product costs what its FLOPs do here
TASKS = 2  # per thread, at least: one that ends early takes another
POSITIONS = 64  # of a row that are one task of the convolution, at most, unless they are fewer than SOME elements
SOME = 2**13


@torch.library.custom_op("nestling::native_scan", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor]:
    """`ssd`; also returns the states before and after each chunk, which backward needs."""
    before = _states(x, B, chunk)
    return *scanned(x, dt, A, B, C, D, state, documents, chunk, before), before


def scanned(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    documents: Tensor | None,
    chunk: int,
    before: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssd`; before: room for the states, if they are to be kept."""
    y, last = x.new_empty(x.shape), x.new_empty(state.shape)
    call("scan", x.dtype, *_scan(x, dt, A, B, C, D, documents, chunk), state.contiguous(), y, before, last)
    return y, last


@torch.library.custom_op("nestling::native_scan_backward", mutates_args=())
def scan_backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    documents: Tensor | None,
    chunk: int,
    before: Tensor,
    dy: Tensor,
    dlast: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D and the first state."""
    given = _scan(x, dt, A, B, C, D, documents, chunk)
    dx, ddt, dstate = (t.new_empty(t.shape) for t in (x, dt, dlast))
    dA, dD = (t.new_empty(len(x), *t.shape) for t in (A, D))  # of each row
    dB, dC = (t.new_empty(_parts(x), *t.shape) for t in (B, C))  # of each part of a group's heads
    dy = dy.contiguous()
    of: list[Any] = [before, dy, dlast.contiguous(), *dy.stride()[:2]]
    found: list[Any] = [dx, ddt, dA, dB, dC, dD, dstate, *dx.stride()[:2], *dB.stride()[:3]]
    call("scan_backward", x.dtype, *given, *of, *found, None, None)
    return dx, ddt, dA.sum(0), dB.sum(0), dC.sum(0), dD.sum(0), dstate


def _scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, documents: Tensor | None, chunk: int
) -> list[Any]:
    """The fields of `Scan`."""
    x, B, C = (t if t[0, 0].is_contiguous() else t.contiguous() for t in (x, B, C))
    strides = [t.stride(dim) for t in (x, B, C) for dim in (0, 1)]
    sizes = [*x.shape, B.shape[-1], chunk, _parts(x), torch.get_num_threads()]
    inputs = [x, dt.contiguous(), A.contiguous(), B, C, D.contiguous()]
    return [*sizes, *inputs, *strides, numbers(documents), *[0] * 7]  # x is not convolved on the way


def _parts(x_BLghp: Tensor) -> int:
    batch, _, groups, heads, _ = x_BLghp.shape
    return parts_of(batch, groups, heads)


def parts_of(batch: int, groups: int, heads: int) -> int:
    """Into how many parts the heads of a group are divided, so that every thread has work."""
    return min(heads, -(-TASKS * torch.get_num_threads() // max(batch * groups, 1)))


def _states(x_BLghp: Tensor, B_BLgn: Tensor, chunk: int) -> Tensor:
    batch, length, groups, heads, channels = x_BLghp.shape
    return states_of(x_BLghp, length, (batch, groups, heads, channels, B_BLgn.shape[-1]), chunk)


def states_of(like: Tensor, length: int, state_Bghpn: tuple[int, ...], chunk: int) -> Tensor:
    """Room for the states before and after each chunk [C + 1, B, g, h, n, p]; n and p are those of whole tiles."""
    batch, groups, heads, channels, state = state_Bghpn
    wide = up(state, 4), up(channels, lanes(like.dtype))
    return like.new_empty(-(-length // chunk) + 1, batch, groups, heads, *wide)


def convolved(x: Tensor, weight: Tensor, bias: Tensor, window: Tensor, documents: Tensor | None) -> Tensor:
    y = weight.new_empty(x.shape)
    call("conv", weight.dtype, *_conv(x, weight, bias, window, documents), y)
    return y


def conv_backward(
    x: Tensor, weight: Tensor, bias: Tensor, window: Tensor, documents: Tensor | None, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and window."""
    tasks = len(x) * -(-x.shape[1] // _positions(x))
    dx, dwindow = weight.new_empty(x.shape), weight.new_empty(window.shape)
    dweight, dbias = weight.new_empty(tasks, *weight.shape), weight.new_empty(tasks, *bias.shape)
    given = _conv(x, weight, bias, window, documents)
    dy = dy.contiguous()
    strides = [*dy.stride()[:2], *dx.stride()[:2]]
    call("conv_backward", weight.dtype, *given, dy, dx, dweight, dbias, dwindow, *strides)
    return dx.to(x.dtype), dweight.sum(0), dbias.sum(0), dwindow.to(window.dtype)


def convolves(x_BLc: Tensor, weight_kc: Tensor) -> bool:
    """Whether the convolution has a kernel for these sizes."""
    return len(weight_kc) in TAPS and x_BLc.shape[-1] >= WIDEST


def _conv(x: Tensor, weight: Tensor, bias: Tensor, window: Tensor, documents: Tensor | None) -> list[Any]:
    """The fields of `Conv`."""
    x, window = (t if t.stride(-1) == 1 else t.contiguous() for t in (x.to(weight.dtype), window.to(weight.dtype)))
    sizes = [len(weight), *x.shape, _positions(x), torch.get_num_threads()]
    inputs = [x, weight.contiguous(), bias.contiguous(), window]
    return [*sizes, *inputs, *x.stride()[:2], *window.stride()[:2], weight.shape[1], numbers(documents)]


def _positions(x_BLc: Tensor) -> int:
    """Positions of a task of the convolution, so that every thread has work."""
    batch, length, channels = x_BLc.shape
    return max(min(POSITIONS, -(-length * batch // (TASKS * torch.get_num_threads()))), SOME // channels, 1)


# ---- what torch must know of them


@scan.register_fake
def _(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor, documents: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), state.new_empty(state.shape), _states(x, B, chunk)


@scan_backward.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (x, dt, A, B, C, D, rest[-1]))


def _keep_scan(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *values, _, documents, ctx.chunk = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*values, documents, output[2])


def _scan_gradients(ctx: Any, dy: Tensor | None, dlast: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    *values, documents, before = ctx.saved_tensors
    x, B = values[0], values[3]
    dy = torch.zeros_like(x) if dy is None else dy
    dlast = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1]) if dlast is None else dlast
    return *scan_backward(*values, documents, ctx.chunk, before, dy, dlast), None, None


scan.register_autograd(_scan_gradients, setup_context=_keep_scan)
