"""`Ranking`: the order of every axis, most important first, and how it was made. The one value that holds arrays."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from nestling.arch.axes import Keep
from nestling.arch.submodel import Architecture
from nestling.errors import NestlingError
from nestling.weights.checkpoint import read_header, read_tensor

FILE = "ranking.safetensors"


@dataclass(frozen=True)
class Ranking:
    """Orders and scores of a model's parts.

    orders: "d" for the hidden channels, "AXIS.LAYER" for an axis of one layer; positions in the model that was ranked,
        [size], or [outer, size] for an axis ranked inside each entry of the axis outside it (heads in their group).
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

    def keep(self, layer: int | None) -> Keep:
        """The orders that apply to one layer's tensors (None: to the tensors outside the layers)."""
        own = {key.split(".")[0]: order for key, order in self.orders.items() if key.endswith(f".{layer}")}
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
    """The ranking beside an elastic checkpoint's weights, or None if it was not ranked."""
    if not (file := directory / FILE).is_file():
        return None
    arrays = {entry.name: read_tensor(entry) for entry in read_header(file)}
    if "order.layers" not in arrays:
        raise NestlingError(f"{file} is not a ranking: order.layers is missing")
    layers = tuple(int(layer) for layer in arrays.pop("order.layers"))
    order, score, stability = (_under(f"{kind}.", arrays) for kind in ("order", "score", "stability"))
    return Ranking(
        order, layers, score, {key: float(value[0]) for key, value in stability.items()}, arrays.get("rounds")
    )


def _under(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
