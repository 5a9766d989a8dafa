"""Calibration texts and chats: read in a stream, mixed by weight, counted, and refused with their line."""

import json
import weakref
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from nestling.data.lines import sha256
from nestling.errors import NestlingError
from nestling.tokenizer import character_tokenizer, save_tokenizer
from nestling.train.calibration import Source, Texts, open_texts

TOKENS = character_tokenizer()


def text(ids: list[int]) -> str:
    return "".join({0: "_", 1: "$"}.get(token) or TOKENS.id_to_token(token) for token in ids)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with a tokenizer, which is all that reading texts needs."""
    (tmp_path / "model").mkdir()
    save_tokenizer(TOKENS, tmp_path / "model")
    return tmp_path / "model"


def lines(tmp_path: Path, *values: object, name: str = "texts.jsonl") -> Path:
    file = tmp_path / name
    file.write_text("".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values))
    return file


def read(
    file: Path | list[Source], model: Path, samples: int | None = None, length: int = 9, batch: int = 2, vocab: int = 16
) -> Texts:
    sources = file if isinstance(file, list) else [Source(file)]
    return open_texts(sources, model, vocab, samples, length, batch)


def test_texts_are_read_cut_padded_and_counted(tmp_path: Path, model: Path) -> None:
    file = lines(tmp_path, {"text": "1+2=3", "id": 1}, "", {"text": "7"}, {"text": "10+10=20"}, {"text": "5-5=0"})
    texts = read(file, model, length=6)
    (ids, real), (more, more_real) = texts
    assert [text(row) for row in ids.tolist()] == ["1+2=3_", "10+10="]  # one token is no text to predict
    assert real.tolist() == [[True] * 5 + [False], [True] * 6]
    assert [text(row) for row in more.tolist()] == ["5-5=0"]
    assert more_real.all()
    assert (len(texts), texts.samples, texts.tokens) == (2, 3, 5 + 6 + 5)
    assert [len(ids) for ids, _ in read(file, model, samples=1)] == [1]
    assert [ids.tolist() for ids, _ in texts] == [ids.tolist(), more.tolist()]  # every pass reads the same


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "has no text of at least two tokens"),
        (["", " "], "has no text of at least two tokens"),
        ([{"text": "7"}], "has no text of at least two tokens"),
        ([{"text": "1+1=2"}, "", "{oops"], "line 3: not valid JSON"),
        ([{"text": "1+1=2"}, "[" * 100_000], "line 2: not valid JSON"),
        ([{"text": "1+1=2"}, ["1+1"]], 'line 2: needs an object with a "text" string'),
        ([{"texts": "1+1=2"}], 'line 1: needs an object with a "text" string'),
        ([{"text": "1+1=2"}, {"text": "one 1"}], "line 2: 'one 1' has characters"),
        ([{"text": 5}], 'line 1: needs an object with a "text" string'),
        ([{"messages": []}], 'line 1: needs an object with a "text" string or a list of "messages"'),
        ([{"messages": ["hello"]}], 'line 1: needs an object with a "text" string or a list of "messages"'),
    ],
)
def test_bad_texts_are_refused_with_their_line(tmp_path: Path, model: Path, values: list[object], words: str) -> None:
    with pytest.raises(NestlingError) as caught:
        read(lines(tmp_path, *values), model)
    assert words in str(caught.value)
    assert "texts.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_binary_file_and_a_small_vocabulary_are_refused(tmp_path: Path, model: Path) -> None:
    with pytest.raises(NestlingError, match="none: cannot be read: No such file"):
        read(tmp_path / "none", model)
    (tmp_path / "binary").write_bytes(b'{"text": "1+1"}\n\xff\xfe\x00')
    with pytest.raises(NestlingError, match="binary, line 2: cannot be read: not UTF-8 text"):
        read(tmp_path / "binary", model)
    with pytest.raises(NestlingError, match="line 1: token 15 is outside the model's vocabulary of 15"):
        read(lines(tmp_path, {"text": "1;2"}), model, vocab=15)


def test_fewer_samples_than_asked_for_are_refused_and_without_a_number_all_are_used(
    tmp_path: Path, model: Path
) -> None:
    file = lines(tmp_path, *[{"text": f"{n}+1={n + 1}"} for n in range(5)])
    with pytest.raises(NestlingError, match="only 5 samples of at least two tokens, 6 were asked for.*--samples 5"):
        read(file, model, samples=6)
    assert read(file, model, samples=5).samples == 5
    assert read(file, model).samples == 5
    many = lines(tmp_path, *[{"text": "1+1=2"}] * 1030, name="many.jsonl")
    assert read(many, model, batch=100).samples == 1024


# ---- several files


def test_files_are_mixed_by_weight_from_the_first_batch_on(tmp_path: Path, model: Path) -> None:
    files = [lines(tmp_path, *[{"text": f"{digit}{digit}"}] * 40, name=f"{digit}.jsonl") for digit in (1, 2, 3)]
    sources = [Source(files[0], 3), Source(files[1], 1), Source(files[2], 0.5)]
    texts = read(sources, model, samples=45, batch=9)
    assert texts.taken == (30, 10, 5)
    for ids, _ in texts:  # every batch of 9 holds the shares 6 : 2 : 1
        assert Counter(text(row) for row in ids.tolist()) == {"11": 6, "22": 2, "33": 1}
    record = texts.to_json()
    assert [(f["file"], f["weight"], f["samples"]) for f in record["data"]] == [
        (str(s.file), s.weight, n) for s, n in zip(sources, (30, 10, 5), strict=True)
    ]
    assert record["data"][0]["sha256"] == sha256(files[0])
    with pytest.raises(NestlingError, match="only 60 samples .* in the proportion asked for, 90 were asked for"):
        read(sources, model, samples=90)  # the first file has 40 of the 60 it would have to give


def test_a_source_is_a_file_and_perhaps_a_weight(tmp_path: Path) -> None:
    assert Source.parse("a.jsonl") == Source(Path("a.jsonl"))
    assert Source.parse("a=b.jsonl=0.3") == Source(Path("a=b.jsonl"), 0.3)
    (tmp_path / "x=2").touch()
    assert Source.parse(str(tmp_path / "x=2")) == Source(tmp_path / "x=2")
    for bad in ("a.jsonl=0", "a.jsonl=-1", "a.jsonl=inf", "a.jsonl=nan", "a.jsonl=much"):
        with pytest.raises(NestlingError, match="must be a number above 0"):
            Source.parse(bad)


# ---- chats

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "{{ {'user': '+', 'assistant': '='}[m['role']] }}{{ m['content'] }}{% endfor %}"
)


def test_chats_go_through_the_models_template(tmp_path: Path, model: Path) -> None:
    pytest.importorskip("transformers")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    chat = {"messages": [{"role": "user", "content": "1;2"}, {"role": "assistant", "content": "3"}]}
    ((ids, _),) = read(lines(tmp_path, chat, {"text": "7=7"}), model)
    assert [text(row) for row in ids.tolist()] == ["+1;2=3", "7=7___"]
    refused = {"messages": [{"role": "robot", "content": "1"}]}
    with pytest.raises(NestlingError, match="line 2: the model's chat template refuses this: no robots"):
        read(lines(tmp_path, chat, refused), model)


def test_a_tokenizers_own_tokens_go_around_texts_and_not_around_chats(tmp_path: Path, model: Path) -> None:
    pytest.importorskip("transformers")
    tokenizer = character_tokenizer()
    tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    save_tokenizer(tokenizer, model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    chat = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "3"}]}
    ((ids, _),) = read(lines(tmp_path, chat, {"text": "7=7"}), model)
    assert [text(row) for row in ids.tolist()] == ["+1=3", "$7=7"]


def test_chats_need_a_template(tmp_path: Path, model: Path) -> None:
    pytest.importorskip("transformers")
    chat = {"messages": [{"role": "user", "content": "1+2"}]}
    with pytest.raises(NestlingError, match="has no chat template; give lines with"):
        read(lines(tmp_path, chat), model)


# ---- streaming


def test_no_batch_is_kept_and_no_line_is_read_before_its_batch(tmp_path: Path, model: Path) -> None:
    texts = read(lines(tmp_path, *[{"text": f"{n}+{n}"} for n in range(400)]), model)
    seen: list[str] = []
    counted = Texts(texts.sources, lambda line, where: seen.append(line) or texts.encode(line, where), 400, 4, 9)
    alive, most = weakref.WeakSet[object](), 0
    for index, (ids, _) in enumerate(counted):
        alive.add(ids)
        most = max(most, len(alive))
        assert len(seen) <= 4 * (index + 1)
    assert index == 99
    assert most <= 2
    assert len(list(islice(counted, 1))) == 1
