"""How many held-out problems a model solves: greedy generation, judged by the task's own verifier."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nestling.errors import NestlingError
from nestling.evaluate.estimates import wilson
from nestling.evaluate.stock import load_stock, load_stock_tokenizer
from nestling.progress import progress
from nestling.tasks import Problem, Task, distinct, problems, solves
from nestling.weights.elastic import open_elastic

Answer = Callable[[Sequence[str]], tuple[list[str], int]]
"""Prompts -> (continuations, tokens generated)."""


@dataclass(frozen=True)
class Accuracy:
    """One model's result. `interval` is the 95 % Wilson interval of the share solved."""

    task: str
    backend: str
    exact_match: float
    correct: int
    problems: int
    interval: tuple[float, float]
    tokens_per_second: float
    outputs: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def accuracy(answer: Answer, task: Task, *, backend: str, count: int, batch: int, seed: int, title: str) -> Accuracy:
    """Solve `count` distinct held-out problems; the same ones for every model of the same seed."""
    asked = distinct(problems(task, seed, held_out=True), count)
    texts: list[str] = []
    generated, began = 0, time.monotonic()
    with progress(title, count, "problems") as show:
        for start in range(0, count, batch):
            answers, tokens = answer([problem.prompt for problem in asked[start : start + batch]])
            texts += answers
            generated += tokens
            show(len(texts))
    seconds = time.monotonic() - began
    outputs = [_judged(task, problem, text) for problem, text in zip(asked, texts, strict=True)]
    correct = sum(output["correct"] for output in outputs)
    interval = wilson(correct, count)
    return Accuracy(str(task), backend, correct / count, correct, count, interval, generated / seconds, outputs)


def _judged(task: Task, problem: Problem, text: str) -> dict[str, Any]:
    correct = solves(task, problem, text)
    return {"prompt": problem.prompt, "expected": problem.solution, "generated": text, "correct": correct}


def stock(directory: str | Path, max_tokens: int, device: Any = "cpu") -> Answer:
    """Answer with stock transformers: what a user of the checkpoint gets, with no code of ours."""
    tokenizer = load_stock_tokenizer(directory)
    elastic = open_elastic(directory)
    if "*" not in elastic.architecture.hybrid_override_pattern:
        raise NestlingError(f"{directory} has no attention layer, and stock transformers cannot generate without one")
    model = load_stock(directory, trust_remote_code=not elastic.uniform).to(device)  # then the code is ours

    def answer(prompts: Sequence[str]) -> tuple[list[str], int]:
        inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left").to(device)
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=max_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        return texts, int((new != tokenizer.pad_token_id).sum())

    return answer
