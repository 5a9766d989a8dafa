"""Attention by a kernel: causal, within the documents of a row.

B batch · L length · G KV heads · H all query heads, those of a KV head side by side · c head channels.
"""

from typing import Any

import torch
from torch import Tensor

from nestling.model.native.library import call, lanes, numbers, summed_in, up

TASKS = 16  # of backward, at least: where there are fewer heads, their queries are divided
QUERIES = 64  # of a block (attention.h)
BLOCKS = 4  # of queries that are a task of their own, at least


def attended(
    query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, logsumexp: Tensor | None = None
) -> Tensor:
    """query [B, L, H, c], key and value [B, L, G, c] -> [B, L, H, c].

    A query sees the keys of its document from the first to its own. documents [B, L]: constant in a document, another
    number in the next; None: one a row. logsumexp: room for that of the scores, [B, H, L], if backward is to follow.
    """
    y = query.new_empty(query.shape)
    call("attention", query.dtype, *_attention(query, key, value, documents), y, logsumexp)
    return y


@torch.library.custom_op("nestling::native_attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    """`attended`; also returns the logsumexp of the scores, which backward needs."""
    logsumexp = _logsumexp(query)
    return attended(query, key, value, documents, logsumexp), logsumexp


@torch.library.custom_op("nestling::native_attention_backward", mutates_args=())
def attention_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Tensor | None,
    y: Tensor,
    logsumexp: Tensor,
    dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    batch, length, heads, channels = query.shape
    held = up(length, 4), up(channels, lanes(query.dtype))
    partial = [logsumexp.new_empty(batch, heads, _parts(query), *held) for _ in range(2)]
    out = [t.new_empty(t.shape) for t in (query, key, value)]
    given = _attention(query, key, value, documents)
    call("attention_backward", query.dtype, *given, y, logsumexp, dy.contiguous(), *out, *partial)
    return out[0], out[1], out[2]


def _attention(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None) -> list[Any]:
    """The fields of `Attention`."""
    batch, length, heads, channels = query.shape
    inputs = [t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value)]
    strides = [stride for t in inputs for stride in t.stride()[:3]]
    sizes = [batch, length, key.shape[2], heads // key.shape[2], channels, _parts(query), torch.get_num_threads()]
    return [*sizes, *inputs, *strides, numbers(documents)]


def _parts(query_BLHc: Tensor) -> int:
    """Into how many parts the queries of a head are divided. Sums depend on it: not on the number of threads."""
    batch, length, heads, _ = query_BLHc.shape
    return max(min(-(-TASKS // max(batch * heads, 1)), length // (QUERIES * BLOCKS)), 1)


def _logsumexp(query_BLHc: Tensor) -> Tensor:
    batch, length, heads, _ = query_BLHc.shape
    return query_BLHc.new_empty(batch, heads, length, dtype=summed_in(query_BLHc.dtype))


# ---- what torch must know of it


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), _logsumexp(query)


@attention_backward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _gradients(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None
    return *attention_backward(*ctx.saved_tensors, dy), None


attention.register_autograd(_gradients, setup_context=_keep)
