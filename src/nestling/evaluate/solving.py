"""Problems that are solved by writing, and judged: drawn in batches, kept as they come, resumed where they stopped."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from nestling import ranks
from nestling.errors import NestlingError
from nestling.evaluate.answers import NOTHING, Verdict, final
from nestling.evaluate.chat import Chat, begins_to_think
from nestling.evaluate.estimates import mean_interval, pass_at_k
from nestling.evaluate.journal import Journal, Key, Record
from nestling.evaluate.subject import Sampling, Subject
from nestling.progress import Progress
from nestling.tokenizer import token_ids

Known = dict[Key, Record]


@dataclass(frozen=True)
class Problem:
    """What is asked, what is expected, and what a judge needs besides."""

    prompt: str
    expected: str
    data: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, eq=False)
class Solving:
    """A task: problems, how often and how each is answered, and who judges. `about` is its protocol in words."""

    name: str
    problems: Sequence[Problem]
    judge: Callable[[Problem, str], Verdict]
    sampling: Sampling
    samples: int = 1
    chat: Chat = Chat(use=False)
    ks: tuple[int, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.samples > 1 and self.sampling.temperature == 0:
            raise NestlingError(f"task {self.name}: {self.samples} samples at temperature 0 are all the same; raise it")
        if wrong := [k for k in self.ks if not 1 <= k <= self.samples]:
            raise NestlingError(f"task {self.name}: pass@{wrong[0]} needs at least {wrong[0]} samples")

    @property
    def total(self) -> int:
        return len(self.problems) * self.samples

    def settings(self, batch: int | None, seed: int) -> dict[str, Any]:
        """What the outputs depend on. batch: its size, where answers that are drawn together share one stream."""
        asked = hashlib.sha256(repr([(p.prompt, p.expected) for p in self.problems]).encode()).hexdigest()[:16]
        shared = {} if batch is None else {"batch": batch}
        drawn = {"seed": seed, **shared} if self.sampling.temperature > 0 else {}
        told = {"task": self.name, "problems": len(self.problems), "asked": asked, "samples": self.samples}
        return told | {"sampling": asdict(self.sampling), "chat": asdict(self.chat), **drawn, **self.about}

    def run(self, subject: Subject, journal: Journal, known: Known, batch: int, seed: int, show: Progress) -> Known:
        """Answer and judge what is not known yet, of several processes each its own batches; returns what is known."""
        rendered = [self.chat.render(subject.directory, problem.prompt) for problem in self.problems]
        ids = [self._ids(subject, text, place) for place, text in enumerate(rendered)]
        found = dict(known)
        for keys in ranks.mine(self._batches(ids, batch)):
            missing = [key for key in keys if key not in found]
            if not missing:
                continue
            asked = keys if subject.shares_stream and self.sampling.temperature > 0 else missing
            began = time.monotonic()
            rows = subject.continue_(
                [ids[item] for item, _ in asked], self.sampling, [_seed(seed, key) for key in asked]
            )
            seconds = (time.monotonic() - began) / len(missing)
            drawn = dict(zip(asked, rows, strict=True))
            records = [self._record(subject, key, drawn[key], rendered[key[0]], seconds) for key in missing]
            journal.append(records)
            found.update(zip(missing, records, strict=True))
            show(len(found), self._note(found))
        return found

    def _ids(self, subject: Subject, text: str, place: int) -> list[int]:
        chat = self.chat.renders(subject.directory)
        ids = token_ids(subject.tokenizer, text, subject.vocabulary, f"{self.name}, problem {place}", special=not chat)
        if not ids:
            raise NestlingError(f"{self.name}, problem {place}: the prompt is empty")
        return ids

    def _batches(self, ids: Sequence[Sequence[int]], batch: int) -> Iterator[list[Key]]:
        """All answers wanted, the same ones together whatever is known: prompts of like length share a batch."""
        keys = [(item, sample) for item in range(len(ids)) for sample in range(self.samples)]
        keys.sort(key=lambda key: (-len(ids[key[0]]), key))
        for start in range(0, len(keys), batch):
            yield keys[start : start + batch]

    def _record(self, subject: Subject, key: Key, row: list[int], rendered: str, seconds: float) -> Record:
        problem, text = self.problems[key[0]], subject.tokenizer.decode(row)
        answer = final(text, thinking=begins_to_think(rendered))
        verdict = NOTHING if answer is None else self.judge(problem, answer)
        return {
            "item": key[0],
            "sample": key[1],
            "prompt": rendered,
            "expected": problem.expected,
            "generated": text,
            "answer": verdict.answer,
            "score": verdict.score,
            "correct": verdict.score == 1,
            "cut_off": len(row) >= self.sampling.max_tokens,
            "tokens": len(row) + (len(row) < self.sampling.max_tokens),
            "seconds": round(seconds, 6),
            **({"note": verdict.note} if verdict.note else {}),
        }

    def _note(self, found: Known) -> str:
        return f"{fmean(record['correct'] for record in found.values()):.1%} right"

    def result(self, found: Known) -> dict[str, Any]:
        """The figures: pass@1 as the mean over problems of the share of right answers, with its 95 % interval."""
        counts = [
            sum(found[item, sample]["correct"] for sample in range(self.samples)) for item in range(len(self.problems))
        ]
        records = list(found.values())
        rates = {k: [pass_at_k(self.samples, count, k) for count in counts] for k in sorted({1, *self.ks})}
        tokens, seconds = sum(r["tokens"] for r in records), sum(r["seconds"] for r in records)
        return {
            "metric": "pass@1",
            "score": fmean(rates[1]),
            "interval": list(mean_interval(rates[1], self.samples)),
            "pass_at": {str(k): {"score": fmean(r), "interval": list(mean_interval(r))} for k, r in rates.items()},
            "correct": sum(counts),
            "problems": len(self.problems),
            "samples": self.samples,
            "no_answer": sum(record["answer"] is None for record in records),
            "cut_off": sum(record["cut_off"] for record in records),
            "tokens": tokens,
            "tokens_per_second": tokens / seconds if seconds else None,
        }


def _seed(seed: int, key: Key) -> int:
    """Of one answer: the same in any batch."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key[0]}/{key[1]}".encode()).digest()[:7])
