"""A prefix view against the same numbers in a contiguous weight, in our own model; forward only."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.arch.axes import Layout
from nestling.arch.submodel import Submodel
from nestling.bench.agree import TOLERANCE, agree
from nestling.bench.figure import Figure
from nestling.bench.models import TINY, cut, random_model, shape, tokens
from nestling.bench.turns import Bench
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import Width, hard, prefix, prefix_linear

Compute = Callable[[], Tensor]


def figures(bench: Bench) -> Iterator[Figure]:
    architecture = TINY if bench.quick else shape(512)
    count = 24 if bench.quick else 512
    heads, hidden = architecture.mamba_num_heads, architecture.hidden_size
    half = Submodel(None, hidden * 3 // 4, 2 * hidden, heads - 2)
    model = random_model(architecture).to(bench.device, bench.dtype)
    widths = hard(architecture, half)
    for name, kind, parameter, reach in (
        ("plain product", "-", "mixer.up_proj.weight", 1.1),
        ("product inside groups", "M", "mixer.out_proj.weight", 1.8),
    ):
        layer = architecture.hybrid_override_pattern.index(kind)
        yield _product(bench, name, model, layer, parameter, dict(widths.layers)[layer], count, reach)
    yield _whole(bench, model, half, tokens(architecture, 1, count, bench.device))


def _product(
    bench: Bench, name: str, model: NemotronH, layer: int, parameter: str, width: Width, count: int, reach: float
) -> Figure:
    block = model.layers[layer]
    found = {key: value for key, value in block.named_parameters() if key.endswith(parameter.removeprefix("mixer."))}
    key, stored = next(iter(found.items()))
    layout = cast(Mapping[str, Layout], block.layouts)[key]
    weight = stored.detach()
    own = prefix(weight, layout, width).contiguous()
    x = torch.randn(count, own.shape[1], generator=torch.Generator().manual_seed(0)).to(own)
    runs: dict[str, Compute] = {
        "view": lambda: prefix_linear(x, weight, None, layout, width),
        "own": lambda: F.linear(x, own),
    }
    error = _agree(name, runs, x.double() @ own.double().T, bench.dtype)
    ratio = (times := bench.in_turn(runs, rounds=4 * bench.rounds)).ratio("view", "own")
    return Figure("view", name, "contiguous", "× the time", ratio, reach, times.median("view"), error=error)


def _whole(bench: Bench, model: NemotronH, half: Submodel, ids_BL: Tensor) -> Figure:
    widths = hard(model.architecture, half)
    own = cut(model, half, widths)
    runs: dict[str, Compute] = {"view": lambda: model(ids_BL, widths).logits, "own": lambda: own(ids_BL).logits}
    with torch.inference_mode():
        reference = own.double()(ids_BL).logits
        own.to(bench.dtype)
        error = _agree("whole model", runs, reference, bench.dtype)
        times = bench.in_turn(runs)
    ratio, case = times.ratio("view", "own"), f"whole model, {ids_BL.shape[1]} tokens"
    return Figure("view", case, "contiguous", "× the time", ratio, 1.3, times.median("view"), error=error)


def _agree(name: str, runs: Mapping[str, Compute], reference: Tensor, dtype: torch.dtype) -> float:
    def listed(run: Compute) -> Callable[[], Sequence[Tensor]]:
        return lambda: [run()]

    return agree(f"view, {name}", {k: listed(run) for k, run in runs.items()}, [reference], TOLERANCE[dtype])
