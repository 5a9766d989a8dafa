"""Outputs are kept line by line; a torn line is dropped, another setting is noticed; task names and data files."""

import json
from pathlib import Path
from typing import Any

import pytest

from nestling.errors import NestlingError
from nestling.evaluate.journal import Journal, difference
from nestling.evaluate.rows import read_rows
from nestling.evaluate.spec import Spec, parse_tasks
from talking import lines

SETTINGS: dict[str, Any] = {"task": "t", "sampling": {"temperature": 0.6}, "batch": 4}


def test_what_was_written_is_there_again_and_a_torn_line_is_not(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "t.jsonl", SETTINGS)
    assert journal.open() == {}
    records = [{"item": item, "sample": 0, "generated": "é\n\ud800"} for item in range(3)]
    journal.append(records[:2])
    journal.append(records[2:])
    assert list(journal.open().values()) == records
    whole = journal.path.read_bytes()
    for cut in range(1, len(whole.splitlines(keepends=True)[-1])):
        journal.path.write_bytes(whole[:-cut])
        assert list(journal.open()) == [(0, 0), (1, 0)]
        journal.append(records[2:])
        assert list(journal.open().values()) == records
    assert journal.open(overwrite=True) == {}


def test_another_setting_is_noticed_and_named(tmp_path: Path) -> None:
    Journal(tmp_path / "t.jsonl", SETTINGS).open()
    changed = SETTINGS | {"sampling": {"temperature": 0}}
    with pytest.raises(NestlingError, match=r"sampling\.temperature was 0\.6 and is 0; .*--overwrite"):
        Journal(tmp_path / "t.jsonl", changed).open()
    assert difference({"a": 1}, {"a": 1}) is None
    assert difference({"a": 1}, {"a": 1, "b": 2}) == "b was null and is 2"
    (tmp_path / "x.jsonl").write_text('{"item": 0}\n')
    with pytest.raises(NestlingError, match="is not the record of an evaluation"):
        Journal(tmp_path / "x.jsonl", SETTINGS).open()
    (tmp_path / "y.jsonl").write_text('{"settings": {}}\n{broken\n{}\n')
    with pytest.raises(NestlingError, match="line 2: broken JSON"):
        Journal(tmp_path / "y.jsonl", SETTINGS).open()


# ---- names


def test_tasks_and_their_options_share_one_line() -> None:
    found = parse_tasks(["a,b:x=1,y=two,c", "d:file=/x/y z.jsonl", "e,temperature=0.5"])
    assert [(spec.name, spec.options) for spec in found] == [
        ("a", {}),
        ("b", {"x": "1", "y": "two"}),
        ("c", {}),
        ("d", {"file": "/x/y z.jsonl"}),
        ("e", {"temperature": "0.5"}),
    ]
    assert Spec.parse(str(found[1])) == found[1]


@pytest.mark.parametrize(
    ("text", "words"), [("a:b", "'b' has no value"), ("a,a", "names a twice"), ("a:x=1,a:x=1", "names a:x=1 twice")]
)
def test_what_is_no_task_is_refused(text: str, words: str) -> None:
    with pytest.raises(NestlingError, match=words):
        parse_tasks([text])


def test_options_are_checked() -> None:
    spec = Spec("t", {"samples": "3", "top_p": "0.5", "bad": "x", "on": "maybe"})
    assert (spec.number("samples", 1, 1), spec.number("top_p", 1.0), spec.number("other", 7)) == (3, 0.5, 7)
    for key, default, least in (("bad", 1, 0), ("samples", 1, 4), ("top_p", 1, 0)):
        with pytest.raises(NestlingError, match=f"{key}=.* must be a number"):
            spec.number(key, default, least)
    with pytest.raises(NestlingError, match="unknown option 'samples'; did you mean 'sample'"):
        spec.check(["sample", "top_p", "bad", "on"])


# ---- data files


def test_rows_are_the_same_from_every_format(tmp_path: Path) -> None:
    records = [{"q": 'a "b", c\nd', "n": "1", "l": '["x", "y"]'}, {"q": "é", "n": "2", "l": '["z", "w"]'}]
    lines(tmp_path / "a.jsonl", records)
    (tmp_path / "a.json").write_text(json.dumps(records))
    quoted = ['"a ""b"", c\nd",1,"[""x"", ""y""]"', 'é,2,"[""z"", ""w""]"']
    (tmp_path / "a.csv").write_text("\n".join(["q,n,l", *quoted]) + "\n", encoding="utf-8-sig")
    names = ["a.jsonl", "a.json", "a.csv"]
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        pass
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
        names.append("a.parquet")
    for name in names:
        rows = read_rows(tmp_path / name, ("q", "l"))
        assert [row.values for row in rows] == records, name
        assert rows[0].texts("l") == ["x", "y"]
    assert len(read_rows(tmp_path / "a.csv", ("q",), 1)) == 1


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", '{"q": "x"}\n{"p": "y"}\n', "line 2: has no 'q'"),
        ("a.jsonl", '{"q": "x"\n', "line 1: not valid JSON"),
        ("a.jsonl", "[1]\n", "line 1: must be a JSON object"),
        ("a.jsonl", "\n", "has no problems"),
        ("a.json", "[1]", "must hold a list of objects"),
        ("a.txt", "x", "must end in one of .jsonl"),
        ("b.jsonl", None, "cannot be read"),
    ],
)
def test_a_data_file_that_cannot_be_used_is_refused(tmp_path: Path, name: str, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(NestlingError, match=words):
        read_rows(tmp_path / name, ("q",))


def test_a_missing_answer_is_refused_with_its_line(tmp_path: Path) -> None:
    rows = read_rows(lines(tmp_path / "a.jsonl", [{"q": "x"}, {"q": " "}, {"q": None}]), ("q",))
    assert rows[0].text("q") == "x"
    for row in rows[1:]:
        with pytest.raises(NestlingError, match=r"line [23]: 'q' is missing or empty"):
            row.text("q")
    with pytest.raises(NestlingError, match="has only 3 problems; 4 were asked for"):
        read_rows(tmp_path / "a.jsonl", ("q",), 4)
