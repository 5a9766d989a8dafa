"""The chunked scan, forward and backward, against stock transformers' torch path.

    OMP_NUM_THREADS=2 python benchmarks/model/scan.py [--curve] [--json] [--device cuda --dtype bf16]

The rival is `mamba2_chunk_scan` of transformers' nemotron_h, at its default chunk (128) and at the fastest of 32, 64,
128 and 256 for that case, found first. A round runs each once, in turn; ratios are of one round: min / median / max.
Memory is what autograd saves besides the inputs. Inputs are random numbers; the results are compared before timing.
"""

import argparse
import functools
from collections.abc import Callable

import torch
from measure import Run, circumstances, in_turn, report
from torch import Tensor

from nestling.model.ssd import ssd

Scan = Callable[..., Tensor]
SHAPES = {  # batch, length, groups, heads per group, head channels, state
    "hidden 192": (4, 512, 2, 3, 64, 64),
    "hidden 512": (2, 1024, 2, 8, 64, 64),
    "nano 12B heads": (1, 512, 8, 8, 64, 128),
    "narrow heads": (8, 128, 2, 4, 32, 32),
}
CHUNKS = (32, 64, 128, 256)
LENGTHS = tuple(2**power for power in range(7, 16))


def inputs(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> list[Tensor]:
    batch, length, groups, heads, channels, state = shape
    generator = torch.Generator().manual_seed(0)
    of = {
        "x": torch.randn(batch, length, groups, heads, channels, generator=generator),
        "dt": torch.nn.functional.softplus(torch.randn(batch, length, groups, heads, generator=generator) - 3),
        "A": -torch.arange(1.0, groups * heads + 1).view(groups, heads),
        "B": torch.randn(batch, length, groups, state, generator=generator) / state**0.5,
        "C": torch.randn(batch, length, groups, state, generator=generator) / state**0.5,
        "D": torch.randn(groups, heads, generator=generator),
    }
    return [value.to(device, dtype if name in "xBC" else None).requires_grad_() for name, value in of.items()]


def ours(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    return ssd(x.float(), dt, A, B.float(), C.float(), D)[0]


def theirs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, chunk: int = 128) -> Tensor:
    from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

    y = mamba2_chunk_scan(x.flatten(2, 3), dt.flatten(2), A.flatten(), B, C, chunk, D.flatten())
    return y.view_as(x)


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


def learn(scan: Scan, given: list[Tensor], dy: Tensor) -> Run:
    return lambda: torch.autograd.grad(scan(*given), given, dy)


def case(name: str, shape: tuple[int, ...], rounds: int, device: str, dtype: torch.dtype) -> dict[str, object]:
    given = inputs(shape, device, dtype)
    dy = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(1)).to(device)
    rivals = {chunk: functools.partial(theirs, chunk=chunk) for chunk in CHUNKS}
    with torch.no_grad():
        expected = theirs(*given)
        difference = float((ours(*given) - expected).abs().max() / expected.abs().max())
    assert difference < (1e-5 if dtype == torch.float32 else 1e-2), difference
    first = in_turn({str(chunk): learn(rival, given, dy) for chunk, rival in rivals.items()}, 2, device)
    best = min(CHUNKS, key=lambda chunk: first.median(str(chunk)))
    runs = {"ours": learn(ours, given, dy), "default": learn(theirs, given, dy), "best": learn(rivals[best], given, dy)}
    times = in_turn(runs, rounds, device)
    return {
        "case": name,
        "B L g h p n": " ".join(map(str, shape)),
        "ours, ms": times.median("ours") * 1e3,
        "default ÷ ours": times.ratio("default", "ours"),
        "best chunk": best,
        "best ÷ ours": times.ratio("best", "ours"),
        "memory ÷ default": saved(ours, given) / saved(theirs, given),
        "memory ÷ best": saved(ours, given) / saved(rivals[best], given),
    }


def curve(rounds: int, device: str, dtype: torch.dtype) -> list[dict[str, object]]:
    """Ours alone against length: milliseconds per 1024 tokens stay what they are where the cost is linear."""
    rows: list[dict[str, object]] = []
    for length in LENGTHS:
        given = inputs((1, length, 2, 3, 64, 64), device, dtype)
        times = in_turn({"ours": learn(ours, given, torch.ones_like(given[0]))}, rounds, device)
        rows.append({"length": length, "ms": times.median("ours") * 1e3})
        rows[-1]["ms per 1024 tokens"] = times.median("ours") * 1e3 * 1024 / length
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--curve", action="store_true", help="cost against length instead")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="of x, B and C; sums are in float32")
    given = parser.parse_args()
    dtype = torch.bfloat16 if given.dtype == "bf16" else torch.float32
    if given.curve:
        rows = curve(given.rounds, given.device, dtype)
    else:
        rows = [case(name, shape, given.rounds, given.device, dtype) for name, shape in SHAPES.items()]
    report(rows, circumstances(given.device) | {"dtype": given.dtype}, given.json)


if __name__ == "__main__":
    main()
