"""Calibration data: text or chats in JSON lines, read in a stream, checked before any work is done.

Nothing but one batch is held: a first pass checks and counts every line that will be used, and each pass over the data
reads the files again.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from nestling.errors import NestlingError
from nestling.tokenizer import read_tokenizer, token_ids
from nestling.train.data import padded
from nestling.weights.output import reason

SAMPLES = 1024  # used at most where no number was asked for


@dataclass(frozen=True)
class Source:
    """One file, and its weight: its share of the samples against the other files'."""

    file: Path
    weight: float = 1.0

    @staticmethod
    def parse(text: str) -> "Source":
        """`b.jsonl` or `b.jsonl=0.3`."""
        name, equals, weight = text.rpartition("=")
        if not equals or Path(text).exists():
            return Source(Path(text))
        try:
            value = float(weight)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise NestlingError(f"--data {text}: the weight {weight!r} must be a number above 0, as in b.jsonl=0.3")
        return Source(Path(name), value)


@dataclass(frozen=True)
class Texts:
    """Batches (ids [B, L], real [B, L]), right-padded, of so many samples; every pass over it reads the files anew."""

    sources: tuple[Source, ...]
    encode: Callable[[str, str], list[int]]  # (a line of JSON, where it is) -> at most `length` token ids
    samples: int
    batch: int
    length: int
    taken: tuple[int, ...] = ()  # samples of each source
    tokens: int = 0

    def __len__(self) -> int:
        return -(-self.samples // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = islice((row for _, row in self._mixed()), self.samples)
        while chosen := list(islice(rows, self.batch)):
            yield padded(chosen)

    def _mixed(self) -> Iterator[tuple[int, list[int]]]:
        """(source, token ids), each time of the source furthest behind its share; ends when that one has no more."""
        total, taken = sum(source.weight for source in self.sources), [0] * len(self.sources)
        with ExitStack() as opened:
            streams = [opened.enter_context(closing(self._rows(source.file))) for source in self.sources]
            while True:
                due = [s.weight / total * (sum(taken) + 1) - t for s, t in zip(self.sources, taken, strict=True)]
                index = due.index(max(due))
                if (row := next(streams[index], None)) is None:
                    return
                taken[index] += 1
                yield index, row

    def _rows(self, file: Path) -> Generator[list[int], None, None]:
        """Texts of at least two tokens; fewer have nothing to predict."""
        for where, line in _lines(file):
            if len(row := self.encode(line, where)) > 1:
                yield row

    def to_json(self) -> dict[str, Any]:
        """What was used, for the record."""
        files = [
            {"file": str(source.file), "weight": source.weight, "samples": taken, "sha256": sha256(source.file)}
            for source, taken in zip(self.sources, self.taken, strict=True)
        ]
        return {"data": files, "samples": self.samples, "tokens": self.tokens, "length": self.length}


def open_texts(
    sources: Sequence[Source], directory: Path, vocabulary: int, samples: int | None, length: int, batch: int
) -> Texts:
    """Check every line that will be used, and count; the tokenizer and the chat template are the model directory's.

    samples: exactly so many, or a NestlingError; None: as many as there are, at most `SAMPLES`.
    """
    encode = _encoder(directory, vocabulary, length)
    wanted = Texts(tuple(sources), encode, SAMPLES if samples is None else samples, batch, length)
    taken, tokens = [0] * len(sources), 0
    for index, row in islice(wanted._mixed(), wanted.samples):
        taken[index] += 1
        tokens += len(row)
    files = ", ".join(str(source.file) for source in sources)
    if not sum(taken):
        raise NestlingError(f"{files} has no text of at least two tokens")
    if samples is not None and sum(taken) < samples:
        shares = "" if len(sources) == 1 else " in the proportion asked for"
        raise NestlingError(
            f"{files}: only {sum(taken)} samples of at least two tokens{shares}, {samples} were asked for; "
            f"give more data, or --samples {sum(taken)}"
        )
    return Texts(tuple(sources), encode, sum(taken), batch, length, tuple(taken), tokens)


def _encoder(directory: Path, vocabulary: int, length: int) -> Callable[[str, str], list[int]]:
    tokenizer = read_tokenizer(directory)

    def encode(line: str, where: str) -> list[int]:
        value = _parsed(line, where)
        chat = not isinstance(value.get("text"), str)
        text = _render(directory, value["messages"], where) if chat else value["text"]
        return token_ids(tokenizer, text, vocabulary, where, special=not chat)[:length]

    return encode


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise NestlingError(f"{where}: not valid JSON: {getattr(error, 'msg', error)}") from None
    if not isinstance(value, dict) or not (isinstance(value.get("text"), str) or _is_chat(value.get("messages"))):
        raise NestlingError(f'{where}: needs an object with a "text" string or a list of "messages"')
    return value


def _is_chat(messages: Any) -> bool:
    return isinstance(messages, list) and len(messages) > 0 and all(isinstance(message, dict) for message in messages)


def _render(directory: Path, messages: list[dict[str, Any]], where: str) -> str:
    try:
        return str(_chat_tokenizer(directory).apply_chat_template(messages, tokenize=False))
    except NestlingError:
        raise
    except Exception as error:  # templates are programs, and raise what they like
        raise NestlingError(f"{where}: the model's chat template refuses this: {error}".split("\n")[0]) from None


@cache
def _chat_tokenizer(directory: Path) -> Any:
    try:
        import jinja2  # noqa: F401 - what transformers renders with
        from transformers import AutoTokenizer
    except ImportError:
        raise NestlingError('"messages" need a chat template renderer: pip install "nestling[hf]" jinja2') from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError) as error:
        raise NestlingError(f"{directory} has no tokenizer that transformers can load: {reason(error)}") from None
    if tokenizer.chat_template is None:
        raise NestlingError(f'{directory} has no chat template; give lines with "text" instead of "messages"')
    return tokenizer


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """(where it is, the line) for every line that is not blank."""
    try:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{file}, line {number}"
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError:
                    raise NestlingError(f"{where}: cannot be read: not UTF-8 text") from None
                if text.strip():
                    yield where, text
    except OSError as error:
        raise NestlingError(f"{file}: cannot be read: {reason(error)}") from None


def sha256(file: Path) -> str:
    with open(file, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
