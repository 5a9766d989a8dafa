"""How importance is spread over a ranked model: falling curves, shares, knees, head maps. Numbers only, no torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nestling.arch.architecture import Architecture, block_axes
from nestling.arch.nemotron_h import FIELDS, ordered
from nestling.errors import NestlingError
from nestling.weights.elastic import open_elastic
from nestling.weights.ranking import FILE, Ranking, read_ranking

FEWEST = 16
"""A curve of fewer positions has no knee to speak of."""

BEND = 0.2
"""How far from the straight line, as a share of the curve's height, a knee lies at least."""


@dataclass(frozen=True)
class Curve:
    """The importance of an axis's positions in one layer (None: of the hidden channels, shared by all layers).

    map [outer, size], or [1, size] where the axis is not ranked inside another: scores in the parent's order. places:
    of the same shape, 1 for the position its group keeps longest. stability: None where it was not measured.
    """

    axis: str
    layer: int | None
    map: np.ndarray
    places: np.ndarray
    stability: float | None

    @property
    def values(self) -> np.ndarray:
        """Falling scores, [size]: the r-th best of each group, the mean over groups."""
        return (-np.sort(-self.map, axis=1)).mean(0)

    @property
    def shares(self) -> np.ndarray:
        """What part of all importance the best r + 1 hold (of every group), [size]; NaN where nothing scores."""
        total = self.values.sum()
        return np.cumsum(self.values) / (total if total > 0 else np.nan)

    def kept(self, percent: int) -> int:
        """How many positions (of every group) are at most so many percent, but one at least."""
        return max(1, self.map.shape[1] * percent // 100)

    def held(self, percent: int) -> float:
        return float(self.shares[self.kept(percent) - 1])

    @property
    def median(self) -> float:
        return float(np.median(self.map))

    @property
    def knee(self) -> int | None:
        return knee(self.values)


def knee(values: np.ndarray) -> int | None:
    """How many positions a falling curve [size] has before it bends, or None where it is nearly straight.

    The bend is the point farthest, up or down, from the straight line between the curve's two ends. Below the line it
    opens a long tail and is the tail's first position; above, it is the last one before the curve falls.
    """
    height = values[0] - values[-1]
    if len(values) < FEWEST or height <= 0:
        return None
    below = np.linspace(1, 0, len(values)) - (values - values[-1]) / height
    place = int(np.abs(below).argmax())
    if abs(below[place]) < BEND:
        return None
    return place if below[place] > 0 else place + 1


@dataclass(frozen=True)
class Layer:
    """A layer's importance. place: 1 for the one kept longest. left: the round of an iterative ranking that took it."""

    index: int
    kind: str
    place: int
    score: float
    left: int | None


@dataclass(frozen=True)
class Spread:
    """Everything about a ranking that is worth looking at, and how it was made."""

    path: Path
    pattern: str
    curves: tuple[Curve, ...]
    layers: tuple[Layer, ...]  # in model order
    stability: float | None  # of the layers
    rounds: np.ndarray | None  # [round, layer]
    provenance: Mapping[str, Any]

    def axis(self, letter: str) -> list[Curve]:
        return [curve for curve in self.curves if curve.axis == letter]

    def ordered(self) -> list[Layer]:
        return sorted(self.layers, key=lambda layer: layer.place)


def read_spread(path: str | Path) -> Spread:
    """Read a ranked checkpoint. One that was not ranked, or whose ranking does not fit it, is a NestlingError."""
    path = Path(path)
    elastic = open_elastic(path)
    made = elastic.sidecar.get("provenance")
    return spread(path, elastic.architecture, _read(path), made if isinstance(made, dict) else {})


def _read(path: Path) -> Ranking:
    try:
        ranking = read_ranking(path)
    except NestlingError:
        raise
    except (IndexError, TypeError, ValueError) as error:
        raise _damaged(path, str(error)) from None
    again = f"rank it: nestling rank {path} --data TEXTS.jsonl --out ELASTIC"
    if ranking is None:
        raise NestlingError(f"{path}: was not ranked, there is no {FILE}; {again}")
    if not ranking.scores:
        raise NestlingError(f"{path / FILE}: holds orders but no scores, nothing to look at; {again}")
    return ranking


def _damaged(path: Path, what: str) -> NestlingError:
    return NestlingError(f"{path / FILE}: damaged, or of another model: {what}; rank the model again")


def spread(path: Path, architecture: Architecture, ranking: Ranking, provenance: Mapping[str, Any]) -> Spread:
    """The spread of a ranking that fits its architecture; one that does not is a NestlingError."""
    pattern = architecture.hybrid_override_pattern
    _check(path, "layers", np.array(ranking.layers), ranking.scores.get("layers"), (len(pattern),))
    rounds = ranking.rounds
    if rounds is not None and (rounds.ndim != 2 or rounds.shape[1] != len(pattern) or not len(rounds)):
        raise _damaged(path, f"rounds has shape {list(rounds.shape)} for {len(pattern)} layers")
    stable = ranking.stability
    if wrong := [name for name, value in stable.items() if not abs(value) <= 1 + 1e-6]:
        raise _damaged(path, f"stability.{wrong[0]} = {stable[wrong[0]]} is no correlation")
    curves = []
    for axis, layer, shape in _places(architecture):
        name = axis if layer is None else f"{axis}.{layer}"
        if name not in ranking.orders:
            continue
        order, scores = ranking.orders[name], ranking.scores.get(name)
        _check(path, name, order, scores, shape)
        assert scores is not None
        places = np.argsort(order.reshape(-1, shape[-1]), axis=1) + 1
        curves.append(Curve(axis, layer, scores.reshape(places.shape).astype(np.float64), places, stable.get(name)))
    layers = tuple(_layers(pattern, ranking))
    return Spread(path, pattern, tuple(curves), layers, stable.get("layers"), rounds, provenance)


def _places(architecture: Architecture) -> Iterator[tuple[str, int | None, tuple[int, ...]]]:
    """(axis, layer, shape of its scores) of every order that a ranking may have, axis by axis."""
    sizes = architecture.sizes()
    for axes in FIELDS.values():
        axis = axes.split()[-1]
        shape = tuple(sizes[one] for one in ordered(axis))
        if axis == "d":
            yield axis, None, shape
            continue
        for layer, kind in enumerate(architecture.hybrid_override_pattern):
            if axis in block_axes(architecture, kind):
                yield axis, layer, shape


def _check(path: Path, name: str, order: np.ndarray, scores: np.ndarray | None, shape: tuple[int, ...]) -> None:
    """Refuse what is no order with its scores: only those of layers may rise, where they were taken away in turn."""
    if scores is None:
        raise _damaged(path, f"score.{name} is missing")
    for kind, array, allowed in (("order", order, "iu"), ("score", scores, "f")):
        if array.shape != shape or array.dtype.kind not in allowed:
            raise _damaged(path, f"{kind}.{name} is {array.dtype}{list(array.shape)}, the model has {list(shape)}")
    if not (np.sort(order, axis=-1) == np.arange(shape[-1])).all():
        raise _damaged(path, f"order.{name} does not name every position once")
    if not np.isfinite(scores).all():
        raise _damaged(path, f"score.{name} is not finite")
    if name != "layers" and (np.diff(np.take_along_axis(scores, order, -1), axis=-1) > 0).any():
        raise _damaged(path, f"order.{name} does not follow score.{name}")


def _layers(pattern: str, ranking: Ranking) -> Iterator[Layer]:
    scores, rounds = ranking.scores["layers"], ranking.rounds
    for index, kind in enumerate(pattern):
        left = None if rounds is None or len(rounds) < 2 else _left(rounds, index)
        yield Layer(index, kind, ranking.layers.index(index) + 1, float(scores[index]), left)


def _left(rounds: np.ndarray, layer: int) -> int | None:
    """The round that took a layer away, counted from 1: the last one that measured it, unless it outlived them all."""
    last = int(np.isfinite(rounds[:, layer]).sum())
    least = np.nanmin(rounds[-1]) if np.isfinite(rounds[-1]).any() else np.nan
    return last if last < len(rounds) or rounds[-1, layer] == least else None
