"""`Ranking`: the order of every axis, most important first, and how it was made. The one value that holds arrays."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from nestling.arch.architecture import Architecture
from nestling.arch.nemotron_h import OUTSIDE
from nestling.arch.positions import Keep
from nestling.errors import NestlingError
from nestling.weights.header import Entry, read_header, read_tensor

FILE = "ranking.safetensors"
_INTEGERS, _FLOATS = ("I64", "I32"), ("F32", "F64")
_ALLOWED: Mapping[str, tuple[tuple[str, ...], tuple[int, ...], str]] = {
    "order.layers": (_INTEGERS, (1,), "integers [layers]"),
    "order": (_INTEGERS, (1, 2), "integers [size] or [outer, size]"),
    "score": (_FLOATS, (1, 2), "floats of the shape of their order"),
    "stability": (_FLOATS, (1,), "one float"),
}
"""Name of an array in the file, or its first part -> types, numbers of dimensions, and both in words."""


@dataclass(frozen=True)
class Ranking:
    """Orders and scores of a model's parts.

    orders: "d" for the hidden channels, "AXIS.LAYER" for an axis of one layer; positions in the model that was ranked,
        [size], or [outer, size] for an axis ranked inside each entry of the axis outside it (heads in their group,
        neurons in their expert).
    layers: layer indices, the one to keep longest first.
    scores: the importance each order was sorted by, under the same keys, and "layers".
    stability: under the same keys, Spearman's correlation of the scores from the two halves of the calibration data
        (the mean over groups); absent where no data were looked at.
    rounds: the error of leaving each layer out, [round, layer], NaN where it was already gone; the layer a round finds
        least important is left out in the next.
    """

    orders: Mapping[str, np.ndarray]
    layers: tuple[int, ...]
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)
    stability: Mapping[str, float] = field(default_factory=dict)
    rounds: np.ndarray | None = None

    def keep(self, layer: int | None, expert: int | None = None) -> Keep:
        """The orders that apply to one layer's tensors (None: to the tensors outside the layers).

        expert: to those of an expert, by its number in the sub-model.
        """
        own = {key.split(".")[0]: order for key, order in self.orders.items() if key.endswith(f".{layer}")}
        for axis in OUTSIDE.keys() & own.keys() if expert is not None else ():
            if own[axis].ndim == 2:
                own[axis] = own[axis][own["e"][expert] if "e" in own else expert]
        return {key: order for key, order in self.orders.items() if "." not in key} | own


def identity(architecture: Architecture) -> Ranking:
    """The ranking that leaves everything where it is."""
    return Ranking({}, tuple(range(len(architecture.hybrid_override_pattern))))


def save_ranking(ranking: Ranking, directory: Path) -> None:
    arrays = {f"order.{key}": order.astype(np.int64) for key, order in ranking.orders.items()}
    arrays |= {f"score.{key}": score.astype(np.float32) for key, score in ranking.scores.items()}
    arrays |= {f"stability.{key}": np.array([value], dtype=np.float32) for key, value in ranking.stability.items()}
    arrays |= {} if ranking.rounds is None else {"rounds": ranking.rounds.astype(np.float32)}
    save_file(arrays | {"order.layers": np.array(ranking.layers, dtype=np.int64)}, directory / FILE)


def read_ranking(directory: Path) -> Ranking | None:
    """The ranking beside an elastic checkpoint's weights, or None if it was not ranked.

    One that does not hold together is a NestlingError; whether it fits the model is for who has the model to say.
    """
    if not os.path.lexists(file := directory / FILE):
        return None
    entries = {entry.name: entry for entry in read_header(file)}
    if "order.layers" not in entries:
        raise NestlingError(f"{file} is not a ranking: order.layers is missing")
    arrays = {name: read_tensor(entry) for name, entry in entries.items()}
    if what := next(filter(None, map(_wrong, entries.values(), arrays.values())), None):
        raise NestlingError(f"{file}: damaged, or of another model: {what}; rank the model again")
    layers = tuple(int(layer) for layer in arrays.pop("order.layers"))
    order, score, stability = (_under(f"{kind}.", arrays) for kind in ("order", "score", "stability"))
    return Ranking(
        order, layers, score, {key: float(value[0]) for key, value in stability.items()}, arrays.get("rounds")
    )


def _wrong(entry: Entry, array: np.ndarray) -> str | None:
    """What is wrong with one array by itself."""
    kind = entry.name.split(".")[0]
    if allowed := _ALLOWED.get(entry.name, _ALLOWED.get(kind)):
        dtypes, dims, words = allowed
        if entry.dtype not in dtypes or array.ndim not in dims or not array.size:
            return f"{entry.name} is {array.dtype}{list(array.shape)}, must be {words}"
    if kind == "order" and not (np.sort(array, axis=-1) == np.arange(array.shape[-1])).all():
        return f"{entry.name} does not name every position once"
    if kind == "score" and not np.isfinite(array).all():
        return f"{entry.name} is not finite"
    if kind == "stability" and not abs(array[0]) <= 1 + 1e-6:
        return f"{entry.name} = {array[0]} is no correlation"
    return None


def _under(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
