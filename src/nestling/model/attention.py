"""Grouped-query attention without positions, over a whole row, its documents, or a cache.

Of whole rows and documents a kernel takes care where there is one (model/native/), else torch.

B batch · L length · S keys seen · d hidden · G q c KV heads, query heads of each, head channels · H all query heads
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.model.block import Block
from nestling.model.cache import extend
from nestling.model.context import Context
from nestling.model.native import attention as native
from nestling.model.native.library import opaque
from nestling.model.width import Width


class Attention(Block):
    def mix(self, x_BLd: Tensor, width: Width, context: Context, cache: dict[str, Tensor] | None) -> Tensor:
        channels = self.architecture.head_dim
        query, key, value = (
            self.linear(x_BLd, f"mixer.{name}_proj", width).unflatten(-1, (-1, channels)).transpose(1, 2)
            for name in "qkv"
        )
        if cache is not None:
            key = extend(cache, "key", key, context.past, context.at_B)
            value = extend(cache, "value", value, context.past, context.at_B)
        heads = _attend(query, key, value, context)
        heads_BLGqc = heads.transpose(1, 2).unflatten(2, (self.architecture.num_key_value_heads, -1))
        self.show(context, "heads", heads_BLGqc.flatten(2))
        return self.linear(width.mask(heads_BLGqc, "q", "c").flatten(2), "mixer.o_proj", width)


def _attend(query_BHLc: Tensor, key_BGSc: Tensor, value_BGSc: Tensor, context: Context) -> Tensor:
    if context.kernel:
        key_BGSc, value_BGSc = key_BGSc.to(query_BHLc.dtype), value_BGSc.to(query_BHLc.dtype)  # a cache may be wider
        heads = query_BHLc.transpose(1, 2), key_BGSc.transpose(1, 2), value_BGSc.transpose(1, 2)
        if opaque():
            return native.attention(*heads, context.documents_BL)[0].transpose(1, 2)
        return native.attended(*heads, context.documents_BL).transpose(1, 2)
    if context.apart is not None:
        return _attend_apart(query_BHLc, key_BGSc, value_BGSc, context.apart)
    return _attend_masked(query_BHLc, key_BGSc, value_BGSc, context.attend_B1LS)


def _attend_masked(query_BHLc: Tensor, key_BGSc: Tensor, value_BGSc: Tensor, attend_B1LS: Tensor | None) -> Tensor:
    """Attention; for a single query the heads that share a key stand where queries would, and nothing is repeated."""
    if query_BHLc.shape[2] == 1:
        query_BGqc = query_BHLc.unflatten(1, (key_BGSc.shape[1], -1))[:, :, :, 0]
        return F.scaled_dot_product_attention(query_BGqc, key_BGSc, value_BGSc, attend_B1LS).flatten(1, 2)[:, :, None]
    causal = attend_B1LS is None
    return F.scaled_dot_product_attention(
        query_BHLc, key_BGSc, value_BGSc, attend_B1LS, is_causal=causal, enable_gqa=True
    )


def _attend_apart(
    query_BHLc: Tensor, key_BGLc: Tensor, value_BGLc: Tensor, apart: tuple[tuple[int, ...], ...]
) -> Tensor:
    """Causal attention within each of a row's documents, given their lengths."""
    rows = zip(query_BHLc.split(1), key_BGLc.split(1), value_BGLc.split(1), apart, strict=True)
    found = []
    for query, key, value, lengths in rows:
        documents = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
        found.append(torch.cat([_attend_masked(*document, None) for document in documents], 2))
    return torch.cat(found)
