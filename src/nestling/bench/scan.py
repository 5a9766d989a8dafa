"""The chunked scan, forward and backward, against the one of stock transformers' nemotron_h in torch.

B batch · L length · g group · h head in its group · p head channel · n state.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nestling.bench.agree import TOLERANCE, agree
from nestling.bench.figure import Figure
from nestling.bench.models import CHUNKS, DEFAULT
from nestling.bench.turns import Bench, Run
from nestling.model.ssd import ssd

Scan = Callable[..., Tensor]
CHECKED = 72  # positions that the recurrence itself is computed for, in float64


@dataclass(frozen=True)
class Shape:
    batch: int
    length: int
    groups: int
    heads: int  # per group
    channels: int
    state: int
    documents: int = 1  # in a row

    @property
    def flops(self) -> int:
        """Of the recurrence, forward and backward: state times decay plus input, and read out; twice that back."""
        return 3 * 4 * self.batch * self.length * self.groups * self.heads * self.channels * self.state


SHAPES = {
    "hidden 192": Shape(4, 512, 2, 3, 64, 64),
    "hidden 512": Shape(2, 1024, 2, 8, 64, 64),
    "hidden 512, 8 documents a row": Shape(2, 1024, 2, 8, 64, 64, documents=8),
    "heads of the 12B": Shape(1, 512, 8, 8, 64, 128),
}
QUICK = {"tiny": Shape(1, 80, 2, 2, 8, 8), "tiny, 2 documents a row": Shape(1, 80, 2, 2, 8, 8, documents=2)}
COMPILED = ("hidden 512", "tiny")


def figures(bench: Bench) -> Iterator[Figure]:
    for name, shape in (QUICK if bench.quick else SHAPES).items():
        yield from _case(bench, name, shape)


def inputs(shape: Shape, device: str, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, dt, A, B, C, D."""
    b, length, g, h, p, n = shape.batch, shape.length, shape.groups, shape.heads, shape.channels, shape.state
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    given = [
        random(b, length, g, h, p),
        torch.nn.functional.softplus(random(b, length, g, h) - 3),
        -torch.arange(1, g * h + 1, dtype=torch.float64).view(g, h),
        random(b, length, g, n) / n**0.5,
        random(b, length, g, n) / n**0.5,
        random(g, h),
    ]
    return [value.to(device, dtype).requires_grad_() for value in given]


def ours(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, documents: int = 1) -> Tensor:
    numbers = None
    if documents > 1:
        numbers = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]) * documents // x.shape[1]
    return ssd(x, dt, A, B, C, D, documents_BL=numbers)[0]


def theirs(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, documents: int = 1, chunk: int = DEFAULT
) -> Tensor:
    """Documents of one length become rows, since this scan knows nothing of documents: the best that can be done."""
    from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

    rows = [value.flatten(2, 3) if value is x else value for value in (x, dt.flatten(2), B, C)]
    rows = [value.unflatten(1, (documents, -1)).flatten(0, 1) for value in rows]
    return mamba2_chunk_scan(rows[0], rows[1], A.flatten(), rows[2], rows[3], chunk, D.flatten()).reshape(x.shape)


def recurrence(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, documents: int = 1) -> Tensor:
    """One token after the other."""
    state, outputs = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1]), []
    for t in range(x.shape[1]):
        if t and t * documents // x.shape[1] != (t - 1) * documents // x.shape[1]:
            state = torch.zeros_like(state)
        state = state * (dt[:, t] * A).exp()[..., None, None]
        state = state + torch.einsum("bgh,bghp,bgn->bghpn", dt[:, t], x[:, t], B[:, t])
        outputs.append(torch.einsum("bghpn,bgn->bghp", state, C[:, t]) + D[..., None] * x[:, t])
    return torch.stack(outputs, 1)


def learn(scan: Scan, given: list[Tensor], dy: Tensor) -> Callable[[], Sequence[Tensor]]:
    def run() -> Sequence[Tensor]:
        y = scan(*given)
        return y.detach(), *torch.autograd.grad(y, given, dy)

    return run


def saved(scan: Scan, given: list[Tensor]) -> int:
    """Bytes that autograd keeps for backward, the inputs themselves left out."""
    known = {value.untyped_storage().data_ptr() for value in given}
    kept: dict[int, Tensor] = {}

    def pack(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        y = scan(*given)
    assert y is not None
    return sum(value.untyped_storage().nbytes() for place, value in kept.items() if place not in known)


def _case(bench: Bench, name: str, shape: Shape) -> Iterator[Figure]:
    scans: dict[str, Scan] = {"ours": functools.partial(ours, documents=shape.documents)}
    for chunk in (32, DEFAULT) if bench.quick else CHUNKS:
        scans[f"chunk {chunk}"] = functools.partial(theirs, documents=shape.documents, chunk=chunk)
    error = _check(bench, name, shape, scans)
    given = inputs(shape, bench.device, 1)
    dy = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(2)).to(bench.device)
    runs: dict[str, Run] = {key: learn(scan, given, dy) for key, scan in scans.items()}
    tried = bench.in_turn({key: run for key, run in runs.items() if key != "ours"}, rounds=min(bench.rounds, 2))
    default, best = f"chunk {DEFAULT}", tried.quickest(*tried.rounds[0])
    runs = {key: runs[key] for key in ("ours", default, best)}
    if name in COMPILED:
        runs |= _compiled(bench, scans["ours"], scans[best], given, dy)
    times = bench.in_turn(runs)
    limit = bench.limits.of_flops(shape.flops, times.median("ours"), "fp32")

    def speed(case: str, run: str, rival: str, reach: float | None, setting: str) -> Figure:
        share = (limit, "fp32 FLOP/s") if run == "ours" else (None, "")
        return Figure(
            "scan", case, f"transformers, {setting}", "× as fast", times.ratio(rival, run), reach, times.median(run),
            *share, error,
        )  # fmt: skip

    for key, of, eager, compiled, kept in ((default, "default", 3.0, 4.0, 0.6), (best, "best", 1.6, 2.5, 0.4)):
        yield speed(name, "ours", key, eager, f"{key} ({of})")
        memory = saved(scans["ours"], given) / saved(scans[key], given)
        yield Figure("scan", f"{name}, saved for backward", f"transformers, {key}", "× the memory", (memory,), kept)
        if name in COMPILED:
            yield speed(f"{name}, compiled", "ours compiled", key, compiled, f"{key} ({of}), eager")
    if name in COMPILED:
        yield speed(f"{name}, compiled", "ours compiled", "theirs compiled", None, f"{best}, compiled")


def _compiled(bench: Bench, mine: Scan, rival: Scan, given: list[Tensor], dy: Tensor) -> dict[str, Run]:
    backends = ("aot_eager", "eager") if bench.quick else ("inductor", "inductor")  # the rival's takes longest
    runs = {
        f"{key} compiled": learn(torch.compile(scan, backend=backend), given, dy)
        for key, scan, backend in zip(("ours", "theirs"), (mine, rival), backends, strict=True)
    }
    agree("scan, compiled", runs, learn(mine, given, dy)(), TOLERANCE[torch.float32])
    return dict(runs)


def _check(bench: Bench, name: str, shape: Shape, scans: dict[str, Scan]) -> float:
    """On fewer positions, forward and backward, against the recurrence in float64."""
    short = replace(shape, length=CHECKED)
    exact = inputs(short, "cpu", 3, torch.float64)
    dy = torch.randn(exact[0].shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    reference = learn(functools.partial(recurrence, documents=shape.documents), exact, dy)()
    given = [value.detach().to(bench.device, torch.float32).requires_grad_() for value in exact]
    dy = dy.to(bench.device, torch.float32)
    runs = {key: learn(scan, given, dy) for key, scan in scans.items()}
    return agree(f"scan, {name}", runs, reference, TOLERANCE[torch.float32])
