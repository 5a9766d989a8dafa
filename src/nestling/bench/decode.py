"""Prefill and decode of sizes by view, against transformers' `generate` with the same weights, contiguous."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from nestling.arch.submodel import Submodel, complete
from nestling.bench.figure import Figure
from nestling.bench.machine import has_bf16
from nestling.bench.models import TINY, cut, random_model, shape, stock
from nestling.bench.turns import Bench, Run
from nestling.errors import NestlingError
from nestling.infer.family import View
from nestling.infer.generate import generate, start
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import hard

MARGIN = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # between the two largest logits: below, either may be first

Generate = Callable[[Sequence[Sequence[int]], int], list[list[int]]]
"""(prompts, how many tokens) -> so many greedy tokens of each."""


def figures(bench: Bench) -> Iterator[Figure]:
    model = random_model(TINY if bench.quick else shape(512))
    hidden, heads = model.architecture.hidden_size, model.architecture.mamba_num_heads
    sizes = {"100%": Submodel(), "small": Submodel(None, hidden * 3 // 4, 2 * hidden, heads - 2)}
    more = {", bf16": torch.bfloat16} if bench.device == "cpu" and has_bf16(bench.device) else {}
    for kind, dtype in ({"": bench.dtype} | more).items():
        model = model.to(bench.device, dtype)
        for name, submodel in list(sizes.items())[bench.quick :]:
            yield from _size(bench, name + kind, model, submodel)


def _size(bench: Bench, name: str, model: NemotronH, submodel: Submodel) -> Iterator[Figure]:
    view = View(model, complete(model.architecture, submodel)).held()
    rival = stock(cut(model, submodel, hard(model.architecture, submodel))).eval()
    yield from against(bench, name, view, {"transformers' generate": partial(stocks, rival)}, (3.0, 1.2, 2.0, 1.5))


def against(
    bench: Bench, name: str, view: View, rivals: Mapping[str, Generate], reaches: Sequence[float | None]
) -> Iterator[Figure]:
    """Two prompts read and two batches continued, with a size by view and by rivals, of which the fastest counts."""
    short, long, count = (4, 40, 3) if bench.quick else (32, 512, 32)
    cases = (("prefill", short, 1, 1), ("prefill", long, 1, 1), ("decode", 16, 1, count), ("decode", 16, 16, count))
    for (row, prompt, batch, tokens), reach in zip(cases, reaches, strict=True):
        prompts = _prompts(view.model.architecture.vocab_size, batch, prompt)
        for rival, theirs in rivals.items():
            _check(f"{row}, {name}", rival, view, prompts, theirs(prompts, tokens), tokens)
        runs: dict[str, Run] = {"ours": partial(generate, view, prompts, max_tokens=tokens)}
        times = bench.in_turn(runs | {rival: partial(theirs, prompts, tokens) for rival, theirs in rivals.items()})
        best = times.quickest(*rivals)
        what = f"{prompt} tokens" if row == "prefill" else f"{batch} × {tokens} tokens"
        yield Figure(row, f"{name}, {what}", best, "× as fast", times.ratio(best, "ours"), reach, times.median("ours"))


def _prompts(vocabulary: int, batch: int, length: int) -> list[list[int]]:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(batch + length)).tolist()


@torch.inference_mode()
def stocks(model: Any, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    ids = torch.tensor(prompts, device=model.device)
    mask = torch.ones_like(ids)
    how = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0, "eos_token_id": None}
    made = model.generate(ids, attention_mask=mask, **how)
    return made[:, ids.shape[1] :].tolist()


def _check(
    what: str, rival: str, view: View, prompts: Sequence[Sequence[int]], theirs: list[list[int]], count: int
) -> None:
    """The same tokens, up to the first place where two are all but equally probable."""
    for prompt, mine, other in zip(prompts, generate(view, prompts, max_tokens=count), theirs, strict=True):
        place = next((i for i, pair in enumerate(zip(mine, other, strict=True)) if pair[0] != pair[1]), None)
        if place is None:
            continue
        _, logits_Bv = start(view, [[*prompt, *mine[:place]]])
        best = logits_Bv[0].topk(2).values
        if best[0] - best[1] > MARGIN[view.dtype]:
            raise NestlingError(f"bench {what}: a token differs from the one of {rival}; nothing of it was timed")
