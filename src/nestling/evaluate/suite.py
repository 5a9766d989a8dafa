"""Tasks that are solved by writing, by name, each with its protocol: prompt, sampling, answers per problem, judge.

The paper's suite (pass@1, reasoning on, the mean of several runs) reads files in the published datasets' own columns.
The paper states no sampling: temperature 0.6 and top-p 0.95 are what reasoning models are usually asked with, and the
number of answers lies where the paper's range (4 to 16) and the cost of a task meet. Prompts are in our words.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from string import ascii_uppercase
from typing import Any

from nestling.errors import NestlingError
from nestling.evaluate import gym, programs
from nestling.evaluate.answers import Verdict, judge_choice, judge_math
from nestling.evaluate.chat import Chat
from nestling.evaluate.rows import Row, file_hash, read_rows
from nestling.evaluate.solving import Problem, Solving
from nestling.evaluate.spec import Spec
from nestling.evaluate.subject import Sampling

ASK_MATH = "{problem}\n\nReason step by step, and put your final answer within \\boxed{{}}."
ASK_CHOICE = '{question}\n\n{choices}\n\nReason step by step, then end with "Answer: X", where X is one of {letters}.'
COMMON = ("file", "problems", "samples", "temperature", "top_p", "max_tokens", "k")
REASONING = Sampling(temperature=0.6, top_p=0.95, max_tokens=32768)


@dataclass(frozen=True)
class Named:
    """A named task: the published data it reads, its columns, how a row is asked and judged."""

    published: str
    columns: tuple[str, ...]
    ask: Callable[[Row], Problem]
    judge: Callable[[Problem, str], Verdict]
    scorer: str
    samples: int
    sampling: Sampling = REASONING


def _math(question: str) -> Callable[[Row], Problem]:
    def ask(row: Row) -> Problem:
        return Problem(ASK_MATH.format(problem=row.text(question)), row.text("answer"))

    return ask


def _gpqa(row: Row) -> Problem:
    """The right answer and three wrong ones, in an order that the question alone decides."""
    right, wrong = row.text("Correct Answer"), [row.text(f"Incorrect Answer {n}") for n in (1, 2, 3)]
    question = row.text("Question")
    choices = [right, *wrong]
    random.Random(question).shuffle(choices)
    return _choice(question, choices, choices.index(right))


def _mmlu_pro(row: Row) -> Problem:
    options, letter = row.texts("options"), row.text("answer")
    if letter not in (letters := list(ascii_uppercase[: len(options)])):
        raise NestlingError(f"{row.where}: answer {letter!r} is none of {', '.join(letters)}")
    return _choice(row.text("question"), options, letters.index(letter))


def _choice(question: str, options: Sequence[str], right: int) -> Problem:
    letters = ascii_uppercase[: len(options)]
    choices = "\n".join(f"{letter}. {option.strip()}" for letter, option in zip(letters, options, strict=True))
    prompt = ASK_CHOICE.format(question=question.strip(), choices=choices, letters=", ".join(letters))
    return Problem(prompt, letters[right], letters)


def _is_right(problem: Problem, text: str) -> Verdict:
    return judge_math(text, problem.expected)


def _is_chosen(problem: Problem, text: str) -> Verdict:
    return judge_choice(text, problem.expected, problem.data)


_EQUAL = "math-verify: the last \\boxed{} equals the answer"
_LETTER = "the letter that the text settles on is the right one"
SUITE: Mapping[str, Named] = {
    "math-500": Named("HuggingFaceH4/MATH-500", ("problem", "answer"), _math("problem"), _is_right, _EQUAL, 4),
    "aime-24": Named("HuggingFaceH4/aime_2024", ("problem", "answer"), _math("problem"), _is_right, _EQUAL, 16),
    "aime-25": Named("math-ai/aime25", ("problem", "answer"), _math("problem"), _is_right, _EQUAL, 16),
    "gpqa": Named(
        "Idavidrein/gpqa, gpqa_diamond",
        ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
        _gpqa,
        _is_chosen,
        _LETTER,
        8,
    ),
    "livecodebench-v5": Named(
        "livecodebench/code_generation_lite, release_v5",
        ("question_content", "starter_code", "public_test_cases", "private_test_cases", "metadata"),
        programs.ask,
        programs.judge,
        "the last code block passes every public and private test",
        4,
    ),
    "mmlu-pro": Named("TIGER-Lab/MMLU-Pro", ("question", "options", "answer"), _mmlu_pro, _is_chosen, _LETTER, 1),
}
MATH = Named("", ("problem", "answer"), _math("problem"), _is_right, _EQUAL, 1, Sampling(0.0, 1.0, 2048))
"""`math`: any file with the columns `problem` and `answer`."""


@dataclass(frozen=True)
class Overrides:
    """What the command line sets for every task; None leaves it to the task."""

    problems: int | None = None
    samples: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    ks: tuple[int, ...] = ()
    chat: Chat = Chat()
    execute: bool = False


def solving(spec: Spec, given: Overrides, seed: int) -> Solving:
    """The task of this name, ready to run."""
    if spec.name in SUITE or spec.name == "math":
        return _from_file(spec, given)
    if spec.name not in (known := gym.names()):
        raise _unknown(spec.name, known)
    return _from_gym(spec, given, seed)


def _unknown(name: str, gym_names: Sequence[str]) -> NestlingError:
    ours = [*SUITE, "math", "choices", "perplexity"]
    close = get_close_matches(name, [*ours, *gym_names], n=1, cutoff=0.5)
    meant = f"did you mean {close[0]!r}? " if close else ""
    listed = f"{', '.join(ours)}, or one of {len(gym_names)} names of reasoning-gym"
    return NestlingError(f"unknown task {name!r}; {meant}(allowed: {listed})")


def _from_file(spec: Spec, given: Overrides) -> Solving:
    named = SUITE.get(spec.name, MATH)
    spec.check(COMMON)
    if "file" not in spec.options:
        data = f"the data of {named.published}" if named.published else "your problems"
        raise NestlingError(f"task {spec.name} needs {data}: {spec.name}:file=PATH, with {', '.join(named.columns)}")
    if named.judge is programs.judge and not given.execute:
        raise NestlingError(
            f"task {spec.name} runs what the model writes, on this machine: allow it with --allow-code-execution"
        )
    path = spec.options["file"]
    rows = read_rows(path, named.columns, spec.number("problems", given.problems or 0, 1) or None)
    about = {"data": {"sha256": file_hash(path)}, "scorer": named.scorer, "dataset": named.published or None}
    chat = given.chat
    return _solving(
        spec, given, [named.ask(row) for row in rows], named.judge, named.sampling, named.samples, about, chat
    )


def _from_gym(spec: Spec, given: Overrides, seed: int) -> Solving:
    shared = tuple(name for name in COMMON if name != "file")
    own = Spec(spec.name, {key: value for key, value in spec.options.items() if key not in shared})
    number = spec.number("problems", given.problems or 200, 1)
    compact = gym.is_compact(own)
    if not compact and gym.runs_answers(spec.name) and not given.execute:
        raise NestlingError(
            f"task {spec.name} hands what the model writes to Python's eval, on this machine, with no limits: allow it "
            "with --allow-code-execution"
        )
    problems, judge = (gym.compact if compact else gym.written)(own, number, seed)
    sampling = Sampling(max_tokens=16 if compact else 512)
    about = {"data": {"reasoning-gym": str(own), "seed": seed}, "scorer": "the dataset's own verifier, full marks"}
    chat = replace(given.chat, use=False) if compact else given.chat
    return _solving(spec, given, problems, judge, sampling, 1, about, chat)


def _solving(
    spec: Spec,
    given: Overrides,
    problems: Sequence[Problem],
    judge: Callable[[Problem, str], Verdict],
    sampling: Sampling,
    samples: int,
    about: Mapping[str, Any],
    chat: Chat,
) -> Solving:
    """With the options of the task before those of the command line before the task's own."""
    temperature = spec.number("temperature", float(_first(given.temperature, sampling.temperature)))
    drawn = Sampling(
        temperature,
        spec.number("top_p", float(_first(given.top_p, sampling.top_p)), 1e-6),
        spec.number("max_tokens", _first(given.max_tokens, sampling.max_tokens), 1),
    )
    usual = samples if temperature > 0 else 1
    count = spec.number("samples", _first(given.samples, usual), 1)
    ks = (spec.number("k", 1, 1),) if "k" in spec.options else given.ks
    return Solving(spec.label, problems, judge, drawn, count, chat, ks, about)


def _first(given: Any, usual: Any) -> Any:
    return usual if given is None else given
