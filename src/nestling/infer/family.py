"""`Family`: every size of an elastic checkpoint as a view of one storage."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from nestling.arch.cost import parameters
from nestling.arch.submodel import Submodel
from nestling.infer.speech import Speech
from nestling.model.block import Part
from nestling.model.cache import Cache
from nestling.model.native import product as native
from nestling.model.nemotron_h import NemotronH, Output
from nestling.model.store import load_model
from nestling.model.width import Width, Widths, hard, in_pieces, in_place, prefix
from nestling.weights.elastic import Elastic, open_elastic


@dataclass(frozen=True, eq=False, repr=False)
class View:
    """One size of a family. Call it like a model: `view(input_ids).logits`, [B, L, vocabulary]."""

    model: NemotronH
    submodel: Submodel
    looked_up: Widths | None = None
    speech: Speech | None = None

    def __repr__(self) -> str:
        sizes = ", ".join(f"{field}={size}" for field, size in self.submodel.given().items())
        return f"View({self.parameters:,} parameters{sizes and f', {sizes}'})"

    @property
    def widths(self) -> Widths:
        return self.looked_up or hard(self.model.architecture, self.submodel)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def parameters(self) -> int:
        return parameters(self.model.architecture, self.submodel)

    def held(self, spare: int = 0) -> "View":
        """The same size with its prefixes looked up once, for many steps in a row.

        Matrices that no strided view can express are read in pieces where there are kernels for it. Elsewhere they are
        packed while `spare` bytes last, and packed anew in every product after that. Vectors are copied, so a change of
        the weights after this call is not seen by the view.
        """
        if self.looked_up is not None:
            return self
        left, layers = spare, []
        ends, left = _hold(self.model.ends, self.widths.ends, left)
        for layer, width in self.widths.layers:
            looked_up, left = _hold(self.model.layers[layer], width, left)
            layers.append((layer, looked_up))
        return replace(self, looked_up=Widths(ends, tuple(layers)))

    def __call__(
        self, input_ids: Tensor, *, attention_mask: Tensor | None = None, cache: Cache | None = None
    ) -> Output:
        """Logits of every position; `cache=Cache()` starts a decode. Padding (mask 0) must be on the left."""
        return self.model(input_ids, self.widths, cache, attention_mask)

    @overload
    def generate(self, prompts: str, **how: Any) -> str: ...

    @overload
    def generate(self, prompts: Sequence[str], **how: Any) -> list[str]: ...

    def generate(self, prompts: str | Sequence[str], **how: Any) -> str | list[str]:
        """The text that follows a prompt, or each of several that are computed together.

        how: max_tokens, temperature, top_p, top_k, stop and seed, as `infer.writing.written` has them.
        """
        from nestling.infer.writing import written  # it builds on views

        texts = written(self, [prompts] if isinstance(prompts, str) else prompts, **how)
        return texts[0] if isinstance(prompts, str) else texts

    def stream(self, prompt: str, **how: Any) -> Iterator[str]:
        """The text that follows a prompt, in pieces as they come; joined, they are what `generate` returns."""
        from nestling.infer.writing import pieces

        return (piece for _, piece in pieces(self, [prompt], **how))


def _hold(part: Any, width: Width, spare: int) -> tuple[Width, int]:
    """The width with every prefix that may be kept, and the bytes that are still spare."""
    assert isinstance(part, Part)
    held, pieces = {}, {}
    for name, layout in part.layouts.items():
        stored = part.get_parameter(name)
        if len(layout.dims) == 2 and in_pieces(layout, width):  # a matrix; kernels of the convolution are small
            if native.multiplies(stored):
                pieces[name] = in_place(stored, layout, width)
                continue
            nbytes = layout.numel(width.kept) * stored.element_size()
            if nbytes > spare:
                continue
            spare -= nbytes
        held[name] = prefix(stored, layout, width)
    width = replace(width, held=held, pieces=pieces)
    width = replace(width, derived=part.derived(width))
    return replace(width, bound=part.bound(width)), spare


@dataclass(frozen=True, eq=False, repr=False)
class Family(Mapping[str, View]):
    """The sizes of one checkpoint: `family["50%"]`, `family[Submodel(hidden_size=96)]`. All share its storage."""

    elastic: Elastic
    model: NemotronH

    def __repr__(self) -> str:
        return f"Family({str(self.elastic.checkpoint.path)!r}, {', '.join(self)})"

    def __getitem__(self, wish: Any) -> View:
        return View(self.model, self.elastic.submodel(wish), speech=self._speech)

    @cached_property
    def _speech(self) -> Speech:
        return Speech(self.elastic.checkpoint.path)

    def __iter__(self) -> Iterator[str]:
        return iter(self.elastic.budgets)

    def __len__(self) -> int:
        return len(self.elastic.budgets)

    def __contains__(self, wish: object) -> bool:
        return isinstance(wish, str) and wish.lower() in {name.lower() for name in self.elastic.budgets}


def load(path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Family:
    """Open any nemotron_h directory; weights are memory-mapped. A directory that was not ranked has the size `100%`.

    device: where the weights are moved to, once for all sizes, and where every size then computes.
    """
    elastic = open_elastic(path)
    return Family(elastic, load_model(elastic, dtype).to(device))
