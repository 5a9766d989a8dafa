"""Time against the size of the work: length, batch and hidden size, in steps of two.

The exponent is of time against the FLOPs that the work must cost, over the last two doublings of the size: 1 is as the
work grows, less is better than that, and more means that something grows faster than it must.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from nestling.arch.cost import cost
from nestling.arch.submodel import Submodel
from nestling.bench.agree import TOLERANCE, agree
from nestling.bench.figure import Figure
from nestling.bench.large import TOKENS, decode
from nestling.bench.models import TINY, random_model, shape, tokens
from nestling.bench.scan import SHAPES, inputs, ours
from nestling.bench.scan import learn as learn_scan
from nestling.bench.step import learn
from nestling.bench.turns import Bench, Run
from nestling.infer.family import View
from nestling.infer.generate import start
from nestling.model.nemotron_h import NemotronH

LENGTHS = tuple(2**power for power in range(7, 16))
BATCHES = tuple(2**power for power in range(7))
HIDDEN = (128, 256, 512, 1024)
LENGTH, WIDER = 64, 256  # tokens of a row along the batch, and along the hidden size
REACH = 1.2


@dataclass(frozen=True)
class Work:
    run: Run
    flops: float


Make = Callable[[int], Work]
Of = Callable[[Bench, NemotronH, int, int], Work]  # of a model, rows and tokens of a row


def figures(bench: Bench) -> Iterator[Figure]:
    model = _model(bench, 192)
    _check(bench, model)
    curves: dict[str, tuple[str, tuple[int, ...], Make]] = {
        "scan, forward and backward": ("its length", LENGTHS, lambda length: _scan(bench, length)),
        "forward pass, hidden 192": ("its length", LENGTHS[:-2], lambda length: _forward(bench, model, 1, length)),
    }
    for name, make in (("step", _step), ("prefill", _prefill), ("decode", _decode)):
        curves[f"{name}, hidden 192"] = ("its batch", BATCHES, partial(_by_batch, bench, make, model))
        curves[f"{name}, 1 row"] = ("its hidden size", HIDDEN, partial(_by_hidden, bench, make))
    for case, (against, sizes, made) in curves.items():
        yield _figure(bench, case, against, {size: made(size) for size in (sizes[:3] if bench.quick else sizes)})


def _figure(bench: Bench, case: str, against: str, works: dict[int, Work]) -> Figure:
    times = bench.in_turn({str(size): work.run for size, work in works.items()}, rounds=min(bench.rounds, 3))
    points = tuple((float(size), times.median(str(size)), work.flops) for size, work in works.items())
    (_, early, less), (_, late, more) = points[-3], points[-1]
    exponent = math.log(late / early) / math.log(more / less)
    return Figure("curve", case, against, "exponent", (exponent,), REACH, points=points)


def _by_batch(bench: Bench, make: Of, model: NemotronH, batch: int) -> Work:
    return make(bench, model, batch, LENGTH)


def _by_hidden(bench: Bench, make: Of, hidden: int) -> Work:
    return make(bench, _model(bench, hidden), 1, WIDER)


def _model(bench: Bench, hidden: int) -> NemotronH:
    architecture = replace(TINY, hidden_size=hidden // 4) if bench.quick else shape(hidden)
    return random_model(architecture).to(bench.device, bench.dtype)


def _check(bench: Bench, model: NemotronH) -> None:
    """The model that is timed, against itself in float64 on the CPU."""
    given = tokens(model.architecture, 2, LENGTH, "cpu")
    exact = random_model(model.architecture).double()(given).logits.detach()
    agree("curve", {"ours": lambda: [model(given.to(bench.device)).logits]}, [exact], TOLERANCE[bench.dtype])


def _scan(bench: Bench, length: int) -> Work:
    of = replace(SHAPES["hidden 192"], batch=1, length=length)
    given = inputs(of, bench.device, 0)
    return Work(learn_scan(ours, given, torch.ones_like(given[0])), of.flops)


def _flops(model: NemotronH, count: int, context: int) -> float:
    """Of a forward pass of so many tokens."""
    return count * cost(model.architecture).flops(context)


def _forward(bench: Bench, model: NemotronH, batch: int, length: int) -> Work:
    ids = tokens(model.architecture, batch, length, bench.device)
    return Work(torch.inference_mode()(lambda: model(ids)), _flops(model, batch * length, length // 2))


def _step(bench: Bench, model: NemotronH, batch: int, length: int) -> Work:
    ids = tokens(model.architecture, batch, length, bench.device)
    return Work(learn(model, ids, bench.dtype), 3 * _flops(model, batch * length, length // 2))


def _prefill(bench: Bench, model: NemotronH, batch: int, length: int) -> Work:
    view = View(model, Submodel()).held()
    prompts = tokens(model.architecture, batch, length, "cpu").tolist()
    return Work(torch.inference_mode()(lambda: start(view, prompts)), _flops(model, batch * length, length // 2))


def _decode(bench: Bench, model: NemotronH, batch: int, length: int) -> Work:
    return Work(decode(View(model, Submodel()).held(), batch), _flops(model, batch * TOKENS, 0))
