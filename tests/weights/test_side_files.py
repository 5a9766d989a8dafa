"""Side files that people edited: a wrong one is one clear line on every verb that opens it, whatever was done to it."""

import contextlib
import io
import json
import re
import shutil
import signal
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import nestling
import stock
from nestling import cli
from nestling.arch.submodel import Submodel
from nestling.errors import NestlingError
from nestling.tokenizer import character_tokenizer, save_tokenizer
from nestling.weights.elastic import open_elastic, sidecar
from nestling.weights.ranking import FILE as RANKING
from nestling.weights.ranking import read_ranking
from nestling.weights.slicing import plan_slices
from nestling.weights.transform import permute
from nestling.weights.verify import verify
from strategies import ranking

MODEL = replace(stock.TINY, hybrid_override_pattern="M*--", vocab_size=24)
HALF = Submodel(hidden_size=8, intermediate_size=16, mamba_num_heads=2)
EVALUATION = {"task": "sums", "exact_match": 0.5, "interval": [0.4, 0.6], "problems": 9, "backend": "x"}
SIDE_FILES = {
    "nestling.json": "elastic",
    "config.json": "elastic",
    "generation_config.json": "elastic",
    "model.safetensors.index.json": "elastic",
    "nestling-slice.json": "cut",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`elastic`, ranked, in shards, with a tokenizer, sizes and what they scored; `cut` out of it, padded."""
    home = tmp_path_factory.mktemp("home")
    stock.save(MODEL, home / "parent")
    save_tokenizer(character_tokenizer(), home / "parent")
    plain = ranking(MODEL, 0, "dfhpq")
    scores = {key: -np.argsort(order).astype(np.float32) for key, order in plain.orders.items()}
    scores["layers"] = np.ones(4, np.float32)
    measured = replace(plain, scores=scores, stability=dict.fromkeys(scores, 0.5), rounds=np.ones((1, 4), np.float32))
    permute(home / "parent", measured, home / "one")
    nestling.slice(home / "one", None, home / "elastic", shard_bytes=9000)
    (home / "elastic" / "nestling-slice.json").unlink()
    shutil.copy(home / "one" / RANKING, home / "elastic")
    budgets = {"100%": Submodel(), "Half": open_elastic(home / "one").submodel(HALF)}
    about = sidecar(MODEL, budgets, {"seconds": 3, "samples": 9, "data": [{"file": "x"}], "recipe": {"a": [1]}})
    about["budgets"]["Half"]["evaluations"] = [EVALUATION]
    (home / "elastic" / "nestling.json").write_text(json.dumps(about | {"xxh3_128": {}}))
    nestling.slice(home / "elastic", {"intermediate_size": [20, 12]}, home / "cut", hetero="pad")
    return home


@pytest.fixture
def elastic(home: Path, tmp_path: Path) -> Path:
    return shutil.copytree(home / "elastic", tmp_path / "elastic")


@pytest.fixture
def cut(home: Path, tmp_path: Path) -> Path:
    return shutil.copytree(home / "cut", tmp_path / "cut")


def change(file: Path, **changed: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


# ---- nestling-slice.json (nestling.json: test_open_elastic.py)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"format": 2}, "format 2 cannot be read; this version reads format 1"),
        ({"dtype": "F99"}, 'dtype is "F99"; allowed: null, BF16, F16, F32; correct it, or cut the slice again'),
        ({"dtype": 5}, "dtype is 5; allowed"),
        ({"dtype": [1]}, "dtype is [1]; allowed"),
        ({"submodel": [1]}, "submodel is [1]; allowed: an object"),
        ({"submodel": {"layers": 3}}, "sub-model: layers must be a list of layer indices, not 3"),
        ({"submodel": {"intermediate_size": [20, 99]}}, "sub-model: intermediate_size = 99 is outside 1 … 20"),
        (
            {"submodel": {"intermediate_size": [20, 12, 9]}},
            "sub-model: intermediate_size lists 3 sizes; the kept layers have 2",
        ),
        ({"xxh3_128": [1]}, "xxh3_128 is [1]; allowed: an object"),
        ({"source_hashes": {"a": "b"}}, 'source_hashes.a is "b"; allowed: 32 hexadecimal digits'),
        ({"hetero": "some"}, 'hetero is "some"; allowed: auto, pad, code'),
        ({"budget": 3}, "budget is 3; allowed: a text or null"),
        ({"attends": "yes"}, 'attends is "yes"; allowed: true or false'),
        ({"parameters": 1.5}, "parameters is 1.5; allowed: an integer, zero or above"),
        ({"provenance": None}, "provenance is null; allowed: an object"),
    ],
)
def test_records_refused(cut: Path, home: Path, changed: dict[str, Any], words: str) -> None:
    change(cut / "nestling-slice.json", **changed)
    for open_ in (lambda: open_elastic(cut), lambda: verify(cut, home / "elastic"), lambda: plan_slices(cut, {})):
        with pytest.raises(NestlingError, match=re.escape(f"nestling-slice.json: {words}")):
            open_()


@pytest.mark.parametrize("missing", ["submodel", "hetero", "by", "parameters"])
def test_records_without_what_they_need_are_refused(cut: Path, missing: str) -> None:
    record = json.loads((cut / "nestling-slice.json").read_text())
    del record[missing]
    (cut / "nestling-slice.json").write_text(json.dumps(record))
    with pytest.raises(NestlingError, match=f"slice.json: '{missing}' is missing; correct it, or cut the slice again"):
        open_elastic(cut)


def test_keys_of_others_are_left_alone(cut: Path) -> None:
    change(cut / "nestling-slice.json", mine=[{"x": None}])
    assert open_elastic(cut).record["mine"] == [{"x": None}]


# ---- ranking.safetensors


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("order.layers", None, "is not a ranking: order.layers is missing"),
        ("order.layers", np.arange(4.0), "order.layers is float64[4], must be integers [layers]"),
        ("order.layers", np.arange(4).reshape(2, 2), "order.layers is int64[2, 2], must be integers [layers]"),
        ("order.layers", np.zeros(0, np.int64), "order.layers is int64[0], must be integers [layers]"),
        ("order.layers", np.array([0, 1, 2, 4]), "order.layers does not name every position once"),
        ("order.layers", np.array([0, 1, 1, 2]), "order.layers does not name every position once"),
        ("order.layers", np.array([-1, 0, 1, 2]), "order.layers does not name every position once"),
        ("order.layers", np.arange(3), "of another model: it orders 3 layers, the model has 4"),
        ("order.d", np.full(16, np.nan), "order.d is float64[16], must be integers [size] or [outer, size]"),
        ("order.h.0", np.zeros((1, 1, 2), np.int64), "order.h.0 is int64[1, 1, 2], must be integers"),
        ("order.h.0", np.array([[0, 0], [0, 1]]), "order.h.0 does not name every position once"),
        ("score.d", np.full(16, np.nan, np.float32), "score.d is not finite"),
        ("stability.d", np.zeros(0, np.float32), "stability.d is float32[0], must be one float"),
        ("stability.d", np.array([2.0], np.float32), "stability.d = 2.0 is no correlation"),
    ],
)
def test_rankings_refused(elastic: Path, name: str, array: np.ndarray | None, words: str) -> None:
    stored = {**load_file(elastic / RANKING), name: array}
    save_file({name: array for name, array in stored.items() if array is not None}, elastic / RANKING)
    with pytest.raises(NestlingError, match=re.escape(RANKING) + ".*" + re.escape(words)):
        open_elastic(elastic).submodel("75%")


def test_a_ranking_is_read_as_it_was_written(home: Path) -> None:
    stored, found = load_file(home / "elastic" / RANKING), read_ranking(home / "elastic")
    assert found is not None
    assert found.layers == tuple(stored["order.layers"].tolist())
    assert all((order == stored[f"order.{key}"]).all() for key, order in found.orders.items())
    assert found.stability == dict.fromkeys(found.scores, 0.5)


# ---- anything at all

RAW = "@@raw@@"
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 40),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from([10**12, 10**30, 10**400, -(10**400), 1e308, "layers", "F99", "moe", "../x", "\ud800", "a\nb"]),
)
JSON = st.recursive(
    ODD, lambda item: st.lists(item, max_size=3) | st.dictionaries(st.text(max_size=3), item), max_leaves=5
)
SPELLED = st.sampled_from(["NaN", "-Infinity", "1e999", "9" * 5000, "[" * 90 + "]" * 90, "[" * 900 + "]" * 900])
TORN = st.sampled_from(['{"a":' * 20_000, "[" * 50_000, "", "\ufeff", "{} {}", "'"])


def nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from nodes(item)


@st.composite
def damaged(draw: st.DrawFn, text: str) -> str:
    """A JSON text with one node replaced by any other value, taken away, doubled or torn."""
    value = json.loads(text)
    places = list(nodes(value))
    container, key = draw(st.sampled_from(places))
    how = draw(st.sampled_from(["odd", "odd", "other", "spelled", "missing", "twice", "cut", "torn"]))
    if how == "cut":
        return text[: draw(st.integers(0, len(text) - 1))]
    if how == "torn":
        return draw(TORN)
    if how == "twice":
        return f"{{{json.dumps(draw(st.sampled_from(sorted(value))))}: {json.dumps(draw(JSON))}, {text.lstrip()[1:]}"
    if how == "missing":
        del container[key]
    elif how == "other":
        other, place = draw(st.sampled_from(places))
        container[key] = json.loads(json.dumps(other[place]))
    else:
        container[key] = draw(JSON) if how == "odd" else RAW
    return json.dumps(value).replace(json.dumps(RAW), draw(SPELLED))


def nestling_(*arguments: object) -> tuple[int, str]:
    """Exit code and standard error of a command run in this process; any exception but an exit goes on."""
    err, handler = io.StringIO(), signal.getsignal(signal.SIGTERM)
    with (
        mock.patch("sys.argv", ["nestling", *map(str, arguments)]),
        contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main()
    signal.signal(signal.SIGTERM, handler)
    return int(ended.value.code or 0), err.getvalue()


def run_or_refused(commands: list[tuple[object, ...]]) -> bool:
    """Whether every command ran; a refused one says so in one line and exits 2."""
    ran = True
    for command in commands:
        code, err = nestling_(*command)
        assert code in (0, 2), command
        assert code == 0 or re.fullmatch(r"nestling: [^\n]+\n", err), err
        ran = ran and code == 0
    return ran


def commands(name: str, directory: Path, home: Path, out: Path) -> list[tuple[object, ...]]:
    """What opens the directory and looks at this file of it."""
    prompt = ("generate", directory, "--prompt", "1+1=", "--max-tokens", 1)
    if name == "generation_config.json":
        return [prompt]
    return [
        ("plan", directory),
        ("slice", directory, "--budget", "100%", "--out", out, "--overwrite"),
        ("slice", directory, "--budget", "half", "--budget", "80%", "--out", f"{out}-{{budget}}", "--overwrite"),
        ("verify", directory),
        ("verify", directory, "--inside", home / "elastic"),
        ("verify", home / "cut", "--inside", directory),
        ("rank", directory, "--inspect", "--out", f"{out}.html"),
        *([prompt] if name == "config.json" else []),
    ]


@pytest.mark.parametrize("name", SIDE_FILES)
def test_any_damage_to_a_side_file_is_read_or_refused_by_every_verb(home: Path, tmp_path: Path, name: str) -> None:
    directory = shutil.copytree(home / SIDE_FILES[name], tmp_path / "model")
    good = (directory / name).read_text()
    told = {True: 0, False: 0}

    @settings(max_examples=15)
    @given(damaged(good))
    def check(text: str) -> None:
        (directory / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        told[run_or_refused(commands(name, directory, home, tmp_path / "out"))] += 1

    check()
    assert told[False], told


def test_any_damage_to_a_ranking_is_read_or_refused(home: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(home / "elastic", tmp_path / "model")
    stored = load_file(directory / RANKING)
    arrays = st.sampled_from(
        [*stored.values(), np.zeros((2, 2)), np.zeros(0), np.array(1.0), np.full(16, np.inf, np.float32)]
    )
    told = {True: 0, False: 0}

    @settings(max_examples=25)
    @given(st.sampled_from(sorted(stored)), arrays, st.booleans(), st.data())
    def check(name: str, array: np.ndarray, flip: bool, data: st.DataObject) -> None:
        save_file(stored if flip else {**stored, name: array}, directory / RANKING)
        if flip:
            broken = bytearray((directory / RANKING).read_bytes())
            length = 8 + struct.unpack("<Q", broken[:8])[0]
            broken[data.draw(st.integers(0, length + 60))] ^= 1 << data.draw(st.integers(0, 7))
            (directory / RANKING).write_bytes(broken)
        wish = ("slice", directory, "--budget", "80%", "--out", tmp_path / "out", "--overwrite")
        told[run_or_refused([wish, ("rank", directory, "--inspect", "--out", tmp_path / "page.html")])] += 1

    check()
    assert all(told.values()), told
