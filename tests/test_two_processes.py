"""rank and eval in two processes say what one process says, bit for bit; one that fails does not leave the other."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import talking
import two_processes
from nestling import cli, ranks
from nestling.evaluate.evaluation import make_tasks
from nestling.evaluate.journal import Journal
from nestling.evaluate.spec import parse_tasks
from nestling.evaluate.suite import Overrides
from nestling.train.calibration import Texts

TEXTS = [f"{n} and {n * n} are {n + n * n}" * (1 + n % 3) for n in range(23)]
CHOICES = [{"question": f"{n} + 1 is", "choices": [str(n), str(n + 1), "none"], "answer": n % 3} for n in range(11)]
SOLVED = [{"problem": f"{n} + {n}", "answer": str(n)} for n in range(13)]


def tell(*command: object) -> list[str]:
    return ["nestling", *map(str, command)]


def alone(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> int:
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    code = ended.value.code
    assert isinstance(code, int)
    return code


def arrays(directory: Path) -> dict[str, bytes]:
    with safe_open(directory / "ranking.safetensors", framework="np") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118 - not a dict


def results(out: Path) -> dict[str, Any]:
    """Every result and output, times aside."""
    found: dict[str, Any] = {}
    for file in sorted(out.rglob("*.json")):
        result = json.loads(file.read_text())
        result["result"].pop("tokens_per_second", None)
        found[str(file.relative_to(out))] = {k: v for k, v in result.items() if k not in ("command", "time")}
    for file in sorted(out.rglob("*.jsonl")):
        records = [
            {k: v for k, v in json.loads(line).items() if k != "seconds"} for line in file.read_text().splitlines()
        ]
        found[str(file.relative_to(out))] = sorted(records, key=lambda record: (record.get("item", -1), str(record)))
    return found


def stop_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the next ranking of this process."""
    whole = Texts.__iter__

    def interrupted(self: Texts) -> Iterator[Any]:
        for index, batch in enumerate(whole(self)):
            if index == batches:
                monkeypatch.setattr(Texts, "__iter__", whole)
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(Texts, "__iter__", interrupted)


def begin(done: Path, out: Path) -> Path:
    """What is left of an evaluation whose two processes were killed: some outputs of each."""
    head, *records = done.read_text().splitlines(keepends=True)
    journal = out / done.parent.name / done.name
    journal.parent.mkdir(parents=True)
    journal.write_text("".join([head, *records[:6]]))
    journal.with_name(f"{done.stem}.rank1.jsonl").write_text("".join([head, *records[8:15]])[:-9])
    return out


def test_ranking_and_evaluating_in_two_processes_is_as_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = talking.family(tmp_path)
    texts = talking.lines(tmp_path / "texts0.jsonl", [{"text": text} for text in TEXTS])
    choices = talking.lines(tmp_path / "choices.jsonl", CHOICES)
    solved = talking.lines(tmp_path / "solved.jsonl", SOLVED)
    ranking = tell(
        "rank", model, "--data", texts, "--batch", 2, "--max-drop", 2, "--metric", "attention_heads=ablation"
    )
    tasks = [f"perplexity:file={texts},window=16", f"choices:file={choices}", f"math:file={solved},samples=3"]
    judging = tell(
        "eval", model, "--budget", "all", *(part for task in tasks for part in ("--tasks", task)),
        "--batch", 4, "--temperature", 1.0, "--max-tokens", 5,
    )  # fmt: skip
    assert alone(monkeypatch, [*ranking, "--out", str(tmp_path / "one")]) == 0
    assert alone(monkeypatch, [*judging, "--out", str(tmp_path / "results-one")]) == 0
    stop_after(9, monkeypatch)
    assert alone(monkeypatch, [*ranking, "--out", str(tmp_path / "resumed")]) == 130
    (done,) = (tmp_path / "results-one" / "100").glob("math*.jsonl")
    begun = begin(done, tmp_path / "begun")
    capsys.readouterr()

    first, second = two_processes.run(
        [*ranking, "--out", str(tmp_path / "two")],
        [*ranking, "--out", str(tmp_path / "resumed")],
        [*judging, "--out", str(tmp_path / "results-two")],
        [*judging, "--out", str(begun)],
        tell("rank", model, "--data", tmp_path / "texts{rank}.jsonl", "--out", tmp_path / "none"),
    )
    assert [said.code for said in (*first, *second)] == 2 * [0, 0, 0, 0, 2], (first, second)
    assert [(said.out, said.err) for said in second[:4]] == [("", "")] * 4
    assert "ranked, the same function as" in first[0].out
    assert "going on where it was stopped (8 batches are saved)" in first[1].err
    assert len(first[2].out.splitlines()) == 2 * len(tasks)
    for out in ("two", "resumed"):
        assert arrays(tmp_path / out) == arrays(tmp_path / "one")
        assert (tmp_path / out / "model.safetensors").read_bytes() == (tmp_path / "one/model.safetensors").read_bytes()
        assert not (tmp_path / f".{out}.rank-state").exists()
    assert results(tmp_path / "results-two") == results(tmp_path / "results-one") == results(begun)
    lost = "another of the processes has ended or is out of reach; its own message says why, if it could leave one"
    assert first[4].err == f"nestling: {lost}\n"
    assert second[4].err == f"nestling: {tmp_path / 'texts1.jsonl'}: cannot be read: No such file or directory\n"
    assert not (tmp_path / "none").exists()


def test_of_three_processes_each_does_its_own_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = talking.subject(talking.family(tmp_path))
    files = {
        "perplexity": talking.lines(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS]),
        "choices": talking.lines(tmp_path / "choices.jsonl", CHOICES),
        "math": talking.lines(tmp_path / "solved.jsonl", SOLVED),
    }
    specs = parse_tasks([f"{name}:file={file}" for name, file in files.items()])
    for task in make_tasks(specs, Overrides(max_tokens=2), 0):
        shares = []
        for rank in range(3):
            monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(ranks, "size", lambda: 3)
            journal = Journal(tmp_path / f"{task.name[:4]}{rank}", {})
            shares.append(task.run(subject, journal, {}, 3, 0, lambda done, note="": None))
        assert all(shares)
        assert sorted(key for share in shares for key in share) == [(item, 0) for item in range(task.total)]


def test_in_one_process_all_is_as_if_there_were_no_others() -> None:
    with ranks.together():
        assert (ranks.rank(), ranks.size(), ranks.first()) == (0, 1, True)
        assert list(ranks.mine("abc")) == ["a", "b", "c"]
        assert ranks.gathered("x") == ["x"]
        assert ranks.of_first(lambda: "y") == "y"


def test_what_other_processes_wrote_is_taken_in_or_begun_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "t.jsonl", {"task": "t"})
    journal.open()
    rows = [{"item": item, "sample": 0} for item in range(4)]
    for rank in (1, 2):
        journal.part(rank).open()
        journal.part(rank).append(rows[rank : rank + 2])
    assert list(journal.open().values()) == rows[1:]
    assert [path.name for path in tmp_path.iterdir()] == ["t.jsonl"]
    journal.part(1).open()
    journal.part(1).append(rows[:1])
    assert journal.open(overwrite=True) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["t.jsonl"]


def test_what_is_wrong_with_a_recipe_is_said_once(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("out = 3\nnonsense = true\n")
    first, second = two_processes.run(tell("train", recipe), tell("run", recipe, "--quick"))
    assert [said.code for said in (*first, *second)] == 4 * [2]
    assert all(said.err.startswith(f"nestling: {recipe}: ") for said in first)
    assert [said.err for said in second] == ["", ""]


PATIENT = """
import pathlib, sys, time, torch
import stock
from nestling import ranks
from nestling.errors import NestlingError
from nestling.model.nemotron_h import NemotronH
from nestling.train.distributed import Layout, spread
from nestling.train.optimize import Optimization
import sharded_runs
given_up = pathlib.Path(sys.argv[1])
try:
    with ranks.together():
        model = spread(NemotronH(stock.TINY), sharded_runs.HOW, Layout(patience=0.1), trained=True)
        while ranks.rank() == 1 and not given_up.exists():
            time.sleep(0.1)
        if ranks.rank() == 0:
            model.hidden(torch.zeros(1, 3, dtype=torch.long))
except NestlingError as error:
    given_up.write_text(str(error))
"""


def test_who_answers_nothing_within_a_step_is_given_up(tmp_path: Path) -> None:
    two_processes.start(["-c", f"import sys; sys.path.append('train')\n{PATIENT}", str(tmp_path / "given up")])
    assert "another of the processes has ended or is out of reach" in (tmp_path / "given up").read_text()
