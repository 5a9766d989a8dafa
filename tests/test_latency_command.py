"""Latency from end to end: a table is made, a slice is cut by it, and a family is trained towards it and to bytes."""

from test_elastic import SPACE, TINY

from nestling.arch.latency import Latencies
from nestling.arch.targets import Target


def made(per_weight: float = 1e-3) -> Latencies:
    """So much a layer, and so much a weight."""
    sizes = [pick for pick in _picks() if pick]
    times = [len(each.layers) + per_weight * Target("parameters", 1).measure(TINY, each) for each in sizes]
    return Latencies(TINY, tuple(zip(sizes, times, strict=True)), ())


def _picks() -> list:
    from nestling.infer.timing import candidates

    return candidates(TINY, SPACE, 40, 0)


TABLE = made()
