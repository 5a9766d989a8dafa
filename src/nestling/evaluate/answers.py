"""From what a model wrote to its answer, and whether that is right. No answer found is said, never guessed."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nestling.errors import NestlingError

THINK, THOUGHT = "<think>", "</think>"


@dataclass(frozen=True)
class Verdict:
    """The answer as it was read, None where there is none, and its score from 0 to 1."""

    answer: str | None
    score: float
    note: str = ""


NOTHING = Verdict(None, 0.0)


def final(text: str, *, thinking: bool = False) -> str | None:
    """What stands behind the reasoning; None where the reasoning never ended. thinking: the prompt had begun it."""
    if THOUGHT in text:
        return text.rsplit(THOUGHT, 1)[1]
    return None if thinking or THINK in text else text


def boxed(text: str) -> str | None:
    r"""What is in the last whole \boxed{…} or \fbox{…}, whose braces may nest."""
    for found in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth = 1
        for place in range(found.end(), len(text)):
            escaped = text[place - 1] == "\\"
            depth += 0 if escaped else {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[found.end() : place].strip()
    return None


def judge_math(text: str, expected: str) -> Verdict:
    r"""Equality as math-verify sees it, of the last \boxed{…}, else of what stands behind the last "answer:" or "is".

    An expected answer that is no mathematics is compared as text.
    """
    parse, verify = _math_verify()
    found, stated = boxed(text) or None, _stated(text)
    answer = parse(_as_math(found)) if found is not None else parse(text if stated is None else stated)
    if found is None and not answer:
        return NOTHING
    shown, gold = found or stated or str(answer[-1]), parse(_as_math(expected))
    if gold and answer:
        return Verdict(shown, float(verify(gold, answer)))
    return Verdict(shown, float(_plain(shown) == _plain(expected)))


def _stated(text: str) -> str | None:
    """The rest of the sentence behind the last "answer:" or "answer is"."""
    said = re.split(r"(?i)answer\s*(?:is|:)", text)
    return re.split(r"\n|\.\s|\.$", said[-1].strip(" \t\n*"))[0].strip() or None if len(said) > 1 else None


def _as_math(text: str) -> str:
    return f"\\boxed{{{text.strip().strip('$')}}}"


def _plain(text: str) -> str:
    return re.sub(r"\\text\{([^{}]*)\}|[\s$.]", r"\1", text).lower()


def _math_verify() -> tuple[Callable[[str], list[Any]], Callable[[Any, Any], bool]]:
    try:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    except ImportError:
        raise NestlingError("judging mathematics needs math-verify: pip install 'nestling[eval]'") from None
    how = [LatexExtractionConfig(), ExprExtractionConfig()]
    return lambda text: parse(text, extraction_config=how), verify


def judge_choice(text: str, expected: str, letters: Sequence[str]) -> Verdict:
    r"""The letter in the last \boxed{…}, else behind the last "answer", else one that is the whole last line."""
    answer = chosen(text, letters)
    return NOTHING if answer is None else Verdict(answer, float(answer == expected))


def chosen(text: str, letters: Sequence[str]) -> str | None:
    """The letter that a text settles on."""
    one = f"([{''.join(letters)}])"
    if (found := boxed(text)) is not None:
        bare = re.sub(r"\\(?:text|textbf|mathrm|mathbf|rm)\b|[\s{}().*:]", " ", found).strip()
        return match[1] if (match := re.fullmatch(rf"{one}(?:\s.*)?", bare, re.DOTALL)) else None
    if said := re.findall(rf"(?i:answer)(?i:\s+is)?\s*[:=]?[\s*_(\[]*{one}(?![A-Za-z'])", text):
        return str(said[-1])
    lines = text.strip().splitlines()
    alone = re.fullmatch(rf"[\s*_(\[]*{one}[\s*_)\].:]*", lines[-1]) if lines else None
    return alone[1] if alone else None


def code_block(text: str) -> str | None:
    """The last fenced block of Python, else the last without a language, else the last."""
    blocks = re.findall(r"```([\w+-]*)[^\n]*\n(.*?)```", text, re.DOTALL)
    for languages in (("python", "python3", "py"), ("",)):
        if found := [body for language, body in blocks if language.lower() in languages]:
            return str(found[-1])
    return str(blocks[-1][1]) if blocks else None
