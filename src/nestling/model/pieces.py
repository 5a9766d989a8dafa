"""Sequences that a CPU works on piece by piece, each as large as stays in its cache."""

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

P = TypeVar("P")


def enough(pieces: Sequence[P], x: Tensor) -> Sequence[P]:
    """All pieces; of a tensor without values the first two and the last, which hold what any two neighbours hold."""
    return [*pieces[:2], pieces[-1]] if len(pieces) > 3 and isinstance(x, FakeTensor) else pieces
