"""The Mamba-2 recurrence (state-space duality), in chunks and one token at a time, and the convolution before it.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t ⊗ B_t        y_t = S_t C_t + D x_t

B batch · L length · g group · h head in its group · p head channel · n state · k taps · c channels of the convolution.
B and C belong to a group and are never repeated to its heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.model import mamba_ssm
from nestling.model.conv import conv, convolved
from nestling.model.native import mamba
from nestling.model.native.library import opaque, runs
from nestling.model.pointwise import wide
from nestling.model.scan import scan, scanned

CHUNK = 128  # on a GPU; long where launching a product costs more than its FLOPs


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
    precision: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan a sequence; returns y [B, L, g, h, p] and the state after its last token [B, g, h, p, n].

    chunk: how many positions are one masked product; any number gives the same result. documents_BL: one number per
    document of a row; the state is zero where a new one starts. The state given belongs to the first document, the
    state returned to the last. precision: of the model; one in 16 bits takes the kernels of mamba-ssm where they are.
    """
    if mamba_ssm.scans(x_BLghp, precision):
        assert precision is not None
        y, last = mamba_ssm.scan(x_BLghp, dt_BLgh, A_gh, B_BLgn, C_BLgn, D_gh, state_Bghpn, documents_BL, precision)
        return wide(y), last
    x_BLghp, B_BLgn, C_BLgn = wide(x_BLghp), wide(B_BLgn), wide(C_BLgn)
    if state_Bghpn is None:
        state_Bghpn = x_BLghp.new_zeros(*x_BLghp.shape[:1], *x_BLghp.shape[2:], B_BLgn.shape[-1])
    if chunk is None:
        chunk = mamba.CHUNK if x_BLghp.device.type == "cpu" else CHUNK
    given = x_BLghp, dt_BLgh, A_gh, B_BLgn, C_BLgn, D_gh, state_Bghpn
    one_step, at_once = (mamba.scan, mamba.scanned) if runs(*given) else (scan, scanned)
    y, last, *_ = (one_step if opaque() else at_once)(*given, documents_BL, chunk)
    return y, last


def ssd_step(
    x_Bghp: Tensor, dt_Bgh: Tensor, A_gh: Tensor, B_Bgn: Tensor, C_Bgn: Tensor, D_gh: Tensor, state_Bghpn: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence; returns y [B, g, h, p] and the state, which is changed in place."""
    input_Bghp, rows = x_Bghp * dt_Bgh[..., None], state_Bghpn.flatten(0, 1).flatten(1, 2)  # [B g, h p, n]
    state_Bghpn.mul_((dt_Bgh * A_gh).exp_()[..., None, None])
    rows.baddbmm_(input_Bghp.view(len(rows), -1, 1), B_Bgn.flatten(0, 1)[:, None])
    y = C_Bgn.flatten(0, 1)[:, None] @ rows.mT  # five times as fast as the state times a column
    return torch.addcmul(y.view(x_Bghp.shape), x_Bghp, D_gh[..., None]), state_Bghpn


def causal_conv(
    x_BLc: Tensor,
    taps_kc: Tensor,
    bias_c: Tensor | None,
    window_Bkc: Tensor,
    documents_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """silu of the depthwise causal convolution; returns y [B, L, c] and the window for the next token.

    taps_kc: the last is of the position itself; sums are in their dtype. window_Bkc: the k - 1 inputs before this
    sequence (zeros at the start of a document). documents_BL: one number per document of a row; a position sees inputs
    of its own document only, and the window belongs to the first. Of 16 bits on a GPU causal-conv1d makes y of 16 bits.
    """
    if x_BLc.shape[1] == 1:  # the window and this input, once over
        seen_Bkc = torch.cat([window_Bkc, x_BLc], 1)
        y_B1c = (seen_Bkc * taps_kc).sum(1, keepdim=True)
        return F.silu(y_B1c if bias_c is None else y_B1c + bias_c), seen_Bkc[:, 1:]
    if mamba_ssm.convolves(x_BLc, taps_kc):
        y_BLc = mamba_ssm.conv(x_BLc, taps_kc, bias_c, window_Bkc, documents_BL)
    else:
        bias_c = taps_kc.new_zeros(taps_kc.shape[1]) if bias_c is None else bias_c
        y_BLc = (conv if opaque() else convolved)(x_BLc, taps_kc, bias_c, window_Bkc, documents_BL)
    seen_BLc = torch.cat([window_Bkc, x_BLc[:, -len(taps_kc) :]], 1)
    return y_BLc, seen_BLc[:, seen_BLc.shape[1] - window_Bkc.shape[1] :]
