"""What is between the projections of a Mamba-2 layer as one operation (what it computes: model/mamba2.py).

B batch · L length · w what the projection makes, z, x, B, C and dt · g group · h head in its group · p head channel ·
n state · k taps · c channels of the convolution.
"""

import struct
from typing import Any

import torch
from torch import Tensor

from nestling.model.native.layer import TAPS, WIDEST
from nestling.model.native.library import call, numbers, opaque, runs, summed_in
from nestling.model.native.mamba import CHUNK, parts_of, states_of


def suits(projected: Tensor, taps_kc: Tensor, norm_gi: Tensor, *others: Tensor) -> bool:
    """Whether there is a kernel for what is computed with these taps and norm and all the others, of one dtype.

    What is projected is of that dtype too, or bfloat16 where it is float32.
    """
    pair = taps_kc.shape[1] - norm_gi.numel()  # channels of B and C
    if len(taps_kc) not in TAPS or pair < WIDEST or summed_in(projected.dtype) != taps_kc.dtype:
        return False
    return runs(projected, narrow=True) and runs(taps_kc, norm_gi, *others)


def between(
    projected: Tensor,
    taps: Tensor,
    bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm: Tensor,
    documents: Tensor | None,
    floor: float,
    eps: float,
    carried: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """projected [B, L, w], taps [k, c], bias [c], dt_bias, A, D [g, h], norm [g, h p] -> [B, L, g h p].

    projected may be bfloat16 where all else is float32: the result is as it is, and nothing in between is rounded.
    documents [B, L]: one number per document of a row. floor: of dt. carried: the window [B, k - 1, c] and the state
    [B, g, h, p, n] after the tokens before, changed in place to those after these; without, a row begins with zeros.
    What is carried has no gradient.
    """
    given = projected, taps, bias, dt_bias, A, D, norm, documents, floor, eps
    if opaque():
        assert carried is None
        normed: Tensor = sequence(*given)[0]
        return normed
    normed, mixed, dt = _outputs(projected, A, norm)
    if carried is not None and projected.shape[1] == 1:  # a kernel of its own, to which x is also convolved at once
        mixed = taps.new_empty(len(projected), taps.shape[1])
    y = normed if normed.dtype == taps.dtype else taps.new_empty(normed.shape)
    call("sequence", projected.dtype, *_sequence(given, carried), mixed, dt, y, None, None, normed)
    return normed


@torch.library.custom_op("nestling::native_sequence", mutates_args=())
def sequence(
    projected: Tensor,
    taps: Tensor,
    bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm: Tensor,
    documents: Tensor | None,
    floor: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`between`, and what backward needs: B and C convolved, dt, y of the scan, its states, the scales of the norm."""
    (normed, mixed, dt), (y, states, scales) = _outputs(projected, A, norm), _kept(projected, A, norm)
    given = _sequence((projected, taps, bias, dt_bias, A, D, norm, documents, floor, eps))
    call("sequence", projected.dtype, *given, mixed, dt, y, states, scales, normed)
    return normed, mixed, dt, y, states, scales


@torch.library.custom_op("nestling::native_sequence_backward", mutates_args=())
def sequence_backward(
    projected: Tensor,
    taps: Tensor,
    bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm: Tensor,
    documents: Tensor | None,
    floor: float,
    eps: float,
    mixed: Tensor,
    dt: Tensor,
    y: Tensor,
    states: Tensor,
    scales: Tensor,
    dnormed: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of projected, taps, bias, dt_bias, A, D and norm."""
    dprojected, dtaps, dbias, ddt_bias, dA, dD, dnorm = found = _gradients_of(
        projected, taps, bias, dt_bias, A, D, norm
    )
    dmixed, ddt = mixed.new_empty(parts_of(len(projected), *A.shape), *mixed.shape), dt.new_empty(dt.shape)
    given = _sequence((projected, taps, bias, dt_bias, A, D, norm, documents, floor, eps), parts=len(dmixed))
    kept = mixed, dt, y, states, scales, None
    call("sequence_backward", projected.dtype, *given, *kept, dnormed.contiguous(), *found, dmixed, ddt)
    return dprojected, dtaps, dbias, ddt_bias, dA, dD, dnorm


def _sequence(
    given: tuple[Any, ...], carried: tuple[Tensor, Tensor] | None = None, parts: int | None = None
) -> list[Any]:
    """The fields of `Sequence` that are given: the arguments of `between`; parts, where there is room for so many."""
    *inputs, documents, floor, eps = given
    projected, taps, _, _, A, _, norm = inputs
    groups, heads = A.shape
    sizes = [*projected.shape[:2], groups, heads, norm.shape[1] // heads, _state(projected, A, norm), len(taps), CHUNK]
    parts = parts_of(len(projected), groups, heads) if parts is None else parts
    fractions = struct.unpack("2q", struct.pack("2d", floor, eps))
    window, state = carried or (None, None)
    moving = [window, *(window.stride()[:2] if window is not None else (0, 0)), state]
    read = [t.contiguous() for t in inputs]
    return [*sizes, parts, torch.get_num_threads(), *fractions, *read, numbers(documents), *moving]


def _state(projected: Tensor, A: Tensor, norm: Tensor) -> int:
    return (projected.shape[-1] - 2 * norm.numel() - A.numel()) // (2 * len(A))


def _outputs(projected: Tensor, A: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what is returned, for B and C convolved, and for dt."""
    (batch, length, _), make = projected.shape, A.new_empty
    pair = 2 * len(A) * _state(projected, A, norm)
    normed = projected.new_empty(batch, length, norm.numel())
    return normed, make(batch, length, pair), make(batch, length, *A.shape)


def _kept(projected: Tensor, A: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what backward needs besides: y of the scan, the states before and after each chunk, a scale per norm."""
    (batch, length, _), (groups, heads), make = projected.shape, A.shape, A.new_empty
    state = batch, groups, heads, norm.shape[1] // heads, _state(projected, A, norm)
    states = states_of(A, length, state, CHUNK)
    return make(batch, length, norm.numel()), states, make(batch, length, groups)


def _gradients_of(*values: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in values)


# ---- what torch must know of them


@sequence.register_fake
def _(
    projected: Tensor, taps: Tensor, bias: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, norm: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return *_outputs(projected, A, norm), *_kept(projected, A, norm)


@sequence_backward.register_fake
def _(*given: Any) -> tuple[Tensor, ...]:
    return _gradients_of(*given[:7])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.floor, ctx.eps = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def _gradients(ctx: Any, dnormed: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dnormed is None:
        return (None,) * 10
    saved = ctx.saved_tensors
    return *sequence_backward(*saved[:8], ctx.floor, ctx.eps, *saved[8:], dnormed), None, None, None


sequence.register_autograd(_gradients, setup_context=_keep)
