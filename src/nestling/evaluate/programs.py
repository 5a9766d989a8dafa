"""Programs that a model wrote, against LiveCodeBench's tests. They run in `sandbox`, one process per test."""

import base64
import io
import json
import pickle
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from nestling.errors import NestlingError
from nestling.evaluate.answers import NOTHING, Verdict, code_block
from nestling.evaluate.rows import Row
from nestling.evaluate.sandbox import Limits, run_python
from nestling.evaluate.solving import Problem

ASK = "{question}\n\n{how}\nPut the whole program in one ```python block at the end."
READS = "Write a Python program that reads the input from standard input and prints the output."
FILLS = "Complete this Python code, keeping its names:\n```python\n{starter}\n```"
LIMITS = Limits()


@dataclass(frozen=True)
class Test:
    """What goes in, what must come out; with a function's name they are its arguments and its value, in JSON."""

    given: str
    expected: str
    function: str | None = None


class _Plain(pickle.Unpickler):
    """The published tests are a pickled text; whatever names a class or a function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"names {module}.{name}")


def ask(row: Row) -> Problem:
    starter = row.values.get("starter_code") or ""
    how = FILLS.format(starter=starter.rstrip()) if starter.strip() else READS
    tests = _tests(row)
    return Problem(ASK.format(question=row.text("question_content"), how=how), f"{len(tests)} tests passed", tests)


def _tests(row: Row) -> list[Test]:
    """Public and private tests; the private ones may be packed (base64, zlib, pickle, JSON)."""
    about, found = _metadata(row), []
    for column in ("public_test_cases", "private_test_cases"):
        for one in _cases(row, column):
            function = about.get("func_name") if one.get("testtype") == "functional" else None
            found.append(Test(str(one["input"]), str(one["output"]), function))
    if not found:
        raise NestlingError(f"{row.where}: has no tests")
    return found


def _metadata(row: Row) -> dict[str, Any]:
    given = row.values.get("metadata") or "{}"
    try:
        about = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        about = None
    if not isinstance(about, dict):
        raise NestlingError(f"{row.where}: 'metadata' must be a JSON object")
    return about


def _cases(row: Row, column: str) -> list[dict[str, Any]]:
    value: Any = row.values.get(column) or []
    try:
        if isinstance(value, str) and not value.lstrip().startswith("["):
            value = _Plain(io.BytesIO(zlib.decompress(base64.b64decode(value, validate=True)))).load()
        cases = json.loads(value) if isinstance(value, str | bytes) else value
        assert isinstance(cases, list)
        assert all({"input", "output"} <= case.keys() for case in cases)
    except (ValueError, zlib.error, pickle.UnpicklingError, EOFError, AssertionError, AttributeError) as error:
        raise NestlingError(f"{row.where}: {column!r} holds no tests that can be read ({error})") from None
    return cases


def judge(problem: Problem, text: str) -> Verdict:
    """Right if every test passes; the first that fails ends it, and is noted."""
    code = code_block(text)
    if code is None:
        return NOTHING
    tests: Sequence[Test] = problem.data
    for number, test in enumerate(tests, 1):
        if fault := fails(code, test):
            return Verdict(code, 0.0, f"test {number} of {len(tests)}: {fault}")
    return Verdict(code, 1.0)


def fails(code: str, test: Test, limits: Limits = LIMITS) -> str | None:
    """Why a program does not pass a test; None if it does."""
    done = run_python(code if test.function is None else _calling(code, test), test.given, limits)
    if done.fault:
        return done.fault
    if test.function is None:
        return None if same_text(done.output, test.expected) else "wrong output"
    try:
        value, expected = json.loads(done.output.splitlines()[-1]), json.loads(test.expected)
    except (ValueError, IndexError):
        return "no value"
    return None if value == expected else "wrong value"


def _calling(code: str, test: Test) -> str:
    """The program, then a call of its function with the arguments that stand on the lines of the input."""
    preamble = "import json, sys\nfrom typing import *\nfrom collections import *\nfrom math import *\n"
    call = (
        f"_given = [json.loads(line) for line in sys.stdin.read().splitlines() if line.strip()]\n"
        f"_of = Solution() if 'Solution' in globals() else sys.modules['__main__']\n"
        f"print('\\n' + json.dumps(getattr(_of, {test.function!r})(*_given)))\n"
    )
    return f"{preamble}\n{code}\n\n{call}"


def same_text(output: str, expected: str) -> bool:
    """Line by line, word by word; words that are numbers are compared as numbers."""
    ours, theirs = (text.strip().splitlines() for text in (output, expected))
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def _same_line(ours: str, theirs: str) -> bool:
    mine, wanted = ours.split(), theirs.split()
    return len(mine) == len(wanted) and all(a == b or _same_number(a, b) for a, b in zip(mine, wanted, strict=True))


def _same_number(a: str, b: str) -> bool:
    try:
        return Decimal(a) == Decimal(b)
    except InvalidOperation:
        return False
