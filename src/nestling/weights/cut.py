"""One model to be written: which sub-model of a checkpoint, tensor by tensor, and how its file holds it."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from nestling.arch.axes import Layout, Sizes
from nestling.arch.cost import parameters
from nestling.arch.positions import Keep, positions
from nestling.arch.submodel import Submodel, Tensor, standalone
from nestling.weights.convert import TORCH, Convert, converter, target
from nestling.weights.elastic import Elastic
from nestling.weights.gather import ZERO, Buffers, Positions, gather
from nestling.weights.header import Entry
from nestling.weights.heterogeneous import code_config
from nestling.weights.ranking import Ranking
from nestling.weights.writing import Planned, writing_order

_LAYER = re.compile(r"(?<=\blayers\.)(\d+)\b")


@dataclass(frozen=True)
class Output:
    """One model to be written: a sub-model of a checkpoint, and how the file holds it.

    hetero: for sizes that differ between layers, "pad" fills up to the widest with zeros, "code" writes every layer as
    it is for the custom code that goes along. dtype: a type code for plain floating-point tensors; None changes none.
    """

    elastic: Elastic
    submodel: Submodel  # spelled out
    ranking: Ranking
    hetero: str = "auto"
    dtype: str | None = None

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by the name it is read from."""
        stored = self.elastic.stored(self.submodel)
        return {_source(tensor, self.ranking.keep(tensor.layer)): tensor for tensor in stored}

    @cached_property
    def planned(self) -> dict[str, Planned]:
        """Every tensor to be written by the name it is read from, in the order of writing."""
        entries = self.elastic.checkpoint.entries
        planned = {
            source: Planned(
                tensor.name, self.dtype_of(entries[source], tensor), tensor.layout.shape(self.sizes(tensor))
            )
            for source, tensor in self.tensors.items()
        }
        names = {tensor.name: source for source, tensor in planned.items()}
        return {names[tensor.name]: tensor for tensor in writing_order(list(planned.values()))}

    @property
    def parameters(self) -> int:
        """Of the sub-model; what padding adds does not count."""
        return parameters(self.elastic.architecture, self.submodel)

    @property
    def attends(self) -> bool:
        """Whether an attention layer is kept: the caches of stock transformers and its `generate` need one."""
        pattern = self.elastic.architecture.hybrid_override_pattern
        return any(pattern[layer] == "*" for layer in self.submodel.layers or ())

    @property
    def groupable(self) -> bool:
        """Whether stock transformers runs its experts as they are loaded."""
        return standalone(self.elastic.architecture, self.submodel).groupable

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data that will be written."""
        return sum(tensor.nbytes for tensor in self.planned.values())

    def dtype_of(self, entry: Entry, tensor: Tensor) -> str:
        return entry.dtype if tensor.buffer else target(entry.dtype, self.dtype)

    def sizes(self, tensor: Tensor) -> Sizes:
        """Axis -> size in the file."""
        return self._widest if self.hetero == "pad" else tensor.kept

    @cached_property
    def _widest(self) -> Sizes:
        return standalone(self.elastic.architecture, self.submodel).sizes()

    def positions(self, tensor: Tensor) -> Positions:
        """Per dimension of the written tensor where each position is read from; `ZERO` where it is padded."""
        layout, orders = tensor.layout, self.ranking.keep(tensor.layer, tensor.expert)
        if orders.keys() & layout.axes:
            read = positions(layout, tensor.full, prefixes(layout, tensor.full, tensor.kept, orders))
        else:
            read = _unranked(layout, frozenset(tensor.full.items()), frozenset(tensor.kept.items()))
        sizes = self.sizes(tensor)
        if layout.shape(sizes) == tensor.shape:
            return read
        places = positions(layout, sizes, {axis: np.arange(n) for axis, n in layout.sized(tensor.kept)})
        return [_padded(size, place, kept) for size, place, kept in zip(layout.shape(sizes), places, read, strict=True)]

    def converter(self, source: str, buffers: Buffers | None = None) -> Convert | None:
        """From the bytes of one stored tensor to those that are written."""
        stored = self.elastic.checkpoint.entries[source].dtype
        return converter(stored, self.planned[source].dtype, source, buffers)

    def read(self, source: str) -> Iterator[np.ndarray]:
        """The bytes of one tensor as they are written, in pieces."""
        change = self.converter(source)
        for data in gather(self.elastic.checkpoint.entries[source], self.positions(self.tensors[source])):
            yield data if change is None else change(data)

    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        base = dict(self.elastic.checkpoint.config)
        if "quantization_config" in base:
            base["quantization_config"] = renumbered(base["quantization_config"], self.submodel)
        if self.dtype is not None:
            base |= dict.fromkeys({"dtype", *(base.keys() & {"torch_dtype"})}, TORCH[self.dtype])
        if self.hetero == "code":
            return code_config(self.elastic.architecture, self.submodel, base)
        return standalone(self.elastic.architecture, self.submodel).to_config(base)


def _source(tensor: Tensor, orders: Keep) -> str:
    """The name a tensor is read from. Experts are an axis that lives in the name, so their order is applied to it."""
    if tensor.expert is None or "e" not in orders:
        return tensor.source
    return tensor.source.replace(f".experts.{tensor.expert}.", f".experts.{orders['e'][tensor.expert]}.")


@lru_cache(maxsize=256)  # the same in many layers
def _unranked(
    layout: Layout, full: frozenset[tuple[str, int]], kept: frozenset[tuple[str, int]]
) -> tuple[np.ndarray | None, ...]:
    """Positions that are read where no axis has an order of its own."""
    sizes = dict(full)
    return positions(layout, sizes, prefixes(layout, sizes, dict(kept), {}))


def prefixes(layout: Layout, full: Sizes, kept: Sizes, orders: Keep) -> Keep:
    """Axis -> kept positions of one tensor: the first of each order, [kept] or [outer, kept]; whole axes left out."""
    return {
        axis: orders.get(axis, np.arange(size))[..., : kept[axis]]
        for axis, size in layout.sized(full)
        if axis in orders or kept[axis] != size
    }


def _padded(size: int, places: np.ndarray | None, read: np.ndarray | None) -> np.ndarray | None:
    """Along one dimension of `size`: what is read, at its places among zeros."""
    if places is None:
        return read
    padded = np.full(size, ZERO)
    padded[places] = np.arange(len(places)) if read is None else read
    return padded


def renumbered(value: Any, submodel: Submodel) -> Any:
    """JSON whose texts name layers (`backbone.layers.7.mixer`), counted as in the sub-model, without dropped ones."""
    place = {str(old): str(new) for new, old in enumerate(submodel.layers or ())}

    def stays(text: Any) -> bool:
        return not isinstance(text, str) or all(layer in place for layer in _LAYER.findall(text))

    def renumber(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {renumber(key): renumber(item) for key, item in value.items() if stays(key)}
        if isinstance(value, list):
            return [renumber(item) for item in value if stays(item)]
        return _LAYER.sub(lambda match: place[match[1]], value) if isinstance(value, str) else value

    return renumber(value)
