"""Calibration data: text or chats in JSON lines, read in a stream, checked before any work is done.

Nothing but one batch is held: a first pass checks and counts every line that will be used, and each pass over the data
reads the files again.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from nestling.data.batches import padded
from nestling.data.chat import render
from nestling.data.lines import parse, read_lines, sha256
from nestling.errors import NestlingError
from nestling.tokenizer import read_tokenizer, token_ids

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
    encode: Callable[[bytes, str], list[int]]  # (a line of JSON, where it is) -> at most `length` token ids
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
        for where, line in read_lines(file):
            if line.strip() and len(row := self.encode(line, where)) > 1:
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


def _encoder(directory: Path, vocabulary: int, length: int) -> Callable[[bytes, str], list[int]]:
    tokenizer = read_tokenizer(directory)

    def encode(line: bytes, where: str) -> list[int]:
        value = parse(line, where)
        chat = not isinstance(value.get("text"), str)
        text = render(directory, value["messages"], where) if chat else value["text"]
        return token_ids(tokenizer, text, vocabulary, where, special=not chat)[:length]

    return encode
