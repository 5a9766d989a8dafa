"""A whole training step of a hybrid, forward and backward without an optimizer, against stock transformers.

The rival has the same weights and tokens, SDPA attention, and the better of two chunks. Compiled: block by block, both.
`products` is the step's own matrix products and nothing else: x W, dy W and dyᵀ x of every linear layer and the head.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.arch.cost import cost
from nestling.bench.agree import TOLERANCE, agree
from nestling.bench.figure import Figure
from nestling.bench.machine import has_bf16
from nestling.bench.models import TINY, random_model, set_chunk, shape, stock, tokens
from nestling.bench.turns import Bench, Run
from nestling.model.compiled import compile_blocks
from nestling.model.nemotron_h import NemotronH
from nestling.model.pointwise import wide
from nestling.model.width import Widths
from nestling.train.chunked import predicted

SHAPES = {"hidden 192": (shape(192), 4, 256), "hidden 512": (shape(512), 2, 512)}
LARGE = {"hidden 1024": (shape(1024), 8, 1024), "hidden 2048": (shape(2048), 8, 2048)}  # for a GPU
QUICK = {"tiny": (TINY, 1, 48)}
TRIED = (64, 128)  # chunks; the fastest two of stock's scan at these shapes
WATCHED = ("in_proj", "A_log", "dt_bias", "conv1d.weight", "q_proj", "up_proj", "embeddings")


@dataclass(frozen=True)
class Kind:
    name: str
    compiled: bool
    dtype: torch.dtype
    reach: float


FP32, BF16 = torch.float32, torch.bfloat16
KINDS = (Kind("fp32", False, FP32, 1.3), Kind("fp32, compiled", True, FP32, 1.7))
BF16_KINDS = (Kind("bf16", False, BF16, 1.3), Kind("bf16, compiled", True, BF16, 2.5))


def figures(bench: Bench) -> Iterator[Figure]:
    kinds = KINDS + (BF16_KINDS[bench.device == "cpu" :] if has_bf16(bench.device) else ())
    shapes = SHAPES if bench.device == "cpu" else LARGE
    for name, (architecture, batch, length) in (QUICK if bench.quick else shapes).items():
        model = random_model(architecture).to(bench.device)
        rival = stock(model).train()
        ids = tokens(architecture, batch, length, bench.device)
        exact = gradients(copy.deepcopy(rival).double(), ids)()
        for kind in kinds:
            yield from _case(bench, f"{name}, {kind.name}", kind, model, rival, ids, exact)


def learn(model: Any, ids_BL: Tensor, dtype: torch.dtype = FP32, widths: Widths | None = None) -> Run:
    """Forward and backward; gradients are thrown away."""

    def run() -> None:
        _loss(model, ids_BL, dtype, widths).backward()
        model.zero_grad(set_to_none=True)

    return run


def gradients(model: Any, ids_BL: Tensor, dtype: torch.dtype = FP32) -> Callable[[], Sequence[Tensor]]:
    """The logits, and the gradients of some parameters of every kind of layer, in the order of their names on disk."""
    stored = model.on_disk() if isinstance(model, NemotronH) else dict(model.named_parameters())
    named = {name.replace("backbone.", "model.", 1): value for name, value in stored.items()}
    given = [named[name] for name in sorted(named) if any(part in name for part in WATCHED)]

    def run() -> Sequence[Tensor]:
        slopes = torch.autograd.grad(_loss(model, ids_BL, dtype, None), given)
        return [_logits(model, ids_BL, dtype, None).detach(), *slopes]

    return run


def _loss(model: Any, ids_BL: Tensor, dtype: torch.dtype, widths: Widths | None) -> Tensor:
    """Something to learn: ours as in training, in chunks of the output head; the rival's of its logits."""
    with torch.autocast(ids_BL.device.type, BF16, enabled=dtype == BF16):
        if isinstance(model, NemotronH):
            hidden_BLd = model.hidden(ids_BL, widths)
            return predicted(hidden_BLd.flatten(0, 1), model.head_weight(widths), ids_BL.flatten())
        return F.cross_entropy(wide(model(ids_BL, use_cache=False).logits).flatten(0, 1), ids_BL.flatten())


def _logits(model: Any, ids_BL: Tensor, dtype: torch.dtype, widths: Widths | None) -> Tensor:
    how = {"widths": widths} if isinstance(model, NemotronH) else {"use_cache": False}
    with torch.autocast(ids_BL.device.type, BF16, enabled=dtype == BF16):
        found: Tensor = model(ids_BL, **how).logits
    return found


def products(model: NemotronH, count: int, dtype: torch.dtype) -> Run:
    """The matrix products of a step over `count` tokens and nothing else."""
    stored = model.on_disk().items()
    weights = [value.detach().to(dtype) for name, value in stored if "proj" in name or "lm_head" in name]
    pairs = [(w.new_ones(count, w.shape[1]), w.new_ones(count, w.shape[0])) for w in weights]

    def run() -> None:
        for (x, dy), weight in zip(pairs, weights, strict=True):
            F.linear(x, weight)
            dy @ weight
            dy.mT @ x

    return run


def _case(
    bench: Bench, name: str, kind: Kind, model: NemotronH, rival: Any, ids_BL: Tensor, exact: Sequence[Tensor]
) -> Iterator[Figure]:
    backend = "aot_eager" if bench.quick else "inductor"
    mine = compile_blocks(copy.deepcopy(model), backend=backend) if kind.compiled else model
    checked = {"ours": gradients(mine, ids_BL, kind.dtype), "transformers": gradients(rival, ids_BL, kind.dtype)}
    error = agree(f"step, {name}", checked, exact, TOLERANCE[kind.dtype])

    def theirs(chunk: int) -> Run:
        learning = learn(rival, ids_BL, kind.dtype)

        def run() -> None:
            set_chunk(rival, chunk)
            learning()

        return run

    runs = {"ours": learn(mine, ids_BL, kind.dtype), "products": products(model, ids_BL.numel(), kind.dtype)}
    times = bench.in_turn(runs | {f"chunk {chunk}": theirs(chunk) for chunk in TRIED})
    best = times.quickest(*(f"chunk {chunk}" for chunk in TRIED))
    seconds = times.median("ours")
    dtype = "bf16" if kind.dtype == BF16 else "fp32"
    done = 3 * cost(model.architecture).flops(ids_BL.shape[1] // 2) * ids_BL.numel()
    limit = bench.limits.of_flops(done, seconds, dtype)
    yield Figure(
        "step", name, f"transformers eager, {best} (best)", "× as fast", times.ratio(best, "ours"), kind.reach, seconds,
        limit, f"{dtype} FLOP/s", error,
    )  # fmt: skip
    yield Figure("step", name, "its own matrix products", "× the time", times.ratio("ours", "products"), 1.6, seconds)
