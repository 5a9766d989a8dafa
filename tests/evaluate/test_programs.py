"""Generated programs: judged by their output, and kept within time, memory, files, directory and environment."""

import io
import json
import os
import pickle
from pathlib import Path

import pytest

from nestling.errors import NestlingError
from nestling.evaluate.programs import Test as Case
from nestling.evaluate.programs import ask, fails, same_text
from nestling.evaluate.rows import Row
from nestling.evaluate.sandbox import Limits, run_python

LIMITS = Limits(seconds=5)


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        ("6\n", "6", True),
        ("1 2\n3", "1 2\n3\n", True),
        ("2.0", "2", True),
        ("1e3", "1000", True),
        ("1  2", "1 2", True),
        ("Yes", "yes", False),
        ("1\n2", "1 2", False),
        ("", "1", False),
        ("0.1", "0.10000001", False),
    ],
)
def test_outputs_are_compared_word_by_word(ours: str, theirs: str, same: bool) -> None:
    assert same_text(ours, theirs) == same


@pytest.mark.parametrize(
    ("code", "case", "fault"),
    [
        ("print(2 * int(input()))", Case("4\n", "8"), None),
        ("print(3 * int(input()))", Case("4\n", "8"), "wrong output"),
        ("1/0", Case("", ""), "exit code 1"),
        ("def f(", Case("", ""), "exit code 1"),
        ("import sys; sys.exit(3)", Case("", ""), "exit code 3"),
        ("def twice(x, y):\n    return {'a': [x, y]}", Case('1\n"q"', '{"a": [1, "q"]}', "twice"), None),
        (
            "class Solution:\n    def f(self, x: List[int]) -> int:\n        return sum(x)",
            Case("[1, 2]", "3", "f"),
            None,
        ),
        (
            "class Solution:\n    def f(self, x):\n        print('noise')\n        return x",
            Case("[1]", "[2]", "f"),
            "wrong value",
        ),
        ("class Solution:\n    def f(self, x):\n        return (x, x)", Case("1", "[1, 1]", "f"), None),
        ("x = 1", Case("1", "1", "f"), "exit code 1"),
    ],
)
def test_a_program_passes_only_with_the_right_output(code: str, case: Case, fault: str | None) -> None:
    assert fails(code, case, LIMITS) == fault


def test_a_program_sees_an_empty_directory_and_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "owl")
    code = "import os, sys; print(os.listdir(), dict(os.environ), 'torch' in sys.modules, sys.flags.isolated)"
    done = run_python(code, "", LIMITS)
    assert done.fault is None
    assert "owl" not in done.output
    assert "SECRET" not in done.output
    listed = done.output.split("]")[0]
    assert sorted(json.loads(listed.replace("'", '"') + "]")) == ["out", "program.py"]
    assert done.output.strip().endswith("False 1")
    written = run_python("open('x', 'w').write('1'); import os; print(os.getcwd())", "", LIMITS)
    assert not Path(written.output.strip()).exists()


def test_limits_end_what_goes_too_far() -> None:
    few = Limits(seconds=1, memory=1 << 28, file=1 << 16)
    assert run_python("while True: pass", "", few).fault in (
        "ran longer than 1 s",
        "ended by SIGKILL",
        "ended by SIGXCPU",
    )
    assert run_python("import time; time.sleep(60)", "", few).fault == "ran longer than 1 s"
    assert run_python("x = bytearray(1 << 29)", "", few).fault == "exit code 1"
    assert run_python("open('x', 'wb').write(bytes(1 << 20))", "", few).fault in ("exit code 1", "ended by SIGXFSZ")
    assert run_python("while True: print('x' * 1000)", "", few).fault is not None
    raised = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))"
    if os.geteuid() != 0:
        assert run_python(raised, "", few).fault == "exit code 1"


def test_what_a_program_started_ends_with_it(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(1.5); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]); print('done')"
    assert run_python(code, "", LIMITS).output == "done\n"
    late = run_python("import time; time.sleep(1.8)", "", LIMITS)
    assert late.fault is None
    assert not mark.exists()


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("trapped",)


def test_packed_tests_can_hold_text_and_nothing_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import base64
    import zlib

    monkeypatch.chdir(tmp_path)
    cases = [{"input": "1", "output": "2", "testtype": "stdin"}]

    def row(private: object) -> Row:
        packed = base64.b64encode(zlib.compress(pickle.dumps(private))).decode()
        return Row("here", {"question_content": "q", "public_test_cases": "[]", "private_test_cases": packed})

    assert ask(row(json.dumps(cases))).data == [Case("1", "2")]
    for hostile in (Trap(), [Trap()], io.StringIO("x")):
        with pytest.raises(NestlingError, match="holds no tests that can be read"):
            ask(row(hostile))
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("metadata", ["{", "[1]", "null", 3])
def test_broken_metadata_is_refused_with_its_line(metadata: object) -> None:
    tests = json.dumps([{"input": "1", "output": "1", "testtype": "functional"}])
    row = Row("file, line 3", {"question_content": "q", "public_test_cases": tests, "metadata": metadata})
    with pytest.raises(NestlingError, match="file, line 3: 'metadata' must be a JSON object"):
        ask(row)
