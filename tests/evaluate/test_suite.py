"""The paper's suite on made-up files of five problems in the published columns, from the command line to figures."""

import base64
import csv
import json
import pickle
import re
import signal
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("math_verify")

from nestling import cli
from nestling.errors import NestlingError
from nestling.evaluate.evaluation import Evaluation, make_tasks
from nestling.evaluate.solving import Solving
from nestling.evaluate.spec import Spec, parse_tasks
from nestling.evaluate.suite import SUITE, Overrides, solving
from talking import family, lines, scripted, subject

MATH = [
    (r"\frac{1}{2}", r"so it is \boxed{\dfrac12}", r"so it is \boxed{2}"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}", r"\boxed{(\pi/2, 3)}"),
    (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", r"\boxed{\text{Briana}}"),
    (r"2\sqrt{3}", r"The answer is $\sqrt{12}$.", r"The answer is $\sqrt{13}$."),
    ("1{,}234", r"\boxed{1} no, \boxed{1234}", "it cannot be told"),
]
AIME = [
    ("072", r"\boxed{72}", r"\boxed{27}"),
    ("204", "Answer: 204", "Answer: 205"),
    ("5", r"\boxed{m+n = 5}", r"\boxed{m+n = 6}"),
    ("0", r"\boxed{000}", r"\boxed{}"),
    ("999", r"**Answer:** $999$", "It is 998, perhaps"),
]
LETTERS = ["Answer: {}", r"\boxed{{\text{{({})}}}}", "The correct answer is ({}).", "**Answer: {}**", "so\n\n{}"]


def marked(number: int, text: str) -> str:
    """A problem that a script can tell from the others."""
    return f"Problem #{number}: {text}"


def math_file(directory: Path, name: str) -> Path:
    rows = MATH if name == "math-500" else AIME
    shared = {"solution": "…", "subject": "Algebra", "level": 3, "unique_id": "test/x.json"}
    if name == "aime-24":
        shared = {"id": 60, "solution": "…", "url": "…", "year": "2024"}
    if name == "aime-25":
        shared = {"id": "0"}
    return lines(
        directory / f"{name}.jsonl",
        [{"problem": marked(n, "find it."), "answer": answer, **shared} for n, (answer, *_) in enumerate(rows)],
    )


def gpqa_file(directory: Path) -> Path:
    columns = ["Record ID", "Question", "Correct Answer", *(f"Incorrect Answer {n}" for n in (1, 2, 3)), "Subdomain"]
    with open(directory / "gpqa.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for n in range(5):
            writer.writerow(
                [f"rec{n}", marked(n, 'an "owl",\nor not?'), f"right {n}", "wrong a", "wrong b", "wrong c\n", "x"]
            )
    return directory / "gpqa.csv"


def mmlu_file(directory: Path) -> Path:
    rows = [
        {
            "question_id": n,
            "question": marked(n, "which?"),
            "options": [f"right {n}" if k == n else f"wrong {k}" for k in range(6 + n)],
            "answer": "ABCDE"[n],
            "answer_index": n,
            "cot_content": "",
            "category": "biology",
            "src": "made-up",
        }
        for n in range(5)
    ]
    return lines(directory / "mmlu.jsonl", rows)


def packed(cases: list[dict[str, str]]) -> str:
    """Private tests as they are published."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


def code_file(directory: Path) -> Path:
    def row(n: int, given: str, expected: str, starter: str = "") -> dict[str, Any]:
        cases = [{"input": given, "output": expected, "testtype": "functional" if starter else "stdin"}]
        private = packed(cases) if n % 2 else json.dumps(cases)
        return {
            "question_title": "t",
            "question_content": marked(n, "compute it."),
            "platform": "leetcode" if starter else "atcoder",
            "question_id": str(n),
            "contest_date": "2024-10-01T00:00:00",
            "starter_code": starter,
            "difficulty": "easy",
            "public_test_cases": json.dumps(cases),
            "private_test_cases": private,
            "metadata": json.dumps({"func_name": "double"} if starter else {}),
        }

    starter = "class Solution:\n    def double(self, x: List[int]) -> List[int]:\n        "
    rows = [
        row(0, "3\n", "6\n"),
        row(1, "1 2 3\n", "2.0 4 6"),
        row(2, "[1, 2]", "[2, 4]", starter),
        row(3, "[0]\n", "[0]", starter),
        row(4, "5\n", "10"),
    ]
    return lines(directory / "code.jsonl", rows)


PRINTS = "```python\nprint(*(2 * int(x) for x in input().split()))\n```"
DOUBLES = "class Solution:\n    def double(self, x: List[int]) -> List[int]:\n        return [2 * v for v in x]"
RETURNS = f"```python\n{DOUBLES}\n```"
RIGHT_CODE = [PRINTS, f"First:\n```python\n1/0\n```\nBetter:\n{PRINTS}", RETURNS, RETURNS, PRINTS]
WRONG_CODE = [
    "```python\nprint(7)\n```",
    "```python\n1/0\n```",
    "no code",
    RETURNS.replace("2 *", "[3] *"),
    "```\nimport\n```",
]


def files(directory: Path) -> dict[str, Path]:
    maths = {name: math_file(directory, name) for name in ("math-500", "aime-24", "aime-25")}
    return maths | {
        "gpqa": gpqa_file(directory),
        "mmlu-pro": mmlu_file(directory),
        "livecodebench-v5": code_file(directory),
    }


def script(name: str, right: bool) -> Any:
    """Answers every problem rightly, or every one wrongly, each in another form."""

    def says(prompt: str) -> str:
        number = int(re.findall(r"#(\d)", prompt)[-1])
        if name == "livecodebench-v5":
            return (RIGHT_CODE if right else WRONG_CODE)[number]
        if name in ("gpqa", "mmlu-pro"):
            listed = re.findall(r"^([A-Z])\. (right)?", prompt, re.M)
            letter = next(letter for letter, good in listed if bool(good) == right)
            return LETTERS[number].format(letter)
        return (MATH if name == "math-500" else AIME)[number][1 if right else 2]

    return says


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("suite")
    family(directory)
    return directory


@pytest.mark.parametrize("name", SUITE)
@pytest.mark.parametrize("right", [True, False])
def test_right_answers_are_right_and_wrong_ones_wrong_in_any_form(
    home: Path, tmp_path: Path, name: str, right: bool
) -> None:
    given = Overrides(temperature=0, max_tokens=200, execute=True)
    (task,) = make_tasks(parse_tasks([f"{name}:file={files(tmp_path)[name]}"]), given, 0)
    one = scripted(subject(home / "elastic"), script(name, right))
    (result,) = Evaluation([task], [one], tmp_path / "out", 2, 0).run(lambda result: None)
    found = result["result"]
    (journal,) = (tmp_path / "out").rglob("*.jsonl")
    records = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    assert [record["correct"] for record in records] == [right] * 5, [(r["generated"], r["answer"]) for r in records]
    assert (found["correct"], found["problems"], found["cut_off"]) == (5 * right, 5, 0)
    missing = {"math-500": 1, "livecodebench-v5": 1, "aime-24": 1, "aime-25": 1}.get(name, 0)
    assert found["no_answer"] == (0 if right else missing)


def test_the_protocol_is_the_papers_and_is_written_down(tmp_path: Path) -> None:
    found = files(tmp_path)
    runs = {"math-500": 4, "aime-24": 16, "aime-25": 16, "gpqa": 8, "livecodebench-v5": 4, "mmlu-pro": 1}
    for name, samples in runs.items():
        (task,) = make_tasks(parse_tasks([f"{name}:file={found[name]}"]), Overrides(execute=True), 0)
        assert isinstance(task, Solving)
        assert (task.samples, task.sampling.temperature, task.sampling.top_p) == (samples, 0.6, 0.95)
        settings = task.settings(8, 0)
        assert settings["dataset"] == SUITE[name].published
        assert len(settings["data"]["sha256"]) == 64
        assert settings["scorer"]
        assert task.chat.use is None  # through the chat template where there is one


def test_the_right_choice_is_shuffled_the_same_way_every_time(tmp_path: Path) -> None:
    many = [
        {"Question": f"Q{n}", "Correct Answer": "r", **{f"Incorrect Answer {k}": f"w{k}" for k in (1, 2, 3)}}
        for n in range(200)
    ]
    spec = [f"gpqa:file={lines(tmp_path / 'g.jsonl', many)}"]
    first, second = (make_tasks(parse_tasks(spec), Overrides(), seed)[0] for seed in (0, 1))
    assert isinstance(first, Solving)
    assert isinstance(second, Solving)
    assert first.problems == second.problems
    counts = [sum(problem.expected == letter for problem in first.problems) for letter in "ABCD"]
    assert min(counts) > 30


# ---- from the command line


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nestling", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code, *capsys.readouterr())

    yield run
    signal.signal(signal.SIGTERM, handler)


def test_the_whole_suite_runs_from_the_command_line(home: Path, tmp_path: Path, run: Any) -> None:
    tasks = ",".join(f"{name}:file={file}" for name, file in files(tmp_path).items())
    command = ["eval", home / "elastic", "--budget", "all", "--tasks", tasks, "--max-tokens", 6, "--temperature", 0]
    code, out, err = run(*command, "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert "livecodebench-v5 runs what the model writes, on this machine: allow it with --allow-code-execution" in err
    assert not (tmp_path / "out").exists()
    code, out, err = run(*command, "--out", tmp_path / "out", "--allow-code-execution")
    assert code == 0, err
    assert len(out.splitlines()) == 12
    written = [json.loads(file.read_text()) for file in (tmp_path / "out").rglob("*.json")]
    assert len(written) == 12
    for result in written:
        assert result["result"]["problems"] == 5
        assert result["result"]["cut_off"] + result["result"]["no_answer"] > 0
        assert result["model"]["budget"] in ("100%", "50%")


@pytest.mark.parametrize(
    ("name", "broken", "words"),
    [
        ("math-500", {"answer": None}, "line 1: 'answer' is missing or empty"),
        ("aime-24", {"problem": ""}, "line 1: 'problem' is missing or empty"),
        ("mmlu-pro", {"answer": "Z"}, "answer 'Z' is none of A, B"),
        ("mmlu-pro", {"options": ["one"]}, "must be a list of at least two"),
        ("livecodebench-v5", {"private_test_cases": "%%%"}, "holds no tests that can be read"),
        ("livecodebench-v5", {"public_test_cases": "[]", "private_test_cases": "[]"}, "has no tests"),
    ],
)
def test_a_row_that_cannot_be_judged_is_refused(tmp_path: Path, name: str, broken: Any, words: str) -> None:
    path = files(tmp_path)[name]
    first = json.loads(path.read_text().splitlines()[0])
    lines(path, [first | broken])
    with pytest.raises(NestlingError, match=words):
        make_tasks(parse_tasks([f"{name}:file={path}"]), Overrides(execute=True), 0)


def test_the_options_of_a_task_go_before_those_of_the_command_line(tmp_path: Path) -> None:
    file = math_file(tmp_path, "math-500")
    given = Overrides(problems=3, samples=2, temperature=0.9, max_tokens=7, ks=(2,))
    (task,) = make_tasks(parse_tasks([f"math:file={file},samples=5,top_p=0.5"]), given, 0)
    assert isinstance(task, Solving)
    assert (len(task.problems), task.samples, task.ks) == (3, 5, (2,))
    assert (task.sampling.temperature, task.sampling.top_p, task.sampling.max_tokens) == (0.9, 0.5, 7)
    with pytest.raises(NestlingError, match="unknown option 'sample'; did you mean 'samples'"):
        make_tasks(parse_tasks([f"math:file={file},sample=5"]), replace(given, ks=()), 0)


def test_a_verifier_that_runs_the_answer_must_be_allowed() -> None:
    for name in ("spiral_matrix", "countdown", "polynomial_multiplication"):
        spec = Spec.parse(f"{name}:problems=2")
        with pytest.raises(NestlingError, match=f"task {name} hands what the model writes to Python's eval"):
            solving(spec, Overrides(), 0)
        solving(spec, Overrides(execute=True), 0)
    solving(Spec.parse("word_sorting:problems=2"), Overrides(), 0)
