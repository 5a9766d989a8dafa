"""Timing sub-models on this machine: the latency table that budgets in milliseconds are read off.

What is timed is decoding: one more token for each of `batch` sequences that have `context` tokens behind them. Each
candidate is computed as the standalone model that a slice is, with random weights. All of them lie in one storage and
take turns, so that whatever else the machine does hits them alike; of every candidate's times the median counts.
"""

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date

import torch
from torch import Tensor

from nestling.arch.architecture import Architecture
from nestling.arch.latency import Latencies
from nestling.arch.nemotron_h import FIELDS
from nestling.arch.search import SearchSpace, layer_order, pick
from nestling.arch.submodel import WHOLE, Submodel, complete, standalone
from nestling.errors import NestlingError
from nestling.model.cache import Cache
from nestling.model.nemotron_h import NemotronH
from nestling.weights.convert import TORCH

ALIGNMENT = 64  # weights, as allocators align; unaligned ones seemed slower, once, on a busy machine
SHARES = (0.375, 0.5, 0.625, 0.75, 0.875)  # of every axis, where no search space says which sizes matter


@dataclass(frozen=True)
class Timing:
    """What is timed, and how often."""

    batch: int = 1
    context: int = 512
    dtype: str = "F32"  # as in a checkpoint
    rounds: int = 15  # in which every candidate has its turn
    steps: int = 5  # tokens decoded in a turn, after one to warm up


def candidates(architecture: Architecture, space: SearchSpace | None, count: int, seed: int) -> list[Submodel]:
    """The whole model, and random members of a search space with random layers."""
    space = space or SearchSpace.of(architecture, _sizes(architecture))
    found, draw = {complete(architecture, WHOLE): None}, random.Random(seed)
    layers = range(len(architecture.hybrid_override_pattern))
    for _ in range(20 * count):
        order = layer_order(architecture, draw.sample(layers, len(layers)))
        found[pick(architecture, order, {field: draw.choice(sizes) for field, sizes in space.candidates})] = None
        if len(found) == count:
            break
    return list(found)


def _sizes(architecture: Architecture) -> dict[str, list[int]]:
    whole = {field: getattr(architecture, field) for field in architecture.elastic_fields}
    steps = {field: architecture.sizes()[FIELDS[field].split()[0]] if " " in FIELDS[field] else 1 for field in whole}
    sizes = {f: [max(int(share * size) // steps[f], 1) * steps[f] for share in SHARES] for f, size in whole.items()}
    count = len(architecture.hybrid_override_pattern)
    return sizes | {"layers": [max(int(share * count), 1) for share in SHARES[1:]]}


def time_submodels(
    architecture: Architecture, submodels: Sequence[Submodel], how: Timing, show: Callable[[int], None]
) -> Latencies:
    """The median time of each. show: told how many turns are done."""
    turns = list(_turns(architecture, submodels, how))
    times: list[list[float]] = [[] for _ in turns]
    for round_ in range(how.rounds):
        for index, turn in enumerate(turns):
            times[index] += turn()
            show(round_ * len(turns) + index + 1)
    rows = zip(submodels, (1000 * statistics.median(each) for each in times), strict=True)
    return Latencies(architecture, tuple(rows), tuple(_about(how).items()))


def _turns(
    architecture: Architecture, submodels: Sequence[Submodel], how: Timing
) -> Iterator[Callable[[], list[float]]]:
    if "E" in architecture.hybrid_override_pattern:
        raise NestlingError("blocks of kind 'E' (experts) cannot be timed yet")
    whole = NemotronH(architecture, device="meta")
    count = sum(aligned(each.numel()) for each in whole.parameters())
    storage = torch.randn(count, generator=torch.Generator().manual_seed(0))
    storage = storage.mul_(0.02).to(getattr(torch, TORCH[how.dtype]))
    for submodel in submodels:
        yield _turn(laid_into(storage, standalone(architecture, submodel)), how)


def laid_into(storage: Tensor, architecture: Architecture) -> NemotronH:
    """A model whose weights are parts of the storage, one after the other."""
    model, begin = NemotronH(architecture, device="meta"), 0
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                part = storage[begin : begin + parameter.numel()].view(parameter.shape)
                module._parameters[name] = torch.nn.Parameter(part, requires_grad=False)
                begin += aligned(parameter.numel())
    return model.eval()


def aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def _turn(model: NemotronH, how: Timing) -> Callable[[], list[float]]:
    """Decode a few tokens after the context; returns the seconds of each."""
    vocabulary = model.architecture.vocab_size
    ids_BL = torch.arange(how.batch * how.context).reshape(how.batch, -1) % vocabulary
    behind = Cache()
    with torch.inference_mode():
        model(ids_BL, None, behind)

    @torch.inference_mode()
    def turn() -> list[float]:
        cache = Cache({layer: dict(kept) for layer, kept in behind.layers.items()}, behind.length)
        seconds = []
        for _ in range(how.steps + 1):
            began = time.perf_counter()
            model(ids_BL[:, :1], None, cache)
            seconds.append(time.perf_counter() - began)
        return seconds[1:]

    return turn


def _about(how: Timing) -> dict[str, str | int]:
    return {
        "of": "decoding one more token of each sequence",
        "batch": how.batch,
        "context": how.context,
        "dtype": TORCH[how.dtype],
        "rounds": how.rounds,
        "steps": how.steps,
        "threads": torch.get_num_threads(),
        "machine": _machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def _machine() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {platform.system()}"
