"""A cache whose rows join, leave, part and differ in length: every row goes on as if it were alone."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from test_held import model

import stock
from nestling.arch.architecture import Architecture
from nestling.arch.submodel import WHOLE
from nestling.infer.family import View
from nestling.infer.generate import start
from nestling.infer.steps import last_logits, step
from nestling.model import cache as caches
from nestling.model.cache import Cache, paged
from strategies import architectures

LONG = Architecture("*M*", 11, 8, 8, 1, 2, 4, 3, 4, 2, 4, 2)


def alone(view: View, row: list[int]) -> torch.Tensor:
    return view(torch.tensor([row])).logits[0, -1]


@given(architectures(needs="M*"), st.data())
def test_rows_join_leave_and_part_in_any_order(architecture: Architecture, data: st.DataObject) -> None:
    unfloored = Architecture(**(vars(architecture) | {"time_step_min": 1e-12}))  # one token at a time has no floor
    view, token = View(model(unfloored), WHOLE), st.integers(0, architecture.vocab_size - 1)
    rows: list[list[int]] = []
    cache = Cache()
    for _ in range(data.draw(st.integers(1, 4))):
        new = data.draw(st.lists(st.lists(token, min_size=1, max_size=7), min_size=1, max_size=3))
        joined, logits = start(view, new)
        for row, found in zip(new, logits, strict=True):
            stock.assert_same(found, alone(view, row))
        if rows:
            cache.join(joined, len(rows), len(new))
        else:
            cache = joined
        rows += new
        for _ in range(data.draw(st.integers(0, 2))):
            tokens = data.draw(st.lists(token, min_size=len(rows), max_size=len(rows)))
            rows = [[*row, last] for row, last in zip(rows, tokens, strict=True)]
            for row, found in zip(rows, step(view, tokens, cache), strict=True):
                stock.assert_same(found, alone(view, row))
        kept = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=5))
        cache.keep(kept)
        rows = [rows[place] for place in kept]


def test_keys_grow_by_pages_and_shrink_when_a_long_row_leaves() -> None:
    view = View(model(LONG), WHOLE)
    long, short = stock.tokens(11, 1, 150)[0].tolist(), [3, 4, 5]
    cache, _ = start(view, [long, short])
    assert cache.layers[0]["key"].shape == (2, 2, paged(150), 2)
    cache.keep([1])
    assert (cache.length, cache.lengths) == (3, None)
    assert cache.layers[0]["key"].shape == (1, 2, paged(3), 2)
    for token in range(70):
        short = [*short, token % 11]
        logits = step(view, short[-1:], cache)
    floored = torch.cat([view(torch.tensor([short[:3]]), cache=(again := Cache())).logits[0, -1:]])
    for token in short[3:]:
        floored = last_logits(view, torch.tensor([[token]]), again)
    stock.assert_same(logits, floored)
    assert cache.layers[2]["value"].shape[2] == paged(73) == 2 * caches.PAGE
    assert cache.nbytes == sum(t.nbytes for state in cache.layers.values() for t in state.values())


def test_a_prompt_in_pieces_is_the_prompt() -> None:
    view, ids = View(model(LONG), WHOLE), stock.tokens(11, 1, 100)
    cache = Cache()
    for piece in ids.split([40, 40, 18, 2], 1):
        logits = last_logits(view, piece, cache)
    stock.assert_same(logits, view(ids).logits[:, -1])
