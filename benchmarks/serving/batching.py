"""Tokens per second of 16 streams of one size against one stream: what batching gains, and where it is lost.

    OMP_NUM_THREADS=1 python benchmarks/serving/batching.py

A random family (hidden 512, eight layers) whose texts never end early, so that every stream gets all its tokens. Four
levels, each of which adds one part to what is timed: the products of a step, the scheduler (sampling, who goes on), the
text of every token as an event, and `nestling serve` in a process of its own, read by clients in this one. 1 and 16
streams take turns; the figures are medians. The last line is the one that counts: it must be at least 4.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import torch
from running import serving

import nestling
from nestling.arch.architecture import Architecture
from nestling.infer.family import View
from nestling.infer.generate import start
from nestling.infer.sampling import Row
from nestling.infer.steps import step
from nestling.model.nemotron_h import NemotronH
from nestling.model.store import save_model
from nestling.serve.answer import CompletionForm
from nestling.serve.choice import Choice
from nestling.serve.http import _event
from nestling.serve.scheduler import Request, Scheduler
from nestling.tokenizer import character_tokenizer, save_tokenizer

STREAMS, PROMPT = 16, "50+23-88="
SHAPE = Architecture(
    "M-M*-M-M",
    vocab_size=16,
    hidden_size=512,
    intermediate_size=1536,
    n_groups=2,
    mamba_num_heads=16,
    mamba_head_dim=64,
    ssm_state_size=64,
    num_key_value_heads=2,
    num_attention_heads=8,
    head_dim=64,
)


def save(directory: Path) -> None:
    model = NemotronH(SHAPE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.02, generator=generator).add_(1.0 if "norm" in name else 0.0)
    save_model(model, directory)
    save_tokenizer(character_tokenizer(), directory)
    (directory / "generation_config.json").unlink()  # nothing ends a text
    (directory / "config.json").write_text(json.dumps(SHAPE.to_config({})))
    half = {"hidden_size": 352, "intermediate_size": 1024, "mamba_num_heads": 12}
    budgets = {"100%": {"submodel": {}}, "50%": {"submodel": half}}
    (directory / "nestling.json").write_text(json.dumps({"format": 1, "budgets": budgets}))


def products(view: View, count: int, tokens: int) -> None:
    with torch.inference_mode():
        cache, _ = start(view, [view.speech.tokenizer.encode(PROMPT).ids] * count)
        for _ in range(tokens):
            step(view, [3] * count, cache)


def scheduled(view: View, count: int, tokens: int, told: bool = False) -> None:
    tokenizer, scheduler = view.speech.tokenizer, Scheduler(cache_bytes=2**30)
    ids = tokenizer.encode(PROMPT).ids
    requests = [Request(view, Row(ids, tokens)) for _ in range(count)]
    choices, form = {one: Choice(0, one, tokenizer, []) for one in requests}, CompletionForm(tokenizer)
    for one in requests:
        scheduler.submit(one)
    while not scheduler.idle:
        for heard in scheduler.step():
            if told:
                for chunk in form.chunks(choices[heard.request].take(heard)):
                    _event({"id": "cmpl-0", "created": 0, "model": "family"} | chunk)


async def served(url: str, model: str, count: int, tokens: int) -> None:
    body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "stream": True}

    async def one(client: httpx.AsyncClient) -> None:
        answer = await client.post(f"{url}/v1/completions", json=body)
        assert answer.content.endswith(b"data: [DONE]\n\n"), answer.content[-200:]

    async with httpx.AsyncClient(timeout=300) as client:
        await asyncio.gather(*(one(client) for _ in range(count)))


def rates(run: Callable[[int, int], None], tokens: int, rounds: int) -> dict[int, float]:
    """Tokens per second by the number of streams, which take turns."""
    found: dict[int, list[float]] = {1: [], STREAMS: []}
    for count in found:
        run(count, 4)
    for _ in range(rounds):
        for count, seen in found.items():
            began = time.perf_counter()
            run(count, tokens)
            seen.append(count * tokens / (time.perf_counter() - began))
    return {count: statistics.median(seen) for count, seen in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200, help="Of each stream.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", default="100%")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        save(Path(made))
        view = nestling.load(made)[options.size].held()
        levels = {
            "products": lambda count, tokens: products(view, count, tokens),
            "scheduler": lambda count, tokens: scheduled(view, count, tokens),
            "text": lambda count, tokens: scheduled(view, count, tokens, told=True),
        }
        found = {name: rates(run, options.tokens, options.rounds) for name, run in levels.items()}
        with serving(Path(made)) as server:
            model = f"family@{options.size}"
            found["HTTP"] = rates(
                lambda count, tokens: asyncio.run(served(server.url, model, count, tokens)),
                options.tokens,
                options.rounds,
            )
    print(f"torch {torch.__version__}, float32, {view.parameters:,} parameters, {options.tokens} tokens a stream\n")
    print(f"| | 1 stream, tokens/s | {STREAMS} streams | times |\n|---|---:|---:|---:|")
    for name, rate in found.items():
        print(f"| {name} | {rate[1]:,.0f} | {rate[STREAMS]:,.0f} | {rate[STREAMS] / rate[1]:.2f} |")


if __name__ == "__main__":
    main()
