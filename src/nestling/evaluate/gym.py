"""reasoning-gym's problems by name: held-out ones, judged by the dataset's own verifier."""

import json
from collections.abc import Callable
from inspect import getsource
from itertools import count
from typing import Any

from nestling.errors import NestlingError
from nestling.evaluate.answers import NOTHING, Verdict, boxed
from nestling.evaluate.solving import Problem
from nestling.evaluate.spec import Spec
from nestling.tasks import Task, distinct, generator, is_held_out, problems, solves

COMPACT = "chain_sum"
"""The task that the demo's models learn in a notation of its own: `50+23-88=`."""
ASK = '{question}\n\nThink step by step, then give the final answer alone on the last line, after "Answer:".'

Judge = Callable[[Problem, str], Verdict]


def names() -> list[str]:
    """Every dataset of reasoning-gym; of the demo's task alone where it is not installed."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError:
        return [COMPACT]
    return sorted(DATASETS)


def runs_answers(name: str) -> bool:
    """Whether a dataset's verifier hands the answer to Python's `eval`, itself or through sympy's parser."""
    from reasoning_gym.factory import DATASETS

    source = getsource(DATASETS[name][0].score_answer)
    return any(call in source for call in ("eval(", "parse_expr(", "sympify("))


def is_compact(spec: Spec) -> bool:
    return spec.name == COMPACT and spec.options.get("style", "compact") == "compact"


def compact(spec: Spec, number: int, seed: int) -> tuple[list[Problem], Judge]:
    """Problems in the demo's notation: what `nestling run` trains on and judges."""
    options = ",".join(f"{key}={value}" for key, value in spec.options.items() if key != "style")
    task = Task.parse(f"{spec.name}:{options}")
    asked = distinct(problems(task, seed, held_out=True), number)

    def judge(problem: Problem, text: str) -> Verdict:
        answer = text.rsplit(";", 1)[-1].strip()
        return Verdict(answer, float(solves(task, problem.data, text))) if answer else NOTHING

    return [Problem(one.prompt, one.solution, one) for one in asked], judge


def written(spec: Spec, number: int, seed: int) -> tuple[list[Problem], Judge]:
    """Problems in words, as the dataset puts them."""
    dataset = _dataset(spec)
    found: dict[str, Problem] = {}
    for index in count(seed * 10**6):
        if index - seed * 10**6 > 1000 + 100 * number:
            raise NestlingError(f"task {spec.name} has only about {len(found)} held-out problems; ask for fewer")
        entry = dataset[index]
        if is_held_out(entry["question"]):
            prompt = ASK.format(question=entry["question"])
            found.setdefault(entry["question"], Problem(prompt, str(entry["answer"]), entry))
        if len(found) == number:
            break

    def judge(problem: Problem, text: str) -> Verdict:
        if (answer := said(text)) is None:
            return NOTHING
        try:
            return Verdict(answer, float(dataset.score_answer(answer, problem.data) == 1))
        except Exception as error:  # some verifiers break on answers that they cannot read
            return Verdict(answer, 0.0, f"cannot be judged: {error!r}"[:200])

    return list(found.values()), judge


def said(text: str) -> str | None:
    """What stands behind the last "Answer:", else in the last box, else on the last line."""
    if "answer:" in (lower := text.lower()):
        return text[lower.rindex("answer:") + len("answer:") :].strip().strip("*").strip() or None
    lines = text.strip().splitlines()
    return boxed(text) or (lines[-1].strip() if lines else None)


def _dataset(spec: Spec) -> Any:
    return generator(spec.name, {key: _value(value) for key, value in spec.options.items() if key != "style"})


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
