"""The Mamba-2 recurrence (state-space duality), in chunks and one token at a time.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t ⊗ B_t        y_t = S_t C_t + D x_t

B batch · L length · C chunk · T, S positions inside a chunk · g group · h head in its group · p head channel · n state.
B and C belong to a group and are never repeated to its heads.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def ssd(
    x_BLghp: Tensor,
    dt_BLgh: Tensor,
    A_gh: Tensor,
    B_BLgn: Tensor,
    C_BLgn: Tensor,
    D_gh: Tensor,
    state_Bghpn: Tensor | None = None,
    chunk: int = 64,
    documents_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan a sequence; returns y [B, L, g, h, p] and the state after its last token [B, g, h, p, n].

    Inside a chunk the recurrence is a masked product of C and B, [T, S] per head; between chunks it carries the state
    (Dao & Gu 2024, arXiv 2405.21060, section 6). Positions past the end are padded with dt = 0, which changes nothing.
    documents_BL: one number per document of a row; the state is zero where a new one starts. The state given belongs
    to the first document, the state returned to the last.
    """
    length = x_BLghp.shape[1]
    chunk = min(chunk, length)
    x, dt, B, C = (_chunks(t, chunk) for t in (x_BLghp * dt_BLgh[..., None], dt_BLgh, B_BLgn, C_BLgn))
    x = x.permute(0, 1, 3, 4, 2, 5)  # B C g h T p
    B, C = B.transpose(2, 3), C.transpose(2, 3)  # B C g T n
    decay = (dt * A_gh).permute(0, 1, 3, 4, 2).cumsum(-1)  # B C g h T, log of what is left of position 0's input
    reach = Reach.of(documents_BL, chunk)

    future = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    between = (decay[..., :, None] - decay[..., None, :]).masked_fill(future, -torch.inf).exp()  # B C g h T S
    between = reach.within(between)
    scores = C @ B.transpose(-1, -2)  # B C g T S
    y = (scores[:, :, :, None] * between) @ x  # B C g h T p

    to_end = reach.to_end((decay[..., -1:] - decay).exp())
    inputs = (x * to_end[..., None]).transpose(-1, -2) @ B[:, :, :, None]  # B C g h p n
    state = torch.zeros_like(inputs[:, 0]) if state_Bghpn is None else state_Bghpn
    if state_Bghpn is not None or inputs.shape[1] > 1:
        starts, from_start = [], reach.from_start(decay.exp())
        for index in range(inputs.shape[1]):
            starts.append(state)
            state = state * from_start[:, index, ..., -1, None, None] + inputs[:, index]
        carried = C[:, :, :, None] @ torch.stack(starts, 1).transpose(-1, -2)  # B C g h T p
        y = y + carried * from_start[..., None]
    else:
        state = inputs[:, 0]
    y = y.permute(0, 1, 4, 2, 3, 5).flatten(1, 2)[:, :length]
    return y + x_BLghp * D_gh[..., None], state


@dataclass(frozen=True)
class Reach:
    """Which positions of a chunk belong to the same document: nothing decays across a boundary, it is gone."""

    documents_BCT: Tensor | None
    before_BC: Tensor | None  # the document that the chunk before ended in

    @staticmethod
    def of(documents_BL: Tensor | None, chunk: int) -> "Reach":
        if documents_BL is None:
            return Reach(None, None)
        length = documents_BL.shape[1]
        places = torch.arange(-(-length // chunk) * chunk, device=documents_BL.device).clamp(max=length - 1)
        documents = documents_BL[:, places].unflatten(1, (-1, chunk))
        return Reach(documents, torch.cat([documents[:, :1, 0], documents[:, :-1, -1]], 1))

    def within(self, decay_BCghTS: Tensor) -> Tensor:
        if self.documents_BCT is None:
            return decay_BCghTS
        same = self.documents_BCT[..., :, None] == self.documents_BCT[..., None, :]
        return decay_BCghTS * same[:, :, None, None]

    def to_end(self, decay_BCghT: Tensor) -> Tensor:
        if self.documents_BCT is None:
            return decay_BCghT
        return decay_BCghT * (self.documents_BCT == self.documents_BCT[..., -1:])[:, :, None, None]

    def from_start(self, decay_BCghT: Tensor) -> Tensor:
        if self.documents_BCT is None or self.before_BC is None:
            return decay_BCghT
        return decay_BCghT * (self.documents_BCT == self.before_BC[..., None])[:, :, None, None]


def _chunks(t: Tensor, chunk: int) -> Tensor:
    """[B, L, ...] -> [B, C, T, ...], padded with zeros at the end."""
    padding = -t.shape[1] % chunk
    return F.pad(t, (0, 0) * (t.ndim - 2) + (0, padding)).unflatten(1, (-1, chunk))


def ssd_step(
    x_Bghp: Tensor, dt_Bgh: Tensor, A_gh: Tensor, B_Bgn: Tensor, C_Bgn: Tensor, D_gh: Tensor, state_Bghpn: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence; returns y [B, g, h, p] and the new state."""
    inputs = (x_Bghp * dt_Bgh[..., None])[..., None] * B_Bgn[:, :, None, None]
    state = state_Bghpn * (dt_Bgh * A_gh).exp()[..., None, None] + inputs
    y = (state @ C_Bgn[:, :, None, :, None])[..., 0]
    return y + x_Bghp * D_gh[..., None], state


def causal_conv(
    x_BLc: Tensor,
    weight_c1k: Tensor,
    bias_c: Tensor | None,
    window_Bkc: Tensor,
    documents_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution as k shifted multiply-adds; returns y [B, L, c] and the window for the next token.

    window_Bkc: the k - 1 inputs before this sequence (zeros at the start of a document). documents_BL: one number per
    document of a row; a position sees inputs of its own document only, and the window belongs to the first. Sums are in
    float32 or better.
    """
    width = weight_c1k.shape[-1]
    dtype = torch.promote_types(x_BLc.dtype, weight_c1k.dtype)
    wide_c1k = weight_c1k.to(torch.promote_types(dtype, torch.float32))
    length = x_BLc.shape[1]
    x = torch.cat([window_Bkc, x_BLc], 1)
    y = x[:, width - 1 :] * wide_c1k[:, 0, width - 1]
    for back in range(1, width):
        seen = x[:, width - 1 - back : width - 1 - back + length]
        if documents_BL is not None:
            seen = seen * (documents_BL == shifted(documents_BL, back))[..., None]
        y = y + seen * wide_c1k[:, 0, width - 1 - back]
    return (y if bias_c is None else y + bias_c).to(dtype), x[:, x.shape[1] - (width - 1) :]


def shifted(documents_BL: Tensor, back: int) -> Tensor:
    """The document of the position `back` places before each; before the first one there is only the first document."""
    places = torch.arange(-back, documents_BL.shape[1] - back, device=documents_BL.device)
    return documents_BL[:, places.clamp(min=0)]
