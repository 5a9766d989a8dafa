"""64 streaming clients over all sizes of a family, on the loopback.

    python benchmarks/serving/load.py out/demo/elastic                # each client asks 8 times
    python benchmarks/serving/load.py out/demo/elastic --seconds 120  # or for so long

Starts `nestling serve`, and has every client stream one greedy completion after the other, of a size and a prompt drawn
by its own seed. Every text is compared with the same request run alone through `generate`; a text may differ from the
first place where the two most probable tokens are within 1e-4. Resident memory of the server is read before, halfway
and after; at the end its caches must be empty. Then 1 and 16 streams of one size are timed.
"""

import argparse
import asyncio
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import torch
from openai import AsyncOpenAI

import nestling
from nestling.infer.generate import generate
from nestling.tasks import Task, distinct, problems
from nestling.tokenizer import end_token, read_tokenizer

MARGIN = 1e-4
TOKENS = 48


def resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))


async def stream(client: AsyncOpenAI, model: str, prompt: str, tokens: int = TOKENS, **given: object) -> str:
    answer = await client.completions.create(
        model=model, prompt=prompt, max_tokens=tokens, temperature=0, stream=True, **given
    )
    return "".join([chunk.choices[0].text async for chunk in answer])


async def load(url: str, models: list[str], prompts: list[str], options: argparse.Namespace, pid: int) -> dict:
    heard: dict[tuple[str, str], set[str]] = {}
    failed: list[str] = []
    memory = [resident(pid)]
    ends = time.monotonic() + (options.seconds or 1e9)

    async def one(client: AsyncOpenAI, number: int) -> int:
        chance, asked = random.Random(number), 0
        while time.monotonic() < ends and (options.seconds or asked < options.requests):
            job = (chance.choice(models), chance.choice(prompts))
            try:
                heard.setdefault(job, set()).add(await stream(client, *job))
            except Exception as error:
                failed.append(f"{type(error).__name__}: {error}")
            asked += 1
            if number == 0 and asked == max(options.requests // 2, 1):
                memory.append(resident(pid))
        return asked

    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        began = time.monotonic()
        asked = sum(await asyncio.gather(*(one(client, number) for number in range(options.clients))))
        took = time.monotonic() - began
        memory.append(resident(pid))
    rates = await speeds(url, models[0], prompts)
    return {"heard": heard, "failed": failed, "memory": memory, "asked": asked, "took": took, "rates": rates}


async def speeds(url: str, model: str, prompts: list[str]) -> dict[int, float]:
    """Tokens per second of 1 and of 16 streams, the best of three rounds; each stream asks ten times in a row."""
    given = {"model": model, "max_tokens": TOKENS, "temperature": 0, "stream": True}

    async def asks(client: httpx.AsyncClient, number: int) -> int:
        events = 0
        for turn in range(10):
            body = given | {"prompt": prompts[(number + turn) % len(prompts)]}
            events += (await client.post(f"{url}/v1/completions", json=body)).content.count(b'"text"')
        return events

    best: dict[int, float] = {}
    async with httpx.AsyncClient(timeout=300) as client:
        for count in (1, 16) * 3:
            began = time.monotonic()
            tokens = sum(await asyncio.gather(*(asks(client, number) for number in range(count))))
            best[count] = max(best.get(count, 0.0), tokens / (time.monotonic() - began))
    return best


def compare(directory: Path, heard: dict[tuple[str, str], set[str]]) -> tuple[int, int]:
    """(jobs that differ from the same request alone beyond the margin, within it)."""
    family, tokenizer, end = nestling.load(directory), read_tokenizer(directory), end_token(directory)
    wrong = near = 0
    for (model, prompt), texts in heard.items():
        view, ids = family[model.split("@", 1)[1]], tokenizer.encode(prompt).ids
        (row,) = generate(view, [ids], max_tokens=TOKENS, eos=end)
        wanted = tokenizer.decode(row)
        for _ in texts - {wanted}:
            logits = view(torch.tensor([ids + row])).logits[0, len(ids) - 1 :]
            best = logits.topk(2).values
            close = bool(((best[:, 0] - best[:, 1]) < MARGIN).any())
            near, wrong = near + close, wrong + (not close)
    return wrong, near


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=8, help="Of each client.")
    parser.add_argument("--seconds", type=float, help="Instead of a number of requests.")
    parser.add_argument("--task", default="chain_sum:min_terms=2,max_terms=3,max_digits=2")
    options = parser.parse_args()
    prompts = [p.prompt for p in distinct(problems(Task.parse(options.task), 0, held_out=True), 40)]
    command = [sys.executable, "-m", "nestling", "serve", str(options.directory), "--port", "0", "--name", "family"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = server.stdout.readline().split("/v1 ")[0]
            models = [m["id"] for m in httpx.get(f"{url}/v1/models").json()["data"] if "@" in m["id"]]
            found = asyncio.run(load(url, models, prompts, options, server.pid))
            time.sleep(0.5)
            metrics = httpx.get(f"{url}/metrics").text
        finally:
            server.terminate()
    wrong, near = compare(options.directory, found["heard"])
    left = {
        name: re.search(rf"^nestling_{name} (\S+)", metrics, re.M)[1] for name in ("cache_bytes", "active_sequences")
    }
    print(f"torch {torch.__version__}, {options.clients} clients, {', '.join(models)}")
    print(f"{found['asked']} requests in {found['took']:.1f} s, {len(found['failed'])} failed {found['failed'][:3]}")
    print(f"{wrong} texts differ from the same request alone; {near} where two tokens are within {MARGIN}")
    print(f"resident memory, MB: {', '.join(f'{m / 1e6:.0f}' for m in found['memory'])}; left at the end: {left}")
    one, sixteen = (found["rates"][count] for count in (1, 16))
    print(f"{models[0]}: 1 stream {one:,.0f} tokens/s, 16 streams {sixteen:,.0f} ({sixteen / one:.2f} times)")


if __name__ == "__main__":
    main()
