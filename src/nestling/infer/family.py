"""`Family`: every size of an elastic checkpoint as a view of one storage."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestling.arch.cost import parameters
from nestling.arch.submodel import Submodel
from nestling.model.nemotron_h import Cache, NemotronH, Output
from nestling.model.store import load_model
from nestling.model.width import Widths, hard
from nestling.weights.elastic import Elastic, open_elastic


@dataclass(frozen=True, eq=False)
class View:
    """One size of a family. Call it like a model: `view(input_ids).logits`, [B, L, vocabulary]."""

    model: NemotronH
    submodel: Submodel

    @property
    def widths(self) -> Widths:
        return hard(self.model.architecture, self.submodel)

    @property
    def parameters(self) -> int:
        return parameters(self.model.architecture, self.submodel)

    def __call__(
        self, input_ids: Tensor, *, attention_mask: Tensor | None = None, cache: Cache | None = None
    ) -> Output:
        """Logits of every position; `cache=Cache()` starts a decode. Padding (mask 0) must be on the left."""
        return self.model(input_ids, self.widths, cache, attention_mask)


@dataclass(frozen=True, eq=False, repr=False)
class Family(Mapping[str, View]):
    """The sizes of one checkpoint: `family["50%"]`, `family[Submodel(hidden_size=96)]`. All share its storage."""

    elastic: Elastic
    model: NemotronH

    def __repr__(self) -> str:
        return f"Family({str(self.elastic.checkpoint.path)!r}, {', '.join(self)})"

    def __getitem__(self, wish: Any) -> View:
        return View(self.model, self.elastic.submodel(wish))

    def __iter__(self) -> Iterator[str]:
        return iter(self.elastic.budgets)

    def __len__(self) -> int:
        return len(self.elastic.budgets)

    def __contains__(self, wish: object) -> bool:
        return isinstance(wish, str) and wish.lower() in {name.lower() for name in self.elastic.budgets}


def load(path: str | Path, *, dtype: torch.dtype | None = None) -> Family:
    """Open any nemotron_h directory; weights are memory-mapped. A directory that was not ranked has the size `100%`."""
    elastic = open_elastic(path)
    return Family(elastic, load_model(elastic, dtype))
