"""Greedy and sampled generation with a cache, for batches of prompts of different lengths."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nestling.errors import NestlingError
from nestling.infer.family import View
from nestling.model.nemotron_h import Cache


@torch.no_grad()
def generate(
    view: View,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    eos: int | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """New tokens per prompt, up to `max_tokens` or the end token (left out). Temperature 0 is greedy."""
    if not all(prompts) or not prompts:
        raise NestlingError("a prompt must have at least one token")
    generator = torch.Generator().manual_seed(seed)
    ids_BL, mask_BL = left_padded(prompts)
    cache, done, tokens = Cache(), torch.zeros(len(prompts), dtype=torch.bool), []
    for _ in range(max_tokens):
        logits_Bv = view(ids_BL, attention_mask=mask_BL, cache=cache).logits[:, -1]
        next_B = _draw(logits_Bv, temperature, generator)
        tokens.append(next_B)
        done |= next_B == eos
        if done.all():
            break
        ids_BL, mask_BL = next_B[:, None], torch.cat([mask_BL, mask_BL.new_ones(len(prompts), 1)], 1)
    rows = torch.stack(tokens, 1).tolist() if tokens else [[] for _ in prompts]
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(ids, mask), both [B, longest], padding on the left."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def _draw(logits_Bv: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits_Bv.argmax(-1)
    return torch.multinomial((logits_Bv.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]
