"""The kernel of attention against torch's own, forward and backward and forward alone, in turns.

    python benchmarks/attention/speed.py > benchmarks/attention/DATE.md

Each round times both, the other way round every second time; ratios are of one round, least / median / most. torch is
`scaled_dot_product_attention`, causal, or with a dense mask where a row has documents. Results are compared first.
"""

import argparse
import statistics
from collections.abc import Callable
from datetime import date

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.bench.machine import circumstances
from nestling.bench.turns import Bench
from nestling.model.native.attention import attended, attention
from nestling.model.native.library import available

TOKENS = 1024  # of all rows, at least one row
SHAPES = [  # (length, query heads, KV heads, channels, documents of a row)
    (512, 8, 1, 64, 1), (512, 8, 1, 64, 8), (512, 8, 8, 64, 1), (128, 8, 1, 64, 1), (2048, 8, 1, 64, 1),
    (2048, 8, 1, 64, 8), (4096, 8, 1, 64, 1), (512, 16, 2, 32, 1), (512, 4, 1, 128, 1), (2048, 4, 1, 128, 1),
]  # fmt: skip


def runs(length: int, heads: int, groups: int, channels: int, documents: int) -> tuple[dict[str, Callable], int]:
    """What is timed, `ours` and `torch` with gradients and without, and how many rows."""
    batch, generator = max(TOKENS // length, 1), torch.Generator().manual_seed(0)
    shapes = [(batch, length, count, channels) for count in (heads, groups, groups)]
    given = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    dy = torch.randn(shapes[0], generator=generator)
    numbers = (torch.arange(length) * documents // length).expand(batch, -1) if documents > 1 else None
    mask = None if numbers is None else (numbers[:, None, :, None] == numbers[:, None, None]).tril()

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (
            attention(query, key, value, numbers)[0]
            if torch.is_grad_enabled()
            else attended(query, key, value, numbers)
        )

    def torchs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        across = [t.transpose(1, 2) for t in (query, key, value)]
        found = F.scaled_dot_product_attention(*across, mask, is_causal=mask is None, enable_gqa=True)
        return found.transpose(1, 2)

    def learn(run: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        y = run(*given)
        return y, *torch.autograd.grad(y, given, dy)

    @torch.no_grad()
    def read(run: Callable[..., Tensor]) -> Tensor:
        return run(*given)

    for mine, other in zip(learn(ours), learn(torchs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)
    both = {"ours": ours, "torch": torchs}
    learnt = {name: lambda run=run: learn(run) for name, run in both.items()}
    return learnt | {f"{name}, read": lambda run=run: read(run) for name, run in both.items()}, batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    assert available(), "there is no C++ compiler here"
    about = ", ".join(f"{name} {value}" for name, value in circumstances("cpu").items() if name != "date")
    print(f"# Attention by a kernel and by torch, {date.today()}\n")
    print(f"`python benchmarks/attention/speed.py --rounds {rounds}`")
    print(f"\n{about}; float32\n")
    print("| rows × length | heads / KV heads × channels | documents | torch, ms | forward + backward | forward |")
    print("|---|---|---|---|---|---|")
    for length, heads, groups, channels, documents in SHAPES:
        made, batch = runs(length, heads, groups, channels, documents)
        times = Bench(rounds=rounds).in_turn(made)
        spreads = [
            f"{min(ratio):.2f} / {statistics.median(ratio):.2f} / {max(ratio):.2f} × the time"
            for ratio in (times.ratio("ours", "torch"), times.ratio("ours, read", "torch, read"))
        ]
        took = f"{1000 * times.median('torch'):.1f}"
        shape = f"{batch} × {length} | {heads} / {groups} × {channels}"
        print(f"| {shape} | {documents} | {took} | {spreads[0]} | {spreads[1]} |", flush=True)


if __name__ == "__main__":
    main()
