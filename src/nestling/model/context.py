"""What every layer of a forward pass needs to know besides its input.

B batch · L length · S keys seen · d hidden · f FFN · g h p Mamba groups, heads, channels · G q c KV heads, query heads,
head channels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.errors import NestlingError
from nestling.model.cache import Cache
from nestling.model.native.library import runs

Watch = Callable[[int | None, str, Tensor], None]
"""Is shown (layer, site, activation) as a forward pass goes by; it cannot change anything. Sites: `norm` [B, L, d] the
input of every mixer and of the head, `x` and `gated` [B, L, g h p] before the convolution and before the output
projection, `up` and `hidden` [B, L, f] before and after the non-linearity, `heads` [B, L, G q c] before the output
projection. Of a mixture of experts `chosen` [B, L, e] whether a token is an expert's, `expert.NUMBER` [n, m] after the
non-linearity, of its n tokens, `routed` [B, L, e] gate · ‖output‖₂ of those chosen and -1 elsewhere, and `shared`
[B, L, s]."""

DENSE = 2048
"""Positions of a packed row up to which a mask is made, 4 MiB, for one product instead of one a document."""


@dataclass(frozen=True)
class Context:
    """The real tokens here, who may attend to whom, who watches."""

    real_BL1: Tensor | None  # 1 for real tokens; None when all are
    attend_B1LS: Tensor | None  # None: causal, no padding, nothing cached
    watch: Watch | None = None
    documents_BL: Tensor | None = None  # counted from 0 in every row; None: one document a row
    past: int = 0  # columns of cached keys in use
    at_B: Tensor | None = None  # the column of each row's next key, where rows differ
    apart: tuple[tuple[int, ...], ...] | None = None  # lengths of every row's documents, each attended to by itself
    kernel: bool = False  # attention has one: whole sequences of real tokens, of documents or not

    @staticmethod
    def of(
        x_BLd: Tensor,
        cache: Cache | None,
        attention_mask_BS: Tensor | None,
        watch: Watch | None = None,
        documents_BL: Tensor | None = None,
    ) -> "Context":
        length, past = x_BLd.shape[1], cache.length if cache is not None else 0
        if documents_BL is not None:
            return Context._packed(x_BLd, cache, attention_mask_BS, watch, documents_BL)
        if cache is not None and (cache.lengths is not None or cache.at_B is not None):
            assert length == 1, "rows of different lengths go on one token at a time"
            at_B = torch.tensor(cache.lengths, device=x_BLd.device) if cache.at_B is None else cache.at_B
            attend = torch.arange(past + 1, device=x_BLd.device) <= at_B[:, None]
            return Context(None, attend[:, None, None], watch, past=past, at_B=at_B)
        if attention_mask_BS is None and (past == 0 or length == 1):
            return Context(None, None, watch, past=past, kernel=past == 0 and length > 1 and _kernel(x_BLd))
        query = torch.arange(past, past + length, device=x_BLd.device)[:, None]
        key = torch.arange(past + length, device=x_BLd.device)
        attend = (key <= query)[None, None]
        if attention_mask_BS is None:
            return Context(None, attend, watch, past=past)
        real = attention_mask_BS.bool()
        attend = attend & real[:, None, None, :] | (key == query)  # padding sees itself: a softmax over nothing is NaN
        return Context(real[:, past:, None].to(x_BLd.dtype), attend, watch, past=past)

    @staticmethod
    def _packed(
        x_BLd: Tensor, cache: Cache | None, attention_mask_BS: Tensor | None, watch: Watch | None, documents_BL: Tensor
    ) -> "Context":
        """Several documents a row. Padding begins a document of its own, so that nothing more need be said of it.

        Without a kernel who may attend to whom is a dense mask, L² bytes a row; in rows longer than DENSE documents are
        attended to one after the other instead, so that memory grows with L.
        """
        if cache is not None:
            raise NestlingError("documents_BL is for packed rows; a cache continues one document: give one of the two")
        if documents_BL.shape != x_BLd.shape[:2]:
            raise NestlingError(
                f"documents_BL is {list(documents_BL.shape)}, the input ids are {list(x_BLd.shape[:2])}: give every "
                "input the number of its document"
            )
        begins = documents_BL.diff(dim=1) != 0
        if attention_mask_BS is not None:
            begins = begins | attention_mask_BS.bool().diff(dim=1)
        counted = F.pad(begins.cumsum(1), (1, 0))
        if _kernel(x_BLd):
            return Context(None, None, watch, counted, kernel=True)
        if x_BLd.shape[1] > DENSE:
            lengths = (row.unique_consecutive(return_counts=True)[1].tolist() for row in counted)
            return Context(None, None, watch, counted, apart=tuple(map(tuple, lengths)))
        causal = torch.ones(x_BLd.shape[1], x_BLd.shape[1], dtype=torch.bool, device=x_BLd.device).tril()
        attend = causal & (counted[:, :, None] == counted[:, None, :])
        return Context(None, attend[:, None], watch, counted)

    @property
    def plain(self) -> bool:
        """All tokens are real, and nobody watches."""
        return self.real_BL1 is None and self.watch is None

    def real(self, x_BLc: Tensor) -> Tensor:
        """Zero at padding: what the convolution and the state must not see."""
        return x_BLc if self.real_BL1 is None else x_BLc * self.real_BL1


def _kernel(x_BLd: Tensor) -> bool:
    """Whether attention has a kernel for what products make of these, which autocast narrows."""
    narrowed = torch.is_autocast_enabled("cpu") and x_BLd.dtype != torch.float64
    return runs(x_BLd, dtype=torch.get_autocast_dtype("cpu") if narrowed else None, narrow=True)
