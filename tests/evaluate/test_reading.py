"""Perplexity and multiple choice against transformers' own loss and token-by-token sums."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stock
from nestling.errors import NestlingError
from nestling.evaluate.evaluation import Evaluation, make_tasks
from nestling.evaluate.likelihood import Passage, continued, scores, windows
from nestling.evaluate.reading import Choices, Perplexity
from nestling.evaluate.spec import parse_tasks
from nestling.evaluate.subject import open_subjects
from nestling.evaluate.suite import Overrides
from talking import BYTES, family, lines, save_tokenizer, subject

TEXTS = ["The owl sleeps.", "Zwölf Eulen – und ein Ei 🥚.", "a", "x = [1, 2, 3]\n" * 4]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reading")
    family(directory)
    return directory


def evaluate(home: Path, out: Path, task: str, batch: int = 3, budget: str = "50%", **more: Any) -> dict[str, Any]:
    tasks = make_tasks(parse_tasks([task]), Overrides(), 0)
    subjects = more.pop("subjects", None) or open_subjects(home / "elastic", [budget])
    (result,) = Evaluation(tasks, subjects, out, batch, 0, **more).run(lambda result: None)
    return result["result"]


def losses(model: torch.nn.Module, ids: list[int], scored: int) -> float:
    """Stock's own loss, summed over the last `scored` of these tokens."""
    labels = torch.tensor([[-100] * (len(ids) - scored) + ids[len(ids) - scored :]])
    with torch.no_grad():
        return float(model(torch.tensor([ids]), labels=labels, use_cache=False).loss) * scored


# ---- perplexity


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 16), (7, 3), (2048, 1024), (5, 1)])
def test_perplexity_is_stocks_loss_over_sliding_windows(home: Path, tmp_path: Path, window: int, stride: int) -> None:
    file = lines(tmp_path / "t.jsonl", [{"text": text} for text in TEXTS])
    found = evaluate(home, tmp_path, f"perplexity:file={file},window={window},stride={stride}")
    model, tokenizer, nll, count = stock.load(home / "half"), subject(home / "elastic").tokenizer, 0.0, 0
    for text in TEXTS:
        ids = [1, *tokenizer.encode(text).ids]
        for first in range(1, len(ids), stride):
            new = ids[first : first + stride]
            read = ids[max(0, first + len(new) - 1 - window) : first + len(new)]
            nll += losses(model, read, len(new))
            count += len(new)
    assert found["tokens"] == count
    assert found["score"] == pytest.approx(math.exp(nll / count), rel=1e-5)
    size = sum(len(text.encode()) for text in TEXTS)
    assert found["bits_per_byte"] == pytest.approx(nll / size / math.log(2), rel=1e-5)
    assert found["byte_perplexity"] == pytest.approx(2 ** found["bits_per_byte"], rel=1e-9)
    assert found["interval"][0] < found["score"] < found["interval"][1]


@given(length=st.integers(1, 60), window=st.integers(2, 20), data=st.data())
def test_windows_score_every_token_once_after_as_many_as_fit(length: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    text = list(range(1, length + 1))
    found = windows(text, 0, window, stride)
    assert [token for passage in found for token in passage.ids[passage.given :]] == text
    for passage in found:
        assert list(passage.ids) == list(range(passage.ids[0], passage.ids[-1] + 1))
        assert 1 <= len(passage.ids) - 1 <= window
        assert len(passage.ids) - 1 == min(passage.ids[-1], window)


def test_a_stopped_reading_goes_on(home: Path, tmp_path: Path) -> None:
    file = lines(tmp_path / "t.jsonl", [{"text": text} for text in TEXTS])
    task = f"perplexity:file={file},window=16"
    whole = evaluate(home, tmp_path / "whole", task)
    (journal,) = (tmp_path / "whole").rglob("*.jsonl")
    kept = journal.read_bytes().splitlines(keepends=True)[:3]
    journal.write_bytes(b"".join(kept))
    again = evaluate(home, tmp_path / "whole", task)
    assert journal.read_bytes().startswith(b"".join(kept))
    assert {**again, "tokens_per_second": 0} == {**whole, "tokens_per_second": 0}


def test_enough_documents_are_the_clusters(home: Path, tmp_path: Path) -> None:
    file = lines(tmp_path / "t.jsonl", [{"text": f"{n} owls"} for n in range(40)])
    found = evaluate(home, tmp_path, f"perplexity:file={file}", budget="100%")
    assert (found["clusters"], found["documents"]) == ("documents", 40)
    one = lines(tmp_path / "one.jsonl", [{"text": "owls"}])
    assert evaluate(home, tmp_path, f"perplexity:file={one}")["interval"] is None


# ---- multiple choice


QUESTIONS = [
    {"question": "An owl is a", "choices": ["bird", "fish", "very long answer"], "answer": 0},
    {"question": "2 + 2 =", "choices": ["3", "4"], "answer": "B"},
    {"question": "Eggs are laid by ", "choices": ["hens", "dogs"], "answer": "hens"},
    {"question": "Numbers:", "choices": ["1", "0"], "answer": "1"},
]


def test_choices_are_weighed_as_token_by_token_sums(home: Path, tmp_path: Path) -> None:
    file = lines(tmp_path / "q.jsonl", QUESTIONS)
    found = evaluate(home, tmp_path, f"choices:file={file}")
    model, tokenizer = stock.load(home / "half"), subject(home / "elastic").tokenizer
    (journal,) = tmp_path.rglob("choices*.jsonl")
    records = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    right = 0
    for record, question, expected in zip(records, QUESTIONS, (0, 1, 0, 0), strict=True):
        sums = []
        for choice in question["choices"]:
            read = tokenizer.encode(question["question"] + " " + choice).ids
            scored = len(read) - len(tokenizer.encode(question["question"].rstrip()).ids)
            sums.append(-losses(model, read, scored))
        assert record["loglikelihoods"] == pytest.approx(sums, rel=1e-4)
        assert record["expected"] == expected
        assert record["answer"] == sums.index(max(sums))
        normed = [total / len(choice) for total, choice in zip(sums, question["choices"], strict=True)]
        assert record["answer_norm"] == normed.index(max(normed))
        right += sums.index(max(sums)) == expected
    assert (found["correct"], found["score"]) == (right, right / 4)


def test_batches_change_no_score(home: Path) -> None:
    one = subject(home / "elastic")
    passages = [Passage(tuple(range(3, 3 + n)), given) for n, given in ((9, 1), (4, 3), (30, 12), (2, 1), (11, 10))]
    alone = [score.logprobs for score in scores(one, passages, 1)]
    for batch in (2, 5):
        together = [score.logprobs for score in scores(one, passages, batch)]
        assert [len(found) for found in together] == [8, 1, 18, 1, 1]
        for a, b in zip(alone, together, strict=True):
            assert a == pytest.approx(b, abs=1e-5)


def test_batches_change_no_score_where_a_bias_stands_at_padding(tmp_path: Path) -> None:
    stock.save(replace(BYTES, use_bias=True), tmp_path / "biased")
    save_tokenizer(tmp_path / "biased")
    (one,) = open_subjects(tmp_path / "biased", [])
    passages = [Passage(tuple(range(3, 3 + n)), 1) for n in (9, 4, 12)]
    alone, together = ([score.logprobs for score in scores(one, passages, batch)] for batch in (1, 3))
    for a, b in zip(alone, together, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_a_continuation_takes_the_spaces_before_it_and_an_empty_context_the_first_token(home: Path) -> None:
    one = subject(home / "elastic")
    for context, read in (("ab", 2), ("ab ", 2), ("", 1), (" ", 1)):
        passage = continued(one, context, "cd", "x")
        assert passage.given == read
        assert one.tokenizer.decode(list(passage.ids[passage.given :])) == context[len(context.rstrip()) :] + "cd"
        assert (passage.ids[0] == 1) == (not context.strip())


# ---- bad input


@pytest.mark.parametrize(
    ("name", "record", "words"),
    [
        ("perplexity", {"text": ""}, "line 1: 'text' is missing or empty"),
        ("choices", {"question": "q", "choices": ["a"], "answer": 0}, "at least two texts"),
        ("choices", {"question": "q", "choices": ["a", "b"], "answer": "c"}, "answer 'c' is none of the 2 choices"),
        ("choices", {"question": "q", "choices": ["a", "b"], "answer": None}, "'answer' is missing"),
        ("choices", {"question": "q", "choices": ["a", "b"]}, "has no 'answer'"),
    ],
)
def test_data_that_cannot_be_read_is_refused(tmp_path: Path, name: str, record: Any, words: str) -> None:
    file = lines(tmp_path / "d.jsonl", [record])
    with pytest.raises(NestlingError, match=words):
        make_tasks(parse_tasks([f"{name}:file={file}"]), Overrides(), 0)


def test_options_of_reading_tasks(tmp_path: Path) -> None:
    file = lines(tmp_path / "d.jsonl", [{"text": "x", "question": "q", "choices": ["a", "b"], "answer": 0}] * 3)
    read, weighed = make_tasks(
        parse_tasks([f"perplexity:file={file},window=8,choices:file={file},problems=2"]), Overrides(), 0
    )
    assert isinstance(read, Perplexity)
    assert isinstance(weighed, Choices)
    assert (read.window, read.stride, read.total, weighed.total) == (8, 4, 3, 2)
    with pytest.raises(NestlingError, match="stride=9 is more than window=8"):
        make_tasks(parse_tasks([f"perplexity:file={file},window=8,stride=9"]), Overrides(), 0)
