"""Generation with a cache, for batches of prompts of different lengths; rows that have ended leave the batch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import torch
from torch import Tensor

from nestling.errors import NestlingError
from nestling.infer.family import View
from nestling.infer.sampling import Row, Sampling, choose
from nestling.infer.steps import last_logits, steps
from nestling.model.cache import Cache

PACKED = 64 * 2**20
"""Bytes of weights that no strided view can express which one call may pack, and gives back when it returns."""

Told = Callable[[int, int], bool]
"""Is told (row, token) as tokens come; True ends the row."""


def generate(
    view: View,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    eos: int | Sequence[int] | None = None,
    seed: int | Sequence[int] = 0,
    n: int = 1,
    told: Told | None = None,
) -> list[list[int]]:
    """New tokens per prompt, up to `max_tokens` or an end token (left out). Temperature 0 is greedy.

    seed: of all prompts, or one per prompt, which then draws the same in any batch. n: continuations per prompt; the
    rows of a prompt stand side by side, len(prompts) × n in all.
    """
    if not all(prompts) or not prompts:
        raise NestlingError("a prompt must have at least one token")
    if not isinstance(seed, int) and len(seed) != len(prompts):
        raise NestlingError(f"{len(seed)} seeds for {len(prompts)} prompts: give one seed, or one per prompt")
    sampling = Sampling(temperature, top_p, top_k)
    ends = frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos)
    seeds = [f"{seed} {place}" for place in range(len(prompts))] if isinstance(seed, int) else map(str, seed)
    rows = [
        Row(prompt, max_tokens, sampling, ends, f"{of} {sample}")
        for prompt, of in zip(prompts, seeds, strict=True)
        for sample in range(n)
    ]
    for shown in go_on(view, rows, n) if max_tokens > 0 else ():
        for place, token in shown:
            if told is not None and told(place, token):
                rows[place].reason = "stop"
    return [row.tokens for row in rows]


@torch.inference_mode()
def go_on(view: View, rows: Sequence[Row], n: int = 1) -> Iterator[list[tuple[int, int]]]:
    """What each step adds, as (row, token), until every row has a reason to end; one may be given in between.

    n: so many rows in turn have one prompt, which is read once.
    """
    view = view.held(PACKED)
    cache, logits_Bv = start(view, [row.prompt for row in rows[::n]])
    if n > 1:
        copies = [place for place in range(len(rows) // n) for _ in range(n)]
        cache.keep(copies)
        logits_Bv = logits_Bv[copies]
    alive, step = list(range(len(rows))), steps(view, cache, max(row.limit for row in rows))
    del cache  # it is held once
    with closing(step):
        while True:
            tokens = choose(logits_Bv, [rows[place] for place in alive])
            yield [(place, token) for place, token in zip(alive, tokens, strict=True) if rows[place].take(token)]
            going = [index for index, place in enumerate(alive) if rows[place].reason is None]
            if not going:
                return
            if len(going) < len(alive):
                step.keep(going)
                alive, tokens = [alive[index] for index in going], [tokens[index] for index in going]
            logits_Bv = step(tokens)


def start(view: View, prompts: Sequence[Sequence[int]]) -> tuple[Cache, Tensor]:
    """Read prompts side by side; returns their cache and the logits that follow each, [B, v]."""
    lengths = [len(prompt) for prompt in prompts]
    padded = len(set(lengths)) > 1
    if padded and view.model.architecture.use_bias:  # the convolution would see that bias at padding, as stock's does
        return _one_by_one(view, prompts)
    ids_BL, mask_BL = left_padded(prompts)
    cache = Cache()
    logits_Bv = last_logits(view, ids_BL, cache, mask_BL if padded else None)
    cache.unpad(lengths)
    return cache, logits_Bv


def _one_by_one(view: View, prompts: Sequence[Sequence[int]]) -> tuple[Cache, Tensor]:
    (cache, first), *others = [start(view, [prompt]) for prompt in prompts]
    for place, (other, _) in enumerate(others, 1):
        cache.join(other, place, 1)
    return cache, torch.cat([first, *(logits for _, logits in others)])


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(ids, mask), both [B, longest], padding on the left."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask
