"""The short causal convolution before the scan."""

import torch
from torch import Tensor


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
