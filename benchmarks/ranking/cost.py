"""Width ranking against a plain forward pass over the same tokens: seconds and peak memory, as ratios.

    OMP_NUM_THREADS=2 python benchmarks/ranking/cost.py > benchmarks/ranking/cost-DATE.md

Seconds: both in one process, in turn, the median of the pairs' ratios. Memory: each alone in a fresh process, the
highest resident set the kernel saw (VmHWM), model and libraries included, and without what was there before the first
pass. `forward` is `model(ids).logits`; `without head` stops at the last norm, as ranking does.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from nestling.arch.architecture import Architecture
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import hard
from nestling.train.depth import last_norm, planned, rank_layers, recomputed, run
from nestling.train.importance import Method, width_scores
from nestling.train.partial import Partial

MODEL = Architecture(
    "M-M*-M-M*-",
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=2048,
    n_groups=4,
    mamba_num_heads=16,
    mamba_head_dim=64,
    ssm_state_size=64,
    num_key_value_heads=4,
    num_attention_heads=8,
    head_dim=64,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--alone", choices=[*PASSES])
    parser.add_argument("--batches", type=int, default=4)
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    if given.alone:
        print(*alone(given.alone, batches(given.samples, given.length, given.batches)))
        return
    print(f"# Cost of ranking: {given.samples} × {given.length} tokens a batch, {torch.get_num_threads()} threads\n")
    print(f"`{MODEL}`, float32, random weights; torch {torch.__version__}\n")
    seconds(given.pairs, given.samples, given.length)
    memory(given.samples, given.length)
    depth(given.samples, given.length)


def model() -> NemotronH:
    torch.manual_seed(0)
    made = NemotronH(MODEL)
    for name, parameter in made.named_parameters():
        parameter.data.normal_(std=parameter.shape[-1] ** -0.5) if parameter.ndim == 2 else parameter.data.fill_(1.0)
        if name.endswith(("A_log", "dt_bias")):
            parameter.data.fill_(-1.0)
    return made.eval()


def batches(samples: int, length: int, count: int = 1, padded: bool = False) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    real = torch.arange(length) < torch.linspace(length // 2 if padded else length, length, samples).long()[:, None]
    return [(torch.randint(MODEL.vocab_size, (samples, length), generator=generator), real) for _ in range(count)]


def forward(made: NemotronH, data: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for ids, _ in data:
        made(ids)


def headless(made: NemotronH, data: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for ids, _ in data:
        last_norm(made, run(made, made.embed(ids, hard(MODEL)), range(len(made.layers))))


def ranking(metrics: dict[str, str]) -> Callable[[NemotronH, list[tuple[torch.Tensor, torch.Tensor]]], None]:
    return lambda made, data: width_scores(made, data, Method.of(metrics), Partial()) and None


L2 = {"hidden": "l2", "ffn": "post-l2", "mamba_heads": "l2", "mamba_channels": "l2", "attention_heads": "l2"}
PASSES = {"forward": forward, "without head": headless, "ranking": ranking({}), "ranking, l2": ranking(L2)}


def seconds(pairs: int, samples: int, length: int) -> None:
    made = model()
    print("| seconds | batch | forward | ratio to forward | ratio without head |\n|---|---|---:|---:|---:|")
    for padded in (False, True):
        data = batches(samples, length, padded=padded)
        taken: dict[str, list[float]] = {name: [] for name in PASSES}
        for _ in range(pairs + 1):  # the first pair warms up
            for name, once in PASSES.items():
                began = time.perf_counter()
                once(made, data)
                taken[name].append(time.perf_counter() - began)
        for name in ("ranking", "ranking, l2"):
            cells = [statistics.median(taken["forward"][1:])]
            for other in ("forward", "without head"):
                cells.append(statistics.median(a / b for a, b in zip(taken[name][1:], taken[other][1:], strict=True)))
            kind = "a quarter padding" if padded else "no padding"
            print(f"| {name} | {kind} | {cells[0]:.2f} s | {cells[1]:.2f} | {cells[2]:.2f} |")


def alone(name: str, data: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[int, int]:
    """Peak resident KiB of a process that does only this, before the passes and after them."""
    made = model()
    before = high_water()
    PASSES[name](made, data)
    return before, high_water()


def high_water() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def memory(samples: int, length: int) -> None:
    print("\n| peak memory | whole process | of it the passes | ratio, process | ratio, passes |")
    print("|---|---:|---:|---:|---:|")
    first: tuple[int, int] | None = None
    for name, count in [*((name, 4) for name in PASSES), ("ranking", 32)]:
        command = [sys.executable, __file__, "--alone", name, "--samples", str(samples), "--length", str(length)]
        command += ["--batches", str(count)]
        runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() for _ in range(3)]
        before, peak = (int(statistics.median(int(run[place]) for run in runs)) for place in (0, 1))
        first = first or (peak, peak - before)
        cells = f"{peak / 1024:.0f} MiB | {(peak - before) / 1024:.0f} MiB"
        print(f"| {name}, {count} batches | {cells} | {peak / first[0]:.2f} | {(peak - before) / first[1]:.2f} |")


def depth(samples: int, length: int) -> None:
    """One round of layer errors against running every model without a layer from the bottom."""
    made, data = model(), batches(samples, length // 4)
    count = len(made.layers)
    began = time.perf_counter()
    rank_layers(made, data, 1, Partial())
    ours = time.perf_counter() - began
    began = time.perf_counter()
    (ids, _), *_ = data
    everything = range(count)
    for gone in (None, *everything):
        made.head(
            run(made, made.embed(ids, hard(MODEL)), [layer for layer in everything if layer != gone]), hard(MODEL)
        )
    naive = time.perf_counter() - began
    print(f"\nDepth, one round of {count} layers: {planned(count, 1)} layer passes instead of {recomputed(count, 1)},")
    print(f"{ours:.2f} s instead of {naive:.2f} s: {1 - ours / naive:.0%} saved.")
    passes, full = planned(62, 61), recomputed(62, 61)
    print(f"All 61 rounds of 62 layers: {passes:,} layer passes a batch, as much as {passes / 62:,.0f} forward passes;")
    print(f"{full:,} if everything were recomputed: {1 - passes / full:.0%} saved.")


if __name__ == "__main__":
    main()
