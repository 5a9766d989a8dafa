"""Rows of documents, whatever their lengths: every token once, in order, and never two documents mixed."""

from collections import Counter
from fractions import Fraction
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nestling.data.batches import Batch
from nestling.data.blend import blend, lasting, shares, taken
from nestling.data.cache import Tokens
from nestling.data.corpus import Corpus, Shape
from nestling.data.packing import pack
from nestling.text_sections import DataSection

Documents = list[tuple[list[int], list[bool]]]


def stored(documents: Documents) -> Tokens:
    ids = np.array([token for ids, _ in documents for token in ids])
    counted = np.array([mark for _, marks in documents for mark in marks])
    offsets = np.cumsum([0, *(len(ids) for ids, _ in documents)])
    return Tokens(ids, offsets, counted, {"tokens": len(ids), "counted": int(counted.sum())})


@st.composite
def texts(draw: st.DrawFn, marked: bool = False, least: int = 1, first: int = 0) -> Documents:
    """Documents whose tokens are all different, so that each says where it is from; some targets of each count."""
    lengths = draw(st.lists(st.integers(2, 30), min_size=least, max_size=12))
    made: Documents = []
    for length in lengths:
        marks = [True] * length
        if marked:
            marks = draw(st.lists(st.booleans(), min_size=length, max_size=length))
            marks[draw(st.integers(1, length - 1))] = True
        made.append((list(range(first, first + length)), marks))
        first += length
    return made


def corpus(*sources: Documents, weights: tuple[float, ...] = (1.0,), seed: int = 0, **options: Any) -> Corpus:
    named = tuple((str(i), weight, stored(each)) for i, (each, weight) in enumerate(zip(sources, weights, strict=True)))
    return Corpus("train", DataSection(train="x.txt", **options), named, seed)


def stretches(batch: Batch) -> list[list[tuple[int, int, bool]]]:
    """What a batch shows: per stretch of one document its (token, target, counted)."""
    found = []
    for row in range(len(batch.inputs_BL)):
        real = batch.real_BL[row]
        ids = torch.ones_like(batch.inputs_BL[row]) if batch.documents_BL is None else batch.documents_BL[row]
        assert (ids[real] > 0).all()
        assert batch.documents_BL is None or (ids[~real] == 0).all()
        assert not batch.counted_BL[row][~real].any()
        for document in ids[real].unique_consecutive().tolist():
            here = real & (ids == document)
            columns = (batch.inputs_BL[row][here], batch.targets_BL[row][here], batch.counted_BL[row][here])
            found.append(list(zip(*(column.tolist() for column in columns), strict=True)))
    return found


def pairs(documents: Documents) -> Counter[tuple[int, int, bool]]:
    """By hand: every token of a document with the next one."""
    return Counter((ids[i], ids[i + 1], marks[i + 1]) for ids, marks in documents for i in range(len(ids) - 1))


# ---- packing and its alternative


@given(texts(), st.integers(1, 12), st.integers(1, 4), st.booleans(), st.integers(0, 3))
def test_every_pair_of_a_document_is_in_exactly_one_row(
    documents: Documents, length: int, rows: int, packing: bool, seed: int
) -> None:
    made = corpus(documents, packing=packing, seed=seed)
    shown = [stretch for batch in made.reading(rows, length).all() for stretch in stretches(batch)]
    assert Counter(pair for stretch in shown for pair in stretch) == pairs(documents)
    for stretch in shown:  # in order, of one document: tokens are numbered through
        assert [token for token, _, _ in stretch] == list(range(stretch[0][0], stretch[0][0] + len(stretch)))
    assert len(shown) == sum(-(-(len(ids) - 1) // length) for ids, _ in documents)  # cut only where it must be


@given(texts(marked=True), st.integers(1, 12))
def test_what_counts_counts_and_pieces_with_nothing_to_learn_are_left_out(documents: Documents, length: int) -> None:
    made = corpus(documents).reading(2, length)
    shown = [stretch for batch in made.all() for stretch in stretches(batch)]
    learnt = Counter({pair: count for pair, count in pairs(documents).items() if pair[2]})
    assert Counter(pair for stretch in shown for pair in stretch if pair[2]) == learnt
    assert all(any(counts for _, _, counts in stretch) for stretch in shown)
    assert all(part.counted_BL.any() for batch in made.all() for part, _ in batch.parts(2))


@given(texts(), st.integers(1, 12))
def test_dropped_documents_are_counted_and_the_others_are_whole(documents: Documents, length: int) -> None:
    short = [(ids, marks) for ids, marks in documents if len(ids) - 1 <= length]
    if not short:
        return
    made = corpus(documents, long_documents="drop").reading(3, length)
    shown = [stretch for batch in made.all() for stretch in stretches(batch)]
    assert Counter(pair for stretch in shown for pair in stretch) == pairs(short)
    assert made.counts()["dropped"] == len(documents) - len(short)


def test_packed_rows_have_exactly_the_length_and_are_nearly_full() -> None:
    random = np.random.default_rng(0)
    sizes = random.integers(1, 100, 5000)
    rows = pack(sizes, 128)
    filled = [int(sizes[rows[row]].sum()) for row in range(len(rows))]
    assert max(filled) <= 128
    assert [len(pack(np.array(sizes), 8)) for sizes in ([4, 4], [8, 8], [5, 4, 3, 4], [1, 8, 7])] == [1, 2, 2, 2]
    assert sum(filled) / 128 / len(rows) > 0.97
    made = corpus([(list(range(n)), [True] * n) for n in (5, 6, 7)])
    assert made.batch(0, 1, 40).inputs_BL.shape == (1, 40)


def test_without_packing_rows_of_similar_length_come_together() -> None:
    random = np.random.default_rng(0)
    documents = [(list(range(n)), [True] * n) for n in random.integers(2, 200, 2048).tolist()]
    made = corpus(documents, packing=False)
    batches = [made.batch(step, 16, 200) for step in range(made.steps(16, 200))]
    assert all(batch.documents_BL is None for batch in batches)
    real, shown = (sum(n) for n in zip(*((b.tokens, b.inputs_BL.numel()) for b in batches), strict=True))
    assert real / shown > 0.9
    widths = [batch.inputs_BL.shape[1] for batch in batches]
    assert widths != sorted(widths)


# ---- order


@given(texts(least=4), st.integers(1, 12), st.integers(1, 2), st.booleans(), st.data())
def test_a_batch_is_a_function_of_the_step_alone(
    documents: Documents, length: int, rows: int, packing: bool, data: st.DataObject
) -> None:
    made, again = (corpus(documents, packing=packing, repeat=True) for _ in range(2))
    order = data.draw(st.permutations(range(6)))
    first = {step: stretches(made.batch(step, rows, length)) for step in range(6)}
    assert {step: stretches(again.batch(step, rows, length)) for step in order} == first


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    documents = [(list(range(n * 10, n * 10 + 5)), [True] * 5) for n in range(40)]
    made = corpus(documents, packing=False, repeat=True)
    assert made.steps(4, 4) == 10
    epochs = [[stretches(made.batch(step, 4, 4)) for step in range(at, at + 10)] for at in (0, 10, 20)]
    seen = [Counter(pair for b in epoch for stretch in b for pair in stretch) for epoch in epochs]
    assert epochs[0] != epochs[1] != epochs[2]
    other = corpus(documents, packing=False, repeat=True, seed=1)
    assert stretches(other.batch(0, 4, 4)) != epochs[0][0]
    assert sum(seen, Counter()).total() == 3 * pairs(documents).total()
    packed = corpus(documents, repeat=True)
    rows = [[stretches(packed.batch(step, 1, 4))[0] for step in range(at, at + 40)] for at in (0, 40, 80)]
    assert rows[0] != rows[1] != rows[2]
    assert all(sorted(epoch) == sorted(rows[0]) for epoch in rows)


@given(texts(least=6), st.integers(1, 12), st.sampled_from([2, 3]), st.booleans())
def test_shards_are_disjoint_and_together_the_whole_batch(
    documents: Documents, length: int, world: int, packing: bool
) -> None:
    made = corpus(documents, packing=packing, repeat=True)
    for step in range(3):
        whole = Counter(map(tuple, stretches(made.batch(step, 6, length))))
        shards = [stretches(made.sharded(rank, world).batch(step, 6, length)) for rank in range(world)]
        assert sum((Counter(map(tuple, shard)) for shard in shards), Counter()) == whole
    with pytest.raises(ValueError, match="a batch of 7 rows cannot be shared by 2 processes"):
        made.sharded(0, 2).batch(0, 7, length)


# ---- stages


@given(texts(least=8), st.integers(4, 9), st.integers(9, 15))
def test_a_later_stage_reads_what_the_earlier_ones_have_not(documents: Documents, short: int, long: int) -> None:
    made, of = corpus(documents), {token: number for number, (ids, _) in enumerate(documents) for token in ids}

    def shown(batch: Batch) -> set[int]:
        return {of[token] for stretch in stretches(batch) for token, _, _ in stretch}

    steps = made.steps(1, short) // 2
    first = {number for step in range(steps) for number in shown(made.batch(step, 1, short))}
    rest = [document for number, document in enumerate(documents) if number not in first]
    if not rest:
        return
    lasts = corpus(rest).steps(1, long)
    with pytest.raises(ValueError, match=r"of stage 2 .*are wanted"):
        made.data([Shape(steps, 1, short), Shape(2 * lasts + 2, 1, long)])
    data = made.data([Shape(steps, 1, short), Shape(lasts // 2 + 1, 1, long)])
    assert {number for step in range(steps) for number in shown(data(0, step))} == first
    assert not first & {number for step in range(lasts // 2 + 1) for number in shown(data(1, steps + step))}


def test_data_that_does_not_last_is_refused_and_may_be_repeated() -> None:
    documents = [(list(range(9)), [True] * 9)] * 10
    with pytest.raises(
        ValueError, match=r"data\.train lasts for 5 steps of \(2 rows of 8 tokens\), 6 are wanted; .*rep"
    ):
        corpus(documents).data([Shape(6, 2, 8)])
    with pytest.raises(ValueError, match=r"lasts for 2 steps of stage 2 \(3 rows of 8 tokens\), 3 are wanted"):
        corpus(documents).data([Shape(2, 2, 8), Shape(3, 3, 8)])
    endless = corpus(documents, repeat=True).data([Shape(2, 2, 8), Shape(300, 3, 8)])
    assert endless(1, 301).tokens == 24


# ---- blends


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(0, 300), st.integers(1, 40))
def test_a_blend_keeps_to_its_weights_everywhere(weights: list[int], start: int, count: int) -> None:
    parts = shares(weights)
    whole = list(islice(blend(parts, 0, start + count), start, None))
    assert list(blend(parts, start, count)) == whole  # wherever one begins
    so_far = Counter(source for source, _ in blend(parts, 0, start))
    assert taken(parts, start) == [so_far[source] for source in range(len(weights))]
    for source, weight in enumerate(weights):
        assert abs(so_far[source] - start * Fraction(weight, sum(weights))) <= len(weights) / 2
    assert all(number == so_far[source] for source, number in reversed(dict(reversed(whole)).items()))


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=4))
def test_a_blend_lasts_until_a_source_has_no_more(sources: list[tuple[int, int]]) -> None:
    parts, there = shares([weight for weight, _ in sources]), [rows for _, rows in sources]
    by_hand = 0
    for source, number in blend(parts, 0, sum(there) + 1):
        if number >= there[source]:
            break
        by_hand += 1
    assert lasting(parts, there) == by_hand


@given(texts(least=5), texts(least=5, first=1000), st.integers(2, 12))
def test_a_blend_of_sources_mixes_rows(one: Documents, other: Documents, length: int) -> None:
    made = corpus(one, other, weights=(3.0, 1.0), repeat=True)
    drawn = [stretches(made.batch(step, 4, length)) for step in range(5)]
    for batch in drawn:
        rows = Counter(stretch[0][0] >= 1000 for stretch in batch)
        assert rows[True] >= 1
    first = made.batch(0, 4, length)
    assert [int(row[0] >= 1000) for row in first.inputs_BL].count(1) == 1
