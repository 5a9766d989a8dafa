"""A student's step at 100, 75 and 50 % of the parameters as a prefix, against the same masked at full cost.

The masked whole is how NVIDIA's public training code computes a size. The reach is the ratio of FLOPs, and 15 % on it.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from nestling.arch.between import between
from nestling.arch.cost import cost
from nestling.arch.targets import parse_wish
from nestling.bench.agree import TOLERANCE, agree
from nestling.bench.figure import Figure
from nestling.bench.models import TINY, random_model, shape, tokens
from nestling.bench.step import FP32, learn
from nestling.bench.turns import Bench, Run
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import Widths, hard, masked

BUDGETS = ("100%", "75%", "50%")


def figures(bench: Bench) -> Iterator[Figure]:
    architecture = TINY if bench.quick else shape(512)
    batch, length = (1, 32) if bench.quick else (2, 512)
    layers = range(len(architecture.hybrid_override_pattern))
    sizes = {name: between(architecture, layers, {}, name, parse_wish(name, architecture)) for name in BUDGETS}
    model, ids = random_model(architecture).to(bench.device), tokens(architecture, batch, length, bench.device)
    exact, checked_ids = random_model(architecture).double(), tokens(architecture, batch, length, "cpu")
    runs: dict[str, Run] = {}
    for name, size in sizes.items():
        both = {"prefix": hard(architecture, size), "masked": masked(architecture, size, device=bench.device)}
        with torch.no_grad():
            reference = [exact(checked_ids, masked(architecture, size, torch.float64)).logits]
            checked = {how: partial(_logits, model, ids, widths) for how, widths in both.items()}
            agree(f"budgets, {name}", checked, reference, TOLERANCE[FP32])
        runs |= {f"{name} {how}": learn(model, ids, bench.dtype, widths) for how, widths in both.items()}
    times, whole = bench.in_turn(runs), cost(architecture).flops(length // 2)
    for name, size in sizes.items():
        share = cost(architecture, size).flops(length // 2) / whole
        prefix = f"{name} prefix"
        yield Figure(
            "budgets", f"{name}, {share:.2f} of the FLOPs", "masked full compute", "× the time",
            times.ratio(prefix, f"{name} masked"), round(1.15 * share, 3), times.median(prefix),
        )  # fmt: skip


def _logits(model: NemotronH, ids_BL: Tensor, widths: Widths) -> Sequence[Tensor]:
    return [model(ids_BL, widths).logits]
