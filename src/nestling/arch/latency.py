"""How long a sub-model takes, interpolated from sub-models that were timed on one machine.

The time of a model is a sum over its blocks, and the time of a block a sum of non-negative costs: one for being there,
one per weight it multiplies with, one per element of state or per query it handles. The costs are fitted to the medians
that were measured, by non-negative least squares of relative errors; so a smaller block is never slower, and the time
of a sub-model can be searched for and trained towards like a number of parameters.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from nestling.arch.architecture import Architecture
from nestling.arch.axes import Sizes
from nestling.arch.cost import block_parameters, total
from nestling.arch.submodel import Submodel
from nestling.errors import NestlingError

KINDS = ("model", "M", "*", "-")
"""Blocks that are timed."""
_SWEEPS = 3000  # of coordinate descent


@dataclass(frozen=True)
class Latencies:
    """Sub-models of one architecture and the milliseconds each took. how: what was timed, and where."""

    architecture: Architecture
    rows: tuple[tuple[Submodel, float], ...]
    how: tuple[tuple[str, Any], ...]

    def block(self, architecture: Architecture, kind: str, sizes: Sizes) -> float:
        """Milliseconds of one block."""
        return float(self.costs[kind] @ _features(architecture, kind, sizes))

    def measure(self, submodel: Submodel) -> float:
        """Milliseconds of a sub-model."""
        return total(self.architecture, submodel, self.block)

    @cached_property
    def costs(self) -> Mapping[str, np.ndarray]:
        """Kind -> milliseconds per feature."""
        features = np.array([_of_model(self.architecture, submodel) for submodel, _ in self.rows])
        times = np.array(self.times)
        found = _non_negative_least_squares(features / times[:, None], np.ones(len(times)))
        return dict(zip(KINDS, np.split(found, len(KINDS)), strict=True))

    @property
    def times(self) -> list[float]:
        return [milliseconds for _, milliseconds in self.rows]

    def held_out(self, every: int = 4) -> tuple[float, float]:
        """Relative errors, median and largest, on rows that a table of the other rows has not seen."""
        errors = []
        for part in range(every):
            seen = replace(self, rows=tuple(row for i, row in enumerate(self.rows) if i % every != part))
            errors += [abs(seen.measure(submodel) / time - 1) for submodel, time in self.rows[part::every]]
        return float(np.median(errors)), max(errors)

    def check(self, architecture: Architecture) -> None:
        """Refuse a table of another model."""
        ours, theirs = ({**asdict(each), "untied": None} for each in (architecture, self.architecture))
        if different := [field for field in ours if ours[field] != theirs[field]]:
            field = different[0]
            raise NestlingError(
                f"the latency table is of another model: {field} is {theirs[field]!r} there and {ours[field]!r} here; "
                "time this one (nestling bench --latency)"
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "format": 1,
            **dict(self.how),
            "architecture": self.architecture.to_config({}),
            "untied": self.architecture.untied,
            "rows": [{"submodel": submodel.to_json(), "milliseconds": time} for submodel, time in self.rows],
        }

    @staticmethod
    def from_json(spec: Any) -> "Latencies":
        """Raises NestlingError where the content is not a table's."""
        try:
            architecture = Architecture.from_config(spec["architecture"])
            rows = tuple((Submodel.from_json(row["submodel"]), float(row["milliseconds"])) for row in spec["rows"])
        except (KeyError, TypeError, ValueError) as error:
            raise NestlingError(f"not a latency table of nestling bench --latency: {error}") from None
        if not rows or not all(0 < time < np.inf for _, time in rows):
            raise NestlingError("a latency table needs rows, with milliseconds above 0")
        known = {"architecture", "untied", "rows", "format"}
        how = tuple((key, value) for key, value in spec.items() if key not in known and not isinstance(value, list))
        return Latencies(architecture, rows, how)


def _features(architecture: Architecture, kind: str, sizes: Sizes) -> np.ndarray:
    """What the time of a block is proportional to: being there, its weights, the elements it handles besides."""
    if kind not in KINDS:
        raise NestlingError(f"blocks of kind {kind!r} cannot be timed yet; budgets of such a model are not latencies")
    elements = {
        "model": sizes["d"],
        "M": sizes["g"] * sizes["h"] * sizes["p"],
        "*": sizes["G"] * sizes["q"],
        "-": sizes["f"],
    }
    return np.array([1.0, block_parameters(architecture, kind, sizes), elements[kind]])


def _of_model(architecture: Architecture, submodel: Submodel) -> np.ndarray:
    """The features of all its blocks, those of every kind summed, one after the other."""

    def placed(architecture: Architecture, kind: str, sizes: Sizes) -> np.ndarray:
        row = np.zeros((len(KINDS), 3))
        row[KINDS.index(kind)] = _features(architecture, kind, sizes)
        return row.reshape(-1)

    return total(architecture, submodel, placed)


def _non_negative_least_squares(matrix: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """x ≥ 0 that minimises ‖matrix x - wanted‖², by coordinate descent, which for this problem finds the minimum."""
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1
    scaled = matrix / scale
    gram, right = scaled.T @ scaled, scaled.T @ wanted
    found = np.zeros(len(right))
    for _ in range(_SWEEPS):
        for j in np.flatnonzero(gram.diagonal()):
            found[j] = max(0.0, found[j] + (right[j] - gram[j] @ found) / gram[j, j])
    return found / scale
