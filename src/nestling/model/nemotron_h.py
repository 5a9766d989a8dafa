"""nemotron_h's forward: Mamba-2, attention, MLP and mixture-of-experts blocks on one residual stream, at any width.

B batch · L length · S keys seen · d hidden · v vocabulary. A `Widths` says per layer what runs (model/width.py), and
nothing in the model remembers one.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nestling.arch.architecture import Architecture, block_tensors
from nestling.arch.axes import Layout
from nestling.arch.submodel import Tensor as Stored
from nestling.arch.submodel import tensors
from nestling.model.attention import Attention
from nestling.model.block import MLP, Block, Part, rms_norm
from nestling.model.cache import Cache
from nestling.model.context import Context, Watch
from nestling.model.experts import Experts
from nestling.model.mamba2 import Mamba2
from nestling.model.width import Widths, hard

BLOCKS: dict[str, type[Block]] = {"M": Mamba2, "*": Attention, "-": MLP, "E": Experts}


@dataclass(frozen=True)
class Output:
    logits: Tensor  # [B, L, v]
    cache: Cache | None = None


class NemotronH(nn.Module):
    """The whole model; `model(ids, widths)` runs any member of its family."""

    def __init__(self, architecture: Architecture, **factory: Any) -> None:
        super().__init__()
        self.architecture = architecture
        self.gradient_checkpointing = (
            False  # as transformers spells it: keep only the input of every block for backward
        )
        full = architecture.sizes()
        self.ends = Part(_rows(architecture, "model", full), **factory)
        self.layers = nn.ModuleList(
            BLOCKS[kind](architecture, layer, _rows(architecture, kind, full), **factory)
            for layer, kind in enumerate(architecture.hybrid_override_pattern)
        )

    def forward(
        self,
        input_ids_BL: Tensor,
        widths: Widths | None = None,
        cache: Cache | None = None,
        attention_mask_BS: Tensor | None = None,
        watch: Watch | None = None,
        documents_BL: Tensor | None = None,
    ) -> Output:
        """Logits of every position.

        cache: continue from it, and extend it in place. attention_mask_BS: 1 for real tokens, 0 for padding, over the
        cached tokens and these; padding must be on the left. documents_BL: several documents in one row, an integer
        that is constant inside a document and changes at each boundary; every document is computed as if it were alone
        (state, convolution window and attention begin anew), and padding, wherever it is, is a document like any other.
        Not with a cache, which continues one document.
        """
        hidden_BLd = self.hidden(input_ids_BL, widths, cache, attention_mask_BS, watch, documents_BL)
        return Output(F.linear(hidden_BLd, self.head_weight(widths)), cache)

    def hidden(
        self,
        input_ids_BL: Tensor,
        widths: Widths | None = None,
        cache: Cache | None = None,
        attention_mask_BS: Tensor | None = None,
        watch: Watch | None = None,
        documents_BL: Tensor | None = None,
    ) -> Tensor:
        """What the output head multiplies, [B, L, d]: the residual stream after its last norm."""
        widths = widths or hard(self.architecture)
        x_BLd = self.embed(input_ids_BL, widths)
        context = Context.of(x_BLd, cache, attention_mask_BS, watch, documents_BL)
        for layer, width in widths.layers:
            state = None if cache is None else cache.layers.setdefault(layer, {})
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_BLd = checkpoint(self.layers[layer], x_BLd, width, context, state, use_reentrant=False)
            else:
                x_BLd = self.layers[layer](x_BLd, width, context, state)
        if cache is not None:
            cache.advance(input_ids_BL.shape[1])
        x_BLd = rms_norm(x_BLd, self.ends.part("backbone.norm_f.weight", widths.ends), widths.ends, self.eps)
        if watch is not None:
            watch(None, "norm", x_BLd)
        return x_BLd

    def embed(self, input_ids_BL: Tensor, widths: Widths) -> Tensor:
        embedded = F.embedding(input_ids_BL, self.ends.part("backbone.embeddings.weight", widths.ends))
        return widths.ends.mask(embedded, "d")

    def head_weight(self, widths: Widths | None = None) -> Tensor:
        """The output head [v, d]: a prefix view of the stored one, or of the embeddings that it is tied to."""
        name = "lm_head" if self.architecture.untied else "backbone.embeddings"
        return self.ends.part(f"{name}.weight", (widths or hard(self.architecture)).ends)

    @property
    def eps(self) -> float:
        return self.architecture.layer_norm_epsilon

    def on_disk(self) -> dict[str, nn.Parameter]:
        """The parameters under their checkpoint names, in checkpoint order."""
        return {tensor.name: self._parameter(tensor) for tensor in tensors(self.architecture)}

    def _parameter(self, tensor: Stored) -> nn.Parameter:
        if tensor.layer is None:
            return self.ends.get_parameter(tensor.name)
        return self.layers[tensor.layer].get_parameter(tensor.name.split(".", 3)[-1])


def _rows(architecture: Architecture, kind: str, full: dict[str, int]) -> dict[str, tuple[Layout, tuple[int, ...]]]:
    return {
        row.name.format(e=expert): (row.layout, row.layout.shape(full))
        for row in block_tensors(architecture, kind)
        for expert in range(full["e"] if "{e}" in row.name else 1)
    }
