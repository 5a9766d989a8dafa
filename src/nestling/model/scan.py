"""The chunked scan as one operation with a gradient of its own (what it computes: model/ssd.py).

On a CPU with a C++ compiler kernels take the place of what is here (model/native/).

Inside a chunk the recurrence is a masked product of C and B, [T, S] per head; between chunks it carries the state
(Dao & Gu 2024, arXiv 2405.21060, section 6). All that backward keeps is the inputs, y - D x and the states between
chunks, nothing of [T, S]. A few chunks are worked on at a time, as many as stay in the cache.

B batch · L length · C chunk · T, S positions inside a chunk · g group · h head in its group · p head channel · n state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestling.model.pieces import enough

CACHED = 2**17  # elements of [T, S] matrices that a CPU works on at a time


@dataclass(frozen=True)
class Piece:
    """Chunks of equal length that are worked on together."""

    first: int  # the number of its first chunk
    count: int
    start: int  # the position of its first chunk in the sequence
    length: int  # T

    def of(self, t_BL: Tensor) -> Tensor:
        """[B, L, ...] -> [C, B, T, ...], a view."""
        part = t_BL.narrow(1, self.start, self.count * self.length)
        return part.unflatten(1, (self.count, self.length)).transpose(0, 1)

    def by_group(self, t_BLg: Tensor) -> Tensor:
        """[B, L, g, ...] -> [C, B, g, T, ...], a view."""
        return self.of(t_BLg).transpose(2, 3)

    def by_head(self, t_BLgh: Tensor) -> Tensor:
        """[B, L, g, h, ...] -> [C, B, g, h, T, ...], a view."""
        return self.of(t_BLgh).movedim(2, 4)

    def before(self, states_CBghpn: Tensor) -> Tensor:
        return states_CBghpn.narrow(0, self.first, self.count)

    def after(self, states_CBghpn: Tensor) -> Tensor:
        return states_CBghpn.narrow(0, self.first + 1, self.count)


def pieces(x_BLghp: Tensor, chunk: int) -> Sequence[Piece]:
    """A whole sequence; a last chunk that is shorter is a piece of its own."""
    batch, length, groups, heads, _ = x_BLghp.shape
    whole, rest = divmod(length, chunk)
    together = CACHED // (batch * groups * heads * chunk**2) if x_BLghp.device.type == "cpu" else whole
    firsts = range(0, whole, max(together, 1))
    found = [Piece(first, min(firsts.step, whole - first), first * chunk, chunk) for first in firsts]
    return enough(found + ([Piece(whole, 1, whole * chunk, rest)] if rest else []), x_BLghp)


@dataclass(frozen=True)
class Decay:
    """What is left of one position's input at another. Behind the start of a document nothing is left."""

    within_CBghTS: Tensor
    from_start_CBgTh: Tensor  # of the state before the chunk, at each position
    to_end_CBgTh: Tensor  # of each position, in the state after the chunk
    through_CBgh11: Tensor  # of the state before the chunk, in the state after it

    @staticmethod
    def of(piece: Piece, dt_BLgh: Tensor, A_gh: Tensor, documents_BL: Tensor | None) -> "Decay":
        log = (piece.by_head(dt_BLgh) * A_gh[..., None]).cumsum(-1)  # C B g h T
        from_start, to_end = _left(log.clone()), _left(log[..., -1:] - log)
        within = _left(log[..., :, None] - log[..., None, :]).tril_()
        if documents_BL is not None:
            here = piece.of(documents_BL)[:, :, None, None]  # C B 1 1 T
            edges = torch.arange(piece.count, device=log.device) * piece.length + piece.start
            before = documents_BL.T[(edges - 1).clamp(min=0)][:, :, None, None, None]  # C B 1 1 1
            within.masked_fill_(here[..., :, None] != here[..., None, :], 0)
            from_start, to_end = from_start * (here == before), to_end * (here == here[..., -1:])
        return Decay(within, from_start.mT, to_end.mT, from_start[..., -1, None, None])


FAINT = -60.0
"""The logarithm of a decay that is nothing beside 1, in float64 too. Below -87 a CPU's exp is 100 times slower."""


def _left(log: Tensor) -> Tensor:
    """exp of the logarithm of a decay, in place."""
    return log.clamp_(FAINT, 0).exp_()


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ssd`, one opaque step to torch.compile; also returns what backward needs: y - D x, which is lost in the rounding
    of y where D x is larger, and the states before and after each chunk."""
    y, recalled, states = x.new_empty(x.shape), x.new_empty(x.shape), _states(x, B, chunk)
    states[0] = state
    for piece in pieces(x, chunk):
        decay = Decay.of(piece, dt, A, documents)
        B_CBgTn, C_CBgTn = piece.by_group(B).contiguous(), piece.by_group(C).contiguous()
        input_CBgThp = _times(piece.by_group(x), piece.by_group(dt) * decay.to_end_CBgTh)
        fresh = _outer(input_CBgThp, B_CBgTn)
        for new, before, after, kept in zip(
            fresh, piece.before(states), piece.after(states), decay.through_CBgh11, strict=True
        ):
            torch.addcmul(new, before, kept, out=after)
        scores = decay.within_CBghTS.mul_((C_CBgTn @ B_CBgTn.mT)[:, :, :, None])
        y_CBghTp = scores @ _times(piece.by_head(x), piece.by_head(dt))
        carried_CBgThp = _read(C_CBgTn, piece.before(states))
        recalled_CBgThp = piece.by_group(recalled)
        torch.addcmul(y_CBghTp.transpose(3, 4), carried_CBgThp, decay.from_start_CBgTh[..., None], out=recalled_CBgThp)
        torch.addcmul(recalled_CBgThp, piece.by_group(x), D[:, None, :, None], out=piece.by_group(y))
    return y, states[-1].clone(), recalled, states


scan = torch.library.custom_op("nestling::scan", scanned, mutates_args=())


@torch.library.custom_op("nestling::scan_backward", mutates_args=())
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
    states: Tensor,
    dy: Tensor,
    dlast: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D and the first state.

    With a_t the sum of dt A up to t in its chunk and u = dt x, every term of r_t = y_t - D x_t has a factor exp(a_t),
    every term that u_s enters a factor exp(-a_s), and the state after the chunk a factor exp(a_T). So the gradient of
    a_t is dy_t · r_t - du_t · u_t, plus dS · S at the end of the chunk: no gradient of a [T, S] decay is formed.
    """
    dx, ddt, dB, dC = (t.new_empty(t.shape) for t in (x, dt, B, C))
    dA, dD, dstate = A.new_zeros(A.shape), D.new_zeros(D.shape), dlast
    for piece in reversed(pieces(x, chunk)):
        decay = Decay.of(piece, dt, A, documents)
        x_CBgThp, dt_CBgTh, dy_CBgThp = piece.by_group(x), piece.by_group(dt), piece.by_group(dy)
        B_CBgTn, C_CBgTn = piece.by_group(B).contiguous(), piece.by_group(C).contiguous()
        read_CBgThp = _times(dy_CBgThp, decay.from_start_CBgTh)
        fresh = _outer(read_CBgThp, C_CBgTn)
        after = torch.empty_like(fresh)  # the gradient of the state after each chunk
        after[-1] = dstate
        for index in reversed(range(1, piece.count)):
            torch.addcmul(fresh[index], after[index], decay.through_CBgh11[index], out=after[index - 1])
        dstate = torch.addcmul(fresh[0], after[0], decay.through_CBgh11[0])

        input_CBghTp, dy_CBghTp = _times(piece.by_head(x), piece.by_head(dt)), piece.by_head(dy).contiguous()
        dscores_CBgTS = (dy_CBghTp @ input_CBghTp.mT).mul_(decay.within_CBghTS).sum(3)
        ended_CBgThp = _times(x_CBgThp, dt_CBgTh * decay.to_end_CBgTh)
        piece.by_group(dB).copy_(_write(ended_CBgThp, after)).add_(dscores_CBgTS.mT @ C_CBgTn)
        piece.by_group(dC).copy_(_write(read_CBgThp, piece.before(states))).add_(dscores_CBgTS @ B_CBgTn)

        scores = decay.within_CBghTS.mul_((C_CBgTn @ B_CBgTn.mT)[:, :, :, None])
        dinput_CBgThp = torch.addcmul(
            (scores.mT @ dy_CBghTp).transpose(3, 4), _read(B_CBgTn, after), decay.to_end_CBgTh[..., None]
        )
        direct_CBgThp = dy_CBgThp * D[:, None, :, None]
        torch.addcmul(direct_CBgThp, dinput_CBgThp, dt_CBgTh[..., None], out=piece.by_group(dx))

        dy_x, dinput_x = (dy_CBgThp * x_CBgThp).sum(-1), (dinput_CBgThp * x_CBgThp).sum(-1)  # C B g T h
        da = (dy_CBgThp * piece.by_group(recalled)).sum(-1) - dinput_x * dt_CBgTh
        da[:, :, :, -1] += (after * piece.after(states)).sum((-1, -2))
        dlog = da.flip(3).cumsum(3).flip(3)  # of dt A: it is in every later sum
        torch.addcmul(dinput_x, dlog, A[:, None], out=piece.by_group(ddt))
        dA += (dlog * dt_CBgTh).sum((0, 1, 3))
        dD += dy_x.sum((0, 1, 3))
    return dx, ddt, dA, dB, dC, dD, dstate.clone()


def _times(t: Tensor, weight: Tensor) -> Tensor:
    """t [..., p] times a weight per row [...], contiguous whatever the order of t in memory."""
    return torch.mul(t, weight[..., None], out=t.new_empty(t.shape))


def _outer(t_CBgThp: Tensor, B_CBgTn: Tensor) -> Tensor:
    """Σ_t t ⊗ B -> [C, B, g, h, p, n]."""
    return (t_CBgThp.flatten(-2).mT @ B_CBgTn).unflatten(3, t_CBgThp.shape[-2:])


def _read(C_CBgTn: Tensor, states_CBghpn: Tensor) -> Tensor:
    """S C -> [C, B, g, T, h, p]."""
    return (C_CBgTn @ states_CBghpn.flatten(3, 4).mT).unflatten(-1, states_CBghpn.shape[3:5])


def _write(t_CBgThp: Tensor, states_CBghpn: Tensor) -> Tensor:
    """Σ_hp t S -> [C, B, g, T, n]."""
    return t_CBgThp.flatten(-2) @ states_CBghpn.flatten(3, 4)


def _states(x_BLghp: Tensor, B_BLgn: Tensor, chunk: int) -> Tensor:
    batch, length, groups, heads, channels = x_BLghp.shape
    return x_BLghp.new_empty(-(-length // chunk) + 1, batch, groups, heads, channels, B_BLgn.shape[-1])


@scan.register_fake
def _(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor, documents: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), state.new_empty(state.shape), x.new_empty(x.shape), _states(x, B, chunk)


@scan_backward.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return (*(t.new_empty(t.shape) for t in (x, dt, A, B, C, D)), rest[-1].new_empty(rest[-1].shape))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *values, _, documents, ctx.chunk = inputs
    _, _, recalled, states = output
    ctx.mark_non_differentiable(recalled, states)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*values, documents, recalled, states)


def _gradients(ctx: Any, dy: Tensor | None, dlast: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    *values, documents, recalled, states = ctx.saved_tensors
    dy = torch.zeros_like(recalled) if dy is None else dy
    dlast = torch.zeros_like(states[0]) if dlast is None else dlast
    with torch.autocast(dy.device.type, enabled=False):  # the caller's may still be on: backward is as wide as forward
        return *scan_backward(*values, documents, ctx.chunk, recalled, states, dy, dlast), None, None


scan.register_autograd(_gradients, setup_context=_keep)
