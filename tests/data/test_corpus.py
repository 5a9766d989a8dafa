"""Text of every kind becomes tokens, once; what cannot be used is refused with its place, or left out and counted."""

import json
import os
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from nestling.data import cache as module
from nestling.data import chat as chat_module
from nestling.data.corpus import Corpus, Shape, open_corpus
from nestling.errors import NestlingError
from nestling.tasks import Task, is_held_out, problems
from nestling.text_sections import DataSection
from nestling.tokenizer import character_tokenizer, save_tokenizer

TOKENS = character_tokenizer()


def text(ids: Any) -> str:
    return "".join({0: "_", 1: "$"}.get(token) or TOKENS.id_to_token(token) for token in map(int, ids))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    save_tokenizer(TOKENS, tmp_path / "model")
    return tmp_path / "model"


def write(file: Path, *values: object) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values))
    return file


def read(train: Any, model: Path, vocabulary: int = 16, said: list[str] | None = None, **options: Any) -> Corpus:
    section = DataSection(train=train if isinstance(train, list | dict) else str(train), **options)
    say = ([] if said is None else said).append
    return open_corpus(section, model, vocabulary, seed=0, cache=model.parent / "cache", say=say)


def documents(corpus: Corpus, source: int = 0) -> list[str]:
    tokens = corpus.sources[source][2]
    return [text(tokens.ids[a:b]) for a, b in zip(tokens.offsets, tokens.offsets[1:], strict=False)]


def learnt(corpus: Corpus, source: int = 0) -> str:
    """All tokens in a row, those that do not count as dots."""
    tokens = corpus.sources[source][2]
    marks = zip(text(tokens.ids), tokens.counted, strict=True)
    return "".join(letter if counts else "." for letter, counts in marks)


# ---- kinds of text


def test_lines_and_files_are_documents_that_end_with_the_end_token(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "data" / "b.jsonl", {"text": "1+1=2", "id": 1}, {"text": "3=3"})
    (tmp_path / "data" / "a.txt").write_text("10-9=1")
    corpus = read(tmp_path / "data" / "*", model)
    assert documents(corpus) == ["10-9=1$", "1+1=2$", "3=3$"]
    assert corpus.sources[0][2].all_counted
    assert corpus.tokens == 7 + 6 + 4
    (source,) = corpus.summary()["sources"]
    assert [Path(file["file"]).name for file in source["files"]] == ["a.txt", "b.jsonl"]
    assert (source["documents"], source["tokens"], source["skipped"]) == (3, 17, 0)
    before = corpus.summary()
    os.utime(tmp_path / "data" / "a.txt", (1, 1))
    assert read(tmp_path / "data" / "*", model).summary() == before  # it says what the text is, not when it was written
    corpus.data([Shape(1, 1, 4)])
    assert corpus.summary()["lengths"] == {"4": {"rows": 4, "split": 2, "dropped": 0, "empty": 0}}


def test_tokens_that_the_tokenizer_puts_around_a_text_are_kept_and_none_is_doubled(tmp_path: Path, model: Path) -> None:
    tokenizer = character_tokenizer()
    tokenizer.post_processor = TemplateProcessing(single="; $A <eos>", special_tokens=[("<eos>", 1), (";", 15)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=40)
    save_tokenizer(tokenizer, model)
    corpus = read(write(tmp_path / "x.jsonl", {"text": "1+1=2"}), model)
    assert documents(corpus) == [";1+1=2$"]


def test_problems_are_training_problems_and_their_solutions_count(tmp_path: Path, model: Path) -> None:
    pytest.importorskip("reasoning_gym")
    options = {"min_terms": 2, "max_terms": 2, "max_digits": 1}
    corpus = read({"task": "chain_sum", "problems": 5, "options": options}, model)
    task = Task("chain_sum", tuple(sorted(options.items())))
    first = [problem for problem, _ in zip(problems(task, 0, held_out=False), range(5), strict=False)]
    assert documents(corpus) == [problem.prompt + problem.solution + "$" for problem in first]
    assert learnt(corpus) == "".join("." * len(problem.prompt) + problem.solution + "$" for problem in first)
    assert not any(is_held_out(document.split("=")[0] + "=") for document in documents(corpus))


@pytest.mark.filterwarnings("ignore")  # of the library's own pickling
def test_datasets_on_disk_are_texts_or_chats(tmp_path: Path, model: Path) -> None:
    datasets = pytest.importorskip("datasets")
    values = {"text": ["1+1=2", "3=3"], "other": ["5=5", "7;7"]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(values)}).save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    datasets.Dataset.from_dict(values).to_parquet(tmp_path / "files" / "train.parquet")
    assert documents(read({"dataset": str(tmp_path / "saved")}, model)) == ["1+1=2$", "3=3$"]
    for place in ("saved", "files"):
        corpus = read({"dataset": str(tmp_path / place), "column": "other"}, model)
        assert documents(corpus) == ["5=5$", "7;7$"]
    for name in ("empty", "broken", "half/train"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "broken" / "train.parquet").write_text("no parquet")
    (tmp_path / "half" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    for given, words in (
        ({"dataset": str(tmp_path / "saved"), "column": "txt"}, "has no column 'txt'; did you mean 'text'?"),
        ({"dataset": str(tmp_path / "saved"), "split": "test"}, "has no split 'test'; allowed: train"),
        ({"dataset": str(tmp_path / "empty")}, "empty cannot be read as a dataset"),
        ({"dataset": str(tmp_path / "broken")}, "broken cannot be read as a dataset"),
        ({"dataset": str(tmp_path / "half")}, "half cannot be read as a dataset"),
    ):
        with pytest.raises(NestlingError, match=words):
            read(given, model)


def test_files_by_format_are_streamed_and_give_what_the_same_files_give(tmp_path: Path, model: Path) -> None:
    pytest.importorskip("datasets")
    for number in range(3):
        write(tmp_path / "parts" / f"{number}.jsonl", {"text": f"{number}={number}"}, {"text": f"{number};{number}"})
    pattern = str(tmp_path / "parts" / "*.jsonl")
    plain = documents(read({"files": pattern}, model))
    assert len(plain) == 6
    assert documents(read({"dataset": "json", "data_files": pattern, "streaming": True}, model)) == plain
    assert documents(read({"dataset": "json", "data_files": pattern, "limit": 4}, model)) == plain[:4]
    write(tmp_path / "parts" / "0.jsonl", {"text": "9=9"})  # the cache is of what the files hold
    assert documents(read({"dataset": "json", "data_files": pattern, "limit": 4}, model))[0] == "9=9$"
    for given, words in (
        ({"dataset": "json"}, "dataset = 'json' is a format; data_files says which files"),
        ({"dataset": "json", "data_files": str(tmp_path / "none" / "*.jsonl")}, "matches no file"),
        ({"dataset": "json", "data_files": pattern, "column": "txt"}, "has no column 'txt'; did you mean 'text'"),
        ({"dataset": "json", "data_files": pattern, "split": "test"}, "has no split 'test'; allowed: train"),
    ):
        with pytest.raises(NestlingError, match=words):
            read(given, model)


def test_an_endless_stream_from_a_hub_is_read_up_to_its_limit(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    asked, drawn = [], []

    def endless() -> Any:
        for number in count():
            drawn.append(number)
            yield {"text": f"{number}={number}"}

    def hub(name: str, config: str | None, **how: Any) -> Any:
        asked.append((name, config, how["revision"], how["streaming"]))
        return datasets.IterableDatasetDict({"train": datasets.IterableDataset.from_generator(endless)})

    monkeypatch.setattr(datasets, "load_dataset", hub)
    given = {"dataset": "owls/sums", "config": "easy", "revision": "v1", "limit": 3, "streaming": True}
    assert documents(read(given, model)) == ["0=0$", "1=1$", "2=2$"]
    assert set(asked) == {("owls/sums", "easy", "v1", True)}
    assert max(drawn) <= 3
    calls = len(asked)
    read(given, model)  # from the cache
    assert len(asked) == calls
    with pytest.raises(NestlingError, match="owls/sums is not a directory; .* set streaming = true"):
        read({"dataset": "owls/sums", "limit": 2}, model)


def test_a_hub_that_cannot_be_reached_is_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'owls/sums' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(NestlingError, match="Couldn't reach .*; no directory here is called 'owls/sums', so a hub was"):
        read({"dataset": "owls/sums", "streaming": True}, model)


@pytest.mark.filterwarnings("ignore")
def test_datasets_may_hold_chats(tmp_path: Path, model: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("transformers")
    (model / "chat_template.jinja").write_text(PLAIN)
    datasets.Dataset.from_dict({"turns": [CHAT["messages"], CHAT["messages"][:2]]}).save_to_disk(tmp_path / "saved")
    corpus = read({"dataset": str(tmp_path / "saved"), "column": "turns"}, model, loss_on="assistant")
    assert documents(corpus) == ["+1;-22;+3;-4;", "+1;-22;"]
    assert learnt(corpus) == "....22;....4;" + "....22;"


def test_a_dataset_that_is_not_there_or_not_supported_is_refused(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(NestlingError, match=r"pip install 'nestling\[datasets\]'"):
        read({"dataset": str(tmp_path)}, model)
    monkeypatch.setitem(__import__("sys").modules, "datasets", np)
    with pytest.raises(NestlingError, match="nowhere is not a directory; .* or set streaming = true"):
        read({"dataset": "nowhere"}, model)


def test_a_blend_has_its_sources_and_weights_and_none_of_weight_zero(tmp_path: Path, model: Path) -> None:
    files = [write(tmp_path / f"{n}.jsonl", {"text": f"{n}={n}"}, {"text": f"{n};{n}"}) for n in (1, 2, 3)]
    given = [{"files": str(file), "weight": weight} for file, weight in zip(files, (3, 0, 1), strict=True)]
    corpus = read(given, model)
    assert [(name, weight) for name, weight, _ in corpus.sources] == [(str(files[0]), 3), (str(files[2]), 1)]
    assert documents(corpus, 1) == ["3=3$", "3;3$"]


def test_other_keys_are_read_alike_and_calibration_falls_back(tmp_path: Path, model: Path) -> None:
    one, other = (write(tmp_path / f"{n}.jsonl", {"text": f"{n}={n}"}) for n in (1, 2))
    section = DataSection(train=str(one), validation=str(other))

    def opened(key: Any) -> list[str]:
        return documents(open_corpus(section, model, 16, seed=0, cache=tmp_path / "cache", key=key))

    assert opened("validation") == ["2=2$"]
    assert opened("calibration") == opened("train") == ["1=1$"]
    with pytest.raises(NestlingError, match=r"\[data\] has no validation"):
        open_corpus(DataSection(train=str(one)), model, 16, seed=0, cache=tmp_path / "cache", key="validation")


# ---- chats

TURNS = "{% for m in messages %}{{ {'user': '+', 'assistant': '-'}[m['role']] }}"
PLAIN = TURNS + "{{ m['content'] }};{% endfor %}{% if add_generation_prompt %}-{% endif %}"
MARKED = (
    TURNS + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }};{% endgeneration %}"
    "{% else %}{{ m['content'] }};{% endif %}{% endfor %}{% if add_generation_prompt %}-{% endif %}"
)
FORGETFUL = PLAIN.replace("{{ m['content'] }}", "{% if loop.last %}={% endif %}{{ m['content'] }}")
CHAT = {
    "messages": [
        {"role": r, "content": c} for r, c in (("user", "1"), ("assistant", "22"), ("user", "3"), ("assistant", "4"))
    ]
}


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["by prefixes", "by marks"])
def test_of_chats_the_assistant_counts(tmp_path: Path, model: Path, template: str) -> None:
    pytest.importorskip("transformers")
    (model / "chat_template.jinja").write_text(template)
    file = write(tmp_path / "x.jsonl", CHAT, {"text": "7=7"})
    corpus = read(file, model, loss_on="assistant")
    assert documents(corpus) == ["+1;-22;+3;-4;", "7=7$"]
    assert learnt(corpus) == "....22;....4;" + "7=7$"
    assert learnt(read(file, model)) == "+1;-22;+3;-4;" + "7=7$"


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = CHATML.replace(
    "{{ m['content'] }}<|im_end|>\n",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}",
)


def test_turns_found_by_prefixes_are_those_that_transformers_finds_by_marks(tmp_path: Path, model: Path) -> None:
    """With merges, text of several bytes a letter and special tokens; the oracle is its assistant mask."""
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    words = ["Hello there", "assistant\n  user ", "naïve café — 日本語", "\n\n", "the the the there"]
    tokenizer.train_from_iterator(words * 5, trainer)
    tokenizer.save(str(model / "tokenizer.json"))
    roles = ["system", "user", "assistant", "user", "assistant"]
    for shift in range(len(words)):
        turns = [{"role": r, "content": words[(i + shift) % len(words)]} for i, r in enumerate(roles)]
        file = write(tmp_path / f"{shift}.jsonl", {"messages": turns})
        (model / "chat_template.jinja").write_text(CHATML)
        chat_module._tokenizer.cache_clear()
        found = read(file, model, vocabulary=400, loss_on="assistant").sources[0][2]
        (model / "chat_template.jinja").write_text(CHATML_MARKED)
        stock = transformers.AutoTokenizer.from_pretrained(model)
        wanted = stock.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        assert found.ids.tolist() == wanted["input_ids"]
        assert found.counted.tolist() == [bool(mark) for mark in wanted["assistant_masks"]]


def test_chats_whose_turns_cannot_be_told_are_refused_with_what_to_do(tmp_path: Path, model: Path) -> None:
    pytest.importorskip("transformers")
    (model / "chat_template.jinja").write_text(FORGETFUL)
    file = write(tmp_path / "x.jsonl", CHAT)
    with pytest.raises(NestlingError, match=r"line 1: .* so that the assistant's turns cannot be told; .*generation"):
        read(file, model, loss_on="assistant", skip_bad=True)
    assert documents(read(file, model)) == ["+1;-22;+3;-=4;"]


def test_a_chat_without_an_assistant_is_bad_only_where_the_assistant_is_learnt_from(
    tmp_path: Path, model: Path
) -> None:
    pytest.importorskip("transformers")
    (model / "chat_template.jinja").write_text(PLAIN)
    file = write(tmp_path / "x.jsonl", CHAT, {"messages": [{"role": "user", "content": "1"}]})
    assert documents(read(file, model))[1] == "+1;"
    with pytest.raises(NestlingError, match="line 2: has no assistant turn"):
        read(file, model, loss_on="assistant")
    assert len(documents(read(file, model, loss_on="assistant", skip_bad=True))) == 1


# ---- bad input


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "line 2: is empty"),
        ("  ", "line 2: is empty"),
        ("{oops", "line 2: not valid JSON"),
        ("[1]", 'line 2: needs an object with a "text" string'),
        ('{"text": 5}', 'line 2: needs an object with a "text" string'),
        ('{"text": ""}', "line 2: has nothing to learn"),
        ('{"text": "one"}', "line 2: has characters that the model's tokenizer does not know"),
        ('{"text": "1;"}', "line 2: token 15 is outside the model's vocabulary of 15"),
        ('{"messages": []}', 'or a list of "messages"'),
    ],
)
def test_a_bad_line_is_refused_with_its_number_or_skipped_and_counted(
    tmp_path: Path, model: Path, line: str, words: str
) -> None:
    file = write(tmp_path / "x.jsonl", {"text": "1+1=2"}, line, {"text": "2=2"})
    with pytest.raises(NestlingError) as caught:
        read(file, model, vocabulary=15)
    assert f"{file}, {words}" in str(caught.value) or words in str(caught.value)
    assert "data.skip_bad = true" in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*"))  # nothing half
    corpus = read(file, model, vocabulary=15, skip_bad=True)
    assert documents(corpus) == ["1+1=2$", "2=2$"]
    (source,) = corpus.summary()["sources"]
    assert source["skipped"] == 1
    assert words.split(": ")[-1] in source["first_skipped"][0]


def test_what_is_not_there_or_of_no_known_kind_is_refused(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "texts.jsonl", {"text": "1=1"})
    with pytest.raises(NestlingError, match=r"text\.jsonl matches no file; did you mean '.*texts\.jsonl'"):
        read(tmp_path / "text.jsonl", model)
    with pytest.raises(NestlingError, match="none/deep/.* matches no file"):
        read(tmp_path / "none" / "deep" / "*.jsonl", model)
    (tmp_path / "x.parquet").touch()
    with pytest.raises(NestlingError, match=r"x\.parquet: cannot be read as text; .*\.jsonl.* dataset = "):
        read(tmp_path / "x.parquet", model)
    with pytest.raises(NestlingError, match=r"bad\.jsonl has no text to learn from; 2 were skipped, the first because"):
        read(write(tmp_path / "bad.jsonl", "x", "y"), model, skip_bad=True)
    with pytest.raises(NestlingError, match=r"empty\.jsonl has no text to learn from$"):
        read(write(tmp_path / "empty.jsonl"), model)
    with pytest.raises(NestlingError, match="has no document left that fits into 2 tokens"):
        read(tmp_path / "texts.jsonl", model, long_documents="drop").batch(0, 1, 2)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "at least 1 item"),
        ([{"files": "a", "weight": 0}, {"files": "b", "weight": 0}], "a blend needs at least one weight above 0"),
        ([{"files": "a", "weight": -1}], "greater than or equal to 0"),
        ({"files": "a", "task": "chain_sum"}, "a source needs one of files, dataset, task"),
        ({"weight": 1}, "a source needs one of files, dataset, task"),
        ({"files": "a", "split": "train"}, "split has no meaning for files"),
    ],
)
def test_a_blend_that_says_nothing_is_refused(given: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DataSection(train=given)


# ---- the cache


def made(said: list[str], *given: Any, **options: Any) -> tuple[list[str], list[str]]:
    """(documents, what was said)."""
    said.clear()
    return documents(read(*given, said=said, **options)), list(said)


def test_tokens_are_made_once_and_again_only_when_something_changed(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, said = write(tmp_path / "x.jsonl", {"text": "1+1=2"}, {"text": "3"}), list[str]()
    times: list[str] = []
    make = module._make
    monkeypatch.setattr(module, "_make", lambda *given: (times.append("made"), make(*given)))
    first = made(said, file, model)
    assert first == (["1+1=2$", "3$"], [])
    assert made(said, file, model) == first
    os.utime(file, (1, 1))
    assert made(said, file, model) == first  # only its time has changed
    assert len(times) == 1
    write(file, {"text": "1+1=3"}, {"text": "3"})
    os.utime(file, (2, 2))
    found, words = made(said, file, model)
    assert found[0] == "1+1=3$"
    assert "was made of other files, or of what they were before; its texts are tokenised again" in words[0]
    assert "was made with other options" in made(said, file, model, skip_bad=True)[1][0]
    assert len(times) == 3


def test_a_cache_by_another_tokenizer_is_made_again_and_that_is_said(tmp_path: Path, model: Path) -> None:
    file, said = write(tmp_path / "x.jsonl", {"text": "1+1=2"}), list[str]()
    made(said, file, model)
    tokenizer = character_tokenizer()
    tokenizer.post_processor = TemplateProcessing(single="; $A", special_tokens=[(";", 15)])
    save_tokenizer(tokenizer, model)
    found, words = made(said, file, model)
    assert found == [";1+1=2$"]
    assert "was made by another tokenizer" in words[0]
    (model / "generation_config.json").write_text('{"eos_token_id": 14}')
    found, words = made(said, file, model)
    assert found == [";1+1=2" + text([14])]
    assert "another chat template or end token" in words[0]


@pytest.mark.parametrize("name", ["ids", "offsets", "counted", "index.json"])
@pytest.mark.parametrize("cut", [0, 3])
def test_a_damaged_cache_is_made_again(tmp_path: Path, model: Path, name: str, cut: int) -> None:
    file, said = write(tmp_path / "x.jsonl", {"text": "1+1=2"}), list[str]()
    first, _ = made(said, file, model)
    (damaged,) = (tmp_path / "cache").glob(f"*/{name}")
    damaged.write_bytes(damaged.read_bytes()[:cut])
    again, words = made(said, file, model)
    assert again == first
    assert name == "index.json" or "is damaged; its texts are tokenised again" in words[0]


def test_a_cache_that_is_interrupted_leaves_nothing(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "x.jsonl", *[{"text": f"{n}={n}"} for n in range(100)])
    monkeypatch.setattr(module, "TOGETHER", 10)
    add, count = module._Writer.add, 0

    def stopping(self: Any, document: Any) -> None:
        nonlocal count
        count += 1
        if count == 35:
            raise KeyboardInterrupt
        add(self, document)

    monkeypatch.setattr(module._Writer, "add", stopping)
    with pytest.raises(KeyboardInterrupt):
        read(file, model)
    assert not (tmp_path / "cache").exists()
    assert len(documents(read(file, model))) == 100


def test_two_processes_that_make_the_same_cache_at_once_both_have_it(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, make = write(tmp_path / "x.jsonl", {"text": "1+1=2"}), module._make

    def late(*given: Any) -> None:
        make(*given)
        raise NestlingError("appeared while this run was writing")

    monkeypatch.setattr(module, "_make", late)
    assert documents(read(file, model)) == ["1+1=2$"]
    monkeypatch.setattr(module, "_make", lambda *given: late(*given[:3], {**given[3], "options": {}}, given[4]))
    with pytest.raises(NestlingError, match="appeared"):  # what is there is something else
        read(write(file, {"text": "2=2"}), model)


def test_a_source_is_read_in_a_stream(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "x.jsonl", *[{"text": f"{n}={n}"} for n in range(100)])
    monkeypatch.setattr(module, "TOGETHER", 10)
    calls: list[int] = []
    encode = module.Encoder.__call__
    monkeypatch.setattr(module.Encoder, "__call__", lambda self, some: (calls.append(len(some)), encode(self, some))[1])
    read(file, model)
    assert calls == [10] * 10
    monkeypatch.setattr(module, "TOGETHER_BYTES", 30)  # a line has 16 bytes or more
    calls.clear()
    read(write(tmp_path / "y.jsonl", *[{"text": f"{n + 10}={n}"} for n in range(9)]), model)
    assert calls == [2, 2, 2, 2, 1]


def test_large_vocabularies_have_room(tmp_path: Path, model: Path) -> None:
    corpus = read(write(tmp_path / "x.jsonl", {"text": "1+1=2"}), model, vocabulary=70_000)
    assert corpus.sources[0][2].ids.dtype == np.uint32
    batch = corpus.batch(0, 1, 5)
    assert text(batch.inputs_BL[0]) + text(batch.targets_BL[0, -1:]) == "1+1=2$"
