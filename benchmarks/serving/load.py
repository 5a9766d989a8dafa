"""64 streaming clients over all sizes of a family, on the loopback.

    python benchmarks/serving/load.py out/demo/elastic                        # each client asks 8 times
    python benchmarks/serving/load.py out/demo/elastic --seconds 120          # or for so long
    python benchmarks/serving/load.py out/demo/elastic --seconds 120 --rude   # some hang up, some read slowly

Starts `nestling serve`, and has every client stream one greedy completion after the other, of a size, a prompt and a
length drawn by its own seed. Every text is compared with the same request run alone through `generate`: it must be the
same up to the first place where the two most probable tokens are within 1e-4. With --rude an eighth of the requests
hang up after a few pieces, whose text must then begin the right one, and an eighth wait between pieces. Resident memory
of the server is sampled twice a second, after a first round of every size; at the end its caches must be empty. Exits 1
if a request failed, a text differs, or anything is left.
"""

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from openai import AsyncOpenAI
from running import Server, questions, serving

import nestling
from nestling.infer.family import View
from nestling.infer.generate import generate
from nestling.tokenizer import end_tokens, read_tokenizer

MARGIN = 1e-4
LENGTHS = (4, 16, 48)  # tokens asked for
MANNERS = ("steady",) * 6 + ("hangs up", "slow")


@dataclass(frozen=True)
class Job:
    model: str
    prompt: str
    tokens: int


@dataclass
class Seen:
    """What the clients saw. texts: of each job, each with whether it was heard to its end."""

    texts: dict[Job, set[tuple[str, bool]]] = field(default_factory=dict)
    manners: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)


async def ask(client: AsyncOpenAI, job: Job, manner: str, chance: random.Random) -> tuple[str, bool]:
    """The text of a stream, and whether it was heard to its end."""
    stream = await client.completions.create(
        model=job.model, prompt=job.prompt, max_tokens=job.tokens, temperature=0, stream=True
    )
    text, ended = "", False
    async with stream:
        async for chunk in stream:
            text, ended = text + chunk.choices[0].text, chunk.choices[0].finish_reason is not None
            if manner == "hangs up" and chance.random() < 0.3:
                break
            if manner == "slow":
                await asyncio.sleep(0.05)
    return text, ended


async def converse(client: AsyncOpenAI, jobs: list[Job], number: int, options: argparse.Namespace, seen: Seen) -> None:
    """One client: request after request."""
    chance, asked = random.Random(number), 0
    ends = time.monotonic() + (options.seconds or 0)
    while time.monotonic() < ends if options.seconds else asked < options.requests:
        job, manner = chance.choice(jobs), chance.choice(MANNERS) if options.rude else "steady"
        try:
            text, ended = await ask(client, job, manner, chance)
            if not ended and manner != "hangs up":
                raise EOFError("the stream ended before its text")
            seen.texts.setdefault(job, set()).add((text, ended))
        except Exception as error:
            seen.failed.append(f"{type(error).__name__}: {error}")
        seen.manners[manner] += 1
        asked += 1


async def watch(server: Server, seen: Seen) -> None:
    while True:
        seen.resident.append(server.resident())
        await asyncio.sleep(0.5)


async def load(server: Server, jobs: list[Job], options: argparse.Namespace) -> Seen:
    seen, warming = Seen(), Seen()
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        first_round = argparse.Namespace(seconds=None, requests=1, rude=False)
        await asyncio.gather(*(converse(client, jobs, -number, first_round, warming) for number in range(64)))
        watching = asyncio.create_task(watch(server, seen))
        await asyncio.gather(*(converse(client, jobs, number, options, seen) for number in range(options.clients)))
        watching.cancel()
    seen.failed += warming.failed
    return seen


def compare(directory: Path, texts: dict[Job, set[tuple[str, bool]]]) -> tuple[int, int]:
    """(texts that differ from the same request alone, texts that differ after two all but equally probable tokens)."""
    family, tokenizer, ends = nestling.load(directory), read_tokenizer(directory), end_tokens(directory)
    wrong = near = 0
    for job, heard in texts.items():
        view, ids = family[job.model.split("@", 1)[1]], tokenizer.encode(job.prompt).ids
        (row,) = generate(view, [ids], max_tokens=job.tokens, eos=ends)
        wanted = tokenizer.decode(row)
        for text, ended in heard:
            if text != wanted if ended else not wanted.startswith(text):
                sure = tokenizer.decode(row[: certain(view, ids, row)])
                agrees = len(sure) < len(wanted) and text.startswith(sure[: len(text)])
                near, wrong = near + agrees, wrong + (not agrees)
    return wrong, near


def certain(view: View, ids: list[int], row: list[int]) -> int:
    """Tokens of the row before the first whose rival is within the margin; one more than all where there is none."""
    best = view(torch.tensor([ids + row])).logits[0, len(ids) - 1 :].topk(2).values
    close = (best[:, 0] - best[:, 1] < MARGIN).nonzero()
    return int(close[0]) if len(close) else len(row) + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=8, help="Of each client.")
    parser.add_argument("--seconds", type=float, help="Instead of a number of requests.")
    parser.add_argument("--rude", action="store_true", help="Some clients hang up, some read slowly.")
    options = parser.parse_args()
    with serving(options.directory) as server:
        jobs = [Job(m, p, n) for m in server.sizes for p in questions(40) for n in LENGTHS]
        began = time.monotonic()
        seen = asyncio.run(load(server, jobs, options))
        took = time.monotonic() - began
        time.sleep(0.5)
        left = {name: server.metric(name) for name in ("cache_bytes", "active_sequences", "queued_sequences")}
    wrong, near = compare(options.directory, seen.texts)
    print(f"torch {torch.__version__}, {options.clients} clients, {', '.join(server.sizes)}")
    manners = ", ".join(f"{count} {manner}" for manner, count in seen.manners.most_common())
    print(f"{seen.manners.total()} requests ({manners}) in {took:.1f} s, {len(seen.failed)} failed {seen.failed[:3]}")
    print(f"{len(seen.texts)} different requests; {wrong} texts differ from the same request alone, {near} only after")
    print(f"two tokens within {MARGIN} of each other")
    first, last, most = (seen.resident[0], seen.resident[-1], max(seen.resident))
    print(f"resident memory, MB: first {first / 1e6:.1f}, last {last / 1e6:.1f}, most {most / 1e6:.1f}; left: {left}")
    sys.exit(bool(seen.failed or wrong or any(left.values())))


if __name__ == "__main__":
    main()
