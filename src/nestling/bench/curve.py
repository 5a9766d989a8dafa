"""Time against length: the scan, forward and backward, and a whole forward pass, in powers of the length.

The exponent is that of the last two doublings: 1 is linear, 2 quadratic. Attention makes a whole model tend to 2.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from nestling.bench.figure import Figure
from nestling.bench.models import TINY, random_model, shape, tokens
from nestling.bench.scan import SHAPES, inputs, learn, ours
from nestling.bench.turns import Bench, Run

SCAN = tuple(2**power for power in range(7, 16))
WHOLE = tuple(2**power for power in range(7, 14))


def figures(bench: Bench) -> Iterator[Figure]:
    model = random_model(TINY if bench.quick else shape(192)).to(bench.device, bench.dtype)

    def scan(length: int) -> Run:
        given = inputs(replace(SHAPES["hidden 192"], batch=1, length=length), bench.device, 0)
        return learn(ours, given, torch.ones_like(given[0]))

    def forward(length: int) -> Run:
        ids = tokens(model.architecture, 1, length, bench.device)
        return torch.inference_mode()(lambda: model(ids))

    cases: dict[str, tuple[Callable[[int], Run], tuple[int, ...], float | None]] = {
        "scan, forward and backward": (scan, SCAN, 1.2),
        "whole forward pass, hidden 192": (forward, WHOLE, None),
    }
    for name, (make, lengths, reach) in cases.items():
        runs = {str(length): make(length) for length in (lengths[:3] if bench.quick else lengths)}
        times = bench.in_turn(runs, rounds=min(bench.rounds, 3))
        points = tuple((float(length), times.median(length)) for length in runs)
        exponent = math.log2(points[-1][1] / points[-3][1]) / 2
        yield Figure("curve", name, "its length", "exponent", (exponent,), reach, points=points)
