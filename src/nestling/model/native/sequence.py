"""What is between the projections of a Mamba-2 layer as one operation (what it computes: model/mamba2.py).

B batch · L length · w what the projection makes, z, x, B, C and dt · g group · h head in its group · p head channel ·
n state · k taps · c channels of the convolution.
"""

import struct
from typing import Any

import torch
from torch import Tensor

from nestling.model.native.layer import TAPS, WIDEST
from nestling.model.native.library import call, numbers, opaque, runs
from nestling.model.native.mamba import parts_of, states_of

CHUNK = 64


def suits(projected_BLw: Tensor, taps_kc: Tensor, norm_gi: Tensor) -> bool:
    """Whether there is a kernel for what was projected, of one dtype with all that is computed with it."""
    pair = taps_kc.shape[1] - norm_gi.numel()  # channels of B and C
    if len(taps_kc) not in TAPS or pair < WIDEST or torch.is_autocast_enabled("cpu"):
        return False
    return runs(projected_BLw, taps_kc, norm_gi)


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
) -> Tensor:
    """projected [B, L, w], taps [k, c], bias [c], dt_bias, A, D [g, h], norm [g, h p] -> [B, L, g h p].

    documents [B, L]: one number per document of a row. floor: of dt. Every row begins with an empty state.
    """
    given = projected, taps, bias, dt_bias, A, D, norm, documents, floor, eps
    if opaque():
        normed: Tensor = sequence(*given)[0]
        return normed
    normed, mixed, dt, *_ = _outputs(projected, A, norm)
    call("sequence", projected.dtype, *_sequence(*given), mixed, dt, normed, None, None, normed)
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
    normed, *kept = _outputs(projected, A, norm)
    given = _sequence(projected, taps, bias, dt_bias, A, D, norm, documents, floor, eps)
    call("sequence", projected.dtype, *given, *kept, normed)
    mixed, dt, y, states, scales = kept
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
    given = _sequence(projected, taps, bias, dt_bias, A, D, norm, documents, floor, eps)
    kept = mixed, dt, y, states, scales, None
    call("sequence_backward", projected.dtype, *given, *kept, dnormed.contiguous(), *found, dmixed, ddt)
    return dprojected, dtaps, dbias, ddt_bias, dA, dD, dnorm


def _sequence(
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
) -> list[Any]:
    """The fields of `Sequence` that are given; no window, no state."""
    groups, heads = A.shape
    sizes = [*projected.shape[:2], groups, heads, norm.shape[1] // heads, _state(projected, A, norm), len(taps)]
    fractions = struct.unpack("2q", struct.pack("2d", floor, eps))
    inputs = [t.contiguous() for t in (projected, taps, bias, dt_bias, A, D, norm)]
    return [*sizes, CHUNK, torch.get_num_threads(), *fractions, *inputs, numbers(documents), None, 0, 0, None]


def _state(projected: Tensor, A: Tensor, norm: Tensor) -> int:
    return (projected.shape[-1] - 2 * norm.numel() - A.numel()) // (2 * len(A))


def _outputs(projected: Tensor, A: Tensor, norm: Tensor) -> tuple[Tensor, ...]:
    """Room for what the operation returns."""
    batch, length, _ = projected.shape
    (groups, heads), state, make = A.shape, _state(projected, A, norm), projected.new_empty
    states = states_of(projected, length, (batch, groups, heads, norm.shape[1] // heads, state), CHUNK)
    mixed, dt = make(batch, length, 2 * groups * state), make(batch, length, groups, heads)
    y, normed, scales = (
        make(batch, length, norm.numel()),
        make(batch, length, norm.numel()),
        make(batch, length, groups),
    )
    return normed, mixed, dt, y, states, scales


def _gradients_of(*values: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in values)


# ---- what torch must know of them


@sequence.register_fake
def _(
    projected: Tensor, taps: Tensor, bias: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, norm: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return _outputs(projected, A, norm)


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
