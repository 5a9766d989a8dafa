"""Batched generation of every size by view, against stock transformers' `generate` on the sliced checkpoint.

    OMP_NUM_THREADS=2 python benchmarks/decode/speed.py out/demo/elastic

One process, float32, greedy, prompts of a demo task. A round times, in turn, both on the same prompts at every batch;
ratios are medians over rounds of the ratio within a round (minimum … maximum). Tokens are checked to be the same up to
the first place where the two most probable tokens are within 1e-4. `fixed`: a row gets so many tokens. `ended`: rows
stop at the end token, as in an evaluation.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers

import nestling
from nestling.evaluate.stock import load_stock, load_stock_tokenizer
from nestling.infer.family import View
from nestling.infer.generate import generate, left_padded
from nestling.tasks import Task, distinct, problems
from nestling.tokenizer import end_token

MARGIN = 1e-4


def stocks(model: torch.nn.Module, prompts: Sequence[Sequence[int]], count: int, eos: int | None) -> list[list[int]]:
    ids, mask = left_padded(prompts)
    options = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0, "eos_token_id": eos}
    rows = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :].tolist()
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def check(view: View, prompts: Sequence[Sequence[int]], ours: list[list[int]], theirs: list[list[int]]) -> int:
    """How many rows differ; each must differ first where two tokens are all but equally probable."""
    differing = 0
    for prompt, mine, other in zip(prompts, ours, theirs, strict=True):
        place = next((i for i, pair in enumerate(zip(mine, other, strict=False)) if pair[0] != pair[1]), None)
        if place is not None:
            differing += 1
            best = view(torch.tensor([[*prompt, *mine[:place]]])).logits[0, -1].topk(2).values
            assert best[0] - best[1] < MARGIN, f"tokens differ where the margin is {best[0] - best[1]:.1e}"
    return differing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 250])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--task", default="chain_sum:min_terms=2,max_terms=3,max_digits=2")
    options = parser.parse_args()
    family, tokenizer = nestling.load(options.directory), load_stock_tokenizer(options.directory)
    asked = distinct(problems(Task.parse(options.task), 0, held_out=True), max(options.batches))
    prompts = [tokenizer(problem.prompt)["input_ids"] for problem in asked]
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    print(f"{versions}, {torch.get_num_threads()} threads, {options.rounds} rounds\n")
    print("| size | batch | tokens | ours, tokens/s | transformers | ratio | rows that differ |")
    print("|---|---:|---|---:|---:|---:|---:|")
    for name, view in family.items():
        with tempfile.TemporaryDirectory() as directory:
            nestling.slice(options.directory, name, Path(directory) / "cut")
            model = load_stock(Path(directory) / "cut")
            for batch in options.batches:
                for eos in (None, end_token(options.directory)):
                    row(name, view, model, prompts[:batch], options.tokens, eos, options.rounds)


def row(
    name: str, view: View, model: torch.nn.Module, prompts: list[list[int]], count: int, eos: int | None, rounds: int
) -> None:
    ours = generate(view, prompts, max_tokens=count, eos=eos)
    theirs = stocks(model, prompts, count, eos)
    differing = check(view, prompts, ours, theirs)
    pairs = [
        (
            seconds(lambda: generate(view, prompts, max_tokens=count, eos=eos)),
            seconds(lambda: stocks(model, prompts, count, eos)),
        )
        for _ in range(rounds)
    ]
    ratios = sorted(theirs / ours for ours, theirs in pairs)
    tokens = sum(min(len(found) + 1, count) for found in ours)
    mine, other = (f"{tokens / statistics.median(times):,.0f}" for times in zip(*pairs, strict=True))
    kind = f"fixed {count}" if eos is None else "ended"
    spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} … {ratios[-1]:.2f})"
    print(f"| {name} | {len(prompts)} | {kind} | {mine} | {other} | {spread} | {differing} |", flush=True)


if __name__ == "__main__":
    main()
