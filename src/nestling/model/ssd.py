"""The Mamba-2 recurrence (state-space duality), in chunks and one token at a time, and the convolution before it.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t ⊗ B_t        y_t = S_t C_t + D x_t

B batch · L length · g group · h head in its group · p head channel · n state · k taps · c channels of the convolution.
B and C belong to a group and are never repeated to its heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.model.conv import conv
from nestling.model.scan import scan

CPU_CHUNK, CHUNK = 32, 128  # short where a product costs what its FLOPs do, long where launching it costs more


def ssd(
    x_BLghp: Tensor,
    dt_BLgh: Tensor,
    A_gh: Tensor,
    B_BLgn: Tensor,
    C_BLgn: Tensor,
    D_gh: Tensor,
    state_Bghpn: Tensor | None = None,
    chunk: int | None = None,
    documents_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan a sequence; returns y [B, L, g, h, p] and the state after its last token [B, g, h, p, n].

    chunk: how many positions are one masked product; any number gives the same result. documents_BL: one number per
    document of a row; the state is zero where a new one starts. The state given belongs to the first document, the
    state returned to the last.
    """
    if state_Bghpn is None:
        state_Bghpn = x_BLghp.new_zeros(*x_BLghp.shape[:1], *x_BLghp.shape[2:], B_BLgn.shape[-1])
    if chunk is None:
        chunk = CPU_CHUNK if x_BLghp.device.type == "cpu" else CHUNK
    y, last, *_ = scan(x_BLghp, dt_BLgh, A_gh, B_BLgn, C_BLgn, D_gh, state_Bghpn, documents_BL, chunk)
    return y, last


def ssd_step(
    x_Bghp: Tensor, dt_Bgh: Tensor, A_gh: Tensor, B_Bgn: Tensor, C_Bgn: Tensor, D_gh: Tensor, state_Bghpn: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence; returns y [B, g, h, p] and the state, which is changed in place."""
    state_Bghpn.mul_((dt_Bgh * A_gh).exp()[..., None, None])
    state_Bghpn.addcmul_((x_Bghp * dt_Bgh[..., None])[..., None], B_Bgn[:, :, None, None])
    y_Bg1hp = C_Bgn[:, :, None] @ state_Bghpn.flatten(2, 3).mT  # five times as fast as the state times a column
    return y_Bg1hp.view_as(x_Bghp) + x_Bghp * D_gh[..., None], state_Bghpn


def causal_conv(
    x_BLc: Tensor,
    weight_c1k: Tensor,
    bias_c: Tensor | None,
    window_Bkc: Tensor,
    documents_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """silu of the depthwise causal convolution; returns y [B, L, c] and the window for the next token.

    window_Bkc: the k - 1 inputs before this sequence (zeros at the start of a document). documents_BL: one number per
    document of a row; a position sees inputs of its own document only, and the window belongs to the first. Sums are in
    float32 or better.
    """
    dtype = torch.promote_types(x_BLc.dtype, weight_c1k.dtype)
    weight_kc = weight_c1k[:, 0].mT.to(torch.promote_types(dtype, torch.float32))
    if x_BLc.shape[1] == 1:  # the window and this input, once over
        seen_Bkc = torch.cat([window_Bkc, x_BLc], 1)
        y_B1c = (seen_Bkc * weight_kc).sum(1, keepdim=True)
        return F.silu(y_B1c if bias_c is None else y_B1c + bias_c).to(dtype), seen_Bkc[:, 1:]
    bias_c = weight_kc.new_zeros(weight_kc.shape[1]) if bias_c is None else bias_c.to(weight_kc.dtype)
    y_BLc = conv(x_BLc, weight_kc, bias_c, window_Bkc, documents_BL)
    seen_BLc = torch.cat([window_Bkc, x_BLc[:, -len(weight_kc) :]], 1)
    return y_BLc.to(dtype), seen_BLc[:, seen_BLc.shape[1] - window_Bkc.shape[1] :]
