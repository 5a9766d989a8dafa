"""What a smaller size costs in training: prefix compute against masked full compute, NVIDIA's public way.

    OMP_NUM_THREADS=2 python benchmarks/training/cost.py

One process, float32, random weights and tokens. A round times, in turn, the student's forward and backward pass of
every budget as prefix and as masked whole, and one forward pass of the teacher. Ratios are medians over rounds of the
ratio within a round. FLOPs are counted by the table (arch/cost.py) at the mean context of the sequence.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from nestling.arch.architecture import Architecture
from nestling.arch.between import between
from nestling.arch.cost import cost, parameters
from nestling.arch.submodel import WHOLE, Submodel
from nestling.arch.targets import parse_wish
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import Widths, hard, masked

BUDGETS = ("100%", "75%", "50%")


def shape(hidden: int) -> Architecture:
    return Architecture(
        "M-M*-M-M*-",
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        n_groups=4,
        mamba_num_heads=hidden // 32,
        mamba_head_dim=64,
        ssm_state_size=64,
        num_key_value_heads=4,
        num_attention_heads=hidden // 64,
        head_dim=64,
    )


def random_model(architecture: Architecture, seed: int) -> NemotronH:
    model = NemotronH(architecture)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.02, generator=generator).add_(1.0 if "norm" in name else 0.0)
    return model


def seconds(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def learn(model: NemotronH, ids: torch.Tensor, widths: Widths) -> None:
    """Forward and backward of a student; gradients are thrown away."""
    model(ids, widths).logits.square().mean().backward()
    model.zero_grad(set_to_none=True)


def teach(model: NemotronH, ids: torch.Tensor) -> None:
    with torch.no_grad():
        model(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    architecture = shape(given.hidden)
    sizes: dict[str, Submodel] = {
        name: between(architecture, range(10), {}, name, parse_wish(name, architecture)) for name in BUDGETS
    }
    model = random_model(architecture, 0)
    ids = torch.randint(8192, (given.batch, given.length), generator=torch.Generator().manual_seed(0))
    runs: dict[str, Callable[[], None]] = {"teacher": lambda: teach(model, ids)}
    for name, size in sizes.items():
        runs[f"{name} prefix"] = lambda size=size: learn(model, ids, hard(architecture, size))
        runs[f"{name} masked"] = lambda size=size: learn(model, ids, masked(architecture, size))
    for call in runs.values():
        call()  # once untimed
    rounds = [{name: seconds(call) for name, call in runs.items()} for _ in range(given.rounds)]
    report(architecture, sizes, rounds, given)


def report(
    architecture: Architecture, sizes: dict[str, Submodel], rounds: list[dict[str, float]], given: argparse.Namespace
) -> None:
    def ratio(top: Callable[[dict[str, float]], float], bottom: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(top(row) / bottom(row) for row in rounds)

    flops = {name: cost(architecture, size).flops(given.length // 2) for name, size in sizes.items()}
    whole = cost(architecture, WHOLE).flops(given.length // 2)
    print(f"hidden {given.hidden}, {given.batch} × {given.length} tokens, {torch.get_num_threads()} threads, ", end="")
    print(f"torch {torch.__version__}, {given.rounds} rounds\n")
    print(
        "| budget | parameters | FLOPs of the whole | prefix of masked, time | of the FLOPs ratio | masked of whole |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    for name, size in sizes.items():
        share = flops[name] / whole
        against = ratio(lambda row, n=name: row[f"{n} prefix"], lambda row, n=name: row[f"{n} masked"])
        slow = ratio(lambda row, n=name: row[f"{n} masked"], lambda row: row["100% prefix"])
        print(
            f"| {name} | {parameters(architecture, size):,} | {share:.3f} | {against:.3f} | {against / share:.2f} | "
            f"{slow:.2f} |"
        )
    each = len(BUDGETS)

    def step(row: dict[str, float], how: str, teachers: int) -> float:
        return teachers * row["teacher"] + sum(row[f"{name} {how}"] for name in BUDGETS)

    print("\n| whole step, teacher included | masked over prefix |")
    print("|---|---:|")
    one = ratio(lambda row: step(row, "masked", each), lambda row: step(row, "prefix", each))
    shared = ratio(lambda row: step(row, "masked", each), lambda row: step(row, "prefix", 1))
    print(f"| one budget a batch, drawn alike | {one:.2f} |")
    print(f"| all three on the same tokens, one teacher pass, against one budget a batch masked | {shared:.2f} |")


if __name__ == "__main__":
    main()
