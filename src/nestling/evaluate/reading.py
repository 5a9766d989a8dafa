"""Tasks that are answered by reading: perplexity of held-out text, and multiple choice by log-likelihood."""

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from nestling import ranks
from nestling.errors import NestlingError
from nestling.evaluate.estimates import mean_interval, ratio_interval
from nestling.evaluate.journal import Journal, Record
from nestling.evaluate.likelihood import continued, first_token, scores, windows
from nestling.evaluate.rows import Row, file_hash, read_rows
from nestling.evaluate.solving import Known
from nestling.evaluate.spec import Spec
from nestling.evaluate.subject import Subject
from nestling.progress import Progress
from nestling.tokenizer import token_ids

NAMES = ("perplexity", "choices")
CLUSTERS = 30
"""Documents that are enough clusters for an interval; with fewer, their windows are."""


@dataclass(frozen=True, eq=False)
class Perplexity:
    """Text in documents, each token scored once after as much of its document as the window holds."""

    name: str
    texts: Sequence[str]
    window: int
    stride: int
    data: str

    @property
    def total(self) -> int:
        return len(self.texts)

    def settings(self, batch: int | None, seed: int) -> dict[str, Any]:
        told = {"task": self.name, "documents": self.total, "window": self.window, "stride": self.stride}
        return {**told, "data": {"sha256": self.data}, "scorer": "log-likelihood of every token, documents apart"}

    def run(self, subject: Subject, journal: Journal, known: Known, batch: int, seed: int, show: Progress) -> Known:
        found, start = dict(known), first_token(subject)
        for item, text in ranks.mine(enumerate(self.texts)):
            if (item, 0) in found:
                continue
            ids = token_ids(subject.tokenizer, text, subject.vocabulary, f"{self.name}, document {item}", special=False)
            passages, began = windows(ids, start, self.window, self.stride), time.monotonic()
            parts = [[-score.total, len(score.logprobs)] for score in scores(subject, passages, batch)]
            record: Record = {"item": item, "sample": 0, "bytes": len(text.encode()), "windows": parts}
            record |= {"nll": sum(nll for nll, _ in parts), "tokens": len(ids)}
            record["seconds"] = round(time.monotonic() - began, 6)
            journal.append([record])
            found[item, 0] = record
            show(len(found))
        return found

    def result(self, found: Known) -> dict[str, Any]:
        """exp of the mean negative log-likelihood per token; the interval is that of the mean over documents."""
        records = [found[item, 0] for item in range(self.total)]
        nll, tokens = sum(r["nll"] for r in records), sum(r["tokens"] for r in records)
        count, seconds = sum(r["bytes"] for r in records), sum(r["seconds"] for r in records)
        apart = len(records) >= CLUSTERS
        parts = [(r["nll"], r["tokens"]) for r in records] if apart else [w for r in records for w in r["windows"]]
        interval = ratio_interval([total for total, _ in parts], [size for _, size in parts])
        return {
            "metric": "perplexity",
            "score": math.exp(nll / tokens),
            "interval": None if interval is None else [math.exp(end) for end in interval],
            "clusters": "documents" if apart else "windows",
            "nll_per_token": nll / tokens,
            "bits_per_byte": nll / count / math.log(2),
            "byte_perplexity": math.exp(nll / count),
            "documents": len(records),
            "tokens": tokens,
            "bytes": count,
            "tokens_per_second": tokens / seconds if seconds else None,
        }


@dataclass(frozen=True)
class Question:
    context: str
    choices: tuple[str, ...]
    right: int


@dataclass(frozen=True, eq=False)
class Choices:
    """Questions, each answered by the choice with the highest log-likelihood after it."""

    name: str
    questions: Sequence[Question]
    data: str

    @property
    def total(self) -> int:
        return len(self.questions)

    def settings(self, batch: int | None, seed: int) -> dict[str, Any]:
        asked = hashlib.sha256(repr(self.questions).encode()).hexdigest()[:16]
        scorer = "highest log-likelihood: acc of the sum, acc_norm of the sum per character of the choice"
        return {
            "task": self.name,
            "problems": self.total,
            "asked": asked,
            "data": {"sha256": self.data},
            "scorer": scorer,
        }

    def run(self, subject: Subject, journal: Journal, known: Known, batch: int, seed: int, show: Progress) -> Known:
        found = dict(known)
        missing = [item for item in range(self.total) if (item, 0) not in found]
        for start in ranks.mine(range(0, len(missing), batch)):
            items, began = missing[start : start + batch], time.monotonic()
            passages = [passage for item in items for passage in self._passages(subject, item)]
            read = iter(scores(subject, passages, batch))
            records = [self._record(item, [next(read).total for _ in self.questions[item].choices]) for item in items]
            seconds = round((time.monotonic() - began) / len(items), 6)
            records = [{**record, "seconds": seconds} for record in records]
            journal.append(records)
            found.update(((item, 0), record) for item, record in zip(items, records, strict=True))
            show(len(found))
        return found

    def _passages(self, subject: Subject, item: int) -> Iterator[Any]:
        question = self.questions[item]
        for choice in question.choices:
            yield continued(subject, question.context, f" {choice}", f"{self.name}, problem {item}")

    def _record(self, item: int, sums: Sequence[float]) -> Record:
        question = self.questions[item]
        best = max(range(len(sums)), key=lambda k: sums[k])
        normed = max(range(len(sums)), key=lambda k: sums[k] / len(question.choices[k]))
        return {
            "item": item,
            "sample": 0,
            "prompt": question.context,
            "choices": list(question.choices),
            "loglikelihoods": list(sums),
            "expected": question.right,
            "answer": best,
            "answer_norm": normed,
            "correct": best == question.right,
            "correct_norm": normed == question.right,
        }

    def result(self, found: Known) -> dict[str, Any]:
        rates = {
            name: [float(found[item, 0][key]) for item in range(self.total)]
            for name, key in (("acc", "correct"), ("acc_norm", "correct_norm"))
        }
        return {
            "metric": "acc",
            "score": fmean(rates["acc"]),
            "interval": list(mean_interval(rates["acc"])),
            "acc_norm": {"score": fmean(rates["acc_norm"]), "interval": list(mean_interval(rates["acc_norm"]))},
            "correct": int(sum(rates["acc"])),
            "problems": self.total,
        }


def reading(spec: Spec, limit: int | None) -> Perplexity | Choices:
    """The task of this name on its file: `perplexity` reads a column `text`, `choices` question, choices and answer."""
    path = spec.options.get("file")
    if path is None:
        needs = "text" if spec.name == "perplexity" else "question, choices and answer"
        raise NestlingError(f"task {spec.name} needs a file: {spec.name}:file=PATH, with {needs}")
    problems = spec.number("problems", limit or 0, 1) or None
    if spec.name == "choices":
        spec.check(("file", "problems"))
        rows = read_rows(path, ("question", "choices", "answer"), problems)
        return Choices(spec.label, [_question(row) for row in rows], file_hash(path))
    spec.check(("file", "problems", "window", "stride"))
    window = spec.number("window", 2048, 2)
    stride = spec.number("stride", window // 2, 1)
    if stride > window:
        raise NestlingError(f"task {spec.name}: stride={stride} is more than window={window}")
    texts = [row.text("text") for row in read_rows(path, ("text",), problems)]
    return Perplexity(spec.label, texts, window, stride, file_hash(path))


def _question(row: Row) -> Question:
    """The answer is a choice's place (from 0), its letter, or its text."""
    choices, answer = row.texts("choices"), row.text("answer").strip()
    letters = [chr(ord("A") + k) for k in range(len(choices))]
    for names in (choices, letters, [str(k) for k in range(len(choices))]):
        if answer in names:
            return Question(row.text("question"), tuple(choices), names.index(answer))
    raise NestlingError(f"{row.where}: answer {answer!r} is none of the {len(choices)} choices")
